"""Radiographs to raw outputs: the seam between the story and the device that computes it.

An executor does three of the steps (geometry, network, the regions of boxes) for a batch of
radiographs at once, so that a GPU need not give anything back between them. Knows neither
probabilities nor the original image's coordinates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.backends import Backend, choose
from thoraxrt.engine.boxes import Region, regions_from_cam
from thoraxrt.engine.bundle import Bundle, Manifest
from thoraxrt.engine.decode import Radiograph
from thoraxrt.engine.errors import BackendError, DeviceError, ImageContentError, NotFiniteError, ThoraxrtError
from thoraxrt.engine.postprocess import reported, thresholds
from thoraxrt.engine.preprocess import Exact, Geometry, PreprocessSpec, network_input
from thoraxrt.engine.profile import Profile, span

__all__ = [
    "Answers",
    "DeviceBackend",
    "DeviceMemory",
    "DeviceRadiograph",
    "Executor",
    "HostExecutor",
    "NetworkInput",
    "Output",
    "Picture",
    "Reopening",
    "geometry_of",
    "not_finite",
    "open_executor",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Pixels:
    array: Any

    @property
    def width(self) -> int:
        """Pixels in a row."""
        return int(self.array.shape[1])

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.array.shape[0])


class DeviceRadiograph(_Pixels):
    """A radiograph that lies in a GPU's memory.

    `array` is uint8 `(H, W)`, row 0 at the top, 0 black to 255 white, and speaks
    `__cuda_array_interface__` or DLPack (PyCUDA, CuPy, PyTorch).
    """


class NetworkInput(_Pixels):
    """What geometry would have made of a radiograph: `array` uint8 `(S, S)`, for a client that does it itself."""


Picture = Radiograph | DeviceRadiograph | NetworkInput
"""A radiograph in host memory or in a GPU's, or the network's input itself."""


def geometry_of(picture: Picture, spec: PreprocessSpec) -> Geometry:
    """From the picture to the network's input: the spec's, but nothing for what is that input already.

    Raises ImageLimitError for a sliver, ImageContentError for a network input of another type or size.
    """
    if not isinstance(picture, NetworkInput):
        return spec.geometry(picture.width, picture.height)
    size = spec.input_size
    if picture.array.dtype != np.uint8 or picture.array.shape != (size, size):
        raise ImageContentError(
            f"the network's input is {picture.array.dtype} {picture.array.shape}; expected uint8 ({size}, {size})"
        )
    return PreprocessSpec(resize=Exact(width=size, height=size)).geometry(size, size)


class Output(NamedTuple):
    """What the network says of one image of C labels.

    `regions` are those of the CAMs of the findings that are asked for and reported, by index into the
    labels, each finding's in the order of `regions_from_cam`; a device that cannot tell what is
    reported gives more. `cam` is there where it was asked for.
    """

    logits: npt.NDArray[np.float32]  # (C,)
    regions: tuple[tuple[int, Region], ...]
    cam: npt.NDArray[np.float32] | None  # (C, h, w)


class DeviceMemory(NamedTuple):
    """One GPU's memory in bytes, whoever uses it."""

    gpu: str
    used: int
    total: int


Answers = list[Output | ThoraxrtError]
"""One per image, in order."""


class Pending(Protocol):
    """A batch that has been handed to an executor."""

    def result(self) -> Answers:
        """Wait for the batch: each image's output, or the error that it met."""


class Executor(Protocol):
    """One network on one device; one thread at a time calls it."""

    @property
    def backend(self) -> str:
        """The backend that executes what is submitted next."""

    @property
    def precision(self) -> str:
        """The precision that it executes."""

    @property
    def ahead(self) -> int:
        """Batches worth submitting before the first one's result is asked for."""

    @property
    def buckets(self) -> tuple[int, ...]:
        """The batch sizes that the network runs at, ascending; empty where it runs at any."""

    @property
    def takes_stored(self) -> bool:
        """Whether 16-bit radiographs are better left as stored, with their table to 8 bits."""

    def submit(self, pictures: Sequence[Picture], wanted: npt.NDArray[np.bool_], cam: bool) -> Pending:
        """Start a batch of N >= 1 images; `wanted`, bool `(N, C)`, says whose findings get regions.

        What fails, fails in the answers.
        """

    def device_memory(self) -> DeviceMemory | None:
        """The GPU's memory; None on a CPU. Any thread may ask. Raises DeviceError."""

    def close(self) -> None:
        """Free the network and the device; closing twice is harmless."""


