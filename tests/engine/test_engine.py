"""The whole path: real weights on real radiographs against torch, and what one bad image does to the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from thoraxrt.engine.backends import NetworkOutput, available, open_backend
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import Radiograph, ThreadDecoder, decode
from thoraxrt.engine.engine import Engine, Prediction
from thoraxrt.engine.errors import BackendError, BackendUnavailableError, ImageError, NotFiniteError, RequestError
from thoraxrt.engine.execute import HostExecutor
from thoraxrt.engine.overlay import heat, render_overlay
from thoraxrt.engine.postprocess import Finding, Softmax, logistic
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, network_input
from thoraxrt.export.phantoms import phantom


@pytest.fixture(scope="module")
def radiographs() -> list[Radiograph]:
    return [Radiograph.from_pixels(phantom(99, index).pixels) for index in range(4)]


@pytest.fixture(scope="module")
def nih_logits(nih: Path, nih_images: list[Path], chexnet_bundle: Bundle) -> dict[str, npt.NDArray[np.float32]]:
    """Logits float32 `(279, 14)` of the real checkpoint on all radiographs: torch, unfolded, and each backend."""
    from thoraxrt.export.checkpoint import read_checkpoint
    from thoraxrt.export.graph import IMAGENET, reference_logits

    spec = chexnet_bundle.manifest.preprocess
    inputs = np.stack([network_input(decode(path.read_bytes()).pixels, spec) for path in nih_images])
    batches = np.array_split(inputs, len(inputs) // 8)
    network = read_checkpoint(nih / "checkpoints" / "densenet121-nih.pth.tar").network
    logits = {"torch": np.concatenate([reference_logits(network, IMAGENET, batch) for batch in batches])}
    for name in ("onnxruntime", "openvino"):
        backend = open_backend(chexnet_bundle, name, "fp32")
        logits[name] = np.concatenate([backend.run(batch).logits for batch in batches])
        backend.close()
    return logits


@pytest.mark.parametrize(("backend", "bound"), [("onnxruntime", 1e-4), ("openvino", 1e-3)])
def test_every_real_radiograph_matches_torch(
    backend: str, bound: float, nih_logits: dict[str, npt.NDArray[np.float32]]
) -> None:
    assert np.abs(nih_logits[backend] - nih_logits["torch"]).max() <= bound
    assert nih_logits["torch"].std(axis=0).min() > 0.1  # the images differ, so agreement means something


def test_a_dicom_and_the_png_it_was_made_from_give_one_answer(nih: Path, chexnet_bundle: Bundle) -> None:
    with Engine.open(chexnet_bundle, backend="onnxruntime") as engine:
        png, dicom = engine.predict(
            [nih / "images" / "00000002_000.png", nih / "dicom" / "nih_00000002_000_8bit__jpegll_sv1.dcm"]
        )
    assert isinstance(png, Prediction)
    assert isinstance(dicom, Prediction)
    assert png.to_dict() == dicom.to_dict()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_cam_mean_plus_bias_is_the_logit(backend: str, sample_bundle: Bundle, radiographs: list[Radiograph]) -> None:
    with Engine.open(sample_bundle, backend=backend, batch=4) as engine:
        for prediction in engine.predict(radiographs, cam=True):
            assert isinstance(prediction, Prediction)
            assert prediction.cam is not None
            logits = prediction.cam.mean((1, 2)) + np.array(sample_bundle.manifest.network.bias)
            np.testing.assert_allclose(logits, [f.logit for f in prediction.findings], atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_come_in_order_whatever_the_batch(
    batch: int, sample_bundle: Bundle, radiographs: list[Radiograph]
) -> None:
    with Engine.open(sample_bundle, backend="onnxruntime", batch=batch) as engine:
        together = list(engine.predict(radiographs))
        alone = [engine.predict_one(radiograph) for radiograph in radiographs]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Prediction)
        np.testing.assert_allclose([f.logit for f in one.findings], [f.logit for f in other.findings], atol=1e-4)


def test_a_bad_image_is_its_own_answer_and_the_others_go_on(
    sample_bundle: Bundle, radiographs: list[Radiograph]
) -> None:
    with Engine.open(sample_bundle, batch=3) as engine:
        answers = list(engine.predict([radiographs[0], b"not an image", Path("/does/not/exist.png"), radiographs[1]]))
    assert [isinstance(answer, ImageError) for answer in answers] == [False, True, True, False]


def test_predict_reads_ahead_but_not_without_bound(sample_bundle: Bundle, radiographs: list[Radiograph]) -> None:
    drawn = 0

    def endless() -> object:
        nonlocal drawn
        while True:
            drawn += 1
            yield radiographs[0]

    with Engine.open(sample_bundle, backend="onnxruntime") as engine:
        next(engine.predict(endless()))  # type: ignore[arg-type]
    assert 1 < drawn < 32


def test_boxes_only_for_reported_findings_and_only_those_wanted(
    sample_bundle: Bundle, radiographs: list[Radiograph]
) -> None:
    with Engine.open(sample_bundle) as engine:
        predictions = [engine.predict_one(radiograph) for radiograph in radiographs]
        for radiograph, prediction in zip(radiographs, predictions, strict=True):
            reported = {finding.finding for finding in prediction.findings if finding.reported}
            assert {box.finding for box in prediction.boxes} == reported
            assert engine.predict_one(radiograph, findings=[]).boxes == ()
            for name in reported:
                assert {box.finding for box in engine.predict_one(radiograph, findings=[name]).boxes} == {name}
        assert any(prediction.boxes for prediction in predictions)
        with pytest.raises(RequestError, match="unknown finding Flu"):
            engine.predict_one(radiographs[0], findings=["Flu"])


def test_a_box_score_is_the_activation_of_its_peak(sample_bundle: Bundle, radiographs: list[Radiograph]) -> None:
    with Engine.open(sample_bundle, backend="onnxruntime") as engine:
        boxes = 0
        for radiograph in radiographs:
            prediction = engine.predict_one(radiograph, cam=True)
            assert prediction.cam is not None
            for box in prediction.boxes:
                index = engine.manifest.labels.index(box.finding)
                ceiling = logistic(float(prediction.cam[index].max()) + engine.manifest.network.bias[index])
                assert 0 < box.score <= ceiling + 1e-6
                assert box.x <= box.peak.x <= box.x + box.width
                assert box.y <= box.peak.y <= box.y + box.height
                boxes += 1
    assert boxes


class TwoClasses:
    """A backend at the edge of the world: the first class is seen in one corner, the others are level."""

    name, precision = "fake", "fp32"

    def __init__(self, bundle: Bundle) -> None:
        network = bundle.manifest.network
        cam = np.zeros((1, len(bundle.manifest.labels), network.cam_height, network.cam_width), np.float32)
        cam[0, 0, :2, :2] = 8.0
        self.cam, self.bias = cam, np.array(network.bias, np.float32)

    def run(self, images: npt.NDArray[np.uint8]) -> NetworkOutput:
        return NetworkOutput(self.cam.mean((2, 3)) + self.bias, self.cam)

    def close(self) -> None:
        pass


def test_a_softmax_box_holds_the_other_classes_where_the_image_has_them(
    sample_bundle: Bundle, radiographs: list[Radiograph]
) -> None:
    manifest = sample_bundle.manifest
    points = [msgspec.structs.replace(point, probability=0.01) for point in manifest.operating_points]
    manifest = msgspec.structs.replace(manifest, activation=Softmax(), operating_points=tuple(points))
    bundle = Bundle(sample_bundle.path, manifest, sample_bundle.sha256)
    backend = TwoClasses(bundle)
    with Engine(bundle, HostExecutor(backend, manifest), ThreadDecoder()) as engine:
        prediction = engine.predict_one(radiographs[0], findings=[manifest.labels[0]])
    logits = backend.run(np.empty(0, np.uint8)).logits[0].astype(np.float64)
    np.testing.assert_allclose(
        [finding.probability for finding in prediction.findings], np.exp(logits) / np.exp(logits).sum(), rtol=1e-12
    )
    logits[0] = 8.0 + manifest.network.bias[0]
    assert prediction.boxes[0].score == pytest.approx((np.exp(logits) / np.exp(logits).sum())[0], rel=1e-6)


class NotANumber:
    """A backend at the edge of the world: its second image overflows, as FP16 can."""

    name, precision = "fake", "fp16"

    def __init__(self, bundle: Bundle) -> None:
        network = bundle.manifest.network
        self.shape = (len(bundle.manifest.labels), network.cam_height, network.cam_width)

    def run(self, images: npt.NDArray[np.uint8]) -> NetworkOutput:
        cam = np.zeros((len(images), *self.shape), np.float32)
        cam[1] = np.nan
        return NetworkOutput(cam.mean((2, 3)), cam)

    def close(self) -> None:
        pass


def test_values_that_are_not_finite_fail_their_image_alone(
    sample_bundle: Bundle, radiographs: list[Radiograph]
) -> None:
    executor = HostExecutor(NotANumber(sample_bundle), sample_bundle.manifest)
    with Engine(sample_bundle, executor, ThreadDecoder(), batch=3) as engine:
        answers = list(engine.predict(radiographs[:3]))
    assert [type(answer) for answer in answers] == [Prediction, NotFiniteError, Prediction]


def test_an_overlay_shows_boxes_and_heat(sample_bundle: Bundle, radiographs: list[Radiograph]) -> None:
    with Engine.open(sample_bundle) as engine:
        predictions = [engine.predict_one(radiograph, cam=True) for radiograph in radiographs]
    prediction = next(prediction for prediction in predictions if prediction.boxes)
    picture = render_overlay(prediction, sample_bundle.manifest.preprocess)
    assert picture.size == (prediction.width, prediction.height)
    channels = np.asarray(picture)
    box = prediction.boxes[0]
    edge = channels[round(box.y + box.height / 2), round(box.x) : round(box.x) + 4]
    assert (np.ptp(edge.astype(int), axis=-1) > 150).any()  # a bright colour on gray
    assert (channels[..., 0].astype(int) - channels[..., 2] > 40).sum() > 1000  # warm colours


def test_heat_covers_what_the_network_saw_and_no_more() -> None:
    radiograph = Radiograph.from_pixels(np.full((100, 300), 64, np.uint8))
    cam = np.ones((1, 4, 4), np.float32)
    cam[0, 0, 0] = 0  # a flat map has no heat
    prediction = Prediction(
        width=300,
        height=100,
        precision="fp32",
        backend="onnxruntime",
        findings=(Finding(finding="Mass", probability=0.9, logit=2.2, reported=True),),
        boxes=(),
        cam=cam,
    )
    spec = PreprocessSpec(resize=Exact(width=64, height=64), square=True)
    warm = (np.asarray(heat(radiograph, prediction, spec, ["Mass"])) != 64).any(axis=(0, 2))
    assert np.flatnonzero(warm)[[0, -1]].tolist() == [100, 199]  # the middle third


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_onnxruntime_refuses_what_it_would_not_execute(precision: str, sample_bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match=f"no {precision} convolutions"):
        Engine.open(sample_bundle, backend="onnxruntime", precision=precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_openvino_executes_the_precision_or_refuses(precision: str, sample_bundle: Bundle) -> None:
    if available("openvino", sample_bundle)[precision] is None:
        with Engine.open(sample_bundle, backend="openvino", precision=precision) as engine:
            assert engine.precision == precision
    else:
        with pytest.raises(BackendUnavailableError, match=f"no {precision}"):
            Engine.open(sample_bundle, backend="openvino", precision=precision)


def test_a_missing_graph_is_named(sample_bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailableError, match=r"holds no model\.int8\.onnx"):
        Engine.open(sample_bundle, precision="int8")


@pytest.mark.parametrize(("backend", "precision"), [("cuda9000", None), (None, "fp7")])
def test_unknown_names(backend: str | None, precision: str | None, sample_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="unknown"):
        Engine.open(sample_bundle, backend=backend, precision=precision)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_closed_engine_says_so(backend: str, sample_bundle: Bundle, radiographs: list[Radiograph]) -> None:
    engine = Engine.open(sample_bundle, backend=backend)
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.predict_one(b"any bytes")
    with pytest.raises(BackendError, match="closed"):
        engine.predict_batch(radiographs)


WITHOUT_TORCH = """
import sys
for name in ("torch", "onnx", "onnxscript", "safetensors", "sklearn", "grpc", "google.protobuf"):
    sys.modules[name] = None  # importing it raises ImportError
