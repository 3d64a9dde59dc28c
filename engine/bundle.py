"""Reading a bundle: its manifest, and its files once their hashes match.

A bundle is a directory that holds everything a deployment needs; `thoraxrt.export` writes it.
Nothing from it reaches a runtime before its sha256 has been compared with the manifest's.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import msgspec

from thoraxrt.engine.boxes import BoxSpec
from thoraxrt.engine.errors import BundleError, SignatureError
from thoraxrt.engine.postprocess import Activation, OperatingPoint, SigmoidOpNorm, Softmax
from thoraxrt.engine.preprocess import PreprocessSpec
from thoraxrt.engine.trust import verify

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "Agreement",
    "Bundle",
    "Calibration",
    "Check",
    "FileEntry",
    "FindingAgreement",
    "Folded",
    "Manifest",
    "Network",
    "Recommended",
    "Skew",
    "TrainedWith",
    "read_bounded",
]

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
SCHEMA_VERSION: Final = 2

_MANIFEST_BYTES: Final = 16 << 20
"""No manifest is larger: a real one has some 10 kB, and 64 for each image that INT8 was calibrated on."""

_Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Cells = Annotated[int, msgspec.Meta(ge=1, le=4096)]

TrainedWith = Literal["skimage", "opencv-area", "opencv-linear", "pillow-bicubic", "ten-crop"]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the manifest's parts: immutable, and strict about unknown fields."""


class FileEntry(_Strict, frozen=True):
    """One file of the bundle: lower-case hex sha256 and size in bytes."""

    sha256: _Sha256
    size: _Count

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The entry of a file with these bytes."""
        return cls(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


class Network(_Strict, frozen=True):
    """The network: its name, CAM size in cells, and the classifier's bias per label (float32)."""

    name: str
    cam_height: _Cells
    cam_width: _Cells
    bias: tuple[float, ...]
    checkpoint_sha256: _Sha256


