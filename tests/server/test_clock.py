"""The wall clock is set forwards and back while the server runs: no request ends sooner or later for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from tests.server.conftest import Gate
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import AuthenticationError
from thoraxrt.proto.oip import open_inference_pb2 as oip
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server import audit, tokens
from thoraxrt.server.audit import AuditLog, AuditOptions, verify
from thoraxrt.server.client import Client
from thoraxrt.server.scheduler import Scheduler
from thoraxrt.server.serve import running_server

HOUR_S = 3600.0
DEADLINE_S = 30.0


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock by so many seconds, wherever it enters: gRPC asks `time.time`, the others `datetime.now`."""
    ahead_s, real = 0.0, time.time

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=ahead_s)

    def by(seconds: float) -> None:
        nonlocal ahead_s
        ahead_s += seconds
        monkeypatch.setattr(time, "time", lambda: real() + ahead_s)
        for module in (audit, tokens):  # now, because msgspec has by then looked up what a token's file holds
            monkeypatch.setattr(module, "datetime", Shifted)

    return by


@pytest.fixture
def admitted(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How long each request had left when it was admitted."""
    left: list[float | None] = []
    admit = Scheduler.admit

    def noted(self: Scheduler, deadline_s: float | None, *rest: Any, **named: Any) -> Any:
        left.append(deadline_s)
        return admit(self, deadline_s, *rest, **named)

    monkeypatch.setattr(Scheduler, "admit", noted)
    return left


def native(image: bytes) -> bytes:
    return pb.PredictStreamRequest(image=image).SerializeToString()


def tensor(image: bytes) -> bytes:
    request = oip.ModelInferRequest()
    request.inputs.add(name="image_bytes", datatype="BYTES", shape=[1]).contents.bytes_contents.append(image)
    return request.SerializeToString()


@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
@pytest.mark.parametrize(
    ("path", "request_of", "answer"),
    [
        ("/thoraxrt.v1.PredictionService/PredictStream", native, pb.PredictStreamResponse),
        ("/inference.GRPCInferenceService/ModelStreamInfer", tensor, oip.ModelStreamInferResponse),
    ],
)
def test_a_stream_keeps_its_deadline(
    path: str,
    request_of: Callable[[bytes], bytes],
    answer: Any,
    seconds: float,
    channel: grpc.Channel,
    jump: Callable[[float], None],
    admitted: list[float | None],
    radiograph: Callable[..., bytes],
) -> None:
    requests: SimpleQueue[bytes | None] = SimpleQueue()
    opened: Any = channel.stream_stream(path)
    call = opened(iter(requests.get, None), timeout=DEADLINE_S)
    for _ in range(3):
        requests.put(request_of(radiograph(0)))
        response = answer.FromString(next(call))
        assert response.infer_response.outputs if answer is oip.ModelStreamInferResponse else response.answer.response
        jump(seconds)
    requests.put(None)
    assert list(call) == []
    assert len(admitted) == 3
    assert all(left is not None and 0 < left < 2 * DEADLINE_S for left in admitted), admitted


def test_a_request_that_waits_neither_expires_nor_stays(
    gated_engine: Engine, gate: Gate, jump: Callable[[float], None], tmp_path: Path, radiograph: Callable[..., bytes]
) -> None:
    """And the audit log, which says when by that clock, is whole."""
    path = tmp_path / "audit.jsonl"
    with (
        AuditLog(AuditOptions(path=path)) as log,
        running_server(gated_engine, audit=log) as port,
        Client(f"127.0.0.1:{port}", timeout=DEADLINE_S) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        for seconds in (0.0, HOUR_S, -2 * HOUR_S):
            gate.shut()
            asked = pool.submit(client.predict, radiograph(0))
            assert gate.entered.acquire(timeout=20)
            jump(seconds)
            gate.open()
            assert asked.result().prediction.width == 97
    first, ahead, back = (
        datetime.fromisoformat(json.loads(line)["time"]) for line in path.read_text().splitlines()[-3:]
    )
    assert ahead - first > timedelta(minutes=59)
    assert ahead - back > timedelta(minutes=119)
    assert verify(path).last >= 3


def test_a_token_expires_by_the_wall_clock_and_counts_again_once_that_is_put_right(
    jump: Callable[[float], None], tmp_path: Path
) -> None:
    """What a certificate or a token says of its own end is a date: only that clock can tell."""
    file = tmp_path / "tokens.toml"
    token = tokens.add_token(file, "pacs", ("predict",), datetime.now(UTC) + timedelta(minutes=30))
    known = tokens.Tokens(tokens.TokenOptions(file=file))
    assert asyncio.run(known.principal(token)).name == "pacs"
    jump(HOUR_S)
    with pytest.raises(AuthenticationError, match="expired"):
        asyncio.run(known.principal(token))
    jump(-HOUR_S)
    assert asyncio.run(known.principal(token)).name == "pacs"
