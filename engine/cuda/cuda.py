"""The device seam: one GPU's memory, streams, events, kernels and graphs, over `cuda-core`.

The only file that imports `cuda.core` or `cuda.bindings`, and lazily: importing this one needs
neither them nor a driver. Every error of the driver and of NVRTC leaves here as one of
`thoraxrt.engine.errors`. Knows neither images, but for the layout of a device array, nor networks.

Ownership: a `Gpu` owns what it made, and closes it when it is closed; closing anything twice, or
in any order, is safe, and waits for the work in flight on that Gpu's streams. What is closed
cannot be used again. A Gpu may be used from any thread, by one thread at a time.

A lost context: after a sticky error (an illegal address, say) the driver fails every further call
of the *process* on that device, for every library in it, and NVIDIA's reference says that "the
process must be terminated and relaunched". Some drivers and errors do recover when the primary
context is reset, which destroys all that anyone holds there. So `Gpu.open` after a loss resets it
only once every other Gpu on that device is closed, then proves with a copy there and back that the
device computes again; where it does not, the error says that only a new process can go on. Close
what else holds the device (a TensorRT context) before opening it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceMemoryError,
    ImageContentError,
    RequestError,
)

__all__ = [
    "DevicePixels",
    "Event",
    "Gpu",
    "Graph",
    "Kernel",
    "Memory",
    "Module",
    "Pinned",
    "Stream",
    "cubin_from_source",
    "pixels_from_array",
]

_OUT_OF_MEMORY: Final = "CUDA_ERROR_OUT_OF_MEMORY"

_LOST: Final = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        # The reference: "leaves the process in an inconsistent state and any further CUDA work will return the same".
        "CONTAINED", "ILLEGAL_ADDRESS", "LAUNCH_TIMEOUT", "ASSERT", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "LAUNCH_FAILED", "TENSOR_MEMORY_LEAK",
        "EXTERNAL_DEVICE", "MPS_CLIENT_TERMINATED",
        # The device's memory or links failed, or the context, the device or the driver went away.
        "ECC_UNCORRECTABLE", "NVLINK_UNCORRECTABLE", "CONTEXT_IS_DESTROYED", "INVALID_CONTEXT", "DEINITIALIZED",
        "NO_DEVICE", "DEVICE_UNAVAILABLE", "SYSTEM_NOT_READY", "SYSTEM_DRIVER_MISMATCH", "MPS_RPC_FAILURE", "UNKNOWN",
    )
)  # fmt: skip
"""The codes after which the context is unusable."""

_guard = threading.Lock()
_lost: set[int] = set()
"""Devices whose context was lost and has not been opened again."""
_open: dict[int, weakref.WeakSet[Gpu]] = {}
"""The open Gpus of each device."""


class _DriverError(Exception):
    """A driver call's code, on its way to becoming one of our errors."""


@functools.cache
def _cuda(module: str) -> Any:
    try:
        return importlib.import_module(f"cuda.{module}")
    except ImportError as error:
        raise BackendUnavailableError(
            "cuda-core is not installed: pip install 'thoraxrt[gpu]', or 'thoraxrt[rtx]' for TensorRT-RTX"
        ) from error


def _value(result: tuple[Any, ...]) -> Any:
    """What a call of `cuda.bindings.driver` gave."""
    if result[0]:
        raise _DriverError(result[0].name)
    return result[1] if len(result) > 1 else None


