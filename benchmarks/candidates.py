"""What a parity check has answer the images: each backend and precision, a server, the original in PyTorch.

Owns which of them there are on this machine and how each is opened, and that what has been answered is not asked
again. Knows nothing of labels or statistics.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from thoraxrt.benchmarks import scores
from thoraxrt.benchmarks.environment import Environment
from thoraxrt.benchmarks.receipt import Candidate
from thoraxrt.benchmarks.scores import Header, Scores, Writer
from thoraxrt.benchmarks.scoring import Answer, Answerer, EncodedImage, Item, engine_answerer, score, server_answerer
from thoraxrt.benchmarks.served import Served
from thoraxrt.engine.backends import available, backend_names, choose
from thoraxrt.engine.bundle import Bundle, Manifest
from thoraxrt.engine.decode import Radiograph, decode
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import (
    BackendUnavailableError,
    CheckpointError,
    ImageError,
    RequestError,
    ServerError,
    ThoraxrtError,
)
from thoraxrt.engine.preprocess import network_input
from thoraxrt.export import Track
from thoraxrt.export.checkpoint import checkpoint_sha256
from thoraxrt.export.graph import Normalisation, Reference
from thoraxrt.export.source import Given, read_source
from thoraxrt.server.client import Client
from thoraxrt.server.models import EngineOptions

__all__ = [
    "FP32",
    "TORCH",
    "Run",
    "answered",
    "candidates_from_text",
    "engine_run",
    "runnable",
    "served",
    "served_run",
    "server_run",
    "torch_run",
    "work_key",
]

FP32: Final = Candidate(backend="onnxruntime", precision="fp32", through="engine")
"""The oracle of every bundle."""
TORCH: Final = Candidate(backend="pytorch", precision="fp32", through="torch")

_BATCH: Final = 8

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A candidate, and how to open what answers for it; `identity` is what else its answers hang on.

    `server_version` is that of a server elsewhere. What else it runs on is not known here: its answers are kept for a
    run that was ended, and for no other one.
    """

    candidate: Candidate
    open: Callable[[], AbstractContextManager[Answerer]]
    identity: str = ""
    server_version: str | None = None


