"""One file per backend, one protocol; choosing among them is policy and stands here alone.

A backend takes `image` uint8 `(N, 1, S, S)` and gives `logits` float32 `(N, C)` and `cam`
float32 `(N, C, h, w)`. Knows nothing of radiographs, findings or boxes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendUnavailableError, RequestError

__all__ = ["PRECISIONS", "Backend", "Choice", "NetworkOutput", "available", "backend_names", "choose", "open_backend"]

PRECISIONS: Final = ("fp32", "bf16", "fp16", "int8")
"""What `precision` may say, and always of what was executed."""

_MODULES: Final = {
    "tensorrt": "thoraxrt.engine.backends.tensorrt",
    "openvino": "thoraxrt.engine.backends.openvino",
    "onnxruntime": "thoraxrt.engine.backends.onnxruntime",
}
"""In the order tried where neither the caller nor the manifest names one."""


class NetworkOutput(NamedTuple):
    """What the network gives for a batch of N images and C labels."""

    logits: npt.NDArray[np.float32]  # (N, C)
    cam: npt.NDArray[np.float32]  # (N, C, h, w)


class Backend(Protocol):
    """A network loaded on one device at one precision; one thread at a time calls `run`."""

    @property
    def name(self) -> str:
        """The backend's name, as on the command line."""

    @property
    def precision(self) -> str:
        """The precision that is executed, one of `PRECISIONS`."""

    def run(self, images: npt.NDArray[np.uint8]) -> NetworkOutput:
        """The network on uint8 `(N, 1, S, S)`, N >= 1; raises BackendError."""

    def close(self) -> None:
        """Free the network; closing twice is harmless."""


class BackendModule(Protocol):
    """What each backend's module defines."""

    DEVICE: str
    """What it runs on: "cpu" or "cuda"."""
    open: Callable[[Bundle, str, int], Backend]
    """Load the bundle's network at a precision that `precisions` allows, on the GPU of this number."""
    precisions: Callable[[int, Bundle], Mapping[str, str | None]]
    """Each precision's reason not to run this bundle on this machine, or on its GPU of this number; None where it runs.

    Raises BackendUnavailableError where the runtime itself is missing or broken.
    """


def backend_names() -> tuple[str, ...]:
    """The backends this version knows, in default order."""
    return tuple(_MODULES)


def _module(name: str) -> BackendModule:
    if name not in _MODULES:
        raise RequestError(f"unknown backend {name!r}; expected one of {', '.join(_MODULES)}")
    module: BackendModule = importlib.import_module(_MODULES[name])
    return module


def available(name: str, bundle: Bundle, index: int = 0) -> dict[str, str | None]:
    """Per precision, why this backend cannot run this bundle here (on GPU number `index`), or None where it can."""
    try:
        reasons = dict(_module(name).precisions(index, bundle))
    except BackendUnavailableError as error:
        return dict.fromkeys(PRECISIONS, str(error))
    for precision, reason in reasons.items():
        if reason is None and bundle.graph_name(precision) not in bundle.manifest.files:
            reasons[precision] = f"the bundle holds no {bundle.graph_name(precision)}"
    return reasons


class Choice(NamedTuple):
    """Where a network is to run: the backend's module, the precision, and which GPU (0 for a CPU)."""

    module: BackendModule
    precision: str
    device: int


def open_backend(
    bundle: Bundle, backend: str | None = None, precision: str | None = None, device: str | None = None
) -> Backend:
    """Load a bundle's network; see `choose`."""
    module, precision, index = choose(bundle, backend, precision, device)
    return module.open(bundle, precision, index)


def choose(
    bundle: Bundle, backend: str | None = None, precision: str | None = None, device: str | None = None
) -> Choice:
    """Where the caller says, else where the manifest recommends, else FP32.

    `device` is "cpu", "cuda" or "cuda:N", N counting the GPUs that the driver shows. A named choice is
    honoured or refused, never replaced. With nothing named and nothing recommended, the first
    backend in default order that can run fp32 does; with only a precision or a device named, the
    first that can run it. Raises RequestError, BackendUnavailableError, BackendError.
    """
    if precision is not None and precision not in PRECISIONS:
        raise RequestError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    kind, index = _parsed(device)
    recommended = bundle.manifest.recommended
    if recommended is not None and backend is None and precision is None and device is None:
        backend, precision = recommended.backend, recommended.precision
    precision = precision or "fp32"
    refusals = []
    for name in (backend,) if backend else backend_names():
        module = _module(name)
        if kind in (None, module.DEVICE):
            reason = available(name, bundle, index).get(precision, f"it has no {precision}")
            if reason is None:
                return Choice(module, precision, index)
        else:
            reason = f"it runs on {module.DEVICE}"
        refusals.append(f"{name}: {reason}")
    raise BackendUnavailableError(
        f"no backend can run {precision} on {device or 'this machine'} ({'; '.join(refusals)}); "
        "`thoraxrt info BUNDLE` shows what can"
    )


def _parsed(device: str | None) -> tuple[str | None, int]:
    """The kind of device, None for any, and its number."""
    if device is None or device in ("cpu", "cuda"):
        return device, 0
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number.isascii() and number.isdigit()):
        raise RequestError(f"unknown device {device!r}; expected cpu, cuda or cuda:N, cuda:1 for example")
    return kind, int(number)
