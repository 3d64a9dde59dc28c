"""What the tests of the CUDA engine share: the kernels, built for the host."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
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


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Tests under the software driver run in a child; see driver.py."""
    return helper("driver").run_in_child(item) or None


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    helper("driver").report(report)


@pytest.fixture
def driver() -> Iterator[Any]:
    """`driver.Driver`, the software driver; what a test leaves alive on the device is an error."""
    steering = helper("driver").Driver()
    steering.reset()
    yield steering
    steering.reset()
    assert steering.alive() == {}


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels as a shared library for the host, built once."""
    return helper("host").host_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def kernels(host_kernels: Path) -> Any:
    """`host.HostKernels`: launches of the kernels on host arrays."""
    return helper("host").HostKernels(host_kernels)
