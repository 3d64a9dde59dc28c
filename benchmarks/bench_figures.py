"""Figures of a benchmark, from plain numbers: latencies, throughput, stages, peers, the roofline.

Owns how they are drawn. Measures nothing and judges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from thoraxrt.benchmarks.auroc import Interval
from thoraxrt.benchmarks.report import INK, MUTED, Panel, lines, panel, series

__all__ = [
    "Ratio",
    "Roof",
    "Run",
    "Throughput",
    "latencies_panel",
    "ratios_panel",
    "roofline_panel",
    "stages_panel",
    "throughput_panel",
]

_PERCENTILES = (50.0, 90.0, 99.0, 99.9)


class Throughput(NamedTuple):
    """A point of a curve: images per second, latency in milliseconds, and what was set there ("batch 8")."""

    per_second: float
    latency: float
    setting: str


class Ratio(NamedTuple):
    """How many times as fast as the reference a peer is, with its 95 % interval where there is one."""

    peer: str
    value: float
    interval: Interval | None


class Roof(NamedTuple):
    """A peak: operations per second that the machine reached, in precision `name`."""

    name: str
    peak: float


class Run(NamedTuple):
    """A network's run: operations per byte, and operations per second reached."""

    name: str
    intensity: float
    reached: float


def latencies_panel(title: str, latencies: Mapping[str, Sequence[tuple[float, float]]]) -> Panel:
    """Distribution functions of latency by name: (share of the answers 0..1, milliseconds) ascending, the tail stretched.

    The vertical axis is logarithmic in the share that is slower, so that p99 and p99.9 stand as far apart as p90 and
    p99.
    """
    figure = Figure((4.3, 3 + 0.19 * len(latencies)), layout="constrained")
    axes = figure.subplots()
    deepest = max(share for points in latencies.values() for share, _ in points if share < 1)
    shown = [p for p in _PERCENTILES if p / 100 <= deepest + 1e-9]
    for number, (name, points) in enumerate(latencies.items()):
        below = [(milliseconds, 1 - share) for share, milliseconds in points if share < 1]
        axes.plot(*zip(*below, strict=True), color=series(number), linestyle=lines(number), linewidth=1.6, label=name)
    figure.legend(loc="outside upper left", fontsize=8.5, handlelength=3)
    axes.set(xscale="log", yscale="log", ylim=(1, (1 - deepest) / 1.5), xlabel="latency, ms", ylabel="percentile")
    axes.yaxis.set_major_locator(FixedLocator([1 - p / 100 for p in shown]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda above, _: f"p{100 - 100 * above:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _plain(axes)
    words = "; ".join(
        f"{name}: " + ", ".join(f"p{p:g} {dict(points)[p / 100]:.3g} ms" for p in shown if p / 100 in dict(points))
        for name, points in latencies.items()
    )
    return panel(figure, title, f"{title}. {words}")


def throughput_panel(title: str, curves: Mapping[str, Sequence[Throughput]], quantile: str) -> Panel:
    """Latency over throughput, a curve per name, each point marked with what was set there.

    `quantile` says which latency it is ("median", "p99").
    """
    figure = Figure((4.3, 3 + 0.19 * len(curves)), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        x, y = [point.per_second for point in points], [point.latency for point in points]
        axes.plot(
            x, y, color=series(number), linestyle=lines(number), linewidth=1.5, marker="o", markersize=4, label=name
        )
        for point in points:
            axes.annotate(
                point.setting,
                (point.per_second, point.latency),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=MUTED,
            )
    figure.legend(loc="outside upper left", fontsize=8.5, handlelength=3)
    axes.set(xlim=(0, None), yscale="log", xlabel="images per second", ylabel=f"latency ({quantile}), ms")
    axes.margins(x=0.08, y=0.15)
    _plain(axes)
    words = "; ".join(
        f"{name}: " + ", ".join(f"{p.setting} {p.per_second:.3g} images/s at {p.latency:.3g} ms" for p in points)
        for name, points in curves.items()
    )
    return panel(figure, title, f"{title}. {words}")


def stages_panel(title: str, stages: Mapping[str, Mapping[str, float]]) -> Panel:
    """Where an image's time goes: stacked bars of milliseconds per stage, a bar per target.

    Every target's stages are taken in the order of their first appearance.
    """
    names = list(dict.fromkeys(name for times in stages.values() for name in times))
    figure = Figure((4.6, 1.15 + 0.42 * len(stages)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(stages))
    for number, name in enumerate(names):
        widths = np.array([times.get(name, 0.0) for times in stages.values()])
        axes.barh(
            range(len(stages)),
            widths,
            left=left,
            height=0.6,
            color=series(number + 1),
            edgecolor=INK,
            linewidth=0.5,
            hatch=("", "//", "", "\\\\", "", "xx", "")[number % 7],
            label=name,
        )
        left += widths
    axes.set_yticks(range(len(stages)), list(stages))
    axes.set(ylim=(len(stages) - 0.5, -0.5), xlabel="milliseconds per image")
    figure.legend(loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=1, fontsize=8.5)
    words = "; ".join(
        f"{target}: " + ", ".join(f"{name} {time:.3g} ms" for name, time in times.items())
        for target, times in stages.items()
    )
    return panel(figure, title, f"{title}. {words}")


def ratios_panel(title: str, ratios: Sequence[Ratio]) -> Panel:
    """How many times as fast peers are, with intervals, on a logarithmic axis: right of 1 is faster."""
    figure = Figure((4.6, 0.7 + 0.28 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=INK, linewidth=1)
    for row, ratio in enumerate(ratios):
        if ratio.interval:
            axes.plot([ratio.interval.low, ratio.interval.high], [row, row], color=series(1), linewidth=1.8)
        axes.plot(ratio.value, row, "o", color=series(1), markersize=6)
    ends = [
        1.0,
        *(end for r in ratios for end in (r.value, *((r.interval.low, r.interval.high) if r.interval else ()))),
    ]
    axes.set(xscale="log", xlim=(min(ends) / 1.25, max(ends) * 1.25), ylim=(len(ratios) - 0.5, -0.5))
    axes.set_yticks(range(len(ratios)), [ratio.peer for ratio in ratios])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("times as fast")
    _plain(axes)
    words = "; ".join(
        f"{r.peer} {r.value:.2f}" + (f" ({r.interval.low:.2f} to {r.interval.high:.2f})" if r.interval else "")
        for r in ratios
    )
    return panel(figure, title, f"{title}: {words}")


def roofline_panel(title: str, roofs: Sequence[Roof], bandwidth: float, runs: Sequence[Run]) -> Panel:
    """The roofline (Williams, Waterman and Patterson, CACM 52(4), 2009): what was reached below what can be.

    `bandwidth` is bytes per second that the memory gave.
    """
    figure = Figure((4.6, 3.3), layout="constrained")
    axes = figure.subplots()
    corners = [roof.peak / bandwidth for roof in roofs] + [run.intensity for run in runs]
    x = np.logspace(np.log10(min(corners) / 5), np.log10(max(corners) * 5), 200)
    for number, roof in enumerate(roofs, 1):
        axes.plot(x, np.minimum(x * bandwidth, roof.peak) / 1e9, color=series(number), linestyle=lines(number))
        axes.annotate(
            roof.name, (x[-1], roof.peak / 1e9), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8
        ).set_color(series(number))
    for run in runs:
        axes.plot(run.intensity, run.reached / 1e9, "o", color=INK, markersize=6)
        axes.annotate(
            run.name,
            (run.intensity, run.reached / 1e9),
            xytext=(7, -3),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="1e9 operations per second")
    axes.margins(y=0.12)
    _plain(axes)
    words = "; ".join(f"{run.name}: {run.reached / 1e9:.3g} at {run.intensity:.3g} operations per byte" for run in runs)
    peaks = ", ".join(f"{roof.name} {roof.peak / 1e9:.3g}" for roof in roofs)
    return panel(figure, title, f"{title}, in 1e9 operations per second. Peaks: {peaks}. {words}")


def _plain(axes: Axes) -> None:
    """Numbers as they are said on logarithmic axes: 20, not 2 x 10^1; enough of them on a short one."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log" and not isinstance(axis.get_major_locator(), FixedLocator):
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
