"""What the tests of the CUDA engine share: the kernels, built for the host."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def helper(name: str) -> ModuleType:
    """The module of that name beside this file: pytest's importlib mode puts none of them on the path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Tests under the software driver run in a child; see driver.py."""
    return helper("driver").run_in_child(item, nextitem) or None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    helper("driver").tell_parent(item.config, report)
    return report


@pytest.fixture
def driver() -> Iterator[Any]:
    """`driver.Driver`, the software driver; a test that leaves something alive on the device fails."""
    if not helper("driver").in_child():  # run_in_child had nothing to build it with
        reason = "no C++ compiler: install g++, or name one in CXX"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    steered = helper("driver").Driver()
    before = steered.alive()
    yield steered
    steered.reset()
    assert steered.alive() <= before


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as a shared library for the host, built once."""
    return helper("host").host_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def kernels(host_kernels: Path) -> Any:
    """`host.HostKernels`: launches of the kernels on host arrays."""
    return helper("host").HostKernels(host_kernels)