class Check(_Strict, frozen=True):
    """How far a graph's logits were from the original's at export, on how many of which images."""

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
    labels; the correlation is Spearman's, over all logits; `concordance`, by label, is that of one finding's
    logits, -1..1, empty on too few images. `thoraxrt.export.agreement` states the bar.
    """

    images: int
    mean_error: float
    p99_error: float
    rank_correlation: float
    findings: tuple[FindingAgreement, ...]
    meets_bar: bool
    concordance: dict[str, float] = {}

    @property
    def least_concordance(self) -> tuple[str, float] | None:
        """The finding whose logits agree least, and their concordance; None on too few images."""
        return min(self.concordance.items(), key=lambda each: each[1], default=None)


class Calibration(_Strict, frozen=True):
    """What the INT8 graph's ranges and layers were chosen with.

    `split` says how the images were parted, `images` has the sha256 of each one by part: `calibrate`
    (ranges), `select` (method and layers) and `judge` (the agreement that the manifest states).
    `quantised` of `layers` convolutions run in INT8; where none could, there is no INT8 graph.
    `reused` where an earlier export's ranges were taken: then nothing was judged in this one.
    """

    method: Literal["minmax", "percentile", "entropy", "mse"]
    ranges: str
    split: str
    images: dict[str, tuple[str, ...]]
    layers: int
    quantised: int
    reused: bool = False


class Folded(_Strict, frozen=True):
    """The normalisation folded into the stem: of pixels in 0..1, per channel, (v - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Skew(_Strict, frozen=True):
    """What serving with another geometry than training's costs, measured on the original network.

    `trained_with`: what training, or the validation that is to be reproduced, did instead of
    Pillow's resize and one centre crop (`thoraxrt.export.skew` says exactly what). Differences
    are absolute, over `images` and all findings: in probability, and the largest in log-odds
    (for sigmoid and op-norm the logit).
    """

    trained_with: TrainedWith
    mean_probability_difference: float
    max_probability_difference: float
    max_logit_difference: float
    images: int
    data: str


class Recommended(_Strict, frozen=True):
    """What runs when nobody names a backend or a precision."""

    backend: str
    precision: str


class Manifest(_Strict, frozen=True, kw_only=True):
    """`manifest.json`: everything about a bundle but its weights.

    `labels`, `network.bias` and `operating_points` share one order. `checks`, `agreement` and
    `kept_in_fp32` are keyed by precision, `files` by name. `assumed` names what neither the model's file
    nor the user said, for which the CheXNet recipe stands. `kept_in_fp32` names the graph's nodes that
    measurement kept in FP32 at a lower precision. `skew` is None where no other geometry than this
    one is known to have been trained with.
    """

    schema_version: int
    network: Network
    labels: tuple[str, ...]
    activation: Activation
    preprocess: PreprocessSpec
    boxes: BoxSpec
    operating_points: tuple[OperatingPoint, ...]
    checks: dict[str, Check]
    normalisation: Folded | None = None
    assumed: tuple[str, ...] = ()
    skew: Skew | None = None
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
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in (MANIFEST, SIGNATURE):
                raise ValueError(f"file name {name!r}: expected a plain name in the bundle's folder")
        for precision in (*self.checks, *([self.recommended.precision] if self.recommended else [])):
            if Bundle.graph_name(precision) not in self.files:
                raise ValueError(
                    f"{precision!r} is checked or recommended, files has no {Bundle.graph_name(precision)!r}"
                )


class Bundle:
    """A bundle on disk whose manifest has been read and found sound."""

    def __init__(self, path: Path, manifest: Manifest, sha256: str, trusted: Sequence[Path] = ()) -> None:
        self.path = path
        self.manifest = manifest
        self.sha256 = sha256
        """Of `manifest.json` itself: it covers every other file, so it names the bundle."""
        self.trusted = tuple(trusted)
        """The public keys that it was opened with; they may vouch for its plans too."""

    @classmethod
    def open(cls, path: str | Path, trusted: Sequence[Path] | None = None) -> Self:
        """Read a bundle's manifest. Raises BundleError where it is missing, damaged or of another schema.

        `trusted` are public keys (see `thoraxrt.engine.trust.verify`); where they are given, `manifest.sig`
        must be by one of them, else SignatureError. It covers the manifest, which covers every other file.
        """
        path = Path(path)
        data = read_bounded(
            path / MANIFEST,
            _MANIFEST_BYTES,
            f"{path} is not a bundle; `thoraxrt export CHECKPOINT --out BUNDLE` writes one",
        )
        if trusted is not None:
            _verify(path, data, trusted)
        return cls(path, _manifest(data, path), hashlib.sha256(data).hexdigest(), trusted or ())

    @staticmethod
    def graph_name(precision: str) -> str:
        """The graph a precision executes: BF16 is arithmetic on the FP32 graph, the others have their own."""
        return f"model.{'fp32' if precision == 'bf16' else precision}.onnx"

    def read(self, name: str) -> bytes:
        """A file's bytes, verified against the manifest. Raises BundleError."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path} holds no {name}; it holds {', '.join(self.manifest.files)}")
        data = read_bounded(self.path / name, entry.size, "copy or export the bundle again")
        if FileEntry.of(data) != entry:
            raise BundleError(
                f"{self.path / name} is not the file that was exported ({len(data)} bytes, sha256 differs; "
                f"the manifest says {entry.size} bytes, {entry.sha256[:12]}...); copy or export the bundle again"
            )
        return data

    def verify(self) -> None:
        """Compare every file with the manifest. Raises BundleError at the first that differs."""
        for name in self.manifest.files:
            self.read(name)


def read_bounded(path: Path, largest: int, remedy: str) -> bytes:
    """A regular file's bytes. Raises BundleError where it is none, or larger than `largest` bytes.

    Neither a pipe nor a device in a file's place may keep the reader waiting.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path} is no regular file; {remedy}")
            if status.st_size > largest:
                raise BundleError(f"{path} has {status.st_size} bytes, expected at most {largest}; {remedy}")
            return file.read(status.st_size)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}; {remedy}") from error


def _verify(path: Path, manifest: bytes, trusted: Sequence[Path]) -> None:
    """Return where a trusted key signed the manifest. Raises SignatureError."""
    try:
        signature = read_bounded(path / SIGNATURE, 64, "`thoraxrt sign BUNDLE --key private.pem` writes it")
        verify(manifest, signature, trusted)
    except BundleError as error:
        raise SignatureError(f"{path / MANIFEST} has no trusted signature in {SIGNATURE}: {error}") from error


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
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        raise BundleError(
            f"{path / MANIFEST} is damaged: {str(error)[:300]}; copy or export the bundle again"
        ) from error
