"""`thoraxrt bench`: how fast an engine is in MLPerf's scenarios, where its time goes, and what bounds it.

Owns the order of the measurements, the curves, the stages, and the result that is kept. Knows neither the gate that
compares two results nor their HTML.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal, Self, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from thoraxrt.benchmarks.environment import Environment, environment
from thoraxrt.benchmarks.peers import Peer, compare_peers
from thoraxrt.benchmarks.roofline import Floor, Peaks, Work, floor, measure_peaks, work_from_bundle
from thoraxrt.benchmarks.rounds import Rounds, interleaved
from thoraxrt.benchmarks.scenarios import (
    PERCENTS,
    RULES,
    SCENARIOS,
    Latencies,
    LoadOptions,
    Percentile,
    Scenario,
    ScenarioResult,
    latencies_from_ms,
    loadgen,
    run_scenario,
)
from thoraxrt.benchmarks.served import (
    PREDICT,
    Served,
    answer_all,
    engine_memory,
    opened_engine,
    predict_request,
)
from thoraxrt.benchmarks.serving_load import Answer, Arrivals, Load
from thoraxrt.benchmarks.serving_load import Target as Address
from thoraxrt.benchmarks.targets import INPUTS, Clients, EngineTarget, Input, TargetName, inputs
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine, read_image, read_radiograph
from thoraxrt.engine.errors import RequestError, ServerError, ThoraxrtError
from thoraxrt.engine.execute import Picture
from thoraxrt.engine.profile import Profile
from thoraxrt.export import Track, no_progress
from thoraxrt.server.models import EngineOptions

__all__ = [
    "IMAGES",
    "BenchOptions",
    "BenchResult",
    "Curve",
    "Memory",
    "Point",
    "Stage",
    "batch_curve",
    "bench",
    "engine_stages",
    "load_curve",
    "print_result",
    "read_result",
    "server_stages",
    "whole_images",
]

_STAGES: Final = ("decode", "copy", "geometry", "network", "boxes", "back", "findings")
"""Of the engine's spans, those that follow one another; on a GPU others wait for these."""

IMAGES: Final = 64
"""Images that are measured with, at most: all of them decoded lie in memory."""

