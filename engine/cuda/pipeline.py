"""The pipeline: radiographs of any size into one graph launch per batch, logits, regions and CAMs out of it.

Owns the ring of slots, the captured graphs, and what becomes of a batch when the GPU fails. Knows the
device only through `thoraxrt.engine.cuda.cuda`, the kernels only through `thoraxrt.engine.cuda.kernels`,
and a network only through `Network`. Per batch:

    copy stream      the slot's staging arena -> the slot's device arena (pixels, tables, coefficients)
    compute stream   wait for that; descriptors -> their fixed address; graph (geometry, network, boxes) at
                     fixed addresses; logits and regions, and CAMs where asked for -> the slot's pinned memory

so that the copy of one batch runs under the compute of the one before it, and nothing is allocated.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from operator import itemgetter
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.boxes import BoxSpec, regions_from_cam
from thoraxrt.engine.cuda import kernels
from thoraxrt.engine.cuda.cuda import DevicePixels, Event, Gpu, Graph, Stream, pixels_from_array
from thoraxrt.engine.errors import BackendError, DeviceError, ImageContentError, RequestError, ThoraxrtError
from thoraxrt.engine.execute import NetworkInput, Output, geometry_of, not_finite
from thoraxrt.engine.preprocess import PreprocessSpec
from thoraxrt.engine.profile import Profile, span

__all__ = ["Image", "InFlight", "Network", "Pipeline", "Stored"]

_ALIGNMENT: Final = 256  # of what lies in an arena
_TABLE_BYTES: Final = 1 << 16
_IMAGE_BYTES: Final = (1 << 20) + (1 << 16)  # of an arena, per image, by default: NIH's 1024 x 1024, and coefficients
_REGIONS_PER_MAP: Final = 4  # on average over a batch; what is beyond is done again on the CPU
_INLINE_BYTES: Final = 2 << 20  # up to so many the caller's thread copies by itself: waking others takes longer
_COPIERS: Final = 4  # threads; a few saturate the host's memory
_KINDS: Final = 256  # sizes of images remembered


class Network(Protocol):
    """A network on the pipeline's GPU, run at fixed addresses: `image` in, `logits` and `cam` out.

    `image` is uint8 `(bucket, 1, S, S)`, `logits` float32 `(bucket, C)`, `cam` float32
    `(bucket, C, h, w)`, all C-contiguous. The pipeline borrows it: whoever opened it closes it.
    """

    @property
    def precision(self) -> str:
        """The precision that is executed, for messages."""

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


class Stored(NamedTuple):
    """Stored values of more than 8 bits, and the table that makes them 8 (see `thoraxrt.engine.decode`)."""

    values: npt.NDArray[np.uint16]  # (H, W)
    table: npt.NDArray[np.uint8]  # (65536,)


Image = npt.NDArray[np.uint8] | Stored | DevicePixels | NetworkInput
"""One radiograph's pixels: uint8 `(H, W)` in host memory, stored values with their table, on the device, or resized."""


