"""A process around the services: ports, encryption, message limits, health, reflection, signals, orderly stop.

Owns the grpc.aio server. Knows nothing of what the calls do.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import ModelNotFoundError, RequestError, ServerError, ThoraxrtError
from thoraxrt.server.audit import AuditLog
from thoraxrt.server.batching import BatchingOptions
from thoraxrt.server.calls import Calls, read_as_small
from thoraxrt.server.certificates import server_credentials
from thoraxrt.server.health import Health
from thoraxrt.server.models import Loaded, ModelState, ModelStatus
from thoraxrt.server.oip import OIP_SERVICE_NAME, OpenInferenceService, Repository
from thoraxrt.server.scheduler import Scheduler
from thoraxrt.server.security import AccessInterceptor, Authenticator, SecurityOptions, check_exposure
from thoraxrt.server.service import SERVICE_NAME, PredictionService, Streams
from thoraxrt.server.telemetry import NullTelemetry
from thoraxrt.server.wire import MAX_MESSAGE_BYTES

__all__ = [
    "HOST",
    "PORT",
    "OneModel",
    "ServeOptions",
    "ServedModels",
    "listening",
    "running_server",
    "serve",
    "try_port",
]

HOST: Final = "127.0.0.1"
PORT: Final = 8500

_AHEAD_BYTES: Final = 512 * 1024
"""What is taken of a call's body before the call has been admitted (see grpc's flow control): most PNGs whole, without a
round trip to ask for the rest."""

_CALLS: Final = 1024
"""At once, of one connection and of all; see Calls for whose. Each may hold what is taken ahead of it."""

_CONNECTION_MS: Final = 60 * 60 * 1000
"""How long a connection lives, and its calls may then go on: whose certificate is not taken any more has gone by then."""

_STOPPING: Final = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a server listens on, and whom it answers.

    Beyond loopback `security` must encrypt and authenticate, unless `insecure` says that it need not. A message has at
    most `max_message_bytes`, also once it is decompressed: gzip is taken. Calls in flight have `grace_s` seconds to
    finish once the server stops.

    Raises ValueError where a value makes no sense. Example: `ServeOptions(port=0, grace_s=5.0)`.
    """

    host: str = HOST
    port: int = PORT
    security: SecurityOptions = field(default_factory=SecurityOptions)
    insecure: bool = False
    max_message_bytes: int = MAX_MESSAGE_BYTES
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"ServeOptions port is {self.port}; expected 0 to 65535")
        if not 0 < self.max_message_bytes < 2**31:
            raise ValueError(f"ServeOptions max_message_bytes is {self.max_message_bytes}; expected 1 to {2**31 - 1}")
        if not 0 <= self.grace_s < math.inf:
            raise ValueError(f"ServeOptions grace_s is {self.grace_s}; expected 0 or more seconds")


class ServedModels(Repository, Protocol):
    """What a server answers with, from `start` to `close`: see `thoraxrt.server.models.Models`."""

    async def start(self) -> None:
        """Warm up what answers from now on."""

    async def refresh(self) -> None:
        """Look again at what is to be served."""

    async def close(self) -> None:
        """Answer what has been admitted, and give back what `start` took."""


_DEFAULTS: Final = ServeOptions()
_ANY_PORT: Final = ServeOptions(port=0)
_SILENT: Final = NullTelemetry()


