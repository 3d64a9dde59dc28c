"""A TensorRT runtime in Python: engines execute an ONNX graph through ONNX Runtime, on host memory.

Its classes, methods and arguments are named as NVIDIA's, which `test_tensorrt.py` holds against the
real bindings; what the caller gets wrong fails as it would there (a call answers False, an engine is
None). Everything else (enums, the builder, the parser) is the installed `tensorrt_rtx`'s own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

TYPES = {"image": np.uint8, "logits": np.float32, "cam": np.float32}


class StandIn:
    """A module in place of `tensorrt` or `tensorrt_rtx`; `launch(stream, work)` puts host work on a stream.

    Any plan deserialises to `graph` with one profile per bucket. `fail` names calls that are to fail;
    `changed` replaces what an engine says: {("get_tensor_shape", "cam"): (1, 2, 3, 4)}.
    """

    def __init__(self, real: Any, graph: bytes, buckets: tuple[int, ...]) -> None:
        self._real = real
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.buckets = buckets
        self.launch: Callable[[int, Any], None]  # to be set
        self.activations = 4096
        self.fail: set[str] = set()
        self.changed: dict[tuple[str, str], Any] = {}
        self.says = "something is wrong"
        self.diagnostics = 0
        self.deserialised: list[bytes] = []
        self.ran: list[int] = []
        self.contexts: list[IExecutionContext] = []
        self.refitted: list[bytes] = []
        self.host_code_allowed: list[bool] = []
        self.kernels_given: list[bytes] = []
        self.logger: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def Runtime(self, logger: Any) -> Runtime:  # noqa: N802 - NVIDIA's name, as the two below
        self.logger = logger
        return Runtime(self)

    def Refitter(self, engine: ICudaEngine, logger: Any) -> Refitter:  # noqa: N802
        return Refitter(self)

    def OnnxParserRefitter(self, refitter: Refitter, logger: Any) -> OnnxParserRefitter:  # noqa: N802
        return OnnxParserRefitter(self)

    def works(self, call: str) -> bool:
        if call in self.fail:
            self.logger.log(self._real.ILogger.ERROR, self.says)
        return call not in self.fail


class _Part:
    __slots__ = ("_trt",)

    def __init__(self, trt: StandIn) -> None:
        self._trt = trt


class Runtime(_Part):
    __slots__ = ("engine_host_code_allowed",)
    engine_header_size = 64

    def __init__(self, trt: StandIn) -> None:
        super().__init__(trt)
        self.engine_host_code_allowed = False

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        assert len(buffer) <= 64
        validity = self._trt.EngineValidity
        return (validity.VALID if self._trt.works("get_engine_validity") else validity.INVALID), self._trt.diagnostics

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        self._trt.deserialised.append(serialized_engine)
        self._trt.host_code_allowed.append(self.engine_host_code_allowed)
        return ICudaEngine(self._trt) if self._trt.works("deserialize_cuda_engine") else None


class ICudaEngine(_Part):
    __slots__ = ()

    @property
    def num_io_tensors(self) -> int:
        return len(TYPES)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._trt.buckets)

    @property
    def device_memory_size_v2(self) -> int:
        return self._trt.activations

    def get_tensor_name(self, index: int) -> str:
        return str(self._trt.changed.get(("get_tensor_name", str(index)), list(TYPES)[index]))

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if name == "image" else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        types = self._trt.DataType
        return self._trt.changed.get(("get_tensor_dtype", name), types.UINT8 if name == "image" else types.FLOAT)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        shape = (self._trt.buckets[profile_index], *self._trt.session.get_inputs()[0].shape[1:])
        return [self._trt.Dims(self._trt.changed.get(("get_tensor_profile_shape", name), shape))] * 3

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._trt)

    def create_execution_context(self, strategy: Any) -> IExecutionContext | None:
        config = strategy if isinstance(strategy, IRuntimeConfig) else None  # as NVIDIA's two overloads
        allocation = config.get_execution_context_allocation_strategy() if config else strategy
        assert allocation == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._trt.works("create_execution_context"):
            return None
        context = IExecutionContext(self._trt, config)
        self._trt.contexts.append(context)
        return context

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._trt)


class IExecutionContext(_Part):
    __slots__ = ("_addresses", "_capturable", "_memory", "_profile", "_shape")

    def __init__(self, trt: StandIn, config: IRuntimeConfig | None) -> None:
        super().__init__(trt)
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._profile = self._shape = None
        self._capturable = config is None or config._capturable()

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._memory = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile, self._shape = self._trt.buckets[profile_index], None
        return self._trt.works("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape if name == "image" and shape[0] == self._profile else None
        return self._shape is not None and self._trt.works("set_input_shape")

    def get_tensor_shape(self, name: str) -> Any:
        inner = next(
            part.shape[1:]
            for part in self._trt.session.get_outputs() + self._trt.session.get_inputs()
            if part.name == name
        )
        return self._trt.Dims(self._trt.changed.get(("get_tensor_shape", name), (self._profile, *inner)))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return self._trt.works("set_tensor_address")

    def is_stream_capturable(self, stream: int) -> bool:
        return self._capturable and self._profile in self._trt.ran and self._trt.works("is_stream_capturable")

    def execute_async_v3(self, stream_handle: int) -> bool:
        memory, size = self._memory
        if not (memory and size >= self._trt.activations and self._shape and set(self._addresses) == set(TYPES)):
            return False
        if not self._trt.works("execute_async_v3"):
            return False
        self._trt.launch(stream_handle, self._execute)
        return True

    def _execute(self) -> None:
        bucket, session = self._profile, self._trt.session
        self._trt.ran.append(bucket)
        arrays = {
            name: _array(address, (bucket, *part.shape[1:]), TYPES[name])
            for name, address in self._addresses.items()
            for part in session.get_inputs() + session.get_outputs()
            if part.name == name
        }
        for name, values in zip(
            ("logits", "cam"), session.run(["logits", "cam"], {"image": arrays["image"]}), strict=True
        ):
            arrays[name][...] = values


class IRuntimeConfig(_Part):
    __slots__ = ("_allocation", "_kernels", "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy")

    def __init__(self, trt: StandIn) -> None:
        super().__init__(trt)
        self._allocation = trt.ExecutionContextAllocationStrategy.STATIC
        self._kernels: IRuntimeCache | None = None
        self.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
        self.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._allocation = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._allocation

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._trt)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._kernels = cache
        return True

    def _capturable(self) -> bool:
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        disabled = self._trt.CudaGraphStrategy.DISABLED
        return self.dynamic_shapes_kernel_specialization_strategy == eager and self.cuda_graph_strategy == disabled


class IRuntimeCache(_Part):
    __slots__ = ()

    def deserialize(self, blob: bytes) -> bool:
        self._trt.kernels_given.append(blob)
        return True

    def serialize(self) -> bytes:
        return b"kernels of " + repr(sorted(set(self._trt.ran))).encode()


class EngineInspector(_Part):
    __slots__ = ()

    def get_engine_information(self, format: Any) -> str:  # noqa: A002 - NVIDIA's name
        assert format == self._trt.LayerInformationFormat.JSON
        return '{"Layers": []}'


class Refitter(_Part):
    __slots__ = ()

    def refit_cuda_engine(self) -> bool:
        return bool(self._trt.refitted) and self._trt.works("refit_cuda_engine")


class OnnxParserRefitter(_Part):
    __slots__ = ()

    def refit_from_bytes(self, model: bytes) -> bool:
        self._trt.refitted.append(model)
        return self._trt.works("refit_from_bytes")


def _array(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)
