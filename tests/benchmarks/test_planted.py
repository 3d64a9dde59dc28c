"""The sample network finds what is planted in phantoms, and IoBB by hand."""

from __future__ import annotations

import numpy as np
import pytest

from thoraxrt.benchmarks.auroc import auroc_per_finding
from thoraxrt.engine.boxes import iobb
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import Radiograph
from thoraxrt.engine.engine import Engine
from thoraxrt.export.nih import LABELS, NihBox
from thoraxrt.export.phantoms import PLANTED, phantom
from thoraxrt.export.sample import UNSEEN_SEED


def box(x: float, y: float, width: float, height: float) -> NihBox:
    return NihBox(finding="Mass", x=x, y=y, width=width, height=height)


def test_the_sample_network_finds_what_is_planted_in_phantoms_it_never_saw(sample_bundle: Bundle) -> None:
    """The embedded default is good enough to test parity and localisation with."""
    phantoms = [phantom(UNSEEN_SEED, index) for index in range(64)]
    with Engine.open(sample_bundle, backend="onnxruntime") as engine:
        predictions = [engine.predict_one(Radiograph.from_pixels(p.pixels)) for p in phantoms]
    positive = np.array([[label in p.findings for label in LABELS] for p in phantoms], np.uint8)
    logits = np.array([[finding.logit for finding in prediction.findings] for prediction in predictions])
    areas = [area for area in auroc_per_finding(positive, logits, LABELS).values() if area is not None]
    assert len(areas) == len(PLANTED)
    assert np.mean(areas) > 0.9
    hits = [
        any(truth.finding == found.finding and iobb(found, truth) >= 0.25 for truth in p.boxes)
        for p, prediction in zip(phantoms, predictions, strict=True)
        for found in prediction.boxes
    ]
    assert len(hits) > 20
    assert np.mean(hits) > 0.5


@pytest.mark.parametrize(
    ("detected", "annotated", "expected"),
    [
        (box(0, 0, 10, 10), box(0, 0, 10, 10), 1.0),
        (box(0, 0, 10, 10), box(5, 0, 100, 100), 0.5),
        (box(0, 0, 10, 10), box(10, 0, 5, 5), 0.0),
        (box(0, 0, 10, 10), box(20, 20, 5, 5), 0.0),
        (box(2, 2, 2, 2), box(0, 0, 100, 100), 1.0),  # over the detected box: a small one inside scores fully
    ],
)
def test_iobb_by_hand(detected: NihBox, annotated: NihBox, expected: float) -> None:
    assert iobb(detected, annotated) == expected
