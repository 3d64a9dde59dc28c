"""INT8 as Q/DQ: one graph that TensorRT, OpenVINO and ONNX Runtime all take.

Owns the rules that chest X-ray networks need; the arithmetic is ONNX Runtime's quantiser. Only
convolutions are quantised: their inputs per tensor, their weights per output channel, both symmetric
and signed with zero point 0, biases in float. The stem and the head stay in float: a symmetric scale
over raw pixels, 0 to 255, would waste half of its codes, and logits and CAMs are what is compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from thoraxrt.engine.errors import RequestError
from thoraxrt.export.graph import trunk_from_graph

__all__ = ["LARGEST_EXPONENT", "equalised", "int8_from_fp32", "quantisable_layers", "scales_from_maxima"]

LARGEST_EXPONENT: Final = 24
"""No channel is scaled by more than this power of two, so that nothing leaves float32's range."""

_SHARE: Final = 0.75
"""How far activations, rather than weights, decide a channel's scale; of 0.5, 0.65, 0.75 and 1 the best on DenseNet-121."""


def quantisable_layers(model: onnx.ModelProto) -> dict[str, str]:
    """The convolutions that may be quantised: each one's node name, and the tensor that it takes.

    Two-dimensional ones with constant weights of their own in the trunk, but the stem (before it lies no
    other convolution), in the graph's order. Raises RequestError where there is none.
    """
    uses = Counter(name for node in model.graph.node for name in node.input)
    weights = {weight.name for weight in model.graph.initializer if len(weight.dims) == 4 and uses[weight.name] == 1}
    trunk = trunk_from_graph(model.graph)
    behind_a_convolution: set[str] = set()
    layers = {}
    for node in model.graph.node:
        if node.op_type == "Conv" or behind_a_convolution.intersection(node.input):
            inside = node.op_type == "Conv" and node.input[0] in behind_a_convolution and node.output[0] in trunk
            if inside and node.input[1] in weights:
                layers[node.name] = node.input[0]
            behind_a_convolution.update(node.output)
    if not layers:
        raise RequestError(
            "the network has no convolution between its stem and its CAM, so nothing to quantise: leave int8 out of --precision"
        )
    return layers


def scales_from_maxima(
    model: onnx.ModelProto, largest: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, tuple[int, ...]]:
    """By how much to divide each channel of the tensors that `equalised` can scale: base-2 logarithms.

    `largest` has each quantisable tensor's largest magnitude by channel, float32 `(C,)`. It is weighed
    against that of the weights as SmoothQuant does (Xiao et al., ICML 2023, equation 4).
    """
    weights = {weight.name: weight for weight in model.graph.initializer}
    scales = {}
    for tensor, _, convolutions in _scalable(model):
        arrays = [onnx.numpy_helper.to_array(weights[node.input[1]]) for node in convolutions]  # (O, C, k, k)
        spread = np.max([np.abs(array).max((0, 2, 3)) for array in arrays], axis=0)  # (C,)
        alive = (largest[tensor] > 0) & (spread > 0)  # else the channel is always zero, or nothing reads it
        exponent = np.zeros(len(spread))
        exponent[alive] = _SHARE * np.log2(largest[tensor][alive]) - (1 - _SHARE) * np.log2(spread[alive])
        exponent[alive] -= exponent[alive].mean() if alive.any() else 0.0
        scales[tensor] = tuple(np.clip(np.rint(exponent), -LARGEST_EXPONENT, LARGEST_EXPONENT).astype(int).tolist())
    return scales


def equalised(model: onnx.ModelProto, scales: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The same function with its channels brought to similar ranges, so that one range per tensor fits them better.

    Between a batch norm or convolution and the convolutions that read it through a ReLU, dividing a
    channel by s > 0 and multiplying the weights that read it by s changes nothing (Nagel et al.,
    Data-free quantization, ICCV 2019, section 4.1). Here s is a power of two, whose logarithm `scales`
    has by tensor and channel: every value keeps its mantissa, and the logits keep their bits. Tensors
    without scales stay as they are. Whether it helps depends on the network: measure.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    weights = {weight.name: weight for weight in result.graph.initializer}
    for tensor, parameters, convolutions in _scalable(model):
        if tensor not in scales:
            continue
        scale = np.exp2(np.array(scales[tensor], np.float32))  # (C,)
        for name in parameters:  # (C,), or a convolution's weights (C, K, k, k)
            array = onnx.numpy_helper.to_array(weights[name])
            _replace(weights[name], np.divide(array, scale.reshape(-1, *[1] * (array.ndim - 1)), dtype=np.float32))
        for node in convolutions:  # (O, C, k, k)
            array = onnx.numpy_helper.to_array(weights[node.input[1]])
            _replace(weights[node.input[1]], array * scale[:, np.newaxis, np.newaxis])
    return result


class _Scalable(NamedTuple):
    """A tensor whose channels can be scaled, the parameters that make it, and the convolutions that read it."""

    tensor: str
    parameters: Sequence[str]
    convolutions: Sequence[onnx.NodeProto]


def _scalable(model: onnx.ModelProto) -> Iterator[_Scalable]:
    """Each ReLU between constants used nowhere else and nothing but quantisable convolutions of one group."""
    weights = {weight.name for weight in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    producers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers = quantisable_layers(model)
    for tensor in dict.fromkeys(layers.values()):
        relu = producers[tensor]
        source = producers.get(relu.input[0]) if relu.op_type == "Relu" else None
        if source is None or source.op_type not in ("BatchNormalization", "Conv"):
            continue
        parameters, convolutions = source.input[1:3], readers[tensor]
        alone = [relu.input[0], *parameters, *(node.input[1] for node in convolutions)]
        if (
            weights.issuperset(alone[1:])
            and all(len(readers[name]) == 1 for name in alone)
            and outputs.isdisjoint((tensor, relu.input[0]))
            and all(node.name in layers and _groups(node) == 1 for node in convolutions)
        ):
            yield _Scalable(tensor, parameters, convolutions)


def _groups(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def _replace(weight: onnx.TensorProto, array: npt.NDArray[np.float32]) -> None:
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


def int8_from_fp32(model: onnx.ModelProto, ranges: Mapping[str, float], layers: Collection[str]) -> onnx.ModelProto:
    """The same graph with Q/DQ pairs before the named convolutions; the same arguments give the same bytes.

    `ranges` has, for each tensor that those convolutions take, the magnitude that code 127 stands for.
    """
    quantised = onnx.ModelProto()
    quantised.CopyFrom(model)
    quantiser = QDQQuantizer(
        quantised,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(
            CalibrationMethod.MinMax,
            {name: TensorData(lowest=np.float32(-top), highest=np.float32(top)) for name, top in ranges.items()},
        ),
        nodes_to_quantize=sorted(layers),
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,  # TensorRT refuses an int32 bias
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        },
    )
    if layers:  # an empty list of nodes means all of them to the quantiser
        quantiser.quantize_model()
        _give_back(quantiser.model.model.graph, layers)
        quantiser.model.topological_sort()
    result: onnx.ModelProto = quantiser.model.model
    result.producer_name, result.producer_version = model.producer_name, model.producer_version
    onnx.checker.check_model(result, full_check=True)
    return result


def _give_back(graph: onnx.GraphProto, layers: Collection[str]) -> None:
    """Let all but the named convolutions read float tensors: the quantiser rounds whatever else reads them, too."""
    sources = {node.output[0]: node.input[0] for node in graph.node}
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.name in layers:
            continue
        for position, name in enumerate(node.input):
            if name in rounded:
                node.input[position] = sources[sources[name]]
