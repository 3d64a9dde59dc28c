"""The TensorRT backend without a GPU: its calls against NVIDIA's signatures, its results against ONNX Runtime."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from thoraxrt.engine import plans
from thoraxrt.engine.backends import NetworkOutput, onnxruntime, tensorrt, tensorrt_plan
from thoraxrt.engine.backends.tensorrt_plan import Device, Flavour, LayerTypes, Plan, PlanOptions, current_device
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendError, BackendUnavailableError, DeviceMemoryError, RequestError
from thoraxrt.engine.plans import CachedPlan, PlanCache, PlanKey
from thoraxrt.engine.trust import sign

_spec = importlib.util.spec_from_file_location("tensorrt_stand_in", Path(__file__).with_name("tensorrt_stand_in.py"))
assert _spec is not None
assert _spec.loader is not None
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)

A10, L4, H100 = Device("NVIDIA A10", "sm86"), Device("NVIDIA L4", "sm89"), Device("NVIDIA H100", "sm90")
BUCKETS = (1, 4)


class HostGpu:
    """Host memory and queues in place of a GPU's: what is not waited for has not happened."""

    def __init__(self, device: Device, index: int = 0) -> None:
        self.name, self.architecture, self.index = *device, index
        self.held: set[Any] = set()
        self.queues: dict[int, list[Callable[[], object]]] = {}
        self.left: set[Any] | None = None

    def stream(self) -> HostStream:
        return HostStream(self)

    def memory(self, size: int) -> HostMemory:
        return HostMemory(self, size)

    pinned = memory

    def launch(self, stream: int, work: Callable[[], object]) -> None:
        self.queues[stream].append(work)

    def close(self) -> None:
        """Close what it made, as a Gpu does; `left` is what others should have closed before."""
        self.left, self.held = self.held, set()


