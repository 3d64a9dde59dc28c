"""PredictStream and PredictStudy: several images in one call, and what one of them meets is its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import grpc
import numpy as np
import pytest
from PIL import Image

from thoraxrt.engine.errors import ImageFormatError, ModelNotFoundError, RequestError
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.proto.v1 import thoraxrt_pb2_grpc
from thoraxrt.server import service
from thoraxrt.server.batching import BatchingOptions
from thoraxrt.server.models import Loaded
from thoraxrt.server.serve import OneModel, ServeOptions, running_server
from thoraxrt.server.service import STREAM_IMAGES, STUDY_IMAGES
from thoraxrt.server.status import ERROR_KEY, PUSHBACK_KEY
from thoraxrt.server.wire import answer_from_message, reply_from_message, study_from_message

AS_COMPLETED = (("thoraxrt-order", "completion"),)
STREAMS = ("/thoraxrt.v1.PredictionService/PredictStream", "/inference.GRPCInferenceService/ModelStreamInfer")


@contextmanager
def stub_of(port: int) -> Iterator[thoraxrt_pb2_grpc.PredictionServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield thoraxrt_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture
def stub(channel):
    return thoraxrt_pb2_grpc.PredictionServiceStub(channel)


def requests_of(images):
    return (pb.PredictStreamRequest(id=name, image=image) for name, image in images)


def ended(call) -> tuple[grpc.StatusCode, str, dict[str, object]]:
    """What a call ends with, whatever it answers before."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    return caught.value.code(), caught.value.details(), dict(caught.value.trailing_metadata())


class Sent:
    """Requests that a client sends one by one, as a test says, until it says no more."""

    def __init__(self) -> None:
        self._given: list[pb.PredictStreamRequest | None] = []
        self._changed = threading.Condition()
        self.taken = 0

    def give(self, *requests: pb.PredictStreamRequest | None) -> None:
        with self._changed:
            self._given.extend(requests)
            self._changed.notify()

    def __iter__(self) -> Iterator[pb.PredictStreamRequest]:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._given, timeout=20):
                    return
                request = self._given.pop(0)
            if request is None:
                return
            self.taken += 1
            yield request


@pytest.mark.parametrize("metadata", [(), (("thoraxrt-order", "request"),), AS_COMPLETED])
def test_a_streams_answers_are_the_engines(stub, engine, radiograph, metadata):
    images = {str(seed): radiograph(seed, width=100 + seed) for seed in range(50)}
    answers = list(stub.PredictStream(requests_of(images.items()), timeout=20, metadata=metadata))
    names = [answer.answer.id for answer in answers]
    assert sorted(names, key=int) == list(images)
    if metadata != AS_COMPLETED:
        assert names == list(images)
    for answer in answers:
        reply = reply_from_message(answer.answer.response)
        assert reply.prediction.to_dict() == engine.predict_one(images[answer.answer.id]).to_dict()
        assert reply.manifest_sha256 == engine.bundle.sha256


def test_an_image_of_a_stream_has_its_own_options(stub, engine, radiograph):
    image = radiograph(1)
    chosen = pb.PredictOptions(boxes_for=pb.FindingSelection(findings=["Nodule"]), cam=True, overlay=True)
    sent = [pb.PredictStreamRequest(image=image, options=chosen), pb.PredictStreamRequest(image=image)]
    first, second = (answer.answer.response for answer in stub.PredictStream(iter(sent), timeout=20))
    local = engine.predict_one(image, findings=["Nodule"], cam=True)
    assert reply_from_message(first).prediction.to_dict() == local.to_dict()
    assert reply_from_message(first).prediction.cam.tobytes() == local.cam.tobytes()
    assert first.overlay_png.startswith(b"\x89PNG")
    assert not second.overlay_png
    assert not second.HasField("cam")


