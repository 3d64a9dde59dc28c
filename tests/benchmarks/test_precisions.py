"""Which precisions are compared, with what yardstick, and what is concluded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from thoraxrt.benchmarks.precisions import YARDSTICK, compare_precisions, conclusion
from thoraxrt.engine.bundle import Bundle


def test_every_precision_that_runs_here_is_compared_with_the_yardstick(sample_bundle: Bundle) -> None:
    inputs = list(np.random.default_rng(0).integers(0, 256, (5, 1, 224, 224), np.uint8))
    results = {r["name"]: r for r in compare_precisions(sample_bundle, inputs, batch=2, rounds=1)}
    assert {"openvino fp32", YARDSTICK} <= set(results)
    assert results[YARDSTICK]["mean_error"] == 0
    assert results[YARDSTICK]["speed_up"] == 1
    assert results["openvino fp32"]["mean_error"] < 1e-5
    assert all(result["images_per_second"] > 0 for result in results.values())


def result(name: str, speed_up: float, mean_error: float, meets_bar: bool = True) -> dict[str, Any]:
    return {"name": name, "speed_up": speed_up, "mean_error": mean_error, "meets_bar": meets_bar}


@pytest.mark.parametrize(
    ("int8", "expected"),
    [
        (result("a int8", 3, 0.002), "fastest within the bar: a int8 (3.0 x onnxruntime fp32); closer: a bf16, at 67% of its speed"),
        (result("a int8", 1.5, 0.002), "fastest within the bar: a bf16 (2.0 x onnxruntime fp32); closer: onnxruntime fp32, at 50% "
         "of its speed; a bf16 is both faster and closer than a int8"),
        (result("a int8", 9, 0.2, meets_bar=False), "fastest within the bar: a bf16 (2.0 x onnxruntime fp32); closer: "
         "onnxruntime fp32, at 50% of its speed"),
    ],
)  # fmt: skip
def test_the_conclusion_says_when_int8_is_not_worth_it(int8: dict[str, Any], expected: str) -> None:
    assert conclusion([result(YARDSTICK, 1, 0.0), result("a bf16", 2, 0.001), int8]) == expected
