"""How fast a network could be here: its operations and bytes, counted from its graph, and what this machine reaches.

The roofline (Williams, Waterman and Patterson, CACM 52(4), 2009): no run is faster than its operations at the peak of
the arithmetic, nor than its unavoidable bytes at the bandwidth of the memory. Knows nothing of images or servers.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from thoraxrt.engine.backends import Backend, available
from thoraxrt.engine.backends.onnxruntime import OnnxRuntimeBackend
from thoraxrt.engine.backends.openvino import OpenVinoBackend
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendError, RequestError
from thoraxrt.export.graph import OPSET
from thoraxrt.export.half import fp16_from_fp32
from thoraxrt.export.quantise import int8_from_fp32, quantisable_layers

__all__ = ["Floor", "Peak", "Peaks", "Work", "floor", "measure_peaks", "work_from_bundle", "work_from_graph"]

_ITEM: Final = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
_FLOATS: Final = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


class Work(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a network takes, counted from its graph.

    `operations` of one image, 2 for each multiply-add, by the precision of the arithmetic: of the operators that
    multiply matrices (Conv, ConvTranspose, Gemm, MatMul). `not_counted` says how many nodes of what other type there
    are: pooling, normalisation, activations, additions and copies, a few per cent of the operations together.
    `weight_bytes`: the constants, read at least once for each batch. `image_bytes`: one image's input and outputs.
    `activation_bytes`: the inputs and outputs of the counted operators, each moved once, for one image; a cache
    can hold them, so that they are no part of the floor.
    """

    operations: dict[str, int]
    weight_bytes: int
    image_bytes: int
    activation_bytes: int
    not_counted: dict[str, int]


