"""The verdict on arrays: what fails a candidate, what passes it, and what is said of what nobody can tell."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest

from thoraxrt.benchmarks.auroc import Cohort
from thoraxrt.benchmarks.judging import Answers, Trial, broken, judged
from thoraxrt.benchmarks.receipt import Candidate, Unanswered, Verdict
from thoraxrt.engine.postprocess import Sigmoid

LABELS = ("Effusion", "Mass", "COVID")  # the last one is annotated nowhere
IMAGES = 4000
RANDOM = np.random.default_rng(0)
POSITIVE = RANDOM.random((IMAGES, 2)) < [0.5, 0.002]
LOGITS = (RANDOM.normal(0, 0.5, (IMAGES, 3)) - 2).astype(np.float32)
LOGITS[:, :2] += 0.5 * POSITIVE

TRIAL = Trial(
    images=tuple(f"{index:08d}_000.png" for index in range(IMAGES)),
    labels=LABELS,
    activation=Sigmoid(),
    cohort=Cohort(labels=LABELS[:2], positive=POSITIVE, patients=np.arange(IMAGES), resamples=100),
    margin=0.005,
)


def answers(logits: npt.NDArray[np.float32], *unanswered: Unanswered) -> Answers:
    return Answers(
        trial=TRIAL,
        candidate=Candidate(backend="openvino", precision="int8", through="engine"),
        logits=logits,
        probabilities=TRIAL.activation.probabilities(logits),
        ranked=TRIAL.activation.log_odds(logits),
        unanswered=unanswered,
    )


REFERENCE = answers(LOGITS)


def verdict(logits: npt.NDArray[np.float32], *unanswered: Unanswered) -> Verdict:
    found = judged(answers(logits, *unanswered), REFERENCE).verdict
    assert found is not None
    return found


def noisy(scale: float) -> npt.NDArray[np.float32]:
    noise = np.random.default_rng(1).normal(0, scale, LOGITS.shape)
    return (LOGITS + noise).astype(np.float32)


def test_the_reference_is_not_judged() -> None:
    for result in (judged(REFERENCE, REFERENCE), judged(REFERENCE, None)):
        assert (result.verdict, result.comparison, result.agreement, result.moved) == (None, None, None, ())
        assert [finding.finding for finding in result.aurocs] == ["Effusion", "Mass"]


def test_a_little_noise_passes_and_few_positives_are_said_to_be_few() -> None:
    found = verdict(noisy(0.002))
    assert (found.passed, found.failures) == (True, ())
    assert found.shown[0] == "no loss of 0.005 AUROC or more in Effusion"
    assert found.shown[1].startswith("answers agree within the bar: probabilities differ by 0.000")
    assert "concordance of a finding's logits at least 1.0000 (" in found.shown[1]
    assert found.not_shown == ("whether AUROC lost 0.005 or more (few patients): Mass",)


def test_what_could_have_been_shown_is_said_of_what_was_tested_only() -> None:
    found = verdict(noisy(0.15))
    assert "whether AUROC lost 0.005 or more (few patients): Mass" in found.not_shown
    (tested,) = [each for each in found.not_shown if "Effusion" in each]
    assert re.search(r"Effusion \(a loss of 0\.0\d\d would show, if it disagrees no more than this\)$", tested)


@pytest.mark.parametrize("column", [1, 2])
def test_a_finding_that_is_noise_fails_on_too_few_patients_and_without_labels(column: int) -> None:
    """Its probabilities are a hundredth of the others', its logits below all: pooled, nothing is seen."""
    rare = LOGITS.copy()
    rare[:, column] -= 5
    shuffled = rare.copy()
    shuffled[:, column] = np.random.default_rng(2).permutation(shuffled[:, column])
    result = judged(answers(shuffled), answers(rare))
    assert result.verdict is not None
    assert f"({LABELS[column]}; expected 0.995)" in result.verdict.failures[-1]


def test_too_much_noise_fails_by_agreement() -> None:
    found = verdict(noisy(0.5))
    assert not found.passed
    assert "answers are too far from the reference's: probabilities differ by" in found.failures[-1]
    assert not any("within the bar" in fact for fact in found.shown)


def test_a_loss_of_auroc_fails_where_agreement_does_not_see_it() -> None:
    """Every positive a little lower: probabilities by less than 0.02, but the ranks against the negatives change."""
    lowered = LOGITS.copy()
    lowered[POSITIVE[:, 0], 0] -= 0.06
    result = judged(answers(lowered), REFERENCE)
    assert result.agreement is not None
    assert result.agreement.meets_bar
    assert result.verdict is not None
    (failure,) = result.verdict.failures
    assert failure.startswith("Effusion: AUROC -0.0")
    assert failure.endswith("worse than the margin of 0.005 allows (shown)")


def test_an_image_without_an_answer_fails() -> None:
    found = verdict(LOGITS, Unanswered(image="00000001_000.png", error="too large"))
    assert found.failures == (
        "1 images have no answer that another candidate answered, 00000001_000.png first: too large",
    )


def test_the_cases_that_moved_most_are_the_largest_first_and_know_their_labels() -> None:
    moved = LOGITS.copy()
    moved[5, 2] += 3  # of the label that nobody annotated
    moved[7, 0] += 2
    first, second = judged(answers(moved), REFERENCE).moved
    assert (first.image, first.finding, first.positive) == ("00000005_000.png", "COVID", None)
    assert (second.image, second.finding, second.positive) == ("00000007_000.png", "Effusion", POSITIVE[7, 0])
    assert second.reference == pytest.approx(1 / (1 + np.exp(-LOGITS[7, 0])))
    assert second.probability > second.reference
    assert len(judged(answers(noisy(0.1)), REFERENCE).moved) == 12


def test_a_broken_runtime_is_a_failure() -> None:
    result = broken(REFERENCE.candidate, "its runtime broke: no such instruction")
    assert result.verdict == Verdict(
        passed=False, failures=("its runtime broke: no such instruction",), shown=(), not_shown=()
    )
