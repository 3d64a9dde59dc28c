"""Counting against hand calculations, published figures and torch's own hooks; the floor; what the machine reaches."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from thoraxrt.benchmarks.gpu_speed import network_work
from thoraxrt.benchmarks.roofline import Peak, Peaks, Work, floor, measure_peaks, work_from_bundle, work_from_graph
from thoraxrt.engine.backends import available
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import RequestError
from thoraxrt.export.graph import IMAGENET, ServedNetwork, onnx_from_network
from thoraxrt.export.half import fp16_from_fp32
from thoraxrt.export.networks import CxrNetwork, DenseNet, ResNet
from thoraxrt.export.quantise import int8_from_fp32, quantisable_layers

GEOMETRY = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}


def one_node(
    operator: str, image: list[int], weight: list[int], output: list[int], **attributes: object
) -> onnx.ModelProto:
    """A graph of one operator, its first dimension free."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape[1:]])
        for name, shape in (("image", image), ("out", output))
    ]
    node = helper.make_node(operator, ["image", "weight"], ["out"], **attributes)
    weights = [numpy_helper.from_array(np.zeros(weight, np.float32), "weight")]
    return helper.make_model(
        helper.make_graph([node], "one", values[:1], values[1:], weights), opset_imports=[helper.make_opsetid("", 18)]
    )


