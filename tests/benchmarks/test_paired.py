"""The verdict: a loss is found, the same answers stay quiet, and too few patients tell nothing."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import t

from thoraxrt.benchmarks.auroc import Cohort
from thoraxrt.benchmarks.paired import Comparison, Difference, compare
from thoraxrt.engine.errors import RequestError

LABELS = ("Effusion", "Nodule", "Mass", "Hernia", "Edema")
PATIENTS = np.arange(1500).repeat(2)
RANDOM = np.random.default_rng(0)
# A patient's two images share the label and half of the score. Hernia: 12 patients. Edema: none.
POSITIVE = (np.arange(1500)[:, np.newaxis] < [600, 400, 200, 12, 0]).repeat(2, axis=0)
REFERENCE = 2 * POSITIVE + RANDOM.normal(size=(1500, 5)).repeat(2, axis=0) + RANDOM.normal(size=(3000, 5))
COHORT = Cohort(labels=LABELS, positive=POSITIVE, patients=PATIENTS, resamples=200)
RANKED = COHORT.ranking(REFERENCE)


def against_reference(scores: npt.NDArray[np.float64], margin: float = 0.005) -> dict[str, Difference]:
    return {finding.finding: finding for finding in compare(COHORT.ranking(scores), RANKED, margin).findings}


def noise(size: float, seed: int) -> npt.NDArray[np.float64]:
    return np.asarray(size * np.random.default_rng(seed).normal(size=REFERENCE.shape))


@pytest.mark.parametrize("repeat", range(10))
def test_the_same_answers_stay_quiet(repeat: int) -> None:
    """As they are, or with the error of half precision: never a finding that is inferior, and all that can be shown
    are shown to be non-inferior."""
    found = against_reference(REFERENCE + noise(0.002, repeat))
    assert {label: finding.verdict for label, finding in found.items()} == {
        "Effusion": "non-inferior",
        "Nodule": "non-inferior",
        "Mass": "non-inferior",
        "Hernia": "cannot tell",
        "Edema": "cannot tell",
    }
    assert (found["Hernia"].reason, found["Edema"].reason) == ("few patients", "no positives or no negatives")
    assert found["Hernia"].detectable is None  # no loss of any size would have been called one


def test_the_detectable_loss_shows_as_often_as_is_said() -> None:
    """A true loss of that size, with the noise that it was stated for: of 300 findings about 80 %, at Holm's first step."""
    random = np.random.default_rng(0)
    positive = (np.arange(600)[:, np.newaxis] < 200).repeat(300, axis=1)
    one = Cohort(labels=tuple(map(str, range(300))), positive=positive, patients=np.arange(600), resamples=1)

    def compared(margin: float) -> npt.NDArray[np.float64]:
        """Of each finding: difference, its standard error, and the detectable loss less the margin."""
        reference = random.normal(size=positive.shape) + positive
        candidate = reference + 0.1 * random.normal(size=positive.shape) - 0.15 * positive
        findings = compare(one.ranking(candidate), one.ranking(reference), margin).findings
        estimates = [each.difference for each in findings if each.difference]
        errors = [(each.value - each.clustered.low) / t.isf(0.025, 199) for each in estimates if each.clustered]
        beyond = [each.detectable - margin for each in findings if each.detectable]
        return np.array([[each.value for each in estimates], errors, beyond])  # (3, findings)

    differences, _, beyond = compared(0.005)
    margin = float(-differences.mean() - beyond.mean())  # for which the true loss is the detectable one
    assert margin > 0.005
    differences, errors, _ = compared(margin)
    assert 0.7 < np.mean(differences + t.isf(0.025 / 300, 199) * errors < -margin) < 0.9


def test_identical_scores_differ_by_nothing_on_any_number_of_images() -> None:
    for label, finding in against_reference(REFERENCE.copy()).items():
        if label == "Edema":
            assert (finding.difference, finding.verdict) == (None, "cannot tell")
            continue
        assert (finding.verdict, finding.reason) == ("non-inferior", "identical scores")
        assert finding.difference is not None
        assert finding.difference.value == 0
        for interval in (finding.difference.delong, finding.difference.clustered, finding.difference.bootstrap):
            assert interval is not None
            assert (interval.low, interval.high) == (0, 0)
        assert finding.p_delong == 1
        assert finding.detectable is None


def test_the_same_order_is_tested_and_differs_by_nothing() -> None:
    found = against_reference(np.exp(REFERENCE))
    assert found["Mass"].p_non_inferior == 0
    assert (found["Mass"].verdict, found["Mass"].reason) == ("non-inferior", "shown")
    assert found["Hernia"].verdict == "cannot tell"  # on other images the order need not be the same


def test_a_planted_loss_is_found_where_it_is() -> None:
    damaged = REFERENCE.copy()
    damaged[:, 1] += noise(2.0, 1)[:, 1]
    found = against_reference(damaged)
    assert (found["Nodule"].verdict, found["Nodule"].reason) == ("inferior", "shown")
    assert found["Nodule"].difference is not None
    assert found["Nodule"].difference.clustered is not None
    assert found["Nodule"].difference.clustered.high < -0.005
    assert found["Effusion"].verdict == found["Mass"].verdict == "non-inferior"


