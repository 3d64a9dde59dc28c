"""The tests marked `gpu`, in a process that may die: `python -m thoraxrt.benchmarks.gpu_tests SAID SECONDS [IMAGES]`.

Reports each test as it ends, as a pytest plugin, so that a runtime that takes the process down hides no other
outcome: whoever started and never ended has crashed, and the tests after it run in the next process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from thoraxrt.benchmarks.gpu import Said

__all__ = ["run"]

_SAID: Final = "GPU_CHECK_SAID"  # in the environment of pytest's process: the file to report to
_TESTS: Final = "tests/engine/cuda/test_gpu.py"


def pytest_runtest_logstart(nodeid: str) -> None:
    """Report that a test begins."""
    Said(Path(os.environ[_SAID])).fact(test=nodeid, outcome="crashed")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Report what became of it: the last word counts, a teardown's only where it failed."""
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        Said(Path(os.environ[_SAID])).fact(
            test=report.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 2),
            reason=reason[-600:],
            properties=dict(report.user_properties),
        )


def run(said: Path, tests: str) -> int:
    """Run the tests, in another process where one takes its process down; the first exit status that is not 0."""
    statuses, done = [], set[str]()
    while True:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider",
                   "-W", "default",  # other versions of others' packages warn of other things
                   "-p", __spec__.name, *(f"--deselect={test}" for test in sorted(done)), tests]  # fmt: skip
        status = subprocess.run(command, env=os.environ | {_SAID: str(said)}, check=False).returncode
        statuses.append(status)
        started = {json.loads(line)["test"] for line in said.read_text().splitlines()} if said.exists() else set()
        if status >= 0 or started == done:  # pytest ended by itself, or died before any test
            return next((status for status in statuses if status), 0)
        done = started


if __name__ == "__main__":
    raise SystemExit(run(Path(sys.argv[1]), _TESTS))