class Pipeline:
    """One network on one GPU, with its own streams, ring and captured graphs; one thread at a time calls it.

    `backend` is the network's, for messages; `labels` its C findings; `thresholds` float32 `(C,)`: a
    finding has regions where its logit reaches its threshold (-inf: always) and the caller wants it.
    `slots` batches are in flight at most; `staging_bytes` of pinned and as many of device memory hold
    each one's sources, by default 1024 x 1024 bytes for each of the largest bucket (a larger single
    image makes its slot grow). With a `profile` every stage is timed, and nothing is captured.

    The GPU and the network are borrowed, and may be closed before or after this.
    Raises DeviceError, DeviceMemoryError, BackendError.

    Example:
        with Pipeline(gpu, network, backend=..., labels=..., preprocess=..., boxes=..., thresholds=...) as pipeline:
            flights = [pipeline.submit(images, wanted) for images, wanted in batches]
            answers = [flight.result() for flight in flights]
    """

    def __init__(
        self,
        gpu: Gpu,
        network: Network,
        *,
        backend: str,
        labels: Sequence[str],
        preprocess: PreprocessSpec,
        boxes: BoxSpec,
        thresholds: npt.NDArray[np.float32],
        slots: int = 2,
        staging_bytes: int | None = None,
        profile: Profile | None = None,
    ) -> None:
        if slots < 1:
            raise RequestError(f"{slots} slots: expected at least 1, and 2 to copy while computing")
        self._gpu = gpu
        self._network = network
        self._backend = backend
        self._preprocess = preprocess
        self._size = preprocess.input_size
        self._boxes = boxes
        self._box_thresholds = [boxes.threshold_of(label) for label in labels]
        self._profile = profile
        self._range = _nvtx_range()
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._flying: deque[_Batch] = deque()
        self._lost: DeviceError | None = None
        self._closed = False
        self._owned = contextlib.ExitStack()
        self._workers = min(_COPIERS, os.cpu_count() or 1)
        self._copiers = ThreadPoolExecutor(self._workers, thread_name_prefix="staging")
        try:
            self._allocate(thresholds, slots, staging_bytes)
            self._warm_up()
        except BaseException:
            self.close()
            raise

    def _allocate(self, thresholds: npt.NDArray[np.float32], slots: int, staging_bytes: int | None) -> None:
        gpu, own, buckets = self._gpu, self._owned.enter_context, self._network.buckets
        largest, labels = buckets[-1], len(self._box_thresholds)
        self._layouts = {bucket: _Layout.of(bucket, labels) for bucket in buckets}
        self._cams_shape = labels, *self._network.cam_shape  # of one image: (C, h, w)
        self._staging_bytes = staging_bytes or largest * _IMAGE_BYTES
        sizes = _Sizes(
            sources=self._staging_bytes,
            images=largest,
            labels=labels,
            outputs=max(layout.dtype.itemsize for layout in self._layouts.values()),
            cams=largest * int(np.prod(self._cams_shape)) * 4,
        )
        self._copy, self._compute = own(gpu.stream()), own(gpu.stream())
        self._descriptors = own(gpu.memory(sizes.descriptors))
        self._input = own(gpu.memory(largest * self._size * self._size))
        self._outputs, self._cams = own(gpu.memory(sizes.outputs)), own(gpu.memory(sizes.cams))
        self._wanted_address = self._descriptors.address + largest * kernels.IMAGE.itemsize
        timed = self._profile is not None
        self._free = [_Slot(gpu, self._owned, sizes, timed) for _ in range(slots)]
        self._clock = _Clock(own(gpu.event(True)), self._compute) if timed else None
        module = own(gpu.module(kernels.source()))
        self._geometry, self._boxes_kernel = module.kernel("geometry"), module.kernel("boxes")
        both = np.stack([thresholds, np.array(self._box_thresholds)]).astype(np.float32)  # (2, C)
        self._thresholds = own(gpu.memory(both.nbytes))
        with gpu.pinned(both.nbytes) as pinned:
            pinned.array[:] = both.reshape(-1).view(np.uint8)
            self._compute.to_device(self._thresholds.address, pinned.address, both.nbytes)
            self._compute.synchronize()

    def _warm_up(self) -> None:
        """Run each bucket without images: directly, since a first run may allocate, then as it will be run."""
        self._network.bind(self._input.address, self._outputs.address, self._cams.address)
        self._compute.fill(self._descriptors.address, 0, self._descriptors.size)
        self._graphs: dict[int, Graph] = {}
        for bucket in self._network.buckets:
            steps = self._steps(bucket)
            _run(steps, self._compute)
            self._compute.synchronize()
            if self._profile is None:
                graph = self._graphs[bucket] = self._owned.enter_context(
                    self._gpu.graph(functools.partial(_run, steps))
                )
                graph.launch(self._compute)
                self._compute.synchronize()

    def _steps(self, bucket: int, columns: int = kernels.COLUMNS) -> list[Callable[[Stream], None]]:
        """Geometry, network and boxes at their fixed addresses, each to be put on a stream."""
        geometry = kernels.geometry_launch(bucket, self._size, columns)
        layout, outputs = self._layouts[bucket], self._outputs.address
        labels, height, width = self._cams_shape
        boxes = kernels.boxes_launch(
            bucket, labels, height, width, self._size, capacity=layout.capacity, min_area=self._boxes.min_area
        )
        images, thresholds = self._descriptors.address, self._thresholds.address
        count, flags, regions = (outputs + offset for offset in layout.offsets)
        return [
            lambda stream: stream.launch(
                self._geometry, *geometry[1:4], images, self._input.address, count, *geometry.scalars
            ),
            lambda stream: self._network.enqueue(bucket, stream.handle),
            lambda stream: stream.launch(
                self._boxes_kernel,
                *boxes[1:4],
                images,
                outputs,
                self._cams.address,
                thresholds,
                thresholds + 4 * labels,
                self._wanted_address,
                count,
                flags,
                regions,
                *boxes.scalars,
            ),
        ]

    def pixels(self, array: object) -> DevicePixels:
        """A device array as an image for `submit`, without a copy; compute waits for its producer.

        `array` is uint8 `(H, W)` with `__cuda_array_interface__` or DLPack. It is kept alive, and must
        not be written to, until the batch's result is there. Raises ImageContentError for any other.
        """
        self._check()
        return pixels_from_array(array, self._compute)

    def submit(self, images: Sequence[Image], wanted: npt.NDArray[np.bool_], cam: bool = False) -> InFlight:
        """Start a batch of any length; where the ring is full, wait for the oldest batch first.

        `wanted` is bool `(N, C)`: the findings whose regions are asked for; `cam` asks for every image's
        CAMs. Host images are copied before this returns. Raises BackendError where the pipeline is
        closed, DeviceError (lost) once the GPU is lost; whatever else fails is the images' answer.
        """
        self._check()
        expected = len(images), len(self._box_thresholds)
        if wanted.shape != expected:
            raise RequestError(f"wanted is {wanted.shape}; expected {expected}: a row per image, a column per finding")
        flight = InFlight(self, len(images))
        for batch in self._batches(flight, images, cam):
            flight._batches.append(batch)
            self._start(batch, wanted[batch.positions])
        return flight

    def _check(self) -> None:
        if self._closed:
            raise BackendError("the pipeline is closed; open the engine again")
        if self._lost is not None:
            raise DeviceError(f"the GPU was lost: {self._lost}; open the engine again", lost=True)

    def _batches(self, flight: InFlight, images: Sequence[Image], cam: bool) -> Iterator[_Batch]:
        """The images in order, in batches that fit the largest bucket and the arena; a refused image is answered."""
        largest, staging = self._network.buckets[-1], self._staging_bytes
        batch, room = _Batch(flight, cam), 0
        for position, image in enumerate(images):
            try:
                kind = self._kind(image)
            except ThoraxrtError as error:
                flight._answers[position] = error
                continue
            if batch.images and (len(batch.images) == largest or room + kind.room > staging):
                yield batch
                batch, room = _Batch(flight, cam), 0
            batch.positions.append(position)
            batch.images.append(image)
            batch.kinds.append(kind)
            room += kind.room
        if batch.images:
            yield batch

    def _kind(self, image: Image) -> _Kind:
        """The image's kind. Raises ImageLimitError for a sliver, ImageContentError for what is no image."""
        key: tuple[Any, ...]
        if isinstance(image, np.ndarray):
            key = (image.dtype.char, image.shape)
        elif isinstance(image, Stored):
            key = (image.values.dtype.char, image.values.shape, image.table.dtype.char, image.table.shape)
        elif isinstance(image, NetworkInput):
            key = (image.array.dtype.char, image.array.shape, "resized")
        else:
            key = ("B", (image.height, image.width), image.pitch)
        return self._kinds.get(key) or self._new_kind(key, image)

    def _new_kind(self, key: tuple[Any, ...], image: Image) -> _Kind:
        shape = key[1]
        stored, on_device = isinstance(image, Stored), isinstance(image, DevicePixels)
        if key != (("H", shape, "B", (_TABLE_BYTES,)) if stored else ("B", *key[1:])) or len(shape) != 2 or 0 in shape:
            raise ImageContentError(
                f"the image's type and shape are {key}; expected uint8 (height, width), "
                f"or uint16 (height, width) with a table uint8 ({_TABLE_BYTES},)"
            )
        height, width = shape
        item = 2 if stored else 1
        geometry = (
            geometry_of(image, self._preprocess)
            if isinstance(image, NetworkInput)
            else self._preprocess.geometry(width, height)
        )
        resampling = kernels.resampling(geometry)
        pixels = 0 if on_device else height * width * item
        if len(self._kinds) >= _KINDS:
            self._kinds.clear()
        kind = self._kinds[key] = _Kind(
            resampling=resampling,
            pitch=image.pitch if isinstance(image, DevicePixels) else width * item,
            item=item,
            room=_aligned(pixels) + _aligned(resampling.data.nbytes) + (_TABLE_BYTES if stored else 0),
        )
        return kind

    def _start(self, batch: _Batch, wanted: npt.NDArray[np.bool_]) -> None:
        """Put a batch on the streams, in a slot that is or becomes free; what fails is its answer."""
        try:
            self._check()
            if not self._free:
                self._collect(self._flying[0])
                self._check()
        except DeviceError as error:
            batch.fail(error)
            return
        slot = batch.slot = self._free.pop()
        self._flying.append(batch)
        try:
            with self._stage("stage", batch):
                used = self._fill(slot, batch, wanted)
            with self._stage("enqueue", batch):
                if slot.marks:
                    self._copy.record(slot.marks[0])
                self._copy.to_device(slot.arena.address, slot.staging.address, used)
                self._copy.record(slot.copied)
                self._compute.wait(slot.copied)
                self._launch(slot, batch, batch.cam)
        except ThoraxrtError as error:
            self._fail(batch, error)
        except BaseException:
            self._fail(batch, BackendError("the batch was interrupted before it was started; submit it again"))
            raise

    def _fill(self, slot: _Slot, batch: _Batch, wanted: npt.NDArray[np.bool_]) -> int:
        """Fill the slot's staging arena and descriptors; the bytes used of the arena."""
        count = len(batch.images)
        batch.bucket = next(bucket for bucket in self._network.buckets if bucket >= count)
        batch.columns = min(kind.resampling.columns for kind in batch.kinds)
        if count == 1 and batch.kinds[0].room > slot.arena.size:
            slot.grow(self._gpu, self._owned, batch.kinds[0].room)
        packing = _Packing(slot.arena.address)
        kinds: dict[_Kind, int] = {}
        templates: list[tuple[int, ...]] = []  # a descriptor per kind, without the addresses of pixels and table
        tables: dict[int, int] = {}  # addresses, by identity: the images keep them alive
        rows: list[tuple[int, int, int]] = []  # per image: kind, address of the pixels, of the table
        for image, kind in zip(batch.images, batch.kinds, strict=True):
            number = kinds.get(kind)
            if number is None:
                number = kinds[kind] = len(templates)
                address = packing.place(kind.resampling.data)
                templates.append(
                    kernels.describe(
                        kind.resampling, address=address, pixels=0, pitch=kind.pitch, table=int(kind.item == 2)
                    )
                )
            if isinstance(image, (np.ndarray, NetworkInput)):
                rows.append((number, packing.place(image if isinstance(image, np.ndarray) else image.array), 0))
            elif isinstance(image, Stored):
                if id(image.table) not in tables:
                    tables[id(image.table)] = packing.place(image.table)
                rows.append((number, packing.place(image.values), tables[id(image.table)]))
            else:
                rows.append((number, image.address, 0))
        copying = self._copy_pieces(slot.staging.array, packing)
        try:
            numbers, pixels, table = np.array(rows, np.uint64).T  # (count,) each
            slot.images[:count] = np.array(templates, kernels.IMAGE)[numbers.astype(np.intp)]
            slot.images["pixels"][:count] += pixels
            slot.images["table"][:count] = table
            slot.images[count:] = np.zeros((), kernels.IMAGE)
            slot.wanted[:count], slot.wanted[count:] = wanted, 0
        finally:
            wait(copying)  # also where this is interrupted: the slot may be used again
        for future in copying:
            future.result()
        return packing.top

    def _copy_pieces(self, staging: npt.NDArray[np.uint8], packing: _Packing) -> list[Future[None]]:
        """Copy to the staging arena: few bytes now, more by threads (numpy lets go of the interpreter's lock)."""
        pieces = packing.pieces
        if packing.top <= _INLINE_BYTES:
            _copy(staging, pieces)
            return []
        shares = [pieces[first :: self._workers] for first in range(self._workers)]
        return [self._copiers.submit(_copy, staging, share) for share in shares]

    def _launch(self, slot: _Slot, batch: _Batch, cam: bool) -> None:
        """Geometry, network and boxes of what lies in the slot's device arena, and the way back."""
        stream, outputs = self._compute, self._layouts[batch.bucket].dtype.itemsize
        stream.to_device(self._descriptors.address, slot.descriptors.address, self._descriptors.size)
        if slot.marks or batch.columns < kernels.COLUMNS:
            _run(self._steps(batch.bucket, batch.columns), stream, slot.marks[1:])
        else:
            self._graphs[batch.bucket].launch(stream)
        stream.to_host(slot.outputs.address, self._outputs.address, outputs)
        if cam:
            stream.to_host(
                slot.cams.address, self._cams.address, len(batch.images) * int(np.prod(self._cams_shape)) * 4
            )
        stream.record(slot.done)

    def _collect(self, batch: _Batch) -> None:
        """Wait for a batch and hand out its answers, unless it has them."""
        slot = batch.slot
        if slot is None:
            return
        try:
            with self._stage("wait", batch):
                slot.done.synchronize()
            with self._stage("collect", batch):
                answers = self._answers(slot, batch)
                self._record_stages(slot, batch)
        except ThoraxrtError as error:
            self._fail(batch, error)
            return
        self._flying.remove(batch)
        self._free.append(slot)
        batch.answer(answers)

    def _answers(self, slot: _Slot, batch: _Batch) -> list[Output | ThoraxrtError]:
        count, layout = len(batch.images), self._layouts[batch.bucket]
        found = slot.outputs.array[: layout.dtype.itemsize].view(layout.dtype)[0]
        flags = found["results"]["flags"][:count]  # (count, C)
        if not batch.cam and (flags & kernels.OVERFLOW).any():
            # Its CAMs may be overwritten by now, but its sources are still in the arena: once more, with CAMs.
            self._launch(slot, batch, cam=True)
            slot.done.synchronize()
        logits = found["logits"][:count].copy()  # (count, C)
        regions = kernels.regions_from_results(found["results"])
        cams = slot.cams.array.view(np.float32).reshape(-1, *self._cams_shape)[:count]  # (count, C, h, w)
        for image, label in np.argwhere(flags == kernels.OVERFLOW).tolist():
            more = regions_from_cam(cams[image, label], self._size, self._box_thresholds[label], self._boxes.min_area)
            regions[image] = tuple(sorted((*regions[image], *((label, region) for region in more)), key=itemgetter(0)))
        finite = np.isfinite(logits).all(axis=1) & ~(flags & kernels.NOT_FINITE).any(axis=1)
        if batch.cam:
            finite &= np.isfinite(cams).all(axis=(1, 2, 3))  # the kernel looks at wanted and reported ones only
        kept = cams.copy() if batch.cam else [None] * count
        return [
            Output(logits[i], regions[i], kept[i]) if good else not_finite(self._backend, self._network.precision)
            for i, good in enumerate(finite.tolist())
        ]

    def _record_stages(self, slot: _Slot, batch: _Batch) -> None:
        if self._clock is not None and self._profile is not None:
            copying, *computing = slot.marks
            for lane, stages, events in (
                ("copy", ["copy"], [copying, slot.copied]),
                ("compute", ["geometry", "network", "boxes", "back"], [*computing, slot.done]),
            ):
                detail = {"images": len(batch.images), "bucket": batch.bucket}
                self._clock.record(self._profile, f"{self._gpu} {lane}", stages, events, **detail)

    def _fail(self, batch: _Batch, error: ThoraxrtError) -> None:
        """A call failed for this batch: answer it, and see whether the GPU can go on."""
        slot = batch.slot
        assert slot is not None
        self._flying.remove(batch)
        lost = error if isinstance(error, DeviceError) and error.lost else None
        try:
            if lost is None:  # what was started before goes on; then nothing uses the slot and the images any more
                self._copy.synchronize()
                self._compute.synchronize()
                self._free.append(slot)
        except DeviceError as failure:
            lost = failure
        batch.fail(lost or error)
        if lost is not None:
            self._lost = lost
            for other in self._flying:
                other.fail(lost)
            self._flying.clear()

    @contextlib.contextmanager
    def _stage(self, stage: str, batch: _Batch) -> Iterator[None]:
        with self._range(stage), span(self._profile, "pipeline", stage, images=len(batch.images)):
            yield

    def close(self) -> None:
        """Free everything; batches whose results were not taken have none. Never raises; twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._copiers.shutdown()
        with contextlib.suppress(DeviceError):  # all is closed all the same, and nobody is left whom it concerns
            self._owned.close()
        for batch in self._flying:  # only now, since closing waited for what reads their images
            batch.fail(BackendError("the pipeline was closed before this result was taken; submit it again"))
        self._flying.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class InFlight:
    """A submitted batch of N images; made by `Pipeline.submit`."""

    def __init__(self, pipeline: Pipeline, count: int) -> None:
        self._pipeline = pipeline
        self._answers: list[Output | ThoraxrtError | None] = [None] * count
        self._batches: list[_Batch] = []

    def result(self) -> list[Output | ThoraxrtError]:
        """Wait for the batch: an answer per image, in order. May be asked again, and in any order of batches.

        An image's error is ImageLimitError for a sliver, ImageContentError for a wrong type, DeviceError
        where the GPU failed before this was taken, BackendError for values that are not finite, or of a
        pipeline that is closed.
        """
        for batch in self._batches:
            self._pipeline._collect(batch)
        self._batches = []
        return [answer for answer in self._answers if answer is not None]


class _Batch:
    """What one launch answers: some of the images of one `submit`."""

    slot: _Slot | None = None  # while it is in flight
    bucket: int
    columns: int

    def __init__(self, flight: InFlight, cam: bool) -> None:
        self.flight = flight
        self.cam = cam
        self.positions: list[int] = []  # in the flight
        self.images: list[Image] = []  # kept: device arrays are read where they lie
        self.kinds: list[_Kind] = []

    def answer(self, answers: Sequence[Output | ThoraxrtError]) -> None:
        """Hand the answers over, and let go of the images."""
        for position, answer in zip(self.positions, answers, strict=True):
            self.flight._answers[position] = answer
        self.images, self.slot = [], None

    def fail(self, error: ThoraxrtError) -> None:
        self.answer([error] * len(self.positions))


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """What images of one size, depth and place share; told apart by identity."""

    resampling: kernels.Resampling
    pitch: int  # bytes of a row, in the arena or where it lies on the device
    item: int  # bytes of a pixel
    room: int  # bytes of an arena with coefficients and table, were they the batch's only ones


class _Packing:
    """What goes where in an arena, whose device address is `base`."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.top = 0
        self.pieces: list[tuple[int, npt.NDArray[Any]]] = []

    def place(self, array: npt.NDArray[Any]) -> int:
        """The device address at which the array will lie."""
        at = self.top
        self.pieces.append((at, array))
        self.top = at + _aligned(array.nbytes)
        return self.base + at