class DeviceBackend(Backend, Protocol):
    """A backend on a GPU: it brings an executor of its own."""

    def executor(self, manifest: Manifest, profile: Profile | None) -> Executor:
        """Geometry, network and regions on the GPU; closing it closes the backend."""


class _Done(NamedTuple):
    answers: Answers

    def result(self) -> Answers:
        return self.answers


class HostExecutor:
    """Geometry by Pillow, the network in a CPU backend, regions by OpenCV: each batch at once, in the caller's thread."""

    ahead = 0
    buckets = ()
    takes_stored = False

    def __init__(self, backend: Backend, manifest: Manifest, profile: Profile | None = None) -> None:
        self._backend = backend
        self._manifest = manifest
        self._profile = profile
        self._thresholds = thresholds(manifest.operating_points, manifest.activation)  # (C,)

    @property
    def backend(self) -> str:
        """See `Executor`."""
        return self._backend.name

    @property
    def precision(self) -> str:
        """See `Executor`."""
        return self._backend.precision

    def submit(self, pictures: Sequence[Picture], wanted: npt.NDArray[np.bool_], cam: bool) -> Pending:
        """See `Executor.submit`."""
        with self._span("geometry", pictures):
            inputs = [self._input(picture) for picture in pictures]
        usable = [array for array in inputs if not isinstance(array, ThoraxrtError)]
        if not usable:
            return _Done([array for array in inputs if isinstance(array, ThoraxrtError)])
        try:
            with self._span("network", usable):
                logits, cams = self._backend.run(np.stack(usable))  # (N, C), (N, C, h, w)
        except BackendError as error:
            return _Done([array if isinstance(array, ThoraxrtError) else error for array in inputs])
        outputs = iter(zip(logits, cams, strict=True))
        with self._span("boxes", usable):
            return _Done(
                [
                    array if isinstance(array, ThoraxrtError) else self._output(*next(outputs), mask, cam)
                    for array, mask in zip(inputs, wanted, strict=True)
                ]
            )

    def _input(self, picture: Picture) -> npt.NDArray[np.uint8] | ThoraxrtError:
        try:
            if isinstance(picture, DeviceRadiograph):
                raise ImageContentError(
                    f"the image is in a GPU's memory and {self.backend} runs on the CPU: copy it to a host array, "
                    "or open the engine with device='cuda'"
                )
            if isinstance(picture, NetworkInput):
                geometry_of(picture, self._manifest.preprocess)
                return np.asarray(picture.array)[np.newaxis]  # (1, S, S)
            return network_input(picture.pixels, self._manifest.preprocess)
        except ThoraxrtError as error:
            return error

    def _output(
        self,
        logits: npt.NDArray[np.float32],
        cams: npt.NDArray[np.float32],
        wanted: npt.NDArray[np.bool_],
        keep_cam: bool,
    ) -> Output | ThoraxrtError:
        if not (np.isfinite(logits).all() and np.isfinite(cams).all()):
            return not_finite(self.backend, self.precision)
        manifest = self._manifest
        shown = wanted & reported(logits, self._thresholds, manifest.activation)
        regions = tuple(
            (int(index), region)
            for index in np.flatnonzero(shown)
            for region in regions_from_cam(
                cams[index],
                manifest.preprocess.input_size,
                manifest.boxes.threshold_of(manifest.labels[index]),
                manifest.boxes.min_area,
            )
        )
        return Output(logits, regions, cams if keep_cam else None)

    def _span(self, stage: str, images: Sequence[Any]) -> Any:
        return span(self._profile, "network", stage, images=len(images))

    def device_memory(self) -> None:
        """See `Executor.device_memory`."""

    def close(self) -> None:
        """See `Executor.close`."""
        self._backend.close()


