"""A classifier made elsewhere to the served graph: an ONNX file, or any torch module through its ONNX.

Owns finding the pool and the classifier in a graph, by walking back from its output, and the two
rewrites that `thoraxrt.export.graph` makes on torch modules: raw pixels in, the CAM out. Knows no
architecture and no findings.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnx_ir
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxscript import optimizer
from torch import Tensor, nn

from thoraxrt.engine.errors import CheckpointError, RequestError, ThoraxrtError
from thoraxrt.export.graph import OPSET, Normalisation, Reference, session_from_graph, strip

__all__ = [
    "ServedGraph",
    "network_from_factory",
    "onnx_from_module",
    "read_onnx",
    "reference_from_onnx",
    "served_from_onnx",
]

Activation: TypeAlias = Literal["sigmoid", "softmax"]
Float64: TypeAlias = npt.NDArray[np.float64]
Shape: TypeAlias = tuple[int | str | None, ...]

_IR_VERSION: Final = 8  # the first that carries opset 18
_LARGEST_FILE: Final = 2**31 - 1  # protobuf's own limit
_LARGEST_FOLD: Final = 2**26  # elements; a classifier of 65,536 features and 1,000 findings is as large
_LARGEST_SIDE: Final = 4096  # pixels, and of a fixed batch
_WIDEST: Final = 8192  # channels of the last feature map; published networks have 4,096 at most
_ADDED: Final = frozenset({
    "cam", "cam_axes", "cam_features", "cam_mean", "cam_weight", "image", "image_centred", "image_float", "image_mean",
    "image_normalised", "image_std", "logits", "logits_bias", "stem", "stem_bias_map", "stem_weight",
})  # fmt: skip
_ACTIVATIONS: Final[Mapping[str, Activation]] = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}

# What may stand between the pool and the logits.
_SHAPE_ONLY: Final = frozenset({"Flatten", "Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_ELEMENTWISE: Final = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Sub"})
_LAYERS: Final = frozenset({"Conv", "Gemm", "MatMul"})
_CLIPS: Final = frozenset({"Clip", "Relu"})
# What folds on constants at a cost that the size of its result bounds.
_FOLDABLE: Final = _SHAPE_ONLY | _ELEMENTWISE | {"Cast", "Concat", "Expand", "Neg", "Reciprocal", "Slice", "Sqrt"}

logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it reports every rewrite that does not apply
logging.getLogger("onnxscript").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class ServedGraph:
    """The FP32 graph of the design, and what its surgery found.

    `model`: `image` uint8 `(batch, 1, S, S)` to float32 `logits (batch, C)` and `cam (batch, C, h, w)`,
    opset 18. `bias` `(C,)` is the classifier's. Where `linear`, the CAM's spatial mean plus the bias *is*
    the logit; elsewhere something bounds values between pool and logits, and the CAM is an extra branch.
    `activation` is the final one that was found and cut off, None where the graph ended in logits.
    """

    model: onnx.ModelProto
    bias: npt.NDArray[np.float32]
    linear: bool
    activation: Activation | None
    input_size: int


def read_onnx(path: str | Path) -> onnx.ModelProto:
    """Read an `.onnx` file, with weights in other files of its folder where it names any.

    Raises CheckpointError where a file cannot be read, is damaged or lies outside the folder, or
    an operator is not ONNX's own.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; an ONNX file has at most {_LARGEST_FILE}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    with _translated(f"{path} is no sound ONNX file; copy or export it again"):
        model = onnx.load_model_from_string(data)
        onnx.load_external_data_for_model(model, str(path.parent))
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        onnx.checker.check_model(model, full_check=True)
        _refuse_operators(model)
    return model


