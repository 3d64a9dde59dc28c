"""The pipeline over the software driver, in every order that streams and events allow, against the CPU path."""

from __future__ import annotations

import contextlib
import gc
import resource
import runpy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from thoraxrt.engine.backends import onnxruntime
from thoraxrt.engine.boxes import BoxSpec, Region, regions_from_cam
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.cuda.cuda import Gpu
from thoraxrt.engine.cuda.pipeline import Image, Pipeline, Stored
from thoraxrt.engine.errors import (
    BackendError,
    DeviceError,
    DeviceMemoryError,
    ImageContentError,
    ImageLimitError,
    RequestError,
)
from thoraxrt.engine.execute import Output
from thoraxrt.engine.preprocess import Exact, PreprocessSpec, Shorter, network_input
from thoraxrt.engine.profile import Profile
from thoraxrt.export.phantoms import phantom

_network = runpy.run_path(str(Path(__file__).with_name("network.py")))  # pytest's importlib mode has no path to it
HostNetwork, memoised, noise = _network["HostNetwork"], _network["memoised"], _network["noise"]

Function = Callable[[npt.NDArray[np.uint8]], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]

SMALL = PreprocessSpec(resize=Shorter(pixels=36), crop=32)
LABELS = ("Mass", "Nodule", "Edema")
BOXES = BoxSpec(threshold=0.5, min_area=0.002, per_finding={"Edema": 0.7})


