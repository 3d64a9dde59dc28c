"""OpenVINO on Intel and AMD CPUs: FP32, BF16 where the CPU has it, INT8 from Q/DQ graphs.

What an INT8 graph keeps in float (batch norms, concatenations, stem, head) runs in BF16 where the CPU has it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from thoraxrt.engine.backends import NetworkOutput
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    import openvino

__all__ = ["DEVICE", "OpenVinoBackend", "open", "precisions"]

DEVICE = "cpu"

# The CPU plugin's arithmetic for each precision, always given: left alone it runs BF16 silently. For INT8 it is that
# of what the graph keeps in float.
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "bf16"}


def precisions(device: int, bundle: Bundle) -> Mapping[str, str | None]:
    """See `thoraxrt.engine.backends.BackendModule`."""
    capabilities = _import().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {
        precision: None if precision.upper() in capabilities else f"this CPU has no {precision} for OpenVINO"
        for precision in _HINTS
    }


def open(bundle: Bundle, precision: str, device: int = 0) -> OpenVinoBackend:  # noqa: A001 - the protocol's name
    """Load the bundle's graph of this precision."""
    return OpenVinoBackend(bundle.read(bundle.graph_name(precision)), precision)


class OpenVinoBackend:
    """An ONNX graph (its serialised bytes) compiled by OpenVINO for the CPU, for any batch size."""

    name = "openvino"

    def __init__(self, graph: bytes, precision: str) -> None:
        self.precision = precision
        core = _import().Core()
        hint = _HINTS[precision]
        if precision == "int8" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            hint = "f32"
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        try:
            model = core.read_model(model=graph)
            compiled = core.compile_model(model, "CPU", options)
            self._request: openvino.InferRequest | None = compiled.create_infer_request()
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot load the {precision} graph: {error}") from error
        executed = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if executed != hint:
            raise BackendUnavailableError(f"asked OpenVINO for {precision}, it would execute {executed} on this CPU")

    def run(self, images: npt.NDArray[np.uint8]) -> NetworkOutput:
        """See `thoraxrt.engine.backends.Backend`."""
        if self._request is None:
            raise BackendError("the openvino backend is closed; open the engine again")
        try:
            self._request.infer({"image": images}, share_inputs=True)
            # Copies: the request's own tensors are overwritten by the next call.
            return NetworkOutput(*(np.array(self._request.get_tensor(n).data) for n in ("logits", "cam")))
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed on a batch of {len(images)}: {type(error).__name__}") from error

    def close(self) -> None:
        """See `thoraxrt.engine.backends.Backend`."""
        self._request = None


def _import() -> Any:
    # On import OpenVINO reports to its maker where this module is found: a clinical machine reports to nobody.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise BackendUnavailableError("openvino is not installed: pip install 'thoraxrt[cpu]'") from error
    return openvino