def reference_from_onnx(model: onnx.ModelProto, normalisation: Normalisation) -> Reference:
    """The untouched original on ONNX Runtime: uint8 `(N, 1, S, S)` to float32 logits `(N, C)`.

    It is fed what its training fed it; only a final activation is left out. Raises CheckpointError
    where its input or output is none of a classifier's, or ONNX Runtime cannot run it.
    """
    source = _image_input(model, normalisation)
    original = onnx.ModelProto()
    original.CopyFrom(model)
    _cut_activation(original)
    output = original.graph.output[0].name
    with _translated("ONNX Runtime cannot run the original"):
        session = session_from_graph(original.SerializeToString())
    mean = np.array(normalisation.mean, np.float32)[:, None, None]
    std = np.array(normalisation.std, np.float32)[:, None, None]

    def logits(images: npt.NDArray[np.uint8 | np.float32]) -> npt.NDArray[np.float32]:
        rows = []
        for image in images:  # (1, S, S)
            x = (image.astype(np.float32) / 255 - mean) / std  # (channels, S, S)
            x = np.moveaxis(x, 0, -1) if source.channels_last else x
            batch = np.repeat(x[np.newaxis], source.batch or 1, 0)
            with _translated("ONNX Runtime cannot run the original"):
                rows.append(session.run([output], {source.name: batch})[0].reshape(len(batch), -1)[0])
        return np.stack(rows)

    return logits


def served_from_onnx(
    model: onnx.ModelProto, normalisation: Normalisation, input_size: int | None = None
) -> ServedGraph:
    """The served graph of a classifier that ends in global average pooling and one linear layer.

    The input is float32, NCHW or NHWC, of 1 or 3 channels, normalised as `normalisation` says.
    `input_size` is needed where the graph leaves height and width free.

    Raises CheckpointError naming the node where the graph is another kind of network, RequestError
    where normalisation or input size do not fit it.
    """
    source = _image_input(model, normalisation)
    size = _size(source, input_size)
    original = model
    model = onnx.ModelProto()
    model.CopyFrom(original)
    activation = _cut_activation(model)
    problem = "the graph cannot be rewritten for serving; export it again at an opset from 13 to 18"
    with _translated(problem), np.errstate(all="ignore"):
        model = _prepared(model, source, size)
        graph = _Graph(model)
        head = _head(graph)
        _attach(graph, head)
        optimizer.remove_unused_nodes(model)
        _take_pixels(_Graph(model), source, normalisation, size)
        optimizer.remove_unused_nodes(model)
        model = _finished(model, len(head.bias))
    return ServedGraph(
        model=model,
        bias=head.bias.astype(np.float32),
        linear=head.linear,
        activation=activation,
        input_size=size,
    )


def network_from_factory(spec: str, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """What the factory `package.module:factory` makes, with the weights `state`, in eval mode on the CPU.

    A prefix that a training wrapper left before every name (`module.`, `model.`) is removed, and what
    lies outside it left aside. It imports and runs the code that the user named. Raises RequestError where `spec` names nothing,
    CheckpointError where that code fails, makes no module, or has other weights.
    """
    package, _, name = spec.partition(":")
    if not package or not name.isidentifier():
        raise RequestError(f"--network {spec}: expected package.module:factory, my_models.chest:make_network say")
    with _translated(
        f"--network {spec} failed; check that `python -c 'import {package}'` works (PYTHONPATH=. may help)"
    ):
        network = getattr(importlib.import_module(package), name)()
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"--network {spec} made a {type(network).__name__}; expected a torch.nn.Module")
    if state is not None:
        with _translated(f"the checkpoint's weights are not those of --network {spec}"):
            network.load_state_dict(_without_wrapper(state, network), strict=True)
    return network.eval().float().cpu()


