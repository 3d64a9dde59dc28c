"""What every call has in common, whatever its service: a message that parses, a status where it fails, its time.

The outermost interceptor: what the services and the other interceptors raise becomes a status here, and only here.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakValueDictionary

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from thoraxrt.engine.errors import DeadlineError, OverloadedError, RequestError, ThoraxrtError
from thoraxrt.server.principal import ANONYMOUS, current_principal
from thoraxrt.server.scheduler import FaultError
from thoraxrt.server.status import Status, fault, status_from_error
from thoraxrt.server.telemetry import NullTelemetry
from thoraxrt.server.wire import MAX_MESSAGE_BYTES

__all__ = [
    "Bodies",
    "Calls",
    "answering",
    "client_of",
    "deadline_of",
    "messages_at_once",
    "read_as_small",
    "status_from_exception",
    "streaming",
    "whole",
]

_IMAGES: Final = frozenset({"/inference.GRPCInferenceService/ModelInfer"})
"""Unary methods whose message brings images."""

_READ_BYTES: Final = 1024 * 1024 * 1024
"""What messages may take while they are being received: those of unary methods that bring images, those of the other
methods, those of strangers, so that probes are answered meanwhile, and those of a service that reads its own, each so
much."""

_MESSAGE_S: Final = 60.0
"""How long a unary call's message may take to arrive, whatever the call's own deadline."""

_SMALL_S: Final = 5.0
_SMALL_BYTES: Final = 64 * 1024
"""The same without images, and the size of such a message: anybody may send one, before it is known who calls."""

_MOST_FIELDS: Final = 10_000
"""Fields of one request, those of its sub-messages included: a study of 16 images has some 50. Empty sub-messages take 2
bytes each on the wire and some 40 in memory, and 64 MiB of them seconds of the event loop."""

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # generic in the stubs only
    _Handler = grpc.RpcMethodHandler[Any, Any]

_Message = TypeVar("_Message")


def status_from_exception(method: str, error: Exception) -> Status:
    """What a call, or one image of it, ends with: ours by the table, any other as a fault, which is logged.

    Where, and of what type: an exception's own text may quote the image or the patient.
    """
    if isinstance(error, ThoraxrtError):
        return status_from_error(error)
    if isinstance(error, DecodeError):
        return status_from_error(
            RequestError(
                f"the message is not what {method} takes; expected the request of its .proto: check the client's version"
            )
        )
    if not isinstance(error, FaultError):  # which has been logged
        where = "".join(traceback.format_tb(error.__traceback__))
        _log.error("%s failed with %s\n%s", method, type(error).__name__, where)
    return fault()


class Calls(grpc.aio.ServerInterceptor):
    """Ends a call with a status where its service or an interceptor raises, and reports it to `telemetry`.

    gRPC itself would answer UNKNOWN with the exception's text, and log it. Of the server's `calls` at once, ModelInfer
    gets half, methods without images an eighth, those of strangers a quarter: the rest is always left to the calls that
    are admitted before their images are read.
    """

    def __init__(self, telemetry: NullTelemetry, max_message_bytes: int = MAX_MESSAGE_BYTES, calls: int = 1024) -> None:
        self._telemetry = telemetry
        messages = messages_at_once(max_message_bytes)
        self._images = _Room(calls // 2, messages, _MESSAGE_S, max_message_bytes)
        self._others = _Room(calls // 8, messages, _SMALL_S, _SMALL_BYTES)
        self._strangers = _Room(calls // 4, messages, _SMALL_S, _SMALL_BYTES)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """See grpc.aio."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        answer = answering(handler)
        rooms = (self._images, self._images) if method in _IMAGES else (self._others, self._strangers)

        async def answered(requests: Any, context: Any) -> Any:
            began, code = time.perf_counter(), grpc.StatusCode.CANCELLED
            _rooms.set(rooms)
            with self._telemetry.span(method, metadata):
                self._telemetry.begun(method)
                try:
                    response = await answer(requests, context)
                    code = context.code() or grpc.StatusCode.OK
                    return response
                except (grpc.aio.AbortError, asyncio.CancelledError):
                    code = context.code() or code
                    raise
                except grpc.aio.InternalError:  # what was to be read or written cannot be: the client has gone
                    raise asyncio.CancelledError from None
                except Exception as error:
                    status = status_from_exception(method, error)
                    code = status.code
                    await _aborted(context, status)
                finally:
                    self._telemetry.answered(method, code.name, time.perf_counter() - began)

        return streaming(handler, answered)


