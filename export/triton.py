"""Bundle to Triton: a model folder for a Triton Inference Server (or KServe) repository.

Owns `config.pbtxt`. The network's tensors are the engine's: a client makes `image` with
`thoraxrt.engine.preprocess.network_input` and reads the outputs with `findings_from_logits` and
`boxes_from_cam`, by the `manifest.json` that lies beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from thoraxrt.engine.bundle import MANIFEST, SIGNATURE, Bundle
from thoraxrt.engine.errors import BundleError, RequestError
from thoraxrt.engine.plans import CachedPlan
from thoraxrt.export.publish import publish

__all__ = ["CONFIG", "triton_from_bundle"]

CONFIG: Final = "config.pbtxt"

_BATCH: Final = 32
_QUEUE_DELAY: Final = 1000  # microseconds; small beside the network's run, large beside an image's arrival in a burst


def triton_from_bundle(
    bundle: Bundle,
    repository: Path,
    *,
    precision: str | None = None,
    batch: int | None = None,
    plan: CachedPlan | None = None,
    replace: bool = False,
) -> Path:
    """Write the bundle's network as the folder `repository/NAME`, whole or not at all; gives that folder.

    NAME is the bundle folder's, without its suffix; the folder may be renamed. It holds the graph of
    `precision` (else what the manifest recommends, else FP32) for batches of up to `batch` images (32), or the
    TensorRT plan, which has its own precision and batch sizes. Raises BundleError where the folder exists
    (unless it is such a folder and `replace` is set), where the bundle is damaged or the plan of another graph;
    RequestError where the options make no sense together.

    Schema: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
    """
    if plan is not None and (precision or batch):
        raise RequestError("the plan has a precision and batch sizes of its own: leave out --precision and --batch")
    labels = "".join(f"{label}\n" for label in bundle.manifest.labels)
    if tuple(labels.split("\n")[:-1]) != bundle.manifest.labels:
        raise RequestError("a label has a line break in it, labels.txt cannot: export the bundle with other --labels")
    if plan is None:
        recommended = bundle.manifest.recommended
        name = bundle.graph_name(precision or (recommended.precision if recommended else "fp32"))
        model = {"1/model.onnx": bundle.read(name)}
        config = _config(bundle, name.split(".")[1], range(1, (batch or _BATCH) + 1), on_plan=False)
    else:
        _refuse(plan, bundle)
        key = plan.record.key
        model = {"1/model.plan": plan.plan}
        config = _config(bundle, key.precision, sorted(key.options.buckets), on_plan=True)
    beside = {
        name: (bundle.path / name).read_bytes() for name in (MANIFEST, SIGNATURE) if (bundle.path / name).is_file()
    }
    out = repository / bundle.path.resolve().stem
    publish(
        {**model, **beside, "labels.txt": labels.encode(), CONFIG: config.encode()}, out, replace=replace, mark=CONFIG
    )
    return out


def _refuse(plan: CachedPlan, bundle: Bundle) -> None:
    """Raise for a plan that Triton could not load, or of another bundle."""
    key = plan.record.key
    if key.onnx_sha256 not in {entry.sha256 for entry in bundle.manifest.files.values()}:
        raise BundleError(
            f"{plan.folder} was compiled from a graph that {bundle.path} does not hold; "
            f"`thoraxrt compile {bundle.path}` makes its own"
        )
    if key.runtime != "tensorrt":
        raise RequestError(
            f"{plan.folder} was made with {key.runtime}, Triton runs plans of tensorrt: compile where that is installed, "
            "in the version of the Triton release, or leave out --plan"
        )
    if key.options.strip_weights:
        raise RequestError(f"{plan.folder} has no weights and Triton puts none in: compile without --strip-weights")


def _config(bundle: Bundle, precision: str, batches: Sequence[int], *, on_plan: bool) -> str:
    """The text of `config.pbtxt` for a network that takes these batch sizes, ascending.

    A plan has one profile per batch size, so all are named; and Triton may only form batches of its own
    where every size up to the largest has one. No size is preferred: Triton's documentation keeps that for
    profiles that differ, and prefers the largest batch at hand without it.
    """
    network, largest = bundle.manifest.network, batches[-1]
    size, count = bundle.manifest.preprocess.input_size, len(bundle.manifest.labels)
    platform, kind, profile = "onnxruntime_onnx", "KIND_AUTO", ""
    batching = f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_DELAY} }}"
    warm = [number for number in batches if number & (number - 1) == 0 or number == largest]
    if on_plan:
        platform, kind, warm = "tensorrt_plan", "KIND_GPU", list(batches)
        profile = " profile: [ " + ", ".join(f'"{index}"' for index in range(len(batches))) + " ]"
        if list(batches) != list(range(1, largest + 1)):
            batching = f"# no dynamic batching: the plan takes {', '.join(map(str, batches))} images, no other number"
    lines = [
        f"# {MANIFEST} says how to make the input and read the outputs.",
        f'platform: "{platform}"',
        f"max_batch_size: {largest}",
        f'input [ {{ name: "image" data_type: TYPE_UINT8 dims: [ 1, {size}, {size} ] }} ]',
        f'output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ {count} ] label_filename: "labels.txt" }},',
        f'{{ name: "cam" data_type: TYPE_FP32 dims: [ {count}, {network.cam_height}, {network.cam_width} ] }} ]',
        f"instance_group [ {{ count: 1 kind: {kind}{profile} }} ]",
        batching,
        *(_warm_up(number, size) for number in warm),
        _parameter("manifest_sha256", bundle.sha256),
        _parameter("precision", precision),
    ]
    return "\n".join(lines) + "\n"


def _warm_up(batch: int, size: int) -> str:
    image = f'key: "image" value {{ data_type: TYPE_UINT8 dims: [ 1, {size}, {size} ] zero_data: true }}'
    return f'model_warmup {{ name: "batch {batch}" batch_size: {batch} inputs {{ {image} }} }}'


def _parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
