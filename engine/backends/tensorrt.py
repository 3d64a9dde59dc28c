"""TensorRT on an NVIDIA GPU: runs compiled plans, one execution context per batch bucket.

A plan comes from the cache (`thoraxrt.engine.plans`), vouched for and fitting this machine; nothing
else is deserialised. `tensorrt` and `tensorrt_rtx` run by the same calls; what only the second has
stands in `_refuse_invalid` and `_rtx_config`. Memory and streams come from `thoraxrt.engine.cuda.cuda`.

Every call is held against TensorRT's real signatures and executed through a stand-in; no GPU has run
it yet. `precision` is what the plan's network convolves in as it was parsed. FP32 and FP16 are the
tensors' own types, to which a strongly typed plan keeps. Whether TensorRT-RTX executes the convolutions
of an INT8 graph in INT8 has to be shown on a GPU: `Network.layers` tells what became of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.backends import PRECISIONS, NetworkOutput
from thoraxrt.engine.backends.tensorrt_plan import RTX, Device, Flavour, PlanOptions, listening
from thoraxrt.engine.bundle import Bundle, Manifest
from thoraxrt.engine.cuda.cuda import Gpu, Memory, Pinned
from thoraxrt.engine.cuda.executor import PipelineExecutor
from thoraxrt.engine.errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    DeviceError,
    DeviceMemoryError,
    PlanError,
    SignatureError,
)
from thoraxrt.engine.plans import CachedPlan, Machine, PlanCache, compile_plans, find_plans, this_machine
from thoraxrt.engine.profile import Profile

__all__ = ["DEVICE", "Network", "TensorRTBackend", "open", "precisions"]

DEVICE: Final = "cuda"

_log = logging.getLogger(__name__)

_NO_BF16: Final = "a bundle holds no bf16 graph, and TensorRT executes the types that its graph has: use fp16"
_TENSORS: Final = {"image": ("INPUT", "UINT8"), "logits": ("OUTPUT", "FLOAT"), "cam": ("OUTPUT", "FLOAT")}


def precisions(device: int = 0, bundle: Bundle | None = None) -> Mapping[str, str | None]:
    """See `thoraxrt.engine.backends.BackendModule`; with a bundle, also why no plan of it can be had here.

    Raises BackendUnavailableError where there is no TensorRT or no GPU, RequestError where there is no such GPU.
    """
    here = _here(device)
    reasons = dict.fromkeys(PRECISIONS) | {"bf16": _NO_BF16}
    if bundle is not None and not _compilable_now(here):
        cache = PlanCache(trusted=bundle.trusted)
        for precision in (name for name, reason in reasons.items() if reason is None):
            found = find_plans(bundle, precision, here.machine, cache)
            if not found.fitting:
                reasons[precision] = _no_plan(bundle, precision, here, found.refused)
    return reasons


def open(bundle: Bundle, precision: str, device: int = 0) -> TensorRTBackend:  # noqa: A001 - the protocol's name
    """Run the plan of the bundle's graph that fits this machine best, on GPU number `device`.

    Where none fits, TensorRT-RTX compiles one now, which takes seconds; full TensorRT takes minutes and
    is to be given one. Raises BackendUnavailableError with the reason against each plan and the
    command that makes one, RequestError where there is no such GPU, DeviceError where it fails.
    """
    here = _here(device)
    gpu = Gpu.open(device)
    try:
        return TensorRTBackend(gpu, _network(bundle, precision, here, gpu))
    except BaseException:
        gpu.close()
        raise


class _Here(NamedTuple):
    machine: Machine
    flavour: Flavour
    device: Device


def _here(device: int) -> _Here:
    """This machine, which has TensorRT and that GPU."""
    machine = this_machine(device)
    if isinstance(machine.flavour, BackendUnavailableError):
        raise machine.flavour
    if isinstance(machine.device, BackendUnavailableError):
        raise machine.device
    return _Here(machine, machine.flavour, machine.device)


def _network(bundle: Bundle, precision: str, here: _Here, gpu: Gpu) -> Network:
    cache = PlanCache(trusted=bundle.trusted)
    found = find_plans(bundle, precision, here.machine, cache)
    refused = list(found.refused)

    def compiled(options: PlanOptions) -> CachedPlan:
        reason = "; ".join(refused) or "there is none"
        _log.warning("compiling a plan of %s in %s for %s (%s)", bundle.path, precision, here.device.name, reason)
        (made,) = compile_plans(bundle, [precision], options, cache, gpu.index)
        return made.cached

    plans: list[Callable[[], CachedPlan]] = [
        *(partial(cache.read, folder) for folder in found.fitting),
        *(partial(compiled, options) for options in _compilable_now(here)),
    ]
    for plan in plans:
        try:
            return Network(plan(), bundle, gpu, here.flavour, cache)
        except DeviceError:
            raise
        except (BackendError, PlanError, SignatureError) as error:
            refused.append(str(error))
    raise BackendUnavailableError(_no_plan(bundle, precision, here, refused))


def _compilable_now(here: _Here) -> Sequence[PlanOptions]:
    """What is worth compiling while somebody waits, the likeliest to run first."""
    if here.flavour.name != RTX:
        return ()
    if here.device.architecture.upper() in here.flavour.module.ComputeCapability.__members__:
        return (PlanOptions(),)
    # A GPU that TensorRT-RTX has no name for (sm90): for this one, else portable, which covers "8.0 and later".
    return PlanOptions(), PlanOptions(hardware_compatible=True)


def _no_plan(bundle: Bundle, precision: str, here: _Here, refused: Sequence[str]) -> str:
    return (
        f"no TensorRT plan of {bundle.path} runs {precision} on {here.device.name} "
        f"({'; '.join(dict.fromkeys(refused)) or 'there is none'}); "
        f"`thoraxrt compile {bundle.path} --precision {precision}` makes one"
    )


class Network:
    """A plan on a GPU: a `thoraxrt.engine.cuda.pipeline.Network`.

    Its contexts share one piece of activation memory, so only one stream at a time may run it. Raises
    BackendError where TensorRT refuses the plan or it is not of this bundle's network, DeviceMemoryError.
    """

    def __init__(self, cached: CachedPlan, bundle: Bundle, gpu: Gpu, flavour: Flavour, cache: PlanCache) -> None:
        manifest = bundle.manifest
        self.precision = _convolved_in(cached)
        self.buckets = cached.record.key.options.buckets
        self.cam_shape = manifest.network.cam_height, manifest.network.cam_width
        self._image_shape = 1, manifest.preprocess.input_size, manifest.preprocess.input_size
        self._labels = len(manifest.labels)
        self._cached, self._cache, self._gpu, self._flavour = cached, cache, gpu, flavour
        self._memory: Memory | None = None
        self._runtime: Any = None
        self._engine: Any = None
        self._kernels: Any = None
        self._how: Any = None
        self._kept = b""
        self._contexts: dict[int, Any] = {}
        self._stream = gpu.stream()
        try:
            with listening(flavour) as self._logger:
                self._load(bundle)
        except BaseException:
            self.close()
            raise

    def _load(self, bundle: Bundle) -> None:
        logger = self._logger
        self._runtime = self._flavour.module.Runtime(logger)
        self._engine = engine = _engine(self._runtime, self._cached, bundle, self._flavour, logger)
        self._check_tensors()
        self._how = self._flavour.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavour.name == RTX:
            self._how = self._rtx_config(self._how)
        self._memory = memory = self._gpu.memory(max(engine.device_memory_size_v2, 1))
        for index, bucket in enumerate(self.buckets):
            context = engine.create_execution_context(self._how)
            if context is None:
                raise _failure(f"cannot make a context for batches of {bucket}", logger)
            self._contexts[bucket] = context
            context.set_device_memory(memory.address, memory.size)
            if not (
                context.set_optimization_profile_async(index, self._stream.handle)
                and context.set_input_shape("image", (bucket, *self._image_shape))
            ):
                raise _failure(f"does not take batches of {bucket}", logger)
            for name, shape in self.shapes(bucket).items():
                if (found := tuple(context.get_tensor_shape(name))) != shape:
                    raise self._misfit(f"{name} is {found} for batches of {bucket}", shape)
        self._stream.synchronize()
        self._try()

    def _try(self) -> None:
        """Run every bucket once, on memory given back at once: a plan that loads may still fail here, and another not."""
        sizes = {name: int(np.prod(shape)) for name, shape in self.shapes(self.buckets[-1]).items()}
        with ExitStack() as held:
            self.bind(**{name: held.enter_context(self._gpu.memory(4 * size)).address for name, size in sizes.items()})

    def shapes(self, bucket: int) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes at a batch size: `image` uint8, `logits` and `cam` float32, all C-contiguous."""
        return {
            "image": (bucket, *self._image_shape),  # (N, 1, S, S)
            "logits": (bucket, self._labels),  # (N, C)
            "cam": (bucket, self._labels, *self.cam_shape),  # (N, C, h, w)
        }

    def _check_tensors(self) -> None:
        """The engine's tensors and profiles against the manifest and the plan's key."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {name: (engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name) for name in names}
        if found != _TENSORS:
            raise self._misfit(f"its tensors are {found}", _TENSORS)
        count = engine.num_optimization_profiles
        profiles = [[tuple(shape) for shape in engine.get_tensor_profile_shape("image", i)] for i in range(count)]
        if profiles != (expected := [[self.shapes(bucket)["image"]] * 3 for bucket in self.buckets]):
            raise self._misfit(f"its profiles (min, opt, max) are {profiles}", expected)

    def _misfit(self, found: str, expected: object) -> BackendError:
        return BackendError(
            f"{self._cached.folder} is not a plan of this bundle's network: {found}, expected {expected}; "
            "remove that folder and compile again"
        )

    def _rtx_config(self, allocation: Any) -> Any:
        """What lets a stream capture TensorRT-RTX: our memory, kernels compiled before they are wanted, no graphs of its own."""
        trt, config = self._flavour.module, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(allocation)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self._kernels = config.create_runtime_cache()
        self._kept = self._cache.kernels(self._cached, self._gpu.name)
        if self._kept:
            self._kernels.deserialize(self._kept)  # False: of another driver or runtime, and compiled again
        config.set_runtime_cache(self._kernels)
        return config

    def bind(self, image: int, logits: int, cam: int) -> None:
        """Set the device addresses, each with room for the largest bucket, and run every bucket there once.

        That compiles and allocates what is left, so that a stream may capture `enqueue` afterwards.
        Raises BackendError where it may not.
        """
        for bucket, context in self._contexts.items():
            for name, address in (("image", image), ("logits", logits), ("cam", cam)):
                if not context.set_tensor_address(name, address):
                    raise _failure(f"does not take the address of {name}", self._logger)
            self.enqueue(bucket, self._stream.handle)
            self._stream.synchronize()
            if self._flavour.name == RTX and not context.is_stream_capturable(self._stream.handle):
                raise _failure(f"cannot be captured in a CUDA graph with batches of {bucket}", self._logger)
        self._keep_kernels()

    def enqueue(self, bucket: int, stream: int) -> None:
        """Enqueue one inference on a stream (its handle), which may be capturing. Raises BackendError."""
        context = self._contexts.get(bucket)
        if context is None:
            open_for = ", ".join(map(str, self._contexts)) or "nothing, it is closed"
            raise BackendError(f"no context for batches of {bucket}: the tensorrt backend is open for {open_for}")
        if not context.execute_async_v3(stream):
            del context  # the error's traceback would keep it beyond `close`
            raise _failure(f"did not run a batch of {bucket}", self._logger)

    def layers(self) -> str:
        """TensorRT's JSON of the engine's layers as they were fused, with the types that they execute in."""
        wanted = self._flavour.module.LayerInformationFormat.JSON
        return str(self._engine.create_engine_inspector().get_engine_information(wanted))

    def _keep_kernels(self) -> None:
        """Keep what TensorRT-RTX compiled for this GPU, where the cache can be written."""
        made = None if self._kernels is None else self._kernels.serialize()
        if made is None or bytes(made) == self._kept:
            return
        self._kept = bytes(made)
        try:
            self._cache.keep_kernels(self._cached, self._gpu.name, self._kept)
        except BundleError as error:
            _log.info("what TensorRT-RTX compiled is not kept, and is compiled again next time: %s", error)

    def close(self) -> None:
        """Wait for what runs, then free the contexts, the engine and the memory; twice is harmless."""
        if self._memory is not None:
            self._memory.close()  # first: it waits
        self._contexts.clear()
        self._how = self._kernels = None
        self._engine = None
        self._runtime = None  # in this order: each outlives what came of it
        self._stream.close()


def _convolved_in(cached: CachedPlan) -> str:
    """The precision that the plan's network convolves in, which is the one it was compiled for. Raises BackendError."""
    types = cached.record.layers.convolutions
    executed = next((name for name in ("int8", "fp16", "fp32") if name in types), "nothing")
    if executed != cached.record.key.precision:
        raise BackendError(
            f"{cached.folder} was compiled for {cached.record.key.precision} and convolves in {executed} "
            f"({cached.record.layers}): export the bundle again, then compile it"
        )
    return executed


