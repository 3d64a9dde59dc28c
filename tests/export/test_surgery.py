"""Graphs made elsewhere and modules of any kind, served, against the untouched original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from thoraxrt.engine.errors import CheckpointError, RequestError
from thoraxrt.export.graph import IMAGENET, Normalisation, session_from_graph
from thoraxrt.export.surgery import (
    ServedGraph,
    network_from_factory,
    onnx_from_module,
    read_onnx,
    reference_from_onnx,
    served_from_onnx,
)

SIZE = 32
GRAY = Normalisation(mean=(0.45,), std=(0.22,))
UNIT = Normalisation(mean=(0, 0, 0), std=(1, 1, 1))
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 1, SIZE, SIZE), np.uint8)


class Net:
    """A small graph under construction: `add` takes tensors' names and arrays, and names its output."""

    def __init__(self, dims: tuple[str | int, ...]) -> None:
        self.dims = dims
        self.rng = np.random.default_rng(1)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: Any, **attributes: Any) -> str:
        names = [name if isinstance(name, str) else self.constant(name) for name in inputs]
        output = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [output], output, **attributes))
        return output

    def constant(self, values: Any) -> str:
        values = np.asarray(values, np.int64 if np.asarray(values).dtype == np.int64 else np.float32)
        self.weights.append(numpy_helper.from_array(values, f"w{len(self.weights)}"))
        return self.weights[-1].name

    def random(self, *shape: int) -> npt.NDArray[np.float32]:
        return self.rng.normal(0, 0.5, shape).astype(np.float32)

    def trunk(self, x: str = "input", channels: int = 3, **attributes: Any) -> str:
        """Two convolutions to a map `(N, 8, 8, 8)`."""
        attributes = {"pads": [1, 1, 1, 1]} | attributes
        x = self.add("Conv", x, self.random(6, channels, 3, 3), self.random(6), strides=[2, 2], **attributes)
        x = self.add("Conv", self.add("Relu", x), self.random(8, 6, 3, 3), pads=[0, 1, 2, 1], strides=[2, 2])
        return self.add("Relu", x)

    def head(self, x: str) -> str:
        x = self.add("Flatten", self.add("GlobalAveragePool", x))
        return self.add("Gemm", x, self.random(5, 8), self.random(5), transB=1)

    def model(self, *outputs: str, opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, self.dims)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.weights,
        )
        imports = [helper.make_opsetid("", opset)]
        return onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=imports, ir_version=4 if opset < 13 else 8)
        )


def nchw(batch: str | int = "N", channels: int = 3) -> Net:
    return Net((batch, channels, SIZE, SIZE))


