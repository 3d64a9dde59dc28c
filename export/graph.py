"""Network to ONNX: the stem takes raw pixels, the CAM is an output.

Owns the two rewrites that every export makes; what comes out is checked against torch by
`thoraxrt.export.bundle`, and `thoraxrt.export.half` makes FP16 of it.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from thoraxrt.engine.errors import RequestError
from thoraxrt.export.networks import CxrNetwork

__all__ = [
    "IMAGENET",
    "Normalisation",
    "Reference",
    "ServedNetwork",
    "onnx_from_network",
    "reference_logits",
    "session_from_graph",
    "strip",
    "trunk_from_graph",
]

OPSET = 18

Reference: TypeAlias = Callable[[npt.NDArray[np.uint8 | np.float32]], npt.NDArray[np.float32]]
"""The original's logits float32 `(N, C)` for pixels `(N, 1, S, S)` in 0..255, uint8 or float32, nothing folded."""

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """What training subtracted and divided by, per channel, after scaling pixels to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise RequestError(f"mean {self.mean} and std {self.std}: expected one each per channel, std above 0")


IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class ServedNetwork(nn.Module):
    """The network as it is served: `image` uint8 `(N, 1, S, S)` to `logits (N, C)` and `cam (N, C, h, w)`.

    The stem absorbs normalisation and its batch norm, computed in float64: with mean m_c, std s_c
    and stem weights W_c, one-channel weights sum_c W_c / (255 s_c) and a constant bias *map*
    conv(ones, sum_c -W_c m_c / s_c). A map, not a scalar, since zero padding follows normalisation.

    The head is applied as a 1 x 1 convolution to the last feature map, which gives the CAM (Zhou
    et al., arXiv 1512.04150); its spatial mean plus the bias is the logit.
    """

    def __init__(self, network: CxrNetwork, normalisation: Normalisation, input_size: int) -> None:
        super().__init__()
        network = copy.deepcopy(network)
        channels = network.stem.in_channels
        if len(normalisation.mean) != channels:
            raise RequestError(
                f"normalisation has {len(normalisation.mean)} channels, the network's stem {channels}: give {channels}"
            )
        self.stem, bias_map = _fold_stem(network, normalisation, input_size)
        self.bias_map: Tensor
        self.register_buffer("bias_map", bias_map)  # (1, O, h', w')
        _replace(network, network.stem_norm, nn.Identity())
        self.network = network
        self.cam = nn.Conv2d(network.head.in_features, network.head.out_features, 1, bias=False)
        self.cam.weight.data = network.head.weight.data[:, :, None, None].clone()
        self.bias = nn.Parameter(network.head.bias.data.clone())
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """`image` uint8 `(N, 1, S, S)` to float32 logits `(N, C)` and CAM `(N, C, h, w)`."""
        stem = self.stem(image.to(torch.float32)) + self.bias_map
        cam = self.cam(self.network.trunk(stem))
        return cam.mean((2, 3)) + self.bias, cam


def _fold_stem(network: CxrNetwork, normalisation: Normalisation, size: int) -> tuple[nn.Conv2d, Tensor]:
    """The one-channel stem convolution, and the bias map float32 `(1, O, h', w')`."""
    stem, norm = copy.deepcopy(network.stem).double(), copy.deepcopy(network.stem_norm).double()
    mean = torch.tensor(normalisation.mean, dtype=torch.float64)[None, :, None, None]
    std = torch.tensor(normalisation.std, dtype=torch.float64)[None, :, None, None]
    with torch.no_grad():
        background = norm(stem((-mean / std).expand(1, -1, size, size)))  # the answer to an all-black image
        assert norm.running_var is not None  # eval mode
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # (O,)
        one_channel = (stem.weight / (255 * std)).sum(1, keepdim=True) * scale[:, None, None, None]  # (O, 1, k, k)
    stem.in_channels, stem.bias, stem.weight = 1, None, nn.Parameter(one_channel)
    return stem.float(), background.float()


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    (name,) = [name for name, module in network.named_modules() if module is old]
    network.set_submodule(name, new)


def reference_logits(
    network: nn.Module, normalisation: Normalisation, images: npt.NDArray[np.uint8 | np.float32]
) -> npt.NDArray[np.float32]:
    """Torch's own logits float32 `(N, C)` for pixels `(N, 1, S, S)` in 0..255: normalised as in training, nothing folded."""
    mean = torch.tensor(normalisation.mean)[None, :, None, None]
    std = torch.tensor(normalisation.std)[None, :, None, None]
    with torch.inference_mode():
        x = torch.tensor(images).float().div(255)  # (N, 1, S, S)
        logits: Tensor = network((x - mean) / std)  # the one channel broadcasts to the network's
    return logits.numpy()


def session_from_graph(graph: bytes) -> onnxruntime.InferenceSession:
    """The oracle: a serialised graph on ONNX Runtime's CPU provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def onnx_from_network(served: ServedNetwork, input_size: int) -> onnx.ModelProto:
    """The FP32 graph: `image` uint8 `(batch, 1, S, S)` to `logits` and `cam`, batch size free."""
    example = torch.zeros(2, 1, input_size, input_size, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter deprecates its own internals
        program = torch.onnx.export(
            served,
            (example,),
            input_names=["image"],
            output_names=["logits", "cam"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # dynamo=True returns the program
    model = program.model_proto
    strip(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def strip(model: onnx.ModelProto) -> None:
    """Drop an exporter's stack traces and notes: paths of its machine, and a reason for hashes to differ."""
    graph = model.graph
    owners: tuple[Any, ...] = (
        model,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.initializer,
        *graph.input,
        *graph.output,
    )
    for owner in owners:
        owner.doc_string = ""
        del owner.metadata_props[:]


def trunk_from_graph(graph: onnx.GraphProto) -> set[str]:
    """The first outputs of the nodes that the CAM convolution's input comes from: all but the head.

    Raises RequestError where the output `cam` comes from no convolution.
    """
    producers = {name: node for node in graph.node for name in node.output}
    node = producers.get("cam")
    while node is not None and node.op_type != "Conv":
        node = producers.get(next(iter(node.input), ""))
    if node is None:
        raise RequestError("the graph's output cam comes from no Conv: give the FP32 graph of a bundle")
    trunk: set[str] = set()
    pending = [node.input[0]]
    while pending:
        node = producers.get(pending.pop())
        if node is not None and node.output[0] not in trunk:
            trunk.add(node.output[0])
            pending.extend(node.input)
    return trunk
