"""The stem's fold and the CAM, against torch with nothing folded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch

from thoraxrt.engine.errors import RequestError
from thoraxrt.export.graph import (
    IMAGENET,
    Normalisation,
    ServedNetwork,
    onnx_from_network,
    reference_logits,
    session_from_graph,
)
from thoraxrt.export.networks import CxrNetwork, DenseNet, ResNet

SIZE = 64


def randomised(network: CxrNetwork) -> CxrNetwork:
    """Batch norms and biases that a fold could get wrong."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2), (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
            ):  # fmt: skip
                assert tensor is not None
                torch.nn.init.uniform_(tensor, low, high)
    torch.nn.init.uniform_(network.head.bias, -2, 2)
    return network.eval()


NETWORKS = {
    "densenet": lambda: DenseNet(growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=5),
    "resnet": lambda: ResNet((1, 1), width=8, num_classes=5),
    "bottleneck": lambda: ResNet((1, 1), bottleneck=True, width=8, num_classes=5),
    "one channel": lambda: DenseNet(
        growth_rate=4, block_config=(2,), num_init_features=8, num_classes=5, in_channels=1
    ),
}


class Exported(NamedTuple):
    network: CxrNetwork
    normalisation: Normalisation
    model: onnx.ModelProto


@pytest.fixture(params=NETWORKS, scope="module")
def exported(request: pytest.FixtureRequest) -> Exported:
    torch.manual_seed(1)
    network = randomised(NETWORKS[request.param]())
    normalisation = IMAGENET if network.stem.in_channels == 3 else Normalisation(mean=(0.3,), std=(0.2,))
    return Exported(network, normalisation, onnx_from_network(ServedNetwork(network, normalisation, SIZE), SIZE))


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 1, SIZE, SIZE), np.uint8)


def test_graph_equals_torch_and_its_cam_averages_to_the_logits(exported: Exported) -> None:
    expected = reference_logits(exported.network, exported.normalisation, IMAGES)
    logits, cam = session_from_graph(exported.model.SerializeToString()).run(["logits", "cam"], {"image": IMAGES})
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    bias = exported.network.head.bias.detach().numpy()
    np.testing.assert_allclose(cam.mean((2, 3)) + bias, expected, atol=1e-4, rtol=0)
    assert np.ptp(expected) > 0.5  # else agreement would say nothing


def test_the_graph_holds_nothing_of_this_machine_and_repeats(exported: Exported) -> None:
    again = onnx_from_network(ServedNetwork(exported.network, exported.normalisation, SIZE), SIZE)
    first = exported.model.SerializeToString(deterministic=True)
    assert first == again.SerializeToString(deterministic=True)
    assert b".py" not in first


def test_normalisation_of_another_channel_count_is_refused() -> None:
    with pytest.raises(RequestError, match="normalisation has 1 channels"):
        ServedNetwork(NETWORKS["resnet"](), Normalisation(mean=(0.5,), std=(0.2,)), SIZE)


def test_every_graph_takes_any_batch_size(exported: Exported) -> None:
    session = session_from_graph(exported.model.SerializeToString())
    together = session.run(["logits"], {"image": IMAGES})[0]
    alone = np.concatenate([session.run(["logits"], {"image": image[np.newaxis]})[0] for image in IMAGES])
    np.testing.assert_allclose(together, alone, atol=1e-5)
