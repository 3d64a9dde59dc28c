"""How fast the engine is on this GPU: each stage alone, and decoded pixels to findings and boxes.

Device times come from events, medians over repeats after a warm-up; inputs rotate, so that no figure is that of
one buffer in the cache. Beside each stands its floor by this card's own ceilings, measured here first: a large
copy on the device (bytes read and written counted), a large FP16 product, a large copy from page-locked memory.
`python -m thoraxrt.benchmarks.gpu_speed SAID SECONDS [IMAGES]` reports to the file SAID.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from thoraxrt.benchmarks.gpu import Said
from thoraxrt.benchmarks.gpu_kernels import DeviceBatch, fewest_bytes
from thoraxrt.benchmarks.gpu_model import BUCKETS, BUNDLE, CHECKPOINT, compile_for, pixels
from thoraxrt.benchmarks.gpu_timing import (
    LARGE,
    copy_to_device_gb_s,
    images_per_second,
    kernel_milliseconds,
    latencies_ms,
    network_milliseconds,
)
from thoraxrt.benchmarks.gpu_torch import TorchLoaded
from thoraxrt.engine.backends import tensorrt
from thoraxrt.engine.backends.onnxruntime import open as open_onnxruntime
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.cuda.cuda import Gpu
from thoraxrt.engine.cuda.executor import PipelineExecutor
from thoraxrt.engine.cuda.kernels import source
from thoraxrt.engine.decode import Radiograph, ThreadDecoder
from thoraxrt.engine.engine import Engine, Prediction
from thoraxrt.engine.errors import ThoraxrtError
from thoraxrt.engine.preprocess import network_input
from thoraxrt.engine.profile import Profile
from thoraxrt.export.checkpoint import read_checkpoint
from thoraxrt.export.graph import IMAGENET, ServedNetwork
from thoraxrt.export.networks import CxrNetwork, DenseNet

__all__ = ["Ceilings", "Work", "ceilings", "network_work"]

_SETS: Final = 4  # batches that the kernels rotate among: 4 x 32 MiB do not fit the L2 either


# --- ceilings and floors ---------------------------------------------------------------------------


class Work(NamedTuple):
    """What one image takes through the convolutions of a network: operations, weights and activations."""

    operations: int
    weights: int
    activations: int
    """Elements that layers read and write, each layer's input once and its output once."""

    def floor_ms(self, batch: int, operations_per_s: float, bytes_per_s: float, item: int = 2) -> float:
        """The least time of a batch, where nothing is recomputed and convolutions are not fused with each other."""
        moved = (self.weights + batch * self.activations) * item
        return 1000 * max(batch * self.operations / operations_per_s, moved / bytes_per_s)


def network_work(network: CxrNetwork, size: int) -> Work:
    """Count what a network does, at an input of `size` pixels a side, without computing it."""
    served = ServedNetwork(network, IMAGENET, size).to("meta")
    operations, activations = 0, 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal operations, activations
        assert isinstance(module, nn.Conv2d)
        operations += 2 * output[0].numel() * module.weight[0].numel()
        activations += inputs[0][0].numel() + output[0].numel()

    for module in served.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        served(torch.zeros(1, 1, size, size, dtype=torch.uint8, device="meta"))
    return Work(operations, sum(weight.numel() for weight in served.parameters()), activations)


class Ceilings(NamedTuple):
    """What this card does at best, measured: bytes per second on it and to it, FP16 operations per second."""

    copy: float
    to_device: float
    fp16: float


def _torch_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """The median device time of a call to torch, by events."""
    event: Any = torch.cuda.Event
    events = [[event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 3)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in events[3:])) / 1000


def ceilings(gpu: Gpu) -> Ceilings:
    """Measure them; on random values, since zeros can be faster."""
    found = Ceilings(_copy_on_the_device(), 1e9 * copy_to_device_gb_s(gpu), _fp16_product())
    torch.cuda.empty_cache()
    return found


