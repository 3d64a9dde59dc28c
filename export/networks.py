"""The network family: DenseNets and ResNets in pure torch, with torchvision's parameter names.

Owns the architectures and their recognition from a state dict. Knows nothing of files, findings or
normalisation: reading checkpoints is `thoraxrt.export.checkpoint`'s.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from thoraxrt.engine.errors import CheckpointError

__all__ = ["CxrNetwork", "DenseNet", "ResNet", "network_from_state"]


class CxrNetwork(nn.Module, ABC):
    """A classifier that ends in ReLU, global average pooling and one linear layer.

    The input is float32 `(N, in_channels, S, S)`, normalised as the checkpoint was trained; the
    output float32 `(N, C)` logits. `forward` is `head(trunk(stem(x)).mean((2, 3)))`, so that export
    can exchange the stem and apply the head at every position of the feature map.
    """

    name: str
    """The published name (`densenet121`), or for other widths the shape (`densenet-2x4x8-g16-i32`)."""

    @property
    @abstractmethod
    def stem(self) -> nn.Conv2d:
        """The first convolution, without its batch norm."""

    @property
    @abstractmethod
    def stem_norm(self) -> nn.BatchNorm2d:
        """The batch norm that follows `stem` directly."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The final linear layer, features `(N, F)` to logits `(N, C)`."""

    @abstractmethod
    def trunk(self, stem_output: Tensor) -> Tensor:
        """The last feature map `(N, F, h, w)`, after its ReLU, for the stem convolution's output."""

    def keep_outputs(self, indices: Sequence[int]) -> None:
        """Drop every output but these, in this order; their logits stay what they were."""
        self.head.weight = nn.Parameter(self.head.weight.detach()[list(indices)])
        self.head.bias = nn.Parameter(self.head.bias.detach()[list(indices)])
        self.head.out_features = len(indices)

    def feature_map(self, x: Tensor) -> Tensor:
        """The last feature map `(N, F, h, w)`, after its ReLU, for a batch of inputs."""
        return self.trunk(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, C)` for a batch of normalised inputs `(N, in_channels, S, S)`."""
        features: Tensor = self.feature_map(x).mean((2, 3))  # (N, F)
        logits: Tensor = self.head(features)  # (N, C)
        return logits


class DenseNet(CxrNetwork):
    """Huang et al., Densely Connected Convolutional Networks, CVPR 2017 (arXiv 1608.06993), the BC variant.

    Any number of blocks: each but the last is followed by a transition that halves channels and
    size, so the feature map's stride is `2 ** (blocks + 1)`. The last norm is named
    `norm{blocks + 1}`, which for four blocks is torchvision's `norm5`.

    Example: `DenseNet(32, (6, 12, 24, 16), 64, num_classes=14)` is DenseNet-121.
    """

    PUBLISHED: ClassVar[Mapping[tuple[int, tuple[int, ...], int, int], str]] = {
        (32, (6, 12, 24, 16), 64, 4): "densenet121",
        (48, (6, 12, 36, 24), 96, 4): "densenet161",
        (32, (6, 12, 32, 32), 64, 4): "densenet169",
        (32, (6, 12, 48, 32), 64, 4): "densenet201",
    }

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        shape = (growth_rate, tuple(block_config), num_init_features, bn_size)
        self.name = self.PUBLISHED.get(shape) or _densenet_name(*shape)
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(in_channels, num_init_features, 7, 2, 3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(num_init_features))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        width = num_init_features
        for number, layers in enumerate(block_config, 1):
            self.features.add_module(f"denseblock{number}", _DenseBlock(width, layers, growth_rate, bn_size))
            width += layers * growth_rate
            if number < len(block_config):
                self.features.add_module(f"transition{number}", _Transition(width, width // 2))
                width //= 2
        self.features.add_module(f"norm{len(block_config) + 1}", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, num_classes)
        _initialise(self, "fan_in")

    @property
    def stem(self) -> nn.Conv2d:
        """`features.conv0`."""
        return cast(nn.Conv2d, self.features.conv0)

    @property
    def stem_norm(self) -> nn.BatchNorm2d:
        """`features.norm0`."""
        return cast(nn.BatchNorm2d, self.features.norm0)

    @property
    def head(self) -> nn.Linear:
        """`classifier`."""
        return self.classifier

    def trunk(self, stem_output: Tensor) -> Tensor:
        """Everything between the stem convolution and the pool; the last ReLU is functional, as in torchvision."""
        x = stem_output
        for layer in list(self.features.children())[1:]:
            x = layer(x)
        return torch.relu(x)


class ResNet(CxrNetwork):
    """He et al., Deep Residual Learning, CVPR 2016 (arXiv 1512.03385), torchvision's v1.5 (stride on the 3 x 3).

    Example: `ResNet((3, 4, 6, 3), bottleneck=True, num_classes=14)` is ResNet-50.
    """

    PUBLISHED: ClassVar[Mapping[tuple[tuple[int, ...], bool, int], str]] = {
        ((2, 2, 2, 2), False, 64): "resnet18",
        ((3, 4, 6, 3), False, 64): "resnet34",
        ((3, 4, 6, 3), True, 64): "resnet50",
        ((3, 4, 23, 3), True, 64): "resnet101",
    }

    def __init__(
        self,
        layers: Sequence[int] = (2, 2, 2, 2),
        bottleneck: bool = False,
        width: int = 64,
        num_classes: int = 1000,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        shape = (tuple(layers), bottleneck, width)
        self.name = self.PUBLISHED.get(shape) or _resnet_name(*shape)
        self.stages = len(layers)
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        block = _Bottleneck if bottleneck else _BasicBlock
        inputs = width
        for number, depth in enumerate(layers, 1):
            planes = width * 2 ** (number - 1)
            stage = nn.Sequential(block(inputs, planes, stride=1 if number == 1 else 2))
            inputs = planes * block.expansion
            stage.extend(block(inputs, planes, stride=1) for _ in range(depth - 1))
            self.add_module(f"layer{number}", stage)
        self.fc = nn.Linear(inputs, num_classes)
        _initialise(self, "fan_out")

    @property
    def stem(self) -> nn.Conv2d:
        """`conv1`."""
        return self.conv1

    @property
    def stem_norm(self) -> nn.BatchNorm2d:
        """`bn1`."""
        return self.bn1

    @property
    def head(self) -> nn.Linear:
        """`fc`."""
        return self.fc

    def trunk(self, stem_output: Tensor) -> Tensor:
        """Everything between the stem convolution and the pool; each block ends in its own ReLU."""
        x: Tensor = self.maxpool(self.relu(self.bn1(stem_output)))
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return x


def network_from_state(state: Mapping[str, Tensor]) -> CxrNetwork:
    """The network that `state` holds the weights of, in eval mode, on the CPU, in float32.

    Names are torchvision's, without prefixes. Kind, depth, widths, input channels and class count
    follow from names and shapes; `num_batches_tracked` may be missing. The tensors are copied.

    Raises CheckpointError where the names fit no network of the family, or name and number the
    keys that are missing, unexpected or of another shape, or hold something other than finite floats.
    """
    with torch.device("meta"):  # shapes only: nothing is allocated before the keys have been checked
        network = _network_like(state)
    expected = network.state_dict()
    _check_keys(network.name, state, expected)
    network.to_empty(device="cpu")
    network.load_state_dict({key: state[key] if key in state else torch.zeros(()) for key in expected})
    _check_values(network)
    return network.eval()


# --- recognition ---------------------------------------------------------------------------------


def _network_like(state: Mapping[str, Tensor]) -> CxrNetwork:
    if "features.conv0.weight" in state:
        return _densenet_like(state)
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return _resnet_like(state)
    raise CheckpointError(
        f"the checkpoint's {len(state)} keys ({_some(state)}) fit no known network; expected torchvision's names, "
        "features.conv0.weight ... classifier.weight (DenseNet) or conv1.weight, layer1.0.conv1.weight ... fc.weight "
        "(ResNet): rename the keys, or export the network to ONNX in its own code"
    )


def _densenet_like(state: Mapping[str, Tensor]) -> DenseNet:
    layers = _indices(state, r"features\.denseblock(\d+)\.denselayer(\d+)\.")
    stem = _shape(state, "features.conv0.weight", 4)
    squeeze = _shape(state, "features.denseblock1.denselayer1.conv1.weight", 4)
    growth = _shape(state, "features.denseblock1.denselayer1.conv2.weight", 4)[0]
    return DenseNet(
        growth_rate=growth,
        block_config=_depths(layers, state),
        num_init_features=stem[0],
        bn_size=max(1, squeeze[0] // growth),
        num_classes=_shape(state, "classifier.weight", 2)[0],
        in_channels=stem[1],
    )


def _resnet_like(state: Mapping[str, Tensor]) -> ResNet:
    blocks = _indices(state, r"layer(\d+)\.(\d+)\.")
    stem = _shape(state, "conv1.weight", 4)
    return ResNet(
        layers=_depths([(stage, block + 1) for stage, block in blocks], state),  # torchvision counts blocks from 0
        bottleneck="layer1.0.conv3.weight" in state,
        width=stem[0],
        num_classes=_shape(state, "fc.weight", 2)[0],
        in_channels=stem[1],
    )


def _indices(keys: Iterable[str], pattern: str) -> list[tuple[int, int]]:
    matches = (re.match(pattern, key) for key in keys)
    return [(int(match[1]), int(match[2])) for match in matches if match]


def _depths(pairs: Collection[tuple[int, int]], state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Layers per block for pairs of block and layer, both from 1; a gap counts, to be reported as missing."""
    blocks = max((block for block, _ in pairs), default=0)
    if blocks > len(state) or max((layer for _, layer in pairs), default=0) > len(state):
        raise CheckpointError(
            f"the checkpoint numbers its layers higher than it has keys ({len(state)}); expected consecutive numbers "
            "as torchvision gives them: the file is damaged or was made by hand"
        )
    return tuple(max((layer for b, layer in pairs if b == block), default=0) for block in range(1, blocks + 1))


def _shape(state: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(
            f"the checkpoint has no {key} among its {len(state)} keys ({_some(state)}); expected torchvision's names: "
            "is it the whole network's state_dict?"
        )
    shape = tuple(state[key].shape)
    if len(shape) != dimensions or min(shape) < 1:
        raise CheckpointError(
            f"the checkpoint's {key} has the shape {shape}; expected {dimensions} dimensions, none of them empty: "
            "export the network to ONNX in its own code if it is another one"
        )
    return shape


def _check_keys(name: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    required = {key for key in expected if not key.endswith("num_batches_tracked")}
    missing = sorted(required - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    misshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in required and key in state and state[key].shape != tensor.shape
    ]
    quantised = [f"{key} {state[key].dtype}" for key in required & state.keys() if not state[key].is_floating_point()]
    groups = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "no floats": sorted(quantised),
    }
    faults = [f"{len(keys)} {word} ({_some(keys)})" for word, keys in groups.items() if keys]
    if faults:
        raise CheckpointError(
            f"the checkpoint looks like {name}, but of its keys {', '.join(faults)}; expected exactly {name}'s "
            f"{len(required)}: load the file that the training wrote, whole, or export the network to ONNX in its "
            "own code if it was changed"
        )


def _check_values(network: CxrNetwork) -> None:
    bad = [key for key, tensor in network.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(
            f"the checkpoint holds NaN or infinity in {len(bad)} of its tensors ({_some(bad)}); expected finite "
            "weights: the training diverged, take an earlier checkpoint"
        )


def _some(keys: Iterable[str], limit: int = 3) -> str:
    """The first few, for a message."""
    listed = list(keys)
    return ", ".join([*listed[:limit], "..."] if len(listed) > limit else listed)


# --- building blocks, named as torchvision names them --------------------------------------------


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth_rate: int, bn_size: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, bn_size * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.conv1(self.relu1(self.norm1(x)))
        grown: Tensor = self.conv2(self.relu2(self.norm2(squeezed)))
        return grown


class _DenseBlock(nn.Module):
    def __init__(self, inputs: int, layers: int, growth_rate: int, bn_size: int) -> None:
        super().__init__()
        for number in range(layers):
            layer = _DenseLayer(inputs + number * growth_rate, growth_rate, bn_size)
            self.add_module(f"denselayer{number + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat((x, layer(x)), dim=1)
        return x


class _Transition(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(inputs))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", nn.Conv2d(inputs, outputs, 1, bias=False))
        self.add_module("pool", nn.AvgPool2d(2, 2))


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(inputs, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _initialise(network: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """torchvision's initialisation: He normal convolutions, unit norms, zero classifier bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def _densenet_name(growth: int, blocks: tuple[int, ...], init: int, bn_size: int) -> str:
    name = f"densenet-{'x'.join(map(str, blocks))}-g{growth}-i{init}"
    return name if bn_size == 4 else f"{name}-b{bn_size}"


def _resnet_name(layers: tuple[int, ...], bottleneck: bool, width: int) -> str:
    return f"resnet-{'x'.join(map(str, layers))}-{'bottleneck' if bottleneck else 'basic'}-w{width}"
