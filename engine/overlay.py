"""Pictures for people: a radiograph with its CAM as heat and its boxes drawn and named.

Owns colours and drawing; what is drawn was decided elsewhere.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from thoraxrt.engine.boxes import Rectangle, upsample
from thoraxrt.engine.decode import Radiograph
from thoraxrt.engine.engine import Prediction
from thoraxrt.engine.errors import RequestError
from thoraxrt.engine.preprocess import PreprocessSpec

__all__ = ["CORRECT", "FALSE_POSITIVE", "GROUND_TRUTH", "draw_box", "heat", "radiograph_image", "render_overlay"]

# The NIH data sheet's colours for boxes.
CORRECT: Final = (0, 220, 0)
FALSE_POSITIVE: Final = (255, 40, 40)
GROUND_TRUTH: Final = (70, 130, 255)


def render_overlay(prediction: Prediction, spec: PreprocessSpec, findings: Iterable[str] | None = None) -> Image.Image:
    """The radiograph in RGB at its own size, with heat for the reported findings and every box.

    `findings` limits the heat to some findings. The prediction must carry its radiograph and its
    CAMs (`predict(..., cam=True)`), else RequestError is raised.
    """
    if prediction.radiograph is None or prediction.cam is None:
        raise RequestError("an overlay needs the radiograph and the CAMs: predict with cam=True")
    reported = [f.finding for f in prediction.findings if f.reported and (findings is None or f.finding in findings)]
    image = heat(prediction.radiograph, prediction, spec, reported)
    colours = _colours([f.finding for f in prediction.findings])
    for box in prediction.boxes:
        draw_box(image, box, colours[box.finding], f"{box.finding} {box.score:.2f}")
    return image


def _colours(findings: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """A bright colour for each finding, the same in every picture of one model."""
    hues = ((index * 0.618) % 1 for index in range(len(findings)))  # the golden ratio keeps neighbours apart
    colours = (colorsys.hsv_to_rgb(hue, 0.75, 1.0) for hue in hues)
    return {name: (int(r * 255), int(g * 255), int(b * 255)) for name, (r, g, b) in zip(findings, colours, strict=True)}


def radiograph_image(radiograph: Radiograph) -> Image.Image:
    """The radiograph as an RGB picture at its own size."""
    return Image.fromarray(radiograph.pixels).convert("RGB")


def heat(radiograph: Radiograph, prediction: Prediction, spec: PreprocessSpec, findings: Iterable[str]) -> Image.Image:
    """The radiograph in RGB with the CAMs of `findings` as heat: per pixel the largest, each min-max normalised.

    What the network did not see (outside the centre crop) stays as it is.
    """
    picture = np.asarray(radiograph_image(radiograph), np.float32)  # (H, W, 3)
    assert prediction.cam is not None
    names = [finding.finding for finding in prediction.findings]
    maps = [_normalised(upsample(prediction.cam[names.index(name)], spec.input_size)) for name in findings]
    if not maps:
        return radiograph_image(radiograph)
    warm = _on_source(np.max(maps, axis=0), radiograph, spec)  # (H, W), 0..1
    colour = cv2.applyColorMap((warm * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    alpha = (0.6 * warm**2)[..., np.newaxis]  # squared: the cool end leaves the radiograph as it is
    return Image.fromarray((picture * (1 - alpha) + colour * alpha).astype(np.uint8))


def _normalised(cam: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    low, high = cam.min(), cam.max()
    return (cam - low) / (high - low) if high > low else np.zeros_like(cam)


def _on_source(warm: npt.NDArray[np.float32], radiograph: Radiograph, spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """A map on the network's input `(S, S)` laid over the source `(H, W)`, zero outside the crop."""
    geometry = spec.geometry(radiograph.width, radiograph.height)
    left, right = (round(geometry.source_x(x)) for x in (0, geometry.size))
    top, bottom = (round(geometry.source_y(y)) for y in (0, geometry.size))
    placed = np.zeros((radiograph.height, radiograph.width), np.float32)
    placed[top:bottom, left:right] = cv2.resize(warm, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
    return placed


def draw_box(image: Image.Image, box: Rectangle, colour: tuple[int, int, int], label: str = "") -> None:
    """Draw a box and its label into an RGB picture of the original image's size, in place."""
    draw = ImageDraw.Draw(image)
    line = max(2, image.width // 256)
    left, top, right, bottom = box.x, box.y, box.x + box.width, box.y + box.height
    draw.rectangle((left, top, right, bottom), outline=colour, width=line)
    if label:
        size = max(10, image.width // 40)
        font = ImageFont.load_default(size=size)
        height = size * 1.3
        y = top - height if top >= height else bottom
        draw.rectangle(draw.textbbox((left, y), label, font=font), fill=(0, 0, 0))
        draw.text((left, y), label, fill=colour, font=font)
