"""What only a GPU can show: `make gpu-check PART=tests`, or `pytest -m gpu tests/engine/cuda/test_gpu.py`.

The kernels and the engine against the CPU path on phantoms (or the radiographs of a folder that GPU_CHECK_IMAGES
names), ownership, faults, and what TensorRT makes of its plans here. Everything compares; no test times anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from thoraxrt.engine.boxes import BoxSpec, boxes_from_cam, sort_boxes
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.cuda.cuda import Gpu
from thoraxrt.engine.decode import Radiograph, decode
from thoraxrt.engine.engine import Engine, Prediction, image_files, read_image
from thoraxrt.engine.errors import BackendError, BackendUnavailableError, ThoraxrtError
from thoraxrt.engine.execute import DeviceRadiograph
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter, network_input
from thoraxrt.engine.profile import Profile
from thoraxrt.export.phantoms import phantom

pytestmark = pytest.mark.gpu

CHEXNET = PreprocessSpec(resize=Shorter(pixels=256), crop=224)
SPECS = (
    CHEXNET,
    PreprocessSpec(resize=Exact(width=224, height=224), square=True),
    PreprocessSpec(resize=Exact(width=320, height=320)),
)


@pytest.fixture(scope="session")
def gpu() -> Iterator[Gpu]:
    try:
        opened = Gpu.open(0)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture(scope="session")
def images() -> list[npt.NDArray[np.uint8]]:
    """Radiographs uint8 `(H, W)`: phantoms, or the first of a folder."""
    if folder := os.environ.get("GPU_CHECK_IMAGES"):
        return [decode(read_image(path)).pixels for path in image_files(Path(folder))[:64]]
    return [phantom(23, index).pixels for index in range(16)]


@pytest.fixture(scope="session")
def bundle(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The sample network in FP32, FP16 and INT8, with a plan cache of its own."""
    from PIL import Image

    from thoraxrt.benchmarks.gpu_model import int8_ranges
    from thoraxrt.export.bundle import ExportOptions, export_bundle
    from thoraxrt.export.sample import SAMPLE_BOXES, SAMPLE_CHECKPOINT

    folder = tmp_path_factory.mktemp("gpu")
    files = [folder / f"{index}.png" for index in range(16)]
    for index, file in enumerate(files):
        Image.fromarray(phantom(29, index).pixels).save(file, compress_level=1)
    int8_ranges(SAMPLE_CHECKPOINT, files, folder / "ranges.json")
    options = ExportOptions(precisions=("fp32", "fp16", "int8"), calibrate=folder / "ranges.json", boxes=SAMPLE_BOXES)
    made = export_bundle(SAMPLE_CHECKPOINT, folder / "sample.bundle", options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THORAXRT_CACHE", str(folder / "cache"))
        yield made


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[Engine]:
    with Engine.open(bundle, backend="tensorrt", precision="fp16", device="cuda:0", batch=8) as opened:
        yield opened


def radiographs(images: Sequence[npt.NDArray[np.uint8]]) -> list[Radiograph]:
    return [Radiograph.from_pixels(image) for image in images]


def predictions(answers: Sequence[Prediction | ThoraxrtError]) -> list[Prediction]:
    for answer in answers:
        if isinstance(answer, ThoraxrtError):
            raise answer
    return [answer for answer in answers if isinstance(answer, Prediction)]


def logits(answers: Sequence[Prediction]) -> npt.NDArray[np.float32]:
    return np.array([[finding.logit for finding in answer.findings] for answer in answers], np.float32)


# --- the kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=["chexnet", "square", "stretched"])
def test_kernels_geometry_of_radiographs_is_pillows_and_boxes_are_the_cpus(
    gpu: Gpu, images: list[npt.NDArray[np.uint8]], spec: PreprocessSpec
) -> None:
    from thoraxrt.benchmarks.gpu_kernels import DeviceBatch, differences
    from thoraxrt.engine.cuda.kernels import source

    rng = np.random.default_rng(0)
    cams = rng.normal(size=(len(images), 14, 7, 7)).astype(np.float32)
    with contextlib.closing(DeviceBatch(gpu, gpu.module(source()), images, cams, spec, BoxSpec())) as batch:
        assert differences(batch, images, cams, spec, BoxSpec()) == []


def test_kernels_random_sizes_and_maps(gpu: Gpu) -> None:
    from thoraxrt.benchmarks.gpu_kernels import DeviceBatch, differences, odd_batch
    from thoraxrt.engine.cuda.kernels import source

    module = gpu.module(source())
    for seed in range(60):
        images, cams = odd_batch(seed)
        boxes = BoxSpec(threshold=(0.3, 0.5, 0.7)[seed % 3], min_area=(0.0, 0.01)[seed % 2])
        with contextlib.closing(DeviceBatch(gpu, module, images, cams, CHEXNET, boxes)) as batch:
            assert differences(batch, images, cams, CHEXNET, boxes) == [], seed


# --- TensorRT here ---------------------------------------------------------------------------------


@pytest.mark.parametrize("portable", [False, True], ids=["current", "portable"])
def test_a_plan_runs_here(
    portable: bool, gpu: Gpu, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """Whether TensorRT takes this GPU at all, with a plan for it and with one for every GPU from Ampere on."""
    from thoraxrt.engine.backends import onnxruntime, tensorrt
    from thoraxrt.engine.backends.tensorrt_plan import PlanOptions
    from thoraxrt.engine.plans import PlanCache, compile_plans, this_machine

    monkeypatch.setenv("THORAXRT_CACHE", str(tmp_path))
    record_property("gpu", f"{gpu.name} {gpu.architecture}")
    inputs = np.stack([network_input(phantom(31, index).pixels, CHEXNET) for index in range(2)])
    with contextlib.closing(onnxruntime.open(bundle, "fp32")) as oracle:
        expected = oracle.run(inputs).logits
    try:
        (compiled,) = compile_plans(bundle, ["fp16"], PlanOptions(buckets=(2,), hardware_compatible=portable))
        record_property("plan", str(compiled.cached.record.key.options))
        flavour: Any = this_machine().flavour
        with Gpu.open(0) as own:
            network = tensorrt.Network(compiled.cached, bundle, own, flavour, PlanCache())
            with contextlib.closing(tensorrt.TensorRTBackend(own, network)) as backend:
                found = backend.run(inputs).logits
    except BackendError as error:
        record_property("answer", f"refused: {error}")
        pytest.skip(f"refused: {error}")
    record_property("answer", f"runs; logits within {np.abs(found - expected).max():.2g} of ONNX Runtime FP32")
    assert np.abs(found - expected).max() < 0.1


@pytest.fixture(scope="module")
def expected(images: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """The sample checkpoint's logits `(N, C)` by torch, in FP32 on the CPU, nothing folded."""
    from thoraxrt.export.checkpoint import read_checkpoint
    from thoraxrt.export.graph import IMAGENET, reference_logits
    from thoraxrt.export.sample import SAMPLE_CHECKPOINT

    inputs = np.stack([network_input(image, CHEXNET) for image in images])
    return reference_logits(read_checkpoint(SAMPLE_CHECKPOINT).network, IMAGENET, inputs)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_logits_are_those_of_fp32_torch(
    precision: str,
    bundle: Bundle,
    images: list[npt.NDArray[np.uint8]],
    expected: npt.NDArray[np.float32],
    record_property: Any,
) -> None:
    from thoraxrt.export.agreement import agreement

    with Engine.open(bundle, backend="tensorrt", precision=precision, device="cuda:0", batch=8) as engine:
        answers = predictions(list(engine.predict(radiographs(images))))
    assert {(answer.backend, answer.precision) for answer in answers} == {("tensorrt", precision)}
    difference = float(np.abs(logits(answers) - expected).max())
    close = agreement(logits(answers), expected, bundle.manifest.activation, bundle.manifest.labels, None)
    record_property("largest_logit_difference", f"{difference:.3g}")
    record_property("mean_probability_error", f"{close.mean_error:.3g}")
    assert close.mean_error <= 0.01
    assert difference <= {"fp32": 1e-3, "fp16": 0.1, "int8": np.inf}[precision]


def test_int8_is_executed_as_int8(bundle: Bundle, record_property: Any) -> None:
    from thoraxrt.engine.backends import tensorrt

    with contextlib.closing(tensorrt.open(bundle, "int8")) as backend:
        said = json.loads(backend.network.layers()).get("Layers", [])
    layers = [layer for layer in said if isinstance(layer, dict)]
    if not layers:
        pytest.skip(f"TensorRT's inspector names {len(said)} layers and says nothing of their types")
    types = Counter(str(t.get("Format/Datatype")) for layer in layers for t in layer.get("Inputs", []))
    record_property("input_types", json.dumps(types))
    assert any("int8" in name.lower() for name in types), types


# --- the engine ------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_cpu_path_on_the_gpus_own_cams(
    engine: Engine, images: list[npt.NDArray[np.uint8]], record_property: Any
) -> None:
    manifest, compared = engine.manifest, 0
    for answer in predictions(list(engine.predict(radiographs(images), cam=True))):
        assert answer.cam is not None
        geometry = manifest.preprocess.geometry(answer.width, answer.height)
        expected = [
            box
            for index, finding in enumerate(answer.findings)
            if finding.reported
            for box in boxes_from_cam(
                answer.cam[index],
                finding=finding.finding,
                bias=manifest.network.bias[index],
                spec=manifest.boxes,
                geometry=geometry,
            )
        ]
        assert answer.boxes == tuple(sort_boxes(expected))
        compared += len(expected)
    record_property("boxes", compared)
    assert compared


def test_a_batch_of_any_length_and_the_uncaptured_path_answer_as_one_by_one(
    engine: Engine, bundle: Bundle, images: list[npt.NDArray[np.uint8]]
) -> None:
    shown = radiographs(images[:11])
    alone = predictions([answer for one in shown for answer in engine.predict_batch([one])])
    together = predictions(engine.predict_batch(shown))
    np.testing.assert_allclose(logits(together), logits(alone), atol=0.05)  # another bucket, other kernels
    with Engine.open(
        bundle, backend="tensorrt", precision="fp16", device="cuda:0", batch=8, profile=(profile := Profile())
    ) as uncaptured:
        direct = predictions(uncaptured.predict_batch(shown))
    np.testing.assert_array_equal(logits(direct), logits(together))
    assert [answer.boxes for answer in direct] == [answer.boxes for answer in together]
    assert {"geometry", "network", "boxes"} <= {stage.stage for stage in profile.stages()}


def test_device_arrays_need_no_copy_and_give_the_same(engine: Engine, images: list[npt.NDArray[np.uint8]]) -> None:
    torch = pytest.importorskip("torch")
    (host,) = predictions(engine.predict_batch(radiographs(images[:1])))
    whole = torch.from_numpy(np.array(images[0])).cuda()
    wide = torch.zeros((whole.shape[0], whole.shape[1] + 100), dtype=torch.uint8, device="cuda")
    wide[:, 40 : 40 + whole.shape[1]] = whole
    strided = wide[:, 40 : 40 + whole.shape[1]]  # a view: rows further apart than they are wide
    arrays = [whole, strided]
    with contextlib.suppress(ImportError):
        import cupy  # type: ignore[import-not-found,unused-ignore]

        arrays.append(cupy.asarray(images[0]))
    for array in arrays:
        (device,) = predictions(engine.predict_batch([DeviceRadiograph(array)]))
        np.testing.assert_array_equal(logits([device]), logits([host]))
        assert device.boxes == host.boxes


def test_two_engines_share_a_device(bundle: Bundle, engine: Engine, images: list[npt.NDArray[np.uint8]]) -> None:
    shown = radiographs(images[:8])
    before = predictions(engine.predict_batch(shown))
    with Engine.open(bundle, backend="tensorrt", precision="fp32", device="cuda:0", batch=8) as other:
        both = list(zip(engine.predict(shown * 8), other.predict(shown * 8), strict=True))
    for index, (mine, theirs) in enumerate(both):
        expected = before[index % 8]
        np.testing.assert_array_equal(logits(predictions([mine])), logits([expected]))
        np.testing.assert_allclose(logits(predictions([theirs])), logits([expected]), atol=0.1)
    np.testing.assert_array_equal(logits(predictions(engine.predict_batch(shown))), logits(before))


# --- ownership -------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_nothing_is_allocated_in_the_steady_state(
    gpu: Gpu, bundle: Bundle, images: list[npt.NDArray[np.uint8]], record_property: Any
) -> None:
    """Neither by the seam's count nor by the driver's free memory, over batches of every size in any order."""
    from thoraxrt.engine.backends import tensorrt
    from thoraxrt.engine.decode import ThreadDecoder

    backend = tensorrt.open(bundle, "fp16")
    rng = np.random.default_rng(0)
    shown = radiographs(images)
    with Engine(bundle, backend.executor(bundle.manifest, None), ThreadDecoder(), batch=32) as engine:
        for count in (1, 8, len(shown)):
            predictions(engine.predict_batch(shown[:count]))
        made, free = backend.gpu.allocations, gpu.free_bytes()
        for _ in range(200):
            chosen = rng.choice(len(shown), size=int(rng.integers(1, 33)))
            predictions(engine.predict_batch([shown[index] for index in chosen]))
        record_property("free_bytes_lost", free - gpu.free_bytes())
        assert backend.gpu.allocations == made
        assert gpu.free_bytes() == free


def test_opening_and_closing_leaks_nothing(gpu: Gpu, bundle: Bundle, record_property: Any) -> None:
    """A thousand GPUs with one of everything they make, then engines; memory before and after."""
    source = 'extern "C" __global__ void nothing() {}'

    def everything() -> None:
        with Gpu.open(0) as own:
            own.memory(1 << 20), own.pinned(1 << 16), own.event()
            kernel, stream = own.module(source).kernel("nothing"), own.stream()
            graph = own.graph(lambda captured: captured.launch(kernel, (1, 1, 1), (1, 1, 1), 0))
            graph.launch(stream)
            stream.synchronize()

    def engine() -> None:
        Engine.open(bundle, backend="tensorrt", precision="fp16", device="cuda:0").close()

    for name, step, times, allowed in (("gpu", everything, 1000, 0), ("engine", engine, 12, 0)):
        for _ in range(3):
            step()
        free, resident = gpu.free_bytes(), resident_bytes()
        for _ in range(times):
            step()
        lost, grown = free - gpu.free_bytes(), resident_bytes() - resident
        record_property(f"{name}_device_bytes_lost", lost)
        record_property(f"{name}_host_bytes_grown", grown)
        assert lost <= allowed, name
        assert grown < 64 << 20, name


def test_ten_thousand_requests(
    gpu: Gpu, engine: Engine, images: list[npt.NDArray[np.uint8]], record_property: Any
) -> None:
    shown = radiographs(images)
    rng = np.random.default_rng(1)
    expected = logits(predictions(list(engine.predict(shown))))
    free, resident, done = gpu.free_bytes(), 0, 0
    while done < 10_000:
        chosen = rng.choice(len(shown), size=int(rng.integers(1, 9)))
        answers = predictions(engine.predict_batch([shown[index] for index in chosen]))
        np.testing.assert_allclose(logits(answers), expected[chosen], atol=0.05)
        done += len(answers)
        resident = resident or (resident_bytes() if done > 1000 else 0)
    record_property("host_bytes_grown", resident_bytes() - resident)
    record_property("device_bytes_lost", free - gpu.free_bytes())
    assert gpu.free_bytes() == free
    assert resident_bytes() - resident < 32 << 20


# --- faults ----------------------------------------------------------------------------------------

FAULT = """
import json, sys
import numpy as np
from thoraxrt.engine.cuda.cuda import Gpu
from thoraxrt.engine.decode import Radiograph
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import DeviceError, ThoraxrtError
from thoraxrt.export.phantoms import phantom

BAD = 'extern "C" __global__ void bad(unsigned* address) { *address = 1; }'
one = [Radiograph.from_pixels(phantom(23, 0).pixels)]

def said(answers):
    (answer,) = answers
    if isinstance(answer, ThoraxrtError):
        return {"error": type(answer).__name__, "lost": getattr(answer, "lost", None), "message": str(answer)}
    return {"backend": answer.backend, "logits": [finding.logit for finding in answer.findings]}

fall_back = sys.argv[2] == "fall_back"
with Engine.open(sys.argv[1], backend="tensorrt", precision="fp16", device="cuda:0", fall_back=fall_back) as engine:
    print(json.dumps(said(engine.predict_batch(one))))
    with Gpu.open(0) as gpu:
        stream = gpu.stream()
        try:
            stream.launch(gpu.module(BAD).kernel("bad"), (1, 1, 1), (1, 1, 1), 0, 1 << 50)
            stream.synchronize()
        except DeviceError as error:
            print(json.dumps({"error": "DeviceError", "lost": error.lost, "message": str(error)}))
    for _ in range(3):
        print(json.dumps(said(engine.predict_batch(one))))
"""


@pytest.mark.parametrize("then", ["reopen", "fall_back"])
def test_an_illegal_address_fails_what_is_in_flight_and_the_engine_goes_on_or_says_why_not(
    then: str, bundle: Bundle, record_property: Any
) -> None:
    """In a child process: the loss may be for good, and then only a new process can use the GPU."""
    child = subprocess.run(
        [sys.executable, "-c", FAULT, str(bundle.path), then], capture_output=True, text=True, timeout=120, check=False
    )
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    record_property("said", json.dumps([line.get("message", line.get("backend")) for line in lines]))
    assert len(lines) == 5, child.stderr[-2000:]
    before, fault, first, *later = lines
    assert before["backend"] == "tensorrt"
    assert (fault["error"], fault["lost"]) == ("DeviceError", True)
    assert (first["error"], first["lost"]) == ("DeviceError", True)
    for answer in later:
        if "error" in answer:  # the driver did not take the GPU back
            assert then == "reopen", answer
            assert answer["lost"]
            assert "new process" in answer["message"]
        else:
            np.testing.assert_allclose(answer["logits"], before["logits"], atol=0.05)


def test_a_gpu_that_is_hidden_is_not_there() -> None:
    code = "from thoraxrt.engine.cuda.cuda import Gpu; Gpu.open(0)"
    child = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert "BackendUnavailableError: no GPU can be used here" in child.stderr
