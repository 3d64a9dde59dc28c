"""AUROC, its intervals and its curve: against definitions, R's pROC and published values."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, roc_auc_score, roc_curve

from thoraxrt.benchmarks.auroc import Cohort, Interval, Placements, auroc_per_finding, finding_aurocs, roc_points
from thoraxrt.benchmarks.paired import compare
from thoraxrt.benchmarks.predictions import predictions_from_csv
from thoraxrt.engine.errors import DatasetError, RequestError
from thoraxrt.export.nih import LABELS, NihDataset

HERE = Path(__file__).parent
R = json.loads((HERE / "proc.json").read_text())

Columns = tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.intp]]


@st.composite
def clustered_scores(draw: st.DrawFn) -> Columns:
    """Positive or not, two scores with ties, and patients, at least two of whom have each kind."""
    images = draw(st.integers(8, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positive = random.random(images) < 0.4
    positive[:4] = True, True, False, False
    patients = random.integers(0, draw(st.integers(4, images)), images) + 4
    patients[:4] = range(4)
    reference = random.integers(0, draw(st.integers(1, 12)), images) + 2.0 * positive
    return positive, reference + random.integers(-1, 2, images), reference, patients


def cohort(positive: npt.NDArray[np.bool_], patients: npt.NDArray[np.intp], resamples: int = 20) -> Cohort:
    return Cohort(labels=("Mass",), positive=positive[:, np.newaxis], patients=patients, resamples=resamples)


def placed(cohort: Cohort, scores: npt.NDArray[np.float64]) -> Placements:
    (placements,) = cohort.ranking(scores[:, np.newaxis]).columns
    assert placements is not None
    return placements


# --- slow oracles ----------------------------------------------------------------------------------------


def pairwise(positive: npt.NDArray[np.bool_], scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 where a positive (row) scores above a negative (column), half for a tie: Mann and Whitney."""
    return np.array([[(x > y) + (x == y) / 2 for y in scores[~positive]] for x in scores[positive]])


def delong(wins: npt.NDArray[np.float64]) -> float:
    """The variance of DeLong 1988, equations 4 to 6, of wins or of differences of wins."""
    by_positive, by_negative = wins.mean(axis=1), wins.mean(axis=0)
    return float(by_positive.var(ddof=1) / len(by_positive) + by_negative.var(ddof=1) / len(by_negative))


def obuchowski(wins: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], patients: npt.NDArray[np.intp]) -> float:
    """The variance of Obuchowski 1997, patient by patient."""
    up, down = wins.mean(axis=1), wins.mean(axis=0)
    of_up, of_down, area = patients[positive], patients[~positive], wins.mean()
    everyone = set(patients.tolist())
    x = {who: (up[of_up == who] - area).sum() for who in everyone}
    y = {who: (down[of_down == who] - area).sum() for who in everyone}
    m, n, i, i10, i01 = len(up), len(down), len(everyone), len(set(of_up.tolist())), len(set(of_down.tolist()))
    s10 = i10 / ((i10 - 1) * m) * sum(v * v for v in x.values())
    s01 = i01 / ((i01 - 1) * n) * sum(v * v for v in y.values())
    s11 = i / (i - 1) * sum(x[who] * y[who] for who in everyone)
    return float(s10 / m + s01 / n + 2 * s11 / (m * n))


