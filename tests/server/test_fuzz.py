"""Input that nobody would send, to every call that there is: each gets a proper status, and the server goes on.

A few thousand cases. THORAXRT_FUZZ_CASES=100000 runs so many, others each time.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from io import BytesIO
from typing import Any, Final

import grpc
import numpy as np
import pydicom
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian

from tests.server.conftest import LABELS, encoded
from thoraxrt.proto.oip import open_inference_pb2 as oip
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server import wire
from thoraxrt.server.client import Client
from thoraxrt.server.status import ERROR_KEY

CASES: Final = int(os.environ.get("THORAXRT_FUZZ_CASES", "0"))
PREDICT: Final = "/thoraxrt.v1.PredictionService/Predict"
HANG_S: Final = 20.0
METHODS: Final[dict[str, MethodDescriptor]] = {
    f"/{named.full_name}/{method.name}": method
    for file in (pb.DESCRIPTOR, oip.DESCRIPTOR)
    for named in file.services_by_name.values()
    for method in named.methods
}
PROPER: Final = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


def dicom() -> bytes:
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


IMAGES: Final = (encoded(0), encoded(1, kind="JPEG"), dicom())
WORDS: Final = ("", "default", "1", "stat", "completion", "image", "image_bytes", "UINT8", "BYTES", "boxes", *LABELS)


@st.composite
def mutated(draw: st.DrawFn, seeds: st.SearchStrategy[bytes]) -> bytes:
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


def integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return st.one_of(st.sampled_from((0, 1, 64)), st.integers(low, high), st.sampled_from((low, high)))


text = st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
image = st.one_of(st.sampled_from(IMAGES), mutated(st.sampled_from(IMAGES)), st.binary(max_size=40))
SCALARS: Final[dict[int, st.SearchStrategy[Any]]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT32: integers(32, signed=True),
    FieldDescriptor.TYPE_INT64: integers(64, signed=True),
    FieldDescriptor.TYPE_UINT32: integers(32, signed=False),
    FieldDescriptor.TYPE_UINT64: integers(64, signed=False),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_STRING: text,
    FieldDescriptor.TYPE_BYTES: image,
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Any) -> Message:
    """Any message of a type: each field left out, or anything of its type."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            for key in draw(
                st.lists(st.one_of(st.sampled_from(("priority", "timeout", "boxes_for")), text), max_size=2)
            ):
                getattr(message, field.name)[key].CopyFrom(draw(messages(entry.fields_by_name["value"].message_type)))
            continue
        one = SCALARS[field.type] if entry is None else messages(entry)
        values = draw(st.lists(one, min_size=1, max_size=3)) if field.is_repeated else [draw(one)]
        if field.is_repeated:
            getattr(message, field.name).extend(values)
        elif entry is not None:
            getattr(message, field.name).CopyFrom(values[0])
        else:
            setattr(message, field.name, values[0])
    return message


PARAMETERS: Final[dict[str, dict[str, st.SearchStrategy[Any]]]] = {
    "priority": {"int64_param": st.integers(0, 3), "bool_param": st.booleans()},
    "timeout": {"int64_param": st.sampled_from((0, 1, 10_000, 10_000_000)), "uint64_param": integers(64, signed=False)},
    "boxes_for": {"string_param": st.lists(st.sampled_from(("", " ", *LABELS)), max_size=3).map(",".join)},
}


@st.composite
def tensors(draw: st.DrawFn) -> oip.ModelInferRequest:
    """An inference that is right, or nearly."""
    count = draw(st.integers(1, 3))
    request = oip.ModelInferRequest(id=draw(text), model_name=draw(st.sampled_from(("", "default"))))
    for name in draw(st.lists(st.sampled_from(("logits", "probabilities", "boxes", "box_count")), max_size=5)):
        request.outputs.add(name=name)
    for key in draw(st.sets(st.sampled_from(sorted(PARAMETERS)))):
        kind = draw(st.sampled_from(sorted(PARAMETERS[key])))
        setattr(request.parameters[key], kind, draw(PARAMETERS[key][kind]))
    if draw(st.booleans()):
        tensor = request.inputs.add(name="image_bytes", datatype="BYTES", shape=[count])
        images = draw(st.lists(image, min_size=count, max_size=count))
        raw = b"".join(len(data).to_bytes(4, "little") + data for data in images)
        contents = oip.InferTensorContents(bytes_contents=images)
    else:
        tensor = request.inputs.add(name="image", datatype="UINT8", shape=[count, 1, 64, 64])
        raw = draw(st.binary(min_size=1, max_size=3)) * (64 * 64 * count)
        contents = oip.InferTensorContents(uint_contents=raw[: draw(st.integers(1, 2)) * 64 * 64])
    if draw(st.integers(0, 3)):
        request.raw_input_contents.append(draw(st.one_of(st.just(raw), mutated(st.just(raw)))))
    else:
        tensor.contents.CopyFrom(contents)
    return request


