"""A checkpoint to a network and what the file says of it: whatever wrapper the training left.

`read_checkpoint` is the story. Owns containers and key names. Pickles are `thoraxrt.export.pickled`'s,
folders `thoraxrt.export.hub`'s, TorchXRayVision's facts `thoraxrt.export.xrv`'s; of architectures it
knows the two keys by which a wrapper's prefix is recognised, `thoraxrt.export.networks` the rest.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import safetensors
import safetensors.torch
import torch

from thoraxrt.engine.bundle import TrainedWith
from thoraxrt.engine.errors import CheckpointError
from thoraxrt.engine.preprocess import PreprocessSpec
from thoraxrt.export import hub, xrv
from thoraxrt.export.graph import Normalisation
from thoraxrt.export.networks import CxrNetwork, ResNet, network_from_state
from thoraxrt.export.pickled import Shell, content_from_pickle, state_from_shell

__all__ = ["Checkpoint", "checkpoint_sha256", "read_checkpoint", "read_state", "torchvision_names"]

# Where training scripts keep the weights inside a larger dict; Lightning's is state_dict.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
# Where they keep the outputs' names: beside the weights, or as attributes of a module pickled whole.
_NAMES = ("pathologies", "targets", "labels")
# The keys that end in one of these tell how long the wrappers' common prefix is.
_ANCHORS = ("features.conv0.weight", "layer1.0.conv1.weight")
# transformers' own ResNet, which has torchvision's layers under other names.
_TRANSFORMERS = "embedder.embedder.convolution.weight"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network in eval mode, float32 on the CPU, and what its file says; None where it says nothing.

    `sha256` is the file's, for a folder its weights' (shards one after another, in order of name).
    `labels` name the outputs in order; `op_thresholds` are TorchXRayVision's operating points, one
    probability in 0..1 per label. `trained_with` names training's resize (`skimage`, `pillow-bicubic`)
    where it is not Pillow's bilinear, which `preprocess` stands in for: export is to measure the skew.
    """

    network: CxrNetwork
    sha256: str
    labels: tuple[str, ...] | None = None
    op_thresholds: tuple[float, ...] | None = None
    normalisation: Normalisation | None = None
    preprocess: PreprocessSpec | None = None
    trained_with: TrainedWith | None = None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a `.pth`, `.pt`, `.tar`, `.ckpt` or `.safetensors` file, or a Hugging Face style folder.

    Accepts a plain state_dict; one under `state_dict` (PyTorch Lightning's too), `model_state_dict` or
    `model`; a network of torchvision's or TorchXRayVision's classes pickled whole; wrapper prefixes
    (`module.`, `model.`), a classifier wrapped in a Sequential (`classifier.0`) and torch 0.3 key names
    (`norm.1`). Keys outside a complete network's prefix (loss weights, metrics) are left aside; those
    inside must fit exactly. No code in the file ever runs.

    A folder holds `model.safetensors` (or its index and shards) or `pytorch_model.bin`, and a
    `config.json` of timm's or transformers' kind for labels, normalisation and geometry.

    TorchXRayVision's weights are recognised by their class, by `op_threshs` or by the published file's
    name. Outputs without a name are cut out of the classifier, and so are those whose operating point
    is NaN: for them TorchXRayVision answers 0.5 whatever the image.

    Raises CheckpointError where the file cannot be read, holds objects of unknown classes, its keys
    fit no known network, or what it says of its outputs does not fit them.
    """
    path = Path(path)
    if not path.is_dir():
        data = _read(path)
        return _checkpoint(_weights(data, path), path, hashlib.sha256(data).hexdigest())
    config = hub.read_config(path)
    sha256, state = hashlib.sha256(), dict[str, object]()
    for file in hub.weight_files(path):
        data = _read(file)
        sha256.update(data)
        shard = _weights(data, file).state
        if twice := state.keys() & shard.keys():
            raise CheckpointError(
                f"{file} holds {min(twice)}, as another shard does; expected each once: copy it again"
            )
        state.update(shard)
    checkpoint = _checkpoint(_Weights(state, []), path, sha256.hexdigest())
    config.check(checkpoint.network)
    said: dict[str, Any] = {
        "labels": _fitting(config.labels, checkpoint.network, path),
        "normalisation": config.normalisation,
        "preprocess": config.preprocess,
        "trained_with": config.trained_with,
    }
    return replace(checkpoint, **{field: value for field, value in said.items() if value is not None})


def checkpoint_sha256(path: Path) -> str:
    """The sha256 of a checkpoint, whatever it holds, as in `Checkpoint`. Raises CheckpointError."""
    sha256 = hashlib.sha256()
    for file in hub.weight_files(path) if path.is_dir() else [path]:
        sha256.update(_read(file))
    return sha256.hexdigest()


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file of whatever network, under the file's own names. Raises CheckpointError."""
    return _tensors(_weights(_read(path), path).state, path)


class _Weights(NamedTuple):
    """A state_dict, its values not yet looked at, and what is around it, outermost first, that may say more."""

    state: Mapping[str, object]
    around: list[Mapping[str, object] | Shell]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error


def _weights(data: bytes, path: Path) -> _Weights:
    content = _from_safetensors(data) if _is_safetensors(data) else content_from_pickle(data, path)
    around: list[Mapping[str, object] | Shell] = []
    if isinstance(content, Mapping):
        inside = (content[name] for name in _CONTAINERS if isinstance(content.get(name), Mapping | Shell))
        if (inner := next(inside, None)) is not None:
            around.append(content)
            content = inner
    if isinstance(content, Shell):
        around.append(content)
        content = state_from_shell(content, path)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}; expected a state_dict with weights")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise CheckpointError(_not_tensors(path, strange))
    return _Weights(content, around)


