"""The gate: what is beyond noise, what is not, and which results may be compared at all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import mannwhitneyu

from thoraxrt.benchmarks import rounds as module
from thoraxrt.benchmarks.bench import BenchResult
from thoraxrt.benchmarks.environment import environment
from thoraxrt.benchmarks.gate import change, compare, print_comparison
from thoraxrt.benchmarks.peers import Peer
from thoraxrt.benchmarks.roofline import Work
from thoraxrt.benchmarks.rounds import Rounds, interleaved
from thoraxrt.engine.backends import Backend, NetworkOutput, open_backend
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import RequestError


def rounds(random: np.random.Generator, ms: float, count: int = 25, noise: float = 0.05, busy: float = 1.0) -> Rounds:
    """Times as a shared machine gives them: others' load comes and goes for both, noise for each alone, now and then a lot."""
    load = busy * random.lognormal(0, 0.4, count)
    own, yard = random.lognormal(0, noise, (2, count))
    own[random.random(count) < 0.1] *= 2
    return Rounds(milliseconds=tuple((ms * load * own).tolist()), yardstick_ms=tuple((15 * load * yard).tolist()))


def test_a_fifth_slower_is_caught_and_a_busier_machine_is_not() -> None:
    random = np.random.default_rng(0)
    caught = [change("x", rounds(random, 30), rounds(random, 36)).verdict for _ in range(200)]
    quiet = [change("x", rounds(random, 30), rounds(random, 30, busy=1.25)).verdict for _ in range(1000)]
    faster = [change("x", rounds(random, 30), rounds(random, 20)).verdict for _ in range(100)]
    assert caught.count("slower") >= 0.95 * len(caught)
    assert "faster" not in caught
    assert "slower" not in quiet
    assert "faster" not in quiet
    assert faster.count("faster") >= 0.9 * len(faster)


def test_on_a_machine_that_is_far_busier_nothing_can_be_told() -> None:
    random = np.random.default_rng(0)
    before, after = rounds(random, 30), rounds(random, 60, busy=2.5)
    assert change("x", before, after).interval.low > 1.5
    assert change("x", before, after).verdict == change("x", after, before).verdict == "cannot tell"


def test_wild_noise_cannot_tell_and_little_noise_is_the_same() -> None:
    random = np.random.default_rng(0)
    assert change("x", rounds(random, 30, noise=1.0), rounds(random, 30, noise=1.0)).verdict == "cannot tell"
    assert change("x", rounds(random, 30, 40, 0.01), rounds(random, 30, 40, 0.01)).verdict == "same"


@given(st.integers(0, 2**32 - 1), st.integers(8, 25), st.integers(8, 25))
@settings(max_examples=25, deadline=None)
def test_the_interval_holds_the_ratios_that_mann_whitneys_test_does_not_reject(seed: int, n: int, m: int) -> None:
    random = np.random.default_rng(seed)
    before, after = (Rounds(milliseconds=tuple(random.lognormal(0, 0.3, k)), yardstick_ms=(1.0,) * k) for k in (n, m))
    found = change("x", before, after)

    def p(ratio: float) -> float:
        """Of the hypothesis that the second is the first times this ratio, the slow way."""
        scaled = np.array(before.milliseconds) * ratio
        return float(mannwhitneyu(after.milliseconds, scaled, method="asymptotic", use_continuity=False).pvalue)

    assert found.interval.low <= found.ratio <= found.interval.high
    assert p(found.interval.low * 0.999) < 0.011  # just outside: rejected at 1 %
    assert p(found.interval.high * 1.001) < 0.011
    assert p(found.ratio) > 0.8
    back = change("x", after, before)
    assert back.interval.low == pytest.approx(1 / found.interval.high)


def test_too_few_rounds_are_refused() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(RequestError, match="x: 7 and 25 rounds; expected at least 8"):
        change("x", rounds(random, 1, 7), rounds(random, 1))


