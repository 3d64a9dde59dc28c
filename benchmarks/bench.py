"""`thoraxrt bench`: what an engine's speed is in the scenarios of MLPerf Inference, where its time goes, what bounds it.

Owns the order of the measurements, the curves, the stages, and the result that is kept. Knows neither the gate that
compares two results nor their HTML.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from thoraxrt.benchmarks.environment import Environment
from thoraxrt.benchmarks.scenarios import Latencies, ScenarioResult
from thoraxrt.benchmarks.targets import Input, TargetName

__all__ = ["BenchResult", "Curve", "Memory", "Point", "Stage"]

Arrivals = Literal["poisson", "even"]


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A curve at one `load`: its batch size, or images offered a second.

    `latency` is of a batch, or of a request from when it was due; of those that were answered, None where none was.
    `errors` counts the others by status.
    """

    load: float
    images_per_s: float
    latency: Latencies | None
    errors: dict[str, int]


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Throughput and latency over the batch size, or over the offered load with these `arrivals`."""

    over: Literal["batch", "offered load"]
    arrivals: Arrivals | None
    target: TargetName
    input: Input
    points: tuple[Point, ...]


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one image's time goes on a target, one image at a time.

    `source` says how it is known: "profile" (the engine's spans), "server" (the server's own counts), or "difference":
    the client's time without the other stages. `p50_ms` and `p99_ms` are None where only means are known.
    """

    target: TargetName
    stage: str
    mean_ms: float
    p50_ms: float | None
    p99_ms: float | None
    source: Literal["profile", "server", "difference"]


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the process that runs the network: its peak resident set, whatever else it has done; and its GPU's, in bytes.

    The engine in process shares its process with the load. `gpu_bytes` is what is used of the GPU, by whomever; None
    on a CPU.
    """

    target: TargetName
    peak_rss_bytes: int
    gpu_bytes: int | None


class BenchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything `thoraxrt bench` found, in the order in which it is read.

    `backend` and `precision` are what was executed. `images` files of `image_bytes` bytes in all were asked for in turn.
    """

    version: Literal[1] = 1
    date: str
    environment: Environment
    network: str
    bundle_sha256: str
    backend: str
    precision: str
    images: int
    image_bytes: int
    loadgen: str
    quick: bool
    scenarios: tuple[ScenarioResult, ...]
    curves: tuple[Curve, ...]
    stages: tuple[Stage, ...]
    memory: tuple[Memory, ...]