def _without_wrapper(state: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """The network's own entries, where one prefix leads to all of them; else everything, to be refused by name."""
    expected = network.state_dict().keys()
    some = next(iter(expected), "")
    prefixes = [key.removesuffix(some) for key in state if key == some or key.endswith(f".{some}")]
    fitting = [prefix for prefix in prefixes if state.keys() >= {prefix + key for key in expected}]
    if len(fitting) != 1:
        return state
    return {key: state[fitting[0] + key] for key in expected}


def onnx_from_module(network: nn.Module, channels: int, input_size: int) -> onnx.ModelProto:
    """The graph of any module from float32 `(N, channels, S, S)`, as training fed it, to its output.

    Raises CheckpointError where torch cannot trace it.
    """
    example = torch.zeros(2, channels, input_size, input_size)
    with warnings.catch_warnings(), _translated("torch cannot trace the network with a free batch size"):
        warnings.simplefilter("ignore")  # torch's exporter deprecates its own internals
        program = torch.onnx.export(
            network,
            (example,),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # dynamo=True returns the program
    return program.model_proto


@contextmanager
def _translated(problem: str) -> Iterator[None]:
    """The boundary to onnx, onnxscript, ONNX Runtime and the user's code, whose errors share no base."""
    try:
        yield
    except ThoraxrtError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{problem} ({type(error).__name__}: {reason})") from error


def _refuse_operators(model: onnx.ModelProto) -> None:
    """Refuse what is not ONNX's own, and omitted inputs that only some may omit: ONNX Runtime crashes on those."""
    (version,) = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise CheckpointError(
                f"node {node.name!r} ({node.op_type}) is of the domain {node.domain!r}; expected ONNX's own operators: "
                "export the network without runtime-specific optimisations"
            )
        inputs = onnx.defs.get_schema(node.op_type, version).inputs
        for position, name in enumerate(node.input):
            option = inputs[min(position, len(inputs) - 1)].option
            if not name and option != onnx.defs.OpSchema.FormalParameterOption.Optional:
                raise CheckpointError(
                    f"node {node.name!r} ({node.op_type}) lacks its input {position}: export it again"
                )


# The original's input, output and form.


@dataclass(frozen=True, kw_only=True)
class _Input:
    """A classifier's float32 input; `batch` and `size` are None where free."""

    name: str
    batch: int | None
    channels: int
    size: int | None
    channels_last: bool


def _image_input(model: onnx.ModelProto, normalisation: Normalisation) -> _Input:
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        names = [value.name for value in [*inputs, *model.graph.output]]
        raise CheckpointError(
            f"the graph has {len(inputs)} inputs and {len(model.graph.output)} outputs ({', '.join(names)}); expected "
            "one image and the logits: keep those with onnx.utils.extract_model"
        )
    tensor = inputs[0].type.tensor_type
    dims = _dims(tensor.shape)
    axis = next((axis for axis in (1, 3) if len(dims) == 4 and dims[axis] in (1, 3)), None)
    spatial = [dim for position, dim in enumerate(dims) if position not in (0, axis)]
    sane = all(0 < dim <= _LARGEST_SIDE for dim in dims if isinstance(dim, int))
    square = len({dim for dim in spatial if isinstance(dim, int)}) <= 1
    if tensor.elem_type != TensorProto.FLOAT or axis is None or not sane or not square:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise CheckpointError(
            f"the graph's input {inputs[0].name!r} is {kind} {dims}; expected float (batch, channels, S, S) or (batch, "
            f"S, S, channels) with 1 or 3 channels, S at most {_LARGEST_SIDE}: export it so"
        )
    channels = dims[axis]
    assert isinstance(channels, int)
    if len(normalisation.mean) != channels:
        raise RequestError(
            f"normalisation has {len(normalisation.mean)} channels, the network's input {channels}: give {channels}"
        )
    return _Input(
        name=inputs[0].name,
        batch=dims[0] if isinstance(dims[0], int) else None,
        channels=channels,
        size=next((dim for dim in spatial if isinstance(dim, int)), None),
        channels_last=axis == 3,
    )


def _size(source: _Input, input_size: int | None) -> int:
    if source.size is not None and input_size not in (None, source.size):
        raise RequestError(f"the graph takes images of {source.size} pixels, not {input_size}: give {source.size}")
    size = source.size or input_size
    if size is None:
        raise RequestError(
            "the graph leaves the image's size free: give the one it was trained at, --input-size 224 say"
        )
    return size


def _cut_activation(model: onnx.ModelProto) -> Activation | None:
    """Let the graph end before its final softmax or sigmoid, where it has one."""
    producers = {name: node for node in model.graph.node for name in node.output}
    (output,) = model.graph.output
    node = producers.get(output.name)
    while node is not None and node.op_type in _SHAPE_ONLY - {"Gather"}:
        node = producers.get(node.input[0])
    activation = _ACTIVATIONS.get(node.op_type) if node is not None else None
    if node is not None and activation is not None:
        output.name = node.input[0]
    output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, None))
    return activation


