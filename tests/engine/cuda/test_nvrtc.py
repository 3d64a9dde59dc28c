"""NVRTC compiles the kernels for every GPU we name, without a GPU: no spills, no contraction, small blocks."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from thoraxrt.engine.cuda.cuda import cubin_from_source
from thoraxrt.engine.cuda.kernels import boxes_launch, geometry_launch, source

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-core is not installed")

TARGETS = ("sm75", "sm86", "sm87", "sm89", "sm90", "sm120")
_FLAGS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
"""As `cubin_from_source` compiles."""


class Compiled(NamedTuple):
    log: str
    ptx: str


def compiled(target: str) -> Compiled:
    """NVRTC's log with what ptxas says of each kernel, and the PTX."""

    def check(result: tuple) -> tuple:
        assert result[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS, log() if program else result[0]
        return result[1:]

    def log() -> str:
        size = nvrtc.nvrtcGetProgramLogSize(program)[1]
        text = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, text)
        return text.decode().rstrip("\0")

    program = None
    (program,) = check(nvrtc.nvrtcCreateProgram(source().encode(), b"kernels.cu", 0, [], []))
    options = [f"--gpu-architecture={target.replace('sm', 'sm_')}", *_FLAGS, "--ptxas-options=-v"]
    check(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))
    (size,) = check(nvrtc.nvrtcGetPTXSize(program))
    ptx = bytearray(size)
    check(nvrtc.nvrtcGetPTX(program, ptx))
    found = Compiled(log(), ptx.decode().rstrip("\0"))
    check(nvrtc.nvrtcDestroyProgram(program))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_compile_without_spills(target: str) -> None:
    log, ptx = compiled(target)
    resources = dict(re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.DOTALL))
    assert set(resources) == {"geometry", "boxes"}
    threads = {
        launch.kernel: launch.block[0]
        for launch in (geometry_launch(32, 224), boxes_launch(1, 1, 7, 7, 4096, capacity=1))
    }
    for kernel, said in resources.items():
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack.* (\d+) bytes spill stores, (\d+) bytes", said).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", said)[1])
        print(f"{target} {kernel}: {registers} registers, stack {stack}, spilled {stores} + {loads} bytes")
        assert (stack, stores, loads) == (0, 0, 0)
        assert registers * threads[kernel] <= 65536  # of a multiprocessor: else no block would start
    assert "fma." not in ptx  # division's own are made later, from div.rn
    assert "div.rn.f32" in ptx
    assert not re.search(r"\.ftz|div\.(full|approx)", ptx)
    assert ptx.count("dp4a") > 3


@pytest.mark.parametrize("target", TARGETS)
def test_the_seam_compiles_them(target: str) -> None:
    assert cubin_from_source(source(), target).startswith(b"\x7fELF")
