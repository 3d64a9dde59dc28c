"""Both clients against real servers: what is sent again, what a call says of its caller, a stream that goes on."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.server.test_security import certify
from thoraxrt.engine.errors import (
    AuthenticationError,
    ConfigError,
    ImageFormatError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    ServerError,
    ThoraxrtError,
)
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server import client as module
from thoraxrt.server import service
from thoraxrt.server.certificates import TlsOptions
from thoraxrt.server.client import AsyncClient, Client, ClientTls, Priority, Reply
from thoraxrt.server.security import SecurityOptions
from thoraxrt.server.serve import ServeOptions, running_server
from thoraxrt.server.status import PUSHBACK_KEY, Status
from thoraxrt.server.tokens import TokenOptions, add_token

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED
ANSWER = pb.PredictResponse(prediction=pb.Prediction(width=97))


class Refusing:
    """A server that ends so many calls with a status, and answers the others without looking at them."""

    def __init__(self, times: float, code: grpc.StatusCode, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self.times, self.code, self.metadata = times, code, metadata
        self.said: list[dict[str, str]] = []
        self.peers: list[str] = []
        self.asked: list[str] = []

    def predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
        self.said.append(dict(context.invocation_metadata()))
        self.peers.append(context.peer())
        if len(self.said) <= self.times:
            context.set_trailing_metadata(self.metadata)
            context.abort(self.code, "not now")
        return ANSWER

    def stream(self, requests: Iterator[pb.PredictStreamRequest], context: Any) -> Iterator[pb.PredictStreamResponse]:
        """Refuses images, not the stream."""
        for request in requests:
            self.asked.append(request.id)
            answer = pb.ImageAnswer(id=request.id, response=ANSWER)
            if len(self.asked) <= self.times:
                failure = pb.Failure(code=self.code.value[0], message="not now")
                answer = pb.ImageAnswer(id=request.id, failure=failure)
            yield pb.PredictStreamResponse(answer=answer)

    @contextmanager
    def address(self) -> Iterator[str]:
        server = grpc.server(ThreadPoolExecutor(4))
        predict = grpc.unary_unary_rpc_method_handler(
            self.predict, pb.PredictRequest.FromString, pb.PredictResponse.SerializeToString
        )
        stream = grpc.stream_stream_rpc_method_handler(
            self.stream, pb.PredictStreamRequest.FromString, pb.PredictStreamResponse.SerializeToString
        )
        methods = {"Predict": predict, "PredictStream": stream}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.SERVICE_NAME, methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


Ask = Callable[..., Any]


def blocking(address: str, method: str, *arguments: Any, **options: Any) -> Any:
    with Client(address, **options) as client:
        answer = getattr(client, method)(*arguments)
        return list(answer) if isinstance(answer, Iterator) else answer


def awaiting(address: str, method: str, *arguments: Any, **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(address, **options) as client:
            answer = getattr(client, method)(*arguments)
            return [one async for one in answer] if hasattr(answer, "__aiter__") else await answer

    return asyncio.run(ask())


@pytest.fixture(params=[blocking, awaiting], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """One call of a client of its own; of many answers the list."""
    ask: Ask = request.param
    return ask


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clients would have slept between attempts; they go on at once."""
    seconds: list[float] = []

    async def sleep(self: object, wait_s: float) -> None:
        seconds.append(wait_s)

    for wire in (module._BlockingWire, module._AsyncWire):
        monkeypatch.setattr(wire, "sleep", sleep)
    return seconds


# What is sent again


@pytest.mark.parametrize("metadata", [(), ((PUSHBACK_KEY, "0"),)])
def test_a_call_is_sent_again_until_it_is_answered(ask, slept, metadata):
    server = Refusing(3, UNAVAILABLE, metadata)
    with server.address() as address:
        assert ask(address, "predict", b"").prediction.width == 97
    assert len(server.said) == 4
    assert len(slept) == 3


