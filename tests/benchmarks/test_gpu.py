"""What `make gpu-check` makes of its parts' reports, and what it says where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thoraxrt.benchmarks import gpu
from thoraxrt.benchmarks.gpu import (
    TARGETS,
    Figure,
    Outcome,
    Said,
    cases_from_lines,
    check,
    figures_from_outcomes,
    summary,
)
from thoraxrt.benchmarks.gpu_tests import run
from thoraxrt.engine.backends.tensorrt_plan import current_device
from thoraxrt.engine.errors import BackendUnavailableError

ROOT = Path(__file__).resolve().parents[2]


def has_gpu() -> bool:
    try:
        current_device()
    except BackendUnavailableError:
        return False
    return True


@pytest.mark.parametrize(
    ("value", "better", "verdict"),
    [(0.6, "lower", "met"), (0.61, "lower", "missed"), (0.6, "higher", "met"), (0.59, "higher", "missed"),
     (None, "lower", "not measured"), (float("nan"), "lower", "missed")],
)  # fmt: skip
def test_a_figure_is_held_against_its_target(value: float | None, better: str, verdict: str) -> None:
    figure = Figure(part="speed", name="x", unit="ms", value=value, target=0.6, better=better)  # type: ignore[arg-type]
    assert figure.verdict == verdict


def test_what_a_part_did_not_say_is_not_measured_and_why(tmp_path: Path) -> None:
    said = Said(tmp_path / "speed.jsonl")
    said.figure("speed", "boxes, batch 32 x 14 maps", "ms", 0.2, floor="one launch")
    said.figure("speed", "something else", "ms", 3.0)
    said.fact(plans={"fp16": "abc"})
    with (tmp_path / "speed.jsonl").open("a") as file:
        file.write('{"name": "cut of')  # a part that was killed
    lines = gpu._lines(tmp_path / "speed.jsonl")
    outcomes = [Outcome(part="speed", seconds=100, reason="it had not ended after its 100 s", said=lines)]
    figures = {figure.name: figure for figure in figures_from_outcomes(outcomes)}
    assert list(figures)[: len(TARGETS)] == [target.name for target in TARGETS]
    assert figures["boxes, batch 32 x 14 maps"].verdict == "missed"
    assert figures["boxes, batch 32 x 14 maps"].floor == "one launch"
    assert figures["something else"].verdict == ""
    missing = figures["network alone, fp16, batch 1, p50"]
    assert (missing.verdict, missing.note) == ("not measured", "it had not ended after its 100 s")
    assert figures["ahead of PyTorch eager"].note == "its part was not run"
    found = summary(outcomes)
    assert found["facts"] == {"plans": {"fp16": "abc"}, "note": 'damaged: {"name": "cut of'}
    assert found["parts"]["speed"]["failed"] == "it had not ended after its 100 s"
    json.dumps(found)


def test_the_table_shows_an_errors_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(part="peers", seconds=1.0, reason="ImportError: [/tmp/a.so] is missing", said=[])
    gpu._print({"date": "2026-01-01", **summary([outcome])}, "a GPU")
    printed = "".join(capsys.readouterr().out.split())
    assert printed.count("ImportError:[/tmp/a.so]ismissing") == 1 + sum(t.part == "peers" for t in TARGETS)


def test_each_test_is_reported_and_one_that_takes_its_process_down_hides_no_other(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "import os, pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(record_property): record_property('bytes', 12)\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.parametrize('x', ['a b'])\n"
        "def test_dies(x): os.abort()\n"
        "def test_not_here(): pytest.skip('no GPU')\n"
        "@pytest.fixture\n"
        "def broken():\n"
        "    yield\n"
        "    raise ValueError('no way')\n"
        "def test_teardown(broken): assert 3 == 4\n"
        "def test_warns():\n"
        "    import warnings\n"
        "    warnings.warn('somebody else\\'s')\n"
    )
    said = tmp_path / "tests.jsonl"
    assert run(said, str(file)) not in (0, 5)
    tests = {test["test"].split("::")[-1]: test for test in cases_from_lines(gpu._lines(said))}
    assert {name: test["outcome"] for name, test in tests.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_dies[a b]": "crashed", "test_not_here": "skipped",
        "test_teardown": "failed", "test_warns": "passed",
    }  # fmt: skip
    assert tests["test_good"]["properties"] == {"bytes": 12}
    assert "one is not two" in tests["test_bad"]["reason"]
    assert "no GPU" in tests["test_not_here"]["reason"]
    assert "3 == 4" in tests["test_teardown"]["reason"]


def test_a_part_that_fails_or_hangs_leaves_the_others_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: `model` reports and fails, `speed` hangs, `peers` ends well."""
    package = tmp_path / "parts"
    package.mkdir()
    (package / "gpu_model.py").write_text("print('about to fail')\nraise SystemExit('no plan: wrong GPU')\n")
    (package / "gpu_speed.py").write_text(
        "import sys, time\nopen(sys.argv[1], 'w').write('{\"fact\": 1}\\n')\ntime.sleep(60)\n"
    )
    (package / "gpu_peers.py").write_text(
        "import sys\nopen(sys.argv[1], 'w').write('{\"seconds\": %s}\\n' % sys.argv[2])\n"
    )
    monkeypatch.setattr(gpu, "_MODULES", "parts")
    monkeypatch.setattr(gpu, "_BUDGET_S", {"model": 30, "speed": 1, "peers": 30})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model, speed, peers = check(("speed", "peers"), None, tmp_path / "work")
    assert model.reason == "exit status 1: no plan: wrong GPU"
    assert speed.reason == "it had not ended after its 1 s"
    assert speed.said == [{"fact": 1}]
    assert peers.reason is None
    assert peers.said == [{"seconds": 30}]


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2() -> None:
    ended = subprocess.run(
        ["make", "-s", "gpu-check", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")},
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line, *rest) = ended.stderr.splitlines()
    assert line.startswith("gpu-check needs a GPU: no NVIDIA driver here")
    assert all(other.startswith("make") for other in rest)
