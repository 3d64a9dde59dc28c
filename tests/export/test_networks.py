from functools import cache

import pytest
import torch
from torch import Tensor

from thoraxrt.engine.errors import CheckpointError
from thoraxrt.export.networks import CxrNetwork, DenseNet, ResNet, network_from_state

PARAMETERS = {
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
}


@cache
def published() -> list[CxrNetwork]:
    """Every published network with 1000 classes, without memory."""
    with torch.device("meta"):
        return [*(DenseNet(*shape) for shape in DenseNet.PUBLISHED), *(ResNet(*shape) for shape in ResNet.PUBLISHED)]


def small_networks() -> list[CxrNetwork]:
    torch.manual_seed(3)
    return [
        DenseNet(4, (2, 3), 8, bn_size=2, num_classes=5),
        DenseNet(4, (1, 2, 1, 2), 6, num_classes=3, in_channels=1),
        ResNet((1, 2), bottleneck=False, width=4, num_classes=5),
        ResNet((1, 1, 2), bottleneck=True, width=4, num_classes=2),
    ]


def small_state() -> dict[str, Tensor]:
    return dict(small_networks()[0].state_dict())


def test_parameter_counts_are_torchvisions() -> None:
    assert {network.name: sum(p.numel() for p in network.parameters()) for network in published()} == PARAMETERS


def test_names_are_torchvisions() -> None:
    densenet, resnet = published()[0].state_dict(), published()[6].state_dict()
    assert {
        "features.conv0.weight",
        "features.norm0.running_mean",
        "features.denseblock1.denselayer1.norm1.weight",
        "features.denseblock4.denselayer16.conv2.weight",
        "features.transition3.norm.bias",
        "features.transition3.conv.weight",
        "features.norm5.weight",
        "classifier.bias",
    } <= densenet.keys()
    assert len(densenet) == 727
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv3.weight",
        "layer4.0.downsample.1.weight",
        "fc.weight",
    } <= resnet.keys()
    assert len(resnet) == 320
    assert "layer1.0.downsample.0.weight" not in published()[4].state_dict()  # resnet18: nothing to match


@pytest.mark.parametrize("index", range(8))
def test_published_networks_are_recognised(index: int) -> None:
    """Shapes alone, without memory: so a key is left out, and the refusal names the network."""
    network = published()[index]
    state = dict(network.state_dict())
    left_out = [key for key in state if key.endswith("bias")][-1]
    del state[left_out]
    with pytest.raises(CheckpointError, match=rf"looks like {network.name}, .* 1 missing \({left_out}\); expected"):
        network_from_state(state)


@pytest.mark.parametrize("index", range(4))
def test_a_network_comes_back_from_its_state(index: int) -> None:
    network = small_networks()[index].eval()
    state = {key: t for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    again = network_from_state(state)
    image = torch.randn(2, network.stem.in_channels, 64, 48)
    assert again.name == network.name
    assert not again.training
    assert torch.equal(again(image), network(image))


def test_the_state_is_copied() -> None:
    state = small_state()
    network = network_from_state(state)
    before = network.head.weight.clone()
    state["classifier.weight"].zero_()
    assert torch.equal(network.head.weight, before)


@pytest.mark.parametrize("index", range(4))
def test_cam_of_the_feature_map_averages_to_the_logit(index: int) -> None:
    network = small_networks()[index].eval()
    image = torch.randn(2, network.stem.in_channels, 64, 64)
    features = network.trunk(network.stem(image))
    assert torch.equal(features, network.feature_map(image))
    assert features.min() == 0  # after the ReLU
    cam = torch.einsum("nfhw,cf->nchw", features, network.head.weight)
    torch.testing.assert_close(cam.mean((2, 3)) + network.head.bias, network(image))


def test_strides_and_stems() -> None:
    for network, stride in zip(small_networks(), (8, 32, 8, 16), strict=True):
        channels = network.stem.in_channels
        assert network.eval().feature_map(torch.zeros(1, channels, 64, 64)).shape[2:] == (64 // stride, 64 // stride)
        assert network.stem_norm.num_features == network.stem.out_channels


def test_each_fault_of_the_keys_is_named() -> None:
    state = small_state()
    del state["features.denseblock2.denselayer2.conv1.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["features.norm3.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        network_from_state(state)
    message = str(caught.value)
    assert "densenet-2x3-g4-i8-b2" in message
    assert "1 missing (features.denseblock2.denselayer2.conv1.weight)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "features.norm3.bias (7,) instead of (20,)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier.weight": None}, "no classifier.weight"),
        ({"classifier.weight": torch.zeros(5)}, "expected 2 dimensions"),
        ({"features.conv0.weight": torch.zeros(8, 0, 7, 7)}, "none of them empty"),
        ({"features.conv0.weight": None}, "fit no known network"),
        ({"classifier.bias": torch.full((5,), torch.nan)}, r"1 of its tensors \(classifier.bias\)"),
        ({"features.denseblock999999999.denselayer1.x": torch.zeros(1)}, "consecutive"),
        ({"features.denseblock1.denselayer999999999.x": torch.zeros(1)}, "consecutive"),
        ({"classifier.bias": torch.zeros(5, dtype=torch.int8)}, "int8"),
    ],
)
def test_a_state_that_fits_nothing_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    state = {key: value for key, value in {**small_state(), **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        network_from_state(state)


def test_half_precision_weights_become_float32() -> None:
    state = {key: t.half() if t.is_floating_point() else t for key, t in small_state().items()}
    assert network_from_state(state).head.weight.dtype is torch.float32


@pytest.mark.parametrize("index", range(4))
def test_outputs_are_kept_as_they_were(index: int) -> None:
    network = small_networks()[index].eval()
    image = torch.randn(2, network.stem.in_channels, 64, 64)
    before = network(image)
    network.keep_outputs([1, 0])
    torch.testing.assert_close(network(image), before[:, [1, 0]], rtol=0, atol=1e-6)
    assert network.head.out_features == 2
    assert network_from_state(network.state_dict()).head.out_features == 2
