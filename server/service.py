"""`thoraxrt.v1.PredictionService` over the models that are served: each call reads as its images' way.

Nothing slow runs on the event loop: decoding and the network are the scheduler's, drawing has a thread of its own. A
call is admitted before its images are read. Knows nothing of ports and signals, nor of what a failed call ends with.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import grpc
import msgspec

from thoraxrt import __version__
from thoraxrt.engine.engine import Prediction
from thoraxrt.engine.errors import DeadlineError, OverloadedError, RequestError, ServerError
from thoraxrt.engine.overlay import render_overlay
from thoraxrt.engine.preprocess import PreprocessSpec
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server.audit import AuditLog
from thoraxrt.server.batching import Priority, RefusedError, Ticket
from thoraxrt.server.calls import Bodies, client_of, deadline_of, messages_at_once, status_from_exception, whole
from thoraxrt.server.models import Loaded
from thoraxrt.server.status import Status
from thoraxrt.server.telemetry import NullTelemetry
from thoraxrt.server.wire import (
    MAX_MESSAGE_BYTES,
    MODEL_KEY,
    ORDER_KEY,
    PRIORITY_KEY,
    VERSION_KEY,
    Options,
    Reply,
    Study,
    message_from_answer,
    message_from_model,
    message_from_reply,
    message_from_study,
    model_from_bundle,
    options_from_message,
)

__all__ = [
    "SERVICE_NAME",
    "STREAM_IMAGES",
    "STUDY_IMAGES",
    "Lender",
    "PredictionService",
    "Streams",
    "audited",
    "version_from_text",
]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["PredictionService"].full_name

STUDY_IMAGES: Final = 16
STREAM_IMAGES: Final = 32
"""Images of one study, and of one stream in flight, at most; part of the wire contract."""

_STREAMS: Final = 32
_CLIENT_STREAMS: Final = 8
"""Streams that may be open at once, and of one client. Each may hold one image that has not been admitted."""

_PATIENCE_S: Final = 60.0
"""How long an image of a stream without a deadline waits for room."""

_SHORTEST_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 1.0
"""Between two times that it asks for room."""

_IDLE_S: Final = 300.0
"""How long a stream's next image may take to arrive."""

_DRAW_MARGIN: Final = 1.25
_DRAW_WEIGHT: Final = 0.2
"""An overlay is promised where the predicted time, so many times over, fits the deadline; and the latest one's weight in the
learned time."""

if TYPE_CHECKING:  # generic in the stubs only
    _Context = grpc.aio.ServicerContext[Any, Any]

_Message = TypeVar("_Message")
_Word = TypeVar("_Word", bound=Enum)


class Lender(Protocol):
    """What gives the model to answer a call with: see `thoraxrt.server.models.Models`."""

    def lease(self, name: str | None = None, version: int | None = None) -> AbstractContextManager[Loaded]:
        """The model, open while the block runs."""


class _Order(Enum):
    REQUEST = "request"
    COMPLETION = "completion"


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call says before its body."""

    method: str
    model: str | None
    version: int | None
    priority: Priority
    order: _Order
    client: str
    peer: str
    deadline: float | None
    """By `time.monotonic`, see `deadline_of`."""

    @classmethod
    def of(cls, method: str, context: _Context) -> _Call:
        """Raises RequestError for metadata that means nothing."""
        said = {key: str(value) for key, value in context.invocation_metadata() or ()}
        return cls(
            method=method,
            model=said.get(MODEL_KEY),
            version=version_from_text(said.get(VERSION_KEY, "")),
            priority=_word(said, PRIORITY_KEY, Priority.ROUTINE),
            order=_word(said, ORDER_KEY, _Order.REQUEST),
            client=client_of(context),
            peer=context.peer(),
            deadline=deadline_of(context),
        )

    def time_remaining(self) -> float | None:
        """Seconds until the call's deadline, where it has one."""
        return None if self.deadline is None else self.deadline - time.monotonic()


def _word(said: dict[str, str], key: str, default: _Word) -> _Word:
    words = {word.value: word for word in type(default)}
    if (value := said.get(key, default.value)) not in words:
        raise RequestError(f"{key} is {value[:40]!r}; expected {' or '.join(words)}")
    return words[value]


