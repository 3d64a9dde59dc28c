"""CAM to boxes: hand-worked cases, a slow oracle, and the stated ties and order."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thoraxrt.engine.boxes import Box, BoxSpec, Peak, Region, boxes_from_cam, regions_from_cam, sort_boxes, upsample
from thoraxrt.engine.postprocess import SigmoidOpNorm, logistic
from thoraxrt.engine.preprocess import Exact, Geometry, PreprocessSpec, Shorter

F = np.float32


def slow_upsample(cam: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """One pixel at a time, each operation a float32 scalar's, in the stated order."""
    height, width = cam.shape
    out = np.empty((size, size), np.float32)
    for i in range(size):
        for j in range(size):
            y = min(max((F(i) + F(0.5)) * (F(height) / F(size)) - F(0.5), F(0)), F(height - 1))
            x = min(max((F(j) + F(0.5)) * (F(width) / F(size)) - F(0.5), F(0)), F(width - 1))
            y0, x0 = int(np.floor(y)), int(np.floor(x))
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            ty, tx = y - F(y0), x - F(x0)
            top = cam[y0, x0] + (cam[y0, x1] - cam[y0, x0]) * tx
            bottom = cam[y1, x0] + (cam[y1, x1] - cam[y1, x0]) * tx
            out[i, j] = top + (bottom - top) * ty
    return out