def not_finite(backend: str, precision: str) -> NotFiniteError:
    """What an image gets whose logits or CAMs hold a NaN or an infinity."""
    return NotFiniteError(
        f"{backend} {precision} gave values that are not finite for this image; "
        "use another precision (fp32) and check the bundle's parity"
    )


class Reopening:
    """An executor that outlives its GPU: after one is lost, the next batch opens it again, else the CPU if told to.

    What was in flight on the lost GPU gets its DeviceError; nothing is run twice.
    """

    def __init__(self, reopen: Callable[[], Executor], fall_back: Callable[[], Executor] | None) -> None:
        self._reopen = reopen
        self._fall_back = fall_back
        self._current = reopen()
        self._lost = False

    @property
    def backend(self) -> str:
        """See `Executor`."""
        return self._current.backend

    @property
    def precision(self) -> str:
        """See `Executor`."""
        return self._current.precision

    @property
    def ahead(self) -> int:
        """See `Executor`."""
        return self._current.ahead

    @property
    def buckets(self) -> tuple[int, ...]:
        """See `Executor`."""
        return self._current.buckets

    @property
    def takes_stored(self) -> bool:
        """See `Executor`; a decoder made for one device also serves the other."""
        return self._current.takes_stored

    def submit(self, pictures: Sequence[Picture], wanted: npt.NDArray[np.bool_], cam: bool) -> Pending:
        """See `Executor.submit`."""
        if self._lost:
            try:
                self._replace()
            except ThoraxrtError as error:
                return _Done([error] * len(pictures))
        pending = self._current.submit(pictures, wanted, cam)
        return _Watched(pending, self, self._current)

    def note(self, answers: Answers, executor: Executor) -> None:
        """Remember a loss, where it is that of the executor in use."""
        lost = any(isinstance(answer, DeviceError) and answer.lost for answer in answers)
        self._lost |= lost and executor is self._current

    def _replace(self) -> None:
        """Another executor for the lost one. Raises BackendError where there is none."""
        self._current.close()
        try:
            self._current = self._reopen()
            _log.warning("the GPU was lost and has been opened again (%s %s)", self.backend, self.precision)
        except ThoraxrtError as error:  # also of a bundle that has been damaged since
            if self._fall_back is None:
                raise DeviceError(f"the GPU was lost and cannot be opened again: {error}", lost=True) from error
            self._current = self._fall_back()
            _log.error("the GPU was lost (%s); going on with %s %s", error, self.backend, self.precision)
        self._lost = False

    def device_memory(self) -> DeviceMemory | None:
        """See `Executor.device_memory`."""
        return self._current.device_memory()

    def close(self) -> None:
        """See `Executor.close`."""
        self._current.close()


class _Watched(NamedTuple):
    pending: Pending
    owner: Reopening
    executor: Executor

    def result(self) -> Answers:
        answers = self.pending.result()
        self.owner.note(answers, self.executor)
        return answers


_FALLBACK: Final = "fp32"


def open_executor(
    bundle: Bundle,
    backend: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    *,
    fall_back: bool = False,
    profile: Profile | None = None,
) -> Executor:
    """The executor of a bundle's network; see `thoraxrt.engine.backends.choose`.

    With `fall_back`, a GPU that is lost and cannot be opened again is replaced by the CPU, at FP32.
    Raises RequestError, BackendUnavailableError or BackendError.
    """
    module, precision, index = choose(bundle, backend, precision, device)
    if module.DEVICE == "cpu":
        return HostExecutor(module.open(bundle, precision, index), bundle.manifest, profile)

    def reopen() -> Executor:
        return cast(DeviceBackend, module.open(bundle, precision, index)).executor(bundle.manifest, profile)

    def cpu() -> Executor:
        return open_executor(bundle, None, _FALLBACK, "cpu", profile=profile)

    return Reopening(reopen, cpu if fall_back else None)
