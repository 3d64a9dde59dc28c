"""What gpu-check measures on: a DenseNet-121 with seeded random weights, its bundle, and its plans.

Random weights answer at random, but take the time that trained ones take. Batch norms get the statistics of
phantoms, so that activations keep the range that they have in a trained network; FP16 neither overflows nor
vanishes. `python -m thoraxrt.benchmarks.gpu_model SAID` makes the bundle beside the file SAID.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from thoraxrt.benchmarks.gpu import Said
from thoraxrt.engine.backends.tensorrt_plan import PlanOptions
from thoraxrt.engine.bundle import Bundle, Calibration
from thoraxrt.engine.engine import image_files, read_radiograph
from thoraxrt.engine.errors import BackendError
from thoraxrt.engine.plans import compile_plans
from thoraxrt.engine.preprocess import network_input
from thoraxrt.export.bundle import ExportOptions, export_bundle
from thoraxrt.export.calibrate import Part, Sample, channel_maxima
from thoraxrt.export.graph import IMAGENET
from thoraxrt.export.int8 import RANGES, Ranges
from thoraxrt.export.networks import CxrNetwork, DenseNet
from thoraxrt.export.nih import LABELS
from thoraxrt.export.phantoms import phantom
from thoraxrt.export.quantise import quantisable_layers
from thoraxrt.export.source import CHEXNET, Given, read_source

__all__ = ["BUCKETS", "BUNDLE", "CHECKPOINT", "checkpoint", "compile_for", "int8_ranges", "normalised", "pixels"]

BUCKETS: Final = (1, 8, 32, 64, 128)
BUNDLE: Final = "densenet121.bundle"
CHECKPOINT: Final = "densenet121.safetensors"

_SEED: Final = 11
_COUNT: Final = 16


def pixels(folder: Path | None, count: int) -> list[npt.NDArray[np.uint8]]:
    """Radiographs uint8 `(H, W)`: the first of a folder, repeated where it has fewer, else phantoms."""
    if folder is None:
        made = [phantom(_SEED, index).pixels for index in range(min(count, _COUNT))]
    else:
        made = [read_radiograph(path).pixels for path in image_files(folder)[:count]]
    return [made[index % len(made)] for index in range(count)]


def normalised(inputs: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    """Network inputs uint8 `(1, S, S)` as training had them: float32 `(N, 3, S, S)`."""
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (IMAGENET.mean, IMAGENET.std))
    return (torch.from_numpy(np.stack(inputs)).float() / 255 - mean) / std


@torch.no_grad()
def checkpoint(network: CxrNetwork, inputs: Sequence[npt.NDArray[np.uint8]], file: Path) -> None:
    """Write an untrained network with the batch norm statistics of these inputs, half of its logits above 0."""
    x = normalised(inputs)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics become this batch's
    network.train()(x)
    network.eval()
    network.head.bias.sub_(network(x).median(0).values)
    save_file(network.state_dict(), file)


def int8_ranges(model_file: Path, images: Sequence[Path], file: Path) -> None:
    """Write the `ranges.json` that quantises every convolution to its largest values on these images.

    No layer is chosen to stay in float, as `export --calibrate FOLDER` would: for speed it makes no difference.
    """
    source = read_source(model_file, Given())
    samples = tuple(
        Sample(path=image, sha256=hashlib.sha256(image.read_bytes()).hexdigest(), labels=None) for image in images
    )
    layers = quantisable_layers(source.graph)
    maxima = channel_maxima(source.graph, sorted(set(layers.values())), Part(samples), CHEXNET)
    ranges = Ranges(
        fp32_sha256=hashlib.sha256(source.graph.SerializeToString(deterministic=True)).hexdigest(),
        preprocess=CHEXNET,
        scales={},
        ranges={"minmax": {name: float(largest.max()) or 1.0 for name, largest in maxima.items()}},
        float_layers=(),
        calibration=Calibration(
            method="minmax",
            ranges=RANGES,
            split=f"all of {len(samples)} phantoms",
            images={"calibrate": tuple(sample.sha256 for sample in samples)},
            layers=len(layers),
            quantised=len(layers),
        ),
    )
    file.write_bytes(msgspec.json.encode(ranges))


def make(work: Path, said: Said) -> None:
    """Make the bundle, unless an earlier run on this machine did; takes no GPU, so that tests may run meanwhile."""
    start = time.monotonic()
    if not (work / BUNDLE).exists():
        print("making the network", flush=True)
        drawn = pixels(None, _COUNT)
        files = [work / f"{index}.png" for index in range(_COUNT)]
        for image, file in zip(drawn, files, strict=True):
            Image.fromarray(image).save(file, compress_level=1)
        torch.manual_seed(_SEED)
        inputs = [network_input(image, CHEXNET) for image in drawn]
        checkpoint(DenseNet(num_classes=len(LABELS)), inputs, work / CHECKPOINT)
        print("computing INT8 ranges", flush=True)
        int8_ranges(work / CHECKPOINT, files, work / RANGES)
        print("exporting", flush=True)
        options = ExportOptions(precisions=("fp32", "fp16", "int8"), calibrate=work / RANGES)
        export_bundle(work / CHECKPOINT, work / BUNDLE, options)
    bundle = Bundle.open(work / BUNDLE)
    checks = {name: check.max_logit_difference for name, check in bundle.manifest.checks.items()}
    said.fact(bundle_sha256=bundle.sha256, bundle_checks=checks, bundle_seconds=round(time.monotonic() - start, 1))


def compile_for(bundle: Bundle, precision: str, said: Said, targets: tuple[str, ...] = ()) -> None:
    """Bring a plan with all buckets into the cache, for this GPU, else for every one from Ampere on; report both.

    Raises BackendError where TensorRT refuses both.
    """
    refused: list[str] = []
    for portable in (False, True):
        options = PlanOptions(buckets=BUCKETS, targets=targets, hardware_compatible=portable)
        try:
            (compiled,) = compile_plans(bundle, (precision,), options)
        except BackendError as error:
            refused.append(str(error))
            continue
        record = compiled.cached.record
        plan = {
            "sha256": record.plan.sha256,
            "bytes": record.plan.size,
            "seconds": compiled.seconds,
            "runtime": f"{record.key.runtime} {record.key.runtime_version}",
            "targets": record.key.options.targets,
            "portable": portable,
            "convolutions": record.layers.convolutions,
            "refused": refused,
        }
        said.fact(**{f"plan_{precision}": plan})
        return
    raise BackendError("; ".join(refused))


if __name__ == "__main__":
    make(Path(sys.argv[1]).parent, Said(Path(sys.argv[1])))
