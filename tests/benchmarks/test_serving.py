"""What the serving benchmark measures belongs together: a real server, a real load, a peer."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.server.conftest import tiny_graph, write_bundle
from thoraxrt.benchmarks import serving, serving_compared
from thoraxrt.benchmarks.served import Served
from thoraxrt.benchmarks.serving_load import Answer, Load, Target
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine
from thoraxrt.export.phantoms import phantom
from thoraxrt.server.models import EngineOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the server decodes in processes")


def png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(phantom(7, index).pixels[::8, ::8]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("served") / "tiny.bundle", tiny_graph())


def test_throughput_latency_and_overload(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CONCURRENCY", (1, 4))
    files = [png(index) for index in range(3)]
    with Load() as load, Served(bundle.path, EngineOptions(backend="onnxruntime")) as server:
        with Engine.open(bundle, backend="onnxruntime") as engine:
            cost = serving.served_and_in_process(engine, server.address, load, files, rounds=1, images=8)
        held = serving.open_loop(server, load, files, seconds=1.0, rounds=2)
        refused = load.closed(Target(server.address, serving.PREDICT), [b"\xff"], 1, 3)
    assert cost["ratio"] == pytest.approx(max(cost["served_per_s"].values()) / cost["in_process_per_s"])
    assert cost["added_ms_interval"]["low"] <= cost["added_ms"] <= cost["added_ms_interval"]["high"]
    assert set(held["steady_statuses"]) == {"OK"}
    assert held["statuses"]["OK"] > 0
    assert held["memory_bytes"] > 50 * 2**20
    assert {answer.status for answer in refused} == {"INVALID_ARGUMENT"}
    assert cost["overhead_ms_interval"]["low"] <= cost["overhead_ms"] <= cost["overhead_ms_interval"]["high"]
    assert min(cost["bare_ms"], cost["decoded_alike_ms"]) > 0
    for name in ("steady_p50", "steady_p99", "even_p99", "queue_p99"):
        assert held[name] == pytest.approx(sum(held[f"{name}s"]) / 2)
        assert min(held[f"{name}s"]) > 0
    assert len(held["goodputs"]) == 2
    assert len(list(serving._rows("x", cost, held))) == 8


class Drifting:
    """A load on a machine on which everything takes twice as long in the second round, and which stalls in the third."""

    def __init__(self) -> None:
        self._round = 0

    def closed(self, target: object, requests: object, concurrency: int, count: int) -> list[Answer]:
        self._round += concurrency == 1  # the unloaded median comes once in a round
        took = 0.01 * (1 + (self._round == 2))
        return [Answer(took * number / concurrency, took, "OK") for number in range(count)]

    def open(self, *given: object) -> list[Answer]:
        time.sleep(0.1)  # in which the memory is looked at
        took = 0.013 * (1, 2, 20)[self._round - 1]
        return [Answer(0.005 * number, took, "OK") for number in range(100)]


def test_a_round_in_which_the_machine_is_slow_does_not_decide_the_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SAMPLE_S", 0.005)
    server = SimpleNamespace(address="", resident_bytes=lambda: 1)
    held = serving.open_loop(server, Drifting(), [b""], seconds=1.0, rounds=3)  # type: ignore[arg-type]
    assert held["steady_p99s"] == pytest.approx([1.3, 1.3, 26])
    assert held["steady_p50"] == held["steady_p99"] == held["even_p99"] == pytest.approx(1.3)


def test_a_queue_takes_one_after_the_other() -> None:
    assert serving._queue([0.0, 0.0, 0.5, 3.0], 1.0) == [1.0, 2.0, 2.5, 1.0]


def test_a_peer_is_compared_and_what_cannot_be_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_compared, "CONCURRENCY", (4,))
    monkeypatch.setattr(serving_compared, "_CELL_S", 0.3)
    peer, *_, absent = serving_compared._PEERS
    other = peer._replace(request=lambda image: png(9))  # it is asked about another image
    monkeypatch.setattr(serving_compared, "_PEERS", (peer, other, absent))
    said: list[str] = []
    files = [png(index) for index in range(3)]
    ours, its, *left_out = serving_compared.compared(bundle, files, Path(sys.executable), rounds=1, say=said.append)
    assert (ours["name"], its["name"]) == ("thoraxrt", "grpc")
    assert ours["statuses"].keys() == its["statuses"].keys() == {"OK"}
    assert its["thoraxrt_to_it"] == pytest.approx(ours["per_s"] / its["per_s"])
    assert any(line.startswith("round 1 of 1, 4 at a time") for line in said)
    assert [row["name"] for row in left_out] == ["grpc", "litserve"]
    assert "its logits are not thoraxrt's: shape (3,)" in left_out[0]["failed"]
    assert "No module named 'litserve'" in left_out[1]["failed"]
    assert [row[0] for row in serving._peer_rows([ours, its, *left_out])] == [
        "thoraxrt, 4 at a time", "grpc, 4 at a time", "grpc", "litserve"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "OK"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "http/1.1 503 busy"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "ValueError: expected HTTP/1.1 with"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "DEADLINE_EXCEEDED"),
        (b"", "DEADLINE_EXCEEDED"),
        (None, ("IncompleteReadError", "ConnectionResetError")),  # it is closed, before or after all has been read
    ],
)
def test_whatever_an_http_server_does_each_request_ends(reply: bytes | None, status: str | tuple[str, ...]) -> None:
    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while received := connection.recv(65536):
                if reply is None:
                    return
                if received.endswith(b"image"):
                    connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener, Load() as load:
        threading.Thread(target=serve, daemon=True).start()
        target = Target(f"127.0.0.1:{listener.getsockname()[1]}", "/predict", "text/plain")
        answers = load.closed(target, [b"image"], 2, 4, deadline_s=0.3)
        listener.shutdown(socket.SHUT_RDWR)
    assert len(answers) == 4
    assert all(answer.status.startswith(status) for answer in answers), answers
