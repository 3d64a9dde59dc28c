"""The area under the ROC curve per finding, and how sure it is: by DeLong, by patient, by resampling patients.

Owns the arithmetic on arrays; knows neither files nor networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.stats import norm, rankdata, t
from sklearn.metrics import roc_curve

from thoraxrt.engine.errors import DatasetError, RequestError

__all__ = [
    "INTERVAL_PATIENTS",
    "LEVEL",
    "Cohort",
    "Estimate",
    "FindingAuroc",
    "Interval",
    "Placements",
    "Ranking",
    "auroc_per_finding",
    "finding_aurocs",
    "roc_points",
]

LEVEL: Final = 0.025
"""Of each side: what is outside a 95 % interval, and the level of a one-sided test."""

INTERVAL_PATIENTS: Final = 10
"""Patients with a positive image, and with a negative one, from which there are intervals.

Simulated with 70 patients without a finding: intervals of a difference whose reference separates well covered 42 % with 2
patients who have it, 76 % with 5, 95 % with 10; of all differences 58, 25 and 6 % had no width at all.
"""

_CHUNK: Final = 256  # resamples at once, so that memory stays flat
_DEFINED: Final = 0.95  # the share of resamples that must have positives and negatives for an interval to be given
_POINTS: Final = 200


class Interval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A 95 % confidence interval, in the unit of what it belongs to."""

    low: float
    high: float


class Estimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An AUROC, or a difference of two, with three 95 % intervals; None where there is too little to say one.

    `delong` takes images to be independent (DeLong, DeLong and Clarke-Pearson, Biometrics 44:837, 1988). `clustered`
    takes patients to be (Obuchowski, Biometrics 53:567, 1997), with Student's quantile for few of them (see
    `Placements.freedom`), and is `delong` where many have one image each. `bootstrap` is the percentile interval of
    resampled patients (Rutter, Acad Radiol 7:413, 2000). There are none where fewer than 10 patients have a positive
    image, or a negative one. All three have no width where positives and negatives are perfectly separated: an AUROC of
    1 is no certainty.
    """

    value: float
    delong: Interval | None
    clustered: Interval | None
    bootstrap: Interval | None


class FindingAuroc(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finding's AUROC in 0..1, and what it was measured on.

    `auroc` is None where the finding has no positives, no negatives or a score that is not finite. `curve` holds
    (false-positive rate, true-positive rate) pairs; see `roc_points`.
    """

    finding: str
    positives: int
    negatives: int
    positive_patients: int
    negative_patients: int
    auroc: Estimate | None
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """The labelled images that candidates are compared on, and the resamples of their patients.

    `labels` names the C findings; `positive` is `(N, C)`, 1 or True where the image is labelled with the finding;
    `patients` integer `(N,)`, any numbers that tell patients apart. `resamples` times as many patients as there are
    are drawn with replacement by `seed`, once, so that every candidate is measured on the same ones.

    Raises DatasetError where shapes do not fit or a label is neither 0 nor 1, RequestError without resamples.

    Example: `cohort = Cohort(labels=LABELS, positive=positive, patients=patients)`, then
    `compare(cohort.ranking(candidate), cohort.ranking(reference))`.
    """

    labels: tuple[str, ...]
    positive: npt.NDArray[np.uint8 | np.bool_]
    patients: npt.NDArray[np.integer]
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        images, columns = len(self.patients), len(self.labels)
        if self.positive.shape != (images, columns) or self.patients.ndim != 1 or not images:
            raise DatasetError(
                f"labels of shape {self.positive.shape} for {images} images and {columns} findings; expected one row "
                "per image and one column per finding: read them from the same data set"
            )
        if not np.isin(self.positive, (0, 1)).all():
            raise DatasetError("labels hold other values than 0 and 1: leave uncertain images out")
        if self.resamples < 1:
            raise RequestError(f"resamples is {self.resamples}: expected at least 1")

    @cached_property
    def patient(self) -> npt.NDArray[np.intp]:
        """Each image's patient, counted from 0: `(N,)`."""
        patient: npt.NDArray[np.intp] = np.unique(self.patients, return_inverse=True)[1]
        return patient

    @cached_property
    def draws(self) -> npt.NDArray[np.uint8]:
        """How often each resample drew each patient: `(patients, resamples)`."""
        random = np.random.default_rng(self.seed)
        patients = int(self.patient.max()) + 1
        draws = np.empty((patients, self.resamples), np.uint8)
        for resample in range(self.resamples):
            draws[:, resample] = np.bincount(random.integers(patients, size=patients), minlength=patients)
        return draws

    def patients_with(self, column: int) -> tuple[int, int]:
        """How many patients have a positive image of a finding, and how many a negative one."""
        positive = self.positive[:, column].astype(np.bool_)
        return len(np.unique(self.patient[positive])), len(np.unique(self.patient[~positive]))

    def ranking(self, scores: npt.NDArray[np.floating]) -> Ranking:
        """Rank `scores`, floating `(N, C)`: higher means more likely. Log-odds are better than probabilities, which
        round to 0 and 1 and so make ties.

        A finding without positives, without negatives or with a score that is not finite is not ranked (None).
        Raises DatasetError where the shape is another than the labels'.
        """
        if scores.shape != self.positive.shape:
            raise DatasetError(
                f"scores of shape {scores.shape}; expected {self.positive.shape}, a row per image and a column per "
                "finding, as the labels: take both from the same images in the same order"
            )
        columns = zip(self.positive.T.astype(np.bool_), scores.T, strict=True)
        return Ranking(cohort=self, scores=scores, columns=tuple(self._placements(*column) for column in columns))

    def _placements(self, positive: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating]) -> Placements | None:
        if positive.all() or not positive.any() or not np.isfinite(scores).all():
            return None
        return Placements(
            values=_placement_values(positive, scores),
            positive=positive,
            patient=self.patient,
            resampled=_resampled_aurocs(positive, scores, self.patient, self.draws),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """One candidate's scores `(N, C)` on a cohort, and each finding's placements, None where there are none."""

    cohort: Cohort
    scores: npt.NDArray[np.floating]
    columns: tuple[Placements | None, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Placements:
    """One finding's AUROC, or a difference of two, as parts that images and resamples contribute.

    `values` float64 `(N,)`: of a positive image the share of negatives that score below it, of a negative one the
    share of positives above it, a tie counting half (DeLong 1988, equation 4); `positive` bool `(N,)`; `patient`
    `(N,)`; `resampled` float64 `(resamples,)`, NaN where a resample has no positives or no negatives. Everything is
    linear in `values`: a paired difference's variance is that of the differences.
    """

    values: npt.NDArray[np.float64]
    positive: npt.NDArray[np.bool_]
    patient: npt.NDArray[np.intp]
    resampled: npt.NDArray[np.float64]

    def __sub__(self, other: Placements) -> Placements:
        """The paired difference; both are of one finding of one cohort."""
        return Placements(
            values=self.values - other.values,
            positive=self.positive,
            patient=self.patient,
            resampled=self.resampled - other.resampled,
        )

    @property
    def value(self) -> float:
        """The AUROC in 0..1, or the difference in -1..1."""
        return float(self.values[self.positive].mean())

    @cached_property
    def delong_error(self) -> float | None:
        """The standard error where images are independent (DeLong 1988, equations 5 and 6)."""
        return _standard_error(self.values, self.positive, np.arange(len(self.values)))

    @cached_property
    def clustered_error(self) -> float | None:
        """The standard error where patients are independent and their images need not be (Obuchowski 1997)."""
        return _standard_error(self.values, self.positive, self.patient)

    @cached_property
    def freedom(self) -> float:
        """The degrees of freedom of `clustered_error`, at least 1: one less than the effective number of patients with
        a positive image, or with a negative one, whichever is less.

        The effective number is (sum of m)^2 / (sum of m^2) for patients with m images (Kish, Survey Sampling, 1965): a
        few with many images count for most. Simulated with the test list's images per patient and 20 to 29 patients with
        a finding, 95 % intervals of differences covered 88 % with the normal quantile and 96 % with this one.
        """
        effective = (_effective(np.bincount(self.patient[kind])) for kind in (self.positive, ~self.positive))
        return max(min(effective) - 1, 1.0)

    @property
    def enough(self) -> bool:
        """Whether there are patients enough for intervals."""
        kinds = (self.positive, ~self.positive)
        return all(len(np.unique(self.patient[kind])) >= INTERVAL_PATIENTS for kind in kinds)

    def estimate(self, lowest: float) -> Estimate:
        """With intervals clipped to `lowest`..1."""
        if not self.enough:
            return Estimate(value=self.value, delong=None, clustered=None, bootstrap=None)
        defined = self.resampled[~np.isnan(self.resampled)]
        bootstrap = None
        if len(defined) >= _DEFINED * len(self.resampled):
            low, high = np.quantile(defined, [LEVEL, 1 - LEVEL])
            bootstrap = Interval(low=float(low), high=float(high))
        return Estimate(
            value=self.value,
            delong=_interval(self.value, self.delong_error, norm.isf(LEVEL), lowest),
            clustered=_interval(self.value, self.clustered_error, t.isf(LEVEL, self.freedom), lowest),
            bootstrap=bootstrap,
        )


def auroc_per_finding(
    positive: npt.NDArray[np.uint8 | np.bool_], scores: npt.NDArray[np.floating], findings: Sequence[str]
) -> dict[str, float | None]:
    """The AUROC of each finding alone, None where it has no positives, no negatives or a score that is not finite.

    `positive` and `scores` are `(N, C)` in the order of `findings`; see `Cohort`.
    """
    cohort = Cohort(labels=tuple(findings), positive=positive, patients=np.arange(len(positive)), resamples=1)
    columns = zip(findings, cohort.ranking(scores).columns, strict=True)
    return {finding: None if column is None else column.value for finding, column in columns}


def finding_aurocs(ranking: Ranking) -> tuple[FindingAuroc, ...]:
    """Each finding's AUROC, its intervals and its curve, in the cohort's order."""
    return tuple(_finding_auroc(ranking, column) for column in range(len(ranking.columns)))


def _finding_auroc(ranking: Ranking, column: int) -> FindingAuroc:
    cohort, placements = ranking.cohort, ranking.columns[column]
    positive = cohort.positive[:, column].astype(np.bool_)
    positive_patients, negative_patients = cohort.patients_with(column)
    return FindingAuroc(
        finding=cohort.labels[column],
        positives=int(positive.sum()),
        negatives=int((~positive).sum()),
        positive_patients=positive_patients,
        negative_patients=negative_patients,
        auroc=None if placements is None else placements.estimate(lowest=0.0),
        curve=() if placements is None else roc_points(positive, ranking.scores[:, column]),
    )


def roc_points(positive: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating]) -> tuple[tuple[float, float], ...]:
    """Vertices of the ROC curve as (false-positive rate, true-positive rate), at most 200, from (0, 0) to (1, 1).

    `positive` bool `(N,)` with both kinds, `scores` finite `(N,)`. The sum of the rates grows along the curve by
    2 in all; of each 200th of that the first vertex is kept, so that each one left out is within 0.0101 of one kept,
    both rates together: less than a line's width.
    """
    false_rate, true_rate, _ = roc_curve(positive, scores)  # (K,) each, ascending
    kept = np.unique(np.searchsorted(false_rate + true_rate, np.linspace(0, 2, _POINTS)))
    return tuple(zip(false_rate[kept].tolist(), true_rate[kept].tolist(), strict=True))


# --- arithmetic ------------------------------------------------------------------------------------------


def _placement_values(positive: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """By midranks, O(N log N) (Sun and Xu, IEEE Signal Process Lett 21:1389, 2014, equations 7 to 9)."""
    values = np.empty(len(scores))
    among_all = rankdata(scores)
    for kind in (positive, ~positive):
        values[kind] = (among_all[kind] - rankdata(scores[kind])) / (~kind).sum()  # the share of the others below
    values[~positive] = 1 - values[~positive]
    return values


def _standard_error(
    values: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_], cluster: npt.NDArray[np.intp]
) -> float | None:
    """Obuchowski 1997, section 2: the variance from each cluster's sums; DeLong's where each cluster has one image.

    None where fewer than two clusters have positives, or fewer than two negatives.
    """
    sums, factors = [], []  # of the positives, then of the negatives
    for kind in (positive, ~positive):
        centred = (values[kind] - values[kind].mean()) / kind.sum()
        sums.append(np.bincount(cluster[kind], centred, minlength=cluster.max() + 1))
        clusters = len(np.unique(cluster[kind]))
        if clusters < 2:
            return None
        factors.append(clusters / (clusters - 1))
    clusters = len(np.unique(cluster))
    variance = sum(factor * (part @ part) for factor, part in zip(factors, sums, strict=True))
    variance += 2 * clusters / (clusters - 1) * (sums[0] @ sums[1])
    return math.sqrt(max(float(variance), 0.0))  # not negative but for rounding: its matrix is positive semidefinite


def _effective(images: npt.NDArray[np.intp]) -> float:
    return float(images.sum() ** 2 / (images**2).sum())


def _interval(value: float, error: float | None, quantile: float, lowest: float) -> Interval | None:
    if error is None:
        return None
    half = float(quantile) * error
    return Interval(low=max(value - half, lowest), high=min(value + half, 1.0))


def _resampled_aurocs(
    positive: npt.NDArray[np.bool_],
    scores: npt.NDArray[np.floating],
    patient: npt.NDArray[np.intp],
    draws: npt.NDArray[np.uint8],
) -> npt.NDArray[np.float64]:
    """The AUROC of each resample of patients, `(resamples,)`; NaN where it has no positives or no negatives.

    The order of the scores is the same in every resample: only the images' weights change. So the positives are
    sorted once, and a resample's count of the negatives below each comes from a cumulative sum.
    """
    steps, step = np.unique(scores[positive], return_inverse=True)  # the K distinct scores of positives
    shape = (len(steps) + 1, len(draws))
    ones = np.ones(len(step))
    positives = csr_array((ones, (step, patient[positive])), shape=shape)  # (K + 1, patients), duplicates summed
    below = [np.searchsorted(steps, scores[~positive], side) for side in ("left", "right")]
    # A negative counts half from the first positive that is not below it, and half from the first above it.
    halves = np.full(2 * len(below[0]), 0.5)
    negatives = csr_array((halves, (np.concatenate(below), np.tile(patient[~positive], 2))), shape=shape)
    aurocs = []
    for start in range(0, draws.shape[1], _CHUNK):
        drawn = draws[:, start : start + _CHUNK].astype(np.float64)
        up = positives @ drawn  # (K + 1, chunk)
        down = np.cumsum(negatives @ drawn, axis=0)
        pairs = up.sum(axis=0) * down[-1]
        wins = np.einsum("kb,kb->b", up, down)
        aurocs.append(np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0))
    return np.concatenate(aurocs)
