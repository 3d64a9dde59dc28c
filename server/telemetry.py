"""What a server tells its operators: Prometheus metrics, OpenTelemetry traces, structured logs.

Owns every metric's name, the endpoint that serves them, and what may stand in a log line or a span. Nothing that comes
from an image or a client does: no content, name, identifier, token or file name. Knows nothing of what is measured.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TextIO

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, MetricsHandler, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from thoraxrt import __version__
from thoraxrt.engine.errors import BackendError, BackendUnavailableError, ServerError
from thoraxrt.engine.execute import DeviceMemory

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

__all__ = [
    "MetricsEndpoint",
    "NullTelemetry",
    "Telemetry",
    "logging_to_stderr",
    "request_id",
    "tracing",
]

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The server's own number of the call that is being answered; empty outside of calls. Every log line carries it."""

# Three or four steps a decade, so that `top` and a dashboard can interpolate a percentile to some 20 %.
_SECONDS: Final = tuple(
    round(step * 10.0**power, 5) for power in range(-4, 2) for step in (1, 1.5, 2, 3, 5, 7) if step * 10.0**power <= 60
)
_IMAGES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)

_SCRAPE_S: Final = 5.0  # a client that takes longer is cut off
_SCRAPES: Final = 16
_LINES: Final = 10_000

_SHOWN: Final = frozenset({"thoraxrt", "opentelemetry"})
"""Packages whose messages quote nothing of an image or a patient: a span has none of it to quote."""

_TEMPLATES: Final = frozenset({"asyncio", "grpc"})
"""Packages that log through templates whose first line is their own words; pydicom's, say, quote the file."""

