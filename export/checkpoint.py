"""A checkpoint file to plain weights: whatever wrapper the training left, never by running its code.

Owns file formats and key names. Knows no architecture beyond the two keys by which a wrapper's
prefix is recognised; `thoraxrt.export.networks` knows the rest.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from thoraxrt.engine.errors import CheckpointError
from thoraxrt.export.networks import CxrNetwork, network_from_state

__all__ = ["Checkpoint", "read_checkpoint", "torchvision_names"]

# Where training scripts keep the weights inside a larger dict.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
# The keys that end in one of these tell how long the wrappers' common prefix is.
_ANCHORS = ("features.conv0.weight", "layer1.0.conv1.weight")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network in eval mode, float32 on the CPU, and the sha256 of the file it came from."""

    network: CxrNetwork
    sha256: str


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a `.pth`, `.pt`, `.tar` or `.safetensors` file.

    Accepts a plain state_dict, one under `state_dict`, `model_state_dict` or `model`, wrapper
    prefixes (`module.`, `densenet121.`), a classifier wrapped in a Sequential (`classifier.0`)
    and torch 0.3 key names (`norm.1`). Pickles are read with `weights_only`: no code of theirs runs.

    Raises CheckpointError where the file cannot be read, holds anything but tensors, or its keys
    fit no known network.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    network = network_from_state(torchvision_names(_state(data, path)))
    return Checkpoint(network=network, sha256=hashlib.sha256(data).hexdigest())


def _state(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The mapping of names to tensors that the file holds."""
    content = _from_safetensors(data) if _is_safetensors(data) else _from_pickle(data, path)
    for container in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}; expected a state_dict with weights")
    strange = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if strange:
        raise CheckpointError(
            f"checkpoint {path}: {len(strange)} entries are not named tensors ({str(strange[0])[:60]}, ...); expected a "
            "state_dict, alone or under 'state_dict': save model.state_dict()"
        )
    return dict(content)


def _is_safetensors(data: bytes) -> bool:
    """A safetensors file starts with its header's length (8 bytes, little endian) and a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _from_safetensors(data: bytes) -> object:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"the safetensors file is damaged: {error}; copy it again") from error


def _from_pickle(data: bytes, path: Path) -> object:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is no safetensors file and no pickle of tensors alone; pickled code is never run: where "
            "you trust the file, load it in its own project and save model.state_dict()"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or no torch file ({type(error).__name__}); copy it again"
        ) from error


def torchvision_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under torchvision's names: prefixes, wrappers and torch 0.3 spellings removed."""
    prefix = _prefix(state)
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        name = re.sub(r"^(features\..*\.(?:norm|conv))\.([12]\.\w+)$", r"\1\2", name)
        name = re.sub(r"^(classifier|fc)\.\d+\.(weight|bias)$", r"\1.\2", name)
        if name in renamed:
            raise CheckpointError(
                f"the checkpoint has two tensors for {name} (one of them is {key}); expected one linear layer as classifier"
            )
        renamed[name] = tensor
    return renamed


def _prefix(state: Mapping[str, torch.Tensor]) -> str:
    for key in state:
        for anchor in _ANCHORS:
            if key == anchor or key.endswith("." + anchor):
                return key.removesuffix(anchor)
    return ""
