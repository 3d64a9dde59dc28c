"""How far the served geometry moves a model that was trained, or validated, with another one.

The engine resizes as Pillow does and looks at one centre crop. Where training did something else,
the difference is measured here, on the original network, and recorded in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage import transform

from thoraxrt.engine.bundle import Skew, TrainedWith
from thoraxrt.engine.errors import DatasetError, RequestError
from thoraxrt.engine.postprocess import Activation
from thoraxrt.engine.preprocess import Geometry, PreprocessSpec, network_input, resized
from thoraxrt.export.graph import Reference

__all__ = ["measure_skew", "trained_inputs"]


def measure_skew(
    reference: Reference,
    pixels: Iterable[npt.NDArray[np.uint8]],
    data: str,
    *,
    spec: PreprocessSpec,
    trained_with: TrainedWith,
    activation: Activation,
) -> Skew:
    """Compare the network fed by training's geometry with the same network fed by the engine's.

    `reference` takes float32 `(N, 1, S, S)`, pixels in 0..255 that need not be whole numbers
    (training's resizers give fractions), and gives logits float32 `(N, C)`. `pixels` are
    radiographs uint8 `(H, W)`, seen one at a time; `data` says in words which. Ten crops' outputs
    are averaged after the activation, as CheXNet's re-implementations do; for the logit
    difference their log-odds are.

    Raises RequestError where ten crops cannot be cut, DatasetError without images.
    """
    if trained_with == "ten-crop" and spec.crop is None:
        raise RequestError("ten-crop needs a crop to repeat; the geometry has none: name its side with --crop")
    probabilities: list[npt.NDArray[np.float64]] = []
    logits: list[npt.NDArray[np.float64]] = []
    for image in pixels:
        trained = trained_inputs(image, spec, trained_with)  # (K, 1, S, S)
        served = network_input(image, spec)[np.newaxis].astype(np.float32)  # (1, 1, S, S)
        outputs = reference(np.concatenate([trained, served]))  # (K + 1, C)
        for values, differences in (
            (activation.probabilities(outputs), probabilities),
            (activation.log_odds(outputs), logits),
        ):
            differences.append(np.abs(values[:-1].mean(axis=0) - values[-1]))  # (C,)
    if not probabilities:
        raise DatasetError("no image to measure the skew on: name a folder that holds radiographs")
    return Skew(
        trained_with=trained_with,
        mean_probability_difference=float(np.mean(probabilities)),
        max_probability_difference=float(np.max(probabilities)),
        max_logit_difference=float(np.max(logits)),
        images=len(probabilities),
        data=data,
    )


def trained_inputs(
    pixels: npt.NDArray[np.uint8], spec: PreprocessSpec, trained_with: TrainedWith
) -> npt.NDArray[np.float32]:
    """What training showed the network of one radiograph uint8 `(H, W)`: float32 `(K, 1, S, S)` in 0..255.

    `skimage` and `opencv-area` are the two engines of TorchXRayVision 1.5's XRayResizer,
    `opencv-linear` is OpenCV's default, which does not antialias; all three between the spec's
    square and its centre crop, in float32, K = 1. `pillow-bicubic` is timm's default, K = 1. `ten-crop` is torchvision's TenCrop of the image
    as Pillow resizes it, K = 10.
    """
    height, width = pixels.shape
    geometry = spec.geometry(width, height)
    if trained_with == "ten-crop":
        return _ten_crops(resized(pixels, geometry), geometry.size).astype(np.float32)
    top, left, size = geometry.top, geometry.left, geometry.size
    window = np.s_[np.newaxis, np.newaxis, top : top + size, left : left + size]
    if trained_with == "pillow-bicubic":
        source = Image.fromarray(geometry.source(pixels))
        shape = (geometry.resized_width, geometry.resized_height)
        return np.asarray(source.resize(shape, Image.Resampling.BICUBIC), np.float32)[window]
    # Resized in TorchXRayVision's range: skimage pads with 0, which is mid-gray there and black in 0..255.
    scaled = (geometry.source(pixels).astype(np.float32) / 255 * 2 - 1) * 1024
    image = (_shrunk(scaled, geometry, trained_with) / 1024 + 1) / 2 * 255
    return np.asarray(image, np.float32)[window]


def _shrunk(image: npt.NDArray[np.floating], geometry: Geometry, trained_with: TrainedWith) -> npt.NDArray[np.float32]:
    """Float32 `(H, W)` to float32 `(resized_height, resized_width)`, as training's library resizes."""
    width, height = geometry.resized_width, geometry.resized_height
    if trained_with == "skimage":
        shape = (1, height, width)
        volume = transform.resize(image[np.newaxis], shape, mode="constant", preserve_range=True)  # type: ignore[no-untyped-call]
        return np.asarray(volume[0], np.float32)
    interpolation = cv2.INTER_AREA if trained_with == "opencv-area" else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), np.float32)


def _ten_crops(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """The four corners and the centre of an image `(h, w)` and of its mirror image: uint8 `(10, 1, S, S)`."""
    bottom, right = (length - size for length in image.shape)
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    crops = [view[top : top + size, left : left + size] for view in (image, image[:, ::-1]) for top, left in corners]
    return np.stack(crops)[:, np.newaxis]
