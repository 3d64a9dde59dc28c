"""TensorRT: what of it this machine has, and plans from ONNX graphs.

Two flavours share one interface: `tensorrt` (10.3 to 11.x), which tunes for the GPU it runs on, and
`tensorrt_rtx`, which compiles for named targets and needs no GPU to do so. Networks are strongly
typed: precision is what the graph says. Knows neither bundles nor the plan cache
(`thoraxrt.engine.plans`), and does not run plans.

What only the first flavour can do (timing cache, version compatibility) is written to
its documentation and held against the Python signatures of its 10.3.0 and 11.4.0 wheels in the
tests; none of it has been run yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import platform
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from thoraxrt.engine.errors import BackendError, BackendUnavailableError, RequestError

__all__ = [
    "RTX",
    "Device",
    "Flavour",
    "LayerTypes",
    "Plan",
    "PlanOptions",
    "current_device",
    "host_platform",
    "installed_flavour",
    "listening",
    "plan_from_onnx",
    "supported_options",
    "version_numbers",
]

_OLDEST, _BEYOND = (10, 3), (12,)
_AMPERE: Final = 80
RTX: Final = "tensorrt_rtx"
_TYPES: Final = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}

# What to do about a parser error, by what its description says.
_REMEDIES: Final = (
    ("zero point", "TensorRT takes symmetric scales only: quantise with zero points of 0"),
    ("must have type FP8", "TensorRT takes no quantised bias: leave biases in float"),
    ("same input types", "the network is strongly typed: put a Cast between the types"),
    ("Plugin not found", "TensorRT has no such operator: export the network without it, or run it on another backend"),
    ("deserializeOnnxModel", "this is no ONNX graph: export the bundle again"),
)
_REMEDY: Final = "export the bundle again with this thoraxrt, or run the graph on another backend"

_LISTENING = threading.Lock()
"""TensorRT takes one logger per process, so what it says belongs to one caller at a time."""


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to compile a plan for, and how; order and repetition in `buckets` and `targets` do not matter.

    `buckets`: batch sizes, 1 to 1024, one optimisation profile each with min = opt = max, in
    ascending order. `targets`: GPU architectures such as "sm86"; empty for this machine's GPU.
    `optimization_level`: 0 to 5, how long the builder searches. `workspace_mib`: most scratch memory
    a layer may take, in MiB; None for all of the device's. `hardware_compatible`: for every GPU from
    Ampere on. `version_compatible`: for later runtimes of the same major version. `strip_weights`:
    a plan without weights, refitted from the ONNX graph when loaded.

    Raises ValueError where a value is out of range.

    Example: `PlanOptions(buckets=(1, 8), targets=("sm86", "sm89"))`.
    """

    buckets: tuple[int, ...] = (1, 8, 32)
    targets: tuple[str, ...] = ()
    optimization_level: int = 3
    workspace_mib: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    strip_weights: bool = False

    def __post_init__(self) -> None:
        if not self.buckets or not all(1 <= bucket <= 1024 for bucket in self.buckets):
            raise ValueError(f"batch buckets {self.buckets}: expected at least one, each 1 to 1024")
        if wrong := [target for target in self.targets if not re.fullmatch(r"sm[1-9][0-9]{1,2}", target)]:
            raise ValueError(f"target {', '.join(wrong)}: expected GPU architectures, sm86 or sm120 for example")
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"optimization level {self.optimization_level}: expected 0 to 5")
        if self.workspace_mib is not None and not 1 <= self.workspace_mib <= 1 << 20:
            raise ValueError(f"workspace of {self.workspace_mib} MiB: expected 1 to {1 << 20}")
        msgspec.structs.force_setattr(self, "buckets", tuple(sorted(set(self.buckets))))
        msgspec.structs.force_setattr(self, "targets", tuple(sorted(set(self.targets), key=_capability)))


class LayerTypes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parsed network's types, before the builder fuses anything.

    `convolutions` counts them by what they compute in: "int8" where both activation and weights
    come from a Dequantize layer over INT8, else the type of their activation ("fp16", "fp32").
    `layers` counts each layer type with its input and output tensor types, as
    "CONVOLUTION HALF -> HALF"; constant weights inside a layer are no inputs.
    """

    convolutions: dict[str, int]
    layers: dict[str, int]

    def __str__(self) -> str:
        return "convolutions by the graph's types: " + ", ".join(
            f"{count} {name}" for name, count in self.convolutions.items()
        )


class Plan(NamedTuple):
    """A serialised engine, the builder's timing cache (None where the flavour has none), and what was parsed."""

    data: bytes
    timing_cache: bytes | None
    layers: LayerTypes


class Flavour(NamedTuple):
    """An installed TensorRT: its module, `tensorrt` or `tensorrt_rtx` by name, and its version."""

    module: Any
    name: str
    version: str


class Device(NamedTuple):
    """A GPU: the driver's name for it, and its architecture, "sm86" say."""

    name: str
    architecture: str


