"""What the host must know of `kernels.cu`: layouts, integer coefficients, launch sizes, and how results are read.

Knows no CUDA: addresses are plain integers, launches plain numbers. The coefficients are those of
Pillow's resampler (`precompute_coeffs` and `normalize_coeffs_8bpc` in its Resample.c), so that the
geometry kernel gives `thoraxrt.engine.preprocess.network_input` to the last bit.
"""

from __future__ import annotations

import functools
import math
from importlib import resources
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.boxes import Region
from thoraxrt.engine.errors import ImageLimitError
from thoraxrt.engine.preprocess import Geometry

__all__ = [
    "COLUMNS",
    "IMAGE",
    "NOT_FINITE",
    "OVERFLOW",
    "REGION",
    "Launch",
    "Resampling",
    "boxes_launch",
    "describe",
    "geometry_launch",
    "regions_from_results",
    "resampling",
    "results_dtype",
    "source",
]

IMAGE: Final = np.dtype(
    [
        ("pixels", np.uint64),  # address of the first pixel that is resized
        ("table", np.uint64),  # address of uint8 (65536,) for a 16-bit source, 0 for an 8-bit one
        ("resampling", np.uint64),  # address of `Resampling.data`, a multiple of 16
        ("pitch", np.int32),  # bytes from one row to the next
        ("width", np.int32),  # pixels of a row that may be read
        ("steps", np.int32),
        ("words", np.int32),
        ("phase", np.int32),
    ],
    align=True,
)
"""One image of a batch, as `describe` fills it; a record of zeros is no image."""

REGION: Final = np.dtype(
    [
        *((name, np.int32) for name in ("image", "finding", "left", "top", "right", "bottom", "area", "peak_x", "peak_y")),
        ("peak_value", np.float32),
    ]
)  # fmt: skip
"""One region of one map: which image and finding of the batch, then `Region`'s fields."""

OVERFLOW: Final = 1
"""Bit of a map's flag: it has too many regions, or values beyond 1e38; take `regions_from_cam` of its CAM."""

NOT_FINITE: Final = 2
"""Bit of a map's flag: its CAM holds NaN or infinity, and there are no regions."""

COLUMNS: Final = 256
"""Output columns of one block of the geometry kernel, where the sources are not extraordinarily wide."""

# As in kernels.cu:
_THREADS, _UNITS, _STEPS = 256, 512, 64  # threads of a block; 16-pixel units, and rows, of one chunk in shared memory
_SLOTS = 64  # regions of one map

_PRECISION_BITS = 32 - 8 - 2  # Resample.c

_MOST_SHRINKING = 4000
"""Taps are then 8,001 at most. Each is rounded by half a unit at most, so that their sum is at most 2^22 + 4,001,
and 255 everywhere gives less than 256 after rounding: the kernel need not clip as Pillow does. One column's window
is 2,003 words at most, which a chunk in shared memory holds."""

_SHARED_BYTES = 48 << 10  # what every GPU grants a block unasked


