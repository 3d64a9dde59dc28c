"""The Open Inference Protocol over the models that are served: what tritonclient and KServe's clients speak.

Knows the protocol's tensors; admission, decoding and the network are the scheduler's, as for `thoraxrt.v1`. What a
failed call ends with is `thoraxrt.server.calls`'s.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
import numpy as np
import numpy.typing as npt

from thoraxrt import __version__
from thoraxrt.engine.engine import Prediction
from thoraxrt.engine.errors import ModelNotFoundError, OverloadedError, RequestError, ThoraxrtError
from thoraxrt.engine.execute import NetworkInput
from thoraxrt.proto.oip import open_inference_pb2 as pb
from thoraxrt.proto.oip import open_inference_pb2_grpc
from thoraxrt.server.audit import AuditLog
from thoraxrt.server.batching import Priority
from thoraxrt.server.calls import deadline_of, status_from_exception, whole
from thoraxrt.server.models import Loaded, ModelStatus
from thoraxrt.server.service import Lender, audited, client_of
from thoraxrt.server.telemetry import NullTelemetry, Telemetry

__all__ = ["OIP_SERVICE_NAME", "OpenInferenceService", "Repository"]

OIP_SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

_EXTENSIONS: Final = ("model_configuration", "model_repository", "statistics")
_STREAM_REQUESTS: Final = 32  # of one stream, in flight
_PLATFORM: Final = "thoraxrt"

if TYPE_CHECKING:  # generic in the stubs only
    _Context = grpc.aio.ServicerContext[Any, Any]


class Repository(Lender, Protocol):
    """What the protocol asks of the models: see `thoraxrt.server.models.Models`."""

    def ready(self, name: str | None = None, version: int | None = None) -> bool:
        """Whether a model is served; without a name, whether the server is ready."""

    def index(self) -> list[ModelStatus]:
        """Every version that is, was or should be served."""

    async def load(self, name: str, version: int | None = None) -> None:
        """Serve a model."""

    async def unload(self, name: str, version: int | None = None) -> None:
        """Serve a model no more."""


@dataclass(slots=True)
class _Counted:
    """One version's requests since the server started."""

    images: int = 0
    last_ms: int = 0
    spent: dict[bool, list[int]] = field(default_factory=lambda: {True: [0, 0], False: [0, 0]})
    """Count and nanoseconds, by whether they succeeded."""


