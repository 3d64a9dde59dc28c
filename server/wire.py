"""The engine's types to protobuf messages, and back without loss.

Owns the only code that reads or writes the fields of `thoraxrt.v1`. Knows nothing of calls or
servers. Each pair of functions is named after the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import grpc
import msgspec
import numpy as np
import numpy.typing as npt

from thoraxrt.engine.boxes import Box, BoxSpec
from thoraxrt.engine.bundle import Bundle, FileEntry, Network
from thoraxrt.engine.decode import DecodeLimits
from thoraxrt.engine.engine import Prediction
from thoraxrt.engine.postprocess import Activation, Finding, OperatingPoint
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server.status import ERROR_KEY, PUSHBACK_KEY, Status

__all__ = [
    "ENVELOPE_BYTES",
    "MAX_MESSAGE_BYTES",
    "MODEL_KEY",
    "ORDER_KEY",
    "PRIORITY_KEY",
    "VERSION_KEY",
    "Model",
    "Options",
    "Reply",
    "Study",
    "StudyFinding",
    "answer_from_message",
    "message_from_answer",
    "message_from_model",
    "message_from_reply",
    "message_from_study",
    "model_from_bundle",
    "model_from_message",
    "options_from_message",
    "reply_from_message",
    "request_from_image",
    "request_from_stream_image",
    "request_from_study",
    "study_from_message",
]

ENVELOPE_BYTES: Final = 64 * 1024
"""What surrounds an image in a message, at most."""

MAX_MESSAGE_BYTES: Final = DecodeLimits().max_bytes + ENVELOPE_BYTES
"""The decoder's largest file and what surrounds it: so that the decoder, not gRPC, says why it is refused."""

MODEL_KEY: Final = "thoraxrt-model"
VERSION_KEY: Final = "thoraxrt-model-version"
PRIORITY_KEY: Final = "thoraxrt-priority"
ORDER_KEY: Final = "thoraxrt-order"
"""What a call may bring as metadata."""

_WIRE_FLOAT = np.dtype("<f4")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted beside the findings.

    `boxes_for`: the findings that get boxes where they are reported; None for all, empty for
    none. `overlay`: a PNG picture with CAM and boxes. `cam`: the CAMs themselves.

    Example: `Options(boxes_for=("Nodule",), overlay=True)`.
    """

    boxes_for: tuple[str, ...] | None = None
    overlay: bool = False
    cam: bool = False


class Reply(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A server's answer for one image.

    `prediction` is what the engine would have given in process, without `radiograph`. `overlay_png`
    is a PNG file's bytes where one was asked for. `manifest_sha256`, 64 hex digits, names the
    exact bundle that answered.
    """

    prediction: Prediction
    overlay_png: bytes | None
    manifest_sha256: str


class StudyFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One label's answer over a study.

    `probability` is the highest among the images', `image` the index of the first that has it; `reported` where any
    image reaches the operating point.
    """

    finding: str
    probability: float
    reported: bool
    image: int


class Study(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A server's answer for one study: each image's, in order, and every label's over all of them.

    A Status is what the call of one image would have ended with. `findings` is empty where no image has a Reply.
    """

    answers: tuple[Reply | Status, ...]
    findings: tuple[StudyFinding, ...]
    manifest_sha256: str

    @classmethod
    def of(cls, answers: Sequence[Reply | Status], manifest_sha256: str) -> Study:
        """The study whose images have these answers, all of the same model."""
        predictions = [(i, answer.prediction) for i, answer in enumerate(answers) if isinstance(answer, Reply)]
        findings = []
        for of_label in zip(*([(i, finding) for finding in p.findings] for i, p in predictions), strict=True):
            image, highest = max(of_label, key=lambda pair: pair[1].probability)  # of several, the first
            findings.append(
                StudyFinding(
                    finding=highest.finding,
                    probability=highest.probability,
                    reported=any(finding.reported for _, finding in of_label),
                    image=image,
                )
            )
        return cls(answers=tuple(answers), findings=tuple(findings), manifest_sha256=manifest_sha256)


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The model that a server answers with, and what executes it; see `engine.bundle.Manifest`."""

    labels: tuple[str, ...]
    network: Network
    activation: Activation
    preprocess: PreprocessSpec
    boxes: BoxSpec
    operating_points: tuple[OperatingPoint, ...]
    backend: str
    precision: str
    producer: dict[str, str]
    files: dict[str, FileEntry]
    manifest_sha256: str
    server_version: str


def request_from_image(image: bytes, options: Options) -> pb.PredictRequest:
    """The request for one encoded image."""
    return pb.PredictRequest(image=image, options=_message_from_options(options))


def request_from_stream_image(name: str, image: bytes, options: Options) -> pb.PredictStreamRequest:
    """The request for one encoded image of a stream; `name` comes back with its answer."""
    return pb.PredictStreamRequest(id=name, image=image, options=_message_from_options(options))


def request_from_study(images: Sequence[bytes], options: Options) -> pb.PredictStudyRequest:
    """The request for the encoded images of one study; their ids are their indices."""
    sent = [pb.StudyImage(id=str(i), image=image) for i, image in enumerate(images)]
    return pb.PredictStudyRequest(images=sent, options=_message_from_options(options))


def _message_from_options(options: Options) -> pb.PredictOptions:
    chosen = None if options.boxes_for is None else pb.FindingSelection(findings=options.boxes_for)
    return pb.PredictOptions(boxes_for=chosen, overlay=options.overlay, cam=options.cam)


def options_from_message(message: pb.PredictOptions) -> Options:
    """The options of a request; absent fields have their defaults."""
    chosen = tuple(message.boxes_for.findings) if message.HasField("boxes_for") else None
    return Options(boxes_for=chosen, overlay=message.overlay, cam=message.cam)


def message_from_reply(reply: Reply) -> pb.PredictResponse:
    """The response for one image; the reply's CAM goes with it where it has one."""
    cam = reply.prediction.cam
    return pb.PredictResponse(
        prediction=pb.Prediction(**reply.prediction.to_dict()),  # the fields have the JSON's names
        manifest_sha256=reply.manifest_sha256,
        overlay_png=reply.overlay_png or b"",
        cam=None if cam is None else _message_from_cam(cam),
    )


def reply_from_message(message: pb.PredictResponse) -> Reply:
    """The reply in a response. Raises ValueError where its CAM is not what its shape says."""
    cam = _cam_from_message(message.cam) if message.HasField("cam") else None
    return Reply(
        prediction=_prediction_from_message(message.prediction, cam),
        overlay_png=message.overlay_png or None,
        manifest_sha256=message.manifest_sha256,
    )


def message_from_answer(name: str, answer: Reply | Status) -> pb.ImageAnswer:
    """One image's answer among several; `name` is that of its request."""
    if isinstance(answer, Reply):
        return pb.ImageAnswer(id=name, response=message_from_reply(answer))
    metadata = dict(answer.trailing_metadata)
    number: int = answer.code.value[0]  # the pair of number and words that grpc makes of it
    failure = pb.Failure(
        code=number,
        message=answer.details,
        error=metadata.get(ERROR_KEY, ""),
        retry_after_ms=int(metadata.get(PUSHBACK_KEY, 0)),
    )
    return pb.ImageAnswer(id=name, failure=failure)


def answer_from_message(message: pb.ImageAnswer) -> Reply | Status:
    """One image's answer: a Reply, or the status that its own call would have ended with.

    Raises ValueError where it holds neither, or a CAM that is not what its shape says.
    """
    match message.WhichOneof("answer"):
        case "response":
            return reply_from_message(message.response)
        case "failure":
            failure = message.failure
            code = next((code for code in grpc.StatusCode if code.value[0] == failure.code), grpc.StatusCode.UNKNOWN)
            metadata = [(ERROR_KEY, failure.error)] if failure.error else []
            if failure.retry_after_ms:
                metadata.append((PUSHBACK_KEY, str(failure.retry_after_ms)))
            return Status(code, failure.message, tuple(metadata))
        case _:
            raise ValueError("an image's answer is of a kind that this version does not know; update thoraxrt")


def message_from_study(names: Sequence[str], study: Study) -> pb.PredictStudyResponse:
    """The response for a study whose images have these names."""
    return pb.PredictStudyResponse(
        answers=[message_from_answer(name, answer) for name, answer in zip(names, study.answers, strict=True)],
        findings=[pb.StudyFinding(**msgspec.to_builtins(finding)) for finding in study.findings],
        manifest_sha256=study.manifest_sha256,
    )


def study_from_message(message: pb.PredictStudyResponse) -> Study:
    """The study in a response. Raises ValueError as `answer_from_message` does."""
    return Study(
        answers=tuple(answer_from_message(answer) for answer in message.answers),
        findings=tuple(msgspec.convert(finding, StudyFinding, from_attributes=True) for finding in message.findings),
        manifest_sha256=message.manifest_sha256,
    )