def _prepared(model: onnx.ModelProto, source: _Input, size: int) -> onnx.ModelProto:
    """The same function in opset 18 with a free batch, constants folded, shapes known, nothing left over."""
    graph = model.graph
    weights = {weight.name for weight in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]  # before IR 4 weights were inputs, too
    del graph.input[:], graph.value_info[:]
    graph.input.extend(inputs)
    dims = graph.input[0].type.tensor_type.shape.dim
    for dim in dims[1:3] if source.channels_last else dims[2:4]:
        dim.dim_value = size
    if source.batch is None:
        dims[0].dim_param = "batch"
    model.ir_version = _IR_VERSION
    if any(opset.domain in ("", "ai.onnx") and opset.version != OPSET for opset in model.opset_import):
        model = onnx.version_converter.convert_version(model, OPSET)
    for node in model.graph.node:
        if node.op_type == "BatchNormalization" and _attributes(node).get("training_mode", 0):
            raise CheckpointError(f"node {node.name!r} ({node.op_type}) is in training mode: export after model.eval()")
    folded = onnx_ir.from_proto(model)
    optimizer.optimize_ir(
        folded, input_size_limit=_LARGEST_FOLD, output_size_limit=_LARGEST_FOLD, should_fold=_should_fold
    )
    model = onnx_ir.to_proto(folded)
    for node in model.graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            raise CheckpointError(f"node {node.name!r} ({node.op_type}) is control flow: export the network without it")
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    _rename(model.graph, {name: f"{name}_original" for name in taken & _ADDED})
    return _inferred(_with_free_batch(model))


def _should_fold(node: onnx_ir.Node) -> bool | None:
    """False, or None to let the optimizer's other rules decide: hostile graphs must not cost memory or time."""
    shapes = [value.shape for value in node.outputs]
    small = all(s is not None and s.is_static() and math.prod(s.numpy()) <= _LARGEST_FOLD for s in shapes)
    return None if small and node.op_type in _FOLDABLE else False


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """All shapes anew from the input's."""
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def _with_free_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Reshapes that name the batch size, or leave it to be computed, copy it from their input instead."""
    (image,) = model.graph.input
    batch = _dims(image.type.tensor_type.shape)[0]
    model = _inferred(model)
    graph = _Graph(model)
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in graph.weights:
            continue
        shape, target = graph.shapes.get(node.input[0], ()), graph.constant(node.input[1]).astype(np.int64).tolist()
        if shape[:1] != (batch,) or not target or target[0] not in (batch, -1):
            continue
        rest = [dim for dim in shape[1:] if isinstance(dim, int)]
        if -1 in target[1:] or (len(rest) == len(shape) - 1 and math.prod(rest) == math.prod(target[1:])):
            del node.attribute[:]  # allowzero
            node.input[1] = graph.add(f"{node.output[0]}_shape", np.array([0, *target[1:]], np.int64))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


class _Graph:
    """A graph's nodes and tensors by name; attributes as Python values."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self.weights = {weight.name: weight for weight in self.proto.initializer}
        self.producers = {name: node for node in self.proto.node for name in node.output}
        values = [*self.proto.input, *self.proto.value_info, *self.proto.output]
        self.shapes = {v.name: _dims(v.type.tensor_type.shape) for v in values if v.type.tensor_type.HasField("shape")}

    def constant(self, name: str) -> Float64:
        return numpy_helper.to_array(self.weights[name]).astype(np.float64)

    def add(self, name: str, values: npt.NDArray[Any]) -> str:
        """A new initializer, int64 or float32; its name."""
        if values.dtype != np.int64:
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"the weights behind {name} hold NaN or infinity: copy or train the network again")
        self.proto.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The dimensions after the batch, None unless all are known."""
        known = tuple(dim for dim in self.shapes.get(name, ())[1:] if isinstance(dim, int))
        return known if known and len(known) == len(self.shapes[name]) - 1 else None


def _dims(shape: onnx.TensorShapeProto) -> Shape:
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None  # a name, or nothing
        for dim in shape.dim
    )


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
    values: tuple[Any, ...] = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for value in values:
        value.name = names.get(value.name, value.name)


# The head: from the logits back to the pool, then the affine map from pooled features to logits.


@dataclass(frozen=True, kw_only=True)
class _Head:
    """`logits = clip?(weight @ mean(features) + bias)`: weight `(C, F)`, bias `(C,)`, features a tensor's name."""

    features: str
    channels_last: bool
    weight: Float64
    bias: Float64
    linear: bool