class OpenInferenceService(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The calls of `inference.GRPCInferenceService`; the models stay their owner's."""

    def __init__(self, models: Repository, telemetry: NullTelemetry, audit: AuditLog | None = None) -> None:
        self._models = models
        self._telemetry = telemetry
        self._audit = audit
        self._counted: defaultdict[tuple[str, int], _Counted] = defaultdict(_Counted)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the calls."""
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, server)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: _Context) -> pb.ServerLiveResponse:  # noqa: N802
        """See the proto."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: _Context) -> pb.ServerReadyResponse:  # noqa: N802
        """See the proto."""
        return pb.ServerReadyResponse(ready=self._models.ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: _Context) -> pb.ModelReadyResponse:  # noqa: N802
        """See the proto."""
        return pb.ModelReadyResponse(ready=self._models.ready(request.name, _version(request.version)))

    async def ServerMetadata(  # noqa: N802
        self, request: pb.ServerMetadataRequest, context: _Context
    ) -> pb.ServerMetadataResponse:
        """See the proto."""
        return pb.ServerMetadataResponse(name="thoraxrt", version=__version__, extensions=_EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: _Context) -> pb.ModelMetadataResponse:  # noqa: N802
        """See the proto."""
        with self._leased(request.name, request.version) as loaded:
            served = [status for status in self._models.index() if status.name == loaded.name and status.sha256]
            inputs, outputs = _tensors(loaded)
            return pb.ModelMetadataResponse(
                name=loaded.name,
                versions=[str(status.version) for status in served],
                platform=_PLATFORM,
                inputs=[_metadata(name, kind, shape) for name, kind, shape in inputs],
                outputs=[_metadata(name, kind, shape) for name, kind, shape in outputs],
            )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: _Context) -> pb.ModelConfigResponse:  # noqa: N802
        """See the proto."""
        with self._leased(request.name, request.version) as loaded:
            inputs, outputs = _tensors(loaded)
            config = pb.ModelConfig(
                name=loaded.name,
                platform=_PLATFORM,
                backend=_PLATFORM,
                max_batch_size=loaded.scheduler.options.max_per_client,
                input=[
                    pb.ModelInput(name=name, data_type=_TYPES[kind], dims=shape[1:] or (1,), optional=True)
                    for name, kind, shape in inputs
                ],
                output=[
                    pb.ModelOutput(name=name, data_type=_TYPES[kind], dims=shape[1:] or (1,))
                    for name, kind, shape in outputs
                ],
            )
            return pb.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: _Context) -> pb.ModelInferResponse:  # noqa: N802
        """See the proto."""
        return await self._infer(request, context, deadline_of(context))

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest], context: _Context
    ) -> None:
        """See the proto."""
        room, writing, deadline = asyncio.Semaphore(_STREAM_REQUESTS), asyncio.Lock(), deadline_of(context)

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                response = pb.ModelStreamInferResponse(infer_response=await self._infer(request, context, deadline))
            except Exception as error:
                said = status_from_exception("ModelStreamInfer", error).details
                response = pb.ModelStreamInferResponse(
                    error_message=said, infer_response=pb.ModelInferResponse(id=request.id)
                )
            async with writing:
                await whole(context.write(response))

        try:
            async with asyncio.TaskGroup() as answering:
                await room.acquire()
                async for request in requests:
                    task = answering.create_task(answer(request))
                    task.add_done_callback(lambda _: room.release())
                    await room.acquire()  # before the next one is read
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: _Context
    ) -> pb.ModelStatisticsResponse:
        """See the proto."""
        version = _version(request.version)
        statuses = [
            status
            for status in self._models.index()
            if request.name in ("", status.name) and version in (None, status.version)
        ]
        if request.name and not statuses:
            raise ModelNotFoundError(f"there is no model {request.name[:80]!r} of version {request.version or 'any'}")
        return pb.ModelStatisticsResponse(model_stats=[self._statistics(s.name, s.version) for s in statuses])

    async def RepositoryIndex(  # noqa: N802
        self, request: pb.RepositoryIndexRequest, context: _Context
    ) -> pb.RepositoryIndexResponse:
        """See the proto."""
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=status.name, version=str(status.version), state=status.state.value, reason=status.reason
                )
                for status in self._models.index()
                if status.state.value == "READY" or not request.ready
            ]
        )

    async def RepositoryModelLoad(  # noqa: N802
        self, request: pb.RepositoryModelLoadRequest, context: _Context
    ) -> pb.RepositoryModelLoadResponse:
        """See the proto."""
        if request.parameters:
            raise RequestError(
                f"parameters {', '.join(sorted(request.parameters))[:80]}; expected none: a model is what its bundle says"
            )
        await self._models.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: _Context
    ) -> pb.RepositoryModelUnloadResponse:
        """See the proto."""
        await self._models.unload(request.model_name)  # Triton's `unload_dependents` is about ensembles
        return pb.RepositoryModelUnloadResponse()

    async def _infer(
        self, request: pb.ModelInferRequest, context: _Context, deadline: float | None
    ) -> pb.ModelInferResponse:
        with self._leased(request.model_name, request.model_version) as loaded, self._counting(loaded) as counted:
            wanted = _wanted(request)
            images = _images(request, loaded.engine.manifest.preprocess.input_size)
            priority, timeout_s, boxes_for = _parameters(request.parameters)
            loaded.engine.check_findings(boxes_for)
            left_s = None if deadline is None else deadline - time.monotonic()
            remaining = [limit for limit in (timeout_s, left_s) if limit is not None]
            if self._audit:
                self._audit.check()
            ticket = loaded.scheduler.admit(min(remaining, default=None), priority, client_of(context), len(images))
            try:
                predictions = await _gathered(
                    [
                        audited(
                            self._audit,
                            "ModelInfer",
                            context.peer(),
                            loaded,
                            _recorded(image) if self._audit else b"",
                            loaded.scheduler.predict(ticket, image, findings=boxes_for),
                        )
                        for image in images
                    ]
                )
            finally:
                loaded.scheduler.release(ticket)
            counted.images += len(images)
            tensors = _outputs(predictions, loaded.engine.manifest.labels)
            response = pb.ModelInferResponse(
                model_name=loaded.name,
                model_version=str(loaded.version),
                id=request.id,
                parameters={
                    "manifest_sha256": pb.InferParameter(string_param=loaded.bundle.sha256),
                    "backend": pb.InferParameter(string_param=predictions[0].backend),
                    "precision": pb.InferParameter(string_param=predictions[0].precision),
                },
            )
            for name in wanted:
                kind, array = tensors[name]
                response.outputs.add(name=name, datatype=kind, shape=array.shape)
                response.raw_output_contents.append(array.tobytes())
            return response

    @contextmanager
    def _leased(self, name: str, version: str) -> Iterator[Loaded]:
        with self._models.lease(name or None, _version(version)) as loaded:
            yield loaded

    @contextmanager
    def _counting(self, loaded: Loaded) -> Iterator[_Counted]:
        counted, began, succeeded = self._counted[loaded.name, loaded.version], time.perf_counter_ns(), False
        try:
            yield counted
            succeeded = True
        finally:
            spent = counted.spent[succeeded]
            spent[0] += 1
            spent[1] += time.perf_counter_ns() - began
            counted.last_ms = time.time_ns() // 1_000_000

    def _statistics(self, name: str, version: int) -> pb.ModelStatistics:
        """Requests of this protocol; stages and batches of all protocols, and of all versions of the model."""
        counted = self._counted[name, version]
        stage = partial(_stage, self._telemetry, name)
        batches = _sample(self._telemetry, "thoraxrt_batch_images_count", model=name)
        (succeeded, success_ns), (failed, fail_ns) = counted.spent[True], counted.spent[False]
        return pb.ModelStatistics(
            name=name,
            version=str(version),
            last_inference=counted.last_ms,
            inference_count=counted.images,
            execution_count=int(batches),
            inference_stats=pb.InferStatistics(
                success=pb.StatisticDuration(count=succeeded, ns=success_ns),
                fail=pb.StatisticDuration(count=failed, ns=fail_ns),
                queue=stage("queue", "batch_wait"),
                compute_input=stage("decode"),
                compute_infer=stage("network"),
                compute_output=stage("write"),
            ),
        )


