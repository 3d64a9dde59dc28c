"""What comes back over the wire is what the engine says in process, to the last bit."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image

from thoraxrt import __version__
from thoraxrt.engine.errors import ImageFormatError, RequestError
from thoraxrt.engine.overlay import render_overlay
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server import calls
from thoraxrt.server.client import Client, Reply
from thoraxrt.server.serve import running_server
from thoraxrt.server.wire import model_from_bundle


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("seed", range(3))
def test_the_reply_is_the_engines_prediction(client, engine, radiograph, seed, kind):
    image = radiograph(seed, width=200 + seed, kind=kind)
    reply = client.predict(image)
    local = engine.predict_one(image).to_dict()
    assert reply.prediction.to_dict() == local
    assert list(reply.prediction.to_dict()) == list(local)
    assert reply.prediction.boxes, "a prediction without boxes would prove little"
    assert reply.manifest_sha256 == engine.bundle.sha256
    assert reply.overlay_png is None
    assert reply.prediction.cam is None


def test_findings_choose_the_boxes_and_all_findings_come(client, engine, radiograph):
    image = radiograph(1)
    for chosen in (("Nodule",), ("Mass", "Nodule"), (), None):
        reply = client.predict(image, findings=chosen)
        assert reply.prediction.to_dict() == engine.predict_one(image, findings=chosen).to_dict()
        assert [finding.finding for finding in reply.prediction.findings] == list(engine.manifest.labels)
    assert client.predict(image, findings=()).prediction.boxes == ()


def test_the_cam_arrives_bit_for_bit(client, engine, radiograph):
    image = radiograph(2)
    cam = client.predict(image, cam=True).prediction.cam
    local = engine.predict_one(image, cam=True).cam
    assert cam.dtype == np.float32
    assert cam.shape == (3, 8, 8)
    assert cam.tobytes() == local.tobytes()


@pytest.mark.parametrize("findings", [None, ("Mass",)])
def test_the_overlay_is_the_engines_picture(client, engine, radiograph, findings):
    image = radiograph(3)
    reply = client.predict(image, findings=findings, overlay=True)
    local = engine.predict_one(image, findings=findings, cam=True)
    expected = render_overlay(local, engine.manifest.preprocess, findings)
    with Image.open(BytesIO(reply.overlay_png), formats=["PNG"]) as picture:
        assert picture.size == (97, 120)
        assert picture.tobytes() == expected.tobytes()
    assert reply.prediction.cam is None, "the CAM was not asked for"


def test_the_model_is_the_manifest_and_what_executes_it(client, engine):
    expected = model_from_bundle(engine.bundle, backend="onnxruntime", precision="fp32", server_version=__version__)
    assert client.model() == expected


def test_a_path_is_read_by_the_client(client, engine, radiograph, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(radiograph(4))
    expected = engine.predict_one(file).to_dict()
    assert client.predict(file).prediction.to_dict() == expected
    assert client.predict(str(file)).prediction.to_dict() == expected


def test_an_unreadable_path_fails_as_it_does_in_process(client, engine):
    with pytest.raises(ImageFormatError) as here:
        engine.predict_one(Path("nowhere.png"))
    with pytest.raises(ImageFormatError) as there:
        client.predict(Path("nowhere.png"))
    assert str(there.value) == str(here.value)


def test_concurrent_requests_are_all_answered(address, engine, radiograph):
    images = [radiograph(seed) for seed in range(24)]
    expected = [engine.predict_one(image).to_dict() for image in images]
    with Client(address) as client, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(client.predict, images))
    assert [reply.prediction.to_dict() for reply in replies] == expected


def test_predict_many_answers_in_order_and_errors_keep_their_place(client, engine, radiograph, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(radiograph(5))
    images = [radiograph(0), b"not an image", file, Path("nowhere.png"), radiograph(1)]
    answers = list(client.predict_many(images, in_flight=2))
    expected = list(engine.predict(images))
    assert [str(a.prediction.to_dict()) if isinstance(a, Reply) else (type(a), str(a)) for a in answers] == [
        (type(e), str(e)) if isinstance(e, Exception) else str(e.to_dict()) for e in expected
    ]


def test_predict_many_holds_no_more_than_it_may(client, radiograph):
    drawn = 0

    def images():
        nonlocal drawn
        for seed in range(12):
            drawn += 1
            yield radiograph(seed)

    for answered, _ in enumerate(client.predict_many(images(), in_flight=3), start=1):
        assert drawn <= answered + 3
    assert drawn == answered == 12


def test_predict_many_may_be_left_early(client, radiograph):
    answers = client.predict_many((radiograph(seed) for seed in range(100)), in_flight=4)
    assert isinstance(next(answers), Reply)
    answers.close()
    assert client.predict(radiograph(0)).prediction.width == 97


def test_predict_many_refuses_what_no_image_can_satisfy(client, radiograph):
    with pytest.raises(RequestError, match="unknown finding Broken Leg"):
        list(client.predict_many([radiograph(0), radiograph(1)], findings=["Broken Leg"]))
    with pytest.raises(RequestError, match="in_flight is 0"):
        list(client.predict_many([], in_flight=0))


def test_a_client_that_knows_only_reflection_gets_findings(channel, engine, radiograph):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert "thoraxrt.v1.PredictionService" in database.get_services()
    service = DescriptorPool(database).FindServiceByName("thoraxrt.v1.PredictionService")
    method = service.methods_by_name["Predict"]
    request_type = message_factory.GetMessageClass(method.input_type)
    response_type = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=request_type.SerializeToString,
        response_deserializer=response_type.FromString,
    )
    image = radiograph(6)
    response = call(request_type(image=image), timeout=20)
    expected = engine.predict_one(image)
    assert [(f.finding, f.probability, f.logit, f.reported) for f in response.prediction.findings] == [
        (f.finding, f.probability, f.logit, f.reported) for f in expected.findings
    ]
    assert len(response.prediction.boxes) == len(expected.boxes)


PREDICT = "/thoraxrt.v1.PredictionService/Predict"


def test_bodies_come_in_by_turns(engine, radiograph, monkeypatch, told):
    monkeypatch.setattr(calls, "_READ_BYTES", 1)  # room for one of a client's
    request, ended = pb.PredictRequest(image=radiograph(0)).SerializeToString(), threading.Event()
    with running_server(engine, telemetry=told) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        first = channel.stream_unary(PREDICT).future(iter(ended.wait, True), timeout=30)  # its body does not come
        told.wait_for("begun", PREDICT)
        second = channel.unary_unary(PREDICT).future(request, timeout=30)
        told.wait_for("begun", PREDICT)
        time.sleep(0.2)
        assert told.heard("stage") == []
        first.cancel()
        assert pb.PredictResponse.FromString(second.result()).prediction.width == 97
        ended.set()


def test_an_image_is_predicted_while_the_calls_end_is_awaited(gated_engine, gate, radiograph, told):
    """A client that says so late that there is no second message waits for nothing but that."""
    request = pb.PredictRequest(image=radiograph(0)).SerializeToString()
    with running_server(gated_engine, telemetry=told) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for more, error in (((), None), ((request,), "the call brought several messages; expected one")):
            gate.shut()
            said = threading.Event()

            def sent(more=more, said=said):
                yield request
                assert said.wait(20)
                yield from more

            call = channel.stream_unary(PREDICT).future(sent(), timeout=30)
            assert gate.entered.acquire(timeout=20)
            gate.open()
            said.set()
            if error:
                assert call.exception(timeout=20).code() is grpc.StatusCode.INVALID_ARGUMENT
                assert call.exception().details() == error
            else:
                assert pb.PredictResponse.FromString(call.result()).prediction.width == 97