def test_a_call_is_sent_5_times_at_most_after_growing_waits(ask, slept):
    server = Refusing(9, UNAVAILABLE)
    with server.address() as address, pytest.raises(ServerError, match=f"no server answers at {address}"):
        ask(address, "predict", b"")
    assert len(server.said) == 5
    assert len(slept) == 4
    for wait_s, least in zip(slept, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert least <= wait_s <= 1.2 * least


def test_an_overloaded_server_is_asked_again_when_it_says(ask, slept):
    server = Refusing(2, EXHAUSTED, (("thoraxrt-error", "OverloadedError"), (PUSHBACK_KEY, "1700")))
    with server.address() as address:
        assert ask(address, "predict", b"").prediction.width == 97
    assert len(slept) == 2
    assert all(1.7 <= wait_s <= 1.2 * 1.7 for wait_s in slept)


def test_what_cannot_be_answered_before_the_deadline_is_not_waited_for(ask, slept):
    server = Refusing(2, EXHAUSTED, (("thoraxrt-error", "OverloadedError"), (PUSHBACK_KEY, "31000")))
    with server.address() as address, pytest.raises(OverloadedError, match="not now") as caught:
        ask(address, "predict", b"", timeout=30.0)
    assert caught.value.retry_after_s == 31
    assert len(server.said) == 1
    assert slept == []


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code not in (UNAVAILABLE, grpc.StatusCode.OK)], ids=lambda c: c.name
)
def test_any_other_code_is_final(slept, code):
    server = Refusing(9, code)  # of RESOURCE_EXHAUSTED: a message that is too large
    with server.address() as address, pytest.raises(ThoraxrtError):
        blocking(address, "predict", b"")
    assert len(server.said) == 1
    assert slept == []


def test_a_server_may_say_that_once_was_enough(ask, slept):
    server = Refusing(9, EXHAUSTED, ((PUSHBACK_KEY, "-1"),))
    with server.address() as address, pytest.raises(ServerError):
        ask(address, "predict", b"")
    assert len(server.said) == 1


def test_waits_grow_to_a_bound_and_end_with_the_deadline():
    now = 100.0
    tries = module._Tries(160.0, 99, clock=lambda: now, chance=lambda: 0.5)
    waits = []
    while (wait_s := tries.wait_s(Status(UNAVAILABLE, "", ()))) is not None:
        waits.append(wait_s)
        now += wait_s
        assert now < 160
    assert waits[:8] == pytest.approx([1.1 * s for s in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0)])
    assert 160 - now <= 5.5


def test_an_image_of_a_stream_is_sent_again_without_the_others(ask, slept):
    server = Refusing(1, UNAVAILABLE)
    with server.address() as address:
        answers = ask(address, "predict_many", [b""] * 5)
    assert [answer.prediction.width for answer in answers] == [97] * 5
    assert sorted(server.asked) == ["0", "0", "1", "2", "3", "4"]
    assert len(slept) == 1


# What a call says


def test_a_call_says_model_version_priority_and_token(ask):
    server = Refusing(0, UNAVAILABLE)
    said = {"model": "chest", "version": 3, "priority": Priority.STAT, "token": "thoraxrt_1_2"}
    with server.address() as address:
        ask(address, "predict", b"", **said)
        ask(address, "predict", b"")
    assert {
        "thoraxrt-model": "chest",
        "thoraxrt-model-version": "3",
        "thoraxrt-priority": "stat",
        "authorization": "Bearer thoraxrt_1_2",
    }.items() <= server.said[0].items()
    assert not {key for key in server.said[1] if key.startswith("thoraxrt") or key == "authorization"}


def test_the_server_takes_what_a_call_says(ask, address, radiograph):
    said = {"model": "default", "version": 1, "priority": Priority.STAT}
    assert ask(address, "predict", radiograph(0), **said).prediction.width == 97
    for method, argument in (("predict", radiograph(0)), ("predict_many", [radiograph(0)])):
        with pytest.raises(ModelNotFoundError, match="no such model"):
            ask(address, method, argument, model="other")


def test_clients_share_a_connection(radiograph):
    server = Refusing(0, UNAVAILABLE)
    with server.address() as address, Client(address) as routine, Client(address, priority=Priority.STAT) as stat:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(routine.predict, [b""] * 20))
        stat.predict(b"")
    assert len(server.peers) == 21
    assert len(set(server.peers)) == 1


