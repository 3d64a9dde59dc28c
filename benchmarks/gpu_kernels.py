"""The engine's own kernels on a batch that lies on the device: run alone, and held against the CPU path.

`python -m thoraxrt.benchmarks.gpu_kernels` runs both kernels over odd sizes and compares; with a file to
report to, it does so under compute-sanitizer's memcheck and racecheck. Imports neither torch nor TensorRT.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from thoraxrt.benchmarks.gpu import Said
from thoraxrt.engine.boxes import BoxSpec, Region, regions_from_cam
from thoraxrt.engine.cuda.cuda import Gpu, Memory, Module, Stream
from thoraxrt.engine.cuda.kernels import (
    IMAGE,
    Launch,
    boxes_launch,
    describe,
    geometry_launch,
    regions_from_results,
    resampling,
    results_dtype,
    source,
)
from thoraxrt.engine.preprocess import PreprocessSpec, Shorter, network_input

__all__ = ["DeviceBatch", "differences", "fewest_bytes", "odd_batch"]

_REGIONS_A_MAP: Final = 32  # more than there are, also of several launches whose count is not reset in between


class DeviceBatch:
    """N radiographs and their CAMs on the device, every map wanted and reported.

    `images` are uint8 `(H, W)` of any sizes, `cams` float32 `(N, C, h, w)`. It owns its memory.
    """

    def __init__(
        self,
        gpu: Gpu,
        module: Module,
        images: Sequence[npt.NDArray[np.uint8]],
        cams: npt.NDArray[np.float32],
        spec: PreprocessSpec,
        boxes: BoxSpec,
    ) -> None:
        count, findings, height, width = cams.shape
        size = spec.input_size
        self._gpu, self._stream = gpu, gpu.stream()
        self._memory: list[Memory] = []
        plans = [resampling(spec.geometry(image.shape[1], image.shape[0])) for image in images]
        table = np.zeros(count, IMAGE)
        for index, (image, plan) in enumerate(zip(images, plans, strict=True)):
            table[index] = describe(
                plan, address=self._upload(plan.data), pixels=self._upload(image), pitch=image.shape[1]
            )
        self._results = results_dtype(count, findings, _REGIONS_A_MAP * count * findings)
        self._input_shape = (count, 1, size, size)
        self._input = self._room(count * size * size)
        self._found = self._room(self._results.itemsize)
        fields = self._results.fields
        assert fields is not None  # results_dtype names them
        into = [self._found.address + fields[name][1] for name in ("count", "flags", "regions")]
        images_at = self._upload(table)
        self._geometry = geometry_launch(count, size, min(plan.columns for plan in plans))
        self._geometry_addresses = (images_at, self._input.address, into[0])
        threshold = np.full(findings, boxes.threshold, np.float32)
        self._boxes = boxes_launch(
            *(count, findings, height, width, size),
            capacity=_REGIONS_A_MAP * count * findings,
            min_area=boxes.min_area,
        )
        self._boxes_addresses = (
            images_at,
            self._upload(np.zeros((count, findings), np.float32)),
            self._upload(cams),
            self._upload(np.full(findings, -np.inf, np.float32)),
            self._upload(threshold),
            self._upload(np.ones((count, findings), np.uint8)),
            *into,
        )
        self._kernels = {name: module.kernel(name) for name in ("geometry", "boxes")}

    def geometry(self, stream: Stream) -> None:
        """Put the geometry kernel on a stream."""
        self._launch(stream, self._geometry, self._geometry_addresses)

    def boxes(self, stream: Stream) -> None:
        """Put the boxes kernel on a stream; it adds to the count that geometry sets to 0."""
        self._launch(stream, self._boxes, self._boxes_addresses)

    def reset(self, stream: Stream) -> None:
        """Set the count of regions to 0, as geometry does before boxes."""
        stream.fill(self._found.address, 0, 4)

    def _launch(self, stream: Stream, launch: Launch, addresses: Sequence[int]) -> None:
        kernel = self._kernels[launch.kernel]
        stream.launch(kernel, launch.grid, launch.block, launch.shared_bytes, *addresses, *launch.scalars)

    def run(self) -> tuple[npt.NDArray[np.uint8], list[tuple[tuple[int, Region], ...]], npt.NDArray[np.uint8]]:
        """Both kernels once, over poisoned memory: network inputs `(N, 1, S, S)`, regions, flags `(N, C)`."""
        for memory in (self._input, self._found):
            self._stream.fill(memory.address, 0xA5, memory.size)
        self.geometry(self._stream)
        self.boxes(self._stream)
        inputs = self._download(self._input).reshape(self._input_shape)
        results = self._download(self._found).view(self._results)[0]
        return inputs, regions_from_results(results), results["flags"].copy()

    def close(self) -> None:
        """Free the memory; twice is harmless."""
        for memory in self._memory:
            memory.close()
        self._stream.close()

    def _room(self, size: int) -> Memory:
        self._memory.append(self._gpu.memory(size))
        return self._memory[-1]

    def _upload(self, array: npt.NDArray[np.generic]) -> int:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        memory = self._room(-(-len(data) // 256) * 256)
        with self._gpu.pinned(len(data)) as pinned:
            pinned.array[:] = data
            self._stream.to_device(memory.address, pinned.address, len(data))
            self._stream.synchronize()
        return memory.address

    def _download(self, memory: Memory) -> npt.NDArray[np.uint8]:
        with self._gpu.pinned(memory.size) as pinned:
            self._stream.to_host(pinned.address, memory.address, memory.size)
            self._stream.synchronize()
            return pinned.array.copy()


def fewest_bytes(images: Sequence[npt.NDArray[np.uint8]], spec: PreprocessSpec) -> int:
    """What geometry must move at least: each source byte that the crop keeps read once, each result written once."""
    total = 0
    for image in images:
        g = spec.geometry(image.shape[1], image.shape[0])
        sides = ((g.source_width, g.resized_width), (g.source_height, g.resized_height))
        # A shrinking pixel's window is twice as wide as its distance to the next one.
        kept = [min(side, int(np.ceil((g.size + 1) * max(side / resized, 1.0)))) for side, resized in sides]
        total += kept[0] * kept[1] + g.size * g.size
    return total


def differences(
    batch: DeviceBatch,
    images: Sequence[npt.NDArray[np.uint8]],
    cams: npt.NDArray[np.float32],
    spec: PreprocessSpec,
    boxes: BoxSpec,
) -> list[str]:
    """Where a run of the batch differs from Pillow and from `thoraxrt.engine.boxes`, in words; at best nothing."""
    inputs, regions, flags = batch.run()
    wrong = []
    for index, image in enumerate(images):
        expected = network_input(image, spec)
        if (off := int((inputs[index] != expected).sum())) > 0:
            wrong.append(f"image {index} of {image.shape}: {off} pixels differ from Pillow's")
        for finding, cam in enumerate(cams[index]):
            if flags[index, finding]:
                continue  # the caller takes regions_from_cam for it, so there is nothing to compare
            found = [region for number, region in regions[index] if number == finding]
            if found != regions_from_cam(cam, spec.input_size, boxes.threshold, boxes.min_area):
                wrong.append(f"map {finding} of image {index}: other regions than on the CPU")
    return wrong


def odd_batch(seed: int) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """Four images of odd sizes, and CAMs of noise, plateaus and a flat map, 3 findings each."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, tuple(rng.integers(100, 700, 2)), np.uint8) for _ in range(4)]
    cams = rng.normal(size=(4, 3, 7, 7)).astype(np.float32)
    cams[1] = np.round(cams[1])
    cams[2, 0] = 1.5
    return images, cams


