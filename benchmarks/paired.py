"""Whether a candidate's AUROC is as good as the reference's on the same images, finding by finding.

Owns the tests, their correction and the verdict; what is compared comes ranked from `benchmarks.auroc`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal

import msgspec
import numpy as np
from scipy.stats import norm, t
from statsmodels.stats.multitest import multipletests

from thoraxrt.benchmarks.auroc import LEVEL, Estimate, Placements, Ranking
from thoraxrt.engine.errors import RequestError

__all__ = ["ENOUGH", "MARGIN", "POWER", "Comparison", "Difference", "Reason", "Verdict", "compare"]

MARGIN: Final = 0.005
POWER: Final = 0.8
ENOUGH: Final = 20
"""Patients with a positive image, and patients with a negative one, from which a finding gets a verdict."""

Verdict = Literal["non-inferior", "inferior", "cannot tell"]

Reason = Literal[
    "shown",
    "identical scores",
    "scores not finite",
    "no positives or no negatives",
    "few patients",
    "not enough images to show either",
]


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finding's AUROC of the candidate minus the reference's, -1..1, and what it shows; None where undefined.

    `p_delong`: two-sided, that there is no difference, as DeLong 1988 and most papers test it.
    `p_non_inferior`: one-sided, that the loss is the margin or more, by the clustered standard error;
    `p_non_inferior_holm` the same and `p_inferior_holm` the opposite (that the loss is the margin or less), both
    corrected over the findings that are tested.
    `detectable`: the smallest true loss, in AUROC, that would have been called inferior with 80 % power if the candidate
    disagrees with the reference no more than this one does; None where there was no test. See `compare`.
    """

    finding: str
    difference: Estimate | None
    p_delong: float | None
    p_non_inferior: float | None
    p_non_inferior_holm: float | None
    p_inferior_holm: float | None
    detectable: float | None
    verdict: Verdict
    reason: Reason


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A candidate against the reference on one cohort, with everything needed to do it again.

    `margin` in AUROC, `level` one-sided; `tested` findings were corrected for.
    """

    images: int
    patients: int
    resamples: int
    seed: int
    margin: float
    level: float
    power: float
    enough_patients: int
    tested: int
    findings: tuple[Difference, ...]


def compare(candidate: Ranking, reference: Ranking, margin: float = MARGIN) -> Comparison:
    """Test each finding for non-inferiority within `margin`, 0 < margin < 1 in AUROC.

    The verdict (Piaggio et al., JAMA 308:2594, 2012, figure 1) rests on t = (difference + margin) / standard error,
    with the standard error of Obuchowski 1997 and the degrees of freedom of `Placements.freedom`: the images of a
    patient are not independent, which DeLong's test takes them to be. "non-inferior": a loss of the margin or more is
    refuted at 0.025, one-sided, after Holm (Scand J Stat 6:65, 1979) over the findings tested; "inferior": a loss of
    the margin or less is, in the same way; "cannot tell" otherwise. So a difference can be certain and the verdict
    still "non-inferior": it is smaller than matters.

    A finding is tested where at least 20 patients have a positive image and 20 a negative one; below that the standard
    error is itself a guess, and the interval stands without a verdict. Scores equal to the reference's
    are non-inferior on any number of images; a score that is not finite makes the finding inferior.

    The detectable loss is the margin and (t(1 - level / tested) + t(power)) x standard error, at the strictest of Holm's
    steps. The error is this candidate's: one that is nearly the reference has a small one, and a worse candidate another.
    Where it is twice the margin at most, a candidate that loses nothing would have been shown to be non-inferior.

    Raises RequestError where the two were ranked on different cohorts, where the reference's scores are not finite, or
    for a senseless margin.
    """
    if not 0 < margin < 1:
        raise RequestError(f"margin is {margin}: expected a loss of AUROC, 0 < margin < 1, such as {MARGIN}")
    if candidate.cohort is not reference.cohort:
        raise RequestError("candidate and reference were ranked on different cohorts: rank both on one, to pair them")
    if not np.isfinite(reference.scores).all():
        raise RequestError("the reference's scores are not all finite: choose another reference")
    cohort = reference.cohort
    differences = [
        None if ours is None or theirs is None else ours - theirs
        for ours, theirs in zip(candidate.columns, reference.columns, strict=True)
    ]
    settled = [_settled(candidate, reference, column) for column in range(len(cohort.labels))]
    p_values = {
        column: _p_values(difference, margin)
        for column, difference in enumerate(differences)
        if difference is not None and settled[column] is None
    }
    corrected = _holm(p_values)
    return Comparison(
        images=len(cohort.patients),
        patients=len(cohort.draws),
        resamples=cohort.resamples,
        seed=cohort.seed,
        margin=margin,
        level=LEVEL,
        power=POWER,
        enough_patients=ENOUGH,
        tested=len(p_values),
        findings=tuple(
            _difference(
                label, difference, settled[column], p_values.get(column), corrected.get(column), len(p_values), margin
            )
            for column, (label, difference) in enumerate(zip(cohort.labels, differences, strict=True))
        ),
    )


def _settled(candidate: Ranking, reference: Ranking, column: int) -> tuple[Verdict, Reason] | None:
    """What can be said of a finding without a test; None where it is to be tested."""
    ours, theirs = candidate.scores[:, column], reference.scores[:, column]
    if not np.isfinite(ours).all():
        return "inferior", "scores not finite"
    if reference.columns[column] is None:
        return "cannot tell", "no positives or no negatives"
    if np.array_equal(ours, theirs):
        return "non-inferior", "identical scores"
    if min(reference.cohort.patients_with(column)) < ENOUGH:
        return "cannot tell", "few patients"
    return None


def _difference(
    label: str,
    difference: Placements | None,
    settled: tuple[Verdict, Reason] | None,
    p: tuple[float, float] | None,
    holm: tuple[float, float] | None,
    tested: int,
    margin: float,
) -> Difference:
    verdict, reason = settled or ("cannot tell", "not enough images to show either")
    if holm is not None and min(holm) <= LEVEL:
        verdict, reason = ("non-inferior" if holm[0] <= LEVEL else "inferior"), "shown"
    return Difference(
        finding=label,
        difference=None if difference is None else difference.estimate(lowest=-1.0),
        p_delong=None
        if difference is None or not difference.enough
        else _two_sided(difference.value, difference.delong_error),
        p_non_inferior=None if p is None else p[0],
        p_non_inferior_holm=None if holm is None else holm[0],
        p_inferior_holm=None if holm is None else holm[1],
        detectable=None if difference is None or p is None else _detectable(difference, tested, margin),
        verdict=verdict,
        reason=reason,
    )


def _in_errors(value: float, error: float) -> float:
    """`value` in standard errors; without any error, certainty on the side where it lies."""
    if error > 0:
        return value / error
    return math.copysign(math.inf, value) if value else 0.0


def _p_values(difference: Placements, margin: float) -> tuple[float, float]:
    """One-sided: that the loss is the margin or more, and that it is the margin or less."""
    assert difference.clustered_error is not None  # at least 20 patients are of either kind
    shift = _in_errors(difference.value + margin, difference.clustered_error)
    return float(t.sf(shift, difference.freedom)), float(t.cdf(shift, difference.freedom))


def _two_sided(value: float, error: float | None) -> float | None:
    return None if error is None else float(2 * norm.sf(abs(_in_errors(value, error))))


def _holm(p_values: Mapping[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """Each hypothesis corrected over the findings it was tested on."""
    if not p_values:
        return {}
    more, less = (multipletests(p, method="holm")[1].tolist() for p in zip(*p_values.values(), strict=True))
    return dict(zip(p_values, zip(more, less, strict=True), strict=True))


def _detectable(difference: Placements, tested: int, margin: float) -> float | None:
    error, freedom = difference.clustered_error, difference.freedom
    if not error:  # unknown, or the ranking is the reference's and no loss of any size can be imagined from it
        return None
    return margin + float(t.isf(LEVEL / tested, freedom) + t.ppf(POWER, freedom)) * error