class Case:
    """A network function with all that a pipeline and the CPU path need to know beside it."""

    def __init__(
        self,
        function: Function,
        spec: PreprocessSpec = SMALL,
        labels: Sequence[str] = LABELS,
        boxes: BoxSpec = BOXES,
        thresholds: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self.function, self.spec, self.labels, self.boxes = function, spec, labels, boxes
        self.thresholds = np.full(len(labels), -np.inf, np.float32) if thresholds is None else thresholds
        self._regions: dict[tuple[bytes, int], list[Region]] = {}

    def open(self, gpu: Gpu, network: Any, **options: Any) -> Pipeline:
        return Pipeline(
            gpu,
            network,
            backend="host",
            labels=self.labels,
            preprocess=self.spec,
            boxes=self.boxes,
            thresholds=self.thresholds,
            **options,
        )

    def network(self, driver: Any, *buckets: int) -> Any:
        return HostNetwork(driver, self.function, buckets, self.spec.input_size)

    def all(self, count: int) -> npt.NDArray[np.bool_]:
        return np.ones((count, len(self.labels)), np.bool_)

    def expected(self, pixels: npt.NDArray[np.uint8], wanted: npt.NDArray[np.bool_], cam: bool) -> Output:
        """The CPU path, one image and one map at a time."""
        image = network_input(pixels, self.spec)
        logits, cams = self.function(image)
        regions = []
        for index in np.flatnonzero(wanted & (logits >= self.thresholds)).tolist():
            key = image.tobytes(), index
            if key not in self._regions:
                threshold = self.boxes.threshold_of(self.labels[index])
                self._regions[key] = regions_from_cam(cams[index], image.shape[1], threshold, self.boxes.min_area)
            regions += [(index, region) for region in self._regions[key]]
        return Output(logits, tuple(regions), cams if cam else None)

    def check(self, answer: object, image: Image, wanted: npt.NDArray[np.bool_], cam: bool = False) -> None:
        assert isinstance(answer, Output), answer
        expected = self.expected(pixels_of(image), wanted, cam)
        np.testing.assert_array_equal(answer.logits, expected.logits)
        assert answer.regions == expected.regions
        assert (answer.cam is None) == (not cam)
        if cam:
            np.testing.assert_array_equal(answer.cam, expected.cam)


def pixels_of(image: Image) -> npt.NDArray[np.uint8]:
    if isinstance(image, Stored):
        return np.asarray(image.table[image.values])
    assert isinstance(image, np.ndarray)
    return image


def picture(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, (height, width), np.uint8)


def stored(rng: np.random.Generator, height: int, width: int) -> Stored:
    return Stored(rng.integers(0, 65536, (height, width), np.uint16), rng.integers(0, 256, 65536, np.uint8))


@pytest.fixture(autouse=True)
def kernels_found(driver: Any, host_kernels: Path) -> None:
    driver.kernels(host_kernels)


@pytest.fixture
def gpu(driver: Any) -> Iterator[Gpu]:
    with Gpu.open(0) as gpu:
        yield gpu


@pytest.fixture(scope="module")
def small() -> Case:
    return Case(memoised(noise(3, 4)), thresholds=np.array([-np.inf, -0.05, 0.02], np.float32))


@pytest.fixture(scope="module")
def sample(sample_bundle: Bundle) -> Case:
    manifest = sample_bundle.manifest
    backend = onnxruntime.open(sample_bundle, "fp32")

    def run(image: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        logits, cams = backend.run(image[np.newaxis])
        return logits[0], cams[0]

    rng = np.random.default_rng(0)
    function = memoised(run)
    thresholds = function(network_input(phantom(3, 0).pixels, manifest.preprocess))[0].copy()  # about half are reported
    thresholds += rng.choice(np.array([-1e-3, 0, 1e-3], np.float32), len(thresholds))
    return Case(function, manifest.preprocess, manifest.labels, manifest.boxes, thresholds)


@pytest.fixture(scope="module")
def radiographs() -> list[Image]:
    """Phantoms whole and cut to other sizes, one at twice its size, one as stored in 16 bits."""
    rng = np.random.default_rng(5)
    whole = [phantom(3, index).pixels for index in range(3)]
    tables = np.sort(rng.integers(0, 256, 65536, np.uint8))
    twelve_bits = whole[0].astype(np.uint16) * 256 + rng.integers(0, 256, whole[0].shape, np.uint16)
    return [
        *whole,
        whole[0][100:900, :700],  # strided
        np.ascontiguousarray(whole[1][:601, 3:]),
        np.repeat(np.repeat(whole[2][::2, ::2], 3, axis=0), 3, axis=1),
        Stored(twelve_bits, tables),
        Stored(twelve_bits[::-1, :801], tables),
    ]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_answers_are_those_of_the_cpu_in_every_order(
    driver: Any, gpu: Gpu, sample: Case, radiographs: list[Image], slots: int
) -> None:
    network = sample.network(driver, 1, 2, 4)
    size = sample.spec.input_size
    with sample.open(gpu, network, slots=slots, staging_bytes=5 << 20) as pipeline:
        for seed in driver.seeds(12):
            rng = np.random.default_rng(seed)
            batches = []
            for _ in range(int(rng.integers(1, 6))):
                images = [radiographs[i] for i in rng.integers(0, len(radiographs), int(rng.integers(0, 7)))]
                wanted = rng.random((len(images), len(sample.labels))) < 0.8
                cam = bool(rng.random() < 0.3)
                batches.append((pipeline.submit(images, wanted, cam), images, wanted, cam))
            for index in rng.permutation(len(batches)):
                flight, images, wanted, cam = batches[index]
                answers = flight.result()
                assert len(answers) == len(images)
                for answer, image, mask in zip(answers, images, wanted, strict=True):
                    sample.check(answer, image, mask, cam)
    padding = np.zeros((1, size, size), np.uint8).tobytes()
    assert network.inputs <= {padding, *(network_input(pixels_of(i), sample.spec).tobytes() for i in radiographs)}


def test_small_images_in_many_orders(driver: Any, gpu: Gpu, small: Case) -> None:
    """As above with images that cost nothing, so under many more seeds; maps overflow their room in some batches."""
    images = [picture(np.random.default_rng(n), 32 + 7 * n, 90 - 5 * n) for n in range(8)]
    images += [stored(np.random.default_rng(9), 50, 41), stored(np.random.default_rng(10), 41, 50)]
    pipelines = [small.open(gpu, small.network(driver, 1, 3, 8), slots=slots) for slots in (1, 2, 3)]
    for seed in driver.seeds(150):
        rng = np.random.default_rng(seed)
        batches = []
        for pipeline in (pipelines[i] for i in rng.integers(0, 3, 6)):  # several share the GPU
            chosen = [images[i] for i in rng.integers(0, len(images), int(rng.integers(1, 9)))]
            wanted, cam = rng.random((len(chosen), 3)) < 0.8, bool(rng.random() < 0.3)
            batches.append((pipeline.submit(chosen, wanted, cam), chosen, wanted, cam))
        for index in rng.permutation(len(batches)):
            flight, chosen, wanted, cam = batches[index]
            for answer, image, mask in zip(flight.result(), chosen, wanted, strict=True):
                small.check(answer, image, mask, cam)
    for pipeline in pipelines:
        pipeline.close()


def test_nothing_is_allocated_in_the_steady_state(driver: Any, gpu: Gpu, small: Case) -> None:
    made = ("cuMemAlloc", "cuMemAllocHost", "cuEventCreate", "cuStreamCreateWithPriority")
    with small.open(gpu, small.network(driver, 1, 4)) as pipeline:
        before = gpu.allocations, driver.alive(), [driver.count(name) for name in made]
        assert before[2][0] > 0
        launched = driver.count("cuGraphLaunch")
        for n in range(20):
            images = [picture(np.random.default_rng(n), 40 + n, 50) for _ in range(1 + n % 4)]
            pipeline.submit(images, small.all(len(images)), cam=n % 3 == 0).result()
        assert driver.count("cuGraphLaunch") == launched + 20
        assert (gpu.allocations, driver.alive(), [driver.count(name) for name in made]) == before


def test_answers_are_the_callers_own(driver: Any, gpu: Gpu, small: Case) -> None:
    rng = np.random.default_rng(0)
    first, second = picture(rng, 40, 40), picture(rng, 40, 40)
    with small.open(gpu, small.network(driver, 1), slots=1) as pipeline:
        given = first.copy()
        flight = pipeline.submit([given], small.all(1), cam=True)
        given[:] = 0  # what was submitted has been copied
        (answer,) = flight.result()
        pipeline.submit([second], small.all(1), cam=True).result()  # in the same slot
        small.check(answer, first, small.all(1)[0], cam=True)
        assert flight.result()[0] is answer
    small.check(answer, first, small.all(1)[0], cam=True)


# Limits.


def test_an_image_that_is_refused_costs_the_others_nothing(driver: Any, gpu: Gpu, small: Case) -> None:
    rng = np.random.default_rng(0)
    good = [picture(rng, 40, 50) for _ in range(3)]
    sliver = np.zeros((3000, 2), np.uint8)
    wrong: Any = np.zeros((40, 40), np.float32)
    table: Any = Stored(np.zeros((40, 40), np.uint16), np.zeros(256, np.uint8))
    with small.open(gpu, small.network(driver, 1, 2, 4)) as pipeline:
        images = [sliver, good[0], wrong, good[1], table, good[2]]
        answers = pipeline.submit(images, small.all(6)).result()
        assert [type(answers[i]) for i in (0, 2, 4)] == [ImageLimitError, ImageContentError, ImageContentError]
        for answer, image in zip(answers[1::2], good, strict=True):
            small.check(answer, image, small.all(1)[0])
        assert pipeline.submit([], small.all(0)).result() == []
        assert isinstance(pipeline.submit([sliver], small.all(1)).result()[0], ImageLimitError)
        with pytest.raises(RequestError, match=r"wanted is \(1, 3\); expected \(2, 3\)"):
            pipeline.submit(good[:2], small.all(1))


def test_an_image_larger_than_the_arena_makes_room_once(driver: Any, gpu: Gpu, small: Case) -> None:
    rng = np.random.default_rng(0)
    images: list[Image] = [picture(rng, 900, 1000), stored(rng, 700, 600), picture(rng, 40, 40)]
    with small.open(gpu, small.network(driver, 1, 4), staging_bytes=1 << 18) as pipeline:
        for _ in range(2):
            for answer, image in zip(pipeline.submit(images, small.all(3)).result(), images, strict=True):
                small.check(answer, image, small.all(1)[0])
        made = gpu.allocations
        for _ in range(4):
            pipeline.submit(images, small.all(3)).result()
        assert gpu.allocations == made


def test_an_image_that_does_not_fit_on_the_gpu_fails_alone(driver: Any, gpu: Gpu, small: Case) -> None:
    rng = np.random.default_rng(0)
    images = [picture(rng, 40, 40), picture(rng, 2000, 2100), picture(rng, 40, 41)]
    with small.open(gpu, small.network(driver, 1, 4), staging_bytes=1 << 18, slots=1) as pipeline:
        alive = driver.alive()
        driver.memory(3 << 20)
        for _ in range(2):
            answers = pipeline.submit(images, small.all(3)).result()
            assert isinstance(answers[1], DeviceMemoryError)
            for index in (0, 2):
                small.check(answers[index], images[index], small.all(1)[0])
        assert driver.alive() == alive


def test_a_very_wide_image_is_launched_without_a_graph(driver: Any, gpu: Gpu) -> None:
    case = Case(memoised(noise(3, 4)), PreprocessSpec(resize=Exact(width=256, height=256)))
    rng = np.random.default_rng(0)
    images = [picture(rng, 40, 60), picture(rng, 40, 12000)]
    with case.open(gpu, case.network(driver, 1, 2)) as pipeline:
        launched = driver.count("cuGraphLaunch")
        for answer, image in zip(pipeline.submit(images, case.all(2)).result(), images, strict=True):
            case.check(answer, image, case.all(1)[0])
        assert driver.count("cuGraphLaunch") == launched
        case.check(pipeline.submit(images[:1], case.all(1)).result()[0], images[0], case.all(1)[0])
        assert driver.count("cuGraphLaunch") == launched + 1


def test_maps_that_overflow_are_done_again_on_the_cpu(driver: Any, gpu: Gpu) -> None:
    boxes = BoxSpec(threshold=0.6, min_area=0)
    spec, labels = PreprocessSpec(resize=Exact(width=96, height=96)), [f"Finding {n}" for n in range(14)]
    many, huge = (Case(memoised(noise(14, 24, scale)), spec, labels, boxes) for scale in (1.0, 3e37))
    images = [picture(np.random.default_rng(n), 40 + n, 40) for n in range(4)]
    for case in (many, huge):
        with case.open(gpu, case.network(driver, 1, 4)) as pipeline:
            for seed in driver.seeds(4):
                flights = [pipeline.submit(images[:n], case.all(n), cam=seed == 3) for n in (4, 1, 3)]
                for flight, n in zip(flights, (4, 1, 3), strict=True):
                    for answer, image in zip(flight.result(), images[:n], strict=True):
                        case.check(answer, image, case.all(1)[0], cam=seed == 3)
    found = many.expected(images[0], many.all(1)[0], False).regions
    assert len(found) > 64  # more than a batch of one has room for


@pytest.mark.parametrize("where", ["logits", "cam"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_that_images_error(driver: Any, gpu: Gpu, where: str, value: float) -> None:
    plain = memoised(noise(3, 4))
    rng = np.random.default_rng(0)
    images = [picture(rng, 40, 40) for _ in range(3)]
    broken = network_input(images[1], SMALL).tobytes()

    def function(image: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        logits, cams = (array.copy() for array in plain(image))
        if image.tobytes() == broken:
            (logits if where == "logits" else cams).flat[2] = value
        return logits, cams

    case = Case(function)
    with case.open(gpu, case.network(driver, 1, 4)) as pipeline:
        for cam in (False, True):
            answers = pipeline.submit(images, case.all(3), cam).result()
            assert isinstance(answers[1], BackendError)
            assert "host fp32 gave values that are not finite" in str(answers[1])
            for index in (0, 2):
                case.check(answers[index], images[index], case.all(1)[0], cam)


# Arrays on the device.


class DeviceArray:
    """A producer's array: `__cuda_array_interface__` version 3, whose content a stream of its own has yet to write."""

    def __init__(self, gpu: Gpu, pixels: npt.NDArray[np.uint8], pitch: int) -> None:
        height, width = pixels.shape
        self.memory, self.pinned, self.stream = gpu.memory(height * pitch), gpu.pinned(height * pitch), gpu.stream()
        self.pinned.array.reshape(height, pitch)[:, :width] = pixels
        self.stream.to_device(self.memory.address, self.pinned.address, height * pitch)
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (height, width),
            "strides": (pitch, 1),
            "typestr": "|u1",
            "data": (self.memory.address, False),
            "stream": self.stream.handle,
        }

    def __del__(self) -> None:
        self.memory.close()


def test_device_arrays_are_read_where_they_lie_after_their_producer(driver: Any, gpu: Gpu, small: Case) -> None:
    rng = np.random.default_rng(0)
    pixels = [picture(rng, 40, 50), picture(rng, 40, 50), picture(rng, 60, 33)]
    with small.open(gpu, small.network(driver, 1, 4)) as pipeline:
        blocks = driver.count("blocks")
        for seed in driver.seeds(20):
            images: list[Image] = [
                pipeline.pixels(DeviceArray(gpu, pixels[0], 64)),
                pixels[1],
                pipeline.pixels(DeviceArray(gpu, pixels[2], 33 + seed)),
            ]
            flight = pipeline.submit(images, small.all(3))
            del images  # nobody else keeps the arrays now
            for answer, expected in zip(flight.result(), pixels, strict=True):
                small.check(answer, expected, small.all(1)[0])
            flight = None
            assert driver.count("blocks") == blocks  # and now nobody


@pytest.mark.parametrize("ending", ["result", "failure", "close"])
def test_device_arrays_are_kept_until_the_gpu_has_read_them(driver: Any, gpu: Gpu, small: Case, ending: str) -> None:
    class Noting(DeviceArray):
        def __del__(self) -> None:
            let_go.append(driver.count("kernel"))
            super().__del__()

    pixels = picture(np.random.default_rng(0), 40, 50)
    for _ in driver.seeds(4):  # the first is lazy
        let_go: list[int] = []
        with small.open(gpu, small.network(driver, 1)) as pipeline:
            ran = driver.count("kernel")
            if ending == "failure":
                driver.fail("cuMemcpyDtoHAsync", 1, "INVALID_VALUE")  # geometry, network and boxes are on the stream
            flight = pipeline.submit([pipeline.pixels(Noting(gpu, pixels, 64))], small.all(1))
            if ending == "result":
                flight.result()
            if ending == "failure":
                assert driver.count("kernel") >= ran + 1  # the slot, too, is free for others
        assert isinstance(flight.result()[0], {"result": Output, "failure": DeviceError, "close": BackendError}[ending])
        del flight
        if ending == "failure":
            gc.collect()  # an error's traceback knows the frames that it went through
        assert len(let_go) == 1
        assert let_go[0] >= ran + 1  # geometry, which reads them, has run


# Faults. A driver function fails once, with an error that leaves the context usable or not.

CALLS = [
    "cuMemcpyHtoDAsync",
    "cuMemcpyDtoHAsync",
    "cuGraphLaunch",
    "cuEventRecord",
    "cuStreamWaitEvent",
    "cuEventSynchronize",
]


@pytest.mark.parametrize("name", CALLS)
def test_a_failed_call_fails_one_batch_and_the_next_goes_on(driver: Any, gpu: Gpu, small: Case, name: str) -> None:
    rng = np.random.default_rng(0)
    images = [picture(rng, 40, 40 + n) for n in range(6)]
    with small.open(gpu, small.network(driver, 1, 2), slots=2) as pipeline:
        for seed in driver.seeds(8):
            before = driver.count(name)
            driver.fail(name, 1 + seed, "INVALID_VALUE")
            answers = [a for f in [pipeline.submit([i], small.all(1)) for i in images] for a in f.result()]
            assert driver.count(name) > before
            failed = [index for index, answer in enumerate(answers) if isinstance(answer, DeviceError)]
            assert len(failed) == (1 if driver.count(name) - before >= 1 + seed else 0)
            for index, (answer, image) in enumerate(zip(answers, images, strict=True)):
                if index not in failed:
                    small.check(answer, image, small.all(1)[0])
                else:
                    assert isinstance(answer, DeviceError)
                    assert not answer.lost
            driver.reset()


@pytest.mark.parametrize("name", [*CALLS, "kernel", "copy"])
def test_a_lost_gpu_fails_what_was_in_flight_and_every_call_after(
    driver: Any, small: Case, host_kernels: Path, name: str
) -> None:
    rng = np.random.default_rng(0)
    images = [picture(rng, 40, 40 + n) for n in range(6)]
    for seed in driver.seeds(8):
        with Gpu.open(0) as gpu:
            pipeline = small.open(gpu, small.network(driver, 1, 2), slots=2)
            (first,) = pipeline.submit(images[:1], small.all(1)).result()
            early = pipeline.submit(images[1:2], small.all(1))
            taken = early.result()
            driver.fail(name, 1 + seed // 2, "ILLEGAL_ADDRESS")
            flights = []
            for image in images[2:]:
                with contextlib.suppress(DeviceError):  # of what comes after the loss; that is asked again below
                    flights.append(pipeline.submit([image], small.all(1)))
            answers = [answer for flight in flights for answer in flight.result()]
            lost = [answer for answer in answers if isinstance(answer, DeviceError)]
            assert lost
            assert all(answer.lost for answer in lost)
            for answer, image in zip(answers, images[2:], strict=False):
                if not isinstance(answer, DeviceError):
                    small.check(answer, image, small.all(1)[0])
            for call in (partial(pipeline.submit, images, small.all(6)), partial(pipeline.pixels, object())):
                with pytest.raises(DeviceError, match="lost") as caught:
                    call()
                assert caught.value.lost
            small.check(first, images[0], small.all(1)[0])
            assert early.result() == taken  # what was complete stays so
            pipeline.close()
            pipeline.close()
        driver.reset()
        Gpu.open(0).close()  # resets what was lost


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("cuMemAlloc", "OUT_OF_MEMORY"),
        ("cuMemAllocHost", "OUT_OF_MEMORY"),
        ("cuEventCreate", "OUT_OF_MEMORY"),
        ("cuGraphInstantiateWithFlags", "OUT_OF_MEMORY"),
        ("cuGraphLaunch", "ILLEGAL_ADDRESS"),
        ("kernel", "ILLEGAL_ADDRESS"),
    ],
)
def test_what_fails_to_open_leaves_nothing(driver: Any, small: Case, name: str, code: str) -> None:
    for nth in (1, 2):
        with Gpu.open(0) as gpu:
            alive = driver.alive()
            driver.fail(name, nth, code)
            with pytest.raises(DeviceError) as caught:
                small.open(gpu, small.network(driver, 1, 2))
            assert caught.value.lost == (code == "ILLEGAL_ADDRESS")
            if not caught.value.lost:
                assert driver.alive() == alive
                small.open(gpu, small.network(driver, 1, 2)).close()
        driver.reset()
        Gpu.open(0).close()  # resets what was lost


def test_a_network_that_fails_fails_its_batch(driver: Any, gpu: Gpu, small: Case) -> None:
    network = small.network(driver, 1, 2)
    image = picture(np.random.default_rng(0), 40, 40)
    profile = Profile()  # nothing is captured: the network is asked for each batch
    with small.open(gpu, network, profile=profile) as pipeline:
        enqueue = network.enqueue

        def failing(bucket: int, stream: int) -> None:
            raise BackendError("TensorRT did not run a batch of 1: it says why")

        network.enqueue = failing
        flight = pipeline.submit([image], small.all(1))
        network.enqueue = enqueue
        (good,) = pipeline.submit([image], small.all(1)).result()
        small.check(good, image, small.all(1)[0])
        (bad,) = flight.result()
        assert isinstance(bad, BackendError)
        assert "did not run" in str(bad)


def test_a_closed_pipeline_says_so_and_gives_up_what_was_not_taken(driver: Any, small: Case) -> None:
    image = picture(np.random.default_rng(0), 40, 40)
    for seed in driver.seeds(8):
        gpu = Gpu.open(0)
        pipeline = small.open(gpu, small.network(driver, 1))
        taken, left = (pipeline.submit([image], small.all(1)) for _ in range(2))
        small.check(taken.result()[0], image, small.all(1)[0])
        for first in (pipeline, gpu) if seed % 2 else (gpu, pipeline):
            first.close()
        small.check(taken.result()[0], image, small.all(1)[0])
        (answer,) = left.result()
        assert isinstance(answer, BackendError)
        assert "closed before this result was taken" in str(answer)
        for call in (partial(pipeline.submit, [image], small.all(1)), partial(pipeline.pixels, object())):
            with pytest.raises(BackendError, match="closed; open the engine again"):
                call()


def test_a_thousand_cycles_leak_nothing(driver: Any, gpu: Gpu, small: Case) -> None:
    image = picture(np.random.default_rng(0), 40, 40)

    def cycle() -> None:
        with small.open(gpu, small.network(driver, 1), staging_bytes=1 << 17) as pipeline:
            pipeline.submit([image], small.all(1))
            small.check(pipeline.submit([image], small.all(1)).result()[0], image, small.all(1)[0])

    for _ in range(50):
        cycle()
    alive, resident = driver.alive(), resident_bytes()
    for _ in range(950):
        cycle()
    assert driver.alive() == alive
    assert resident_bytes() - resident < 4 << 20


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


# Profiling.


def test_a_profile_has_every_stage_of_every_batch(driver: Any, gpu: Gpu, small: Case) -> None:
    images = [picture(np.random.default_rng(n), 40, 40) for n in range(5)]
    profile = Profile()
    with small.open(gpu, small.network(driver, 1, 4), profile=profile) as pipeline:
        for answer, image in zip(pipeline.submit(images, small.all(5), True).result(), images, strict=True):
            small.check(answer, image, small.all(1)[0], cam=True)
    stages = {(time.lane, time.stage): time.spans for time in profile.stages()}
    expected = [("pipeline", "stage"), ("pipeline", "enqueue"), ("pipeline", "wait"), ("pipeline", "collect")]
    expected += [("cuda:0 copy", "copy")]
    expected += [("cuda:0 compute", stage) for stage in ("geometry", "network", "boxes", "back")]
    assert stages == dict.fromkeys(expected, 2)