_FAULTS: Final = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes that make a server's span an error: OpenTelemetry's semantic conventions for gRPC, "gRPC status"."""

_CALL_LOG: Final = logging.getLogger("thoraxrt.server.calls")
_log = logging.getLogger(__name__)


class NullTelemetry:
    """Telemetry that is switched off: what to report, and when. Any thread may call anything.

    A `model` is a name that the server has loaded and a `method` one that it serves (`/thoraxrt.v1.../Predict`), never
    what a client asked for: each new value is kept for as long as the process runs.
    """

    def stage(self, model: str, stage: str, seconds: float) -> None:
        """One image has spent so long in a stage: read, queue, decode, batch_wait, network, draw or write."""

    def traced(self, model: str, stage: str, seconds: float, ended: float | None = None) -> None:
        """The same for the trace of the call that this is said in; until `ended`, by `time.monotonic`, else until now."""

    def stage_of_call(self, model: str, stage: str, seconds: float) -> None:
        """Both, of a stage that has just ended in its call."""
        self.stage(model, stage, seconds)
        self.traced(model, stage, seconds)

    def batch(self, model: str, size: int) -> None:
        """A batch of so many images has gone to the engine."""

    def refused(self, model: str, reason: str) -> None:
        """An image was not admitted, or its deadline passed; `reason` is a word of ours."""

    def queue(self, model: str, depth: int) -> None:
        """So many images are in the server now."""

    def begun(self, method: str) -> None:
        """A call has arrived; in the call's own context, which it gives a `request_id`."""

    def answered(self, method: str, code: str, seconds: float) -> None:
        """A call that had begun ended with a status code (OK, INVALID_ARGUMENT, ...)."""

    def worker_restarted(self) -> None:
        """A decoding worker was replaced."""

    def loaded(self, model: str, version: str, *, sha256: str, backend: str, precision: str) -> None:
        """A model's version answers from now on."""

    def unloaded(self, model: str, version: str) -> None:
        """A model's version is gone; harmless where it never was."""

    def load_failed(self, model: str) -> None:
        """A bundle could not be loaded, and what was served before still is; a folder's name, or "default"."""

    def audit_failed(self) -> None:
        """An audit record could not be written."""

    def gpu_memory(self, read: Callable[[], Iterable[DeviceMemory]]) -> None:
        """Ask `read` at every scrape, in the scrape's thread; a BackendError from it leaves the GPUs out."""

    def span(self, method: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> AbstractContextManager[None]:
        """A trace's span around a call; `traced` and `answered` in the block tell it what there is to tell.

        Of the `metadata` the W3C `traceparent` and `tracestate` are read, and the client's span becomes the parent.
        """
        return nullcontext()

    def close(self) -> None:
        """Send the spans that wait; the traces end here."""


class Telemetry(NullTelemetry):
    """Metrics in a registry of its own, and spans where a tracer provider is given (see `tracing`).

    Example:
        telemetry = Telemetry()
        with MetricsEndpoint(telemetry, "127.0.0.1", 8501):
            telemetry.batch("chexnet", 4)
    """

    def __init__(self, traces: TracerProvider | None = None) -> None:
        self.registry = CollectorRegistry()
        self._traces = traces
        self._tracer = traces.get_tracer("thoraxrt", __version__) if traces else None
        self._numbers = itertools.count(1)
        self._start = secrets.token_hex(4)  # so that no two servers' request ids meet
        self._models: dict[tuple[str, str], tuple[str, ...]] = {}
        self._lock = threading.Lock()  # around the models

        # Cached by their labels, which takes a fraction of looking them up in the metric.
        def histogram(
            name: str, help_: str, labels: Sequence[str], buckets: Sequence[float]
        ) -> Callable[..., Histogram]:
            return cache(Histogram(name, help_, labels, buckets=buckets, registry=self.registry).labels)

        def gauge(name: str, help_: str, labels: Sequence[str]) -> Callable[..., Gauge]:
            return cache(Gauge(name, help_, labels, registry=self.registry).labels)

        def counter(name: str, help_: str, labels: Sequence[str]) -> Callable[..., Counter]:
            return cache(Counter(name, help_, labels, registry=self.registry).labels)

        self._stage = histogram("thoraxrt_stage_seconds", "Time of one image in a stage.", ("model", "stage"), _SECONDS)
        self._call = histogram("thoraxrt_call_seconds", "Time from arrival to end.", ("method", "code"), _SECONDS)
        self._batch = histogram("thoraxrt_batch_images", "Images that went to the engine at once.", ("model",), _IMAGES)
        self._in_flight = gauge("thoraxrt_calls_in_flight", "Calls that are being answered.", ("method",))
        self._queue = gauge("thoraxrt_queue_images", "Images in the server, whatever their stage.", ("model",))
        self._refused = counter("thoraxrt_refused", "Images not admitted, or too late.", ("model", "reason"))
        self._restarts = Counter(
            "thoraxrt_decode_worker_restarts", "Decoding workers that were replaced.", registry=self.registry
        )
        self._loads = counter("thoraxrt_model_loads", "Models loaded, or that could not be.", ("model", "outcome"))
        self._audit_failures = Counter(
            "thoraxrt_audit_failures", "Audit records that could not be written.", registry=self.registry
        )
        facts = ("model", "version", "sha256", "backend", "precision")
        self._info = Gauge(
            "thoraxrt_model_info", "1 for each model version that answers.", facts, registry=self.registry
        )
        gauge("thoraxrt_build_info", "1; the server's version.", ("version",))(__version__).set(1)
        ProcessCollector(registry=self.registry)  # CPU time, resident memory, descriptors, start time

    def stage(self, model: str, stage: str, seconds: float) -> None:
        """See NullTelemetry."""
        self._stage(model, stage).observe(seconds)

    def traced(self, model: str, stage: str, seconds: float, ended: float | None = None) -> None:
        """See NullTelemetry."""
        if self._tracer is None:
            return
        from opentelemetry.trace import get_current_span

        if get_current_span().is_recording():
            ago = 0.0 if ended is None else time.monotonic() - ended
            end = time.time_ns() - int(1e9 * ago)
            began = end - int(1e9 * seconds)
            self._tracer.start_span(stage, attributes={"model": model, "stage": stage}, start_time=began).end(end)

    def batch(self, model: str, size: int) -> None:
        """See NullTelemetry."""
        self._batch(model).observe(size)

    def refused(self, model: str, reason: str) -> None:
        """See NullTelemetry."""
        self._refused(model, reason).inc()

    def queue(self, model: str, depth: int) -> None:
        """See NullTelemetry."""
        self._queue(model).set(depth)

    def begun(self, method: str) -> None:
        """See NullTelemetry."""
        request_id.set(f"{self._start}-{next(self._numbers)}")
        self._in_flight(method).inc()

    def answered(self, method: str, code: str, seconds: float) -> None:
        """See NullTelemetry."""
        self._in_flight(method).dec()
        self._call(method, code).observe(seconds)
        if _CALL_LOG.isEnabledFor(logging.INFO):
            call = {"method": method, "code": code, "ms": round(1000 * seconds, 3)}
            _CALL_LOG.info("%s %s in %.3f ms", method, code, 1000 * seconds, extra={"call": call})
        if self._tracer is not None:
            from opentelemetry.trace import StatusCode, get_current_span

            span = get_current_span()
            span.set_attribute("code", code)
            if code in _FAULTS:
                span.set_status(StatusCode.ERROR)

    def worker_restarted(self) -> None:
        """See NullTelemetry."""
        self._restarts.inc()

    def loaded(self, model: str, version: str, *, sha256: str, backend: str, precision: str) -> None:
        """See NullTelemetry."""
        self.unloaded(model, version)
        with self._lock:
            self._models[model, version] = labels = (model, version, sha256, backend, precision)
            self._info.labels(*labels).set(1)
        self._loads(model, "loaded").inc()

    def unloaded(self, model: str, version: str) -> None:
        """See NullTelemetry."""
        with self._lock:
            if labels := self._models.pop((model, version), None):
                self._info.remove(*labels)

    def load_failed(self, model: str) -> None:
        """See NullTelemetry."""
        self._loads(model, "failed").inc()

    def audit_failed(self) -> None:
        """See NullTelemetry."""
        self._audit_failures.inc()

    def gpu_memory(self, read: Callable[[], Iterable[DeviceMemory]]) -> None:
        """See NullTelemetry."""
        self.registry.register(_GpuCollector(read))

    def span(self, method: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> AbstractContextManager[None]:
        """See NullTelemetry."""
        return nullcontext() if self._tracer is None else self._span(self._tracer, method, metadata)

    @contextmanager
    def _span(self, tracer: Tracer, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Iterator[None]:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {key: value for key, value in metadata if key in ("traceparent", "tracestate")}
        client = TraceContextTextMapPropagator().extract(carrier)
        said = {"method": method}  # of an exception nothing: it may quote the image or the patient
        with tracer.start_as_current_span(
            method, client, SpanKind.SERVER, said, record_exception=False, set_status_on_exception=False
        ):
            yield

    def close(self) -> None:
        """See NullTelemetry."""
        if self._traces is not None:
            self._traces.shutdown()


class _GpuCollector(Collector):
    def __init__(self, read: Callable[[], Iterable[DeviceMemory]]) -> None:
        self._read = read

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [GaugeMetricFamily("thoraxrt_gpu_memory_bytes", "A GPU's memory.", labels=("gpu", "kind"))]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        (family,) = self.describe()
        try:
            for memory in self._read():
                family.add_metric((memory.gpu, "used"), memory.used)
                family.add_metric((memory.gpu, "total"), memory.total)
        except BackendError as error:  # a lost GPU; the other metrics say what that does
            _log.warning("the GPU's memory cannot be read: %s", error)
        return [family]


class MetricsEndpoint:
    """Serves a telemetry's metrics in Prometheus's formats over HTTP, from threads of its own, until it is closed.

    `port` 0 takes a free one; `port` then says which. There is neither encryption nor authentication: for loopback,
    or a network that only the monitoring reaches. Raises ServerError where the address cannot be bound.
    """

    def __init__(self, telemetry: Telemetry, host: str, port: int) -> None:
        handler = type("Handler", (MetricsHandler,), {"registry": telemetry.registry, "timeout": _SCRAPE_S})
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            server = type("Server", (_Server,), {"address_family": family})
            self._server: ThreadingHTTPServer = server(address, handler)
        except OSError as error:
            raise ServerError(
                f"cannot serve metrics on {host}, port {port}: {error.strerror}; choose another metrics.port "
                "(0 takes a free one) or metrics.host, or set metrics.enabled to false"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; scrapes that are being answered end by themselves."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    """Answers so many scrapes at a time, each within its time as a whole, however its client drips."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        self._open: dict[Any, float] = {}  # when it is cut off, by socket
        super().__init__(*args)

    def server_bind(self) -> None:
        """See TCPServer; HTTPServer asks for the host's name besides, and waits where there is no DNS."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """See ThreadingMixIn."""
        if len(self._open) >= _SCRAPES:
            self.shutdown_request(request)
            return
        self._open[request] = time.monotonic() + _SCRAPE_S
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Cut off whose time is up; called several times a second."""
        now = time.monotonic()
        for request, until in self._open.copy().items():
            if now > until:
                with suppress(OSError):  # it has just ended
                    request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """See TCPServer."""
        self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what ended a scrape, without the peer's words."""
        _log.warning("a scrape of the metrics ended with %s", type(sys.exception()).__name__)


def tracing(endpoint: str) -> TracerProvider:
    """Spans go to an OpenTelemetry collector at `endpoint` over OTLP/gRPC: http://host:4317, or https:// for TLS.

    The OTEL_* variables of OpenTelemetry's specification hold besides (OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, ...).
    Raises BackendUnavailableError where the packages are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"tracing needs {error.name}, which is not installed: pip install 'thoraxrt[tracing]', or leave "
            "tracing.endpoint out"
        ) from error
    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "thoraxrt"), "service.version": __version__}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider


@contextmanager
def logging_to_stderr(level: str = "info", *, as_json: bool = False) -> Iterator[None]:
    """Log to stderr while the block runs, from a thread of its own, so that a stalled reader stalls no call.

    `level` is debug, info, warning or error. Lines are JSON objects, or plain. At most 10,000 lines wait; those beyond
    are dropped, and the next line that is written says how many. Other packages are heard from warnings on, cut to what
    is known to quote neither an image nor a patient; of an exception, type and place are logged, not its message.
    """
    root = logging.getLogger()
    before = root.handlers[:], root.level
    writer = _Writer(sys.stderr)
    writer.setFormatter(_JsonFormatter() if as_json else _PlainFormatter())
    writer.addFilter(lambda record: record.levelno >= logging.WARNING or _package(record) in _SHOWN)
    root.handlers = [writer]
    root.setLevel(level.upper())
    logging.captureWarnings(True)  # they go to a logger, which is another package's
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers = before[0]
        root.setLevel(before[1])
        writer.close()


class _Writer(logging.Handler):
    """Writes lines from a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, unless the reader takes none of it for a second."""
        super().close()
        with suppress(queue.Full):
            self._lines.put(None, timeout=1)
            self._thread.join(timeout=1)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            note = f"{dropped} lines of the log were dropped before this one\n" if dropped else ""
            try:
                self._stream.write(f"{note}{line}\n")
                self._stream.flush()
            except OSError:  # the reader has gone, or its disk is full
                self._dropped += dropped + 1


class _PlainFormatter(logging.Formatter):
    """One line for people: time, level, logger, message, request."""

    def format(self, record: logging.LogRecord) -> str:
        request = f" [{request_id.get()}]" if request_id.get() else ""
        error = f": {_error(record)['error']}" if record.exc_info else ""
        return f"{_time(record)} {record.levelname:<7} {record.name}: {_message(record)}{error}{request}"


class _JsonFormatter(logging.Formatter):
    """One line for programs: a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        line["message"] = _message(record)
        if request := request_id.get():
            line["request_id"] = request
        return msgspec.json.encode(line | getattr(record, "call", {}) | _error(record)).decode()


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _package(record: logging.LogRecord) -> str:
    return record.name.partition(".")[0]


def _message(record: logging.LogRecord) -> str:
    """What may be logged of a record: our own words, and others' as far as they are known to quote nothing."""
    if _package(record) in _SHOWN:
        return record.getMessage()
    if _package(record) in _TEMPLATES:
        return str(record.msg).partition("\n")[0]  # without its arguments, and the exceptions quoted below it
    return f"not shown, because it may quote an image or a patient (of {record.module}, line {record.lineno})"


def _error(record: logging.LogRecord) -> dict[str, Any]:
    """An exception's type and where it came from; what it says may quote an image or a patient."""
    if not record.exc_info or record.exc_info[0] is None:
        return {}
    return {"error": record.exc_info[0].__name__, "at": traceback.format_tb(record.exc_info[2])}
