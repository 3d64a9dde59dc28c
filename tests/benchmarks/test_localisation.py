"""Localisation and box agreement against painted pixels, against every assignment, and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from thoraxrt.benchmarks.localisation import IOBB_THRESHOLDS, IOU_THRESHOLDS, box_agreement, localisation
from thoraxrt.engine.boxes import Box, Peak, Rectangle, iobb, iou
from thoraxrt.export.nih import NihBox

SIDE = 24
"""Boxes lie on this small grid, so that painting them is exact."""

FINDINGS = ("Mass", "Nodule")


def truth(x: float, y: float, width: float, height: float, finding: str = "Mass") -> NihBox:
    return NihBox(finding=finding, x=x, y=y, width=width, height=height)


def found(x: float, y: float, width: float, height: float, finding: str = "Mass") -> Box:
    peak = Peak(x=x + width / 2, y=y + height / 2)
    return Box(finding=finding, x=x, y=y, width=width, height=height, score=0.5, peak=peak)


corner = st.integers(0, SIDE - 1)
rectangles = st.tuples(corner, corner, corner, corner).map(
    lambda c: (c[0], c[1], min(c[2] + 1, SIDE - c[0]), min(c[3] + 1, SIDE - c[1]))
)
truths = st.builds(lambda r, f: truth(r[0], r[1], r[2], r[3], f), rectangles, st.sampled_from(FINDINGS))
founds = st.builds(lambda r, f: found(r[0], r[1], r[2], r[3], f), rectangles, st.sampled_from(FINDINGS))


def painted(box: Rectangle) -> npt.NDArray[np.bool_]:
    pixels = np.zeros((SIDE, SIDE), bool)
    pixels[int(box.y) : int(box.y + box.height), int(box.x) : int(box.x + box.width)] = True
    return pixels


def painted_iobb(detected: Rectangle, annotated: Rectangle) -> float:
    return float((painted(detected) & painted(annotated)).sum() / painted(detected).sum())


def painted_iou(one: Rectangle, other: Rectangle) -> float:
    return float((painted(one) & painted(other)).sum() / (painted(one) | painted(other)).sum())


@given(one=founds, other=truths)
def test_overlaps_are_those_of_painted_pixels(one: Box, other: NihBox) -> None:
    assert iobb(one, other) == painted_iobb(one, other)
    assert iou(one, other) == iou(other, one) == painted_iou(one, other)
    assert iou(one, other) <= iobb(one, other)  # which is why "either IoU or IoBB" is IoBB


edge = st.floats(0.001, 1024, allow_subnormal=False)


@given(x=edge, y=edge, width=edge, height=edge)
def test_a_box_overlaps_itself_by_one_whatever_rounding_does(x: float, y: float, width: float, height: float) -> None:
    box = truth(x, y, width, height)
    assert 1 - 1e-9 <= iou(box, box) <= 1
    assert 1 - 1e-9 <= iobb(box, box) <= 1


@settings(max_examples=60, deadline=None)
@given(images=st.lists(st.tuples(st.lists(truths, max_size=3), st.lists(founds, max_size=4)), min_size=1, max_size=4))
def test_localisation_is_the_papers_counted_slowly(images: list[tuple[list[NihBox], list[Box]]]) -> None:
    of_all = sum(len(truly) for truly, _ in images)
    assume(of_all)
    results = localisation([a for a, _ in images], [d for _, d in images], FINDINGS)
    assert tuple(result.finding for result in results) == FINDINGS
    for result in results:
        for rows, overlap, thresholds in (
            (result.iobb, painted_iobb, IOBB_THRESHOLDS),
            (result.iou, painted_iou, IOU_THRESHOLDS),
        ):
            assert tuple(row.threshold for row in rows) == thresholds
            for row in rows:
                correct = annotated = wrong = 0
                for truly, detections in images:
                    mine = [a for a in truly if a.finding == result.finding]
                    boxes = [d for d in detections if d.finding == result.finding]
                    annotated += len(mine)
                    correct += sum(any(overlap(d, a) > row.threshold for d in boxes) for a in mine)
                    wrong += sum(not any(overlap(d, a) > row.threshold for a in mine) for d in boxes)
                assert (row.correct, row.false_positives, result.annotated) == (correct, wrong, annotated)
                assert row.accuracy == (correct / annotated if annotated else None)
                assert row.average_false_positives == wrong / of_all
                assert result.images == len(images)


def test_localisation_by_hand() -> None:
    """One image with the finding, hit by half of a box; one with another, where a box is found all the same: as the paper,
    over 2 rows of the box list."""
    annotated = [[truth(0, 0, 10, 10), truth(0, 0, 10, 10, "Nodule")], []]
    detected = [[found(5, 0, 10, 10)], [found(0, 0, 5, 5)]]
    (mass,) = localisation(annotated, detected, ("Mass",))
    assert [(r.accuracy, r.average_false_positives) for r in mass.iobb] == [
        (1.0, 0.5),
        (1.0, 0.5),
        (0.0, 1.0),  # an IoBB of 0.5 is not above 0.5
        (0.0, 1.0),
        (0.0, 1.0),
    ]
    assert [r.correct for r in mass.iou] == [1, 1, 1, 0, 0, 0, 0]  # an IoU of a third


def test_another_findings_box_is_neither_a_hit_nor_a_miss() -> None:
    mass, nodule = localisation([[truth(0, 0, 9, 9)]], [[found(0, 0, 9, 9, "Nodule")]], FINDINGS)
    assert (mass.annotated, mass.detected, mass.iobb[0].accuracy, mass.iobb[0].false_positives) == (1, 0, 0.0, 0)
    assert (nodule.annotated, nodule.detected) == (0, 1)
    assert (nodule.iobb[0].accuracy, nodule.iobb[0].false_positives) == (None, 1)


def test_localisation_needs_the_same_images() -> None:
    with pytest.raises(ValueError, match="1 images with annotated and 2 with detected boxes"):
        localisation([[]], [[], []], FINDINGS)
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="no annotated box"):
            localisation(nothing, nothing, FINDINGS)


@settings(max_examples=60, deadline=None)
@given(ours=st.lists(founds, max_size=4), theirs=st.lists(founds, max_size=4))
def test_boxes_are_matched_as_the_best_of_all_assignments(ours: list[Box], theirs: list[Box]) -> None:
    for result in box_agreement([ours], [theirs], FINDINGS):
        few, many = sorted(
            ([b for b in side if b.finding == result.finding] for side in (ours, theirs)), key=lambda side: len(side)
        )
        best = max(
            math.fsum(painted_iou(a, b) for a, b in zip(few, order, strict=True))
            for order in itertools.permutations(many, len(few))
        )
        assert (result.mean_iou or 0.0) * result.matched == pytest.approx(best)
        assert (result.unmatched is None) == (result.boxes == 0)
        assert (result.mean_iou is None) == (result.matched == 0)


def test_equal_boxes_agree_entirely() -> None:
    boxes = [[found(0, 0, 4, 4), found(8, 8, 4, 4)], [found(1, 1, 2, 2, "Nodule")]]
    mass, _ = box_agreement(boxes, boxes, FINDINGS)
    assert (mass.boxes, mass.reference_boxes, mass.matched) == (2, 2, 2)
    assert (mass.mean_iou, mass.mean_peak_distance, mass.unmatched, mass.reference_unmatched) == (1, 0, 0, 0)


def test_agreement_by_hand() -> None:
    """Of two boxes one moved by 3 right and 4 down, the other vanished; nothing matches across images."""
    ours = [[found(3, 4, 10, 10)], [found(0, 0, 2, 2)]]
    theirs = [[found(0, 0, 10, 10), found(20, 20, 2, 2)], []]
    (mass,) = box_agreement(ours, theirs, ("Mass",))
    assert (mass.matched, mass.unmatched, mass.reference_unmatched) == (1, 0.5, 0.5)
    assert mass.mean_iou == 42 / 158
    assert mass.mean_peak_distance == 5


def test_agreement_needs_the_same_images() -> None:
    with pytest.raises(ValueError, match="boxes of 1 and of 0 images"):
        box_agreement([[]], [], FINDINGS)
