"""Side by side: a thoraxrt with itself, with one that is slower, and what cannot stand on a side."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image

from thoraxrt.benchmarks import rounds as module
from thoraxrt.benchmarks.against import against, alternating, change_from_pairs
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BundleError, RequestError
from thoraxrt.export.phantoms import phantom
from thoraxrt.server.models import EngineOptions

T = TypeVar("T")
RAN = EngineOptions(backend="onnxruntime", precision="fp32")
FIGURES = ["engine, an image", "engine, 2 images", "grpc, an image"]
SLOWER = """
import time
from thoraxrt.engine.backends.onnxruntime import OnnxRuntimeBackend

run = OnnxRuntimeBackend.run

def slower(self, images):
    time.sleep(0.1)
    return run(self, images)

OnnxRuntimeBackend.run = slower
"""


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [png(index) for index in range(3)]


def png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(phantom(7, index).pixels[::4, ::4]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TURN_S", 0.02)
    monkeypatch.setattr(module, "_REST_S", 0.0)


def test_each_side_is_first_as_often_as_the_other_and_both_do_the_same_in_a_round(quick: None) -> None:
    called: list[str] = []
    pair = (lambda number: called.append(f"a{number}"), lambda number: called.append(f"b{number}"))
    found = alternating({"x": pair}, 4)
    assert [name for name, _ in groupby(called)] == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3"]
    assert [len(times) for times in found["x"]] == [4, 4]


def test_a_fifth_slower_is_caught_whatever_the_machine_does_from_round_to_round() -> None:
    random = np.random.default_rng(0)

    def verdict(share: float) -> str:
        load = random.lognormal(0, 0.4, 26)  # both sides of a round have it
        before, after = load * 30 * random.lognormal(0, 0.05, (2, 26))
        return change_from_pairs("x", tuple(before), tuple(after * share)).verdict

    assert [verdict(1.2) for _ in range(200)].count("slower") >= 190
    assert [verdict(1 / 1.2) for _ in range(200)].count("faster") >= 190
    assert not {"slower", "faster"} & {verdict(1) for _ in range(400)}


def test_beside_its_copy_a_bundle_is_not_slower(
    sample_bundle: Bundle, files: list[bytes], tmp_path: Path, quick: None
) -> None:
    other, drawn = shutil.copytree(sample_bundle.path, tmp_path / "copy.bundle"), []

    def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        drawn.append(total)
        return items

    # With 11 rounds the interval goes from the least ratio to the largest: noise alone is "slower" once in 2,048.
    found = against(sample_bundle.path, files, RAN, other, batch=2, rounds=11, track=track)
    assert [change.figure for change in found] == FIGURES
    assert "slower" not in [change.verdict for change in found]
    assert min(change.before_ms for change in found) > 0
    assert drawn == [11]


def test_what_is_slower_here_than_in_another_python_is_seen(
    sample_bundle: Bundle, files: list[bytes], tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this side's PYTHONPATH, which the other does not have. How sure it is, is the machine's matter."""
    (tmp_path / "sitecustomize.py").write_text(SLOWER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = against(sample_bundle.path, files, RAN, Path(sys.executable), batch=2, rounds=8)
    assert [change.figure for change in found] == FIGURES
    assert min(change.ratio for change in found) > 1.2  # several times as long, beside an image of some 10 ms
    assert {change.verdict for change in found} <= {"slower", "cannot tell"}


def test_what_cannot_stand_on_the_other_side_is_refused_with_its_reason(
    sample_bundle: Bundle, files: list[bytes], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(
        RequestError, match=r"file is no folder and cannot be run; expected another bundle, or a Python"
    ):
        against(sample_bundle.path, files, RAN, file, batch=2)
    with pytest.raises(BundleError):
        against(sample_bundle.path, files, RAN, tmp_path, batch=2)
    with pytest.raises(RequestError, match="7 rounds of 3 images; expected at least 8"):
        against(sample_bundle.path, files, RAN, Path(sys.executable), batch=2, rounds=7)
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without its packages
    file.chmod(0o755)
    with pytest.raises(RequestError, match=r"file has ended \(ModuleNotFoundError: No module named 'thoraxrt'\)"):
        against(sample_bundle.path, files, RAN, file, batch=2)
