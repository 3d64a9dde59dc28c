"""Logits to findings: activations, operating points and the rule for what is reported.

Knows nothing of where logits come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = [
    "Activation",
    "Finding",
    "OperatingPoint",
    "Sigmoid",
    "SigmoidOpNorm",
    "Softmax",
    "findings_from_logits",
    "logistic",
    "reported",
    "thresholds",
]


class _Activation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name"):
    """What the activations share. An operating point is compared in log-odds, never as a probability.

    For independent findings the logit is the log-odds ln(s / (1 - s)) of s = sigmoid(logit), so
    that no transcendental stands in the comparison. `index` counts labels from 0.
    """

    def log_odds(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """What operating points are compared with: float32 logits `(..., C)` to float64 `(..., C)`."""
        return logits.astype(np.float64)

    def probability(self, log_odds: float, index: int) -> float:
        """The probability in 0..1 of the finding with these log-odds."""
        return logistic(log_odds)

    def threshold(self, probability: float, index: int) -> np.float32:
        """The log-odds of a probability above 0 and below 1, rounded to float32."""
        return np.float32(math.log(probability) - math.log1p(-probability))

    def local_biases(self, bias: Sequence[float], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """What makes a CAM's value the log-odds there, an image's other logits held: float64 `(C,)`.

        `bias` is the classifier's `(C,)`, `logits` the image's `(C,)`. Beyond the bias it is zero but for softmax.
        """
        return np.asarray(np.asarray(bias) + (self.log_odds(logits) - logits))

    def probabilities(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Float32 logits `(..., C)` to probabilities, float64 `(..., C)` in 0..1."""
        rows = self.log_odds(logits).reshape(-1, logits.shape[-1])  # (N, C)
        values = [self.probability(value, index) for row in rows.tolist() for index, value in enumerate(row)]
        return np.array(values, np.float64).reshape(logits.shape)


class Sigmoid(_Activation, frozen=True, tag="sigmoid"):
    """Findings are independent: 1 / (1 + exp(-logit))."""


class Softmax(_Activation, frozen=True, tag="softmax"):
    """Classes exclude each other: exp(z_i) / sum_j exp(z_j), for at least two labels.

    A softmax's logits mean nothing one by one (adding a constant to all changes no probability),
    so an operating point p is compared with the log-odds z_i - ln(sum over j != i of exp(z_j)):
    they reach ln(p / (1 - p)) exactly where the probability reaches p. They are computed in
    float64 and rounded to float32 once. exp and ln stand in this comparison: a device whose
    functions differ in float64's last places can disagree where log-odds lie within a float32
    rounding of the threshold.
    """

    def log_odds(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """See `_Activation.log_odds`; C is at least 2."""
        z = logits.astype(np.float64)
        others = np.where(np.eye(z.shape[-1], dtype=np.bool_), -np.inf, z[..., np.newaxis, :])  # (..., C, C)
        highest = others.max(axis=-1)
        sums = np.exp(others - highest[..., np.newaxis]).sum(axis=-1)
        return np.asarray(z - (highest + np.log(sums)))  # (..., C)


class SigmoidOpNorm(_Activation, frozen=True, tag="sigmoid_opnorm"):
    """TorchXRayVision's `op_norm`: the sigmoid, bent so that each finding's threshold lands on 0.5.

    With threshold t and s = sigmoid(logit): s / (2 t) below t, 1 - (1 - s) / (2 (1 - t)) from t
    on. `thresholds` has one t per label, 0 < t < 1, in sigmoid space. TorchXRayVision's NaN (not
    calibrated) makes its answer 0.5 for every image, which is no answer: it has no value here,
    and such an output must be left out of the labels. An operating point is taken back through
    both pieces to a logit, and logits are compared.
    """

    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        for t in self.thresholds:
            if not 0.0 < t < 1.0:
                raise ValueError(f"op-norm threshold {t}: expected 0 < threshold < 1; leave uncalibrated outputs out")

    def probability(self, log_odds: float, index: int) -> float:
        """See `_Activation.probability`."""
        t, s = self.thresholds[index], logistic(log_odds)
        return s / (2.0 * t) if s < t else 1.0 - logistic(-log_odds) / (2.0 * (1.0 - t))

    def threshold(self, probability: float, index: int) -> np.float32:
        """See `_Activation.threshold`; 0.5 gives the logit of the label's t."""
        t, p = self.thresholds[index], probability
        # Sums of logarithms: at p = 0.5 one term vanishes and the logit is t's own, and nothing underflows.
        if p <= 0.5:  # s = 2 p t
            return np.float32(math.log(2.0 * p) + math.log(t) - math.log1p(-2.0 * p * t))
        q = 1.0 - p  # 1 - s = 2 q (1 - t)
        return np.float32(math.log1p(-2.0 * q * (1.0 - t)) - math.log(2.0 * q) - math.log1p(-t))


Activation = Sigmoid | Softmax | SigmoidOpNorm
"""How logits become probabilities; in the manifest an object with the activation's `name`."""


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


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One label's answer for one image; `probability` in 0..1, `logit` a float32 value."""

    finding: str
    probability: float
    logit: float
    reported: bool


def logistic(x: float) -> float:
    """The logistic function 1 / (1 + exp(-x)) in float64, without overflow."""
    if x >= 0.0:
        return 1.0 / (1.0 + math.exp(-x))
    e = math.exp(x)
    return e / (1.0 + e)


def thresholds(operating_points: Sequence[OperatingPoint], activation: Activation) -> npt.NDArray[np.float32]:
    """Each label's operating point as log-odds, float32 `(C,)`."""
    points = enumerate(operating_points)
    return np.array([activation.threshold(point.probability, index) for index, point in points], np.float32)


def reported(
    logits: npt.NDArray[np.float32], thresholds: npt.NDArray[np.float32], activation: Activation
) -> npt.NDArray[np.bool_]:
    """Which findings are reported, bool `(..., C)`, for logits float32 `(..., C)`.

    A finding is reported where its log-odds, rounded to float32, reach its float32 threshold; but for
    softmax they are the logit itself, so host and device agree to the last bit.
    """
    return np.asarray(activation.log_odds(logits).astype(np.float32) >= thresholds)


def findings_from_logits(
    logits: npt.NDArray[np.float32],
    operating_points: Sequence[OperatingPoint],
    activation: Activation,
    cuts: npt.NDArray[np.float32] | None = None,
) -> tuple[Finding, ...]:
    """The findings of one image, in label order.

    `logits` is float32 `(C,)`, in the order of `operating_points`; see `reported`. `cuts` are the
    points' `thresholds`, for a caller who has many images.
    """
    cuts = thresholds(operating_points, activation) if cuts is None else cuts
    log_odds = activation.log_odds(logits).tolist()
    shown = reported(logits, cuts, activation).tolist()
    return tuple(
        Finding(
            finding=point.finding, probability=activation.probability(value, index), logit=logit, reported=is_reported
        )
        for index, (point, logit, value, is_reported) in enumerate(
            zip(operating_points, logits.tolist(), log_odds, shown, strict=True)
        )
    )
