"""The same network through PyTorch, torch.compile and ONNX Runtime, beside ours: FP16, batch by batch, one process.

The scenario: the network alone on uint8 inputs that lie on the device, which are copied to where each candidate
reads them. Candidates take turns in every round, so that a clock that drifts drifts for all; a ratio is the median
of the rounds' ratios. PyTorch runs as it is used: channels_last, FP16, logits only, without the CAM that ours gives.
`python -m thoraxrt.benchmarks.gpu_peers SAID SECONDS [IMAGES]` reports to the file SAID.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from thoraxrt.benchmarks.gpu import Said
from thoraxrt.benchmarks.gpu_model import BUNDLE, CHECKPOINT, compile_for, pixels
from thoraxrt.engine.backends import tensorrt
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.cuda.pipeline import Network
from thoraxrt.engine.errors import BackendUnavailableError
from thoraxrt.engine.preprocess import network_input
from thoraxrt.export.checkpoint import read_checkpoint
from thoraxrt.export.graph import IMAGENET, Normalisation

__all__ = ["AsTrained", "interleaved_ms", "ratios", "within"]

OURS: Final = "thoraxrt"
PEERS: Final = {
    "PyTorch eager": "ahead of PyTorch eager",
    "torch.compile": "ahead of torch.compile max-autotune",
    "ONNX Runtime": "ahead of ONNX Runtime CUDA",
}
_BATCHES: Final = (32, 1, 128)  # in order of worth: torch.compile takes minutes for each
_CALLS: Final = 10  # a turn
_SETS: Final = 8
_MEASURING_S: Final = 12  # kept back for each batch size, whatever torch.compile takes before

Candidate = Callable[[Tensor], object]
"""Enqueues one inference of uint8 `(N, 1, S, S)` on torch's current stream."""


class AsTrained(nn.Module):
    """The network as a training script would run it: uint8 `(N, 1, S, S)`, normalised, to logits `(N, C)`."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, normalisation: Normalisation = IMAGENET) -> None:
        super().__init__()
        self.network = network.eval().to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", normalisation.mean), ("std", normalisation.std)):
            self.register_buffer(name, torch.tensor(values, dtype=dtype)[None, :, None, None])

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        x = (image.to(self.dtype) / 255 - self.mean) / self.std  # (N, 3, S, S)
        logits: Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return logits


def interleaved_ms(
    candidates: Mapping[str, Candidate], inputs: Sequence[Tensor], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of one call, by candidate and round; inputs take turns, and each turn warms up with a call."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for number in range(rounds):
            for name, candidate in candidates.items():
                candidate(inputs[number % len(inputs)])
                with _timed(inputs[0].device, times[name]):
                    for index in range(_CALLS):
                        candidate(inputs[(number + index) % len(inputs)])
    return times


@contextlib.contextmanager
def _timed(device: torch.device, into: list[float]) -> Iterator[None]:
    """Append a call's share of the block's time: the device's by events, a CPU's by the clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        yield
        into.append(1000 * (time.perf_counter() - began) / _CALLS)
        return
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    yield
    end.record()
    torch.cuda.synchronize()
    into.append(start.elapsed_time(end) / _CALLS)


