"""Telemetry: every metric by its name, scrapes over HTTP, spans at a real collector, logs that quote nothing."""

from __future__ import annotations

import inspect
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from contextvars import copy_context

import grpc
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from thoraxrt.engine.errors import BackendUnavailableError, DeviceError, ServerError
from thoraxrt.engine.execute import DeviceMemory
from thoraxrt.proto.v1.thoraxrt_pb2 import PredictRequest
from thoraxrt.server import telemetry as module
from thoraxrt.server.serve import running_server
from thoraxrt.server.telemetry import (
    MetricsEndpoint,
    NullTelemetry,
    Telemetry,
    logging_to_stderr,
    request_id,
    tracing,
)

PATIENT = "DOE^JANE 1956-02-17"
PREDICT = "/thoraxrt.v1.PredictionService/Predict"


def scrape(port: int) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by name and label values, in the labels' alphabetical order."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(autouse=True)
def outside_of_calls() -> Iterator[None]:
    token = request_id.set("")
    yield
    request_id.reset(token)


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def endpoint(telemetry: Telemetry) -> Iterator[MetricsEndpoint]:
    with MetricsEndpoint(telemetry, "127.0.0.1", 0) as endpoint:
        yield endpoint


def test_what_is_reported_is_scraped(telemetry, endpoint):
    telemetry.stage("chexnet", "decode", 0.012)
    telemetry.batch("chexnet", 4)
    telemetry.batch("chexnet", 1)
    telemetry.queue("chexnet", 7)
    telemetry.refused("chexnet", "deadline")
    telemetry.begun(PREDICT)
    telemetry.begun(PREDICT)
    telemetry.answered(PREDICT, "OK", 0.2)
    telemetry.worker_restarted()
    telemetry.audit_failed()
    telemetry.load_failed("chexnet")
    telemetry.loaded("chexnet", "1", sha256="ab12", backend="openvino", precision="bf16")
    samples = scrape(endpoint.port)
    expected = {
        ("thoraxrt_stage_seconds_count", ("chexnet", "decode")): 1,
        ("thoraxrt_stage_seconds_sum", ("chexnet", "decode")): 0.012,
        ("thoraxrt_stage_seconds_bucket", ("0.01", "chexnet", "decode")): 0,
        ("thoraxrt_stage_seconds_bucket", ("0.015", "chexnet", "decode")): 1,
        ("thoraxrt_batch_images_count", ("chexnet",)): 2,
        ("thoraxrt_batch_images_sum", ("chexnet",)): 5,
        ("thoraxrt_queue_images", ("chexnet",)): 7,
        ("thoraxrt_refused_total", ("chexnet", "deadline")): 1,
        ("thoraxrt_calls_in_flight", (PREDICT,)): 1,
        ("thoraxrt_call_seconds_count", ("OK", PREDICT)): 1,
        ("thoraxrt_decode_worker_restarts_total", ()): 1,
        ("thoraxrt_audit_failures_total", ()): 1,
        ("thoraxrt_model_loads_total", ("chexnet", "failed")): 1,
        ("thoraxrt_model_loads_total", ("chexnet", "loaded")): 1,
        ("thoraxrt_model_info", ("openvino", "chexnet", "bf16", "ab12", "1")): 1,
    }
    assert {key: samples[key] for key in expected} == expected
    assert samples["process_resident_memory_bytes", ()] > 10_000_000
    assert samples["process_open_fds", ()] == pytest.approx(len(os.listdir("/proc/self/fd")), abs=4)


def test_one_model_version_has_one_info_until_it_is_unloaded(telemetry, endpoint):
    def infos() -> set[tuple[str, ...]]:
        return {labels for name, labels in scrape(endpoint.port) if name == "thoraxrt_model_info"}

    telemetry.loaded("chexnet", "1", sha256="ab", backend="openvino", precision="bf16")
    telemetry.loaded("chexnet", "1", sha256="cd", backend="openvino", precision="bf16")  # reloaded with another bundle
    telemetry.loaded("chexnet", "2", sha256="ef", backend="openvino", precision="bf16")
    assert infos() == {("openvino", "chexnet", "bf16", sha256, v) for sha256, v in (("cd", "1"), ("ef", "2"))}
    telemetry.unloaded("chexnet", "1")
    telemetry.unloaded("chexnet", "1")
    assert infos() == {("openvino", "chexnet", "bf16", "ef", "2")}


