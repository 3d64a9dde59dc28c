"""Taking turns, and the interval of a median."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from thoraxrt.benchmarks import rounds as module
from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.rounds import Rounds, interleaved, median_interval, speed_ups, verdict_from_interval


def test_works_take_turns_and_each_stands_between_yardsticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TURN_S", 0.01)
    called: list[str] = []
    found = interleaved({name: lambda name=name: called.append(name) for name in ("a", "b")}, 2)  # type: ignore[misc]
    assert re.fullmatch("a{2,}b{2,}a{2,}b{2,}", "".join(called))
    for rounds in found.values():
        assert (len(rounds.milliseconds), len(rounds.yardstick_ms)) == (2, 2)
        assert min(rounds.yardstick_ms) > 0


def test_a_slower_machine_cancels_out() -> None:
    quiet = Rounds(milliseconds=(10, 20), yardstick_ms=(2, 4))
    busy = Rounds(milliseconds=(40, 40), yardstick_ms=(8, 8))
    assert quiet.relative == busy.relative == (5, 5)
    assert speed_ups(busy, quiet) == (4, 2)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_the_medians_interval_is_the_narrowest_pair_of_order_statistics_that_holds_95_percent(
    values: list[float],
) -> None:
    median, interval = median_interval(tuple(values))
    ordered, n = np.sort(values), len(values)
    outside = int(binom.ppf(0.025, n, 0.5)) - 1  # the slow way: the last k with P(X <= k) <= 2.5 %
    assert binom.cdf(outside, n, 0.5) <= 0.025 < binom.cdf(outside + 1, n, 0.5)
    assert median == pytest.approx(np.median(values))
    if outside < 0:
        assert interval is None
        assert n < 6
    else:
        assert interval is not None
        assert (interval.low, interval.high) == (ordered[outside], ordered[n - 1 - outside])


def test_how_many_values_an_interval_needs() -> None:
    for count, confidence in ((6, 0.95), (8, 0.99)):
        values = tuple(map(float, range(count)))
        assert median_interval(values, confidence)[1] == Interval(low=0, high=count - 1)
        assert median_interval(values[1:], confidence)[1] is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.06, 1.2, "slower"),
        (0.8, 0.94, "faster"),
        (0.96, 1.04, "same"),
        (1.04, 1.2, "cannot tell"),
        (0.8, 0.96, "cannot tell"),
        (0.5, 2.0, "cannot tell"),
    ],
)
def test_a_verdict_is_of_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert verdict_from_interval(Interval(low=low, high=high)) == verdict