class Gpu:
    """One device's primary context; make it with `Gpu.open`.

    Example:
        with Gpu.open(0) as gpu:
            stream, memory, pinned = gpu.stream(), gpu.memory(1024), gpu.pinned(1024)
            stream.to_device(memory.address, pinned.address, 1024)
            stream.synchronize()
    """

    index: int
    """Among the devices that this process may see."""
    name: str
    architecture: str
    """`sm90`, say."""
    allocations: int
    """How many pieces of memory, streams, events, modules and graphs this Gpu has made so far."""

    def __init__(self, index: int, device: Any) -> None:
        self.index = index
        self.allocations = 0
        self._device = device
        self._owned: dict[_Owned, None] = {}  # in the order they were made
        self._closed = False
        with self._driving("to answer"):
            self.name = device.name
            self.architecture = f"sm{device.arch}"

    @classmethod
    def open(cls, index: int) -> Gpu:
        """Open the device of that index among those this process sees (CUDA_VISIBLE_DEVICES and MIG decide which).

        Raises BackendUnavailableError where there is no driver or no device, RequestError for an
        index that is not there, and DeviceError with `lost` where a lost context cannot be had again.
        """
        core, driver = _cuda("core"), _cuda("bindings.driver")
        count = _device_count(driver)
        if not 0 <= index < count:
            seen = "one GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
            raise RequestError(
                f"there is no cuda:{index}: this process sees {seen}; CUDA_VISIBLE_DEVICES and MIG decide which"
            )
        with _guard:
            gpus = _open.setdefault(index, weakref.WeakSet())
            if index in _lost:
                _reset(index, len(gpus))
            try:
                gpu = cls(index, core.Device(index))
            except DeviceError:
                _lost.discard(index)  # there is no context yet that could be: a GPU in exclusive use, say
                raise
            gpus.add(gpu)
        return gpu

    def __str__(self) -> str:
        return f"cuda:{self.index}"

    def free_bytes(self) -> int:
        """Device memory that is free now, in bytes, whoever holds the rest."""
        return self._memory_info()[0]

    def total_bytes(self) -> int:
        """Device memory in all, in bytes; of a MIG instance, its own."""
        return self._memory_info()[1]

    def _memory_info(self) -> tuple[int, int]:
        with self._driving("to say how much memory it has"):
            error, free, total = _cuda("bindings.driver").cuMemGetInfo()
            _value((error,))
            return free, total

    def stream(self) -> Stream:
        """A new stream, which does not wait for the default stream."""
        return Stream(self)

    def event(self, timing: bool = False) -> Event:
        """A new event; `timing` where `milliseconds_since` will be asked of it."""
        return Event(self, timing)

    def memory(self, size: int) -> Memory:
        """`size` bytes of device memory, not zeroed, aligned to 256. Raises DeviceMemoryError where there is no room."""
        return Memory(self, size)

    def pinned(self, size: int) -> Pinned:
        """`size` bytes of page-locked host memory, not zeroed. Raises DeviceMemoryError where there is no room."""
        return Pinned(self, size)

    def module(self, source: str) -> Module:
        """CUDA C++ compiled for this device, as by `cubin_from_source`, and loaded."""
        return Module(self, source)

    def graph(self, record: Callable[[Stream], None]) -> Graph:
        """What `record` puts on the stream that it is given, captured as one graph; nothing of it runs yet.

        Only this thread is kept from calls that a capture forbids. The stream's `handle` may be
        given to others who work on streams, TensorRT's `execute_async_v3` say; nobody may wait
        for it. The memory that the recorded work addresses must live as long as the graph.
        """
        return Graph(self, record)

    def close(self) -> None:
        """Close everything that this Gpu made; after a loss, too."""
        with contextlib.ExitStack() as stack:  # goes on where one fails
            stack.callback(self._forget)
            for owned in self._owned:
                stack.callback(owned.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        with _guard:
            self._closed = True
            _open[self.index].discard(self)

    def _give_back(self, owned: _Owned) -> None:
        """Release one thing; a loss met there is noted, and the next call says so."""
        streams = [other._stream for other in (owned, *self._owned) if isinstance(other, Stream)]
        del self._owned[owned]
        for step in (self._device.set_current, *(stream.sync for stream in streams), owned._release):
            try:
                step()
            except Exception as error:
                if not _is_cuda(error):
                    raise
                translated = self._translated(error, "to close")
                if not translated.lost:
                    raise translated from error

    def _driving(self, purpose: str, *used: _Owned) -> _Driving:
        """`with` this: the context current in this thread, and errors made ours; `purpose` follows "cuda:0 failed"."""
        return _Driving(self, purpose, used)

    def _translated(self, error: Exception, purpose: str) -> DeviceError:
        """The error as one of ours; a loss is noted."""
        code = _code(error)
        if code in _LOST:
            _lost.add(self.index)
            return DeviceError(
                f"{self} failed {purpose} and is lost: {_said(error)}; open it again, and where that fails start a new process",
                lost=True,
            )
        if code == _OUT_OF_MEMORY:
            return DeviceMemoryError(
                f"{self} has no memory left {purpose}; {self._room()}: "
                "use fewer or smaller batches, or end what else runs there"
            )
        return DeviceError(f"{self} failed {purpose}: {_said(error)}")

    def _room(self) -> str:
        """How much memory is free, for a message; the driver that has just refused may not say."""
        error, free, total = _cuda("bindings.driver").cuMemGetInfo()
        return (
            f"{free:,} of {total:,} bytes of its memory are free" if not error else "how much is free it does not say"
        )


class _Driving:
    """See `Gpu._driving`; a class because a generator takes twice as long, ten times in every batch."""

    __slots__ = ("_gpu", "_purpose", "_used")

    def __init__(self, gpu: Gpu, purpose: str, used: tuple[_Owned, ...]) -> None:
        self._gpu, self._purpose, self._used = gpu, purpose, used

    def __enter__(self) -> None:
        gpu = self._gpu
        if gpu._closed:
            raise DeviceError(f"{gpu} is closed; open it again")
        if gpu.index in _lost:
            raise DeviceError(f"{gpu} was lost to an earlier error; close this and open it again", lost=True)
        for owned in self._used:
            if owned not in gpu._owned:
                raise DeviceError(
                    f"a {type(owned).__name__.lower()} is closed, or not of this Gpu ({gpu}): make another"
                )
        try:
            gpu._device.set_current()
        except Exception as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and _is_cuda(error):
            raise self._gpu._translated(error, self._purpose) from error


def _device_count(driver: Any) -> int:
    """How many devices this process sees; at least one. Raises BackendUnavailableError."""
    try:
        _value(driver.cuInit(0))
        if count := int(_value(driver.cuDeviceGetCount())):
            return count
        reason = "the driver shows none"
    except Exception as error:
        if not _is_cuda(error):
            raise
        reason = _said(error)
    raise BackendUnavailableError(
        f"no GPU can be used here: {reason}; see that NVIDIA's driver works (nvidia-smi) and that "
        "CUDA_VISIBLE_DEVICES hides no GPU, or run on the CPU"
    )


def _reset(index: int, others: int) -> None:
    """Reset a lost primary context, and prove that it computes; see the module's docstring."""
    if others:
        raise DeviceError(
            f"cuda:{index} was lost, and others still hold it: close them ({others}) before it is opened again",
            lost=True,
        )
    core, driver = _cuda("core"), _cuda("bindings.driver")
    sent, received = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8)
    try:
        device = _value(driver.cuDeviceGet(index))
        _value(driver.cuDevicePrimaryCtxReset(device))
        # Who retains a reset context first makes it anew. Kept for good, as cuda-core keeps its own: a reset
        # releases nobody's, says the reference, and a release too many would end the context.
        _value(driver.cuDevicePrimaryCtxRetain(device))
        core.Device(index).set_current()
        address = _value(driver.cuMemAlloc(sent.nbytes))
        _value(driver.cuMemcpyHtoD(address, sent.ctypes.data, sent.nbytes))
        _value(driver.cuMemcpyDtoH(received.ctypes.data, address, sent.nbytes))
        _value(driver.cuMemFree(address))
    except Exception as error:
        if not _is_cuda(error):
            raise
        reason = _said(error)
    else:
        if np.array_equal(sent, received):
            _lost.discard(index)
            return
        reason = "it gave back other bytes than it was sent"
    raise DeviceError(
        f"cuda:{index} was lost and a reset did not mend it ({reason}): start a new process, or run on the CPU",
        lost=True,
    )


