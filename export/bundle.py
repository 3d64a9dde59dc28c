"""Checkpoint to bundle: export, check every graph against torch, and write all of it or nothing.

`export_bundle` is the story. Owns what a bundle contains; how it appears on disk is
`thoraxrt.export.publish`'s, reading one `thoraxrt.engine.bundle`'s.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
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
from thoraxrt.engine.bundle import MANIFEST, SCHEMA_VERSION, Bundle, Check, FileEntry, Manifest, Network
from thoraxrt.engine.decode import decode
from thoraxrt.engine.engine import image_files, read_image
from thoraxrt.engine.errors import CheckpointError, DatasetError, RequestError
from thoraxrt.engine.postprocess import OperatingPoint, Sigmoid
from thoraxrt.engine.preprocess import PreprocessSpec, Shorter, network_input
from thoraxrt.export import Track, no_progress
from thoraxrt.export.checkpoint import Checkpoint, read_checkpoint
from thoraxrt.export.graph import (
    IMAGENET,
    Normalisation,
    ServedNetwork,
    onnx_from_network,
    reference_logits,
    session_from_graph,
)
from thoraxrt.export.half import fp16_from_fp32
from thoraxrt.export.nih import LABELS
from thoraxrt.export.operating_points import operating_points_from_file, operating_points_from_folder
from thoraxrt.export.phantoms import phantom
from thoraxrt.export.publish import publish, refuse_to_overwrite

__all__ = ["CHEXNET", "PRECISIONS", "ExportOptions", "export_bundle"]

CHEXNET: Final = PreprocessSpec(resize=Shorter(pixels=256), crop=224)
"""The CheXNet recipe (Rajpurkar et al., arXiv 1711.05225, as its re-implementations run it)."""

PRECISIONS: Final = ("fp32", "fp16")

_CHECK_IMAGES: Final = 16
_CHECK_SEED: Final = 7
# Beyond these a graph is wrong rather than rounded: FP32 differs by about 1e-6, FP16 by about 1e-2.
_LARGEST_DIFFERENCE: Final = {"fp32": 1e-3, "fp16": 0.25}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a checkpoint does not say of itself; the defaults are the CheXNet recipe.

    `labels` defaults to the 14 NIH findings. `operating_points` is a JSON file of probabilities by
    finding, or a folder in the NIH layout to choose them on; without it 0.5, marked as default.
    `images` is a folder of radiographs to check the graphs on; without it, phantoms.

    Example: `ExportOptions(precisions=("fp32",), labels=("Pneumonia",), replace=True)`.
    """

    precisions: tuple[str, ...] = PRECISIONS
    labels: tuple[str, ...] | None = None
    preprocess: PreprocessSpec = CHEXNET
    normalisation: Normalisation = IMAGENET
    boxes: BoxSpec = BoxSpec()  # noqa: RUF009 - immutable
    operating_points: Path | None = None
    images: Path | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        if unknown := [p for p in self.precisions if p not in PRECISIONS]:
            raise RequestError(f"unknown precision {', '.join(unknown)}; export writes {', '.join(PRECISIONS)}")
        if "fp32" not in self.precisions:
            raise RequestError("fp32 is the oracle that the other precisions are checked against: include it")


def export_bundle(
    checkpoint: str | Path, out: str | Path, options: ExportOptions | None = None, track: Track = no_progress
) -> Bundle:
    """Write the bundle of a checkpoint to the folder `out`, whole or not at all.

    Raises CheckpointError where the checkpoint cannot be read or its graph disagrees with torch,
    RequestError where labels or precisions do not fit, DatasetError for unusable image folders,
    BundleError where `out` exists (unless `replace`) or cannot be written.
    """
    options = options or ExportOptions()
    out = Path(out)
    refuse_to_overwrite(out, options.replace)
    source = read_checkpoint(checkpoint)
    labels = _labels(options, source.network.head.out_features)
    served = ServedNetwork(source.network, options.normalisation, options.preprocess.input_size)
    graphs = _graphs(served, options, track)
    checks, cam = _check(graphs, source, options, track)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        network=Network(
            name=source.network.name,
            cam_height=cam.shape[2],
            cam_width=cam.shape[3],
            bias=tuple(served.bias.tolist()),
            checkpoint_sha256=source.sha256,
        ),
        labels=labels,
        activation=Sigmoid(),
        preprocess=options.preprocess,
        boxes=options.boxes,
        operating_points=_operating_points(graphs["fp32"], labels, options, track),
        checks=checks,
        recommended=None,
        producer=_producer(),
        files={
            Bundle.graph_name(precision): FileEntry(sha256=hashlib.sha256(graph).hexdigest(), size=len(graph))
            for precision, graph in graphs.items()
        },
    )
    files = {Bundle.graph_name(precision): graph for precision, graph in graphs.items()}
    files[MANIFEST] = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    publish(files, out, replace=options.replace)
    return Bundle.open(out)


