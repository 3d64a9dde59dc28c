"""A Hugging Face style folder: which files hold the weights, and what `config.json` says of them.

Owns timm's and transformers' configuration as far as it concerns this network family. Knows nothing of tensors.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from thoraxrt.engine.bundle import TrainedWith
from thoraxrt.engine.errors import CheckpointError
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter
from thoraxrt.export.graph import Normalisation
from thoraxrt.export.networks import CxrNetwork

__all__ = ["HubConfig", "read_config", "weight_files"]

_INDEX: Final = "model.safetensors.index.json"
_HARMLESS_ARGS: Final = {"num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "drop_block_rate"}


class _Pretrained(msgspec.Struct, kw_only=True):
    """timm's `pretrained_cfg`; its defaults are timm's own (`timm.data.resolve_data_config`)."""

    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class HubConfig(msgspec.Struct, kw_only=True):
    """What is used of `config.json`; all of it may be missing."""

    architecture: str | None = None
    global_pool: str = "avg"
    model_args: dict[str, Any] | None = None
    label_names: list[str] | dict[str, str] | None = None
    id2label: dict[str, str] | None = None
    pretrained_cfg: _Pretrained | None = None

    def check(self, network: CxrNetwork) -> None:
        """Raise CheckpointError where the configuration names another network than the weights' names do.

        timm has networks that share names and shapes and compute something else (`resnetblur50`).
        """
        architecture = (self.architecture or network.name).split(".")[0].removeprefix("tv_")
        arguments = self.model_args or {}
        pool = arguments.get("global_pool", self.global_pool)
        other = sorted(arguments.keys() - _HARMLESS_ARGS)
        if architecture != network.name or pool != "avg" or other:
            raise CheckpointError(
                f"config.json says {architecture} with {pool} pooling"
                f"{', ' + ', '.join(other) if other else ''}; its weights are read as {network.name} with avg pooling "
                "and no other arguments: export the network with --network, or to ONNX in its own code"
            )

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The outputs' names in order, from `label_names` or `id2label`; None for transformers' LABEL_0, LABEL_1, ...

        Raises CheckpointError where the numbering has gaps.
        """
        named = self.label_names or self.id2label or {}
        if isinstance(named, dict):
            if set(named) != {str(index) for index in range(len(named))}:
                raise CheckpointError(
                    f"config.json numbers its labels {', '.join(named)}; expected 0 to {len(named) - 1}: correct it"
                )
            named = [named[str(index)] for index in range(len(named))]
        return None if all(re.fullmatch(r"LABEL_\d+", name) for name in named) else tuple(named)

    @property
    def normalisation(self) -> Normalisation | None:
        """Mean and std, where it has both."""
        cfg = self.pretrained_cfg
        return Normalisation(mean=cfg.mean, std=cfg.std) if cfg and cfg.mean and cfg.std else None

    @property
    def preprocess(self) -> PreprocessSpec | None:
        """timm's evaluation transform (`timm.data.transforms_imagenet_eval`), its interpolation taken as bilinear.

        Raises CheckpointError for the crops that a PreprocessSpec cannot say.
        """
        cfg = self.pretrained_cfg
        if cfg is None or cfg.input_size is None:
            return None
        _, height, width = cfg.input_size
        try:
            resized = math.floor(width / cfg.crop_pct)
            modes: dict[str, Exact | Shorter] = {
                "center": Shorter(pixels=resized),
                "squash": Exact(width=resized, height=resized),
            }
            spec = PreprocessSpec(resize=modes[cfg.crop_mode], crop=width)
        except (ValueError, KeyError, ArithmeticError) as error:
            raise CheckpointError(
                f"config.json's input_size {cfg.input_size}, crop_pct {cfg.crop_pct} and crop_mode {cfg.crop_mode} "
                "make no crop of the resized image; expected crop_mode center or squash: correct it"
            ) from error
        if height != width:
            raise CheckpointError(f"config.json's input_size is {cfg.input_size}; expected a square: correct it")
        return spec

    @property
    def trained_with(self) -> TrainedWith | None:
        """timm's interpolation where it is bicubic; None without a geometry."""
        cfg = self.pretrained_cfg
        return "pillow-bicubic" if cfg and cfg.input_size and cfg.interpolation == "bicubic" else None


def read_config(folder: Path) -> HubConfig:
    """`config.json`, empty where there is none. Raises CheckpointError where it is not valid."""
    path = folder / "config.json"
    if not path.exists():
        return HubConfig()
    data = _read(path)
    try:
        config = msgspec.json.decode(data, type=HubConfig)
        if config.pretrained_cfg is None:  # timm before 0.9 wrote it flat
            config.pretrained_cfg = msgspec.json.decode(data, type=_Pretrained)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no configuration of timm or transformers: {error}; correct it") from error
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order of name: safetensors (one or in shards), else pytorch_model.bin.

    Raises CheckpointError where there are none.
    """
    for name in ("model.safetensors", _INDEX, "pytorch_model.bin"):
        if (folder / name).exists():
            return _shards(folder) if name == _INDEX else [folder / name]
    raise CheckpointError(
        f"folder {folder} holds no weights; expected model.safetensors, {_INDEX} or pytorch_model.bin"
    )


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _shards(folder: Path) -> list[Path]:
    try:
        index = msgspec.json.decode(_read(folder / _INDEX), type=_Index)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{folder / _INDEX} is no index of shards: {error}; copy it again") from error
    names = sorted(set(index.weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{folder / _INDEX} names {outside[0]}; expected files in that folder itself")
    return [folder / name for name in names]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