def _is_cuda(error: Exception) -> bool:
    """Whether an exception speaks of the driver or of NVRTC; cuda-core's own classes are not public."""
    return isinstance(error, (_DriverError, RuntimeError)) or type(error).__module__.startswith("cuda.")


def _code(error: Exception) -> str:
    found = re.search(r"CUDA_ERROR_\w+", str(error))
    return found[0] if found else ""


def _said(error: Exception) -> str:
    """The code, with NVIDIA's explanation where there is one, in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class _Owned:
    """What a Gpu made: closed once, by its user or with the Gpu."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        gpu._owned[self] = None
        gpu.allocations += 1

    def close(self) -> None:
        """Wait for what this Gpu has in flight, then give this back."""
        if self in self._gpu._owned:
            self._gpu._give_back(self)

    def _release(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Event(_Owned):
    """A point in a stream's work, set by `Stream.record`."""

    def __init__(self, gpu: Gpu, timing: bool) -> None:
        with gpu._driving("to make an event"):
            self._event = gpu._device.create_event({"timing_enabled": timing})
        super().__init__(gpu)

    def done(self) -> bool:
        """Whether the work before the last record is done; True where nothing was recorded."""
        with self._gpu._driving("in earlier work", self):
            return bool(self._event.is_done)

    def synchronize(self) -> None:
        """Wait until the work before the last record is done."""
        with self._gpu._driving("in earlier work", self):
            self._event.sync()

    def milliseconds_since(self, other: Event) -> float:
        """Device time from `other` to this; both made with `timing`, recorded and done."""
        with self._gpu._driving("to tell the time between two events", self, other):
            return float(self._event - other._event)

    def _release(self) -> None:
        self._event.close()


class Stream(_Owned):
    """Work that the device does in order. Every call but `synchronize` returns before the work is done."""

    handle: int
    """The `cudaStream_t`, for others who put work on it."""

    def __init__(self, gpu: Gpu) -> None:
        with gpu._driving("to make a stream"):
            self._stream = gpu._device.create_stream()
            self._cuda_handle = self._stream.handle
        self.handle = int(self._cuda_handle)
        super().__init__(gpu)

    def wait(self, event: Event) -> None:
        """Let later work here wait for the work before the event's last record."""
        with self._gpu._driving("to wait for an event", self, event):
            self._stream.wait(event._event)

    def record(self, event: Event) -> None:
        """Set the event to this point."""
        with self._gpu._driving("to record an event", self, event):
            self._stream.record(event._event)

    def to_device(self, address: int, host_address: int, size: int) -> None:
        """Copy `size` bytes from page-locked host memory, which must not change until that is done."""
        with self._gpu._driving("to copy to the device", self):
            _value(_cuda("bindings.driver").cuMemcpyHtoDAsync(address, host_address, size, self._cuda_handle))

    def to_host(self, host_address: int, address: int, size: int) -> None:
        """Copy `size` bytes to page-locked host memory, which says nothing until that is done."""
        with self._gpu._driving("to copy to the host", self):
            _value(_cuda("bindings.driver").cuMemcpyDtoHAsync(host_address, address, size, self._cuda_handle))

    def fill(self, address: int, value: int, size: int) -> None:
        """Set `size` bytes of device memory to `value`, 0..255."""
        with self._gpu._driving("to fill memory", self):
            _value(_cuda("bindings.driver").cuMemsetD8Async(address, value, size, self._cuda_handle))

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        *args: int | np.generic,
    ) -> None:
        """Run a kernel with `shared_bytes` of dynamic shared memory; an int is an address, a numpy scalar itself."""
        core = _cuda("core")
        with self._gpu._driving(f"to launch {kernel.name}", self):
            config = core.LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)
            core.launch(self._stream, config, kernel._kernel, *args)

    def synchronize(self) -> None:
        """Wait until all work put here is done."""
        with self._gpu._driving("in earlier work", self):
            self._stream.sync()

    def _release(self) -> None:
        self._stream.close()


