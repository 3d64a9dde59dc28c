"""Each wrapper a training script leaves around a state dict, and what is refused."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from thoraxrt.engine.errors import CheckpointError
from thoraxrt.export.checkpoint import Checkpoint, read_checkpoint
from thoraxrt.export.networks import CxrNetwork, DenseNet, ResNet

State = dict[str, Tensor]


def old_names(state: State) -> State:
    """As torch 0.3 spelt them, in the public CheXNet files' wrapper."""
    renamed = {
        re.sub(r"(norm|conv)([12]\.)", r"\1.\2", key) if "denselayer" in key else key: v for key, v in state.items()
    }
    renamed = {key.replace("classifier.", "classifier.0."): v for key, v in renamed.items()}
    return {f"module.densenet121.{key}": v for key, v in renamed.items() if "num_batches_tracked" not in key}


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best_loss": 0.5},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
    "module": lambda state: {f"module.{key}": v for key, v in state.items()},
    "half": lambda state: {key: v.half() if v.is_floating_point() else v for key, v in state.items()},
}


@pytest.fixture
def network() -> CxrNetwork:
    torch.manual_seed(0)
    network = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=14)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network.eval()


class AttributeDict(dict[str, Any]):
    """As Lightning's: pickled by its class's name."""

    __module__ = "pytorch_lightning.utilities.parsing"


def lightning(state: State, **hyper_parameters: object) -> dict[str, Any]:
    """The layout of a `.ckpt` that PyTorch Lightning 2.6 wrote, with a loss and a metric beside the network."""
    beside = {"criterion.pos_weight": torch.ones(14), "val_auroc.confmat": torch.zeros(5, 14, 2, 2)}
    return {
        "epoch": 3,
        "global_step": 800,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {**{f"model.{key}": v for key, v in state.items()}, **beside},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_auroc'}": {"best_model_score": torch.tensor(0.8)}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4, "params": [0, 1]}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
    }


