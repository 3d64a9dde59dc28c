"""The bar: what meets it, what does not, and what too few images cannot tell."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from thoraxrt.cli.export import _show_export
from thoraxrt.cli.info import _show_info
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.postprocess import Sigmoid
from thoraxrt.export.agreement import agreement

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(200, 3)).astype(np.float32)
POSITIVE = RANDOM.random((200, 3)) < [0.5, 0.05, 0.0]  # enough, too few, none
LABELS = ("Effusion", "Mass", "Hernia")


def test_equal_answers_meet_the_bar_and_too_few_images_tell_nothing() -> None:
    result = agreement(LOGITS, LOGITS, Sigmoid(), LABELS, POSITIVE)
    assert result.meets_bar
    assert (result.mean_error, result.p99_error, result.rank_correlation) == (0, 0, pytest.approx(1))
    assert {finding.finding: finding.verdict for finding in result.findings} == {
        "Effusion": "within",
        "Mass": "cannot tell",
    }


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (np.full((200, 3), 0.06), "mean_error"),  # everywhere, a little
        (np.where(RANDOM.random((200, 3)) < 0.02, 1.0, 0.0), "p99_error"),  # here and there, a lot
        (np.full((200, 3), np.nan), "mean_error"),
    ],
)
def test_each_error_misses_the_bar(error: npt.NDArray[np.float64], why: str) -> None:
    result = agreement((LOGITS + error).astype(np.float32), LOGITS, Sigmoid(), LABELS, None)
    assert not result.meets_bar
    assert getattr(result, why) > {"mean_error": 0.01, "p99_error": 0.03}[why]


def test_a_changed_order_misses_the_bar_where_probabilities_hardly_move() -> None:
    low = (LOGITS * 0.01 - 8).astype(np.float32)  # probabilities of 0.0003
    result = agreement(low[::-1], low, Sigmoid(), LABELS, None)
    assert result.mean_error < 1e-4
    assert result.rank_correlation < 0.995
    assert not result.meets_bar


FOURTEEN = (*"abcdefghijklm", "Hernia")
RARE = RANDOM.normal(size=(76, 14)).astype(np.float32)
RARE[:, 13] = RARE[:, 13] / 4 - 6  # probabilities of 0.002, ranks below all others


def test_a_rare_finding_that_is_noise_misses_the_bar_though_the_pooled_measures_do_not_see_it() -> None:
    shuffled = RARE.copy()
    shuffled[:, 13] = RANDOM.permutation(shuffled[:, 13])
    result = agreement(shuffled, RARE, Sigmoid(), FOURTEEN, None)
    assert result.mean_error < 0.001
    assert result.p99_error < 0.01
    assert result.rank_correlation > 0.999
    assert [result.concordance[label] for label in FOURTEEN[:13]] == [1] * 13
    assert result.concordance["Hernia"] < 0.9
    assert not result.meets_bar
    few = agreement(shuffled[:19], RARE[:19], Sigmoid(), FOURTEEN, None)
    assert few.concordance == {}
    assert few.least_concordance is None


def test_what_is_printed_names_the_finding_that_missed_the_bar(
    sample_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    shifted = RARE.copy()
    shifted[:, 13] += 0.04
    missed = agreement(shifted, RARE, Sigmoid(), FOURTEEN, None)
    manifest = msgspec.structs.replace(sample_bundle.manifest, agreement={"int8": missed})
    bundle = Bundle(sample_bundle.path, manifest, sample_bundle.sha256)
    _show_export(bundle)
    assert " (Hernia; expected 0.995)" in capsys.readouterr().out
    _show_info(bundle, {}, [], "none")
    assert f"{missed.concordance['Hernia']:.4f} (Hernia)" in capsys.readouterr().out


@pytest.mark.parametrize(("scale", "shift", "meets"), [(1, 0.01, True), (1, 0.04, False), (0.85, 0, False)])
def test_a_rare_findings_shift_or_scale_counts_as_its_noise_does(scale: float, shift: float, meets: bool) -> None:
    changed = RARE.copy()
    changed[:, 13] = scale * (changed[:, 13] + 6) - 6 + shift
    result = agreement(changed, RARE, Sigmoid(), FOURTEEN, None)
    ours, theirs = changed[:, 13].astype(float), RARE[:, 13].astype(float)
    by_hand = 1 - ((ours - theirs) ** 2).mean() / (ours.var() + theirs.var() + (ours.mean() - theirs.mean()) ** 2)
    assert result.concordance["Hernia"] == pytest.approx(by_hand, abs=1e-9)
    assert result.meets_bar == meets


def test_a_constant_answer_misses_the_bar_with_a_correlation_that_json_can_hold() -> None:
    result = agreement(np.zeros_like(LOGITS), LOGITS, Sigmoid(), LABELS, None)
    assert (result.rank_correlation, *result.concordance.values()) == (0, 0, 0, 0)
    assert not result.meets_bar


def test_a_finding_whose_auroc_moves_misses_the_bar() -> None:
    moved = LOGITS.copy()
    moved[POSITIVE[:, 0], 0] += 0.05  # each probability by 0.0125 at most
    result = agreement(moved, LOGITS, Sigmoid(), LABELS, POSITIVE)
    (effusion,) = [finding for finding in result.findings if finding.finding == "Effusion"]
    assert result.p99_error < 0.03
    assert effusion.verdict == "beyond"
    assert effusion.low < effusion.difference < effusion.high
    assert not result.meets_bar


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_auroc_and_difference_are_scikit_learns(seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    reference = random.normal(size=(60, 1)).astype(np.float32)
    logits = (reference + 0.3 * random.normal(size=(60, 1))).astype(np.float32)
    if ties:
        logits, reference = logits.round(), reference.round()
    positive = random.random((60, 1)) < 0.4
    positive[:2, 0] = True, False
    (finding,) = agreement(logits, reference, Sigmoid(), ("Mass",), positive).findings
    assert finding.auroc == pytest.approx(roc_auc_score(positive[:, 0], logits[:, 0]))
    assert finding.auroc - finding.difference == pytest.approx(roc_auc_score(positive[:, 0], reference[:, 0]))
    assert finding.low <= finding.high
    assert (finding.positives, finding.negatives) == (positive.sum(), (~positive).sum())