def _refuse(node: NodeProto | None, expected: str) -> NoReturn:
    found = f"node {node.name!r} ({node.op_type})" if node is not None else "the graph's input"
    raise CheckpointError(
        f"{found} stands where {expected} was expected: a network is served with its CAM if it ends in global average "
        "pooling over its last feature map and one linear layer; change its head and train that, or cut the graph after "
        "its linear layer with onnx.utils.extract_model"
    )


def _head(graph: _Graph) -> _Head:
    chain, (features, channels_last) = _chain(graph)
    dims = graph.shape(features)
    width = dims[-1 if channels_last else 0] if dims is not None else 0
    if dims is None or len(dims) != 3 or width > _WIDEST:
        _refuse(graph.producers.get(features), f"a feature map of known size, at most {_WIDEST} channels,")
    weight, bias = np.eye(width), np.zeros(width)  # (C, F) and (C,), growing towards the logits
    linear, layers, clip_after_layer = True, 0, None
    for node, data in chain:
        if node.op_type in _CLIPS:
            linear, clip_after_layer = False, node if layers else None
        elif node.op_type in _LAYERS and clip_after_layer is not None:
            _refuse(clip_after_layer, "the logits, or a linear operation before another layer,")
        elif node.op_type not in _SHAPE_ONLY:
            layers += node.op_type in _LAYERS
            weight, bias = _through(graph, node, data, weight, bias)
        kept = graph.shape(node.output[0])
        if kept is not None and (math.prod(kept) != len(bias) or isinstance(graph.shapes[node.output[0]][0], int)):
            _refuse(node, f"an operation that keeps a batch of {len(bias)} values")
    transposed = graph.producers.get(features)
    if channels_last and transposed is not None and _permutation(transposed) == (0, 2, 3, 1):
        features, channels_last = transposed.input[0], False
    convolution = graph.producers.get(features)
    if not layers and not channels_last and convolution is not None and _is_pointwise(graph, convolution):
        features = convolution.input[0]
        channels = graph.weights[convolution.input[1]].dims[1]
        matrix, offset = _through(graph, convolution, features, np.eye(channels), np.zeros(channels))
        weight, bias = weight @ matrix, weight @ offset + bias  # a 1 x 1 convolution commutes with the mean
    return _Head(features=features, channels_last=channels_last, weight=weight, bias=bias, linear=linear)


def _chain(graph: _Graph) -> tuple[list[tuple[NodeProto, str]], tuple[str, bool]]:
    """The nodes from pool to output, each with its data input; the pooled map and whether its channels are last."""
    chain: list[tuple[NodeProto, str]] = []
    name = graph.proto.output[0].name
    while True:
        node = graph.producers.get(name)
        if node is None:
            _refuse(None, "global average pooling")
        if (pooled := _pooled_map(graph, node)) is not None:
            return chain[::-1], pooled
        data = [name for name in node.input if name and name not in graph.weights]
        if node.op_type == "Reshape":
            data = data[:1]  # its shape may be computed
        known = _SHAPE_ONLY | _ELEMENTWISE | _LAYERS | _CLIPS
        if node.op_type not in known or len(data) != 1 or not _keeps_order(graph, node):
            _refuse(node, "global average pooling, or a linear operation on its result,")
        chain.append((node, name := data[0]))


