"""Each form that a model comes in, exported whole: the bundle answers as torch does, and says what the file said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from thoraxrt.engine.backends import open_backend
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import CheckpointError, RequestError
from thoraxrt.engine.postprocess import Sigmoid, SigmoidOpNorm, Softmax
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter
from thoraxrt.export.bundle import ExportOptions, export_bundle
from thoraxrt.export.graph import IMAGENET, Normalisation, reference_logits
from thoraxrt.export.networks import DenseNet
from thoraxrt.export.source import CHEXNET, Given, read_source
from thoraxrt.export.surgery import onnx_from_module
from thoraxrt.export.xrv import FINDINGS, normalisation

TINY = PreprocessSpec(resize=Exact(width=64, height=64))
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64), np.uint8)

FACTORY = """
import torch
from torch import nn


class Chest(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.Hardswish())
        self.scores = nn.Linear(12, 3)

    def forward(self, x):
        return self.scores(self.body(x).mean((2, 3)))


def make():
    return Chest()
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(PIXELS):
        Image.fromarray(image[0]).save(folder / f"{number}.png")
    return folder


def densenet(outputs: int, channels: int = 3) -> DenseNet:
    torch.manual_seed(0)
    network = DenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=outputs, in_channels=channels
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network.eval()


def exported(path: Path, images: Path, given: Given) -> Bundle:
    options = ExportOptions(precisions=("fp32",), given=given, images=images)
    return export_bundle(path, images.parent / "out.bundle", options)


def assert_answers_as(
    bundle: Bundle, network: nn.Module, normalisation: Normalisation, tolerance: float = 1e-4
) -> None:
    backend = open_backend(bundle, "onnxruntime")
    expected = reference_logits(network, normalisation, PIXELS)
    np.testing.assert_allclose(backend.run(PIXELS).logits, expected, atol=tolerance, rtol=0)
    backend.close()
    assert np.ptp(expected) > 1e-3


def test_a_lightning_checkpoint(images: Path, tmp_path: Path) -> None:
    network = densenet(14)
    state = {f"model.{key}": value for key, value in network.state_dict().items()} | {"loss.pos_weight": torch.ones(14)}
    torch.save({"state_dict": state, "hyper_parameters": {"lr": 0.1}, "epoch": 3}, tmp_path / "last.ckpt")
    bundle = exported(tmp_path / "last.ckpt", images, Given(preprocess=TINY))
    assert_answers_as(bundle, network, IMAGENET)
    assert bundle.manifest.activation == Sigmoid()
    assert bundle.manifest.assumed == ("labels", "activation", "normalisation")