def _copy_on_the_device() -> float:
    here, there = (torch.randint(0, 255, (4 * LARGE,), dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * len(here) / _torch_seconds(lambda: there.copy_(here))


def _fp16_product(side: int = 8192) -> float:
    a, b = (torch.randn(side, side, dtype=torch.float16, device="cuda") for _ in range(2))
    return 2 * side**3 / _torch_seconds(lambda: a @ b)


# --- the part --------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """An FP16 network to measure: what its figures are called, the backend, and the engine at a batch size."""

    prefix: str
    captured: bool
    open: Callable[[], Any]
    engine: Callable[[int, Profile | None], Engine]


def _tensorrt(said: Said, bundle: Bundle) -> _Candidate:
    """As a user opens it. Raises BackendError where TensorRT runs no plan here."""
    compile_for(bundle, "fp16", said)
    tensorrt.open(bundle, "fp16").close()

    def engine(batch: int, profile: Profile | None) -> Engine:
        return Engine.open(bundle, backend="tensorrt", precision="fp16", device="cuda:0", batch=batch, profile=profile)

    return _Candidate("", True, lambda: tensorrt.open(bundle, "fp16"), engine)


def _pytorch(bundle: Bundle, checkpoint: Path) -> _Candidate:
    def load() -> TorchLoaded:
        return TorchLoaded(read_checkpoint(checkpoint).network, bundle, BUCKETS)

    def engine(batch: int, profile: Profile | None) -> Engine:
        executor = PipelineExecutor(load(), bundle.manifest, profile or Profile())
        return Engine(bundle, executor, ThreadDecoder(), batch=batch)

    return _Candidate("PyTorch in TensorRT's place: ", False, load, engine)


def _network_alone(
    said: Said, bundle: Bundle, loaded: Any, name: str, inputs: npt.NDArray[np.uint8], best: Ceilings, captured: bool
) -> float:
    """Report the network alone at each bucket; gives its best rate in images per second."""
    labels = len(bundle.manifest.labels)
    times = network_milliseconds(loaded.gpu, loaded.network, inputs, labels, 200, captured=captured)
    work = network_work(DenseNet(num_classes=labels), bundle.manifest.preprocess.input_size)
    half = loaded.precision == "fp16"  # whose ceilings were measured
    medians = {bucket: statistics.median(time.device) for bucket, time in times.items()}
    for bucket, ms in medians.items():
        said.figure(
            *("speed", f"{name}, batch {bucket}, p50", "ms", ms),
            floor=f"{work.floor_ms(bucket, best.fp16, best.copy):.3f} ms" if half else "",
            note=f"launch to result {statistics.median(times[bucket].waited_for):.3f} ms",
        )
    batch = max(medians, key=lambda bucket: bucket / medians[bucket])
    rate = 1000 * batch / medians[batch]
    floor = 1000 * batch / work.floor_ms(batch, best.fp16, best.copy)
    said.figure(
        *("speed", f"{name}, best batch", "images/s", rate),
        floor=f"{floor:,.0f} images/s" if half else "",
        note=f"batch {batch}",
    )
    return rate


def _executed_types(layers: str) -> dict[str, int]:
    """How many fused layers read each type, by TensorRT's own account: whether INT8 is executed as INT8."""
    counts: Counter[str] = Counter()
    for layer in json.loads(layers).get("Layers", ()):
        if isinstance(layer, dict):
            counts[", ".join(sorted({str(tensor.get("Format/Datatype")) for tensor in layer.get("Inputs", ())}))] += 1
    return dict(counts)


def _kernels(said: Said, gpu: Gpu, bundle: Bundle, images: Sequence[npt.NDArray[np.uint8]], best: Ceilings) -> None:
    """Report both kernels at batch 32, on the CAMs that the network makes of these images."""
    spec, boxes = bundle.manifest.preprocess, bundle.manifest.boxes
    with contextlib.closing(open_onnxruntime(bundle, "fp32")) as oracle:
        inputs = np.stack([network_input(image, spec) for image in images[:32]])
        cams = np.asarray(oracle.run(inputs).cam, np.float32)  # (32, C, h, w)
    module = gpu.module(source())
    groups = [images[32 * index : 32 * index + 32] for index in range(_SETS)]
    batches = [
        DeviceBatch(gpu, module, group, np.roll(cams, index, 0), spec, boxes) for index, group in enumerate(groups)
    ]
    for batch in batches:
        batch.run()
    moved = fewest_bytes(groups[0], spec)
    geometry = statistics.median(kernel_milliseconds(gpu, batches, "geometry", 50))
    said.figure(
        *("speed", "geometry, batch 32 resident", "% of copy bandwidth", 100 * moved / (geometry / 1000) / best.copy),
        floor=f"{1000 * moved / best.copy:.3f} ms",
        note=f"{geometry:.3f} ms for {moved / 1e6:.1f} MB",
    )
    time_of_boxes = statistics.median(kernel_milliseconds(gpu, batches, "boxes", 50))
    said.figure(
        *("speed", f"boxes, batch 32 x {cams.shape[1]} maps", "ms", time_of_boxes),
        floor=f"{1000 * cams.nbytes / best.copy:.4f} ms for the maps' bytes; else one launch",
    )
    for batch in batches:
        batch.close()


def _whole(
    said: Said,
    candidate: _Candidate,
    radiographs: Sequence[Radiograph],
    network: float | None,
    best: Ceilings,
) -> None:
    """Report decoded pixels to findings and boxes, through the engine."""
    name = f"{candidate.prefix}pixels to findings and boxes"
    with candidate.engine(1, None) as engine:
        times = latencies_ms(lambda one: _checked(engine.predict_batch([one])), radiographs, 1000)
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    said.figure("speed", f"{name}, batch 1, p50", "ms", p50)
    said.figure("speed", f"{name}, batch 1, p99", "ms", p99)
    rates = {}
    for batch in (32, 64, 128):
        with candidate.engine(batch, None) as engine:
            rates[batch] = images_per_second(engine.predict, radiographs, 4.0)
        said.figure("speed", f"{name}, batch {batch}", "images/s", rates[batch])
    copied = best.to_device / statistics.mean(radiograph.pixels.nbytes for radiograph in radiographs)
    batch, rate = max(rates.items(), key=lambda item: item[1])
    said.figure(
        *("speed", f"{name}, best batch", "% of the slower of network and copy"),
        100 * rate / min(copied, network) if network else None,
        floor=f"network {network:,.0f}, copy {copied:,.0f} images/s" if network else "",
        note=f"batch {batch}: {rate:,.0f} images/s" + ("" if network else "; the network alone was not measured"),
    )
    for batch in (1, 32):  # where the time goes: with a profile nothing is captured, so the sum is more
        with candidate.engine(batch, profile := Profile()) as engine:
            for _ in range(20):
                _checked(engine.predict_batch(radiographs[:batch]))
        stages = {f"{stage.lane} {stage.stage}": round(stage.p50_ms, 4) for stage in profile.stages()}
        said.fact(**{f"stages_batch_{batch}_p50_ms": stages})


def _checked(answers: Sequence[Prediction | ThoraxrtError]) -> None:
    for answer in answers:
        if isinstance(answer, ThoraxrtError):
            raise answer


def main(said: Said, work: Path, folder: Path | None) -> None:
    """Measure everything; a stage that fails is reported with its reason, and the others go on."""
    bundle = Bundle.open(work / BUNDLE)
    images = pixels(folder, 32 * _SETS)
    failed: list[str] = []

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        print(name, flush=True)
        try:
            yield
        except Exception as error:  # whatever it is, it belongs into the report
            failed.append(f"{name}: {type(error).__name__}: {error}")
            print(f"  failed: {failed[-1]}", flush=True)

    network: float | None = None
    with Gpu.open(0) as gpu:
        print("ceilings", flush=True)
        best = ceilings(gpu)
        said.figure("speed", "ceiling: copy on the device", "GB/s", best.copy / 1e9)
        said.figure("speed", "ceiling: copy to the device", "GB/s", best.to_device / 1e9)
        said.figure("speed", "ceiling: FP16 product", "TFLOP/s", best.fp16 / 1e12)
        with stage("kernels"):
            _kernels(said, gpu, bundle, images, best)
    inputs = np.stack([network_input(image, bundle.manifest.preprocess) for image in images])
    inputs = np.concatenate([inputs, inputs[::-1]])  # more than the largest bucket, so that batches differ
    candidate = None
    with stage("TensorRT"):
        candidate = _tensorrt(said, bundle)
    candidate = candidate or _pytorch(bundle, work / CHECKPOINT)
    with stage(f"{candidate.prefix}network alone, fp16"), contextlib.closing(candidate.open()) as loaded:
        name = f"{candidate.prefix}network alone, fp16"
        network = _network_alone(said, bundle, loaded, name, inputs, best, candidate.captured)
    radiographs = [Radiograph.from_pixels(image) for image in images]
    with stage(f"{candidate.prefix}pixels to findings and boxes"):
        _whole(said, candidate, radiographs, network, best)
    if candidate.captured:
        with stage("network alone, int8"):
            compile_for(bundle, "int8", said)
            with contextlib.closing(tensorrt.open(bundle, "int8")) as loaded:
                _network_alone(said, bundle, loaded, "network alone, int8", inputs, best, True)
                said.fact(int8_layers=_executed_types(loaded.network.layers()))
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    main(Said(arguments[0]), arguments[0].parent, arguments[2] if len(arguments) > 2 else None)
