"""Timing on a machine that is shared: what is compared takes turns, round by round, beside a fixed piece of work.

Owns the turns, the yardstick by which one run's times are compared with another's, and what a change of time is called.
Knows nothing of what it times.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import msgspec
import numpy as np
from rich.table import Table
from scipy.stats import quantile_test

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.export import Track, no_progress

__all__ = [
    "MARGIN",
    "Change",
    "Rounds",
    "Verdict",
    "change_table",
    "interleaved",
    "mean_ms",
    "median_interval",
    "speed_ups",
    "verdict_from_interval",
    "yardstick_ms",
]

MARGIN: Final = 0.05
"""How much slower, as a share, is not yet a regression."""

Verdict = Literal["slower", "faster", "same", "cannot tell"]

_TURN_S: Final = 0.2
"""So that a busy machine's time slices, some ms each, average out."""
_REST_S: Final = 0.05
"""Threads that wait for their next call spin for a while: next to ONNX Runtime's the yardstick took twice its time."""
_SQUARE: Final = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)


class Rounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One work's milliseconds by round, and the mean of the yardstick's just before and just after it."""

    milliseconds: tuple[float, ...]
    yardstick_ms: tuple[float, ...]

    @property
    def relative(self) -> tuple[float, ...]:
        """Its time in yardsticks, by round: what is left when the whole machine is slower or faster."""
        return tuple(own / yard for own, yard in zip(self.milliseconds, self.yardstick_ms, strict=True))


def interleaved(
    works: Mapping[str, Callable[[], object]], rounds: int, track: Track = no_progress
) -> dict[str, Rounds]:
    """Time each work in every round.

    A turn is a call that is not timed (its own weights into the cache), then the yardstick, the work and the yardstick
    again, each for 0.2 seconds, at least once; in between all threads come to rest.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    yardsticks: dict[str, list[float]] = {name: [] for name in works}
    for _ in track(range(rounds), "Measuring", rounds):
        for name, work in works.items():
            work()
            before = yardstick_ms()
            times[name].append(mean_ms(work))
            yardsticks[name].append((before + yardstick_ms()) / 2)
    return {name: Rounds(milliseconds=tuple(times[name]), yardstick_ms=tuple(yardsticks[name])) for name in works}


def yardstick_ms() -> float:
    """Milliseconds of a work that is nobody's who is compared: a numpy product of side 1,024 in FP32."""
    return mean_ms(lambda: _SQUARE @ _SQUARE)


def mean_ms(work: Callable[[], object]) -> float:
    """Milliseconds of a call, on average over a turn, after a rest."""
    time.sleep(_REST_S)
    calls, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < _TURN_S:
        work()
        calls += 1
    return 1000 * spent / calls


def speed_ups(reference: Rounds, own: Rounds) -> tuple[float, ...]:
    """How many times faster than the reference, by round."""
    return tuple(theirs / mine for theirs, mine in zip(reference.milliseconds, own.milliseconds, strict=True))


def median_interval(values: tuple[float, ...], confidence: float = 0.95) -> tuple[float, Interval | None]:
    """The median and its interval by order statistics, whatever the distribution.

    None for fewer values than give one: 6 at 95 %, 8 at 99 %. Source: Conover, Practical Nonparametric Statistics, 3rd
    edition, section 3.2, as scipy computes it.
    """
    found = quantile_test(values, p=0.5).confidence_interval(confidence)
    known = math.isfinite(found.low) and math.isfinite(found.high)
    return statistics.median(values), Interval(low=float(found.low), high=float(found.high)) if known else None


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure before and after: each one's median time, and the ratio of the later to the earlier.

    `interval` is the ratio's 99 % one, `verdict` what follows from it, see `verdict_from_interval`.
    """

    figure: str
    before_ms: float
    after_ms: float
    ratio: float
    interval: Interval
    verdict: Verdict


def verdict_from_interval(interval: Interval, margin: float = MARGIN) -> Verdict:
    """ "slower" or "faster" where all of a ratio's interval lies beyond the margin, "same" where all of it lies within."""
    if interval.low > 1 + margin:
        return "slower"
    if interval.high < 1 / (1 + margin):
        return "faster"
    return "same" if 1 / (1 + margin) <= interval.low and interval.high <= 1 + margin else "cannot tell"


def change_table(changes: Sequence[Change], title: str) -> Table:
    """The changes, for a terminal; where none is more than noise, that is said below."""
    table = Table("figure", "before, ms", "after, ms", "ratio", "99 % interval", "", title=title)
    for found in changes:
        table.add_row(
            *(found.figure, f"{found.before_ms:.2f}", f"{found.after_ms:.2f}", f"{found.ratio:.3f}"),
            *(f"{found.interval.low:.3f} to {found.interval.high:.3f}", found.verdict),
        )
    if all(found.verdict == "cannot tell" for found in changes):
        table.caption = "nothing could be told: too noisy, or the machine is not as it was"
    return table
