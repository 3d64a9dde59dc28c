"""Checkpoint to bundle: export, check every graph against torch, and write all of it or nothing.

`export_bundle` is the story. Owns what a bundle contains; what a model is read from is
`thoraxrt.export.source`'s, how a bundle appears on disk `thoraxrt.export.publish`'s, reading one
`thoraxrt.engine.bundle`'s.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch

import thoraxrt
from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Agreement,
    Bundle,
    Check,
    FileEntry,
    Folded,
    Manifest,
    Network,
    Skew,
)
from thoraxrt.engine.engine import image_files, read_radiograph
from thoraxrt.engine.errors import CheckpointError, DatasetError, RequestError
from thoraxrt.engine.plans import PRECISIONS, cache_folder
from thoraxrt.engine.postprocess import OperatingPoint, Softmax
from thoraxrt.engine.preprocess import PreprocessSpec, network_input
from thoraxrt.export import Track, no_progress
from thoraxrt.export.agreement import agreement
from thoraxrt.export.calibrate import Parts, parts_from_path
from thoraxrt.export.graph import session_from_graph
from thoraxrt.export.half import emulation_from_fp16, fp16_by_measurement
from thoraxrt.export.int8 import Choice, Int8, int8_by_measurement, int8_from_file
from thoraxrt.export.nih import LABELS
from thoraxrt.export.operating_points import operating_points_from_file, operating_points_from_folder
from thoraxrt.export.phantoms import phantom
from thoraxrt.export.publish import publish, refuse_to_overwrite
from thoraxrt.export.sensitivity import logits_from_graphs
from thoraxrt.export.skew import measure_skew
from thoraxrt.export.source import Given, Source, read_source

__all__ = ["ExportOptions", "export_bundle"]

_CHECK_IMAGES: Final = 16
_CHECK_SEED: Final = 7
# Beyond these a graph is wrong rather than rounded: FP32 differs by about 1e-6, FP16 by about 1e-2, INT8 by about 0.1.
_LARGEST_DIFFERENCE: Final = {"fp32": 1e-3, "fp16": 0.25, "int8": 100.0}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a bundle is to hold, and what a checkpoint does not say of itself.

    `given` is the user's word on the model, without which the file's or the CheXNet recipe counts.
    `operating_points` is a JSON file of probabilities by finding, or a folder in the NIH layout to
    choose them on; without it 0.5, marked as default. `images` is a folder of radiographs to check the
    graphs on; without it, phantoms. `calibrate`, which INT8 needs, is a folder of radiographs (NIH
    layout or not), a text file that lists some, or another bundle's `ranges.json`.

    Example: `ExportOptions(precisions=("fp32", "int8"), calibrate=Path("nih"), replace=True)`.
    """

    precisions: tuple[str, ...] = ("fp32", "fp16")
    given: Given = field(default_factory=Given)
    boxes: BoxSpec = BoxSpec()  # noqa: RUF009 - immutable
    operating_points: Path | None = None
    images: Path | None = None
    calibrate: Path | None = None
    method: Choice = "best"
    replace: bool = False

    def __post_init__(self) -> None:
        if unknown := [p for p in self.precisions if p not in PRECISIONS]:
            raise RequestError(f"unknown precision {', '.join(unknown)}; export writes {', '.join(PRECISIONS)}")
        if "fp32" not in self.precisions:
            raise RequestError("fp32 is the oracle that the other precisions are checked against: include it")
        if self.ranges is not None and self.method != "best":
            raise RequestError(
                f"{self.calibrate} says itself which calibration method it was made by: leave the method out"
            )
        if "int8" in self.precisions and self.calibrate is None:
            raise RequestError(
                "int8 needs radiographs to compute its ranges on, random data would give random ranges: name a folder of "
                "some hundred with --calibrate, or leave int8 out of --precision"
            )

    @property
    def ranges(self) -> Path | None:
        """`calibrate`, where it is a file of ranges and no radiographs."""
        return self.calibrate if self.calibrate and self.calibrate.suffix == ".json" else None