def _keeps_order(graph: _Graph, node: NodeProto) -> bool:
    """A Gather that takes the only element of an axis is a squeeze; others choose or reorder."""
    if node.op_type != "Gather":
        return True
    shape = graph.shapes.get(node.input[0], ())
    axis: int = _attributes(node).get("axis", 0)
    return -len(shape) <= axis < len(shape) and shape[axis] == 1


def _pooled_map(graph: _Graph, node: NodeProto) -> tuple[str, bool] | None:
    """The map that a node averages as a whole, and whether its channels are last; None for another node."""
    name = node.input[0] if node.input else ""
    dims = graph.shape(name)
    if node.op_type == "GlobalAveragePool":
        return name, False
    if dims is None:
        return None
    if node.op_type == "AveragePool":
        attributes = _attributes(node)
        whole = tuple(attributes["kernel_shape"]) == dims[1:] and not any(attributes.get("pads", ()))
        return (name, False) if whole and graph.shape(node.output[0]) == (dims[0], 1, 1) else None
    if (axes := _mean_axes(graph, node)) is None:
        return None
    if len(dims) == 3 and axes in ({2, 3}, {1, 2}):
        return name, axes == {1, 2}
    before = graph.producers.get(name)
    inner = graph.shape(before.input[0]) if before is not None else None
    if before is None or inner is None or len(inner) != 3:
        return None
    if axes == {2} and _mean_axes(graph, before) == {3}:  # x.mean(3).mean(2)
        return before.input[0], False
    if axes == {2} and before.op_type == "Reshape" and dims == (inner[0], inner[1] * inner[2]):  # x.flatten(2).mean(2)
        return before.input[0], False
    return None


def _mean_axes(graph: _Graph, node: NodeProto) -> set[int] | None:
    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in graph.weights:
        return None
    rank = len(graph.shapes.get(node.input[0], ()))
    return {int(axis) % max(rank, 1) for axis in graph.constant(node.input[1])}


def _permutation(node: NodeProto) -> tuple[int, ...] | None:
    return tuple(_attributes(node).get("perm", (3, 2, 1, 0))) if node.op_type == "Transpose" else None


def _is_pointwise(graph: _Graph, node: NodeProto) -> bool:
    """A 1 x 1 convolution without strides or padding, over all channels."""
    if node.op_type != "Conv" or any(name and name not in graph.weights for name in node.input[1:]):
        return False
    attributes = _attributes(node)
    strides, pads, group = attributes.get("strides", ()), attributes.get("pads", ()), attributes.get("group", 1)
    ones: set[int] = {*strides, *graph.weights[node.input[1]].dims[2:], group}
    return ones == {1} and not any(pads)


def _through(graph: _Graph, node: NodeProto, data: str, weight: Float64, bias: Float64) -> tuple[Float64, Float64]:
    """`(weight, bias)` of the affine map after `node`, for the one before it."""
    attributes = _attributes(node)
    first = node.input[0] == data
    constants = [graph.constant(name) for name in node.input if name in graph.weights]
    value, offset = constants[0], constants[1] if len(constants) > 1 else np.zeros(1)
    if node.op_type == "BatchNormalization":
        gamma, beta, mean, variance = (constant.reshape(-1) for constant in constants)
        value = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        return value[:, None] * weight, value * (bias - mean) + beta
    if node.op_type in _ELEMENTWISE:
        if value.size not in (1, len(bias)):
            _refuse(node, f"an operation with one constant or {len(bias)}")
        value = value.reshape(-1)
        if node.op_type == "Add":
            return weight, bias + value
        if node.op_type == "Sub":
            return (weight, bias - value) if first else (-weight, value - bias)
        if node.op_type == "Mul" or first:
            value = value if node.op_type == "Mul" else 1 / value
            return value[:, None] * weight, value * bias
        _refuse(node, "a linear operation")
    if node.op_type == "Conv" and _is_pointwise(graph, node):
        matrix = value[:, :, 0, 0]
    elif node.op_type == "Gemm" and not attributes.get("transA", 0):
        matrix = attributes.get("alpha", 1.0) * (value if attributes.get("transB", 0) else value.T)
        offset = attributes.get("beta", 1.0) * offset
    else:
        matrix = value.T
    if not first or matrix.ndim != 2 or matrix.shape[1] != len(bias) or offset.size not in (1, len(matrix)):
        _refuse(node, f"a linear layer over {len(bias)} features")
    return matrix @ weight, matrix @ bias + offset.reshape(-1)