def _checkpoint(weights: _Weights, path: Path, sha256: str) -> Checkpoint:
    """The network, its unnamed outputs dropped, and what is said of it beside a folder's configuration."""
    state = _tensors(torchvision_names(weights.state), path)
    state.pop("op_threshs", None)
    network = network_from_state(state)
    points = _operating_points(weights.state, network, path)
    said = [*_named(weights.around), xrv.FINDINGS if points is not None else None]
    labels = next(filter(None, (_fitting(names, network, path) for names in said)), None)
    if labels is not None:
        labels, points = _drop_unnamed(network, labels, points, path)
    checkpoint = Checkpoint(network=network, sha256=sha256, labels=labels, op_thresholds=points)
    pickled = (holder.name for holder in weights.around if isinstance(holder, Shell))
    if points is None and not any(name.startswith("torchxrayvision.") for name in pickled):
        return checkpoint
    return replace(
        checkpoint,
        normalisation=xrv.normalisation(network.stem.in_channels),
        preprocess=xrv.preprocess(512 if isinstance(network, ResNet) else 224),
        trained_with="skimage",
    )


def _drop_unnamed(
    network: CxrNetwork, labels: tuple[str, ...], points: tuple[float, ...] | None, path: Path
) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Cut the outputs without a name, or with NaN for operating point, out of network, labels and points."""
    kept = [i for i, label in enumerate(labels) if label and not (points and math.isnan(points[i]))]
    if not kept:
        raise CheckpointError(f"checkpoint {path} names none of its {len(labels)} outputs; expected one at least")
    network.keep_outputs(kept)
    return tuple(labels[i] for i in kept), tuple(points[i] for i in kept) if points else None


def _named(around: Iterable[Mapping[str, object] | Shell]) -> Iterator[object]:
    for holder in around:
        for name in _NAMES:
            yield holder.get(name)


def _fitting(labels: object, network: CxrNetwork, path: Path) -> tuple[str, ...] | None:
    """The same, where they are strings. Raises CheckpointError where there are more or fewer than outputs."""
    if not isinstance(labels, list | tuple) or not labels or not all(isinstance(label, str) for label in labels):
        return None
    if len(labels) != network.head.out_features:
        raise CheckpointError(
            f"checkpoint {path} names {len(labels)} outputs, its network has {network.head.out_features}; expected a "
            "name each, empty for an output without one: correct the names it was saved with"
        )
    return tuple(labels)


def _operating_points(state: Mapping[str, object], network: CxrNetwork, path: Path) -> tuple[float, ...] | None:
    """TorchXRayVision's, one per output, NaN for an untrained one: the file's own, else by the published file's name."""
    held = next((state[key] for key in state if re.fullmatch(r"(.*\.)?op_threshs", key)), None)
    points = torch.tensor(xrv.PUBLISHED[path.name]) if held is None and path.name in xrv.PUBLISHED else held
    if points is None:
        return None
    outputs = network.head.out_features
    if not _is_plain(points) or points.shape != (outputs,) or not ((points > 0) & (points < 1) | points.isnan()).all():
        raise CheckpointError(
            f"checkpoint {path} has op_threshs that do not fit its {outputs} outputs; expected a probability between "
            "0 and 1 for each, NaN for none: set the model's op_threshs to None before saving, where it was retrained"
        )
    return tuple(points.float().tolist())