def export_bundle(
    checkpoint: str | Path, out: str | Path, options: ExportOptions | None = None, track: Track = no_progress
) -> Bundle:
    """Write the bundle of a model to the folder `out`, whole or not at all.

    Raises CheckpointError where the model cannot be read or its graph disagrees with the original,
    RequestError where labels or precisions do not fit, DatasetError for unusable image folders,
    ImageError for a file in one that is no radiograph, BundleError where `out` exists (unless `replace`) or cannot be written.
    """
    options = options or ExportOptions()
    out = Path(out)
    refuse_to_overwrite(out, options.replace)
    source = read_source(checkpoint, options.given)
    labels = _labels(source)
    checked_on = _check_images(options)
    skew = _skew(source, checked_on)
    operating_points = _operating_points(source, labels, options, track)
    graphs = _graphs(source, labels, checked_on, options, track)
    checks, cam = _check(graphs, source, checked_on, track)
    files = graphs.files()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        network=Network(
            name=source.name,
            cam_height=cam.shape[2],
            cam_width=cam.shape[3],
            bias=tuple(source.bias.tolist()),
            checkpoint_sha256=source.sha256,
        ),
        labels=labels,
        activation=source.activation,
        preprocess=source.preprocess,
        boxes=options.boxes,
        operating_points=operating_points,
        checks=checks,
        normalisation=Folded(mean=source.normalisation.mean, std=source.normalisation.std),
        assumed=source.assumed,
        skew=skew,
        calibration=graphs.int8.ranges.calibration if graphs.int8 else None,
        agreement=graphs.agreement,
        kept_in_fp32=graphs.kept_in_fp32,
        recommended=None,
        producer=_producer(),
        files={name: FileEntry.of(data) for name, data in files.items()},
    )
    files[MANIFEST] = manifest_bytes(manifest)
    publish(files, out, replace=options.replace)
    return Bundle.open(out)


def _labels(source: Source) -> tuple[str, ...]:
    labels, outputs = source.labels or LABELS, len(source.bias)
    if len(labels) != outputs:
        raise RequestError(
            f"the network has {outputs} outputs, {'these' if source.labels else 'the NIH'} labels are {len(labels)}: "
            "name its labels in order with --labels"
        )
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise RequestError(
            f"--labels names {', '.join(twice)} more than once; expected a name of its own for each output"
        )
    if outputs < 2 and isinstance(source.activation, Softmax):
        raise RequestError("--activation softmax for a network of one output: expected at least two, or sigmoid")
    return labels


# --- what the graphs are checked on --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _CheckImages:
    """Radiographs uint8 `(H, W)`, and in words which they are."""

    pixels: tuple[npt.NDArray[np.uint8], ...]
    data: str

    def inputs(self, spec: PreprocessSpec) -> list[npt.NDArray[np.uint8]]:
        """The network inputs, uint8 `(1, S, S)`."""
        return [network_input(pixels, spec) for pixels in self.pixels]


def _check_images(options: ExportOptions) -> _CheckImages:
    if options.images is None:
        pixels = tuple(phantom(_CHECK_SEED, index).pixels for index in range(_CHECK_IMAGES))
        return _CheckImages(pixels=pixels, data=f"{len(pixels)} phantoms")
    paths = image_files(options.images)[:_CHECK_IMAGES]
    if not paths:
        raise DatasetError(f"{options.images} holds no PNG, JPEG or DICOM file to check the graphs on")
    return _CheckImages(
        pixels=tuple(read_radiograph(path).pixels for path in paths),
        data=f"{len(paths)} radiographs of {options.images.name}",
    )


def _check(
    graphs: _Graphs, source: Source, checked_on: _CheckImages, track: Track
) -> tuple[dict[str, Check], npt.NDArray[np.float32]]:
    """Each graph's largest logit difference to the original, and the last CAM float32 `(1, C, h, w)`.

    The FP16 graph is run with its roundings made explicit: ONNX Runtime leaves some of them out on a CPU.
    """
    inputs = checked_on.inputs(source.preprocess)
    models = {name: emulation_from_fp16(model) if name == "fp16" else model for name, model in graphs.models.items()}
    sessions = {precision: session_from_graph(model.SerializeToString()) for precision, model in models.items()}
    differences: dict[str, list[float]] = {precision: [] for precision in sessions}
    for image in track(inputs, "Checking graphs against the original", len(inputs)):
        expected = source.reference(image[np.newaxis])
        for precision, session in sessions.items():
            logits, cam = session.run(["logits", "cam"], {"image": image[np.newaxis]})
            differences[precision].append(float(np.abs(logits - expected).max()))
    for precision, values in differences.items():
        limit = _LARGEST_DIFFERENCE[precision]
        if any(not value <= limit for value in values):  # NaN compares false: written so that it is refused
            raise CheckpointError(
                f"the {precision} graph's logits differ from the original's by up to {max(values):.3g} on "
                f"{checked_on.data}; expected at most {limit:g}: "
                + (f"leave {precision} out" if precision != "fp32" else "check --mean, --std and the checkpoint")
            )
    return {
        precision: Check(max_logit_difference=max(values), images=len(inputs), data=checked_on.data)
        for precision, values in differences.items()
    }, cam