_LEAST: Final = 8  # images of a mean
_MEDIAN_OF: Final = 6  # rounds of the batch curve at least: fewer give a median no interval
_P99_TAKES: Final = 368  # spans: of fewer it would be their maximum, see Latencies.at
_REQUESTS: Final = 48  # of a point of the load curve, on average: 36 give its 90th percentile an interval
_ROUNDS: Final = 25
_DEADLINE_S: Final = 10.0  # of a request in an open loop
_T = TypeVar("_T")


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A curve at one `load`: its batch size, or images offered a second.

    `latency` is of a batch, or of a request from when it was due; of those that were answered, None where none was.
    `images_per_s` counts those alone, until the last of them was answered; `errors` counts the others by status.
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
    """Where one image's time goes on a target, one encoded image at a time.

    `source` says how it is known: "profile" (the engine's spans), "server" (the server's own counts), or "difference":
    the caller's time without the other stages. `p50_ms` and `p99_ms` are None where only a mean is known, or too few
    images were asked for. Of a server,
    "network" is geometry, network, boxes and findings, "queue" the waiting for a decoder and for a batch, and "wire"
    what is left: gRPC on both ends, loopback, and the messages' encoding.
    """

    target: TargetName
    stage: str
    mean_ms: float
    p50_ms: float | None
    p99_ms: float | None
    source: Literal["profile", "server", "difference"]


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of a process that does nothing else than run the network: the most it had in RAM; and its GPU's, in bytes.

    `gpu_bytes` is what is used of the GPU, by whomever; None on a CPU, and of a server.
    """

    target: TargetName
    peak_rss_bytes: int
    gpu_bytes: int | None


class BenchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that `thoraxrt bench` found, in the order in which it is read.

    `backend` and `precision` are what was executed. `images` files of `image_bytes` bytes in all were asked for in
    turn. `loadgen` is its version. `floors` are those of batch 1 and of the batch curve's sizes, from `work` and
    `peaks`, which are of CPUs; where there is none, `no_floor` says why. `peers` are empty where they were left out.
    `turns` are whole images, timed round by round beside a yardstick, for `bench compare`; none where it was `quick`.
    """

    version: Literal[1] = 1
    environment: Environment
    network: str
    bundle_sha256: str
    backend: str
    precision: str
    batch: int
    images: int
    image_bytes: int
    loadgen: str
    seconds: float
    quick: bool
    scenarios: tuple[ScenarioResult, ...]
    curves: tuple[Curve, ...]
    stages: tuple[Stage, ...]
    memory: tuple[Memory, ...]
    work: Work
    peaks: Peaks | None
    floors: tuple[Floor, ...]
    no_floor: str | None
    peers: tuple[Peer, ...]
    turns: dict[str, Rounds]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured.

    `load` is each scenario's; `batch` the engine's largest batch. `batches` are the sizes of the batch curve; `shares`
    the load curve's, of what the server reaches with 8 requests in flight. Both curves take `load.seconds` for each
    point, and longer where that gives too few answers. `peers` runs the network through other runtimes too.

    Raises RequestError where a value makes no sense. Example: `BenchOptions(targets=("engine",))`.
    """

    targets: tuple[TargetName, ...] = ("engine", "grpc", "oip")
    scenarios: tuple[Scenario, ...] = SCENARIOS
    load: LoadOptions = field(default_factory=LoadOptions)
    batch: int = 8
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    peers: bool = True
    quick: bool = False

    def __post_init__(self) -> None:
        for name, given, known in (
            ("targets", self.targets, tuple(INPUTS)),
            ("scenarios", self.scenarios, SCENARIOS),
        ):
            if not set(given) <= set(known):
                raise RequestError(f"{name} is {', '.join(given)}; expected some of {', '.join(known)}")
        if min(self.batch, *self.batches) < 1 or min(self.shares, default=1) <= 0:
            raise RequestError(
                f"batch is {self.batch}, batches {self.batches}, shares {self.shares}; expected at least 1, and above 0"
            )

    @classmethod
    def brief(cls) -> Self:
        """Every part for a moment: for CI, not for figures. LoadGen then says INVALID, for it is too short."""
        return cls(
            load=LoadOptions(seconds=0.25, longest_s=0.25, per_query=2),
            batch=4,
            batches=(1, 4),
            shares=(0.5,),
            peers=False,
            quick=True,
        )


def bench(
    bundle: Path,
    images: Sequence[Path],
    *,
    backend: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    checkpoint: Path | None = None,
    options: BenchOptions | None = None,
    track: Track = no_progress,
) -> BenchResult:
    """Measure the bundle on the first 64 of these images, as `Engine.open` and a server open it; minutes.

    `checkpoint` is for the peers, see `compare_peers`. Raises BackendUnavailableError without LoadGen, RequestError
    without images, ImageError for one that is no radiograph, and what `Engine.open` raises. An error in an answer does
    not end it, but fails the scenario.
    """
    options = options or BenchOptions()
    loadgen_version = _loadgen_version()
    here = environment()
    opened = Bundle.open(bundle)
    for path in images[:IMAGES]:
        read_radiograph(path)  # or it is refused now: what has no pixels would end the turns that are given them
    files = [read_image(path) for path in images[:IMAGES]]
    if not files:
        raise RequestError("no images; expected one or more encoded radiographs")
    engine = Engine.open(opened, backend=backend, precision=precision, device=device, batch=options.batch)
    backend, precision = engine.backend, engine.precision
    ran = EngineOptions(backend=backend, precision=precision, device=device)
    on_gpu = engine.device_memory() is not None
    began = time.perf_counter()
    measured = track(_parts(engine, files, ran, options), "Measuring", _count(options))
    found = [part for parts in measured for part in parts]
    work, peaks = work_from_bundle(opened, backend, precision), None if on_gpu else measure_peaks()
    floors, no_floor = _floors(work, peaks, sorted({1, *options.batches}))
    peers: tuple[Peer, ...] = ()
    if options.peers:
        pictures = [picture.array[None] for picture in inputs(files, "network", opened.manifest)]  # type: ignore[union-attr]
        turn = [pictures[number % len(pictures)] for number in range(max(options.batch, len(pictures)))]
        peers = compare_peers(opened, turn, batch=1, checkpoint=checkpoint, track=track)
    turns = {} if options.quick else whole_images(opened, ran, files, options, track)
    return BenchResult(
        environment=here,
        network=opened.manifest.network.name,
        bundle_sha256=opened.sha256,
        backend=backend,
        precision=precision,
        batch=options.batch,
        images=len(files),
        image_bytes=sum(map(len, files)),
        loadgen=loadgen_version,
        seconds=time.perf_counter() - began,
        quick=options.quick,
        scenarios=_of(found, ScenarioResult),
        curves=_of(found, Curve),
        stages=_of(found, Stage),
        memory=_of(found, Memory),
        work=work,
        peaks=peaks,
        floors=floors,
        no_floor=no_floor,
        peers=peers,
        turns=turns,
    )


_Part = ScenarioResult | Curve | Stage | Memory


def _parts(
    engine: Engine, files: Sequence[bytes], ran: EngineOptions, options: BenchOptions
) -> Iterator[Sequence[_Part]]:
    """Every measurement, one after the other: first in process, where the engine is then closed, then served."""
    bundle, seconds = engine.bundle, options.load.seconds
    with engine:
        if "engine" in options.targets:
            for kind, scenario in _plan("engine", options):
                with EngineTarget(engine, inputs(files, kind, bundle.manifest), kind) as target:
                    yield [run_scenario(target, scenario, options.load)]
            yield [batch_curve(engine, files, options.batches, seconds)]
    if "engine" in options.targets:
        yield engine_stages(bundle, ran, files, seconds)
        peak, gpu = engine_memory(bundle.path, ran, options.batch, files[: 2 * options.batch])
        yield [Memory(target="engine", peak_rss_bytes=peak, gpu_bytes=gpu)]
    if served := [name for name in options.targets if name != "engine"]:
        with Served(bundle.path, ran) as server, Clients(server.address, len(bundle.manifest.labels)) as clients:
            for name in served:
                for kind, scenario in _plan(name, options):
                    with clients.target(name, kind, inputs(files, kind, bundle.manifest)) as asked:
                        yield [run_scenario(asked, scenario, options.load)]
            if "grpc" in served:
                with Load() as load:
                    yield [load_curve(load, server.address, files, options.shares, seconds)]
                yield server_stages(clients, files, seconds)
            peak = server.peak_resident_bytes()
            yield [Memory(target=name, peak_rss_bytes=peak, gpu_bytes=None) for name in served]


def _plan(name: TargetName, options: BenchOptions) -> list[tuple[Input, Scenario]]:
    """A target's runs: all scenarios on encoded files, and one image at a time on what it takes beside."""
    return [
        (kind, scenario)
        for kind in INPUTS[name]
        for scenario in options.scenarios
        if kind == "encoded" or scenario == "SingleStream"
    ]


