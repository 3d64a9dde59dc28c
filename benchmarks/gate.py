"""Whether a bench result is slower than another beyond noise: `compare`, for a person and for CI.

Owns the rule. Knows neither how figures were measured nor accuracy, whose gate is the parity check.
"""

from __future__ import annotations

import math
import statistics
from typing import Final, Literal

import msgspec
import numpy as np
from scipy.stats import norm

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.rounds import Rounds
from thoraxrt.engine.errors import RequestError

__all__ = ["MARGIN", "Change", "Comparison", "change"]

_FEWEST: Final = 8


MARGIN: Final = 0.1
"""How much slower, as a share, is not yet a regression: by so much runs of one build differ from each other."""


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure in two results: the ratio of the second's time to the first's, each in yardsticks that ran beside it.

    `interval` is the ratio's 99 % one. `verdict` is "slower" or "faster" where all of it lies beyond the margin, "same" where all of it lies
    within, else "cannot tell".
    """

    figure: str
    before_ms: float
    after_ms: float
    ratio: float
    interval: Interval
    verdict: Literal["slower", "faster", "same", "cannot tell"]


class Comparison(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every figure that both results have, in the first one's order; `missing` names those that one of them lacks.

    `different` says in what the two runs differ (versions, CPUs, commit), for whoever reads a change.
    """

    margin: float
    changes: tuple[Change, ...]
    missing: tuple[str, ...]
    different: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """Whether any figure is slower beyond the margin and beyond noise."""
        return any(change.verdict == "slower" for change in self.changes)


def change(figure: str, before: Rounds, after: Rounds, margin: float = MARGIN) -> Change:
    """Compare one figure's rounds.

    The ratio is the Hodges-Lehmann estimate over all pairs of rounds of the two runs, on logarithms, its interval the
    one that the Mann-Whitney test inverts to (Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3rd
    edition, section 4.3, large-sample form), at 99 %. Raises RequestError with fewer than 8 rounds, which give no such interval.
    """
    ratios = np.sort(np.divide.outer(after.relative, before.relative).ravel())  # (rounds after x rounds before,)
    m, n = len(before.milliseconds), len(after.milliseconds)
    if min(m, n) < _FEWEST:
        raise RequestError(f"{figure}: {m} and {n} rounds; expected at least {_FEWEST} in both results")
    outside = int(m * n / 2 - norm.ppf(0.995) * math.sqrt(m * n * (m + n + 1) / 12))
    ratio, low, high = float(np.median(ratios)), float(ratios[outside]), float(ratios[-1 - outside])
    verdict: Literal["slower", "faster", "same", "cannot tell"] = "cannot tell"
    if low > 1 + margin:
        verdict = "slower"
    elif high < 1 / (1 + margin):
        verdict = "faster"
    elif 1 / (1 + margin) <= low and high <= 1 + margin:
        verdict = "same"
    return Change(
        figure=figure,
        before_ms=statistics.median(before.milliseconds),
        after_ms=statistics.median(after.milliseconds),
        ratio=ratio,
        interval=Interval(low=low, high=high),
        verdict=verdict,
    )
