"""A tiny bundle made by hand, radiographs for it, and a server on loopback with a real backend."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import grpc
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from thoraxrt.engine.backends import Backend, NetworkOutput, open_backend
from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.bundle import MANIFEST, SCHEMA_VERSION, Bundle, Check, FileEntry, Manifest, Network
from thoraxrt.engine.decode import ThreadDecoder
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.execute import HostExecutor
from thoraxrt.engine.postprocess import OperatingPoint, Sigmoid
from thoraxrt.engine.preprocess import PreprocessSpec, Shorter
from thoraxrt.server.client import Client
from thoraxrt.server.serve import ServeOptions, running_server
from thoraxrt.server.telemetry import NullTelemetry

LABELS = ("Effusion", "Nodule", "Mass")
BIAS = (-1.5, 0.25, 0.75)
CELL = 8
"""Pixels of a CAM cell; the network's input is 8 cells a side."""


def tiny_graph(*, faulty: bool = False) -> bytes:
    """Patch means, a 1 x 1 convolution as the CAM, its mean plus the bias as the logits.

    `image` uint8 (N, 1, 64, 64) -> `logits` float32 (N, 3), `cam` float32 (N, 3, 8, 8). Where
    `faulty`, every logit is infinite.
    """
    rng = np.random.default_rng(7)
    weights = {
        "patch": np.full((1, 1, CELL, CELL), 1 / (255 * CELL * CELL), np.float32),
        "classifier": rng.normal(0, 3, (len(LABELS), 1, 1, 1)).astype(np.float32),
        "bias": np.full(len(LABELS), np.inf, np.float32) if faulty else np.array(BIAS, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "patch"], ["features"], strides=[CELL, CELL]),
        helper.make_node("Conv", ["features", "classifier"], ["cam"]),
        helper.make_node("GlobalAveragePool", ["cam"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Add", ["flat", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, 8 * CELL, 8 * CELL])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(LABELS)]),
            helper.make_tensor_value_info("cam", TensorProto.FLOAT, ["N", len(LABELS), 8, 8]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def write_bundle(folder: Path, graph: bytes) -> Bundle:
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        network=Network(name="tiny", cam_height=8, cam_width=8, bias=BIAS, checkpoint_sha256="0" * 64),
        labels=LABELS,
        activation=Sigmoid(),
        preprocess=PreprocessSpec(resize=Shorter(pixels=72), crop=64),
        boxes=BoxSpec(threshold=0.6, per_finding={"Nodule": 0.8}),
        operating_points=(
            OperatingPoint(finding="Effusion", probability=0.125),
            OperatingPoint(finding="Nodule"),
            OperatingPoint(
                finding="Mass",
                probability=0.3,
                method="youden",
                data="phantoms",
                sensitivity=0.8,
                specificity=0.7,
            ),
        ),
        checks={"fp32": Check(max_logit_difference=0.0, images=1, data="by hand")},
        recommended=None,
        producer={"thoraxrt": "test"},
        files={"model.fp32.onnx": FileEntry(sha256=hashlib.sha256(graph).hexdigest(), size=len(graph))},
    )
    folder.mkdir()
    (folder / "model.fp32.onnx").write_bytes(graph)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return Bundle.open(folder)


def encoded(seed: int = 0, width: int = 97, height: int = 120, kind: str = "PNG") -> bytes:
    """An encoded gray picture with a few bright patches on a gradient."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(20, 120, width * height).reshape(height, width)
    for x, y in rng.integers(0, min(width, height) - 16, (3, 2)):
        pixels[y : y + 16, x : x + 16] += rng.integers(40, 130)
    file = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


class Gate:
    """The real backend behind a door: a test sees a call arrive, holds it, lets it go, or breaks it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._open = threading.Event()
        self._open.set()
        self.entered = threading.Semaphore(0)
        self.runs = 0
        self.error: Exception | None = None
        self.name, self.precision = backend.name, backend.precision

    def run(self, images: npt.NDArray[np.uint8]) -> NetworkOutput:
        self.runs += 1
        self.entered.release()
        assert self._open.wait(20)
        if self.error is not None:
            raise self.error
        return self._backend.run(images)

    def shut(self) -> None:
        """Hold the calls that arrive from now on; forget those that did."""
        self._open.clear()
        self.entered = threading.Semaphore(0)
        self.runs = 0

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._backend.close()


class Told(NullTelemetry):
    """Telemetry that a test waits for."""

    def __init__(self) -> None:
        self._heard: Counter[tuple[str, object]] = Counter()
        self._changed = threading.Condition()

    def wait_for(self, what: str, value: object) -> None:
        """Until this has been reported once more than it was waited for."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._heard[what, value] > 0, timeout=20), self._heard
            self._heard[what, value] -= 1

    def heard(self, what: str) -> list[object]:
        """All that has been reported and not been waited for."""
        with self._changed:
            return [value for (kind, value), count in self._heard.items() if kind == what for _ in range(count)]

    def _hear(self, what: str, value: object) -> None:
        with self._changed:
            self._heard[what, value] += 1
            self._changed.notify_all()

    def stage(self, model: str, stage: str, seconds: float) -> None:
        assert seconds >= 0
        self._hear("stage", stage)

    def refused(self, model: str, reason: str) -> None:
        self._hear("refused", reason)

    def queue(self, model: str, depth: int) -> None:
        self._hear("queue", depth)

    def begun(self, method: str) -> None:
        self._hear("begun", method)

    def answered(self, method: str, code: str, seconds: float) -> None:
        self._hear("answered", code)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture(scope="session")
def radiograph() -> Callable[..., bytes]:
    return encoded


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "tiny.bundle", tiny_graph())


@pytest.fixture
def faulty_bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "faulty.bundle", tiny_graph(faulty=True))


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> Iterator[Engine]:
    with Engine.open(tiny_bundle, backend="onnxruntime") as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with running_server(engine, ServeOptions(port=0, grace_s=5.0)) as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


@pytest.fixture
def gate(tiny_bundle: Bundle) -> Iterator[Gate]:
    gate = Gate(open_backend(tiny_bundle, "onnxruntime"))
    yield gate
    gate.open()  # whatever the test did, no thread waits for ever


@pytest.fixture
def gated_engine(tiny_bundle: Bundle, gate: Gate) -> Iterator[Engine]:
    with Engine(tiny_bundle, HostExecutor(gate, tiny_bundle.manifest), ThreadDecoder(2)) as engine:
        yield engine