def conv_net(opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    net = nchw()
    return net.model(net.head(net.trunk(**attributes)), opset=opset)


def fixed_batch() -> onnx.ModelProto:
    net = nchw(batch=1)
    x = net.add("Reshape", net.add("GlobalAveragePool", net.trunk()), np.array([1, -1]))
    x = net.add("MatMul", x, net.random(8, 5))
    return net.model(net.add("Squeeze", net.add("Add", x, net.random(5))))  # the batch, too


def channels_last() -> onnx.ModelProto:
    net = Net(("N", SIZE, SIZE, 3))
    x = net.trunk(net.add("Transpose", "input", perm=[0, 3, 1, 2]), auto_pad="SAME_UPPER", pads=None)
    x = net.add("ReduceMean", net.add("Transpose", x, perm=[0, 2, 3, 1]), axes=[1, 2], keepdims=0)
    return net.model(net.add("Add", net.add("MatMul", x, net.random(8, 5)), net.random(5)))


def channels_last_throughout() -> onnx.ModelProto:
    """The map that is pooled exists only with channels last, and the input is used twice."""
    net = Net(("N", SIZE, SIZE, 3))
    x = net.add("MatMul", net.add("Add", "input", net.add("Relu", "input")), net.random(3, 8))
    x = net.add("ReduceMean", net.add("Relu", x), axes=[1, 2], keepdims=1)
    return net.model(net.add("Squeeze", net.add("MatMul", x, net.random(8, 5)), np.array([1, 2])))


def normalising(factor: Any) -> onnx.ModelProto:
    net = nchw()
    x = net.add("Sub", "input", net.random(1, 3, SIZE, SIZE))  # a mean image
    x = net.add("Sub", np.float32(1), net.add("Div", net.add("Mul", x, factor), np.float32(0.7)))
    return net.model(net.head(net.trunk(x)))


def gray_repeated() -> onnx.ModelProto:
    net = nchw(channels=1)
    x = net.add("Concat", "input", "input", "input", axis=1)
    return net.model(net.head(net.trunk(x)))


def neck() -> onnx.ModelProto:
    """Pool, batch norm, two linear layers with nothing between, and constants of every kind: one affine map."""
    net = nchw()
    x = net.add("GlobalAveragePool", net.trunk())
    x = net.add("BatchNormalization", x, *(net.random(8) for _ in range(3)), net.random(8) ** 2 + 0.1)
    x = net.add("Conv", x, net.random(7, 8, 1, 1), net.random(7))
    x = net.add("Gemm", net.add("Flatten", x), net.random(7, 5), net.random(1, 5), alpha=0.5, beta=2.0)
    return net.model(net.add("Sub", net.random(5), net.add("Div", x, np.float32(3))))


def pooled_convolution(bound: bool) -> onnx.ModelProto:
    """The classifier is a 1 x 1 convolution before the pool, SqueezeNet's with a ReLU after it."""
    net = nchw()
    x = net.add("Conv", net.trunk(), net.random(5, 8, 1, 1), net.random(5))
    x = net.add("GlobalAveragePool", net.add("Relu", x) if bound else x)
    return net.model(net.add("Reshape", x, np.array([-1, 5])))


def ending(*ops: str, **attributes: Any) -> onnx.ModelProto:
    net = nchw()
    x = net.head(net.trunk())
    for op in ops:
        x = net.add(op, x, **attributes)
    return net.model(x)


def clipped() -> onnx.ModelProto:
    net = nchw()
    x = net.add("Clip", net.add("GlobalAveragePool", net.trunk()), np.float32(0.1), np.float32(0.8))
    x = net.add("Conv", x, net.random(5, 8, 1, 1), net.random(5))
    return net.model(net.add("Clip", x, np.float32(-0.4), np.float32(1)))


def computed_shape() -> onnx.ModelProto:
    """`x.view(x.size(0), -1)` as torch used to trace it."""
    net = nchw(batch="N")
    x = net.add("GlobalAveragePool", net.trunk())
    batch = net.add("Unsqueeze", net.add("Gather", net.add("Shape", x), np.array(0)), np.array([0]))
    x = net.add("Reshape", x, net.add("Concat", batch, np.array([-1]), axis=0))
    return net.model(net.add("Gemm", x, net.random(5, 8), net.random(5), transB=1))


def average_pool() -> onnx.ModelProto:
    net = nchw()
    x = net.add("AveragePool", net.trunk(), kernel_shape=[8, 8])
    x = net.add("MatMul", net.add("Squeeze", x, np.array([2, 3])), net.random(8, 5))
    return net.model(net.add("Identity", net.add("Dropout", x)))


def mean_by(spelling: str) -> onnx.ModelProto:
    """`x.mean(3).mean(2)`, `x.flatten(2).mean(-1)`, `avg_pool2d(x, 8)[:, :, 0, 0]`, as torch exports them."""
    net = nchw()
    x = net.trunk()
    if spelling == "means":
        x = net.add("ReduceMean", net.add("ReduceMean", x, axes=[3], keepdims=0), axes=[2], keepdims=0)
    elif spelling == "flat mean":
        x = net.add("ReduceMean", net.add("Reshape", x, np.array([0, 8, 64])), axes=[-1], keepdims=0)
    else:
        x = net.add("Gather", net.add("AveragePool", x, kernel_shape=[8, 8]), np.array(0), axis=2)
        x = net.add("Gather", x, np.array(0), axis=2)
    return net.model(net.add("Gemm", x, net.random(5, 8), net.random(5), transB=1))


GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "opset 9": lambda: conv_net(opset=9),
    "opset 11": lambda: conv_net(opset=11),
    "opset 18": lambda: conv_net(opset=18),
    "opset 21": lambda: conv_net(opset=21),
    "asymmetric pads": lambda: conv_net(pads=[0, 2, 1, 0]),
    "dilations": lambda: conv_net(pads=[2, 2, 2, 2], dilations=[2, 2]),
    "SAME_UPPER": lambda: conv_net(auto_pad="SAME_UPPER", pads=None),
    "SAME_LOWER": lambda: conv_net(auto_pad="SAME_LOWER", pads=None),
    "VALID": lambda: conv_net(auto_pad="VALID", pads=None),
    "fixed batch": fixed_batch,
    "channels last": channels_last,
    "channels last throughout": channels_last_throughout,
    "normalising": lambda: normalising(np.float32([[[2]], [[3]], [[4]]])),
    "scaled by pixel": lambda: normalising(np.linspace(1, 2, SIZE * SIZE).reshape(1, 1, SIZE, SIZE)),
    "gray repeated": gray_repeated,
    "neck": neck,
    "pooled convolution": lambda: pooled_convolution(False),
    "SqueezeNet": lambda: pooled_convolution(True),
    "softmax": lambda: ending("Softmax"),
    "sigmoid": lambda: ending("Sigmoid", "Identity"),
    "clipped": clipped,
    "computed shape": computed_shape,
    "average pool": average_pool,
    "means": lambda: mean_by("means"),
    "flat mean": lambda: mean_by("flat mean"),
    "indexed": lambda: mean_by("indexed"),
}
ACTIVATIONS = {"softmax": "softmax", "sigmoid": "sigmoid"}
UNFOLDED = ("channels last throughout", "scaled by pixel", "gray repeated")