from thoraxrt.engine.engine import Engine
with Engine.open(sys.argv[1]) as engine:
    print(len(engine.predict_one(sys.argv[2]).findings))
"""


def test_the_engine_runs_without_torch_onnx_and_grpc(
    sample_bundle: Bundle, radiographs: list[Radiograph], tmp_path: Path
) -> None:
    from PIL import Image

    Image.fromarray(radiographs[0].pixels).save(tmp_path / "a.png")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(sample_bundle.path), str(tmp_path / "a.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "14\n"


def test_two_builds_of_onnxruntime_are_detected(
    sample_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime_gpu-1.99.dist-info").mkdir()
    (tmp_path / "onnxruntime_gpu-1.99.dist-info" / "METADATA").write_text("Name: onnxruntime-gpu\nVersion: 1.99\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailableError, match="onnxruntime and onnxruntime-gpu are both installed"):
        Engine.open(sample_bundle, backend="onnxruntime")


def test_openvino_reports_to_nobody_and_needs_no_home() -> None:
    code = (
        "import sys; from thoraxrt.engine.backends.openvino import precisions\n"
        "assert precisions(0, None)['fp32'] is None\n"
        "sys.exit(any(name.startswith('openvino_telemetry.') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": os.environ["PATH"], "HOME": ""})