def ratios(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How many times faster ours is than each other candidate: the median of the rounds' ratios."""
    return {
        name: statistics.median(theirs / own for theirs, own in zip(values, times[OURS], strict=True))
        for name, values in times.items()
        if name != OURS
    }


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has taken so long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it had not ended after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _ours(network: Network, largest: int, size: int, labels: int) -> Callable[[int], Candidate]:
    """For a batch size, our network as a captured graph on torch's stream; binds its addresses, once for all."""
    image = torch.zeros((largest, 1, size, size), dtype=torch.uint8, device="cuda")
    logits = torch.zeros((largest, labels), device="cuda")
    cam = torch.zeros((largest, labels, *network.cam_shape), device="cuda")
    network.bind(image.data_ptr(), logits.data_ptr(), cam.data_ptr())

    def at(batch: int) -> Candidate:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            network.enqueue(batch, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            network.enqueue(batch, torch.cuda.current_stream().cuda_stream)

        def run(inputs: Tensor) -> tuple[Tensor, Tensor]:
            image[:batch].copy_(inputs)
            graph.replay()
            return logits[:batch], cam[:batch]

        return run

    return at


def _onnxruntime(bundle: Bundle, batch: int, labels: int, cam_shape: tuple[int, int]) -> Candidate:
    """ONNX Runtime on the bundle's FP16 graph, bound to torch's memory. Raises BackendUnavailableError."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise BackendUnavailableError("the installed onnxruntime has no CUDA provider")
    session = onnxruntime.InferenceSession(bundle.read(bundle.graph_name("fp16")), providers=["CUDAExecutionProvider"])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise BackendUnavailableError("onnxruntime's CUDA provider does not load here")
    outputs = {"logits": (batch, labels), "cam": (batch, labels, *cam_shape)}
    held = {name: torch.empty(shape, device="cuda") for name, shape in outputs.items()}

    def run(inputs: Tensor) -> None:
        binding = session.io_binding()
        binding.bind_input("image", "cuda", 0, np.uint8, tuple(inputs.shape), inputs.data_ptr())
        for name, tensor in held.items():
            binding.bind_output(name, "cuda", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)

    return run


def main(said: Said, work: Path, seconds: float, folder: Path | None) -> None:
    """Compare at each batch size until the time is used up; what is missing is reported with its reason."""
    end = time.monotonic() + seconds - 15  # for what must be said
    bundle = Bundle.open(work / BUNDLE)
    manifest, spec = bundle.manifest, bundle.manifest.preprocess
    cam_shape = manifest.network.cam_height, manifest.network.cam_width
    drawn = np.stack([network_input(image, spec) for image in pixels(folder, 128)])
    eager = AsTrained(read_checkpoint(work / CHECKPOINT).network, torch.float16).cuda()
    found: dict[str, dict[int, float]] = {name: {} for name in PEERS}
    reasons: dict[str, list[str]] = {name: [] for name in PEERS}
    compile_for(bundle, "fp16", said)
    with contextlib.closing(tensorrt.open(bundle, "fp16")) as backend:
        ours = _ours(backend.network, backend.network.buckets[-1], spec.input_size, len(manifest.labels))
        batches = [batch for batch in _BATCHES if batch in backend.network.buckets]
        for later, batch in zip(reversed(range(len(batches))), batches, strict=True):
            makers: dict[str, Callable[[], Candidate]] = {
                "PyTorch eager": lambda: eager,
                "ONNX Runtime": lambda batch=batch: _onnxruntime(bundle, batch, len(manifest.labels), cam_shape),  # type: ignore[misc]
                "torch.compile": lambda: torch.compile(eager, mode="max-autotune", dynamic=False),
            }
            inputs = [torch.from_numpy(np.roll(drawn, 16 * n, 0)[:batch]).cuda() for n in range(_SETS)]
            candidates = {OURS: ours(batch)}
            for name, make in makers.items():
                print(f"batch {batch}: {name}", flush=True)
                try:
                    with within(end - time.monotonic() - _MEASURING_S * (later + 1)), torch.inference_mode():
                        candidate = make()
                        candidate(inputs[0])
                        candidate(inputs[0])
                        torch.cuda.synchronize()
                except Exception as error:  # whatever it is, it belongs into the report
                    reasons[name].append(f"batch {batch}: {type(error).__name__}: {str(error)[:200]}")
                    print(f"  {reasons[name][-1]}", flush=True)
                else:
                    candidates[name] = candidate
            times = interleaved_ms(candidates, inputs, 15)
            for name, values in times.items():
                said.figure("peers", f"{name}, batch {batch}", "ms", statistics.median(values))
            for name, ratio in ratios(times).items():
                found[name][batch] = ratio
    for name, by_batch in found.items():
        each = [f"batch {batch}: {ratio:.2f} x" for batch, ratio in sorted(by_batch.items())]
        note = "; ".join([*each, *reasons[name]])
        said.figure("peers", PEERS[name], "x", min(by_batch.values()) if by_batch else None, note=note)


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    main(Said(arguments[0]), arguments[0].parent, float(sys.argv[2]), arguments[2] if len(arguments) > 2 else None)