def slow_regions(cam: npt.NDArray[np.float32], size: int, threshold: float) -> list[Region]:
    """Flood fill from each pixel in raster order."""
    heat = slow_upsample(cam, size)
    low, high = heat.min(), heat.max()
    if not high > low:
        return []
    mask = (heat - low) / (high - low) >= F(threshold)
    regions = []
    for start in zip(*np.nonzero(mask), strict=True):
        if not mask[start]:
            continue
        pending, member = [start], []
        mask[start] = False
        while pending:
            y, x = pending.pop()
            member.append((int(y), int(x)))
            for ny in range(max(y - 1, 0), min(y + 2, size)):
                for nx in range(max(x - 1, 0), min(x + 2, size)):
                    if mask[ny, nx]:
                        mask[ny, nx] = False
                        pending.append((ny, nx))
        member.sort()
        py, px = max(member, key=lambda p: (heat[p], -p[0], -p[1]))
        ys, xs = [y for y, _ in member], [x for _, x in member]
        regions.append(
            Region(
                left=min(xs), top=min(ys), right=max(xs) + 1, bottom=max(ys) + 1,
                area=len(member), peak_x=px, peak_y=py, peak_value=float(heat[py, px]),
            )
        )  # fmt: skip
    return sorted(regions, key=lambda r: (r.top, r.left, r.peak_y, r.peak_x))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(8, 24), st.sampled_from([0.3, 0.5, 0.7]), st.integers(0, 2**32)
)
def test_regions_equal_the_slow_oracle_to_the_last_bit(
    height: int, width: int, size: int, threshold: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cam = rng.normal(size=(height, width)).astype(np.float32)
    if seed % 2:
        cam = np.round(cam)  # plateaus and ties
    np.testing.assert_array_equal(upsample(cam, size), slow_upsample(cam, size))
    assert regions_from_cam(cam, size, threshold) == slow_regions(cam, size, threshold)


def test_upsample_by_hand() -> None:
    # Positions of 4 samples of 2 cells: (i + 0.5) / 2 - 0.5 = -0.25, 0.25, 0.75, 1.25, clamped to 0..1.
    heat = upsample(np.array([[0, 4], [8, 12]], np.float32), 4)
    np.testing.assert_array_equal(
        heat, np.array([[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10], [8, 9, 11, 12]], np.float32)
    )


def test_one_hot_cell_by_hand() -> None:
    # An 8-pixel input over 4 cells: cell (1, 2) is hot. Its taps: 0.25, 0.75, 0.75, 0.25 around pixels 3..6 in x, 1..4 in y.
    cam = np.zeros((4, 4), np.float32)
    cam[1, 2] = 1
    (region,) = regions_from_cam(cam, 8, 0.5)
    # max is 0.75 * 0.75; at half of it: 0.28125 <= v: the 2 x 2 core alone (0.25 * 0.75 = 0.1875 is below).
    assert region == Region(left=4, top=2, right=6, bottom=4, area=4, peak_x=4, peak_y=2, peak_value=0.5625)


def test_a_box_is_mapped_to_the_source_with_score_and_peak() -> None:
    cam = np.zeros((4, 4), np.float32)
    cam[1, 2] = 1
    geometry = PreprocessSpec(resize=Shorter(pixels=10), crop=8).geometry(100, 100)  # 10 source pixels each, crop at 1
    (box,) = boxes_from_cam(cam, finding="Mass", bias=-2.0, spec=BoxSpec(threshold=0.5, min_area=0), geometry=geometry)
    assert box == Box(
        finding="Mass", x=50.0, y=30.0, width=20.0, height=20.0, score=logistic(0.5625 - 2.0), peak=Peak(x=55.0, y=35.0)
    )


def test_a_score_is_made_by_the_models_own_activation() -> None:
    geometry = PreprocessSpec(resize=Exact(width=3, height=3)).geometry(3, 3)
    op_norm = partial(SigmoidOpNorm(thresholds=(0.5, 0.1)).probability, index=1)
    (box,) = boxes_from_cam(
        np.eye(3, dtype=np.float32),
        finding="Mass",
        bias=-1.0,
        spec=BoxSpec(min_area=0),
        geometry=geometry,
        probability=op_norm,
    )
    assert box.score == pytest.approx(1 - 0.5 / (2 * 0.9))  # the local logit is 0, s = 0.5, t = 0.1


def test_diagonal_neighbours_are_one_region() -> None:
    # Input size equals CAM size: upsampling is the identity.
    assert len(regions_from_cam(np.eye(3, dtype=np.float32), 3, 0.5)) == 1


def test_a_flat_map_has_no_region() -> None:
    assert regions_from_cam(np.full((7, 7), 3.5, np.float32), 224, 0.5) == []


def test_peak_ties_go_to_the_first_in_raster_order() -> None:
    cam = np.array([[0, 5, 0], [5, 5, 5], [0, 0, 0]], np.float32)
    (region,) = regions_from_cam(cam, 3, 0.5)
    assert (region.peak_x, region.peak_y) == (1, 0)


@pytest.fixture
def identity() -> Geometry:
    return PreprocessSpec(resize=Exact(width=8, height=8)).geometry(8, 8)


def test_boxes_come_by_score_and_small_ones_go(identity: Geometry) -> None:
    cam = np.zeros((8, 8), np.float32)
    cam[6, 6] = 5
    cam[0:2, 0:2] = 6
    cam[0:2, 5:7] = 5
    both = boxes_from_cam(cam, finding="Mass", bias=0, spec=BoxSpec(threshold=0.5, min_area=0), geometry=identity)
    assert [(b.x, b.y) for b in both] == [(0, 0), (5, 0), (6, 6)]  # equal scores: by y, then x
    large = boxes_from_cam(cam, finding="Mass", bias=0, spec=BoxSpec(threshold=0.5, min_area=2 / 64), geometry=identity)
    assert [(b.x, b.y) for b in large] == [(0, 0), (5, 0)]
    spec = BoxSpec(threshold=0.5, min_area=0, per_finding={"Mass": 0.9})
    assert [(b.x, b.y) for b in boxes_from_cam(cam, finding="Mass", bias=0, spec=spec, geometry=identity)] == [(0, 0)]
    first = BoxSpec(threshold=0.5, min_area=0, max_per_finding=1)
    assert boxes_from_cam(cam, finding="Mass", bias=0, spec=first, geometry=identity) == both[:1]


def test_order_is_score_then_y_then_x() -> None:
    def box(score: float, y: float, x: float) -> Box:
        return Box(finding="Mass", x=x, y=y, width=1, height=1, score=score, peak=Peak(x=x, y=y))

    boxes = [box(0.5, 1, 1), box(0.5, 1, 0), box(0.9, 9, 9), box(0.5, 0, 5)]
    assert [(b.score, b.y, b.x) for b in sort_boxes(boxes)] == [(0.9, 9, 9), (0.5, 0, 5), (0.5, 1, 0), (0.5, 1, 1)]


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 0.0},
        {"threshold": 1.5},
        {"per_finding": {"Mass": 2.0}},
        {"min_area": -0.1},
        {"max_per_finding": 0},
    ],
)
def test_senseless_specs_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        BoxSpec(**fields)  # type: ignore[arg-type]
