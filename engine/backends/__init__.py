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

__all__ = ["PRECISIONS", "Backend", "NetworkOutput", "available", "backend_names", "open_backend"]

PRECISIONS: Final = ("fp32", "bf16", "fp16", "int8")
"""What `precision` may say, and always of what was executed."""

_MODULES: Final = {
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

    open: Callable[[Bundle, str], Backend]
    """Load the bundle's network at a precision that `precisions` allows."""
    precisions: Callable[[], Mapping[str, str | None]]
    """Each precision's reason not to run on this machine, None where it runs.

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


def available(name: str, bundle: Bundle) -> dict[str, str | None]:
    """Per precision, why this backend cannot run this bundle here, or None where it can."""
    try:
        reasons = dict(_module(name).precisions())
    except BackendUnavailableError as error:
        return dict.fromkeys(PRECISIONS, str(error))
    for precision, reason in reasons.items():
        if reason is None and bundle.graph_name(precision) not in bundle.manifest.files:
            reasons[precision] = f"the bundle holds no {bundle.graph_name(precision)}"
    return reasons


def open_backend(bundle: Bundle, backend: str | None = None, precision: str | None = None) -> Backend:
    """Load a bundle's network where the caller says, else where the manifest recommends, else FP32.

    A named choice is honoured or refused, never replaced. With nothing named and nothing
    recommended, the first installed backend in default order runs fp32; with only a precision
    named, the first that can run it. Raises RequestError, BackendUnavailableError, BackendError.
    """
    if precision is not None and precision not in PRECISIONS:
        raise RequestError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    recommended = bundle.manifest.recommended
    if recommended is not None and backend is None and precision is None:
        backend, precision = recommended.backend, recommended.precision
    precision = precision or "fp32"
    refusals = []
    for name in (backend,) if backend else backend_names():
        module = _module(name)
        reason = available(name, bundle).get(precision, f"it has no {precision}")
        if reason is None:
            return module.open(bundle, precision)
        refusals.append(f"{name}: {reason}")
    raise BackendUnavailableError(
        f"no backend can run {precision} on this machine ({'; '.join(refusals)}); `thoraxrt info BUNDLE` shows what can"
    )
