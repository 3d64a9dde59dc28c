from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from thoraxrt.engine.backends import choose, open_backend
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import Radiograph, ThreadDecoder
from thoraxrt.engine.engine import Engine, Prediction
from thoraxrt.engine.errors import (
    BackendError,
    BackendUnavailableError,
    DeviceError,
    ImageContentError,
    ImageLimitError,
    RequestError,
)
from thoraxrt.engine.execute import (
    Answers,
    DeviceRadiograph,
    Executor,
    HostExecutor,
    NetworkInput,
    Output,
    Picture,
    Reopening,
)
from thoraxrt.engine.preprocess import network_input
from thoraxrt.export.phantoms import phantom


@pytest.fixture(scope="module")
def radiographs() -> list[Radiograph]:
    return [Radiograph.from_pixels(phantom(99, index).pixels) for index in range(4)]


class Answered(NamedTuple):
    answers: Answers

    def result(self) -> Answers:
        return self.answers


class FakeDevice:
    """An executor whose device is lost when it is told to be; its logits are the size of the image."""

    precision, ahead, buckets, takes_stored = "fp16", 1, (), True

    def __init__(self, name: str, labels: int, losses: int = 0) -> None:
        self.backend, self.labels, self.losses, self.closed = name, labels, losses, 0

    def submit(self, pictures: Sequence[Picture], wanted: npt.NDArray[np.bool_], cam: bool) -> Answered:
        assert wanted.shape == (len(pictures), self.labels)
        if self.losses:
            self.losses -= 1
            return Answered([DeviceError("the device fell off the bus", lost=True)] * len(pictures))
        return Answered([Output(np.full(self.labels, p.width, np.float32), (), None) for p in pictures])

    def device_memory(self) -> None:
        return None

    def close(self) -> None:
        self.closed += 1


def test_a_lost_device_costs_what_was_in_flight_and_is_opened_again(
    sample_bundle: Bundle, radiographs: list[Radiograph]
) -> None:
    labels = len(sample_bundle.manifest.labels)
    opened = [FakeDevice("first", labels, losses=1), FakeDevice("second", labels)]
    queue = iter(opened)
    with Engine(sample_bundle, Reopening(lambda: next(queue), None), ThreadDecoder(1), batch=1) as engine:
        answers = list(engine.predict(radiographs))
    # One batch was under way when the loss became known: it ran on the first device, which answered it.
    assert [type(answer) for answer in answers] == [DeviceError, Prediction, Prediction, Prediction]
    backends = [answer.backend for answer in answers if isinstance(answer, Prediction)]
    assert backends == ["first", "second", "second"]
    assert [device.closed for device in opened] == [1, 1]


def test_a_device_that_cannot_be_opened_again_fails_each_batch_or_gives_way_to_the_cpu(
    sample_bundle: Bundle, radiographs: list[Radiograph]
) -> None:
    labels = len(sample_bundle.manifest.labels)

    def opener() -> Executor:
        if devices:
            return devices.pop()
        raise BackendUnavailableError("no GPU any more")

    devices = [FakeDevice("gpu", labels, losses=2)]
    with Engine(sample_bundle, Reopening(opener, None), ThreadDecoder(1)) as engine:
        answers = list(engine.predict(radiographs))
    assert all(isinstance(answer, DeviceError) and answer.lost for answer in answers)
    assert "cannot be opened again: no GPU any more" in str(answers[-1])

    devices = [FakeDevice("gpu", labels, losses=2)]

    def cpu() -> Executor:
        return HostExecutor(open_backend(sample_bundle, "onnxruntime"), sample_bundle.manifest)

    with Engine(sample_bundle, Reopening(opener, cpu), ThreadDecoder(1)) as engine:
        answers = list(engine.predict(radiographs))
        assert (engine.backend, engine.precision) == ("onnxruntime", "fp32")
    assert [type(answer) for answer in answers] == [DeviceError, DeviceError, Prediction, Prediction]
    assert isinstance(answers[2], Prediction)
    assert answers[2].backend == "onnxruntime"


