"""The pipeline: radiographs of any size into one graph launch per batch, logits, regions and CAMs out of it.

Owns the ring of slots, the captured graphs, and what becomes of a batch when the GPU fails. Knows the
device only through `thoraxrt.engine.cuda.cuda`, the kernels only through `thoraxrt.engine.cuda.kernels`,
and a network only through `Network`. Per batch:

    copy stream      the slot's staging arena -> the slot's device arena (pixels, tables, coefficients)
    compute stream   wait for that, table -> its fixed address, graph (geometry, network, boxes) at fixed
                     addresses, logits and regions (and CAMs where asked for) -> the slot's pinned memory

so that the copy of one batch runs under the compute of the one before it, and nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.cuda.cuda import DevicePixels, Gpu
from thoraxrt.engine.errors import ThoraxrtError
from thoraxrt.engine.execute import Output
from thoraxrt.engine.preprocess import PreprocessSpec

__all__ = ["InFlight", "Network", "Pipeline", "Recorder", "Stored"]


class Network(Protocol):
    """A network on the pipeline's GPU, run at fixed addresses: `image` in, `logits` and `cam` out.

    `image` is uint8 `(bucket, 1, S, S)`, `logits` float32 `(bucket, C)`, `cam` float32
    `(bucket, C, h, w)`, all C-contiguous. The pipeline borrows it: whoever opened it closes it.
    """

    @property
    def buckets(self) -> tuple[int, ...]:
        """The batch sizes it runs at, ascending."""

    @property
    def cam_shape(self) -> tuple[int, int]:
        """h and w."""

    def bind(self, image: int, logits: int, cam: int) -> None:
        """Set the device addresses, each with room for the largest bucket; once, before any `enqueue`."""

    def enqueue(self, bucket: int, stream: int) -> None:
        """Enqueue one inference on a stream (its handle), which may be capturing. Raises BackendError."""


class Recorder(Protocol):
    """Takes what a profiled pipeline measures."""

    def record(self, lane: str, stage: str, start_s: float, seconds: float, **detail: object) -> None:
        """One stage of one batch: `start_s` on `time.perf_counter`'s clock."""


class Stored(NamedTuple):
    """Stored values of more than 8 bits, and the table that makes them 8 (see `thoraxrt.engine.decode`)."""

    values: npt.NDArray[np.uint16]  # (H, W)
    table: npt.NDArray[np.uint8]  # (65536,)


Image = npt.NDArray[np.uint8] | Stored | DevicePixels
"""One radiograph's pixels: uint8 `(H, W)` in host memory, stored values with their table, or on the device."""


class Pipeline:
    """One network on one GPU, with its own streams, ring and captured graphs; one thread at a time calls it.

    `labels` are the network's C findings; `thresholds` float32 `(C,)`: a finding has regions where its
    logit reaches its threshold (-inf: always) and the caller wants it. `slots` batches are in flight at
    most; `staging_bytes` of pinned and of device memory hold each one's sources (a larger single image
    makes its slot grow). With a `recorder` every stage is timed, and nothing is captured.

    Raises DeviceError, DeviceMemoryError, BackendError.

    Example:
        with Pipeline(gpu, network, labels=..., preprocess=..., boxes=..., thresholds=...) as pipeline:
            flights = [pipeline.submit(batch, wanted) for batch, wanted in batches]
            answers = [flight.result() for flight in flights]
    """

    def __init__(
        self,
        gpu: Gpu,
        network: Network,
        *,
        labels: Sequence[str],
        preprocess: PreprocessSpec,
        boxes: BoxSpec,
        thresholds: npt.NDArray[np.float32],
        slots: int = 2,
        staging_bytes: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        raise NotImplementedError

    def pixels(self, array: object) -> DevicePixels:
        """A device array as an image for `submit`, without a copy; compute waits for its producer.

        `array` is uint8 `(H, W)` with `__cuda_array_interface__` or DLPack. It is kept alive, and must
        not be written to, until the batch's result is there.
        """
        raise NotImplementedError

    def submit(self, images: Sequence[Image], wanted: npt.NDArray[np.bool_], *, cam: bool = False) -> InFlight:
        """Start a batch of any length; where the ring is full, wait for the oldest batch first.

        `wanted` is bool `(N, C)`: the findings whose regions are asked for; `cam` asks for every image's
        CAMs. Host images are copied before this returns. Raises BackendError where the pipeline is
        closed, DeviceError (lost) once the GPU is lost; anything else is an image's answer.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free everything; batches whose results were not taken have none. Never raises; twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class InFlight:
    """A submitted batch."""

    def result(self) -> list[Output | ThoraxrtError]:
        """Wait for the batch: an answer per image, in order. May be called again, and in any order of batches.

        An image's error is ImageLimitError for a sliver, DeviceError where the GPU failed before the
        batch was done, BackendError for a CAM that is not finite, or a batch of a closed pipeline.
        """
        raise NotImplementedError
