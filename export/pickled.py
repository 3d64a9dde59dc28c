"""A torch file to tensors and plain values: classes it mentions become inert shells, none of its code runs.

Owns which classes a file may mention. All reading is torch.load's with `weights_only`, whose unpickler
looks names up in a list and imports nothing; this module only lengthens that list, by shells.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import nn

from thoraxrt.engine.errors import CheckpointError

__all__ = ["Shell", "content_from_pickle", "state_from_shell"]


class Shell:
    """Stands in for an object whose class is not imported: takes any arguments, keeps its state unread.

    `state` is whatever the file set, for a module its `__dict__`; `name` the class's full name in the file.
    """

    name: str = ""
    state: object = None

    def __new__(cls, *_: object) -> Self:
        """Any arguments, none kept."""
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, attribute: str) -> object:
        """An attribute that the file set, None where it is missing (as in files older than the attribute)."""
        return self.state.get(attribute) if isinstance(self.state, Mapping) else None


# Networks that people save whole, and the layers that a network we know can have.
_LAYERS: Final = (
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Conv2d, nn.DataParallel, nn.Dropout, nn.Flatten, nn.Identity,
    nn.Linear, nn.MaxPool2d, nn.ReLU, nn.Sequential, nn.Sigmoid,
)  # fmt: skip
_MODULES: Final = (
    *(f"{layer.__module__}.{layer.__qualname__}" for layer in _LAYERS),
    *(f"{package}.{kind}" for package in ("torchxrayvision.models", "torchvision.models.densenet")
      for kind in ("DenseNet", "_DenseLayer", "_DenseBlock", "_Transition")),
    *(f"torchvision.models.resnet.{kind}" for kind in ("ResNet", "BasicBlock", "Bottleneck")),
    "torchxrayvision.models.ResNet",
    "torch.nn.backends.thnn._get_thnn_function_backend",  # an attribute of every module before torch 1.4
)  # fmt: skip

# What training leaves beside the weights (hyperparameters, callbacks): read over, never used.
_BESIDE: Final = (
    "argparse.Namespace",
    *(f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    *(f"torch.nn.modules.loss.{kind}Loss" for kind in ("BCE", "BCEWithLogits", "CrossEntropy")),
    *(f"torch.optim.{kind}" for kind in ("adam.Adam", "adamw.AdamW", "sgd.SGD")),
    *(f"numpy.{core}.multiarray.{kind}" for core in ("core", "_core") for kind in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    "functools.partial",
    "typing.Any",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "Path", "String")),
)

# weights_only sets items of exact dicts alone, so subclasses of dict become one.
_DICTS: Final = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)

_LAYERS_DEEP: Final = 32  # networks have about 6


def content_from_pickle(data: bytes, path: Path) -> object:
    """What a torch file holds: tensors, plain values, and a `Shell` for each object of a known class.

    `data` is the file, zip or legacy format; `path` its name in messages. Raises CheckpointError where it is
    damaged, or names the class that is not known. Nothing in the file is called or imported.
    """
    try:
        if not data.startswith(b"PK"):
            data = _without_class_sources(data)
        with torch.serialization.safe_globals(_shells()):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"checkpoint {path} holds {f'an object of {named[1]}' if named else 'pickled objects'}; expected tensors "
            "and plain values, or a network of torchvision's or TorchXRayVision's classes. Pickled code is never run: "
            "where you trust the file, load it in its own project and save model.state_dict()"
        ) from error
    except Exception as error:  # struct.error, AssertionError, MemoryError: a damaged pickle raises anything
        raise CheckpointError(
            f"checkpoint {path} is damaged or no torch file ({type(error).__name__}); copy it again"
        ) from error


def state_from_shell(module: Shell, path: Path) -> dict[str, object]:
    """The state_dict of a module that was pickled whole: parameters and buffers under their dotted names.

    Raises CheckpointError where the shells are no tree of modules: one twice, or nested too deep.
    """
    state: dict[str, object] = {}
    seen: set[int] = set()
    pending: list[tuple[str, object]] = [("", module)]
    while pending:
        prefix, shell = pending.pop()
        if not isinstance(shell, Shell) or id(shell) in seen or prefix.count(".") > _LAYERS_DEEP:
            raise CheckpointError(
                f"checkpoint {path}: the pickled {module.name} is no tree of layers (at {prefix[:60] or 'its root'}); "
                f"expected each layer once, at most {_LAYERS_DEEP} deep: save model.state_dict() instead"
            )
        seen.add(id(shell))
        for group in ("_parameters", "_buffers", "_modules"):
            members = shell.get(group)
            for name, member in members.items() if isinstance(members, Mapping) else ():
                if member is not None and group == "_modules":
                    pending.append((f"{prefix}{name}.", member))
                elif member is not None:
                    state[f"{prefix}{name}"] = member
    return state


def _shells() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    return [
        *((type("Shell", (Shell,), {"name": name}), name) for name in (*_MODULES, *_BESIDE)),
        *((OrderedDict, name) for name in _DICTS),
        (_empty_dict, "collections.defaultdict"),
        (_class_alone, _CLASS_ALONE),
    ]


def _empty_dict(*_: object) -> OrderedDict[object, object]:
    return OrderedDict()


# --- torch up to 1.5 ------------------------------------------------------------------------------

_CLASS_ALONE: Final = "thoraxrt.class_alone"  # a name in rewritten files, nothing to import


def _class_alone(tagged: tuple[str, type[Shell], str, str]) -> type[Shell]:
    return tagged[1]


def _without_class_sources(data: bytes) -> bytes:
    """A legacy file in which each module's class is named plainly, not beside its source code.

    The legacy format gives it as a persistent id, ("module", class, source file, source), which weights_only
    refuses. The rewritten pickle passes that tuple to `_class_alone`. What reads it is weights_only as ever,
    so nothing rests on the rewriting being right but that the file can be read.
    """
    stream = io.BytesIO(data)
    for _ in range(3):  # magic number, version, system
        for _ in pickletools.genops(stream):
            pass
    edits: list[tuple[int, int, bytes]] = []  # position, length, replacement
    marks: list[tuple[int, bool]] = []  # position, whether "module" follows
    memo: set[object] = set()  # the slots that hold the string "module"
    closed = (0, False)
    before, tag = "", False
    for op, argument, position in pickletools.genops(stream):
        assert position is not None  # genops knows it, of a stream that can tell
        tag = (tag and "PUT" in op.name) or argument == "module" or ("GET" in op.name and argument in memo)
        if tag and "PUT" in op.name:
            memo.add(argument)
        if before == "MARK":
            marks[-1] = (marks[-1][0], tag)
        if op.name == "MARK":
            marks.append((position, False))
        elif pickletools.markobject in op.stack_before:
            closed = marks.pop()
        elif op.name == "BINPERSID" and closed[1]:
            module, _, name = _CLASS_ALONE.rpartition(".")
            edits += [(closed[0], 0, f"c{module}\n{name}\n".encode()), (position, 1, pickle.TUPLE1 + pickle.REDUCE)]
        before = op.name
    pieces, end = [], 0
    for position, length, replacement in sorted(edits):
        pieces += [data[end:position], replacement]
        end = position + length
    return b"".join([*pieces, data[end:]])
