"""The published numbers against what they must be made of: whole boxes, whole images, their own sums."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from thoraxrt.benchmarks.published import (
    DATA_SHEET,
    OFFICIAL_TEST_IMAGES,
    REFERENCES,
    TABLE_4,
    TABLE_7,
    LocalisationReference,
    comparable,
)
from thoraxrt.export.nih import LABELS, NihDataset

BOXES = (180, 146, 153, 123, 85, 79, 120, 98)
"""Of each finding in BBox_List_2017.csv, in the order of LABELS."""


def rounded_to(value: float, whole: int, digits: int = 4) -> bool:
    """Whether value is some k / whole, cut off or rounded to that many digits: the paper does both."""
    unit = 10**-digits
    return any(-unit / 2 - 1e-9 <= value - k / whole <= unit / 2 + 1e-9 for k in near(value, whole)) or any(
        -1e-9 <= k / whole - value < unit - 1e-9 for k in near(value, whole)
    )


def near(value: float, whole: int) -> range:
    return range(math.floor(value * whole) - 1, math.ceil(value * whole) + 2)


@pytest.mark.parametrize("table", [TABLE_4, TABLE_7])
def test_the_tables_count_whole_boxes(table: LocalisationReference) -> None:
    """A mistyped digit fails: of an accuracy nearly always, of an average one time in ten."""
    accuracy, false_positives = np.array(table.accuracy), np.array(table.average_false_positives)
    assert accuracy.shape == false_positives.shape == (len(table.thresholds), len(table.findings))
    assert (np.diff(accuracy, axis=0) <= 0).all()  # a higher threshold localises no more
    assert (np.diff(false_positives, axis=0) >= 0).all()
    for row in table.accuracy:
        assert [rounded_to(value, boxes) for value, boxes in zip(row, BOXES, strict=True)] == [True] * 8
    for row in table.average_false_positives:
        assert all(rounded_to(value, sum(BOXES), 3 if value == 1.009 else 4) for value in row)


def test_iou_never_localises_more_than_iobb() -> None:
    for threshold in (0.1, 0.5):
        iou, iobb = TABLE_7.thresholds.index(threshold), TABLE_4.thresholds.index(threshold)
        assert all(a <= b for a, b in zip(TABLE_7.accuracy[iou], TABLE_4.accuracy[iobb], strict=True))


def test_references() -> None:
    assert len({reference.name for reference in REFERENCES}) == len(REFERENCES)
    for reference in REFERENCES:
        assert reference.url.startswith("https://arxiv.org/abs/")
        if reference.aurocs:
            assert tuple(reference.aurocs) == LABELS
            assert np.mean(list(reference.aurocs.values())) == pytest.approx(reference.mean, abs=5e-5)


def test_only_the_whole_official_test_list_is_comparable() -> None:
    by_name = {reference.name: reference for reference in REFERENCES}
    wang, chexnet = by_name["Wang 2017"], by_name["CheXNet"]
    assert comparable(wang, "test", OFFICIAL_TEST_IMAGES)
    assert not comparable(wang, "test", 76)
    assert not comparable(wang, "all", 112_120)
    assert not comparable(wang, "train_val", OFFICIAL_TEST_IMAGES)
    assert not comparable(chexnet, "test", OFFICIAL_TEST_IMAGES)


def test_the_data_sheet_adds_up() -> None:
    matrix, counts = np.array(DATA_SHEET.co_occurrence), np.array(DATA_SHEET.counts)
    assert (matrix == matrix.T).all()
    assert (matrix.diagonal() < counts).all()  # alone: fewer than in all
    assert (matrix.sum(axis=0) >= counts).all()  # who is not alone is with somebody


def test_the_numbers_of_the_real_lists(nih: Path) -> None:
    dataset = NihDataset.open(nih)
    boxes = Counter(box.finding for record in dataset for box in record.boxes)
    assert tuple(boxes[finding] for finding in LABELS[:8]) == BOXES
    assert len(dataset.split("test")) == OFFICIAL_TEST_IMAGES
    assert (len(dataset), len({record.patient for record in dataset})) == (DATA_SHEET.images, DATA_SHEET.patients)
    counts = dataset.label_matrix().sum(axis=0, dtype=int)
    difference = dict(zip(LABELS, (counts - DATA_SHEET.counts).tolist(), strict=True))
    assert {finding: count for finding, count in difference.items() if count} == {
        "Atelectasis": 24,
        "Cardiomegaly": 4,
        "Effusion": 10,
        "Infiltration": 23,
        "Mass": 36,
        "Nodule": 8,
        "Pneumonia": 78,
        "Pneumothorax": 4,
    }