def _prediction_from_message(message: pb.Prediction, cam: npt.NDArray[np.float32] | None) -> Prediction:
    return Prediction(
        width=message.width,
        height=message.height,
        backend=message.backend,
        precision=message.precision,
        findings=tuple(msgspec.convert(finding, Finding, from_attributes=True) for finding in message.findings),
        boxes=tuple(msgspec.convert(box, Box, from_attributes=True) for box in message.boxes),
        cam=cam,
    )


def _message_from_cam(cam: npt.NDArray[np.float32]) -> pb.ClassActivationMaps:
    count, height, width = cam.shape
    return pb.ClassActivationMaps(
        count=count, height=height, width=width, values=cam.astype(_WIRE_FLOAT, copy=False).tobytes()
    )


def _cam_from_message(message: pb.ClassActivationMaps) -> npt.NDArray[np.float32]:
    values = np.frombuffer(message.values, dtype=_WIRE_FLOAT).astype(np.float32)
    return values.reshape(message.count, message.height, message.width)  # (C, h, w)


def model_from_bundle(bundle: Bundle, *, backend: str, precision: str, server_version: str) -> Model:
    """What a server says of its bundle, with the backend and precision that it executes."""
    manifest = bundle.manifest
    return Model(
        labels=manifest.labels,
        network=manifest.network,
        activation=manifest.activation,
        preprocess=manifest.preprocess,
        boxes=manifest.boxes,
        operating_points=manifest.operating_points,
        backend=backend,
        precision=precision,
        producer=manifest.producer,
        files=manifest.files,
        manifest_sha256=bundle.sha256,
        server_version=server_version,
    )


def message_from_model(model: Model) -> pb.GetModelResponse:
    """The description of a model."""
    fields = msgspec.to_builtins(model)  # the fields have the names of Model's, but for these
    activation = fields.pop("activation")
    fields["activation"] = activation["name"]
    fields["activation_thresholds"] = activation.get("thresholds", ())
    fields["preprocess"] = _message_from_preprocess(model.preprocess)
    return pb.GetModelResponse(**fields)


def model_from_message(message: pb.GetModelResponse) -> Model:
    """The model in a description. Raises ValueError where it says what this version cannot mean."""
    network = message.network
    thresholds = {"thresholds": list(message.activation_thresholds)} if message.activation_thresholds else {}
    return Model(
        labels=tuple(message.labels),
        network=Network(
            name=network.name,
            cam_height=network.cam_height,
            cam_width=network.cam_width,
            bias=tuple(network.bias),
            checkpoint_sha256=network.checkpoint_sha256,
        ),
        activation=msgspec.convert({"name": message.activation, **thresholds}, Activation),
        preprocess=_preprocess_from_message(message.preprocess),
        boxes=msgspec.convert(message.boxes, BoxSpec, from_attributes=True),
        operating_points=tuple(_operating_point_from_message(point) for point in message.operating_points),
        backend=message.backend,
        precision=message.precision,
        producer=dict(message.producer),
        files={name: msgspec.convert(entry, FileEntry, from_attributes=True) for name, entry in message.files.items()},
        manifest_sha256=message.manifest_sha256,
        server_version=message.server_version,
    )


def _message_from_preprocess(spec: PreprocessSpec) -> pb.Preprocess:
    message = pb.Preprocess(crop=spec.crop, filter=spec.filter, input_size=spec.input_size, square=spec.square)
    match spec.resize:
        case Exact(width=width, height=height):
            message.exact.CopyFrom(pb.ExactSize(width=width, height=height))
        case Shorter(pixels=pixels):
            message.shorter = pixels
    return message


def _preprocess_from_message(message: pb.Preprocess) -> PreprocessSpec:
    match message.WhichOneof("resize"):
        case "exact":
            resize: Exact | Shorter = Exact(width=message.exact.width, height=message.exact.height)
        case "shorter":
            resize = Shorter(pixels=message.shorter)
        case _:
            raise ValueError("the resize is of a kind that this version does not know; update thoraxrt")
    fields = {
        "resize": resize,
        "crop": message.crop if message.HasField("crop") else None,
        "square": message.square,
        "filter": message.filter,
    }
    return msgspec.convert(fields, PreprocessSpec)


def _operating_point_from_message(message: pb.OperatingPoint) -> OperatingPoint:
    """Set fields only: those that are absent are None here."""
    return msgspec.convert({field.name: value for field, value in message.ListFields()}, OperatingPoint)