class Launch(NamedTuple):
    """One kernel launch: `kernel`'s name, sizes, and `scalars`, the arguments that follow the addresses."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    scalars: tuple[np.uint32, ...]


class Resampling(NamedTuple):
    """Pillow's integer coefficients for one `Geometry`, of the rows and columns that the crop keeps.

    `data`: uint8, to be copied to the device once, at a multiple of 16 bytes. `columns`: the widest
    launch of the geometry kernel that takes this source; launch it uncaptured, with so many columns,
    where the captured launch has more. `source_left`, `source_top`: the first pixel that is read.
    """

    data: npt.NDArray[np.uint8]
    columns: int
    source_left: int
    source_top: int
    width: int
    steps: int
    words: int
    phase: int


def source() -> str:
    """The CUDA source of both kernels; it needs no headers.

    Kernels and their arguments, addresses as 64-bit integers, then the launch's `scalars`:

        geometry(images, input, count)
            IMAGE (N,) -> uint8 (N, 1, S, S), zeros where there is no image; *count = 0
        boxes(images, logits, cams, logit_thresholds, box_thresholds, wanted, count, flags, regions)
            IMAGE (N,), float32 (N, C), float32 (N, C, h, w), float32 (C,), float32 (C,), uint8 (N, C)
            -> uint32, uint8 (N, C), REGION (capacity,): the fields of `results_dtype`

    `boxes` adds to `count`, which `geometry` before it sets to zero. A map is taken where its image
    is there, it is wanted (not 0), and its logit is >= its threshold (-inf: always).
    """
    return resources.files(__package__).joinpath("kernels.cu").read_text("utf-8")


@functools.lru_cache(maxsize=256)
def resampling(geometry: Geometry) -> Resampling:
    """The coefficients for one source size, kept for the next image of that size.

    Raises ImageLimitError where one side shrinks more than 4,000 times, which the kernel's integers and
    shared memory are not made for.
    """
    g = geometry
    if max(g.source_width / g.resized_width, g.source_height / g.resized_height) > _MOST_SHRINKING:
        raise ImageLimitError(
            f"the image is {g.width} x {g.height} pixels, resized to {g.resized_width} x {g.resized_height}; "
            f"expected each side to shrink at most {_MOST_SHRINKING} times: send it reduced"
        )
    columns = _taps(g.source_width, g.resized_width, g.left, g.size)
    rows = _taps(g.source_height, g.resized_height, g.top, g.size)
    steps, spans = _steps(rows, grows=g.resized_height > g.source_height)
    # A window of taps is read in words of 4 pixels; where the words start (0 to 3 pixels before the
    # source) decides how many a window touches: for 1024 to 256 pixels 2 instead of 3.
    words, phase = min((int((-(-(columns.ends + p) // 4) - (columns.starts + p) // 4).max()), p) for p in range(4))
    first = (columns.starts + phase) // 4
    widest = next(n for n in _COLUMN_CHOICES if _units(first, words, n) <= _UNITS)
    weights = np.zeros((g.size, 4 * words), np.uint32)
    taps = np.arange(columns.weights.shape[1])
    place = (columns.starts + phase - 4 * first)[:, np.newaxis] + taps  # (S, taps)
    row, tap = np.nonzero(columns.weights)
    weights[row, place[row, tap]] = columns.weights[row, tap]
    planes = [((weights >> shift) & 255).astype(np.uint8).view("<u4").T for shift in (0, 8, 16)]  # 3 x (words, S)
    parts = (steps, spans, first, np.stack(planes))
    data = np.frombuffer(b"".join(part.astype("<i4").tobytes() for part in parts), np.uint8)
    return Resampling(
        data=data,
        columns=widest,
        source_left=g.source_left,
        source_top=g.source_top,
        width=g.source_width,
        steps=len(steps),
        words=words,
        phase=phase,
    )


_COLUMN_CHOICES = tuple(COLUMNS >> n for n in range(9))  # 256, 128, ... 1


def _units(first: npt.NDArray[np.int64], words: int, columns: int) -> int:
    """The most 16-pixel units that `columns` neighbouring output columns read of one row, wherever it is aligned."""
    tiles = np.arange(0, len(first), columns)
    last = np.minimum(tiles + columns, len(first)) - 1
    return int((4 * (first[last] + words - first[tiles]) + 30).max()) // 16


class _Taps(NamedTuple):
    """One axis of a resize: for each kept output pixel its first source pixel, the end, and the weights from there."""

    starts: npt.NDArray[np.int64]  # (S,)
    ends: npt.NDArray[np.int64]  # (S,)
    weights: npt.NDArray[np.int64]  # (S, taps), zero from `ends` on


def _taps(source: int, resized: int, first: int, size: int) -> _Taps:
    """The 22-bit weights of output pixels first to first + size of `source` pixels resized to `resized`.

    Resample.c, `precompute_coeffs` and `normalize_coeffs_8bpc`, in the same order of float64 operations;
    weights that round to zero are left out at either end.
    """
    scale = source / resized
    support = max(scale, 1.0)
    center = (np.arange(first, first + size) + 0.5) * scale
    low = np.maximum((center - support + 0.5).astype(np.int64), 0)
    high = np.minimum((center + support + 0.5).astype(np.int64), source)
    x = low[:, np.newaxis] + np.arange(int((high - low).max()))  # (S, taps)
    weights = np.maximum(1.0 - np.abs((x - center[:, np.newaxis] + 0.5) * (1.0 / support)), 0.0)
    weights[x >= high[:, np.newaxis]] = 0.0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # cumsum adds one after the other, as Pillow does
    whole = (0.5 + weights * (1 << _PRECISION_BITS)).astype(np.int64)
    skip = (whole > 0).argmax(axis=1)
    last = whole.shape[1] - (whole[:, ::-1] > 0).argmax(axis=1)  # (S,)
    shifted = np.take_along_axis(
        np.pad(whole, ((0, 0), (0, int(skip.max())))), skip[:, np.newaxis] + np.arange(whole.shape[1]), axis=1
    )
    return _Taps(low + skip, low + last, shifted)


def _steps(rows: _Taps, *, grows: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The vertical pass as steps (n, 4) over source rows, and for each output row its first step and the end, (S, 2).

    A step is: source row, output row that it completes or -1, weight for the output row at work,
    weight for the next one. Where the image shrinks a source row counts for two output rows at most,
    since windows are twice as wide as their distance; where it grows each output row takes two steps.
    """
    size = len(rows.starts)
    output = np.arange(size)
    if grows:
        both = np.pad(rows.weights, ((0, 0), (0, 1)))[:, :2]
        assert (rows.ends - rows.starts <= 2).all()
        steps = np.zeros((size, 2, 4), np.int64)
        steps[:, 0, 0], steps[:, 1, 0] = rows.starts, rows.ends - 1
        steps[:, 0, 1], steps[:, 1, 1] = -1, output
        steps[:, :, 2] = both
        return steps.reshape(-1, 4), np.stack([2 * output, 2 * output + 2], axis=1)
    assert (rows.ends[:-1] < rows.ends[1:]).all()
    assert (rows.starts[2:] >= rows.ends[:-2]).all()
    y = np.arange(rows.starts[0], rows.ends[-1])
    now = np.searchsorted(rows.ends, y, side="right")  # the first output row that is not complete before y
    completes = np.where(y + 1 == rows.ends[now], now, -1)
    spans = np.stack([rows.starts, rows.ends], axis=1) - y[0]
    return np.stack([y, completes, _weight(rows, now, y), _weight(rows, now + 1, y)], axis=1), spans