def _copy(staging: npt.NDArray[np.uint8], pieces: Sequence[tuple[int, npt.NDArray[Any]]]) -> None:
    for at, array in pieces:
        np.copyto(staging[at : at + array.nbytes].view(array.dtype).reshape(array.shape), array)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _run(steps: Sequence[Callable[[Stream], None]], stream: Stream, marks: Sequence[Event] = ()) -> None:
    """Put the steps on a stream; with marks, one before each of them and one after the last."""
    for index, step in enumerate(steps):
        if marks:
            stream.record(marks[index])
        step(stream)
    if marks:
        stream.record(marks[-1])


class _Sizes(NamedTuple):
    """Of a slot's memory: bytes of sources, outputs and CAMs; images and labels of the descriptors."""

    sources: int
    images: int
    labels: int
    outputs: int
    cams: int

    @property
    def descriptors(self) -> int:
        """Bytes of IMAGE `(images,)`, then wanted uint8 `(images, labels)`."""
        return self.images * (kernels.IMAGE.itemsize + self.labels)


class _Layout(NamedTuple):
    """What comes back of a bucket: logits float32 `(bucket, C)`, then `kernels.results_dtype`."""

    dtype: np.dtype[np.void]
    capacity: int
    offsets: list[int]
    """Of the results' count, flags and regions."""

    @classmethod
    def of(cls, bucket: int, labels: int) -> Self:
        capacity = max(64, bucket * labels * _REGIONS_PER_MAP)
        results = kernels.results_dtype(bucket, labels, capacity)
        start = _aligned(bucket * labels * 4)
        formats = [np.dtype((np.float32, (bucket, labels))), results]
        dtype = np.dtype({"names": ["logits", "results"], "formats": formats, "offsets": [0, start]})
        fields = results.fields
        assert fields is not None
        return cls(dtype, capacity, [start + fields[name][1] for name in ("count", "flags", "regions")])