class Memory(_Owned):
    """Device memory."""

    address: int
    size: int

    def __init__(self, gpu: Gpu, size: int) -> None:
        with gpu._driving(f"to allocate {size:,} bytes"):
            self.address = int(_value(_cuda("bindings.driver").cuMemAlloc(size)))
        self.size = size
        super().__init__(gpu)

    def _release(self) -> None:
        _value(_cuda("bindings.driver").cuMemFree(self.address))


class Pinned(_Owned):
    """Page-locked host memory, which copies read and write without the CPU."""

    address: int
    array: npt.NDArray[np.uint8]
    """The memory, uint8 `(size,)`; no view of it may be used once this is closed."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        with gpu._driving(f"to allocate {size:,} bytes of page-locked host memory"):
            self.address = int(_value(_cuda("bindings.driver").cuMemAllocHost(size)))
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))  # (size,)
        super().__init__(gpu)

    def _release(self) -> None:
        self.array = np.empty(0, np.uint8)
        _value(_cuda("bindings.driver").cuMemFreeHost(self.address))


@functools.lru_cache(maxsize=8)
def cubin_from_source(source: str, architecture: str) -> bytes:
    """Compile CUDA C++ for one architecture, `sm90` say; needs NVRTC but neither a driver nor a GPU.

    Floats are exact: no contraction, no flush to zero, IEEE division and square root. Raises
    DeviceError with the compiler's log, and BackendUnavailableError where NVRTC is not installed.
    """
    core = _cuda("core")
    target = architecture.replace("sm", "sm_")
    options = core.ProgramOptions(
        name="thoraxrt", arch=target, std="c++17", fma=False, ftz=False, prec_div=True, prec_sqrt=True
    )
    try:
        program = core.Program(source, "c++", options)
        try:
            return bytes(program.compile("cubin").code)
        finally:
            program.close()
    except _cuda("pathfinder").DynamicLibNotFoundError as error:
        raise BackendUnavailableError("NVRTC is not installed: pip install 'thoraxrt[gpu]'") from error
    except Exception as error:
        if not _is_cuda(error):
            raise
        raise DeviceError(f"NVRTC cannot compile the kernels for {target}: {error}") from error


@functools.cache
def _code_from_cubin(cubin: bytes) -> Any:
    """Loaded once per process: `cuda-core` never unloads, and what is loaded belongs to no context."""
    code = _cuda("core").ObjectCode.from_cubin(cubin)
    code.handle  # noqa: B018  loads now rather than at the first kernel
    return code


class Module(_Owned):
    """Compiled CUDA C++, loaded. It stays loaded to the process's end, so its kernels outlive its closing."""

    def __init__(self, gpu: Gpu, source: str) -> None:
        cubin = cubin_from_source(source, gpu.architecture)
        with gpu._driving("to load kernels"):
            self._code = _code_from_cubin(cubin)
        super().__init__(gpu)

    def kernel(self, name: str) -> Kernel:
        """The `extern "C"` kernel of that name, allowed all the shared memory that a block can have."""
        driver, properties = _cuda("bindings.driver"), self._gpu._device.properties
        with self._gpu._driving(f"to find the kernel {name}", self):
            kernel = self._code.get_kernel(name)
            dynamic = properties.max_shared_memory_per_block_optin - kernel.attributes.shared_size_bytes
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _value(driver.cuKernelSetAttribute(attribute, dynamic, kernel.handle, self._gpu.index))
        return Kernel(name, kernel)

    def _release(self) -> None:
        self._code = None


