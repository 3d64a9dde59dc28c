"""TorchXRayVision's weights: pickled whole as published, or as a state_dict; to torch, and through the fold."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thoraxrt.engine.errors import CheckpointError
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, network_input
from thoraxrt.export import xrv
from thoraxrt.export.checkpoint import Checkpoint, read_checkpoint
from thoraxrt.export.graph import Normalisation, ServedNetwork
from thoraxrt.export.networks import CxrNetwork, DenseNet, ResNet
from thoraxrt.export.phantoms import phantom

NIH = "nih-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
CHEX = "chex-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"
RESNET = "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt"
SQUARE = PreprocessSpec(square=True, resize=Exact(width=224, height=224))


def scaled(images: np.ndarray[Any, Any]) -> Tensor:
    """uint8 `(N, 1, S, S)` to float32 in -1024..1024, in TorchXRayVision's order of operations."""
    return torch.tensor((2 * (images.astype(np.float32) / 255) - 1) * 1024)


def trained(network: CxrNetwork, images: np.ndarray[Any, Any]) -> CxrNetwork:
    """Batch norms with random weights and the statistics of these inputs, so that logits depend on the image."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None  # cumulative
    nn.init.uniform_(network.head.bias, -2, 2)
    network.head.weight.data *= 10  # an initial classifier hardly looks
    with torch.no_grad():
        network.train()(scaled(images))
    return network.eval()


def small(classes: int = 18) -> CxrNetwork:
    torch.manual_seed(0)
    noise = np.random.default_rng(0).integers(0, 256, (4, 1, 64, 64), np.uint8)
    network = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=classes, in_channels=1)
    return trained(network, noise)


@contextmanager
def package_named(name: str) -> Iterator[types.ModuleType]:
    """An empty package of this name, for as long as something is pickled."""
    parts = name.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    with pytest.MonkeyPatch.context() as patch:
        for part in names:
            patch.setitem(sys.modules, part, types.ModuleType(part))
        yield sys.modules[name]


@pytest.fixture
def package() -> Iterator[types.ModuleType]:
    with package_named("torchxrayvision.models") as package:
        yield package


def as_theirs(module: nn.Module, package: types.ModuleType) -> nn.Module:
    """The same layers, ours being of the classes in `package` with the same name."""
    if not type(module).__module__.startswith("torch."):
        name = type(module).__name__
        if not hasattr(package, name):
            setattr(package, name, type(name, (nn.Module,), {"__module__": package.__name__}))
        theirs = nn.Module.__new__(getattr(package, name))
        theirs.__dict__.update(module.__dict__)
        theirs.__dict__["_modules"] = dict(module._modules)
        module = theirs
    for name, child in module._modules.items():
        assert child is not None
        module._modules[name] = as_theirs(child, package)
    return module


def save_whole(network: CxrNetwork, path: Path, package: types.ModuleType, **attributes: object) -> None:
    """As TorchXRayVision's training saved it, in the format of torch up to 1.5."""
    module = as_theirs(copy.deepcopy(network), package)
    for name, value in attributes.items():
        setattr(module, name, value)
    del module.__dict__["_non_persistent_buffers_set"]  # those files are older than it
    with pytest.warns(UserWarning, match="Couldn't retrieve source code"):  # the package above has none
        torch.save(module, path, _use_new_zipfile_serialization=False)