def test_a_device_error_that_leaves_the_device_usable_reopens_nothing(sample_bundle: Bundle) -> None:
    labels = len(sample_bundle.manifest.labels)
    opened: list[FakeDevice] = []

    def opener() -> Executor:
        opened.append(FakeDevice("gpu", labels))
        return opened[-1]

    executor = Reopening(opener, None)
    executor.note([DeviceError("out of memory")], opened[0])
    executor.submit([Radiograph.from_pixels(phantom(5, 0).pixels)], np.zeros((1, labels), np.bool_), False)
    assert len(opened) == 1
    executor.note([DeviceError("gone", lost=True)], opened[0])
    executor.submit([Radiograph.from_pixels(phantom(5, 0).pixels)], np.zeros((1, labels), np.bool_), False)
    assert len(opened) == 2
    executor.note([DeviceError("gone", lost=True)], opened[0])  # heard of late: it has been replaced already
    executor.submit([Radiograph.from_pixels(phantom(5, 0).pixels)], np.zeros((1, labels), np.bool_), False)
    assert len(opened) == 2


def test_on_the_cpu_each_image_meets_its_own_error(sample_bundle: Bundle, radiographs: list[Radiograph]) -> None:
    sliver = Radiograph.from_pixels(np.zeros((32, 32 * 300), np.uint8))
    on_a_gpu = DeviceRadiograph(np.zeros((64, 64), np.uint8))
    with Engine.open(sample_bundle, device="cpu", batch=4) as engine:
        answers = engine.predict_batch([sliver, radiographs[0], on_a_gpu])
        assert [type(answer) for answer in answers] == [ImageLimitError, Prediction, ImageContentError]
        assert "in a GPU's memory" in str(answers[2])
        assert [type(a) for a in engine.predict_batch([sliver, on_a_gpu])] == [ImageLimitError, ImageContentError]
        assert engine.predict_batch([]) == []


class Broken:
    """A backend whose runtime fails on every second call."""

    name, precision = "broken", "fp32"

    def __init__(self, bundle: Bundle) -> None:
        self._inner, self._calls = open_backend(bundle, "onnxruntime"), 0

    def run(self, images: npt.NDArray[np.uint8]) -> object:
        self._calls += 1
        if self._calls % 2 == 0:
            raise BackendError("the runtime failed")
        return self._inner.run(images)

    def close(self) -> None:
        self._inner.close()


def test_a_network_that_fails_fails_its_batch_alone(sample_bundle: Bundle, radiographs: list[Radiograph]) -> None:
    executor = HostExecutor(Broken(sample_bundle), sample_bundle.manifest)
    with Engine(sample_bundle, executor, ThreadDecoder(1)) as engine:
        answers = list(engine.predict(radiographs))
    assert [type(answer) for answer in answers] == [Prediction, BackendError] * 2


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA", "cuda:²"])
def test_a_device_that_nobody_knows_is_refused(device: str, sample_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="expected cpu, cuda or cuda:N"):
        choose(sample_bundle, device=device)


def test_a_device_rules_out_the_backends_of_the_other_kind(sample_bundle: Bundle) -> None:
    assert choose(sample_bundle, device="cpu").module.DEVICE == "cpu"
    with pytest.raises(BackendUnavailableError, match="openvino: it runs on cpu; onnxruntime: it runs on cpu"):
        choose(sample_bundle, precision="bf16", device="cuda:7")
    with pytest.raises(BackendUnavailableError, match="onnxruntime: it runs on cpu"):
        choose(sample_bundle, "onnxruntime", device="cuda")


def test_a_client_may_do_geometry_itself(sample_bundle: Bundle, radiographs: list[Radiograph]) -> None:
    spec = sample_bundle.manifest.preprocess
    arrays = [network_input(radiograph.pixels, spec)[0] for radiograph in radiographs]
    with Engine.open(sample_bundle, device="cpu", batch=4) as engine:
        whole, ready = engine.predict_batch(radiographs), engine.predict_batch([NetworkInput(a) for a in arrays])
        small, floats = engine.predict_batch([NetworkInput(arrays[0][1:]), NetworkInput(arrays[0].astype(np.float32))])
    boxes = 0
    for one, other, radiograph in zip(whole, ready, radiographs, strict=True):
        assert isinstance(one, Prediction)
        assert isinstance(other, Prediction)
        assert one.findings == other.findings
        assert (other.width, other.height) == (spec.input_size, spec.input_size)
        geometry = spec.geometry(radiograph.width, radiograph.height)
        for box, there in zip(one.boxes, other.boxes, strict=True):
            assert there.score == box.score
            assert geometry.source_x(there.peak.x) == pytest.approx(box.peak.x)
            boxes += 1
    assert boxes
    assert isinstance(small, ImageContentError)
    assert isinstance(floats, ImageContentError)
    assert "expected uint8 (224, 224)" in str(small)
