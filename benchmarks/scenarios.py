"""MLPerf Inference's scenarios, driven by MLPerf's own LoadGen against a target, and what it says of them.

Owns LoadGen's settings and the reading of its logs; knows neither engines nor servers. What was learnt of LoadGen 6.0
(mlcommons/inference, loadgen/): ConstructSUT takes two callbacks and no latencies come back, so each sample's, from
its scheduled arrival, is read from mlperf_log_trace.json ("Sample", complete_ns), and the verdict from _detail.txt.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.targets import Input, TargetName

__all__ = ["PERCENTS", "Latencies", "Percentile", "Scenario", "ScenarioResult", "latencies"]

Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]

PERCENTS = (50.0, 90.0, 95.0, 99.0, 99.9)


class Percentile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A latency's percentile in ms, and its 95 % interval from order statistics; None where there are too few for one."""

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


class ScenarioResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One scenario on one target.

    `verdict` is LoadGen's, but INVALID also where an answer was an error: `errors` counts those by what they say, and
    there are then no latencies and no throughput. `reasons` say why it is INVALID. `early_stopping` is what LoadGen's
    rule says. A query holds `per_query` images; a latency is a query's, from when it was due: in Server from its
    scheduled arrival, else from when it was issued, which is when the one before was answered. In Offline all images
    are one query, and there is one latency.

    `offered_per_s` is Server's load, queries a second; `bound_ms` what `percent` % of its latencies must meet.
    `seconds` is the measured time, without the `warm_up` images before it. `joules_per_image` is of the whole machine's
    CPU packages, None where they do not say.
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
