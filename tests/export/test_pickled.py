"""Pickles of whole modules and of what training leaves beside the weights; hostile ones never run."""

from __future__ import annotations

import argparse
import functools
import io
import os
import pickle
import random
import struct
import warnings
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from thoraxrt.engine.errors import CheckpointError
from thoraxrt.export.checkpoint import read_checkpoint
from thoraxrt.export.pickled import Shell, content_from_pickle, state_from_shell

HERE = Path("checkpoint.pt")


def saved(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def legacy_file(pickled: bytes) -> bytes:
    """A file in the legacy format around a pickle made by hand, without storages."""
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps([], 2)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


SEQUENTIAL = b"ctorch.nn.modules.container\nSequential\n)\x81"  # a new one, its state to follow


@pytest.mark.parametrize("legacy", [False, True])
def test_a_module_pickled_whole_gives_its_state_dict(legacy: bool) -> None:
    """The legacy format has each class's source beside it, which weights_only alone refuses."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), nn.Linear(2, 2, bias=False))
    data = saved(module, legacy)
    if legacy:
        classes = torch.serialization.safe_globals([type(layer) for layer in module.modules()])
        with classes, pytest.raises(pickle.UnpicklingError, match="Only persistent_load of storage"):
            torch.load(io.BytesIO(data), weights_only=True)
    shell = content_from_pickle(data, HERE)
    assert isinstance(shell, Shell)
    assert shell.name == "torch.nn.modules.container.Sequential"
    state = state_from_shell(shell, HERE)
    expected = module.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_leaves_beside_the_weights_is_read_over(legacy: bool) -> None:
    beside = {
        "root": Path("/data/nih"),
        "windows": PureWindowsPath("c:/nih"),
        "arguments": argparse.Namespace(lr=1e-3, blocks=(6, 12)),
        "best": np.float64(0.8),
        "curve": np.arange(3.0),
        "optimizer": functools.partial(torch.optim.Adam, lr=1e-3),
        "loss": nn.BCEWithLogitsLoss(),
    }
    content = content_from_pickle(saved({"beside": beside, "weight": torch.ones(2)}, legacy), HERE)
    assert isinstance(content, dict)
    torch.testing.assert_close(content["weight"], torch.ones(2))
    assert {key for key, value in content["beside"].items() if isinstance(value, Shell)} == beside.keys()


class Reduced:
    """Pickled, it is a call that makes a folder."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


HOSTILE = {
    "posix.mkdir": Reduced(os.mkdir, "pwned"),
    "posix.system": Reduced(os.system, "mkdir pwned"),
    "exec": Reduced(exec, "import os; os.mkdir('pwned')"),
    "torch.hub.load": Reduced(torch.hub.load, "attacker/repository", "model"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["weight", "beside", "in a module", "as a module's state"])
def test_pickled_code_is_refused_by_name(
    name: str, place: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = nn.Sequential(nn.ReLU())
    if place == "in a module":
        module._buffers["evil"] = HOSTILE[name]  # type: ignore[assignment]
    elif place == "as a module's state":
        module[0].evil = HOSTILE[name]  # type: ignore[assignment]
    content = {"weight": {"state_dict": {"a": HOSTILE[name]}}, "beside": {"hyper_parameters": HOSTILE[name]}}
    (tmp_path / "evil.pt").write_bytes(saved(content.get(place, module), legacy))
    with pytest.raises(CheckpointError, match=rf"an object of {name}; .* never run"):
        read_checkpoint("evil.pt")
    assert not Path("pwned").exists()


STATES = {
    "is a list": b"]",
    "is a tuple of class and attributes": b"N}" + text("__class__") + b"cbuiltins\ndict\ns\x86",
    "has a list of modules": b"}" + text("_modules") + b"]s",
    "has a string for module": b"}" + text("_modules") + b"}" + text("0") + text("no module") + b"ss",
    "has a string for tensor": b"}" + text("_buffers") + b"}" + text("0") + text("no tensor") + b"ss",
}


@pytest.mark.parametrize("state", STATES)
def test_a_module_whose_state_is_no_modules(state: str, tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(legacy_file(b"\x80\x02" + SEQUENTIAL + STATES[state] + b"b."))
    with pytest.raises(CheckpointError, match="expected"):
        read_checkpoint(tmp_path / "evil.pt")


@pytest.mark.parametrize("depth", [100, 10_000])
def test_modules_nested_deep_are_refused(depth: int) -> None:
    inner = b"}" + text("_modules") + b"}" + text("0")
    data = legacy_file(b"\x80\x02" + (SEQUENTIAL + inner) * depth + b"N" + b"ssb" * depth + b".")
    shell = content_from_pickle(data, HERE)
    assert isinstance(shell, Shell)
    with pytest.raises(CheckpointError, match="at most 32 deep"):
        state_from_shell(shell, HERE)


@pytest.mark.parametrize("legacy", [False, True])
def test_modules_in_a_cycle_or_shared_are_refused(legacy: bool) -> None:
    cycle = nn.Sequential(nn.Sequential(nn.ReLU()))
    cycle[0]._modules["1"] = cycle
    shared = nn.Sequential(layer := nn.Linear(1, 1), layer)
    for module in (cycle, shared):
        shell = content_from_pickle(saved(module, legacy), HERE)
        assert isinstance(shell, Shell)
        with pytest.raises(CheckpointError, match="each layer once"):
            state_from_shell(shell, HERE)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bytes_are_refused_or_read(legacy: bool) -> None:
    """Never another exception, whatever the byte."""
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    data = saved(module, legacy)
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 4))):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of pickle protocols
            try:
                content = content_from_pickle(bytes(damaged[: rng.choice((None, rng.randrange(len(data))))]), HERE)
                if isinstance(content, Shell):
                    state_from_shell(content, HERE)
            except CheckpointError:
                continue


def test_the_list_of_known_classes_ends_with_the_reading() -> None:
    before = torch.serialization.get_safe_globals()  # torch's set as a list, in no order
    content_from_pickle(saved(nn.ReLU()), HERE)
    after = torch.serialization.get_safe_globals()
    assert (len(after), set(after)) == (len(before), set(before))
