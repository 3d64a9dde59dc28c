"""Reading a bundle: its manifest, and its files once their hashes match.

A bundle is a directory that holds everything a deployment needs; `thoraxrt.export` writes it.
Nothing from it reaches a runtime before its sha256 has been compared with the manifest's.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final, Literal, Self

import msgspec

from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.errors import BundleError
from thoraxrt.engine.postprocess import Activation, OperatingPoint, SigmoidOpNorm, Softmax
from thoraxrt.engine.preprocess import PreprocessSpec

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Agreement",
    "Bundle",
    "Calibration",
    "Check",
    "FileEntry",
    "FindingAgreement",
    "Manifest",
    "Network",
    "Recommended",
]

MANIFEST: Final = "manifest.json"
SCHEMA_VERSION: Final = 1


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the manifest's parts: immutable, and strict about unknown fields."""


class FileEntry(_Strict, frozen=True):
    """One file of the bundle: lower-case hex sha256 and size in bytes."""

    sha256: str
    size: int


class Network(_Strict, frozen=True):
    """The network: its name, CAM size in cells, and the classifier's bias per label (float32)."""

    name: str
    cam_height: int
    cam_width: int
    bias: tuple[float, ...]
    checkpoint_sha256: str


class Check(_Strict, frozen=True):
    """How far a graph's logits were from torch's at export, on how many of which images."""

    max_logit_difference: float
    images: int
    data: str


class FindingAgreement(_Strict, frozen=True):
    """A finding's AUROC at one precision, and by how much it exceeds FP32's on the same images.

    `low` to `high` is the difference's 95 % interval. The verdict is `cannot tell` where fewer than
    20 images show the finding or fewer than 20 do not.
    """

    finding: str
    positives: int
    negatives: int
    auroc: float
    difference: float
    low: float
    high: float
    verdict: Literal["within", "beyond", "cannot tell"]


class Agreement(_Strict, frozen=True):
    """How close one precision's answers are to FP32's on images that no choice was made on.

    Errors are absolute differences of probabilities, the mean and the 99th percentile over images and
    labels; the correlation is Spearman's, over all logits. `thoraxrt.export.agreement` states the bar.
    """

    images: int
    mean_error: float
    p99_error: float
    rank_correlation: float
    findings: tuple[FindingAgreement, ...]
    meets_bar: bool


class Calibration(_Strict, frozen=True):
    """What the INT8 graph's ranges and layers were chosen with.

    `split` says how the images were parted, `images` has the sha256 of each one by part: `calibrate`
    (ranges), `select` (method and layers) and `judge` (the agreement that the manifest states).
    `quantised` of `layers` convolutions run in INT8.
    """

    method: Literal["minmax", "percentile", "entropy", "mse"]
    ranges: str
    split: str
    images: dict[str, tuple[str, ...]]
    layers: int
    quantised: int


class Recommended(_Strict, frozen=True):
    """What runs when nobody names a backend or a precision."""

    backend: str
    precision: str


class Manifest(_Strict, frozen=True, kw_only=True):
    """`manifest.json`: everything about a bundle but its weights.

    `labels`, `network.bias` and `operating_points` share one order. `checks`, `agreement` and
    `kept_in_fp32` are keyed by precision, `files` by name. `kept_in_fp32` names the graph's nodes that
    measurement kept in FP32 at a lower precision.
    """

    schema_version: int
    network: Network
    labels: tuple[str, ...]
    activation: Activation
    preprocess: PreprocessSpec
    boxes: BoxSpec
    operating_points: tuple[OperatingPoint, ...]
    checks: dict[str, Check]
    calibration: Calibration | None = None
    agreement: dict[str, Agreement] = {}
    kept_in_fp32: dict[str, tuple[str, ...]] = {}
    recommended: Recommended | None
    producer: dict[str, str]
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct and at least one")
        if tuple(point.finding for point in self.operating_points) != self.labels:
            raise ValueError("operating_points must name the labels, in their order")
        match self.activation:
            case SigmoidOpNorm(thresholds=thresholds) if len(thresholds) != len(self.labels):
                raise ValueError(f"activation has {len(thresholds)} thresholds for {len(self.labels)} labels")
            case Softmax() if len(self.labels) < 2:
                raise ValueError("activation is softmax for one label: expected at least two, or sigmoid")
        if len(self.network.bias) != len(self.labels):
            raise ValueError(f"network.bias has {len(self.network.bias)} values for {len(self.labels)} labels")
        if unknown := set(self.boxes.per_finding) - set(self.labels):
            raise ValueError(f"boxes.per_finding names {', '.join(sorted(unknown))}, no label of this model")
        for name in self.files:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"file name {name!r}: expected a plain name in the bundle's folder")


class Bundle:
    """A bundle on disk whose manifest has been read and found sound."""

    def __init__(self, path: Path, manifest: Manifest, sha256: str) -> None:
        self.path = path
        self.manifest = manifest
        self.sha256 = sha256
        """Of `manifest.json` itself: it covers every other file, so it names the bundle."""

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a bundle's manifest. Raises BundleError where it is missing, damaged or of another schema."""
        path = Path(path)
        try:
            data = (path / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleError(
                f"{path} is not a bundle: {MANIFEST} cannot be read ({error.strerror}); "
                "`thoraxrt export CHECKPOINT --out BUNDLE` writes one"
            ) from error
        return cls(path, _manifest(data, path), hashlib.sha256(data).hexdigest())

    @staticmethod
    def graph_name(precision: str) -> str:
        """The graph a precision executes: BF16 is arithmetic on the FP32 graph, the others have their own."""
        return f"model.{'fp32' if precision == 'bf16' else precision}.onnx"

    def read(self, name: str) -> bytes:
        """A file's bytes, verified against the manifest. Raises BundleError."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path} holds no {name}; it holds {', '.join(self.manifest.files)}")
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise BundleError(
                f"{self.path / name} cannot be read: {error.strerror}; export the bundle again"
            ) from error
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(
                f"{self.path / name} is not the file that was exported ({len(data)} bytes, sha256 differs; "
                f"the manifest says {entry.size} bytes, {entry.sha256[:12]}...); copy or export the bundle again"
            )
        return data

    def verify(self) -> None:
        """Compare every file with the manifest. Raises BundleError at the first that differs."""
        for name in self.manifest.files:
            self.read(name)


class _Version(msgspec.Struct):
    schema_version: int


def _manifest(data: bytes, path: Path) -> Manifest:
    """Parse a manifest; the version first, so that another schema is named as such."""
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}; this thoraxrt reads {SCHEMA_VERSION}: "
                f"{'update thoraxrt' if version > SCHEMA_VERSION else 'export the bundle again'}"
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} is damaged: {error}; copy or export the bundle again") from error
