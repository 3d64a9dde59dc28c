"""INT8 by measurement: calibrate, choose the method and the layers, and keep what another export needs to repeat it.

`int8_by_measurement` is the story; each step is a module of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnx

from thoraxrt.engine.bundle import Agreement, Calibration
from thoraxrt.engine.errors import DatasetError
from thoraxrt.engine.postprocess import Activation
from thoraxrt.engine.preprocess import PreprocessSpec
from thoraxrt.export import Track, no_progress
from thoraxrt.export.agreement import agreement
from thoraxrt.export.calibrate import METHODS, Method, Parts, channel_maxima, histograms, range_from_histogram
from thoraxrt.export.quantise import (
    LARGEST_EXPONENT,
    equalised,
    int8_from_fp32,
    quantisable_layers,
    scales_from_maxima,
)
from thoraxrt.export.sensitivity import Inputs, choose_layers, choose_method, logit_error, logits_from_graph, plot

__all__ = ["RANGES", "Choice", "Int8", "Ranges", "int8_by_measurement", "int8_from_file", "int8_from_ranges"]

Choice = Literal["best", Method]
"""A calibration method, or the one that moves logits least."""

RANGES: Final = "ranges.json"
SENSITIVITY: Final = "sensitivity.json"
PICTURE: Final = "sensitivity.png"

_LARGEST_RANGE: Final = float(np.finfo(np.float32).max)


class Ranges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`ranges.json`: all that turns one FP32 graph into its INT8 graph again, byte for byte, without an image.

    `scales` are base-2 logarithms by tensor and channel (see `equalised`); `ranges` the magnitude that
    code 127 stands for, by method and tensor, of which `calibration` names the method used.
    `float_layers` are the convolutions that stay in float.
    """

    fp32_sha256: str
    preprocess: PreprocessSpec
    scales: dict[str, tuple[int, ...]]
    ranges: dict[Method, dict[str, float]]
    float_layers: tuple[str, ...]
    calibration: Calibration

    def __post_init__(self) -> None:
        if not all(0 < top <= _LARGEST_RANGE for tops in self.ranges.values() for top in tops.values()):
            raise ValueError("ranges must be float32 values above 0")
        if self.calibration.method not in self.ranges:
            raise ValueError(f"there are no ranges of the method used, {self.calibration.method}")
        if any(abs(exponent) > LARGEST_EXPONENT for channels in self.scales.values() for exponent in channels):
            raise ValueError(f"scales must lie within {LARGEST_EXPONENT} powers of two")


@dataclass(frozen=True, kw_only=True)
class Int8:
    """The INT8 graph, and the files that say how it came about, by name."""

    model: onnx.ModelProto
    ranges: Ranges
    files: dict[str, bytes]


def int8_by_measurement(
    model: onnx.ModelProto,
    parts: Parts,
    spec: PreprocessSpec,
    activation: Activation,
    labels: tuple[str, ...],
    method: Choice,
    unfinished: Path,
    track: Track = no_progress,
) -> Int8:
    """Quantise a served FP32 graph: ranges from one part of the images, method and float layers from another.

    An interrupted calibration goes on from what it left in the folder `unfinished`. Raises DatasetError
    for unusable images, RequestError where nothing can be quantised.
    """
    layers = quantisable_layers(model)
    tensors = sorted(set(layers.values()))
    inputs = list(parts.select.inputs(spec))
    reference = logits_from_graph(model, inputs)
    positive = parts.select.positive(labels)
    maxima = channel_maxima(model, tensors, parts.calibrate, spec, track)
    scales = _scales_if_better(model, maxima, inputs, reference)
    even = equalised(model, scales)
    counted = histograms(even, tensors, parts.calibrate, spec, unfinished, track)
    ranges: dict[Method, dict[str, float]] = {
        name: {tensor: range_from_histogram(counted[tensor], name) for tensor in tensors}
        for name in track(METHODS, "Computing ranges", len(METHODS))
    }

    def compare(logits: npt.NDArray[np.float32]) -> Agreement:
        return agreement(logits, reference, activation, labels, positive)

    chosen = choose_method(even, ranges, inputs, reference) if method == "best" else method
    trade_off = choose_layers(even, chosen, ranges[chosen], inputs, reference, compare, track)
    kept = Ranges(
        fp32_sha256=_sha256(model),
        preprocess=spec,
        scales=scales,
        ranges=ranges,
        float_layers=trade_off.float_layers,
        calibration=Calibration(
            method=chosen,
            ranges=RANGES,
            split=parts.split,
            images={
                name: tuple(sample.sha256 for sample in part.samples)
                for name, part in (("calibrate", parts.calibrate), ("select", parts.select), ("judge", parts.judge))
            },
            layers=len(layers),
            quantised=len(layers) - len(trade_off.float_layers),
        ),
    )
    return Int8(
        model=int8_from_ranges(model, kept),
        ranges=kept,
        files={RANGES: _json(kept), SENSITIVITY: _json(trade_off), PICTURE: plot(trade_off)},
    )


