"""One candidate's answers against the reference's: the statistics side by side, and the verdict.

Owns what a pass is. Works on arrays; where answers came from is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from thoraxrt.benchmarks.auroc import Cohort, Ranking, finding_aurocs
from thoraxrt.benchmarks.measures import errors, reliability
from thoraxrt.benchmarks.paired import Comparison, Difference, compare
from thoraxrt.benchmarks.receipt import Candidate, Moved, Result, Unanswered, Verdict
from thoraxrt.engine.bundle import Agreement
from thoraxrt.engine.postprocess import Activation
from thoraxrt.export.agreement import agreement, agreement_text

__all__ = ["Answers", "Trial", "broken", "judged"]

_MOVED: Final = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What everybody is compared on: N images and C labels, of which `cohort` has those that are annotated, in order.

    `margin` is the loss of AUROC that matters.
    """

    images: tuple[str, ...]
    labels: tuple[str, ...]
    activation: Activation
    cohort: Cohort
    margin: float

    @cached_property
    def columns(self) -> list[int]:
        """Which labels are annotated."""
        return [self.labels.index(label) for label in self.cohort.labels]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """One candidate's on a trial: float32 `logits`, float64 `probabilities` in 0..1, and what is ranked, all `(N, C)`.

    `ranked` are log-odds, or where only probabilities are known, these.
    """

    trial: Trial
    candidate: Candidate
    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float64]
    ranked: npt.NDArray[np.float64]
    unanswered: tuple[Unanswered, ...] = ()

    @cached_property
    def ranking(self) -> Ranking:
        """Of the annotated findings."""
        return self.trial.cohort.ranking(self.ranked[:, self.trial.columns])


def judged(answers: Answers, reference: Answers | None) -> Result:
    """What the answers are worth, and where there is another reference, whether they may stand in for its.

    A candidate passes where it has answered every image that another did, no finding is inferior (see `paired.compare`)
    and its answers agree with the reference's by the bar of an export, pooled and of each finding by itself (see
    `thoraxrt.export.agreement`; AUROC is left to the paired test). So a verdict stands on few positives too: agreement
    is seen on every image. Who changed side is not judged: no error of a tenth of the logits' spread moves many.
    """
    trial = answers.trial
    positive, columns = trial.cohort.positive, trial.columns
    alone = Result(
        candidate=answers.candidate,
        unanswered=answers.unanswered,
        aurocs=finding_aurocs(answers.ranking),
        reliability=reliability(trial.cohort.labels, positive, answers.probabilities[:, columns]),
    )
    if reference is None or reference is answers:
        return alone
    comparison = compare(answers.ranking, reference.ranking, trial.margin)
    agreed = agreement(answers.logits, reference.logits, trial.activation, trial.labels, None)
    log_odds = [trial.activation.log_odds(each.logits) for each in (answers, reference)]
    return msgspec.structs.replace(
        alone,
        comparison=comparison,
        probability_errors=errors(answers.probabilities, reference.probabilities),
        logit_errors=errors(*log_odds),
        agreement=agreed,
        moved=tuple(_moved(answers, reference)),
        verdict=_verdict(comparison, agreed, answers.unanswered),
    )


def broken(candidate: Candidate, reason: str) -> Result:
    """What a candidate comes to that nothing can be compared of."""
    return Result(
        candidate=candidate,
        verdict=Verdict(passed=False, failures=(reason,), shown=(), not_shown=()),
    )


def _moved(answers: Answers, reference: Answers) -> Iterator[Moved]:
    trial = answers.trial
    differences = np.abs(answers.probabilities - reference.probabilities)  # (N, C)
    for place in np.argsort(-differences, axis=None, kind="stable")[:_MOVED].tolist():
        row, column = divmod(place, len(trial.labels))
        if not differences[row, column]:
            return
        label = trial.labels[column]
        yield Moved(
            image=trial.images[row],
            finding=label,
            probability=float(answers.probabilities[row, column]),
            reference=float(reference.probabilities[row, column]),
            positive=bool(trial.cohort.positive[row, trial.cohort.labels.index(label)])
            if label in trial.cohort.labels
            else None,
        )


# --- the verdict -----------------------------------------------------------------------------------------


def _verdict(comparison: Comparison, agreed: Agreement, unanswered: Sequence[Unanswered]) -> Verdict:
    failures = [*_inferior(comparison), *_disagreement(agreed)]
    if unanswered:
        failures.append(
            f"{len(unanswered)} images have no answer that another candidate answered, {unanswered[0].image} first: "
            f"{unanswered[0].error}"
        )
    shown = [*_non_inferior(comparison)]
    if agreed.meets_bar:
        shown.append(f"answers agree within the bar: {agreement_text(agreed)}")
    return Verdict(
        passed=not failures, failures=tuple(failures), shown=tuple(shown), not_shown=tuple(_untold(comparison))
    )


def _inferior(comparison: Comparison) -> Iterator[str]:
    for finding in comparison.findings:
        if finding.verdict == "inferior":
            change = f"{finding.difference.value:+.4f}" if finding.difference else "undefined"
            yield (
                f"{finding.finding}: AUROC {change}, worse than the margin of {comparison.margin:g} allows "
                f"({finding.reason})"
            )


def _disagreement(agreed: Agreement) -> Iterator[str]:
    if not agreed.meets_bar:
        yield f"answers are too far from the reference's: {agreement_text(agreed)}"


def _non_inferior(comparison: Comparison) -> Iterator[str]:
    names = [finding.finding for finding in comparison.findings if finding.verdict == "non-inferior"]
    if names:
        yield f"no loss of {comparison.margin:g} AUROC or more in {', '.join(names)}"


def _untold(comparison: Comparison) -> Iterator[str]:
    """A sentence per reason, with the smallest loss that the images could have shown."""
    open_ones = [finding for finding in comparison.findings if finding.verdict == "cannot tell"]
    for reason, findings in groupby(sorted(open_ones, key=lambda each: each.reason), key=lambda each: each.reason):
        names = ", ".join(_detectable(finding) for finding in findings)
        yield f"whether AUROC lost {comparison.margin:g} or more ({reason}): {names}"


def _detectable(finding: Difference) -> str:
    if finding.detectable is None:
        return finding.finding
    return f"{finding.finding} (a loss of {finding.detectable:.3f} would show, if it disagrees no more than this)"
