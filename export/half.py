"""FP16 from FP32: a graph of mixed types, and which nodes must stay in FP32, decided by measurement.

Owns types and their borders. It knows neither networks nor where calibration images come from.
A node is named by its first output, since ONNX lets node names be empty or repeat.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from operator import length_hint
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from thoraxrt.engine.errors import DatasetError, RequestError
from thoraxrt.export import Track, no_progress
from thoraxrt.export.graph import session_from_graph, trunk_from_graph

__all__ = ["Half", "emulation_from_fp16", "fp16_by_measurement", "fp16_from_fp32"]

_Image: TypeAlias = npt.NDArray[np.uint8]
_Logits: TypeAlias = npt.NDArray[np.float32]

_LARGEST: Final = float(np.finfo(np.float16).max)  # 65504
_SMALLEST: Final = float(np.finfo(np.float16).tiny)  # 6.1e-5: smaller values lose digits, then vanish
_SAFE: Final = _LARGEST / 4  # images that were not measured reach further than those that were
_RANKING_IMAGES: Final = 8  # enough to put groups in order; the bar is always judged on all images
_STARTS_GROUP: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SHAPE_OF: Final = ("Shape", "Size")  # these read no values, so the type of their input does not matter


class _Slots(NamedTuple):
    """Which of a node's inputs and outputs are FP16, by position."""

    takes: frozenset[int] = frozenset()
    gives: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Half:
    """An FP16 graph, and why each node that measurement keeps in FP32 is kept."""

    model: onnx.ModelProto
    why: dict[str, str]

    @property
    def kept(self) -> tuple[str, ...]:
        """The nodes kept in FP32, without those that every FP16 graph keeps."""
        return tuple(self.why)


def fp16_by_measurement(
    model: onnx.ModelProto,
    images: Callable[[], Iterable[_Image]],
    meets: Callable[[_Logits, _Logits], bool],
    track: Track = no_progress,
) -> Half:
    """The FP16 graph of a served FP32 graph, in which the fewest nodes stay FP32 that images show to need it.

    `images()` gives the calibration images anew, uint8 `(1, S, S)` each; they are streamed.
    `meets(fp16, fp32)` is the accuracy bar on logits float32 `(N, C)`, never asked about NaN.

    Kept for certain are nodes with a weight that FP16 cannot hold, or that read or write a value
    beyond a quarter of 65504 on any image. Where the rest misses the bar, each group (a
    convolution or matrix product and what follows it) is tried as the only one in FP16; those that
    move the logits most are kept, the fewest that meet the bar, found by doubling and bisection.

    Raises DatasetError without images; RequestError where the bar refuses even FP32, or as
    `fp16_from_fp32` does.
    """
    model = copy.deepcopy(model)
    _lift_constants(model.graph)
    slots = _half_slots(model)
    fp32, largest = _ranges(model, slots, track(stream := images(), "Measuring ranges", length_hint(stream)))
    if not np.isfinite(fp32).all() or not meets(fp32, fp32):
        raise RequestError("the FP32 graph itself misses the accuracy bar: check the bar and the calibration images")
    why = {name: reason for name, reason in _unfit(model.graph).items() if name in slots}
    why |= _overflowing(model.graph, slots, largest)

    def passes(keep: Collection[str]) -> bool:
        fp16 = _logits(fp16_from_fp32(model, keep), track(images(), "Comparing FP16 with FP32", len(fp32)))
        return bool(np.isfinite(fp16).all()) and meets(fp16, fp32)

    if not passes(why):
        ranked = _costliest_first(model, slots, why, images, fp32, track)
        count = _fewest(len(ranked), lambda count: passes({*why, *chain(*(group for _, group in ranked[:count]))}))
        for cost, group in ranked[:count]:
            why |= dict.fromkeys(group, f"its group alone in FP16 moves a logit by {cost:.2g} on average")
    return Half(model=fp16_from_fp32(model, why), why=why)


def _ranges(
    model: onnx.ModelProto, slots: dict[str, _Slots], images: Iterable[_Image]
) -> tuple[_Logits, dict[str, float]]:
    """The FP32 logits float32 `(N, C)`, and the largest magnitude of each tensor that could be FP16.

    The graph reduces each tensor to one number itself, so that no feature map outlives its use.
    """
    weights = {weight.name for weight in model.graph.initializer}
    names = sorted({name for node in model.graph.node for name in _half_tensors(node, slots)} - weights)
    model = copy.deepcopy(model)
    for name in names:
        model.graph.node.append(onnx.helper.make_node("Abs", [name], [f"|{name}|"]))
        model.graph.node.append(onnx.helper.make_node("ReduceMax", [f"|{name}|"], [f"max|{name}|"], keepdims=0))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"max|{name}|", TensorProto.FLOAT, []))
    session = session_from_graph(model.SerializeToString())
    wanted = ["logits", *(f"max|{name}|" for name in names)]
    rows: list[_Logits] = []
    largest = np.zeros(len(names), np.float32)
    for image in images:
        logits, *reached = session.run(wanted, {"image": image[np.newaxis]})
        rows.append(logits)
        np.maximum(largest, reached, out=largest)  # NaN wins
    if not rows:
        raise DatasetError("no calibration image to measure FP16 on: give a folder that holds some")
    return np.concatenate(rows), dict(zip(names, map(float, largest), strict=True))


def _half_tensors(node: onnx.NodeProto, slots: dict[str, _Slots]) -> list[str]:
    """What the node would read and write in FP16."""
    takes, gives = slots.get(node.output[0], _Slots())
    return [node.input[i] for i in sorted(takes)] + [node.output[i] for i in sorted(gives)]


