"""Whether a bench result is slower than another beyond noise: `compare`, for a person and for CI.

Owns the rule. Only what was timed in rounds beside a yardstick is compared: on a machine that is shared, nothing else
tells a slower build from a busier minute. Accuracy has a gate of its own, the parity check.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Final, Literal

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import norm

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.bench import BenchResult
from thoraxrt.benchmarks.rounds import Rounds
from thoraxrt.engine.errors import RequestError

__all__ = ["MARGIN", "Change", "Comparison", "change", "compare", "print_comparison"]


MARGIN: Final = 0.05
"""How much slower, as a share, is not yet a regression."""

_BUSIER: Final = 1.5
"""By how much the yardstick itself may differ. Beyond, a machine is so much busier that works suffer unequally: with 2
CPUs shared by 20 processes and then by 5, a network took 1.2 to 1.6 times as many yardsticks."""

_FEWEST: Final = 8
"""Rounds: fewer give no 99 % interval worth the name."""


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure in two results: the ratio of the second's time to the first's, each in yardsticks that ran beside it.

    `interval` is the ratio's 99 % one. `verdict` is "slower" or "faster" where all of it lies beyond the margin, "same"
    where all of it lies within, else "cannot tell".
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


def compare(before: BenchResult, after: BenchResult, *, margin: float = MARGIN, anyway: bool = False) -> Comparison:
    """What changed from one result to the other, see `change`.

    Raises RequestError where they are of different bundles, backends, precisions, CPUs or GPUs, unless `anyway`, where
    no figure is in both, or where there are too few rounds.
    """
    if not anyway and (odd := _differences(_subject(before), _subject(after))):
        raise RequestError(
            f"these results are not of the same thing ({'; '.join(odd)}); compare them anyway, or not at all"
        )
    figures, others = _figures(before), _figures(after)
    both = [name for name in figures if name in others]
    if not both:
        raise RequestError(
            "the results have no figure in common that was timed in rounds; run thoraxrt bench without --quick"
        )
    return Comparison(
        margin=margin,
        changes=tuple(change(name, figures[name], others[name], margin) for name in both),
        missing=tuple(sorted(figures.keys() ^ others.keys())),
        different=_differences(_software(before), _software(after)),
    )


def _figures(result: BenchResult) -> dict[str, Rounds]:
    return result.turns | {f"network alone, {peer.name}": peer.rounds for peer in result.peers if peer.rounds}


def _subject(result: BenchResult) -> dict[str, object]:
    """What must be the same for a change of time to mean anything."""
    here = result.environment
    return {
        "bundle": result.bundle_sha256[:12],
        "backend": result.backend,
        "precision": result.precision,
        "CPU": here.cpu,
        "CPUs": here.cpus,
        "CPU quota": here.cpu_quota,
        "GPUs": ", ".join(gpu.name for gpu in here.gpus) or None,
        "thread settings": here.threads or None,
    }


def _software(result: BenchResult) -> dict[str, object]:
    """What may have changed the time."""
    here = result.environment
    return {
        "commit": here.commit,
        "thoraxrt": here.thoraxrt,
        "python": here.python,
        "system": here.system,
        **here.versions,
    }


def _differences(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(
        f"{name} {before.get(name)} and {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    )


def change(figure: str, before: Rounds, after: Rounds, margin: float = MARGIN) -> Change:
    """Compare one figure's rounds.

    The ratio is the Hodges-Lehmann estimate over all pairs of rounds of the two runs, on logarithms, its interval the
    one that the Mann-Whitney test inverts to (Hollander, Wolfe and Chicken, Nonparametric Statistical Methods, 3rd
    edition, section 4.3, large-sample form), at 99 %. Where the yardstick's own medians differ by more than half, the
    verdict is "cannot tell": repeat it when the machine is as busy as it was. Raises RequestError with fewer than 8
    rounds, which give no such interval.
    """
    ratios = np.sort(np.divide.outer(after.relative, before.relative).ravel())  # (rounds after x rounds before,)
    m, n = len(before.milliseconds), len(after.milliseconds)
    if min(m, n) < _FEWEST:
        raise RequestError(f"{figure}: {m} and {n} rounds; expected at least {_FEWEST} in both results")
    outside = int(m * n / 2 - norm.ppf(0.995) * math.sqrt(m * n * (m + n + 1) / 12)) - 1
    ratio, low, high = float(np.median(ratios)), float(ratios[outside]), float(ratios[-1 - outside])
    busier = statistics.median(after.yardstick_ms) / statistics.median(before.yardstick_ms)
    comparable = 1 / _BUSIER <= busier <= _BUSIER
    verdict: Literal["slower", "faster", "same", "cannot tell"] = "cannot tell"
    if comparable and low > 1 + margin:
        verdict = "slower"
    elif comparable and high < 1 / (1 + margin):
        verdict = "faster"
    elif comparable and 1 / (1 + margin) <= low and high <= 1 + margin:
        verdict = "same"
    return Change(
        figure=figure,
        before_ms=statistics.median(before.milliseconds),
        after_ms=statistics.median(after.milliseconds),
        ratio=ratio,
        interval=Interval(low=low, high=high),
        verdict=verdict,
    )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """A table, what is missing and what else is different."""
    table = Table(
        *("figure", "before, ms", "after, ms", "ratio in yardsticks", "99 % interval", ""),
        title=f"slower or faster: beyond {comparison.margin:.0%}, the whole interval",
    )
    for found in comparison.changes:
        table.add_row(
            *(found.figure, f"{found.before_ms:.2f}", f"{found.after_ms:.2f}", f"{found.ratio:.3f}"),
            *(f"{found.interval.low:.3f} to {found.interval.high:.3f}", found.verdict),
        )
    console.print(table)
    for heading, entries in (("not in both", comparison.missing), ("different", comparison.different)):
        if entries:
            console.print(f"{heading}: {'; '.join(entries)}", markup=False)
