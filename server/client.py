"""The typed clients, one that blocks and one for asyncio: images in, the engine's own types and errors out.

Owns the channel, what a call says of its caller, and what is sent again. Knows nothing of the server's insides. Every
step is written once, as a coroutine over what waits; on the client that blocks, it never suspends.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Final, Self, TypeVar

import grpc
import msgspec

from thoraxrt.engine.engine import read_image
from thoraxrt.engine.errors import (
    AccessError,
    ConfigError,
    ImageError,
    OverloadedError,
    RequestError,
    ServerError,
    ThoraxrtError,
)
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.proto.v1 import thoraxrt_pb2_grpc
from thoraxrt.server.batching import Priority
from thoraxrt.server.probe import ClientTls
from thoraxrt.server.status import PUSHBACK_KEY, Status, error_from_status, status_from_error
from thoraxrt.server.watched import Watched, read_file
from thoraxrt.server.wire import (
    MAX_MESSAGE_BYTES,
    MODEL_KEY,
    ORDER_KEY,
    PRIORITY_KEY,
    VERSION_KEY,
    Model,
    Options,
    Reply,
    StudyFinding,
    answer_from_message,
    model_from_message,
    reply_from_message,
    request_from_image,
    request_from_stream_image,
    request_from_study,
    study_from_message,
)

__all__ = ["AsyncClient", "Client", "ClientTls", "Image", "Model", "Priority", "Reply", "StudyReply"]

Image = bytes | str | Path
"""An image: encoded bytes, or the path of a file that holds them."""

_ATTEMPTS: Final = 5
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 5.0
"""Between two attempts: it doubles from the first to the longest."""

_JITTER: Final = 0.2
"""A wait is longer by a random share up to this, so that clients refused together do not return together."""

_FULL: Final = "Concurrent RPC limit exceeded!"
"""gRPC's own words for a server that is; it sends them without a time to come again, as for a message that is too large."""

_CHANNEL_OPTIONS: Final = (
    ("grpc.enable_http_proxy", 0),  # an image goes where the caller says and nowhere else
    ("grpc.keepalive_time_ms", 30_000),  # calls on a connection that died in silence end: a server takes 10 s or more
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that is back is found as soon as it is asked again; gRPC's own pause grows to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", int(1000 * _LONGEST_WAIT_S)),
)

_Metadata = tuple[tuple[str, str], ...]
_T = TypeVar("_T")