class Peak(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The most operations a second that were measured in one precision, and what reached them."""

    operations_per_s: float
    by: str


class Peaks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this machine reached on all the CPUs that this process may use: arithmetic, by precision, and memory."""

    arithmetic: dict[str, Peak]
    bytes_per_s: float


class Floor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The least time of one image at a batch size, on a machine's measured peaks.

    `operations` and `bytes` are one image's share of a batch, `intensity` is operations per byte,
    `peak_operations_per_s` that of the mix of precisions. `bound` says which of the two takes longer.
    """

    batch: int
    operations: int
    bytes: float
    intensity: float
    peak_operations_per_s: float
    bytes_per_s: float
    bound: Literal["compute", "memory"]
    milliseconds: float

    def share(self, milliseconds: float) -> float:
        """How near a measured time of one image, in ms, comes to the floor: 1 at the floor."""
        return self.milliseconds / milliseconds


# --- counting --------------------------------------------------------------------------------------


def work_from_bundle(bundle: Bundle, backend: str, precision: str) -> Work:
    """The work of the bundle's graph of this precision as that backend executes it. Raises BundleError, RequestError."""
    graph = onnx.load_model_from_string(bundle.read(bundle.graph_name(precision)))
    floats = precision
    if precision == "int8":  # what the graph keeps in float: see the OpenVINO backend
        floats = "bf16" if backend == "openvino" and available(backend, bundle)["bf16"] is None else "fp32"
    return work_from_graph(graph, floats)


def work_from_graph(model: onnx.ModelProto, floats: str) -> Work:
    """Count the work of a graph of one input, `image`; `floats` is the precision in which FLOAT tensors are executed.

    Quantised is a product whose operands both come from DequantizeLinear; tensors that QuantizeLinear gives are
    INT8. Raises RequestError where shapes cannot be inferred.
    """
    graph = _with_batch_of_one(model).graph
    tensors = _Tensors(graph, floats)
    operations: Counter[str] = Counter()
    not_counted: Counter[str] = Counter()
    activation_bytes = 0
    for node in graph.node:
        if node.op_type not in _MULTIPLY_ADDS:
            not_counted[node.op_type] += 1
            continue
        multiply_adds = _MULTIPLY_ADDS[node.op_type](
            *(tensors.shape(name) for name in (*node.input[:2], node.output[0]))
        )
        operations[tensors.arithmetic(node)] += 2 * multiply_adds
        moved = [name for name in node.input[:2] if not tensors.is_constant(name)]
        activation_bytes += sum(map(tensors.bytes, (*moved, node.output[0])))
    return Work(
        operations=dict(operations),
        weight_bytes=sum(tensors.bytes(weight.name) for weight in graph.initializer if weight.data_type in _NUMBERS),
        image_bytes=sum(_stored_bytes(value) for value in (*graph.input, *graph.output)),
        activation_bytes=activation_bytes,
        not_counted=dict(not_counted),
    )


_NUMBERS: Final = (*_FLOATS, TensorProto.INT8, TensorProto.UINT8)

_Shape = tuple[int, ...]
_MULTIPLY_ADDS: Final[Mapping[str, Callable[[_Shape, _Shape, _Shape], int]]] = {
    # of input, weight and output; a convolution's weight is (O, I / groups, kh, kw), a transposed one's (I, O / groups, ...)
    "Conv": lambda _, weight, output: math.prod(output) * math.prod(weight[1:]),
    "ConvTranspose": lambda image, weight, _: math.prod(image) * math.prod(weight[1:]),
    "Gemm": lambda a, _, output: math.prod(output) * (math.prod(a) // output[0]),
    "MatMul": lambda a, _, output: math.prod(output) * a[-1],
}


class _Tensors:
    """The shapes and sizes of a graph's tensors."""

    def __init__(self, graph: onnx.GraphProto, floats: str) -> None:
        self._floats = floats
        self._constants = {weight.name: weight for weight in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}

    def is_constant(self, name: str) -> bool:
        """Whether it is a weight, perhaps behind DequantizeLinear."""
        return self._stored(name) in self._constants

    def shape(self, name: str) -> _Shape:
        if name in self._constants:
            return tuple(self._constants[name].dims)
        return _shape(self._values[name]) if name in self._values else self.shape(self._stored(name))

    def arithmetic(self, node: onnx.NodeProto) -> str:
        """The precision in which a node multiplies."""
        precisions = {self._precision(name) for name in node.input[:2]}
        return "int8" if precisions == {"int8"} else next(iter(precisions - {"int8"}))

    def bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * _ITEM[self._precision(name)]

    def _precision(self, name: str) -> str:
        stored = self._stored(name)
        kind = (
            self._constants[stored].data_type
            if stored in self._constants
            else self._values[stored].type.tensor_type.elem_type
        )
        if kind in (TensorProto.INT8, TensorProto.UINT8):
            return "int8"
        return "fp16" if kind == TensorProto.FLOAT16 else self._floats

    def _stored(self, name: str) -> str:
        """The tensor that DequantizeLinear reads, where this one is its output."""
        producer = self._producers.get(name)
        return producer.input[0] if producer is not None and producer.op_type == "DequantizeLinear" else name


def _with_batch_of_one(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose shapes are all known."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    del single.graph.value_info[:]
    for value in (*single.graph.input, *single.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    try:
        return onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise RequestError(f"the shapes of this graph cannot be inferred ({error}); export the bundle again") from error


def _shape(value: onnx.ValueInfoProto) -> _Shape:
    dimensions = value.type.tensor_type.shape.dim
    if any(not dimension.HasField("dim_value") for dimension in dimensions):
        raise RequestError(f"the shape of tensor {value.name!r} is not fixed even for one image: expected a fixed one")
    return tuple(dimension.dim_value for dimension in dimensions)


def _stored_bytes(value: onnx.ValueInfoProto) -> int:
    item = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
    return math.prod(_shape(value)) * item


# --- the machine -----------------------------------------------------------------------------------

_CHANNELS: Final = 512
_SIDE: Final = 28
_DEPTH: Final = 4
_BATCH: Final = 4
_PRODUCT: Final = 1024
_ROUNDS: Final = 5
_REST_S: Final = 0.05  # in which the last one's threads stop spinning for their next call


def measure_peaks() -> Peaks:
    """What this machine reaches in each precision that a runtime has here, and its memory; takes 2 seconds or so.

    Arithmetic: a chain of 1 x 1 convolutions of 512 channels (matrix products of 784 x 512 x 512 for each image, with
    no shortcut such as Winograd's), batch 4, through each backend as the engine opens it, and a numpy product of side
    1,024; the best of five rounds taken in turn. Memory: see `_triad_bytes_per_s`.
    """
    probe = _probe()
    images = np.random.default_rng(0).integers(0, 256, (_BATCH, 1, _SIDE, _SIDE), np.uint8)
    square = np.random.default_rng(0).normal(size=(_PRODUCT, _PRODUCT)).astype(np.float32)
    candidates: dict[tuple[str, str], Callable[[], object]] = {("fp32", "numpy"): lambda: square @ square}
    operations = {("fp32", "numpy"): 2 * _PRODUCT**3}
    with contextlib.ExitStack() as opened:
        for precision, backend in _backends(probe):
            opened.callback(backend.close)
            candidates[precision, backend.name] = partial(backend.run, images)
            operations[precision, backend.name] = _BATCH * sum(work_from_graph(probe, "fp32").operations.values())
        seconds = _best_seconds(candidates)
    reached = {key: operations[key] / seconds[key] for key in candidates}
    arithmetic: dict[str, Peak] = {}
    for (precision, name), rate in reached.items():
        if precision not in arithmetic or rate > arithmetic[precision].operations_per_s:
            arithmetic[precision] = Peak(operations_per_s=rate, by=name)
    return Peaks(arithmetic=arithmetic, bytes_per_s=_triad_bytes_per_s())


def _best_seconds(candidates: Mapping[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], float]:
    """The least seconds of a call, of rounds taken in turn, two calls each."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in candidates}
    for _ in range(_ROUNDS):
        for key, work in candidates.items():
            time.sleep(_REST_S)
            for _ in range(2):
                start = time.perf_counter()
                work()
                seconds[key].append(time.perf_counter() - start)
    return {key: min(values) for key, values in seconds.items()}


def _backends(probe: onnx.ModelProto) -> Iterator[tuple[str, Backend]]:
    """The probe in every precision that a runtime has here."""
    fp32, int8 = probe.SerializeToString(), _int8(probe).SerializeToString()
    graphs = {"fp32": fp32, "bf16": fp32, "fp16": fp16_from_fp32(probe).SerializeToString(), "int8": int8}
    makers: list[Callable[[], Backend]] = [partial(OpenVinoBackend, graph, name) for name, graph in graphs.items()]
    makers += [partial(OnnxRuntimeBackend, graphs[name], name) for name in ("fp32", "int8")]
    for make in makers:
        with contextlib.suppress(BackendError):  # not installed, or no such arithmetic on this CPU
            backend = make()
            yield backend.precision, backend


def _probe() -> onnx.ModelProto:
    """A graph of the engine's form, `image` to `logits` and `cam`, that does little but multiply matrices."""
    random = np.random.default_rng(0)
    widths = [1, *[_CHANNELS] * (_DEPTH + 1), 1]
    nodes = [helper.make_node("Cast", ["image"], ["x0"], to=TensorProto.FLOAT)]
    weights = []
    for index, (taken, given) in enumerate(pairwise(widths)):
        scale = np.sqrt(2 / taken) / (1 if index else 128)  # He's: magnitudes stay, as deep as it is
        values = random.normal(0, scale, (given, taken, 1, 1)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{index}"))
        last = index == len(widths) - 2
        nodes.append(
            helper.make_node("Conv", [f"x{index}", f"w{index}"], ["cam" if last else f"y{index}"], f"conv{index}")
        )
        if not last:
            nodes.append(helper.make_node("Relu", [f"y{index}"], [f"x{index + 1}"]))
    weights.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    nodes.append(helper.make_node("ReduceMean", ["cam", "axes"], ["logits"], keepdims=0))
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, _SIDE, _SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1])
    cam = helper.make_tensor_value_info("cam", TensorProto.FLOAT, ["batch", 1, _SIDE, _SIDE])
    graph = helper.make_graph(nodes, "probe", [image], [logits, cam], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _int8(probe: onnx.ModelProto) -> onnx.ModelProto:
    layers = quantisable_layers(probe)
    return int8_from_fp32(probe, dict.fromkeys(layers.values(), 8.0), layers)


def _triad_bytes_per_s() -> float:
    """STREAM's triad, a = b + s c (McCalpin, 1995), in float64, counted as it does: 24 bytes for each element.

    All usable CPUs in parallel, each on its share and in blocks that its cache holds between the two numpy calls;
    each array is four times as large as the last cache, as STREAM asks. The best of five.
    """
    cpus = len(os.sched_getaffinity(0))
    elements = _array_bytes() // 8
    a, b, c = (np.full(elements, value) for value in (0.0, 1.0, 2.0))

    def triad(part: int) -> None:
        for start in range(part * elements // cpus, (part + 1) * elements // cpus, _BLOCK):
            block = slice(start, min(start + _BLOCK, (part + 1) * elements // cpus))
            np.multiply(c[block], 3.0, out=a[block])
            np.add(a[block], b[block], out=a[block])

    seconds = []
    with ThreadPoolExecutor(cpus) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(pool.map(triad, range(cpus)))
            seconds.append(time.perf_counter() - start)
    return 24 * elements / min(seconds)


_BLOCK: Final = 4096  # elements: 32 KiB of each array


def _array_bytes() -> int:
    """Four times the last-level cache, 64 MiB at least and 1 GiB at most."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    largest = max((int(size.read_text().strip().rstrip("K")) << 10 for size in sizes), default=0)
    return min(max(4 * largest, 64 << 20), 1 << 30)


# --- the floor -------------------------------------------------------------------------------------


def floor(work: Work, peaks: Peaks, batch: int) -> Floor:
    """The least time of one image in batches of `batch`, at least 1. Raises RequestError where a peak was not measured."""
    if missing := work.operations.keys() - peaks.arithmetic.keys():
        raise RequestError(
            f"no peak of {', '.join(sorted(missing))} was measured on this machine, only of {', '.join(peaks.arithmetic)}: "
            "there is no floor for it"
        )
    compute_s = sum(count / peaks.arithmetic[name].operations_per_s for name, count in work.operations.items())
    operations, moved = sum(work.operations.values()), work.weight_bytes / batch + work.image_bytes
    memory_s = moved / peaks.bytes_per_s
    return Floor(
        batch=batch,
        operations=operations,
        bytes=moved,
        intensity=operations / moved,
        peak_operations_per_s=operations / compute_s,
        bytes_per_s=peaks.bytes_per_s,
        bound="compute" if compute_s >= memory_s else "memory",
        milliseconds=1000 * max(compute_s, memory_s),
    )