_TYPES: Final = {
    "UINT8": pb.DataType.TYPE_UINT8,
    "INT32": pb.DataType.TYPE_INT32,
    "FP32": pb.DataType.TYPE_FP32,
    "BYTES": pb.DataType.TYPE_STRING,
}
_OUTPUTS: Final = ("logits", "probabilities", "boxes", "box_count")
_Tensors = tuple[tuple[str, str, tuple[int, ...]], ...]


def _tensors(loaded: Loaded) -> tuple[_Tensors, _Tensors]:
    """Name, type and shape of inputs and outputs, -1 where any size is meant."""
    size, labels = loaded.engine.manifest.preprocess.input_size, len(loaded.engine.manifest.labels)
    inputs = (("image_bytes", "BYTES", (-1,)), ("image", "UINT8", (-1, 1, size, size)))
    outputs = (
        ("logits", "FP32", (-1, labels)),
        ("probabilities", "FP32", (-1, labels)),
        ("boxes", "FP32", (-1, -1, 6)),
        ("box_count", "INT32", (-1,)),
    )
    return inputs, outputs


def _metadata(name: str, kind: str, shape: tuple[int, ...]) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=kind, shape=shape)


def _version(text: str) -> int | None:
    """A version number; None where any is meant. Raises RequestError."""
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise RequestError(f"the model's version is {text[:40]!r}; expected a whole number, or none for the highest")
    return int(text)


def _wanted(request: pb.ModelInferRequest) -> Sequence[str]:
    """The outputs that are asked for. Raises RequestError for one that no model has."""
    names = [output.name for output in request.outputs]
    if unknown := [name for name in names if name not in _OUTPUTS]:
        raise RequestError(f"output {unknown[0][:80]!r}; expected some of {', '.join(_OUTPUTS)}")
    return names or _OUTPUTS


def _parameters(given: Mapping[str, pb.InferParameter]) -> tuple[Priority, float | None, tuple[str, ...] | None]:
    """Priority, seconds until the answer is needed, and whose findings get boxes. Raises RequestError."""
    values = {key: getattr(value, value.WhichOneof("parameter_choice") or "", None) for key, value in given.items()}
    priority, timeout, boxes_for = (values.get(key) for key in ("priority", "timeout", "boxes_for"))
    if priority is not None and (isinstance(priority, bool) or not isinstance(priority, int) or priority < 0):
        raise RequestError("parameter priority is no whole number; expected 0 (default), 1 (STAT) or more (routine)")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0):
        raise RequestError("parameter timeout is no whole number; expected microseconds, or 0 for none")
    if boxes_for is not None and not isinstance(boxes_for, str):
        raise RequestError("parameter boxes_for is no string; expected findings, comma-separated")
    return (
        Priority.STAT if priority == 1 else Priority.ROUTINE,
        timeout / 1e6 if timeout else None,
        None if boxes_for is None else tuple(part.strip() for part in boxes_for.split(",") if part.strip()),
    )


