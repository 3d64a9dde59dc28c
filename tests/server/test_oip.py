"""The Open Inference Protocol: tritonclient itself in a process of its own (it registers the same message names), and raw calls."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor

from tests.server.conftest import Gate, Told
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import ThreadDecoder, decode
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import BundleError
from thoraxrt.engine.execute import NetworkInput
from thoraxrt.engine.preprocess import network_input
from thoraxrt.proto.oip import open_inference_pb2 as pb
from thoraxrt.proto.oip import open_inference_pb2_grpc
from thoraxrt.server.audit import AuditLog, AuditOptions, verify
from thoraxrt.server.batching import BatchingOptions
from thoraxrt.server.decoding import ProcessDecoder
from thoraxrt.server.models import EngineOptions, Models
from thoraxrt.server.serve import OneModel, ServeOptions, running_server
from thoraxrt.server.telemetry import Telemetry

CODE = grpc.StatusCode


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a model repository: `tiny`, version 3."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / "tiny").mkdir()
    (repository / "tiny" / "3").symlink_to(tiny_bundle.path)
    telemetry = Telemetry()
    with ProcessDecoder(workers=1) as decoder:
        models = Models(repository, decoder, BatchingOptions(), telemetry, engine=EngineOptions(backend="onnxruntime"))
        with running_server(models, ServeOptions(port=0, grace_s=5.0), telemetry) as port:
            yield f"127.0.0.1:{port}"


@pytest.fixture
def stub(served: str) -> Iterator[open_inference_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(served) as channel:
        yield open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


SCRIPT = """
import asyncio, json, queue, sys
import numpy as np
import tritonclient.grpc as t
import tritonclient.grpc.aio as ta
address, *files = sys.argv[1:]
data = [open(file, "rb").read() for file in files]
said = {}
def given(client_module, images):
    tensor = client_module.InferInput("image_bytes", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=np.object_))
    return [tensor]
def taken(result):
    names = ("logits", "probabilities", "boxes", "box_count")
    return {name: result.as_numpy(name).tolist() for name in names if result.as_numpy(name) is not None}
with t.InferenceServerClient(address) as client:
    said["live"] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready("tiny"), client.is_model_ready("no")]
    said["server"] = client.get_server_metadata(as_json=True)
    said["model"] = client.get_model_metadata("tiny", as_json=True)
    said["config"] = client.get_model_config("tiny", as_json=True)
    said["index"] = client.get_model_repository_index(as_json=True)
    said["infer"] = taken(client.infer("tiny", given(t, data)))
    wanted = [t.InferRequestedOutput("box_count")]
    said["one"] = taken(client.infer("tiny", given(t, data[:1]), outputs=wanted, model_version="3", priority=1, timeout=5000000))
    try:
        client.infer("tiny", given(t, [b"no image"] + data))
    except t.InferenceServerException as error:
        said["bad"] = [error.status(), error.message()]
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for index, image in enumerate([*data, b"no image"]):
        client.async_stream_infer("tiny", given(t, [image]), request_id=str(index))
    stream = [answers.get(timeout=30) for _ in range(len(data) + 1)]
    client.stop_stream()
    said["stream"] = {result.get_response().id: taken(result) for result, error in stream if error is None}
    said["stream_errors"] = [error.message() for _, error in stream if error is not None]
    client.unload_model("tiny")
    said["unloaded"] = client.is_model_ready("tiny")
    client.load_model("tiny")
    said["loaded"] = client.is_model_ready("tiny")
    said["statistics"] = client.get_inference_statistics("tiny", as_json=True)
async def later():
    async with ta.InferenceServerClient(address) as client:
        results = await asyncio.gather(*(client.infer("tiny", given(ta, [image])) for image in data))
        return [taken(result) for result in results]