class Kernel:
    """A kernel of a `Module`, for `Stream.launch`; it needs no closing."""

    name: str

    def __init__(self, name: str, kernel: Any) -> None:
        self.name = name
        self._kernel = kernel


class Graph(_Owned):
    """Captured work, launched as one; see `Gpu.graph`."""

    def __init__(self, gpu: Gpu, record: Callable[[Stream], None]) -> None:
        # Not by cuda-core's GraphBuilder: 1.2 destroys the graph of a capture that failed, which the driver has done.
        driver = _cuda("bindings.driver")
        with Stream(gpu) as stream:
            with gpu._driving("to start capturing a graph"):
                mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
                _value(driver.cuStreamBeginCapture(stream._cuda_handle, mode))
            try:
                record(stream)
            except BaseException:
                error, graph = driver.cuStreamEndCapture(stream._cuda_handle)
                if not error:
                    driver.cuGraphDestroy(graph)
                raise
            with gpu._driving("to make a graph of what was captured"):
                graph = _value(driver.cuStreamEndCapture(stream._cuda_handle))
                try:
                    self._graph = _value(driver.cuGraphInstantiate(graph, 0))
                finally:
                    driver.cuGraphDestroy(graph)
        super().__init__(gpu)

    def launch(self, stream: Stream) -> None:
        """Put the captured work on a stream. Launches of one graph run one after another, on any streams."""
        with self._gpu._driving("to launch a graph", self, stream):
            _value(_cuda("bindings.driver").cuGraphLaunch(self._graph, stream._cuda_handle))

    def _release(self) -> None:
        _value(_cuda("bindings.driver").cuGraphExecDestroy(self._graph))


class DevicePixels(NamedTuple):
    """One radiograph's pixels on the device, rows of `pitch` bytes. Keep `owner` until the work on them is done."""

    address: int
    pitch: int
    width: int
    height: int
    owner: object


def pixels_from_array(array: object, stream: Stream) -> DevicePixels:
    """A device array's pixels, not copied: uint8 `(H, W)`, rows at any pitch, pixels side by side.

    `array` speaks `__cuda_array_interface__` or DLPack and lies on the stream's device, in its
    primary context (those of torch and CuPy do; PyCUDA's with `pycuda.autoprimaryctx`). What its
    producer has still to do to it, on a stream that it tells, comes before later work on `stream`.
    Raises ImageContentError for any other array.
    """
    gpu = stream._gpu
    with gpu._driving("to take a device array", stream):
        try:
            view = _cuda("core.utils").StridedMemoryView.from_any_interface(array, stream_ptr=stream.handle)
        except Exception as error:  # whatever its producer raises
            if _code(error):
                raise
            raise ImageContentError(
                f"a {type(array).__name__} is no device array: {error}; "
                "expected uint8 (H, W) by __cuda_array_interface__ or DLPack"
            ) from error
    if view.device_id != gpu.index:
        where = f"cuda:{view.device_id}" if view.device_id >= 0 else "the host"
        raise ImageContentError(f"the array lies on {where}, the engine runs on {gpu}: copy it there first")
    if view.dtype != np.uint8 or len(view.shape) != 2 or 0 in view.shape:
        raise ImageContentError(f"a device array is {view.dtype} {view.shape}: expected uint8 (H, W)")
    height, width = view.shape
    rows, columns = view.strides or (width, 1)  # in pixels
    if (columns != 1 and width > 1) or (rows < width and height > 1):
        raise ImageContentError(
            f"a device array has strides of {rows} and {columns} bytes: expected rows one after "
            "another and pixels side by side; make a contiguous copy"
        )
    return DevicePixels(view.ptr, max(rows, width), width, height, view)
