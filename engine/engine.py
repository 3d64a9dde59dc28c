"""The story: bytes to radiograph to network input to raw outputs to findings and boxes.

Owns the order of the steps and the overlap of decoding with the network. Each step is a module
of its own, named as the step; the network runs in a backend chosen by `thoraxrt.engine.backends`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from thoraxrt.engine.backends import Backend, open_backend
from thoraxrt.engine.boxes import Box, boxes_from_cam, sort_boxes
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import Decoder, Radiograph, ThreadDecoder
from thoraxrt.engine.errors import BackendError, ImageError, ImageFormatError, RequestError, ThoraxrtError
from thoraxrt.engine.postprocess import Finding, findings_from_logits
from thoraxrt.engine.preprocess import network_input

__all__ = ["Engine", "Prediction", "Source", "image_files", "read_image"]

Source = bytes | str | Path | Radiograph
"""An image: encoded bytes, a file's path, or a radiograph already decoded."""

_T = TypeVar("_T")
_P = ParamSpec("_P")

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

    def __init__(self, bundle: Bundle, backend: Backend, decoder: Decoder, *, batch: int = 1) -> None:
        if batch < 1:
            raise RequestError(f"batch size {batch}: expected at least 1")
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.decoder = decoder
        self.batch = batch
        self._backend = backend
        self._closed = False

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        backend: str | None = None,
        precision: str | None = None,
        batch: int = 1,
        decoder: Decoder | None = None,
    ) -> Self:
        """Open a bundle: the named backend and precision, else the manifest's recommended, else FP32.

        `batch` is the most images the network takes at once in `predict`; `decoder` is closed
        with the engine. Raises BundleError, BackendUnavailableError or BackendError.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        return cls(bundle, open_backend(bundle, backend, precision), decoder or ThreadDecoder(), batch=batch)

    @property
    def backend(self) -> str:
        """The backend that executes the network."""
        return self._backend.name

    @property
    def precision(self) -> str:
        """The precision that is executed: fp32, bf16, fp16 or int8."""
        return self._backend.precision

    def predict(
        self, images: Iterable[Source], *, findings: Collection[str] | None = None, cam: bool = False
    ) -> Iterator[Prediction | ThoraxrtError]:
        """One answer per image, in order: a Prediction, or the error that this image met.

        Decoding runs ahead of the network in the decoder's workers. `findings` limits which
        reported findings get boxes; `cam` keeps each image's CAMs. Raises RequestError for an
        unknown finding, BackendError where the network itself fails.
        """
        self.check_findings(findings)
        decoding = _ahead((self.submit(image) for image in images), 2 * self.batch + _AHEAD)
        while batch := [_result(future) for future in itertools.islice(decoding, self.batch)]:
            decoded = [answer for answer in batch if isinstance(answer, Radiograph)]
            predictions = iter(self.predict_batch(decoded, findings=findings, cam=cam))
            yield from (next(predictions) if isinstance(answer, Radiograph) else answer for answer in batch)

    def predict_one(self, image: Source, *, findings: Collection[str] | None = None, cam: bool = False) -> Prediction:
        """The prediction for one image; see `predict`. Raises what `predict` would yield."""
        (answer,) = self.predict([image], findings=findings, cam=cam)
        if isinstance(answer, ThoraxrtError):
            raise answer
        return answer

    def predict_batch(
        self, radiographs: Sequence[Radiograph], *, findings: Collection[str] | None = None, cam: bool = False
    ) -> list[Prediction | ThoraxrtError]:
        """One network call on radiographs already decoded: an answer each, in order."""
        inputs = [_attempt(network_input, radiograph.pixels, self.manifest.preprocess) for radiograph in radiographs]
        usable = [array for array in inputs if not isinstance(array, ThoraxrtError)]
        outputs = iter(self._run(usable))
        return [
            array
            if isinstance(array, ThoraxrtError)
            else _attempt(self._prediction, radiograph, *next(outputs), findings=findings, cam=cam)
            for radiograph, array in zip(radiographs, inputs, strict=True)
        ]

    def _run(
        self, inputs: list[npt.NDArray[np.uint8]]
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Each input's logits `(C,)` and CAMs `(C, h, w)`; no input, no call."""
        if not inputs:
            return iter(())
        output = self._backend.run(np.stack(inputs))  # uint8 (N, 1, S, S)
        return zip(output.logits, output.cam, strict=True)

    def _prediction(
        self,
        radiograph: Radiograph,
        logits: npt.NDArray[np.float32],
        cams: npt.NDArray[np.float32],
        *,
        findings: Collection[str] | None,
        cam: bool,
    ) -> Prediction:
        if not (np.isfinite(logits).all() and np.isfinite(cams).all()):
            raise BackendError(
                f"{self.backend} {self.precision} gave values that are not finite for this image; "
                "use another precision (fp32) and check the bundle's parity"
            )
        answers = findings_from_logits(logits, self.manifest.operating_points, self.manifest.activation)
        return Prediction(
            width=radiograph.width,
            height=radiograph.height,
            precision=self.precision,
            backend=self.backend,
            findings=answers,
            boxes=self._boxes(radiograph, answers, logits, cams, findings),
            cam=cams if cam else None,
            radiograph=radiograph,
        )

    def _boxes(
        self,
        radiograph: Radiograph,
        answers: Sequence[Finding],
        logits: npt.NDArray[np.float32],
        cams: npt.NDArray[np.float32],
        wanted: Collection[str] | None,
    ) -> tuple[Box, ...]:
        """The boxes of what is reported and wanted, best first.

        `logits` is float32 `(C,)`, `cams` float32 `(C, h, w)`. A score is the activation of the
        image's logits with the finding's own replaced by its local logit at the peak.
        """
        geometry = self.manifest.preprocess.geometry(radiograph.width, radiograph.height)
        activation = self.manifest.activation
        # From a finding's logit to its log-odds, the others' logits held: zero but for softmax.
        biases = self.manifest.network.bias + (activation.log_odds(logits) - logits)
        boxes = [
            box
            for index, (answer, cam, bias) in enumerate(zip(answers, cams, biases.tolist(), strict=True))
            if answer.reported and (wanted is None or answer.finding in wanted)
            for box in boxes_from_cam(
                cam,
                finding=answer.finding,
                bias=bias,
                spec=self.manifest.boxes,
                geometry=geometry,
                probability=partial(activation.probability, index=index),
            )
        ]
        return tuple(sort_boxes(boxes))

    def submit(self, image: Source) -> Future[Radiograph]:
        """Start decoding an image; the future holds its Radiograph or its ImageError.

        Raises BackendError where the engine is closed.
        """
        if self._closed:
            raise BackendError("the engine is closed; open it again")
        future: Future[Radiograph] = Future()
        try:
            if isinstance(image, Radiograph):
                future.set_result(image)
                return future
            return self.decoder.submit(image if isinstance(image, bytes) else read_image(Path(image)))
        except ImageError as error:
            future.set_exception(error)
            return future

    def check_findings(self, findings: Collection[str] | None) -> None:
        """Raise RequestError where `findings` names something that the model does not answer."""
        unknown = sorted(set(findings or ()) - set(self.manifest.labels))
        if unknown:
            raise RequestError(
                f"unknown finding {', '.join(unknown)}; this model knows {', '.join(self.manifest.labels)}"
            )

    def close(self) -> None:
        """Stop the decoder's workers and free the network; closing twice is harmless."""
        self._closed = True
        self.decoder.close()
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def image_files(folder: Path) -> list[Path]:
    """The PNG, JPEG and DICOM files in a folder and those below it, by their suffix, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".dcm"))


def read_image(path: Path) -> bytes:
    """An image file's bytes. Raises ImageFormatError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageFormatError(f"{path.name} cannot be read: {error.strerror}") from error


def _ahead(futures: Iterable[_T], count: int) -> Iterator[_T]:
    """The same items, with up to `count` drawn from the source before they are asked for."""
    source = iter(futures)
    window = deque(itertools.islice(source, count))
    while window:
        item = window.popleft()
        window.extend(itertools.islice(source, 1))
        yield item


def _result(future: Future[Radiograph]) -> Radiograph | ThoraxrtError:
    return _attempt(future.result)


def _attempt(step: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | ThoraxrtError:
    """The step's result, or the error of ours that it raised: one image's failure is its answer."""
    try:
        return step(*args, **kwargs)
    except ThoraxrtError as error:
        return error
