"""The same network through other runtimes, beside ours: same inputs, same process, in turn, round by round.

The scenario: the network alone, uint8 inputs in memory to logits in memory, a batch at a time, on the CPU. Every
answer is compared with FP32's first. `thoraxrt.benchmarks.gpu_peers` does the same on a GPU, TensorRT included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.gpu_peers import AsTrained, within
from thoraxrt.benchmarks.precisions import all_logits
from thoraxrt.benchmarks.rounds import Rounds, interleaved, median_interval, speed_ups
from thoraxrt.engine.backends import available, backend_names, open_backend
from thoraxrt.engine.bundle import Agreement, Bundle
from thoraxrt.engine.errors import RequestError
from thoraxrt.export import Track, no_progress
from thoraxrt.export.agreement import agreement, agreement_text
from thoraxrt.export.checkpoint import read_checkpoint
from thoraxrt.export.graph import IMAGENET, Normalisation

__all__ = ["REFERENCE", "Candidate", "Peer", "compare_peers", "engine_candidates", "race"]

REFERENCE: Final = "onnxruntime fp32"
"""The peer whose answers are right and whose time the others are held against."""
Candidate = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
"""The network's float32 logits `(N, C)` for uint8 `(N, 1, S, S)`."""


class Peer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to run the network in batches of `batch`.

    `reason` says why it has no times: it does not run here, or its answers are not FP32's within the bar of
    `thoraxrt.export.agreement`; None where it has. `speed_up` is the median over the rounds of REFERENCE's time by its
    own, `interval` that median's distribution-free one, None with fewer than 6 rounds.
    """

    name: str
    batch: int
    reason: str | None
    agreement: Agreement | None
    rounds: Rounds | None
    speed_up: float | None
    interval: Interval | None


def compare_peers(
    bundle: Bundle,
    inputs: Sequence[npt.NDArray[np.uint8]],
    *,
    batch: int,
    rounds: int = 25,
    checkpoint: Path | None = None,
    track: Track = no_progress,
) -> tuple[Peer, ...]:
    """Each backend and precision that the engine has here, the CPU runtimes with their defaults, and PyTorch.

    `inputs` are network inputs, uint8 `(1, S, S)` each, at least `batch`. PyTorch runs the network of `checkpoint`,
    normalised as the bundle's, eager and compiled; without one the reason says so. Raises BackendError where ONNX Runtime
    is missing, RequestError where there are too few inputs.
    """
    with contextlib.ExitStack() as opened:
        makers = {**engine_candidates(bundle, opened), **_others(bundle, checkpoint)}
        return race(makers, inputs, bundle, batch=batch, rounds=rounds, track=track)


def race(
    makers: Mapping[str, Callable[[], Candidate]],
    inputs: Sequence[npt.NDArray[np.uint8]],
    bundle: Bundle,
    *,
    batch: int,
    rounds: int,
    track: Track = no_progress,
) -> tuple[Peer, ...]:
    """Open every candidate, REFERENCE among them, hold its answers against REFERENCE's, and time those that are right."""
    if len(inputs) < batch:
        raise RequestError(f"{len(inputs)} inputs for batches of {batch}: expected at least one batch of them")
    reference = all_logits(makers[REFERENCE](), inputs, batch)
    timed = np.stack(inputs[:batch])  # (N, 1, S, S)
    works: dict[str, Callable[[], object]] = {}
    reasons: dict[str, str] = {}
    agreements: dict[str, Agreement] = {}
    for name, make in track(makers.items(), "Opening", len(makers)):
        try:
            with within(_OPENING_S):
                candidate = make()
                logits = all_logits(candidate, inputs, batch)
        except Exception as error:  # other people's runtimes; whatever it is, it belongs into the report
            reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        close = agreement(logits, reference, bundle.manifest.activation, bundle.manifest.labels, None)
        agreements[name] = close
        if close.meets_bar:
            works[name] = partial(candidate, timed)
        else:
            reasons[name] = f"wrong answers: {agreement_text(close)}"
    found = interleaved(works, rounds, track)
    peers = []
    for name in makers:
        own = found.get(name)
        ratio, interval = median_interval(speed_ups(found[REFERENCE], own)) if own else (None, None)
        peers.append(
            Peer(
                name=name,
                batch=batch,
                reason=reasons.get(name),
                agreement=agreements.get(name),
                rounds=own,
                speed_up=ratio,
                interval=interval,
            )
        )
    return tuple(peers)


_OPENING_S: Final = 180  # torch.compile takes the longest, a minute or two for a DenseNet-121


# --- the candidates --------------------------------------------------------------------------------


def engine_candidates(bundle: Bundle, opened: contextlib.ExitStack) -> dict[str, Callable[[], Candidate]]:
    """What opens each backend and precision that runs this bundle here, as the engine does; `opened` closes them."""

    def make(name: str, precision: str) -> Candidate:
        backend = open_backend(bundle, name, precision)
        opened.callback(backend.close)
        return lambda images: backend.run(images).logits

    return {
        f"{name} {precision}": partial(make, name, precision)
        for name in backend_names()
        for precision, reason in available(name, bundle).items()
        if reason is None
    }


def _others(bundle: Bundle, checkpoint: Path | None) -> dict[str, Callable[[], Candidate]]:
    """The runtimes as their documentation's first example has it, on the FP32 graph, and PyTorch."""
    return {
        "onnxruntime, defaults": lambda: _onnxruntime(bundle),
        "openvino, defaults": lambda: _openvino(bundle),
        "PyTorch eager": lambda: _from_torch(_as_trained(bundle, checkpoint)),
        "torch.compile": lambda: _from_torch(torch.compile(_as_trained(bundle, checkpoint), dynamic=False)),
    }


def _onnxruntime(bundle: Bundle) -> Candidate:
    import onnxruntime

    session = onnxruntime.InferenceSession(bundle.path / bundle.graph_name("fp32"))
    return lambda images: session.run(["logits"], {"image": images})[0]


def _openvino(bundle: Bundle) -> Candidate:
    import openvino

    compiled = openvino.Core().compile_model(bundle.path / bundle.graph_name("fp32"), "CPU")
    return lambda images: compiled([images])["logits"].copy()


def _as_trained(bundle: Bundle, checkpoint: Path | None) -> nn.Module:
    """The checkpoint's network, normalisation before it. Raises RequestError, CheckpointError."""
    if checkpoint is None:
        raise RequestError("PyTorch needs the network's checkpoint, and none was given")
    folded = bundle.manifest.normalisation
    normalisation = Normalisation(mean=folded.mean, std=folded.std) if folded else IMAGENET
    return AsTrained(read_checkpoint(checkpoint).network, torch.float32, normalisation)


def _from_torch(network: Callable[[torch.Tensor], torch.Tensor]) -> Candidate:
    def logits(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            found: npt.NDArray[np.float32] = network(torch.from_numpy(images)).numpy()
        return found

    return logits
