"""The TensorRT backend on the software driver, in every order that streams allow, captured and not, against ONNX Runtime."""

from __future__ import annotations

import hashlib
import runpy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from thoraxrt.engine import plans
from thoraxrt.engine.backends import onnxruntime, tensorrt
from thoraxrt.engine.backends.tensorrt_plan import Device, Flavour, LayerTypes, Plan, PlanOptions, host_platform
from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.bundle import SCHEMA_VERSION, Bundle, FileEntry, Manifest, Network
from thoraxrt.engine.cuda.cuda import Gpu
from thoraxrt.engine.cuda.executor import PipelineExecutor
from thoraxrt.engine.decode import Radiograph
from thoraxrt.engine.engine import Engine, Prediction
from thoraxrt.engine.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceMemoryError,
    ImageContentError,
    RequestError,
)
from thoraxrt.engine.execute import DeviceRadiograph, HostExecutor, NetworkInput, Output
from thoraxrt.engine.plans import PlanCache, PlanKey
from thoraxrt.engine.postprocess import OperatingPoint, Sigmoid
from thoraxrt.engine.preprocess import PreprocessSpec, Shorter, network_input
from thoraxrt.engine.profile import Profile

StandIn = runpy.run_path(str(Path(__file__).parents[1] / "tensorrt_stand_in.py"))["StandIn"]

LABELS, SIZE, CAM, BUCKETS = ("Mass", "Nodule", "Edema"), 32, 4, (1, 4)