def _engine(runtime: Any, cached: CachedPlan, bundle: Bundle, flavour: Flavour, logger: Any) -> Any:
    """The engine of a plan, with the weights of the bundle's graph where the plan has none."""
    trt, key = flavour.module, cached.record.key
    if flavour.name == RTX:
        _refuse_invalid(runtime, cached, trt, logger)
    if key.options.version_compatible:
        runtime.engine_host_code_allowed = True  # such a plan brings the runtime that it was made with
    engine = runtime.deserialize_cuda_engine(cached.plan)
    if engine is None:
        raise _failure(f"cannot load {cached.folder}", logger)
    if key.options.strip_weights:
        refitter, graph = trt.Refitter(engine, logger), bundle.read(bundle.graph_name(key.precision))
        parser = trt.OnnxParserRefitter(refitter, logger)  # by name, since it holds the weights until they are there
        if not (parser.refit_from_bytes(graph) and refitter.refit_cuda_engine()):
            raise _failure(f"cannot put the bundle's weights into {cached.folder}", logger)
    return engine


def _refuse_invalid(runtime: Any, cached: CachedPlan, trt: Any, logger: Any) -> None:
    """Ask TensorRT-RTX itself whether it would run a plan here: it looks at the header only. Raises BackendError."""
    validity, found = runtime.get_engine_validity(cached.plan[: runtime.engine_header_size])
    if validity == trt.EngineValidity.INVALID:
        reasons = [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if found & int(flag)]
        said = ", ".join(reasons).replace("_", " ").lower() or logger.said()
        raise BackendError(f"{cached.folder}: TensorRT-RTX says that it cannot run here: {said}")


