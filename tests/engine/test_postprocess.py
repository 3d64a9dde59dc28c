"""Activations, operating points, and which findings are reported."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thoraxrt.engine.postprocess import (
    Activation,
    OperatingPoint,
    Sigmoid,
    SigmoidOpNorm,
    Softmax,
    findings_from_logits,
    logistic,
)

SHARE = st.floats(1e-6, 1 - 1e-6)
LOGIT = st.floats(-1e3, 1e3, width=32)


@given(st.floats(-1e30, 1e30))
def test_the_logistic_function_is_a_probability_for_every_finite_logit(logit: float) -> None:
    assert 0.0 <= logistic(logit) <= 1.0
    assert logistic(logit) + logistic(-logit) == pytest.approx(1.0, abs=1e-15)


def test_sigmoid_by_hand() -> None:
    logits = np.array([[0.0, math.log(3)], [-math.log(3), 0.0]], np.float32)
    np.testing.assert_allclose(Sigmoid().probabilities(logits), [[0.5, 0.75], [0.25, 0.5]], atol=1e-7)


@pytest.mark.parametrize("activation", [Sigmoid(), SigmoidOpNorm(thresholds=(0.02, 0.9))])
def test_the_threshold_itself_is_reported_and_one_float_below_is_not(activation: Activation) -> None:
    points = [OperatingPoint(finding="Mass", probability=0.3), OperatingPoint(finding="Edema", probability=0.7)]
    at = np.array([activation.threshold(point.probability, index) for index, point in enumerate(points)], np.float32)
    assert [f.reported for f in findings_from_logits(at, points, activation)] == [True, True]
    below = np.nextafter(at, np.float32(-np.inf))
    assert [f.reported for f in findings_from_logits(below, points, activation)] == [False, False]


def test_findings_carry_the_exact_logit() -> None:
    (finding,) = findings_from_logits(np.array([-0.757], np.float32), [OperatingPoint(finding="Mass")], Sigmoid())
    assert finding.logit == float(np.float32(-0.757))
    assert finding.probability == logistic(finding.logit)


@given(st.lists(st.tuples(LOGIT, SHARE), min_size=1, max_size=18))
def test_op_norm_is_linear_from_0_through_a_half_at_the_threshold_to_1(values: list[tuple[float, float]]) -> None:
    logits = np.array([logit for logit, _ in values], np.float32)
    thresholds = tuple(t for _, t in values)
    expected = [np.interp(logistic(float(z)), [0, t, 1], [0, 0.5, 1]) for z, t in zip(logits, thresholds, strict=True)]
    np.testing.assert_allclose(SigmoidOpNorm(thresholds=thresholds).probabilities(logits), expected, atol=1e-9)


@given(SHARE, SHARE)
def test_op_norm_takes_an_operating_point_back_to_its_logit(t: float, p: float) -> None:
    activation = SigmoidOpNorm(thresholds=(0.5, t))
    s = np.interp(p, [0, 0.5, 1], [0, t, 1])
    # Near 1 a float64 probability holds few of the logit's digits.
    assert activation.threshold(p, 1) == pytest.approx(math.log(s) - math.log1p(-s), rel=1e-6, abs=1e-6)
    assert activation.threshold(p, 0) == pytest.approx(Sigmoid().threshold(p, 0), rel=2e-7, abs=1e-9)


@given(SHARE)
def test_op_norm_at_a_half_is_the_threshold_itself(t: float) -> None:
    assert SigmoidOpNorm(thresholds=(t,)).threshold(0.5, 0) == Sigmoid().threshold(t, 0)


@given(st.sampled_from([5e-324, 1e-300, 0.5, 1 - 2**-53]), st.sampled_from([5e-324, 1e-300, 0.5, 1 - 2**-53]))
def test_op_norm_is_finite_at_the_ends(t: float, p: float) -> None:
    activation = SigmoidOpNorm(thresholds=(t,))
    assert np.isfinite(activation.threshold(p, 0))
    assert 0.0 <= activation.probability(float(np.finfo(np.float32).max), 0) <= 1.0
    assert 0.0 <= activation.probability(float(np.finfo(np.float32).min), 0) <= 1.0


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, math.nan])
def test_an_op_norm_threshold_outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < threshold < 1"):
        SigmoidOpNorm(thresholds=(0.5, threshold))


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


@given(st.lists(LOGIT, min_size=2, max_size=18))
def test_softmax_is_the_softmax(values: list[float]) -> None:
    logits = np.array([values, values[::-1]], np.float32)
    probabilities = Softmax().probabilities(logits)
    for row, expected in zip(probabilities, logits, strict=True):
        np.testing.assert_allclose(row, _softmax(expected.astype(np.float64)), rtol=1e-9, atol=1e-300)


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=6), st.floats(0.01, 0.99))
def test_softmax_reports_what_reaches_the_probability(values: list[float], p: float) -> None:
    logits = np.array(values, np.float32)
    points = [OperatingPoint(finding=str(index), probability=p) for index in range(len(values))]
    for finding, expected in zip(
        findings_from_logits(logits, points, Softmax()), _softmax(logits.astype(np.float64)), strict=True
    ):
        if abs(expected - p) > 1e-6:  # nearer, float32 decides
            assert finding.reported == (expected > p)
        assert finding.logit in values


@pytest.mark.parametrize(
    "activation", [Sigmoid(), Softmax(), SigmoidOpNorm(thresholds=(0.0742, 0.0398)), SigmoidOpNorm(thresholds=())]
)
def test_an_activation_is_an_object_in_json(activation: Activation) -> None:
    encoded = msgspec.json.encode(activation)
    assert msgspec.json.decode(encoded, type=Activation) == activation  # type: ignore[arg-type]
    assert msgspec.json.decode(encoded)["name"] in ("sigmoid", "softmax", "sigmoid_opnorm")


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.5, math.nan])
def test_an_operating_point_outside_0_to_1_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < probability < 1"):
        OperatingPoint(finding="Mass", probability=probability)