def test_gpu_memory_is_read_at_each_scrape_and_left_out_where_the_gpu_is_lost(telemetry, endpoint):
    answers = iter([[DeviceMemory(gpu="0", used=3, total=8)], DeviceError("gone", lost=True), []])

    def read() -> list[DeviceMemory]:
        answer = next(answers)
        if isinstance(answer, DeviceError):
            raise answer
        return answer

    telemetry.gpu_memory(read)
    name = "thoraxrt_gpu_memory_bytes"
    assert {key: value for key, value in scrape(endpoint.port).items() if key[0] == name} == {
        (name, ("0", "total")): 8,
        (name, ("0", "used")): 3,
    }
    for _ in range(2):
        samples = scrape(endpoint.port)
        assert not [key for key in samples if key[0] == name]
        assert ("process_open_fds", ()) in samples


def test_two_telemetries_share_nothing(telemetry):
    telemetry.worker_restarted()
    assert Telemetry().registry.get_sample_value("thoraxrt_decode_worker_restarts_total") == 0


def test_reports_from_many_threads_are_all_counted(telemetry):
    def report(_: int) -> None:
        for _ in range(500):
            telemetry.stage("m", "network", 0.01)
            telemetry.begun(PREDICT)
            telemetry.answered(PREDICT, "OK", 0.01)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(report, range(8)))
    value = telemetry.registry.get_sample_value
    assert value("thoraxrt_stage_seconds_count", {"model": "m", "stage": "network"}) == 4000
    assert value("thoraxrt_call_seconds_count", {"method": PREDICT, "code": "OK"}) == 4000
    assert value("thoraxrt_calls_in_flight", {"method": PREDICT}) == 0


def test_switched_off_it_takes_the_same_calls_and_keeps_nothing():
    def public(kind: type) -> dict[str, inspect.Signature]:
        return {
            name: inspect.signature(f) for name, f in vars(kind).items() if callable(f) and not name.startswith("_")
        }

    of_both = {"stage_of_call": public(NullTelemetry)["stage_of_call"]}  # made of two that each has
    assert public(NullTelemetry) == public(Telemetry) | of_both
    off = NullTelemetry()
    off.stage("m", "read", 1.0)
    with off.span("predict"):
        off.answered(PREDICT, "OK", 1.0)
    assert vars(off) == {}


def test_a_taken_port_is_an_error_that_says_what_to_set(telemetry, endpoint):
    with pytest.raises(
        ServerError, match=rf"port {endpoint.port}: Address already in use; choose another metrics.port"
    ):
        MetricsEndpoint(telemetry, "127.0.0.1", endpoint.port)


def test_the_endpoint_listens_on_ipv6(telemetry):
    with MetricsEndpoint(telemetry, "::1", 0) as endpoint, socket.create_connection(("::1", endpoint.port), 5) as peer:
        peer.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert peer.recv(64).startswith(b"HTTP/1.0 200")


def test_a_silent_client_is_cut_off_and_keeps_nobody_waiting(telemetry, monkeypatch):
    monkeypatch.setattr(module, "_SCRAPE_S", 0.2)
    with (
        MetricsEndpoint(telemetry, "127.0.0.1", 0) as endpoint,
        socket.create_connection(("127.0.0.1", endpoint.port), 5) as silent,
    ):
        silent.sendall(b"GET /met")
        assert ("process_open_fds", ()) in scrape(endpoint.port)
        assert silent.recv(1) == b""


def test_a_client_that_drips_is_cut_off(telemetry, monkeypatch):
    monkeypatch.setattr(module, "_SCRAPE_S", 0.3)
    with (
        MetricsEndpoint(telemetry, "127.0.0.1", 0) as endpoint,
        socket.create_connection(("127.0.0.1", endpoint.port), 5) as dripping,
        suppress(ConnectionError),
    ):
        for _ in range(50):
            dripping.sendall(b"G")
            time.sleep(0.1)
        pytest.fail("it was left to drip")


def test_no_more_than_so_many_are_served_at_once(telemetry):
    with MetricsEndpoint(telemetry, "127.0.0.1", 0) as endpoint:
        with ExitStack() as opened:
            clients = [
                opened.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), 3))
                for _ in range(module._SCRAPES + 1)
            ]
            assert clients[-1].recv(1) == b""
        until = time.monotonic() + 5
        while endpoint._server._open and time.monotonic() < until:  # the others' ends are still to be seen
            time.sleep(0.01)
        assert ("process_open_fds", ()) in scrape(endpoint.port)