def test_a_bad_image_gets_its_own_status_and_the_stream_goes_on(stub, engine, radiograph):
    unknown = pb.PredictOptions(boxes_for=pb.FindingSelection(findings=["Fracture"]))
    sent = [
        pb.PredictStreamRequest(id="a", image=radiograph(0)),
        pb.PredictStreamRequest(id="b", image=b"patient: J. Doe"),
        pb.PredictStreamRequest(id="c", image=radiograph(0), options=unknown),
        pb.PredictStreamRequest(id="d", image=radiograph(1)),
    ]
    a, b, c, d = (answer.answer for answer in stub.PredictStream(iter(sent), timeout=20))
    assert [a.id, b.id, c.id, d.id] == ["a", "b", "c", "d"]
    for seed, answer in ((0, a), (1, d)):
        reply = reply_from_message(answer.response)
        assert reply.prediction.to_dict() == engine.predict_one(radiograph(seed)).to_dict()
    with pytest.raises(ImageFormatError) as local:
        engine.predict_one(b"patient: J. Doe")
    assert (b.failure.code, b.failure.error, b.failure.message) == (3, "ImageFormatError", str(local.value))
    assert (c.failure.code, c.failure.error) == (3, "RequestError")
    assert answer_from_message(c).details.startswith("unknown finding Fracture")


def test_a_fault_on_one_image_is_its_answer_and_stays_unsaid(gated_engine, gate, radiograph, caplog):
    with running_server(gated_engine) as port, stub_of(port) as stub:
        sent = Sent()
        call = stub.PredictStream(iter(sent), timeout=20)
        gate.error = ValueError("patient J. Doe")
        sent.give(pb.PredictStreamRequest(image=radiograph(0)))
        failure = next(call).answer.failure
        assert (failure.code, failure.error) == (13, "")
        gate.error = None
        sent.give(pb.PredictStreamRequest(image=radiograph(0)), None)
        assert next(call).answer.response.prediction.width == 97
        assert list(call) == []
    assert "Doe" not in failure.message + caplog.text


def test_answers_come_as_they_are_there_or_in_order(gated_engine, gate, radiograph):
    """The first image is held in the network, and the second one cannot be decoded."""
    with running_server(gated_engine) as port, stub_of(port) as stub:
        for metadata, expected in ((AS_COMPLETED, ["bad", "held"]), ((), ["held", "bad"])):
            gate.shut()
            sent = Sent()
            call = stub.PredictStream(iter(sent), timeout=20, metadata=metadata)
            sent.give(pb.PredictStreamRequest(id="held", image=radiograph(0)))
            assert gate.entered.acquire(timeout=20)
            sent.give(pb.PredictStreamRequest(id="bad"), None)
            if metadata == AS_COMPLETED:
                answers = [next(call)]
                gate.open()
            else:
                answers = []
                threading.Timer(0.2, gate.open).start()
            answers += list(call)
            assert [answer.answer.id for answer in answers] == expected


def test_a_stream_reads_no_more_than_it_may_have_in_flight(gated_engine, gate, radiograph, told):
    image = radiograph(0, width=600, height=600, kind="PNG") + bytes(400_000)  # beyond what flow control lets wait
    with running_server(gated_engine, telemetry=told) as port, stub_of(port) as stub:
        gate.shut()
        sent = Sent()
        sent.give(*(pb.PredictStreamRequest(id=str(i), image=image) for i in range(100)), None)
        call = stub.PredictStream(iter(sent), timeout=30)
        told.wait_for("queue", STREAM_IMAGES)
        time.sleep(0.2)
        assert STREAM_IMAGES <= sent.taken <= STREAM_IMAGES + 4  # what is on the way
        assert told.heard("queue").count(STREAM_IMAGES + 1) == 0
        gate.open()
        assert [answer.answer.id for answer in call] == [str(i) for i in range(100)]


def test_a_client_that_does_not_read_is_sent_no_more_than_may_be_in_flight(engine):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    request = pb.PredictStreamRequest(image=file.getvalue(), options=pb.PredictOptions(overlay=True))
    with running_server(engine) as port:
        small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", small) as channel:
            stub = thoraxrt_pb2_grpc.PredictionServiceStub(channel)
            sent = Sent()
            sent.give(*[request] * 90, None)
            call = stub.PredictStream(iter(sent), timeout=30)
            until = time.monotonic() + 10
            before = -1
            while before != sent.taken and time.monotonic() < until:
                before = sent.taken
                time.sleep(0.5)
            assert sent.taken < STREAM_IMAGES + 16  # and what was written before the client's window was full
            answers = [answer.answer.response for answer in call]
            assert len(answers) == 90
            assert all(len(answer.overlay_png) > 100_000 for answer in answers)