def test_a_loss_about_the_margin_cannot_be_told_and_a_certain_but_small_one_is_non_inferior() -> None:
    damaged = REFERENCE + noise(0.4, 2)
    loss = -compare(COHORT.ranking(damaged), RANKED).findings[0].difference.value  # type: ignore[union-attr]
    assert 0.001 < loss < 0.02
    at_the_margin = against_reference(damaged, margin=loss)["Effusion"]
    assert (at_the_margin.verdict, at_the_margin.reason) == ("cannot tell", "not enough images to show either")
    assert at_the_margin.p_non_inferior == pytest.approx(0.5)
    generous = against_reference(damaged, margin=0.05)["Effusion"]
    assert generous.verdict == "non-inferior"
    assert generous.p_delong is not None
    assert generous.p_delong < 0.05


def test_no_difference_of_certain_answers_is_certain() -> None:
    """Without any variance the sign decides: all positives above all negatives, then all below."""
    perfect = 2 * POSITIVE - 1.0
    one = COHORT.ranking(perfect)
    turned = compare(COHORT.ranking(-perfect), one).findings[0]
    assert turned.difference is not None
    assert turned.difference.value == -1
    assert (turned.verdict, turned.p_delong) == ("inferior", 0)
    assert compare(one, COHORT.ranking(-perfect)).findings[0].verdict == "non-inferior"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_not_finite_fails_its_finding_alone(value: float) -> None:
    broken = REFERENCE.copy()
    broken[7, [0, 3, 4]] = value
    found = against_reference(broken)
    for label in ("Effusion", "Hernia", "Edema"):
        assert (found[label].verdict, found[label].reason) == ("inferior", "scores not finite")
        assert found[label].difference is None
    assert found["Nodule"].verdict == "non-inferior"


def test_p_values_are_corrected_by_holm_over_the_findings_tested() -> None:
    comparison = compare(COHORT.ranking(REFERENCE + noise(0.5, 3)), RANKED)
    tested = [finding for finding in comparison.findings if finding.p_non_inferior is not None]
    assert comparison.tested == len(tested) == 3
    raw = sorted((finding.p_non_inferior, finding.p_non_inferior_holm) for finding in tested)  # type: ignore[type-var]
    by_hand = np.maximum.accumulate([min(1.0, (3 - step) * p) for step, (p, _) in enumerate(raw)])  # type: ignore[operator]
    assert [holm for _, holm in raw] == pytest.approx(by_hand.tolist())
    for finding, patients in zip(tested, (600, 400, 200), strict=True):  # of two images each
        assert finding.difference is not None
        assert finding.difference.clustered is not None
        half = (finding.difference.clustered.high - finding.difference.clustered.low) / 2
        student = t(patients - 1)
        error = half / student.ppf(0.975)
        assert finding.p_non_inferior == pytest.approx(student.sf((finding.difference.value + 0.005) / error))
        assert finding.detectable == pytest.approx(0.005 + (student.isf(0.025 / 3) + student.ppf(0.8)) * error)


def test_more_images_show_smaller_losses() -> None:
    damaged = REFERENCE + noise(0.5, 4)
    detectable = []
    for images in (750, 1500, 3000):
        some = np.random.default_rng(1).permutation(1500)[: images // 2]
        rows = np.isin(PATIENTS, some)
        one = Cohort(labels=LABELS[:1], positive=POSITIVE[rows, :1], patients=PATIENTS[rows], resamples=1)
        (finding,) = compare(one.ranking(damaged[rows, :1]), one.ranking(REFERENCE[rows, :1])).findings
        detectable.append(finding.detectable)
    assert all(few > many for few, many in pairwise(detectable))  # type: ignore[operator]


def test_a_comparison_survives_json_with_what_is_needed_to_do_it_again() -> None:
    comparison = compare(COHORT.ranking(REFERENCE + noise(0.1, 5)), RANKED, margin=0.01)
    assert msgspec.json.decode(msgspec.json.encode(comparison), type=Comparison) == comparison
    assert (comparison.images, comparison.patients, comparison.resamples, comparison.seed) == (3000, 1500, 200, 0)
    assert comparison.margin == 0.01


def test_senseless_comparisons() -> None:
    for margin in (0.0, -0.01, 1.0, float("nan")):
        with pytest.raises(RequestError, match="margin"):
            compare(RANKED, RANKED, margin)
    other = Cohort(labels=LABELS, positive=POSITIVE, patients=PATIENTS, resamples=1)
    with pytest.raises(RequestError, match="different cohorts"):
        compare(other.ranking(REFERENCE), RANKED)
    broken = REFERENCE.copy()
    broken[0, 0] = np.nan
    with pytest.raises(RequestError, match="another reference"):
        compare(RANKED, COHORT.ranking(broken))
