"""The Open Inference Protocol over the models that are served: what tritonclient and KServe's clients speak.

Knows the protocol's tensors; admission, decoding and the network are the scheduler's, as for `thoraxrt.v1`. What a
failed call ends with is `thoraxrt.server.calls`'s.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
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
from thoraxrt.server.calls import client_of, deadline_of, status_from_exception, whole
from thoraxrt.server.models import Loaded, ModelStatus
from thoraxrt.server.service import Lender, Streams, audited, version_from_text
from thoraxrt.server.telemetry import NullTelemetry, Telemetry

__all__ = ["OIP_SERVICE_NAME", "OpenInferenceService", "Repository"]

OIP_SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

_EXTENSIONS: Final = ("model_configuration", "model_repository", "statistics")
_STREAM_REQUESTS: Final = 32  # of one stream, in flight
_PLATFORM: Final = "thoraxrt"
_LONGEST: Final = 4096  # list of findings
_PART: Final = 65_536

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
    """The calls of `inference.GRPCInferenceService`; models and streams stay their owner's."""

    def __init__(
        self, models: Repository, telemetry: NullTelemetry, streams: Streams, audit: AuditLog | None = None
    ) -> None:
        self._models = models
        self._telemetry = telemetry
        self._streams = streams
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
        return pb.ModelReadyResponse(ready=self._models.ready(request.name, version_from_text(request.version)))

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
            options = loaded.scheduler.options
            config = pb.ModelConfig(
                name=loaded.name,
                platform=_PLATFORM,
                backend=_PLATFORM,
                max_batch_size=min(options.max_images, options.max_per_client),
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
        answering = self._infer(request, context, deadline_of(context))
        del request
        return await answering

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[pb.ModelInferRequest], context: _Context
    ) -> None:
        """See the proto."""
        room, writing, deadline = asyncio.Semaphore(_STREAM_REQUESTS), asyncio.Lock(), deadline_of(context)

        async def answer(request: pb.ModelInferRequest) -> None:
            name, answering = request.id, self._infer(request, context, deadline)
            del request
            try:
                response = pb.ModelStreamInferResponse(infer_response=await answering)
            except Exception as error:
                said = status_from_exception("ModelStreamInfer", error).details
                response = pb.ModelStreamInferResponse(
                    error_message=said, infer_response=pb.ModelInferResponse(id=name)
                )
            async with writing:
                await whole(context.write(response))

        async with self._streams.opened(client_of(context)) as answering:
            await room.acquire()
            while (request := await self._streams.next(requests)) is not None:
                task = answering.create_task(answer(request))
                task.add_done_callback(lambda _: room.release())
                del request
                await room.acquire()  # before the next one is read

    async def ModelStatistics(  # noqa: N802
        self, request: pb.ModelStatisticsRequest, context: _Context
    ) -> pb.ModelStatisticsResponse:
        """See the proto."""
        version = version_from_text(request.version)
        statuses = [
            status
            for status in self._models.index()
            if request.name in ("", status.name) and version in (None, status.version)
        ]
        if request.name and not statuses:
            raise ModelNotFoundError(f"there is no model {request.name[:80]!r} of version {request.version or 'any'}")
        samples = await asyncio.to_thread(_samples, self._telemetry)
        return pb.ModelStatisticsResponse(model_stats=[self._statistics(s.name, s.version, samples) for s in statuses])

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
        await self._administered("RepositoryModelLoad", request.model_name, context, self._models.load)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self, request: pb.RepositoryModelUnloadRequest, context: _Context
    ) -> pb.RepositoryModelUnloadResponse:
        """See the proto."""
        # Triton's `unload_dependents` is about ensembles.
        await self._administered("RepositoryModelUnload", request.model_name, context, self._models.unload)
        return pb.RepositoryModelUnloadResponse()

    async def _administered(
        self, method: str, name: str, context: _Context, change: Callable[[str], Awaitable[None]]
    ) -> None:
        """Change what is served, and have it stand in the audit log, where there is one, by whom.

        How it ended stands there, also where nobody waits for it any more: a change that has begun goes on.
        """
        if self._audit:
            self._audit.check()
        peer = context.peer()

        async def recorded() -> None:
            outcome: str | None = None
            try:
                await change(name)
            except BaseException as error:
                outcome = type(error).__name__
                raise
            finally:
                if self._audit:
                    await self._audit.record(method, outcome, name=name[:128], peer=peer)

        changing = asyncio.create_task(recorded())
        changing.add_done_callback(lambda task: task.cancelled() or task.exception())  # which may be nobody's by then
        await asyncio.shield(changing)

    async def _infer(
        self, request: pb.ModelInferRequest, context: _Context, deadline: float | None
    ) -> pb.ModelInferResponse:
        with self._leased(request.model_name, request.model_version) as loaded, self._counting(loaded) as counted:
            size = loaded.engine.manifest.preprocess.input_size
            wanted, own_id, tensor = _wanted(request), request.id, _input(request, size)
            priority, timeout_s, boxes_for = _parameters(request.parameters)
            loaded.engine.check_findings(boxes_for)
            left_s = None if deadline is None else deadline - time.monotonic()
            remaining = [limit for limit in (timeout_s, left_s) if limit is not None]
            if self._audit:
                self._audit.check()
            client, count = client_of(context), tensor.shape[0]
            ticket = loaded.scheduler.admit(min(remaining, default=None), priority, client, count)
            try:
                images = await _images(request, tensor, size)
                del request, tensor  # from here on, what the images take is the scheduler's to bound
                answering = [
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
                del images
                predictions = await _gathered(answering)
            finally:
                loaded.scheduler.release(ticket)
            began = time.perf_counter()
            counted.images += count
            tensors = _outputs(predictions, loaded.engine.manifest.labels)
            response = pb.ModelInferResponse(
                model_name=loaded.name,
                model_version=str(loaded.version),
                id=own_id,
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
            self._telemetry.stage_of_call(loaded.name, "write", time.perf_counter() - began)
            return response

    def _leased(self, name: str, version: str) -> AbstractContextManager[Loaded]:
        return self._models.lease(name or None, version_from_text(version))

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

    def _statistics(self, name: str, version: int, samples: _Samples) -> pb.ModelStatistics:
        """Requests of this protocol; stages and batches of all protocols, and of all versions of the model."""
        counted = self._counted[name, version]

        def stage(*stages: str) -> pb.StatisticDuration:
            """Images that passed the first of the stages, and their time in all of them."""
            seconds = sum(samples.get(("thoraxrt_stage_seconds_sum", name, each), 0.0) for each in stages)
            count = samples.get(("thoraxrt_stage_seconds_count", name, stages[0]), 0.0)
            return pb.StatisticDuration(count=int(count), ns=int(seconds * 1e9))

        (succeeded, success_ns), (failed, fail_ns) = counted.spent[True], counted.spent[False]
        return pb.ModelStatistics(
            name=name,
            version=str(version),
            last_inference=counted.last_ms,
            inference_count=counted.images,
            execution_count=int(samples.get(("thoraxrt_batch_images_count", name, ""), 0.0)),
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


def _wanted(request: pb.ModelInferRequest) -> Sequence[str]:
    """The outputs that are asked for. Raises RequestError for one that no model has."""
    if (count := len(request.outputs)) > len(_OUTPUTS):
        raise RequestError(f"{count} outputs; expected each of {', '.join(_OUTPUTS)} once at most")
    names = [output.name for output in request.outputs]
    if unknown := [name for name in names if name not in _OUTPUTS]:
        raise RequestError(f"output {unknown[0][:80]!r}; expected some of {', '.join(_OUTPUTS)}")
    return names or _OUTPUTS


def _parameters(given: Mapping[str, pb.InferParameter]) -> tuple[Priority, float | None, tuple[str, ...] | None]:
    """Priority, seconds until the answer is needed, and whose findings get boxes. Raises RequestError."""
    priority, timeout, boxes_for = (
        getattr(given[key], given[key].WhichOneof("parameter_choice") or "", None) if key in given else None
        for key in ("priority", "timeout", "boxes_for")
    )
    if priority is not None and (isinstance(priority, bool) or not isinstance(priority, int) or priority < 0):
        raise RequestError("parameter priority is no whole number; expected 0 (default), 1 (STAT) or more (routine)")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0):
        raise RequestError("parameter timeout is no whole number; expected microseconds, or 0 for none")
    if boxes_for is not None and (not isinstance(boxes_for, str) or len(boxes_for) > _LONGEST):
        raise RequestError(
            f"parameter boxes_for is no string of {_LONGEST} characters at most; expected findings, comma-separated"
        )
    return (
        Priority.STAT if priority == 1 else Priority.ROUTINE,
        timeout / 1e6 if timeout else None,
        None if boxes_for is None else tuple(part.strip() for part in boxes_for.split(",") if part.strip()),
    )


def _input(request: pb.ModelInferRequest, size: int) -> pb.ModelInferRequest.InferInputTensor:
    """The request's one input, its shape what it should be. Raises RequestError."""
    if len(request.inputs) != 1:
        raise RequestError(f"{len(request.inputs)} inputs; expected one, image_bytes or image")
    (tensor,) = request.inputs
    expected = {"image_bytes": ("BYTES", []), "image": ("UINT8", [1, size, size])}
    if tensor.name not in expected:
        raise RequestError(f"input {tensor.name[:80]!r}; expected image_bytes or image")
    kind, rest = expected[tensor.name]
    shape = list(tensor.shape[:8])
    if tensor.datatype != kind or not shape or shape[1:] != rest or shape[0] < 1:
        raise RequestError(
            f"input {tensor.name} is {tensor.datatype[:20]} {shape}; expected {kind} [N{''.join(f', {n}' for n in rest)}] with N of at least 1"
        )
    raw = request.raw_input_contents
    if raw and (len(raw) != 1 or tensor.HasField("contents")):
        raise RequestError(f"{len(raw)} raw inputs beside 1 input; expected one, and no contents beside it")
    return tensor


async def _images(
    request: pb.ModelInferRequest, tensor: pb.ModelInferRequest.InferInputTensor, size: int
) -> list[bytes | NetworkInput]:
    """The input's images, as many as its shape says. Raises RequestError where those are not what it holds.

    What is counted before it is taken apart stalls no other call.
    """
    raw, count = request.raw_input_contents, tensor.shape[0]
    if tensor.name == "image_bytes":
        contents = _elements(raw[0], count) if raw else tensor.contents.bytes_contents
        _check_count("image_bytes", len(contents), count)
        return list(contents)
    values = raw[0] if raw else tensor.contents.uint_contents
    _check_count("image", len(values), count * size * size)
    data = values if isinstance(values, bytes) else await asyncio.to_thread(_bytes, values)
    return [NetworkInput(array) for array in np.frombuffer(data, np.uint8).reshape(-1, size, size)]  # (S, S) each


def _elements(raw: bytes, most: int) -> list[bytes]:
    """The elements of a raw BYTES tensor, or of more than `most` one more. Raises RequestError where a length does not fit."""
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) <= most:
        length = struct.unpack_from("<I", raw, at)[0] if at + 4 <= len(raw) else len(raw)
        if at + 4 + length > len(raw):
            raise RequestError("image_bytes is cut off; expected each element after its length in 4 bytes")
        elements.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return elements


def _bytes(values: Sequence[int]) -> bytes:
    """In parts, so that other threads have their turn."""
    try:
        return b"".join(bytes(values[at : at + _PART]) for at in range(0, len(values), _PART))
    except ValueError:
        raise RequestError(f"image holds {max(values)}; expected 0 to 255") from None


def _check_count(name: str, found: int, expected: int) -> None:
    if found != expected:
        more = "or more " if found > expected else ""
        raise RequestError(f"input {name} has {found} {more}elements; its shape says {expected}")


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


_Samples = Mapping[tuple[str, str, str], float]  # by metric, model and stage


def _samples(telemetry: NullTelemetry) -> _Samples:
    """What the metrics say of stages and batches; of nothing where they are switched off."""
    if not isinstance(telemetry, Telemetry):
        return {}
    names = ["thoraxrt_stage_seconds_count", "thoraxrt_stage_seconds_sum", "thoraxrt_batch_images_count"]
    return {
        (sample.name, sample.labels["model"], sample.labels.get("stage", "")): sample.value
        for family in telemetry.registry.restricted_registry(names).collect()
        for sample in family.samples
    }
