"""The gate: what is beyond noise, what is not, and which results may be compared at all."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import mannwhitneyu

from thoraxrt.benchmarks.bench import BenchResult
from thoraxrt.benchmarks.environment import environment
from thoraxrt.benchmarks.gate import Comparison, change, compare, print_comparison
from thoraxrt.benchmarks.peers import Peer
from thoraxrt.benchmarks.roofline import Work
from thoraxrt.benchmarks.rounds import Rounds
from thoraxrt.engine.errors import RequestError


def rounds(random: np.random.Generator, ms: float, count: int = 25, noise: float = 0.05, busy: float = 1.0) -> Rounds:
    """Times as a shared machine gives them: others' load comes and goes for both, noise for each alone, now and then a lot."""
    load = busy * random.lognormal(0, 0.1, count)
    own, yard = random.lognormal(0, noise, (2, count))
    own[random.random(count) < 0.1] *= 2
    return Rounds(milliseconds=tuple((ms * load * own).tolist()), yardstick_ms=tuple((15 * load * yard).tolist()))


def test_a_fifth_slower_is_caught_and_a_busier_machine_is_not() -> None:
    random = np.random.default_rng(0)
    caught = [change("x", [rounds(random, 30)], rounds(random, 36)).verdict for _ in range(200)]
    quiet = [change("x", [rounds(random, 30)], rounds(random, 30, busy=1.04)).verdict for _ in range(1000)]
    faster = [change("x", [rounds(random, 30)], rounds(random, 20)).verdict for _ in range(100)]
    assert caught.count("slower") >= 0.95 * len(caught)
    assert "faster" not in caught
    assert "slower" not in quiet
    assert "faster" not in quiet
    assert faster.count("faster") >= 0.9 * len(faster)


def test_where_the_yardstick_does_not_agree_nothing_can_be_told() -> None:
    random = np.random.default_rng(0)
    before, after = rounds(random, 30), rounds(random, 60, busy=1.25)
    assert change("x", [before], after).interval.low > 1.5
    assert change("x", [before], after).verdict == change("x", [after], before).verdict == "cannot tell"


def test_slower_is_what_is_slower_than_every_earlier_result_whose_yardstick_agrees() -> None:
    random = np.random.default_rng(0)
    slow, fast, busy = rounds(random, 40), rounds(random, 30), rounds(random, 20, busy=2)
    regime = change("x", [fast, slow], rounds(random, 40))
    assert (regime.verdict, change("x", [fast], rounds(random, 40)).verdict) == ("cannot tell", "slower")
    assert regime.before_ms == np.median(slow.milliseconds)  # the nearest is shown
    assert change("x", [fast, slow, busy], rounds(random, 52)).verdict == "slower"
    assert change("x", [slow, fast], rounds(random, 52)).ratio < 1.5
    assert change("x", [fast, slow], rounds(random, 20)).verdict == "faster"
    assert change("x", [busy, busy], rounds(random, 40)).verdict == "cannot tell"


def test_wild_noise_cannot_tell_and_little_noise_is_the_same() -> None:
    random = np.random.default_rng(0)
    assert change("x", [rounds(random, 30, noise=1.0)], rounds(random, 30, noise=1.0)).verdict == "cannot tell"
    assert change("x", [rounds(random, 30, 40, 0.01)], rounds(random, 30, 40, 0.01)).verdict == "same"


@given(st.integers(0, 2**32 - 1), st.integers(8, 25), st.integers(8, 25))
@settings(max_examples=25, deadline=None)
def test_the_interval_holds_the_ratios_that_mann_whitneys_test_does_not_reject(seed: int, n: int, m: int) -> None:
    random = np.random.default_rng(seed)
    before, after = (Rounds(milliseconds=tuple(random.lognormal(0, 0.3, k)), yardstick_ms=(1.0,) * k) for k in (n, m))
    found = change("x", [before], after)

    def p(ratio: float) -> float:
        """Of the hypothesis that the second is the first times this ratio, the slow way."""
        scaled = np.array(before.milliseconds) * ratio
        return float(mannwhitneyu(after.milliseconds, scaled, method="asymptotic", use_continuity=False).pvalue)

    assert found.interval.low <= found.ratio <= found.interval.high
    assert p(found.interval.low * 0.999) < 0.011  # just outside: rejected at 1 %
    assert p(found.interval.high * 1.001) < 0.011
    assert p(found.ratio) > 0.8
    back = change("x", [after], before)
    assert back.interval.low == pytest.approx(1 / found.interval.high)