@settings(max_examples=150, deadline=None)
@given(clustered_scores())
def test_areas_and_errors_are_those_of_the_definitions(columns: Columns) -> None:
    positive, scores, reference, patients = columns
    one = cohort(positive, patients)
    ours, theirs = placed(one, scores), placed(one, reference)
    wins, wins_of_reference = pairwise(positive, scores), pairwise(positive, reference)
    for placements, oracle in ((ours, wins), (ours - theirs, wins - wins_of_reference)):
        assert placements.value == pytest.approx(oracle.mean(), abs=1e-12)
        assert placements.delong_error == pytest.approx(math.sqrt(delong(oracle)), abs=1e-9)
        variance = max(obuchowski(oracle, positive, patients), 0.0)
        assert placements.clustered_error == pytest.approx(math.sqrt(variance), abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(clustered_scores())
def test_a_resample_is_its_patients_images_as_often_as_they_were_drawn(columns: Columns) -> None:
    positive, scores, _, patients = columns
    one = cohort(positive, patients)
    for resample, area in enumerate(placed(one, scores).resampled):
        drawn = np.repeat(np.arange(len(scores)), one.draws[one.patient, resample])
        if 0 < positive[drawn].sum() < len(drawn):
            assert area == pytest.approx(roc_auc_score(positive[drawn], scores[drawn]), abs=1e-12)
        else:
            assert math.isnan(area)


def test_resamples_draw_as_many_patients_as_there_are_and_the_same_by_seed() -> None:
    patients = np.arange(500).repeat(2)
    positive = np.arange(1000) % 3 == 0
    draws = cohort(positive, patients, resamples=400).draws
    assert draws.shape == (500, 400)
    assert (draws.sum(axis=0, dtype=int) == 500).all()
    assert draws.var() == pytest.approx(1 - 1 / 500, rel=0.02)  # a multinomial's
    assert np.array_equal(draws, cohort(positive, patients, resamples=400).draws)


def test_repeating_every_image_of_a_patient_tells_nothing_new() -> None:
    random = np.random.default_rng(0)
    positive, scores = random.random(300) < 0.3, random.normal(size=300)
    once = placed(cohort(positive, np.arange(300), 300), scores)
    many = placed(cohort(positive.repeat(4), np.arange(300).repeat(4), 300), scores.repeat(4))
    assert once.delong_error is not None
    assert once.clustered_error == pytest.approx(once.delong_error)
    assert many.clustered_error == pytest.approx(once.clustered_error)
    assert many.resampled == pytest.approx(once.resampled)
    assert many.delong_error == pytest.approx(once.delong_error / 2, rel=0.01)  # which DeLong's does not notice


def test_few_patients_with_many_images_have_the_freedom_of_few() -> None:
    positive = np.array([True] * 12 + [False] * 40)
    patients = np.array([*range(3), *[3] * 9, *range(4, 44)])  # of the 12 positives, 9 are of one patient
    one = placed(cohort(positive, patients), np.random.default_rng(0).normal(size=52))
    assert one.freedom == 1  # 12^2 / (1 + 1 + 1 + 81) patients less 1 would be 0.7
    even = placed(cohort(positive, np.arange(52)), np.random.default_rng(0).normal(size=52))
    assert even.freedom == pytest.approx(11)
    assert even.clustered_error == pytest.approx(even.delong_error)
    delong, clustered = even.estimate(0.0).delong, even.estimate(0.0).clustered
    assert delong is not None
    assert clustered is not None
    assert (clustered.high - clustered.low) / (delong.high - delong.low) == pytest.approx(2.201 / 1.96, abs=1e-3)


# --- R and what was published ----------------------------------------------------------------------------


def assert_as_r_has_it(
    labels: tuple[str, ...],
    positive: npt.NDArray[np.uint8],
    candidate: npt.NDArray[np.float64],
    reference: npt.NDArray[np.float64],
    expected: Mapping[str, Mapping[str, float]],
) -> None:
    one = Cohort(labels=labels, positive=positive, patients=np.arange(len(positive)), resamples=10)
    ranking = one.ranking(candidate)
    comparison = compare(ranking, one.ranking(reference))
    assert set(labels) == set(expected)
    for area, against in zip(finding_aurocs(ranking), comparison.findings, strict=True):
        r = expected[area.finding]
        assert area.auroc is not None
        assert area.auroc.delong is not None
        assert against.difference is not None
        assert against.difference.delong is not None
        assert area.auroc.value == pytest.approx(r["auroc"], abs=1e-9)
        for interval, low, high in (
            (area.auroc.delong, "low", "high"),
            (against.difference.delong, "difference_low", "difference_high"),
        ):
            assert (interval.low, interval.high) == pytest.approx((r[low], r[high]), abs=1e-9)
        assert against.p_delong == pytest.approx(r["p"], abs=1e-9)


def synthetic() -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    positive, candidate, reference = (
        np.array(R["synthetic"][name]).T for name in ("positive", "candidate", "reference")
    )
    return positive.astype(np.uint8), candidate.astype(np.float64), reference.astype(np.float64)


def test_delong_is_what_proc_has() -> None:
    assert_as_r_has_it(("Mass", "Hernia"), *synthetic(), R["synthetic"]["expected"])


@pytest.mark.skipif(
    not shutil.which("Rscript") or subprocess.run(["Rscript", "-e", "library(pROC)"], capture_output=True).returncode,
    reason="needs R with pROC",
)
def test_the_values_kept_are_those_that_proc_gives(tmp_path: Path) -> None:
    with (tmp_path / "in.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["finding", "positive", "candidate", "reference"])
        for finding, *columns in zip(("Mass", "Hernia"), *(array.T.tolist() for array in synthetic()), strict=True):
            rows.writerows([finding, *values] for values in zip(*columns, strict=True))
    subprocess.run(["Rscript", HERE / "proc.R", tmp_path / "in.csv", tmp_path / "out.csv"], check=True)
    with (tmp_path / "out.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            expected = R["synthetic"]["expected"][row.pop("finding")]
            assert {name: float(value) for name, value in row.items()} == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def published(nih: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """22,433 published DenseNet-121 predictions and the labels as NIH publishes them."""
    predictions = predictions_from_csv(nih / "predictions" / "densenet121_reproduce-chexnet.csv", LABELS)
    dataset = NihDataset.open(nih)
    row = {record.image: index for index, record in enumerate(dataset.records)}
    assert len(predictions) == 22433
    return dataset.label_matrix()[[row[image] for image in predictions]], np.stack(list(predictions.values()))


def test_published_auroc_is_reproduced(
    nih: Path, published: tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]
) -> None:
    found = auroc_per_finding(*published, LABELS)
    with (nih / "predictions" / "densenet121_reproduce-chexnet_auroc.csv").open(newline="") as file:
        areas = {line["label"]: float(line["auc"]) for line in csv.DictReader(file)}
    assert found == pytest.approx(areas, abs=1e-9)


def test_delong_is_what_proc_has_on_published_predictions(
    published: tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]],
) -> None:
    """The predictions rounded to two digits, so with many ties, against the predictions."""
    positive, scores = published
    assert_as_r_has_it(LABELS, positive, scores.round(2), scores, R["published"])


# --- the curve, and what cannot be ranked ----------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), digits=st.sampled_from([0, 1, 6]))
def test_a_thinned_curve_looks_the_same(seed: int, digits: int) -> None:
    random = np.random.default_rng(seed)
    positive = random.random(5000) < 0.2
    scores = (random.normal(size=5000) + positive).round(digits)
    points = np.array(roc_points(positive, scores))
    assert len(points) <= 200
    assert points[0].tolist() == [0, 0]
    assert points[-1].tolist() == [1, 1]
    whole = np.stack(roc_curve(positive, scores)[:2], axis=1)
    assert {*map(tuple, points.tolist())} <= {*map(tuple, whole.tolist())}
    nearest = np.abs(whole[:, np.newaxis] - points).sum(axis=2).min(axis=1)
    assert nearest.max() <= 0.0101
    assert auc(*points.T) == pytest.approx(roc_auc_score(positive, scores), abs=0.001)


def test_auroc_by_hand() -> None:
    positive = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]], np.uint8)
    scores = np.array([[0.9, 0.1, 0.1], [0.5, 0.2, 0.2], [0.4, 0.3, np.nan], [0.1, 0.4, 0.4]])
    # Three of the four pairs of a positive and a negative are in order; nothing is ranked without positives or by NaN.
    expected = {"Mass": 0.75, "Edema": None, "Hernia": None}
    assert auroc_per_finding(positive, scores, ["Mass", "Edema", "Hernia"]) == expected


