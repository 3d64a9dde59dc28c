"""MLPerf Inference's scenarios, driven by MLPerf's own LoadGen against a target, and what it says of them.

Owns LoadGen's settings and the reading of its logs; knows neither engines nor servers. What was learnt of LoadGen 6.0
(mlcommons/inference, loadgen/): its SUT has two callbacks and gives no latencies back, so each query's, from its
scheduled arrival, is read from mlperf_log_trace.json ("Sample", complete_ns), and the verdict from mlperf_log_detail.txt.
"""

from __future__ import annotations

import importlib
import math
import queue
import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import msgspec
import numpy as np
import numpy.typing as npt
from scipy import stats

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.targets import Input, Target, TargetName
from thoraxrt.engine.errors import BackendUnavailableError, RequestError

__all__ = [
    "PERCENTS",
    "RULES",
    "SCENARIOS",
    "Latencies",
    "LoadOptions",
    "Percentile",
    "Scenario",
    "ScenarioResult",
    "latencies_from_ms",
    "loadgen",
    "run_scenario",
]

Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]

SCENARIOS: Final[tuple[Scenario, ...]] = get_args(Scenario)

PERCENTS: Final = (50.0, 90.0, 95.0, 99.0, 99.9)

RULES: Final = (
    "VALID is LoadGen's word by the rule that stands beside it, which asks less than MLPerf's own (mlperf.conf): 600 s, "
    "p99 in MultiStream and Server. Server's load is half of what the warm-up reached: its images/s are what was offered, "
    "no capacity."
)
"""What a reader of verdicts must know."""

_QUANTILES: Final = 201
_STREAM_PERCENT: Final = 90.0
"""What SingleStream and MultiStream are judged by; MLPerf's is 99 for MultiStream, which takes 662 queries, not 64."""

_SERVER_SHARE: Final = 0.5
"""Of what the warm-up reached."""

_WARM_QUERIES: Final = 5
"""At least: the first is slower than the others, and so may be any other."""

_EARLY_STOPPING: Final = 0.01
"""LoadGen's early stopping accepts so large a chance of being wrong about a percentile."""


class Percentile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A latency's percentile in ms, and its 95 % interval from order statistics.

    Where there are too few for an interval it is None, and `ms`, of a tail the maximum, no percentile to show.
    """

    percent: float
    ms: float
    interval_ms: Interval | None


class Latencies(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The latencies of `count` queries in ms.

    `percentiles` are PERCENTS. `quantiles_ms` are at most 201 ordered ones, at equal steps of probability from 0 (the
    lowest) to 1 (the highest): the distribution function.
    """

    count: int
    mean_ms: float
    percentiles: tuple[Percentile, ...]
    quantiles_ms: tuple[float, ...]

    def at(self, percent: float) -> Percentile | None:
        """One of PERCENTS; None where there are too few queries for it: p50 takes 6, p90 36, p95 72, p99 368."""
        return next((each for each in self.percentiles if each.percent == percent and each.interval_ms), None)


class ScenarioResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One scenario on one target.

    `verdict` is LoadGen's, but INVALID also where an answer was an error: `errors` counts those by what they say, and
    there are then no latencies and no throughput. `reasons` say why it is INVALID. `early_stopping` is what LoadGen's
    rule says. A query holds `per_query` images; a latency is a query's, from when it was due: in Server from its
    scheduled arrival, else from when it was issued, which is when the one before was answered. In Offline all images
    are one query, and there is one latency.

    `percent` % of the latencies are what the scenario is judged by, None in Offline; `offered_per_s` is Server's load,
    queries a second, `bound_ms` what its percentile must meet: see RULES. `seconds` is the measured time, without the `warm_up`
    images before it. `joules_per_image` is of the machine's CPU packages, None where they do not say.
    """

    scenario: Scenario
    target: TargetName
    input: Input
    verdict: Literal["VALID", "INVALID"]
    reasons: tuple[str, ...]
    early_stopping: str
    queries: int
    images: int
    per_query: int
    warm_up: int
    seconds: float
    images_per_s: float | None
    offered_per_s: float | None
    percent: float | None
    bound_ms: float | None
    latency: Latencies | None
    errors: dict[str, int]
    joules_per_image: float | None

    @property
    def rule(self) -> str:
        """What it is judged by, in few words."""
        bound = f" <= {self.bound_ms:g} ms" if self.bound_ms else ""
        return "images/s" if self.percent is None else f"p{self.percent:g}{bound}"

    @property
    def judged(self) -> Percentile | None:
        """The percentile that it is judged by; None in Offline, and where there are too few queries for it."""
        return self.latency.at(self.percent) if self.latency and self.percent else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How long a scenario runs and what it is judged by.

    At least `seconds`, and on until LoadGen's early-stopping rule has enough queries, but no query is issued after
    `longest_s`. MultiStream's queries hold `per_query` images (MLPerf: 8). In Server, `percent` % of the queries must
    meet `bound_ms` (MLPerf's 99 % takes 662 queries, 95 % takes 130), at half of what the warm-up reached.

    Raises RequestError where a value makes no sense. Example: `LoadOptions(seconds=60, percent=99)`.
    """

    seconds: float = 5.0
    longest_s: float = 40.0
    per_query: int = 8
    percent: float = 95.0
    bound_ms: float = 1000.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= self.longest_s < math.inf:
            raise RequestError(f"seconds is {self.seconds}; expected above 0 and at most longest_s, {self.longest_s}")
        if self.per_query < 1 or self.bound_ms <= 0:
            raise RequestError(f"per_query is {self.per_query}, bound_ms {self.bound_ms}; expected each above 0")
        if not 50 <= self.percent < 100:
            raise RequestError(f"percent is {self.percent}; expected 50 up to, not including, 100")


def loadgen() -> Any:
    """MLPerf's module. Raises BackendUnavailableError where it is not installed."""
    try:
        return importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        raise BackendUnavailableError(
            f"MLPerf's LoadGen cannot be imported ({error}); it drives the scenarios: pip install 'thoraxrt[bench]', or "
            "pip install mlcommons-loadgen, which builds with a C++ compiler where it has no wheel"
        ) from error


def latencies_from_ms(values: Sequence[float] | npt.NDArray[np.float64]) -> Latencies | None:
    """The latencies of queries in ms, at least one; None without any.

    A percentile is the lowest observed value that this share of them does not exceed. Its interval is that between the
    two order statistics that hold it with at least 95 % probability, whatever the distribution (Conover, Practical
    Nonparametric Statistics, 3rd ed., section 3.2), as scipy.stats.quantile_test gives it.
    """
    ms = np.asarray(values, np.float64)
    if not ms.size:
        return None
    steps = np.linspace(0, 1, min(_QUANTILES, max(ms.size, 2)))
    return Latencies(
        count=ms.size,
        mean_ms=float(ms.mean()),
        percentiles=tuple(_percentile(ms, percent) for percent in PERCENTS),
        quantiles_ms=tuple(np.quantile(ms, steps, method="inverted_cdf").tolist()),
    )


def _percentile(ms: npt.NDArray[np.float64], percent: float) -> Percentile:
    low, high = stats.quantile_test(ms, p=percent / 100).confidence_interval(0.95)
    return Percentile(
        percent=percent,
        ms=float(np.percentile(ms, percent, method="inverted_cdf")),
        interval_ms=Interval(low=float(low), high=float(high)) if np.isfinite([low, high]).all() else None,
    )


def run_scenario(target: Target, scenario: Scenario, options: LoadOptions) -> ScenarioResult:
    """Warm the target up, then run the scenario on it, unless the warm-up met an error.

    Raises BackendUnavailableError without LoadGen.
    """
    module = loadgen()
    size = 1 if scenario == "SingleStream" else options.per_query
    warm = _warm_up(target, size, min(1.0, options.seconds))
    offered = _SERVER_SHARE * size / warm.query_s
    errors, ran, joules = warm.errors, _NOT_RUN, None
    if not errors:
        before = _joules(_POWERCAP)
        with tempfile.TemporaryDirectory() as folder:
            errors = _drive(module, target, _settings(module, scenario, options, offered, warm.query_s), Path(folder))
            joules = _spent(before, _joules(_POWERCAP))
            ran = _read_logs(Path(folder))
    counted = Counter(type(error).__name__ for error in errors)
    said = [f"answers were errors: {len(errors)}, the first: {errors[0]}"] if errors else []
    percent = {"Offline": None, "Server": options.percent}.get(scenario, _STREAM_PERCENT)
    return ScenarioResult(
        scenario=scenario,
        target=target.name,
        input=target.input,
        verdict="INVALID" if errors or not ran.valid else "VALID",
        reasons=(*said, *ran.reasons),
        early_stopping=ran.early_stopping,
        queries=len(ran.latencies_ms),
        images=ran.images,
        per_query=ran.images // max(len(ran.latencies_ms), 1),
        warm_up=warm.images,
        seconds=ran.seconds,
        images_per_s=None if errors else ran.images / ran.seconds,
        offered_per_s=offered if scenario == "Server" else None,
        percent=percent,
        bound_ms=options.bound_ms if scenario == "Server" else None,
        latency=None if errors else latencies_from_ms(ran.latencies_ms),
        errors=dict(counted),
        joules_per_image=None if errors or joules is None else joules / ran.images,
    )