class StudyReply(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A server's answer for one study: each image's, in order, and every label's over those that have a Reply."""

    answers: tuple[Reply | ThoraxrtError, ...]
    findings: tuple[StudyFinding, ...]
    manifest_sha256: str


class _Tries:
    """Whether, and after how long, what ended with a status is sent again.

    Again is for UNAVAILABLE, and for RESOURCE_EXHAUSTED with `grpc-retry-pushback-ms`, which is waited for: a message
    that is too large has the same code without it. Not beyond so many `attempts`, nor the `deadline` of the clock.

    gRPC's own retry policy is not used: it sends a message that is too large 5 times, waits for a pushback that lies
    beyond the deadline, gives up within a second or two, and cannot take up a stream.
    """

    def __init__(
        self,
        deadline: float,
        attempts: float = _ATTEMPTS,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.deadline = deadline
        self._left, self._clock, self._chance = attempts - 1, clock, chance
        self._wait_s = _FIRST_WAIT_S

    def wait_s(self, status: Status) -> float | None:
        """Seconds to wait before the next attempt; None where there is none."""
        pushback = dict(status.trailing_metadata).get(PUSHBACK_KEY)
        overloaded = status.code is grpc.StatusCode.RESOURCE_EXHAUSTED and pushback is not None
        if self._left <= 0 or not (overloaded or status.code is grpc.StatusCode.UNAVAILABLE):
            return None
        if pushback is not None and not pushback.isdecimal():  # gRPC's way to say: never
            return None
        self._left -= 1
        wait_s = self._wait_s if pushback is None else int(pushback) / 1000
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        wait_s *= 1 + _JITTER * self._chance()
        return wait_s if self._clock() + wait_s < self.deadline else None


class _BlockingStream:
    """One PredictStream in flight."""

    def __init__(self, stub: Any, metadata: _Metadata) -> None:
        requests: SimpleQueue[pb.PredictStreamRequest | None] = SimpleQueue()
        self.send = requests.put
        """Give a request to be sent, in order, when there is room; None closes this side."""
        self._call = stub.PredictStream(iter(requests.get, None), metadata=metadata)

    async def receive(self) -> pb.PredictStreamResponse | None:
        """The next answer, None after the last. Raises grpc.RpcError."""
        return next(self._call, None)

    def cancel(self) -> None:
        """End it, whatever its state."""
        self._call.cancel()
        self.send(None)  # else gRPC's thread waits for a request for ever


class _BlockingWire:
    """A channel, and everything that waits, by blocking."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._stub: Any = thoraxrt_pb2_grpc.PredictionServiceStub(channel)

    async def call(self, method: str, request: Any, timeout_s: float, metadata: _Metadata) -> Any:
        """The response. Raises grpc.RpcError."""
        return getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)

    def stream(self, metadata: _Metadata) -> _BlockingStream:
        """Open a PredictStream."""
        return _BlockingStream(self._stub, metadata)

    async def read(self, path: Path) -> bytes:
        """See read_image."""
        return read_image(path)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    async def close(self) -> None:
        """Cancel what is in flight and disconnect."""
        self._channel.close()


class _AsyncStream:
    """The same for an event loop."""

    def __init__(self, stub: Any, metadata: _Metadata) -> None:
        requests: asyncio.Queue[pb.PredictStreamRequest | None] = asyncio.Queue()

        async def each() -> AsyncIterator[pb.PredictStreamRequest]:
            while (request := await requests.get()) is not None:
                yield request

        self.send = requests.put_nowait
        self._call = stub.PredictStream(each(), metadata=metadata)

    async def receive(self) -> pb.PredictStreamResponse | None:
        message = await self._call.read()
        return None if message is grpc.aio.EOF else message

    def cancel(self) -> None:
        self._call.cancel()


class _AsyncWire:
    """The same for an event loop."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._stub: Any = thoraxrt_pb2_grpc.PredictionServiceStub(channel)

    async def call(self, method: str, request: Any, timeout_s: float, metadata: _Metadata) -> Any:
        return await getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)

    def stream(self, metadata: _Metadata) -> _AsyncStream:
        return _AsyncStream(self._stub, metadata)

    async def read(self, path: Path) -> bytes:
        return await asyncio.to_thread(read_image, path)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._channel.close()


_Stream = _BlockingStream | _AsyncStream


@dataclass(slots=True)
class _Asked:
    """One image of many: what it is, its answer once that is there, and whether the stream has been given it."""

    image: Image
    answer: Reply | ThoraxrtError | None = None
    sent: bool = False
    tries: _Tries = field(default_factory=lambda: _Tries(math.inf))


class _Calls:
    """What both clients do."""

    _grpc: ClassVar[Any]
    _wire_kind: type[_BlockingWire | _AsyncWire]

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 30.0,
        model: str | None = None,
        version: int | None = None,
        priority: Priority = Priority.ROUTINE,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: ClientTls | None = None,
        insecure: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        if token is not None and token_file is not None:
            raise RequestError("both token and token_file are given; expected one of them")
        self.address, self.timeout = address, timeout
        self._token: str | Watched[str] | None = None if token is None else _checked_token(token, "`token`")
        if token_file is not None:
            self._token = Watched([file := Path(token_file)], lambda: _token_in(file))
        if self._token and not (tls or insecure or _is_loopback(address)):
            raise RequestError(
                f"the token would travel to {address} unencrypted, for others to read; expected tls, or insecure where "
                "something else protects it"
            )
        if model is not None and not (model.isascii() and model.isprintable()):
            raise RequestError(f"the model is {model[:40]!r}; expected printable ASCII, which is all that gRPC sends")
        said = {
            MODEL_KEY: model,
            VERSION_KEY: version,
            PRIORITY_KEY: None if priority is Priority.ROUTINE else priority.value,
        }
        self._said = tuple((key, str(value)) for key, value in said.items() if value is not None)
        options = [*_CHANNEL_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)]
        grpc_ = self._grpc
        self._wire = self._wire_kind(
            grpc_.secure_channel(address, tls.credentials(), options)
            if tls
            else grpc_.insecure_channel(address, options)
        )

    async def _predict(self, image: Image, options: Options) -> Reply:
        request = request_from_image(await self._read(image), options)
        return await self._called("Predict", request, reply_from_message)

    async def _predict_study(self, images: Sequence[Image], options: Options) -> StudyReply:
        request = request_from_study([await self._read(image) for image in images], options)
        study = await self._called("PredictStudy", request, study_from_message)
        answers = (self._error(answer) if isinstance(answer, Status) else answer for answer in study.answers)
        return StudyReply(answers=tuple(answers), findings=study.findings, manifest_sha256=study.manifest_sha256)

    async def _model(self) -> Model:
        return await self._called("GetModel", pb.GetModelRequest(), model_from_message)

    async def _predict_many(
        self, images: Iterable[Image], options: Options, in_flight: int
    ) -> AsyncGenerator[Reply | ThoraxrtError, None]:
        if in_flight < 1:
            raise RequestError(f"in_flight is {in_flight}: expected at least 1")
        coming, names = iter(images), map(str, count())
        asked: dict[str, _Asked] = {}  # by name, in order
        tries: _Tries | None = self._tries()
        stream = self._stream()
        try:
            while True:
                for image in islice(coming, in_flight - len(asked)):
                    asked[next(names)] = _Asked(image)
                if not asked:
                    break
                await self._send(asked, options, stream)
                first = next(iter(asked))
                if (answer := asked[first].answer) is not None:
                    del asked[first]
                    yield answer
                    continue
                try:
                    await self._receive(asked, stream)
                    tries = None
                except grpc.RpcError as error:
                    stream.cancel()
                    # An idle stream is closed by the server: it is the caller who took that long.
                    if tries or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                        tries = tries or self._tries(math.inf)
                        await self._recover(asked[first], options, tries, _status_of(error))
                    stream = self._stream()
                    for one in asked.values():
                        one.sent = False
            stream.send(None)
            with contextlib.suppress(grpc.RpcError):  # all is answered
                await stream.receive()
        finally:  # the caller may stop early
            stream.cancel()

    def _stream(self) -> _Stream:
        return self._wire.stream((*self._metadata(), (ORDER_KEY, "completion")))

    async def _send(self, asked: dict[str, _Asked], options: Options, stream: _Stream) -> None:
        """Give the stream what it has not been given; a file that cannot be read has its answer."""
        for name, one in asked.items():
            if not one.sent and one.answer is None:
                try:
                    stream.send(request_from_stream_image(name, await self._read(one.image), options))
                    one.sent = True
                except ImageError as error:
                    one.answer = error

    async def _receive(self, asked: dict[str, _Asked], stream: _Stream) -> None:
        """Take one answer. Raises grpc.RpcError where the stream ends early, RequestError for what every image meets."""
        message = await stream.receive()
        with self._sense():
            if message is None or (one := asked.get(message.answer.id)) is None:
                raise ValueError("an answer is missing, or is to no request")
            answer = answer_from_message(message.answer)
        if isinstance(answer, Reply):
            one.answer = answer
        elif (wait_s := one.tries.wait_s(answer)) is not None:
            await self._wire.sleep(wait_s)
            one.sent = False
        elif isinstance(error := self._error(answer), RequestError):
            raise error
        else:
            one.answer = error

    async def _recover(self, first: _Asked, options: Options, tries: _Tries, status: Status) -> None:
        """Wait until the stream may be opened again. Raises what the status means where it may not.

        Where the status does not tell which image ended the stream, if any did, a call for the first one alone does:
        a message that is too large, and on asyncio (grpc/grpc#36066) whatever ended it while an image was being sent.
        """
        unclear = status.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
        if not unclear or PUSHBACK_KEY in dict(status.trailing_metadata):
            return await self._pause(tries, status)
        try:
            request = request_from_image(await self._read(first.image), options)
            first.answer = await self._called("Predict", request, reply_from_message, tries)
        except (RequestError, AccessError):
            raise
        except ThoraxrtError as error:
            first.answer = error

    async def _called(self, method: str, request: Any, read: Callable[[Any], _T], tries: _Tries | None = None) -> _T:
        """What `read` makes of the response. Raises a ThoraxrtError."""
        tries = tries or self._tries()
        while True:
            try:
                response = await self._wire.call(method, request, tries.deadline - time.monotonic(), self._metadata())
            except grpc.RpcError as error:
                await self._pause(tries, _status_of(error))
            else:
                with self._sense():
                    return read(response)

    def _tries(self, attempts: float = _ATTEMPTS) -> _Tries:
        return _Tries(time.monotonic() + self.timeout, attempts)

    async def _pause(self, tries: _Tries, status: Status) -> None:
        """Wait for the next attempt. Raises what the status means where there is none."""
        if (wait_s := tries.wait_s(status)) is None:
            raise self._error(status)
        await self._wire.sleep(wait_s)

    def _error(self, status: Status) -> ThoraxrtError:
        return error_from_status(status.code, status.details, dict(status.trailing_metadata), self.address)

    async def _read(self, image: Image) -> bytes:
        return image if isinstance(image, bytes) else await self._wire.read(Path(image))

    def _metadata(self) -> _Metadata:
        token = self._token.refresh() if isinstance(self._token, Watched) else self._token
        return self._said if token is None else (*self._said, ("authorization", f"Bearer {token}"))

    @contextlib.contextmanager
    def _sense(self) -> Iterator[None]:
        """Turn a reply that makes no sense into a ServerError."""
        try:
            yield
        except ValueError as error:
            raise ServerError(
                f"the reply of {self.address} makes no sense to this version ({error}); "
                "install the same version of thoraxrt on both ends"
            ) from error


