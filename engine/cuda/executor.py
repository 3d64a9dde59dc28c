"""An `Executor` over the pipeline: radiographs of the engine in, what the engine's story goes on with out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.bundle import Manifest
from thoraxrt.engine.cuda.cuda import Gpu
from thoraxrt.engine.cuda.pipeline import Image, InFlight, Network, Pipeline, Stored
from thoraxrt.engine.errors import DeviceError, ThoraxrtError
from thoraxrt.engine.execute import Answers, DeviceMemory, DeviceRadiograph, NetworkInput, Pending, Picture
from thoraxrt.engine.postprocess import Softmax, thresholds
from thoraxrt.engine.profile import Profile

__all__ = ["PipelineExecutor"]

_SLOTS = 3
"""One batch is copied, one computed, one collected by the host."""


class Loaded(Protocol):
    """A backend that has loaded a network on its GPU, and owns both."""

    @property
    def name(self) -> str:
        """The backend's name."""

    @property
    def precision(self) -> str:
        """The precision that is executed."""

    @property
    def gpu(self) -> Gpu:
        """The GPU."""

    @property
    def network(self) -> Network:
        """The network."""

    def close(self) -> None:
        """Free both."""


class PipelineExecutor:
    """Geometry, network and regions on a GPU; see `thoraxrt.engine.execute.Executor`. Owns the backend.

    Raises BackendError or DeviceError where the pipeline cannot be set up.
    """

    ahead = _SLOTS - 1
    takes_stored = True

    def __init__(self, backend: Loaded, manifest: Manifest, profile: Profile | None = None) -> None:
        self._backend = backend
        self.backend, self.precision = backend.name, backend.precision
        self.buckets = backend.network.buckets
        # A softmax's log-odds take exp and ln, which differ between devices: the host decides, the GPU looks everywhere.
        cuts = thresholds(manifest.operating_points, manifest.activation)  # (C,)
        everywhere = isinstance(manifest.activation, Softmax)
        try:
            self._pipeline = Pipeline(
                backend.gpu,
                backend.network,
                backend=backend.name,
                labels=manifest.labels,
                preprocess=manifest.preprocess,
                boxes=manifest.boxes,
                thresholds=np.full_like(cuts, -np.inf) if everywhere else cuts,
                slots=_SLOTS,
                profile=profile,
            )
        except BaseException:
            backend.close()
            raise

    def submit(self, pictures: Sequence[Picture], wanted: npt.NDArray[np.bool_], cam: bool) -> Pending:
        """See `Executor.submit`."""
        answers: list[ThoraxrtError | None] = [None] * len(pictures)
        images: list[Image] = []
        for position, picture in enumerate(pictures):
            try:
                images.append(self._image(picture))
            except ThoraxrtError as error:
                answers[position] = error
        usable = [position for position, error in enumerate(answers) if error is None]
        try:
            return _Submitted(answers, self._pipeline.submit(images, wanted[usable], cam))
        except DeviceError as error:
            return _Submitted([refused or error for refused in answers], None)

    def _image(self, picture: Picture) -> Image:
        if isinstance(picture, DeviceRadiograph):
            return self._pipeline.pixels(picture.array)
        if isinstance(picture, NetworkInput):
            return picture
        return picture.pixels if picture.table is None else Stored(picture.values, picture.table)  # type: ignore[arg-type]

    def device_memory(self) -> DeviceMemory:
        """See `Executor.device_memory`."""
        gpu = self._backend.gpu
        total = gpu.total_bytes()
        return DeviceMemory(str(gpu), total - gpu.free_bytes(), total)

    def close(self) -> None:
        """See `Executor.close`."""
        self._pipeline.close()
        self._backend.close()


class _Submitted:
    """A batch in flight, but for the pictures that were refused at once."""

    def __init__(self, refused: Sequence[ThoraxrtError | None], flight: InFlight | None) -> None:
        self._refused = refused
        self._flight = flight

    def result(self) -> Answers:
        """See `Pending.result`."""
        answers = iter(self._flight.result() if self._flight else ())
        return [next(answers) if error is None else error for error in self._refused]