def _attach(graph: _Graph, head: _Head) -> None:
    """Make `logits` and `cam` the outputs."""
    features, old = head.features, graph.proto.output[0].name
    append = graph.proto.node.append
    if head.channels_last:
        append(helper.make_node("Transpose", [features], ["cam_features"], "cam_features", perm=[0, 3, 1, 2]))
        features = "cam_features"
    weight = graph.add("cam_weight", head.weight[:, :, None, None])
    append(helper.make_node("Conv", [features, weight], ["cam"], "cam", kernel_shape=[1, 1]))
    if head.linear:
        axes = graph.add("cam_axes", np.array([2, 3]))
        append(helper.make_node("ReduceMean", ["cam", axes], ["cam_mean"], "cam_mean", keepdims=0))
        bias = graph.add("logits_bias", head.bias)
        append(helper.make_node("Add", ["cam_mean", bias], ["logits"], "logits"))
    elif len(graph.shapes.get(old, ())) == 2:  # the network's own logit path
        _rename(graph.proto, {old: "logits"})
    else:
        append(helper.make_node("Flatten", [old], ["logits"], "logits"))
    del graph.proto.output[:]
    for name in ("logits", "cam"):
        graph.proto.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


# The input: raw pixels, normalisation folded into the first convolution.


@dataclass(frozen=True, kw_only=True)
class _Stem:
    """The first convolution, and its input as `scale * pixel + shift`, each float64 `(1, channels, S, S)`."""

    convolution: NodeProto
    scale: Float64
    shift: Float64


def _take_pixels(graph: _Graph, source: _Input, normalisation: Normalisation, size: int) -> None:
    """Exchange the input for `image` uint8 `(batch, 1, S, S)`."""
    original = graph.proto.input[0].name
    mean = 255 * np.array(normalisation.mean)[None, :, None, None]  # (1, channels, 1, 1), of 8-bit pixels
    std = 255 * np.array(normalisation.std)[None, :, None, None]
    nodes = [helper.make_node("Cast", ["image"], ["image_float"], "image_float", to=TensorProto.FLOAT)]
    stem = _stem(graph, source, 1 / std, -mean / std, size)
    if stem is not None:
        nodes += _folded(graph, stem)
    else:
        normalised = "image_normalised" if source.channels_last else original
        names = graph.add("image_mean", mean), graph.add("image_std", std)
        nodes.append(helper.make_node("Sub", ["image_float", names[0]], ["image_centred"], "image_centred"))
        nodes.append(helper.make_node("Div", ["image_centred", names[1]], [normalised], "image_normalised"))
        if source.channels_last:
            nodes.append(helper.make_node("Transpose", [normalised], [original], "image_nhwc", perm=[0, 2, 3, 1]))
    kept = [node for node in graph.proto.node if stem is None or node is not stem.convolution]
    del graph.proto.node[:], graph.proto.input[:]
    graph.proto.node.extend([*nodes, *kept])
    graph.proto.input.append(helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, size, size]))


