"""Input that nobody would send, to the decoder and every call: `python -m thoraxrt.benchmarks.fuzz BUNDLE`.

The scenario: a server in a process of its own, as `thoraxrt serve` runs it, which decodes in worker processes, keeps an
audit log, asks for tokens, and has two models, one of which is loaded and unloaded by what comes. Each call gets
messages of its kind, messages cut up, bytes that are none, right and wrong metadata and tokens; some are gzipped, some
take the most bytes that a message may have, or more. The claims: every call ends in time, with a status that it may
have and that the server gave itself; every file given to the decoder is decoded or refused in time; the server then
still answers, its own books hold no fault, and it ends as it should. Exit status 1 where one does not hold. Linux only.
Needs hypothesis, which the extra `dev` has.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from datetime import date
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import hypothesis
import numpy as np
import pydicom
import typer
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pydicom.uid import ExplicitVRLittleEndian

from thoraxrt.benchmarks.served import PREDICT, Served
from thoraxrt.benchmarks.soak import bundles_of
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import ImageError
from thoraxrt.export.phantoms import phantom
from thoraxrt.export.publish import publish
from thoraxrt.proto.oip import open_inference_pb2 as oip
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server import wire
from thoraxrt.server.audit import AuditOptions, verify
from thoraxrt.server.decoding import ProcessDecoder
from thoraxrt.server.models import EngineOptions
from thoraxrt.server.security import SecurityOptions
from thoraxrt.server.status import ERROR_KEY
from thoraxrt.server.tokens import TokenOptions, add_token

__all__ = ["METHODS", "Report", "fuzz", "main"]

METHODS: Final[dict[str, MethodDescriptor]] = {
    f"/{named.full_name}/{method.name}": method
    for file in (pb.DESCRIPTOR, oip.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for named in file.services_by_name.values()
    for method in named.methods
}
"""Every call that the server answers, by path."""

_OURS: Final = ("/thoraxrt.", "/inference.")
_STEADY: Final = "steady"
_HANG_S: Final = 20.0
_ROUND: Final = 50  # cases of each call, before all come again
_LARGE: Final = 5  # of a round, beside them
_HTTP: Final = 5
_KILLED: Final = "ended its process"
_PROPER: Final = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,  # for the model whose bundle is damaged
}
_CHANNEL: Final = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


def _encoded(kind: str) -> bytes:
    file = BytesIO()
    Image.fromarray(phantom(7, 0).pixels).resize((97, 120)).save(file, kind)
    return file.getvalue()


def _dicom() -> bytes:
    dataset = pydicom.Dataset()
    dataset.Modality, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = "DX", 1, "MONOCHROME1"
    dataset.Rows, dataset.Columns = 40, 50
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.PixelData = np.random.default_rng(0).integers(0, 4096, (40, 50), np.uint16).tobytes()
    dataset.preamble, dataset.file_meta = bytes(128), pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=False)
    return file.getvalue()


_IMAGES: Final = (_encoded("PNG"), _encoded("JPEG"), _dicom())
_LABELS: Final = ("Effusion", "Nodule", "Mass")
_WORDS: Final = (
    *("", "default", "spare", "damaged", "1", "stat", "completion", "image", "image_bytes", "UINT8", "BYTES", "boxes"),
    *_LABELS,
)


@st.composite
def _mutated(draw: st.DrawFn, seeds: st.SearchStrategy[bytes]) -> bytes:
    """A seed with some of it overwritten, taken out, doubled or put in."""
    data = bytearray(draw(seeds))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.one_of(st.integers(1, 4), st.integers(0, len(data))))
        kind = draw(st.sampled_from(("overwrite", "remove", "double", "insert")))
        if kind == "overwrite":
            new = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(new)] = new
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length]
        else:
            data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


def _integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return st.one_of(st.sampled_from((0, 1, 64)), st.integers(low, high), st.sampled_from((low, high)))


_text = st.one_of(st.sampled_from(_WORDS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
_image = st.one_of(st.sampled_from(_IMAGES), _mutated(st.sampled_from(_IMAGES)), st.binary(max_size=40))
_SCALARS: Final[dict[int, st.SearchStrategy[Any]]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT32: _integers(32, signed=True),
    FieldDescriptor.TYPE_INT64: _integers(64, signed=True),
    FieldDescriptor.TYPE_UINT32: _integers(32, signed=False),
    FieldDescriptor.TYPE_UINT64: _integers(64, signed=False),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_STRING: _text,
    FieldDescriptor.TYPE_BYTES: _image,
}

# So that models are really loaded, asked about and unloaded; never the one that the other calls are answered with.
_models = st.one_of(st.sampled_from(("spare", "spare", "damaged")), _text)
_versions = st.one_of(st.sampled_from(("", "", "1")), _text)
_NAMED: Final = {"name": _models, "model_name": _models, "version": _versions, "model_version": _versions}


@st.composite
def _messages(draw: st.DrawFn, descriptor: Any) -> Message:
    """Any message of a type: each field left out, or anything of its type."""
    message = GetMessageClass(descriptor)()
    for part in descriptor.fields:
        if not draw(st.booleans()):
            continue
        entry = part.message_type
        if entry is not None and entry.GetOptions().map_entry:
            for key in draw(
                st.lists(st.one_of(st.sampled_from(("priority", "timeout", "boxes_for")), _text), max_size=2)
            ):
                getattr(message, part.name)[key].CopyFrom(draw(_messages(entry.fields_by_name["value"].message_type)))
            continue
        one = _NAMED.get(part.name, _SCALARS[part.type]) if entry is None else _messages(entry)
        values = draw(st.lists(one, min_size=1, max_size=3)) if part.is_repeated else [draw(one)]
        if part.is_repeated:
            getattr(message, part.name).extend(values)
        elif entry is not None:
            getattr(message, part.name).CopyFrom(values[0])
        else:
            setattr(message, part.name, values[0])
    return message


_PARAMETERS: Final[dict[str, dict[str, st.SearchStrategy[Any]]]] = {
    "priority": {"int64_param": st.integers(0, 3), "bool_param": st.booleans()},
    "timeout": {
        "int64_param": st.sampled_from((0, 1, 10_000, 10_000_000)),
        "uint64_param": _integers(64, signed=False),
    },
    "boxes_for": {"string_param": st.lists(st.sampled_from(("", " ", *_LABELS)), max_size=3).map(",".join)},
}


@st.composite
def _tensors(draw: st.DrawFn, size: int) -> oip.ModelInferRequest:
    """An inference that is right, or nearly."""
    count = draw(st.integers(1, 3))
    request = oip.ModelInferRequest(id=draw(_text), model_name=draw(st.sampled_from((_STEADY, _STEADY, "", "spare"))))
    for name in draw(st.lists(st.sampled_from(("logits", "probabilities", "boxes", "box_count")), max_size=5)):
        request.outputs.add(name=name)
    for key in draw(st.sets(st.sampled_from(sorted(_PARAMETERS)))):
        kind = draw(st.sampled_from(sorted(_PARAMETERS[key])))
        setattr(request.parameters[key], kind, draw(_PARAMETERS[key][kind]))
    if draw(st.booleans()):
        tensor = request.inputs.add(name="image_bytes", datatype="BYTES", shape=[count])
        images = draw(st.lists(_image, min_size=count, max_size=count))
        raw = b"".join(len(data).to_bytes(4, "little") + data for data in images)
        contents = oip.InferTensorContents(bytes_contents=images)
    else:
        tensor = request.inputs.add(name="image", datatype="UINT8", shape=[count, 1, size, size])
        raw = draw(st.binary(min_size=1, max_size=3)) * (size * size * count)
        contents = oip.InferTensorContents(uint_contents=raw[: draw(st.integers(1, 2)) * size * size])
    if draw(st.integers(0, 3)):
        request.raw_input_contents.append(draw(st.one_of(st.just(raw), _mutated(st.just(raw)))))
    else:
        tensor.contents.CopyFrom(contents)
    return request


def _bodies(method: MethodDescriptor, size: int) -> st.SearchStrategy[bytes]:
    """A message of the method, its bytes mutated, or bytes that are none."""
    known: list[st.SearchStrategy[Message]] = [_messages(method.input_type)]
    if named := {part.name: _NAMED[part.name] for part in method.input_type.fields if part.name in _NAMED}:
        known.append(st.builds(GetMessageClass(method.input_type), **named))
    if method.input_type.full_name == "inference.ModelInferRequest":
        known.append(_tensors(size))
    written = st.one_of(known).map(lambda message: message.SerializeToString())
    return st.one_of(written, written, _mutated(written), st.binary(max_size=60))


_visible = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
_keys = st.sampled_from((wire.MODEL_KEY, wire.VERSION_KEY, wire.PRIORITY_KEY, wire.ORDER_KEY, "authorization"))
_metadata = st.lists(
    st.one_of(
        st.tuples(_keys, st.one_of(st.sampled_from(_WORDS), _visible)),
        st.tuples(
            st.from_regex(r"x[a-z0-9_.-]{0,19}", fullmatch=True).filter(lambda key: key[-4:] != "-bin"), _visible
        ),
        st.tuples(st.just("x-bin"), st.binary(max_size=40)),
    ),
    max_size=2,
)


def _large_images() -> list[bytes]:
    """Files of up to 60 MiB, small ones that claim to be large, and a text that is."""
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + b"\x08\x00\x00\x00\x00"
    claiming = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    text, file = PngImagePlugin.PngInfo(), BytesIO()
    text.add_text("a", "x" * 60 * 2**20, zip=True)
    Image.new("L", (97, 120)).save(file, "PNG", pnginfo=text)
    return [bytes(60 * 2**20), _IMAGES[0][:8] + bytes(30 * 2**20), claiming + _IMAGES[0][33:], file.getvalue()]


def _large_bodies(method: MethodDescriptor, size: int) -> list[Callable[[], bytes]]:
    """Makers of what takes most room or most steps to read: each is made when it is sent."""
    made: list[Callable[[], bytes]] = [lambda: bytes(60 * 2**20), lambda: bytes(200 * 2**20)]
    if texts := [f for f in method.input_type.fields if f.type == f.TYPE_STRING and not f.is_repeated]:
        made.append(lambda: GetMessageClass(method.input_type)(**{texts[0].name: "a" * 16 * 2**20}).SerializeToString())
    match method.input_type.full_name:
        case "thoraxrt.v1.PredictRequest" | "thoraxrt.v1.PredictStreamRequest":
            kind = GetMessageClass(method.input_type)
            made += [lambda index=index: kind(image=_large_images()[index]).SerializeToString() for index in range(4)]  # type: ignore[misc]
        case "thoraxrt.v1.PredictStudyRequest":
            made.append(
                lambda: pb.PredictStudyRequest(
                    images=[pb.StudyImage(id=str(number), image=bytes(15 * 2**18)) for number in range(16)]
                ).SerializeToString()
            )
        case "inference.ModelInferRequest":
            images, contents = 60 * 2**20 // size**2, oip.InferTensorContents
            made += [
                lambda: _infer("image_bytes", "BYTES", [1], raw=bytes(60 * 2**20)),
                lambda: _infer("image_bytes", "BYTES", [15 * 2**20], raw=bytes(60 * 2**20)),
                lambda: _infer("image", "UINT8", [images, 1, size, size], raw=bytes(images * size**2)),
                lambda: _infer("image_bytes", "BYTES", [1], contents=contents(bytes_contents=[b""] * 2**22)),
                lambda: _infer("image", "UINT8", [1, 1, size, size], contents=contents(uint_contents=[1] * 2**24)),
                lambda: _infer("image", "UINT8", [1] * 2**22),
                lambda: oip.ModelInferRequest(
                    parameters={str(number): oip.InferParameter(bool_param=True) for number in range(2**18)}
                ).SerializeToString(),
            ]
    return made


def _infer(
    name: str, kind: str, shape: list[int], raw: bytes | None = None, contents: oip.InferTensorContents | None = None
) -> bytes:
    request = oip.ModelInferRequest(model_name=_STEADY, raw_input_contents=[] if raw is None else [raw])
    request.inputs.add(name=name, datatype=kind, shape=shape, contents=contents)
    return request.SerializeToString()


@dataclass(slots=True)
class Report:
    """What happened: cases by call (or `decoder`, `http`), how they ended, and each claim that did not hold."""

    seed: int
    seconds: float = 0.0
    cases: Counter[str] = field(default_factory=Counter)
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    large: int = 0  # cases of 2 MiB to 200 MiB
    gzipped: int = 0
    workers_ended: int = 0  # by a file: a crash of a decoder, or its time or memory was up
    slowest_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    def claim(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.faults.append(what)


class _Fuzzing:
    """One server's cases."""

    def __init__(self, channel: grpc.Channel, tokens: dict[str, str], size: int, report: Report) -> None:
        self._channel, self._tokens, self._size, self._report = channel, tokens, size, report
        self._random = random.Random(report.seed)
        # Most callers get past the door: what lies behind it is what is to be tried.
        entries = [*[tokens["admin"]] * 8, tokens["predict"], "thoraxrt_0_0", None]
        self._token = st.sampled_from(entries)
        self._model = st.sampled_from((*[_STEADY] * 5, "spare", None))

    def call(self, path: str, cases: int) -> None:
        """So many cases of one method, some of them large."""
        method = METHODS[path]
        counts = st.integers(0, 4) if method.client_streaming else st.just(1)
        bodies = _bodies(method, self._size)
        messages = counts.flatmap(lambda count: st.lists(bodies, min_size=count, max_size=count))

        @hypothesis.given(messages, _metadata, self._token, self._model, st.booleans())
        def case(
            requests: list[bytes], brought: list[tuple[str, Any]], token: str | None, model: str | None, gzip: bool
        ) -> None:
            said = (*brought, *_said(token, model))
            self._check(path, method, requests, said, gzip)

        self._run(path, cases, case)
        self._ping(path)

    def large(self, path: str, body: bytes, *, gzip: bool) -> None:
        """One case of a method that is large, or not small."""
        self._report.large += 1
        try:
            self._check(path, METHODS[path], [body], _said(self._tokens["admin"], _STEADY), gzip, large=True)
        except AssertionError as error:
            self._report.faults.append(f"{path}, {len(body)} bytes: {error}")
        self._ping(path)

    def _run(self, what: str, cases: int, case: Any) -> None:
        settings = hypothesis.settings(
            max_examples=max(cases, 1),
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        )
        try:
            hypothesis.seed(self._random.getrandbits(32))(settings(case))()
        except Exception as error:  # whatever a case met: the others go on
            notes = " ".join(getattr(error, "__notes__", ()))
            self._report.faults.append(f"{what}: {type(error).__name__}: {error} {notes}"[:2000])

    def _check(
        self,
        path: str,
        method: MethodDescriptor,
        requests: list[bytes],
        said: Sequence[tuple[str, Any]],
        gzip: bool,
        *,
        large: bool = False,
    ) -> None:
        endless = method.server_streaming and not method.client_streaming
        compression = grpc.Compression.Gzip if gzip else None
        began = time.monotonic()
        calls: Any = self._channel.stream_stream(path)  # a stream of one message is, on the wire, that message
        call = calls(iter(requests), timeout=_HANG_S, metadata=said, compression=compression)
        answers = []
        with contextlib.suppress(grpc.RpcError):  # `call` has its status
            for answer in call:
                answers.append(answer)
                if endless:
                    call.cancel()
        code, told = call.code(), dict(call.trailing_metadata())
        self._report.cases[path] += 1
        self._report.gzipped += gzip
        self._report.ended[path, code.name] += 1
        self._report.slowest_s = max(self._report.slowest_s, time.monotonic() - began)
        if endless and answers:
            assert code is grpc.StatusCode.CANCELLED, (code, call.details())
            return
        assert code in _PROPER, (code, call.details())
        theirs = large and code is grpc.StatusCode.RESOURCE_EXHAUSTED  # gRPC's own, of a message beyond the limit
        named = code is grpc.StatusCode.OK or told.get(ERROR_KEY) or theirs or not path.startswith(_OURS)
        assert named, (code, call.details())
        for answer in answers:
            self._check_answer(method, answer)
        if code is grpc.StatusCode.OK:
            assert len(answers) == (len(requests) if method.client_streaming else 1), len(answers)

    def _check_answer(self, method: MethodDescriptor, data: bytes) -> None:
        """It is the method's, and no image of it met a fault of the server."""
        answer: Any = GetMessageClass(method.output_type).FromString(data)
        several = {"PredictStreamResponse": "answer", "PredictStudyResponse": "answers"}.get(method.output_type.name)
        if several:
            found = getattr(answer, several)
            for one in [found] if isinstance(found, pb.ImageAnswer) else found:
                kind = one.WhichOneof("answer")
                self._report.workers_ended += _KILLED in one.failure.message
                assert kind == "response" or (one.failure.error and one.failure.code in {3, 4, 5, 8}), one
        if method.name == "ModelStreamInfer":
            assert "its log names the fault" not in answer.error_message

    def _ping(self, after: str) -> None:
        """The server answers an image."""
        call: Any = self._channel.unary_unary(PREDICT, None, pb.PredictResponse.FromString)
        request = pb.PredictRequest(image=_IMAGES[2]).SerializeToString()
        try:
            said = call(request, timeout=_HANG_S, metadata=_said(self._tokens["predict"], _STEADY))
            self._report.claim(said.prediction.width == 50, f"after {after}: a wrong answer")
        except grpc.RpcError as error:
            self._report.faults.append(f"after {after}: {error}")

    def decoder(self, decoder: ProcessDecoder, cases: int) -> None:
        """So many files for the decoder alone."""

        @hypothesis.given(_image)
        def case(data: bytes) -> None:
            self._decode(decoder, data)

        self._run("decoder", cases, case)

    def large_files(self, decoder: ProcessDecoder) -> None:
        """Those that are large, or claim to be."""
        for number, data in enumerate(_large_images()):
            self._report.large += 1
            try:
                self._decode(decoder, data)
            except FutureTimeoutError:
                self._report.faults.append(f"decoder: large file {number} took {_HANG_S:g} s")

    def _decode(self, decoder: ProcessDecoder, data: bytes) -> None:
        began = time.monotonic()
        try:
            decoder.submit(data).result(_HANG_S)
            ended = "OK"
        except ImageError as error:
            ended = type(error).__name__
            self._report.workers_ended += _KILLED in str(error)
        self._report.cases["decoder"] += 1
        self._report.ended["decoder", ended] += 1
        self._report.slowest_s = max(self._report.slowest_s, time.monotonic() - began)

    def http(self, address: str, cases: int) -> None:
        """So many connections that speak no HTTP, or only at first."""
        frame = bytes.fromhex("00000004000000000000000401000000010000000000")

        @hypothesis.given(st.booleans(), _mutated(st.just(frame)))
        def case(preface: bool, data: bytes) -> None:
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=_HANG_S) as connection:
                connection.sendall((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if preface else b"") + data)
            self._report.cases["http"] += 1
            self._report.ended["http", "closed"] += 1

        self._run("http", cases, case)
        self._ping("http")