def logits(network: CxrNetwork, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(x)


def test_a_published_file_to_torch_and_through_the_fold(package: types.ModuleType, tmp_path: Path) -> None:
    """The full size once: pickled whole in the legacy format, under its published name."""
    torch.manual_seed(0)
    images = np.stack([network_input(phantom(7, index).pixels, SQUARE) for index in range(4)])
    network = trained(DenseNet(num_classes=18, in_channels=1), images)
    expected = logits(network, scaled(images))
    assert expected.std(0).min() > 0.2  # else agreement would say nothing
    save_whole(network, tmp_path / NIH, package)

    checkpoint = read_checkpoint(tmp_path / NIH)
    assert checkpoint.network.name == "densenet121"
    assert checkpoint.labels == xrv.FINDINGS[:14]
    torch.testing.assert_close(logits(checkpoint.network, scaled(images)), expected[:, :14], atol=1e-4, rtol=0)

    assert checkpoint.normalisation is not None
    served = ServedNetwork(checkpoint.network, checkpoint.normalisation, 224)
    with torch.inference_mode():
        folded, _ = served(torch.tensor(images))
    difference = (folded - expected[:, :14]).abs().max() / expected.abs().max()
    assert difference < 1e-4


def test_what_is_said_of_a_published_file(package: types.ModuleType, tmp_path: Path) -> None:
    save_whole(small(), tmp_path / CHEX, package)
    checkpoint = read_checkpoint(tmp_path / CHEX)
    assert checkpoint.labels == (
        "Atelectasis", "Consolidation", "Pneumothorax", "Edema", "Effusion", "Pneumonia", "Cardiomegaly",
        "Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum",
    )  # fmt: skip
    assert checkpoint.op_thresholds == pytest.approx(
        (0.1988969, 0.05710573, 0.0531293, 0.1435217, 0.27212676, 0.07749717, 0.19712369, 0.09932402, 0.09273402,
         0.3270967, 0.10888247)
    )  # fmt: skip
    assert checkpoint.normalisation == Normalisation(mean=(0.5,), std=(1 / 2048,))
    assert checkpoint.preprocess == SQUARE
    assert checkpoint.trained_with == "skimage"


@pytest.mark.parametrize("attribute", ["pathologies", "targets"])
def test_names_that_the_module_holds(attribute: str, package: types.ModuleType, tmp_path: Path) -> None:
    network = small(classes=4)
    save_whole(network, tmp_path / "mine.pt", package, **{attribute: ["Mass", "", "Hernia", "Lung Opacity"]})
    checkpoint = read_checkpoint(tmp_path / "mine.pt")
    assert checkpoint.labels == ("Mass", "Hernia", "Lung Opacity")
    assert checkpoint.op_thresholds is None
    assert checkpoint.preprocess == SQUARE
    x = torch.randn(2, 1, 64, 64) * 500
    torch.testing.assert_close(logits(checkpoint.network, x), logits(network, x)[:, [0, 2, 3]], atol=1e-5, rtol=0)


def test_a_renamed_file_names_no_outputs(package: types.ModuleType, tmp_path: Path) -> None:
    """Which of the 18 were trained it does not say; the input it does."""
    save_whole(small(), tmp_path / "renamed.pt", package)
    checkpoint = read_checkpoint(tmp_path / "renamed.pt")
    assert (checkpoint.labels, checkpoint.op_thresholds) == (None, None)
    assert checkpoint.network.head.out_features == 18
    assert checkpoint.normalisation == xrv.normalisation(1)


def test_torchvisions_network_pickled_whole_says_nothing_of_its_input(tmp_path: Path) -> None:
    network = small()
    with package_named("torchvision.models.densenet") as package:
        save_whole(network, tmp_path / "whole.pt", package)
    checkpoint = read_checkpoint(tmp_path / "whole.pt")
    x = torch.randn(2, 1, 64, 64) * 500
    torch.testing.assert_close(logits(checkpoint.network, x), logits(network, x), atol=0, rtol=0)
    assert checkpoint == Checkpoint(network=checkpoint.network, sha256=checkpoint.sha256)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_state_dict_with_op_threshs(prefix: str, tmp_path: Path) -> None:
    """NaN marks the outputs that TorchXRayVision answers with 0.5 always: those without a name."""
    network = small()
    points = torch.linspace(0.1, 0.9, 18)
    points[[2, 17]] = torch.nan
    state = {**network.state_dict(), "op_threshs": points}
    torch.save({f"{prefix}{key}": v for key, v in state.items()}, tmp_path / "state.pt")
    checkpoint = read_checkpoint(tmp_path / "state.pt")
    kept = [index for index in range(18) if index not in (2, 17)]
    assert checkpoint.labels == tuple(xrv.FINDINGS[index] for index in kept)
    assert checkpoint.op_thresholds == pytest.approx(points[kept].tolist())
    x = torch.randn(2, 1, 64, 64) * 500
    torch.testing.assert_close(logits(checkpoint.network, x), logits(network, x)[:, kept], atol=1e-5, rtol=0)


def test_the_resnet_of_512_pixels(tmp_path: Path) -> None:
    """Its published file is a plain state_dict; its module's own has `op_threshs` beside the prefix."""
    network = ResNet((1, 1), width=8, num_classes=18, in_channels=1).eval()
    torch.save(network.state_dict(), tmp_path / RESNET)
    state = {f"model.{key}": v for key, v in network.state_dict().items()}
    torch.save({**state, "op_threshs": torch.tensor(xrv.PUBLISHED[RESNET])}, tmp_path / "saved.pt")
    published, saved = read_checkpoint(tmp_path / RESNET), read_checkpoint(tmp_path / "saved.pt")
    for checkpoint in (published, saved):
        assert checkpoint.labels == (*xrv.FINDINGS[:14], "Fracture", "Lung Opacity")  # NaN for the other two
        assert checkpoint.preprocess == PreprocessSpec(square=True, resize=Exact(width=512, height=512))
    assert published.op_thresholds == saved.op_thresholds


@pytest.mark.parametrize(
    ("classes", "points", "complaint"),
    [
        (18, torch.full((5,), 0.5), "do not fit its 18 outputs"),
        (18, torch.full((18,), 1.5), "between 0 and 1"),
        (18, torch.zeros(18), "between 0 and 1"),
        (18, torch.full((18,), torch.nan), "names none"),
        (5, torch.full((5,), 0.5), "names 18 outputs, its network has 5"),
    ],
)
def test_op_threshs_that_do_not_fit(classes: int, points: Tensor, complaint: str, tmp_path: Path) -> None:
    torch.save({**small(classes).state_dict(), "op_threshs": points}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(tmp_path / "state.pt")


def test_one_channel_and_18_outputs_alone_are_no_sign(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "state.pt")
    checkpoint = read_checkpoint(tmp_path / "state.pt")
    assert checkpoint == Checkpoint(network=checkpoint.network, sha256=checkpoint.sha256)


def test_published_operating_points_are_one_per_finding() -> None:
    assert len(set(xrv.FINDINGS)) == 18
    for points in xrv.PUBLISHED.values():
        assert len(points) == 18
        assert all(0 < point < 1 for point in points if not np.isnan(point))
