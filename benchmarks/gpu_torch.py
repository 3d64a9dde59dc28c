"""PyTorch in TensorRT's place, where TensorRT runs no plan on the GPU at hand: the pipeline is measured all the same.

A stopgap of gpu-check, not a backend: its figures carry PyTorch's name. Its network is a CUDA graph of PyTorch's
own, which no other capture can hold, so the pipeline runs it uncaptured, as a profiled one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.cuda.cuda import Gpu
from thoraxrt.export.graph import IMAGENET, ServedNetwork
from thoraxrt.export.networks import CxrNetwork

__all__ = ["HalfServed", "TorchLoaded", "TorchNetwork"]


class HalfServed(nn.Module):
    """The network as served, in FP16 but for the mean over the CAM."""

    def __init__(self, network: CxrNetwork, size: int) -> None:
        super().__init__()
        self.served = ServedNetwork(network, IMAGENET, size).half().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """`image` uint8 `(N, 1, S, S)` to float32 logits `(N, C)` and CAM `(N, C, h, w)`."""
        served = self.served
        stem = served.stem(image.half().contiguous(memory_format=torch.channels_last)) + served.bias_map
        cam: Tensor = served.cam(served.network.trunk(stem)).float()
        return cam.mean((2, 3)) + served.bias, cam


class TorchNetwork:
    """A `thoraxrt.engine.cuda.pipeline.Network`, one CUDA graph of PyTorch's for each bucket."""

    precision = "fp16"

    def __init__(self, network: HalfServed, bundle: Bundle, buckets: tuple[int, ...]) -> None:
        manifest = bundle.manifest
        self.buckets = buckets
        self.cam_shape = manifest.network.cam_height, manifest.network.cam_width
        self._shapes = (1, *[manifest.preprocess.input_size] * 2), (len(manifest.labels),)
        self._network = network.cuda()
        self._graphs: dict[int, Any] = {}

    @torch.inference_mode()
    def bind(self, image: int, logits: int, cam: int) -> None:
        """Capture every bucket at these device addresses."""
        (image_shape, labels), largest = self._shapes, self.buckets[-1]
        inputs = _tensor(image, (largest, *image_shape), "|u1")
        outputs = _tensor(logits, (largest, *labels), "<f4"), _tensor(cam, (largest, *labels, *self.cam_shape), "<f4")

        def run(bucket: int) -> None:
            for made, place in zip(self._network(inputs[:bucket]), outputs, strict=True):
                place[:bucket].copy_(made)

        for bucket in self.buckets:
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(side):
                for _ in range(3):
                    run(bucket)
            torch.cuda.synchronize()
            self._graphs[bucket] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[bucket]):
                run(bucket)

    def enqueue(self, bucket: int, stream: int) -> None:
        """Put one inference on a stream, which must not be capturing."""
        external: Any = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(external):
            self._graphs[bucket].replay()


class TorchLoaded:
    """What a `PipelineExecutor` takes as a backend: the network and its GPU."""

    name = "pytorch"
    precision = "fp16"

    def __init__(self, network: CxrNetwork, bundle: Bundle, buckets: tuple[int, ...]) -> None:
        self.gpu = Gpu.open(0)
        self.network = TorchNetwork(HalfServed(network, bundle.manifest.preprocess.input_size), bundle, buckets)

    def close(self) -> None:
        """Free the GPU's things; PyTorch's are freed with the network."""
        self.gpu.close()


class _Array:
    """A piece of device memory, for `torch.as_tensor`."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": typestr, "version": 3}


def _tensor(address: int, shape: tuple[int, ...], typestr: str) -> Tensor:
    return torch.as_tensor(_Array(address, shape, typestr), device="cuda")
