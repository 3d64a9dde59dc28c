"""Logits to findings: probabilities and operating points.

Owns the activation and the rule for what is reported. Knows nothing of where logits come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["Activation", "Finding", "OperatingPoint", "activate", "findings_from_logits"]

Activation = Literal["sigmoid"]
"""How a logit becomes a probability; one value so far, findings being independent."""


class OperatingPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The probability from which a finding is reported, and where that number comes from.

    `sensitivity` and `specificity` are fractions in 0..1 measured on `data` when `method` is
    `youden` (Youden, Cancer 3:32, 1950: the threshold that maximises their sum), else None.
    `default` marks the 0.5 that nobody chose.
    """

    finding: str
    probability: float = 0.5
    method: Literal["default", "file", "youden"] = "default"
    data: str | None = None
    sensitivity: float | None = None
    specificity: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.probability < 1.0:
            raise ValueError(f"operating point of {self.finding} is {self.probability}: expected 0 < probability < 1")

    @property
    def logit(self) -> np.float32:
        """The same threshold in logit space, ln(p / (1 - p)) rounded to float32."""
        return np.float32(math.log(self.probability) - math.log1p(-self.probability))


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One label's answer for one image; `probability` in 0..1, `logit` a float32 value."""

    finding: str
    probability: float
    logit: float
    reported: bool


def activate(logit: float) -> float:
    """The logistic function 1 / (1 + exp(-logit)) in float64, without overflow."""
    if logit >= 0.0:
        return 1.0 / (1.0 + math.exp(-logit))
    e = math.exp(logit)
    return e / (1.0 + e)


def findings_from_logits(
    logits: npt.NDArray[np.float32], operating_points: Sequence[OperatingPoint]
) -> tuple[Finding, ...]:
    """The findings of one image, in label order.

    `logits` is float32 `(C,)`, in the order of `operating_points`. A finding is reported where
    its float32 logit reaches the operating point's float32 logit, so host and device agree.
    """
    return tuple(
        Finding(
            finding=point.finding,
            probability=activate(float(logit)),
            logit=float(logit),
            reported=bool(logit >= point.logit),
        )
        for logit, point in zip(logits, operating_points, strict=True)
    )
