"""The story: bytes to radiograph to network input to raw outputs to findings and boxes.

Owns the order of the steps and the overlap of decoding with the network. Each step is a module
of its own, named as the step; geometry, network and the regions of boxes run where
`thoraxrt.engine.execute` has been told to.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from thoraxrt.engine.boxes import Box, boxes_from_regions, sort_boxes
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import Decoder, Radiograph, ThreadDecoder, decode
from thoraxrt.engine.errors import (
    BackendError,
    DatasetError,
    ImageError,
    ImageFormatError,
    RequestError,
    ThoraxrtError,
)
from thoraxrt.engine.execute import (
    DeviceMemory,
    DeviceRadiograph,
    Executor,
    NetworkInput,
    Output,
    Pending,
    Picture,
    geometry_of,
    open_executor,
)
from thoraxrt.engine.postprocess import Finding, findings_from_logits, thresholds
from thoraxrt.engine.profile import Profile, span

__all__ = ["Batch", "Engine", "Prediction", "Source", "image_files", "listed_images", "read_image", "read_radiograph"]

Source = bytes | str | Path | Picture
"""An image: encoded bytes, a file's path, or a radiograph already decoded, in host memory or in a GPU's."""

_T = TypeVar("_T")

_AHEAD = 8
"""Images decoded ahead of the network, so that memory stays bounded however many are asked for."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What the engine says of one image of `width` x `height` pixels.

    `precision` and `backend` are what was executed. `findings` has every label, in order;
    `boxes` those of the reported findings, best first. `cam` is float32 `(C, h, w)` where it was
    asked for; `radiograph` the decoded image, where the engine decoded it in this process.
    """

    width: int
    height: int
    precision: str
    backend: str
    findings: tuple[Finding, ...]
    boxes: tuple[Box, ...]
    cam: npt.NDArray[np.float32] | None = None
    radiograph: Radiograph | None = None

    def to_dict(self) -> dict[str, Any]:
        """The public JSON shape, without `image`: nothing is rounded, no pixels are in it."""
        names = ("width", "height", "precision", "backend", "findings", "boxes")
        return {name: msgspec.to_builtins(getattr(self, name)) for name in names}


class Engine:
    """A bundle's network, open on one backend.

    Example:
        with Engine.open("chexnet.bundle") as engine:
            for prediction in engine.predict(["a.png", "b.dcm"]):
                ...

    `predict` may be called from one thread at a time; a server owns one engine per worker.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: Executor,
        decoder: Decoder,
        *,
        batch: int = 1,
        profile: Profile | None = None,
    ) -> None:
        if batch < 1:
            raise RequestError(f"batch size {batch}: expected at least 1")
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.decoder = decoder
        self.batch = batch
        self._executor = executor
        self._profile = profile
        self._thresholds = thresholds(self.manifest.operating_points, self.manifest.activation)
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        backend: str | None = None,
        precision: str | None = None,
        device: str | None = None,
        batch: int = 1,
        decoder: Decoder | None = None,
        fall_back: bool = False,
        profile: Profile | None = None,
    ) -> Self:
        """Open a bundle: the named backend, precision and device, else the manifest's recommended, else FP32.

        `device` is "cpu", "cuda" or "cuda:N". `batch` is the most images the network takes at once in
        `predict`; `decoder` is closed with the engine. A GPU that is lost is opened again, and with
        `fall_back` replaced by the CPU (at FP32) where that fails. `profile` gets every stage's time.
        Raises BundleError, RequestError, BackendUnavailableError or BackendError.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        executor = open_executor(bundle, backend, precision, device, fall_back=fall_back, profile=profile)
        decoder = decoder or ThreadDecoder(keep_stored=executor.takes_stored, profile=profile)
        return cls(bundle, executor, decoder, batch=batch, profile=profile)

    @property
    def backend(self) -> str:
        """The backend that executes the network."""
        return self._executor.backend

    @property
    def precision(self) -> str:
        """The precision that is executed: fp32, bf16, fp16 or int8."""
        return self._executor.precision

    @property
    def buckets(self) -> tuple[int, ...]:
        """The batch sizes that the network runs at, ascending; empty where it runs at any."""
        return self._executor.buckets

    @property
    def ahead(self) -> int:
        """Batches worth starting before the first one's result is asked for."""
        return self._executor.ahead

    def predict(
        self, images: Iterable[Source], *, findings: Collection[str] | None = None, cam: bool = False
    ) -> Iterator[Prediction | ThoraxrtError]:
        """One answer per image, in order: a Prediction, or the error that this image met.

        Decoding runs ahead of the network in the decoder's workers, and on a GPU one batch ahead of the
        next. `findings` limits which reported findings get boxes; `cam` keeps each image's CAMs.
        Raises RequestError for an unknown finding.
        """
        self.check_findings(findings)
        decoding = _ahead((self.submit(image) for image in images), 2 * self.batch + _AHEAD)
        decoded = ([_result(future) for future in batch] for batch in _batches(decoding, self.batch))
        started = (self.start(batch, [findings] * len(batch), cam=cam) for batch in decoded)
        for batch in _ahead(started, self.ahead):
            yield from batch.result()

    def predict_one(self, image: Source, *, findings: Collection[str] | None = None, cam: bool = False) -> Prediction:
        """The prediction for one image; see `predict`. Raises what `predict` would yield."""
        (answer,) = self.predict([image], findings=findings, cam=cam)
        if isinstance(answer, ThoraxrtError):
            raise answer
        return answer

    def predict_batch(
        self, pictures: Sequence[Picture], *, findings: Collection[str] | None = None, cam: bool = False
    ) -> list[Prediction | ThoraxrtError]:
        """One batch of radiographs already decoded: an answer each, in order."""
        return self.start(pictures, [findings] * len(pictures), cam=cam).result()

    def start(
        self, pictures: Sequence[Picture | ThoraxrtError], findings: Sequence[Collection[str] | None], *, cam: bool
    ) -> Batch:
        """Hand a batch to the executor; `findings` are each image's, see `predict`.

        On a GPU it is then in flight, and `ahead` more are worth starting before its result is asked for; a
        CPU has computed it. An error in a picture's place is its answer. Raises BackendError where the
        engine is closed.
        """
        self._check_open()
        usable = [i for i, picture in enumerate(pictures) if not isinstance(picture, ThoraxrtError)]
        labels = self.manifest.labels
        masks = {id(chosen): [chosen is None or label in chosen for label in labels] for chosen in findings}
        wanted = np.array([masks[id(findings[i])] for i in usable], np.bool_)  # (N, C)
        given: list[Picture] = [pictures[i] for i in usable]  # type: ignore[misc]  # no errors among them
        pending = self._executor.submit(given, wanted, cam) if given else None
        return Batch(self, pictures, pending, self.backend, self.precision)

    def _prediction(self, batch: Batch, picture: Picture, output: Output | ThoraxrtError) -> Prediction | ThoraxrtError:
        if isinstance(output, ThoraxrtError):
            return output
        manifest = self.manifest
        answers = findings_from_logits(output.logits, manifest.operating_points, manifest.activation, self._thresholds)
        return Prediction(
            width=picture.width,
            height=picture.height,
            precision=batch.precision,
            backend=batch.backend,
            findings=answers,
            boxes=self._boxes(picture, answers, output),
            cam=output.cam,
            radiograph=picture if isinstance(picture, Radiograph) else None,
        )

    def _boxes(self, picture: Picture, answers: Sequence[Finding], output: Output) -> tuple[Box, ...]:
        """The boxes of what is reported, best first.

        A score is the activation of the image's logits with the finding's own replaced by its local
        logit at the peak.
        """
        if not output.regions:
            return ()
        manifest = self.manifest
        biases = manifest.activation.local_biases(manifest.network.bias, output.logits)
        geometry = geometry_of(picture, manifest.preprocess)
        boxes = [
            box
            for index, regions in itertools.groupby(output.regions, key=lambda pair: pair[0])
            if answers[index].reported
            for box in boxes_from_regions(
                [region for _, region in regions],
                finding=answers[index].finding,
                bias=float(biases[index]),
                spec=manifest.boxes,
                geometry=geometry,
                probability=partial(manifest.activation.probability, index=index),
            )
        ]
        return tuple(sort_boxes(boxes))

    def submit(self, image: Source) -> Future[Picture]:
        """Start decoding an image; the future holds its radiograph or its ImageError.

        Raises BackendError where the engine is closed.
        """
        self._check_open()
        future: Future[Any] = Future()
        try:
            if isinstance(image, (Radiograph, DeviceRadiograph, NetworkInput)):
                future.set_result(image)
            else:
                data = image if isinstance(image, bytes) else read_image(Path(image))
                future = self.decoder.submit(data)
        except ImageError as error:
            future.set_exception(error)
        return future

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("the engine is closed; open it again")

    def check_findings(self, findings: Collection[str] | None) -> None:
        """Raise RequestError where `findings` names something that the model does not answer."""
        unknown = sorted(set(findings or ()) - set(self.manifest.labels))
        if unknown:
            raise RequestError(
                f"unknown finding {', '.join(unknown)}; this model knows {', '.join(self.manifest.labels)}"
            )

    def device_memory(self) -> DeviceMemory | None:
        """The memory of the GPU that it runs on; None on a CPU. Raises DeviceError where that is lost."""
        return self._executor.device_memory()

    def close(self) -> None:
        """Stop the decoder's workers and free the network; closing twice is harmless."""
        self._closed = True
        self.decoder.close()
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Batch:
    """A batch that `Engine.start` has handed to the executor; `backend` and `precision` are what executes it."""

    def __init__(
        self,
        engine: Engine,
        pictures: Sequence[Picture | ThoraxrtError],
        pending: Pending | None,
        backend: str,
        precision: str,
    ) -> None:
        self._engine = engine
        self._pictures = pictures
        self._pending = pending
        self.backend = backend
        self.precision = precision

    def result(self) -> list[Prediction | ThoraxrtError]:
        """Wait for the batch: an answer per image, in order."""
        outputs = iter(self._pending.result() if self._pending else ())
        with span(self._engine._profile, "engine", "findings", images=len(self._pictures)):
            return [
                picture
                if isinstance(picture, ThoraxrtError)
                else self._engine._prediction(self, picture, next(outputs))
                for picture in self._pictures
            ]