def served_outputs(served: ServedGraph, images: npt.NDArray[np.uint8]) -> tuple[Any, Any]:
    logits, cam = session_from_graph(served.model.SerializeToString()).run(["logits", "cam"], {"image": images})
    return logits, cam


def assert_served(served: ServedGraph, expected: npt.NDArray[np.float32], images: npt.NDArray[np.uint8]) -> None:
    """The logits are the original's, at any batch size; the CAM's mean plus the bias is, where it must be."""
    assert np.ptp(expected, axis=0).max() > 0.01  # else agreement would say nothing
    logits, cam = served_outputs(served, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(served_outputs(served, images[:1])[0], expected[:1], atol=1e-4, rtol=0)
    from_cam = cam.mean((2, 3)) + served.bias
    if served.linear:
        np.testing.assert_allclose(from_cam, expected, atol=1e-4, rtol=0)
    assert_clean(served.model, cam.shape)


def assert_clean(model: onnx.ModelProto, cam: tuple[int, ...]) -> None:
    graph = model.graph
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    values = [*graph.input, *graph.output]
    dims = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values]
    assert [value.name for value in values] == ["image", "logits", "cam"]
    assert dims[1:] == [["batch", cam[1]], ["batch", *cam[1:]]]
    assert graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert not {"Identity", "Dropout", "Constant"} & {node.op_type for node in graph.node}
    weights = {weight.name for weight in graph.initializer}
    assert weights == weights & {name for node in graph.node for name in node.input}
    assert all(node.input[1] in weights for node in graph.node if node.op_type == "Conv")


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_served_as_it_was(name: str) -> None:
    model = GRAPHS[name]()
    untouched = model.SerializeToString()
    normalisation = GRAY if name == "gray repeated" else IMAGENET
    served = served_from_onnx(model, normalisation)
    assert_served(served, reference_from_onnx(model, normalisation)(IMAGES), IMAGES)
    assert model.SerializeToString() == untouched
    assert served.activation == ACTIVATIONS.get(name)
    assert served.linear == (name != "clipped")
    assert served.input_size == SIZE
    assert ("stem" in {node.name for node in served.model.graph.node}) == (name not in UNFOLDED)