def saved_lightning(content: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:  # the package is there only while saving
        for name in ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.utilities.parsing"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[AttributeDict.__module__].AttributeDict = AttributeDict  # type: ignore[attr-defined]
        torch.save(content, path)
    return path


def assert_same(network: CxrNetwork, path: Path, tolerance: float = 0.0) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(read_checkpoint(path).network(x), network(x), atol=tolerance, rtol=0)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers(wrapper: str, legacy: bool, network: CxrNetwork, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(WRAPPERS[wrapper](network.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    assert_same(network, path, 2e-2 if wrapper == "half" else 0.0)


def test_chexnet_files_of_torch_0_3(network: CxrNetwork, tmp_path: Path) -> None:
    torch.save({"state_dict": old_names(network.state_dict())}, tmp_path / "chexnet.pth.tar")
    assert_same(network, tmp_path / "chexnet.pth.tar")


def test_safetensors(network: CxrNetwork, tmp_path: Path) -> None:
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    assert_same(network, tmp_path / "weights.safetensors")


def test_resnet_with_a_prefix_and_a_wrapped_classifier(tmp_path: Path) -> None:
    network = ResNet((1, 1), width=8, num_classes=3).eval()
    state = {f"model.{key.replace('fc.', 'fc.1.')}": v for key, v in network.state_dict().items()}
    torch.save(state, tmp_path / "resnet.pt")
    assert_same(network, tmp_path / "resnet.pt")


@pytest.mark.parametrize("prefix", ["", "model.", "net."])
def test_lightning(prefix: str, network: CxrNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"{prefix}{key}": v for key, v in network.state_dict().items()}
    hyper_parameters = AttributeDict(lr=1e-4, root=Path("/data"), arguments=argparse.Namespace(blocks=(2, 2)))
    content = lightning(state, **hyper_parameters, nested=hyper_parameters)
    assert_same(network, saved_lightning(content, tmp_path / "epoch=3.ckpt", monkeypatch))


def test_lightning_with_an_object_of_its_own_project(network: CxrNetwork, tmp_path: Path) -> None:
    torch.save(lightning(network.state_dict(), config=Exploit()), tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"holds an object of posix\.mkdir; .* save model\.state_dict\(\)"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_keys_inside_the_prefix_must_fit(network: CxrNetwork, tmp_path: Path) -> None:
    content = lightning(network.state_dict())
    content["state_dict"]["model.attention.weight"] = torch.ones(3)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(attention\.weight\)"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_a_classifier_beside_its_backbone_leaves_nothing_aside(network: CxrNetwork, tmp_path: Path) -> None:
    state = network.state_dict()
    apart = {key if key.startswith("classifier") else f"backbone.{key}": v for key, v in state.items()}
    torch.save(apart, tmp_path / "apart.pt")
    assert_same(network, tmp_path / "apart.pt")
    torch.save({**apart, "attention.weight": torch.ones(3)}, tmp_path / "attention.pt")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(attention\.weight\)"):
        read_checkpoint(tmp_path / "attention.pt")


def test_two_networks_are_refused(network: CxrNetwork, tmp_path: Path) -> None:
    state = network.state_dict()
    torch.save({f"{prefix}.{key}": v for prefix in ("model", "ema") for key, v in state.items()}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"2 networks \('model\.', 'ema\.'\)"):
        read_checkpoint(tmp_path / "two.pt")


@pytest.mark.parametrize("name", ["labels", "pathologies", "targets"])
def test_labels_of_the_file_name_its_outputs(name: str, network: CxrNetwork, tmp_path: Path) -> None:
    """Outputs without a name are cut; the other logits stay what they were."""
    labels = [f"finding {index}" if index % 3 else "" for index in range(14)]
    torch.save({"model": network.state_dict(), name: labels}, tmp_path / "named.pt")
    checkpoint = read_checkpoint(tmp_path / "named.pt")
    assert checkpoint.labels == tuple(label for label in labels if label)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network(x)[:, [bool(label) for label in labels]]
        torch.testing.assert_close(checkpoint.network(x), expected, atol=1e-6, rtol=0)
    assert checkpoint.network.head.out_features == len(checkpoint.labels)


@pytest.mark.parametrize(
    ("labels", "complaint"), [(["Mass"] * 13, "names 13 outputs, its network has 14"), ([""] * 14, "names none")]
)
def test_labels_that_do_not_fit(labels: list[str], complaint: str, network: CxrNetwork, tmp_path: Path) -> None:
    torch.save({"state_dict": network.state_dict(), "labels": labels}, tmp_path / "named.pt")
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(tmp_path / "named.pt")


def test_a_file_says_nothing_that_it_does_not_hold(network: CxrNetwork, tmp_path: Path) -> None:
    torch.save({"state_dict": network.state_dict(), "labels": torch.ones(14)}, tmp_path / "plain.pt")
    checkpoint = read_checkpoint(tmp_path / "plain.pt")
    assert checkpoint == Checkpoint(network=checkpoint.network, sha256=checkpoint.sha256)
    assert checkpoint.sha256 == hashlib.sha256((tmp_path / "plain.pt").read_bytes()).hexdigest()


def test_the_real_checkpoint(nih: Path) -> None:
    checkpoint = read_checkpoint(nih / "checkpoints" / "densenet121-nih.pth.tar")
    assert checkpoint.network.name == "densenet121"
    assert checkpoint.network.head.out_features == 14


class Exploit:
    """Pickled, it would make a folder when loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_pickled_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"features.conv0.weight": Exploit()}}, "evil.pth")
    with pytest.raises(CheckpointError, match="never run"):
        read_checkpoint("evil.pth")
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "damaged or no torch file"),
        (b"hello, I am no checkpoint", "never run|damaged"),
        (b"PK\x03\x04" + b"\0" * 40, "damaged"),
        (b"\x10\0\0\0\0\0\0\0{not json here  ", "safetensors file is damaged"),
    ],
)
def test_damaged_files(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(tmp_path / "broken.pth")


def test_a_truncated_file(network: CxrNetwork, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("features.norm0.weight"), r"1 missing \(features.norm0.weight\)"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), r"1 unexpected \(extra.weight\)"),
        (lambda s: s.update({"classifier.bias": torch.zeros(13)}), r"classifier.bias \(13,\) instead of \(14,\)"),
        (lambda s: s["classifier.bias"].fill_(torch.nan), "NaN"),
        (lambda s: s.update({"note": "hello"}), "not named tensors"),
        (lambda s: s.clear(), "expected a state_dict"),
        (lambda s: s.update({3: torch.zeros(1)}), r"not named tensors \(3, "),
        (lambda s: s.update({"classifier.weight": torch.zeros(1, 1).expand(10**9, 20)}), "not named tensors"),
        (lambda s: s.update({"classifier.weight": torch.zeros(14, 20).to_sparse()}), "not named tensors"),
        (lambda s: s.update({"classifier.weight": torch.zeros(14, 20, device="meta")}), "not named tensors"),
    ],
)
def test_keys_that_do_not_fit(
    change: Callable[[State], Any], complaint: str, network: CxrNetwork, tmp_path: Path
) -> None:
    state = {key: v.clone() for key, v in network.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    with pytest.raises(CheckpointError, match=complaint):
        read_checkpoint(tmp_path / "changed.pth")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "none.pth")
