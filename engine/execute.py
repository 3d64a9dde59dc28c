"""Radiographs to raw outputs: the seam between the story and the device that computes it.

An executor does three of the steps (geometry, network, the regions of boxes) for a batch of
radiographs at once, so that a GPU need not give anything back between them. Knows neither
probabilities nor the original image's coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.boxes import Region

__all__ = ["Output"]


class Output(NamedTuple):
    """What the network says of one image of C labels.

    `regions` are those of the CAMs of the asked-for findings, by index into the labels, in the
    order of `regions_from_cam`; `cam` is there where it was asked for.
    """

    logits: npt.NDArray[np.float32]  # (C,)
    regions: tuple[tuple[int, Region], ...]
    cam: npt.NDArray[np.float32] | None  # (C, h, w)
