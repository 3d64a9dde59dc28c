"""Geometry: a radiograph's pixels to the network's input, bit for bit as Pillow does it.

Owns `PreprocessSpec` (what the training pipeline did) and `Geometry` (what that means for one
source size, and the way back). Knows nothing of mean and std: they are folded into the network.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from thoraxrt.engine.errors import ImageLimitError

__all__ = ["Exact", "Geometry", "PreprocessSpec", "Shorter", "network_input", "resized"]


class Exact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="exact", tag_field="mode"):
    """Resize to exactly `width` x `height` pixels, whatever the source's aspect ratio."""

    width: int
    height: int

    def __post_init__(self) -> None:
        if not (1 <= self.width <= 4096 and 1 <= self.height <= 4096):
            raise ValueError(f"resize to {self.width} x {self.height}: expected 1 to 4096 pixels a side")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """`(width, height)` after the resize."""
        return self.width, self.height


class Shorter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="shorter", tag_field="mode"):
    """Resize the shorter side to `pixels`; the longer one follows, truncated as torchvision does.

    Source: `torchvision.transforms.functional._compute_resized_output_size`.
    """

    pixels: int

    def __post_init__(self) -> None:
        if not 1 <= self.pixels <= 4096:
            raise ValueError(f"resize of the shorter side to {self.pixels}: expected 1 to 4096 pixels")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """`(width, height)` after the resize."""
        if width <= height:
            return self.pixels, int(self.pixels * height / width)
        return int(self.pixels * width / height), self.pixels


class PreprocessSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The geometry a network was validated with: Pillow's bilinear resize, then a centre crop.

    `square` cuts the source to its centre square before the resize, as TorchXRayVision's
    transforms do. `crop` is the side of the centre crop in pixels of the resized image, or None
    for no crop. The result is square (`input_size` a side).

    Example: `PreprocessSpec(resize=Shorter(pixels=256), crop=224)` is the CheXNet recipe,
    `PreprocessSpec(square=True, resize=Exact(width=224, height=224))` TorchXRayVision's.

    Raises ValueError where the result would not be square.
    """

    resize: Exact | Shorter
    crop: int | None = None
    square: bool = False
    filter: Literal["pillow-bilinear"] = "pillow-bilinear"

    def __post_init__(self) -> None:
        shorter = self.resize.pixels if isinstance(self.resize, Shorter) else min(self.resize.width, self.resize.height)
        if self.crop is not None and not 1 <= self.crop <= shorter:
            raise ValueError(f"centre crop of {self.crop}: expected 1 to {shorter}, the resized shorter side")
        square = isinstance(self.resize, Exact) and self.resize.width == self.resize.height
        if self.crop is None and not square:
            raise ValueError("without a crop the resize must be to a square: give a crop or equal width and height")

    @property
    def input_size(self) -> int:
        """S: the side of the network's square input, in pixels."""
        if self.crop is not None:
            return self.crop
        assert isinstance(self.resize, Exact)  # __post_init__ holds it
        return self.resize.width

    def geometry(self, width: int, height: int) -> Geometry:
        """What this spec does to a source of `width` x `height` pixels.

        Raises ImageLimitError where the resized image would exceed 64 times the network's
        input, as only a sliver of an image would.
        """
        side = min(width, height)
        source_width, source_height = (side, side) if self.square else (width, height)
        resized_width, resized_height = self.resize.size(source_width, source_height)
        size = self.input_size
        if resized_width * resized_height > 64 * size * size:
            raise ImageLimitError(
                f"the image is {width} x {height} pixels, a sliver; expected the proportions of a radiograph"
            )
        return Geometry(
            width=width,
            height=height,
            # TorchXRayVision's XRayCenterCrop floors both halves: (w - side) // 2 differs for odd sides.
            source_left=width // 2 - source_width // 2,
            source_top=height // 2 - source_height // 2,
            source_width=source_width,
            source_height=source_height,
            resized_width=resized_width,
            resized_height=resized_height,
            left=round((resized_width - size) / 2),  # torchvision center_crop: round half to even
            top=round((resized_height - size) / 2),
            size=size,
        )


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """One source size through one `PreprocessSpec`: sizes in pixels, and the map back.

    `source_left`, `source_top`, `source_width` and `source_height` are the part of the source
    that is resized; `left`, `top` and `size` the part of the resized image that is the input.

    Coordinates are continuous, x to the right and y down, with the origin at the top left corner
    of the top left pixel, so that the centre of the pixel in column i is at x = i + 0.5.
    """

    width: int
    height: int
    source_left: int
    source_top: int
    source_width: int
    source_height: int
    resized_width: int
    resized_height: int
    left: int
    top: int
    size: int

    def source(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The part of the source `(H, W)` that is resized, a view."""
        bottom, right = self.source_top + self.source_height, self.source_left + self.source_width
        return pixels[self.source_top : bottom, self.source_left : right]

    def source_x(self, x: float) -> float:
        """The source's x for a network input x in 0..size."""
        return self.source_left + (x + self.left) * self.source_width / self.resized_width

    def source_y(self, y: float) -> float:
        """The source's y for a network input y in 0..size."""
        return self.source_top + (y + self.top) * self.source_height / self.resized_height


def network_input(pixels: npt.NDArray[np.uint8], spec: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """The network's input for one radiograph: the square if asked for, Pillow's resize, the centre crop.

    `pixels` is uint8 `(H, W)`, 0 black to 255 white; the result uint8 `(1, S, S)`, same range.
    Raises ImageLimitError for a sliver (see `PreprocessSpec.geometry`).
    """
    height, width = pixels.shape
    g = spec.geometry(width, height)
    cropped = resized(pixels, g)[g.top : g.top + g.size, g.left : g.left + g.size]
    return np.ascontiguousarray(cropped)[np.newaxis]  # (1, S, S)


def resized(pixels: npt.NDArray[np.uint8], geometry: Geometry) -> npt.NDArray[np.uint8]:
    """The whole resized image that the network's input is cut from, uint8 `(resized_height, resized_width)`.

    Pillow resamples rows, rounds to uint8, then columns; but from 13.0 on it takes columns first
    where the height shrinks more than twice as much as the width, which rounds differently. One
    call per axis keeps the order that every model so far was trained with.
    """
    source = Image.fromarray(geometry.source(pixels))
    rows = source.resize((geometry.resized_width, source.height), Image.Resampling.BILINEAR)
    return np.asarray(rows.resize((geometry.resized_width, geometry.resized_height), Image.Resampling.BILINEAR))