def _count(options: BenchOptions) -> int:
    """How many measurements `_parts` makes."""
    count = sum(len(_plan(name, options)) for name in options.targets)
    count += 3 * ("engine" in options.targets) + bool(set(options.targets) - {"engine"})
    return count + 2 * ("grpc" in options.targets)


def batch_curve(engine: Engine, files: Sequence[bytes], sizes: Sequence[int], seconds: float) -> Curve:
    """Batches of decoded images, each waited for, the sizes in turn: a round that is not counted, and some that are.

    `seconds` for each size, but at least six rounds; sizes beyond a GPU's largest bucket are left out. Raises ImageError
    for a file that cannot be decoded.
    """
    sizes = [size for size in sizes if not engine.buckets or size <= engine.buckets[-1]]
    pictures: list[Picture] = inputs(files, "decoded", engine.manifest)  # type: ignore[assignment]
    batches = {size: [pictures[i % len(pictures)] for i in range(size)] for size in sizes}
    ms: dict[int, list[float]] = {size: [] for size in sizes}
    errors: dict[int, Counter[str]] = {size: Counter() for size in sizes}
    for size in sizes:
        engine.predict_batch(batches[size])
    began, rounds = time.perf_counter(), 0
    while rounds < _MEDIAN_OF or time.perf_counter() - began < seconds * len(sizes):
        rounds += 1
        for size, batch in batches.items():
            start = time.perf_counter()
            answers = engine.predict_batch(batch)
            spent = 1000 * (time.perf_counter() - start)
            failed = [type(answer).__name__ for answer in answers if isinstance(answer, ThoraxrtError)]
            errors[size].update(failed)
            if not failed:
                ms[size].append(spent)
        if any(errors.values()):
            break
    points = [
        Point(
            load=size,
            images_per_s=1000 * size * len(ms[size]) / sum(ms[size]) if ms[size] else 0.0,
            latency=latencies_from_ms(ms[size]),
            errors=dict(errors[size]),
        )
        for size in sizes
    ]
    return Curve(over="batch", arrivals=None, target="engine", input="decoded", points=tuple(points))