def _failure(what: str, logger: Any) -> BackendError:
    said = logger.said()
    kind = DeviceMemoryError if re.search("out ?of ?memory", said, re.IGNORECASE) else BackendError
    return kind(f"TensorRT {what}: {said}")


class TensorRTBackend:
    """A `Network` from and to host memory, for parity checks and benchmarks; the engine's own path is the pipeline.

    Owns its GPU and its network. Whoever gives `network` to a pipeline does not call `run`: addresses are bound once.
    """

    name = "tensorrt"

    def __init__(self, gpu: Gpu, network: Network) -> None:
        self.gpu = gpu
        self.network = network
        self.precision = network.precision
        self._exchange: _Exchange | None = None
        self._closed = False

    def run(self, images: npt.NDArray[np.uint8]) -> NetworkOutput:
        """See `thoraxrt.engine.backends.Backend`; any N, in batches of the plan's buckets."""
        if self._closed:
            raise BackendError("the tensorrt backend is closed; open the engine again")
        if self._exchange is None:
            self._exchange = _Exchange(self.gpu, self.network)
        largest = self.network.buckets[-1]
        parts = [self._exchange.run(images[start : start + largest]) for start in range(0, len(images), largest)]
        return NetworkOutput(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def executor(self, manifest: Manifest, profile: Profile | None) -> PipelineExecutor:
        """See `thoraxrt.engine.execute.DeviceBackend`."""
        return PipelineExecutor(self, manifest, profile)

    def close(self) -> None:
        """See `thoraxrt.engine.backends.Backend`."""
        self._closed = True
        self.network.close()
        self.gpu.close()


class _Exchange:
    """Buffers for the largest bucket on both sides, bound to a network, and the stream between them."""

    def __init__(self, gpu: Gpu, network: Network) -> None:
        self._network = network
        self._stream = gpu.stream()
        types = {"image": np.uint8, "logits": np.float32, "cam": np.float32}
        self._host: dict[str, tuple[Pinned, npt.NDArray[Any]]] = {}
        self._device: dict[str, Memory] = {}
        for name, shape in network.shapes(network.buckets[-1]).items():
            size = int(np.prod(shape)) * np.dtype(types[name]).itemsize
            pinned = gpu.pinned(size)
            self._host[name] = pinned, pinned.array.view(types[name]).reshape(shape)
            self._device[name] = gpu.memory(size)
        network.bind(**{name: memory.address for name, memory in self._device.items()})

    def run(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits `(N, C)` and CAMs `(N, C, h, w)` of uint8 `(N, 1, S, S)`, N at most the largest bucket."""
        count, stream = len(images), self._stream
        bucket = next(bucket for bucket in self._network.buckets if bucket >= count)
        pinned, image = self._host["image"]
        image[:count] = images  # the rest of the bucket is computed and dropped
        stream.to_device(self._device["image"].address, pinned.address, image[:bucket].nbytes)
        self._network.enqueue(bucket, stream.handle)
        for name in ("logits", "cam"):
            pinned, array = self._host[name]
            stream.to_host(pinned.address, self._device[name].address, array[:count].nbytes)
        stream.synchronize()
        return self._host["logits"][1][:count].copy(), self._host["cam"][1][:count].copy()