def test_a_client_that_vanishes_frees_everything(gated_engine, gate, radiograph, told):
    model = OneModel(gated_engine, told, BatchingOptions(max_per_client=STREAM_IMAGES, max_images=STREAM_IMAGES))
    with running_server(model, telemetry=told) as port:
        gate.shut()
        with stub_of(port) as stub:
            call = stub.PredictStream(requests_of(("", radiograph(i)) for i in range(100)), timeout=20)
            told.wait_for("queue", STREAM_IMAGES)
            call.cancel()
        told.wait_for("answered", "CANCELLED")
        gate.open()
        with stub_of(port) as stub:  # there is room for as many again
            answers = list(stub.PredictStream(requests_of(("", radiograph(i)) for i in range(100)), timeout=20))
        assert all(answer.answer.HasField("response") for answer in answers)
        assert gate.runs < 10 + 100


def test_a_message_that_is_none_ends_its_stream(channel, stub, radiograph):
    call = channel.stream_stream("/thoraxrt.v1.PredictionService/PredictStream")(iter([b"\xff\xff"]), timeout=20)
    code, details, metadata = ended(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "not what" in details
    assert metadata[ERROR_KEY] == "RequestError"
    assert len(list(stub.PredictStream(requests_of([("", radiograph(0))]), timeout=20))) == 1


@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("thoraxrt-order", "random", grpc.StatusCode.INVALID_ARGUMENT, "expected request or completion"),
        ("thoraxrt-priority", "urgent", grpc.StatusCode.INVALID_ARGUMENT, "expected routine or stat"),
        ("thoraxrt-model-version", "-1", grpc.StatusCode.INVALID_ARGUMENT, "expected a whole number"),
        ("thoraxrt-model-version", "2", grpc.StatusCode.NOT_FOUND, "no such model"),
        ("thoraxrt-model", "other", grpc.StatusCode.NOT_FOUND, "no such model"),
    ],
)
def test_metadata_that_means_nothing_ends_a_call(stub, radiograph, key, value, code, words):
    request = pb.PredictStreamRequest(image=radiograph(0))
    found = ended(stub.PredictStream(iter([request]), timeout=20, metadata=[(key, value)]))
    assert found[0] is code
    assert words in found[1]


def test_metadata_names_model_version_and_priority(stub, radiograph):
    said = [("thoraxrt-model", "default"), ("thoraxrt-model-version", "1"), ("thoraxrt-priority", "stat")]
    assert stub.Predict(pb.PredictRequest(image=radiograph(0)), timeout=20, metadata=said).prediction.width == 97


def test_a_full_queue_slows_a_stream_and_loses_nothing_of_it(gated_engine, gate, radiograph, told):
    model = OneModel(gated_engine, told, BatchingOptions(max_images=2, max_per_client=2))
    with running_server(model, telemetry=told) as port, stub_of(port) as stub:
        gate.shut()
        call = stub.PredictStream(requests_of((str(i), radiograph(i)) for i in range(20)), timeout=20)
        told.wait_for("queue", 2)
        time.sleep(0.3)  # the third one asks for room meanwhile
        gate.open()
        answers = [answer.answer for answer in call]
        assert [answer.id for answer in answers] == [str(i) for i in range(20)]
        assert all(answer.HasField("response") for answer in answers)
        assert told.heard("refused") == []