@pytest.fixture
def guarded(engine, tmp_path, monkeypatch) -> Iterator[tuple[str, Path, Path]]:
    """A server that wants a token over TLS: its address, its authority's certificate, its file of tokens."""
    monkeypatch.setattr("thoraxrt.server.watched._EVERY_S", 0.0)
    authority, tokens = certify("authority"), tmp_path / "tokens.toml"
    certificate, key = certify("server", authority).write(tmp_path)
    authority.write(tmp_path, "ca")
    tokens.write_text("")
    security = SecurityOptions(
        tls=TlsOptions(certificate=certificate, private_key=key), tokens=TokenOptions(file=tokens)
    )
    with running_server(engine, ServeOptions(port=0, security=security)) as port:
        yield f"127.0.0.1:{port}", tmp_path / "ca.pem", tokens


def test_a_token_over_tls_opens_the_server(ask, guarded, radiograph, tmp_path):
    address, ca, tokens = guarded
    tls, file = ClientTls(ca=ca), tmp_path / "token"
    file.write_text(add_token(tokens, "scanner", ("predict",)) + "\n")
    assert ask(address, "predict", radiograph(0), tls=tls, token_file=file).prediction.width == 97
    assert len(ask(address, "predict_many", [radiograph(0)] * 3, tls=tls, token_file=file)) == 3
    for method, argument in (("predict", radiograph(0)), ("predict_many", [radiograph(0)])):
        with pytest.raises(AuthenticationError, match="none that this server knows"):
            ask(address, method, argument, tls=tls, token="thoraxrt_000000000000_wrong")
    with pytest.raises(ServerError):
        ask(address, "predict", radiograph(0), tls=ClientTls(), timeout=5)  # no public authority vouches for it


def test_a_token_file_is_read_again_when_it_changes(guarded, radiograph, tmp_path):
    address, ca, tokens = guarded
    file = tmp_path / "token"
    file.write_text("thoraxrt_000000000000_wrong")
    with Client(address, tls=ClientTls(ca=ca), token_file=file) as client:
        with pytest.raises(AuthenticationError):
            client.predict(radiograph(0))
        file.write_text(add_token(tokens, "scanner", ("predict",)))
        assert client.predict(radiograph(0)).prediction.width == 97


def test_a_certificate_opens_the_server(ask, engine, radiograph, tmp_path):
    authority = certify("authority")
    ca, _ = authority.write(tmp_path, "ca")
    certificate, key = certify("server", authority).write(tmp_path)
    mine, my_key = certify("scanner", authority).write(tmp_path, "scanner")
    tls = TlsOptions(
        certificate=certificate, private_key=key, client_ca=ca, clients={"dns:scanner.example": ("predict",)}
    )
    with running_server(engine, ServeOptions(port=0, security=SecurityOptions(tls=tls))) as port:
        shown = ClientTls(ca=ca, certificate=mine, private_key=my_key)
        assert ask(f"127.0.0.1:{port}", "predict", radiograph(0), tls=shown).prediction.width == 97
        with pytest.raises((AuthenticationError, ServerError)):
            ask(f"127.0.0.1:{port}", "predict", radiograph(0), tls=ClientTls(ca=ca), timeout=5)


def test_a_token_does_not_travel_for_others_to_read(tmp_path):
    with pytest.raises(RequestError, match=r"would travel to 192\.0\.2\.1:8500 unencrypted"):
        Client("192.0.2.1:8500", token="thoraxrt_1_2")
    with Client("192.0.2.1:8500", token="thoraxrt_1_2", insecure=True), Client("[::1]:8500", token="thoraxrt_1_2"):
        pass


def test_what_a_call_cannot_say_is_refused_at_once(tmp_path):
    (tmp_path / "token").write_text("two words")
    for options, error, words in (
        ({"token_file": tmp_path / "nowhere"}, ConfigError, "nowhere cannot be read"),
        ({"token_file": tmp_path / "token"}, ConfigError, "holds no token"),
        ({"token": "a\nb"}, ConfigError, "holds no token"),
        ({"token": "a", "token_file": tmp_path / "token"}, RequestError, "expected one of them"),
        ({"model": "thörax"}, RequestError, "expected printable ASCII"),
        ({"tls": ClientTls(ca=tmp_path / "ca")}, ConfigError, "ca cannot be read"),
    ):
        with pytest.raises(error, match=words) as caught:
            Client("localhost:1", **options)
        assert "two words" not in str(caught.value)
    with pytest.raises(ValueError, match="go together"):
        ClientTls(certificate=tmp_path / "certificate")