def _scales_if_better(
    model: onnx.ModelProto,
    maxima: Mapping[str, npt.NDArray[np.float32]],
    inputs: Inputs,
    reference: npt.NDArray[np.float32],
) -> dict[str, tuple[int, ...]]:
    """The channels' scales, or none where quantising to the largest values goes better without them."""
    scales = scales_from_maxima(model, maxima)
    layers = quantisable_layers(model)

    def error(scales: dict[str, tuple[int, ...]]) -> float:
        tops = {
            name: float((largest / np.exp2(np.array(scales.get(name, 0), np.float32))).max()) or 1.0
            for name, largest in maxima.items()
        }
        return logit_error(int8_from_fp32(equalised(model, scales), tops, layers), inputs, reference)

    return min(({}, scales), key=error)


def int8_from_ranges(model: onnx.ModelProto, ranges: Ranges) -> onnx.ModelProto:
    """The INT8 graph that these ranges made of this FP32 graph. Raises DatasetError where they are of another one."""
    if _sha256(model) != ranges.fp32_sha256:
        raise DatasetError(
            f"the ranges were computed for another FP32 graph (sha256 {ranges.fp32_sha256[:12]}...) than this export's "
            f"({_sha256(model)[:12]}...): calibrate again with --calibrate FOLDER"
        )
    layers, tops, done = quantisable_layers(model), ranges.ranges[ranges.calibration.method], ranges.calibration
    floats = set(ranges.float_layers)
    fits = (done.ranges, done.layers, done.quantised) == (RANGES, len(layers), len(layers) - len(floats))
    if not fits or set(layers.values()) != tops.keys() or not layers.keys() >= floats:
        raise DatasetError(
            "the ranges name other tensors or layers than their graph has: the file was changed; calibrate again"
        )
    try:
        even = equalised(model, ranges.scales)
    except ValueError as error:
        raise DatasetError(
            f"the ranges' scales do not fit their graph ({error}): the file was changed; calibrate again"
        ) from error
    return int8_from_fp32(even, tops, [layer for layer in layers if layer not in ranges.float_layers])


def int8_from_file(model: onnx.ModelProto, spec: PreprocessSpec, path: Path) -> Int8:
    """The INT8 graph of another export's `ranges.json`, for the same network and geometry.

    Raises DatasetError where the file cannot be read or is another's.
    """
    try:
        data = path.read_bytes()
        ranges = msgspec.json.decode(data, type=Ranges)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}); expected a bundle's {RANGES}") from error
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        raise DatasetError(
            f"{path} is no {RANGES} of a bundle: {error}; calibrate with a folder of radiographs"
        ) from error
    if ranges.preprocess != spec:
        raise DatasetError(
            f"{path} was computed with another geometry ({ranges.preprocess}) than this export's ({spec}): give the same "
            "--resize, --crop and --square, or calibrate again"
        )
    model = int8_from_ranges(model, ranges)
    reused = msgspec.structs.replace(ranges.calibration, reused=True)
    return Int8(model=model, ranges=msgspec.structs.replace(ranges, calibration=reused), files={RANGES: data})


def _sha256(model: onnx.ModelProto) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _json(value: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