def _overflowing(graph: onnx.GraphProto, slots: dict[str, _Slots], largest: dict[str, float]) -> dict[str, str]:
    """The nodes that FP16's range keeps in FP32, and why."""
    return {
        node.output[0]: f"{name} reaches {largest[name]:.3g}, a quarter of FP16's {_LARGEST:.0f} is safe"
        for node in graph.node
        for name in _half_tensors(node, slots)
        if name in largest and not largest[name] <= _SAFE  # NaN too
    }


def _costliest_first(
    model: onnx.ModelProto,
    slots: dict[str, _Slots],
    kept: Collection[str],
    images: Callable[[], Iterable[_Image]],
    fp32: _Logits,
    track: Track,
) -> list[tuple[float, list[str]]]:
    """Each group of the nodes not kept, with the mean logit error on a few images when it alone is FP16."""
    groups = _groups(model.graph, slots.keys() - kept)
    few = list(islice(images(), _RANKING_IMAGES))
    ranked: list[tuple[float, list[str]]] = []
    for group in track(groups, "Finding what FP16 costs", len(groups)):
        alone = _logits(fp16_from_fp32(model, slots.keys() - set(group)), few)
        error = float(np.abs(alone - fp32[: len(few)]).mean())
        ranked.append((error if np.isfinite(error) else np.inf, group))
    return sorted(ranked, key=lambda pair: -pair[0])


def _groups(graph: onnx.GraphProto, nodes: Collection[str]) -> list[list[str]]:
    """The named nodes in groups: a convolution or matrix product, and what follows it up to the next."""
    groups: list[list[str]] = []
    group_of: dict[str, int] = {}  # by tensor
    for node in graph.node:
        if node.output[0] not in nodes:
            continue
        before = [group_of[name] for name in node.input if name in group_of]
        if node.op_type in _STARTS_GROUP or not before:
            before = [len(groups)]
            groups.append([])
        index = max(before)
        groups[index].append(node.output[0])
        group_of.update(dict.fromkeys(node.output, index))
    return groups


def _fewest(count: int, passes: Callable[[int], bool]) -> int:
    """The smallest number from 1 to `count` that passes, where more never hurts and `count` is known to pass."""
    enough = 1
    while enough < count and not passes(enough):
        enough *= 2
    too_few, enough = enough // 2, min(enough, count)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if passes(middle):
            enough = middle
        else:
            too_few = middle
    return enough


def _logits(half: onnx.ModelProto, images: Iterable[_Image]) -> _Logits:
    """The FP16 graph's logits float32 `(N, C)`, every rounding done."""
    session = session_from_graph(emulation_from_fp16(half).SerializeToString())
    return np.concatenate([session.run(["logits"], {"image": image[np.newaxis]})[0] for image in images])


def emulation_from_fp16(half: onnx.ModelProto) -> onnx.ModelProto:
    """An FP16 graph in FP32 types that rounds each tensor to FP16 as soon as a node has written it.

    Made since ONNX Runtime's CPU provider has hardly an FP16 operator on x86: it computes an FP16
    graph in FP32 and drops the roundings between neighbours, which shows too small an error.

    Covered are the storage of weights and tensors in FP16, overflow to infinity included, with sums
    inside an operator in FP32: what tensor cores do, and a little more than a compiler rounds that
    fuses nodes. Not covered: sums in FP16, which some hardware may choose (error grows, and a sum can
    overflow though its result fits), subnormals flushed to zero, and each kernel's order of adding.
    """
    model = copy.deepcopy(half)
    graph = model.graph
    halves = _tensors(half, TensorProto.FLOAT16)
    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT16:
            values = onnx.numpy_helper.to_array(weight).astype(np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    nodes = list(graph.node)
    del graph.node[:], graph.value_info[:]  # the old types
    for node in nodes:
        written = [(position, name) for position, name in enumerate(node.output) if name in halves]
        if node.op_type == "Cast" and written:
            _cast_to(node, TensorProto.FLOAT)
        for position, name in written:
            node.output[position] = f"{name}_exact"
        graph.node.append(node)
        for _, name in written:
            for source, target, to in (
                ("_exact", "_rounded", TensorProto.FLOAT16),
                ("_rounded", "", TensorProto.FLOAT),
            ):
                graph.node.append(onnx.helper.make_node("Cast", [name + source], [name + target], to=to))
    return model


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
    floats = _tensors(half, TensorProto.FLOAT)
    halves = {node.output[i] for node, (_, gives) in zip(graph.node, slots, strict=True) for i in gives}
    forms: dict[int, dict[str, str]] = {  # what each tensor is called in each type
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


def _tensors(model: onnx.ModelProto, data_type: int) -> set[str]:
    """The names of all tensors of a type, weights included."""
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    names = {value.name for value in values if value.type.tensor_type.elem_type == data_type}
    return names | {weight.name for weight in graph.initializer if weight.data_type == data_type}


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
    floats = _tensors(model, TensorProto.FLOAT)
    versions = {opset.domain: opset.version for opset in model.opset_import}
    trunk, pixels = trunk_from_graph(model.graph), {entry.name for entry in model.graph.input}
    found: dict[str, _Slots] = {}
    for node in model.graph.node:
        slots = _half_form(node, versions[node.domain], floats)
        if node.op_type in _SHAPE_OF or not pixels.intersection(node.input):
            continue
        pixels.update(node.output)
        if slots and node.output[0] in trunk:
            found[node.output[0]] = slots
    return found


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
            _cast_to(node, TensorProto.FLOAT16)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _cast_to(cast: onnx.NodeProto, to: int) -> None:
    (attribute,) = (attribute for attribute in cast.attribute if attribute.name == "to")
    attribute.i = to