def _skew(source: Source, checked_on: _CheckImages) -> Skew | None:
    if source.trained_with is None:
        return None
    return measure_skew(
        source.reference,
        checked_on.pixels,
        checked_on.data,
        spec=source.preprocess,
        trained_with=source.trained_with,
        activation=source.activation,
    )


# --- the graphs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Graphs:
    """Each precision's graph, and what measuring gave besides."""

    models: dict[str, onnx.ModelProto]
    int8: Int8 | None
    kept_in_fp32: dict[str, tuple[str, ...]]
    agreement: dict[str, Agreement]

    def files(self) -> dict[str, bytes]:
        """The bundle's files by name, but for its manifest."""
        graphs = {Bundle.graph_name(name): model for name, model in self.models.items()}
        return {name: model.SerializeToString(deterministic=True) for name, model in graphs.items()} | (
            self.int8.files if self.int8 else {}
        )


def _graphs(
    source: Source, labels: tuple[str, ...], checked_on: _CheckImages, options: ExportOptions, track: Track
) -> _Graphs:
    """The graphs asked for, and how far each is from FP32 on radiographs that no choice was made on."""
    models = {"fp32": source.graph}
    kept_in_fp32, int8, parts = {}, None, None
    if options.calibrate is not None and options.ranges is None and len(options.precisions) > 1:
        parts = parts_from_path(options.calibrate)
    if "fp16" in options.precisions:
        inputs = list(parts.select.inputs(source.preprocess)) if parts else checked_on.inputs(source.preprocess)

        def meets(logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> bool:
            return agreement(logits, reference, source.activation, labels, None).meets_bar

        half = fp16_by_measurement(source.graph, lambda: inputs, meets, track)
        models["fp16"], kept_in_fp32["fp16"] = half.model, half.kept
    if "int8" in options.precisions:
        int8 = _int8(source, labels, parts, options, track)
        kept_in_fp32["int8"] = int8.ranges.float_layers
        if int8.ranges.calibration.quantised:  # else no choice meets the bar, as the curve shows
            models["int8"] = int8.model
    judged = _judged(models, source, labels, parts, track) if parts else {}
    return _Graphs(models=models, int8=int8, kept_in_fp32=kept_in_fp32, agreement=judged)


def _int8(source: Source, labels: tuple[str, ...], parts: Parts | None, options: ExportOptions, track: Track) -> Int8:
    if options.ranges is not None:
        return int8_from_file(source.graph, source.preprocess, options.ranges)
    assert parts is not None  # ExportOptions holds it
    return int8_by_measurement(
        source.graph,
        parts,
        source.preprocess,
        source.activation,
        labels,
        options.method,
        cache_folder() / "calibration",
        track,
    )


def _judged(
    models: dict[str, onnx.ModelProto], source: Source, labels: tuple[str, ...], parts: Parts, track: Track
) -> dict[str, Agreement]:
    """The agreement of each lower precision with FP32 on the part of the images that was kept for it."""
    positive = parts.judge.positive(labels)
    runnable = {name: emulation_from_fp16(model) if name == "fp16" else model for name, model in models.items()}
    inputs = track(parts.judge.inputs(source.preprocess), "Judging", len(parts.judge))
    logits = logits_from_graphs(runnable, inputs)
    reference = logits.pop("fp32")
    return {name: agreement(values, reference, source.activation, labels, positive) for name, values in logits.items()}


# --- the rest of the manifest --------------------------------------------------------------------------


def _operating_points(
    source: Source, labels: tuple[str, ...], options: ExportOptions, track: Track
) -> tuple[OperatingPoint, ...]:
    file = options.operating_points
    if file is None:
        return tuple(OperatingPoint(finding=label) for label in labels)
    if file.is_dir():
        graph = source.graph.SerializeToString(deterministic=True)
        return operating_points_from_folder(file, graph, labels, source.preprocess, source.activation, track)
    return operating_points_from_file(file, labels)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is written, read once before an older bundle makes room for it: JSON has no NaN."""
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    try:
        msgspec.json.decode(data, type=Manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"what was measured makes no manifest ({error}); check --mean, --std and the weights"
        ) from error
    return data


def _producer() -> dict[str, str]:
    return {
        "thoraxrt": thoraxrt.__version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
