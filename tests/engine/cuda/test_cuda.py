"""The device seam, run for real over the software driver (driver.py), which hurries nothing and forgives nothing."""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thoraxrt.engine.cuda.cuda import DevicePixels, Gpu, Kernel, Pinned, Stream, cubin_from_source, pixels_from_array
from thoraxrt.engine.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceMemoryError,
    ImageContentError,
    RequestError,
)

SOURCE = """
extern "C" __global__ void affine(const float* x, float* y, float scale, unsigned count) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = scale * x[i] + y[i];
}
"""
HOST = """
extern "C" void affine_host(const unsigned* grid, const unsigned* block, unsigned, void** args) {
    const float* x = *(const float**)args[0];
    float* y = *(float**)args[1];
    float scale = *(float*)args[2];
    unsigned count = *(unsigned*)args[3];
    for (unsigned i = 0; i < grid[0] * block[0]; i++)
        if (i < count) y[i] = scale * x[i] + y[i];
}
"""
COUNT = 100
BYTES = 4 * COUNT


@pytest.fixture(scope="session")
def affine_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("affine")
    (folder / "affine.cpp").write_text(HOST)
    subprocess.run(["g++", "-shared", "-fPIC", folder / "affine.cpp", "-o", folder / "affine.so"], check=True)
    return folder / "affine.so"


@pytest.fixture
def affine(driver: Any, affine_library: Path) -> Callable[[Gpu], Kernel]:
    driver.kernels(affine_library)
    return lambda gpu: gpu.module(SOURCE).kernel("affine")


def launch(stream: Stream, kernel: Kernel, x: int, y: int, scale: float, shared_bytes: int = 0) -> None:
    stream.launch(kernel, (4, 1, 1), (32, 1, 1), shared_bytes, x, y, np.float32(scale), np.uint32(COUNT))


def floats(pinned: Pinned) -> Any:
    return pinned.array.view(np.float32)


# What runs when.


def test_copies_and_fills_arrive(driver: Any) -> None:
    for seed in driver.seeds(12):
        with Gpu.open(0) as gpu, gpu.stream() as stream:
            memory, sent, received = gpu.memory(256), gpu.pinned(256), gpu.pinned(256)
            sent.array[:] = np.arange(256)
            stream.to_device(memory.address, sent.address, 256)
            stream.fill(memory.address + 16, seed, 100)
            stream.to_host(received.address, memory.address, 256)
            stream.synchronize()
            np.testing.assert_array_equal(received.array, [*range(16), *[seed] * 100, *range(116, 256)])
    assert driver.count("pageable") == 0


WAITS = ("host before it writes", "copy before it overwrites", "compute before it reads", "host before it reads")


def tripled(gpu: Gpu, kernel: Kernel, forgotten: str | None) -> list[float]:
    """1, 2 and 3 copied on one stream, tripled on another and read by the host, through one staging buffer."""
    copies, compute, copied, done = gpu.stream(), gpu.stream(), gpu.event(), gpu.event()
    sent, x, y = gpu.pinned(BYTES), gpu.memory(BYTES), gpu.memory(BYTES)
    received = [gpu.pinned(BYTES) for _ in range(3)]
    for value, pinned in enumerate(received, start=1):
        if forgotten != "host before it writes":
            copied.synchronize()
        floats(sent)[:] = value
        if forgotten != "copy before it overwrites":
            copies.wait(done)
        copies.to_device(x.address, sent.address, BYTES)
        copies.record(copied)
        if forgotten != "compute before it reads":
            compute.wait(copied)
        compute.fill(y.address, 0, BYTES)
        launch(compute, kernel, x.address, y.address, 3.0)
        compute.to_host(pinned.address, y.address, BYTES)
        compute.record(done)
    if forgotten != "host before it reads":
        done.synchronize()
    return [float(floats(pinned)[COUNT - 1]) for pinned in received]