def installed_flavour() -> Flavour:
    """`tensorrt` where it is installed, else `tensorrt_rtx`.

    Raises BackendUnavailableError where there is neither, or the one found is broken or too old.
    """
    for name in ("tensorrt", RTX):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                continue
            raise BackendUnavailableError(f"{name} is installed but lacks {error.name}; install it again") from error
        except (ImportError, OSError) as error:
            raise BackendUnavailableError(f"{name} is installed but cannot be loaded: {error}") from error
        version = str(module.__version__)
        if name == "tensorrt" and not _OLDEST <= version_numbers(version) < _BEYOND:
            raise BackendUnavailableError(f"tensorrt {version} is installed; expected 10.3 to 11.x")
        return Flavour(module, name, version)
    raise BackendUnavailableError(
        "TensorRT is not installed: pip install 'thoraxrt[gpu]', or 'thoraxrt[rtx]' for TensorRT-RTX"
    )


def version_numbers(version: str) -> tuple[int, ...]:
    """What versions compare by: (10, 3, 0) of "10.3.0"."""
    return tuple(map(int, re.findall(r"\d{1,9}", version)))


def host_platform() -> str:
    """The operating system and processor that plans are made on and for, "linux-x86_64" say."""
    return f"{platform.system()}-{platform.machine()}".lower()


def current_device(index: int = 0) -> Device:
    """The GPU of that index, asked from the NVIDIA driver; without a context, which would cost memory there.

    Raises BackendUnavailableError where there is none, RequestError where there are others only.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailableError("no NVIDIA driver here: libcuda.so.1 cannot be loaded") from error
    count, device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    for function, *arguments in (  # CUDA driver API; 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        ("cuInit", 0),
        ("cuDeviceGetCount", ctypes.byref(count)),
        ("cuDeviceGet", ctypes.byref(device), index),
        ("cuDeviceGetName", name, len(name), device),
        ("cuDeviceGetAttribute", ctypes.byref(major), 75, device),
        ("cuDeviceGetAttribute", ctypes.byref(minor), 76, device),
    ):
        if count.value and not 0 <= index < count.value:
            raise RequestError(
                f"there is no cuda:{index}: the GPUs that this process sees end with cuda:{count.value - 1}"
            )
        if (status := getattr(driver, str(function))(*arguments)) != 0:
            raise BackendUnavailableError(f"no NVIDIA GPU here: {function} gives error {status}; nvidia-smi says more")
    return Device(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")


def supported_options(options: PlanOptions, flavour: Flavour, device: int = 0) -> PlanOptions:
    """The options with their targets named, once the flavour is known to have them all; its own result it gives back.

    `device` is the GPU that is meant where none is named. Raises RequestError naming an option that
    the flavour lacks, BackendUnavailableError where it would need a GPU that is not there.
    """
    name = f"{flavour.name} {flavour.version}"
    if flavour.name == RTX:
        return _supported_by_rtx(options, flavour, name, device)
    here = _device_for("compiling", name, device).architecture
    if options.targets not in ((), (here,)):
        raise RequestError(
            f"target {', '.join(options.targets)}: {name} compiles for the GPU it runs on, {here} here; "
            "compile on that GPU, or with tensorrt_rtx in an environment without tensorrt"
        )
    return msgspec.structs.replace(options, targets=(here,))


def _supported_by_rtx(options: PlanOptions, flavour: Flavour, name: str, device: int) -> PlanOptions:
    if options.version_compatible:
        raise RequestError(f"version compatibility: {name} has none; its plans are remade in seconds: leave it out")
    if options.strip_weights:
        _device_for("weight stripping", name, device)
    nameable = sorted(
        (n.lower() for n in flavour.module.ComputeCapability.__members__ if n[:2] == "SM"), key=_capability
    )
    if options.hardware_compatible:
        portable = tuple(target for target in nameable if _capability(target) >= _AMPERE)
        if options.targets not in ((), portable):
            raise RequestError("hardware compatibility is for every GPU from Ampere on: name no --target with it")
        return msgspec.structs.replace(options, targets=portable)
    if options.targets and not set(options.targets) - set(nameable):
        return options
    # What has no name (sm90, say) can only be meant as the GPU that is here.
    here: tuple[str, ...] = ()
    try:
        here = (_device_for("compiling without --target", name, device).architecture,)
    except BackendUnavailableError:
        if not options.targets:
            raise
    if options.targets not in ((), here):
        raise RequestError(
            f"target {', '.join(set(options.targets) - set(nameable))}: {name} compiles for {', '.join(nameable)}, "
            "or without --target for this machine's GPU"
        )
    return msgspec.structs.replace(options, targets=here)


def _device_for(what: str, runtime: str, device: int) -> Device:
    try:
        return current_device(device)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(f"{what} needs a GPU with {runtime}; {error}") from error


def _capability(target: str) -> int:
    return int(target.removeprefix("sm"))


def plan_from_onnx(graph: bytes, options: PlanOptions, timing_cache: bytes = b"", device: int = 0) -> Plan:
    """Compile a serialised ONNX graph with one input whose first axis is the batch.

    `timing_cache` is one that an earlier build with the same flavour, version and GPU gave. A plan for
    the GPU that is here is one for `device`, whose context must be current unless it is the first.
    Raises BackendError naming the ONNX node or what the builder said, and what `supported_options` raises.
    """
    flavour = installed_flavour()
    options = supported_options(options, flavour, device)
    with listening(flavour) as logger:
        parsed = _parse(graph, flavour, logger)
        config = _builder_config(parsed, options, flavour)
        timings = None if flavour.name == RTX else _attach_timing_cache(config, timing_cache)
        data = parsed.builder.build_serialized_network(parsed.network, config)
        if data is None:
            raise BackendError(
                f"{flavour.name} {flavour.version} cannot build the plan: "
                f"{logger.said()}; "
                "a larger workspace or fewer batch buckets may help"
            )
        kept = None if timings is None else bytes(timings.serialize())
        return Plan(bytes(data), kept, _layer_types(parsed.network))


class _Parsed(NamedTuple):
    """A network and what must outlive it: the parser owns its weights."""

    network: Any
    builder: Any
    parser: Any


def _parse(graph: bytes, flavour: Flavour, logger: Any) -> _Parsed:
    trt = flavour.module
    builder = trt.Builder(logger)
    typed = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")  # a version without it knows no other
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise BackendError("; ".join(_parser_error(error, flavour) for error in errors))
    if network.num_inputs != 1:
        raise BackendError(
            f"the graph has {network.num_inputs} inputs; expected one, the image: export the bundle again"
        )
    return _Parsed(network, builder, parser)


@contextlib.contextmanager
def listening(flavour: Flavour) -> Iterator[Any]:
    """The process's one logger, to be given to TensorRT; what it hears inside is the caller's: `said()`."""
    with _LISTENING:
        logger = _logger(flavour.module)
        logger.errors.clear()
        yield logger


@functools.cache
def _logger(trt: Any) -> Any:
    """The process's one logger: keeps errors for our messages and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)

        def said(self) -> str:
            said = "; ".join(self.errors) or "it gave no reason"
            self.errors.clear()
            return said

    return Logger()


