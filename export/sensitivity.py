"""What quantising each convolution costs, and the fewest that must stay in float.

Owns the search and its picture. Measures on radiographs that ranges were not computed on; whether a
choice is good is `thoraxrt.export.agreement`'s to say.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from matplotlib.figure import Figure

from thoraxrt.engine.bundle import Agreement
from thoraxrt.export import Track, no_progress
from thoraxrt.export.agreement import CONCORDANCE, MEAN_ERROR, P99_ERROR
from thoraxrt.export.calibrate import METHODS, Method, parallel, single_threaded
from thoraxrt.export.quantise import int8_from_fp32, quantisable_layers

__all__ = [
    "Inputs",
    "LayerCost",
    "Step",
    "TradeOff",
    "choose_layers",
    "choose_method",
    "logit_error",
    "logits_from_graph",
    "plot",
]

Inputs = Sequence[npt.NDArray[np.uint8]]
"""Network inputs, uint8 `(1, S, S)` each."""

Compare = Callable[[npt.NDArray[np.float32]], Agreement]
"""The agreement of logits `(N, C)` on the same inputs with FP32's."""


class LayerCost(msgspec.Struct, frozen=True, kw_only=True):
    """What it costs to quantise one convolution alone.

    `logit_error` is the root mean square difference to FP32's logits; `auroc_change` the mean absolute
    one of AUROC over the findings that some images show, None where none is labelled: of few
    positives, so no verdict.
    """

    layer: str
    logit_error: float
    auroc_change: float | None


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A point of the trade-off: the agreement with so many convolutions in float."""

    float_layers: int
    agreement: Agreement


class TradeOff(msgspec.Struct, frozen=True, kw_only=True):
    """The costs, costliest first; the curve, with so many of the costliest in float; what is chosen, and its agreement.

    Where no choice meets the bar, every convolution stays in float.
    """

    method: Method
    costs: tuple[LayerCost, ...]
    curve: tuple[Step, ...]
    float_layers: tuple[str, ...]
    chosen: Step


def logits_from_graph(model: onnx.ModelProto, inputs: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """The graph's logits, float32 `(N, C)`, an image at a time."""
    return logits_from_graphs({"": model}, inputs)[""]