said["aio"] = asyncio.run(later())
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def images(radiograph: Callable[..., bytes]) -> list[bytes]:
    return [radiograph(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def said(served: str, images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{index}.png" for index in range(len(images))]
    for file, data in zip(files, images, strict=True):
        file.write_bytes(data)
    code = [sys.executable, "-c", SCRIPT, served, *map(str, files)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


def expected(engine: Engine, images: list[bytes]) -> list[dict[str, Any]]:
    labels = engine.manifest.labels
    answers = []
    for data in images:
        prediction = engine.predict_one(data)
        boxes = [[labels.index(b.finding), b.x, b.y, b.width, b.height, b.score] for b in prediction.boxes]
        answers.append(
            {
                "logits": [finding.logit for finding in prediction.findings],
                "probabilities": [finding.probability for finding in prediction.findings],
                "boxes": boxes,
                "box_count": len(boxes),
            }
        )
    return answers


def test_tritonclient_gets_what_the_engine_gives(said: dict[str, Any], engine: Engine, images: list[bytes]) -> None:
    right = expected(engine, images)
    for name in ("logits", "probabilities"):
        np.testing.assert_array_equal(
            np.array(said["infer"][name], np.float32), np.array([r[name] for r in right], np.float32)
        )
    assert said["infer"]["box_count"] == [r["box_count"] for r in right]
    assert max(said["infer"]["box_count"]) > 0
    for rows, one in zip(said["infer"]["boxes"], right, strict=True):
        count = one["box_count"]
        np.testing.assert_array_equal(np.array(rows[:count], np.float32), np.array(one["boxes"], np.float32))
        assert all(row == [-1] * 6 for row in rows[count:])
    assert said["one"] == {"box_count": [right[0]["box_count"]]}
    for answers in ([said["stream"][str(index)] for index in range(3)], said["aio"]):
        assert [answer["logits"][0] for answer in answers] == said["infer"]["logits"]


def test_tritonclient_sees_the_server_and_its_models(said: dict[str, Any], tiny_bundle: Bundle) -> None:
    assert said["live"] == [True, True, True, False]
    assert said["server"]["name"] == "thoraxrt"
    labels, size = len(tiny_bundle.manifest.labels), tiny_bundle.manifest.preprocess.input_size
    assert said["model"]["versions"] == ["3"]
    shapes = {t["name"]: (t["datatype"], t["shape"]) for t in said["model"]["inputs"] + said["model"]["outputs"]}
    assert shapes == {
        "image_bytes": ("BYTES", ["-1"]),
        "image": ("UINT8", ["-1", "1", str(size), str(size)]),
        "logits": ("FP32", ["-1", str(labels)]),
        "probabilities": ("FP32", ["-1", str(labels)]),
        "boxes": ("FP32", ["-1", "-1", "6"]),
        "box_count": ("INT32", ["-1"]),
    }
    config = said["config"]["config"]
    assert config["max_batch_size"] >= 1
    assert [tensor["data_type"] for tensor in config["input"]] == ["TYPE_STRING", "TYPE_UINT8"]
    assert said["index"]["models"] == [{"name": "tiny", "version": "3", "state": "READY"}]


def test_tritonclient_gets_errors_that_name_the_image(said: dict[str, Any]) -> None:
    status, message = said["bad"]
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith("image 0: ")
    (streamed,) = said["stream_errors"]
    assert "neither PNG, JPEG nor DICOM" in streamed


def test_tritonclient_unloads_and_loads_a_model(said: dict[str, Any]) -> None:
    assert said["unloaded"] is False
    assert said["loaded"] is True
    (statistics,) = said["statistics"]["model_stats"]
    assert int(statistics["inference_count"]) == 3 + 1 + 3
    assert int(statistics["inference_stats"]["success"]["count"]) == 5
    assert int(statistics["inference_stats"]["fail"]["count"]) == 2
    assert int(statistics["inference_stats"]["compute_infer"]["ns"]) > 0


def request(**fields: Any) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(model_name="tiny", **fields)


def raw(*images: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def tensor(name: str, kind: str, shape: list[int], **fields: Any) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(name=name, datatype=kind, shape=shape, **fields)


def test_contents_may_be_typed_or_raw_and_geometry_the_clients(stub: Any, engine: Engine, images: list[bytes]) -> None:
    typed = pb.InferTensorContents(bytes_contents=images)
    one = stub.ModelInfer(request(inputs=[tensor("image_bytes", "BYTES", [3], contents=typed)]))
    other = stub.ModelInfer(request(inputs=[tensor("image_bytes", "BYTES", [3])], raw_input_contents=[raw(*images)]))
    assert one.raw_output_contents == other.raw_output_contents
    assert {k: v.string_param for k, v in one.parameters.items()} == {
        "manifest_sha256": engine.bundle.sha256, "backend": "onnxruntime", "precision": "fp32"
    }  # fmt: skip
    spec = engine.manifest.preprocess
    inputs = np.stack([network_input(decode(image).pixels, spec) for image in images])  # (N, 1, S, S)
    shape = list(inputs.shape)
    ready = stub.ModelInfer(request(inputs=[tensor("image", "UINT8", shape)], raw_input_contents=[inputs.tobytes()]))
    numbers = pb.InferTensorContents(uint_contents=inputs.reshape(-1).tolist())
    same = stub.ModelInfer(request(inputs=[tensor("image", "UINT8", shape, contents=numbers)]))
    assert ready.raw_output_contents == same.raw_output_contents
    assert ready.raw_output_contents[:2] == one.raw_output_contents[:2]  # logits and probabilities
    own = engine.predict_batch([NetworkInput(array[0]) for array in inputs])
    boxes = np.frombuffer(ready.raw_output_contents[2], "<f4").reshape(list(ready.outputs[2].shape))
    for rows, answer in zip(boxes, own, strict=True):
        for row, box in zip(rows, answer.boxes, strict=False):
            np.testing.assert_array_equal(row[1:], np.array([box.x, box.y, box.width, box.height, box.score], "<f4"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": []}, "0 inputs; expected one"),
        ({"inputs": [tensor("pixels", "BYTES", [1])]}, "'pixels'; expected image_bytes or image"),
        ({"inputs": [tensor("image_bytes", "FP32", [1])]}, "expected BYTES [N]"),
        ({"inputs": [tensor("image_bytes", "BYTES", [0])]}, "expected BYTES [N]"),
        ({"inputs": [tensor("image_bytes", "BYTES", [1, 1])]}, "expected BYTES [N]"),
        ({"inputs": [tensor("image_bytes", "BYTES", [2])], "raw_input_contents": [raw(b"x")]}, "has 1 elements"),
        ({"inputs": [tensor("image_bytes", "BYTES", [1])], "raw_input_contents": [b"\xff\xff\xff\xff"]}, "is cut off"),
        ({"inputs": [tensor("image_bytes", "BYTES", [1])], "raw_input_contents": [b"a"]}, "is cut off"),
        ({"inputs": [tensor("image_bytes", "BYTES", [1])], "raw_input_contents": [b"", b""]}, "2 raw inputs"),
        ({"inputs": [tensor("image", "UINT8", [1, 1, 3, 3])]}, "expected UINT8 [N, 1, "),
        ({"inputs": [tensor("image_bytes", "BYTES", [1])], "outputs": [{"name": "cam"}]}, "output 'cam'"),
        ({"inputs": [tensor("image_bytes", "BYTES", [1])], "outputs": [{"name": "logits"}] * 5}, "5 outputs; expected"),
        ({"inputs": [tensor("image_bytes", "BYTES", [1000])], "raw_input_contents": [b"a"]}, "1000 images"),
        ({"inputs": [tensor("image_bytes", "BYTES", [1])], "raw_input_contents": [bytes(4_000_000)]}, "has 2 or more"),
        ({"inputs": [tensor("image", "UINT8", [1, 1, 64, 64], contents={"uint_contents": [1]})]}, "has 1 elements"),
        ({"inputs": [tensor("image", "UINT8", [1, 1, 64, 64], contents={"uint_contents": [256] * 4096})]}, "holds 256"),
        ({"parameters": {"priority": pb.InferParameter(string_param="high")}}, "priority is no whole number"),
        ({"parameters": {"boxes_for": pb.InferParameter(string_param="Gout")}}, "unknown finding Gout"),
        ({"parameters": {"boxes_for": pb.InferParameter(string_param="," * 5000)}}, "no string of 4096 characters"),
        ({"model_version": "three"}, "expected a whole number"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_what_was_expected(
    stub: Any, images: list[bytes], change: dict[str, Any], said: str
) -> None:
    good = {"inputs": [tensor("image_bytes", "BYTES", [1])], "raw_input_contents": [raw(images[0])]}
    if "inputs" in change:
        good = {}
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(request(**{**good, **change}))
    assert refused.value.code() is CODE.INVALID_ARGUMENT
    assert said in refused.value.details()


def test_models_that_are_not_there_are_not_found(stub: Any) -> None:
    for call in (
        lambda: stub.ModelMetadata(pb.ModelMetadataRequest(name="no")),
        lambda: stub.ModelConfig(pb.ModelConfigRequest(name="tiny", version="9")),
        lambda: stub.ModelStatistics(pb.ModelStatisticsRequest(name="no")),
        lambda: stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="no")),
        lambda: stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="no")),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() is CODE.NOT_FOUND


def test_the_messages_are_tritons_as_far_as_they_go() -> None:
    """Names, numbers, types and repetition of every field that we have, in a process where Triton's own are registered."""
    ours = {}

    def describe(message: Descriptor) -> None:
        for field in message.fields:
            kind = field.message_type.full_name if field.message_type else ""
            ours[f"{message.full_name}.{field.name}"] = [field.number, field.type, field.is_repeated, kind]
        for nested in message.nested_types:
            describe(nested)

    for message in pb.DESCRIPTOR.message_types_by_name.values():
        describe(message)
    code = (
        "import json, sys\n"
        "from tritonclient.grpc import model_config_pb2, service_pb2\n"
        "theirs = {}\n"
        "def describe(message):\n"
        "    for f in message.fields:\n"
        "        kind = f.message_type.full_name if f.message_type else ''\n"
        "        theirs[f'{message.full_name}.{f.name}'] = [f.number, f.type, f.is_repeated, kind]\n"
        "    for nested in message.nested_types: describe(nested)\n"
        "for file in (service_pb2, model_config_pb2):\n"
        "    for message in file.DESCRIPTOR.message_types_by_name.values(): describe(message)\n"
        "print(json.dumps(theirs))\n"
    )
    theirs = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert {name: theirs.get(name) for name in ours} == ours
    methods = [method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
    assert len(methods) == 12


def test_the_protos_comments_say_what_the_tensors_are() -> None:
    text = (Path(pb.__file__).parent / "open_inference.proto").read_text()
    for name in ("image_bytes", "image", "logits", "probabilities", "boxes", "box_count"):
        assert f"  {name} " in text


def test_a_request_is_held_no_longer_than_its_images_wait(
    gated_engine: Engine, gate: Gate, told: Told, images: list[bytes]
) -> None:
    """What the images take is bounded by the scheduler's options, a message that nobody has counted by nothing."""
    inputs = [tensor("image_bytes", "BYTES", [1])]
    data = pb.ModelInferRequest(inputs=inputs, raw_input_contents=[raw(images[0])]).SerializeToString()
    with (
        running_server(OneModel(gated_engine, told), telemetry=told) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        gate.shut()
        before = _alive()
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([data] * 8))
        told.wait_for("queue", 8)
        assert _alive() - before <= 1  # that which gRPC gave last
        gate.open()
        assert len(list(call)) == 8
        gate.shut()
        before = _alive()
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        calls = [infer.future(data) for _ in range(8)]
        told.wait_for("queue", 8)
        assert _alive() == before
        gate.open()
        assert all(answer.result() for answer in calls)


def _alive() -> int:
    return sum(type(one) is pb.ModelInferRequest for one in gc.get_objects())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("inference.GRPCInferenceService/ModelInfer", b"\x2a\x00" * 20_000),  # inputs, each of them empty
        ("inference.GRPCInferenceService/ModelInfer", b"\x2a\xc0\xb8\x02" + b"\x18\x01" * 20_000),  # one input's shape
        ("thoraxrt.v1.PredictionService/Predict", b"\x12\x00" * 20_000),
        ("thoraxrt.v1.PredictionService/PredictStudy", b"\x0a\x00" * 20_000),
    ],
)  # fmt: skip
def test_a_message_of_countless_small_fields_is_not_parsed(engine: Engine, method: str, message: bytes) -> None:
    with running_server(OneModel(engine)) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{method}")(message)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "more than 10000 fields" in refused.value.details()


def test_statistics_ask_for_nothing_but_stages_and_batches(engine: Engine, images: list[bytes]) -> None:
    telemetry, asked = Telemetry(), []
    telemetry.gpu_memory(lambda: asked.append("the GPU") or ())
    with (
        running_server(OneModel(engine, telemetry), telemetry=telemetry) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        inputs = [tensor("image_bytes", "BYTES", [2])]
        asked.clear()
        stub.ModelInfer(pb.ModelInferRequest(inputs=inputs, raw_input_contents=[raw(*images[:2])]))
        infer, until = 0, time.monotonic() + 10
        while infer < 2 and time.monotonic() < until:  # it is reported once the answers are on their way
            (model,) = stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
            infer = model.inference_stats.compute_infer.count
    stats = model.inference_stats
    assert asked == []
    assert (model.inference_count, model.execution_count) in ((2, 1), (2, 2))
    assert [part.count for part in (stats.queue, stats.compute_input, stats.compute_infer)] == [2, 2, 2]
    assert stats.compute_output.count == 1
    assert min(part.ns for part in (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)) > 0


def test_the_audit_log_says_what_was_loaded_and_unloaded(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "1").symlink_to(tiny_bundle.path)
    options = AuditOptions(path=tmp_path / "audit.jsonl")
    with ThreadDecoder(1) as decoder, AuditLog(options) as audit:
        models = Models(
            tmp_path / "models",
            decoder,
            BatchingOptions(),
            Telemetry(),
            engine=EngineOptions(backend="onnxruntime"),
        )
        with (
            running_server(models, audit=audit) as port,
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="tiny"))
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="tiny"))
            with pytest.raises(grpc.RpcError):
                stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="no"))
    assert _administered(options.path) == [
        ("RepositoryModelUnload", "tiny", None),
        ("RepositoryModelLoad", "tiny", None),
        ("RepositoryModelLoad", "no", "ModelNotFoundError"),
    ]