# Many


def test_both_clients_give_the_engines_answers_in_order(ask, address, engine, radiograph, tmp_path):
    images = [radiograph(0), b"not an image", Path("nowhere.png"), *(radiograph(seed) for seed in range(1, 40))]
    answers = ask(address, "predict_many", images)
    for answer, expected in zip(answers, engine.predict(images), strict=True):
        if isinstance(answer, Reply):
            assert answer.prediction.to_dict() == expected.to_dict()
        else:
            assert (type(answer), str(answer)) == (type(expected), str(expected))
    assert isinstance(answers[1], ImageFormatError)
    assert isinstance(answers[2], ImageFormatError)


def test_a_message_that_is_too_large_is_one_images_error(ask, engine, radiograph):
    images = [radiograph(0), bytes(200_000), radiograph(1), bytes(300_000), radiograph(2)]
    with running_server(engine, ServeOptions(port=0, max_message_bytes=100_000)) as port:
        answers = ask(f"127.0.0.1:{port}", "predict_many", images)
    assert [type(answer) for answer in answers] == [Reply, ServerError, Reply, ServerError, Reply]
    assert "message is too large" in str(answers[1])
    assert answers[4].prediction.to_dict() == engine.predict_one(radiograph(2)).to_dict()


def test_a_stream_that_is_refused_while_it_sends_says_why(ask, guarded):
    address, ca, _ = guarded
    for _ in range(10):
        with pytest.raises(AuthenticationError, match="none that this server knows"):
            ask(
                address, "predict_many", [bytes(1 << 20)] * 9, tls=ClientTls(ca=ca), token="thoraxrt_000000000000_wrong"
            )


def test_a_study_has_one_answer_and_its_images_errors_keep_their_place(ask, address, engine, radiograph):
    study = ask(address, "predict_study", [radiograph(0), b"", radiograph(1)])
    first, error, last = study.answers
    assert first.prediction.to_dict() == engine.predict_one(radiograph(0)).to_dict()
    assert isinstance(error, ImageFormatError)
    assert last.prediction.to_dict() == engine.predict_one(radiograph(1)).to_dict()
    assert study.manifest_sha256 == engine.bundle.sha256
    for index, finding in enumerate(study.findings):
        assert finding.probability == max(one.prediction.findings[index].probability for one in (first, last))
    with pytest.raises(RequestError, match="has 0 images; expected 1 to 16"):
        ask(address, "predict_study", [])


def test_async_calls_are_in_flight_together_and_one_may_be_cancelled(gated_engine, gate, radiograph, told):
    images = [radiograph(seed) for seed in range(8)]

    async def ask() -> list[Any]:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            calls = [asyncio.create_task(client.predict(image)) for image in images]
            await asyncio.to_thread(told.wait_for, "queue", 8)
            calls[7].cancel()
            await asyncio.to_thread(told.wait_for, "answered", "CANCELLED")
            gate.open()
            return await asyncio.gather(*calls, return_exceptions=True)

    with running_server(gated_engine, telemetry=told) as port:
        gate.shut()
        *replies, cancelled = asyncio.run(ask())
    assert isinstance(cancelled, asyncio.CancelledError)
    for reply, image in zip(replies, images, strict=False):
        assert reply.prediction.to_dict() == gated_engine.predict_one(image).to_dict()


def test_async_answers_may_be_left_early(address, radiograph):
    async def ask() -> int:
        async with AsyncClient(address) as client:
            drawn = itertools.count()
            answers = client.predict_many((radiograph(next(drawn)) for _ in range(100)), in_flight=3)
            assert isinstance(await anext(answers), Reply)
            await answers.aclose()
            assert (await client.predict(radiograph(0))).prediction.width == 97
            return next(drawn)

    assert asyncio.run(ask()) == 3