def _labels(options: ExportOptions, classes: int) -> tuple[str, ...]:
    labels = options.labels or LABELS
    if len(labels) != classes:
        raise RequestError(
            f"the network has {classes} outputs, {'these' if options.labels else 'the NIH'} labels are {len(labels)}: "
            "name its labels in order with --labels"
        )
    return tuple(labels)


def _graphs(served: ServedNetwork, options: ExportOptions, track: Track) -> dict[str, bytes]:
    """Each precision's serialised ONNX."""
    wanted = [precision for precision in PRECISIONS if precision in options.precisions]  # fp32 first, always
    models: dict[str, onnx.ModelProto] = {}
    for precision in track(wanted, "Exporting graphs", len(wanted)):
        if precision == "fp32":
            models[precision] = onnx_from_network(served, options.preprocess.input_size)
        else:
            models[precision] = fp16_from_fp32(models["fp32"])
    return {precision: model.SerializeToString(deterministic=True) for precision, model in models.items()}


def _check(
    graphs: dict[str, bytes], source: Checkpoint, options: ExportOptions, track: Track
) -> tuple[dict[str, Check], npt.NDArray[np.float32]]:
    """Each graph's largest logit difference to torch, and the last CAM float32 `(1, C, h, w)`."""
    data, inputs = _check_inputs(options)
    sessions = {precision: session_from_graph(graph) for precision, graph in graphs.items()}
    differences: dict[str, list[float]] = {precision: [] for precision in graphs}
    for image in track(inputs, "Checking graphs against torch", len(inputs)):
        expected = reference_logits(source.network, options.normalisation, image[np.newaxis])
        for precision, session in sessions.items():
            logits, cam = session.run(["logits", "cam"], {"image": image[np.newaxis]})
            differences[precision].append(float(np.abs(logits - expected).max()))
    for precision, values in differences.items():
        # NaN compares false: written so that it is refused.
        if not max(values) <= _LARGEST_DIFFERENCE[precision] or np.isnan(values).any():
            raise CheckpointError(
                f"the {precision} graph's logits differ from torch's by up to {max(values):.3g} on {data}; expected at most "
                f"{_LARGEST_DIFFERENCE[precision]}: "
                + ("export --precision fp32" if precision != "fp32" else "check --mean, --std and the checkpoint")
            )
    return {
        precision: Check(max_logit_difference=max(values), images=len(inputs), data=data)
        for precision, values in differences.items()
    }, cam


def _check_inputs(options: ExportOptions) -> tuple[str, list[npt.NDArray[np.uint8]]]:
    """What the graphs are checked on, in words, and the network inputs uint8 `(1, S, S)`."""
    if options.images is None:
        pixels = [phantom(_CHECK_SEED, index).pixels for index in range(_CHECK_IMAGES)]
        return f"{len(pixels)} phantoms", [network_input(p, options.preprocess) for p in pixels]
    paths = image_files(options.images)[:_CHECK_IMAGES]
    inputs = [network_input(decode(read_image(path)).pixels, options.preprocess) for path in paths]
    if not inputs:
        raise DatasetError(f"{options.images} holds no PNG, JPEG or DICOM file to check the graphs on")
    return f"{len(inputs)} radiographs of {options.images.name}", inputs


def _operating_points(
    graph: bytes, labels: tuple[str, ...], options: ExportOptions, track: Track
) -> tuple[OperatingPoint, ...]:
    source = options.operating_points
    if source is None:
        return tuple(OperatingPoint(finding=label) for label in labels)
    if source.is_dir():
        return operating_points_from_folder(source, graph, labels, options.preprocess, Sigmoid(), track)
    return operating_points_from_file(source, labels)


def _producer() -> dict[str, str]:
    return {
        "thoraxrt": thoraxrt.__version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
