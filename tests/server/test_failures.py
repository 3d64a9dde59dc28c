"""Hostile and unlucky requests: each ends with its own status, and the next one works."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Final

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from thoraxrt.engine.errors import (
    AuditError,
    BackendError,
    DeadlineError,
    ImageContentError,
    ImageFormatError,
    ImageLimitError,
    OverloadedError,
    RequestError,
    ServerError,
    ThoraxrtError,
)
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.proto.v1 import thoraxrt_pb2_grpc
from thoraxrt.server import calls
from thoraxrt.server.audit import AuditLog, AuditOptions
from thoraxrt.server.batching import BatchingOptions
from thoraxrt.server.client import Client
from thoraxrt.server.serve import OneModel, ServeOptions, running_server
from thoraxrt.server.status import ERROR_KEY, PUSHBACK_KEY

PREDICT = "/thoraxrt.v1.PredictionService/Predict"


def gigantic_png() -> bytes:
    """A PNG file of some bytes whose header promises 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def colour_photograph() -> bytes:
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


HOSTILE = {
    "empty": (lambda image: b"", ImageFormatError),
    "truncated": (lambda image: image[: len(image) // 2], ImageFormatError),
    "corrupt": (lambda image: image[:60] + bytes(20) + image[80:], ImageFormatError),
    "text": (lambda image: b"patient: J. Doe", ImageFormatError),
    "gigantic": (lambda image: gigantic_png(), ImageLimitError),
    "colour": (lambda image: colour_photograph(), ImageContentError),
}


def status_of(channel: grpc.Channel, request: bytes) -> tuple[grpc.StatusCode, str, dict[str, object]]:
    """The status that these request bytes end with, sent past our client and its types."""
    call = channel.unary_unary(PREDICT)
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    error = caught.value
    return error.code(), error.details(), dict(error.trailing_metadata())


@pytest.mark.parametrize(("make", "kind"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_image_raises_what_it_raises_in_process(client, engine, radiograph, make, kind):
    image = make(radiograph(0))
    with pytest.raises(ThoraxrtError) as here:
        engine.predict_one(image)
    with pytest.raises(ThoraxrtError) as there:
        client.predict(image)
    assert type(there.value) is type(here.value) is kind
    assert str(there.value) == str(here.value)
    assert client.predict(radiograph(0)).prediction.width == 97


@pytest.mark.parametrize(("make", "kind"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_image_ends_with_invalid_argument(channel, radiograph, make, kind):
    request = pb.PredictRequest(image=make(radiograph(0))).SerializeToString()
    code, details, metadata = status_of(channel, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert metadata[ERROR_KEY] == kind.__name__
    assert "Doe" not in details


def test_an_unknown_finding_is_named_with_what_is_known(client, radiograph):
    with pytest.raises(RequestError, match="unknown finding Fracture; this model knows Effusion, Nodule, Mass"):
        client.predict(radiograph(0), findings=["Nodule", "Fracture"])
    assert client.predict(radiograph(0), findings=["Nodule"]).prediction.width == 97


def test_a_finding_longer_than_any_status_still_gets_one(client, radiograph):
    with pytest.raises(RequestError, match="unknown finding ÄÄÄÄ"):
        client.predict(radiograph(0), findings=["Ä" * 50_000])


@pytest.mark.parametrize("request_bytes", [b"\xff\xff\xff", b"\x0a\xff\x01abc", b"\x12\x02\x10"])
def test_a_malformed_message_gets_a_status(channel, client, radiograph, request_bytes):
    code, details, metadata = status_of(channel, request_bytes)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "not what /thoraxrt.v1.PredictionService/Predict takes" in details
    assert metadata[ERROR_KEY] == "RequestError"
    assert client.predict(radiograph(0)).prediction.width == 97


def test_a_message_above_the_limit_is_refused_with_the_remedy(engine, radiograph):
    with (
        running_server(engine, ServeOptions(port=0, max_message_bytes=20_000)) as port,
        Client(f"127.0.0.1:{port}") as client,
    ):
        with pytest.raises(ServerError, match=r"message is too large .* vs. 20000.*; send a smaller file"):
            client.predict(bytes(20_001))
        assert client.predict(radiograph(0)).prediction.width == 97


def test_a_reply_above_the_clients_limit_is_refused_with_the_remedy(address, radiograph):
    with Client(address, max_message_bytes=2_000) as client:
        with pytest.raises(ServerError, match="message is too large"):
            client.predict(radiograph(0), overlay=True)
        assert client.predict(radiograph(0), findings=()).prediction.width == 97


def test_one_image_that_the_network_fails_on_is_a_backend_error(gated_engine, gate, radiograph):
    with running_server(gated_engine) as port, Client(f"127.0.0.1:{port}") as client:
        gate.error = BackendError("the runtime broke")
        with pytest.raises(BackendError, match="the runtime broke"):
            client.predict(radiograph(0))
        gate.error = None
        assert client.predict(radiograph(0)).prediction.width == 97


def test_a_fault_ends_its_own_call_and_its_text_stays_unsaid(gated_engine, gate, radiograph, caplog):
    with running_server(gated_engine) as port, Client(f"127.0.0.1:{port}") as client:
        gate.error = ValueError("patient J. Doe")
        with caplog.at_level(logging.DEBUG), pytest.raises(ServerError, match="INTERNAL: the server failed") as caught:
            client.predict(radiograph(0))
        assert "Doe" not in str(caught.value)
        assert "Doe" not in caplog.text
        assert "the engine failed with ValueError" in caplog.text
        gate.error = None
        assert client.predict(radiograph(0)).prediction.width == 97


def test_calls_that_their_client_cancels_break_nothing(gated_engine, gate, radiograph):
    request = pb.PredictRequest(image=radiograph(0)).SerializeToString()
    with (
        running_server(gated_engine) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        Client(f"127.0.0.1:{port}") as client,
    ):
        call = channel.unary_unary(PREDICT)
        gate.shut()
        running = call.future(request, timeout=20)
        assert gate.entered.acquire(timeout=20)
        waiting = [call.future(request, timeout=20) for _ in range(5)]
        for cancelled in (running, *waiting):
            cancelled.cancel()
        gate.open()
        assert client.predict(radiograph(1)).prediction.width == 97
        assert all(cancelled.cancelled() for cancelled in (running, *waiting))


def test_a_cancelled_call_never_reaches_the_network(gated_engine, gate, radiograph, told):
    request = pb.PredictRequest(image=radiograph(0)).SerializeToString()
    with (
        running_server(gated_engine, telemetry=told) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        call = channel.unary_unary(PREDICT)
        gate.shut()
        running = call.future(request, timeout=20)
        assert gate.entered.acquire(timeout=20)
        waiting = [call.future(request, timeout=20) for _ in range(5)]
        told.wait_for("queue", 6)
        for cancelled in waiting:
            cancelled.cancel()
        for _ in waiting:
            told.wait_for("answered", "CANCELLED")
        gate.open()
        assert running.result()
        assert call(request, timeout=20)
        assert gate.runs == 2


def test_a_deadline_that_passes_is_said_so_with_the_remedy(gated_engine, gate, radiograph):
    with running_server(gated_engine) as port:
        gate.shut()
        with (
            Client(f"127.0.0.1:{port}", timeout=0.05) as hasty,
            pytest.raises(DeadlineError, match=r"did not answer in time; .* longer timeout|after the deadline; try"),
        ):
            hasty.predict(radiograph(0))
        gate.open()
        with Client(f"127.0.0.1:{port}") as client:
            assert client.predict(radiograph(0)).prediction.width == 97


def test_predict_many_yields_what_one_image_met_and_goes_on(gated_engine, gate, radiograph):
    with running_server(gated_engine) as port, Client(f"127.0.0.1:{port}") as client:
        answers = client.predict_many([radiograph(0), b"", radiograph(1)], in_flight=1)
        assert next(answers).prediction.width == 97
        gate.error = BackendError("the runtime broke")
        assert isinstance(next(answers), ImageFormatError)
        gate.error = None
        assert next(answers).prediction.width == 97


def test_nobody_at_the_address_is_said_so():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with Client(address, timeout=10) as client:
        with pytest.raises(ServerError, match=f"no server answers at {address} .*thoraxrt serve"):
            client.model()
        with pytest.raises(ServerError, match="no server answers"):
            next(client.predict_many([b""]))


def test_another_service_at_the_address_is_said_so():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client, pytest.raises(ServerError, match="is no thoraxrt server"):
            client.predict(b"")
    finally:
        server.stop(None).wait()


# Before the body


class Counting:
    """A TCP relay to a server, which sees it at `host`, that counts the bytes that come from the client."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._to, self._host = port, host
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(("127.0.0.1", self._to), source_address=(self._host, 0))
                threading.Thread(target=self._relay, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._relay, args=(server, client, False), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.bytes += len(data) * counts
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._server.close()


@pytest.mark.parametrize("method", ["Predict", "PredictStudy"])
def test_an_overloaded_server_refuses_without_reading_the_body(gated_engine, gate, radiograph, told, method):
    request = pb.PredictRequest(image=radiograph(0)).SerializeToString()
    body = bytes(30_000_000)
    model = OneModel(gated_engine, batching=BatchingOptions(max_images=1, max_per_client=1))
    with (
        running_server(model, telemetry=told) as port,
        contextlib.closing(Counting(port)) as relay,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        grpc.insecure_channel(relay.address) as far,
    ):
        gate.shut()
        running = channel.unary_unary(PREDICT).future(request, timeout=20)
        assert gate.entered.acquire(timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            far.unary_unary(f"/thoraxrt.v1.PredictionService/{method}")(body, timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata = dict(caught.value.trailing_metadata())
        assert metadata[ERROR_KEY] == "OverloadedError"
        assert int(metadata[PUSHBACK_KEY]) >= 1
        assert relay.bytes < 600_000
        gate.open()
        assert running.result()
        with pytest.raises(grpc.RpcError) as caught:  # where there is room, it is read
            far.unary_unary(PREDICT)(body, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert relay.bytes > len(body)


@pytest.mark.parametrize(("messages", "words"), [([], "no message"), ([b"", b""], "several messages")])
def test_a_unary_call_brings_one_message(channel, client, radiograph, messages, words):
    for method in ("Predict", "PredictStudy"):
        call = channel.stream_unary(f"/thoraxrt.v1.PredictionService/{method}")
        with pytest.raises(grpc.RpcError, match=f"the call brought {words}; expected one") as caught:
            call(iter(messages), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.predict(radiograph(0)).prediction.width == 97


READS_ONE: Final = (
    "/thoraxrt.v1.PredictionService/GetModel",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ServerLive",
    "/grpc.health.v1.Health/Check",
)


@pytest.mark.parametrize("path", READS_ONE)
def test_a_call_without_its_message_ends_also_where_it_has_no_deadline(engine, path, monkeypatch):
    monkeypatch.setattr(calls, "_MESSAGE_S", 0.2)
    monkeypatch.setattr(calls, "_SMALL_S", 0.2)
    ended = threading.Event()
    with running_server(engine) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError, match="the call brought no message; expected one") as caught:
            channel.stream_unary(path)(iter(()))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        coming = channel.stream_unary(path).future(iter(ended.wait, True))  # for ever
        try:
            assert coming.exception(timeout=20).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "the message did not come in time" in coming.exception().details()
        finally:
            ended.set()


def test_unary_messages_come_in_by_turns_and_probes_beside_them(engine, told, monkeypatch):
    monkeypatch.setattr(calls, "_READ_BYTES", 1)  # room for one
    infer, probe = "/inference.GRPCInferenceService/ModelInfer", "/grpc.health.v1.Health/Check"
    ended = threading.Event()
    with running_server(engine, telemetry=told) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        first = channel.stream_unary(infer).future(iter(ended.wait, True))
        told.wait_for("begun", infer)
        second = channel.unary_unary(infer).future(b"")
        told.wait_for("begun", infer)
        for _ in range(5):
            assert channel.unary_unary(probe)(b"", timeout=20)
            told.wait_for("answered", "OK")
        assert "INVALID_ARGUMENT" not in told.heard("answered")
        first.cancel()
        assert second.exception(timeout=20).code() is grpc.StatusCode.INVALID_ARGUMENT
        ended.set()


@pytest.mark.parametrize(
    ("path", "code"),
    [("/grpc.health.v1.Health/Check", "OK"), ("/inference.GRPCInferenceService/ModelInfer", "INVALID_ARGUMENT")],
)
def test_messages_that_do_not_come_keep_no_other_client_waiting(engine, told, monkeypatch, path, code):
    monkeypatch.setattr(calls, "_READ_BYTES", 1)  # room for two
    monkeypatch.setattr(calls, "_SMALL_S", 60.0)
    ended = threading.Event()
    with (
        running_server(engine, telemetry=told) as port,
        contextlib.closing(Counting(port, "127.0.0.2")) as relay,
        grpc.insecure_channel(f"127.0.0.1:{port}") as near,
        grpc.insecure_channel(relay.address) as far,
    ):
        held = [near.stream_unary(path).future(iter(ended.wait, True)) for _ in range(8)]
        for _ in held:
            told.wait_for("begun", path)
        answering = far.unary_unary(path).future(b"", timeout=20)
        assert answering.code().name == code
        assert not any(call.done() for call in held)
        for call in held:
            call.cancel()
        ended.set()


def test_reflection_is_as_bounded_as_other_methods_without_images(engine, monkeypatch):
    monkeypatch.setattr(calls, "_SMALL_S", 0.3)
    lists = reflection_pb2.ServerReflectionRequest(list_services="")
    ended = threading.Event()

    def one_and_no_more():
        yield lists
        ended.wait(20)

    with running_server(engine) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        large = reflection_pb2.ServerReflectionRequest(file_by_filename=70_000 * "x")
        with pytest.raises(grpc.RpcError, match="expected at most 65536 without images") as caught:
            next(info(iter([large]), timeout=20))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

        idle = info(one_and_no_more(), timeout=20)
        assert next(idle).list_services_response.service
        with pytest.raises(grpc.RpcError, match="the message did not come in time") as caught:
            next(idle)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        ended.set()


def test_who_gets_no_turn_is_told_to_come_again_and_what_is_too_large_is_not_kept():
    room, large = calls._Room(8, 2, 0.2, 10), bytes(11)

    async def nothing_comes():
        await asyncio.Event().wait()
        yield b""

    async def comes(message: bytes):
        yield message

    async def check() -> None:
        assert await room.message(comes(b"x"), "a") == b"x"
        before = sys.getrefcount(large)
        with pytest.raises(RequestError, match="the message has 11 bytes; expected at most 10") as refused:
            async with contextlib.aclosing(comes(large)) as messages:
                await room.message(messages, "a")
        await asyncio.sleep(0)  # the step that gave it ends
        assert sys.getrefcount(large) == before, refused
        slow = asyncio.create_task(room.message(nothing_comes(), "a"))
        await asyncio.sleep(0)
        assert await room.message(comes(b"x"), "b") == b"x"  # it has a turn of its own
        until = time.monotonic() + 0.05
        with pytest.raises(OverloadedError, match="other messages are still coming in") as overloaded:
            await room._bodies.receive(comes(b"x"), "a", until)
        assert overloaded.value.retry_after_s == 1.0
        with pytest.raises(DeadlineError, match="the message did not come in time"):
            await slow
        assert await room.message(comes(b"x"), "a") == b"x"

    asyncio.run(check())


def test_a_body_that_does_not_come_loses_its_room_at_the_servers_deadline(engine, radiograph):
    options = BatchingOptions(max_images=1, max_per_client=1, default_deadline_s=0.3)
    ended = threading.Event()

    def nothing():
        ended.wait(20)
        yield from ()

    with (
        running_server(OneModel(engine, batching=options)) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        call = channel.stream_unary(PREDICT).future(nothing())  # without a deadline of its own
        assert call.exception(timeout=20).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        ended.set()
        with Client(f"127.0.0.1:{port}") as client:
            assert client.predict(radiograph(0)).prediction.width == 97


def test_gzip_is_taken_and_a_message_that_unfolds_beyond_the_limit_is_not(engine, radiograph, caplog):
    with (
        running_server(engine, ServeOptions(port=0, max_message_bytes=100_000)) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}", compression=grpc.Compression.Gzip) as channel,
    ):
        call = channel.unary_unary(PREDICT)
        request = pb.PredictRequest(image=radiograph(0)).SerializeToString()
        assert pb.PredictResponse.FromString(call(request, timeout=20)).prediction.width == 97
        with pytest.raises(grpc.RpcError) as caught:
            call(bytes(50_000_000), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(request, timeout=20)
    assert caplog.text == ""


def test_a_clients_deadline_is_what_its_image_has(gated_engine, gate, radiograph):
    with running_server(gated_engine) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        gate.shut()
        call = channel.unary_unary(PREDICT)
        request = pb.PredictRequest(image=radiograph(0)).SerializeToString()
        running = call.future(request, timeout=20)
        assert gate.entered.acquire(timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=1)  # long enough not to be refused for what the first one takes
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.open()
        assert running.result()
        assert gate.runs == 1


def test_a_call_is_reported_with_its_method_its_stages_and_its_code(engine, radiograph, told):
    with running_server(engine, telemetry=told) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(PREDICT)
        call(pb.PredictRequest(image=radiograph(0), options=pb.PredictOptions(overlay=True)).SerializeToString())
        told.wait_for("answered", "OK")
        assert told.heard("begun") == [PREDICT]
        for stage in ("read", "queue", "decode", "batch_wait", "network", "draw", "write"):
            told.wait_for("stage", stage)
        assert told.heard("stage") == []
        with pytest.raises(grpc.RpcError):
            call(b"\xff")
        told.wait_for("answered", "INVALID_ARGUMENT")
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/patient.J/Doe")(b"")
        assert told.heard("begun") == [PREDICT, PREDICT]


def test_each_images_answer_stands_in_the_audit_log_before_it_is_sent(engine, radiograph, tmp_path):
    path = tmp_path / "audit.jsonl"
    images = [radiograph(0), b"patient: J. Doe", radiograph(1)]
    sent = pb.PredictStudyRequest(images=[pb.StudyImage(image=image) for image in images])

    def lines() -> list[dict[str, object]]:
        return [line for line in map(json.loads, path.read_bytes().splitlines()) if "method" in line]

    with (
        AuditLog(AuditOptions(path=path)) as audit,
        running_server(engine, audit=audit) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = thoraxrt_pb2_grpc.PredictionServiceStub(channel)
        stub.Predict(pb.PredictRequest(image=images[0]), timeout=20)
        (line,) = lines()
        assert (line["method"], line["model"]) == ("Predict", engine.bundle.sha256)
        assert line["input"] == hashlib.sha256(images[0]).hexdigest()
        local = engine.predict_one(images[0])
        assert [found["probability"] for found in line["findings"]] == [f.probability for f in local.findings]
        stub.PredictStudy(sent, timeout=20)
        study = {line["input"]: line for line in lines() if line["method"] == "PredictStudy"}
        assert list(study) != []
        for image in images:
            line = study.pop(hashlib.sha256(image).hexdigest())
            assert (line.get("error") == "ImageFormatError") is (image == images[1])
        assert study == {}
        for _ in stub.PredictStream(iter([pb.PredictStreamRequest(image=images[2])]), timeout=20):
            assert lines()[-1]["method"] == "PredictStream"
    assert b"Doe" not in path.read_bytes()


def test_where_no_answer_can_be_recorded_there_is_none(engine, radiograph, tmp_path, monkeypatch):
    with (
        AuditLog(AuditOptions(path=tmp_path / "audit.jsonl")) as audit,
        running_server(engine, audit=audit) as port,
        Client(f"127.0.0.1:{port}") as client,
    ):
        assert client.predict(radiograph(0)).prediction.width == 97

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr("thoraxrt.server.audit.os.write", full)
            for _ in range(2):  # the second one before its image is read
                with pytest.raises(AuditError, match="there is no answer"):
                    client.predict(radiograph(0))
