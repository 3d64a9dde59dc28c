"""Everything that needs a GPU, tested and measured: `make gpu-check [PART=tests|speed|peers] [IMAGES=folder]`.

    tests   pytest -m gpu, and compute-sanitizer over the kernels where it is installed
    speed   the engine's stages and the whole of it, each beside the roofline's floor and its target
    peers   the same network through PyTorch and ONNX Runtime, batch by batch in interleaved rounds

The scenario: a DenseNet-121 with seeded random weights, exported as any checkpoint is, on phantoms (or the
radiographs of a folder) of 1024 x 1024. Each part is a process of its own with a budget, 8 minutes in all: one
that fails or hangs leaves the others running, keeps what it had measured, and stands in the table with its
reason. Prints one table; writes one JSON under `benchmarks/results`. What was not measured says so.

Needs CUDA, PyTorch and, where nothing can be fetched, what `benchmarks/gpu-carry.sh` brings along: read that
for the packages, their sizes and the two calls. Without a GPU: one line, exit status 2.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from thoraxrt.benchmarks.environment import environment
from thoraxrt.engine.backends.tensorrt_plan import current_device
from thoraxrt.engine.errors import BackendUnavailableError

__all__ = ["TARGETS", "Figure", "Outcome", "Said", "cases_from_lines", "check", "figures_from_outcomes", "main"]

REPOSITORY: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = REPOSITORY / "benchmarks" / "results"
_WORK: Final = (
    REPOSITORY / "build" / "gpu-check"
)  # kept, so that a second call on the same machine need not export again
_MODULES: Final = "thoraxrt.benchmarks"  # where each part's module is
Part = Literal["tests", "speed", "peers"]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured figure; `value` None where it was not measured, and `note` says why.

    `target` with `better`: "lower" where it is the most allowed, "higher" where the least. `floor` is what the
    roofline allows, in words.
    """

    part: str
    name: str
    unit: str
    value: float | None = None
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"
    floor: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty where there is none."""
        if self.value is None:
            return "not measured"
        if self.target is None:
            return ""
        met = self.value <= self.target if self.better == "lower" else self.value >= self.target
        return "met" if met else "missed"


class Outcome(msgspec.Struct, kw_only=True):
    """How a part's process ended: `reason` None where it ran to its end, and what it had said by then."""

    part: str
    seconds: float
    reason: str | None
    said: list[dict[str, Any]]


class Said:
    """What a part has to report, a JSON object a line: written at once, so that it outlives the part's process."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def figure(self, part: str, name: str, unit: str, value: float | None, *, floor: str = "", note: str = "") -> None:
        """A figure that was measured, or why it was not."""
        self._line(msgspec.to_builtins(Figure(part=part, name=name, unit=unit, value=value, floor=floor, note=note)))

    def fact(self, **facts: Any) -> None:
        """Anything else that belongs into the JSON."""
        self._line(facts)

    def _line(self, line: dict[str, Any]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


TARGETS: Final = (  # the table of what the engine must reach on an H200
    Figure(part="speed", name="network alone, fp16, batch 1, p50", unit="ms", target=0.6),
    Figure(part="speed", name="network alone, fp16, best batch", unit="images/s", target=25_000, better="higher"),
    Figure(part="speed", name="geometry, batch 32 resident", unit="% of copy bandwidth", target=60, better="higher"),
    Figure(part="speed", name="boxes, batch 32 x 14 maps", unit="ms", target=0.1),
    Figure(part="speed", name="pixels to findings and boxes, batch 1, p50", unit="ms", target=1.0),
    Figure(part="speed", name="pixels to findings and boxes, batch 1, p99", unit="ms", target=1.5),
    Figure(part="speed", name="pixels to findings and boxes, best batch", unit="% of the slower of network and copy",
           target=90, better="higher"),
    Figure(part="peers", name="ahead of PyTorch eager", unit="x", target=1, better="higher"),
    Figure(part="peers", name="ahead of torch.compile max-autotune", unit="x", target=1, better="higher"),
    Figure(part="peers", name="ahead of ONNX Runtime CUDA", unit="x", target=1, better="higher"),
)  # fmt: skip

_BUDGET_S: Final = {"model": 150, "tests": 145, "kernels": 45, "speed": 120, "peers": 150}
"""Seconds; the model is made while the tests run, so that 460 are left to be waited for."""
_ALONE_S: Final = 320  # of a part asked for alone


def main(
    part: Annotated[Part | None, typer.Option(help="Run this part alone.")] = None,
    images: Annotated[Path | None, typer.Option(help="A folder of radiographs, used in place of phantoms.")] = None,
    commit: Annotated[str | None, typer.Option(envvar="COMMIT", help="What is being measured, without git.")] = None,
) -> None:
    """Run the tests that need a GPU and measure the engine: a table, and a JSON under benchmarks/results."""
    try:
        device = current_device()
    except BackendUnavailableError as error:
        print(f"gpu-check needs a GPU: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    here = environment()
    outcomes = check((part,) if part else ("tests", "speed", "peers"), images)
    report = {
        "scenario": "gpu-check",
        "date": here.date,
        "commit": commit or here.commit,
        "images": "phantoms" if images is None else images.name,
        "environment": msgspec.to_builtins(here),
        **summary(outcomes),
    }
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    file = RESULTS / f"gpu-check-{report['date'][:10]}-{slug}{f'-{part}' if part else ''}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    _print(report, device.name)
    print(f"wrote {file.relative_to(REPOSITORY)}")
    raise SystemExit(int(any(outcome.reason for outcome in outcomes)))


def check(parts: Iterable[Part], images: Path | None, work: Path = _WORK) -> list[Outcome]:
    """Run the parts, each in a process of its own, and the model's export beside the tests."""
    work.mkdir(parents=True, exist_ok=True)
    parts = tuple(parts)
    budgets = _BUDGET_S if len(parts) > 1 else _BUDGET_S | dict.fromkeys(parts, _ALONE_S)

    def ran(part: str) -> Outcome:
        return _ran(part, work, images, budgets[part])

    with ThreadPoolExecutor(1) as beside:
        model = beside.submit(ran, "model") if parts != ("tests",) else None
        outcomes = [ran("tests"), ran("kernels")] if "tests" in parts else []
        if model is not None:
            outcomes.append(model.result())
    return outcomes + [ran(part) for part in parts if part != "tests"]


