"""The INT8 graph's shape, the equalisation that changes no bit, and the search for layers to keep in float."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from thoraxrt.engine.bundle import Agreement
from thoraxrt.engine.errors import RequestError
from thoraxrt.engine.postprocess import Sigmoid
from thoraxrt.export.agreement import agreement
from thoraxrt.export.calibrate import single_threaded
from thoraxrt.export.graph import IMAGENET, ServedNetwork, onnx_from_network
from thoraxrt.export.networks import CxrNetwork, DenseNet, ResNet
from thoraxrt.export.quantise import equalised, int8_from_fp32, quantisable_layers, scales_from_maxima
from thoraxrt.export.sensitivity import choose_layers, choose_method, logits_from_graph, plot
from thoraxrt.export.surgery import onnx_from_module, served_from_onnx

SIZE = 64
IMAGES = list(np.random.default_rng(0).integers(0, 256, (12, 1, SIZE, SIZE), np.uint8))
NETWORKS = {
    "densenet": lambda: DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=5),
    "resnet": lambda: ResNet((2, 1), width=8, num_classes=5),
    "bottleneck": lambda: ResNet((1, 1), bottleneck=True, width=8, num_classes=5),
}


def uneven(network: CxrNetwork) -> CxrNetwork:
    """Batch norms whose channels differ by orders of magnitude, as trained ones do."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            module.weight.data = torch.exp(torch.empty_like(module.weight).uniform_(-3, 1))
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    return network.eval()


@pytest.fixture(params=NETWORKS, scope="module")
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    torch.manual_seed(3)
    return onnx_from_network(ServedNetwork(uneven(NETWORKS[request.param]()), IMAGENET, SIZE), SIZE)


def tensors_on(model: onnx.ModelProto, images: Collection[npt.NDArray[np.uint8]]) -> dict[str, npt.NDArray[np.float32]]:
    """Each quantisable convolution's input on the images, `(N, C, h, w)`."""
    names = sorted(set(quantisable_layers(model).values()))
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    exposed.graph.output.extend(onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names)
    values = single_threaded(exposed.SerializeToString()).run(names, {"image": np.stack(list(images))})
    return dict(zip(names, values, strict=True))


def ranges_on(model: onnx.ModelProto) -> dict[str, float]:
    return {name: float(np.abs(value).max()) for name, value in tensors_on(model, IMAGES).items()}


# --- the graph -------------------------------------------------------------------------------------


