"""Both kernels, built for the host, against Pillow and `engine/boxes.py`: equal to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from thoraxrt.engine.backends import open_backend
from thoraxrt.engine.boxes import Region, regions_from_cam
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.cuda.kernels import (
    COLUMNS,
    IMAGE,
    NOT_FINITE,
    OVERFLOW,
    boxes_launch,
    describe,
    geometry_launch,
    regions_from_results,
    resampling,
    results_dtype,
)
from thoraxrt.engine.errors import ImageLimitError
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter, network_input

CHEXNET = PreprocessSpec(resize=Shorter(pixels=256), crop=224)


def at(size: int, offset: int = 0) -> npt.NDArray[np.uint8]:
    """A uint8 array of `size` that lies `offset` bytes behind a multiple of 16, in whole 16-byte units of its own."""
    memory = np.full(size + offset + 48, 0xA5, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    return memory[start : start + size]


class Batch:
    """Images in memory as a device would hold them: any pitch, any alignment, garbage in between."""

    def __init__(self, images: Sequence[np.ndarray], spec: PreprocessSpec, table: np.ndarray, rng: np.random.Generator):
        self.spec, self.columns, self._kept = spec, COLUMNS, [table]
        self.records = np.zeros(len(images), IMAGE)
        for index, image in enumerate(images):
            height, width = image.shape
            found = resampling(spec.geometry(width, height))
            self.columns = min(self.columns, found.columns)
            coefficients = at(found.data.size)
            coefficients[:] = found.data
            item = image.itemsize
            pitch = (width + int(rng.integers(0, 20))) * item
            memory = at(pitch * (height - 1) + width * item, int(rng.integers(0, 16 // item)) * item)
            memory[:] = rng.integers(0, 256, memory.size, np.uint8)
            np.ndarray(image.shape, image.dtype, memory.data, strides=(pitch, item))[:] = image
            self.records[index] = describe(
                found,
                address=coefficients.ctypes.data,
                pixels=memory.ctypes.data,
                pitch=pitch,
                table=table.ctypes.data if item == 2 else 0,
            )
            self._kept += [coefficients, memory]

    def input(self, kernels: Any, columns: int = COLUMNS) -> npt.NDArray[np.uint8]:
        """What the geometry kernel makes of it, (N, 1, S, S)."""
        size = self.spec.input_size
        out = np.full((len(self.records), 1, size, size), 0xA5, np.uint8)
        count = np.array([9], np.uint32)
        launch = geometry_launch(len(self.records), size, min(columns, self.columns))
        kernels.launch(launch, self.records.ctypes.data, out.ctypes.data, count.ctypes.data)
        assert count[0] == 0
        return out


sides = st.one_of(st.integers(1, 40), st.integers(1, 400))


@st.composite
def specs(draw: st.DrawFn) -> PreprocessSpec:
    square = draw(st.booleans())
    if draw(st.booleans()):
        pixels = draw(st.integers(1, 120))
        return PreprocessSpec(resize=Shorter(pixels=pixels), crop=draw(st.integers(1, pixels)), square=square)
    width, height = draw(st.integers(1, 120)), draw(st.integers(1, 120))
    if draw(st.booleans()):
        return PreprocessSpec(resize=Exact(width=width, height=width), square=square)
    crop = draw(st.integers(1, min(width, height)))
    return PreprocessSpec(resize=Exact(width=width, height=height), crop=crop, square=square)


def fits(spec: PreprocessSpec, width: int, height: int) -> bool:
    try:
        spec.geometry(width, height)
    except ImageLimitError:
        return False
    return True


def picture(rng: np.random.Generator, width: int, height: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Noise, or only the darkest and the brightest value, where rounding has most to lose."""
    top = np.iinfo(dtype).max
    noise = rng.integers(0, top, (height, width), dtype, endpoint=True)
    return noise if rng.integers(2) else np.where(noise > top // 2, dtype(top), dtype(0))


@settings(max_examples=400, deadline=None)
@given(specs(), st.lists(st.tuples(sides, sides, st.booleans()), min_size=1, max_size=5), st.integers(0, 2**32))
def test_geometry_is_pillows_to_the_last_bit(
    kernels: Any, spec: PreprocessSpec, sizes: list[tuple[int, int, bool]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes = [size for size in sizes if fits(spec, *size[:2])]
    assume(sizes)
    table = rng.integers(0, 256, 65536, np.uint8)
    images = [picture(rng, width, height, np.uint16 if wide else np.uint8) for width, height, wide in sizes]
    batch = Batch(images, spec, table, rng)
    made = batch.input(kernels, columns=int(2 ** rng.integers(0, 9)))
    for image, made_of_it in zip(images, made, strict=True):
        np.testing.assert_array_equal(made_of_it, network_input(table[image] if image.itemsize == 2 else image, spec))


@pytest.mark.parametrize(
    ("width", "height", "spec"),
    [
        (1024, 1024, CHEXNET),
        (2991, 2992, CHEXNET),  # 12 times: more words than registers keep
        (9001, 300, PreprocessSpec(resize=Exact(width=224, height=224))),  # too wide for all columns in one block
        (12, 9001, PreprocessSpec(resize=Exact(width=224, height=224))),
        (1500, 90, PreprocessSpec(resize=Exact(width=224, height=224))),  # 5 rows a chunk, 2 steps an output row
        (2048, 2500, PreprocessSpec(square=True, resize=Exact(width=512, height=512))),  # two tiles
        (320, 390, PreprocessSpec(resize=Shorter(pixels=1100), crop=1024)),  # enlarged, four tiles
        (1, 11, CHEXNET),  # as much of a sliver as passes
        (12000, 1, PreprocessSpec(resize=Exact(width=3, height=3))),  # 4,000 times smaller
        (1, 12000, PreprocessSpec(resize=Exact(width=3, height=3))),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_extraordinary_sizes(
    kernels: Any, width: int, height: int, spec: PreprocessSpec, dtype: type[np.unsignedinteger]
) -> None:
    rng = np.random.default_rng(width)
    table = rng.integers(0, 256, 65536, np.uint8)
    image = picture(rng, width, height, dtype)
    batch = Batch([image], spec, table, rng)
    np.testing.assert_array_equal(
        batch.input(kernels)[0], network_input(table[image] if dtype is np.uint16 else image, spec)
    )


def test_an_empty_slot_is_black_and_neighbours_are_whole(kernels: Any) -> None:
    rng = np.random.default_rng(0)
    image = picture(rng, 300, 280, np.uint8)
    batch = Batch([image] * 3, CHEXNET, np.zeros(65536, np.uint8), rng)
    batch.records[1] = np.zeros((), IMAGE)
    made = batch.input(kernels)
    assert not made[1].any()
    for index in (0, 2):
        np.testing.assert_array_equal(made[index], network_input(image, CHEXNET))


def test_every_bucket_gives_the_same(kernels: Any) -> None:
    rng = np.random.default_rng(0)
    image = picture(rng, 411, 370, np.uint8)
    for images in (1, 20, 40):  # bands of 4, 8 and 16 rows
        made = Batch([image] * images, CHEXNET, np.zeros(65536, np.uint8), rng).input(kernels)
        assert (made == network_input(image, CHEXNET)).all()


def test_real_radiographs(kernels: Any, nih_images: list[Path]) -> None:
    rng = np.random.default_rng(0)
    images = [np.asarray(Image.open(path).convert("L")) for path in nih_images[:8]]
    for spec in (CHEXNET, PreprocessSpec(square=True, resize=Exact(width=224, height=224))):
        made = Batch(images, spec, np.zeros(65536, np.uint8), rng).input(kernels)
        for image, made_of_it in zip(images, made, strict=True):
            np.testing.assert_array_equal(made_of_it, network_input(image, spec))


def test_coefficients_are_kept_by_geometry() -> None:
    assert resampling(CHEXNET.geometry(640, 480)) is resampling(CHEXNET.geometry(640, 480))


@pytest.mark.parametrize(("width", "height"), [(8001, 1), (1, 8001)])
def test_a_source_beyond_the_integers_is_refused(width: int, height: int) -> None:
    with pytest.raises(ImageLimitError, match=rf"{width} x {height} pixels, resized to 2 x 2; expected .* 4000 times"):
        resampling(PreprocessSpec(resize=Exact(width=2, height=2)).geometry(width, height))


@pytest.mark.parametrize("wrong", [{"address": 8}, {"pixels": 33}, {"pitch": 101}])
def test_a_wrong_alignment_is_refused(wrong: dict[str, int]) -> None:
    right = {"address": 16, "pixels": 32, "pitch": 100, "table": 64}
    with pytest.raises(ValueError, match="expected multiples of 16, 2 and 2"):
        describe(resampling(CHEXNET.geometry(50, 50)), **{**right, **wrong})


# ----------------------------------------------------------------------------------------- boxes


def found(
    kernels: Any,
    cams: np.ndarray,
    size: int,
    thresholds: Sequence[float],
    *,
    min_area: float = 0.0,
    capacity: int = 4096,
    logits: np.ndarray | None = None,
    logit_thresholds: Sequence[float] | None = None,
    wanted: np.ndarray | None = None,
    missing: Sequence[int] = (),
) -> np.void:
    """What the boxes kernel writes for CAMs (N, C, h, w), as one element of `results_dtype`."""
    images, findings, height, width = cams.shape
    cams = np.ascontiguousarray(cams, np.float32)
    records = np.zeros(images, IMAGE)
    records["pixels"] = 1
    records["pixels"][list(missing)] = 0
    logits = np.zeros((images, findings), np.float32) if logits is None else logits
    gates = np.full(findings, -np.inf, np.float32) if logit_thresholds is None else np.float32(logit_thresholds)
    cuts = np.array(thresholds, np.float32)
    wanted = np.ones((images, findings), np.uint8) if wanted is None else wanted
    dtype = results_dtype(images, findings, capacity)
    results = np.full(dtype.itemsize, 0xA5, np.uint8).view(dtype)
    results["count"] = 0
    assert dtype.fields is not None
    addresses = [results.ctypes.data + dtype.fields[name][1] for name in ("count", "flags", "regions")]
    launch = boxes_launch(images, findings, height, width, size, capacity=capacity, min_area=min_area)
    inputs = [a.ctypes.data for a in (records, logits, cams, gates, cuts, wanted)]
    kernels.launch(launch, *inputs, *addresses)
    return results[0]


def expected(
    cams: np.ndarray, size: int, thresholds: Sequence[float], min_area: float = 0.0
) -> list[tuple[tuple[int, Region], ...]]:
    return [
        tuple(
            (finding, region)
            for finding, cam in enumerate(maps)
            for region in regions_from_cam(cam, size, thresholds[finding], min_area)
        )
        for maps in cams
    ]


def unflagged(cams: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """The maps, those with a flag made flat, so that nothing is expected of them."""
    return np.where(flags[:, :, np.newaxis, np.newaxis] == 0, cams, np.float32(0))


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    """CAMs (N, C, h, w): noise at any scale, whole numbers (plateaus and ties), blobs, flat ones."""
    shape = tuple(draw(st.integers(1, most)) for most in (3, 4, 12, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    noise = rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, (*shape[:2], 1, 1))
    whole = np.round(rng.normal(size=shape) * 1.5)
    kind = rng.integers(0, 4, (*shape[:2], 1, 1))
    return np.select([kind == 0, kind == 1, kind == 2], [noise, whole, -whole * 0.1], 3.5).astype(np.float32)


@settings(max_examples=500, deadline=None)
@given(
    maps(),
    st.one_of(st.integers(1, 40), st.integers(1, 130)),
    st.lists(st.sampled_from([1e-50, 0.1, 0.5, 180 / 255, 0.9, 0.999, 1.0]), min_size=4, max_size=4),
    st.sampled_from([0.0, 0.001, 0.02, 0.5]),
)
def test_regions_are_those_of_the_cpu_to_the_last_bit(
    kernels: Any, cams: np.ndarray, size: int, thresholds: list[float], min_area: float
) -> None:
    results = found(kernels, cams, size, thresholds, min_area=min_area)
    assert not (results["flags"] & NOT_FINITE).any()
    kept = unflagged(cams, results["flags"])
    assert regions_from_results(results) == expected(kept, size, thresholds, min_area)
    for finding, region in sum(regions_from_results(results), ()):
        assert isinstance(region.left, int)
        assert 0 <= finding < cams.shape[1]


@pytest.mark.parametrize(("side", "size"), [(7, 224), (16, 512), (32, 1024), (7, 2048), (40, 33)])
def test_regions_of_networks_sizes(kernels: Any, side: int, size: int) -> None:
    rng = np.random.default_rng(size)
    cams = cv2.GaussianBlur(rng.normal(size=(side, side)), (0, 0), 1.0).astype(np.float32)[np.newaxis, np.newaxis]
    results = found(kernels, cams, size, [0.7])
    assert not results["flags"].any()
    assert regions_from_results(results) == expected(cams, size, [0.7])
    assert results["count"] > 0


def test_real_cams(kernels: Any, chexnet_bundle: Bundle, nih_images: list[Path]) -> None:
    manifest = chexnet_bundle.manifest
    spec = manifest.preprocess
    images = [network_input(np.asarray(Image.open(path).convert("L")), spec) for path in nih_images[:6]]
    backend = open_backend(chexnet_bundle, "onnxruntime", "fp32")
    cams = backend.run(np.stack(images)).cam
    backend.close()
    thresholds = [manifest.boxes.per_finding.get(label, manifest.boxes.threshold) for label in manifest.labels]
    for cuts in (thresholds, [0.2] * len(thresholds)):
        results = found(kernels, cams, spec.input_size, cuts, min_area=manifest.boxes.min_area)
        assert not results["flags"].any()
        assert results["count"] >= cams.shape[0] * cams.shape[1]
        assert regions_from_results(results) == expected(cams, spec.input_size, cuts, manifest.boxes.min_area)


def test_what_is_not_asked_for_is_not_made(kernels: Any) -> None:
    rng = np.random.default_rng(3)
    cams = rng.normal(size=(4, 3, 7, 7)).astype(np.float32)
    logits = rng.normal(size=(4, 3)).astype(np.float32)
    gates = [-np.inf, logits[0, 1], np.nextafter(logits[1, 2], np.float32(9))]  # always; reached exactly; just missed
    logits[3, 0] = np.nan
    wanted = np.ones((4, 3), np.uint8)
    wanted[0, 0] = 0
    cams[0, 0] = np.nan  # not even looked at
    results = found(
        kernels, cams, 56, [0.5] * 3, logits=logits, logit_thresholds=gates, wanted=wanted, missing=[2], capacity=512
    )
    taken = (logits >= np.float32(gates)) & (wanted > 0)
    taken[2] = False
    assert taken[0, 1]
    assert not taken[1, 2]
    assert not results["flags"].any()
    full = expected(np.nan_to_num(cams), 56, [0.5] * 3)
    assert regions_from_results(results) == [
        tuple(pair for pair in pairs if taken[image, pair[0]]) for image, pairs in enumerate(full)
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_cam_that_is_not_finite_is_flagged(kernels: Any, value: float) -> None:
    cams = np.random.default_rng(0).normal(size=(1, 2, 5, 5)).astype(np.float32)
    cams[0, 1, 4, 4] = value
    cams[0, 1, 0, 0] = 2e38
    results = found(kernels, cams, 30, [0.5, 0.5])
    assert results["flags"].tolist() == [[0, NOT_FINITE]]
    assert regions_from_results(results)[0] == expected(cams[:, :1], 30, [0.5])[0]


def test_a_cam_whose_sums_could_overflow_is_left_to_the_cpu(kernels: Any) -> None:
    cams = np.array([[[[3e38, -3e38], [0, 1]]]], np.float32)
    assert found(kernels, cams, 30, [0.5])["flags"].tolist() == [[OVERFLOW]]


def test_too_many_regions_are_left_to_the_cpu(kernels: Any) -> None:
    dots = np.zeros((1, 2, 1600), np.float32)
    corners = (np.arange(0, 40, 4)[:, np.newaxis] * 40 + np.arange(0, 40, 4)).ravel()
    dots[0, 0, corners[:64]] = 1  # as many as a map has room for
    dots[0, 1, corners[:65]] = 1
    dots = dots.reshape(1, 2, 40, 40)
    results = found(kernels, dots, 40, [0.5, 0.5])
    assert results["flags"].tolist() == [[0, OVERFLOW]]
    assert regions_from_results(results) == expected(dots[:, :1], 40, [0.5])


def test_too_many_runs_are_left_to_the_cpu(kernels: Any) -> None:
    rows = np.zeros((1, 1, 40, 40), np.float32)
    rows[0, 0, ::2] = 1  # 20 regions, but 800 runs down the columns
    assert found(kernels, rows, 40, [0.5])["flags"].tolist() == [[OVERFLOW]]
    columns = rows.transpose(0, 1, 3, 2)
    results = found(kernels, columns, 40, [0.5])
    assert regions_from_results(results) == expected(columns, 40, [0.5])


def test_on_a_huge_input_large_regions_are_left_to_the_cpu(kernels: Any) -> None:
    cams = np.zeros((1, 2, 16, 16), np.float32)
    cams[0, 0, :, :8] = cams[0, 1, 3, 3] = 1  # 2,048 columns; 256
    results = found(kernels, cams, 4096, [0.5, 0.5])
    assert results["flags"].tolist() == [[OVERFLOW, 0]]
    assert regions_from_results(results) == expected(unflagged(cams, results["flags"]), 4096, [0.5, 0.5])


def test_a_small_input_may_have_more_regions_than_columns(kernels: Any) -> None:
    dots = np.zeros((1, 1, 16, 16), np.float32)
    dots[0, 0, ::2, ::2] = 1  # 64 of one pixel
    results = found(kernels, dots, 16, [0.9])
    assert not results["flags"].any()
    assert len(regions_from_results(results)[0]) == 64
    assert regions_from_results(results) == expected(dots, 16, [0.9])


def test_small_regions_take_no_room(kernels: Any) -> None:
    dots = np.zeros((1, 1, 40, 40), np.float32)
    dots[0, 0, :16:2, ::2] = 1  # 160 of one pixel
    dots[0, 0, 30:35, 30:35] = 1
    results = found(kernels, dots, 40, [0.5], min_area=2 / 1600)
    assert not results["flags"].any()
    assert regions_from_results(results) == expected(dots, 40, [0.5], 2 / 1600)


def test_a_full_batch_flags_the_maps_that_found_no_room(kernels: Any) -> None:
    cams = np.random.default_rng(5).normal(size=(3, 4, 9, 9)).astype(np.float32)
    full = found(kernels, cams, 45, [0.5] * 4)
    capacity = int(full["count"]) // 2
    results = found(kernels, cams, 45, [0.5] * 4, capacity=capacity)
    assert results["count"] == full["count"]
    flags = results["flags"]
    assert set(np.unique(flags)) == {0, OVERFLOW}
    assert regions_from_results(results) == expected(unflagged(cams, flags), 45, [0.5] * 4)


def test_a_winding_region_is_one(kernels: Any) -> None:
    spiral = np.zeros((31, 31), np.float32)
    y = x = 15
    for turn in range(1, 28):  # arms one pixel wide, one pixel apart
        dy, dx = [(0, 1), (1, 0), (0, -1), (-1, 0)][turn % 4]
        for _ in range(turn // 2 * 2 + (turn % 2) * 0 + 2):
            if 0 <= y + dy < 31 and 0 <= x + dx < 31:
                y, x = y + dy, x + dx
                spiral[y, x] = 1 + (turn % 3) / 8
    cams = spiral[np.newaxis, np.newaxis]
    results = found(kernels, cams, 31, [0.5])
    assert regions_from_results(results) == expected(unflagged(cams, results["flags"]), 31, [0.5])


def test_sizes_beyond_the_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="5000 pixels a side: expected 1 to 4096"):
        boxes_launch(1, 1, 7, 7, 5000, capacity=1)


def test_launches_fit_every_gpu() -> None:
    for size in (1, 224, 512, 1024, 4096):
        launches = (geometry_launch(32, size), boxes_launch(32, 14, 7, 7, size, capacity=1))
        assert all(launch.shared_bytes <= 48 << 10 and launch.block[0] <= 1024 for launch in launches)
        assert all(launch.grid[1] <= 65535 and launch.grid[2] <= 65535 for launch in launches)