def small_graph() -> bytes:
    """Means of 8 x 8 pixels, weighted by finding: the CAM; its mean is the logit."""
    weights = np.array([0.02, -0.02, 0.01], np.float32).reshape(3, 1, 1, 1)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("AveragePool", ["x"], ["means"], kernel_shape=[8, 8], strides=[8, 8]),
            helper.make_node("Conv", ["means", "weights"], ["cam"]),
            helper.make_node("GlobalAveragePool", ["cam"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, SIZE, SIZE])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("cam", TensorProto.FLOAT, ["batch", 3, CAM, CAM]),
        ],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder, graph = tmp_path_factory.mktemp("small"), small_graph()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        network=Network(name="small", cam_height=CAM, cam_width=CAM, bias=(0.0,) * 3, checkpoint_sha256="0" * 64),
        labels=LABELS,
        activation=Sigmoid(),
        preprocess=PreprocessSpec(resize=Shorter(pixels=36), crop=SIZE),
        boxes=BoxSpec(threshold=0.5),
        operating_points=tuple(OperatingPoint(finding=label) for label in LABELS),
        checks={},
        recommended=None,
        producer={},
        files={"model.fp32.onnx": FileEntry.of(graph)},
    )
    (folder / "model.fp32.onnx").write_bytes(graph)
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return Bundle.open(folder)


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def trt(
    request: pytest.FixtureRequest, rtx: Flavour, bundle: Bundle, driver: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:  # fmt: skip
    """TensorRT's stand-in, installed, with a plan for this machine in the cache."""
    monkeypatch.setenv("THORAXRT_CACHE", str(tmp_path))
    made = StandIn(rtx.module, bundle.read("model.fp32.onnx"), BUCKETS)
    made.launch = driver.call
    monkeypatch.setattr(plans, "installed_flavour", lambda: Flavour(made, request.param, "10.3.0"))
    device = plans.current_device()
    key = PlanKey(
        onnx_sha256=hashlib.sha256(bundle.read("model.fp32.onnx")).hexdigest(),
        precision="fp32",
        runtime=request.param,
        runtime_version="10.3.0",
        platform=host_platform(),
        device=device.name if request.param == "tensorrt" else None,
        options=PlanOptions(buckets=BUCKETS, targets=(device.architecture,)),
    )
    PlanCache().store(key, Plan(b"a plan", None, LayerTypes(convolutions={"fp32": 1}, layers={})))
    return made


@pytest.fixture(autouse=True)
def kernels_found(driver: Any, host_kernels: Path) -> None:
    driver.kernels(host_kernels)


def test_the_driver_shows_the_gpu_that_plans_are_chosen_for(driver: Any) -> None:
    with Gpu.open(1) as gpu:
        assert plans.current_device(1) == Device(gpu.name, gpu.architecture)


def test_batches_agree_with_onnx_runtime_in_every_order(trt: Any, bundle: Bundle, driver: Any) -> None:
    oracle = onnxruntime.open(bundle, "fp32")
    images = np.random.default_rng(0).integers(0, 256, (9, 1, SIZE, SIZE), np.uint8)
    expected = oracle.run(images)
    for _ in driver.seeds(8):
        backend = tensorrt.open(bundle, "fp32")
        for count in (9, 1, 3):
            output = backend.run(images[:count])
            np.testing.assert_array_equal(output.logits, expected.logits[:count])
            np.testing.assert_array_equal(output.cam, expected.cam[:count])
        backend.close()


def radiographs(count: int) -> list[Radiograph]:
    rng = np.random.default_rng(1)
    blocks = [rng.integers(0, 256, (6, 7 + index % 2), np.uint8) for index in range(count)]
    return [Radiograph.from_pixels(np.kron(block, np.ones((9, 9), np.uint8))) for block in blocks]


def test_the_engines_path_through_it_gives_what_the_cpu_gives(trt: Any, bundle: Bundle, driver: Any) -> None:
    pictures, wanted = radiographs(7), np.ones((7, 3), np.bool_)
    host = HostExecutor(onnxruntime.open(bundle, "fp32"), bundle.manifest)
    expected = host.submit(pictures, wanted, True).result()
    for _ in driver.seeds(6):
        executor = PipelineExecutor(tensorrt.open(bundle, "fp32"), bundle.manifest)
        assert (executor.backend, executor.precision) == ("tensorrt", "fp32")
        answers = executor.submit(pictures, wanted, True).result()
        executor.close()
        for answer, other in zip(answers, expected, strict=True):
            assert isinstance(answer, Output)
            assert isinstance(other, Output)
            np.testing.assert_array_equal(answer.logits, other.logits)
            np.testing.assert_array_equal(answer.cam, other.cam)
            assert answer.regions == other.regions
    assert any(isinstance(answer, Output) and answer.regions for answer in expected)


class OnDevice:
    """An array on the software device, as PyCUDA's, CuPy's and torch's show themselves."""

    def __init__(self, gpu: Gpu, pixels: np.ndarray) -> None:
        self.shape, memory = pixels.shape, gpu.memory(pixels.nbytes)
        with gpu.pinned(pixels.nbytes) as pinned, gpu.stream() as stream:
            pinned.array[:] = pixels.reshape(-1)
            stream.to_device(memory.address, pinned.address, pixels.nbytes)
            stream.synchronize()
        self.__cuda_array_interface__ = {
            "shape": pixels.shape, "typestr": "|u1", "data": (memory.address, False), "version": 3, "strides": None
        }  # fmt: skip


def test_an_engine_on_the_gpu_answers_as_one_on_the_cpu(trt: Any, bundle: Bundle, driver: Any, tmp_path: Path) -> None:
    pictures: list[Any] = list(radiographs(11))
    deep = np.random.default_rng(2).integers(0, 65536, (40, 44), np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    sources = [*pictures[:5], tmp_path / "deep.png", b"no image", *pictures[5:]]
    with Engine.open(bundle, backend="onnxruntime", batch=4) as engine:
        expected = list(engine.predict(sources, cam=True))
    for _ in driver.seeds(6):
        with Engine.open(bundle, device="cuda:0", batch=4) as engine, Gpu.open(0) as gpu:
            assert (engine.backend, engine.precision, engine.ahead) == ("tensorrt", "fp32", 2)
            assert engine.buckets == BUCKETS
            memory = engine.device_memory()
            assert memory is not None
            assert memory.gpu == "cuda:0"
            assert 0 < memory.used < memory.total
            answers = list(engine.predict(sources, cam=True))
            there = DeviceRadiograph(OnDevice(gpu, pictures[0].pixels))
            elsewhere = DeviceRadiograph(pictures[0].pixels.astype(np.float32))
            on_device, refused = engine.predict_batch([there, elsewhere])
            ready = NetworkInput(network_input(pictures[0].pixels, bundle.manifest.preprocess)[0])
            resized, misfit = engine.predict_batch([ready, NetworkInput(ready.array[1:])])
        for answer, other in zip(answers, expected, strict=True):
            assert type(answer) is type(other)
            if isinstance(answer, Prediction) and isinstance(other, Prediction):
                assert answer.findings == other.findings
                assert answer.boxes == other.boxes
                np.testing.assert_array_equal(answer.cam, other.cam)
                assert answer.backend == "tensorrt"
        assert isinstance(on_device, Prediction)
        assert isinstance(expected[0], Prediction)
        assert on_device.boxes == expected[0].boxes
        assert isinstance(refused, ImageContentError)
        assert isinstance(resized, Prediction)
        assert resized.findings == expected[0].findings
        assert isinstance(misfit, ImageContentError)
    assert any(answer.boxes for answer in expected if isinstance(answer, Prediction))


def test_a_plan_tuned_for_one_gpu_is_not_run_on_another(trt: Any, bundle: Bundle, driver: Any) -> None:
    if plans.installed_flavour().name == "tensorrt":
        with pytest.raises(BackendUnavailableError, match="tuned for Software GPU 0, this GPU is Software GPU 1"):
            Engine.open(bundle, device="cuda:1")
    else:
        with Engine.open(bundle, device="cuda:1") as engine:
            assert isinstance(engine.predict_batch(radiographs(1))[0], Prediction)
    with pytest.raises((RequestError, BackendUnavailableError), match=r"cuda:2|GPU"):
        Engine.open(bundle, device="cuda:2")


def test_an_engine_outlives_its_gpu(trt: Any, bundle: Bundle, driver: Any) -> None:
    pictures = radiographs(6)
    with Engine.open(bundle, device="cuda", fall_back=True) as engine:
        driver.fail("copy", 3, "ILLEGAL_ADDRESS")
        answers = list(engine.predict(pictures))
        lost = [isinstance(answer, DeviceError) for answer in answers]
        assert any(lost)
        assert not lost[-1]  # opened again
        assert engine.backend == "tensorrt"
    with Engine.open(bundle, device="cuda", fall_back=True) as engine:
        driver.fail("copy", 1, "ILLEGAL_ADDRESS")
        driver.fail("cuDevicePrimaryCtxReset", 1, "LAUNCH_FAILED")
        answers = list(engine.predict(pictures))
        assert isinstance(answers[-1], Prediction)
        assert answers[-1].backend in ("openvino", "onnxruntime")
    Gpu.open(0).close()  # a reset that works, and frees what the lost context held


def test_the_gpus_stages_are_in_the_profile(trt: Any, bundle: Bundle, driver: Any) -> None:
    profile = Profile()
    with Engine.open(bundle, device="cuda", batch=4, profile=profile) as engine:
        list(engine.predict(radiographs(8)))
    spans = {(stage.lane, stage.stage): stage.spans for stage in profile.stages()}
    for stage in ("geometry", "network", "boxes", "back"):
        assert spans["cuda:0 compute", stage] == 2
    assert spans["cuda:0 copy", "copy"] == 2


def test_a_gpu_that_fails_while_it_runs_is_a_device_error_and_closing_is_safe(
    trt: Any, bundle: Bundle, driver: Any
) -> None:
    images = np.zeros((1, 1, SIZE, SIZE), np.uint8)
    backend = tensorrt.open(bundle, "fp32")
    backend.run(images)
    driver.fail("copy", 1, "ILLEGAL_ADDRESS")
    with pytest.raises(DeviceError) as failure:
        backend.run(images)
    assert failure.value.lost
    backend.close()
    driver.reset()
    backend = tensorrt.open(bundle, "fp32")  # the next one has the GPU again
    backend.run(images)
    backend.close()


def test_a_network_too_large_for_the_gpu_leaves_nothing_there(trt: Any, bundle: Bundle, driver: Any) -> None:
    trt.activations = 1 << 28
    driver.memory(1 << 27)
    with pytest.raises(DeviceMemoryError):
        tensorrt.open(bundle, "fp32")


def test_a_thousand_networks_leave_nothing_behind(trt: Any, bundle: Bundle, driver: Any) -> None:
    with Gpu.open(0) as gpu:
        flavour = plans.installed_flavour()
        (folder,) = PlanCache().folders(bundle)
        plan, before = PlanCache().read(folder), driver.alive()
        for _ in range(1000):
            tensorrt.Network(plan, bundle, gpu, flavour, PlanCache()).close()
        assert driver.alive() == before
