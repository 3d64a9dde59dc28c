"""Images through what answers them into scores: one pass, in order, in bounded memory.

Owns the *answerer*, the seam by which an engine, a server or anything else comes in. Knows neither where the images
are listed (`thoraxrt.benchmarks.archive`) nor Ray.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from thoraxrt import __version__
from thoraxrt.benchmarks.environment import environment
from thoraxrt.benchmarks.scores import Header, Row, Writer
from thoraxrt.engine.boxes import Box, boxes_from_cam
from thoraxrt.engine.bundle import Bundle, Manifest
from thoraxrt.engine.decode import DecodeLimits, ThreadDecoder
from thoraxrt.engine.engine import Engine, Prediction, read_image
from thoraxrt.engine.errors import ImageError, NotFiniteError, ServerError, ThoraxrtError
from thoraxrt.engine.execute import open_executor
from thoraxrt.export import Track, no_progress
from thoraxrt.server.client import Client
from thoraxrt.server.decoding import ProcessDecoder
from thoraxrt.server.wire import Model

__all__ = [
    "Answer",
    "Answerer",
    "EncodedImage",
    "Item",
    "answered_rows",
    "engine_answerer",
    "engine_header",
    "open_engine",
    "score",
    "server_answerer",
    "versions",
]

_LIMITS: Final = DecodeLimits()
_READERS: Final = ("numpy", "pillow", "opencv-python-headless")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An image to score: its place in the input from 0, the name that stands for it, and the file.

    `located` are the findings whose boxes are wanted whatever their thresholds.
    """

    index: int
    image: str
    path: Path
    located: tuple[str, ...] = ()


class EncodedImage(NamedTuple):
    """What an answerer is given: a file's bytes, and the item's `located`."""

    data: bytes
    located: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """What is said of one image of `width` x `height` pixels, for C labels.

    `logits` is float32 `(C,)`, `probabilities` float64 `(C,)` in 0..1; `boxes` are those of the reported findings, best
    first, `located` those of the findings that were asked for, in pixels of the original image.
    """

    width: int
    height: int
    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float64]
    boxes: tuple[Box, ...]
    located: tuple[Box, ...]


Answerer = Callable[[Iterable[EncodedImage]], Iterable[Answer | ThoraxrtError]]
"""Answers images in order, one each, drawing no more of them ahead than it can hold.

An ImageError is that image's alone; any other error ends the pass.
"""


def score(items: Sequence[Item], answerer: Answerer, writer: Writer, track: Track = no_progress) -> None:
    """Answer the items that are not done, in order, into the writer; no more images are in memory than are in flight.

    A file that cannot be read, or an image that cannot be answered, is a row with its `error`. A name stands for its
    image: of two items of one name the first is scored. Any other error of the answerer is raised, a BackendError say;
    what was answered before it stays, and a further call goes on from there.
    """
    left = sum(item.image not in writer.done for item in items)
    for row in track(answered_rows(items, answerer, writer.done), "Scoring", left):
        writer.write([row])


def answered_rows(items: Iterable[Item], answerer: Answerer, done: Iterable[str] = ()) -> Iterator[Row]:
    """A row for each item whose name is not among `done`, and for no name twice; see `score`."""
    asked: deque[Row] = deque()  # those without an error have been given to the answerer, in order
    for answer in answerer(_encoded(items, set(done), asked)):
        while asked[0].error is not None:
            yield asked.popleft()
        yield _answered(asked.popleft(), answer)
    if any(row.error is None for row in asked):
        raise ValueError("the answerer gave fewer answers than it was given images; expected one each, in order")
    yield from asked


def _encoded(items: Iterable[Item], taken: set[str], asked: deque[Row]) -> Iterator[EncodedImage]:
    """The items' bytes as they are asked for, each noted in `asked`, and there alone where it cannot be read."""
    for item in items:
        if item.image in taken:
            continue
        taken.add(item.image)
        row = Row(index=item.index, image=item.image)
        try:
            data = read_image(item.path)
        except ImageError as error:
            asked.append(replace(row, error=str(error)))
            continue
        row = replace(row, sha256=hashlib.sha256(data).hexdigest())
        try:
            _LIMITS.check_bytes(
                len(data)
            )  # here, for gRPC refuses a file of this size without saying that it is the file
        except ImageError as error:
            asked.append(replace(row, error=str(error)))
            continue
        asked.append(row)
        yield EncodedImage(data, item.located)


