"""A bench result as a page: scenarios as LoadGen judged them, latencies, curves, stages, peers, the roofline.

Owns what stands where and how numbers are said; every number is the result's.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from thoraxrt.benchmarks.bench import BenchResult, Curve
from thoraxrt.benchmarks.bench_figures import (
    Ratio,
    Roof,
    Run,
    Throughput,
    latencies_panel,
    ratios_panel,
    roofline_panel,
    stages_panel,
    throughput_panel,
)
from thoraxrt.benchmarks.peers import REFERENCE, Peer
from thoraxrt.benchmarks.report import DASH, Banner, Cell, Drawing, Panel, Table, estimate, number, render
from thoraxrt.benchmarks.roofline import Floor
from thoraxrt.benchmarks.scenarios import PERCENTS, RULES, Latencies, Percentile, ScenarioResult

__all__ = ["bench_report"]

_TARGETS = {"engine": "engine in process", "grpc": "server, thoraxrt.v1", "oip": "server, Open Inference"}
_INPUTS = {"encoded": "file's bytes", "decoded": "decoded pixels", "network": "network's input"}


def bench_report(result: BenchResult) -> str:
    """The result as one HTML page."""
    return render(
        "bench.html",
        title=f"Speed of {result.network}, {result.backend} {result.precision}",
        banners=_banners(result.scenarios),
        machine=result.environment,
        result=result,
        facts=_facts(result),
        scenarios=_scenarios(result.scenarios),
        loadgen=_loadgen(result.scenarios),
        latencies=_latencies(result.scenarios),
        percentiles=_percentiles(result.scenarios),
        curves=_curves(result.curves),
        points=_points(result.curves),
        stages=_stages(result),
        stage_table=_stage_table(result),
        peers=_peers(result.peers),
        peer_table=_peer_table(result.peers),
        roofline=_roofline(result),
        floors=_floors(result),
        memory=_memory(result),
    )


def _name(target: str, given: str) -> str:
    return f"{_TARGETS[target]}, {_INPUTS[given]}"


def _facts(result: BenchResult) -> list[tuple[str, str]]:
    return [
        ("backend, precision", f"{result.backend} {result.precision}"),
        ("images", f"{result.images:,}, {result.image_bytes / 1e6 / result.images:.2f} MB each"),
        ("LoadGen", result.loadgen),
        ("took", f"{result.seconds:,.0f} s" + (" (quick)" if result.quick else "")),
        ("bundle", result.bundle_sha256[:12]),
    ]


# --- scenarios -------------------------------------------------------------------------------------------


def _banners(scenarios: Sequence[ScenarioResult]) -> list[Banner]:
    """One for each scenario: what LoadGen calls INVALID is said to be, and its figures are no claim."""
    banners = []
    for name in dict.fromkeys(each.scenario for each in scenarios):
        runs = [each for each in scenarios if each.scenario == name]
        invalid = sum(each.verdict == "INVALID" for each in runs)
        banners.append(
            Banner(
                state="open" if invalid else "pass",
                subject=f"{name}: {invalid} of {len(runs)} runs INVALID" if invalid else f"{name}: VALID",
                reasons=[(f"{_name(each.target, each.input)}:", _headline(each)) for each in runs],
            )
        )
    return banners or [Banner(state="open", subject="No scenario was run", reasons=())]


def _headline(each: ScenarioResult) -> str:
    said = "" if each.verdict == "VALID" else ", INVALID"
    if each.images_per_s is None:
        return f"no figures{said}"
    rate = f"{each.offered_per_s:.1f}/s offered" if each.offered_per_s else f"{each.images_per_s:.1f} images/s"
    latency = f", p{each.percent:g} {_percentile(each.judged, '.1f').text} ms" if each.judged else ""
    return f"{rate}{latency}{said}"


def _percentile(each: Percentile | None, form: str = ".2f") -> Cell:
    return estimate(each.ms, each.interval_ms, form) if each else number(None)


def _scenarios(scenarios: Sequence[ScenarioResult]) -> Table:
    return Table(
        head=(
            "scenario",
            "target",
            "input",
            "verdict",
            "judged by",
            "at that, ms",
            "images/s",
            "queries",
            "images",
            "s",
            "offered/s",
            "CPU packages, J/image",
        ),
        rows=[
            [
                Cell(text=each.scenario),
                Cell(text=_TARGETS[each.target], css="text"),
                Cell(text=_INPUTS[each.input], css="text"),
                Cell(text=each.verdict, state="pass" if each.verdict == "VALID" else "fail", css="text"),
                Cell(text=each.rule, css="text"),
                _percentile(each.judged),
                number(each.images_per_s, ".1f"),
                number(each.queries, ",d"),
                number(each.images, ",d"),
                number(each.seconds, ".1f"),
                number(each.offered_per_s, ".1f"),
                number(each.joules_per_image, ".2f"),
            ]
            for each in scenarios
        ],
        caption=f"MLPerf Inference's scenarios, driven and judged by LoadGen. What it calls INVALID is no result. {RULES}",
    )


def _loadgen(scenarios: Sequence[ScenarioResult]) -> Table:
    return Table(
        head=("scenario", "target", "why INVALID, and errors", "early stopping"),
        rows=[
            [
                Cell(text=each.scenario),
                Cell(text=_name(each.target, each.input), css="text"),
                Cell(
                    text="; ".join((*each.reasons, *(f"{n} x {error}" for error, n in each.errors.items()))) or DASH,
                    css="wrap",
                ),
                Cell(text=each.early_stopping or DASH, css="wrap"),
            ]
            for each in scenarios
        ],
        caption="In LoadGen's words.",
    )


def _latencies(scenarios: Sequence[ScenarioResult]) -> Drawing:
    panels = []
    for name in dict.fromkeys(each.scenario for each in scenarios):
        curves = {
            _name(each.target, each.input): _distribution(each.latency)
            for each in scenarios
            if each.scenario == name and each.latency is not None and each.latency.count > 1
        }
        if curves:
            panels.append(latencies_panel(name, curves))
    return Drawing(
        panels=panels,
        caption="The share of queries that were answered by then, the tail stretched. From when a query was due, so that what "
        "waited counts. The further left and the steeper, the better.",
    )


def _distribution(latency: Latencies) -> list[tuple[float, float]]:
    """(share, milliseconds): the kept quantiles, and the percentiles beyond them that there are queries enough for."""
    steps = len(latency.quantiles_ms) - 1
    points = [(step / steps, ms) for step, ms in enumerate(latency.quantiles_ms)]
    return sorted({*points, *((each.percent / 100, each.ms) for each in latency.percentiles if each.interval_ms)})


def _percentiles(scenarios: Sequence[ScenarioResult]) -> Table | None:
    rows = [
        [
            Cell(text=each.scenario),
            Cell(text=_name(each.target, each.input), css="text"),
            number(each.latency.count, ",d"),
            number(each.latency.mean_ms, ".2f"),
            *(_percentile(each.latency.at(percent)) for percent in PERCENTS),
        ]
        for each in scenarios
        if each.latency
    ]
    if not rows:
        return None
    return Table(
        head=("scenario", "target", "queries", "mean", *(f"p{percent:g}" for percent in PERCENTS)),
        rows=rows,
        caption="Latency of a query in ms, with the 95 % interval by order statistics; no percentile that takes more queries than there were.",
    )


# --- curves and stages -----------------------------------------------------------------------------------


def _curves(curves: Sequence[Curve]) -> Drawing:
    panels: list[Panel] = []
    for over, percent, title in (("batch", 50.0, "Over batch size"), ("offered load", 90.0, "Over offered load")):
        drawn = {
            _curve(curve): [
                Throughput(point.images_per_s, judged.ms, f"{point.load:.3g}" + ("" if over == "batch" else "/s"))
                for point in curve.points
                if point.latency and (judged := point.latency.at(percent))
            ]
            for curve in curves
            if curve.over == over
        }
        drawn = {name: points for name, points in drawn.items() if points}
        if drawn:
            panels.append(throughput_panel(title, drawn, "median" if percent == 50.0 else f"p{percent:g}"))
    return Drawing(
        panels=panels,
        caption="Latency over throughput. Beside each point its batch size, or the images offered a second: where "
        "throughput no longer grows and latency does, the machine is full.",
    )


def _curve(curve: Curve) -> str:
    return _name(curve.target, curve.input) + (f", {curve.arrivals} arrivals" if curve.arrivals else "")


def _points(curves: Sequence[Curve]) -> Table | None:
    rows = [
        [
            Cell(text=_curve(curve)),
            Cell(text=curve.over, css="text"),
            number(point.load, ".4g"),
            number(point.images_per_s, ".1f"),
            *(_percentile(point.latency.at(percent) if point.latency else None) for percent in (50.0, 90.0, 99.0)),
            Cell(text=", ".join(f"{count} {status}" for status, count in point.errors.items()) or DASH, css="text"),
        ]
        for curve in curves
        for point in curve.points
    ]
    if not rows:
        return None
    return Table(
        head=("target", "over", "load", "images/s", "median, ms", "p90, ms", "p99, ms", "errors"),
        rows=rows,
        caption="The curves' points, with 95 % intervals. Load is a batch's images, or images offered a second.",
    )


def _stages(result: BenchResult) -> Drawing:
    targets = dict.fromkeys(stage.target for stage in result.stages)
    times = {
        _TARGETS[target]: {each.stage: each.mean_ms for each in result.stages if each.target == target}
        for target in targets
    }
    return Drawing(
        panels=[stages_panel("Mean time of one image", times)] if times else [],
        caption="Where the time of one encoded image goes, asked for one at a time: the widest part is what to work on.",
    )


def _stage_table(result: BenchResult) -> Table | None:
    if not result.stages:
        return None
    return Table(
        head=("stage", "target", "mean, ms", "median, ms", "p99, ms", "known by"),
        rows=[
            [
                Cell(text=each.stage),
                Cell(text=_TARGETS[each.target], css="text"),
                number(each.mean_ms, ".3f"),
                number(each.p50_ms, ".3f"),
                number(each.p99_ms, ".3f"),
                Cell(text=each.source, css="text"),
            ]
            for each in result.stages
        ],
        caption="Stages: by the engine's own spans, by the server's counts, or what is left of the caller's time.",
    )


# --- peers, the floor, memory ----------------------------------------------------------------------------


def _peers(peers: Sequence[Peer]) -> Drawing:
    ratios = [
        Ratio(peer.name, peer.speed_up, peer.interval)
        for peer in peers
        if peer.speed_up is not None and peer.name != REFERENCE
    ]
    return Drawing(
        panels=[ratios_panel(f"Times as fast as {REFERENCE}", ratios)] if ratios else [],
        caption="The network alone through every runtime here, in turn in one process, round by round: medians of the rounds' "
        "ratios with their 95 % intervals. Right of 1 is faster. Runtimes with their defaults, and PyTorch, run on the CPU.",
    )


def _peer_table(peers: Sequence[Peer]) -> Table | None:
    if not peers:
        return None
    return Table(
        head=("runtime", "batch", "median, ms", f"times as fast as {REFERENCE}", "answers, mean error", "why not"),
        rows=[
            [
                Cell(text=peer.name),
                number(peer.batch, "d"),
                number(median(peer.rounds.milliseconds) if peer.rounds else None, ".2f"),
                estimate(peer.speed_up, peer.interval, ".2f"),
                number(peer.agreement.mean_error if peer.agreement else None, ".2g"),
                Cell(text=peer.reason or DASH, css="wrap"),
            ]
            for peer in peers
        ],
        caption="Time of one batch. A runtime whose answers are wrong has no time.",
    )


def _reached(result: BenchResult) -> list[tuple[Floor, float]]:
    """Each floor with the images per second that the engine reached at its batch size, from pixels to boxes."""
    points = [
        point
        for curve in result.curves
        if curve.over == "batch" and curve.target == "engine"
        for point in curve.points
        if point.images_per_s > 0
    ]
    best = {point.load: point.images_per_s for point in points}
    return [(floor, best[floor.batch]) for floor in result.floors if floor.batch in best]


def _roofline(result: BenchResult) -> Drawing:
    reached = _reached(result)
    if result.peaks is None or not reached:
        return Drawing(panels=[], caption="")
    roofs = [
        Roof(name, peak.operations_per_s)
        for name, peak in result.peaks.arithmetic.items()
        if name in result.work.operations
    ]
    runs = [Run(f"batch {floor.batch}", floor.intensity, floor.operations * rate) for floor, rate in reached]
    return Drawing(
        panels=[roofline_panel("Roofline", roofs, result.peaks.bytes_per_s, runs)],
        caption="What the machine reached at best: the sloped line is its memory, the flat ones its arithmetic. A point is the "
        "engine from decoded pixels to boxes, so that what its distance to the line above holds is not the network's alone.",
    )


def _floors(result: BenchResult) -> Table | None:
    rates = {floor.batch: rate for floor, rate in _reached(result)}
    if not result.floors:
        return None
    return Table(
        head=(
            "batch",
            "floor, ms/image",
            "bound by",
            "1e9 operations",
            "MB",
            "pixels to boxes, ms/image",
            "share reached",
        ),
        rows=[
            [
                Cell(text=str(floor.batch)),
                number(floor.milliseconds, ".2f"),
                Cell(text=floor.bound, css="text"),
                number(floor.operations / 1e9, ".2f"),
                number(floor.bytes / 1e6, ".2f"),
                number(1000 / rates[floor.batch] if floor.batch in rates else None, ".2f"),
                number(floor.share(1000 / rates[floor.batch]) if floor.batch in rates else None, ".0%"),
            ]
            for floor in result.floors
        ],
        caption="The least time that the counted operations and bytes of one image take at this machine's measured peaks, and "
        "what the engine takes from decoded pixels to boxes, geometry included.",
    )


def _memory(result: BenchResult) -> Table | None:
    if not result.memory:
        return None
    return Table(
        head=("target", "peak RAM, MB", "GPU memory, MB"),
        rows=[
            [
                Cell(text=_TARGETS[each.target]),
                number(each.peak_rss_bytes / 1e6, ",.0f"),
                number(each.gpu_bytes / 1e6 if each.gpu_bytes is not None else None, ",.0f"),
            ]
            for each in result.memory
        ],
        caption="Memory of a process that does nothing but run the network.",
    )