def test_an_image_of_a_stream_that_finds_no_room_in_time_is_told_so(gated_engine, gate, radiograph, told, monkeypatch):
    monkeypatch.setattr(service, "_PATIENCE_S", 0.3)
    model = OneModel(gated_engine, told, BatchingOptions(max_images=1, max_per_client=1))
    with running_server(model, telemetry=told) as port, stub_of(port) as stub:
        gate.shut()
        call = stub.PredictStream(requests_of([("in", radiograph(0)), ("out", radiograph(1))]), metadata=AS_COMPLETED)
        out = next(call).answer
        assert (out.id, out.failure.code, out.failure.error) == ("out", 8, "OverloadedError")
        assert out.failure.retry_after_ms >= 1
        gate.open()
        assert next(call).answer.id == "in"
    assert told.heard("refused") == ["images"]  # once, however often it asked


@pytest.mark.parametrize("limit", ["_STREAMS", "_CLIENT_STREAMS"])
@pytest.mark.parametrize("path", STREAMS)
def test_more_streams_than_may_be_open_are_refused(engine, radiograph, told, monkeypatch, path, limit):
    monkeypatch.setattr(service, limit, 1)
    first = Sent()
    with running_server(engine, telemetry=told) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = thoraxrt_pb2_grpc.PredictionServiceStub(channel)
        open_ = stub.PredictStream(iter(first), timeout=20)
        first.give(pb.PredictStreamRequest(image=radiograph(0)))
        next(open_)
        code, details, metadata = ended(channel.stream_stream(path)(iter(()), timeout=20))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details.startswith(f"1 streams{' of this client' * (limit == '_CLIENT_STREAMS')} are open")
        assert metadata[PUSHBACK_KEY] == "1000"
        assert told.heard("refused") == ["streams"]
        first.give(None)
        assert list(open_) == []
        assert list(channel.stream_stream(path)(iter(()), timeout=20)) == []


@pytest.mark.parametrize("path", STREAMS)
def test_an_idle_stream_is_ended(channel, monkeypatch, path):
    monkeypatch.setattr(service, "_IDLE_S", 0.1)
    sent = Sent()
    code, details, _ = ended(channel.stream_stream(path)(iter(sent), timeout=20))
    sent.give(None)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "no image came for 0.1 s" in details


@pytest.mark.parametrize("path", STREAMS)
def test_a_stop_ends_an_idle_stream_at_once(engine, told, path):
    sent, stack = Sent(), contextlib.ExitStack()
    port = stack.enter_context(running_server(engine, ServeOptions(port=0, grace_s=20), told))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(path)(iter(sent), timeout=30)
        told.wait_for("begun", path)
        began = time.monotonic()
        stack.close()
        assert time.monotonic() - began < 10
        code, details, _ = ended(call)
        sent.give(None)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "send the others again" in details


def test_answers_that_nobody_reads_keep_no_model(engine, told):
    """A reload waits for those who use the model, not for a client to read."""

    class Counting(OneModel):
        users = 0

        @contextmanager
        def lease(self, name: str | None = None, version: int | None = None) -> Iterator[Loaded]:
            self.users += 1
            try:
                with super().lease(name, version) as loaded:
                    yield loaded
            finally:
                self.users -= 1

    model, image = Counting(engine), BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8)).save(image, "PNG")
    sent = Sent()
    small = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    with running_server(model, telemetry=told) as port, grpc.insecure_channel(f"127.0.0.1:{port}", small) as channel:
        call = thoraxrt_pb2_grpc.PredictionServiceStub(channel).PredictStream(iter(sent), timeout=30)
        options = pb.PredictOptions(overlay=True)
        sent.give(*[pb.PredictStreamRequest(image=image.getvalue(), options=options)] * STREAM_IMAGES, None)
        for _ in range(STREAM_IMAGES):
            told.wait_for("stage", "draw")
        until = time.monotonic() + 10
        while model.users and time.monotonic() < until:
            time.sleep(0.05)
        assert model.users == 0
        assert told.heard("stage").count("write") < STREAM_IMAGES  # the others wait for the client
        assert len(list(call)) == STREAM_IMAGES


