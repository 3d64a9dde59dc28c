"""A receipt as an edge box reads it: whose it is, what it says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from thoraxrt.cli.info import info
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BundleError, SignatureError
from thoraxrt.engine.receipt import LEAST_IMAGES, RECEIPT, RECEIPT_SIGNATURE, read_receipt, require_parity
from thoraxrt.export.agreement import ENOUGH
from thoraxrt.export.publish import sign_bundle, write_receipt


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(sample_bundle.path, tmp_path / "copy.bundle"))


def said(bundle: Bundle, changed: dict[str, object] | None = None, **verdicts: bool | None) -> bytes:
    """A receipt with what the edge reads of it: verdicts by `backend_precision_through`, on 24 images."""
    results = [
        {
            "candidate": dict(zip(("backend", "precision", "through"), name.split("_"), strict=True)),
            "verdict": None if passed is None else {"passed": passed, "reasons": []},
            "findings": [],
        }
        for name, passed in verdicts.items()
    ]
    receipt = {
        "version": 1,
        "bundle": bundle.sha256,
        "environment": {"date": "2026-11-24"},
        "data": {"images": 24, "patients": 17},
        "margin": 0.005,
        "preprocessing": {"images": 24, "identical": 24},
        "dicom": [{"image": "a.png", "input_difference": 0}],
        "results": results,
    }
    return json.dumps(receipt | (changed or {})).encode()


def test_no_receipt(bundle: Bundle) -> None:
    assert read_receipt(bundle) is None
    with pytest.raises(BundleError, match=r"no parity receipt .* `thoraxrt parity"):
        require_parity(bundle, "onnxruntime", "fp32")


def test_what_passed_is_what_no_verdict_says_otherwise_of(bundle: Bundle) -> None:
    receipt = said(
        bundle,
        pytorch_fp32_torch=None,
        onnxruntime_fp32_engine=None,
        openvino_bf16_engine=True,
        openvino_int8_engine=True,
        openvino_int8_server=False,
        onnxruntime_int8_engine=False,
    )
    write_receipt(bundle, receipt)
    passed = read_receipt(bundle)
    assert passed is not None
    assert (passed.date, passed.images, passed.margin) == ("2026-11-24", 24, 0.005)
    assert passed.candidates == {("onnxruntime", "fp32"), ("openvino", "bf16")}
    require_parity(bundle, "openvino", "bf16")
    for refused in (("openvino", "int8"), ("onnxruntime", "int8"), ("tensorrt", "fp32"), ("pytorch", "fp32")):
        with pytest.raises(BundleError, match=r"has not passed .* passed: onnxruntime:fp32, openvino:bf16: run one"):
            require_parity(bundle, *refused)


@pytest.mark.parametrize(
    "changed", [{"preprocessing": {"images": 24, "identical": 23}}, {"dicom": [{"input_difference": 1}]}]
)
def test_nothing_passed_where_network_inputs_were_others(bundle: Bundle, changed: dict[str, object]) -> None:
    write_receipt(bundle, said(bundle, changed, onnxruntime_fp32_engine=None))
    with pytest.raises(BundleError, match="passed: none: run"):
        require_parity(bundle, "onnxruntime", "fp32")


@pytest.mark.parametrize("changed", [{"data": {"images": 1}}, {"data": {"images": 19}}, {"margin": 0.99}])
def test_a_receipt_of_hardly_anything_opens_nothing(bundle: Bundle, changed: dict[str, object]) -> None:
    assert LEAST_IMAGES >= ENOUGH  # else findings were not judged one by one
    write_receipt(bundle, said(bundle, changed, openvino_int8_engine=True))
    with pytest.raises(BundleError, match=r"expected at least 20 images and a margin of at most 0\.01; .* anew"):
        require_parity(bundle, "openvino", "int8")


def test_a_receipt_of_another_version_is_named_as_such(bundle: Bundle) -> None:
    write_receipt(bundle, b'{"version": 2, "what": "nobody knows"}')
    with pytest.raises(BundleError, match=r"has version 2; this thoraxrt reads 1: .* anew"):
        read_receipt(bundle)


def test_a_receipt_of_another_manifest_or_of_nothing_is_refused(bundle: Bundle) -> None:
    write_receipt(bundle, said(bundle, openvino_int8_engine=True).replace(bundle.sha256.encode(), b"0" * 64))
    with pytest.raises(BundleError, match=r"is of the manifest 000000000000, this one is .*anew"):
        require_parity(bundle, "openvino", "int8")
    for damaged in (b"", b"{}", b"\xff", b"[" * 100_000):
        write_receipt(bundle, damaged)
        with pytest.raises(BundleError, match="is damaged"):
            read_receipt(bundle)


def test_info_shows_a_bundle_whose_receipt_counts_for_nothing(
    bundle: Bundle, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    private, public = keys
    sign_bundle(bundle, private)
    write_receipt(bundle, said(bundle, openvino_int8_engine=True))
    info(bundle.path, require_signature=public)
    assert "parity.json has no trusted signature in parity.sig" in (text := capsys.readouterr().out)
    assert "Files, all intact" in text
    write_receipt(bundle, b"{}")
    info(bundle.path)
    assert "parity.json is damaged" in capsys.readouterr().out


def test_trusted_keys_ask_for_a_signature_of_these_very_bytes(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    private, public = keys
    sign_bundle(bundle, private)
    trusting = Bundle.open(bundle.path, trusted=[public])
    write_receipt(bundle, said(bundle, openvino_int8_engine=True))
    with pytest.raises(SignatureError, match=r"no trusted signature in parity\.sig: .*cannot be read"):
        read_receipt(trusting)
    write_receipt(bundle, said(bundle, openvino_int8_engine=True), private)
    require_parity(trusting, "openvino", "int8")
    path = bundle.path / RECEIPT
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"int8", b"fp16"))
    with pytest.raises(SignatureError, match="no key in"):
        read_receipt(trusting)


def test_a_new_receipt_does_not_keep_the_old_ones_signature(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    write_receipt(bundle, b"{}", keys[0])
    assert (bundle.path / RECEIPT_SIGNATURE).is_file()
    write_receipt(bundle, b"[]")
    assert not (bundle.path / RECEIPT_SIGNATURE).exists()
    assert (bundle.path / RECEIPT).read_bytes() == b"[]"
    bundle.verify()
    with pytest.raises(SignatureError, match="private key"):
        write_receipt(bundle, b"{}", keys[1])
    assert (bundle.path / RECEIPT).read_bytes() == b"[]"