@pytest.mark.parametrize(
    ("model", "multiply_adds"),
    [
        (one_node("Conv", [1, 4, 6, 6], [8, 4, 3, 3], [1, 8, 6, 6], **GEOMETRY), 8 * 36 * 4 * 9),
        (one_node("Conv", [1, 4, 6, 6], [8, 2, 3, 3], [1, 8, 6, 6], group=2, **GEOMETRY), 8 * 36 * 2 * 9),
        (one_node("Conv", [1, 4, 6, 6], [4, 1, 3, 3], [1, 4, 3, 3], group=4, strides=[2, 2], **GEOMETRY), 4 * 9 * 9),
        (one_node("ConvTranspose", [1, 4, 6, 6], [4, 8, 2, 2], [1, 8, 12, 12], strides=[2, 2]), 4 * 36 * 8 * 4),
        (one_node("Gemm", [1, 20], [20, 7], [1, 7]), 20 * 7),
        (one_node("Gemm", [1, 20], [7, 20], [1, 7], transB=1), 20 * 7),
        (one_node("MatMul", [1, 5, 20], [20, 7], [1, 5, 7]), 5 * 20 * 7),
    ],
)  # fmt: skip
def test_operators_count_as_by_hand(model: onnx.ModelProto, multiply_adds: int) -> None:
    work = work_from_graph(model, "fp32")
    sizes = [np.prod(numpy_helper.to_array(w).shape) for w in model.graph.initializer]
    moved = sum(
        np.prod([d.dim_value or 1 for d in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    )
    assert work == Work(
        operations={"fp32": 2 * multiply_adds},
        weight_bytes=4 * int(sizes[0]),
        image_bytes=4 * int(moved),
        activation_bytes=4 * int(moved),
        not_counted={},
    )


@pytest.mark.parametrize(
    "network", [DenseNet(8, (1, 2), 8, num_classes=3), ResNet((1, 1), bottleneck=True, num_classes=3)]
)
def test_every_precision_of_a_graph_counts_what_hooks_on_the_torch_network_count(network: CxrNetwork) -> None:
    fp32 = onnx_from_network(ServedNetwork(network, IMAGENET, 64), 64)
    expected = network_work(network, 64)
    work = work_from_graph(fp32, "fp32")
    assert work.operations == {"fp32": expected.operations}
    assert work.activation_bytes == 4 * expected.activations
    assert work.weight_bytes >= 4 * expected.weights  # the bias map and what batch norms remember come on top
    assert work.image_bytes == 64 * 64 + 4 * 3 * (1 + network_cells(fp32))
    assert work_from_graph(fp32, "bf16").weight_bytes == work.weight_bytes // 2

    half = work_from_graph(fp16_from_fp32(fp32), "fp32")
    assert sum(half.operations.values()) == expected.operations
    assert half.operations["fp16"] > half.operations.get("fp32", 0)

    layers = quantisable_layers(fp32)
    int8 = work_from_graph(int8_from_fp32(fp32, dict.fromkeys(layers.values(), 1.0), layers), "bf16")
    quantised = sum(conv_operations(fp32, name) for name in layers)
    assert int8.operations == {"bf16": expected.operations - quantised, "int8": quantised}
    assert int8.weight_bytes < work.weight_bytes


def network_cells(model: onnx.ModelProto) -> int:
    """The CAM's height times its width."""
    (cam,) = [value for value in model.graph.output if value.name == "cam"]
    return int(np.prod([dimension.dim_value for dimension in cam.type.tensor_type.shape.dim[2:]]))


def conv_operations(model: onnx.ModelProto, name: str) -> int:
    """Two times the multiply-adds of one convolution, by ONNX's own evaluator: the output for ones, of ones, adds up."""
    (node,) = [node for node in model.graph.node if node.name == name]
    shapes = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    height, width = (d.dim_value for d in shapes[node.output[0]].type.tensor_type.shape.dim[2:])
    (weight,) = [weight for weight in model.graph.initializer if weight.name == node.input[1]]
    return int(2 * np.prod(weight.dims) * height * width)


def test_published_networks_take_what_was_published(chexnet_bundle: Bundle) -> None:
    # torchvision: 2.83 and 4.09 G multiply-adds at 224 with a stem of three channels, of which normalisation's fold
    # leaves one, and a classifier that is applied once, not at each of 49 places, but to 1,000 classes
    stem = 112 * 112 * 64 * 49
    densenet = work_from_bundle(chexnet_bundle, "onnxruntime", "fp32")
    assert sum(densenet.operations.values()) == 2 * 2_755_164_160
    assert sum(densenet.operations.values()) / 2 == pytest.approx(2.834e9 - 2 * stem, rel=0.001)
    resnet = network_work(ResNet((3, 4, 6, 3), bottleneck=True, num_classes=14), 224)
    assert resnet.operations / 2 == pytest.approx(4.089e9 - 2 * stem, rel=0.001)
    assert densenet.not_counted["BatchNormalization"] == 62
    assert densenet.weight_bytes == pytest.approx(4 * 6.96e6 + 4 * 64 * 112 * 112, rel=0.02)  # and the bias map


def test_int8_keeps_the_rest_in_what_the_backend_executes(sample_bundle: Bundle) -> None:
    bf16 = available("openvino", sample_bundle)["bf16"] is None
    if bf16:
        assert set(work_from_bundle(sample_bundle, "openvino", "bf16").operations) == {"bf16"}
    assert set(work_from_bundle(sample_bundle, "onnxruntime", "fp32").operations) == {"fp32"}


def test_a_graph_whose_shapes_stay_unknown_is_refused() -> None:
    model = one_node("Conv", [1, 4, 6, 6], [8, 4, 3, 3], [1, 8, 6, 6], **GEOMETRY)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(RequestError, match="'image' is not fixed"):
        work_from_graph(model, "fp32")


PEAKS = Peaks(
    arithmetic={"fp32": Peak(operations_per_s=1e9, by="a"), "int8": Peak(operations_per_s=4e9, by="b")}, bytes_per_s=1e8
)


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    work = Work(
        operations={"fp32": 10**8, "int8": 8 * 10**8}, weight_bytes=10**6, image_bytes=1000, activation_bytes=1, not_counted={}
    )  # fmt: skip
    found = floor(work, PEAKS, 4)
    assert found.milliseconds == pytest.approx(100 + 200)
    assert (found.bound, found.operations, found.bytes) == ("compute", 9 * 10**8, 251_000)
    assert found.peak_operations_per_s == pytest.approx(3e9)
    assert found.intensity == pytest.approx(9e8 / 251_000)
    assert found.share(600) == pytest.approx(0.5)

    thin = Work(operations={"int8": 4}, weight_bytes=10**6, image_bytes=0, activation_bytes=0, not_counted={})
    assert (floor(thin, PEAKS, 1).bound, floor(thin, PEAKS, 1).milliseconds) == ("memory", pytest.approx(10))
    assert floor(thin, PEAKS, 10).milliseconds == pytest.approx(1)


def test_there_is_no_floor_without_a_peak() -> None:
    work = Work(operations={"fp16": 1}, weight_bytes=1, image_bytes=1, activation_bytes=1, not_counted={})
    with pytest.raises(RequestError, match="no peak of fp16 was measured on this machine, only of fp32, int8"):
        floor(work, PEAKS, 1)


def test_the_machines_peaks_are_measured_through_its_runtimes() -> None:
    peaks = measure_peaks()
    assert {"fp32", "int8"} <= peaks.arithmetic.keys()
    assert {peak.by for peak in peaks.arithmetic.values()} <= {"numpy", "onnxruntime", "openvino"}
    rates = [peak.operations_per_s for peak in peaks.arithmetic.values()]
    assert min(rates) > 1e8  # a processor does more than that, however busy: seconds and operations were not mixed up
    assert max(rates) < 1e15
    assert 1e7 < peaks.bytes_per_s < 1e13
