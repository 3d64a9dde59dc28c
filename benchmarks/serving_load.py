"""Requests against a server from a process of their own: as many at a time, or as they come.

Knows bytes, not what they mean: a request is written as it is, and of an answer only its status is looked at. Needs
nothing of thoraxrt, so that every server gets the same load.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import grpc

__all__ = ["Answer", "Arrivals", "Load", "Target", "due_times"]

Arrivals = Literal["poisson", "even"]
"""When requests come in an open loop: independently of each other, or evenly spaced."""


class Target(NamedTuple):
    """Where requests go: over gRPC `path` is a method; over HTTP/1.1 they are posted to it, as `content_type`."""

    address: str
    path: str
    content_type: str = ""


class Answer(NamedTuple):
    """A request that was due at `due_s` seconds, took `latency_s` from then on, and ended with `status`: OK, or not."""

    due_s: float
    latency_s: float
    status: str


_Ask = Callable[[bytes], Awaitable[str]]


class Load:
    """The process, for the block. `requests` are sent in turn, again and again."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()

    def closed(
        self,
        target: Target,
        requests: Sequence[bytes],
        concurrency: int,
        count: int | None = None,
        *,
        seconds: float = math.inf,
        deadline_s: float = 60.0,
    ) -> list[Answer]:
        """Send `count` requests, or for `seconds`, each as soon as fewer than `concurrency` are unanswered."""
        return self._run(_closed, target, requests, concurrency, count, seconds, deadline_s)

    def open(
        self,
        target: Target,
        requests: Sequence[bytes],
        rate: float,
        seconds: float,
        deadline_s: float,
        arrivals: Arrivals = "poisson",
    ) -> list[Answer]:
        """Send requests as they arrive, `rate` a second, whatever is unanswered; each has `deadline_s` seconds."""
        return self._run(_open, target, requests, due_times(arrivals, rate, seconds), deadline_s)

    def _run(self, *work: Any) -> list[Answer]:
        self._connection.send(work)
        answers: list[Answer] = self._connection.recv()
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()


def _work(connection: Connection) -> None:
    while True:
        work, target, *given = connection.recv()
        connection.send(asyncio.run(work(target, *given)))


async def _closed(
    target: Target,
    requests: Sequence[bytes],
    concurrency: int,
    count: int | None,
    seconds: float,
    deadline_s: float,
) -> list[Answer]:
    answers: list[Answer] = []
    left = iter(itertools.count() if count is None else range(count))

    async def one_after_the_other(ask: _Ask) -> None:
        for number in left:
            due = time.perf_counter() - began
            if due >= seconds:
                return
            status = await ask(requests[number % len(requests)])
            answers.append(Answer(due, time.perf_counter() - began - due, status))

    if target.content_type:
        connections = [_Http(target, deadline_s) for _ in range(concurrency)]
        began = time.perf_counter()
        await asyncio.gather(*(one_after_the_other(connection.ask) for connection in connections))
        return answers
    async with grpc.aio.insecure_channel(target.address, _OPTIONS) as channel:
        ask = _grpc(channel, target, deadline_s)
        began = time.perf_counter()
        await asyncio.gather(*(one_after_the_other(ask) for _ in range(concurrency)))
    return answers


def due_times(arrivals: Arrivals, rate: float, seconds: float) -> list[float]:
    """When requests arrive, in seconds from the begin and below `seconds`: `rate` a second, on average or evenly."""
    randomly, times, due = random.Random(0), list[float](), 0.0
    while (due := due + (randomly.expovariate(rate) if arrivals == "poisson" else 1 / rate)) < seconds:
        times.append(due)
    return times


async def _open(target: Target, requests: Sequence[bytes], times: Sequence[float], deadline_s: float) -> list[Answer]:
    answers: list[Answer] = []
    async with grpc.aio.insecure_channel(target.address, _OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), _READY_S)
        ask = _grpc(channel, target, deadline_s)
        began = time.perf_counter()

        async def one(due: float, request: bytes) -> None:
            status = await ask(request)
            answers.append(Answer(due, time.perf_counter() - began - due, status))

        async with asyncio.TaskGroup() as asking:
            for number, due in enumerate(times):
                if (early := due - (time.perf_counter() - began)) > 0:
                    await asyncio.sleep(early)
                asking.create_task(one(due, requests[number % len(requests)]))
    return answers


_READY_S = 30.0
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]


def _grpc(channel: grpc.aio.Channel, target: Target, deadline_s: float) -> _Ask:
    call: Any = channel.unary_unary(target.path)

    async def ask(request: bytes) -> str:
        try:
            await call(request, timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    return ask


class _Http:
    """One connection, which is kept from a request to the next, and made anew after one that failed."""

    def __init__(self, target: Target, deadline_s: float) -> None:
        self._target, self._deadline_s = target, deadline_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> str:
        try:
            async with asyncio.timeout(self._deadline_s):
                head = await self._answered(request)
        except TimeoutError:
            status = "DEADLINE_EXCEEDED"
        except (OSError, EOFError, ValueError) as error:
            status = f"{type(error).__name__}: {error}"
        else:
            status = "OK" if head.split(" ", 2)[1] == "200" else head.partition("\r\n")[0]
            if "\r\nconnection: close\r\n" not in head:
                return status
        if self._streams:
            self._streams[1].close()
            self._streams = None
        return status

    async def _answered(self, request: bytes) -> str:
        """The answer's head, in lower case. Raises OSError, EOFError, or ValueError for one that is not understood."""
        host, _, port = self._target.address.rpartition(":")
        self._streams = self._streams or await asyncio.open_connection(host, int(port))
        reader, writer = self._streams
        writer.write(
            f"POST {self._target.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {self._target.content_type}\r\n"
            f"Content-Length: {len(request)}\r\n\r\n".encode()
        )
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = re.search(r"\r\ncontent-length: *([0-9]+)\r\n", head)
        if not (head.startswith("http/1.1 ") and length):
            raise ValueError("expected HTTP/1.1 with a content-length")
        await reader.readexactly(int(length[1]))
        return head