def messages_at_once(max_message_bytes: int) -> int:
    """How many messages of at most so many bytes may be received at a time; two at least."""
    return max(_READ_BYTES // (2 * max_message_bytes), 2)  # gRPC holds one twice while it hands it over


class Bodies:
    """Receives calls' messages, so many at a time, of one client half of them: a slow line keeps no others waiting."""

    def __init__(self, at_once: int) -> None:
        self._turns, self._share = asyncio.Semaphore(at_once), max(at_once // 2, 1)
        self._turns_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def receive(self, requests: AsyncIterator[_Message], client: str, until: float) -> _Message | None:
        """The next message of a client's call, None where there is no more; `until` is by `time.monotonic`.

        Raises DeadlineError where it does not come, OverloadedError where those before it do not. The call must then
        end: until it has, gRPC goes on with what it has begun to read.
        """
        own, reading = self._turns_of.setdefault(client, asyncio.Semaphore(self._share)), False
        try:
            async with asyncio.timeout_at(until), own, self._turns:
                reading = True
                return await anext(requests, None)
        except TimeoutError:
            if reading:
                raise DeadlineError("the message did not come in time; send it with the call, or allow more") from None
            raise OverloadedError("other messages are still coming in; try again", retry_after_s=1.0) from None


def client_of(context: Any) -> str:
    """Whose share a call takes: those that nobody knows are told apart by their machine."""
    principal = current_principal.get()
    # Tokens, OIDC and certificates name callers each by itself; a peer is ipv4:192.0.2.1:50000.
    return f"{principal.via}:{principal.name}" if principal is not ANONYMOUS else context.peer().rpartition(":")[0]


class _Room:
    """Where so many calls at once are answered, a quarter of them one client's, each message within `seconds` and `size`.

    `messages` of them are received at a time.
    """

    def __init__(self, calls: int, messages: int, seconds: float, size: int) -> None:
        self._calls, self._open = max(calls, 1), Counter[str]()  # by client
        self._bodies, self._seconds, self._size = Bodies(messages), seconds, size

    @contextmanager
    def entered(self, client: str) -> Iterator[None]:
        """A client's call while the block runs. Raises OverloadedError where there are too many."""
        for whose, count, most in (
            ("", self._open.total(), self._calls),
            (" of this client", self._open[client], max(self._calls // 4, 1)),
        ):
            if count >= most:
                raise OverloadedError(
                    f"{most} such calls{whose} are open, as many as may be; try again", retry_after_s=1.0
                )
        self._open[client] += 1
        try:
            yield
        finally:
            self._open -= Counter([client])

    async def message(self, requests: AsyncIterator[_Message], client: str) -> _Message | None:
        """The call's next message. Raises RequestError where it is too large, and as Bodies does."""
        message: Any = await self._bodies.receive(requests, client, time.monotonic() + self._seconds)
        size = len(message) if isinstance(message, bytes) else message.ByteSize() if message else 0
        if size > self._size:
            del message  # else the error's traceback keeps it
            raise RequestError(f"the message has {size} bytes; expected at most {self._size} without images")
        received: _Message | None = message
        return received


_rooms: ContextVar[tuple[_Room, _Room]] = ContextVar("_rooms")
"""Where the call that is being answered is, if it comes from somebody known, and if from a stranger."""


def _room() -> _Room:
    return _rooms.get()[current_principal.get() is ANONYMOUS]


async def read_as_small(requests: AsyncIterator[_Message], context: Any) -> AsyncGenerator[_Message, None]:
    """A stream's messages, each as one of a unary method without images; raises what such a call ends with."""
    room, client = _room(), client_of(context)
    with room.entered(client):
        while (message := await room.message(requests, client)) is not None:
            yield message


def answering(handler: Any) -> Callable[[Any, Any], Awaitable[Any]]:
    """What answers a handler's call from the stream of its requests; a response that is a stream has then been written.

    A unary call's message is read here: whoever has something to see to before that does so before calling it.
    """
    answer = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    parse = _parser(handler)

    async def answered(requests: Any, context: Any) -> Any:
        if handler.request_streaming:
            return await _responded(answer(requests, context), context)
        room, client = _room(), client_of(context)
        with room.entered(client):
            async with aclosing(aiter(requests)) as messages:  # else it keeps the message as long as the call lasts
                message = await room.message(messages, client)
            if message is None:
                raise RequestError("the call brought no message; expected one")
            responding = answer(parse(message), context)
            del message  # what it takes is the answer's to hold
            return await _responded(responding, context)

    return answered


async def _responded(responding: Any, context: Any) -> Any:
    if not inspect.isasyncgen(responding):
        return await responding
    async with aclosing(responding) as responses:
        async for response in responses:
            await context.write(response)
    return None


def streaming(handler: Any, answer: Callable[[Any, Any], Awaitable[Any]]) -> _Handler:
    """The handler with another answer, which gets the stream of the call's requests.

    Of a stream, because gRPC itself would read a unary call's message first, and wait for it for ever.
    """
    make: Any = (
        grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    )
    parse = _parser(handler) if handler.request_streaming else None
    streamed: _Handler = make(answer, parse, handler.response_serializer)
    return streamed


def _parser(handler: Any) -> Callable[[bytes], Any]:
    """What parses a handler's request; it raises RequestError for more fields than make sense, without parsing them."""
    parse: Callable[[bytes], Any] = handler.request_deserializer or bytes
    kind: Descriptor | None = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
    if kind is None:
        return parse

    def parsed(data: bytes) -> Any:
        if len(data) > 2 * _MOST_FIELDS:  # a field takes two bytes at least
            _fields_left(memoryview(data), kind, _MOST_FIELDS)
        return parse(data)

    return parsed


def _fields_left(data: memoryview, kind: Descriptor, left: int) -> int:
    """Of so many fields, those that a message of this kind does not need; what is malformed ends the count.

    Raises RequestError where it needs more. Source: the protocol buffers' wire format, protobuf.dev.
    """
    at = 0
    while at < len(data):
        if (left := left - 1) < 0:
            raise RequestError(f"the message has more than {_MOST_FIELDS} fields; expected fewer")
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                _, at = _varint(data, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(data, at)
                field = kind.fields_by_number.get(key >> 3)
                if field is not None and field.message_type is not None:
                    left = _fields_left(data[at : at + size], field.message_type, left)
                at += size
            case 5:
                at += 4
    return left


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number that begins there, and where the next thing does."""
    number = shift = 0
    while at < len(data) and shift < 70:
        number |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            break
    return number, at


def deadline_of(context: Any) -> float | None:
    """When the call ends, by `time.monotonic`; None where it says nothing of it.

    To be asked for when a call begins: gRPC tells the time that remains by the wall clock, which may be set meanwhile.
    """
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


async def whole(writing: Awaitable[None]) -> None:
    """Wait for a write to its end, also where cancelled meanwhile.

    While one is under way, gRPC sends no status: the call would stay open, and its client wait for ever.
    """
    task = asyncio.ensure_future(writing)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


async def _aborted(context: Any, status: Status) -> None:
    try:
        await context.abort(*status)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None