class OneModel:
    """One engine, under the name "default", for a server to answer with; the engine stays its owner's."""

    def __init__(
        self, engine: Engine, telemetry: NullTelemetry = _SILENT, batching: BatchingOptions | None = None
    ) -> None:
        scheduler = Scheduler(engine, engine.decoder, batching or BatchingOptions(), telemetry)
        self._loaded = Loaded(name=scheduler.model, version=1, bundle=engine.bundle, engine=engine, scheduler=scheduler)
        self._warm = False

    @contextmanager
    def lease(self, name: str | None = None, version: int | None = None) -> Iterator[Loaded]:
        """See Models."""
        if not self._is(name, version):
            raise ModelNotFoundError(f"no such model or version; this server has {self._loaded.name}, version 1")
        yield self._loaded

    def _is(self, name: str | None, version: int | None) -> bool:
        return name in (None, self._loaded.name) and version in (None, self._loaded.version)

    async def start(self) -> None:
        """See Models. Raises BackendError where the network fails."""
        await self._loaded.scheduler.warm_up()
        self._warm = True

    def ready(self, name: str | None = None, version: int | None = None) -> bool:
        """See Models."""
        return self._warm and self._is(name, version)

    def index(self) -> list[ModelStatus]:
        """See Models."""
        return [
            ModelStatus(
                name=self._loaded.name,
                version=self._loaded.version,
                state=ModelState.READY if self._warm else ModelState.UNAVAILABLE,
                reason="",
                sha256=self._loaded.bundle.sha256,
                backend=self._loaded.engine.backend,
                precision=self._loaded.engine.precision,
            )
        ]

    async def load(self, name: str, version: int | None = None) -> None:
        """Raises RequestError: there is no other."""
        raise RequestError("this server has one model, which stays; serve a repository to load and unload")

    unload = load

    async def refresh(self) -> None:
        """See Models. It stays as it is."""

    async def close(self) -> None:
        """See Models."""
        self._warm = False
        await self._loaded.scheduler.close()


