"""What decoding in worker processes costs beside threads: `python -m thoraxrt.benchmarks.decoding [FOLDER]`.

The scenario: files in, radiographs out, by the same number of workers each, in one process that does nothing else.
The floor of a latency is `decode` called directly, the ceiling of a rate that floor on every worker, or on every CPU
where those are fewer. All take their turn in each round, so that differences hold on a shared machine.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Final

import imagecodecs
import msgspec
import numpy as np
import typer
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1
from rich.console import Console
from rich.progress import track
from rich.table import Table

from thoraxrt.benchmarks.environment import environment
from thoraxrt.engine.decode import Decoder, ThreadDecoder, decode
from thoraxrt.engine.engine import image_files, read_image
from thoraxrt.engine.errors import ImageError
from thoraxrt.export.phantoms import phantom
from thoraxrt.server.decoding import ProcessDecoder

__all__ = ["compare_decoders", "main"]

_FILES: Final = 48  # of a kind
_PHANTOMS: Final = 16
_ROUNDS: Final = 7

_ROWS: Final = (
    ("direct_ms", "decode alone, ms", 2),
    ("threads_ms", "one file by threads, ms", 2),
    ("processes_ms", "one file by processes, ms", 2),
    ("added_ms", "added by processes, ms", 2),
    ("ceiling_per_s", "ceiling, files/s", 1),
    ("threads_per_s", "all files by threads, files/s", 1),
    ("processes_per_s", "all files by processes, files/s", 1),
    ("ratio", "processes to threads", 3),
)


def compare_decoders(kind: str, files: Sequence[bytes], workers: int, rounds: int = _ROUNDS) -> dict[str, Any]:
    """Threads against processes on `files` of one kind.

    Latencies are medians over files and rounds of one file at a time, in milliseconds; `added_ms` the median of each
    file's difference. Rates are medians over rounds of all files at once; `ratio` the median of each round's.
    """
    with ThreadDecoder(workers) as threads, ProcessDecoder(workers) as processes:
        for decoder in (threads, processes):
            _all(decoder, files)  # not timed: every worker starts, and has its memory
        direct: list[float] = []
        single: dict[str, list[float]] = {"threads": [], "processes": []}
        rates: dict[str, list[float]] = {"threads": [], "processes": []}
        for _ in track(range(rounds), f"Measuring {kind}", console=Console(stderr=True)):
            for data in files:
                direct.append(_seconds(lambda data=data: decode(data)))  # type: ignore[misc]
                for name, decoder in (("threads", threads), ("processes", processes)):
                    single[name].append(_seconds(lambda data=data, d=decoder: d.submit(data).result()))  # type: ignore[misc]
            for name, decoder in (("threads", threads), ("processes", processes)):
                rates[name].append(len(files) / _seconds(lambda decoder=decoder: _all(decoder, files)))  # type: ignore[misc]
    pairs = zip(single["processes"], single["threads"], strict=True)
    return {
        "kind": kind,
        "files": len(files),
        "bytes": round(statistics.mean(map(len, files))),
        "direct_ms": 1000 * statistics.median(direct),
        "threads_ms": 1000 * statistics.median(single["threads"]),
        "processes_ms": 1000 * statistics.median(single["processes"]),
        "added_ms": 1000 * statistics.median(process - thread for process, thread in pairs),
        "ceiling_per_s": min(workers, _cpus()) / statistics.median(direct),
        "threads_per_s": statistics.median(rates["threads"]),
        "processes_per_s": statistics.median(rates["processes"]),
        "ratio": statistics.median(p / t for p, t in zip(rates["processes"], rates["threads"], strict=True)),
    }


def _all(decoder: Decoder, files: Sequence[bytes]) -> None:
    for future in [decoder.submit(data) for data in files]:
        future.result()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _start_milliseconds() -> float:
    """Until a worker is ready, as when one is replaced."""
    return 1000 * statistics.median(_seconds(lambda: ProcessDecoder(1).close()) for _ in range(3))


def _files(folder: Path | None) -> dict[str, list[bytes]]:
    """The files to decode, by their kind, of those that can be."""
    kinds: dict[str, list[bytes]] = defaultdict(list)
    if folder is None:
        for index in range(_PHANTOMS):
            pixels = phantom(7, index).pixels
            out = BytesIO()
            Image.fromarray(pixels).save(out, "PNG")
            kinds["PNG phantom, 1024 x 1024"].append(out.getvalue())
            kinds["DICOM phantom, 2048 x 2048"].append(_dicom(pixels))
    else:
        for file in image_files(folder):
            kind = kinds[f"{file.suffix.lower()} in {folder.name}"]
            if len(kind) < _FILES:
                with suppress(ImageError):  # one that is refused takes no time to speak of
                    decode(data := read_image(file))
                    kind.append(data)
    return {kind: files for kind, files in kinds.items() if files}


def _dicom(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """A digital radiograph of twice the size and 12 bits, as a detector gives them."""
    values = pixels.repeat(2, axis=0).repeat(2, axis=1).astype(np.uint16) << 4
    values |= np.random.default_rng(7).integers(0, 16, values.shape, np.uint16)
    ds = Dataset()
    ds.Modality, ds.SamplesPerPixel, ds.PhotometricInterpretation = "DX", 1, "MONOCHROME2"
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth = 2048, 4096
    stream = imagecodecs.jpeg8_encode(values, lossless=True, predictor=1, bitspersample=12)
    ds.PixelData = encapsulate([bytes(stream)])
    ds.preamble, ds.file_meta = bytes(128), FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    out = BytesIO()
    ds.save_as(out, enforce_file_format=False)
    return out.getvalue()


def main(
    folder: Annotated[
        Path | None, typer.Argument(help="Radiographs, the first 48 of each suffix; else phantoms.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads, and processes; by default the CPUs.")] = None,
) -> None:
    """Time decoding by threads and by processes; a table to stderr, one line of JSON to stdout."""
    kinds = _files(folder)
    if not kinds:
        raise typer.BadParameter(f"{folder} holds no radiographs; expected PNG, JPEG or DICOM files")
    workers = workers or _cpus()
    here = environment()
    results = [compare_decoders(kind, files, workers) for kind, files in kinds.items()]
    started = _start_milliseconds()
    table = Table(
        *("", *kinds),
        title=f"Decoding by {workers} threads or processes, {here}",
        caption=f"a worker is replaced in {started:.0f} ms",
    )
    for name, text, digits in _ROWS:
        table.add_row(text, *(f"{result[name]:.{digits}f}" for result in results))
    Console(stderr=True).print(table)
    print(
        json.dumps(
            {
                "scenario": "decoding",
                "environment": msgspec.to_builtins(here),
                "workers": workers,
                "start_ms": started,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
