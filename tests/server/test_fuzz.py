"""Two thousand cases of `thoraxrt.benchmarks.fuzz`, the same each time: input that nobody would send, to every call."""

from __future__ import annotations

import sys

import pytest

from thoraxrt.benchmarks.fuzz import METHODS, fuzz
from thoraxrt.engine.bundle import Bundle


@pytest.mark.skipif(sys.platform != "linux", reason="the server decodes in processes")
def test_whatever_a_call_brings_it_ends_with_a_proper_status(tiny_bundle: Bundle) -> None:
    report = fuzz(tiny_bundle, 2000, backend="onnxruntime")
    assert report.faults == []
    assert report.cases.total() >= 2000
    # Else the cases could pass because nothing ever gets far.
    far = {path for path, ended in report.ended if ended in {"OK", "CANCELLED"}}
    assert far == {*METHODS, "decoder"}
    ended = {status for _, status in report.ended}
    assert ended >= {"FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED", "ImageFormatError"}
    assert report.large > 5
    assert report.gzipped > 0