def image_files(folder: Path) -> list[Path]:
    """The PNG, JPEG and DICOM files in a folder and those below it, by their suffix, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".dcm"))


def listed_images(file: Path, expected: str) -> list[str]:
    """The paths that a text file names, one per line, as they stand there; they start at the file's own folder.

    Raises DatasetError, with what was `expected` in the file's place, where it cannot be read or is no text.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{file} cannot be read ({error.strerror}); {expected}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is no text; {expected}") from error
    if "\0" in text:
        raise DatasetError(f"{file} is no text; {expected}")
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_image(path: Path) -> bytes:
    """An image file's bytes. Raises ImageFormatError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageFormatError(f"{path.name} cannot be read: {error.strerror}") from error


def read_radiograph(path: Path) -> Radiograph:
    """The radiograph in an image file. Raises ImageError, which names the file."""
    data = read_image(path)
    try:
        return decode(data)
    except ImageError as error:
        raise type(error)(f"{path}: {error}") from error


def _ahead(items: Iterable[_T], count: int) -> Iterator[_T]:
    """The same items, each once up to `count` more have been drawn from the source."""
    drawn: deque[_T] = deque()
    for item in items:
        drawn.append(item)
        if len(drawn) > count:
            yield drawn.popleft()
    yield from drawn


def _batches(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _result(future: Future[Picture]) -> Picture | ThoraxrtError:
    try:
        return future.result()
    except ThoraxrtError as error:
        return error