def _stem(graph: _Graph, source: _Input, scale: Float64, shift: Float64, size: int) -> _Stem | None:
    """The convolution that the input reaches through constants and transposes alone; None where it does not."""
    full = (1, source.channels, size, size)
    scale, shift = np.broadcast_to(scale, full), np.broadcast_to(shift, full)
    if source.channels_last:
        scale, shift = np.moveaxis(scale, 1, -1), np.moveaxis(shift, 1, -1)
    name = graph.proto.input[0].name
    while True:
        users = [node for node in graph.proto.node for used in node.input if used == name]
        if len(users) != 1:
            return None
        (node,) = users
        constants = [graph.constant(used) for used in node.input if used in graph.weights]
        first = node.input[0] == name
        if node.op_type == "Conv":
            flat = np.all(scale == scale[:, :, :1, :1])  # a scale of each pixel is no convolution's weight
            whole = first and len(constants) == len(node.input) - 1 and _attributes(node).get("group", 1) == 1
            return _Stem(convolution=node, scale=scale, shift=shift) if flat and whole else None
        if (order := _permutation(node)) is not None:
            scale, shift = scale.transpose(order), shift.transpose(order)
        elif node.op_type in ("Add", "Sub") and constants:
            scale, shift = (scale, shift) if first or node.op_type == "Add" else (-scale, -shift)
            shift = shift + constants[0] * (-1 if first and node.op_type == "Sub" else 1)
        elif (node.op_type == "Mul" and constants) or (node.op_type == "Div" and first and constants):
            factor = constants[0] if node.op_type == "Mul" else 1 / constants[0]
            scale, shift = scale * factor, shift * factor
        else:
            return None
        if shift.ndim != 4 or len(shift) != 1:
            return None
        scale, shift = np.broadcast_arrays(scale, shift)
        name = node.output[0]


def _folded(graph: _Graph, stem: _Stem) -> list[NodeProto]:
    """The one-channel convolution and its bias map, as `thoraxrt.export.graph` folds them, in float64."""
    node = stem.convolution
    attributes = _attributes(node)
    weight = graph.constant(node.input[1])  # (O, channels, kh, kw)
    strides, dilations = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
    top, left, bottom, right = _pads(attributes, stem.shift.shape[2:], weight.shape[2:])
    background = torch.nn.functional.conv2d(
        torch.nn.functional.pad(torch.tensor(stem.shift), (left, right, top, bottom)),
        torch.tensor(weight),
        torch.tensor(graph.constant(node.input[2])) if len(node.input) > 2 and node.input[2] else None,
        stride=tuple(strides),
        dilation=tuple(dilations),
    )  # (1, O, h', w')
    one_channel = (weight * stem.scale[:, :, :1, :1]).sum(1, keepdims=True)  # (O, 1, kh, kw)
    names = graph.add("stem_weight", one_channel), graph.add("stem_bias_map", background.numpy())
    pads, kernel = [top, left, bottom, right], list(weight.shape[2:])
    convolution = helper.make_node(
        "Conv", ["image_float", names[0]], ["stem"], "stem",
        kernel_shape=kernel, pads=pads, strides=list(strides), dilations=list(dilations),
    )  # fmt: skip
    return [convolution, helper.make_node("Add", ["stem", names[1]], [node.output[0]], "stem_bias_map")]


def _pads(attributes: Mapping[str, Any], size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Top, left, bottom, right, computed where `auto_pad` leaves them to the runtime (ONNX's Conv)."""
    auto = attributes.get("auto_pad", b"NOTSET")
    if auto in (b"NOTSET", b"VALID"):
        top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0)) if auto == b"NOTSET" else (0, 0, 0, 0)
        return top, left, bottom, right
    before, after = [], []
    for n, k, s, d in zip(
        size, kernel, attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1)), strict=True
    ):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        before.append(total // 2 if auto == b"SAME_UPPER" else total - total // 2)
        after.append(total - before[-1])
    return before[0], before[1], after[0], after[1]


def _finished(model: onnx.ModelProto, classes: int) -> onnx.ModelProto:
    """Checked, with stable names and nothing of the machine or the tool it came from."""
    strip(model)
    names: set[str] = set()
    for position, node in enumerate(model.graph.node):
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{position}"
        names.add(node.name)
    model = _inferred(model)
    shapes = _Graph(model).shapes
    for output in model.graph.output:
        shape = shapes.get(output.name, ())
        if shape[1:2] != (classes,) or isinstance(shape[0], int):
            raise CheckpointError(
                f"the served graph's {output.name} is {shape}; expected a free batch of {classes}: export the network with a "
                "dynamic batch axis"
            )
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, ["batch", *shape[1:]]))
    onnx.checker.check_model(model, full_check=True)
    return model