def _said(token: str | None, model: str | None) -> tuple[tuple[str, str], ...]:
    values = (("authorization", token and f"Bearer {token}"), (wire.MODEL_KEY, model))
    return tuple((key, value) for key, value in values if value)


def fuzz(
    bundle: Bundle,
    cases: int,
    *,
    seed: int = 0,
    backend: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run at least so many cases, the same for a seed; `report.faults` is empty where every claim holds."""
    report, began = Report(seed), time.monotonic()
    size, chance = bundle.manifest.preprocess.input_size, random.Random(seed)
    bodies = [(path, body) for path, method in METHODS.items() for body in _large_bodies(method, size)]
    large = cycle(chance.sample(bodies, len(bodies)))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for model, files in zip((_STEADY, "spare", "damaged"), bundles_of(bundle), strict=True):
            (place / "models" / model).mkdir(parents=True)
            publish(files, place / "models" / model / "1", replace=False)
        file, audit = place / "tokens.toml", AuditOptions(path=place / "audit.jsonl", sync_ms=50.0)
        tokens = {role: add_token(file, role, roles) for role, roles in _ROLES.items()}
        security, options = SecurityOptions(tokens=TokenOptions(file=file)), EngineOptions(backend=backend)
        with ProcessDecoder() as decoder, Served(place / "models", options, audit=audit, security=security) as server:
            with grpc.insecure_channel(server.address, _CHANNEL) as channel:
                fuzzing = _Fuzzing(channel, tokens, size, report)
                while (left := cases - report.cases.total()) > 0:
                    each = min(_ROUND, left // (len(METHODS) + 1) + 1)
                    for path in METHODS:
                        fuzzing.call(path, each)
                    for path, body in islice(large, _LARGE):
                        fuzzing.large(path, body(), gzip=chance.random() < 0.5)
                    fuzzing.http(server.address, _HTTP)
                    fuzzing.decoder(decoder, each)
                    say(f"{report.cases.total()} cases, {len(report.faults)} faults, {time.monotonic() - began:.0f} s")
                fuzzing.large_files(decoder)
            begun, answered, status = server.stop()
        verify(audit.path)
    report.seconds = time.monotonic() - began
    report.claim(sum(begun.values()) == sum(answered.values()), f"calls begun {begun}, ended {answered}")
    report.claim(not answered.keys() & {"UNKNOWN", "INTERNAL"}, f"statuses of faults: {answered}")
    report.claim(status == 0, f"the server ended with exit status {status}")
    return report


_ROLES: Final[dict[str, Any]] = {"predict": ("predict",), "admin": ("predict", "admin")}


def main(
    bundle: Path,
    cases: Annotated[int, typer.Option(min=1)] = 100_000,
    seed: Annotated[int, typer.Option(help="Another one gives other cases.")] = 0,
    backend: Annotated[str | None, typer.Option(help="By default the bundle's own choice.")] = None,
) -> None:
    """Run the scenario; how it goes to stderr, one line of JSON to stdout."""
    opened = Bundle.open(bundle)
    report = fuzz(opened, cases, seed=seed, backend=backend, say=lambda line: print(line, file=sys.stderr, flush=True))
    for fault in report.faults:
        print(fault, file=sys.stderr)
    machine = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.machine(), "date": str(date.today())}
    said: dict[str, Any] = {"scenario": "fuzz", **machine, "bundle": opened.sha256, "total": report.cases.total()}
    said["ended"] = {
        what: {how: n for (of, how), n in sorted(report.ended.items()) if of == what} for what in report.cases
    }
    for name in ("seed", "seconds", "large", "gzipped", "workers_ended", "slowest_s", "faults"):
        said[name] = getattr(report, name)
    print(json.dumps(said))
    sys.exit(1 if report.faults else 0)


if __name__ == "__main__":
    typer.run(main)
