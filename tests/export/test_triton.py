"""A Triton model: Triton's own schema reads it, and it says what the network is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from thoraxrt.cli import app
from thoraxrt.engine.backends.tensorrt_plan import LayerTypes, Plan, PlanOptions
from thoraxrt.engine.bundle import MANIFEST, SIGNATURE, Bundle
from thoraxrt.engine.errors import BundleError, PlanError, RequestError
from thoraxrt.engine.plans import CachedPlan, PlanCache, PlanKey
from thoraxrt.export.graph import session_from_graph
from thoraxrt.export.publish import publish, sign_bundle
from thoraxrt.export.triton import CONFIG, triton_from_bundle

# In a process of its own: Triton's protobuf package registers names that other protos register too.
PARSE = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

config = text_format.Parse(open(sys.argv[1]).read(), ModelConfig())
print(json_format.MessageToJson(config, preserving_proto_field_name=True))
"""

TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}


def config_of(model: Path) -> dict[str, Any]:
    pytest.importorskip("tritonclient", reason="Triton's schema is in tritonclient")
    command = [sys.executable, "-c", PARSE, str(model / CONFIG)]
    config: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return config


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_config_says_what_the_graph_is(precision: str, sample_bundle: Bundle, tmp_path: Path) -> None:
    model = triton_from_bundle(sample_bundle, tmp_path, precision=precision, batch=6)
    assert model == tmp_path / "sample"
    assert files_of(model) == {CONFIG, "labels.txt", MANIFEST, "1/model.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]
    config = config_of(model)
    assert (config["platform"], config["max_batch_size"]) == ("onnxruntime_onnx", 6)
    assert config["instance_group"] == [{"count": 1}]  # KIND_AUTO, the schema's zero: a GPU where there is one
    assert int(config["dynamic_batching"]["max_queue_delay_microseconds"]) == 1000
    assert config["parameters"] == {
        "manifest_sha256": {"string_value": sample_bundle.sha256},
        "precision": {"string_value": precision},
    }
    assert config["output"][0]["label_filename"] == "labels.txt"
    assert (model / "labels.txt").read_text().splitlines() == list(sample_bundle.manifest.labels)

    session = session_from_graph((model / "1" / "model.onnx").read_bytes())
    for said, tensors in ((config["input"], session.get_inputs()), (config["output"], session.get_outputs())):
        assert [(t["name"], t["data_type"]) for t in said] == [(t.name, TYPES[t.type]) for t in tensors]
    assert [int(dim) for dim in config["input"][0]["dims"]] == session.get_inputs()[0].shape[1:]
    assert [warm["batch_size"] for warm in config["model_warmup"]] == [1, 2, 4, 6]
    for warm in config["model_warmup"]:
        image = warm["inputs"]["image"]
        assert (image["data_type"], image["zero_data"]) == ("TYPE_UINT8", True)
        shape = (warm["batch_size"], *map(int, image["dims"]))
        for said, output in zip(config["output"], session.run(None, {"image": np.zeros(shape, np.uint8)}), strict=True):
            assert output.shape == (warm["batch_size"], *map(int, said["dims"]))


def test_the_defaults_and_the_signature(sample_bundle: Bundle, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    signed = tmp_path / "chexnet.bundle"
    publish({file.name: file.read_bytes() for file in sample_bundle.path.iterdir()}, signed, replace=False)
    sign_bundle(Bundle.open(signed), keys[0])
    model = triton_from_bundle(Bundle.open(signed), tmp_path / "models" / "production")
    assert (model / SIGNATURE).read_bytes() == (signed / SIGNATURE).read_bytes()
    assert (model / "1" / "model.onnx").read_bytes() == (signed / "model.fp32.onnx").read_bytes()
    config = config_of(model)
    assert config["max_batch_size"] == 32
    assert [warm["batch_size"] for warm in config["model_warmup"]] == [1, 2, 4, 8, 16, 32]


def test_the_recommended_precision_is_written(sample_bundle: Bundle, tmp_path: Path) -> None:
    manifest = json.loads((sample_bundle.path / MANIFEST).read_bytes())
    manifest["recommended"] = {"backend": "openvino", "precision": "bf16"}  # arithmetic on the FP32 graph
    files = {file.name: file.read_bytes() for file in sample_bundle.path.iterdir()}
    publish({**files, MANIFEST: json.dumps(manifest).encode()}, tmp_path / "x.bundle", replace=False)
    config = config_of(triton_from_bundle(Bundle.open(tmp_path / "x.bundle"), tmp_path))
    assert config["parameters"]["precision"] == {"string_value": "fp32"}


def plan_of(bundle: Bundle, cache: PlanCache, runtime: str = "tensorrt", **options: Any) -> CachedPlan:
    """A plan in the cache, of bytes that only Triton would read."""
    key = PlanKey(
        onnx_sha256=bundle.manifest.files["model.fp16.onnx"].sha256,
        precision="fp16",
        runtime=runtime,
        runtime_version="10.13.0",
        platform="linux-x86_64",
        device="NVIDIA L4",
        options=PlanOptions(targets=("sm89",), **options),
    )
    return cache.store(key, Plan(data=b"plan", layers=LayerTypes(convolutions={}, layers={}), timing_cache=None))


@pytest.mark.parametrize(
    ("buckets", "batching"), [((1, 8, 32), False), ((1, 2, 3, 4), True), ((1,), True), ((8,), False)]
)
def test_a_plan_names_its_profiles_and_batches_only_what_it_can(
    buckets: tuple[int, ...], batching: bool, sample_bundle: Bundle, tmp_path: Path
) -> None:
    plan = plan_of(sample_bundle, PlanCache(tmp_path / "cache"), buckets=buckets)
    model = triton_from_bundle(sample_bundle, tmp_path / "models", plan=plan)
    assert files_of(model) == {CONFIG, "labels.txt", MANIFEST, "1/model.plan"}
    assert (model / "1" / "model.plan").read_bytes() == b"plan"
    config = config_of(model)
    assert (config["platform"], config["max_batch_size"]) == ("tensorrt_plan", buckets[-1])
    profiles = [str(index) for index in range(len(buckets))]
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "profile": profiles}]
    assert ("dynamic_batching" in config) is batching
    assert [warm["batch_size"] for warm in config["model_warmup"]] == list(buckets)
    assert config["parameters"]["precision"] == {"string_value": "fp16"}


