"""Reading a bundle: every kind of damage is a BundleError that names it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.bundle import MANIFEST, Bundle
from thoraxrt.engine.errors import BundleError
from thoraxrt.engine.postprocess import OperatingPoint, Softmax


@pytest.fixture
def copy(sample_bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / "copy.bundle"
    shutil.copytree(sample_bundle.path, path, copy_function=shutil.copyfile)
    return path


def test_a_sound_bundle_opens_and_verifies(copy: Path, sample_bundle: Bundle) -> None:
    bundle = Bundle.open(copy)
    bundle.verify()
    assert bundle.sha256 == sample_bundle.sha256


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:100] + bytes([d[100] ^ 1]) + d[101:], lambda d: b""])
def test_a_damaged_graph(damage: Callable[[bytes], bytes], copy: Path) -> None:
    graph = copy / "model.fp32.onnx"
    graph.write_bytes(damage(graph.read_bytes()))
    with pytest.raises(BundleError, match=r"model\.fp32\.onnx is not the file that was exported"):
        Bundle.open(copy).verify()


def test_a_missing_graph(copy: Path) -> None:
    (copy / "model.fp16.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.fp16\.onnx cannot be read"):
        Bundle.open(copy).verify()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("schema_version", 2, "schema version 2; this thoraxrt reads 1: update thoraxrt"),
        ("schema_version", 0, "schema version 0; this thoraxrt reads 1: export the bundle again"),
        ("schema_version", "one", "damaged"),
        ("surprise", 1, "unknown field `surprise`"),
        ("labels", ["Mass"], "operating_points must name the labels"),
        ("labels", [], "labels must be distinct"),
        ("activation", {"name": "relu"}, "activation"),
        ("activation", {"name": "sigmoid_opnorm", "thresholds": [0.5]}, "1 thresholds for 14 labels"),
        ("activation", {"name": "sigmoid_opnorm", "thresholds": [0.0] * 14}, "op-norm threshold 0.0"),
        ("files", {"../../etc/passwd": {"sha256": "", "size": 1}}, "expected a plain name"),
        ("preprocess", {"resize": {"mode": "shorter", "pixels": 100}, "crop": 224}, "centre crop of 224"),
        ("boxes", {"threshold": 7.0}, "box threshold"),
        ("boxes", {"per_finding": {"Flu": 0.5}}, "no label of this model"),
    ],
)
def test_a_senseless_manifest(field: str, value: Any, complaint: str, copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(BundleError, match=complaint):
        Bundle.open(copy)


def test_a_softmax_of_one_label_is_refused(sample_bundle: Bundle) -> None:
    manifest = sample_bundle.manifest
    with pytest.raises(ValueError, match="softmax for one label"):
        msgspec.structs.replace(
            manifest,
            labels=("Mass",),
            operating_points=(OperatingPoint(finding="Mass"),),
            boxes=BoxSpec(),
            activation=Softmax(),
        )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_opens_or_is_refused(data: st.DataObject, copy: Path, sample_bundle: Bundle) -> None:
    original = (sample_bundle.path / MANIFEST).read_bytes()
    start = data.draw(st.integers(0, len(original)))
    stop = data.draw(st.integers(start, min(start + 40, len(original))))
    (copy / MANIFEST).write_bytes(original[:start] + data.draw(st.binary(max_size=20)) + original[stop:])
    with contextlib.suppress(BundleError):  # and nothing else
        assert Bundle.open(copy).manifest.labels