def test_events_order_streams_and_the_host(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    for _ in driver.seeds(40):
        with Gpu.open(0) as gpu:
            assert tripled(gpu, affine(gpu), None) == [3, 6, 9]


@pytest.mark.parametrize("forgotten", WAITS)
def test_a_forgotten_wait_is_found(driver: Any, affine: Callable[[Gpu], Kernel], forgotten: str) -> None:
    """Of the software driver: some order of work shows each of them."""
    results = []
    for _ in driver.seeds(40):
        with Gpu.open(0) as gpu:
            results.append(tripled(gpu, affine(gpu), forgotten))
    assert any(result != [3, 6, 9] for result in results)


def test_an_order_is_its_seed(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    results = []
    for seed in (2, 3, 6, 7) * 2:
        driver.seed(seed)
        with Gpu.open(0) as gpu:
            results.append(tripled(gpu, affine(gpu), "compute before it reads"))
    np.testing.assert_array_equal(results[:4], results[4:])


def test_events_tell_when_and_how_long(driver: Any) -> None:
    with Gpu.open(0) as gpu:
        stream, memory = gpu.stream(), gpu.memory(1 << 16)
        start, end, untimed = gpu.event(timing=True), gpu.event(timing=True), gpu.event()
        assert untimed.done()  # nothing was recorded
        stream.record(start)
        stream.fill(memory.address, 1, memory.size)
        stream.record(end)
        assert not end.done()  # seed 0 is lazy
        while not end.done():
            pass
        assert end.milliseconds_since(start) > 0
        with pytest.raises(DeviceError, match="cuda:0 failed to tell the time between two events"):
            untimed.milliseconds_since(start)


# Kernels and graphs.


def test_a_graph_replays_what_was_captured_and_allocates_nothing(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    for _ in driver.seeds(12):
        with Gpu.open(0) as gpu:
            kernel, streams = affine(gpu), [gpu.stream(), gpu.stream()]
            x, y, pinned = gpu.memory(BYTES), gpu.memory(BYTES), gpu.pinned(BYTES)

            def record(stream: Stream, x: int = x.address, y: int = y.address, kernel: Kernel = kernel) -> None:
                stream.fill(x, 0, BYTES)
                launch(stream, kernel, y, x, 1.0)  # x = y
                launch(stream, kernel, x, y, 2.0)  # y += 2 x

            floats(pinned)[:] = 1
            streams[0].to_device(y.address, pinned.address, BYTES)
            streams[0].synchronize()
            graph = gpu.graph(record)
            before = gpu.allocations, driver.count("cuMemAlloc"), driver.count("cuGraphInstantiateWithFlags")
            for index in range(5):  # launches of one graph take turns, on whatever streams
                graph.launch(streams[index % 2])
            streams[1].synchronize()
            streams[0].to_host(pinned.address, y.address, BYTES)
            streams[0].synchronize()
            assert set(floats(pinned)) == {3.0**5}
            assert before == (
                gpu.allocations, driver.count("cuMemAlloc"), driver.count("cuGraphInstantiateWithFlags")
            )  # fmt: skip


def test_others_may_work_on_the_capturing_stream(driver: Any) -> None:
    """As TensorRT does, by the stream's handle."""
    ran = []
    with Gpu.open(0) as gpu, gpu.stream() as stream:
        graph = gpu.graph(lambda capturing: driver.call(capturing.handle, lambda: ran.append(1)))
        assert ran == []
        graph.launch(stream)
        graph.launch(stream)
        stream.synchronize()
    assert ran == [1, 1]


def test_kernels_outlive_their_module_and_are_loaded_once(driver: Any, affine_library: Path) -> None:
    driver.kernels(affine_library)
    with Gpu.open(0) as gpu, gpu.stream() as stream:
        x = gpu.memory(BYTES)
        with gpu.module(SOURCE) as module:
            kernel = module.kernel("affine")
            graph = gpu.graph(lambda capturing: launch(capturing, kernel, x.address, x.address, 1.0))
        graph.launch(stream)
        launch(stream, kernel, x.address, x.address, 1.0)
        stream.synchronize()
    assert driver.count("cuLibraryLoadData") <= 1  # not at all where an earlier test has


def test_a_capture_that_fails_leaves_the_gpu_usable(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    with Gpu.open(0) as gpu:

        def fail(stream: Stream) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            gpu.graph(fail)
        with pytest.raises(
            DeviceError, match="cuda:0 failed in earlier work: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        ) as e:
            gpu.graph(lambda stream: stream.synchronize())
        assert not e.value.lost
        with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            gpu.graph(lambda _: gpu.memory(1).close())
        event = gpu.event()
        with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_ISOLATION"):
            gpu.graph(lambda stream: stream.wait(event))
        assert tripled(gpu, affine(gpu), None) == [3, 6, 9]


def test_a_capture_binds_its_own_thread_only(driver: Any) -> None:
    with Gpu.open(0) as gpu, Gpu.open(0) as other:

        def record(stream: Stream) -> None:
            thread = threading.Thread(target=lambda: other.memory(1).close())
            thread.start()
            thread.join()

        gpu.graph(record).close()
        assert other.allocations == 1


def test_shared_memory_beyond_48_kib_is_asked_for(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    with Gpu.open(0) as gpu, gpu.stream() as stream:
        kernel, x = affine(gpu), gpu.memory(BYTES)
        launch(stream, kernel, x.address, x.address, 1.0, shared_bytes=200 << 10)
        stream.synchronize()
        with pytest.raises(DeviceError, match="cuda:0 failed to launch affine: CUDA_ERROR_INVALID_VALUE"):
            launch(stream, kernel, x.address, x.address, 1.0, shared_bytes=300 << 10)


def test_a_kernel_that_is_not_there(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    with Gpu.open(0) as gpu, pytest.raises(DeviceError, match="cuda:0 failed to find the kernel other: CUDA_ERROR_NOT"):
        gpu.module(SOURCE).kernel("other")


@pytest.mark.parametrize(
    ("plain", "exact"),
    [
        ("a[i] * b[i] + c[i]", "c[i] = __fadd_rn(__fmul_rn(a[i], b[i]), c[i]);"),
        ("a[i] / b[i]", "c[i] = __fdiv_rn(a[i], b[i]);"),
        ("sqrtf(a[i])", "c[i] = __fsqrt_rn(a[i]);"),
        ("a[i] * b[i]", 'float r; asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a[i]), "f"(b[i])); c[i] = r;'),
    ],
)
def test_floats_are_compiled_exactly(plain: str, exact: str) -> None:
    """Plain operators give the same machine code as those that name their rounding and keep denormals."""
    head = 'extern "C" __global__ void k(const float* a, const float* b, float* c) { unsigned i = threadIdx.x; '
    assert cubin_from_source(f"{head} c[i] = {plain}; }}", "sm86") == cubin_from_source(f"{head} {exact} }}", "sm86")


def test_source_that_does_not_compile() -> None:
    with pytest.raises(DeviceError, match=r"NVRTC cannot compile the kernels for sm_75: (?s:.*)expected") as error:
        cubin_from_source("int x", "sm75")
    assert not error.value.lost


# Ownership.


def used(gpu: Gpu, kernel: Kernel, module: Any) -> list[Any]:
    """One of everything, with work in flight."""
    stream, other, event, memory, pinned = gpu.stream(), gpu.stream(), gpu.event(), gpu.memory(BYTES), gpu.pinned(BYTES)
    graph = gpu.graph(lambda capturing: launch(capturing, kernel, memory.address, memory.address, 2.0))
    stream.to_device(memory.address, pinned.address, BYTES)
    stream.fill(memory.address, 0, 8)
    stream.record(event)
    other.wait(event)
    graph.launch(other)
    other.to_host(pinned.address, memory.address, BYTES)
    return [stream, other, event, memory, pinned, graph, module, gpu]


def test_closing_in_any_order_and_twice(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    order = random.Random(1)
    for _ in driver.seeds(60):
        gpu = Gpu.open(0)
        module = gpu.module(SOURCE)
        things = used(gpu, module.kernel("affine"), module)
        order.shuffle(things)
        for thing in [*things, *things]:
            thing.close()
        assert driver.alive().total() == 0


def test_closing_goes_on_where_one_thing_fails(driver: Any) -> None:
    gpu = Gpu.open(0)
    kept = [gpu.stream(), gpu.memory(1), gpu.memory(1), gpu.pinned(1)]
    driver.fail("cuMemFreeHost", 1, "INVALID_VALUE")
    with pytest.raises(DeviceError, match="cuda:0 failed to close: CUDA_ERROR_INVALID_VALUE") as error:
        gpu.close()
    assert not error.value.lost
    assert driver.alive() == Counter(pinned=1)
    gpu.close()
    from cuda.bindings.driver import cuMemFreeHost

    cuMemFreeHost(kept[-1].address)


def test_what_is_closed_says_so(driver: Any) -> None:
    with Gpu.open(0) as gpu:
        stream, event, pinned = gpu.stream(), gpu.event(), gpu.pinned(8)
        for thing in (stream, event, pinned):
            thing.close()
        assert pinned.array.size == 0
        for use in (stream.synchronize, event.synchronize, lambda: stream.fill(1, 0, 1), lambda: stream.record(event)):
            with pytest.raises(DeviceError, match="is closed"):
                use()
    for use in (gpu.free_bytes, gpu.stream, lambda: gpu.memory(1)):
        with pytest.raises(DeviceError, match="cuda:0 is closed; open it again"):
            use()


def test_a_thousand_cycles_leak_nothing(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    sizes = []
    for cycle in range(1000):
        with Gpu.open(cycle % 2) as gpu:
            module = gpu.module(SOURCE)
            used(gpu, module.kernel("affine"), module)
            del module
        assert driver.count("bytes") == driver.count("pinned") == 0
        if cycle in (200, 999):
            assert driver.alive().total() == 0
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            sizes.append((resident, len(os.listdir("/proc/self/fd"))))
    assert sizes[1][0] - sizes[0][0] < 4 << 20
    assert sizes[1][1] == sizes[0][1]


def test_another_thread_may_use_it(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    results = []
    with Gpu.open(1) as gpu:
        for _ in range(2):
            thread = threading.Thread(target=lambda: results.append(tripled(gpu, affine(gpu), None)))
            thread.start()
            thread.join()
    assert results == [[3, 6, 9]] * 2


def test_two_devices_side_by_side(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    with Gpu.open(0) as one, Gpu.open(1) as other:
        assert (one.index, one.name, other.name) == (0, "Software GPU 0", "Software GPU 1")
        memories = [gpu.memory(1000) for gpu in (one, other, one)]
        assert one.total_bytes() - one.free_bytes() == 2000
        assert other.total_bytes() - other.free_bytes() == 1000
        for memory in memories:
            memory.close()
        for _ in driver.seeds(6):
            for gpu in (one, other):
                assert tripled(gpu, affine(gpu), None) == [3, 6, 9]


# Errors.


def lost_codes() -> dict[str, bool]:
    """Every code but success and out of memory, and whether it leaves the context unusable."""
    from cuda.bindings.driver import CUresult

    ours = {
        "ASSERT", "CONTEXT_IS_DESTROYED", "DEINITIALIZED", "DEVICE_UNAVAILABLE", "ECC_UNCORRECTABLE", "EXTERNAL_DEVICE",
        "INVALID_CONTEXT", "MPS_RPC_FAILURE", "NO_DEVICE", "NVLINK_UNCORRECTABLE", "SYSTEM_DRIVER_MISMATCH",
        "SYSTEM_NOT_READY", "UNKNOWN",
    }  # fmt: skip
    names = {code.name.removeprefix("CUDA_ERROR_"): code.__doc__ or "" for code in CUresult if code}
    del names["OUT_OF_MEMORY"]
    return {
        name: name in ours or "process must be terminated" in " ".join(said.split()) for name, said in names.items()
    }


def test_every_code_becomes_one_of_our_errors(driver: Any) -> None:
    codes = lost_codes()
    assert sum(codes.values()) > 20
    for name, lost in codes.items():
        with Gpu.open(0) as gpu, gpu.stream() as stream:
            driver.fail("cuStreamSynchronize", 1, name)
            with pytest.raises(DeviceError, match=rf"^cuda:0 failed in earlier work.*: CUDA_ERROR_{name}\b") as error:
                stream.synchronize()
            assert error.value.lost == lost, name
            assert not isinstance(error.value, DeviceMemoryError)


def test_memory_that_is_not_there(driver: Any, affine: Callable[[Gpu], Kernel]) -> None:
    driver.memory(1_000_000)
    with Gpu.open(0) as gpu:
        gpu.memory(400_000)
        allocations = gpu.allocations
        with pytest.raises(DeviceMemoryError) as error:
            gpu.memory(700_000)
        assert str(error.value) == (
            "cuda:0 has no memory left to allocate 700,000 bytes; 600,000 of 1,000,000 bytes of its memory are free: "
            "use fewer or smaller batches, or end what else runs there"
        )
        with pytest.raises(DeviceMemoryError, match="to allocate 2,000,000 bytes of page-locked host memory"):
            gpu.pinned(2_000_000)
        driver.fail("cuGraphInstantiateWithFlags", 1, "OUT_OF_MEMORY")
        with pytest.raises(DeviceMemoryError, match="no memory left to make a graph"):
            gpu.graph(lambda stream: None)
        assert not error.value.lost
        assert gpu.allocations == allocations + 1  # the stream that was to be captured
        assert tripled(gpu, affine(gpu), None) == [3, 6, 9]


@pytest.mark.parametrize(
    "failing", ["kernel", "copy", "fill", "cuLaunchKernelEx", "cuMemcpyHtoDAsync", "cuGraphLaunch"]
)
def test_a_lost_context_is_opened_again(driver: Any, affine: Callable[[Gpu], Kernel], failing: str) -> None:
    for _ in driver.seeds(8):
        engine, neighbour, elsewhere = Gpu.open(0), Gpu.open(0), Gpu.open(1)
        theirs, stream = neighbour.memory(10), neighbour.stream()
        module = engine.module(SOURCE)
        driver.fail(failing, 1, "ILLEGAL_ADDRESS")
        with pytest.raises(DeviceError, match=r"is lost: CUDA_ERROR_ILLEGAL_ADDRESS.*open it again") as error:
            used(engine, module.kernel("affine"), module)[1].synchronize()
        assert error.value.lost
        for use in (engine.stream, stream.synchronize, neighbour.free_bytes):
            with pytest.raises(DeviceError, match="cuda:0 was lost to an earlier error") as error:
                use()
            assert error.value.lost
        assert tripled(elsewhere, affine(elsewhere), None) == [3, 6, 9]
        engine.close()
        with pytest.raises(DeviceError, match="others still hold it: close them") as error:
            Gpu.open(0)
        assert error.value.lost
        neighbour.close()
        theirs.close()
        with Gpu.open(0) as again, Gpu.open(0) as another:
            for gpu in (again, another, elsewhere):
                assert tripled(gpu, affine(gpu), None) == [3, 6, 9]
        elsewhere.close()
        del module
        assert driver.alive().total() == 0


def test_a_loss_met_while_closing(driver: Any) -> None:
    gpu = Gpu.open(0)
    stream, memory = gpu.stream(), gpu.memory(8)
    stream.fill(memory.address, 0, 8)
    driver.fail("fill", 1, "LAUNCH_FAILED")
    memory.close()
    with pytest.raises(DeviceError, match="was lost") as error:
        stream.synchronize()
    assert error.value.lost
    gpu.close()
    Gpu.open(0).close()


def test_a_reset_that_does_not_mend(driver: Any) -> None:
    for step in ("cuDevicePrimaryCtxReset", "cuMemcpyDtoH", "cuMemAlloc", "cuCtxSetCurrent"):
        with Gpu.open(0) as gpu, gpu.stream() as stream:
            driver.fail("cuStreamSynchronize", 1, "ILLEGAL_ADDRESS")
            with pytest.raises(DeviceError):
                stream.synchronize()
        for _ in range(2):
            driver.fail(step, 1, "ILLEGAL_ADDRESS")
            with pytest.raises(
                DeviceError, match=r"a reset did not mend it \(CUDA_ERROR_ILLEGAL_ADDRESS.*\): start a new process"
            ) as error:
                Gpu.open(0)
            assert error.value.lost
        Gpu.open(0).close()


def test_no_device_of_that_index(driver: Any) -> None:
    for index in (2, -1):
        with pytest.raises(RequestError, match=f"there is no cuda:{index}: this process sees 2 GPUs, cuda:0 to cuda:1"):
            Gpu.open(index)


def test_no_device(driver: Any) -> None:
    driver.fail("cuInit", 1, "NO_DEVICE")
    with pytest.raises(BackendUnavailableError, match=r"no GPU can be used here: CUDA_ERROR_NO_DEVICE.*nvidia-smi"):
        Gpu.open(0)
    driver.devices(0)
    with pytest.raises(BackendUnavailableError, match=r"the driver shows none.*CUDA_VISIBLE_DEVICES"):
        Gpu.open(0)
    driver.devices(1)
    with pytest.raises(RequestError, match="there is no cuda:1: this process sees one GPU, cuda:0;"):
        Gpu.open(1)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("import sys; assert 'cuda' not in sys.modules", "no GPU can be used here: .*NVIDIA's driver works"),
        ("import sys; sys.modules['cuda'] = None", "cuda-core is not installed: pip install 'thoraxrt"),
    ],
)
def test_neither_driver_nor_cuda_core(tmp_path: Path, before: str, expected: str) -> None:
    (tmp_path / "libcuda.so.1").touch()  # hides the driver that this machine may have
    code = f"""
from thoraxrt.engine.cuda.cuda import Gpu
from thoraxrt.engine.errors import BackendUnavailableError
import re
{before}
try:
    Gpu.open(0)
except BackendUnavailableError as error:
    assert re.search({expected!r}, str(error)), error
else:
    raise SystemExit("opened")
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, check=True)


# Device arrays.


class Array:
    """An array on a device, as another library's: uint8 or what is said, `(H, W)`, at strides in bytes."""

    def __init__(
        self, address: int, shape: tuple[int, ...], strides: Any = None, typestr: str = "|u1", stream: Any = None
    ):
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": shape, "strides": strides, "typestr": typestr, "version": 3, "stream": stream
        }  # fmt: skip


class Exchanged:
    """An array that speaks DLPack only."""

    def __init__(self, memory: Any, shape: tuple[int, ...], dtype: Any) -> None:
        from cuda.core import Buffer
        from cuda.core.utils import StridedMemoryView

        buffer = Buffer.from_handle(memory.address, memory.size, owner=memory)
        self._view = StridedMemoryView.from_buffer(buffer, shape, dtype=np.dtype(dtype))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._view.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> object:
        return self._view.__dlpack__(**options)


def test_device_arrays_are_taken_as_they_lie(driver: Any) -> None:
    with Gpu.open(0) as gpu, gpu.stream() as stream:
        memory = gpu.memory(4096)
        for array, pitch, width, height in (
            (Array(memory.address, (30, 40)), 40, 40, 30),
            (Array(memory.address, (30, 40), (64, 1)), 64, 40, 30),
            (Array(memory.address, (1, 40), (7, 1)), 40, 40, 1),
            (Array(memory.address, (30, 1), (8, 8)), 8, 1, 30),
            (Exchanged(memory, (30, 40), np.uint8), 40, 40, 30),
        ):
            pixels = pixels_from_array(array, stream)
            assert pixels == DevicePixels(memory.address, pitch, width, height, pixels.owner)


def test_device_arrays_that_are_refused(driver: Any) -> None:
    with Gpu.open(0) as gpu, Gpu.open(1) as other, gpu.stream() as stream:
        here, there = gpu.memory(4096).address, other.memory(4096).address
        for array, expected in (
            (Array(here, (3, 30, 40)), r"uint8 \(3, 30, 40\): expected uint8 \(H, W\)"),
            (Array(here, (0, 40)), r"uint8 \(0, 40\)"),
            (Array(here, (10, 10), None, "<f4"), r"float32 \(10, 10\)"),
            (Array(here, (10, 10), None, "|i1"), r"int8 \(10, 10\)"),
            (Array(here, (10, 10), None, "<u2"), r"uint16 \(10, 10\)"),
            (Array(here, (10, 10), (20, 2)), "strides of 20 and 2 bytes: expected rows"),
            (Array(here, (10, 10), (1, 10)), "strides of 1 and 10 bytes"),
            (Array(here, (10, 10), (5, 1)), "strides of 5 and 1 bytes"),
            (Array(here + 1000, (10, 10), (-10, 1)), "strides of -10 and 1 bytes"),
            (Array(here, (10, 10), (21, 2), "<u2"), "is no device array"),
            (Array(there, (10, 10)), "lies on cuda:1, the engine runs on cuda:0: copy it there first"),
            (np.zeros((10, 10), np.uint8), "a ndarray is no device array"),
            (Exchanged(other.memory(100), (10, 10), np.uint8), "lies on cuda:1"),
            ([[1, 2], [3, 4]], "a list is no device array"),
        ):
            with pytest.raises(ImageContentError, match=expected):
                pixels_from_array(array, stream)
        driver.fail("cuPointerGetAttribute", 1, "LAUNCH_FAILED")
        with pytest.raises(DeviceError, match="cuda:0 failed to take a device array and is lost"):
            pixels_from_array(Array(here, (10, 10)), stream)
    Gpu.open(0).close()


@pytest.mark.parametrize("told", ["its stream", "the default stream", "nothing"])
def test_a_device_array_is_read_after_it_was_written(driver: Any, told: str) -> None:
    """And too early, under some seed, where its producer does not tell its stream."""
    early = 0
    for _ in driver.seeds(24):
        with Gpu.open(0) as gpu:
            theirs, ours, memory, pinned = gpu.stream(), gpu.stream(), gpu.memory(100), gpu.pinned(100)
            handle = 1 if told == "the default stream" else theirs.handle
            driver.call(handle, partial(ctypes.memset, memory.address, 7, 100))
            array = Array(memory.address, (10, 10), stream=None if told == "nothing" else handle)
            pixels = pixels_from_array(array, ours)
            ours.to_host(pinned.address, pixels.address, 100)
            ours.synchronize()
            early += set(pinned.array) != {7}
    assert (early == 0) == (told != "nothing")


# The software driver itself: what would be undefined on a GPU ends the process.


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("stream.fill(memory.address + 90, 0, 20)", "fill: 20 bytes at 0x[0-9a-f]+ end 10 bytes beyond memory of 100 bytes"),
        ("stream.to_device(8, pinned.address, 1)", "copy to the device: no device memory at 0x8 on cuda:0"),
        ("stream.to_host(pinned.address, memory.address, 100); free(pinned)", "page-locked memory was freed before"),
        ("stream.launch(kernel, (4, 1, 1), (32, 1, 1), 0, memory.address, memory.address, np.float32(1), np.uint32(26))",
         "kernel affine wrote outside the memory of 100 bytes"),
    ],
)  # fmt: skip
def test_the_driver_ends_what_is_undefined(driver: Any, affine_library: Path, does: str, said: str) -> None:
    code = f"""
import numpy as np
from cuda.bindings.driver import cuMemFreeHost
from thoraxrt.engine.cuda.cuda import Gpu
SOURCE = {SOURCE!r}
def free(pinned): cuMemFreeHost(pinned.address)
gpu = Gpu.open(0)
stream, memory, pinned, kernel = gpu.stream(), gpu.memory(100), gpu.pinned(100), gpu.module(SOURCE).kernel("affine")
{does}
stream.synchronize()
"""
    driver.kernels(affine_library)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -6, ended.stderr
    assert re.search(f"stub driver: {said}", ended.stderr)