def _compare() -> None:
    spec, boxes = PreprocessSpec(resize=Shorter(pixels=128), crop=112), BoxSpec(min_area=0.0)
    with Gpu.open(0) as gpu:
        images, cams = odd_batch(0)
        batch = DeviceBatch(gpu, gpu.module(source()), images, cams, spec, boxes)
        if wrong := differences(batch, images, cams, spec, boxes):
            raise SystemExit("; ".join(wrong[:3]))


def _sanitize(said: Said) -> None:
    """Run `_compare` under compute-sanitizer's tools, and report what each one says."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        said.fact(compute_sanitizer="not measured: it is not installed")
        return
    failed = []
    # Not the boxes kernel for racecheck: its union-find reads parents that others lower, which is right and flagged.
    for tool, only in (("memcheck", ()), ("racecheck", ("--kernel-name", "kernel_substring=geometry"))):
        start = time.monotonic()
        command = [program, "--tool", tool, *only, "--error-exitcode", "9", sys.executable, "-m", __spec__.name]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        verdict = next((line for line in reversed(ended.stdout.splitlines()) if "SUMMARY" in line), ended.stdout[-300:])
        print(f"{tool}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
        said.fact(**{f"compute_sanitizer_{tool}": f"exit status {ended.returncode}: {verdict.strip('= ')}"})
        if ended.returncode:
            failed.append(f"{tool}: {verdict.strip('= ')}")
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _sanitize(Said(Path(sys.argv[1])))
    else:
        _compare()
