"""What an export starts from, whatever its form: a checkpoint, an ONNX file, or the user's own code and weights.

`read_source` is the story. Each form ends as the same thing: the FP32 served graph, the original to
compare it with, and what is known of labels, activation and geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from torch import nn

from thoraxrt.engine.bundle import TrainedWith
from thoraxrt.engine.postprocess import Activation, Sigmoid, SigmoidOpNorm, Softmax
from thoraxrt.engine.preprocess import PreprocessSpec, Shorter
from thoraxrt.export.checkpoint import checkpoint_sha256, read_checkpoint, read_state
from thoraxrt.export.graph import IMAGENET, Normalisation, Reference, ServedNetwork, onnx_from_network, reference_logits
from thoraxrt.export.surgery import (
    network_from_factory,
    onnx_from_module,
    read_onnx,
    reference_from_onnx,
    served_from_onnx,
)

__all__ = ["ACTIVATIONS", "CHEXNET", "Given", "Source", "read_source"]

CHEXNET: Final = PreprocessSpec(resize=Shorter(pixels=256), crop=224)
"""The CheXNet recipe (Rajpurkar et al., arXiv 1711.05225, as its re-implementations run it)."""

ACTIVATIONS: Final[Mapping[str, Activation]] = {"sigmoid": Sigmoid(), "softmax": Softmax()}
"""By name, those that need no numbers of their own."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user says of a model; None leaves it to the file, and where that is silent to the CheXNet recipe.

    `network` is `package.module:factory`, code of the user's that makes the module whose weights the
    checkpoint holds. `trained_with` names what training did instead of Pillow's resize and one crop.

    Example: `Given(labels=("COVID", "Normal", "Pneumonia"), activation=Softmax())`.
    """

    labels: tuple[str, ...] | None = None
    activation: Activation | None = None
    preprocess: PreprocessSpec | None = None
    normalisation: Normalisation | None = None
    trained_with: TrainedWith | None = None
    network: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model ready to be exported.

    `graph`: `image` uint8 `(batch, 1, S, S)` to float32 `logits` and `cam`; it is made when it is first asked for,
    since who only wants the `reference` need not wait for it. `bias` float32 `(C,)`, the classifier's. `labels` None
    where nobody named the outputs. `assumed` names what neither the user nor the file says, for which the CheXNet
    recipe stands.
    """

    name: str
    sha256: str
    make_graph: Callable[[], onnx.ModelProto]
    reference: Reference
    bias: npt.NDArray[np.float32]
    labels: tuple[str, ...] | None
    activation: Activation
    preprocess: PreprocessSpec
    normalisation: Normalisation
    trained_with: TrainedWith | None
    assumed: tuple[str, ...]

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """See above."""
        return self.make_graph()


def read_source(path: str | Path, given: Given) -> Source:
    """Read an `.onnx` file, a checkpoint of a known network, or of the one that `given.network` makes.

    What the user gives wins over what the file says. Raises CheckpointError where the file cannot be
    read or is no classifier that ends in global average pooling and one linear layer, RequestError
    where what is given does not fit it.
    """
    path = Path(path)
    if given.network is not None:
        return _from_factory(path, given, given.network)
    if path.suffix.lower() == ".onnx":
        return _from_onnx(read_onnx(path), path.stem, checkpoint_sha256(path), given)
    return _from_checkpoint(path, given)


def _from_checkpoint(path: Path, given: Given) -> Source:
    checkpoint = read_checkpoint(path)
    normalisation = given.normalisation or checkpoint.normalisation or IMAGENET
    preprocess = given.preprocess or checkpoint.preprocess or CHEXNET
    points = checkpoint.op_thresholds
    served = ServedNetwork(checkpoint.network, normalisation, preprocess.input_size)
    return Source(
        name=checkpoint.network.name,
        sha256=checkpoint.sha256,
        make_graph=partial(onnx_from_network, served, preprocess.input_size),
        reference=partial(reference_logits, checkpoint.network, normalisation),
        bias=served.bias.detach().numpy(),
        labels=given.labels or checkpoint.labels,
        activation=given.activation or (SigmoidOpNorm(thresholds=points) if points else Sigmoid()),
        preprocess=preprocess,
        normalisation=normalisation,
        # A geometry that the user states is the one to be served: only his own word says that training's was another.
        trained_with=given.trained_with or (None if given.preprocess else checkpoint.trained_with),
        assumed=_unsaid(
            labels=given.labels or checkpoint.labels,
            activation=given.activation or points,
            normalisation=given.normalisation or checkpoint.normalisation,
            geometry=given.preprocess or checkpoint.preprocess,
        ),
    )


def _from_factory(path: Path, given: Given, factory: str) -> Source:
    network = network_from_factory(factory, read_state(path))
    channels = len((given.normalisation or IMAGENET).mean)
    model = onnx_from_module(network, channels, (given.preprocess or CHEXNET).input_size)
    return _from_onnx(model, type(network).__name__, checkpoint_sha256(path), given, network)


def _from_onnx(
    model: onnx.ModelProto, name: str, sha256: str, given: Given, network: nn.Module | None = None
) -> Source:
    """A graph as its training fed it; where it was made of a module, that one is the reference."""
    normalisation = given.normalisation or IMAGENET
    preprocess = given.preprocess or CHEXNET
    served = served_from_onnx(model, normalisation, preprocess.input_size)
    found = ACTIVATIONS[served.activation] if served.activation else Sigmoid()
    reference: Reference = reference_from_onnx(model, normalisation)
    if network is not None and served.activation is None:  # logits come out of it, so torch itself can be asked
        reference = partial(reference_logits, network, normalisation)
    return Source(
        name=name,
        sha256=sha256,
        make_graph=lambda: served.model,
        reference=reference,
        bias=served.bias,
        labels=given.labels,
        activation=given.activation or found,
        preprocess=preprocess,
        normalisation=normalisation,
        trained_with=given.trained_with,
        assumed=_unsaid(
            labels=given.labels,
            activation=given.activation or served.activation,
            normalisation=given.normalisation,
            geometry=given.preprocess,
        ),
    )


def _unsaid(**said: object) -> tuple[str, ...]:
    return tuple(name for name, value in said.items() if value is None)