def candidates_from_text(text: str) -> tuple[tuple[str, str], ...]:
    """Backends and precisions as the command line names them: `openvino:int8,onnxruntime:fp32`.

    Raises RequestError for anything else; whether they can run is `runnable`'s to say.
    """
    pairs = [tuple(each.strip().split(":")) for each in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise RequestError(f"candidates {text!r}; expected BACKEND:PRECISION, separated by commas, openvino:int8 say")
    return tuple((backend, precision) for backend, precision in dict.fromkeys(pairs))


def runnable(bundle: Bundle, named: Sequence[tuple[str, str]] | None) -> list[Candidate]:
    """The backends and precisions that are `named`; without names, all that the bundle has and this machine can run.

    Raises RequestError or BackendUnavailableError for a named one that cannot run here.
    """
    if named is not None:
        for backend, precision in named:
            choose(bundle, backend, precision)
    else:
        named = [
            (backend, precision)
            for backend in backend_names()
            for precision, reason in available(backend, bundle).items()
            if reason is None
        ]
    if not named:
        raise BackendUnavailableError("no backend can run this bundle here; `thoraxrt info BUNDLE` shows why")
    return [Candidate(backend=backend, precision=precision, through="engine") for backend, precision in named]


def served(bundle: Bundle, candidates: Sequence[Candidate]) -> Candidate:
    """Which of the candidates `thoraxrt serve BUNDLE` would run: the recommended one, else FP32, else the first."""
    recommended = bundle.manifest.recommended
    named = (recommended.backend, recommended.precision) if recommended else None
    return min(candidates, key=lambda each: ((each.backend, each.precision) != named, each.precision != "fp32"))


def engine_run(bundle: Bundle, candidate: Candidate, located: bool) -> Run:
    """In this process."""

    @contextmanager
    def opened() -> Iterator[Answerer]:
        backend, precision = candidate.backend, candidate.precision
        with Engine.open(bundle, backend=backend, precision=precision, batch=_BATCH) as engine:
            yield engine_answerer(engine, located=located)

    return Run(candidate=candidate, open=opened)


def served_run(bundle: Bundle, candidate: Candidate, located: bool) -> Run:
    """Through a server in a process of its own, on loopback, as `thoraxrt serve` runs it."""
    options = EngineOptions(backend=candidate.backend, precision=candidate.precision, trusted=bundle.trusted or None)

    @contextmanager
    def opened() -> Iterator[Answerer]:
        try:
            server = Served(bundle.path, options)
        except RuntimeError as error:
            raise ServerError(f"no server of {bundle.path} could be started on loopback: {error}") from error
        with server, Client(server.address) as client:
            yield server_answerer(client, client.model(), located=located)

    return Run(candidate=msgspec.structs.replace(candidate, through="server"), open=opened)


def server_run(bundle: Bundle, client: Client, located: bool) -> Run:
    """Through a server that runs somewhere. Raises RequestError where it serves another bundle, ServerError."""
    model = client.model()
    if model.manifest_sha256 != bundle.sha256:
        raise RequestError(
            f"{client.address} serves the bundle {model.manifest_sha256[:12]}, expected {bundle.sha256[:12]}: "
            "name a server of this bundle, or its bundle"
        )

    @contextmanager
    def opened() -> Iterator[Answerer]:
        yield server_answerer(client, model, located=located)

    return Run(
        candidate=Candidate(backend=model.backend, precision=model.precision, through="server"),
        open=opened,
        identity=f"{client.address} {model.server_version} {datetime.now(UTC).date()}",
        server_version=model.server_version,
    )


def torch_run(manifest: Manifest, checkpoint: Path, network: str | None) -> tuple[Run, str]:
    """The original as PyTorch loads it, nothing folded, on the same network inputs; and the checkpoint's sha256.

    `network` is `package.module:factory` where the checkpoint is of no known network. Raises CheckpointError, when it
    is opened too, or where its outputs are not this bundle's.
    """
    folded = manifest.normalisation
    given = Given(
        labels=manifest.labels,
        activation=manifest.activation,
        preprocess=manifest.preprocess,
        normalisation=Normalisation(mean=folded.mean, std=folded.std) if folded else None,
        network=network,
    )

    @contextmanager
    def opened() -> Iterator[Answerer]:
        source = read_source(checkpoint, given)
        if len(source.bias) != len(manifest.labels):
            raise CheckpointError(
                f"{checkpoint} has {len(source.bias)} outputs, the bundle {len(manifest.labels)}: "
                "name the checkpoint that it was exported from"
            )
        yield partial(_torch_answers, source.reference, manifest)

    sha256 = checkpoint_sha256(checkpoint)
    return Run(candidate=TORCH, open=opened, identity=f"{sha256} {network}"), sha256


def _torch_answers(
    reference: Reference, manifest: Manifest, images: Iterable[EncodedImage]
) -> Iterator[Answer | ThoraxrtError]:
    coming = iter(images)
    while batch := list(itertools.islice(coming, _BATCH)):
        inputs = [_torch_input(image.data, manifest) for image in batch]
        usable = [each.pixels for each in inputs if isinstance(each, _TorchInput)]
        logits = iter(reference(np.stack(usable)) if usable else ())  # (C,) each
        for each in inputs:
            yield each if isinstance(each, ImageError) else _torch_answer(each, next(logits), manifest)


class _TorchInput(NamedTuple):
    radiograph: Radiograph
    pixels: npt.NDArray[np.uint8]  # (1, S, S)


def _torch_input(data: bytes, manifest: Manifest) -> _TorchInput | ImageError:
    try:
        radiograph = decode(data)
        return _TorchInput(radiograph, network_input(radiograph.pixels, manifest.preprocess))
    except ImageError as error:
        return error


def _torch_answer(given: _TorchInput, logits: npt.NDArray[np.float32], manifest: Manifest) -> Answer:
    return Answer(
        width=given.radiograph.width,
        height=given.radiograph.height,
        logits=logits,
        probabilities=manifest.activation.probabilities(logits),
        boxes=(),
        located=(),
    )


def answered(run: Run, bundle: Bundle, items: Sequence[Item], work: Path, key: str, track: Track) -> Scores:
    """The candidate's answers for all items, in order: those that a folder below `work` has, and the others."""
    header = Header(
        labels=bundle.manifest.labels,
        bundle_sha256=bundle.sha256,
        backend=run.candidate.backend,
        precision=run.candidate.precision,
        through=run.candidate.through,
    )
    name = hashlib.sha256(f"{key} {header} {run.identity}".encode()).hexdigest()[:16]
    folder = work / f"{str(run.candidate).replace(' ', '-')}-{name}"
    with Writer(folder, header) as writer:
        if any(item.image not in writer.done for item in items):
            with run.open() as answerer:
                score(items, answerer, writer, _titled(track, str(run.candidate)))
    found = scores.read(folder)
    if run.server_version is not None:
        shutil.rmtree(folder)
    return found


def work_key(items: Sequence[Item], environment: Environment) -> str:
    """What answers hang on besides the candidate: these very files, these versions, this machine's arithmetic."""
    state = hashlib.sha256()
    for item in items:
        status = item.path.stat()
        state.update(f"{item.image} {item.located} {status.st_size} {status.st_mtime_ns}\n".encode())
    for room in ("engine", "export", "server"):  # a checkout changes without its version
        for file in sorted((Path(__file__).resolve().parents[1] / room).rglob("*.py")):
            state.update(file.read_bytes())
    gpus = [(gpu.name, gpu.driver, gpu.mig) for gpu in environment.gpus]  # not their clocks, which never stand still
    state.update(f"{environment.versions} {environment.cpu} {gpus} {environment.threads}".encode())
    return state.hexdigest()


def _titled(track: Track, title: str) -> Track:
    def titled(items: Iterable[_T], description: str, total: int) -> Iterable[_T]:
        return track(items, title, total)

    return titled