def test_who_takes_long_over_an_answer_loses_nothing(engine, radiograph, monkeypatch):
    monkeypatch.setattr(service, "_IDLE_S", 0.1)
    with running_server(engine) as port, Client(f"127.0.0.1:{port}") as client:
        answers = client.predict_many((radiograph(seed) for seed in range(4)), in_flight=1)
        widths = [answer.prediction.width for answer in answers if not time.sleep(0.3)]
    assert widths == [97] * 4


@pytest.mark.parametrize("grace_s", [0.0, 20.0])
def test_a_stream_goes_on_where_the_server_was_started_anew(gated_engine, gate, radiograph, told, grace_s):
    images = [radiograph(seed) for seed in range(12)]
    expected = [gated_engine.predict_one(image).to_dict() for image in images]
    drawn: list[int] = []
    options = ServeOptions(port=free_port(), grace_s=grace_s)

    def draw() -> Iterator[bytes]:
        for index, image in enumerate(images):
            drawn.append(index)
            yield image

    def restart() -> None:
        assert gate.entered.acquire(timeout=20)
        stopping = threading.Thread(target=first.close)
        with grpc.insecure_channel(f"127.0.0.1:{options.port}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            stopping.start()
            with suppress(grpc.RpcError):  # without grace it may end before it says so
                assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
        gate.open()  # the stop has begun: what it holds is answered, or too late
        stopping.join(20)
        second.enter_context(running_server(gated_engine, options, told))

    with ExitStack() as second, ThreadPoolExecutor(1) as pool, Client(f"127.0.0.1:{options.port}") as client:
        first = ExitStack()
        first.enter_context(running_server(gated_engine, options))
        answers = client.predict_many(draw(), in_flight=3)
        found = [next(answers) for _ in range(3)]
        gate.shut()
        restarting = pool.submit(restart)
        found += answers
        restarting.result(20)
    assert [answer.prediction.to_dict() for answer in found] == expected
    assert drawn == list(range(12))
    # The first server has answered the 3 that were taken, at most the 2 sent meanwhile and the 3 that it held.
    assert 12 - 8 <= told.heard("stage").count("decode") <= 12 - 3, "what was answered is not asked for again"


SERVER = """
import sys
from thoraxrt.engine.engine import Engine
from thoraxrt.server.serve import OneModel, ServeOptions, serve
with Engine.open(sys.argv[1], backend="onnxruntime") as engine:
    serve(OneModel(engine), ServeOptions(port=int(sys.argv[2])))
"""


def test_a_folder_goes_on_where_the_server_was_killed(tiny_bundle, engine, radiograph, tmp_path):
    """`thoraxrt predict --server`, whose reader stops in between, so that the server is killed in the middle."""
    count = 300
    for index in range(count):
        (tmp_path / f"{index:03}.png").write_bytes(radiograph(index))
    port = free_port()

    def server() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(tiny_bundle.path), str(port)], stdout=subprocess.PIPE, text=True
        )
        started.callback(process.stdout.close)
        started.callback(process.wait, 20)
        started.callback(process.kill)
        assert process.stdout.readline().startswith("serving")
        return process

    command = [sys.executable, "-m", "thoraxrt.cli", "predict", "--server", f"127.0.0.1:{port}", str(tmp_path)]
    with ExitStack() as started:
        first = server()
        with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True, bufsize=1) as predicting:
            lines = [predicting.stdout.readline() for _ in range(20)]
            first.kill()
            first.wait(20)
            server()
            lines += predicting.stdout
        assert predicting.returncode == 0
    answers = [json.loads(line) for line in lines]
    assert [answer.pop("image") for answer in answers] == [str(tmp_path / f"{index:03}.png") for index in range(count)]
    for index in (0, 20, count - 1):
        assert answers[index] == json.loads(json.dumps(engine.predict_one(radiograph(index)).to_dict()))


