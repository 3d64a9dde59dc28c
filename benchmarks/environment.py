"""What a figure was measured on: processor, memory, GPU, versions and what else ran, without whose machine it was.

Knows nothing of what is measured. Host and user names and paths are never read into it.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

import thoraxrt

__all__ = ["Environment", "Gpu", "environment", "gpus", "isa_from_flags"]

_REPOSITORY: Final = Path(__file__).resolve().parents[1]
_PACKAGES: Final = (
    "numpy", "pillow", "opencv-python-headless", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "triton",
    "tensorrt", "tensorrt-rtx-cu13-bindings", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "grpcio",
    "mlcommons-loadgen", "scipy", "scikit-learn",
)  # fmt: skip
_ISA: Final = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""What decides how fast a precision runs, as Linux calls it, on x86-64 and on Arm."""
_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU as its driver describes it; None where the driver does not say.

    Clocks in MHz and power in W as they are at that moment; `mig` "Enabled" or "Disabled".
    """

    name: str
    driver: str
    memory_mib: float | None
    sm_mhz: float | None
    memory_mhz: float | None
    celsius: float | None
    watts: float | None
    mig: str | None


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machine and the software of a run; None where this machine does not say.

    `cpus` are those that this process may use, `cpu_quota` how many at a time on average a cgroup allows.
    `load_before` is the mean number of runnable processes over the minute before (everybody's, ours too),
    `pressure_before` the share 0..1 of the ten seconds before in which some process waited for a CPU.
    `commit` names the git commit of a checkout, with "+" where files differ from it. `threads` are the environment
    variables that set how many threads there are, where set.
    """

    date: str
    thoraxrt: str
    commit: str | None
    cpu: str | None
    cpus: int
    cpu_quota: float | None
    isa: tuple[str, ...]
    memory_mib: int
    governor: str | None
    mhz: float | None
    load_before: float
    pressure_before: float | None
    system: str
    machine: str
    python: str
    versions: dict[str, str]
    threads: dict[str, str]
    gpus: tuple[Gpu, ...]

    def __str__(self) -> str:
        """In a line, for a table's title."""
        gpu = "".join(f", {gpu.name}" for gpu in self.gpus)
        return (
            f"{self.cpus} CPUs of {self.cpu or self.machine}{gpu}, {self.date[:10]}, load before {self.load_before:.1f}"
        )


def environment() -> Environment:
    """The environment now: call it before the run, so that the load is that of others."""
    cpuinfo = _text("/proc/cpuinfo") or ""
    model = re.search(r"^model name\s*: (.*)", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", cpuinfo, re.MULTILINE)
    mhz = re.search(r"^cpu MHz\s*: (.*)", cpuinfo, re.MULTILINE)
    pressure = re.search(r"^some avg10=([\d.]+)", _text("/proc/pressure/cpu") or "", re.MULTILINE)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        thoraxrt=thoraxrt.__version__,
        commit=_commit(),
        cpu=model[1] if model else None,
        cpus=len(os.sched_getaffinity(0)),
        cpu_quota=_quota(),
        isa=isa_from_flags(flags[1] if flags else ""),
        memory_mib=pages >> 20,
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        mhz=float(mhz[1]) if mhz else None,
        load_before=os.getloadavg()[0],
        pressure_before=float(pressure[1]) / 100 if pressure else None,
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        python=platform.python_version(),
        versions=_versions(),
        threads={name: os.environ[name] for name in _THREADS if name in os.environ},
        gpus=gpus(),
    )


def isa_from_flags(flags: str) -> tuple[str, ...]:
    """The instruction sets that matter to a network, of those that /proc/cpuinfo lists."""
    listed = set(flags.split())
    return tuple(name for name in _ISA if name in listed)


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that NVIDIA's driver shows; none where there is no driver."""
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw,mig.mode.current"
    said = _said_by("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits") or ""
    return tuple(_gpu([value.strip() for value in line.split(",")]) for line in said.splitlines())


def _gpu(values: Sequence[str]) -> Gpu:
    name, driver, *numbers, mig = values
    memory, sm, clock, celsius, watts = (float(n) if re.fullmatch(r"[\d.]+", n) else None for n in numbers)
    return Gpu(
        name=name,
        driver=driver,
        memory_mib=memory,
        sm_mhz=sm,
        memory_mhz=clock,
        celsius=celsius,
        watts=watts,
        mig=None if mig.startswith("[") else mig,
    )


def _quota() -> float | None:
    """The CPUs that the cgroup allows at a time; None where it sets no limit (kernel, admin-guide/cgroup-v2)."""
    if limits := _text("/sys/fs/cgroup/cpu.max"):
        quota, period = limits.split()
        return None if quota == "max" else int(quota) / int(period)
    quota = _text("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1"  # cgroup v1
    period = _text("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "1"
    return int(quota) / int(period) if int(quota) > 0 else None


def _commit() -> str | None:
    """The checkout's commit, "+" behind it where files differ; None where this is an installed package."""
    git = ("git", "-C", str(_REPOSITORY))
    if not (_REPOSITORY / ".git").exists() or (commit := _said_by(*git, "rev-parse", "HEAD")) is None:
        return None
    return commit + ("+" if _said_by(*git, "status", "--porcelain", "--untracked-files=no") else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _text(file: str) -> str | None:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return None


def _said_by(*command: str) -> str | None:
    """What a program prints; None where it is not there or refuses."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