def result(**figures: Rounds) -> BenchResult:
    """A result of the network alone."""
    peers = tuple(
        Peer(name=name, batch=1, reason=None, agreement=None, rounds=found, speed_up=1.0, interval=None)
        for name, found in figures.items()
    )
    return BenchResult(
        environment=HERE, network="n", bundle_sha256="b" * 64, backend="onnxruntime", precision="fp32", batch=1, images=1,
        image_bytes=1, loadgen="6", seconds=1, quick=False, scenarios=(), curves=(), stages=(), memory=(), work=WORK,
        peaks=None, floors=(), no_floor=None, peers=peers, turns={},
    )  # fmt: skip


HERE = environment()
WORK = Work(operations={"fp32": 2}, weight_bytes=1, image_bytes=1, activation_bytes=1, not_counted={})


def test_two_results_are_compared_figure_by_figure_and_read_the_same_from_json() -> None:
    random = np.random.default_rng(0)
    before = result(a=rounds(random, 30, 40), b=rounds(random, 30, 40), old=rounds(random, 1))
    after = result(b=rounds(random, 45, 40), a=rounds(random, 30, 40), new=rounds(random, 1))
    newer = msgspec.structs.replace(HERE, versions={**HERE.versions, "onnxruntime": "9"})
    after = msgspec.structs.replace(after, environment=newer)
    found = compare(*(msgspec.json.decode(msgspec.json.encode(r), type=BenchResult) for r in (before, after)))
    assert [(c.figure, c.verdict == "slower") for c in found.changes] == [
        ("network alone, a", False), ("network alone, b", True)]  # fmt: skip
    assert found.regressed
    assert not compare(before, before).regressed
    assert found.missing == ("network alone, new", "network alone, old")
    assert found.different == (f"onnxruntime {HERE.versions['onnxruntime']} and 9",)
    console = Console(record=True, width=160)
    print_comparison(found, console)
    text = console.export_text()
    assert "slower" in text
    assert "different: onnxruntime" in text


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("bundle_sha256", "c" * 64, "bundle bbbbbbbbbbbb and cccccccccccc"),
        ("backend", "openvino", "backend onnxruntime and openvino"),
        ("environment", msgspec.structs.replace(HERE, cpus=99), f"CPUs {HERE.cpus} and 99"),
    ],
)
def test_what_is_not_of_the_same_thing_is_refused_unless_told(field: str, value: object, said: str) -> None:
    before = result(a=rounds(np.random.default_rng(0), 30))
    after = msgspec.structs.replace(before, **{field: value})
    with pytest.raises(RequestError, match=said):
        compare(before, after)
    assert not compare(before, after, anyway=True).regressed


def test_nothing_in_common_is_refused() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(RequestError, match="no figure in common"):
        compare(result(a=rounds(random, 1)), result(b=rounds(random, 1)))


class Burning:
    """A backend that works a share longer than it needs, on the same number of threads: a planted slowdown."""

    def __init__(self, backend: Backend, share: float) -> None:
        self._backend = backend
        self._share = share
        self.name, self.precision, self.close = backend.name, backend.precision, backend.close

    def run(self, images: npt.NDArray[np.uint8]) -> NetworkOutput:
        start = time.perf_counter()
        found = self._backend.run(images)
        until = time.perf_counter() + self._share * (time.perf_counter() - start)
        while time.perf_counter() < until:
            pass
        return found


@pytest.fixture(scope="module")
def network(sample_bundle: Bundle) -> Iterator[Backend]:
    backend = open_backend(sample_bundle, "onnxruntime", "fp32")
    yield backend
    backend.close()


def test_a_real_slowdown_is_seen_on_a_real_network_and_a_repetition_is_not(
    network: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TURN_S", 0.05)
    images = np.random.default_rng(0).integers(0, 256, (1, 1, 224, 224), np.uint8)
    works: Sequence[Backend] = (network, network, Burning(network, 1.0))
    names = ("before", "again", "slow")
    found = interleaved({n: lambda w=w: w.run(images) for n, w in zip(names, works, strict=True)}, 9)  # type: ignore[misc]
    slow, again = change("x", found["before"], found["slow"]), change("x", found["before"], found["again"])
    assert slow.ratio > 1.3  # twice the work, on a machine that may be doing anything else besides
    assert again.verdict != "slower"
