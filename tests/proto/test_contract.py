"""The wire contract is public: what it promises is pinned here, and its generated code is current.

A line of `CONTRACT` may be added together with a field. One that changes or goes breaks every
client that was built on it: make a v2 instead.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from thoraxrt.proto.v1 import thoraxrt_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]

CONTRACT = """
rpc PredictionService.Predict(.thoraxrt.v1.PredictRequest) returns (.thoraxrt.v1.PredictResponse)
rpc PredictionService.PredictStream(stream .thoraxrt.v1.PredictStreamRequest) returns (stream .thoraxrt.v1.PredictStreamResponse)
rpc PredictionService.PredictStudy(.thoraxrt.v1.PredictStudyRequest) returns (.thoraxrt.v1.PredictStudyResponse)
rpc PredictionService.GetModel(.thoraxrt.v1.GetModelRequest) returns (.thoraxrt.v1.GetModelResponse)
PredictRequest.image = 1: bytes
PredictRequest.options = 2: .thoraxrt.v1.PredictOptions
PredictOptions.boxes_for = 1: .thoraxrt.v1.FindingSelection
PredictOptions.overlay = 2: bool
PredictOptions.cam = 3: bool
FindingSelection.findings = 1: repeated string
PredictResponse.prediction = 1: .thoraxrt.v1.Prediction
PredictResponse.manifest_sha256 = 2: string
PredictResponse.overlay_png = 3: bytes
PredictResponse.cam = 4: .thoraxrt.v1.ClassActivationMaps
PredictStreamRequest.id = 1: string
PredictStreamRequest.image = 2: bytes
PredictStreamRequest.options = 3: .thoraxrt.v1.PredictOptions
PredictStreamResponse.answer = 1: .thoraxrt.v1.ImageAnswer
ImageAnswer.id = 1: string
ImageAnswer.response = 2: .thoraxrt.v1.PredictResponse in answer
ImageAnswer.failure = 3: .thoraxrt.v1.Failure in answer
Failure.code = 1: int32
Failure.message = 2: string
Failure.error = 3: string
Failure.retry_after_ms = 4: uint32
PredictStudyRequest.images = 1: repeated .thoraxrt.v1.StudyImage
PredictStudyRequest.options = 2: .thoraxrt.v1.PredictOptions
StudyImage.id = 1: string
StudyImage.image = 2: bytes
PredictStudyResponse.answers = 1: repeated .thoraxrt.v1.ImageAnswer
PredictStudyResponse.findings = 2: repeated .thoraxrt.v1.StudyFinding
PredictStudyResponse.manifest_sha256 = 3: string
StudyFinding.finding = 1: string
StudyFinding.probability = 2: double
StudyFinding.reported = 3: bool
StudyFinding.image = 4: uint32
Prediction.width = 1: uint32
Prediction.height = 2: uint32
Prediction.backend = 3: string
Prediction.precision = 4: string
Prediction.findings = 5: repeated .thoraxrt.v1.Finding
Prediction.boxes = 6: repeated .thoraxrt.v1.Box
Finding.finding = 1: string
Finding.probability = 2: double
Finding.logit = 3: float
Finding.reported = 4: bool
Box.finding = 1: string
Box.x = 2: double
Box.y = 3: double
Box.width = 4: double
Box.height = 5: double
Box.score = 6: double
Box.peak = 7: .thoraxrt.v1.Point
Point.x = 1: double
Point.y = 2: double
ClassActivationMaps.count = 1: uint32
ClassActivationMaps.height = 2: uint32
ClassActivationMaps.width = 3: uint32
ClassActivationMaps.values = 4: bytes
GetModelResponse.manifest_sha256 = 1: string
GetModelResponse.labels = 2: repeated string
GetModelResponse.network = 3: .thoraxrt.v1.Network
GetModelResponse.activation = 4: string
GetModelResponse.preprocess = 5: .thoraxrt.v1.Preprocess
GetModelResponse.boxes = 6: .thoraxrt.v1.BoxSpec
GetModelResponse.operating_points = 7: repeated .thoraxrt.v1.OperatingPoint
GetModelResponse.backend = 8: string
GetModelResponse.precision = 9: string
GetModelResponse.producer = 10: repeated .thoraxrt.v1.GetModelResponse.ProducerEntry
GetModelResponse.files = 11: repeated .thoraxrt.v1.GetModelResponse.FilesEntry
GetModelResponse.server_version = 12: string
GetModelResponse.activation_thresholds = 13: repeated double
GetModelResponse.ProducerEntry.key = 1: string
GetModelResponse.ProducerEntry.value = 2: string
GetModelResponse.FilesEntry.key = 1: string
GetModelResponse.FilesEntry.value = 2: .thoraxrt.v1.File
Network.name = 1: string
Network.cam_height = 2: uint32
Network.cam_width = 3: uint32
Network.bias = 4: repeated float
Network.checkpoint_sha256 = 5: string
Preprocess.exact = 1: .thoraxrt.v1.ExactSize in resize
Preprocess.shorter = 2: uint32 in resize
Preprocess.crop = 3: optional uint32
Preprocess.filter = 4: string
Preprocess.input_size = 5: uint32
Preprocess.square = 6: bool
ExactSize.width = 1: uint32
ExactSize.height = 2: uint32
BoxSpec.threshold = 1: double
BoxSpec.per_finding = 2: repeated .thoraxrt.v1.BoxSpec.PerFindingEntry
BoxSpec.min_area = 3: double
BoxSpec.max_per_finding = 4: uint32
BoxSpec.PerFindingEntry.key = 1: string
BoxSpec.PerFindingEntry.value = 2: double
OperatingPoint.finding = 1: string
OperatingPoint.probability = 2: double
OperatingPoint.method = 3: string
OperatingPoint.data = 4: optional string
OperatingPoint.sensitivity = 5: optional double
OperatingPoint.specificity = 6: optional double
File.sha256 = 1: string
File.size = 2: uint64
"""


def _methods(file: descriptor_pb2.FileDescriptorProto):
    for service in file.service:
        for method in service.method:
            sent = "stream " * method.client_streaming + method.input_type
            received = "stream " * method.server_streaming + method.output_type
            yield f"rpc {service.name}.{method.name}({sent}) returns ({received})"


def _fields(messages, prefix: str = ""):
    kinds = descriptor_pb2.FieldDescriptorProto
    for message in messages:
        for field in message.field:
            kind = field.type_name or kinds.Type.Name(field.type).removeprefix("TYPE_").lower()
            label = "repeated " if field.label == kinds.LABEL_REPEATED else "optional " * field.proto3_optional
            in_oneof = field.HasField("oneof_index") and not field.proto3_optional
            oneof = f" in {message.oneof_decl[field.oneof_index].name}" if in_oneof else ""
            yield f"{prefix}{message.name}.{field.name} = {field.number}: {label}{kind}{oneof}"
        yield from _fields(message.nested_type, f"{prefix}{message.name}.")


def test_the_contract_is_what_clients_were_built_on():
    file = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert file.package == "thoraxrt.v1"
    assert file.syntax == "proto3"
    assert [*_methods(file), *_fields(file.message_type)] == CONTRACT.split("\n")[1:-1]


def test_the_generated_code_is_current(tmp_path):
    pytest.importorskip("grpc_tools")
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, "thoraxrt/proto/v1/thoraxrt.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    made = sorted((tmp_path / "thoraxrt" / "proto" / "v1").iterdir())
    assert [file.name for file in made] == ["thoraxrt_pb2.py", "thoraxrt_pb2.pyi", "thoraxrt_pb2_grpc.py"]
    for file in made:
        committed = (ROOT / "proto" / "v1" / file.name).read_text()
        assert committed == file.read_text(), f"{file.name} is stale: run `make proto` with the pinned grpcio-tools"


def test_generated_code_runs_on_protobuf_6_and_7():
    """Gencode of 6.x runs on runtimes of 6 and 7; its gRPC stubs ask for no more than pyproject.toml does."""
    folder = ROOT / "proto" / "v1"
    assert "# Protobuf Python Version: 6.31.1\n" in (folder / "thoraxrt_pb2.py").read_text()
    assert "GRPC_GENERATED_VERSION = '1.76.0'\n" in (folder / "thoraxrt_pb2_grpc.py").read_text()
