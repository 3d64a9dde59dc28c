"""What is recorded of the machine, and that nothing tells whose it is."""

from __future__ import annotations

import getpass
import os
import platform
import socket
from pathlib import Path

import msgspec
import pytest

from thoraxrt.benchmarks import environment as module
from thoraxrt.benchmarks.environment import Environment, environment, gpus, isa_from_flags


def test_the_environment_is_this_machines() -> None:
    here = environment()
    assert here.cpus == len(os.sched_getaffinity(0))
    assert here.python == platform.python_version()
    assert here.memory_mib * 2**20 == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=1e-3)
    assert {"numpy", "onnxruntime"} <= here.versions.keys()
    assert here.load_before >= 0
    assert str(here).startswith(f"{here.cpus} CPUs of ")


def test_it_reads_back_and_names_no_host_user_or_path() -> None:
    here = environment()
    written = msgspec.json.encode(here)
    assert msgspec.json.decode(written, type=Environment) == here
    text = written.decode()
    for name in (socket.gethostname(), getpass.getuser(), str(Path.home()), str(Path(__file__).parents[2])):
        assert f'"{name}"' not in text
        assert f"{name}/" not in text


def test_instruction_sets_are_named_on_x86_and_on_arm() -> None:
    assert isa_from_flags("fpu avx2 avx512f avx512_vnni amx_int8") == ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    assert isa_from_flags("fp asimd asimddp i8mm bf16") == ("asimd", "asimddp", "i8mm", "bf16")


def test_a_gpu_is_read_from_its_drivers_program_and_what_it_does_not_say_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.1, 143771, 1980, 3201, 31, 75.02, Disabled'\n"
                       "echo 'Orin, 540.4, [N/A], 1300, [N/A], 44, [N/A], [N/A]'\n")  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    first, second = gpus()
    assert (first.name, first.driver, first.memory_mib, first.watts, first.mig) == (
        "NVIDIA H200", "570.1", 143771, 75.02, "Disabled")  # fmt: skip
    assert (second.name, second.memory_mib, second.sm_mhz, second.watts, second.mig) == ("Orin", None, 1300, None, None)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_cgroups_quota_is_read_in_both_versions(
    files: dict[str, str], quota: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_text", files.get)
    assert module._quota() == quota