def version_from_text(text: str) -> int | None:
    """A model's version; None where any is meant. Raises RequestError."""
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise RequestError(f"the model's version is {text[:40]!r}; expected a whole number, or none for the highest")
    return int(text)


async def audited(
    audit: AuditLog | None, method: str, peer: str, loaded: Loaded, image: bytes, predicting: Awaitable[Prediction]
) -> Prediction:
    """The prediction for an image, or its error, once that stands in the audit log, where there is one."""
    if audit is None:
        del image  # what it takes is the scheduler's to bound
        return await predicting
    hashing = audit.hashed(image)
    del image
    record = partial(audit.record, method, model_sha256=loaded.bundle.sha256, peer=peer)
    try:
        prediction = await predicting
    except Exception as error:
        digest = await asyncio.wrap_future(hashing)
        await record(type(error).__name__, input_sha256=digest)
        raise
    digest = await asyncio.wrap_future(hashing)
    await record(prediction, input_sha256=digest)
    return prediction


class Streams:
    """The streams that are open, whatever their service: so many and no more, none idle, none once the server stops."""

    def __init__(self, telemetry: NullTelemetry) -> None:
        self._telemetry = telemetry
        self._open: Counter[str] = Counter()  # by client
        self._waiting: set[asyncio.Timeout] = set()
        self._stopping = False

    @asynccontextmanager
    async def opened(self, client: str) -> AsyncIterator[asyncio.TaskGroup]:
        """A client's stream while the block reads it; then the tasks that answer it are waited for.

        Raises OverloadedError where there are too many, what a task raises, what the block raises once the tasks have
        ended, and ServerError once the server stops.
        """
        for whose, count, most in (
            ("", self._open.total(), _STREAMS),
            (" of this client", self._open[client], _CLIENT_STREAMS),
        ):
            if count >= most:
                self._telemetry.refused("", "streams")  # of no model yet
                raise OverloadedError(
                    f"{most} streams{whose} are open, as many as may be; try again", retry_after_s=1.0
                )
        self._open[client] += 1
        unread: Exception | None = None
        try:
            async with asyncio.TaskGroup() as answering:
                try:
                    yield answering
                except Exception as error:  # the group would cancel what has been taken
                    unread = error
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self._open -= Counter([client])
        if unread:
            raise unread
        if self._stopping:
            raise ServerError("the server is stopping, and reads no further image; send the others again, elsewhere")

    async def next(self, requests: AsyncIterator[_Message]) -> _Message | None:
        """A stream's next request; None where there is none, or the server stops. Raises DeadlineError."""
        if self._stopping:
            return None
        waiting = asyncio.timeout(_IDLE_S)
        self._waiting.add(waiting)
        try:
            async with waiting:
                return await anext(requests, None)
        except TimeoutError:
            if self._stopping:
                return None
            raise DeadlineError(f"no image came for {_IDLE_S:g} s; close a stream that has no more") from None
        finally:
            self._waiting.remove(waiting)

    def stop(self) -> None:
        """Have the streams take no further image; they end once what they have is answered."""
        self._stopping = True
        for waiting in self._waiting:
            if not waiting.expired():
                waiting.reschedule(0.0)


