"""The CUDA kernels built with a host compiler, and what launches them without a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from thoraxrt.engine.cuda.kernels import Launch

SOURCE = Path(__file__).resolve().parents[3] / "engine" / "cuda" / "kernels.cu"


def host_kernels(folder: Path, *options: str) -> Path:
    """Build `kernels.cu` as a shared library in `folder`; it exports `geometry_host` and `boxes_host`."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        reason = "no C++ compiler: install g++, or name one in CXX"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    library = folder / "kernels.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC", "-shared", *options]
    subprocess.run([compiler, *flags, "-x", "c++", SOURCE, "-o", library], check=True)
    return library


class HostKernels:
    """`launch` as `Stream.launch`, at once and on the host: addresses are those of host arrays."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def launch(self, launch: Launch, *addresses: int) -> None:
        arguments = [*(ctypes.c_uint64(a) for a in addresses), *(ctypes.c_uint32(int(s)) for s in launch.scalars)]
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        three = ctypes.c_uint32 * 3
        kernel = getattr(self._library, f"{launch.kernel}_host")
        kernel.restype = None
        kernel(three(*launch.grid), three(*launch.block), ctypes.c_uint32(launch.shared_bytes), pointers)
