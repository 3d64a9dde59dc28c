"""The process around the service: warm-up and health, ports, signals, orderly stop."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import BackendError, OverloadedError, RequestError, ServerError
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server import serve as serving
from thoraxrt.server.certificates import TlsOptions
from thoraxrt.server.client import Client
from thoraxrt.server.oip import OIP_SERVICE_NAME
from thoraxrt.server.security import SecurityOptions
from thoraxrt.server.serve import OneModel, ServeOptions, running_server, serve
from thoraxrt.server.service import SERVICE_NAME
from thoraxrt.server.status import PUSHBACK_KEY
from thoraxrt.server.tokens import TokenOptions, add_token

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

SERVE = """
import sys
from thoraxrt.engine.engine import Engine
from thoraxrt.server.serve import OneModel, ServeOptions, serve
with Engine.open(sys.argv[1], backend="onnxruntime") as engine:
    serve(OneModel(engine), ServeOptions(port=0))
print("stopped")
"""


CLOSING = """import asyncio
    class Closing(OneModel):
        async def close(self):
            print("closing", flush=True)
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(60)  # a model goes only when what it answers has ended
    serve(Closing"""


REFUSING = """from thoraxrt.engine.errors import BundleError
    class Refusing(OneModel):
        faults = iter([ZeroDivisionError()])
        async def refresh(self):
            for fault in self.faults:
                raise fault
            raise BundleError("a damaged bundle")
    serve(Refusing"""


COMPILING = """import asyncio, time
    class Compiling(OneModel):
        async def start(self):
            print("compiling", flush=True)
            await asyncio.to_thread(time.sleep, 60)
    serve(Compiling"""


def health_of(channel: grpc.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20, wait_for_ready=True).status


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
def test_health_is_serving(channel, service):
    assert health_of(channel, service) == SERVING


def test_health_of_an_unknown_service_is_not_found(channel):
    with pytest.raises(grpc.RpcError) as caught:
        health_of(channel, "other.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_waits_for_the_network_to_be_warm(gated_engine, gate, free_port):
    gate.shut()
    warm, end = threading.Event(), threading.Event()

    def run() -> None:
        with running_server(gated_engine, ServeOptions(port=free_port)):
            warm.set()
            end.wait(20)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{free_port}") as channel:
            assert gate.entered.acquire(timeout=20)  # it is warming up
            assert [health_of(channel, name) for name in ("", SERVICE_NAME)] == [NOT_SERVING, NOT_SERVING]
            assert not warm.is_set()
            gate.open()
            assert warm.wait(20)
            assert [health_of(channel, name) for name in ("", SERVICE_NAME)] == [SERVING, SERVING]
    finally:
        gate.open()
        end.set()
        thread.join()


def test_a_network_that_fails_its_warm_up_is_not_served(faulty_bundle):
    with (
        Engine.open(faulty_bundle, backend="onnxruntime") as engine,
        pytest.raises(BackendError, match="not finite"),
        running_server(engine),
    ):
        pytest.fail("it serves")


def test_a_stop_finishes_what_is_in_flight_and_takes_no_more(gated_engine, gate, radiograph):
    stack = contextlib.ExitStack()
    port = stack.enter_context(running_server(gated_engine, ServeOptions(port=0, grace_s=20)))
    watching = grpc.insecure_channel(f"127.0.0.1:{port}")
    with (
        watching,
        ThreadPoolExecutor(1) as pool,
        Client(f"127.0.0.1:{port}") as client,
        Client(f"127.0.0.1:{port}") as late,
    ):
        watch = health_pb2_grpc.HealthStub(watching).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == SERVING
        gate.shut()
        asking = pool.submit(client.predict, radiograph(0))
        assert gate.entered.acquire(timeout=20)
        stopping = threading.Thread(target=stack.close)
        stopping.start()
        assert next(watch).status == NOT_SERVING  # the stop has begun
        watch.cancel()
        assert stopping.is_alive()
        gate.open()
        assert asking.result(20).prediction.width == 97
        stopping.join(20)
        assert not stopping.is_alive()
        with pytest.raises(ServerError, match="no server answers"):
            late.predict(radiograph(0))


def test_those_who_watch_its_health_do_not_hold_a_stop(engine):
    stack = contextlib.ExitStack()
    port = stack.enter_context(running_server(engine, ServeOptions(port=0, grace_s=20)))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [
            stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=30) for name in ("", SERVICE_NAME, "other")
        ]
        said = [next(watch).status for watch in watches]
        assert said == [SERVING, SERVING, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]
        began = time.monotonic()
        stack.close()
        assert time.monotonic() - began < 5
        for watch in watches[:2]:
            assert next(watch).status == NOT_SERVING
        for watch in watches:
            with pytest.raises(grpc.RpcError) as caught:
                next(watch)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_health_follows_the_models(engine):
    class Unloading(OneModel):
        gone = False

        def ready(self, name: str | None = None, version: int | None = None) -> bool:
            return super().ready(name, version) and not self.gone

    models = Unloading(engine)
    with running_server(models) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=OIP_SERVICE_NAME), timeout=30)
        assert next(watch).status == SERVING
        models.gone = True
        assert next(watch).status == NOT_SERVING
        assert health_of(channel, SERVICE_NAME) == NOT_SERVING
        models.gone = False
        assert next(watch).status == SERVING


def test_it_encrypts_and_refuses_strangers_before_it_reads(engine, radiograph, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    tokens = tmp_path / "tokens.toml"
    token = add_token(tokens, "scanner", ("predict",))
    security = SecurityOptions(
        tls=TlsOptions(certificate=certificate, private_key=key), tokens=TokenOptions(file=tokens)
    )
    trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
    request = pb.PredictRequest(image=radiograph(0)).SerializeToString()
    with (
        running_server(engine, ServeOptions(host="0.0.0.0", port=0, security=security)) as port,
        grpc.secure_channel(f"localhost:{port}", trusted) as channel,
    ):
        call = channel.unary_unary("/thoraxrt.v1.PredictionService/Predict")
        said = (("authorization", f"Bearer {token}"),)
        assert pb.PredictResponse.FromString(call(request, timeout=20, metadata=said)).prediction.width == 97
        assert health_of(channel, "") == SERVING
        for method, metadata, code in (
            ("thoraxrt.v1.PredictionService/Predict", (), grpc.StatusCode.UNAUTHENTICATED),
            ("inference.GRPCInferenceService/RepositoryModelUnload", said, grpc.StatusCode.PERMISSION_DENIED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{method}")(request, timeout=20, metadata=metadata)
            assert caught.value.code() is code


def test_a_hangup_looks_at_the_models_again(tiny_bundle, radiograph):
    script = SERVE.replace("serve(OneModel", REFUSING)
    arguments = [sys.executable, "-c", script, str(tiny_bundle.path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().split()[3]
            process.send_signal(signal.SIGHUP)
            assert process.stderr.readline().startswith("a fault in looking at the models again; the next SIGHUP is")
            while process.stderr.readline() != "ZeroDivisionError\n":
                pass  # where it happened
            process.send_signal(signal.SIGHUP)
            assert process.stderr.readline() == "what was served before SIGHUP still is: a damaged bundle\n"
            with Client(address) as client:
                assert client.predict(radiograph(0)).prediction.width == 97
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_a_stop_waits_no_longer_than_its_grace(gated_engine, gate, radiograph):
    request = pb.PredictRequest(image=radiograph(0))
    stack = contextlib.ExitStack()
    port = stack.enter_context(running_server(gated_engine, ServeOptions(port=0, grace_s=0.05)))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/thoraxrt.v1.PredictionService/Predict")
        gate.shut()
        held = call.future(request.SerializeToString(), timeout=20)
        assert gate.entered.acquire(timeout=20)
        stopping = threading.Thread(target=stack.close)
        stopping.start()
        with pytest.raises(grpc.RpcError) as caught:
            held.result()
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        gate.open()  # the engine is freed only once the network has returned
        stopping.join(20)
        assert not stopping.is_alive()


def own_channel(stack: contextlib.ExitStack, port: int) -> grpc.Channel:
    """A connection that no other channel shares."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    return stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", options))


def test_strangers_who_watch_leave_room_for_others_calls(engine, radiograph, monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "_CALLS", 8)
    token = add_token(tokens := tmp_path / "tokens.toml", "scanner", ("predict",))
    security = SecurityOptions(tokens=TokenOptions(file=tokens))
    with (
        running_server(engine, ServeOptions(port=0, security=security)) as port,
        contextlib.ExitStack() as stack,
        Client(f"127.0.0.1:{port}", token=token) as client,
    ):
        watch = health_pb2_grpc.HealthStub(own_channel(stack, port)).Watch
        first = watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(first).status == SERVING  # so that it is the one that is open
        for other in [watch(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(7)]:
            with pytest.raises(grpc.RpcError, match="1 such calls of this client are open") as caught:
                next(other)
            assert PUSHBACK_KEY in dict(caught.value.trailing_metadata())
        assert client.predict(radiograph(0)).prediction.width == 97
        assert client.model().backend == "onnxruntime"


def test_a_full_server_is_one_to_come_back_to(engine, radiograph, monkeypatch, told):
    monkeypatch.setattr(serving, "_CALLS", 2)
    ended, path = threading.Event(), f"/{SERVICE_NAME}/Predict"
    with (
        running_server(engine, telemetry=told) as port,
        contextlib.ExitStack() as stack,
        Client(f"127.0.0.1:{port}") as client,
        Client(f"127.0.0.1:{port}", timeout=0.5) as hurried,
        ThreadPoolExecutor(1) as pool,
    ):
        stack.callback(ended.set)
        held = []
        for _ in range(2):
            held.append(own_channel(stack, port).stream_unary(path).future(iter(ended.wait, True)))
            told.wait_for("begun", path)
        with pytest.raises(OverloadedError, match="the server has as many calls as it takes") as refused:
            hurried.predict(radiograph(0))
        assert refused.value.retry_after_s == 1.0
        asking = pool.submit(client.predict, radiograph(0))
        time.sleep(0.3)
        held[0].cancel()
        assert asking.result(20).prediction.width == 97


def test_a_connection_ends_however_long_its_calls(engine, monkeypatch):
    monkeypatch.setattr(serving, "_CONNECTION_MS", 300)
    with running_server(engine) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert health_of(channel, "") == SERVING  # by another one


def test_a_second_server_on_the_port_is_refused_in_one_line(engine, address, capfd):
    port = int(address.rpartition(":")[2])
    with pytest.raises(ServerError, match=rf"cannot listen on 127.0.0.1:{port}: .*in use; choose another --port"):
        serve(OneModel(engine), ServeOptions(port=port))
    with pytest.raises(ServerError, match="cannot listen"), running_server(engine, ServeOptions(port=port)):
        pytest.fail("it serves")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(engine, host):
    with (
        pytest.raises(ServerError, match=f"cannot listen on {host}:0: .*--host"),
        running_server(engine, ServeOptions(host=host, port=0, insecure=True)),
    ):
        pytest.fail("it serves")


def test_it_listens_on_loopback_unless_told_otherwise(engine, caplog):
    assert ServeOptions().host == "127.0.0.1"
    exposed = ServeOptions(host="0.0.0.0", port=0, insecure=True)
    with pytest.raises(RequestError, match=r"unencrypted; expected tls\.certificate"):  # noqa: SIM117
        with running_server(engine, ServeOptions(host="0.0.0.0", port=0)):
            pytest.fail("it serves")
    with caplog.at_level(logging.WARNING, "thoraxrt"):
        with running_server(engine):
            pass
        assert caplog.text == ""
        with running_server(engine, exposed) as port, Client(f"127.0.0.1:{port}") as client:
            assert client.model().backend == "onnxruntime"
        assert "travel unencrypted" in caplog.text


def test_it_listens_on_ipv6(engine):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with running_server(engine, ServeOptions(host="::1", port=0)) as port, Client(f"[::1]:{port}") as client:
        assert client.model().precision == "fp32"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_is_warm_ends_it_at_once(tiny_bundle, number):
    script = SERVE.replace("serve(OneModel", COMPILING)
    with subprocess.Popen([sys.executable, "-c", script, str(tiny_bundle.path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"compiling\n"
            process.send_signal(signal.SIGHUP)
            process.send_signal(number)
            assert process.wait(20) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_order(tiny_bundle, radiograph, number):
    arguments = [sys.executable, "-c", SERVE, str(tiny_bundle.path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith(f"serving {SERVICE_NAME} on 127.0.0.1:")
            with Client(line.split()[3]) as client:
                assert client.predict(radiograph(0)).prediction.width == 97
                process.send_signal(number)
                assert process.wait(20) == 0
            assert process.stdout.read() == "stopped\n"
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_whatever_it_is_finishing(tiny_bundle, number):
    script = SERVE.replace("serve(OneModel", CLOSING)
    arguments = [sys.executable, "-c", script, str(tiny_bundle.path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith("serving")
            process.send_signal(number)
            assert process.stdout.readline() == "closing\n"
            process.send_signal(number)
            assert process.wait(20) == -number
        finally:
            process.kill()