class _Drawing:
    """Draws overlays one by one, in a thread of its own; as many may wait for it as in the queue of their model.

    What waits here has left that queue, with all its pixels.
    """

    def __init__(self, telemetry: NullTelemetry) -> None:
        self._telemetry = telemetry
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self._promised: Counter[str] = Counter()  # by client
        self._seconds = 0.0  # that one takes, exponentially weighted

    @contextmanager
    def promised(
        self, loaded: Loaded, ticket: Ticket[Any], options: Options, images: int = 1, *, final: bool = True
    ) -> Iterator[None]:
        """Room for so many overlays while the block runs, where the options ask for them. Raises RefusedError.

        Asked for before the network: what would be late should not go there. `final` as for `Scheduler.admit`.
        """
        if not options.overlay:
            yield
            return
        most, left_s = loaded.scheduler.options, ticket.deadline - time.monotonic()
        waiting, own = self._promised.total(), self._promised[ticket.client]
        late_s = (waiting + images) * self._seconds * _DRAW_MARGIN - left_s if waiting else 0.0
        if late_s > 0 or waiting + images > most.max_images or own + images > most.max_per_client:
            if final:
                self._telemetry.refused(loaded.name, "drawing")
            raise RefusedError(
                f"{waiting} overlays wait to be drawn, {own} of this client, at {self._seconds:.3g} s each; the answer has "
                f"{left_s:.3g} s, and {most.max_images} may wait, {most.max_per_client} of a client",
                reason="drawing",
                retry_after_s=max(late_s, self._seconds or _SHORTEST_WAIT_S),
            )
        self._promised[ticket.client] += images
        try:
            yield
        finally:
            self._promised -= Counter({ticket.client: images})

    async def drawn(self, loaded: Loaded, ticket: Ticket[Any], prediction: Prediction, options: Options) -> bytes:
        """The overlay's PNG. Raises DeadlineError at the ticket's deadline."""
        began, held = time.perf_counter(), [prediction]
        del prediction
        drawing = self._thread.submit(self._draw, held, loaded.engine.manifest.preprocess, options)
        try:
            async with asyncio.timeout_at(ticket.deadline):
                overlay = await asyncio.wrap_future(drawing)
        except TimeoutError:
            self._telemetry.refused(loaded.name, "expired")
            raise DeadlineError("the overlay would come after the deadline; try again, or allow more time") from None
        finally:
            held.clear()  # one that nobody waits for keeps its turn, but not its pixels
        self._telemetry.stage_of_call(loaded.name, "draw", time.perf_counter() - began)
        return overlay

    def _draw(self, held: list[Prediction], preprocess: PreprocessSpec, options: Options) -> bytes:
        began = time.perf_counter()
        overlay = _draw(held.pop(), preprocess, options)
        took = time.perf_counter() - began
        self._seconds += _DRAW_WEIGHT * (took - self._seconds) if self._seconds else took
        return overlay

    def close(self) -> None:
        """Drop what waits, and wait for what is being drawn."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class PredictionService:
    """The calls of `thoraxrt.v1.PredictionService`; models and streams stay their owner's.

    `close` waits for the drawing to end.
    """

    def __init__(
        self,
        models: Lender,
        telemetry: NullTelemetry,
        streams: Streams,
        audit: AuditLog | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._models = models
        self._telemetry = telemetry
        self._streams = streams
        self._audit = audit
        self._drawing = _Drawing(telemetry)
        self._bodies = Bodies(messages_at_once(max_message_bytes))

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the calls; those that bring images as streams, whose messages are read when they ask for them.

        On the wire, a stream of one message is that message.
        """
        handlers: Any = {
            "Predict": _handler(grpc.stream_unary_rpc_method_handler, self.Predict, pb.PredictRequest),
            "PredictStudy": _handler(grpc.stream_unary_rpc_method_handler, self.PredictStudy, pb.PredictStudyRequest),
            "PredictStream": _handler(
                grpc.stream_stream_rpc_method_handler, self.PredictStream, pb.PredictStreamRequest
            ),
            "GetModel": _handler(grpc.unary_unary_rpc_method_handler, self.GetModel, pb.GetModelRequest),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        server.add_registered_method_handlers(SERVICE_NAME, handlers)

    async def Predict(self, requests: AsyncIterator[pb.PredictRequest], context: _Context) -> bytes:  # noqa: N802
        """See the proto."""
        call = _Call.of("Predict", context)
        with self._leased(call) as loaded, self._admitted(call, loaded) as ticket:
            async with self._only(call, requests, loaded, ticket) as body:
                request = body.pop()
                options = options_from_message(request.options)
                with self._drawing.promised(loaded, ticket, options):
                    answering = self._reply(call, loaded, ticket, request.image, options)
                    del request
                    reply = await answering
            return self._written(loaded, message_from_reply(reply))

    async def PredictStudy(  # noqa: N802
        self, requests: AsyncIterator[pb.PredictStudyRequest], context: _Context
    ) -> bytes:
        """See the proto. The images beyond the first are admitted once they have been counted."""
        call = _Call.of("PredictStudy", context)
        with self._leased(call) as loaded, self._admitted(call, loaded) as first:
            async with self._only(call, requests, loaded, first) as body:
                request = body.pop()
                if not 1 <= (count := len(request.images)) <= STUDY_IMAGES:
                    raise RequestError(f"the study has {count} images; expected 1 to {STUDY_IMAGES}")
                options = options_from_message(request.options)
                loaded.engine.check_findings(options.boxes_for)
                names = [image.id for image in request.images]
                with (
                    self._drawing.promised(loaded, first, options, count),
                    self._admitted(call, loaded, images=count - 1) if count > 1 else nullcontext(first) as others,
                ):
                    tickets = [first] + [others] * (count - 1)
                    answering = [
                        self._answer(call, loaded, ticket, image.image, options)
                        for ticket, image in zip(tickets, request.images, strict=True)
                    ]
                    del request
                    study = Study.of(await asyncio.gather(*answering), loaded.bundle.sha256)
            return self._written(loaded, message_from_study(names, study))

    async def PredictStream(  # noqa: N802
        self, requests: AsyncIterator[pb.PredictStreamRequest], context: _Context
    ) -> None:
        """See the proto."""
        call = _Call.of("PredictStream", context)
        async with self._streams.opened(call.client) as answering:
            await _Stream(self, call, context.write, answering).read(partial(self._streams.next, requests))

    async def GetModel(self, request: pb.GetModelRequest, context: _Context) -> bytes:  # noqa: N802
        """See the proto."""
        with self._leased(_Call.of("GetModel", context)) as loaded:
            engine = loaded.engine
            model = model_from_bundle(
                engine.bundle, backend=engine.backend, precision=engine.precision, server_version=__version__
            )
        return message_from_model(model).SerializeToString()

    async def close(self) -> None:
        """Drop what waits for the drawing, and wait for what runs there."""
        await asyncio.to_thread(self._drawing.close)

    def _leased(self, call: _Call) -> AbstractContextManager[Loaded]:
        return self._models.lease(call.model, call.version)

    @contextmanager
    def _admitted(self, call: _Call, loaded: Loaded, images: int = 1, *, final: bool = True) -> Iterator[Ticket[Any]]:
        """Room for so many images, given back with the block's end."""
        if self._audit:
            self._audit.check()
        ticket = loaded.scheduler.admit(call.time_remaining(), call.priority, call.client, images, final=final)
        try:
            yield ticket
        finally:
            loaded.scheduler.release(ticket)

    @asynccontextmanager
    async def _only(
        self, call: _Call, requests: AsyncIterator[_Message], loaded: Loaded, ticket: Ticket[Any]
    ) -> AsyncIterator[list[_Message]]:
        """The one message of a call, in a list so that the block alone holds it.

        That it is the only one is seen while the block answers it, and is certain once the block has ended.
        """
        began = time.perf_counter()
        message = await self._bodies.receive(requests, call.client, ticket.deadline)
        if message is None:
            raise RequestError("the call brought no message; expected one")
        self._telemetry.stage_of_call(loaded.name, "read", time.perf_counter() - began)
        body = [message]
        end = asyncio.create_task(self._bodies.receive(requests, call.client, ticket.deadline))
        del message
        try:
            yield body
        except asyncio.CancelledError:
            end.cancel()
            raise
        finally:
            if await end is not None:
                raise RequestError("the call brought several messages; expected one")

    async def _reply(self, call: _Call, loaded: Loaded, ticket: Ticket[Any], image: bytes, options: Options) -> Reply:
        """One image's reply."""
        predicting = loaded.scheduler.predict(
            ticket, image, findings=options.boxes_for, cam=options.cam or options.overlay
        )
        answering = audited(self._audit, call.method, call.peer, loaded, image, predicting)
        del image, predicting
        prediction = await answering
        overlay = await self._drawing.drawn(loaded, ticket, prediction, options) if options.overlay else None
        kept = msgspec.structs.replace(prediction, radiograph=None, cam=prediction.cam if options.cam else None)
        return Reply(prediction=kept, overlay_png=overlay, manifest_sha256=loaded.bundle.sha256)

    async def _answer(
        self, call: _Call, loaded: Loaded, ticket: Ticket[Any], image: bytes, options: Options
    ) -> Reply | Status:
        """The same for one image among several, which share the call: an error is its answer."""
        answering = self._reply(call, loaded, ticket, image, options)
        del image
        try:
            return await answering
        except Exception as error:
            return status_from_exception(call.method, error)

    def _written(self, loaded: Loaded, message: pb.PredictResponse | pb.PredictStudyResponse) -> bytes:
        began = time.perf_counter()
        data = message.SerializeToString()
        self._telemetry.stage_of_call(loaded.name, "write", time.perf_counter() - began)
        return data


class _Stream:
    """One PredictStream: reads as long as there is room, and answers each image in a task of its own."""

    def __init__(
        self, service: PredictionService, call: _Call, write: Callable[[bytes], Any], answering: asyncio.TaskGroup
    ) -> None:
        self._service = service
        self._call = call
        self._write = write
        self._answering = answering
        self._room = asyncio.Semaphore(STREAM_IMAGES)
        self._writing = asyncio.Lock()

    async def read(self, receive: Callable[[], Awaitable[pb.PredictStreamRequest | None]]) -> None:
        """Have all requests answered. Raises what ends the stream."""
        before = asyncio.Event()  # the answer before the next one has been written
        before.set()
        while True:
            await self._room.acquire()
            request = await receive()
            if request is None:
                return
            written = asyncio.Event()
            opened = ExitStack()
            options = options_from_message(request.options)
            admitted = await self._admitted(opened, options)
            turn = before if self._call.order is _Order.REQUEST else None
            task = self._answering.create_task(self._answer(request.id, admitted, opened, request.image, options, turn))
            # In a callback, because a task that is cancelled before its first step never runs.
            task.add_done_callback(partial(self._ended, opened, written))
            before = written
            del request, task

    def _ended(self, opened: ExitStack, written: asyncio.Event, task: object) -> None:
        opened.close()
        written.set()
        self._room.release()

    async def _admitted(self, opened: ExitStack, options: Options) -> tuple[Loaded, Ticket[Any]] | Status:
        """The model and the ticket for one image, which are `opened`'s; a Status where there is no room for too long."""
        until = self._call.deadline or time.monotonic() + _PATIENCE_S
        while True:
            with ExitStack() as trying:  # so that waiting holds up no reload
                loaded = trying.enter_context(self._service._leased(self._call))
                try:
                    ticket = trying.enter_context(self._service._admitted(self._call, loaded, final=False))
                    trying.enter_context(self._service._drawing.promised(loaded, ticket, options, final=False))
                except RefusedError as error:
                    wait_s = min(max(error.retry_after_s, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)
                    if time.monotonic() + wait_s > until:
                        self._service._telemetry.refused(loaded.name, error.reason)
                        return status_from_exception(self._call.method, error)
                except DeadlineError as error:
                    return status_from_exception(self._call.method, error)
                else:
                    opened.push(trying.pop_all())
                    return loaded, ticket
            await asyncio.sleep(wait_s)

    async def _answer(
        self,
        name: str,
        admitted: tuple[Loaded, Ticket[Any]] | Status,
        opened: ExitStack,
        image: bytes,
        options: Options,
        turn: asyncio.Event | None,
    ) -> None:
        """Answer one image, and write that once it is its `turn`."""
        answer: Reply | Status
        if isinstance(admitted, Status):
            answer = admitted
        else:
            answering = self._service._answer(self._call, *admitted, image, options)
            del image
            answer = await answering
        data = pb.PredictStreamResponse(answer=message_from_answer(name, answer)).SerializeToString()
        del answer
        opened.close()  # a client that does not read holds up no reload
        if turn:
            await turn.wait()
        began = time.perf_counter()
        async with self._writing:
            await whole(self._write(data))
        if not isinstance(admitted, Status):
            self._service._telemetry.stage_of_call(admitted[0].name, "write", time.perf_counter() - began)


def _handler(make: Any, method: Any, message: Any) -> Any:
    return make(method, request_deserializer=message.FromString)  # the responses are bytes already


def _draw(prediction: Prediction, preprocess: PreprocessSpec, options: Options) -> bytes:
    picture = render_overlay(prediction, preprocess, options.boxes_for)
    file = BytesIO()
    picture.save(file, "PNG", compress_level=1)  # 5 times faster than the default, 20% larger
    return file.getvalue()
