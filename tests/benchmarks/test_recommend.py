"""The default that a bundle states: the fastest that passed, and nothing that did not."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from thoraxrt.benchmarks.bench import BenchResult
from thoraxrt.benchmarks.environment import environment
from thoraxrt.benchmarks.peers import Peer
from thoraxrt.benchmarks.receipt import Candidate, Data, Receipt, Result, Verdict
from thoraxrt.benchmarks.recommend import recommend
from thoraxrt.benchmarks.roofline import Work
from thoraxrt.engine.bundle import Bundle, Recommended
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import BundleError, RequestError
from thoraxrt.engine.receipt import RECEIPT, require_parity
from thoraxrt.export.publish import sign_bundle, write_receipt

HERE = environment()
OPENVINO = Recommended(backend="openvino", precision="fp32")


@pytest.fixture
def bundle(sample_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(sample_bundle.path, tmp_path / "a.bundle"))


def receipt(bundle: Bundle, **passed: bool) -> bytes:
    """By candidate, such as onnxruntime_fp32, whether it passed."""
    results = []
    for name, well in passed.items():
        backend, precision = name.split("_")
        verdict = Verdict(passed=well, failures=() if well else ("no",), shown=(), not_shown=())
        candidate = Candidate(backend=backend, precision=precision, through="engine")
        results.append(Result(candidate=candidate, verdict=verdict))
    data = Data(
        folder="nih", split="test", limit=None, sample=None, images=500, patients=400, absent=0, unreadable=(),
        sha256="d" * 64, annotated=(), unannotated=(),
    )  # fmt: skip
    return msgspec.json.encode(
        Receipt(
            bundle=bundle.sha256, network="n", checkpoint=None, data=data, margin=0.005, reference=None,
            boxes_reference=None, preprocessing=None, dicom=(), results=tuple(results), environment=HERE,
        )
    )  # fmt: skip


def speed(bundle: Bundle, speed_ups: Mapping[str, float]) -> BenchResult:
    peers = tuple(
        Peer(name=name, batch=1, reason=None, agreement=None, rounds=None, speed_up=ratio, interval=None)
        for name, ratio in speed_ups.items()
    )
    work = Work(operations={"fp32": 2}, weight_bytes=1, image_bytes=1, activation_bytes=1, not_counted={})
    return BenchResult(
        environment=HERE, network="n", bundle_sha256=bundle.sha256, backend="openvino", precision="fp32", batch=1,
        images=1, image_bytes=1, loadgen="6", seconds=1, quick=False, scenarios=(), curves=(), stages=(), memory=(),
        work=work, peaks=None, floors=(), no_floor=None, peers=peers, turns={},
    )  # fmt: skip


TIMED = {"onnxruntime fp32": 1.0, "openvino fp32": 1.2, "openvino bf16": 2.0, "openvino, defaults": 2.1}


def test_the_fastest_that_passed_runs_from_then_on(bundle: Bundle) -> None:
    write_receipt(bundle, receipt(bundle, onnxruntime_fp32=True, openvino_fp32=True, openvino_bf16=False))
    (bundle.path / "note.txt").write_text("mine")
    assert recommend(bundle, speed(bundle, TIMED)) == OPENVINO
    now = Bundle.open(bundle.path)
    now.verify()
    assert now.manifest == msgspec.structs.replace(bundle.manifest, recommended=OPENVINO)
    require_parity(now, "openvino", "fp32")
    with pytest.raises(BundleError, match="openvino:bf16 has not passed"):
        require_parity(now, "openvino", "bf16")
    with Engine.open(now) as engine:
        assert (engine.backend, engine.precision) == ("openvino", "fp32")
    assert (bundle.path / "note.txt").read_text() == "mine"
    with pytest.raises(RequestError, match="run thoraxrt bench on this bundle"):  # the times are of the old manifest
        recommend(now, speed(bundle, TIMED))


def test_a_receipt_says_afterwards_what_it_said_whatever_else_is_in_it(bundle: Bundle) -> None:
    other = msgspec.json.decode(receipt(bundle, openvino_fp32=True)) | {"of a later version": [1e300]}
    del other["boxes_reference"]
    write_receipt(bundle, msgspec.json.encode(other))
    assert recommend(bundle, speed(bundle, TIMED)) == OPENVINO
    now = Bundle.open(bundle.path)
    require_parity(now, "openvino", "fp32")
    assert msgspec.json.decode((bundle.path / RECEIPT).read_bytes()) == other | {"bundle": now.sha256}


def test_a_signed_bundle_is_signed_anew(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    private, public = keys
    sign_bundle(bundle, private)
    write_receipt(bundle, receipt(bundle, onnxruntime_fp32=True, openvino_fp32=True), private)
    signed = Bundle.open(bundle.path, [public])
    before = {path.name: path.read_bytes() for path in bundle.path.iterdir()}
    with pytest.raises(RequestError, match=r"manifest.sig and parity.sig would no longer hold; give the key"):
        recommend(signed, speed(bundle, TIMED))
    assert {path.name: path.read_bytes() for path in bundle.path.iterdir()} == before
    assert recommend(signed, speed(bundle, TIMED), private) == OPENVINO
    require_parity(Bundle.open(bundle.path, [public]), "openvino", "fp32")


def test_without_receipt_or_times_there_is_no_recommendation(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"has no parity.json; `thoraxrt parity"):
        recommend(bundle, speed(bundle, TIMED))
    write_receipt(bundle, receipt(bundle, openvino_int8=True, openvino_fp32=False))
    with pytest.raises(RequestError, match="none of openvino int8, which passed the parity check, was timed"):
        recommend(bundle, speed(bundle, TIMED))
    assert Bundle.open(bundle.path).manifest.recommended is None
