"""Half a minute of `thoraxrt.benchmarks.soak`: everything that clients and misfortune do, at once."""

from __future__ import annotations

import sys

import pytest

from tests.server.conftest import encoded
from thoraxrt.benchmarks.soak import soak
from thoraxrt.engine.bundle import Bundle


@pytest.mark.skipif(sys.platform != "linux", reason="the server decodes in processes")
def test_every_call_ends_once_and_nothing_is_left_behind(tiny_bundle: Bundle) -> None:
    images = [encoded(seed, 80 + 7 * seed, 120 - 5 * seed) for seed in range(6)]
    report = soak(tiny_bundle, images, 30.0, backend="onnxruntime")
    assert report.faults == []
    kinds = {kind for kind, _ in report.calls}
    assert kinds == {
        *("predict", "study", "stream", "bad", "malformed", "hurried", "cancelled", "vanishing"),
        *("tensors", "tensor stream", "unload", "unloaded", "load", "loaded", "stranger"),
    }
    assert report.calls["load", "OK"] > 0
    assert report.calls["unloaded", "NOT_FOUND"] > 0
    assert report.calls["stranger", "UNAUTHENTICATED"] > 0
    assert report.calls["stranger", "PERMISSION_DENIED"] > 0