def test_plans_that_triton_cannot_run(sample_bundle: Bundle, tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "cache")
    for plan, complaint in (
        (plan_of(sample_bundle, cache, "tensorrt_rtx"), "made with tensorrt_rtx, Triton runs plans of tensorrt"),
        (plan_of(sample_bundle, cache, strip_weights=True), "has no weights"),
    ):
        with pytest.raises(RequestError, match=complaint):
            triton_from_bundle(sample_bundle, tmp_path, plan=plan)
    plan = plan_of(sample_bundle, cache)
    other = plan._replace(
        record=msgspec.structs.replace(plan.record, key=msgspec.structs.replace(plan.record.key, onnx_sha256="0" * 64))
    )
    with pytest.raises(BundleError, match=r"compiled from a graph that .* does not hold"):
        triton_from_bundle(sample_bundle, tmp_path, plan=other)
    for options in ({"precision": "fp32"}, {"batch": 8}):
        with pytest.raises(RequestError, match="leave out --precision and --batch"):
            triton_from_bundle(sample_bundle, tmp_path, plan=plan, **options)
    with pytest.raises(BundleError, match=r"holds no model\.int8\.onnx"):
        triton_from_bundle(sample_bundle, tmp_path, precision="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_only_a_model_of_ours_is_replaced_and_only_when_asked(sample_bundle: Bundle, tmp_path: Path) -> None:
    model = triton_from_bundle(sample_bundle, tmp_path)
    with pytest.raises(BundleError, match="--replace"):
        triton_from_bundle(sample_bundle, tmp_path, precision="fp16")
    triton_from_bundle(sample_bundle, tmp_path, precision="fp16", replace=True)
    assert config_of(model)["parameters"]["precision"] == {"string_value": "fp16"}
    bundle = tmp_path / "elsewhere" / "nosuffix"
    publish({file.name: file.read_bytes() for file in sample_bundle.path.iterdir()}, bundle, replace=False)
    with pytest.raises(BundleError, match=r"it has no config\.pbtxt"):  # the model would take the bundle's own place
        triton_from_bundle(Bundle.open(bundle), bundle.parent, replace=True)
    Bundle.open(bundle).verify()


def test_a_label_that_labels_txt_cannot_hold(sample_bundle: Bundle, tmp_path: Path) -> None:
    text = (sample_bundle.path / MANIFEST).read_text().replace('"Mass"', '"Ma\\nss"')
    files = {file.name: file.read_bytes() for file in sample_bundle.path.iterdir()}
    publish({**files, MANIFEST: text.encode()}, tmp_path / "x.bundle", replace=False)
    with pytest.raises(RequestError, match="line break"):
        triton_from_bundle(Bundle.open(tmp_path / "x.bundle"), tmp_path)


def test_the_command_takes_a_plan_from_this_machines_cache(
    sample_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THORAXRT_CACHE", str(tmp_path / "cache"))
    plan = plan_of(sample_bundle, PlanCache(tmp_path / "cache"), buckets=(1, 8))
    arguments = ["export-triton", str(sample_bundle.path), str(tmp_path / "models"), "--plan", str(plan.folder)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert config_of(tmp_path / "models" / "sample")["max_batch_size"] == 8
    (plan.folder / "engine.plan").chmod(0o644)
    (plan.folder / "engine.plan").write_bytes(b"plon")
    assert isinstance(CliRunner().invoke(app, [*arguments, "--replace"]).exception, PlanError)
