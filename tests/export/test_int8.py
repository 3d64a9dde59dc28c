"""INT8 end to end on the sample network: the accuracy bar, what is written down, repeating it, and three runtimes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thoraxrt.engine.backends import open_backend
from thoraxrt.engine.backends.tensorrt_plan import PlanOptions, plan_from_onnx
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import DatasetError, RequestError
from thoraxrt.engine.postprocess import Sigmoid
from thoraxrt.engine.preprocess import Exact, PreprocessSpec
from thoraxrt.export.agreement import agreement
from thoraxrt.export.bundle import ExportOptions, export_bundle
from thoraxrt.export.calibrate import Part, parts_from_path
from thoraxrt.export.int8 import Ranges, int8_from_file
from thoraxrt.export.phantoms import PLANTED, write_phantoms
from thoraxrt.export.sample import SAMPLE_BOXES, SAMPLE_CHECKPOINT
from thoraxrt.export.source import CHEXNET

PHANTOMS = 400


class Exported(NamedTuple):
    bundle: Bundle
    judge: Part


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Two thirds of the patients are kept for the judge: each planted finding is then there 20 times and AUROC a hard gate."""
    folder = tmp_path_factory.mktemp("int8")
    write_phantoms(folder / "phantoms", PHANTOMS, 20180)
    names = [path.name for path in sorted((folder / "phantoms" / "images").iterdir())]
    for file, kept in (("train_val_list.txt", True), ("test_list.txt", False)):
        chosen = [name for name in names if (int(name[:8]) % 3 == 0) == kept]
        (folder / "phantoms" / file).write_text("\n".join(chosen))
    options = ExportOptions(
        precisions=("fp32", "fp16", "int8"), boxes=SAMPLE_BOXES, calibrate=folder / "phantoms", method="minmax"
    )
    bundle = export_bundle(SAMPLE_CHECKPOINT, folder / "sample.bundle", options)
    return Exported(bundle, parts_from_path(folder / "phantoms").judge)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_bar_is_met_on_phantoms_that_nothing_was_chosen_on(precision: str, exported: Exported) -> None:
    result = exported.bundle.manifest.agreement[precision]
    assert result.images == len(exported.judge)
    verdicts = {finding.finding: finding.verdict for finding in result.findings}
    assert verdicts == dict.fromkeys(PLANTED, "within")  # none is 'cannot tell'
    assert result.meets_bar


def test_the_manifest_says_what_was_done_on_which_images(exported: Exported) -> None:
    manifest = exported.bundle.manifest
    exported.bundle.verify()
    assert {"model.int8.onnx", "ranges.json", "sensitivity.json", "sensitivity.png"} <= set(manifest.files)
    calibration = manifest.calibration
    assert calibration is not None
    assert calibration.method == "minmax"
    assert calibration.images["judge"] == tuple(sample.sha256 for sample in exported.judge.samples)
    seen = [sha256 for part in calibration.images.values() for sha256 in part]
    assert len(seen) == len(set(seen))
    assert calibration.quantised == calibration.layers - len(manifest.kept_in_fp32["int8"])
    costs = msgspec.json.decode(exported.bundle.read("sensitivity.json"))["costs"]
    assert len(costs) == calibration.layers
    assert all(cost["logit_error"] > 0 and cost["auroc_change"] >= 0 for cost in costs)
    assert exported.bundle.read("sensitivity.png").startswith(b"\x89PNG")


def test_the_ranges_repeat_the_graph_byte_for_byte_without_an_image(exported: Exported, tmp_path: Path) -> None:
    ranges = exported.bundle.path / "ranges.json"
    again = export_bundle(
        SAMPLE_CHECKPOINT,
        tmp_path / "again.bundle",
        ExportOptions(precisions=("fp32", "int8"), calibrate=ranges),
    )
    assert again.read("model.int8.onnx") == exported.bundle.read("model.int8.onnx")
    assert again.read("ranges.json") == exported.bundle.read("ranges.json")
    before, after = exported.bundle.manifest.calibration, again.manifest.calibration
    assert before is not None
    assert not before.reused
    assert after == msgspec.structs.replace(before, reused=True)
    assert again.manifest.agreement == {}  # nothing was judged here