def test_too_few_rounds_are_refused() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(RequestError, match="x: 7 and 25 rounds; expected at least 8"):
        change("x", [rounds(random, 1, 7)], rounds(random, 1))


def result(peer: Rounds | None = None, **figures: Rounds) -> BenchResult:
    """A result of whole images, and of the network alone in another runtime."""
    peers = tuple(
        Peer(name="PyTorch", batch=1, reason=None, agreement=None, rounds=found, speed_up=1.0, interval=None)
        for found in ([peer] if peer else [])
    )
    return BenchResult(
        environment=HERE, network="n", bundle_sha256="b" * 64, backend="onnxruntime", precision="fp32", batch=1, images=1,
        image_bytes=1, loadgen="6", seconds=1, quick=False, scenarios=(), curves=(), stages=(), memory=(), work=WORK,
        peaks=None, floors=(), no_floor=None, peers=peers, turns=figures,
    )  # fmt: skip


HERE = environment()
WORK = Work(operations={"fp32": 2}, weight_bytes=1, image_bytes=1, activation_bytes=1, not_counted={})


def shown(comparison: Comparison) -> str:
    console = Console(record=True, width=160)
    print_comparison(comparison, console)
    return console.export_text()


def test_two_results_are_compared_figure_by_figure_and_read_the_same_from_json() -> None:
    random = np.random.default_rng(0)
    before = result(a=rounds(random, 30, 40), b=rounds(random, 30, 40))
    after = result(b=rounds(random, 45, 40), a=rounds(random, 30, 40))
    newer = msgspec.structs.replace(HERE, versions={**HERE.versions, "onnxruntime": "9"})
    after = msgspec.structs.replace(after, environment=newer)
    before, after = (msgspec.json.decode(msgspec.json.encode(r), type=BenchResult) for r in (before, after))
    found = compare([before], after)
    assert [(c.figure, c.verdict == "slower") for c in found.changes] == [("b", True), ("a", False)]
    assert found.regressed
    assert not compare([before, after], after).regressed
    assert found.different == compare([before, before], after).different
    assert found.different == (f"onnxruntime {HERE.versions['onnxruntime']} and 9",)
    text = shown(found)
    assert "slower" in text
    assert "different: onnxruntime" in text
    assert "another regime" in text
    assert "nothing could be told" not in text


def test_another_runtimes_slowdown_is_shown_and_is_not_ours() -> None:
    random = np.random.default_rng(0)
    before, after = (result(a=rounds(random, 30), peer=rounds(random, ms)) for ms in (30, 60))
    found = compare([before], after)
    assert [(change.figure, change.verdict) for change in found.peers] == [("network alone, PyTorch", "slower")]
    assert not found.regressed
    assert "other runtimes, not judged" in shown(found)
    assert compare([result(a=rounds(random, 30))], after).missing == ("network alone, PyTorch",)
    ran = [  # the network as the engine ran it: our own
        msgspec.structs.replace(found, peers=(msgspec.structs.replace(found.peers[0], name="onnxruntime fp32"),))
        for found in (before, after)
    ]
    assert compare(ran[:1], ran[1]).regressed


def test_that_nothing_could_be_told_is_said() -> None:
    random = np.random.default_rng(0)
    found = compare([result(a=rounds(random, 30))], result(a=rounds(random, 60, busy=1.5)))
    assert not found.regressed
    assert "nothing could be told" in shown(found)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bundle_sha256", "c" * 64, "bundle bbbbbbbbbbbb and cccccccccccc"),
        ("backend", "openvino", "backend onnxruntime and openvino"),
        ("batch", 8, "batch 1 and 8"),
        ("images", 2, "images 1 and 2"),
        ("image_bytes", 2, "their bytes 1 and 2"),
        ("turns", {}, "figures a and None"),
        ("environment", msgspec.structs.replace(HERE, cpus=99), f"CPUs {HERE.cpus} and 99"),
    ],
)
def test_what_is_not_of_the_same_thing_is_refused_unless_told(field: str, value: object, said: str) -> None:
    before = result(a=rounds(np.random.default_rng(0), 30))
    after = msgspec.structs.replace(before, **{field: value})
    with pytest.raises(RequestError, match=said):
        compare([before], after)
    with pytest.raises(RequestError, match=said):
        compare([after, before], after)
    if field != "turns":
        assert not compare([before], after, anyway=True).regressed


def test_nothing_in_common_is_refused() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(RequestError, match="no figure in common"):
        compare([result(a=rounds(random, 1))], result(b=rounds(random, 1)), anyway=True)
    with pytest.raises(RequestError, match="no earlier result"):
        compare([], result(a=rounds(random, 1)))
