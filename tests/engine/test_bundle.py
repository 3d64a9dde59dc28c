"""Reading a bundle: every kind of damage is a BundleError that names it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thoraxrt.engine.boxes import BoxSpec, boxes_from_cam
from thoraxrt.engine.bundle import MANIFEST, SIGNATURE, Bundle
from thoraxrt.engine.errors import BundleError, ImageLimitError, SignatureError
from thoraxrt.engine.postprocess import OperatingPoint, Softmax, findings_from_logits
from thoraxrt.export.publish import sign_bundle


@pytest.fixture
def copy(sample_bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / "copy.bundle"
    shutil.copytree(sample_bundle.path, path, copy_function=shutil.copyfile)
    return path


@pytest.fixture
def signed(copy: Path, keys: tuple[Path, Path]) -> Path:
    sign_bundle(Bundle.open(copy), keys[0])
    (copy / SIGNATURE).chmod(0o644)
    return copy


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
        ("schema_version", 3, "schema version 3; this thoraxrt reads 2: update thoraxrt"),
        ("schema_version", 1, "schema version 1; this thoraxrt reads 2: export the bundle again"),
        ("schema_version", "one", "damaged"),
        ("surprise", 1, "unknown field `surprise`"),
        ("labels", ["Mass"], "operating_points must name the labels"),
        ("labels", [], "labels must be distinct"),
        ("activation", {"name": "relu"}, "activation"),
        ("activation", {"name": "sigmoid_opnorm", "thresholds": [0.5]}, "1 thresholds for 14 labels"),
        ("activation", {"name": "sigmoid_opnorm", "thresholds": [0.0] * 14}, "op-norm threshold 0.0"),
        ("files", {"../../etc/passwd": {"sha256": "0" * 64, "size": 1}}, "expected a plain name"),
        ("files", {".hidden": {"sha256": "0" * 64, "size": 1}}, "expected a plain name"),
        ("files", {"manifest.sig": {"sha256": "0" * 64, "size": 1}}, "expected a plain name"),
        ("files", {"model.fp32.onnx": {"sha256": "0" * 64, "size": -1}}, r"files\[\.\.\.\]\.size"),
        ("files", {"model.fp32.onnx": {"sha256": "0" * 63, "size": 1}}, r"files\[\.\.\.\]\.sha256"),
        ("files", {}, "'fp32' is checked or recommended, files has no 'model.fp32.onnx'"),
        ("recommended", {"backend": "openvino", "precision": "int8"}, "files has no 'model.int8.onnx'"),
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


QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(QUICK, max_examples=300)
@given(data=st.data())
def test_a_mutated_manifest_opens_or_is_refused(data: st.DataObject, copy: Path, sample_bundle: Bundle) -> None:
    original = (sample_bundle.path / MANIFEST).read_bytes()
    start = data.draw(st.integers(0, len(original)))
    stop = data.draw(st.integers(start, min(start + 40, len(original))))
    (copy / MANIFEST).write_bytes(original[:start] + data.draw(st.binary(max_size=20)) + original[stop:])
    with contextlib.suppress(BundleError):  # and nothing else
        assert Bundle.open(copy).manifest.labels


def use(bundle: Bundle) -> None:
    """What a manifest that opened must bear: everything the engine asks of it."""
    manifest = bundle.manifest
    count = len(manifest.labels)
    assert count == len(manifest.network.bias) == len(manifest.operating_points) > 0
    assert all(math.isfinite(value) for value in manifest.network.bias)
    assert 1 <= manifest.preprocess.input_size <= 4096
    assert all(Path(name).name == name and entry.size >= 0 for name, entry in manifest.files.items())
    with contextlib.suppress(ImageLimitError):
        geometry = manifest.preprocess.geometry(1024, 1024)
        assert geometry.size == manifest.preprocess.input_size
        assert 0 <= geometry.source_x(0) <= 1024
        shape = manifest.network.cam_height, manifest.network.cam_width
        cam = np.linspace(-1, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
        spec = manifest.boxes
        boxes = boxes_from_cam(
            cam, finding=manifest.labels[0], bias=manifest.network.bias[0], spec=spec, geometry=geometry
        )
        assert all(0.0 <= box.score <= 1.0 and box.width > 0 for box in boxes)
    for finding in findings_from_logits(np.zeros(count, np.float32), manifest.operating_points, manifest.activation):
        assert 0.0 <= finding.probability <= 1.0
    assert msgspec.json.decode(msgspec.json.encode(manifest), type=type(manifest)) == manifest
    with contextlib.suppress(BundleError):
        bundle.verify()


def holders(value: Any) -> list[Any]:
    """Every object and array of a JSON document."""
    if not isinstance(value, dict | list):
        return []
    return [
        value,
        *(holder for child in (value.values() if isinstance(value, dict) else value) for holder in holders(child)),
    ]


NUMBERS = st.one_of(
    st.integers(),
    st.integers(1, 64),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from([0, -1, 1 << 31, 1 << 63, 1 << 64, 10**400, 1e308, 5e-324, math.nan, math.inf]),
)
STRINGS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "..", "../x", "/dev/stdin", "a/b", "a\\b", "CON", "manifest.json", "a" * 300, "\0", "\ud800", "\u202e"]
    ),
    st.sampled_from(["fp32", "bf16", "int8", "sigmoid", "softmax", "shorter", "exact", "youden", "Mass"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS),
    lambda children: st.one_of(st.lists(children, max_size=4), st.dictionaries(STRINGS, children, max_size=4)),
    max_leaves=8,
)


@settings(QUICK, max_examples=200)
@given(data=st.data())
def test_a_manifest_with_other_values_is_refused_or_bears_use(
    data: st.DataObject, copy: Path, sample_bundle: Bundle
) -> None:
    document = json.loads((sample_bundle.path / MANIFEST).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        holder = data.draw(st.sampled_from(holders(document)))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = data.draw(st.sampled_from(keys)) if keys else None
        match data.draw(st.sampled_from(["replace", "remove", "add", "alike", "alike", "alike"])):
            case "replace" if keys:
                holder[key] = data.draw(VALUES)
            case "alike" if keys and isinstance(holder[key], int | float | str):
                holder[key] = data.draw(STRINGS if isinstance(holder[key], str) else NUMBERS)
            case "remove" if keys:
                del holder[key]
            case _:
                if isinstance(holder, dict):
                    holder[data.draw(STRINGS)] = data.draw(VALUES)
                else:
                    holder.append(data.draw(VALUES))
    (copy / MANIFEST).write_text(json.dumps(document), errors="surrogatepass")
    with contextlib.suppress(BundleError):  # and nothing else
        use(Bundle.open(copy))


@pytest.mark.parametrize(
    "insertion",
    [
        '"surprise": ' + "[" * 1_000_000 + "]" * 1_000_000,
        '"surprise": ' + '{"a": ' * 1_000_000,
        '"surprise": ' + "9" * 1_000_000,
        '"surprise": NaN',
        '"labels": ["' + "x" * (10 << 20) + '"]',
        f'"files": {{"{"x" * (10 << 20)}": {{"sha256": "{"0" * 64}", "size": 1}}}}',
        '"schema_version": 1e400',
        '"schema_version": ' + "9" * 5_000,
        '"network": {"name": "\\ud800"}',
        '"labels": ["Mass"], "labels": ["Mass", "Mass"]',
    ],
    ids=[
        "nested arrays",
        "nested objects",
        "digits",
        "NaN",
        "label",
        "name",
        "infinite",
        "version",
        "surrogate",
        "twice",
    ],
)
def test_a_manifest_with_a_monstrous_value(insertion: str, copy: Path) -> None:
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.rstrip().removesuffix("}") + f", {insertion}}}")
    with pytest.raises(BundleError) as refused:
        Bundle.open(copy)
    assert len(str(refused.value)) < 1000


def large(path: Path) -> None:
    os.truncate(path, 1 << 40)  # sparse: reading it would need a terabyte


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, "model.fp32.onnx"])
@pytest.mark.parametrize("replace", [large, pipe, folder, endless, itself])
def test_what_is_no_file_of_a_bundle_is_refused_at_once(
    replace: Callable[[Path], None], name: str, signed: Path, keys: tuple[Path, Path]
) -> None:
    replace(signed / name)
    with pytest.raises(BundleError, match=f"{name} (has 1099511627776 bytes|is no regular file|cannot be read)"):
        Bundle.open(signed, trusted=[keys[1]]).verify()


@settings(QUICK, max_examples=100)
@given(data=st.data())
def test_any_damage_to_any_file_of_a_signed_bundle_is_refused_by_name(
    data: st.DataObject, signed: Path, keys: tuple[Path, Path]
) -> None:
    file = data.draw(st.sampled_from(sorted(signed.iterdir())))
    original = file.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    flipped = bytes([original[position] ^ data.draw(st.integers(1, 255))])
    damaged = data.draw(
        st.sampled_from(
            [original[:position] + flipped + original[position + 1 :], original[:position], original + flipped]
        )
    )
    file.write_bytes(damaged)
    try:
        with pytest.raises(BundleError, match=file.name):
            Bundle.open(signed, trusted=[keys[1]]).verify()
    finally:
        file.write_bytes(original)


def test_a_bundle_nobody_trusted_signed_is_refused(copy: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    with pytest.raises(
        SignatureError, match=r"no trusted signature in manifest\.sig: .*manifest\.sig cannot be read.*thoraxrt sign"
    ):
        Bundle.open(copy, trusted=[public])
    sign_bundle(Bundle.open(copy), private)
    Bundle.open(copy, trusted=[public]).verify()
    with pytest.raises(SignatureError, match="no key in an empty list made this signature"):
        Bundle.open(copy, trusted=[])
