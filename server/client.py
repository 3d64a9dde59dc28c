"""The typed client: images in, the engine's own types and errors out.

Owns the channel and the window of calls in flight. Knows nothing of the server's insides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc

from thoraxrt.engine.engine import read_image
from thoraxrt.engine.errors import RequestError, ServerError, ThoraxrtError
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.proto.v1 import thoraxrt_pb2_grpc
from thoraxrt.server.status import error_from_status
from thoraxrt.server.wire import (
    MAX_MESSAGE_BYTES,
    Model,
    Options,
    Reply,
    model_from_message,
    reply_from_message,
    request_from_image,
)

__all__ = ["Client", "Image", "Model", "Reply"]

if TYPE_CHECKING:
    _Call = grpc.Future[pb.PredictResponse]

Image = bytes | str | Path
"""An image: encoded bytes, or the path of a file that holds them."""


class Client:
    """A connection to one thoraxrt server; threads may share it.

    `address` is HOST:PORT, an IPv6 host in brackets; the connection is made with the first call,
    directly, past any HTTP proxy. `timeout` is in seconds and for each call. A reply beyond
    `max_message_bytes` is refused.

    Every method raises what the engine would have raised in process, and ServerError where the
    server cannot be reached, is another one, or does not answer in time.

    Example:
        with Client("localhost:8500") as client:
            reply = client.predict("a.png")
            for finding in reply.prediction.findings: ...
    """

    def __init__(self, address: str, *, timeout: float = 30.0, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.address = address
        self.timeout = timeout
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.enable_http_proxy", 0),  # an image goes where the caller says and nowhere else
        ]
        self._channel = grpc.insecure_channel(address, options)
        stub = thoraxrt_pb2_grpc.PredictionServiceStub(self._channel)
        self._predict: grpc.UnaryUnaryMultiCallable[pb.PredictRequest, pb.PredictResponse] = stub.Predict
        self._get_model: grpc.UnaryUnaryMultiCallable[pb.GetModelRequest, pb.GetModelResponse] = stub.GetModel

    def predict(
        self, image: Image, *, findings: Collection[str] | None = None, overlay: bool = False, cam: bool = False
    ) -> Reply:
        """The server's reply for one image; `findings` and `cam` are those of `Engine.predict`.

        `overlay` asks for `Reply.overlay_png`.
        """
        return self._reply(self._send(image, _options(findings, overlay, cam)))

    def predict_many(
        self,
        images: Iterable[Image],
        *,
        findings: Collection[str] | None = None,
        overlay: bool = False,
        cam: bool = False,
        in_flight: int = 8,
    ) -> Iterator[Reply | ThoraxrtError]:
        """One answer per image, in order: a Reply, or the error that this image met.

        Up to `in_flight` images are with the server at a time, and no more are in memory. Raises
        ServerError where the server cannot be asked at all, RequestError for an unknown finding.
        """
        if in_flight < 1:
            raise RequestError(f"in_flight is {in_flight}: expected at least 1")
        self.model()  # answers at once, or there is nobody to send images to
        options = _options(findings, overlay, cam)
        window: deque[_Call | ThoraxrtError] = deque()
        try:
            for image in images:
                if len(window) == in_flight:
                    yield self._try_reply(window.popleft())
                window.append(self._try_send(image, options))
            while window:
                yield self._try_reply(window.popleft())
        finally:  # the caller may stop early
            for call in window:
                if not isinstance(call, ThoraxrtError):
                    call.cancel()

    def model(self) -> Model:
        """The model that the server answers with, and what executes it."""
        with self._translated():
            return model_from_message(self._get_model(pb.GetModelRequest(), timeout=self.timeout))

    def close(self) -> None:
        """Cancel what is in flight and disconnect; closing twice is harmless."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, image: Image, options: Options) -> _Call:
        """Start one call. Raises ImageFormatError for a file that cannot be read."""
        data = image if isinstance(image, bytes) else read_image(Path(image))
        return self._predict.future(request_from_image(data, options), timeout=self.timeout)

    def _reply(self, call: _Call) -> Reply:
        with self._translated():
            return reply_from_message(call.result())

    def _try_send(self, image: Image, options: Options) -> _Call | ThoraxrtError:
        try:
            return self._send(image, options)
        except ThoraxrtError as error:
            return error

    def _try_reply(self, call: _Call | ThoraxrtError) -> Reply | ThoraxrtError:
        try:
            return call if isinstance(call, ThoraxrtError) else self._reply(call)
        except RequestError:  # true of every image
            raise
        except ThoraxrtError as error:
            return error

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn a status into our error, and a reply that makes no sense into a ServerError."""
        try:
            yield
        except grpc.RpcError as error:
            metadata = {entry.key: entry.value for entry in error.trailing_metadata() or ()}
            raise error_from_status(error.code(), error.details() or "", metadata, self.address) from None
        except ValueError as error:
            raise ServerError(
                f"the reply of {self.address} makes no sense to this version ({error}); "
                "install the same version of thoraxrt on both ends"
            ) from error


def _options(findings: Collection[str] | None, overlay: bool, cam: bool) -> Options:
    return Options(boxes_for=None if findings is None else tuple(findings), overlay=overlay, cam=cam)
