"""How gpu-check measures: device times by events, a host's waiting by its clock.

Everything is enqueued ahead of the device and repeated after a warm-up; inputs rotate, so that no figure is that of
one buffer in the cache. Knows neither bundles nor TensorRT, and reports nothing.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from thoraxrt.benchmarks.gpu_kernels import DeviceBatch
from thoraxrt.engine.cuda.cuda import Gpu, Stream
from thoraxrt.engine.cuda.pipeline import Network
from thoraxrt.engine.errors import ThoraxrtError

__all__ = [
    "LARGE",
    "NetworkTimes",
    "copy_to_device_gb_s",
    "device_milliseconds",
    "images_per_second",
    "kernel_milliseconds",
    "latencies_ms",
    "network_milliseconds",
]

LARGE: Final = 256 << 20
"""Bytes of a copy that no cache holds: five times the L2 of an H200."""


def device_milliseconds(
    gpu: Gpu,
    steps: Sequence[Callable[[Stream], None]],
    repeats: int,
    prepare: Callable[[Stream, int], None] | None = None,
) -> list[float]:
    """Device time of each repeat, milliseconds by events; repeat i runs `steps[i % len(steps)]`.

    `prepare` puts what is not to be timed before repeat i. Everything is enqueued without waiting, so that
    the device never waits for the host once a few repeats are queued; the first tenth is warm-up and left out.
    """
    warm = max(repeats // 10, 3)
    with gpu.stream() as stream:
        events = [(gpu.event(timing=True), gpu.event(timing=True)) for _ in range(warm + repeats)]
        for index, (start, end) in enumerate(events):
            if prepare is not None:
                prepare(stream, index)
            stream.record(start)
            steps[index % len(steps)](stream)
            stream.record(end)
        stream.synchronize()
        times = [end.milliseconds_since(start) for start, end in events]
        for event in itertools.chain.from_iterable(events):
            event.close()
    return times[warm:]


def copy_to_device_gb_s(gpu: Gpu, size: int = LARGE, repeats: int = 20) -> float:
    """Bytes per nanosecond from page-locked memory to the device, one copy at a time: the median."""
    with gpu.pinned(size) as pinned, gpu.memory(size) as memory:
        pinned.array[:] = np.arange(size, dtype=np.uint8)
        times = device_milliseconds(
            gpu, [lambda stream: stream.to_device(memory.address, pinned.address, size)], repeats
        )
    return size / statistics.median(times) / 1e6


class NetworkTimes(NamedTuple):
    """One bucket's inference as a captured graph: device time, and from launch to known result, milliseconds."""

    device: list[float]
    waited_for: list[float]


def network_milliseconds(
    gpu: Gpu, network: Network, inputs: npt.NDArray[np.uint8], labels: int, repeats: int, *, captured: bool = True
) -> dict[int, NetworkTimes]:
    """The network alone at each of its buckets, captured or not; a new input is copied in, untimed, before each launch.

    `inputs` are uint8 `(M, 1, S, S)`, at least as many as the largest bucket. Binds the network's addresses,
    which nobody else may have done.
    """
    largest, image_bytes = network.buckets[-1], inputs[0].nbytes
    height, width = network.cam_shape
    times = {}
    with (
        gpu.pinned(inputs.nbytes) as pinned,
        gpu.memory(largest * image_bytes) as image,
        gpu.memory(largest * labels * 4) as logits,
        gpu.memory(largest * labels * height * width * 4) as cam,
        gpu.stream() as stream,
    ):
        pinned.array[:] = inputs.reshape(-1)
        network.bind(image.address, logits.address, cam.address)
        for bucket in network.buckets:
            offsets = range(0, (len(inputs) - bucket + 1) * image_bytes, image_bytes)

            def copy(to: Stream, index: int, offsets: range = offsets, size: int = bucket * image_bytes) -> None:
                to.to_device(image.address, pinned.address + offsets[index % len(offsets)], size)

            copy(stream, 0)
            network.enqueue(bucket, stream.handle)  # once uncaptured: whatever is made at first use is made here
            stream.synchronize()
            enqueue = partial(_enqueue, network, bucket)
            launch = gpu.graph(enqueue).launch if captured else enqueue
            device = device_milliseconds(gpu, [launch], repeats, copy)
            times[bucket] = NetworkTimes(device, _waited_for(stream, launch, copy, repeats))
    return times


def _enqueue(network: Network, bucket: int, stream: Stream) -> None:
    network.enqueue(bucket, stream.handle)


def _waited_for(
    stream: Stream, launch: Callable[[Stream], None], copy: Callable[[Stream, int], None], repeats: int
) -> list[float]:
    times = []
    for index in range(repeats):
        copy(stream, index)
        stream.synchronize()
        start = time.perf_counter()
        launch(stream)
        stream.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return times


def kernel_milliseconds(gpu: Gpu, batches: Sequence[DeviceBatch], name: str, repeats: int) -> list[float]:
    """A kernel's device time, `geometry` or `boxes`, a launch a batch in turn, captured so that no gap is timed."""
    rounds = 4

    def all_of(stream: Stream) -> None:
        for _, batch in itertools.product(range(rounds), batches):
            (batch.geometry if name == "geometry" else batch.boxes)(stream)

    def reset(stream: Stream, _: int) -> None:
        for batch in batches:
            batch.reset(stream)

    with gpu.graph(all_of) as graph:
        return [time / (rounds * len(batches)) for time in device_milliseconds(gpu, [graph.launch], repeats, reset)]


def latencies_ms(predict: Callable[[Any], object], images: Sequence[Any], calls: int) -> list[float]:
    """Milliseconds of the host's clock for each call on one image, the images in turn; a tenth is warm-up."""
    times = []
    for index in range(calls + calls // 10):
        start = time.perf_counter()
        predict(images[index % len(images)])
        times.append(1000 * (time.perf_counter() - start))
    return times[calls // 10 :]


def images_per_second(
    predict: Callable[[Iterable[Any]], Iterable[Any]], images: Sequence[Any], seconds: float
) -> float:
    """How many images a stream of them gives answers for; the first second or tenth of them is warm-up.

    `predict` takes images and yields an answer each. Raises the first error among the answers.
    """
    start = time.perf_counter()
    end = start + seconds

    def until_the_end() -> Iterator[Any]:
        yield from itertools.takewhile(lambda _: time.perf_counter() < end, itertools.cycle(images))

    warm, done, last = start + seconds / 5, 0, start
    began = None
    for answer in predict(until_the_end()):
        if isinstance(answer, ThoraxrtError):
            raise answer
        last = time.perf_counter()
        if began is not None:
            done += 1
        elif last >= warm:
            began = last
    if not done or began is None:
        raise ValueError(f"no answer within {seconds} s, or all at once: measure for longer")
    return done / (last - began)