def test_only_the_trunks_convolutions_are_quantised_symmetric_signed_and_per_channel(model: onnx.ModelProto) -> None:
    layers = quantisable_layers(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert set(layers) == {node.name for node in convolutions[1:-1]}  # neither the stem nor the CAM
    int8 = int8_from_fp32(model, ranges_on(model), layers)
    by_output = {output: node for node in int8.graph.node for output in node.output}
    values = {weight.name: numpy_helper.to_array(weight) for weight in int8.graph.initializer}
    for node in int8.graph.node:
        sources = [by_output.get(name) for name in node.input[:2]]
        if node.name not in layers:  # an addition that shares a convolution's input, say
            assert not any(source is not None and source.op_type == "DequantizeLinear" for source in sources)
            continue
        assert [source.op_type for source in sources if source] == ["DequantizeLinear"] * 2
        activation, weight = sources
        assert activation is not None
        assert weight is not None
        assert by_output[activation.input[0]].op_type == "QuantizeLinear"
        assert values[weight.input[0]].dtype == np.int8
        assert values[weight.input[1]].shape == (values[weight.input[0]].shape[0],)
        for source in (activation, weight):
            assert values[source.input[2]].dtype == np.int8
            assert not values[source.input[2]].any()
        assert all(values[name].dtype == np.float32 for name in node.input[2:])  # the bias
    assert [output.name for output in int8.graph.output] == ["logits", "cam"]


def test_a_layer_quantised_alone_leaves_what_shares_its_input_in_float(model: onnx.ModelProto) -> None:
    for layer in quantisable_layers(model):
        int8 = int8_from_fp32(model, ranges_on(model), [layer])
        dequantised = {node.output[0] for node in int8.graph.node if node.op_type == "DequantizeLinear"}
        assert [node.name for node in int8.graph.node if dequantised.intersection(node.input)] == [layer]


class _Clipped(nn.Module):
    """A head with a convolution of its own beside the CAM's, and a one-dimensional convolution in the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.attention, self.head = nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(12, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        x = x * torch.sigmoid(self.attention(x.mean((2, 3))[:, None])[:, 0])[:, :, None, None]
        return self.head(x.mean((2, 3), keepdim=True).clamp(0, 1)).flatten(1)


def test_the_whole_head_and_other_convolutions_stay_in_float() -> None:
    torch.manual_seed(0)
    served = served_from_onnx(onnx_from_module(_Clipped().eval(), 3, SIZE), IMAGENET)
    assert not served.linear
    (layer,) = quantisable_layers(served.model)
    int8 = int8_from_fp32(served.model, ranges_on(served.model), [layer])
    assert sum(node.op_type == "DequantizeLinear" for node in int8.graph.node) == 2
    assert sum(node.op_type == "Conv" for node in int8.graph.node) == 5


def test_weights_round_to_the_nearest_of_255_codes_per_channel(model: onnx.ModelProto) -> None:
    int8 = int8_from_fp32(model, ranges_on(model), quantisable_layers(model))
    before = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    after = {weight.name: numpy_helper.to_array(weight) for weight in int8.graph.initializer}
    quantised = [name.removesuffix("_quantized") for name in after if name.endswith("_quantized")]
    assert quantised
    for name in quantised:
        scale = after[f"{name}_scale"].reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(scale.ravel(), np.abs(before[name]).max((1, 2, 3)) / 127, rtol=1e-6)
        assert np.abs(after[f"{name}_quantized"] * scale - before[name]).max() <= scale.max() * 0.5001


def test_the_same_arguments_give_the_same_bytes_in_another_process(model: onnx.ModelProto, tmp_path: Path) -> None:
    ranges = ranges_on(model)
    expected = int8_from_fp32(model, ranges, quantisable_layers(model)).SerializeToString(deterministic=True)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "ranges.json").write_bytes(msgspec.json.encode(ranges))
    code = (
        "import sys, onnx, msgspec\n"
        "from thoraxrt.export.quantise import int8_from_fp32, quantisable_layers\n"
        "model = onnx.load('model.onnx'); ranges = msgspec.json.decode(open('ranges.json', 'rb').read())\n"
        "int8 = int8_from_fp32(model, ranges, quantisable_layers(model))\n"
        "sys.stdout.buffer.write(int8.SerializeToString(deterministic=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert done.stdout == expected


def test_a_network_without_a_trunk_is_refused() -> None:
    nodes = [
        onnx.helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        onnx.helper.make_node("Conv", ["x", "w"], ["cam"]),
        onnx.helper.make_node("GlobalAveragePool", ["cam"], ["logits"]),
    ]
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
    image = onnx.helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 1, 8, 8])
    outputs = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "cam")]
    graph = onnx.helper.make_graph(nodes, "one", [image], outputs, [weight])
    with pytest.raises(RequestError, match="nothing to quantise"):
        quantisable_layers(onnx.helper.make_model(graph))


# --- equalisation ----------------------------------------------------------------------------------


def test_equalising_changes_channels_but_no_bit_of_the_answer(model: onnx.ModelProto) -> None:
    largest = {name: np.abs(value).max((0, 2, 3)) for name, value in tensors_on(model, IMAGES).items()}
    scales = scales_from_maxima(model, largest)
    assert any(np.ptp(exponents) > 0 for exponents in scales.values())
    even = equalised(model, scales)
    reference = logits_from_graph(model, IMAGES)
    np.testing.assert_array_equal(logits_from_graph(even, IMAGES), reference)
    for name, value in tensors_on(even, IMAGES).items():
        exponents = np.array(scales.get(name, [0] * value.shape[1]))
        np.testing.assert_array_equal(
            np.abs(value).max((0, 2, 3)), largest[name] / np.exp2(exponents).astype(np.float32)
        )


# --- the search ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def densenet() -> onnx.ModelProto:
    torch.manual_seed(3)
    return onnx_from_network(ServedNetwork(uneven(NETWORKS["densenet"]()), IMAGENET, SIZE), SIZE)


def test_a_bar_that_is_met_keeps_nothing_and_one_that_no_int8_meets_keeps_everything(densenet: onnx.ModelProto) -> None:
    ranges, reference = ranges_on(densenet), logits_from_graph(densenet, IMAGES)

    def bar(limit: float) -> Agreement:
        return agreement(reference, reference, Sigmoid(), "abcde", None)

    for limit, kept in ((1e9, 0), (0.0, len(quantisable_layers(densenet)))):

        def compare(logits: npt.NDArray[np.float32], limit: float = limit) -> Agreement:
            met = float(np.abs(logits - reference).max()) <= limit
            return msgspec.structs.replace(bar(limit), meets_bar=met)

        result = choose_layers(densenet, "minmax", ranges, IMAGES, reference, compare)
        assert len(result.float_layers) == kept


def test_the_layer_that_a_bad_range_spoils_is_the_costliest_and_the_one_kept(densenet: onnx.ModelProto) -> None:
    layers = quantisable_layers(densenet)
    spoilt = list(layers)[4]
    ranges = ranges_on(densenet)
    ranges[layers[spoilt]] *= 0.02  # nearly everything saturates
    reference = logits_from_graph(densenet, IMAGES)
    limit = 3 * float(
        np.abs(logits_from_graph(int8_from_fp32(densenet, ranges, set(layers) - {spoilt}), IMAGES) - reference).max()
    )

    def compare(logits: npt.NDArray[np.float32]) -> Agreement:
        met = float(np.abs(logits - reference).max()) <= limit
        return msgspec.structs.replace(agreement(logits, reference, Sigmoid(), "abcde", None), meets_bar=met)

    result = choose_layers(densenet, "minmax", ranges, IMAGES, reference, compare)
    assert result.costs[0].layer == spoilt
    assert result.float_layers == (spoilt,)
    assert [cost.layer for cost in result.costs] != list(layers)
    assert {cost.layer for cost in result.costs} == set(layers)
    counts = [step.float_layers for step in result.curve]
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (0, len(layers))
    assert not result.curve[0].agreement.meets_bar
    assert result.curve[1].agreement.meets_bar
    picture = plot(result)
    assert picture.startswith(b"\x89PNG")
    assert picture == plot(result)
    result.chosen.agreement.concordance["a"] = 0.5
    assert picture != plot(result)


def test_the_best_method_is_the_one_that_moves_logits_least(densenet: onnx.ModelProto) -> None:
    good = ranges_on(densenet)
    bad = {name: top * 0.05 for name, top in good.items()}
    ranges = {"minmax": bad, "percentile": good, "entropy": bad, "mse": bad}
    assert choose_method(densenet, ranges, IMAGES, logits_from_graph(densenet, IMAGES)) == "percentile"  # type: ignore[arg-type]