def _ran(part: str, work: Path, images: Path | None, budget: float) -> Outcome:
    """One part's process, its output passed on with the time, ended at its budget of seconds."""
    said = work / f"{part}.jsonl"
    said.unlink(missing_ok=True)
    environment = os.environ | {
        "THORAXRT_CACHE": str(work / "cache"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", f"{_MODULES}.gpu_{part}", str(said), str(budget)]
    if images is not None:
        command.append(str(images.resolve()))
        environment["GPU_CHECK_IMAGES"] = str(images.resolve())
    start, last = time.monotonic(), ""
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what it starts ends with it: torch.compile's workers hold the pipe too
    ) as process:
        timer = threading.Timer(budget, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None  # a pipe was asked for
        for line in process.stdout:
            last = line.strip() or last
            print(f"{time.monotonic() - start:5.0f} s {part:9} {line.rstrip()}", flush=True)
        status = process.wait()
        timer.cancel()
    seconds = time.monotonic() - start
    reason = None
    if status:
        reason = (
            f"it had not ended after its {budget:.0f} s" if seconds >= budget else f"exit status {status}: {last[:300]}"
        )
    return Outcome(part=part, seconds=round(seconds, 1), reason=reason, said=_lines(said))


def _lines(file: Path) -> list[dict[str, Any]]:
    """What a part wrote, a JSON object a line; a process that was killed may have left half of the last."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            lines.append({"note": f"damaged: {line[:80]}"})
    return lines


def cases_from_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each test as it was last spoken of (see `gpu_tests`); a failed teardown does not hide a failed call."""
    cases: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "test" in line and cases.get(line["test"], {}).get("outcome") != "failed":
            cases[line["test"]] = line
    return list(cases.values())


def figures_from_outcomes(outcomes: Iterable[Outcome]) -> list[Figure]:
    """The targets' figures first, measured or not and why, then whatever else was measured."""
    outcomes = list(outcomes)
    measured = [
        msgspec.convert(line, Figure)
        for outcome in outcomes
        for line in outcome.said
        if "unit" in line and "name" in line
    ]
    reasons = {outcome.part: outcome.reason or "its part did not report it" for outcome in outcomes}
    by_name = {figure.name: figure for figure in measured}
    expected = []
    for target in TARGETS:
        found = by_name.pop(target.name, None)
        note = reasons.get(target.part, "its part was not run")
        expected.append(
            msgspec.structs.replace(target, note=note)
            if found is None
            else msgspec.structs.replace(target, value=found.value, floor=found.floor, note=found.note)
        )
    return expected + [figure for figure in measured if figure.name in by_name]


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """What the JSON holds of the parts: how each ended, the tests, the figures, and what else they said."""
    return {
        "parts": {o.part: {"seconds": o.seconds, "failed": o.reason} for o in outcomes},
        "figures": [
            msgspec.to_builtins(figure) | {"verdict": figure.verdict} for figure in figures_from_outcomes(outcomes)
        ],
        "tests": cases_from_lines(line for o in outcomes for line in o.said),
        "facts": {
            key: value
            for o in outcomes
            for line in o.said
            if "test" not in line and "unit" not in line
            for key, value in line.items()
        },
    }


def _print(report: dict[str, Any], device: str) -> None:
    console = Console(width=150, markup=False)  # a path in an error's text, [/tmp/x], is no markup
    counts = Counter(test["outcome"] for test in report["tests"])
    table = Table(*("what", "measured", "target", "verdict", "floor", "note"), title=f"{device}, {report['date']}")
    for figure in report["figures"]:
        value, target = figure["value"], figure["target"]
        table.add_row(
            figure["name"],
            "-"
            if value is None
            else f"{value:,.3g} {figure['unit']}"
            if value < 1000
            else f"{value:,.0f} {figure['unit']}",
            "" if target is None else f"{'<=' if figure['better'] == 'lower' else '>='} {target:,g}",
            figure["verdict"],
            figure["floor"],
            figure["note"][:70],
        )
    console.print(table)
    if counts:
        console.print("tests: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    for test in report["tests"]:
        if test["outcome"] != "passed":
            console.print(f"  {test['outcome']}: {test['test']}: {test.get('reason', '')[-300:]}")
    for part, ended in report["parts"].items():
        if ended["failed"]:
            console.print(f"{part} failed after {ended['seconds']} s: {ended['failed']}")


if __name__ == "__main__":
    typer.run(main)