class _Warm(NamedTuple):
    images: int
    query_s: float  # their median
    errors: list[Exception]


def _warm_up(target: Target, size: int, seconds: float) -> _Warm:
    """Queries of `size` images, one after the other: at least five, and on until the time has passed or one failed."""
    began, seconds_each, errors = time.perf_counter(), list[float](), list[Exception]()
    answers = queue.SimpleQueue[Exception | None]()
    while True:
        asked, number = time.perf_counter(), len(seconds_each)
        target.submit([(number * size + i) % target.count for i in range(size)], lambda _, error: answers.put(error))
        errors += [error for error in (answers.get() for _ in range(size)) if error is not None]
        seconds_each.append((now := time.perf_counter()) - asked)
        if errors or (len(seconds_each) >= _WARM_QUERIES and now - began >= seconds):
            return _Warm(len(seconds_each) * size, statistics.median(seconds_each), errors)


def _settings(module: Any, scenario: Scenario, options: LoadOptions, offered_per_s: float, query_s: float) -> Any:
    """LoadGen's TestSettings. It prepares as many queries as fit the least time, by what it is told to expect."""
    settings = module.TestSettings()
    settings.scenario = getattr(module.TestScenario, scenario)
    settings.mode = module.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.max_duration_ms = int(1000 * options.seconds), int(1000 * options.longest_s)
    percent = options.percent if scenario == "Server" else _STREAM_PERCENT
    settings.min_query_count = 1 if scenario == "Offline" else _queries(percent)
    settings.single_stream_expected_latency_ns = int(1e9 * query_s / 4)
    settings.single_stream_target_latency_percentile = percent / 100
    settings.multi_stream_samples_per_query = options.per_query
    settings.multi_stream_expected_latency_ns = int(1e9 * query_s / 4)
    settings.multi_stream_target_latency_percentile = percent / 100
    settings.server_target_qps = offered_per_s
    settings.server_target_latency_ns = int(1e6 * options.bound_ms)
    settings.server_target_latency_percentile = percent / 100
    settings.offline_expected_qps = 1.5 * options.per_query / query_s  # faster than warm-up: decoding overlaps
    return settings


def _queries(percent: float) -> int:
    """The fewest queries that LoadGen's early stopping accepts for a percentile where one of them may exceed it.

    P(at most one of n is above the percentile) <= 1 % (MLPerf Inference rules, appendix "Early Stopping Criterion").
    """
    n = 2
    while stats.binom.cdf(1, n, 1 - percent / 100) > _EARLY_STOPPING:
        n += 1
    return n


