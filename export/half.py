"""FP16 from FP32: a graph of mixed types, and which nodes must stay in FP32, decided by measurement.

Owns types and their borders. It knows neither networks nor where calibration images come from.
A node is named by its first output, since ONNX lets node names be empty or repeat.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Final, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from thoraxrt.engine.errors import RequestError

__all__ = ["fp16_from_fp32"]

_LARGEST: Final = float(np.finfo(np.float16).max)  # 65504
_SMALLEST: Final = float(np.finfo(np.float16).tiny)  # 6.1e-5: smaller values lose digits, then vanish
_SHAPE_OF: Final = ("Shape", "Size")  # these read no values, so the type of their input does not matter


class _Slots(NamedTuple):
    """Which of a node's inputs and outputs are FP16, by position."""

    takes: frozenset[int] = frozenset()
    gives: frozenset[int] = frozenset()


def fp16_from_fp32(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """The served graph in FP16 types: input `image` uint8 and outputs `logits` and `cam` float32 as before.

    `keep` names nodes that stay in FP32. Of themselves stay: the head (all that the CAM
    convolution's input does not need), what does not depend on pixels (shape arithmetic: FP16
    counts exactly to 2048 only), operators without an FP16 form, and nodes with a weight that FP16
    cannot hold. A Cast stands at each border, one per tensor and direction; a weight that both
    sides use is there twice.

    Raises RequestError where `keep` names no node, the graph has no CAM convolution, or a node is
    control flow or no standard operator.
    """
    half = copy.deepcopy(model)
    graph = half.graph
    _lift_constants(graph)
    if unknown := sorted(set(keep) - {node.output[0] for node in graph.node}):
        raise RequestError(
            f"no node to keep in FP32 has the first output {', '.join(unknown)}: name nodes of this graph"
        )
    kept = {*keep, *_unfit(graph)}
    half_slots = {name: slots for name, slots in _half_slots(half).items() if name not in kept}
    slots = [half_slots.get(node.output[0], _Slots()) for node in graph.node]
    floats = _float_tensors(half)
    halves = {node.output[i] for node, (_, gives) in zip(graph.node, slots, strict=True) for i in gives}
    forms = {  # what each tensor is called in each type
        TensorProto.FLOAT: {name: name for name in floats - halves},
        TensorProto.FLOAT16: {name: name for name in halves} | _halve_weights(graph, slots),
    }
    _cast_at_borders(graph, slots, floats, forms)
    del graph.value_info[:]  # the old types
    half = onnx.shape_inference.infer_shapes(half, strict_mode=True)
    onnx.checker.check_model(half, full_check=True)
    return half


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Turn float Constant nodes into initialisers, so that both are typed alike."""
    for node in list(graph.node):
        if node.op_type == "Constant" and node.attribute[0].t.data_type == TensorProto.FLOAT:
            graph.initializer.append(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
            graph.node.remove(node)


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """The names of all FP32 tensors, weights included."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    names = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {weight.name for weight in graph.initializer if weight.data_type == TensorProto.FLOAT}


def _unfit(graph: onnx.GraphProto) -> dict[str, str]:
    """The nodes that a weight keeps in FP32, and why."""
    reasons: dict[str, str] = {}
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT:
            continue
        values = np.abs(onnx.numpy_helper.to_array(weight))
        largest = float(values.max(initial=0, where=np.isfinite(values)))  # FP16 has infinities too
        if largest > _LARGEST or 0 < largest < _SMALLEST:
            reasons[weight.name] = f"{weight.name} reaches {largest:.3g}, FP16 holds {_SMALLEST:.2g} to {_LARGEST:.0f}"
    return {node.output[0]: reasons[name] for node in graph.node for name in node.input if name in reasons}


def _half_slots(model: onnx.ModelProto) -> dict[str, _Slots]:
    """The nodes that could be FP16: those of the trunk that pixels pass through and that have an FP16 form."""
    floats, versions = _float_tensors(model), {opset.domain: opset.version for opset in model.opset_import}
    trunk, pixels = _trunk(model.graph), {entry.name for entry in model.graph.input}
    found: dict[str, _Slots] = {}
    for node in model.graph.node:
        if node.op_type in _SHAPE_OF or not pixels.intersection(node.input):
            continue
        pixels.update(node.output)
        slots = _half_form(node, versions[node.domain], floats)
        if slots and node.output[0] in trunk:
            found[node.output[0]] = slots
    return found


def _trunk(graph: onnx.GraphProto) -> set[str]:
    """The nodes that the CAM convolution's input comes from."""
    producers = {name: node for node in graph.node for name in node.output}
    node = producers.get("cam")
    while node is not None and node.op_type != "Conv":
        node = producers.get(next(iter(node.input), ""))
    if node is None:
        raise RequestError("the graph's output cam comes from no Conv: give the FP32 graph of a bundle")
    trunk: set[str] = set()
    pending = [node.input[0]]
    while pending:
        node = producers.get(pending.pop())
        if node is not None and node.output[0] not in trunk:
            trunk.add(node.output[0])
            pending.extend(node.input)
    return trunk


def _half_form(node: onnx.NodeProto, version: int, floats: set[str]) -> _Slots | None:
    """What the operator's schema lets be FP16; None where a float output would still be FP32."""
    where = f"node {node.name or node.output[0]} ({node.op_type})"
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
        raise RequestError(f"{where} is control flow, which FP16 conversion does not follow: export --precision fp32")
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError as error:
        raise RequestError(f"{where} is no standard ONNX operator: rewrite it, or export --precision fp32") from error
    has_half = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    # A variadic operator's last formal parameter stands for all that follow it.
    takes = {i: schema.inputs[min(i, len(schema.inputs) - 1)].type_str for i, n in enumerate(node.input) if n in floats}
    gives = {
        i: schema.outputs[min(i, len(schema.outputs) - 1)].type_str for i, n in enumerate(node.output) if n in floats
    }
    takes = {position: variable for position, variable in takes.items() if variable in has_half}
    if node.op_type != "Cast" and not set(gives.values()) <= set(takes.values()):
        return None  # its output's type comes from an attribute, or is always FP32
    return _Slots(frozenset(takes), frozenset(gives))


def _halve_weights(graph: onnx.GraphProto, slots: list[_Slots]) -> dict[str, str]:
    """Type each weight as its nodes take it, a second one where they differ; the FP16 names by weight."""
    in_half: set[str] = set()
    in_full: set[str] = set()
    for node, (takes, _) in zip(graph.node, slots, strict=True):
        for position, name in enumerate(node.input):
            (in_half if position in takes else in_full).add(name)
    names: dict[str, str] = {}
    for weight in [weight for weight in graph.initializer if weight.name in in_half]:
        values = onnx.numpy_helper.to_array(weight).astype(np.float16)
        names[weight.name] = f"{weight.name}_fp16" if weight.name in in_full else weight.name
        target = graph.initializer.add() if weight.name in in_full else weight
        target.CopyFrom(onnx.numpy_helper.from_array(values, names[weight.name]))
    return names


def _cast_at_borders(
    graph: onnx.GraphProto, slots: list[_Slots], floats: set[str], forms: dict[int, dict[str, str]]
) -> None:
    """Give each node its inputs in its types, where need be through a Cast that others share."""
    nodes: list[onnx.NodeProto] = []
    for node, (takes, gives) in zip(graph.node, slots, strict=True):
        for position, name in enumerate(node.input):
            to = TensorProto.FLOAT16 if position in takes else TensorProto.FLOAT
            if name not in floats or node.op_type in _SHAPE_OF:
                continue
            if name not in forms[to]:
                cast = forms[to][name] = f"{name}_fp{16 if position in takes else 32}"
                nodes.append(onnx.helper.make_node("Cast", [name], [cast], cast, to=to))
            node.input[position] = forms[to][name]
        if node.op_type == "Cast" and gives:
            (attribute,) = (attribute for attribute in node.attribute if attribute.name == "to")
            attribute.i = TensorProto.FLOAT16
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
