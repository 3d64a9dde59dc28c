"""What every call has in common, whatever its service: a message that parses, a status where it fails, its time.

The outermost interceptor: what the services and the other interceptors raise becomes a status here, and only here.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import DecodeError

from thoraxrt.engine.errors import DeadlineError, RequestError, ThoraxrtError
from thoraxrt.server.scheduler import FaultError
from thoraxrt.server.status import Status, fault, status_from_error
from thoraxrt.server.telemetry import NullTelemetry

__all__ = ["Calls", "deadline_of", "only_message", "status_from_exception", "whole"]

_MESSAGE_S: Final = 60.0
"""How long a unary call's message may take to arrive, whatever the call's own deadline."""

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # generic in the stubs only
    _Handler = grpc.RpcMethodHandler[Any, Any]


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

    gRPC itself would answer UNKNOWN with the exception's text, and log it.
    """

    def __init__(self, telemetry: NullTelemetry) -> None:
        self._telemetry = telemetry

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """See grpc.aio."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        answer = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        parse = None if handler.request_streaming else handler.request_deserializer

        async def answered(requests: Any, context: Any) -> Any:
            began, code = time.perf_counter(), grpc.StatusCode.CANCELLED
            self._telemetry.begun(method)
            try:
                with self._telemetry.span(method, metadata, method=method):
                    try:
                        request = parse(await only_message(requests)) if parse else requests
                        response = await _answered(answer, request, context)
                    except (grpc.aio.AbortError, asyncio.CancelledError):
                        code = context.code() or code
                        raise
                    except grpc.aio.InternalError:  # what was to be read or written cannot be: the client has gone
                        raise asyncio.CancelledError from None
                    except Exception as error:
                        status = status_from_exception(method, error)
                        code = status.code
                        await _aborted(context, status)
                code = context.code() or grpc.StatusCode.OK
                return response
            finally:
                self._telemetry.answered(method, code.name, time.perf_counter() - began)

        make: Any = (  # of a stream of requests: gRPC itself would wait for a unary call's message, for ever
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        wrapped: _Handler = make(answered, None if parse else handler.request_deserializer, handler.response_serializer)
        return wrapped


async def only_message(requests: AsyncIterator[Any]) -> Any:
    """A unary call's message. Raises RequestError where the call ends without one, DeadlineError where none comes."""
    try:
        async with asyncio.timeout(_MESSAGE_S):
            async for request in requests:
                return request
    except TimeoutError:
        raise DeadlineError(f"no message came for {_MESSAGE_S:g} s; send it with the call") from None
    raise RequestError("the call brought no message; expected one")


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


async def _answered(answer: Any, request: Any, context: Any) -> Any:
    """The response; where it is a stream, all of it has been written."""
    if not inspect.isasyncgenfunction(answer):
        return await answer(request, context)
    async for response in answer(request, context):
        await context.write(response)
    return None
