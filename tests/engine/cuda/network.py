"""A network on the host for the software driver: a function of one input, put on streams as a host call.

It satisfies `thoraxrt.engine.cuda.pipeline.Network`, captured or not. Device memory is host memory there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Function = Callable[[npt.NDArray[np.uint8]], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
"""From uint8 `(1, S, S)` to logits float32 `(C,)` and CAMs float32 `(C, h, w)`."""


class HostNetwork:
    """`inputs` is the bytes of every image it was given, padding included."""

    precision = "fp32"

    def __init__(self, driver: Any, function: Function, buckets: tuple[int, ...], size: int) -> None:
        self.buckets = buckets
        self.inputs: set[bytes] = set()
        self._driver, self._function, self._size = driver, function, size
        logits, cams = function(np.zeros((1, size, size), np.uint8))
        self._shapes = {"image": (1, size, size), "logits": logits.shape, "cam": cams.shape}
        self.cam_shape = cams.shape[1:]

    def bind(self, image: int, logits: int, cam: int) -> None:
        self._addresses = {"image": image, "logits": logits, "cam": cam}

    def enqueue(self, bucket: int, stream: int) -> None:
        self._driver.call(stream, lambda: self._run(bucket))

    def _run(self, bucket: int) -> None:
        images = self._array("image", bucket, ctypes.c_uint8)
        logits, cams = (self._array(name, bucket, ctypes.c_float) for name in ("logits", "cam"))
        for index, image in enumerate(images):
            self.inputs.add(image.tobytes())
            logits[index], cams[index] = self._function(image.copy())

    def _array(self, name: str, bucket: int, kind: Any) -> npt.NDArray[Any]:
        shape = (bucket, *self._shapes[name])
        return np.ctypeslib.as_array((kind * int(np.prod(shape))).from_address(self._addresses[name])).reshape(shape)


def memoised(function: Function) -> Function:
    """The same function, which computes nothing twice."""
    known: dict[bytes, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}

    def recall(image: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        key = image.tobytes()
        if key not in known:
            known[key] = function(image)
        return known[key]

    return recall


def noise(labels: int, side: int, scale: float = 1.0) -> Function:
    """CAMs `(labels, side, side)` of noise drawn from the image's bytes, many regions each; logits are their means."""

    def draw(image: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        rng = np.random.default_rng(np.frombuffer(image.tobytes()[:64], np.uint32) if image.any() else 0)
        cams = (scale * rng.normal(size=(labels, side, side))).astype(np.float32)
        return cams.mean(axis=(1, 2), dtype=np.float64).astype(np.float32), cams

    return draw