def test_a_stop_answers_what_a_stream_has_and_takes_no_more(gated_engine, gate, radiograph):
    stopped = threading.Event()
    sent = Sent()

    def stop() -> None:
        serving.__exit__(None, None, None)
        stopped.set()

    serving = running_server(gated_engine, ServeOptions(port=0, grace_s=20))
    with stub_of(serving.__enter__()) as stub:
        gate.shut()
        call = stub.PredictStream(iter(sent), timeout=20)
        sent.give(pb.PredictStreamRequest(id="held", image=radiograph(0)))
        assert gate.entered.acquire(timeout=20)
        stopping = threading.Thread(target=stop)
        stopping.start()
        assert not stopped.wait(0.2)
        gate.open()
        assert next(call).answer.response.prediction.width == 97
        code, details, _ = ended(call)
        sent.give(None)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "send the others again" in details
        assert stopped.wait(10)
        stopping.join()


def test_a_model_that_goes_takes_no_image_along_that_a_stream_has_given(gated_engine, gate, radiograph, told):
    class Going(OneModel):
        gone = False

        @contextmanager
        def lease(self, name: str | None = None, version: int | None = None) -> Iterator[Loaded]:
            if self.gone:
                told.refused("", "gone")
                raise ModelNotFoundError("it has been unloaded")
            with super().lease(name, version) as loaded:
                yield loaded

    model, sent = Going(gated_engine), Sent()
    with running_server(model) as port, stub_of(port) as stub:
        gate.shut()
        call = stub.PredictStream(iter(sent), timeout=20)
        sent.give(pb.PredictStreamRequest(id="held", image=radiograph(0)))
        assert gate.entered.acquire(timeout=20)
        model.gone = True
        sent.give(pb.PredictStreamRequest(id="late", image=radiograph(1)), None)
        told.wait_for("refused", "gone")
        gate.open()
        assert next(call).answer.response.prediction.width == 97
        assert ended(call)[0] is grpc.StatusCode.NOT_FOUND


# Studies


def study_of(*images: bytes, **options: object) -> pb.PredictStudyRequest:
    sent = [pb.StudyImage(id=f"image {i}", image=image) for i, image in enumerate(images)]
    return pb.PredictStudyRequest(images=sent, options=pb.PredictOptions(**options))


def test_a_study_is_its_images_and_the_highest_of_each_finding(stub, engine, radiograph):
    images = [radiograph(seed, width=100 + 9 * seed) for seed in range(STUDY_IMAGES)]
    message = stub.PredictStudy(study_of(*images), timeout=20)
    assert [answer.id for answer in message.answers] == [f"image {i}" for i in range(STUDY_IMAGES)]
    study = study_from_message(message)
    local = [engine.predict_one(image) for image in images]
    assert [answer.prediction.to_dict() for answer in study.answers] == [p.to_dict() for p in local]
    assert study.manifest_sha256 == engine.bundle.sha256
    assert len({finding.image for finding in study.findings}) > 1, "one image that has it all would prove little"
    for index, finding in enumerate(study.findings):
        column = [prediction.findings[index] for prediction in local]
        assert finding.finding == column[0].finding
        assert finding.probability == max(answer.probability for answer in column)
        assert column[finding.image].probability == finding.probability
        assert finding.reported == any(answer.reported for answer in column)


def test_an_image_of_a_study_that_cannot_be_answered_harms_no_other(stub, engine, radiograph):
    study = study_from_message(stub.PredictStudy(study_of(b"", radiograph(0)), timeout=20))
    assert study.answers[0].code is grpc.StatusCode.INVALID_ARGUMENT
    assert study.answers[1].prediction.to_dict() == engine.predict_one(radiograph(0)).to_dict()
    assert {finding.image for finding in study.findings} == {1}


