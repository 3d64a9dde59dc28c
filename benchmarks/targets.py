"""What is loaded: the engine in process, or a server in a process of its own over one of its two protocols.

Knows how images are asked for and that each is answered once; not when they are asked for, nor what is measured.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

import grpc
import numpy as np

from thoraxrt.engine.bundle import Manifest
from thoraxrt.engine.decode import decode
from thoraxrt.engine.engine import Engine, Source
from thoraxrt.engine.errors import RequestError, ServerError
from thoraxrt.engine.execute import NetworkInput
from thoraxrt.engine.preprocess import network_input
from thoraxrt.proto.oip import open_inference_pb2 as oip
from thoraxrt.proto.oip import open_inference_pb2_grpc
from thoraxrt.server.client import Client
from thoraxrt.server.status import error_from_status
from thoraxrt.server.wire import MAX_MESSAGE_BYTES

__all__ = ["INPUTS", "Answered", "Clients", "EngineTarget", "Input", "ServerTarget", "Target", "TargetName", "inputs"]

TargetName = Literal["engine", "grpc", "oip"]
"""The engine in process; a server over thoraxrt.v1; a server over the Open Inference Protocol."""

Input = Literal["encoded", "decoded", "network"]
"""What is handed over: a file's bytes, pixels already decoded, or the network's input, geometry done."""

INPUTS: Final[dict[TargetName, tuple[Input, ...]]] = {
    "engine": ("encoded", "decoded", "network"),
    "grpc": ("encoded",),
    "oip": ("encoded", "network"),
}
"""What each target takes."""

_IN_FLIGHT: Final = 32  # requests of the client at a time, a quarter of what a server takes of one
_TIMEOUT_S: Final = 30.0

Answered = Callable[[int, Exception | None], None]
"""Called once for every image, from any thread: its place among those asked for, and the error it met, if any."""


class Target(Protocol):
    """Something that answers images, by their numbers in the set that it was made with."""

    @property
    def name(self) -> TargetName:
        """What it is."""

    @property
    def input(self) -> Input:
        """What it is handed."""

    @property
    def count(self) -> int:
        """The images in its set."""

    def submit(self, numbers: Sequence[int], answered: Answered) -> None:
        """Ask for these images together, and return at once; `answered` gets places in `numbers`. Never raises."""


def inputs(files: Sequence[bytes], kind: Input, manifest: Manifest) -> list[Source]:
    """The files as this kind of input, what precedes it done. Raises ImageError."""
    if kind == "encoded":
        return list(files)
    radiographs = [decode(file) for file in files]
    if kind == "decoded":
        return list(radiographs)
    return [NetworkInput(network_input(r.pixels, manifest.preprocess)[0]) for r in radiographs]  # (S, S) each


class EngineTarget:
    """An engine and the thread that it answers from; the engine stays its owner's.

    What is asked for while a batch runs goes into the next one, up to the engine's batch size.
    """

    name: Final[TargetName] = "engine"

    def __init__(self, engine: Engine, images: Sequence[Source], kind: Input) -> None:
        self.input: Final = kind
        self.count: Final = len(images)
        self._engine, self._images = engine, images
        self._asked: queue.Queue[tuple[Sequence[int], Answered] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="engine")
        self._thread.start()

    def submit(self, numbers: Sequence[int], answered: Answered) -> None:
        """See Target."""
        self._asked.put((numbers, answered))

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            together = _each(*asked)
            while len(together) < self._engine.batch and not self._asked.empty():
                if (asked := self._asked.get()) is None:
                    self._asked.put(None)  # for the loop outside
                    break
                together += _each(*asked)
            self._answer(together)

    def _answer(self, together: list[tuple[int, Callable[[Exception | None], None]]]) -> None:
        done = 0
        try:
            for answer in self._engine.predict(self._images[number] for number, _ in together):
                together[done][1](answer if isinstance(answer, Exception) else None)
                done += 1
        except Exception as error:  # what is not answered would be waited for
            for _, answered in together[done:]:
                answered(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._asked.put(None)
        self._thread.join()


def _each(numbers: Sequence[int], answered: Answered) -> list[tuple[int, Callable[[Exception | None], None]]]:
    return [(number, partial(answered, place)) for place, number in enumerate(numbers)]


class ServerTarget:
    """A server, asked with one call per image from a client that has up to 32 of them in flight.

    `asks` has for each image what makes its call, waits, checks the answer and raises what is wrong with it. Further
    images wait at the client.
    """

    def __init__(self, name: TargetName, kind: Input, asks: Sequence[Callable[[], object]]) -> None:
        self.name: Final = name
        self.input: Final = kind
        self.count: Final = len(asks)
        self._asks = asks
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, "client")

    def submit(self, numbers: Sequence[int], answered: Answered) -> None:
        """See Target."""
        for place, number in enumerate(numbers):
            self._pool.submit(self._ask, number, partial(answered, place))

    def _ask(self, number: int, answered: Callable[[Exception | None], None]) -> None:
        met = None
        try:
            self._asks[number]()
        except Exception as error:
            met = error
        answered(met)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()


class Clients:
    """Connections to one server, by protocol; threads share them."""

    def __init__(self, address: str, labels: int) -> None:
        self._address, self._labels = address, labels
        self._client = Client(address, timeout=_TIMEOUT_S)
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._channel = grpc.insecure_channel(address, options)
        self._stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def target(self, name: TargetName, kind: Input, images: Sequence[Source]) -> ServerTarget:
        """The server as a target. Raises RequestError for an input that its protocol does not take."""
        if name == "engine" or kind not in INPUTS[name]:
            raise RequestError(f"{name} with {kind} input; expected grpc or oip with what each takes: {INPUTS}")
        return ServerTarget(name, kind, [self.ask(name, image) for image in images])

    def ask(self, name: TargetName, image: Source) -> Callable[[], object]:
        """What asks for one image and checks its answer: raises the error that it met."""
        if name == "oip":
            return partial(self._infer, _tensor(image))
        assert isinstance(image, bytes)
        return partial(self._client.predict, image)

    def _infer(self, request: Any) -> None:
        try:
            response = self._stub.ModelInfer(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            failed: Any = error
            metadata = {key: str(value) for key, value in failed.trailing_metadata() or ()}
            raise error_from_status(failed.code(), failed.details() or "", metadata, self._address) from error
        shape = list(response.outputs[0].shape) if response.outputs else []
        if shape != [1, self._labels]:
            raise ServerError(f"{self._address} answers with logits of shape {shape}; expected [1, {self._labels}]")

    def statistics(self) -> Any:
        """What the server has counted since its start: the Open Inference Protocol's InferStatistics of its model."""
        (model,) = self._stub.ModelStatistics(oip.ModelStatisticsRequest(), timeout=_TIMEOUT_S).model_stats
        return model.inference_stats

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()
        self._channel.close()


def _tensor(image: Source) -> oip.ModelInferRequest:
    """The request for encoded bytes, or for a network input."""
    request = oip.ModelInferRequest()
    if isinstance(image, NetworkInput):
        array = np.ascontiguousarray(image.array)  # (S, S)
        request.inputs.add(name="image", datatype="UINT8", shape=[1, 1, *array.shape])
        request.raw_input_contents.append(array.tobytes())
    else:
        assert isinstance(image, bytes)
        request.inputs.add(name="image_bytes", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(len(image).to_bytes(4, "little") + image)
    return request
