"""Whether our network input is the one that training made: Pillow as torchvision calls it, and PNG against DICOM.

Owns the reference, which shares no code with `thoraxrt.engine.decode` and `thoraxrt.engine.preprocess`. Knows no network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from thoraxrt.benchmarks.receipt import DicomPair, Preprocessing
from thoraxrt.engine.engine import read_radiograph
from thoraxrt.engine.errors import DatasetError
from thoraxrt.engine.preprocess import PreprocessSpec, Shorter, network_input
from thoraxrt.export import Track, no_progress

__all__ = ["dicom_pairs", "preprocessing_parity", "torchvision_input"]

_IMAGES: Final = 512
_NAMED: Final = 10
_MODES: Final = ("L", "LA", "RGB", "RGBA")
"""Pillow's names of 8-bit pictures; of others its `convert` clips the values, which no training wants."""


def preprocessing_parity(
    paths: Sequence[Path], spec: PreprocessSpec, track: Track = no_progress
) -> Preprocessing | None:
    """Compare on at most 512 of these images, which are readable; None where none has 8 bits in a form that Pillow reads."""
    chosen = [paths[index] for index in np.linspace(0, len(paths) - 1, min(len(paths), _IMAGES)).round().astype(int)]
    largest: dict[str, int] = {}
    for path in track(chosen, "Comparing with Pillow", len(chosen)):
        theirs = torchvision_input(path, spec)
        if theirs is not None:
            ours = network_input(read_radiograph(path).pixels, spec)
            largest[path.name] = _difference(ours[0, :, :, np.newaxis], theirs)
    if not largest:
        return None
    different = [name for name, difference in largest.items() if difference]
    return Preprocessing(
        images=len(largest),
        identical=len(largest) - len(different),
        max_difference=max(largest.values()),
        different=tuple(different[:_NAMED]),
    )


def torchvision_input(path: Path, spec: PreprocessSpec) -> npt.NDArray[np.uint8] | None:
    """What a torchvision pipeline feeds a network before it scales to 0..1: uint8 `(S, S, 3)`; None without 8 bits.

    `Image.open(path).convert("RGB")`, `Resize` and `CenterCrop` for pictures of Pillow's, whose arithmetic this is
    (torchvision 0.21, transforms/functional.py: `_compute_resized_output_size`, `center_crop`); for `square` first
    TorchXRayVision's `XRayCenterCrop`. Pillow's resize is that of its versions before 13.
    """
    with Image.open(path) as opened:
        if opened.mode not in _MODES:
            return None
        image = opened.convert("RGB")
    width, height = image.size
    if spec.square:
        side = min(width, height)
        left, top = width // 2 - side // 2, height // 2 - side // 2
        image = image.crop((left, top, left + side, top + side))
        width = height = side
    if isinstance(spec.resize, Shorter):
        shorter, longer = sorted((width, height))
        other = int(spec.resize.pixels * longer / shorter)
        size = (spec.resize.pixels, other) if width <= height else (other, spec.resize.pixels)
    else:
        size = (spec.resize.width, spec.resize.height)
    # Rows first, as every Pillow before 13 did within one call: it is what models were trained with.
    for each in ((size[0], height), size):
        image = image.resize(each, Image.Resampling.BILINEAR)
    if spec.crop is not None:
        left, top = (round((side - spec.crop) / 2.0) for side in size)
        image = image.crop((left, top, left + spec.crop, top + spec.crop))
    return np.asarray(image)


def dicom_pairs(folder: Path, images: Mapping[str, Path], spec: PreprocessSpec) -> tuple[DicomPair, ...]:
    """Compare each DICOM file with the PNG that its name names, as in `nih_00000002_000_implicit.dcm`.

    `images` are PNG files by name. Raises DatasetError where no file of the folder names one, ImageError.
    """
    pairs = [
        (images[name], file)
        for file in sorted(folder.rglob("*.dcm"))
        if (found := re.search(r"\d{8}_\d{3}", file.name)) and (name := f"{found[0]}.png") in images
    ]
    if not pairs:
        raise DatasetError(
            f"{folder} holds no DICOM file that names an image at hand; expected names such as 00000002_000.dcm"
        )
    return tuple(_pair(image, dicom, spec) for image, dicom in pairs)


def _pair(image: Path, dicom: Path, spec: PreprocessSpec) -> DicomPair:
    png, other = (read_radiograph(path).pixels for path in (image, dicom))
    return DicomPair(
        image=image.name,
        dicom=dicom.name,
        pixels_difference=_difference(png, other) if png.shape == other.shape else None,
        input_difference=_difference(network_input(png, spec), network_input(other, spec)),
    )


def _difference(ours: npt.NDArray[np.uint8], theirs: npt.NDArray[np.uint8]) -> int:
    return int(np.abs(ours.astype(np.int16) - theirs).max())