def test_bounds_between_pool_and_logits_are_kept() -> None:
    served = served_from_onnx(clipped(), IMAGENET)
    logits, cam = served_outputs(served, IMAGES)
    assert np.abs(cam.mean((2, 3)) + served.bias - logits).max() > 0.1  # the CAM is no way to these logits
    assert cam.shape == (3, 5, 8, 8)


@pytest.mark.parametrize("make", [conv_net, clipped, gray_repeated])
def test_tensors_may_have_the_served_names_already(make: Callable[[], onnx.ModelProto]) -> None:
    model = make()
    names = {"input": "image", model.graph.output[0].name: "cam", model.graph.node[2].output[0]: "stem"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    model.graph.input[0].name, model.graph.output[0].name = "image", "cam"
    del model.graph.value_info[:]
    normalisation = GRAY if make is gray_repeated else IMAGENET
    assert_served(served_from_onnx(model, normalisation), reference_from_onnx(model, normalisation)(IMAGES), IMAGES)


def test_a_free_image_size_is_asked_for() -> None:
    model = conv_net()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "size"
    with pytest.raises(RequestError, match="--input-size"):
        served_from_onnx(model, IMAGENET)
    images = np.random.default_rng(1).integers(0, 256, (2, 1, 48, 48), np.uint8)
    assert_served(served_from_onnx(model, IMAGENET, 48), reference_from_onnx(model, IMAGENET)(images), images)
    with pytest.raises(RequestError, match="32 pixels, not 48"):
        served_from_onnx(conv_net(), IMAGENET, 48)


def test_a_real_classifier_made_elsewhere(nih: Path, nih_images: list[Path]) -> None:
    """SE-MobileNetV2 from TFLite: NHWC in 0..1, Clips around the pool and on the logits."""
    model = read_onnx(nih / "models" / "se-mobilenetv2_covid-normal-pneumonia.onnx")
    images = np.stack(
        [
            np.asarray(Image.open(path).convert("L").resize((224, 224), Image.Resampling.BILINEAR))
            for path in nih_images[:12]
        ]
    )[:, np.newaxis]
    served = served_from_onnx(model, UNIT)
    assert_served(served, reference_from_onnx(model, UNIT)(images), images)
    assert (served.linear, served.activation, served.input_size) == (False, None, 224)
    assert served_outputs(served, images[:1])[1].shape == (1, 3, 7, 7)


def test_bytes_repeat_and_hold_nothing_of_this_machine() -> None:
    model = conv_net()
    model.doc_string = model.graph.node[0].doc_string = model.graph.doc_string = "/home/someone/train.py"
    model.metadata_props.add(key="path", value="/home/someone/train.py")
    first, second = (served_from_onnx(model, IMAGENET).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert b"/home" not in first


# Refusals


def mlp() -> onnx.ModelProto:
    net = nchw()
    x = net.add("Flatten", net.add("GlobalAveragePool", net.trunk()))
    x = net.add("Relu", net.add("Gemm", x, net.random(8, 6)))
    return net.model(net.add("Gemm", x, net.random(6, 5)))


def pooled_by(op: str, **attributes: Any) -> onnx.ModelProto:
    net = nchw()
    x = net.add("Flatten", net.add(op, net.trunk(), **attributes))
    width = 8 if op.startswith("Global") else 32
    return net.model(net.add("Gemm", x, net.random(width, 5)))


def trained() -> onnx.ModelProto:
    net = nchw()
    x = net.add("BatchNormalization", "input", *(net.random(3) ** 2 for _ in range(4)), training_mode=1)
    net.nodes[-1].output.extend(["mean", "variance"])
    return net.model(net.head(net.trunk(x)))


def damaged_weights() -> onnx.ModelProto:
    model = conv_net()
    model.graph.initializer[0].raw_data = np.full((6, 3, 3, 3), np.nan, np.float32).tobytes()
    return model


def two_pools() -> onnx.ModelProto:
    net = nchw()
    trunk = net.trunk()
    x = net.add("Concat", net.add("GlobalAveragePool", trunk), net.add("GlobalMaxPool", trunk), axis=1)
    return net.model(net.add("Gemm", net.add("Flatten", x), net.random(16, 5)))


def attention_pool() -> onnx.ModelProto:
    net = nchw()
    trunk = net.trunk()
    weights = net.add("Sigmoid", net.add("Conv", trunk, net.random(1, 8, 1, 1)))
    x = net.add("ReduceSum", net.add("Mul", trunk, weights), np.array([2, 3]), keepdims=0)
    return net.model(net.add("Gemm", x, net.random(8, 5)))


def channels_reordered() -> onnx.ModelProto:
    net = nchw()
    x = net.add("Gather", net.add("GlobalAveragePool", net.trunk()), np.arange(8)[::-1], axis=1)
    return net.model(net.add("Gemm", net.add("Flatten", x), net.random(8, 5)))


def several_outputs() -> onnx.ModelProto:
    net = nchw()
    x = net.head(net.trunk())
    return net.model(x, net.add("Softmax", x))


def no_pool() -> onnx.ModelProto:
    net = nchw()
    return net.model(net.add("Gemm", net.add("Flatten", "input"), net.random(3 * SIZE * SIZE, 5)))


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "MLP": (mlp, r"node 'relu\d+' \(Relu\) stands where .* before another layer"),
    "max pool": (lambda: pooled_by("GlobalMaxPool"), r"node 'globalmaxpool\d+' \(GlobalMaxPool\) stands where global"),
    "partial pool": (lambda: pooled_by("AveragePool", kernel_shape=[4, 4], strides=[4, 4]), r"\(AveragePool\)"),
    "two pools": (two_pools, r"node 'concat\d+' \(Concat\) stands where global average pooling"),
    "attention pool": (attention_pool, r"\(ReduceSum\) stands where"),
    "reordered": (channels_reordered, r"\(Gather\) stands where"),
    "damaged": (damaged_weights, "stem_weight hold NaN or infinity"),
    "training": (trained, r"\(BatchNormalization\) is in training mode"),
    "activation": (lambda: ending("Tanh"), r"node 'tanh\d+' \(Tanh\)"),
    "two outputs": (several_outputs, "1 inputs and 2 outputs"),
    "no pool": (no_pool, "the graph's input stands where"),
    "no image": (lambda: Net(("N", 8)).model(), "0 outputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_kind_of_network_is_refused_by_its_node(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        served_from_onnx(make(), IMAGENET)


def test_an_input_that_is_no_image_is_refused() -> None:
    net = Net(("N", 4, SIZE, SIZE))
    with pytest.raises(CheckpointError, match=r"float \('N', 4, 32, 32\); expected float"):
        served_from_onnx(net.model(net.head(net.trunk(channels=4))), IMAGENET)
    with pytest.raises(RequestError, match="normalisation has 1 channels"):
        served_from_onnx(conv_net(), GRAY)


# Files


def test_a_file_is_read_with_weights_beside_it_only(tmp_path: Path) -> None:
    path = tmp_path / "model" / "net.onnx"
    path.parent.mkdir()
    onnx.save(conv_net(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    model = read_onnx(path)
    assert_served(served_from_onnx(model, IMAGENET), reference_from_onnx(model, IMAGENET)(IMAGES), IMAGES)
    (tmp_path / "net.data").write_bytes((path.parent / "net.data").read_bytes())
    damaged = onnx.load_model(path, load_external_data=False)
    for location in ("../net.data", str(tmp_path / "net.data"), "absent.data"):
        for weight in damaged.graph.initializer:
            weight.external_data[0].value = location
        path.write_bytes(damaged.SerializeToString())
        with pytest.raises(CheckpointError, match="no sound ONNX file"):
            read_onnx(path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_onnx(path)
    whole = conv_net().SerializeToString()
    for data in (b"", b"\x80\x04pickle", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="no sound ONNX file"):
            read_onnx(path)
    model = conv_net()
    model.graph.node[1].op_type = "Max"
    model.graph.node[1].input.append("")  # ONNX Runtime 1.32 dies of this
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"\(Max\) lacks its input 1"):
        read_onnx(path)
    model.opset_import.add(domain="com.microsoft", version=1)
    model.graph.node[0].op_type, model.graph.node[0].domain = "FusedConv", "com.microsoft"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"\(FusedConv\) is of the domain 'com.microsoft'"):
        read_onnx(path)


SEEDS = [conv_net(opset=9), channels_last(), clipped(), normalising(np.float32(2)), fixed_batch()]
OPERATORS = [
    "AveragePool", "Cast", "Clip", "Concat", "ConstantOfShape", "Conv", "Div", "Expand", "Flatten", "Gather", "Gemm", "If",
    "Loop", "MatMul", "Mul", "Pad", "Range", "ReduceMean", "Reshape", "Softmax", "Squeeze", "Sub", "Tile", "Transpose",
]  # fmt: skip
fuzz = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_refused_or_sound(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        served = served_from_onnx(read_onnx(path), IMAGENET)
    except (CheckpointError, RequestError):
        return
    onnx.checker.check_model(served.model, full_check=True)
    assert [value.name for value in served.model.graph.output] == ["logits", "cam"]


@fuzz
@given(
    seed=st.sampled_from(range(len(SEEDS))),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_mutated_files_are_refused_or_sound(
    seed: int, edits: list[tuple[float, int]], keep: float, tmp_path: Path
) -> None:
    """Most of a file is weights, whose bytes may change unnoticed: that is for hashes to find."""
    data = bytearray(SEEDS[seed].SerializeToString())
    for where, value in edits:
        data[int(where * len(data))] = value
    assert_refused_or_sound(tmp_path / "mutated.onnx", data[: int(keep * len(data))])


@fuzz
@given(data=st.data(), seed=st.sampled_from(range(len(SEEDS))), edits=st.integers(1, 3))
def test_mutated_graphs_are_refused_or_sound(data: st.DataObject, seed: int, edits: int, tmp_path: Path) -> None:
    model = onnx.load_model_from_string(SEEDS[seed].SerializeToString())
    tensors = [name for node in model.graph.node for name in (*node.input, *node.output)]
    numbers = st.sampled_from([-(2**63), -2, -1, 0, 1, 2, 3, 8, 100_000, 2**31, 2**63 - 1])
    for _ in range(edits):
        node = data.draw(st.sampled_from(list(model.graph.node)))
        ints = [attribute.ints for attribute in node.attribute if attribute.ints]
        kind = data.draw(st.sampled_from(["operator", "input", "attribute", "size"]))
        if kind == "operator":
            node.op_type = data.draw(st.sampled_from(OPERATORS))
        elif kind == "input":
            node.input[data.draw(st.integers(0, len(node.input) - 1))] = data.draw(st.sampled_from(tensors))
        elif kind == "attribute" and ints:
            ints[0][0] = data.draw(numbers)
        else:
            dims = model.graph.input[0].type.tensor_type.shape.dim
            dims[data.draw(st.integers(0, 3))].dim_value = data.draw(numbers)
    assert_refused_or_sound(tmp_path / "mutated.onnx", model.SerializeToString())


# Modules


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.excite(functional.silu(self.squeeze(pooled))))


class Efficient(nn.Module):
    """EfficientNet's parts: SiLU, depthwise convolutions, SE, a residual, dropout before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU(), SqueezeExcite(8), nn.Conv2d(8, 8, 1)
        )  # fmt: skip
        self.last = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled: Tensor = functional.adaptive_avg_pool2d(self.last(x + self.block(x)), 1)
        logits: Tensor = self.head(torch.flatten(pooled, 1))
        return logits


class Head(nn.Module):
    """A small trunk and any function of its map and a linear layer."""

    def __init__(self, head: Callable[[Tensor, nn.Linear], Tensor], channels: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.linear, self.function = nn.Linear(16, 5), head

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.trunk(x), self.linear)


class Normalising(Head):
    """Takes 0..1 and normalises by itself."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = torch.tensor(IMAGENET.mean)[:, None, None], torch.tensor(IMAGENET.std)[:, None, None]
        return super().forward((x - mean) / std)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "efficient": Efficient,
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 5, 2),
        nn.PReLU(),
        nn.Conv2d(8, 12, 3),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4, bias=False),
    ),
    "mean": lambda: Head(lambda x, linear: linear(x.mean([2, 3])), channels=1),
    "normalising": lambda: Normalising(lambda x, linear: linear(functional.adaptive_avg_pool2d(x, 1).squeeze())),
}


def made(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.2, 1.5)
    return module.eval()


@pytest.mark.parametrize("name", MODULES)
def test_any_module_with_the_head_is_served(name: str) -> None:
    torch.manual_seed(3)
    network = made(MODULES[name]())
    channels = 1 if name in ("sequential", "mean") else 3
    normalisation = GRAY if channels == 1 else UNIT if name == "normalising" else IMAGENET
    model = onnx_from_module(network, channels, SIZE)
    served = served_from_onnx(model, normalisation)
    pixels = torch.tensor(IMAGES).float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (normalisation.mean, normalisation.std))
    with torch.inference_mode():
        expected = network((pixels - mean) / std).numpy()
    assert_served(served, expected, IMAGES)
    assert served.linear
    np.testing.assert_allclose(reference_from_onnx(model, normalisation)(IMAGES), expected, atol=1e-4, rtol=0)


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.zeros(1, 1, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # (N, 16, 16)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        logits: Tensor = self.head(self.layer(tokens)[:, 0])
        return logits


def test_a_module_with_another_head_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\(Gather\) stands where global average pooling"):
        served_from_onnx(onnx_from_module(VisionTransformer().eval(), 3, SIZE), IMAGENET)


FACTORY = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
def fails():
    raise OSError("no data here")
number = int
"""


def test_a_factory_is_named_by_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chest_models_under_test.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    spec = "chest_models_under_test:make"
    state = network_from_factory(spec).state_dict()
    again = network_from_factory(spec, state)
    assert not again.training
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(again(x), network_from_factory(spec, state)(x))
    with pytest.raises(CheckpointError, match=r"weights are not those of .*0\.bias"):
        network_from_factory(spec, {key: value for key, value in state.items() if key != "0.bias"})
    with pytest.raises(CheckpointError, match="OSError: no data here"):
        network_from_factory("chest_models_under_test:fails")
    with pytest.raises(CheckpointError, match=r"made a int; expected a torch\.nn\.Module"):
        network_from_factory("chest_models_under_test:number")
    for absent in ("chest_models_under_test:absent", "absent_package:make"):
        with pytest.raises(CheckpointError, match="PYTHONPATH"):
            network_from_factory(absent)
    with pytest.raises(RequestError, match=r"package\.module:factory"):
        network_from_factory("chest_models_under_test")
