"""What gpu-check measures on and holds its figures against: the network made for it, its work, its peers on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from thoraxrt.benchmarks.gpu_model import checkpoint, int8_ranges, normalised, pixels
from thoraxrt.benchmarks.gpu_peers import OURS, AsTrained, interleaved_ms, ratios
from thoraxrt.benchmarks.gpu_speed import Work, network_work
from thoraxrt.benchmarks.gpu_torch import HalfServed
from thoraxrt.engine.preprocess import network_input
from thoraxrt.export.checkpoint import read_checkpoint
from thoraxrt.export.graph import IMAGENET, reference_logits
from thoraxrt.export.int8 import int8_from_file
from thoraxrt.export.networks import DenseNet
from thoraxrt.export.source import CHEXNET, Given, read_source


@pytest.fixture(scope="module")
def images() -> list[npt.NDArray[np.uint8]]:
    return pixels(None, 4)


@pytest.fixture(scope="module")
def inputs(images: list[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.uint8]]:
    return [network_input(image, CHEXNET) for image in images]


@pytest.fixture(scope="module")
def small(inputs: list[npt.NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small network, made as gpu-check makes its DenseNet-121."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("small") / "small.safetensors"
    checkpoint(DenseNet(8, (1, 1), 8, num_classes=14), inputs, file)
    return file


def test_images_are_repeated_where_there_are_too_few(images: list[npt.NDArray[np.uint8]], tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(images[0]).save(tmp_path / "a.png")
    found = pixels(tmp_path, 3)
    assert [image is found[0] for image in found] == [True] * 3
    np.testing.assert_array_equal(found[0], images[0])


def test_a_made_checkpoint_is_alive_on_phantoms(small: Path, inputs: list[npt.NDArray[np.uint8]]) -> None:
    network = read_checkpoint(small).network
    with torch.no_grad():
        features = network.feature_map(normalised(inputs))
        above = (network(normalised(inputs)) > 0).float().mean()
    assert 0.1 < float(features.std()) < 10  # as a trained network's, neither vanishing nor beyond FP16
    assert 0.2 <= float(above) <= 0.8


def test_ranges_quantise_every_convolution(small: Path, images: list[npt.NDArray[np.uint8]], tmp_path: Path) -> None:
    from PIL import Image

    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    int8_ranges(small, sorted(tmp_path.glob("*.png")), tmp_path / "ranges.json")
    source = read_source(small, Given())
    made = int8_from_file(source.graph, CHEXNET, tmp_path / "ranges.json")
    assert made.ranges.calibration.quantised == made.ranges.calibration.layers > 0
    assert "QuantizeLinear" in {node.op_type for node in made.model.graph.node}


def test_the_work_of_densenet121_is_as_published_and_the_floor_is_the_slower_of_both() -> None:
    work = network_work(DenseNet(num_classes=14), 224)
    # 2.87 G multiply-adds with a three-channel stem (Huang et al.), of which two thirds of the stem are folded away.
    stem = 112 * 112 * 64 * 49
    assert work.operations == pytest.approx(2 * (2.83e9 - 2 * stem), rel=0.02)
    assert work.weights == pytest.approx(6.96e6, rel=0.02)
    assert Work(2_000, 10, 20).floor_ms(3, 1e6, 1e6) == pytest.approx(6)  # 6,000 operations, 140 bytes
    assert Work(2, 1_000, 500).floor_ms(3, 1e6, 1e6) == pytest.approx(5)  # 6 operations, 2 x 2,500 bytes


def test_peers_compute_the_same_network(small: Path, inputs: list[npt.NDArray[np.uint8]]) -> None:
    network = read_checkpoint(small).network
    expected = reference_logits(network, IMAGENET, np.stack(inputs))
    image = torch.from_numpy(np.stack(inputs))
    with torch.inference_mode():
        half, cam = HalfServed(network, CHEXNET.input_size)(image)
        plain = AsTrained(network, torch.float32)(image)
    np.testing.assert_allclose(plain.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(half.numpy(), expected, atol=0.05)
    assert (half.dtype, cam.dtype, cam.shape[:2]) == (torch.float32, torch.float32, (4, 14))


def test_candidates_take_turns_on_inputs_that_rotate() -> None:
    seen: list[tuple[str, int]] = []

    def candidate(name: str) -> object:
        return lambda image: seen.append((name, int(image)))

    inputs: list[Tensor] = [torch.tensor(number) for number in range(3)]
    times = interleaved_ms({OURS: candidate("ours"), "other": candidate("other")}, inputs, 2)  # type: ignore[dict-item]
    assert {name: len(values) for name, values in times.items()} == {OURS: 2, "other": 2}
    assert [name for name, _ in seen] == (["ours"] * 11 + ["other"] * 11) * 2
    assert {number for _, number in seen} == {0, 1, 2}
    assert ratios({OURS: [1.0, 2.0, 4.0], "other": [3.0, 4.0, 20.0]}) == {"other": 3.0}