def _images(request: pb.ModelInferRequest, size: int) -> list[bytes | NetworkInput]:
    """The request's images, at least one. Raises RequestError where its one input is not what it should be."""
    if len(request.inputs) != 1:
        raise RequestError(f"{len(request.inputs)} inputs; expected one, image_bytes or image")
    (tensor,) = request.inputs
    expected = {"image_bytes": ("BYTES", []), "image": ("UINT8", [1, size, size])}
    if tensor.name not in expected:
        raise RequestError(f"input {tensor.name[:80]!r}; expected image_bytes or image")
    kind, rest = expected[tensor.name]
    shape = list(tensor.shape)
    if tensor.datatype != kind or not shape or shape[1:] != rest or shape[0] < 1:
        raise RequestError(
            f"input {tensor.name} is {tensor.datatype[:20]} {shape[:8]}; expected {kind} [N{''.join(f', {n}' for n in rest)}] with N of at least 1"
        )
    raw = request.raw_input_contents
    if raw and (len(raw) != 1 or tensor.HasField("contents")):
        raise RequestError(f"{len(raw)} raw inputs beside 1 input; expected one, and no contents beside it")
    if tensor.name == "image_bytes":
        images = _elements(raw[0]) if raw else list(tensor.contents.bytes_contents)
        _check_count("image_bytes", len(images), shape[0])
        return list(images)
    values = np.frombuffer(raw[0], np.uint8) if raw else _bytes(tensor.contents.uint_contents)
    _check_count("image", values.size, shape[0] * size * size)
    return [NetworkInput(array) for array in values.reshape(-1, size, size)]  # (S, S) each


def _elements(raw: bytes) -> list[bytes]:
    """The elements of a raw BYTES tensor. Raises RequestError where their lengths do not fit."""
    elements, at = [], 0
    while at < len(raw):
        length = struct.unpack_from("<I", raw, at)[0] if at + 4 <= len(raw) else len(raw)
        if at + 4 + length > len(raw):
            raise RequestError("image_bytes is cut off; expected each element after its length in 4 bytes")
        elements.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return elements


def _bytes(values: Sequence[int]) -> npt.NDArray[np.uint8]:
    array = np.array(values, np.uint32)
    if array.size and array.max() > 255:
        raise RequestError(f"image holds {array.max()}; expected 0 to 255")
    return array.astype(np.uint8)


def _check_count(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise RequestError(f"input {name} has {found} elements; its shape says {expected}")


async def _gathered(answering: Sequence[Any]) -> list[Prediction]:
    """All answers; the first error, with the image's place, where one fails: the others are then dropped."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in answering]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for index, task in enumerate(tasks):
            if task.done() and (error := task.exception()):
                raise _placed(error, index) if len(tasks) > 1 else error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _recorded(image: bytes | NetworkInput) -> bytes:
    """What the audit log hashes."""
    return image if isinstance(image, bytes) else image.array.tobytes()


def _placed(error: BaseException, index: int) -> BaseException:
    if not isinstance(error, ThoraxrtError) or isinstance(error, OverloadedError):  # which are of the whole request
        return error
    return type(error)(f"image {index}: {error}")


def _outputs(
    predictions: Sequence[Prediction], labels: Sequence[str]
) -> dict[str, tuple[str, npt.NDArray[np.generic]]]:
    """Each output's type and values, little-endian."""
    findings = [prediction.findings for prediction in predictions]
    most = max(len(prediction.boxes) for prediction in predictions)
    boxes = np.full((len(predictions), most, 6), -1, "<f4")  # (N, K, 6)
    for rows, prediction in zip(boxes, predictions, strict=True):
        for row, box in zip(rows, prediction.boxes, strict=False):
            row[:] = labels.index(box.finding), box.x, box.y, box.width, box.height, box.score
    return {
        "logits": ("FP32", np.array([[finding.logit for finding in row] for row in findings], "<f4")),
        "probabilities": ("FP32", np.array([[finding.probability for finding in row] for row in findings], "<f4")),
        "boxes": ("FP32", boxes),
        "box_count": ("INT32", np.array([len(prediction.boxes) for prediction in predictions], "<i4")),
    }


def _stage(telemetry: NullTelemetry, model: str, *stages: str) -> pb.StatisticDuration:
    """Images that passed the first of the stages, and their time in all of them."""
    names = [{"model": model, "stage": stage} for stage in stages]
    count = _sample(telemetry, "thoraxrt_stage_seconds_count", **names[0])
    seconds = sum(_sample(telemetry, "thoraxrt_stage_seconds_sum", **name) for name in names)
    return pb.StatisticDuration(count=int(count), ns=int(seconds * 1e9))


def _sample(telemetry: NullTelemetry, name: str, **labels: str) -> float:
    if not isinstance(telemetry, Telemetry):  # switched off
        return 0.0
    return telemetry.registry.get_sample_value(name, labels) or 0.0
