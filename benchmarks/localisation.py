"""Localisation: detected boxes against annotated ones, as Wang et al. measured them, and two detectors' boxes.

Owns the matching and the counts; the overlaps are `thoraxrt.engine.boxes`'. Knows neither images nor networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from thoraxrt.benchmarks.published import TABLE_4, TABLE_7
from thoraxrt.engine.boxes import Box, Rectangle, iobb, iou
from thoraxrt.export.nih import NihBox

__all__ = [
    "IOBB_THRESHOLDS",
    "IOU_THRESHOLDS",
    "BoxAgreement",
    "Localisation",
    "ThresholdResult",
    "box_agreement",
    "localisation",
]

_B = TypeVar("_B", NihBox, Box)

IOBB_THRESHOLDS: Final = TABLE_4.thresholds
IOU_THRESHOLDS: Final = TABLE_7.thresholds


class ThresholdResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of the paper's tables, for one finding.

    `correct` of the finding's annotated boxes are localised; `accuracy` is their share, 0..1, None without any
    annotated box. `false_positives` detected boxes are not correct; `average_false_positives` are theirs per annotated
    box of any finding, as the paper counts.
    """

    threshold: float
    correct: int
    accuracy: float | None
    false_positives: int
    average_false_positives: float


class Localisation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finding on all images: how many boxes are annotated and detected, and the result at each threshold."""

    finding: str
    images: int
    annotated: int
    detected: int
    iobb: tuple[ThresholdResult, ...]
    iou: tuple[ThresholdResult, ...]


class BoxAgreement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a candidate's boxes of one finding are the reference's.

    `matched` pairs overlap; `mean_iou` is theirs, 0..1, and `mean_peak_distance` that of their peaks in pixels of the
    original image (None without a pair). `unmatched` and `reference_unmatched` are the shares, 0..1, of each side's
    boxes that have no partner (None where that side has no box).
    """

    finding: str
    boxes: int
    reference_boxes: int
    matched: int
    mean_iou: float | None
    mean_peak_distance: float | None
    unmatched: float | None
    reference_unmatched: float | None


def localisation(
    annotated: Sequence[Iterable[NihBox]], detected: Sequence[Iterable[Box]], findings: Sequence[str]
) -> tuple[Localisation, ...]:
    """Accuracy and average false positives of each of `findings` (arXiv 1705.02315, section 4.3, Tables 4 and 7).

    `annotated` and `detected` hold the boxes of each image, in the same order; all images are counted, those without
    a box of the finding too. Boxes are in pixels of the original image, origin top left.

    A box is localised correctly where IoBB (or IoU) is *above* the threshold. Accuracy is the share of annotated boxes
    that some detected box of the finding localises; each detected box that localises none in its image is a false
    positive. Where the paper is silent: (1) IoBB and IoU are judged apart, as its tables are; at equal thresholds its
    "either IoU or IoBB" is IoBB alone, for IoU is never above it. (2) One detected box may localise several annotated
    ones, and several detected boxes one, none of them a false positive. (3) The average is over annotated boxes of every
    finding, not over images: the paper's are whole multiples of 1/984, and its box list has 984 rows, of 880 images. Per
    image they would be 11.8 % higher for the same boxes. (4) A finding is looked for on every
    image, so `detected` should hold its boxes there too. On the annotated images alone the paper's counts would be 5 to
    9 boxes of a finding per image; it says 1 to 3 (A.3).

    Raises ValueError where the two sequences differ in length or hold no annotated box.
    """
    if len(annotated) != len(detected):
        raise ValueError(
            f"{len(annotated)} images with annotated and {len(detected)} with detected boxes; expected as many"
        )
    images = [(list(truths), list(boxes)) for truths, boxes in zip(annotated, detected, strict=True)]
    of_all = sum(len(truths) for truths, _ in images)
    if not of_all:
        raise ValueError("no annotated box; expected at least one, of any finding")
    return tuple(
        _localisation(finding, [(_of(finding, truths), _of(finding, boxes)) for truths, boxes in images], of_all)
        for finding in findings
    )


