"""Plans through the TensorRT that is installed, and the calls to the full one against its recorded signatures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from thoraxrt.engine.backends import tensorrt_plan
from thoraxrt.engine.backends.tensorrt_plan import (
    Device,
    Flavour,
    LayerTypes,
    PlanOptions,
    current_device,
    installed_flavour,
    listening,
    plan_from_onnx,
    supported_options,
)
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendError, BackendUnavailableError, RequestError

SM86 = PlanOptions(buckets=(1, 4), targets=("sm86",))


@pytest.fixture
def no_gpu() -> None:
    try:
        pytest.skip(f"there is a GPU here, {current_device().name}: nothing is refused for want of one")
    except BackendUnavailableError:
        return


def quantised_graph() -> onnx.ModelProto:
    """Float stem, then a convolution in INT8: symmetric, per channel, bias in float."""
    random = np.random.default_rng(0)
    initializers = {
        "stem_weight": random.normal(size=(8, 1, 3, 3)).astype(np.float32),
        "scale": np.float32(0.05),
        "zero": np.int8(0),
        "weight": random.integers(-127, 128, (16, 8, 3, 3), np.int8),
        "weight_scale": random.uniform(0.001, 0.01, 16).astype(np.float32),
        "weight_zero": np.zeros(16, np.int8),
        "bias": random.normal(size=16).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "stem_weight"], ["features"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["features"], ["positive"], "relu"),
        helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["codes"], "quantise"),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"], "dequantise"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], "weights", axis=0),
        helper.make_node("Conv", ["values", "w", "bias"], ["out"], "conv", pads=[1] * 4),
    ]
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, 32, 32])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 16, 32, 32])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = [node for node in model.graph.node if node.name == name]
    return found


def layers(graph: bytes) -> LayerTypes:
    return plan_from_onnx(graph, SM86).layers


@pytest.mark.usefixtures("rtx")
def test_convolutions_are_counted_by_the_type_they_compute_in(sample_bundle: Bundle) -> None:
    single, half = (layers(sample_bundle.read(f"model.{name}.onnx")) for name in ("fp32", "fp16"))
    count = sum(single.convolutions.values())
    assert single.convolutions == {"fp32": count}
    assert half.convolutions == {"fp16": count - 1, "fp32": 1}  # the CAM
    assert half.layers["CAST UINT8 -> HALF"] == 1
    assert half.layers["CONVOLUTION HALF -> HALF"] == count - 1
    quantised = layers(quantised_graph().SerializeToString())
    assert quantised.convolutions == {"fp32": 1, "int8": 1}
    assert str(quantised) == "convolutions by the graph's types: 1 fp32, 1 int8"
    assert quantised.layers["QUANTIZE FLOAT, FLOAT, FLOAT -> INT8"] == 1


@pytest.mark.usefixtures("rtx")
def test_a_convolution_with_one_quantised_side_is_not_int8() -> None:
    model = quantised_graph()
    node(model, "conv").input[0] = "positive"
    assert layers(model.SerializeToString()).convolutions == {"fp32": 2}
    model = quantised_graph()
    wide = np.random.default_rng(1).normal(size=(16, 8, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(wide, "wide"))
    node(model, "conv").input[1] = "wide"
    assert layers(model.SerializeToString()).convolutions == {"fp32": 2}


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_plans_compile_without_a_gpu_and_repeat(
    precision: str, sample_bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = (
        quantised_graph().SerializeToString()
        if precision == "int8"
        else sample_bundle.read(sample_bundle.graph_name(precision))
    )
    plan = plan_from_onnx(graph, SM86)
    assert len(plan.data) > 100_000
    assert plan.timing_cache is None
    assert plan_from_onnx(graph, SM86).data == plan.data
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("rtx")
def test_one_plan_covers_several_gpus_and_each_bucket_adds_to_it() -> None:
    graph = quantised_graph().SerializeToString()
    targets = ("sm86", "sm89", "sm120")
    one, three = (plan_from_onnx(graph, PlanOptions(buckets=b, targets=targets)).data for b in ((1,), (1, 8, 32)))
    assert len(three) > 1.5 * len(one)
    assert len({plan_from_onnx(graph, PlanOptions(buckets=(1,), targets=(t,))).data for t in ("sm75", "sm86")}) == 2


def parse(flavour: Flavour) -> Any:
    with listening(flavour) as logger:
        return tensorrt_plan._parse(quantised_graph().SerializeToString(), flavour, logger)


H100 = Device("NVIDIA H100", "sm90")  # TensorRT-RTX has no name for sm90


def test_the_configuration_is_what_the_options_say(rtx: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = rtx.module
    parsed = parse(rtx)
    options = PlanOptions(targets=("sm86", "sm120"), optimization_level=1, workspace_mib=64, strip_weights=True)
    config = tensorrt_plan._builder_config(parsed, options, rtx)
    assert [config.get_compute_capability(index).name for index in range(2)] == ["SM86", "SM120"]
    assert config.num_optimization_profiles == 3
    assert config.builder_optimization_level == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.get_flag(trt.BuilderFlag.STRIP_PLAN)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else no stream may capture it
    assert not config.get_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    monkeypatch.setattr(tensorrt_plan, "current_device", lambda index: [Device("NVIDIA A10", "sm86"), H100][index])
    here = supported_options(PlanOptions(), rtx, 1)
    assert here.targets == ("sm90",)  # in the key, though it has no name
    assert supported_options(here, rtx, 1) == here
    assert tensorrt_plan._builder_config(parsed, here, rtx).get_compute_capability(0) == trt.ComputeCapability.CURRENT
    for targets in (("sm90",), ("sm86", "sm90")):
        with pytest.raises(RequestError, match=r"target sm90: .* or without --target for this machine's GPU"):
            supported_options(PlanOptions(targets=targets), rtx, 0)


@pytest.mark.usefixtures("no_gpu")
def test_a_portable_plan_names_no_target_to_tensorrt_rtx(rtx: Flavour) -> None:
    options = supported_options(PlanOptions(buckets=(1,), hardware_compatible=True), rtx)
    assert options.targets == ("sm80", "sm86", "sm89", "sm120", "sm121")
    assert supported_options(options, rtx) == options
    assert tensorrt_plan._builder_config(parse(rtx), options, rtx).num_compute_capabilities == 0
    graph = quantised_graph().SerializeToString()
    named = plan_from_onnx(graph, msgspec.structs.replace(options, hardware_compatible=False)).data
    assert plan_from_onnx(graph, options).data != named  # it covers more than those
    with pytest.raises(RequestError, match="name no --target with it"):
        supported_options(PlanOptions(targets=("sm86",), hardware_compatible=True), rtx)


@pytest.mark.usefixtures("rtx")
def test_parser_errors_name_the_node_and_the_remedy(capfd: pytest.CaptureFixture[str]) -> None:
    asymmetric, unknown, mixed, integer_bias = (quantised_graph() for _ in range(4))
    for weight in asymmetric.graph.initializer:
        if weight.name == "zero":
            weight.CopyFrom(numpy_helper.from_array(np.asarray(np.int8(3)), "zero"))
    node(unknown, "relu").op_type = "Sharpen"
    node(mixed, "relu").op_type = "Add"
    node(mixed, "relu").input.append("half")
    mixed.graph.initializer.append(numpy_helper.from_array(np.ones((1, 8, 32, 32), np.float16), "half"))
    integer_bias.graph.node.insert(
        0, helper.make_node("DequantizeLinear", ["bias_codes", "weight_scale"], ["b"], "bias_values", axis=0)
    )
    integer_bias.graph.initializer.append(numpy_helper.from_array(np.zeros(16, np.int32), "bias_codes"))
    node(integer_bias, "conv").input[2] = "b"
    for model, named, remedy in (
        (asymmetric, r"node 3, 'quantise' \(QuantizeLinear\)", "zero points of 0"),
        (unknown, r"node 2, 'relu' \(Sharpen\)", "no such operator"),
        (mixed, r"node 2, 'relu' \(Add\)", "put a Cast"),
        (integer_bias, r"node 0, 'bias_values' \(DequantizeLinear\)", "leave biases in float"),
    ):
        with pytest.raises(BackendError, match=rf"{named}.*{remedy}"):
            plan_from_onnx(model.SerializeToString(), SM86)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("rtx")
def test_bytes_that_are_no_graph_and_a_workspace_too_small_are_refused() -> None:
    graph = quantised_graph().SerializeToString()
    with pytest.raises(BackendError, match="cannot read the graph"):
        plan_from_onnx(graph[:500], SM86)
    with pytest.raises(BackendError, match="0 inputs"):
        plan_from_onnx(b"", SM86)
    with pytest.raises(BackendError, match=r"cannot build the plan: .*workspace"):
        plan_from_onnx(graph, msgspec.structs.replace(SM86, workspace_mib=1))
    assert plan_from_onnx(graph, SM86).data  # an error leaves nothing behind


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"buckets": ()}, "batch buckets"),
        ({"buckets": (0, 1)}, "batch buckets"),
        ({"targets": ("8.6",)}, "target 8.6"),
        ({"targets": ("sm86", "ampere")}, "target ampere"),
        ({"optimization_level": 6}, "optimization level 6"),
        ({"workspace_mib": 0}, "workspace of 0 MiB"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanOptions(**values)


def test_options_do_not_depend_on_order() -> None:
    options = PlanOptions(buckets=(32, 1, 8, 1), targets=("sm120", "sm86", "sm86"))
    assert options == PlanOptions(buckets=(1, 8, 32), targets=("sm86", "sm120"))
    assert options.targets == ("sm86", "sm120")  # by number, not by letter


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"version_compatible": True}, RequestError, "version compatibility: tensorrt_rtx"),
        ({"strip_weights": True}, BackendUnavailableError, "weight stripping needs a GPU"),
        ({"targets": ("sm86", "sm87")}, RequestError, "target sm87: .* sm86, sm89"),
        ({"targets": ()}, BackendUnavailableError, "without --target needs a GPU"),
    ],
)
def test_options_that_the_flavour_lacks_are_refused_by_name_before_building(
    values: dict[str, Any], error: type[Exception], message: str, rtx: Flavour
) -> None:
    options = msgspec.structs.replace(SM86, **values)
    with pytest.raises(error, match=message):
        supported_options(options, rtx)
    with pytest.raises(error, match=message):
        plan_from_onnx(b"never parsed", options)


def test_full_tensorrt_compiles_for_the_gpu_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Flavour(None, "tensorrt", "10.3.0")
    monkeypatch.setattr(tensorrt_plan, "current_device", lambda index: Device("NVIDIA A10", "sm86"))
    options = PlanOptions(version_compatible=True, hardware_compatible=True, strip_weights=True)
    assert supported_options(options, full) == msgspec.structs.replace(options, targets=("sm86",))
    assert supported_options(PlanOptions(targets=("sm86",)), full).targets == ("sm86",)
    with pytest.raises(RequestError, match=r"target sm89: tensorrt 10\.3\.0 compiles for the GPU it runs on, sm86"):
        supported_options(PlanOptions(targets=("sm89",)), full)


def test_the_installed_flavour_is_found_and_an_old_or_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    full = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", full)
    monkeypatch.setattr(full, "__version__", "10.3.0", raising=False)
    assert installed_flavour() == (full, "tensorrt", "10.3.0")  # before tensorrt_rtx
    for version in ("8.6.1", "10.2.0", "12.0.0.1"):
        monkeypatch.setattr(full, "__version__", version)
        with pytest.raises(BackendUnavailableError, match=rf"{version} is installed; expected 10.3 to 11"):
            installed_flavour()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailableError, match="TensorRT is not installed"):
        installed_flavour()


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return DEVICES ? 0 : 100; }
int cuDeviceGet(int *device, int ordinal) { *device = 6 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Paper GPU", length); return device != 7; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 12 : attribute == 76 ? 1 : -1;
    return device != 7;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build a driver's stand-in with")
@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (2, "Device(name='Paper GPU', architecture='sm121')"),
        (1, "there is no cuda:1: the GPUs that this process sees end with cuda:0"),
        (0, "cuDeviceGetCount gives error 100"),
    ],
)
def test_the_gpu_is_asked_from_the_driver(devices: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-DDEVICES={devices}", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"],
        check=True,
    )
    code = (
        "from thoraxrt.engine.backends.tensorrt_plan import current_device\n"
        "from thoraxrt.engine.errors import ThoraxrtError\n"
        "try:\n    print(current_device(1))\nexcept ThoraxrtError as error:\n    print(error)"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said in done.stdout


class Recorder:
    """Passes everything on to a TensorRT object and notes each member used, with how many arguments."""

    def __init__(self, real: Any, owner: str, used: set[tuple[str, str, int | None]]) -> None:
        self.__dict__.update(_real=real, _owner=owner, _used=used)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if self._owner and not name.startswith("__") and not callable(value):
            self._used.add((self._owner, name, None))
        if name == "ILogger":  # subclassed by our logger
            return value
        if isinstance(value, type) and hasattr(value, "__members__"):
            return Recorder(value, name, self._used)
        if callable(value):
            return lambda *arguments: self._call(value, name, arguments)
        return self._wrapped(value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._used.add((self._owner, name, None))
        setattr(self._real, name, value)

    def __bytes__(self) -> bytes:
        return bytes(self._real)

    def _call(self, value: Any, name: str, arguments: tuple[Any, ...]) -> Any:
        self._used.add((self._owner or name, name if self._owner else "__init__", len(arguments)))
        bare = [a._real if isinstance(a, Recorder) else a for a in arguments]
        return self._wrapped(value(*bare))

    def _wrapped(self, value: Any) -> Any:
        kind = type(value)
        plain = hasattr(kind, "__members__") or kind.__name__ == "Dims" or not kind.__module__.startswith("tensorrt")
        return value if plain else Recorder(value, kind.__name__, self._used)


SIGNATURES = Path(__file__).with_name("tensorrt_signatures.json")
"""By version: members of classes and the first line of their documentation, read from NVIDIA's wheels
tensorrt_cu12_bindings 10.3.0 and tensorrt_cu13_bindings 11.4.0.106 (loaded with their libraries
stubbed); only what `thoraxrt.engine.backends.tensorrt_plan` uses is kept."""


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops.*:DeprecationWarning")
def test_every_call_made_to_full_tensorrt_exists_in_its_oldest_and_newest_version(
    rtx: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[tuple[str, str, int | None]] = set()
    full = Flavour(Recorder(rtx.module, "", used), "tensorrt", "10.3.0")
    monkeypatch.setattr(tensorrt_plan, "installed_flavour", lambda: full)
    monkeypatch.setattr(tensorrt_plan, "current_device", lambda index: Device("NVIDIA A10", "sm86"))
    graph = quantised_graph()
    plan = plan_from_onnx(graph.SerializeToString(), PlanOptions(hardware_compatible=True, workspace_mib=4096))
    assert plan.timing_cache is not None
    node(graph, "relu").op_type = "Sharpen"
    with pytest.raises(BackendError, match="Sharpen"):
        plan_from_onnx(graph.SerializeToString(), PlanOptions())
    with pytest.raises(BackendError, match="lean"):  # as far as RTX goes
        plan_from_onnx(quantised_graph().SerializeToString(), PlanOptions(version_compatible=True))
    every_option = PlanOptions(targets=("sm86",), strip_weights=True, version_compatible=True)
    tensorrt_plan._builder_config(parse(full), every_option, full)

    assert {
        ("IBuilderConfig", "set_timing_cache", 2),
        ("IBuilderConfig", "hardware_compatibility_level", None),
        ("BuilderFlag", "STRIP_PLAN", None),
        ("ITimingCache", "serialize", 0),
        ("ParserError", "node_name", 0),
    } <= used
    recorded = json.loads(SIGNATURES.read_text())
    assert list(recorded) == ["10.3.0", "11.4.0.106"]
    for version, classes in recorded.items():
        for owner, member, arguments in sorted(used, key=str):
            assert member in classes.get(owner, {}), f"tensorrt {version} has no {owner}.{member}, or it is unrecorded"
            signature = classes[owner][member]
            if arguments is not None and "(self" in signature:
                parameters = signature.partition("(self")[2].partition(") -> ")[0].split(", ")[1:]
                required = [parameter for parameter in parameters if " = " not in parameter]
                assert len(required) <= arguments <= len(parameters), f"tensorrt {version}: {signature}"