def test_ranges_of_another_network_or_no_ranges_are_refused(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load_from_string(exported.bundle.read("model.fp32.onnx"))
    ranges = msgspec.json.decode(exported.bundle.read("ranges.json"), type=Ranges)
    (tmp_path / "other.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(ranges, fp32_sha256="0" * 64)))
    (tmp_path / "broken.json").write_bytes(b'{"scales": 3}')
    with pytest.raises(DatasetError, match="another geometry"):
        int8_from_file(model, PreprocessSpec(resize=Exact(width=224, height=224)), exported.bundle.path / "ranges.json")
    with pytest.raises(RequestError, match="leave the method out"):
        ExportOptions(precisions=("fp32", "int8"), calibrate=Path("ranges.json"), method="mse")
    for name, message in (
        ("other", "another FP32 graph"),
        ("broken", r"is no ranges\.json"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(DatasetError, match=message):
            int8_from_file(model, CHEXNET, tmp_path / f"{name}.json")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_ranges_are_refused_or_make_a_sound_graph(
    exported: Exported, tmp_path: Path, data: st.DataObject
) -> None:
    model = onnx.load_from_string(exported.bundle.read("model.fp32.onnx"))
    ranges = json.loads(exported.bundle.read("ranges.json"))
    junk = st.sampled_from([None, -1, 0, 1e300, 10**30, "x", [], {}, [99], {"x": 1.0}, True, float("inf")])
    for _ in range(data.draw(st.integers(1, 3))):
        part = ranges
        while isinstance(part, dict) and part:
            holder, key = part, data.draw(st.sampled_from(sorted(part)))
            part = part[key]
            if data.draw(st.booleans()):
                break
        if data.draw(st.booleans()):
            del holder[key]
        else:
            holder[key] = data.draw(junk)
    (tmp_path / "ranges.json").write_text(json.dumps(ranges))
    with contextlib.suppress(DatasetError):  # anything else is a crash
        onnx.checker.check_model(int8_from_file(model, CHEXNET, tmp_path / "ranges.json").model)


def test_without_images_int8_is_refused_with_the_reason() -> None:
    with pytest.raises(RequestError, match="random data would give random ranges"):
        ExportOptions(precisions=("fp32", "int8"))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_each_runtime_executes_it_within_the_bar(backend: str, exported: Exported) -> None:
    manifest = exported.bundle.manifest
    images = np.stack(list(Part(exported.judge.samples[:32]).inputs(manifest.preprocess)))
    logits = {}
    for precision in ("fp32", "int8"):
        runtime = open_backend(exported.bundle, backend, precision)
        logits[precision] = runtime.run(images).logits
        runtime.close()
    result = agreement(logits["int8"], logits["fp32"], Sigmoid(), manifest.labels, None)
    assert result.meets_bar
    assert result.mean_error > 0  # INT8 was executed


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_sees_the_types_that_the_manifest_says(precision: str, exported: Exported) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = exported.bundle.read(f"model.{precision}.onnx")
    convolutions = sum(node.op_type == "Conv" for node in onnx.load_from_string(graph).graph.node)
    seen = plan_from_onnx(graph, PlanOptions(targets=("sm86",))).layers.convolutions
    calibration = exported.bundle.manifest.calibration
    assert calibration is not None
    expected = {
        "fp32": {"fp32": convolutions},
        "fp16": {"fp16": convolutions - 1, "fp32": 1},  # the CAM's
        "int8": {"int8": calibration.quantised, "fp32": convolutions - calibration.quantised},
    }
    assert seen == expected[precision]