def _drive(module: Any, target: Target, settings: Any, folder: Path) -> list[Exception]:
    """Run LoadGen's test, its logs into the folder; the errors that were answers.

    It runs in a thread of its own, so that an interrupt does not end up in LoadGen's code: then what is still issued
    is answered at once.
    """
    errors: list[Exception] = []
    stopped, ended = threading.Event(), threading.Event()

    def issue(samples: Sequence[Any]) -> None:
        ids = [sample.id for sample in samples]

        def answered(place: int, error: Exception | None) -> None:
            if error is not None:
                errors.append(error)
            module.QuerySamplesComplete([module.QuerySampleResponse(ids[place], 0, 0)])

        if stopped.is_set():
            for place in range(len(ids)):
                answered(place, None)
        else:
            target.submit([sample.index for sample in samples], answered)

    logs = module.LogSettings()
    output = module.LogOutputSettings()
    output.outdir = str(folder)
    logs.log_output = output
    sut = module.ConstructSUT(issue, lambda: None)
    qsl = module.ConstructQSL(target.count, target.count, lambda _: None, lambda _: None)
    audit = str(folder / "audit.config")  # else LoadGen obeys one that lies in the working directory

    def test() -> None:
        try:
            module.StartTestWithLogSettings(sut, qsl, settings, logs, audit)
        finally:
            ended.set()

    thread = threading.Thread(target=test, name="loadgen")
    thread.start()
    try:
        ended.wait()
    finally:
        stopped.set()
        ended.wait()  # an interrupted Thread.join takes the thread to have ended (Python 3.11)
        thread.join()
        module.DestroyQSL(qsl)
        module.DestroySUT(sut)
    return errors


class _Ran(NamedTuple):
    valid: bool
    reasons: tuple[str, ...]
    early_stopping: str
    latencies_ms: npt.NDArray[np.float64]  # (queries,)
    images: int
    seconds: float


_NOT_RUN: Final = _Ran(False, (), "", np.empty(0), 0, 0.0)

_MISSED: Final = {
    "result_perf_constraints_met": "performance constraints not satisfied",
    "result_min_duration_met": "min duration not satisfied",
    "result_min_queries_met": "min queries not satisfied",
    "early_stopping_met": "early stopping not satisfied",
}
"""LoadGen's, in the words of its summary."""

_DETAIL: Final = re.compile(r':::MLLOG (.*"key": "(?:result_|early_stopping|num_errors).*)')
_SAMPLE: Final = re.compile(r'"Sample".*"ts":(-?[\d.]+),.*"query_seq":(\d+),.*"complete_ns":(\d+)')


def _read_logs(folder: Path) -> _Ran:
    """What LoadGen logged. Raises RuntimeError where the trace does not hold every query."""
    details = map(msgspec.json.decode, _DETAIL.findall((folder / "mlperf_log_detail.txt").read_text()))
    said = {detail["key"]: detail["value"] for detail in details}
    samples = _SAMPLE.findall((folder / "mlperf_log_trace.json").read_text())
    table = np.array(samples, np.float64).reshape(-1, 3)  # (images, 3): due in microseconds, query, latency in ns
    due_ns, query, latency_ns = 1e3 * table[:, 0], table[:, 1].astype(int), table[:, 2]
    latencies = np.zeros(query.max(initial=-1) + 1)
    np.maximum.at(latencies, query, latency_ns)  # a query's is that of its last image
    if len(latencies) != said["result_query_count"] or not latencies.all():
        raise RuntimeError(f"LoadGen's trace holds {len(latencies)} queries of {said['result_query_count']}")
    early_stopping = " ".join(said["early_stopping_result"].replace("*", "").split())
    reasons = [words for key, words in _MISSED.items() if said.get(key) is False]
    reasons += filter(None, [said.get("result_invalid_reason", "").strip()])
    if said["num_errors"]:
        reasons.append(f"LoadGen met {said['num_errors']} errors")
    return _Ran(
        valid=said["result_validity"] == "VALID" and not said["num_errors"],
        reasons=tuple(reasons),
        early_stopping=early_stopping,
        latencies_ms=latencies / 1e6,
        images=len(table),
        seconds=float((due_ns + latency_ns).max() - due_ns.min()) / 1e9,
    )


_POWERCAP: Final = Path("/sys/class/powercap")


def _joules(powercap: Path) -> dict[Path, float]:
    """The energy counter of each CPU package in J, where this process may read it (kernel, power/powercap)."""
    try:
        return {
            zone: int((zone / "energy_uj").read_text()) / 1e6
            for zone in sorted(powercap.glob("intel-rapl:*"))
            if (zone / "name").read_text().startswith("package")
        }
    except OSError:  # root's alone since Linux 5.10
        return {}


def _spent(before: dict[Path, float], after: dict[Path, float]) -> float | None:
    """What the packages took in between, J; each counter begins again once at most in so short a time."""
    if not before or before.keys() != after.keys():
        return None
    ends = {zone: int((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in before}
    return sum((after[zone] - before[zone]) % ends[zone] for zone in before)