def test_the_endpoint_asks_nobody_for_the_hosts_name(telemetry, monkeypatch):
    monkeypatch.setattr(socket, "getfqdn", lambda host: pytest.fail("a network without DNS would have it wait"))
    with MetricsEndpoint(telemetry, "127.0.0.1", 0) as endpoint:
        assert ("process_open_fds", ()) in scrape(endpoint.port)


def test_a_closed_endpoint_leaves_port_and_threads(telemetry):
    with MetricsEndpoint(telemetry, "127.0.0.1", 0) as endpoint:
        scrape(endpoint.port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", endpoint.port))
    assert "metrics" not in [thread.name for thread in threading.enumerate()]


# Logs


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines()]


def test_a_call_is_one_json_line(telemetry, capsys):
    with logging_to_stderr(as_json=True):

        def call() -> str:
            telemetry.begun(PREDICT)
            logging.getLogger("thoraxrt.server.scheduler").warning("%d images were not answered", 3)
            telemetry.answered(PREDICT, "OK", 0.0123456)
            return request_id.get()

        ids = [copy_context().run(call), copy_context().run(call)]
        logging.getLogger("thoraxrt.server").info("outside of calls")
    lines = logged(capsys)
    assert len(set(ids)) == 2
    assert [line.get("request_id") for line in lines] == [ids[0], ids[0], ids[1], ids[1], None]
    assert lines[0] | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": "thoraxrt.server.scheduler",
        "message": "3 images were not answered",
        "request_id": ids[0],
    }
    assert {key: lines[1][key] for key in ("method", "code", "ms")} == {"method": PREDICT, "code": "OK", "ms": 12.346}


def test_plain_lines_are_for_people(telemetry, capsys):
    with logging_to_stderr():
        copy_context().run(lambda: (telemetry.begun(PREDICT), telemetry.answered(PREDICT, "NOT_FOUND", 0.01)))
        logging.getLogger("thoraxrt.server").debug("below the level")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"INFO    thoraxrt.server.calls: {PREDICT} NOT_FOUND in 10.000 ms [" in line


@pytest.mark.parametrize("as_json", [True, False])
def test_a_log_quotes_no_patient(capsys, as_json):
    with warnings.catch_warnings(action="always"), logging_to_stderr("debug", as_json=as_json):
        logging.getLogger("pydicom").warning(f"Invalid value for VR PN: '{PATIENT}'")
        logging.getLogger("pydicom").info("nothing that an operator could read")
        logging.getLogger("asyncio").error(f"Task exception was never retrieved\nfuture: ValueError('{PATIENT}')")
        logging.getLogger("grpc._cython.cygrpc").error("Unexpected %s", PATIENT)
        warnings.warn(f"a value of {PATIENT}", stacklevel=1)
        try:
            raise ValueError(PATIENT)
        except ValueError:
            logging.getLogger("thoraxrt.server").exception("the engine failed")
            logging.getLogger("asyncio").exception("it failed")
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 6
    assert "Task exception was never retrieved" in said
    assert "the engine failed" in said
    assert "ValueError" in said
    assert not any(word in said for word in ("DOE", "JANE", "1956"))


def test_a_json_line_says_where_an_exception_came_from(capsys):
    with logging_to_stderr(as_json=True):
        try:
            raise KeyError("x")
        except KeyError:
            logging.getLogger("thoraxrt.server").exception("it failed")
    (line,) = logged(capsys)
    assert line["error"] == "KeyError"
    assert "test_telemetry.py" in line["at"][-1]


def test_logging_is_as_it_was_afterwards(capsys):
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with logging_to_stderr("error"):
        logging.getLogger("thoraxrt").warning("below the level")
    assert (root.handlers, root.level) == before
    assert capsys.readouterr().err == ""


STALLED = """
import logging, time
from thoraxrt.server import telemetry
telemetry._LINES = 50
log = logging.getLogger("thoraxrt")
with telemetry.logging_to_stderr():
    began = time.monotonic()
    for number in range(400):
        log.info("%d %s", number, "x" * 1000)
    print(time.monotonic() - began, flush=True)
    input()  # the reader reads on
    while logging.root.handlers[0]._lines.qsize(): time.sleep(0.01)
    log.info("the last")
"""


def test_a_reader_that_stalls_stalls_nobody_and_is_told_what_it_missed():
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert float(process.stdout.readline()) < 1.0  # a pipe takes 64 KiB: 400 KiB would wait for ever
    _, said = process.communicate("\n", timeout=20)
    assert "lines of the log were dropped before this one" in said
    assert said.endswith("the last\n")
    assert process.returncode == 0


# Traces