@pytest.mark.parametrize("count", [0, STUDY_IMAGES + 1])
def test_a_study_has_at_least_one_and_not_too_many_images(stub, radiograph, count):
    with pytest.raises(grpc.RpcError, match=f"the study has {count} images; expected 1 to 16") as caught:
        stub.PredictStudy(study_of(*[radiograph(0)] * count), timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_studys_unknown_finding_is_the_whole_calls(stub, radiograph):
    chosen = pb.FindingSelection(findings=["Fracture"])
    with pytest.raises(grpc.RpcError, match="unknown finding Fracture") as caught:
        stub.PredictStudy(study_of(radiograph(0), boxes_for=chosen), timeout=20)
    assert dict(caught.value.trailing_metadata())[ERROR_KEY] == RequestError.__name__


def test_a_study_that_does_not_fit_is_refused_whole_and_leaves_no_trace(engine, radiograph):
    model = OneModel(engine, batching=BatchingOptions(max_images=4, max_per_client=4))
    with running_server(model) as port, stub_of(port) as stub:
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                stub.PredictStudy(study_of(*[radiograph(0)] * 5), timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(stub.PredictStudy(study_of(*[radiograph(0)] * 4), timeout=20).findings) == 3


# Overlays


@pytest.fixture
def pen(monkeypatch):
    """What overlays wait for to be drawn."""
    down, draw = threading.Event(), service._draw
    monkeypatch.setattr(service, "_draw", lambda *given: draw(*given) if down.wait(20) else b"")
    yield down
    down.set()


def test_no_more_overlays_wait_to_be_drawn_than_images_in_the_queue(engine, radiograph, told, pen):
    model = OneModel(engine, told, BatchingOptions(max_images=2, max_per_client=2))
    asked = pb.PredictRequest(image=radiograph(0), options=pb.PredictOptions(overlay=True))
    with running_server(model, telemetry=told) as port, stub_of(port) as stub:
        calls = [stub.Predict.future(asked, timeout=20) for _ in range(2)]
        for _ in calls:
            told.wait_for("stage", "network")
        for method, request in ((stub.Predict, asked), (stub.PredictStudy, study_of(radiograph(0), overlay=True))):
            with pytest.raises(grpc.RpcError, match="2 overlays wait to be drawn") as caught:
                method(request, timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(dict(caught.value.trailing_metadata())[PUSHBACK_KEY]) >= 1
            told.wait_for("refused", "drawing")
        assert stub.Predict(pb.PredictRequest(image=radiograph(0)), timeout=20).prediction.width == 97
        pen.set()
        assert all(call.result().overlay_png for call in calls)
        assert stub.Predict(asked, timeout=20).overlay_png


def test_an_overlay_is_given_up_at_the_deadline_and_refused_where_it_would_miss_it(engine, radiograph, told, pen):
    model = OneModel(engine, told, BatchingOptions(longest_deadline_s=2.0))
    asked = pb.PredictRequest(image=radiograph(0), options=pb.PredictOptions(overlay=True))
    with running_server(model, telemetry=told) as port, stub_of(port) as stub:
        for call in [stub.Predict.future(asked, timeout=20) for _ in range(2)]:
            with pytest.raises(grpc.RpcError, match="the overlay would come after the deadline") as caught:
                call.result()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert told.heard("refused") == ["expired"] * 2
        pen.set()
        assert stub.Predict(asked, timeout=20).overlay_png  # by now the first has been drawn, and took two seconds
        pen.clear()
        calls = [stub.Predict.future(asked, timeout=20) for _ in range(2)]
        told.wait_for("refused", "drawing")
        pen.set()
        assert sorted(call.code().name for call in calls) == ["OK", "RESOURCE_EXHAUSTED"]


def test_overlays_slow_a_stream_and_lose_nothing_of_it(engine, radiograph, told, pen):
    model = OneModel(engine, told, BatchingOptions(max_images=2, max_per_client=2))
    with running_server(model, telemetry=told) as port, stub_of(port) as stub:
        options = pb.PredictOptions(overlay=True)
        sent = (pb.PredictStreamRequest(id=str(i), image=radiograph(i), options=options) for i in range(12))
        call = stub.PredictStream(sent, timeout=20)
        for _ in range(2):
            told.wait_for("stage", "network")
        time.sleep(0.3)  # the third one asks for room meanwhile
        pen.set()
        answers = [answer.answer for answer in call]
        assert [answer.id for answer in answers] == [str(i) for i in range(12)]
        assert all(answer.response.overlay_png for answer in answers)
        assert told.heard("refused") == []