def _answered(row: Row, answer: Answer | ThoraxrtError) -> Row:
    if isinstance(answer, (ImageError, NotFiniteError)):
        return replace(row, error=str(answer))
    if isinstance(answer, ThoraxrtError):
        raise answer
    return replace(
        row,
        width=answer.width,
        height=answer.height,
        logits=answer.logits,
        probabilities=answer.probabilities,
        boxes=answer.boxes,
        located=answer.located,
    )


def open_engine(
    bundle: Bundle,
    *,
    backend: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    batch: int = 1,
    workers: int | None = None,
) -> Engine:
    """An engine for files from anywhere: they are decoded in `workers` processes of their own, where that is possible.

    A file that crashes a decoder is then one image with an error, and not the end of every run. For the rest and what
    is raised see `Engine.open`.
    """
    executor = open_executor(bundle, backend, precision, device)
    decoder = ProcessDecoder if sys.platform == "linux" else ThreadDecoder
    return Engine(bundle, executor, decoder(workers, keep_stored=executor.takes_stored), batch=batch)


def engine_header(engine: Engine) -> Header:
    """The header of an open engine's scores."""
    return Header(
        labels=engine.manifest.labels,
        bundle_sha256=engine.bundle.sha256,
        backend=engine.backend,
        precision=engine.precision,
        through="engine",
        versions=versions(engine.backend),
    )


def versions(backend: str) -> dict[str, str]:
    """Of thoraxrt, of what reads images and of the backend's runtime, where installed: with another one numbers move."""
    installed = environment().versions.items()
    used = {name: version for name, version in installed if name in _READERS or name.startswith(backend)}
    return {"thoraxrt": __version__, **used}


def engine_answerer(engine: Engine, *, located: bool = False) -> Answerer:
    """An open engine; with `located`, items may ask for boxes whatever the threshold."""

    def answers(images: Iterable[bytes]) -> Iterator[Prediction | ThoraxrtError]:
        return engine.predict(images, cam=located)

    return partial(_answers, answers, engine.manifest)


def server_answerer(client: Client, model: Model, *, located: bool = False) -> Answerer:
    """A server, as long as it serves `model`; with `located`, items may ask for boxes whatever the threshold."""
    expected = (model.manifest_sha256, model.backend, model.precision)

    def answers(images: Iterable[bytes]) -> Iterator[Prediction | ThoraxrtError]:
        for reply in client.predict_many(images, cam=located):
            if isinstance(reply, ThoraxrtError):
                yield reply
                continue
            found = (reply.manifest_sha256, reply.prediction.backend, reply.prediction.precision)
            if found != expected:
                raise ServerError(
                    f"{client.address} answers with {_named(*found)} by now, expected {_named(*expected)}, with which "
                    "these scores began; serve that again, or take another folder"
                )
            yield reply.prediction

    return partial(_answers, answers, model)


def _named(manifest_sha256: str, backend: str, precision: str) -> str:
    return f"bundle {manifest_sha256[:12]} on {backend} {precision}"


def _answers(
    predict: Callable[[Iterable[bytes]], Iterable[Prediction | ThoraxrtError]],
    model: Manifest | Model,
    images: Iterable[EncodedImage],
) -> Iterator[Answer | ThoraxrtError]:
    asked: deque[tuple[str, ...]] = deque()

    def data() -> Iterator[bytes]:
        for image in images:
            asked.append(image.located)
            yield image.data

    for prediction in predict(data()):
        wanted = asked.popleft()
        yield prediction if isinstance(prediction, ThoraxrtError) else _answer(prediction, wanted, model)


def _answer(prediction: Prediction, wanted: Sequence[str], model: Manifest | Model) -> Answer:
    logits = np.array([finding.logit for finding in prediction.findings], np.float32)  # (C,)
    return Answer(
        width=prediction.width,
        height=prediction.height,
        logits=logits,
        probabilities=np.array([finding.probability for finding in prediction.findings], np.float64),
        boxes=prediction.boxes,
        located=tuple(box for finding in wanted for box in _located(prediction, finding, logits, model)),
    )


def _located(
    prediction: Prediction, finding: str, logits: npt.NDArray[np.float32], model: Manifest | Model
) -> list[Box]:
    """One finding's boxes, by what `Engine` does where it is reported."""
    assert prediction.cam is not None, "boxes are asked for of an answerer that was made without located=True"
    index = model.labels.index(finding)
    return boxes_from_cam(
        prediction.cam[index],
        finding=finding,
        bias=float(model.activation.local_biases(model.network.bias, logits)[index]),
        spec=model.boxes,
        geometry=model.preprocess.geometry(prediction.width, prediction.height),
        probability=partial(model.activation.probability, index=index),
    )
