"""LoadGen's scenarios: its verdict is kept, its latencies are read whole, a stall shows, an error fails the scenario."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from thoraxrt.benchmarks import scenarios
from thoraxrt.benchmarks.scenarios import (
    SCENARIOS,
    LoadOptions,
    Scenario,
    latencies_from_ms,
    loadgen,
    run_scenario,
)
from thoraxrt.benchmarks.targets import Answered, Input, TargetName
from thoraxrt.engine.errors import BackendUnavailableError, DeadlineError, RequestError

pytest.importorskip("mlperf_loadgen")

BRIEF = LoadOptions(seconds=0.3, longest_s=5.0, per_query=3)


class Answering:
    """A target that answers one image after the other, each in `work(how many before)`."""

    name: TargetName = "engine"
    input: Input = "encoded"
    count = 7

    def __init__(self, work: Callable[[int], None]) -> None:
        self.asked: list[int] = []
        self.together: set[int] = set()
        self._work, self._pool = work, ThreadPoolExecutor(1)

    def submit(self, numbers: Sequence[int], answered: Answered) -> None:
        self.together.add(len(numbers))
        for place, number in enumerate(numbers):
            self._pool.submit(self._one, number, place, answered)

    def _one(self, number: int, place: int, answered: Answered) -> None:
        try:
            self._work(len(self.asked))
        except DeadlineError as error:
            answered(place, error)
        else:
            answered(place, None)
        self.asked.append(number)


@pytest.fixture
def quick() -> Answering:
    return Answering(lambda _: time.sleep(0.0005))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_scenario_is_run_and_judged(scenario: Scenario, quick: Answering) -> None:
    result = run_scenario(quick, scenario, BRIEF)
    assert (result.scenario, result.target, result.input) == (scenario, "engine", "encoded")
    assert (result.verdict == "VALID") == (not result.reasons)
    assert result.errors == {}
    assert len(quick.asked) == result.warm_up + result.images
    assert set(quick.asked) <= set(range(7))
    assert result.images_per_s == pytest.approx(result.images / result.seconds)
    assert result.images == result.queries * result.per_query
    latency = result.latency
    assert latency is not None
    assert latency.count == result.queries
    per_query = {"SingleStream": 1, "MultiStream": 3, "Server": 1, "Offline": result.images}[scenario]
    assert result.per_query == per_query
    assert quick.together == {1 if scenario == "SingleStream" else 3, per_query}
    if scenario == "Offline":
        assert (result.queries, result.percent) == (1, None)
    elif result.verdict == "VALID":
        assert result.early_stopping.startswith("Run successful" if scenario == "Server" else "Processed at least 64")
    assert (result.offered_per_s is None, result.bound_ms) == (
        (False, 1000.0) if scenario == "Server" else (True, None)
    )
    rules = {"Server": "p95 <= 1000 ms", "Offline": "images/s"}
    assert result.rule == rules.get(scenario, "p90")
    assert result.judged == (latency.at(result.percent) if result.percent else None)
    assert (result.judged is None) == (scenario == "Offline")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_latencies_read_from_the_trace_are_those_that_loadgen_counts(
    scenario: Scenario, quick: Answering, tmp_path: Path
) -> None:
    settings = scenarios._settings(loadgen(), scenario, BRIEF, 600.0, 0.002)
    assert scenarios._drive(loadgen(), quick, settings, tmp_path) == []
    ran = scenarios._read_logs(tmp_path)
    said = _details(tmp_path)
    per_query = "per_query_" if scenario == "MultiStream" else ""
    ordered = np.sort(1e6 * ran.latencies_ms)
    assert ordered[-1] == pytest.approx(said[f"result_max_{per_query.removeprefix('per_')}latency_ns"])
    for percent in ("50.00", "90.00", "99.00", "99.90") if scenario != "Offline" else ():  # LoadGen's are images' there
        at = int(len(ordered) * float(percent) / 100)
        assert ordered[at] == pytest.approx(said[f"result_{percent}_percentile_{per_query}latency_ns"])
    if scenario == "Offline":
        assert ran.images / ran.seconds == pytest.approx(said["result_samples_per_second"], rel=1e-4)


def test_what_loadgen_did_wrong_is_not_passed_over(quick: Answering, tmp_path: Path) -> None:
    settings = scenarios._settings(loadgen(), "SingleStream", BRIEF, 1.0, 0.002)
    scenarios._drive(loadgen(), quick, settings, tmp_path)
    detail, trace = tmp_path / "mlperf_log_detail.txt", tmp_path / "mlperf_log_trace.json"
    detail.write_text(detail.read_text().replace('"key": "num_errors", "value": 0', '"key": "num_errors", "value": 2'))
    ran = scenarios._read_logs(tmp_path)
    assert not ran.valid
    assert "LoadGen met 2 errors" in ran.reasons
    trace.write_text(trace.read_text().replace('"query_seq":3,', '"query_seq":2,'))
    with pytest.raises(RuntimeError, match="LoadGen's trace"):
        scenarios._read_logs(tmp_path)


def _details(folder: Path) -> dict[str, Any]:
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    details = (json.loads(line.removeprefix(":::MLLOG ")) for line in lines)
    return {detail["key"]: detail["value"] for detail in details}


def test_a_stall_shows_in_the_percentiles_of_what_was_due_meanwhile(tmp_path: Path) -> None:
    """Coordinated omission: a load that waits for its answers would show one slow query in hundreds."""
    options = LoadOptions(seconds=1.5, longest_s=5.0, per_query=1)
    stalling = Answering(lambda before: time.sleep(0.5 if before == 1050 else 0.0002))
    while len(stalling.asked) < 1000:  # the stall comes 50 answers later, whatever the warm-up takes
        stalling.submit([0], lambda *_: None)
        time.sleep(0.0001)
    settings = scenarios._settings(loadgen(), "Server", options, 200.0, 0.001)
    assert scenarios._drive(loadgen(), stalling, settings, tmp_path) == []
    ms = scenarios._read_logs(tmp_path).latencies_ms
    assert (ms > 100).mean() > 0.1  # some 80 of the 300 were due in the first 0.4 s of the stall
    assert ms.max() >= 400
    percentiles = latencies_from_ms(ms)
    assert percentiles is not None
    assert percentiles.percentiles[1].ms > 100  # the 90th


def test_a_run_that_is_too_short_is_invalid_and_says_why(quick: Answering) -> None:
    result = run_scenario(quick, "SingleStream", LoadOptions(seconds=0.01, longest_s=0.01))
    assert result.verdict == "INVALID"
    assert "min queries not satisfied" in result.reasons
    assert result.latency is not None


def test_a_server_that_misses_its_bound_is_invalid(quick: Answering) -> None:
    result = run_scenario(quick, "Server", LoadOptions(seconds=0.2, bound_ms=0.1))
    assert result.verdict == "INVALID"
    assert "performance constraints not satisfied" in result.reasons


def test_the_load_does_not_rest_on_one_query_of_the_warm_up() -> None:
    """Neither the first nor the last, which here takes so long that it is the last."""
    slow = Answering(lambda before: time.sleep(0.5 if before in (0, 4) else 0.0002))
    warm = scenarios._warm_up(slow, 1, 0.4)
    assert (warm.images, warm.errors) == (5, [])
    assert warm.query_s < 0.5


@pytest.mark.parametrize("when", [0, 200])
def test_an_error_in_an_answer_fails_the_scenario(when: int) -> None:
    """In the warm-up, after which nothing is run, and in the run."""

    def work(before: int) -> None:
        time.sleep(0.005)
        if before == when:
            raise DeadlineError("too late")

    failing = Answering(work)
    result = run_scenario(failing, "SingleStream", LoadOptions(seconds=0.8, longest_s=2.0))
    assert result.verdict == "INVALID"
    assert result.errors == {"DeadlineError": 1}
    assert result.reasons[0] == "answers were errors: 1, the first: too late"
    assert result.latency is result.images_per_s is None
    assert (result.images > 0) == (when > 0)


def test_an_interrupt_ends_the_run_and_leaves_nothing_behind(quick: Answering, tmp_path: Path) -> None:
    settings = scenarios._settings(loadgen(), "SingleStream", LoadOptions(seconds=1, longest_s=60), 1.0, 0.001)
    interrupt = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        scenarios._drive(loadgen(), quick, settings, tmp_path)
    assert not any(thread.name == "loadgen" for thread in threading.enumerate())


def test_without_loadgen_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'thoraxrt\[bench\]'"):
        loadgen()


@pytest.mark.parametrize(
    "wrong",
    [{"seconds": 0}, {"seconds": 50}, {"per_query": 0}, {"bound_ms": 0}, {"percent": 100}],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="expected"):
        LoadOptions(**wrong)


def test_the_fewest_queries_are_loadgens_own() -> None:
    """By its summary: 64 for the 90th percentile, 662 for the 99th."""
    assert [scenarios._queries(percent) for percent in (90, 99)] == [64, 662]


def test_intervals_cover_the_percentile_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    truth = stats.expon.ppf(0.9)
    covered = 0
    for _ in range(200):
        interval = scenarios._percentile(random.exponential(size=60), 90).interval_ms
        covered += interval is not None and interval.low <= truth <= interval.high
    assert covered / 200 > 0.92


def test_percentiles_are_observed_and_have_no_interval_where_there_are_too_few() -> None:
    found = latencies_from_ms(np.arange(1.0, 101.0)[::-1])
    assert found is not None
    assert [percentile.ms for percentile in found.percentiles] == [50, 90, 95, 99, 100]
    assert [percentile.interval_ms is None for percentile in found.percentiles] == [False, False, False, True, True]
    assert [found.at(percent) for percent in scenarios.PERCENTS] == [*found.percentiles[:3], None, None]
    middle = found.percentiles[0].interval_ms
    assert middle is not None
    # The order statistics that scipy's binomial gives: P(40 <= B <= 60) of n = 100, p = 1/2.
    assert (middle.low, middle.high) == (stats.binom.ppf(0.025, 100, 0.5), stats.binom.ppf(0.975, 100, 0.5) + 1)
    assert (found.quantiles_ms[0], found.quantiles_ms[-1], len(found.quantiles_ms)) == (1, 100, 100)
    assert list(found.quantiles_ms) == sorted(found.quantiles_ms)
    assert latencies_from_ms([]) is None
    alone = latencies_from_ms([3.0])
    assert alone is not None
    assert all(percentile.interval_ms is None for percentile in alone.percentiles)
    assert alone.at(50) is None


@pytest.mark.parametrize(("percent", "fewest"), [(50, 6), (90, 36), (95, 72), (99, 368)])
def test_a_percentile_takes_as_many_queries_as_is_said(percent: float, fewest: int) -> None:
    for count in (fewest - 1, fewest):
        found = latencies_from_ms(np.arange(float(count)))
        assert found is not None
        assert (found.at(percent) is None) == (count < fewest)


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Callable[[int, int], None]]:
    """Two CPU packages' counters, and a part of one that must not be counted twice."""
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000\n")

    def count(first: int, second: int) -> None:
        for zone, value in (("intel-rapl:0", first), ("intel-rapl:1", second), ("intel-rapl:0:0", 1)):
            (tmp_path / zone / "energy_uj").write_text(f"{value}\n")

    return count


def test_energy_is_that_of_the_packages_across_the_end_of_a_counter(
    packages: Callable[[int, int], None], tmp_path: Path
) -> None:
    packages(1_000_000, 9_500_000)
    before = scenarios._joules(tmp_path)
    packages(3_000_000, 500_000)
    assert scenarios._spent(before, scenarios._joules(tmp_path)) == pytest.approx(2.0 + 1.0)
    assert scenarios._spent(scenarios._joules(tmp_path / "none"), {}) is None