def serve(
    models: ServedModels,
    options: ServeOptions = _DEFAULTS,
    telemetry: NullTelemetry = _SILENT,
    audit: AuditLog | None = None,
    *,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is in flight and close the models.

    Each image's answer stands in `audit` before it is sent; telemetry and audit log stay their owner's.
    A second signal ends the process at once, and so does the first one before the models are warm. SIGHUP has the models
    looked at again; certificates and tokens are, all the time. `announce` gets one line once the models are warm, with
    the port that was bound; by default it is printed. For the main thread, because signals arrive there. Raises ServerError where a
    port cannot be bound, RequestError where strangers could reach it, ConfigError for certificates or tokens that
    cannot be used, and what a model's start raises.
    """

    async def run() -> None:
        loop, hung_up = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, hung_up.set)
        for number in _STOPPING:
            # There is nothing to finish yet, and what is being compiled cannot be stopped: that may take minutes.
            loop.add_signal_handler(number, os._exit, 0)
        async with listening(models, options, telemetry, audit) as bound:
            stopping = _signalled()
            line = f"serving {SERVICE_NAME} on {_address(options.host, bound)}"
            print(line, flush=True) if announce is None else announce(line)
            refreshing = asyncio.create_task(_refreshed(models, hung_up))
            await stopping.wait()
        refreshing.cancel()

    asyncio.run(run())


@contextmanager
def running_server(
    models: ServedModels | Engine,
    options: ServeOptions = _ANY_PORT,
    telemetry: NullTelemetry = _SILENT,
    audit: AuditLog | None = None,
) -> Iterator[int]:
    """Serve from a thread while the block runs; gives the port. An engine stays its owner's.

    Example:
        with Engine.open("chexnet.bundle") as engine, running_server(engine) as port:
            with Client(f"127.0.0.1:{port}") as client: ...

    Raises as `serve` does.
    """
    served = OneModel(models, telemetry) if isinstance(models, Engine) else models
    started: Future[tuple[int, Callable[[], None]]] = Future()

    async def run() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            loop.call_soon_threadsafe(ended.set)

        async with listening(served, options, telemetry, audit) as bound:
            started.set_result((bound, end))
            await ended.wait()

    with ThreadPoolExecutor(1, thread_name_prefix="server") as pool:
        running = pool.submit(lambda: asyncio.run(run()))
        either: list[Future[Any]] = [started, running]
        wait(either, return_when=FIRST_COMPLETED)
        if running.done():
            running.result()  # it could not start: raises why
        bound, end = started.result()
        try:
            yield bound
        finally:
            end()
            running.result()


@asynccontextmanager
async def listening(
    models: ServedModels,
    options: ServeOptions = _DEFAULTS,
    telemetry: NullTelemetry = _SILENT,
    audit: AuditLog | None = None,
) -> AsyncIterator[int]:
    """Serve on this event loop while the block runs; gives the port, which the system chooses for 0.

    The block is entered once the models are warm: health then says SERVING, and NOT_SERVING before it and from the
    block's end. What is in flight then has `grace_s` seconds to finish, and the models are closed. Raises as `serve`
    does.
    """
    security = options.security
    check_exposure(options.host, bool(security.tls), options.insecure, authenticates=security.authenticates)
    authenticator = Authenticator(security)
    access = [AccessInterceptor(authenticator, security, audit)] if security.authenticates else []
    server = grpc.aio.server(
        interceptors=[Calls(telemetry, options.max_message_bytes, _CALLS), *access],
        options=_channel_options(options),
        maximum_concurrent_rpcs=_CALLS,
    )
    streams, names = Streams(telemetry), (SERVICE_NAME, OIP_SERVICE_NAME)
    service = PredictionService(models, telemetry, streams, audit, options.max_message_bytes)
    state = Health(names, models.ready)
    service.add_to(server)
    OpenInferenceService(models, telemetry, streams, audit).add_to(server)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    reflected = _Reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, server)
    async with AsyncExitStack() as closing:  # in the reverse order
        closing.push_async_callback(models.close)
        closing.push_async_callback(service.close)
        bound = _bind(server, options)
        await server.start()
        closing.push_async_callback(server.stop, options.grace_s)
        closing.callback(streams.stop)
        closing.callback(state.stop)
        await authenticator.start()
        await models.start()
        yield bound


class _Reflection(reflection.aio.ReflectionServicer):  # type: ignore[misc]  # the package has no types
    """gRPC's reflection, whose requests are as bounded as a unary call's."""

    async def ServerReflectionInfo(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """See grpc.reflection."""
        async with aclosing(read_as_small(requests, context)) as small:
            async for response in super().ServerReflectionInfo(small, context):
                yield response


def _channel_options(options: ServeOptions) -> list[tuple[str, int]]:
    """See grpc_types.h for what each of them means."""
    return [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.so_reuseport", 0),  # else a second server on the port takes half the calls in silence
        ("grpc.max_concurrent_streams", _CALLS),
        ("grpc.max_connection_age_ms", _CONNECTION_MS),
        ("grpc.max_connection_age_grace_ms", _CONNECTION_MS),
        # Else gRPC takes megabytes of a body ahead of the reader, to keep a long line busy.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _AHEAD_BYTES),
        ("grpc.keepalive_time_ms", 60_000),  # a connection on which nothing comes is asked whether it is alive
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # how often a client may ask the same
    ]


def _bind(server: grpc.aio.Server, options: ServeOptions) -> int:
    address = _address(options.host, options.port)
    try:
        try_port(options.host, options.port)
        if options.security.tls:
            return server.add_secure_port(address, server_credentials(options.security.tls))
        return server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the port has just been taken"
        raise ServerError(
            f"cannot listen on {address}: {reason}; choose another --port (0 takes a free one) or --host"
        ) from error


def try_port(host: str, port: int) -> None:
    """Raise the OSError that says why the address cannot be bound; gRPC raises without a reason, and prints it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _signalled() -> asyncio.Event:
    """Set at the first SIGINT or SIGTERM, of which the second does what it does by default."""
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        stopping.set()
        for number in _STOPPING:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)  # else asyncio's, which ends what runs in order, is back for SIGINT

    for number in _STOPPING:
        loop.add_signal_handler(number, stop)
    return stopping


async def _refreshed(models: ServedModels, hung_up: asyncio.Event) -> None:
    """Look at the models again whenever SIGHUP has come, however often it came meanwhile."""
    while await hung_up.wait():
        hung_up.clear()
        try:
            await models.refresh()
        except ThoraxrtError as error:
            _log.error("what was served before SIGHUP still is: %s", error)
        except Exception:
            _log.exception("a fault in looking at the models again; the next SIGHUP is heard all the same")