def test_a_load_that_nobody_waits_for_is_recorded_as_it_ends(engine: Engine, told: Told, tmp_path: Path) -> None:
    class Refusing(OneModel):
        refuse = threading.Event()

        async def load(self, name: str, version: int | None = None) -> None:
            async def change() -> None:
                await asyncio.to_thread(self.refuse.wait, 20)
                raise BundleError("it is damaged")

            await asyncio.shield(asyncio.create_task(change()))  # as Models has it

    options, model = AuditOptions(path=tmp_path / "audit.jsonl"), Refusing(engine)
    with AuditLog(options) as audit, running_server(model, telemetry=told, audit=audit) as port:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            load = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel).RepositoryModelLoad
            calling = load.future(pb.RepositoryModelLoadRequest(model_name="tiny"))
            told.wait_for("begun", "/inference.GRPCInferenceService/RepositoryModelLoad")
            time.sleep(0.2)  # until it is being changed
            calling.cancel()
            told.wait_for("answered", "CANCELLED")
        model.refuse.set()
        until = time.monotonic() + 10
        while not (lines := _administered(options.path)) and time.monotonic() < until:
            time.sleep(0.02)
    assert lines == [("RepositoryModelLoad", "tiny", "BundleError")]


def _administered(path: Path) -> list[tuple[str, str, str | None]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["method"], line["name"], line.get("error")) for line in lines if "method" in line]


