"""Requests against a server from a process of their own: as many at a time, or as they come.

Knows bytes, not what they mean: a request is written as it is, and of an answer only its status is looked at. Needs
nothing of thoraxrt, so that every server gets the same load.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

__all__ = ["Answer", "Load", "Target"]


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

    def closed(self, target: Target, requests: Sequence[bytes], concurrency: int, count: int) -> list[Answer]:
        """Send `count` requests, each as soon as fewer than `concurrency` are unanswered."""
        return self._run(_closed, target, requests, concurrency, count)

    def open(
        self, target: Target, requests: Sequence[bytes], rate: float, seconds: float, deadline_s: float
    ) -> list[Answer]:
        """Send requests at random times, `rate` a second, whatever is unanswered; each has `deadline_s` seconds."""
        return self._run(_open, target, requests, rate, seconds, deadline_s)

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


async def _closed(target: Target, requests: Sequence[bytes], concurrency: int, count: int) -> list[Answer]:
    answers: list[Answer] = []
    left = iter(range(count))

    async def one_after_the_other(ask: _Ask) -> None:
        for number in left:
            due = time.perf_counter()
            status = await ask(requests[number % len(requests)])
            answers.append(Answer(due - began, time.perf_counter() - due, status))

    if target.content_type:
        asks = [await _http(target) for _ in range(concurrency)]
        began = time.perf_counter()
        await asyncio.gather(*map(one_after_the_other, asks))
        return answers
    async with grpc.aio.insecure_channel(target.address, _OPTIONS) as channel:
        ask = _grpc(channel, target, 60.0)
        began = time.perf_counter()
        await asyncio.gather(*(one_after_the_other(ask) for _ in range(concurrency)))
    return answers


async def _open(
    target: Target, requests: Sequence[bytes], rate: float, seconds: float, deadline_s: float
) -> list[Answer]:
    answers: list[Answer] = []
    randomly = random.Random(0)
    async with grpc.aio.insecure_channel(target.address, _OPTIONS) as channel:
        await channel.channel_ready()
        ask = _grpc(channel, target, deadline_s)
        began, due = time.perf_counter(), 0.0

        async def one(due: float, request: bytes) -> None:
            status = await ask(request)
            answers.append(Answer(due, time.perf_counter() - began - due, status))

        async with asyncio.TaskGroup() as asking:
            number = 0
            while (due := due + randomly.expovariate(rate)) < seconds:
                if (early := due - (time.perf_counter() - began)) > 0:
                    await asyncio.sleep(early)
                asking.create_task(one(due, requests[number % len(requests)]))
                number += 1
    return answers


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


async def _http(target: Target) -> _Ask:
    host, _, port = target.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    async def ask(request: bytes) -> str:
        writer.write(
            f"POST {target.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {target.content_type}\r\n"
            f"Content-Length: {len(request)}\r\n\r\n".encode()
        )
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.partition("content-length:")[2].partition("\r\n")[0]))
        return "OK" if head.split(" ", 2)[1] == "200" else head.split("\r\n")[0]

    return ask