def _tensors(state: Mapping[str, object], path: Path) -> dict[str, torch.Tensor]:
    if strange := [key for key, value in state.items() if not _is_plain(value)]:
        raise CheckpointError(_not_tensors(path, strange))
    return {key: value for key, value in state.items() if _is_plain(value)}


def _is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a dense tensor with all its values in the file: a tiny file can claim a huge one."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def _not_tensors(path: Path, keys: list[Any]) -> str:
    return (
        f"checkpoint {path}: {len(keys)} entries are not named tensors ({str(keys[0])[:60]}, ...); expected a "
        "state_dict, alone or under 'state_dict': save model.state_dict()"
    )


def _is_safetensors(data: bytes) -> bool:
    """A safetensors file starts with its header's length (8 bytes, little endian) and a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _from_safetensors(data: bytes) -> object:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"the safetensors file is damaged: {error}; copy it again") from error


def torchvision_names(state: Mapping[str, object]) -> dict[str, object]:
    """The network's entries under torchvision's names: prefixes, wrappers and torch 0.3 spellings removed.

    Entries outside the prefix are left aside where the network inside is complete, with a classifier.
    Raises CheckpointError for two networks, or two layers as classifier.
    """
    prefix = _prefix(state)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not any(key.startswith(("classifier.", "fc.")) for key in inside):
        inside = {key.removeprefix(prefix): value for key, value in state.items()}
    renamed: dict[str, object] = {}
    for key, value in inside.items():
        name = re.sub(r"^(features\..*\.(?:norm|conv))\.([12]\.\w+)$", r"\1\2", key)
        name = re.sub(r"^(classifier|fc)\.\d+\.(weight|bias)$", r"\1.\2", name)
        if name in renamed:
            raise CheckpointError(
                f"the checkpoint has two tensors for {name} (one of them is {key}); expected one linear layer as classifier"
            )
        renamed[name] = value
    return renamed


def _prefix(state: Mapping[str, object]) -> str:
    """What stands before every name of the network."""
    found = {
        key.removesuffix(anchor): anchor
        for anchor in _ANCHORS
        for key in state
        if re.search(rf"(^|\.){re.escape(anchor)}$", key)
    }
    if len(found) > 1:
        raise CheckpointError(
            f"the checkpoint holds {len(found)} networks ({', '.join(map(repr, list(found)[:3]))}); expected one: "
            "save the state_dict of the one to be served"
        )
    if not found and any(key.endswith(_TRANSFORMERS) for key in state):
        raise CheckpointError(
            "the checkpoint has transformers' own names for a ResNet (embedder.embedder ...); expected torchvision's or "
            "timm's: export the network to ONNX in its own code"
        )
    return next(iter(found), "")
