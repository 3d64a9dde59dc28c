"""ONNX Runtime on the CPU: the portable path, and the oracle for the other backends."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.backends import NetworkOutput
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["DEVICE", "OnnxRuntimeBackend", "open", "precisions"]

DEVICE = "cpu"

_BUILDS = ("onnxruntime", "onnxruntime-gpu")  # both bring a module named onnxruntime
_NO_HALF = (
    "ONNX Runtime's CPU provider has no {0} convolutions: it would run fp32 arithmetic on {0} weights; "
    "use --precision fp32, or another backend"
)


def precisions(device: int, bundle: Bundle) -> Mapping[str, str | None]:
    """See `thoraxrt.engine.backends.BackendModule`."""
    _import()
    return {"fp32": None, "bf16": _NO_HALF.format("bf16"), "fp16": _NO_HALF.format("fp16"), "int8": None}


def open(bundle: Bundle, precision: str, device: int = 0) -> OnnxRuntimeBackend:  # noqa: A001 - the protocol's name
    """Load the bundle's graph of this precision."""
    return OnnxRuntimeBackend(bundle.read(bundle.graph_name(precision)), precision)


class OnnxRuntimeBackend:
    """An ONNX graph (its serialised bytes) in an InferenceSession on the CPU provider."""

    name = "onnxruntime"

    def __init__(self, graph: bytes, precision: str) -> None:
        self.precision = precision
        runtime = _import()
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings would reach the user's terminal
        # Idle threads would spin for milliseconds, on the CPUs that decoding needs; older versions ignore it.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
        try:
            self._session: ort.InferenceSession | None = runtime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendError(f"ONNX Runtime cannot load the {precision} graph: {error}") from error

    def run(self, images: npt.NDArray[np.uint8]) -> NetworkOutput:
        """See `thoraxrt.engine.backends.Backend`."""
        if self._session is None:
            raise BackendError("the onnxruntime backend is closed; open the engine again")
        try:
            logits, cam = self._session.run(["logits", "cam"], {"image": images})
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendError(f"ONNX Runtime failed on a batch of {len(images)}: {type(error).__name__}") from error
        return NetworkOutput(logits, cam)

    def close(self) -> None:
        """See `thoraxrt.engine.backends.Backend`."""
        self._session = None


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError("onnxruntime is not installed: pip install 'thoraxrt[cpu]'") from error
    if len(builds := [name for name in _BUILDS if any(distributions(name=name))]) > 1:
        raise BackendUnavailableError(
            f"{' and '.join(builds)} are both installed and overwrite each other's module; "
            f"uninstall both, then install one: pip uninstall {' '.join(builds)}"
        )
    return onnxruntime