def load_curve(load: Load, address: str, files: Sequence[bytes], shares: Sequence[float], seconds: float) -> Curve:
    """Requests to a thoraxrt.v1 server as they arrive, at random, whatever is unanswered, at shares of what it reaches.

    What it reaches is measured before, with 8 requests in flight. A point takes `seconds`, or as long as it takes for
    some 48 requests to come. Raises ServerError where it then answers none.
    """
    target = Address(address, PREDICT)
    requests = [predict_request(data) for data in files]
    full = _point(0, load.closed(target, requests, 8, 2 * _LEAST))
    if not full.images_per_s:
        raise ServerError(f"{address} answers no request ({full.errors}); see the server's log")
    points = []
    for share in shares:
        rate = share * full.images_per_s
        lasts = max(seconds, _REQUESTS / rate)
        points.append(_point(rate, load.open(target, requests, rate, lasts, _DEADLINE_S)))
    return Curve(over="offered load", arrivals="poisson", target="grpc", input="encoded", points=tuple(points))


def _point(rate: float, answers: Sequence[Answer]) -> Point:
    good = [answer for answer in answers if answer.status == "OK"]
    return Point(
        load=rate,
        images_per_s=len(good) / max(answer.due_s + answer.latency_s for answer in good) if good else 0.0,
        latency=latencies_from_ms([1000 * answer.latency_s for answer in good]),
        errors=dict(Counter(answer.status for answer in answers if answer.status != "OK")),
    )


def engine_stages(bundle: Bundle, ran: EngineOptions, files: Sequence[bytes], seconds: float) -> list[Stage]:
    """The stages of an engine opened for this, encoded files one at a time. Raises what `Engine.predict_one` raises."""
    profile = Profile()
    with opened_engine(bundle, ran, profile=profile) as engine:
        engine.predict_one(files[0])
        profile.clear()
        mean_ms = _mean_ms([partial(engine.predict_one, data) for data in files], seconds)
    stages = [
        Stage(
            target="engine",
            stage=time_.stage,
            mean_ms=1000 * time_.seconds / time_.spans,
            p50_ms=time_.p50_ms,
            p99_ms=time_.p99_ms if time_.spans >= _P99_TAKES else None,
            source="profile",
        )
        for time_ in profile.stages()
        if time_.stage in _STAGES
    ]
    return [*stages, _left("engine", "handing over", mean_ms, stages)]