def bodies(method: MethodDescriptor) -> st.SearchStrategy[bytes]:
    """A message of the method, its bytes mutated, or bytes that are none."""
    known = [messages(method.input_type)]
    if method.input_type.full_name == "inference.ModelInferRequest":
        known.append(tensors())
    written = st.one_of(known).map(lambda message: message.SerializeToString())
    return st.one_of(written, written, mutated(written), st.binary(max_size=60))


visible = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
known_keys = st.sampled_from((wire.MODEL_KEY, wire.VERSION_KEY, wire.PRIORITY_KEY, wire.ORDER_KEY, "authorization"))
metadata = st.lists(
    st.one_of(
        st.tuples(known_keys, st.one_of(st.sampled_from(WORDS), visible)),
        st.tuples(st.from_regex(r"x[a-z0-9_.-]{0,19}", fullmatch=True).filter(lambda key: key[-4:] != "-bin"), visible),
        st.tuples(st.just("x-bin"), st.binary(max_size=40)),
    ),
    max_size=3,
)


@pytest.fixture(scope="module")
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


def check_answer(method: MethodDescriptor, data: bytes) -> None:
    """It is the method's, and no image of it met a fault of the server."""
    answer = GetMessageClass(method.output_type).FromString(data)
    several = {"PredictStreamResponse": "answer", "PredictStudyResponse": "answers"}.get(method.output_type.name)
    if several:
        found = getattr(answer, several)
        for one in [found] if isinstance(found, pb.ImageAnswer) else found:
            kind = one.WhichOneof("answer")
            assert kind == "response" or (one.failure.error and one.failure.code in {3, 4, 8}), one
    if method.name == "ModelStreamInfer":
        assert "its log names the fault" not in answer.error_message


@pytest.mark.parametrize("path", METHODS)
def test_whatever_a_call_brings_it_ends_with_a_proper_status(
    path: str, channel: grpc.Channel, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    method = METHODS[path]
    calls = channel.stream_stream(path)  # a stream of one message is, on the wire, that message
    counts = st.integers(0, 4) if method.client_streaming else st.just(1)
    messages_of_call = counts.flatmap(lambda count: st.lists(bodies(method), min_size=count, max_size=count))

    @settings(
        max_examples=CASES // len(METHODS) + 1 if CASES else 150,
        deadline=None,
        derandomize=not CASES,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(messages_of_call, metadata)
    def cases(requests: list[bytes], brought: list[tuple[str, Any]]) -> None:
        call = calls(iter(requests), timeout=HANG_S, metadata=brought)
        answers = []
        with contextlib.suppress(grpc.RpcError):  # `call` has its status
            answers.extend(call)
        code, said = call.code(), dict(call.trailing_metadata())
        assert code in PROPER, (code, call.details())
        assert code is grpc.StatusCode.OK or said.get(ERROR_KEY), (code, call.details())  # it is the server's own
        for answer in answers:
            check_answer(method, answer)
        if code is grpc.StatusCode.OK:
            assert len(answers) == (len(requests) if method.client_streaming else 1)

    cases()
    assert client.predict(IMAGES[0]).prediction.width == 97
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@settings(max_examples=100 if CASES else 25, deadline=None, derandomize=not CASES, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.booleans(), mutated(st.just(bytes.fromhex("00000004000000000000000401000000010000000000"))))
def test_bytes_that_are_no_http_harm_nobody(address: str, client: Client, preface: bool, data: bytes) -> None:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=HANG_S) as connection:
        connection.sendall((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if preface else b"") + data)
    assert client.predict(IMAGES[0]).prediction.width == 97


def test_a_message_that_is_one_for_sure_is_not_refused(channel: grpc.Channel) -> None:
    """Else the cases above could pass because nothing ever gets far."""
    request = pb.PredictRequest(image=IMAGES[2])
    response = pb.PredictResponse.FromString(channel.unary_unary(PREDICT)(request.SerializeToString()))
    assert (response.prediction.width, response.prediction.height) == (50, 40)
    with pytest.raises(DecodeError):
        pb.PredictRequest.FromString(b"\xff")
