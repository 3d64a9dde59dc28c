"""Hostile and unlucky requests: each ends with its own status, and the next one works."""

from __future__ import annotations

import logging
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import grpc
import numpy as np
import pytest
from PIL import Image

from thoraxrt.engine.errors import (
    BackendError,
    DeadlineError,
    ImageContentError,
    ImageFormatError,
    ImageLimitError,
    RequestError,
    ServerError,
    ThoraxrtError,
)
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server.client import Client
from thoraxrt.server.serve import ServeOptions, running_server
from thoraxrt.server.status import ERROR_KEY

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
