"""Who takes part, whose answers are wrong, and what becomes of those that break."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from thoraxrt.benchmarks import rounds
from thoraxrt.benchmarks.gpu_model import pixels
from thoraxrt.benchmarks.peers import REFERENCE, Candidate, Peer, compare_peers, engine_candidates, race
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import RequestError
from thoraxrt.engine.preprocess import network_input
from thoraxrt.export.bundle import ExportOptions, export_bundle
from thoraxrt.export.graph import Normalisation
from thoraxrt.export.sample import SAMPLE_CHECKPOINT
from thoraxrt.export.source import Given


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_TURN_S", 0.02)


@pytest.fixture(scope="module")
def inputs(sample_bundle: Bundle) -> list[npt.NDArray[np.uint8]]:
    return [network_input(image, sample_bundle.manifest.preprocess) for image in pixels(None, 3)]


def test_every_runtime_gives_the_same_answers_and_times(
    sample_bundle: Bundle, inputs: list[npt.NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", lambda network, **_: network)  # compiling takes a minute where CPUs are busy
    found = {peer.name: peer for peer in compare_peers(
        sample_bundle, inputs, batch=2, rounds=6, checkpoint=SAMPLE_CHECKPOINT)}  # fmt: skip
    expected = {
        "openvino fp32",
        REFERENCE,
        "onnxruntime, defaults",
        "openvino, defaults",
        "PyTorch eager",
        "torch.compile",
    }
    assert expected <= found.keys()
    for name in expected:
        peer = found[name]
        assert peer.reason is None
        assert peer.agreement is not None
        assert peer.agreement.mean_error < (1e-5 if "openvino, defaults" not in name else 0.01)  # that one may run BF16
        assert peer.rounds is not None
        assert len(peer.rounds.milliseconds) == 6
        assert peer.speed_up is not None
        assert peer.interval is not None
        assert peer.interval.low <= peer.speed_up <= peer.interval.high
    assert found[REFERENCE].speed_up == 1
    peers = tuple(found.values())
    assert msgspec.json.decode(msgspec.json.encode(peers), type=tuple[Peer, ...]) == peers


def test_a_peer_that_is_wrong_or_breaks_is_reported_and_not_ranked(
    sample_bundle: Bundle, inputs: list[npt.NDArray[np.uint8]]
) -> None:
    def broken() -> Candidate:
        raise OSError("no such\nlibrary")

    with contextlib.ExitStack() as opened:
        right = engine_candidates(sample_bundle, opened)[REFERENCE]
        makers: dict[str, Callable[[], Candidate]] = {
            REFERENCE: right,
            "shifted": lambda: lambda images: right()(images) + 2,
            "not normalised": lambda: lambda images: right()(255 - images),
            "broken": broken,
        }
        found = {peer.name: peer for peer in race(makers, inputs, sample_bundle, batch=1, rounds=1)}
    assert list(found) == list(makers)
    for name in ("shifted", "not normalised"):
        assert "wrong answers: probabilities differ by 0." in (found[name].reason or "")
        assert found[name].agreement is not None
    assert found["broken"].reason == "OSError: no such library"
    assert [name for name, peer in found.items() if peer.rounds] == [REFERENCE]
    assert [name for name, peer in found.items() if peer.speed_up is not None] == [REFERENCE]
    assert found[REFERENCE].interval is None  # one round


def test_a_peer_that_is_wrong_of_one_finding_alone_is_told_of_which(
    sample_bundle: Bundle, inputs: list[npt.NDArray[np.uint8]]
) -> None:
    with contextlib.ExitStack() as opened:
        right = engine_candidates(sample_bundle, opened)[REFERENCE]()
        spread = right(np.stack(inputs)).std(0)  # (C,)
        shift = np.where(spread == spread.min(), 0.15 * spread, 0)  # of the finding that varies least
        makers = {REFERENCE: lambda: right, "shifted": lambda: lambda images: right(images) + shift.astype(np.float32)}
        _, shifted = race(makers, inputs * 7, sample_bundle, batch=1, rounds=1)
    finding = sample_bundle.manifest.labels[int(spread.argmin())]
    assert f"concordance of a finding's logits at least 0.9889 ({finding}; expected 0.995)" in (shifted.reason or "")


def test_pytorch_normalises_as_the_bundle(
    inputs: list[npt.NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", lambda network, **_: network)
    given = Given(normalisation=Normalisation(mean=(0.5,) * 3, std=(0.25,) * 3))
    bundle = export_bundle(SAMPLE_CHECKPOINT, tmp_path / "a.bundle", ExportOptions(precisions=("fp32",), given=given))
    found = compare_peers(bundle, inputs, batch=1, rounds=1, checkpoint=SAMPLE_CHECKPOINT)
    agreement = {peer.name: peer.agreement for peer in found}["PyTorch eager"]
    assert agreement is not None
    assert agreement.mean_error < 1e-5


def test_pytorch_needs_a_checkpoint_and_a_batch_its_inputs(
    sample_bundle: Bundle, inputs: list[npt.NDArray[np.uint8]]
) -> None:
    found = {peer.name: peer for peer in compare_peers(sample_bundle, inputs, batch=1, rounds=1)}
    assert "needs the network's checkpoint" in (found["PyTorch eager"].reason or "")
    with pytest.raises(RequestError, match="3 inputs for batches of 4"):
        compare_peers(sample_bundle, inputs, batch=4)