def test_a_model_says_how_many_images_a_request_may_have(engine: Engine, images: list[bytes]) -> None:
    model = OneModel(engine, batching=BatchingOptions(max_images=2))
    with running_server(model) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        most = stub.ModelConfig(pb.ModelConfigRequest(name="default")).config.max_batch_size
        inputs = [tensor("image_bytes", "BYTES", [most + 1])]
        with pytest.raises(grpc.RpcError, match="expected 1 to 2"):
            stub.ModelInfer(pb.ModelInferRequest(inputs=inputs, raw_input_contents=[raw(*images[:3])]))
    assert most == 2


def test_answers_stand_in_the_audit_log(tiny_bundle: Bundle, images: list[bytes], tmp_path: Path) -> None:
    options = AuditOptions(path=tmp_path / "audit.jsonl")
    with (
        Engine.open(tiny_bundle, backend="onnxruntime") as engine,
        AuditLog(options) as audit,
        running_server(engine, audit=audit) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        call = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        inputs = [tensor("image_bytes", "BYTES", [2])]
        call(pb.ModelInferRequest(inputs=inputs, raw_input_contents=[raw(*images[:2])]))
        with pytest.raises(grpc.RpcError):
            call(pb.ModelInferRequest(inputs=inputs, raw_input_contents=[raw(images[0], b"no image")]))
    verify(options.path)
    lines = [json.loads(line) for line in options.path.read_text().splitlines()]
    recorded = [line for line in lines if line.get("method") == "ModelInfer"]
    digests = [line["input"] for line in recorded]
    assert set(digests[:2]) == {hashlib.sha256(image).hexdigest() for image in images[:2]}  # as they were answered
    assert hashlib.sha256(b"no image").hexdigest() in digests[2:]
