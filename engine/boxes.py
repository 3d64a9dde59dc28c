"""CAM to boxes, reproducibly: every float32 operation here is stated, ordered and uncontracted.

The method is that of ChestX-ray8 (Wang et al., arXiv 1705.02315, section 4.3): upsample the
finding's activation map, normalise, threshold, and box the connected regions. Owns `BoxSpec`
and `Box`; knows nothing of probabilities beyond a box's score. A GPU kernel computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from thoraxrt.engine.postprocess import logistic
from thoraxrt.engine.preprocess import Geometry

__all__ = [
    "Box",
    "BoxSpec",
    "Peak",
    "Rectangle",
    "Region",
    "boxes_from_cam",
    "boxes_from_regions",
    "iobb",
    "iou",
    "regions_from_cam",
    "sort_boxes",
    "upsample",
]


class BoxSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a CAM becomes boxes.

    `threshold`: the min-max normalised activation, in 0..1, from which a pixel belongs to a
    region; the default is the upper one of the paper's two, 180 of 255. `per_finding` overrides
    it by finding. `min_area`: regions smaller than this share of the network's input are
    dropped. `max_per_finding`: the highest-scoring regions kept.

    Example: `BoxSpec(threshold=0.6, per_finding={"Nodule": 0.8})`.
    """

    threshold: float = 180 / 255
    per_finding: dict[str, float] = {}
    min_area: float = 0.001
    max_per_finding: int = 8

    def __post_init__(self) -> None:
        for name, value in {"threshold": self.threshold, **self.per_finding}.items():
            if not 0.0 < value <= 1.0:
                raise ValueError(f"box threshold {name} is {value}: expected 0 < threshold <= 1")
        if not 0.0 <= self.min_area < 1.0:
            raise ValueError(f"min_area is {self.min_area}: expected a share, 0 <= min_area < 1")
        if self.max_per_finding < 1:
            raise ValueError(f"max_per_finding is {self.max_per_finding}: expected at least 1")

    def threshold_of(self, finding: str) -> float:
        """The finding's own threshold, else the common one."""
        return self.per_finding.get(finding, self.threshold)


class Rectangle(Protocol):
    """A box or an annotation: pixels of the original image, origin top left."""

    @property
    def x(self) -> float:
        """Left edge."""

    @property
    def y(self) -> float:
        """Top edge."""

    @property
    def width(self) -> float:
        """Width."""

    @property
    def height(self) -> float:
        """Height."""


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """Where a box's activation is highest: a pixel centre, in source coordinates (see `Geometry`)."""

    x: float
    y: float


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """A region in pixels of the original image, origin at its top left corner.

    It covers x to x + width and y to y + height in continuous coordinates. `score` in 0..1 is
    the activation of the local logit (CAM plus bias) at `peak`.
    """

    finding: str
    x: float
    y: float
    width: float
    height: float
    score: float
    peak: Peak


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A connected region on the network's input grid: half-open pixel extents, area, first peak."""

    left: int
    top: int
    right: int
    bottom: int
    area: int
    peak_x: int
    peak_y: int
    peak_value: float


