"""How well `predict` hides decoding behind the network: `python -m thoraxrt.benchmarks.overlap BUNDLE IMAGES`.

The scenario: image files in, predictions out, one process, as `thoraxrt predict` runs. On a CPU the
decoder's workers and the network share the cores, so the floor beside each figure is the *sum* of
decoding alone and the network alone, each on all CPUs; geometry and boxes come on top.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from thoraxrt.benchmarks.environment import environment
from thoraxrt.engine.backends import available, backend_names, open_backend
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import ThreadDecoder
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.execute import HostExecutor
from thoraxrt.engine.profile import Profile

__all__ = ["main"]

_IMAGES = 100
_REPEATS = 3


def _measure(bundle: Bundle, name: str, precision: str, files: list[Path]) -> dict[str, object]:
    """Milliseconds per image, best of some repeats taken in turn."""
    backend, profile = open_backend(bundle, name, precision), Profile()
    with Engine(bundle, HostExecutor(backend, bundle.manifest, profile), ThreadDecoder()) as engine:
        size = bundle.manifest.preprocess.input_size
        blank = np.zeros((1, 1, size, size), np.uint8)
        backend.run(blank)
        runs = []
        for _ in range(_REPEATS):
            decoding = _seconds(lambda: [future.result() for future in [engine.submit(file) for file in files]])
            network = _seconds(lambda: [backend.run(blank) for _ in files])
            before = _busy(profile)
            whole = _seconds(lambda: sum(1 for _ in engine.predict(files)))
            runs.append((whole, decoding, network, (_busy(profile) - before) / whole))
    whole, decoding, network, busy = min(runs)
    per_image = 1000 / len(files)
    return {
        "backend": name,
        "precision": precision,
        "predict_ms": whole * per_image,
        "decoding_alone_ms": decoding * per_image,
        "network_alone_ms": network * per_image,
        "network_busy": busy,
    }


def _busy(profile: Profile) -> float:
    """Seconds of the network so far."""
    return sum(stage.seconds for stage in profile.stages() if stage.stage == "network")


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(bundle: Path, images: list[Path]) -> None:
    """Time `predict` on 100 of the images (repeated where there are fewer), for each backend that runs here.

    Prints a table to stderr and one line of JSON to stdout.
    """
    _report(Bundle.open(bundle), list(itertools.islice(itertools.cycle(images), _IMAGES)))


def _report(bundle: Bundle, files: list[Path]) -> None:
    here = environment()
    results = [
        _measure(bundle, name, precision, files)
        for name in backend_names()
        for precision, reason in available(name, bundle).items()
        if reason is None
    ]
    table = Table(
        *("backend", "precision", "predict", "decoding alone", "network alone", "network busy"),
        title=f"{_IMAGES} files, ms per image, {here}",
    )
    for r in results:
        table.add_row(
            *(
                f"{v:.0%}" if k == "network_busy" else f"{v:.1f}" if isinstance(v, float) else str(v)
                for k, v in r.items()
            )
        )
    Console(stderr=True).print(table)
    print(
        json.dumps(
            {
                "scenario": "overlap",
                "environment": msgspec.to_builtins(here),
                "bundle": bundle.sha256,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