class HostThing:
    def __init__(self, gpu: HostGpu) -> None:
        self._gpu = gpu
        gpu.held.add(self)

    def close(self) -> None:
        self._gpu.held.discard(self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HostMemory(HostThing):
    def __init__(self, gpu: HostGpu, size: int) -> None:
        super().__init__(gpu)
        self._all = np.full(size + 256, 0xAB, np.uint8)
        start = -self._all.ctypes.data % 256
        self.array, self.address, self.size = self._all[start : start + size], self._all.ctypes.data + start, size


class HostStream(HostThing):
    def __init__(self, gpu: HostGpu) -> None:
        super().__init__(gpu)
        self.handle = len(gpu.queues) + 1
        gpu.queues[self.handle] = []

    def to_device(self, address: int, host_address: int, size: int) -> None:
        self._gpu.launch(self.handle, lambda: ctypes.memmove(address, host_address, size))

    def to_host(self, host_address: int, address: int, size: int) -> None:
        self.to_device(host_address, address, size)

    def synchronize(self) -> None:
        while queue := self._gpu.queues[self.handle]:
            queue.pop(0)()


class Bench:
    """A machine with a GPU, a TensorRT and a plan cache, all of which a test may spoil."""

    def __init__(self, trt: Any, flavour: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trt, self.bundle, self.cache = trt, bundle, PlanCache()
        self.flavour = Flavour(trt, flavour, "10.3.0")
        self.gpus: list[HostGpu] = []
        self.devices = [A10]
        for module in (plans, tensorrt_plan):
            monkeypatch.setattr(module, "installed_flavour", lambda: self.flavour)
            monkeypatch.setattr(module, "current_device", self._device)
        monkeypatch.setattr(tensorrt.Gpu, "open", self._gpu)
        trt.launch = lambda stream, work: self.gpus[-1].launch(stream, work)

    def _device(self, index: int = 0) -> Device:
        if not self.devices:
            raise BackendUnavailableError("no NVIDIA driver here")
        if index >= len(self.devices):
            raise RequestError(f"there is no cuda:{index}")
        return self.devices[index]

    def _gpu(self, index: int) -> HostGpu:
        self.gpus.append(HostGpu(self.devices[index], index))
        return self.gpus[-1]

    def plan(self, precision: str = "fp32", data: bytes = b"a plan", **changes: Any) -> CachedPlan:
        """Keep a plan that fits, but for the changes to its key, options or layers."""
        changed = {name: changes.pop(name) for name in [*changes] if name in PlanOptions.__struct_fields__}
        layers = LayerTypes(convolutions=changes.pop("convolutions", {precision: 3}), layers={})
        key = PlanKey(
            onnx_sha256=self.bundle.manifest.files[Bundle.graph_name(precision)].sha256,
            precision=precision,
            runtime=self.flavour.name,
            runtime_version=self.flavour.version,
            platform=tensorrt_plan.host_platform(),
            device=None if self.flavour.name == "tensorrt_rtx" else A10.name,
            options=msgspec.structs.replace(PlanOptions(buckets=BUCKETS, targets=("sm86",)), **changed),
        )
        return self.cache.store(msgspec.structs.replace(key, **changes), Plan(data, None, layers))

    def open(self, precision: str = "fp32", device: int = 0) -> tensorrt.TensorRTBackend:
        return tensorrt.open(self.bundle, precision, device)

    def refusal(self, precision: str = "fp32", error: type[BackendError] = BackendUnavailableError) -> str:
        """What opening says, having left nothing open."""
        with pytest.raises(error) as refused:
            self.open(precision)
        assert all(gpu.left == set() for gpu in self.gpus[-1:])
        return str(refused.value)


@pytest.fixture
def trt(rtx: Flavour, sample_bundle: Bundle) -> Any:
    return stand_in.StandIn(rtx.module, sample_bundle.read("model.fp32.onnx"), BUCKETS)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THORAXRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def full(trt: Any, sample_bundle: Bundle, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(trt, "tensorrt", sample_bundle, monkeypatch)


@pytest.fixture
def light(trt: Any, sample_bundle: Bundle, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(trt, "tensorrt_rtx", sample_bundle, monkeypatch)


@pytest.fixture(params=["full", "light"])
def bench(request: pytest.FixtureRequest) -> Bench:
    made: Bench = request.getfixturevalue(request.param)
    return made


def images(count: int, bundle: Bundle) -> np.ndarray:
    size = bundle.manifest.preprocess.input_size
    return np.random.default_rng(count).integers(0, 256, (count, 1, size, size), np.uint8)


def same(one: NetworkOutput, other: NetworkOutput) -> bool:
    return all(
        np.allclose(a, b, atol=1e-4) and a.dtype == b.dtype == np.float32 for a, b in zip(one, other, strict=True)
    )


def test_any_batch_runs_in_buckets_and_agrees_with_onnx_runtime(bench: Bench) -> None:
    bench.plan()
    oracle = onnxruntime.open(bench.bundle, "fp32")
    backend = bench.open()
    assert (backend.name, backend.precision) == ("tensorrt", "fp32")
    for count, buckets in ((1, [1]), (3, [4]), (4, [4]), (9, [4, 4, 1]), (2, [4])):
        batch = images(count, bench.bundle)
        output = backend.run(batch)
        assert same(output, oracle.run(batch))
        assert bench.trt.ran[-len(buckets) :] == buckets
        kept = output.logits.copy()
        backend.run(images(4, bench.bundle))
        assert np.array_equal(kept, output.logits)  # no view of buffers that the next batch overwrites
    backend.close()
    backend.close()
    assert bench.gpus[0].held == set()
    with pytest.raises(BackendError, match="closed; open the engine again"):
        backend.run(images(1, bench.bundle))


def test_an_engine_gets_one_piece_of_memory_and_a_context_per_bucket(bench: Bench) -> None:
    bench.plan()
    network = bench.open().network
    assert network.buckets == BUCKETS
    manifest = bench.bundle.manifest
    assert network.cam_shape == (manifest.network.cam_height, manifest.network.cam_width)
    assert network.shapes(4)["cam"] == (4, len(manifest.labels), *network.cam_shape)
    first, second = bench.trt.contexts
    assert first._memory == second._memory
    assert first._memory[1] == bench.trt.activations
    assert json.loads(network.layers()) == {"Layers": []}
    with pytest.raises(BackendError, match="no context for batches of 2: the tensorrt backend is open for 1, 4"):
        network.enqueue(2, 1)
    network.close()
    with pytest.raises(BackendError, match="it is closed"):
        network.enqueue(1, 1)


def test_a_vouched_for_plan_reaches_the_runtime_as_it_was_compiled(bench: Bench) -> None:
    bench.plan(data=b"what was compiled")
    bench.open()
    assert bench.trt.deserialised == [b"what was compiled"]
    assert bench.trt.host_code_allowed == [False]


def test_of_the_plans_that_fit_the_least_portable_runs_then_the_newest(full: Bench) -> None:
    made = [full.plan(data=name, optimization_level=level) for level, name in enumerate((b"old", b"new", b"older"))]
    made.append(full.plan(data=b"newest, and portable", hardware_compatible=True))
    full.plan(data=b"of another precision", precision="fp16")
    for plan, seconds in zip(made, (2, 3, 1, 4), strict=True):
        os.utime(plan.folder / "plan.json", (seconds, seconds))
    full.open()
    shutil.rmtree(made[1].folder)
    full.open()
    assert full.trt.deserialised == [b"new", b"old"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"targets": ("sm89",), "device": L4.name}, "made for sm89, this GPU is sm86"),
        ({"device": "NVIDIA RTX A4000"}, "tuned for NVIDIA RTX A4000, this GPU is NVIDIA A10"),
        ({"runtime_version": "10.2.0"}, "made with tensorrt 10.2.0, installed is tensorrt 10.3.0"),
        ({"runtime": "tensorrt_rtx"}, "made with tensorrt_rtx 10.3.0, installed is tensorrt 10.3.0"),
        ({"platform": "windows-amd64"}, "made for windows-amd64, this is linux"),
        ({"precision": "fp16"}, "there is none"),
        ({"convolutions": {"fp16": 3}}, "compiled for fp32 and convolves in fp16"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_it_is_loaded(
    changes: dict[str, Any], reason: str, full: Bench
) -> None:
    full.plan(**changes)
    said = full.refusal()
    assert reason in said
    assert f"`thoraxrt compile {full.bundle.path} --precision fp32` makes one" in said
    assert "runs fp32 on NVIDIA A10" in said
    assert full.trt.deserialised == []


@pytest.mark.parametrize("name", ["engine.plan", "plan.json", "plan.tag"])
def test_a_plan_that_was_tampered_with_is_refused_before_it_is_loaded(name: str, full: Bench) -> None:
    path = full.plan().folder / name
    path.write_bytes(path.read_bytes()[:-2] + b"!!")
    assert name in full.refusal()
    assert full.trt.deserialised == []
    full.plan(data=b"a sound one", optimization_level=5)
    full.open()
    assert full.trt.deserialised == [b"a sound one"]


def test_a_shipped_plan_runs_where_the_bundles_keys_vouch_for_it(
    full: Bench, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    made = full.plan(data=b"shipped")
    full.cache.ship(made, private)  # in place: its tag is gone
    assert "does not vouch" in full.refusal()
    signed = tmp_path / "signed.bundle"
    signed.mkdir()
    for file in full.bundle.path.iterdir():
        (signed / file.name).symlink_to(file)
    (signed / "manifest.sig").write_bytes(sign((signed / "manifest.json").read_bytes(), private))
    tensorrt.open(Bundle.open(signed, [public]), "fp32")
    assert full.trt.deserialised == [b"shipped"]


def test_a_machine_without_a_gpu_or_without_that_one_says_so(bench: Bench) -> None:
    bench.plan()
    with pytest.raises(RequestError, match="there is no cuda:1"):
        bench.open(device=1)
    bench.devices.clear()
    assert bench.refusal() == "no NVIDIA driver here"
    assert bench.gpus == []


def test_the_gpu_that_is_named_decides_which_plan_fits(full: Bench) -> None:
    full.devices = [A10, L4]
    full.plan(data=b"of the A10")
    full.plan(data=b"of the L4", targets=("sm89",), device=L4.name)
    full.open(device=1)
    assert full.gpus[0].index == 1
    assert full.trt.deserialised == [b"of the L4"]


def test_tensorrt_rtx_compiles_a_missing_plan_once_and_says_so(light: Bench, caplog: pytest.LogCaptureFixture) -> None:
    light.trt.buckets = PlanOptions().buckets
    light.plan(targets=("sm89",))
    light.open().close()
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert re.search(r"compiling a plan of .* in fp32 for NVIDIA A10 \(.*made for sm89, this GPU is sm86\)", said)
    caplog.clear()
    light.open().close()
    assert caplog.records == []
    first, second = light.trt.deserialised
    assert first == second
    assert len(first) > 100_000  # a real plan, from the real builder


def test_tensorrt_rtx_compiles_for_the_gpu_that_is_named(light: Bench) -> None:
    light.devices = [A10, L4]
    light.trt.buckets = PlanOptions().buckets
    light.open(device=1)
    (folder,) = light.cache.folders(light.bundle)
    assert light.cache.record(folder).key.options.targets == ("sm89",)


def test_a_gpu_without_a_name_gets_a_plan_of_its_own_or_a_portable_one(light: Bench) -> None:
    try:
        pytest.skip(f"there is a GPU here, {REAL_DEVICE().name}: a plan for it can be built")
    except BackendUnavailableError:
        light.devices = [H100]
    light.trt.buckets = PlanOptions().buckets
    light.open()  # compiling for the GPU that is here fails, since there is none
    (folder,) = light.cache.folders(light.bundle)
    assert light.cache.record(folder).key.options.hardware_compatible
    light.plan(data=b"its own", targets=("sm90",), buckets=PlanOptions().buckets)
    light.open()
    assert light.trt.deserialised[-1] == b"its own"


REAL_DEVICE = current_device


def test_what_tensorrt_rtx_says_of_a_plan_is_asked_before_it_is_loaded(light: Bench) -> None:
    light.plan(data=b"header" * 100)
    light.trt.fail = {"get_engine_validity"}
    light.trt.diagnostics = int(light.trt.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER)
    assert "TensorRT-RTX says that it cannot run here: old cuda driver" in light.refusal()
    light.trt.diagnostics = 0
    assert "cannot run here: something is wrong" in light.refusal()
    assert light.trt.deserialised == []


def test_the_real_runtime_tells_a_plan_from_other_bytes(rtx: Flavour, sample_bundle: Bundle, tmp_path: Path) -> None:
    def refusal(data: bytes) -> str:
        plan: Any = CachedPlan(tmp_path, None, data, b"")
        with tensorrt_plan.listening(rtx) as logger, pytest.raises(BackendError) as refused:
            tensorrt._refuse_invalid(rtx.module.Runtime(logger), plan, rtx.module, logger)
        return str(refused.value)

    assert refusal(b"x" * 1000).endswith("cannot run here: malformed engine")
    try:
        pytest.skip(f"there is a GPU here, {REAL_DEVICE().name}: it may take the plan")
    except BackendUnavailableError:
        options = PlanOptions(buckets=(1,), targets=("sm86",))
        graph = sample_bundle.read("model.fp32.onnx")
        assert "CUDA driver version is insufficient" in refusal(tensorrt_plan.plan_from_onnx(graph, options).data)


@pytest.mark.parametrize(
    "call",
    [
        "deserialize_cuda_engine",
        "create_execution_context",
        "set_optimization_profile_async",
        "set_input_shape",
    ],
)
def test_what_tensorrt_refuses_while_opening_is_said_and_nothing_stays_open(call: str, full: Bench) -> None:
    full.plan()
    full.trt.fail = {call}
    assert re.search(r"TensorRT (cannot|does not) .*: something is wrong", full.refusal())
    full.trt.says = "Error Code 2: OutOfMemory (Requested size was 40.)"
    assert "OutOfMemory" in full.refusal(error=DeviceMemoryError)  # and no other plan is tried
    full.trt.fail = set()
    full.open()


@pytest.mark.parametrize(
    ("changed", "value", "said"),
    [
        (("get_tensor_name", "2"), "heatmap", "its tensors are"),
        (("get_tensor_dtype", "cam"), "HALF", "its tensors are"),
        (("get_tensor_profile_shape", "image"), (4, 1, 320, 320), "its profiles .* 320"),
        (("get_tensor_shape", "logits"), (1, 15), r"logits is \(1, 15\) for batches of 1"),
        (("get_tensor_shape", "cam"), (1, 14, 9, 9), r"cam is \(1, 14, 9, 9\)"),
    ],
)
def test_an_engine_of_another_network_is_refused(changed: tuple[str, str], value: Any, said: str, full: Bench) -> None:
    full.plan()
    full.trt.changed[changed] = getattr(full.trt.DataType, value) if value == "HALF" else value
    assert re.search(f"is not a plan of this bundle's network: {said}.*, expected", full.refusal())


def test_a_batch_that_tensorrt_does_not_enqueue_is_an_error_and_the_next_one_runs(bench: Bench) -> None:
    bench.plan()
    backend = bench.open()
    batch = images(4, bench.bundle)
    before = backend.run(batch)
    bench.trt.fail = {"execute_async_v3"}
    with pytest.raises(BackendError, match="TensorRT did not run a batch of 4: something is wrong"):
        backend.run(batch)
    bench.trt.says = "Cuda Runtime (out of memory)"
    with pytest.raises(DeviceMemoryError, match="out of memory"):
        backend.run(batch)
    bench.trt.fail = set()
    assert same(backend.run(batch), before)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("set_tensor_address", "does not take the address of image"),
        ("is_stream_capturable", "cannot be captured in a CUDA graph with batches of 1"),
    ],
)
def test_a_network_that_cannot_be_bound_or_captured_is_refused(call: str, said: str, light: Bench) -> None:
    light.plan()
    backend = light.open()
    light.trt.fail = {call}
    with pytest.raises(BackendError, match=f"TensorRT {said}: something is wrong"):
        backend.run(images(1, light.bundle))


def test_a_version_compatible_plan_may_bring_its_runtime_and_a_stripped_one_gets_the_bundles_weights(
    full: Bench,
) -> None:
    full.plan(version_compatible=True, strip_weights=True, runtime_version="10.1.0")
    full.open()
    assert full.trt.host_code_allowed == [True]
    assert full.trt.refitted == [full.bundle.read("model.fp32.onnx")]
    for call in ("refit_from_bytes", "refit_cuda_engine"):
        full.trt.fail = {call}
        assert "cannot put the bundle's weights into" in full.refusal()


def test_what_tensorrt_rtx_compiled_is_given_to_the_next_engine_of_that_plan_and_gpu(light: Bench) -> None:
    plan = light.plan()
    light.open().run(images(1, light.bundle))
    kept = b"kernels of [1, 4]"
    (file,) = plan.folder.glob("kernels-*")
    assert file.name == "kernels-NVIDIA-A10.cache"
    light.open()
    assert light.trt.kernels_given == [kept]
    assert light.cache.kernels(plan, A10.name) == kept
    assert light.cache.kernels(plan, L4.name) == b""
    assert light.cache.kernels(plan._replace(plan=b"another"), A10.name) == b""
    assert PlanCache(light.cache.root / "elsewhere").kernels(plan, A10.name) == b""
    assert light.cache.read(plan.folder) == plan
    data = file.read_bytes()
    for wrong in (data[:-1] + b"x", b"0" * 64 + kept, b"", data[:70]):
        file.write_bytes(wrong)
        light.open()
    assert light.trt.kernels_given == [kept]


def test_a_cache_that_cannot_be_written_costs_only_the_kernels(light: Bench, caplog: pytest.LogCaptureFixture) -> None:
    plan = light.plan()
    blocked = plan.folder / "kernels-NVIDIA-A10.cache"
    blocked.mkdir()
    with caplog.at_level(logging.INFO):
        light.open().run(images(1, light.bundle))
    assert "is not kept" in caplog.text
    assert [path.name for path in plan.folder.iterdir() if path.name.startswith(".")] == []


def test_info_says_what_each_precision_lacks(full: Bench) -> None:
    full.plan()
    reasons = tensorrt.precisions(0, full.bundle)
    assert list(reasons) == ["fp32", "bf16", "fp16", "int8"]
    assert reasons["fp32"] is None
    assert "use fp16" in str(reasons["bf16"])
    assert f"(there is none); `thoraxrt compile {full.bundle.path} --precision fp16` makes one" in str(reasons["fp16"])
    assert [name for name, reason in tensorrt.precisions(0).items() if reason is None] == ["fp32", "fp16", "int8"]
    full.devices.clear()
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver here"):
        tensorrt.precisions(0, full.bundle)


def test_info_misses_no_plan_where_one_is_compiled_in_seconds(light: Bench) -> None:
    reasons = tensorrt.precisions(0, light.bundle)
    assert [name for name, reason in reasons.items() if reason is None] == ["fp32", "fp16", "int8"]


def parameters(signature: str) -> set[str]:
    """The names in one line of a binding's documentation, but for `self`."""
    return set(re.findall(r"(\w+): ", signature)) - {"self"}


def overloads(documentation: str) -> list[str]:
    return [line for line in documentation.splitlines() if re.match(r"(\d+\. )?\w+\(self", line)]


STANDING_IN = {
    name: kind for name, kind in vars(stand_in).items() if inspect.isclass(kind) and issubclass(kind, stand_in._Part)
}
ONLY_RTX = {
    "IRuntimeConfig",
    "IRuntimeCache",
    "get_engine_validity",
    "engine_header_size",
    "create_runtime_config",
    "is_stream_capturable",
}
BUILT = {"Runtime": "Runtime", "Refitter": "Refitter", "OnnxParserRefitter": "OnnxParserRefitter"}
ENUMS = {
    "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    "LayerInformationFormat": ["JSON"],
    "TensorIOMode": ["INPUT", "OUTPUT"],
    "DataType": ["UINT8", "FLOAT"],
}


def members() -> Iterator[tuple[str, str, set[str] | None]]:
    """Class, member and parameters (None for a property) of all that the stand-in offers."""
    for owner, kind in STANDING_IN.items():
        for name in dir(kind):
            if name[0] != "_":
                value = inspect.getattr_static(kind, name)
                yield (
                    owner,
                    name,
                    set(inspect.signature(value).parameters) - {"self"} if inspect.isfunction(value) else None,
                )
    for name in BUILT:
        yield name, "__init__", set(inspect.signature(getattr(stand_in.StandIn, name)).parameters) - {"self"}
    for owner, names in ENUMS.items():
        yield from ((owner, name, None) for name in names)


def test_the_stand_in_has_nothing_that_tensorrt_rtx_has_not(rtx: Flavour) -> None:
    seen = list(members())
    assert ("IExecutionContext", "set_input_shape", {"name", "shape"}) in seen
    for owner, name, wanted in seen:
        real = getattr(getattr(rtx.module, owner), name)
        if wanted is not None:
            assert any(wanted <= parameters(line) for line in overloads(real.__doc__)), (
                f"{owner}.{name}: {real.__doc__}"
            )


def test_the_stand_in_has_nothing_that_full_tensorrt_has_not_in_its_oldest_and_newest_version() -> None:
    recorded = json.loads(Path(__file__).with_name("tensorrt_signatures.json").read_text())
    assert list(recorded) == ["10.3.0", "11.4.0.106"]
    for version, classes in recorded.items():
        for owner, name, wanted in members():
            if not {owner, name} & ONLY_RTX:
                assert name in classes.get(owner, {}), f"tensorrt {version} has no {owner}.{name}, or it is unrecorded"
                assert wanted is None or wanted <= parameters(classes[owner][name]), classes[owner][name]