def _taps(source: int, target: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Lower tap, upper tap and upper weight for each of `target` samples of `source` cells."""
    scale = np.float32(source) / np.float32(target)
    position = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    position = np.clip(position, np.float32(0), np.float32(source - 1))
    lower = np.floor(position)
    low = lower.astype(np.intp)
    return low, np.minimum(low + 1, source - 1), position - lower


def upsample(cam: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Bilinear upsampling with half-pixel centres and clamped edges, float32 throughout.

    `cam` is float32 `(h, w)`; the result float32 `(size, size)`. For target pixel i the source
    position is p = (i + 0.5) * (h / size) - 0.5, clamped to 0..h-1, lower tap floor(p), weight
    t = p - floor(p). Each interpolation is a + (b - a) * t, along x first, then along y; every
    operation is rounded to float32 by itself (no fused multiply-add).
    """
    height, width = cam.shape
    left, right, t = _taps(width, size)
    rows = cam[:, left] + (cam[:, right] - cam[:, left]) * t  # (h, S)
    upper, lower, t = _taps(height, size)
    return rows[upper] + (rows[lower] - rows[upper]) * t[:, np.newaxis]  # (S, S)


def regions_from_cam(cam: npt.NDArray[np.float32], size: int, threshold: float, min_area: float = 0.0) -> list[Region]:
    """The 8-connected regions of one CAM, float32 `(h, w)`, on the `(size, size)` input grid.

    A pixel belongs to a region where (v - min) / (max - min) >= threshold, in float32. A flat
    map has no regions. The peak is the first maximum in raster order. Regions come in raster
    order of their topmost, then leftmost pixel.
    """
    heat = upsample(cam, size)  # (S, S)
    low, high = heat.min(), heat.max()
    if not high > low:
        return []
    mask = (heat - low) / (high - low) >= np.float32(threshold)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    regions = []
    for label in range(1, count):
        left, top, width, height, area = (int(v) for v in stats[label])
        if area < min_area * size * size:
            continue
        window = (slice(top, top + height), slice(left, left + width))
        inside = np.where(labels[window] == label, heat[window], -np.inf)
        dy, dx = divmod(int(np.argmax(inside)), width)  # argmax: the first in raster order
        regions.append(
            Region(
                left=left,
                top=top,
                right=left + width,
                bottom=top + height,
                area=area,
                peak_x=left + dx,
                peak_y=top + dy,
                peak_value=float(heat[top + dy, left + dx]),
            )
        )
    return sorted(regions, key=lambda r: (r.top, r.left, r.peak_y, r.peak_x))


def boxes_from_cam(
    cam: npt.NDArray[np.float32],
    *,
    finding: str,
    bias: float,
    spec: BoxSpec,
    geometry: Geometry,
    probability: Callable[[float], float] = logistic,
) -> list[Box]:
    """The boxes of one finding, best first: by score, then y, then x.

    `cam` is float32 `(h, w)`; `bias` the finding's classifier bias, so that cam + bias is a local logit, and
    `probability` makes it a score in 0..1. Extents are mapped through `geometry` and clipped to the source image.
    """
    regions = regions_from_cam(cam, geometry.size, spec.threshold_of(finding), spec.min_area)
    return boxes_from_regions(
        regions, finding=finding, bias=bias, spec=spec, geometry=geometry, probability=probability
    )


def boxes_from_regions(
    regions: Iterable[Region],
    *,
    finding: str,
    bias: float,
    spec: BoxSpec,
    geometry: Geometry,
    probability: Callable[[float], float] = logistic,
) -> list[Box]:
    """The boxes of one finding's regions, wherever they were found; see `boxes_from_cam`."""
    boxes = []
    for region in regions:
        left = max(geometry.source_x(region.left), 0.0)
        top = max(geometry.source_y(region.top), 0.0)
        right = min(geometry.source_x(region.right), float(geometry.width))
        bottom = min(geometry.source_y(region.bottom), float(geometry.height))
        local_logit = np.float32(region.peak_value) + np.float32(bias)
        boxes.append(
            Box(
                finding=finding,
                x=left,
                y=top,
                width=right - left,
                height=bottom - top,
                score=probability(float(local_logit)),
                peak=Peak(x=geometry.source_x(region.peak_x + 0.5), y=geometry.source_y(region.peak_y + 0.5)),
            )
        )
    return sort_boxes(boxes)[: spec.max_per_finding]


def sort_boxes(boxes: list[Box]) -> list[Box]:
    """Boxes by score, highest first, then by y, then by x; equal ones stay in label order."""
    return sorted(boxes, key=lambda box: (-box.score, box.y, box.x))


def iobb(detected: Rectangle, annotated: Rectangle) -> float:
    """Intersection over the *detected* box's area, 0..1 (Wang et al., arXiv 1705.02315, section 4.3)."""
    return _intersection(detected, annotated) / (detected.width * detected.height)


def iou(one: Rectangle, other: Rectangle) -> float:
    """Intersection over union, 0..1; the same whichever box comes first."""
    intersection = _intersection(one, other)
    return intersection / (one.width * one.height + other.width * other.height - intersection)


def _intersection(one: Rectangle, other: Rectangle) -> float:
    """The common area, never above the smaller box's: edges are sums, which round."""
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    width, height = min(width, one.width, other.width), min(height, one.height, other.height)
    return max(width, 0.0) * max(height, 0.0)
