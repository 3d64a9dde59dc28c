"""What the serving benchmark measures belongs together: a real server, a real load, a peer."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tests.server.conftest import tiny_graph, write_bundle
from thoraxrt.benchmarks import serving
from thoraxrt.benchmarks.served import Served
from thoraxrt.benchmarks.serving_load import Load, Target
from thoraxrt.engine.engine import Engine
from thoraxrt.export.phantoms import phantom
from thoraxrt.server.models import EngineOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server decodes in processes")


def png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(phantom(7, index).pixels[::8, ::8]).save(file, "PNG")
    return file.getvalue()


def test_throughput_latency_overload_and_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "tiny.bundle", tiny_graph())
    monkeypatch.setattr(serving, "CONCURRENCY", (1, 4))
    monkeypatch.setattr(serving, "_PEERS", serving._PEERS[:1])
    monkeypatch.setattr(serving, "_IMAGES", 8)
    files = [png(index) for index in range(3)]
    with Load() as load, Served(bundle.path, EngineOptions(backend="onnxruntime")) as server:
        with Engine.open(bundle, backend="onnxruntime") as engine:
            cost = serving.served_and_in_process(engine, server.address, load, files, rounds=1, images=8)
        held = serving.open_loop(server, load, files, capacity=20.0, seconds=2.0)
        compared = serving._compared(bundle, server, load, files, Path(sys.executable), rounds=1)
        refused = load.closed(Target(server.address, serving.PREDICT), [b"\xff"], 1, 3)
    assert cost["ratio"] == pytest.approx(max(cost["served_per_s"].values()) / cost["in_process_per_s"])
    assert cost["added_ms"] == pytest.approx(cost["served_ms"] - cost["in_process_ms"])
    assert set(held["steady_statuses"]) == {"OK"}
    assert held["statuses"]["OK"] > 0
    assert held["memory_bytes"] > 50 * 2**20
    assert {(peer["name"], peer["concurrency"]) for peer in compared} == {
        (name, concurrency) for name in ("thoraxrt", "grpc") for concurrency in (1, 4)
    }
    assert all(peer["per_s"] > 0 for peer in compared)
    assert {answer.status for answer in refused} == {"INVALID_ARGUMENT"}
    assert len(list(serving._rows("x", cost, held))) == 6