def _parser_error(error: Any, flavour: Flavour) -> str:
    description = " ".join(error.desc().split())
    said = f"{description} {error.func()}"
    remedy = next((remedy for text, remedy in _REMEDIES if text in said), _REMEDY)
    if error.node() < 0:
        return f"{flavour.name} {flavour.version} cannot read the graph: {description}; {remedy}"
    stack = [*error.local_function_stack()]
    inside = f" in function {' > '.join(stack)}" if stack else ""
    return (
        f"{flavour.name} {flavour.version} does not take ONNX node {error.node()}, {error.node_name()!r} "
        f"({error.node_operator()}){inside}: {description}; {remedy}"
    )


def _builder_config(parsed: _Parsed, options: PlanOptions, flavour: Flavour) -> Any:
    """A configuration with one optimisation profile per batch bucket."""
    trt = flavour.module
    config = parsed.builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the engine inspector; the plan does not grow
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: "fp32" would execute TF32
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.hardware_compatible and flavour.name != RTX:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if flavour.name == RTX:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else it may allocate in a stream that captures
        # None named is NVIDIA's default: Ampere and later, those without a name too.
        named = () if options.hardware_compatible else options.targets
        config.num_compute_capabilities = len(named)
        for index, target in enumerate(named):
            members = trt.ComputeCapability.__members__
            config.set_compute_capability(members.get(target.upper(), trt.ComputeCapability.CURRENT), index)
    image = parsed.network.get_input(0)
    for bucket in options.buckets:
        shape = (bucket, *tuple(image.shape)[1:])
        profile = parsed.builder.create_optimization_profile()
        profile.set_shape(image.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    return config


def _attach_timing_cache(config: Any, data: bytes) -> Any:
    """An earlier build's timings where the builder takes them, else none yet; must outlive the build."""
    cache = config.create_timing_cache(data)
    if not config.set_timing_cache(cache, False):  # False: refuse another GPU's
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _layer_types(network: Any) -> LayerTypes:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    from_int8 = {
        layer.get_output(0).name
        for layer in layers
        if layer.type.name == "DEQUANTIZE" and layer.get_input(0).dtype.name == "INT8"
    }
    kinds: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    for layer in layers:
        inputs = [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if layer.type.name == "CONVOLUTION":
            quantised = [tensor.name in from_int8 for tensor in inputs[:2]] == [True, True]
            convolutions["int8" if quantised else _TYPES.get(inputs[0].dtype.name, inputs[0].dtype.name)] += 1
        taken = ", ".join(tensor.dtype.name for tensor in inputs)
        kinds[f"{layer.type.name} {taken} -> {', '.join(tensor.dtype.name for tensor in outputs)}"] += 1
    return LayerTypes(convolutions=dict(sorted(convolutions.items())), layers=dict(sorted(kinds.items())))
