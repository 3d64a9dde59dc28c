"""Types to messages and back, where a call over the wire does not reach."""

from __future__ import annotations

import grpc
import msgspec
import numpy as np
import pytest

from thoraxrt.engine.engine import Prediction
from thoraxrt.engine.errors import OverloadedError, ThoraxrtError
from thoraxrt.engine.postprocess import Finding, Sigmoid, SigmoidOpNorm, Softmax
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server.status import fault, status_from_error
from thoraxrt.server.wire import (
    Options,
    Reply,
    Study,
    StudyFinding,
    answer_from_message,
    message_from_answer,
    message_from_model,
    message_from_study,
    model_from_bundle,
    model_from_message,
    options_from_message,
    reply_from_message,
    request_from_image,
    request_from_stream_image,
    request_from_study,
    study_from_message,
)


@pytest.fixture
def model(tiny_bundle):
    return model_from_bundle(tiny_bundle, backend="openvino", precision="bf16", server_version="1.2.3")


@pytest.mark.parametrize(
    "spec",
    [
        PreprocessSpec(resize=Shorter(pixels=256), crop=224),
        PreprocessSpec(resize=Exact(width=512, height=512)),
        PreprocessSpec(resize=Exact(width=300, height=400), crop=224),
        PreprocessSpec(resize=Exact(width=224, height=224), square=True),
    ],
)
def test_a_model_survives_the_wire(model, spec):
    model = msgspec.structs.replace(model, preprocess=spec)
    sent = message_from_model(model).SerializeToString()
    assert model_from_message(pb.GetModelResponse.FromString(sent)) == model


@pytest.mark.parametrize("activation", [Sigmoid(), Softmax(), SigmoidOpNorm(thresholds=(0.25, 0.0398, 0.7))])
def test_an_activation_survives_the_wire(model, activation):
    model = msgspec.structs.replace(model, activation=activation)
    message = pb.GetModelResponse.FromString(message_from_model(model).SerializeToString())
    assert message.activation == {Sigmoid: "sigmoid", Softmax: "softmax"}.get(type(activation), "sigmoid_opnorm")
    assert model_from_message(message).activation == activation


def test_thresholds_belong_to_op_norm_alone(model):
    message = message_from_model(model)
    message.activation_thresholds[:] = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="thresholds"):
        model_from_message(message)
    message = message_from_model(model)
    message.activation = "sigmoid_opnorm"
    with pytest.raises(ValueError, match="thresholds"):
        model_from_message(message)


def test_an_operating_point_of_zero_is_not_an_absent_one(model):
    points = (msgspec.structs.replace(model.operating_points[0], sensitivity=0.0, data=""), *model.operating_points[1:])
    model = msgspec.structs.replace(model, operating_points=points)
    assert model_from_message(message_from_model(model)).operating_points == points


@pytest.mark.parametrize("field", ["activation", "preprocess", "operating_points"])
def test_a_description_from_the_future_is_refused_not_guessed(model, field):
    message = message_from_model(model)
    if field == "activation":
        message.activation = "softplus"
    elif field == "preprocess":
        message.preprocess.ClearField("shorter")
    else:
        message.operating_points[0].method = "oracle"
    with pytest.raises(ValueError, match=r"."):
        model_from_message(message)


@pytest.mark.parametrize("chosen", [None, (), ("Nodule",), ("Nodule", "Mass")])
@pytest.mark.parametrize("flag", [False, True])
def test_options_survive_the_wire(chosen, flag):
    options = Options(boxes_for=chosen, overlay=flag, cam=not flag)
    sent = request_from_image(b"x", options).SerializeToString()
    assert options_from_message(pb.PredictRequest.FromString(sent).options) == options


def test_absent_options_are_all_defaults():
    assert options_from_message(pb.PredictRequest(image=b"x").options) == Options()


def test_a_cam_is_little_endian_with_the_last_axis_fastest():
    values = np.arange(6, dtype="<f4").tobytes()
    message = pb.PredictResponse(cam=pb.ClassActivationMaps(count=1, height=2, width=3, values=values))
    assert reply_from_message(message).prediction.cam.tolist() == [[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize("size", [3, 20, 28])
def test_a_cam_that_is_not_its_shape_is_refused(size):
    message = pb.PredictResponse(cam=pb.ClassActivationMaps(count=1, height=2, width=3, values=bytes(size)))
    with pytest.raises(ValueError, match=r"."):
        reply_from_message(message)


def reply(*probabilities: float, reported: float = 0.5) -> Reply:
    """An answer with a label per probability, reported from `reported` on."""
    findings = tuple(
        Finding(finding=f"label {i}", probability=p, logit=0.0, reported=p >= reported)
        for i, p in enumerate(probabilities)
    )
    prediction = Prediction(width=2, height=3, backend="b", precision="fp32", findings=findings, boxes=())
    return Reply(prediction=prediction, overlay_png=None, manifest_sha256="0" * 64)


def test_a_streams_request_is_that_of_one_image_with_a_name():
    options = Options(boxes_for=("Mass",), cam=True)
    message = request_from_stream_image("a", b"x", options)
    assert (message.id, message.image, options_from_message(message.options)) == ("a", b"x", options)


def test_a_studys_request_has_its_images_in_order():
    message = request_from_study([b"x", b"y"], Options(overlay=True))
    assert [image.image for image in message.images] == [b"x", b"y"]
    assert options_from_message(message.options) == Options(overlay=True)


@pytest.mark.parametrize(
    "status",
    [status_from_error(OverloadedError("full", retry_after_s=1.5)), status_from_error(ThoraxrtError("x")), fault()],
)
def test_a_failure_survives_the_wire(status):
    message = pb.ImageAnswer.FromString(message_from_answer("a", status).SerializeToString())
    assert message.id == "a"
    assert message.failure.code == status.code.value[0]
    assert answer_from_message(message) == status


def test_a_code_from_the_future_is_unknown():
    assert answer_from_message(pb.ImageAnswer(failure=pb.Failure(code=99))).code is grpc.StatusCode.UNKNOWN


def test_an_answer_that_is_none_is_refused_not_guessed():
    with pytest.raises(ValueError, match="update thoraxrt"):
        answer_from_message(pb.ImageAnswer(id="a"))


def test_a_study_says_each_labels_highest_probability_and_where():
    study = Study.of([reply(0.2, 0.6), fault(), reply(0.7, 0.6), reply(0.7, 0.1)], "0" * 64)
    assert study.findings == (
        StudyFinding(finding="label 0", probability=0.7, reported=True, image=2),
        StudyFinding(finding="label 1", probability=0.6, reported=True, image=0),
    )


def test_a_label_is_reported_where_any_image_reports_it():
    (finding,) = Study.of([reply(0.4, reported=0.3), reply(0.45, reported=0.5)], "0" * 64).findings
    assert finding == StudyFinding(finding="label 0", probability=0.45, reported=True, image=1)


def test_a_study_without_an_answer_has_no_findings():
    assert Study.of([fault()], "0" * 64).findings == ()


def test_a_study_survives_the_wire():
    study = Study.of([reply(0.2, 0.6), fault()], "0" * 64)
    message = message_from_study(["a", "b"], study)
    assert [answer.id for answer in message.answers] == ["a", "b"]
    arrived = study_from_message(pb.PredictStudyResponse.FromString(message.SerializeToString()))
    assert arrived.findings == study.findings
    assert arrived.answers[0].prediction.to_dict() == study.answers[0].prediction.to_dict()
    assert arrived.answers[1] == fault()
    assert arrived.manifest_sha256 == "0" * 64
