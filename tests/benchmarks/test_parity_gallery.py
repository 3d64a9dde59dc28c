"""The gallery where this machine cannot draw what a server elsewhere said: the others are drawn, and the log says why."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from thoraxrt.benchmarks.parity import ParityOptions, parity
from thoraxrt.benchmarks.parity_gallery import gallery
from thoraxrt.benchmarks.receipt import Candidate, Moved
from thoraxrt.engine.bundle import Bundle
from thoraxrt.export.nih import NihDataset
from thoraxrt.export.phantoms import write_phantoms


def test_what_this_machine_cannot_run_has_no_cases_and_takes_none_from_the_others(
    sample_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_phantoms(tmp_path, 2, seed=5)
    records = {record.image: record for record in NihDataset.open(tmp_path)}
    options = ParityOptions(split="all", candidates=(("openvino", "fp32"),), serve=False, work=tmp_path / "work")
    receipt = parity(sample_bundle, tmp_path, options)
    moved = tuple(Moved(image=i, finding="Mass", probability=0.6, reference=0.4, positive=None) for i in records)
    reference, here = receipt.results
    here = msgspec.structs.replace(here, moved=moved)
    elsewhere = Candidate(backend="npu", precision="fp32", through="server")
    there = msgspec.structs.replace(here, candidate=elsewhere)
    cases = gallery(msgspec.structs.replace(receipt, results=(reference, there, here)), sample_bundle, records)
    assert [(case.image, case.candidate.name) for case in cases] == [(image, "openvino fp32") for image in records]
    (said,) = caplog.messages
    assert said.startswith("no cases of npu fp32 are drawn: unknown backend")
