"""Operating points, changes of side, reliability and errors: by hand, and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from thoraxrt.benchmarks.measures import ERROR_EDGES, changes, errors, operating, reliability
from thoraxrt.engine.errors import RequestError


def test_sensitivity_and_specificity_by_hand() -> None:
    positive = np.array([[1, 0]] * 10 + [[0, 0]] * 30, np.uint8)
    reported = np.zeros((40, 2), np.bool_)
    reported[:8, 0] = True  # 8 of 10 positives
    reported[10:13, 0] = True  # 3 of 30 negatives
    mass, edema = operating(("Mass", "Edema"), positive, reported)
    assert (mass.sensitivity.count, mass.sensitivity.of) == (8, 10)
    assert (mass.specificity.count, mass.specificity.of) == (27, 30)
    assert mass.sensitivity.interval is not None
    # Wilson 1927: (p + z^2 / 2n -+ z sqrt(p q / n + z^2 / 4n^2)) / (1 + z^2 / n)
    z, n, p = 1.959963984540054, 10, 0.8
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    assert (mass.sensitivity.interval.low, mass.sensitivity.interval.high) == pytest.approx(expected)
    assert (edema.sensitivity.of, edema.sensitivity.interval) == (0, None)
    assert (edema.specificity.count, edema.specificity.of) == (40, 40)


def test_who_changes_side_by_hand() -> None:
    reference = np.array([[1, 0], [1, 0], [0, 0], [0, 0], [0, 0], [1, 0]], np.bool_)
    reported = np.array([[0, 0], [1, 0], [1, 0], [1, 0], [0, 0], [0, 0]], np.bool_)
    patients = np.array([5, 5, 5, 5, 6, 7])
    mass, edema = changes(("Mass", "Edema"), reported, reference, patients)
    assert (mass.images_now_reported, mass.images_no_longer_reported) == (2, 2)
    assert (mass.patients_now_reported, mass.patients_no_longer_reported) == (1, 2)
    assert mass.kappa == pytest.approx((2 / 6 - 0.5) / (1 - 0.5))  # 2 of 6 agree; half would by chance
    assert (edema.images_now_reported, edema.kappa) == (0, None)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 400), digits=st.sampled_from([1, 2, 12]))
def test_reliability_is_that_of_its_images(seed: int, images: int, digits: int) -> None:
    random = np.random.default_rng(seed)
    probabilities = random.beta(0.3, 3, (images, 1)).round(digits)
    positive = random.random((images, 1)) < probabilities
    (found,) = reliability(("Mass",), positive, probabilities)
    column = probabilities[:, 0]
    assert found.brier == pytest.approx(brier_score_loss(positive[:, 0], column, pos_label=True))
    assert sum(part.images for part in found.bins) == images
    assert len(found.bins) <= 15
    means = [part.probability for part in found.bins]
    assert means == sorted(means)
    assert sum(part.images * part.probability for part in found.bins) == pytest.approx(column.sum())
    assert sum(part.images * part.positive for part in found.bins) == pytest.approx(positive.sum())
    expected = sum(part.images * abs(part.probability - part.positive) for part in found.bins) / images
    assert found.ece == pytest.approx(expected)


def test_bins_of_equal_mass_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    probabilities = random.beta(0.3, 3, (2001, 1))  # no ties, and no image on an edge
    positive = random.random((2001, 1)) < probabilities
    (found,) = reliability(("Mass",), positive, probabilities)
    frequency, mean = calibration_curve(positive[:, 0], probabilities[:, 0], n_bins=15, strategy="quantile")
    assert [part.probability for part in found.bins] == pytest.approx(mean, abs=1e-3)
    assert [part.positive for part in found.bins] == pytest.approx(frequency, abs=0.01)
    assert {part.images for part in found.bins} <= {133, 134}


def test_probabilities_that_are_frequencies_have_hardly_an_error_and_others_have_theirs() -> None:
    random = np.random.default_rng(1)
    probabilities = random.random((20_000, 1))
    positive = random.random((20_000, 1)) < probabilities
    assert reliability(("Mass",), positive, probabilities)[0].ece < 0.02
    assert reliability(("Mass",), positive, probabilities / 2)[0].ece == pytest.approx(0.25, abs=0.01)
    assert reliability(("Mass",), np.ones((9, 1)), np.ones((9, 1)))[0].ece == 0


def test_errors_by_hand() -> None:
    reference = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
    ours = reference + np.array([[0.0, 1e-12], [0.02, -0.5]])
    found = errors(ours, reference)
    assert found.mean == pytest.approx(0.13)
    assert found.p50 == pytest.approx(0.01)
    assert found.p99 == pytest.approx(np.quantile([0, 0, 0.02, 0.5], 0.99))
    assert found.max == pytest.approx(0.5)
    assert found.rank_correlation == 1
    assert len(found.histogram) == len(ERROR_EDGES) + 1 == 24
    assert found.histogram[0] == 2  # none, or less than can be drawn
    assert np.flatnonzero(found.histogram).tolist() == [0, 15, 18]  # 0.02 from 0.01 on, 0.5 from 10^-0.5 on
    assert sum(found.histogram) == 4


def test_rank_correlation_is_scipys_and_defined_where_answers_are_constant() -> None:
    random = np.random.default_rng(2)
    reference = random.normal(size=(100, 3))
    ours = reference + random.normal(size=(100, 3))
    assert errors(ours, reference).rank_correlation == spearmanr(ours.ravel(), reference.ravel()).statistic
    assert errors(np.zeros((4, 2)), reference[:4, :2]).rank_correlation == 0
    assert errors(np.zeros((4, 2)), np.zeros((4, 2))).rank_correlation == 1


@pytest.mark.parametrize("value", [np.nan, -0.1, 1.1])
def test_what_is_no_probability_has_no_reliability(value: float) -> None:
    with pytest.raises(RequestError, match=r"outside 0\.\.1"):
        reliability(("Mass",), np.array([[1]]), np.array([[value]]))


def test_what_is_not_finite_has_no_error() -> None:
    with pytest.raises(RequestError, match="not finite"):
        errors(np.array([[np.nan]]), np.array([[0.0]]))