def _weight(rows: _Taps, output: npt.NDArray[np.int64], y: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The weight of source row y for an output row, 0 where it has none."""
    row = np.minimum(output, len(rows.starts) - 1)
    inside = (output < len(rows.starts)) & (y >= rows.starts[row]) & (y < rows.ends[row])
    return np.where(inside, rows.weights[row, np.where(inside, y - rows.starts[row], 0)], 0)


def describe(resampling: Resampling, *, address: int, pixels: int, pitch: int, table: int = 0) -> tuple[int, ...]:
    """One image's record, to be assigned to an element of an array of dtype `IMAGE`.

    `address` is where `resampling.data` lies on the device, a multiple of 16; `pixels` where the whole
    image's top left pixel lies, uint8, or uint16 where there is a `table` (uint8 (65536,)) to look it
    up in; `pitch` the bytes from one row to the next. uint16 needs even numbers; bytes may lie
    anywhere, but whole 16-byte units around them are read. Raises ValueError for a wrong alignment.
    """
    item = 2 if table else 1
    if address % 16 or pixels % item or pitch % item:
        raise ValueError(
            f"coefficients at {address:#x}, pixels at {pixels:#x} with a pitch of {pitch} bytes: "
            f"expected multiples of 16, {item} and {item}"
        )
    first = pixels + resampling.source_top * pitch + resampling.source_left * item
    return first, table, address, pitch, resampling.width, resampling.steps, resampling.words, resampling.phase


def geometry_launch(images: int, size: int, columns: int = COLUMNS) -> Launch:
    """The geometry kernel's launch for a bucket of `images` and a network input of `size` pixels a side.

    `columns` is the output columns of one block, a power of two up to `COLUMNS`, and at most each
    source's `Resampling.columns` (below, the kernel writes zeros for that image).
    """
    tiles = math.ceil(size / columns)
    # A band's neighbours read some of its rows again, so tall bands read less, and flat ones fill more of the GPU.
    rows = next((n for n in (16, 8) if images * tiles * math.ceil(size / n) >= 512), 4)
    return Launch(
        kernel="geometry",
        grid=(tiles, math.ceil(size / rows), images),
        block=(_THREADS, 1, 1),
        shared_bytes=2 * 16 * (_UNITS + _STEPS),
        scalars=(np.uint32(size), np.uint32(rows), np.uint32(columns)),
    )


def boxes_launch(
    images: int, findings: int, height: int, width: int, size: int, *, capacity: int, min_area: float = 0.0
) -> Launch:
    """The boxes kernel's launch for CAMs `(images, findings, height, width)` and an input of `size` pixels a side.

    `capacity` is the regions that `results_dtype` holds for the whole batch; `min_area` as `BoxSpec`'s,
    a share of the input. A map has room for runs of 4 `size` and a bit more, less from 1,300 pixels on
    (860 at 4096): then large regions are flagged `OVERFLOW`. Raises ValueError for a size beyond 4096.
    """
    if not 1 <= size <= 4096:
        raise ValueError(f"boxes on an input of {size} pixels a side: expected 1 to 4096")
    fixed = -(-(64 + 32 * _SLOTS + 8 * size) // 16) * 16  # kernels.cu: Map, Slots, positions and last runs
    runs = min(4 * size + 64, (_SHARED_BYTES - fixed) // 16)  # of mask pixels, down the columns
    return Launch(
        kernel="boxes",
        grid=(findings, images, 1),
        block=(min(max(-(-size // 32) * 32, _SLOTS), 1024), 1, 1),  # a thread for each column, and each region
        shared_bytes=fixed + 16 * runs,
        scalars=(
            *(np.uint32(value) for value in (height, width, size, runs, capacity)),
            np.uint32(math.ceil(min_area * size * size)),
        ),
    )


def results_dtype(images: int, findings: int, capacity: int) -> np.dtype[np.void]:
    """What the boxes kernel writes, in one piece so that one copy brings it back.

    Fields: `count` uint32, how many regions there are (it may be beyond `capacity`), `flags` uint8
    (images, findings) of `OVERFLOW` and `NOT_FINITE`, `regions` `REGION` (capacity,). The kernel
    takes the fields' addresses.
    """
    flags = np.dtype((np.uint8, (images, findings)))
    start = -(-(4 + flags.itemsize) // 16) * 16
    return np.dtype(
        {
            "names": ["count", "flags", "regions"],
            "formats": [np.uint32, flags, (REGION, (capacity,))],
            "offsets": [0, 4, start],
        }
    )


def regions_from_results(results: np.void) -> list[tuple[tuple[int, Region], ...]]:
    """For each image its (finding index, region) pairs, by finding, then as `regions_from_cam` sorts them.

    `results` is one element of dtype `results_dtype`. Maps whose flag is not 0 have none here.
    """
    flags, count = results["flags"], min(int(results["count"]), len(results["regions"]))
    images: list[list[tuple[int, Region]]] = [[] for _ in flags]
    for image, finding, left, top, right, bottom, area, peak_x, peak_y, peak_value in results["regions"][
        :count
    ].tolist():
        if not flags[image, finding]:
            region = Region(
                left=left,
                top=top,
                right=right,
                bottom=bottom,
                area=area,
                peak_x=peak_x,
                peak_y=peak_y,
                peak_value=peak_value,
            )
            images[image].append((finding, region))
    return [tuple(sorted(found, key=_order)) for found in images]


def _order(found: tuple[int, Region]) -> tuple[int, ...]:
    finding, region = found
    return finding, region.top, region.left, region.peak_y, region.peak_x