def logits_from_graphs(
    models: Mapping[str, onnx.ModelProto], inputs: Iterable[npt.NDArray[np.uint8]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Each graph's logits, float32 `(N, C)`, in one pass over the images."""
    sessions = [single_threaded(model.SerializeToString(deterministic=True)) for model in models.values()]

    def logits(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        return [session.run(["logits"], {"image": image[np.newaxis]})[0][0] for session in sessions]

    rows = list(parallel(logits, inputs))
    return {name: np.stack([row[column] for row in rows]) for column, name in enumerate(models)}


def logit_error(model: onnx.ModelProto, inputs: Inputs, reference: npt.NDArray[np.float32]) -> float:
    """The root mean square difference of the graph's logits to `reference`, float32 `(N, C)`."""
    return _rms(logits_from_graph(model, inputs) - reference)


def choose_method(
    model: onnx.ModelProto,
    ranges: Mapping[Method, Mapping[str, float]],
    inputs: Inputs,
    reference: npt.NDArray[np.float32],
) -> Method:
    """The calibration method with the smallest root mean square logit error, everything quantised."""
    layers = quantisable_layers(model)

    def error(method: Method) -> float:
        return logit_error(int8_from_fp32(model, ranges[method], layers), inputs, reference)

    return min(METHODS, key=error)


def choose_layers(
    model: onnx.ModelProto,
    method: Method,
    ranges: Mapping[str, float],
    inputs: Inputs,
    reference: npt.NDArray[np.float32],
    compare: Compare,
    track: Track = no_progress,
) -> TradeOff:
    """Measure each convolution alone, then find how few of the costliest must stay in float to meet the bar.

    The curve doubles the number in float; between the first one that meets the bar and the one
    before it, bisection. Of the layers so kept, each that turns out not to be needed is given back,
    the cheapest first. `ranges` are by tensor, `reference` FP32's logits `(N, C)`.
    """
    layers = list(quantisable_layers(model))
    measured = []
    for layer in track(layers, "Measuring each layer", len(layers)):
        logits = logits_from_graph(int8_from_fp32(model, ranges, [layer]), inputs)
        measured.append(
            LayerCost(layer=layer, logit_error=_rms(logits - reference), auroc_change=_auroc_change(compare(logits)))
        )
    costs = sorted(measured, key=lambda cost: -cost.logit_error)
    curve: dict[int, Agreement] = {}

    def without(kept: Collection[str]) -> Agreement:
        quantised = int8_from_fp32(model, ranges, [layer for layer in layers if layer not in kept])
        return compare(logits_from_graph(quantised, inputs))

    def meets(count: int) -> bool:
        if count not in curve:
            curve[count] = without([cost.layer for cost in costs[:count]])
        return curve[count].meets_bar

    counts = [0, *(2**power for power in range(20) if 2**power < len(layers)), len(layers)]
    for count in track(counts, "Keeping layers in float", len(counts)):
        meets(count)
    enough = next((position for position, count in enumerate(counts) if meets(count)), len(counts) - 1)
    low, high = counts[max(enough - 1, 0)], counts[enough]
    while high - low > 1:  # low does not meet the bar, high does, if any does
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    kept, chosen = [cost.layer for cost in costs[:high]], curve[high]
    spare = kept[-2::-1]  # but the last: without it the bar was not met
    for layer in track(spare, "Giving layers back", len(spare)):
        tried = without(fewer := [name for name in kept if name != layer])
        if tried.meets_bar:
            kept, chosen = fewer, tried
    return TradeOff(
        method=method,
        costs=tuple(costs),
        curve=tuple(Step(float_layers=count, agreement=curve[count]) for count in sorted(curve)),
        float_layers=tuple(kept),
        chosen=Step(float_layers=len(kept), agreement=chosen),
    )


def plot(trade_off: TradeOff) -> bytes:
    """A PNG picture: the agreement by number of float layers, and what each layer costs."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [step.float_layers for step in trade_off.curve]
    curve, chosen = ([_shown(step.agreement) for step in steps] for steps in (trade_off.curve, [trade_off.chosen]))
    for name, colour, bar, values in zip(
        ("mean error", "99th percentile", "1 - least concordance of a finding"),
        ("tab:blue", "tab:orange", "tab:green"),
        (MEAN_ERROR, P99_ERROR, 1 - CONCORDANCE),
        zip(*curve, strict=True),
        strict=True,
    ):
        left.plot(counts, values, "o-", color=colour, label=name)
        left.axhline(bar, color=colour, linestyle=":", label=f"its bar, {bar:.3g}")
    at = [trade_off.chosen.float_layers] * len(chosen[0])
    left.plot(at, chosen[0], "k*", markersize=13, label="chosen", zorder=3)
    left.set_xscale("symlog", linthresh=1)
    left.set_xticks(counts, map(str, counts), fontsize=8)
    left.set(
        xlabel=f"convolutions kept in float, of {len(trade_off.costs)}",
        ylabel="absolute probability error; 1 - concordance",
        title=f"INT8 against FP32, {trade_off.method} ranges, {trade_off.curve[0].agreement.images} radiographs",
        xlim=(-0.2, 1.2 * len(trade_off.costs)),
        ylim=(0, None),
    )
    left.legend(fontsize=8)
    colours = ["grey" if cost.layer in trade_off.float_layers else "tab:blue" for cost in trade_off.costs]
    right.bar(range(len(trade_off.costs)), [cost.logit_error for cost in trade_off.costs], color=colours)
    right.set(
        xlabel="convolutions, costliest first (grey: kept in float)",
        ylabel="logit error, root mean square",
        title="Each convolution quantised alone",
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    return picture.getvalue()


def _shown(agreement: Agreement) -> tuple[float, float, float]:
    least = agreement.least_concordance
    return agreement.mean_error, agreement.p99_error, 1 - least[1] if least else math.nan


def _rms(difference: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(difference.astype(np.float64) ** 2)))


def _auroc_change(agreement: Agreement) -> float | None:
    changes = [abs(finding.difference) for finding in agreement.findings]
    return float(np.mean(changes)) if changes else None
