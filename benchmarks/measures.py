"""What else is measured of answers: operating points and who changes side, reliability, and errors of numbers.

Owns the arithmetic on arrays; what is reported at an operating point is `engine.postprocess.reported`'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.proportion import proportion_confint

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.engine.errors import RequestError
from thoraxrt.export.agreement import rank_correlation

__all__ = [
    "ERROR_EDGES",
    "Changes",
    "Errors",
    "Operating",
    "Reliability",
    "ReliabilityBin",
    "Share",
    "changes",
    "errors",
    "operating",
    "reliability",
]

_BINS: Final = 15

ERROR_EDGES: Final = tuple(10 ** (power / 2) for power in range(-18, 5))
"""Edges of the histogram of absolute errors: two bins a decade, from 1e-9 to 100."""


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` of `of` images, and Wilson's 95 % interval of the share, 0..1; None where `of` is 0."""

    count: int
    of: int
    interval: Interval | None


class Operating(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finding at its operating point: positives that are reported, and negatives that are not."""

    finding: str
    sensitivity: Share
    specificity: Share


class Changes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finding: who is on another side of the operating point than with the reference.

    Patients count who have at least one such image; one whose images went both ways counts twice. `kappa` is Cohen's,
    -1..1, of reported against reported; None where both report all, or none, of the images.
    """

    finding: str
    images_now_reported: int
    images_no_longer_reported: int
    patients_now_reported: int
    patients_no_longer_reported: int
    kappa: float | None


class ReliabilityBin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`images` of about the same probability: its mean, and the share of them that are positive."""

    images: int
    probability: float
    positive: float


class Reliability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far one finding's probabilities are from frequencies: Brier score, ECE (both 0..1) and the diagram's bins."""

    finding: str
    brier: float
    ece: float
    bins: tuple[ReliabilityBin, ...]


class Errors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Absolute differences from the reference, in the unit of what was compared.

    `histogram` has one count per bin of `ERROR_EDGES`, below its first (no error at all is there) and above its last
    edge included: 24. `rank_correlation` is Spearman's; where either side is constant, 1 if both are equal, else 0.
    """

    mean: float
    p50: float
    p99: float
    max: float
    histogram: tuple[int, ...]
    rank_correlation: float


def operating(
    labels: Sequence[str], positive: npt.NDArray[np.bool_ | np.uint8], reported: npt.NDArray[np.bool_]
) -> tuple[Operating, ...]:
    """Sensitivity and specificity of each finding, with Wilson's intervals (JASA 22:209, 1927), which take images to
    be independent.

    `positive`, as labelled, and `reported` are `(N, C)` in the order of `labels`.
    """
    truth = positive.astype(np.bool_)
    return tuple(
        Operating(
            finding=label,
            sensitivity=_share(reported[truth[:, column], column]),
            specificity=_share(~reported[~truth[:, column], column]),
        )
        for column, label in enumerate(labels)
    )


def changes(
    labels: Sequence[str],
    reported: npt.NDArray[np.bool_],
    reference: npt.NDArray[np.bool_],
    patients: npt.NDArray[np.integer],
) -> tuple[Changes, ...]:
    """Who changes side from `reference` to `reported`, bool `(N, C)` each; `patients` is `(N,)`."""
    appeared, vanished = reported & ~reference, reference & ~reported
    return tuple(
        Changes(
            finding=label,
            images_now_reported=int(appeared[:, column].sum()),
            images_no_longer_reported=int(vanished[:, column].sum()),
            patients_now_reported=len(np.unique(patients[appeared[:, column]])),
            patients_no_longer_reported=len(np.unique(patients[vanished[:, column]])),
            kappa=_kappa(reported[:, column], reference[:, column]),
        )
        for column, label in enumerate(labels)
    )


def reliability(
    labels: Sequence[str], positive: npt.NDArray[np.bool_ | np.uint8], probabilities: npt.NDArray[np.float64]
) -> tuple[Reliability, ...]:
    """Brier score (Monthly Weather Review 78:1, 1950) and expected calibration error of each finding.

    `positive` and `probabilities`, finite in 0..1, are `(N, C)`. The ECE (Naeini et al., AAAI 2015) is over 15 bins of
    equal mass (Nixon et al., arXiv 1904.01685): most findings are rare, and of bins of equal width nearly all images
    would be in the first. Equal probabilities share a bin, so there may be fewer.

    Raises RequestError where a probability is outside 0..1 or not finite.
    """
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise RequestError("a probability is outside 0..1 or not finite: reliability is that of probabilities only")
    return tuple(
        _reliability(label, positive[:, column].astype(np.float64), probabilities[:, column])
        for column, label in enumerate(labels)
    )


def errors(ours: npt.NDArray[np.floating], reference: npt.NDArray[np.floating]) -> Errors:
    """The absolute errors of logits or probabilities, finite and of one shape, all elements pooled.

    Raises RequestError where one is not finite.
    """
    if not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        raise RequestError("values that are not finite have no error: leave out the findings or images that have them")
    difference = np.abs(ours.astype(np.float64) - reference).ravel()
    p50, p99 = np.quantile(difference, [0.5, 0.99])
    places = np.searchsorted(ERROR_EDGES, difference, side="right")
    return Errors(
        mean=float(difference.mean()),
        p50=float(p50),
        p99=float(p99),
        max=float(difference.max()),
        histogram=tuple(np.bincount(places, minlength=len(ERROR_EDGES) + 1).tolist()),
        rank_correlation=rank_correlation(ours.ravel(), reference.ravel()),
    )


def _share(hits: npt.NDArray[np.bool_]) -> Share:
    count, of = int(hits.sum()), len(hits)
    if not of:
        return Share(count=0, of=0, interval=None)
    low, high = proportion_confint(count, of, method="wilson")
    return Share(count=count, of=of, interval=Interval(low=float(low), high=float(high)))


def _kappa(ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_]) -> float | None:
    """Without both sides anywhere, agreement by chance is certain, and kappa is 0 / 0."""
    if len(np.unique(np.concatenate([ours, theirs]))) < 2:
        return None
    return float(cohen_kappa_score(ours, theirs))


def _reliability(label: str, positive: npt.NDArray[np.float64], probabilities: npt.NDArray[np.float64]) -> Reliability:
    edges = np.quantile(probabilities, np.linspace(0, 1, _BINS + 1)[1:-1])
    place = np.searchsorted(np.unique(edges), probabilities, side="right")  # (N,)
    counts = np.bincount(place)
    filled = counts > 0
    counts = counts[filled]
    probability, frequency = (np.bincount(place, values)[filled] / counts for values in (probabilities, positive))
    return Reliability(
        finding=label,
        brier=float(np.mean((probabilities - positive) ** 2)),
        ece=float(np.abs(probability - frequency) @ counts / counts.sum()),
        bins=tuple(
            ReliabilityBin(images=count, probability=mean, positive=share)
            for count, mean, share in zip(counts.tolist(), probability.tolist(), frequency.tolist(), strict=True)
        ),
    )