@pytest.fixture
def collector() -> Iterator[tuple[str, list[object]]]:
    """A collector of spans as OpenTelemetry's protocol wants it: its address, and the spans that arrived."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc")
    messages = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    spans: list[object] = []

    class Collector(service.TraceServiceServicer):
        def Export(self, request, context):  # noqa: N802
            for resource in request.resource_spans:
                names = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
                spans.extend((names["service.name"], span) for scope in resource.scope_spans for span in scope.spans)
            return messages.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    service.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", spans
    server.stop(None).wait()


def attributes(span) -> dict[str, str]:
    return {entry.key: entry.value.string_value for entry in span.attributes}


def test_a_calls_spans_reach_the_collector_under_the_clients_trace(collector, engine, radiograph):
    endpoint, spans = collector
    telemetry = Telemetry(tracing(endpoint))
    header = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    with running_server(engine, telemetry=telemetry) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(PREDICT)
        call(PredictRequest(image=radiograph()).SerializeToString(), metadata=[header], timeout=20)
        with pytest.raises(grpc.RpcError):
            call(PredictRequest(image=PATIENT.encode()).SerializeToString(), timeout=20)
    telemetry.close()
    assert {name for name, _ in spans} == {"thoraxrt"}
    answered, failed = (span for _, span in spans if span.name == PREDICT)
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == tuple(header[1].split("-")[1:3])
    assert (attributes(answered), answered.status.code) == ({"method": PREDICT, "code": "OK"}, 0)
    assert failed.parent_span_id == b""
    assert (attributes(failed), failed.status.code) == ({"method": PREDICT, "code": "INVALID_ARGUMENT"}, 0)
    inside = {span.name: span for _, span in spans if span.parent_span_id == answered.span_id}
    assert inside.keys() == {"read", "queue", "decode", "batch_wait", "network", "write"}
    assert inside["decode"].end_time_unix_nano <= inside["network"].start_time_unix_nano + 1_000_000  # of two clocks
    for name, span in inside.items():
        assert attributes(span) == {"model": "default", "stage": name}
        assert span.trace_id == answered.trace_id
        assert answered.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    assert not any(PATIENT.encode() in span.SerializeToString() for _, span in spans)


def test_a_stages_span_is_where_it_was_and_an_errors_text_stays_unsaid(collector):
    endpoint, spans = collector
    telemetry = Telemetry(tracing(endpoint))
    telemetry.traced("m", "outside", 1.0)  # of no call
    with suppress(ValueError), telemetry.span("/x"):
        telemetry.begun("/x")
        telemetry.traced("m", "decode", 0.5, ended=time.monotonic() - 2.0)
        telemetry.answered("/x", "INTERNAL", 3.0)
        raise ValueError(PATIENT)
    telemetry.close()
    (_, decode), (_, call) = spans
    assert (decode.name, decode.parent_span_id) == ("decode", call.span_id)
    assert decode.end_time_unix_nano - decode.start_time_unix_nano == 500_000_000
    assert 1.9 < (call.end_time_unix_nano - decode.end_time_unix_nano) / 1e9 < 10
    assert (attributes(call)["code"], call.status.code, call.status.message) == ("INTERNAL", 2, "")
    assert not call.events
    assert PATIENT.encode() not in call.SerializeToString()


@pytest.mark.parametrize("header", ["", "00-xyz", "00-00000000000000000000000000000000-b7ad6b7169203331-01"])
def test_a_malformed_traceparent_starts_a_trace_of_its_own(collector, header):
    endpoint, spans = collector
    telemetry = Telemetry(tracing(endpoint))
    with telemetry.span("Predict", [("traceparent", header)]):
        pass
    telemetry.close()
    ((_, span),) = spans
    assert span.parent_span_id == b""


def test_a_collector_that_is_gone_does_not_hold_up_the_end(monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with socket.socket() as bound:  # bound, not listening: refused
        bound.bind(("127.0.0.1", 0))
        telemetry = Telemetry(tracing(f"http://127.0.0.1:{bound.getsockname()[1]}"))
        with telemetry.span("Predict"):
            pass
        began = time.monotonic()
        telemetry.close()
        assert time.monotonic() - began < 4


def test_tracing_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'thoraxrt\[tracing\]'"):
        tracing("http://127.0.0.1:4317")


def test_without_tracing_opentelemetry_is_not_imported():
    code = (
        "import sys; from thoraxrt.server.telemetry import Telemetry\n"
        "telemetry = Telemetry()\n"
        "with telemetry.span('/m'): telemetry.stage('m', 'read', 1); telemetry.begun('/m'); telemetry.answered('/m', 'OK', 1)\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