class _Slot:
    """A place in the ring: one batch's memory on both sides, and the events that order its use."""

    def __init__(self, gpu: Gpu, owned: contextlib.ExitStack, sizes: _Sizes, timed: bool) -> None:
        own = owned.enter_context
        self.arena, self.staging = own(gpu.memory(sizes.sources)), own(gpu.pinned(sizes.sources))
        self.descriptors = own(gpu.pinned(sizes.descriptors))
        self.outputs, self.cams = own(gpu.pinned(sizes.outputs)), own(gpu.pinned(sizes.cams))
        self.copied, self.done = own(gpu.event(timed)), own(gpu.event(timed))
        # Where profiled, what begins: the copy; geometry, network, boxes, the way back.
        self.marks = [own(gpu.event(True)) for _ in range(5)] if timed else []
        split = sizes.images * kernels.IMAGE.itemsize
        self.images = self.descriptors.array[:split].view(kernels.IMAGE)  # (images,)
        self.wanted = self.descriptors.array[split:].reshape(sizes.images, sizes.labels)

    def grow(self, gpu: Gpu, owned: contextlib.ExitStack, size: int) -> None:
        """Room for an image larger than any before; kept, so that the next one finds it."""
        arena = gpu.memory(size)
        try:
            staging = gpu.pinned(size)
        except BaseException:
            arena.close()
            raise
        self.arena.close()
        self.staging.close()
        self.arena, self.staging = owned.enter_context(arena), owned.enter_context(staging)


class _Clock:
    """Device time on the host's clock, from an event that both saw."""

    def __init__(self, origin: Event, stream: Stream) -> None:
        stream.record(origin)
        origin.synchronize()
        self._origin, self._start = origin, time.perf_counter()

    def record(
        self, profile: Profile, lane: str, stages: Sequence[str], events: Sequence[Event], **detail: int
    ) -> None:
        """Each stage from one event to the next."""
        for stage, begun, ended in zip(stages, events, events[1:], strict=False):
            start = self._start + begun.milliseconds_since(self._origin) / 1e3
            # Not a difference of two times since the origin: those are float32, and coarse after a minute.
            profile.record(lane, stage, start, ended.milliseconds_since(begun) / 1e3, **detail)


def _nvtx_range() -> Callable[[str], contextlib.AbstractContextManager[Any]]:
    """Ranges that Nsight Systems shows, where `nvtx` is installed."""
    try:
        annotate = importlib.import_module("nvtx").annotate
    except ImportError:
        return contextlib.nullcontext
    return functools.partial(annotate, domain="thoraxrt")