def whole_images(
    bundle: Bundle, ran: EngineOptions, files: Sequence[bytes], options: BenchOptions, track: Track = no_progress
) -> dict[str, Rounds]:
    """Encoded files of every target, one at a time, and in process a batch at a time; by what is asked."""
    with ExitStack() as opened:
        works: dict[str, Callable[[], object]] = {}
        if "engine" in options.targets:
            engine = opened.enter_context(opened_engine(bundle, ran))
            batch = [files[number % len(files)] for number in range(options.batch)]
            several = opened.enter_context(opened_engine(bundle, ran, batch=options.batch))
            works["engine, an image"] = _in_turn([partial(engine.predict_one, data) for data in files])
            works[f"engine, {options.batch} images"] = lambda: answer_all(several, batch)
        if served := [name for name in options.targets if name != "engine"]:
            server = opened.enter_context(Served(bundle.path, ran))
            clients = opened.enter_context(Clients(server.address, len(bundle.manifest.labels)))
            for name in served:
                works[f"{name}, an image"] = _in_turn([clients.ask(name, data) for data in files])
        return interleaved(works, _ROUNDS, track)


def _in_turn(asks: Sequence[Callable[[], object]]) -> Callable[[], object]:
    turn = itertools.cycle(asks)
    return lambda: next(turn)()


def server_stages(clients: Clients, files: Sequence[bytes], seconds: float) -> list[Stage]:
    """The stages of a thoraxrt.v1 server that nobody else asks, encoded files one at a time. Raises ServerError."""
    asks = [clients.ask("grpc", data) for data in files]
    asks[0]()
    before = clients.statistics()
    mean_ms = _mean_ms(asks, seconds)
    after = clients.statistics()
    count = after.compute_infer.count - before.compute_infer.count
    stages = [
        Stage(
            target="grpc",
            stage=stage,
            mean_ms=(getattr(after, name).ns - getattr(before, name).ns) / 1e6 / count,
            p50_ms=None,
            p99_ms=None,
            source="server",
        )
        for stage, name in _SERVER_STAGES.items()
    ]
    return [*stages, _left("grpc", "wire", mean_ms, stages)]


_SERVER_STAGES: Final = {
    "queue": "queue",
    "decode": "compute_input",
    "network": "compute_infer",
    "write": "compute_output",
}
"""By the Open Inference Protocol's names in InferStatistics."""


def _left(target: TargetName, stage: str, mean_ms: float, stages: Sequence[Stage]) -> Stage:
    left = mean_ms - sum(stage.mean_ms for stage in stages)
    return Stage(target=target, stage=stage, mean_ms=left, p50_ms=None, p99_ms=None, source="difference")


def _mean_ms(asks: Sequence[Callable[[], object]], seconds: float) -> float:
    """The mean time of a call, one after the other in turn: at least 8, and on until the time has passed."""
    began, number = time.perf_counter(), 0
    while number < _LEAST or time.perf_counter() - began < seconds:
        asks[number % len(asks)]()
        number += 1
    return 1000 * (time.perf_counter() - began) / number


def _floors(work: Work, peaks: Peaks | None, batches: Sequence[int]) -> tuple[tuple[Floor, ...], str | None]:
    """The floor at each batch size, or why there is none."""
    if peaks is None:
        return (), "no floor: peaks are measured on the CPUs, and this ran on a GPU"
    try:
        return tuple(floor(work, peaks, batch) for batch in batches), None
    except RequestError as error:
        return (), str(error)


def _of(found: Sequence[_Part], kind: type[_T]) -> tuple[_T, ...]:
    return tuple(part for part in found if isinstance(part, kind))


