"""Activation, operating points, and which findings are reported."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thoraxrt.engine.postprocess import OperatingPoint, activate, findings_from_logits


@given(st.floats(-1e30, 1e30))
def test_activation_is_a_probability_for_every_finite_logit(logit: float) -> None:
    assert 0.0 <= activate(logit) <= 1.0
    assert activate(logit) + activate(-logit) == pytest.approx(1.0, abs=1e-15)


def test_activation_by_hand() -> None:
    assert activate(0.0) == 0.5
    assert activate(math.log(3)) == pytest.approx(0.75, abs=1e-15)


def test_the_threshold_itself_is_reported_and_one_float_below_is_not() -> None:
    point = OperatingPoint(finding="Mass", probability=0.3)
    below = np.nextafter(point.logit, np.float32(-np.inf))
    at, under = findings_from_logits(np.array([point.logit, below], np.float32), [point, point])
    assert at.reported
    assert not under.reported


def test_findings_carry_the_exact_logit() -> None:
    (finding,) = findings_from_logits(np.array([-0.757], np.float32), [OperatingPoint(finding="Mass")])
    assert finding.logit == float(np.float32(-0.757))
    assert finding.probability == activate(finding.logit)


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.5, math.nan])
def test_an_operating_point_outside_0_to_1_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < probability < 1"):
        OperatingPoint(finding="Mass", probability=probability)
