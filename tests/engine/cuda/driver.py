"""The software `libcuda.so.1` of driver.cpp: what builds it, runs tests under it, and steers it.

A test that asks for the `driver` fixture runs in a child process, which loads this library in
place of NVIDIA's; all such tests of a module share one. It is written like any other test, and
its failures show as usual:

    def test_copies(driver: Any, host_kernels: Path) -> None:
        driver.kernels(host_kernels)  # libraries that export NAME_host, if kernels are launched
        for seed in driver.seeds(20):  # the order that streams run in
            with Gpu.open(0) as gpu: ...

The fixture ends with a check that nothing of the device is left alive. What would be undefined on
a GPU ends the child with a message, which the test that ran and those after it show.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("driver.cpp")
REPORTS = "THORAXRT_DRIVER_REPORTS"  # set in the child: the file where its reports go
ALIVE = ("blocks", "pinned", "streams", "events", "graphs")

_outcomes: dict[Path, dict[str, list[Any]]] = {}
"""What the child of each test module reported, by test."""


class Driver:
    """The software driver that this process has loaded."""

    def __init__(self) -> None:
        from cuda.bindings.driver import CUresult

        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.stub_count.restype = ctypes.c_ulong
        self._functions: list[Any] = []
        for code in CUresult:
            self._library.stub_name(int(code), code.name.encode())

    def reset(self) -> None:
        """Back to two devices, their usual memory, the first seed and no failures to come."""
        self._library.stub_reset()

    def kernels(self, *libraries: Path) -> None:
        """Find kernels in these libraries from now on: NAME as NAME_host."""
        os.environ["STUB_KERNELS"] = ":".join(str(library) for library in libraries)

    def seed(self, value: int) -> None:
        """Choose the order that work runs in; of four seeds the first is lazy, the second eager."""
        self._library.stub_seed(value)

    def seeds(self, count: int) -> Iterator[int]:
        """The first seeds, each set in its turn."""
        for value in range(count):
            self.seed(value)
            yield value

    def fail(self, name: str, nth: int, code: str) -> None:
        """Let the nth call from now of a driver function fail ("ILLEGAL_ADDRESS", say), or the nth "kernel", "copy" or "fill"."""
        from cuda.bindings.driver import CUresult

        self._library.stub_fail(name.encode(), nth, int(getattr(CUresult, f"CUDA_ERROR_{code}")))

    def devices(self, count: int) -> None:
        """Have so many devices, two unless told."""
        self._library.stub_devices(count)

    def memory(self, size: int) -> None:
        """Give each device `size` bytes."""
        self._library.stub_memory(ctypes.c_size_t(size))

    def count(self, name: str) -> int:
        """What is alive (`ALIVE`, or "bytes" of device memory), else how often a function was called or a kind of work ran."""
        return int(self._library.stub_count(name.encode()))

    def alive(self) -> Counter[str]:
        """What of the device is alive."""
        gc.collect()
        return Counter({name: self.count(name) for name in ALIVE})

    def call(self, stream: int, function: Callable[[], None]) -> None:
        """Put a Python function on a stream (its handle), capturing ones too: a network's stand-in, say."""
        kept = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: function())
        self._functions.append(kept)
        assert self._library.cuLaunchHostFunc(ctypes.c_void_p(stream), kept, None) == 0


def in_child() -> bool:
    """Whether this process is one that runs tests under the software driver."""
    return REPORTS in os.environ


def compiler() -> str | None:
    """The C++ compiler that is there."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> Path:
    """Build `libcuda.so.1` in a folder of its own inside `folder`, unless this very source was; that folder."""
    made = folder / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    if not (made / "libcuda.so.1").exists():
        made.mkdir(exist_ok=True)
        unfinished = made / str(os.getpid())
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
        subprocess.run([str(compiler()), *flags, SOURCE, "-o", unfinished, "-ldl"], check=True)
        unfinished.rename(made / "libcuda.so.1")
    return made


def run_in_child(item: pytest.Item, following: pytest.Item | None) -> bool:
    """For `pytest_runtest_protocol`: report what the child said of a test that asks for `driver`; whether it does."""
    if in_child() or "driver" not in getattr(item, "fixturenames", ()) or compiler() is None:
        return False
    if item.path not in _outcomes:
        chosen = [other for other in item.session.items if other.path == item.path and "driver" in other.fixturenames]
        _outcomes[item.path] = _run(item.config, [other.nodeid for other in chosen])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in _outcomes[item.path][item.nodeid]:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the test before it left set up for this one, which does without, is not what the next one needs.
    item.session._setupstate.teardown_exact(following)
    return True


def tell_parent(config: pytest.Config, report: pytest.TestReport) -> None:
    """For `pytest_runtest_makereport`: in the child, write the report to where the parent reads it."""
    if in_child():
        data = config.hook.pytest_report_to_serializable(config=config, report=report)
        with Path(os.environ[REPORTS]).open("a") as file:
            file.write(json.dumps(data) + "\n")


def _run(config: pytest.Config, tests: list[str]) -> dict[str, list[Any]]:
    """Run tests under the library; for each, its reports, or one that says how the child ended without any."""
    assert config.cache is not None
    folder = config.cache.mkdir("driver")
    reports = folder / f"reports-{os.getpid()}"
    reports.write_text("")
    # Only Python's own output is captured: what the library says as it ends the process comes through.
    options = ["-p", "no:cacheprovider", "--tb=short", "--capture=sys"]
    command = [sys.executable, "-P", "-m", "pytest", *options, *tests]
    paths = [str(build(folder)), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), REPORTS: str(reports)}
    child = subprocess.run(command, cwd=config.rootpath, env=environment, capture_output=True, text=True)
    outcomes: dict[str, list[Any]] = {test: [] for test in tests}
    for line in reports.read_text().splitlines():
        data = json.loads(line)
        outcomes[data["nodeid"]].append(data)
    reports.unlink()
    said = f"the child ended with status {child.returncode}\n{child.stderr[:1500]}\n{child.stdout[-1500:]}"
    for test, received in outcomes.items():
        if not received or received[-1]["when"] != "teardown":
            ended = pytest.TestReport(test, (test, None, test), {}, "failed", said, "call")
            received.append(config.hook.pytest_report_to_serializable(config=config, report=ended))
            said = "not run: the child had ended, see above"
    return outcomes