class Client(_Calls):
    """A connection to one thoraxrt server; threads may share it.

    `address` is HOST:PORT, an IPv6 host in brackets; the connection is made with the first call, directly, past any
    HTTP proxy, and shared with the process's other clients of that address and encryption: one for STAT beside one for
    routine images costs nothing. A call takes at most `timeout` seconds, in which it is tried up to 5 times where the
    server cannot be reached, or is overloaded: then not before the time that the server says. A reply beyond
    `max_message_bytes` is refused.

    `model` and `version` choose what answers, else the server does. `token` is what the server knows the caller by;
    a `token_file` holds one, and is read again when it changes. A token goes beyond this machine only with `tls`,
    unless `insecure` says that it may.

    Every method raises what the engine would have raised in process, OverloadedError, DeadlineError and AccessError,
    and ServerError where the server cannot be reached or is another one. The constructor raises ConfigError for a file
    that cannot be used, RequestError for arguments that do not fit together.

    Example:
        with Client("localhost:8500") as client:
            reply = client.predict("a.png")
            for finding in reply.prediction.findings: ...
    """

    _grpc: ClassVar[Any] = grpc
    _wire_kind = _BlockingWire

    def predict(
        self, image: Image, *, findings: Collection[str] | None = None, overlay: bool = False, cam: bool = False
    ) -> Reply:
        """The server's reply for one image; `findings` and `cam` are those of `Engine.predict`.

        `overlay` asks for `Reply.overlay_png`.
        """
        return _run(self._predict(image, _options(findings, overlay, cam)))

    def predict_study(
        self,
        images: Sequence[Image],
        *,
        findings: Collection[str] | None = None,
        overlay: bool = False,
        cam: bool = False,
    ) -> StudyReply:
        """One answer for the 1 to 16 images of a study. Raises ImageFormatError for a file that cannot be read."""
        return _run(self._predict_study(images, _options(findings, overlay, cam)))

    def predict_many(
        self,
        images: Iterable[Image],
        *,
        findings: Collection[str] | None = None,
        overlay: bool = False,
        cam: bool = False,
        in_flight: int = 16,
    ) -> Iterator[Reply | ThoraxrtError]:
        """One answer per image, in order: a Reply, or the error that this image met; all through one stream.

        Up to `in_flight` images are with the server at a time, and no more are in memory. Where the connection is lost
        in between, it goes on with what has no answer yet, as soon as the server is back within `timeout` seconds; the
        stream as a whole has no deadline, each image has the server's. Raises ServerError where the server cannot be
        asked at all, RequestError for an unknown finding.
        """
        answers = self._predict_many(images, _options(findings, overlay, cam), in_flight)
        try:
            while True:
                yield _run(answers.__anext__())
        except StopAsyncIteration:
            return
        finally:
            _run(answers.aclose())

    def model(self) -> Model:
        """The model that the server answers with, and what executes it."""
        return _run(self._model())

    def close(self) -> None:
        """Cancel what is in flight and disconnect; closing twice is harmless."""
        _run(self._wire.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Calls):
    """The same for asyncio: what Client says holds here. For one event loop, in which it is made.

    Example:
        async with AsyncClient("localhost:8500") as client:
            replies = await asyncio.gather(*map(client.predict, images))
    """

    _grpc: ClassVar[Any] = grpc.aio
    _wire_kind = _AsyncWire

    async def predict(
        self, image: Image, *, findings: Collection[str] | None = None, overlay: bool = False, cam: bool = False
    ) -> Reply:
        """See Client."""
        return await self._predict(image, _options(findings, overlay, cam))

    async def predict_study(
        self,
        images: Sequence[Image],
        *,
        findings: Collection[str] | None = None,
        overlay: bool = False,
        cam: bool = False,
    ) -> StudyReply:
        """See Client."""
        return await self._predict_study(images, _options(findings, overlay, cam))

    def predict_many(
        self,
        images: Iterable[Image],
        *,
        findings: Collection[str] | None = None,
        overlay: bool = False,
        cam: bool = False,
        in_flight: int = 16,
    ) -> AsyncGenerator[Reply | ThoraxrtError, None]:
        """See Client."""
        return self._predict_many(images, _options(findings, overlay, cam), in_flight)

    async def model(self) -> Model:
        """See Client."""
        return await self._model()

    async def close(self) -> None:
        """See Client."""
        await self._wire.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _run(steps: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that waits by blocking, and so ends where it is started."""
    try:
        steps.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    raise AssertionError("a step of the blocking client suspended")


def _options(findings: Collection[str] | None, overlay: bool, cam: bool) -> Options:
    return Options(boxes_for=None if findings is None else tuple(findings), overlay=overlay, cam=cam)


def _status_of(error: Any) -> Status:
    metadata = tuple((key, str(value)) for key, value in error.trailing_metadata() or ())
    if error.details() == _FULL:
        return status_from_error(
            OverloadedError("the server has as many calls as it takes; try again", retry_after_s=1.0)
        )
    return Status(error.code(), error.details() or "", metadata)


def _token_in(file: Path) -> str:
    return _checked_token(read_file(file, "token file").decode(errors="replace").strip(), f"the token file {file}")


def _checked_token(token: str, where: str) -> str:
    """The token. Raises ConfigError where it cannot be one, without saying it."""
    if not (token.isascii() and token.isprintable()) or len(token.split()) != 1:
        raise ConfigError(f"{where} holds no token; expected one, as `thoraxrt token` prints it")
    return token


def _is_loopback(address: str) -> bool:
    from thoraxrt.server.security import is_loopback  # with what checks certificates, which few clients need

    return is_loopback(address.rpartition(":")[0].strip("[]"))
