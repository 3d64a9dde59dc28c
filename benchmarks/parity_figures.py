"""Figures of a parity check: differences, ROC curves, reliability, errors.

Owns how they are drawn; computes nothing, and does not know the receipt that their numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from thoraxrt.benchmarks.auroc import FindingAuroc
from thoraxrt.benchmarks.measures import ERROR_EDGES, Reliability
from thoraxrt.benchmarks.paired import Difference, Verdict
from thoraxrt.benchmarks.report import INK, MUTED, SHADE, Panel, lines, panel, series

__all__ = ["differences_panel", "errors_panel", "reliability_panel", "roc_panel"]

_SMALL = (2.3, 2.15)
"""Inches of a panel that stands among fourteen."""

_MARKERS: dict[Verdict, dict[str, Any]] = {
    "non-inferior": {"marker": "o", "markersize": 6},
    "inferior": {"marker": "X", "markersize": 9, "markeredgecolor": INK, "markeredgewidth": 0.6},
    "cannot tell": {"marker": "o", "markersize": 6, "markerfacecolor": "none"},
}


def differences_panel(title: str, differences: Sequence[Difference], margin: float, number: int) -> Panel:
    """A forest plot: AUROC less the reference's per finding, by patient, with the margin that no interval may reach.

    An interval that leaves the axis ends in an arrow; the axis shows all values and four margins at least. `number`
    is the candidate's, counted from the reference, 0.
    """
    figure = Figure((3.9, 0.6 + 0.235 * len(differences)), layout="constrained")
    axes = figure.subplots()
    limit = max([4 * margin, *(1.3 * abs(each.difference.value) for each in differences if each.difference)])
    axes.axvspan(-limit, -margin, color=SHADE, linewidth=0)
    axes.axvline(-margin, color=INK, linestyle=lines(1), linewidth=1)
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, each in enumerate(differences):
        _draw_difference(axes, row, each, limit, series(number))
    axes.set(xlim=(-limit, limit), ylim=(len(differences) - 0.5, -0.5), xlabel="AUROC less the reference's")
    axes.set_yticks(range(len(differences)), [each.finding for each in differences])
    axes.tick_params(axis="y", length=0)
    return panel(figure, title, f"{title}, margin {margin:g}: " + "; ".join(map(_words, differences)))


def _draw_difference(axes: Axes, row: int, each: Difference, limit: float, colour: str) -> None:
    if each.difference is None:
        axes.text(0, row, " undefined", va="center", fontsize=8, color=MUTED)
        return
    if interval := each.difference.clustered:
        axes.plot([max(interval.low, -limit), min(interval.high, limit)], [row, row], color=colour, linewidth=1.6)
        for outside, edge, arrow in ((interval.low < -limit, -limit, "<"), (interval.high > limit, limit, ">")):
            if outside:
                axes.plot(edge, row, arrow, color=colour, markersize=5, clip_on=False)
    axes.plot(each.difference.value, row, color=colour, **_MARKERS[each.verdict])


def _words(each: Difference) -> str:
    if each.difference is None:
        return f"{each.finding} undefined"
    interval = each.difference.clustered
    span = f" ({interval.low:+.4f} to {interval.high:+.4f})" if interval else ""
    return f"{each.finding} {each.difference.value:+.4f}{span}, {each.verdict}"


def roc_panel(curves: Mapping[str, FindingAuroc]) -> Panel:
    """One finding's ROC curves by name, of the reference first; where there is no curve, the panel says why."""
    figure, axes = _square()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=lines(3))
    drawn = {number: each.curve for number, each in enumerate(curves.values()) if each.curve}
    for number, curve in drawn.items():
        axes.plot(*zip(*curve, strict=True), **_stroke(number))
    first = next(iter(curves.values()))
    count = f"{first.positives} of {first.positives + first.negatives} images have it"
    if not drawn:
        _say(axes, "undefined:\n" + count)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    areas = (f"{name} {each.auroc.value:.4f}" if each.auroc else f"{name} undefined" for name, each in curves.items())
    return panel(figure, first.finding, f"ROC curves of {first.finding}; AUROC: {', '.join(areas)}; {count}")


def reliability_panel(diagrams: Mapping[str, Reliability]) -> Panel:
    """One finding's share of positive images over the probability given, per bin, by name, of the reference first."""
    figure, axes = _square()
    points = {name: [(each.probability, each.positive) for each in one.bins] for name, one in diagrams.items()}
    top = min(1.02, 1.08 * max(0.1, *(max(point) for each in points.values() for point in each)))
    axes.plot([0, top], [0, top], color=MUTED, linewidth=0.8, linestyle=lines(3))
    for number, each in enumerate(points.values()):
        axes.plot(*zip(*each, strict=True), marker="o", markersize=3, **_stroke(number))
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="mean probability", ylabel="share positive")
    axes.locator_params(nbins=4)
    finding = next(iter(diagrams.values())).finding
    errors = ", ".join(f"{name} {one.ece:.3f}" for name, one in diagrams.items())
    return panel(figure, finding, f"Reliability of {finding}; expected calibration error: {errors}")


def errors_panel(title: str, unit: str, histograms: Mapping[int, Sequence[int]]) -> Panel:
    """Histograms of absolute errors, by the candidate's number: counts below, between and above `ERROR_EDGES`."""
    figure = Figure((4.4, 2.8), layout="constrained")
    axes = figure.subplots()
    edges = np.array([ERROR_EDGES[0] ** 2 / ERROR_EDGES[1], *ERROR_EDGES, ERROR_EDGES[-1] ** 2 / ERROR_EDGES[-2]])
    for number, counts in histograms.items():
        axes.stairs(counts, edges, color=series(number), linestyle=lines(number), linewidth=1.5)
        axes.stairs(counts, edges, color=series(number), alpha=0.12, fill=True)
    used = np.flatnonzero(np.sum(list(histograms.values()), axis=0))
    axes.set(xscale="log", xlim=(edges[used[0]], edges[used[-1] + 1]), xlabel=unit, ylabel="answers")
    axes.set_ylim(bottom=0)
    return panel(figure, title, f"{title}: histograms of {unit}; the table below has their quantiles")


def _square() -> tuple[Figure, Axes]:
    figure = Figure(_SMALL, layout="constrained")
    axes = figure.subplots()
    axes.set_aspect("equal")
    return figure, axes


def _stroke(number: int) -> dict[str, Any]:
    """The reference's line is broad and behind, so that it shows where a candidate's covers it."""
    width, alpha = (3.2, 0.45) if number == 0 else (1.5, 1.0)
    return {"color": series(number), "linestyle": lines(number), "linewidth": width, "alpha": alpha}


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=8, color=MUTED)