def test_one_patient_with_a_finding_gives_an_area_without_an_interval() -> None:
    positive = np.array([True, True, False, False, False])
    ranking = cohort(positive, np.array([7, 7, 8, 9, 10])).ranking(np.array([[3.0], [1.0], [2.0], [0.0], [-1.0]]))
    (area,) = finding_aurocs(ranking)
    assert (area.positives, area.negatives, area.positive_patients, area.negative_patients) == (2, 3, 1, 3)
    assert area.auroc is not None
    assert area.auroc.value == pytest.approx(5 / 6)
    assert (area.auroc.delong, area.auroc.clustered, area.auroc.bootstrap) == (None, None, None)


@pytest.mark.parametrize(("patients", "intervals"), [(9, False), (10, True)])
def test_there_is_no_interval_on_fewer_than_ten_patients_of_either_kind(patients: int, intervals: bool) -> None:
    for kind in (True, False):
        positive = (np.arange(60) < 2 * patients) == kind
        scores = np.random.default_rng(0).normal(size=60)
        one = placed(cohort(positive, np.arange(60) // 2), scores)  # two images each
        estimate = one.estimate(0.0)
        for interval in (estimate.delong, estimate.clustered, estimate.bootstrap):
            assert isinstance(interval, Interval) == intervals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"positive": np.zeros((3, 2))}, DatasetError, "one column per finding"),
        ({"patients": np.arange(2)}, DatasetError, "2 images and 1 findings"),
        ({"positive": np.array([[1], [0], [-1]])}, DatasetError, "uncertain"),
        ({"positive": np.zeros((0, 1)), "patients": np.arange(0)}, DatasetError, "0 images"),
        ({"resamples": 0}, RequestError, "at least 1"),
    ],
)
def test_senseless_cohorts(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    sensible = {"labels": ("Mass",), "positive": np.array([[1], [0], [1]]), "patients": np.arange(3)}
    with pytest.raises(error, match=message):
        Cohort(**(sensible | arguments))


def test_scores_of_other_images_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"\(4, 1\); expected \(3, 1\)"):
        cohort(np.array([True, False, True]), np.arange(3)).ranking(np.zeros((4, 1)))
