"""Types to messages and back, where a call over the wire does not reach."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from thoraxrt.engine.postprocess import Sigmoid, SigmoidOpNorm, Softmax
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server.wire import (
    Options,
    message_from_model,
    model_from_bundle,
    model_from_message,
    options_from_message,
    reply_from_message,
    request_from_image,
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
