"""What a bundle's parity receipt says to the machine that serves it: which backend and precision passed.

Reads and verifies `parity.json`, of which it takes what that needs; `thoraxrt.benchmarks.receipt` owns the rest.
"""

from __future__ import annotations

from typing import Final

import msgspec

from thoraxrt.engine.bundle import Bundle, read_bounded
from thoraxrt.engine.errors import BundleError, SignatureError
from thoraxrt.engine.trust import verify

__all__ = [
    "LARGEST_MARGIN",
    "LEAST_IMAGES",
    "RECEIPT",
    "RECEIPT_SIGNATURE",
    "RECEIPT_VERSION",
    "PassedParity",
    "read_receipt",
    "require_parity",
]

RECEIPT: Final = "parity.json"
RECEIPT_SIGNATURE: Final = "parity.sig"
RECEIPT_VERSION: Final = 1

LEAST_IMAGES: Final = 20
"""Images from which a receipt counts: with fewer, no finding was judged by itself; see `thoraxrt.export.agreement`."""

LARGEST_MARGIN: Final = 0.01
"""Of AUROC, up to which a receipt counts: twice the default. A larger one would let a model pass that is another."""

_RECEIPT_BYTES: Final = 64 << 20
"""No receipt is larger: one of ten candidates has some hundred kB."""

_REMEDY: Final = "`thoraxrt parity BUNDLE --data FOLDER --write` writes it"


class PassedParity(msgspec.Struct, frozen=True, kw_only=True):
    """Which of `candidates`, a backend and a precision each, passed, by the receipt of `date` (ISO 8601): on how many
    images, and with which margin of AUROC.
    """

    date: str
    images: int
    margin: float
    candidates: frozenset[tuple[str, str]]


class _Verdict(msgspec.Struct):
    passed: bool


class _Candidate(msgspec.Struct):
    backend: str
    precision: str
    through: str


class _Result(msgspec.Struct):
    candidate: _Candidate
    verdict: _Verdict | None  # None: it is what the others were compared with


class _Environment(msgspec.Struct):
    date: str


class _Preprocessing(msgspec.Struct):
    images: int
    identical: int


class _DicomPair(msgspec.Struct):
    input_difference: int


class _Data(msgspec.Struct):
    images: int


class _Version(msgspec.Struct):
    version: int


class _Receipt(msgspec.Struct):
    bundle: str
    data: _Data
    margin: float
    dicom: tuple[_DicomPair, ...]
    environment: _Environment
    preprocessing: _Preprocessing | None
    results: tuple[_Result, ...]


def read_receipt(bundle: Bundle) -> PassedParity | None:
    """What the receipt beside the bundle's files says; None where there is none.

    A backend and precision passed where each verdict on them, through the engine or a server, is a pass, or where they
    are the reference; none did where network inputs were not those of training. Raises BundleError where the receipt is
    damaged or of another manifest, SignatureError where the bundle was opened with trusted keys and none of them signed
    it.
    """
    path = bundle.path / RECEIPT
    if not path.is_file():
        return None
    data = read_bounded(path, _RECEIPT_BYTES, _REMEDY)
    if bundle.trusted:
        _verify(bundle, data)
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != RECEIPT_VERSION:
            raise BundleError(f"{path} has version {version}; this thoraxrt reads {RECEIPT_VERSION}: {_REMEDY} anew")
        receipt = msgspec.json.decode(data, type=_Receipt)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        raise BundleError(f"{path} is damaged: {str(error)[:300]}; {_REMEDY} anew") from error
    if receipt.bundle != bundle.sha256:
        raise BundleError(
            f"{path} is of the manifest {receipt.bundle[:12]}, this one is {bundle.sha256[:12]}; {_REMEDY} anew"
        )
    given = receipt.preprocessing
    fed = given is None or given.identical == given.images
    fed = fed and not any(pair.input_difference for pair in receipt.dicom)
    ours = [result for result in receipt.results if fed and result.candidate.through in ("engine", "server")]
    named = {(result.candidate.backend, result.candidate.precision) for result in ours}
    failed = {
        (result.candidate.backend, result.candidate.precision)
        for result in ours
        if result.verdict is not None and not result.verdict.passed
    }
    return PassedParity(
        date=receipt.environment.date,
        images=receipt.data.images,
        margin=receipt.margin,
        candidates=frozenset(named - failed),
    )


def require_parity(bundle: Bundle, backend: str, precision: str) -> None:
    """Return where the bundle's receipt says that this backend passed at this precision.

    It counts from 20 images on, and with a margin of 0.01 AUROC at most. Raises BundleError, or SignatureError, as
    `read_receipt` does, and where there is no receipt, or it does not count or does not say so.
    """
    receipt = read_receipt(bundle)
    if receipt is None:
        raise BundleError(f"{bundle.path} has no parity receipt ({RECEIPT}), and one is required; {_REMEDY}")
    if receipt.images < LEAST_IMAGES or not receipt.margin <= LARGEST_MARGIN:
        raise BundleError(
            f"{bundle.path / RECEIPT} is of {receipt.images} images and a margin of {receipt.margin:g} AUROC; expected at "
            f"least {LEAST_IMAGES} images and a margin of at most {LARGEST_MARGIN:g}; {_REMEDY} anew"
        )
    if (backend, precision) not in receipt.candidates:
        passed = ", ".join(":".join(candidate) for candidate in sorted(receipt.candidates)) or "none"
        raise BundleError(
            f"{backend}:{precision} has not passed the parity check of {receipt.date} ({bundle.path / RECEIPT}); "
            f"passed: {passed}: run one of these, or check parity again"
        )


def _verify(bundle: Bundle, data: bytes) -> None:
    try:
        signature = read_bounded(bundle.path / RECEIPT_SIGNATURE, 64, f"{_REMEDY}, --sign signs it")
        verify(data, signature, bundle.trusted)
    except BundleError as error:
        raise SignatureError(
            f"{bundle.path / RECEIPT} has no trusted signature in {RECEIPT_SIGNATURE}: {error}"
        ) from error
