"""gpu-check's measuring functions, each run for a moment over the software driver: shapes and units, no figures.

Here rather than beside the benchmarks' other tests, since the software driver is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.engine.cuda.network import HostNetwork, noise
from thoraxrt.benchmarks.gpu_kernels import DeviceBatch, differences, fewest_bytes, odd_batch
from thoraxrt.benchmarks.gpu_timing import (
    copy_to_device_gb_s,
    device_milliseconds,
    images_per_second,
    kernel_milliseconds,
    latencies_ms,
    network_milliseconds,
)
from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.cuda.cuda import Gpu, Stream
from thoraxrt.engine.cuda.kernels import source
from thoraxrt.engine.cuda.pipeline import Pipeline
from thoraxrt.engine.errors import DeviceError, ThoraxrtError
from thoraxrt.engine.execute import Output
from thoraxrt.engine.preprocess import PreprocessSpec, Shorter

SPEC, BOXES = PreprocessSpec(resize=Shorter(pixels=40), crop=32), BoxSpec(min_area=0.0)


def test_device_times_leave_out_the_warm_up_and_rotate_the_steps(driver: Any) -> None:
    with Gpu.open(0) as gpu, gpu.memory(4) as memory:
        ran: list[str] = []

        def step(name: str, value: int) -> Any:
            def fill(stream: Stream) -> None:
                ran.append(name)
                stream.fill(memory.address + value, value, 1)

            return fill

        prepared: list[int] = []
        times = device_milliseconds(gpu, [step("a", 0), step("b", 1)], 20, lambda _, index: prepared.append(index))
        assert len(times) == 20
        assert min(times) >= 0
        assert prepared == list(range(23))
        assert ran == ["a", "b"] * 11 + ["a"]
        assert copy_to_device_gb_s(gpu, 1 << 16, 5) > 0


def test_the_kernels_alone_agree_with_the_cpu_and_their_times_are_of_one_launch(
    driver: Any, host_kernels: Path
) -> None:
    driver.kernels(host_kernels)
    with Gpu.open(0) as gpu:
        module = gpu.module(source())
        odd = [odd_batch(seed) for seed in range(2)]
        batches = [DeviceBatch(gpu, module, images, cams, SPEC, BOXES) for images, cams in odd]
        for batch, (images, cams) in zip(batches, odd, strict=True):
            assert differences(batch, images, cams, SPEC, BOXES) == []
        assert differences(batches[0], *odd[1], SPEC, BOXES) != []  # else the comparison compares nothing
        launches = driver.count("kernel")
        for name in ("geometry", "boxes"):
            times = kernel_milliseconds(gpu, batches, name, 2)
            assert len(times) == 2
            assert min(times) >= 0
        assert driver.count("kernel") - launches == 2 * (2 + 3) * 4 * len(batches)


def test_the_bytes_of_geometry_by_hand() -> None:
    spec = PreprocessSpec(resize=Shorter(pixels=256), crop=224)
    # 4 pixels become one: 224 windows of 8 pixels, 4 apart, span 900 pixels of 1024.
    assert fewest_bytes([np.zeros((1024, 1024), np.uint8)] * 2, spec) == 2 * (900 * 900 + 224 * 224)


def test_the_network_alone_is_timed_at_each_bucket_on_inputs_that_differ(driver: Any) -> None:
    with Gpu.open(0) as gpu:
        network = HostNetwork(driver, noise(3, 4), (1, 2), 8)
        inputs = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
        times = network_milliseconds(gpu, network, inputs, 3, 10)
        assert list(times) == [1, 2]
        assert all(len(kind) == 10 and min(kind) >= 0 for bucket in times.values() for kind in bucket)
        assert {image.tobytes() for image in inputs} <= network.inputs


def test_a_pipeline_is_timed_by_call_and_by_stream(driver: Any, host_kernels: Path) -> None:
    driver.kernels(host_kernels)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (50, 60), np.uint8) for _ in range(3)]
    wanted = np.ones((1, 3), bool)
    with Gpu.open(0) as gpu:
        network = HostNetwork(driver, noise(3, 4), (1, 2), SPEC.input_size)
        thresholds = np.full(3, -np.inf, np.float32)
        with Pipeline(
            gpu,
            network,
            backend="host",
            labels=("a", "b", "c"),
            preprocess=SPEC,
            boxes=BOXES,
            thresholds=thresholds,
        ) as pipeline:

            def answers(images: Iterable[npt.NDArray[np.uint8]]) -> Iterator[Output | ThoraxrtError]:
                for image in images:
                    yield from pipeline.submit([image], wanted).result()

            times = latencies_ms(lambda image: list(answers([image])), images, 10)
            assert len(times) == 10
            assert min(times) > 0
            assert images_per_second(answers, images, 0.5) > 0


def test_a_rate_is_that_of_answers_after_the_warm_up_and_an_error_is_no_answer() -> None:
    with pytest.raises(DeviceError, match="lost"):
        images_per_second(lambda images: (DeviceError("lost") for _ in images), [1], 0.1)
    with pytest.raises(ValueError, match="measure for longer"):
        images_per_second(lambda images: [], [1], 0.01)