def test_a_command_that_is_killed_goes_on_where_it_stopped(address, engine, radiograph, tmp_path):
    """`predict --server --out`, killed as it waits for an image that does not come."""
    folder, out = tmp_path / "archive", tmp_path / "answers.jsonl"
    folder.mkdir()
    paths = [folder / f"{index:02}.png" for index in range(40)]
    for index, path in enumerate(paths):
        path.write_bytes(radiograph(index))
    paths[3].write_bytes(b"no image")
    paths[30].unlink()
    os.mkfifo(paths[30])
    command = [sys.executable, "-m", "thoraxrt.cli", "predict", "--server", address, str(folder), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as predicting:
        until = time.monotonic() + 30
        while not (out.exists() and out.read_bytes().count(b"\n") >= 10):
            assert time.monotonic() < until
            assert predicting.poll() is None, predicting.stderr.read()
            time.sleep(0.01)
        predicting.kill()
    before = out.read_bytes()
    assert before.count(b"\n") < 30
    out.write_bytes(before[:-20])  # as where the machine went down while the last line was written
    paths[30].unlink()
    paths[30].write_bytes(radiograph(30))

    def again(status: int) -> list[dict[str, Any]]:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (status, ""), result.stderr
        assert (str(paths[3]) in result.stderr) == bool(status), "what failed is said"
        return [json.loads(line) for line in out.read_text().splitlines()]

    answers = again(1)
    assert [answer["image"] for answer in answers] == [str(path) for path in paths if path != paths[3]]
    assert out.read_bytes().startswith(before.rpartition(b"\n{")[0]), "what was answered is not asked for again"
    paths[3].write_bytes(radiograph(3))
    answers = again(0)
    assert sorted(answer.pop("image") for answer in answers) == list(map(str, paths))
    assert {answer.pop("manifest_sha256") for answer in answers} == {engine.bundle.sha256}
    local = [engine.predict_one(path).to_dict() for path in (*paths[:3], *paths[4:], paths[3])]
    assert answers == json.loads(json.dumps(local))
    whole = out.read_bytes()
    again(0)
    assert out.read_bytes() == whole


def test_rows_are_shown_as_they_come(address, radiograph, tmp_path):
    os.mkfifo(tmp_path / "z.png")
    for index in range(20):  # more than are in flight
        (tmp_path / f"{index:02}.png").write_bytes(radiograph(index))
    command = [sys.executable, "-m", "thoraxrt.cli", "predict", "--server", address, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as predicting:
        lines = iter(predicting.stdout.readline, "")
        assert "boxes x, y, width, height" in next(lines)
        assert any(line.startswith(" 00.png") for line in lines), "though the last one has not come"
        predicting.kill()


@pytest.mark.parametrize("text", ["a letter\n", "a letter", '{"image": 1', "[]\n"])
def test_a_file_that_holds_something_else_stays_as_it_is(text, radiograph, tmp_path):
    (tmp_path / "a.png").write_bytes(radiograph(0))
    (other := tmp_path / "other").write_text(text)
    command = [sys.executable, "-m", "thoraxrt.cli", "predict", "--server", "127.0.0.1:1", str(tmp_path / "a.png")]
    result = subprocess.run([*command, "--out", str(other)], capture_output=True, text=True, check=False)
    ours = text.startswith("{")  # and was cut off
    assert (result.returncode, "line 1" in result.stderr) == (2, not ours)
    assert other.read_text() == ("" if ours else text)


def test_the_command_shows_its_token_over_tls(guarded, radiograph, tmp_path):
    address, ca, tokens = guarded
    image, file = tmp_path / "a.png", tmp_path / "token"
    image.write_bytes(radiograph(0))
    file.write_text(add_token(tokens, "scanner", ("predict",)))

    def thoraxrt(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "thoraxrt.cli", "predict", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    said = ("--tls-ca", ca, "--token-file", file, "--stat", "--model")
    result = thoraxrt("--server", address, *said, "default", image, "--json")
    assert json.loads(result.stdout)["width"] == 97, result.stderr
    for arguments, words in (
        (("--server", address, *said, "other", image), "no such model"),
        (("--server", address, "--tls-ca", ca, image), "nobody's credentials"),
        (("--server", address, "--tls-cert", ca, image), "--tls-cert and --tls-key go together"),
        (("nowhere.bundle", "--stat", image), "add --server"),
    ):
        result = thoraxrt(*arguments)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert words in line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