def read_result(path: Path) -> BenchResult:
    """A result as `bench` made it, from its JSON. Raises RequestError for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=BenchResult)
    except (OSError, msgspec.DecodeError) as error:
        raise RequestError(f"{path.name} is no result of this version's `thoraxrt bench` ({error})") from error


def print_result(result: BenchResult, console: Console) -> None:
    """The result as tables."""
    tables = [_scenario_table(result), *map(_curve_table, result.curves), _stage_table(result)]
    for table in tables:
        for column in table.columns:
            column.overflow = "fold"  # no digit is left out where the terminal is narrow
    console.print(tables[0])
    why = dict.fromkeys(f"{run.scenario}: {'; '.join(run.reasons)}" for run in result.scenarios if run.reasons)
    for line in why:
        console.print(f"INVALID {line}", markup=False)
    console.print(*tables[1:])
    for name, rounds in result.turns.items():
        console.print(
            f"{name}: {statistics.median(rounds.milliseconds):.1f} ms, the median of {len(rounds.milliseconds)}"
        )
    for memory in result.memory:
        gpu = "" if memory.gpu_bytes is None else f", its GPU's {memory.gpu_bytes / 2**20:.0f} MiB"
        console.print(f"{memory.target}: peak memory {memory.peak_rss_bytes / 2**20:.0f} MiB{gpu}")
    console.print(result.no_floor or "", markup=False)


def _scenario_table(result: BenchResult) -> Table:
    least = {floor_.batch: floor_ for floor_ in result.floors}.get(1)
    ceiling = f"; floor {least.milliseconds:.1f} ms an image ({least.bound}-bound)" if least else ""
    shown = [p for p in PERCENTS if any(run.latency and run.latency.at(p) for run in result.scenarios)]
    table = Table(
        *("target", "input", "scenario", "LoadGen", "judged by", "offered/s", "images/s", *(f"p{p:g}" for p in shown)),
        title=f"{result.network}, {result.backend} {result.precision}, {result.environment}{ceiling}",
        caption="latencies of a query in ms from when it was due, with 95 % intervals; no percentile that takes more "
        f"queries than there were. {RULES}",
    )
    for run in result.scenarios:
        table.add_row(
            *(run.target, run.input, run.scenario, run.verdict, run.rule),
            *("" if rate is None else f"{rate:.1f}" for rate in (run.offered_per_s, run.images_per_s)),
            *(_said(run.latency.at(percent)) for percent in shown if run.latency),
        )
    return table


def _said(percentile: Percentile | None) -> str:
    if percentile is None or percentile.interval_ms is None:
        return ""
    return f"{percentile.ms:.1f} ({percentile.interval_ms.low:.1f} to {percentile.interval_ms.high:.1f})"


def _curve_table(curve: Curve) -> Table:
    offered = f" ({curve.arrivals} arrivals, images/s)" if curve.arrivals else ""
    table = Table(
        *(curve.over, "images/s", "p50 ms", "p90 ms", "count", "errors"),
        title=f"{curve.target}, {curve.input}: over the {curve.over}{offered}",
    )
    for point in curve.points:
        latency = [_said(point.latency.at(percent)) if point.latency else "" for percent in (50, 90)]
        count = str(point.latency.count) if point.latency else "0"
        errors = ", ".join(f"{status} {number}" for status, number in point.errors.items())
        table.add_row(f"{point.load:.3g}", f"{point.images_per_s:.1f}", *latency, count, errors)
    return table


def _stage_table(result: BenchResult) -> Table:
    table = Table("target", "stage", "mean ms", "p50 ms", "p99 ms", "known from", title="one image at a time")
    for stage in result.stages:
        tail = ("" if value is None else f"{value:.2f}" for value in (stage.p50_ms, stage.p99_ms))
        table.add_row(stage.target, stage.stage, f"{stage.mean_ms:.2f}", *tail, stage.source)
    return table


def _loadgen_version() -> str:
    loadgen()
    return version("mlcommons-loadgen")
