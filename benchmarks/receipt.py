"""The parity receipt: what was compared with what, on which data, what each candidate showed, and whether it passed.

Owns the structure alone, which is also the file `parity.json`; what an edge box reads of it stands in
`thoraxrt.engine.receipt`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from thoraxrt.benchmarks.auroc import FindingAuroc
from thoraxrt.benchmarks.environment import Environment
from thoraxrt.benchmarks.localisation import BoxAgreement, Localisation
from thoraxrt.benchmarks.measures import Changes, Errors, Operating, Reliability
from thoraxrt.benchmarks.paired import Comparison
from thoraxrt.engine.bundle import Agreement
from thoraxrt.engine.receipt import RECEIPT_VERSION

__all__ = [
    "Candidate",
    "Cohorts",
    "Data",
    "DicomPair",
    "Moved",
    "Outcome",
    "Preprocessing",
    "Receipt",
    "Result",
    "Unanswered",
    "Verdict",
]

Cohorts = Literal["test", "train_val", "all"]
"""Which of the official lists: one of them, or whatever the data entry file has."""

Outcome = Literal["passed", "agrees", "failed"]
"""What a candidate came to. "passed": its answers agree, and of each annotated finding it is shown that no AUROC was lost;
"agrees": its answers agree, but of some findings these images cannot tell; "failed" otherwise."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the receipt's parts: immutable, and strict about unknown fields."""


class Candidate(_Strict, frozen=True, kw_only=True):
    """What gave the answers: `precision` is what was executed, `through` how it was reached.

    `torch` is the original checkpoint as PyTorch loads it, `file` a file of published predictions, whose name
    `backend` then is, without its folder, and whose precision nobody knows: "".
    """

    backend: str
    precision: str
    through: Literal["engine", "server", "torch", "file"]

    def __str__(self) -> str:
        """As it stands in tables: "openvino int8 through the server"."""
        name = f"{self.backend} {self.precision}".rstrip()
        return f"{name} through the server" if self.through == "server" else name


class Data(_Strict, frozen=True, kw_only=True):
    """The images of the comparison: all that the reference answered; a candidate is compared on those that it answered too.

    `folder` is the data set folder's name; `limit` and `sample` are how many images were asked for, the first ones or
    of patients drawn at random (seed 0). `absent` images of the split were not at hand, `unreadable` ones nobody
    could answer, by name. `sha256` is that of lines of image name, a space and the file's sha256, sorted, each ended
    by a newline; of files of predictions, that of lines of their names and sha256. `annotated` are the findings that
    have labels there, `unannotated` those that the model answers and the data set does not label: for them there is
    agreement with the reference only.
    """

    folder: str
    split: Cohorts
    limit: int | None
    sample: int | None
    images: int
    patients: int
    absent: int
    unreadable: tuple[str, ...]
    sha256: str | None
    annotated: tuple[str, ...]
    unannotated: tuple[str, ...]


class Preprocessing(_Strict, frozen=True, kw_only=True):
    """Our network input against Pillow's, called as torchvision does it, on PNG and JPEG files.

    Of `images`, spread evenly over the data, `identical` are the same in every bit; `max_difference` in gray levels,
    0..255. `different` names the first ten that are not.
    """

    images: int
    identical: int
    max_difference: int
    different: tuple[str, ...]


class DicomPair(_Strict, frozen=True, kw_only=True):
    """One image as PNG and as DICOM: largest differences in gray levels, 0..255; None where the sizes differ."""

    image: str
    dicom: str
    pixels_difference: int | None
    input_difference: int


class Unanswered(_Strict, frozen=True, kw_only=True):
    """An image that this candidate did not answer although another did, and why."""

    image: str
    error: str


class Moved(_Strict, frozen=True, kw_only=True):
    """One of the answers furthest from the reference's: probabilities in 0..1; `positive` None without a label."""

    image: str
    finding: str
    probability: float
    reference: float
    positive: bool | None


class Verdict(_Strict, frozen=True, kw_only=True):
    """Whether a candidate may stand in for the reference: it does where there are no `failures`; see `Receipt.outcome`.

    All three are sentences: why it failed, what the images showed, and what they could not show.
    """

    passed: bool
    failures: tuple[str, ...]
    shown: tuple[str, ...]
    not_shown: tuple[str, ...]


class Result(_Strict, frozen=True, kw_only=True):
    """One candidate. What compares it with the reference is None or empty for the reference itself.

    `aurocs`, `operating`, `reliability` and `comparison` are of the annotated findings; `changes`, the errors and
    `boxes` of all (`boxes`: of the reported findings, against those of `Receipt.boxes_reference`), `localisation` of
    those with annotated boxes; `moved` is largest first. `agreement` holds the errors to the bar of an export, see
    `thoraxrt.export.agreement`. A file of predictions has no logits and no operating points, and nothing of them.
    Where a runtime broke, the `verdict` says how and the rest is empty.
    """

    candidate: Candidate
    unanswered: tuple[Unanswered, ...] = ()
    aurocs: tuple[FindingAuroc, ...] = ()
    operating: tuple[Operating, ...] = ()
    reliability: tuple[Reliability, ...] = ()
    comparison: Comparison | None = None
    changes: tuple[Changes, ...] = ()
    probability_errors: Errors | None = None
    logit_errors: Errors | None = None
    agreement: Agreement | None = None
    localisation: tuple[Localisation, ...] = ()
    boxes: tuple[BoxAgreement, ...] = ()
    moved: tuple[Moved, ...] = ()
    verdict: Verdict | None = None


class Receipt(_Strict, frozen=True, kw_only=True):
    """`parity.json`. `results` has the reference first, where there is one.

    `bundle` is the sha256 of the bundle's manifest, `network` its name; None where files of predictions were compared.
    `checkpoint` is the sha256 of the original, where it was run. `margin` is the loss of AUROC that matters.
    `boxes_reference` is what boxes were compared with: the reference, or where it has none, FP32 on ONNX Runtime.
    """

    version: int = RECEIPT_VERSION
    bundle: str | None
    network: str | None
    checkpoint: str | None
    data: Data
    margin: float
    reference: Candidate | None
    boxes_reference: Candidate | None
    preprocessing: Preprocessing | None
    dicom: tuple[DicomPair, ...]
    results: tuple[Result, ...]
    environment: Environment

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong with the network's input, whoever answers: sentences; nobody passes where there is one."""
        given = self.preprocessing
        different = [pair for pair in self.dicom if pair.input_difference]
        failures = []
        if given is not None and given.identical < given.images:
            failures.append(
                f"network inputs are not those of training: {given.images - given.identical} of {given.images} are not "
                f"Pillow's in every bit, {given.different[0]} first, by up to {given.max_difference} gray levels"
            )
        if different:
            furthest = max(different, key=lambda pair: pair.input_difference)
            failures.append(
                f"network inputs of {len(different)} of {len(self.dicom)} DICOM files are not those of their PNG files, by "
                f"up to {furthest.input_difference} gray levels ({furthest.dicom}); expected the same: leave files with "
                "lossy compression or another window out"
            )
        return tuple(failures)

    def outcome(self, result: Result) -> Outcome | None:
        """Of one of `results`; None of the reference, and of all where nothing was compared."""
        if result.verdict is None:
            return None
        if self.failures or not result.verdict.passed:
            return "failed"
        findings = result.comparison.findings if result.comparison else ()
        return "passed" if findings and all(each.verdict == "non-inferior" for each in findings) else "agrees"

    @property
    def passed(self) -> bool:
        """Whether nobody failed, and network inputs are those of training."""
        return not self.failures and all(self.outcome(result) != "failed" for result in self.results)