def box_agreement(
    boxes: Sequence[Iterable[Box]], reference: Sequence[Iterable[Box]], findings: Sequence[str]
) -> tuple[BoxAgreement, ...]:
    """How far a candidate's boxes are the reference's, for each of `findings`.

    Both hold the boxes of each image, in the same order; in pixels of the original image, origin top left. Within an
    image boxes are matched one to one so that the sum of IoU is greatest (`scipy.optimize.linear_sum_assignment`);
    boxes that do not overlap are no match.

    Raises ValueError where the two sequences differ in length.
    """
    if len(boxes) != len(reference):
        raise ValueError(f"boxes of {len(boxes)} and of {len(reference)} images; expected the same images")
    images = list(zip(boxes, reference, strict=True))
    return tuple(
        _agreement(finding, [(_of(finding, ours), _of(finding, theirs)) for ours, theirs in images])
        for finding in findings
    )


def _of(finding: str, boxes: Iterable[_B]) -> list[_B]:
    return [box for box in boxes if box.finding == finding]


def _localisation(finding: str, images: list[tuple[list[NihBox], list[Box]]], of_all: int) -> Localisation:
    return Localisation(
        finding=finding,
        images=len(images),
        annotated=sum(len(truths) for truths, _ in images),
        detected=sum(len(boxes) for _, boxes in images),
        iobb=_results(images, iobb, IOBB_THRESHOLDS, of_all),
        iou=_results(images, iou, IOU_THRESHOLDS, of_all),
    )


def _results(
    images: list[tuple[list[NihBox], list[Box]]],
    overlap: Callable[[Rectangle, Rectangle], float],
    thresholds: Iterable[float],
    of_all: int,
) -> tuple[ThresholdResult, ...]:
    tables = [_overlaps(boxes, truths, overlap) for truths, boxes in images]  # (detected, annotated) each
    of_annotated = np.concatenate([table.max(axis=0, initial=0.0) for table in tables])  # each box's best
    of_detected = np.concatenate([table.max(axis=1, initial=0.0) for table in tables])
    results = []
    for threshold in thresholds:
        correct = int((of_annotated > threshold).sum())
        false_positives = int((of_detected <= threshold).sum())
        results.append(
            ThresholdResult(
                threshold=threshold,
                correct=correct,
                accuracy=correct / of_annotated.size if of_annotated.size else None,
                false_positives=false_positives,
                average_false_positives=false_positives / of_all,
            )
        )
    return tuple(results)


def _overlaps(
    rows: Sequence[Rectangle], columns: Sequence[Rectangle], overlap: Callable[[Rectangle, Rectangle], float]
) -> npt.NDArray[np.float64]:
    table = [[overlap(row, column) for column in columns] for row in rows]
    return np.array(table, np.float64).reshape(len(rows), len(columns))


def _agreement(finding: str, images: list[tuple[list[Box], list[Box]]]) -> BoxAgreement:
    ious: list[float] = []
    distances: list[float] = []
    for ours, theirs in images:
        table = _overlaps(ours, theirs, iou)  # (ours, theirs)
        for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True):
            if table[row, column] > 0:
                ious.append(float(table[row, column]))
                one, other = ours[row].peak, theirs[column].peak
                distances.append(math.hypot(one.x - other.x, one.y - other.y))
    boxes, reference_boxes = sum(len(ours) for ours, _ in images), sum(len(theirs) for _, theirs in images)
    return BoxAgreement(
        finding=finding,
        boxes=boxes,
        reference_boxes=reference_boxes,
        matched=len(ious),
        mean_iou=math.fsum(ious) / len(ious) if ious else None,
        mean_peak_distance=math.fsum(distances) / len(distances) if distances else None,
        unmatched=1 - len(ious) / boxes if boxes else None,
        reference_unmatched=1 - len(ious) / reference_boxes if reference_boxes else None,
    )
