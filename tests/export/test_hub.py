"""Folders as timm and transformers write them, read back against torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from thoraxrt.engine.errors import CheckpointError
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter
from thoraxrt.export.checkpoint import Checkpoint, read_checkpoint
from thoraxrt.export.graph import IMAGENET, Normalisation
from thoraxrt.export.networks import CxrNetwork, DenseNet, ResNet

Folder = Callable[..., Path]

NAME = "resnet-1x1-basic-w8"  # small, where timm would have resnet18
PRETRAINED = {  # of timm/densenet121.tv_in1k
    "tag": "tv_in1k",
    "custom_load": False,
    "input_size": [3, 224, 224],
    "fixed_input_size": False,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": list(IMAGENET.mean),
    "std": list(IMAGENET.std),
    "num_classes": 3,
    "pool_size": [7, 7],
    "first_conv": "conv1",
    "classifier": "fc",
}
TIMM = {
    "architecture": NAME,
    "num_classes": 3,
    "num_features": 16,
    "global_pool": "avg",
    "label_names": ["Effusion", "Mass", "Nodule"],
    "model_args": {"num_classes": 3},
    "pretrained_cfg": PRETRAINED,
}
FLAT = {"architecture": NAME, "num_features": 16, **PRETRAINED}  # as timm wrote it before 0.9


@pytest.fixture(scope="module")
def network() -> CxrNetwork:
    torch.manual_seed(0)
    network = ResNet((1, 1), width=8, num_classes=3)
    network(torch.randn(4, 3, 64, 64))  # running statistics of its own
    return network.eval()


@pytest.fixture
def folder(network: CxrNetwork, tmp_path: Path) -> Folder:
    def make(config: object, weights: str = "model.safetensors", prefix: str = "") -> Path:
        state = {f"{prefix}{key}": v for key, v in network.state_dict().items()}
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        if weights == "pytorch_model.bin":
            torch.save(state, tmp_path / weights)
        elif weights == "shards":
            shard(state, tmp_path)
        else:
            safetensors.torch.save_file(state, tmp_path / weights)
        return tmp_path

    return make


def shard(state: dict[str, Tensor], folder: Path) -> None:
    weight_map = {key: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, key in enumerate(state)}
    for name in set(weight_map.values()):
        safetensors.torch.save_file({key: v for key, v in state.items() if weight_map[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same(network: CxrNetwork, checkpoint: Checkpoint) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(checkpoint.network(x), network(x), atol=0, rtol=0)


@pytest.mark.parametrize("prefix", ["", "timm_model."])  # timm's own; within transformers
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "shards"])
def test_weights_come_back(weights: str, prefix: str, network: CxrNetwork, folder: Folder) -> None:
    assert_same(network, read_checkpoint(folder(TIMM, weights, prefix)))


def test_what_timm_says(folder: Folder) -> None:
    checkpoint = read_checkpoint(folder(TIMM))
    assert checkpoint.labels == ("Effusion", "Mass", "Nodule")
    assert checkpoint.normalisation == IMAGENET
    assert checkpoint.preprocess == PreprocessSpec(resize=Shorter(pixels=256), crop=224)
    assert checkpoint.trained_with == "pillow-bicubic"
    assert checkpoint.op_thresholds is None


@pytest.mark.parametrize(
    ("changes", "preprocess", "trained_with"),
    [
        ({"crop_pct": 0.95, "interpolation": "bilinear"}, PreprocessSpec(resize=Shorter(pixels=235), crop=224), None),
        (
            {"input_size": [3, 448, 448], "crop_pct": 1},
            PreprocessSpec(resize=Shorter(pixels=448), crop=448),
            "pillow-bicubic",
        ),
        ({"crop_mode": "squash"}, PreprocessSpec(resize=Exact(width=256, height=256), crop=224), "pillow-bicubic"),
        ({"input_size": None}, None, None),
    ],
)
def test_geometry(
    changes: dict[str, Any], preprocess: PreprocessSpec | None, trained_with: str | None, folder: Folder
) -> None:
    checkpoint = read_checkpoint(folder({**TIMM, "pretrained_cfg": {**PRETRAINED, **changes}}))
    assert checkpoint.preprocess == preprocess
    assert checkpoint.trained_with == trained_with


def test_flat_configurations_say_the_same(folder: Folder) -> None:
    checkpoint = read_checkpoint(folder(FLAT))
    assert checkpoint.normalisation == IMAGENET
    assert checkpoint.preprocess == PreprocessSpec(resize=Shorter(pixels=256), crop=224)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"id2label": {"2": "Nodule", "0": "Effusion", "1": "Mass"}}, ("Effusion", "Mass", "Nodule")),
        ({"label_names": {"0": "Effusion", "1": "Mass", "2": "Nodule"}}, ("Effusion", "Mass", "Nodule")),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, None),
        ({}, None),
    ],
)
def test_labels(labels: dict[str, Any], expected: tuple[str, ...] | None, folder: Folder) -> None:
    assert read_checkpoint(folder({"architectures": ["CheXNet"], **labels})).labels == expected


def test_other_values_than_imagenets(folder: Folder) -> None:
    cfg = {**PRETRAINED, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    checkpoint = read_checkpoint(folder({**TIMM, "pretrained_cfg": cfg}))
    assert checkpoint.normalisation == Normalisation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def test_the_sha256_is_the_weights_files(folder: Folder) -> None:
    path = folder(TIMM)
    assert read_checkpoint(path).sha256 == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    (path / "model.safetensors").unlink()
    folder(TIMM, "shards")
    shards = b"".join(file.read_bytes() for file in sorted(path.glob("model-*")))
    assert read_checkpoint(path).sha256 == hashlib.sha256(shards).hexdigest()


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({**TIMM, "architecture": "resnetblur18"}, f"says resnetblur18 with avg pooling; .* read as {NAME}"),
        ({**TIMM, "model_args": {"act_layer": "silu"}}, f"{NAME} with avg pooling, act_layer;"),
        ({**TIMM, "global_pool": "max"}, "with max pooling"),
        ({**TIMM, "label_names": ["Mass"]}, "names 1 outputs, its network has 3"),
        ({"id2label": {"0": "Mass", "1": "Nodule", "7": "Hernia"}}, "numbers its labels 0, 1, 7; expected 0 to 2"),
        ({**TIMM, "pretrained_cfg": {**PRETRAINED, "crop_mode": "border"}}, "crop_mode border"),
        ({**TIMM, "pretrained_cfg": {**PRETRAINED, "crop_pct": 1.2}}, "crop_pct 1.2"),
        ({**TIMM, "pretrained_cfg": {**PRETRAINED, "crop_pct": 1e-320}}, "crop_pct 1e-320"),
        ({**TIMM, "pretrained_cfg": {**PRETRAINED, "input_size": [3, 320, 224]}}, "expected a square"),
        ({**TIMM, "pretrained_cfg": {**PRETRAINED, "mean": "imagenet"}}, "no configuration"),
        ([1, 2], "no configuration"),
    ],
)
def test_configurations_that_do_not_fit(config: object, complaint: str, folder: Folder) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(folder(config))


def test_a_configuration_nested_deep(folder: Folder) -> None:
    path = folder(None)
    (path / "config.json").write_text('{"model_args": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}")
    with pytest.raises(CheckpointError, match="no configuration"):
        read_checkpoint(path)


def test_an_aliased_densenet_of_timm(tmp_path: Path) -> None:
    with torch.device("meta"):
        densenet = DenseNet(num_classes=2)
    torch.manual_seed(0)
    state = {
        key: torch.rand(v.shape) if v.is_floating_point() else torch.zeros(())
        for key, v in densenet.state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "tv_densenet121.tv_in1k"}))
    assert read_checkpoint(tmp_path).network.name == "densenet121"


def test_transformers_own_resnet_is_refused(tmp_path: Path) -> None:
    state = {
        "resnet.embedder.embedder.convolution.weight": torch.ones(64, 3, 7, 7),
        "classifier.1.weight": torch.ones(2, 2),
    }
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="transformers' own names for a ResNet"):
        read_checkpoint(tmp_path)


def test_folders_without_weights_or_with_bad_indices(folder: Folder, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path)
    for content, complaint in (
        ("{}", "no index of shards"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "expected files in that folder"),
        ('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "cannot be read"),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=complaint):
            read_checkpoint(tmp_path)
    folder(TIMM, "shards")
    first, second, _ = sorted(tmp_path.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="as another shard does"):
        read_checkpoint(tmp_path)