def test_a_hugging_face_folder_says_labels_normalisation_and_geometry(images: Path, tmp_path: Path) -> None:
    network, folder = densenet(2), tmp_path / "hub"
    folder.mkdir()
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
    config = {"label_names": ["Mass", "Edema"], "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    bundle = exported(folder, images, Given())
    assert_answers_as(bundle, network, Normalisation(mean=(0.5,) * 3, std=(0.25,) * 3))
    assert bundle.manifest.labels == ("Mass", "Edema")
    assert bundle.manifest.preprocess == PreprocessSpec(resize=Shorter(pixels=64), crop=64)
    skew = bundle.manifest.skew  # timm resizes bicubically, the engine does not: measured, not hidden
    assert skew is not None
    assert skew.trained_with == "pillow-bicubic"
    assert skew.max_probability_difference >= skew.mean_probability_difference >= 0


def test_torchxrayvision_weights_say_everything(images: Path, tmp_path: Path) -> None:
    network = densenet(18, channels=1)
    points = torch.full((18,), 0.2)
    points[14:] = torch.nan
    torch.save({**network.state_dict(), "op_threshs": points}, tmp_path / "xrv.pt")
    bundle = exported(tmp_path / "xrv.pt", images, Given())
    manifest = bundle.manifest
    assert manifest.labels == FINDINGS[:14]  # outputs without an operating point are cut off
    assert manifest.preprocess == PreprocessSpec(square=True, resize=Exact(width=224, height=224))
    assert isinstance(manifest.activation, SigmoidOpNorm)
    assert manifest.assumed == ()
    assert manifest.activation.thresholds == pytest.approx((0.2,) * 14)
    assert manifest.skew is not None
    assert manifest.skew.trained_with == "skimage"
    with Engine.open(bundle, backend="onnxruntime") as engine:
        prediction = engine.predict_one(images / "0.png")
    with torch.inference_mode():  # from the same pixels, with TorchXRayVision's op_norm written out
        spec = manifest.preprocess
        from thoraxrt.engine.preprocess import network_input

        x = network_input(PIXELS[0, 0], spec)[np.newaxis]
        s = torch.sigmoid(torch.tensor(reference_logits(network, normalisation(1), x)))[0, :14].double()
    expected = torch.where(s < 0.2, s / 0.4, 1 - (1 - s) / 1.6)
    assert [finding.probability for finding in prediction.findings] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [finding.reported for finding in prediction.findings] == (s >= 0.2).tolist()


def test_an_onnx_file_of_somebody_else(images: Path, tmp_path: Path) -> None:
    network = nn.Sequential(densenet(3), nn.Softmax(1))
    (tmp_path / "theirs.onnx").write_bytes(onnx_from_module(network, 3, 64).SerializeToString())
    labels = ("COVID", "Normal", "Pneumonia")
    bundle = exported(tmp_path / "theirs.onnx", images, Given(preprocess=TINY, labels=labels))
    assert_answers_as(bundle, network[0], IMAGENET)  # the softmax is cut off, and written down
    assert bundle.manifest.activation == Softmax()
    assert bundle.manifest.network.name == "theirs"
    assert bundle.manifest.assumed == ("normalisation",)
    with Engine.open(bundle) as engine:
        assert sum(f.probability for f in engine.predict_one(images / "0.png").findings) == pytest.approx(1)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"net.{key}": v for key, v in s.items()}}])
def test_a_network_of_the_users_own(
    wrap: Callable[[dict[str, Tensor]], object], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_chest_model.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(1)
    network = __import__("my_chest_model").make().eval()
    torch.save(wrap(network.state_dict()), tmp_path / "weights.pt")
    given = Given(preprocess=TINY, labels=("Mass", "Nodule", "Edema"), network="my_chest_model:make")
    bundle = exported(tmp_path / "weights.pt", images, given)
    assert_answers_as(bundle, network, IMAGENET)
    assert bundle.manifest.network.name == "Chest"
    torch.save(densenet(3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not those of --network"):
        read_source(tmp_path / "other.pt", given)
    sys.modules.pop("my_chest_model")


def test_a_larger_input(images: Path, tmp_path: Path) -> None:
    network = densenet(14)
    torch.save(network.state_dict(), tmp_path / "large.pth")
    source = read_source(tmp_path / "large.pth", Given(preprocess=PreprocessSpec(resize=Shorter(pixels=320), crop=320)))
    (image,) = source.graph.graph.input
    assert [dim.dim_value for dim in image.type.tensor_type.shape.dim][1:] == [1, 320, 320]
    assert read_source(tmp_path / "large.pth", Given()).preprocess == CHEXNET


def test_ten_crops_of_training_are_measured_against_the_centre_crop_served(images: Path, tmp_path: Path) -> None:
    torch.save(densenet(14).state_dict(), tmp_path / "ten.pth")
    given = Given(trained_with="ten-crop", preprocess=PreprocessSpec(resize=Shorter(pixels=64), crop=48))
    skew = exported(tmp_path / "ten.pth", images, given).manifest.skew
    assert skew is not None
    assert (skew.trained_with, skew.images) == ("ten-crop", 2)
    assert skew.max_logit_difference > 0


def test_labels_that_do_not_fit_are_refused_before_anything_is_written(images: Path, tmp_path: Path) -> None:
    torch.save(densenet(3).state_dict(), tmp_path / "three.pth")
    with pytest.raises(RequestError, match="3 outputs, the NIH labels are 14"):
        exported(tmp_path / "three.pth", images, Given(preprocess=TINY))
    assert not (tmp_path / "out.bundle").exists()
