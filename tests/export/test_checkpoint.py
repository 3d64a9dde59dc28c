"""Each wrapper a training script leaves around a state dict, and what is refused."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from thoraxrt.engine.errors import CheckpointError
from thoraxrt.export.checkpoint import read_checkpoint
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
