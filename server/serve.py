"""A process around the service: port, message limits, health, reflection, signals, orderly stop.

Owns the grpc.aio server. Knows nothing of what the calls do.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import ServerError
from thoraxrt.proto.v1 import thoraxrt_pb2_grpc
from thoraxrt.server.service import SERVICE_NAME, PredictionService, RequestParser
from thoraxrt.server.wire import MAX_MESSAGE_BYTES

__all__ = ["GRACE", "HOST", "PORT", "listening", "running_server", "serve"]

HOST: Final = "127.0.0.1"
PORT: Final = 8500

GRACE: Final = 10.0
"""Seconds that calls in flight have to finish once the server stops."""

_log = logging.getLogger(__name__)


def serve(
    engine: Engine,
    *,
    host: str = HOST,
    port: int = PORT,
    grace: float = GRACE,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is in flight and close the engine.

    A second signal ends the process at once. `announce` gets one line once the server is warm,
    with the port that was bound; by default it is printed. For the main thread, because signals
    arrive there. Raises ServerError where the port cannot be bound, BackendError where the
    network fails on the first image.
    """

    async def run() -> None:
        signalled = _signalled()
        async with listening(engine, host=host, port=port, grace=grace, max_message_bytes=max_message_bytes) as bound:
            line = f"serving {SERVICE_NAME} on {_address(host, bound)} ({engine.backend} {engine.precision})"
            print(line, flush=True) if announce is None else announce(line)
            await signalled.wait()

    with engine:
        asyncio.run(run())


@contextmanager
def running_server(
    engine: Engine,
    *,
    host: str = HOST,
    port: int = 0,
    grace: float = GRACE,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> Iterator[int]:
    """Serve from a thread while the block runs; gives the port. The engine stays its owner's.

    Example:
        with Engine.open("chexnet.bundle") as engine, running_server(engine) as port:
            with Client(f"127.0.0.1:{port}") as client: ...

    Raises as `serve` does.
    """
    started: Future[tuple[int, Callable[[], None]]] = Future()

    async def run() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            loop.call_soon_threadsafe(ended.set)

        async with listening(engine, host=host, port=port, grace=grace, max_message_bytes=max_message_bytes) as bound:
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
    engine: Engine,
    *,
    host: str = HOST,
    port: int = PORT,
    grace: float = GRACE,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> AsyncIterator[int]:
    """Serve on this event loop while the block runs; gives the port, which the system chooses for 0.

    The block is entered once the network has run: health then says SERVING, and NOT_SERVING
    before it and from the block's end. What is in flight then has `grace` seconds to finish;
    nothing of the engine runs after that. Raises as `serve` does.
    """
    server = grpc.aio.server(
        interceptors=[RequestParser()],
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),  # else a second server on the port takes half the calls in silence
        ],
    )
    service, state = PredictionService(engine), health.aio.HealthServicer()
    thoraxrt_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        bound = _bind(server, host, port)
        await _report(state, health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.start()
        await service.warm_up()
        await _report(state, health_pb2.HealthCheckResponse.SERVING)
        yield bound
    finally:
        await state.enter_graceful_shutdown()
        await server.stop(grace)
        await service.close()


async def _report(state: health.aio.HealthServicer, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
    for name in (health.OVERALL_HEALTH, SERVICE_NAME):
        await state.set(name, status)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = _address(host, port)
    if not _is_loopback(host):
        _log.warning("%s is reachable from other machines, without encryption and without a password", address)
    try:
        _probe(host, port)
        return server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the port has just been taken"
        raise ServerError(
            f"cannot listen on {address}: {reason}; choose another --port (0 takes a free one) or --host"
        ) from error


def _probe(host: str, port: int) -> None:
    """Raise the OSError that says why the address cannot be bound; gRPC raises without a reason, and prints it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _signalled() -> asyncio.Event:
    """Set at the first SIGINT or SIGTERM; the second one does what it does by default."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        event.set()
        for number in numbers:
            loop.remove_signal_handler(number)

    for number in numbers:
        loop.add_signal_handler(number, stop)
    return event
