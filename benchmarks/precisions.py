"""How fast and how close each precision is here: `python -m thoraxrt.benchmarks.precisions BUNDLE FOLDER`.

The scenario: the network alone on decoded radiographs, a batch at a time, as it runs under load.
Every backend and precision that this machine offers takes its turn in each round, so that ratios hold on a shared
machine; ONNX Runtime's FP32 is the yardstick for both speed and answers.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from thoraxrt.benchmarks.environment import environment
from thoraxrt.engine.backends import Backend, available, backend_names, open_backend
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import image_files, read_radiograph
from thoraxrt.engine.preprocess import network_input
from thoraxrt.export.agreement import agreement

__all__ = ["all_logits", "compare_precisions", "conclusion", "main"]

YARDSTICK: Final = "onnxruntime fp32"

_ROUNDS: Final = 11
_RUNS: Final = 3  # a turn


def compare_precisions(
    bundle: Bundle, inputs: list[npt.NDArray[np.uint8]], batch: int, rounds: int = _ROUNDS
) -> list[dict[str, Any]]:
    """Speed and agreement of each backend and precision that runs here, in the order of the backends.

    `inputs` are network inputs, uint8 `(1, S, S)` each, at least `batch`. `milliseconds` is the median over
    rounds for one batch, `speed_up` the median of each round's ratio to the yardstick's time.
    """
    timed = np.stack(inputs[:batch])
    with contextlib.ExitStack() as opened:
        backends = {
            f"{name} {precision}": _opened(opened, open_backend(bundle, name, precision))
            for name in backend_names()
            for precision, reason in available(name, bundle).items()
            if reason is None
        }
        logits = {name: all_logits(partial(_run, backend), inputs, batch) for name, backend in backends.items()}
        times: dict[str, list[float]] = {name: [] for name in backends}
        for _ in track(range(rounds), "Measuring", console=Console(stderr=True)):
            for name, backend in backends.items():
                backend.run(
                    timed
                )  # not timed: the last one's threads come to rest, and this one's weights into the cache
                start = time.perf_counter()
                for _ in range(_RUNS):
                    backend.run(timed)
                times[name].append((time.perf_counter() - start) / _RUNS)
    results = []
    for name in backends:
        close = agreement(logits[name], logits[YARDSTICK], bundle.manifest.activation, bundle.manifest.labels, None)
        results.append(
            {
                "name": name,
                "milliseconds": 1000 * statistics.median(times[name]),
                "images_per_second": batch / statistics.median(times[name]),
                "speed_up": statistics.median(t / own for t, own in zip(times[YARDSTICK], times[name], strict=True)),
                "mean_error": close.mean_error,
                "p99_error": close.p99_error,
                "meets_bar": close.meets_bar,
            }
        )
    return results


def conclusion(results: list[dict[str, Any]]) -> str:
    """What to run here: the fastest within the bar, what is closer, and which INT8 is neither faster nor closer."""
    usable = [result for result in results if result["meets_bar"]]
    fastest = max(usable, key=lambda result: result["speed_up"])
    text = f"fastest within the bar: {fastest['name']} ({fastest['speed_up']:.1f} x {YARDSTICK})"
    if closer := [result for result in usable if result["mean_error"] < fastest["mean_error"]]:
        near = max(closer, key=lambda result: result["speed_up"])
        text += f"; closer: {near['name']}, at {near['speed_up'] / fastest['speed_up']:.0%} of its speed"
    for result in results:
        better = [r for r in usable if r["speed_up"] > result["speed_up"] and r["mean_error"] < result["mean_error"]]
        if "int8" in result["name"] and better:
            text += f"; {better[0]['name']} is both faster and closer than {result['name']}"
    return text


def _opened(stack: contextlib.ExitStack, backend: Backend) -> Backend:
    stack.callback(backend.close)
    return backend


def _run(backend: Backend, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return backend.run(images).logits


def all_logits(
    run: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]], inputs: Sequence[npt.NDArray[np.uint8]], batch: int
) -> npt.NDArray[np.float32]:
    """The float32 logits `(N, C)` that `run` gives for all inputs, uint8 `(1, S, S)` each, in full batches `(batch, 1, S, S)`.

    Some inputs are asked for twice, so that the last batch is full too.
    """
    padded = [*inputs, *inputs[: -len(inputs) % batch]]
    parts = [run(np.stack(padded[i : i + batch])) for i in range(0, len(padded), batch)]
    return np.concatenate(parts)[: len(inputs)]


def main(
    bundle: Path,
    folder: Annotated[Path, typer.Argument(help="Radiographs, the first 96 of them are used.")],
    batch: Annotated[int, typer.Option(min=1)] = 8,
) -> None:
    """Time and compare every precision that runs here; a table to stderr, one line of JSON to stdout."""
    opened = Bundle.open(bundle)
    files = image_files(folder)[:96]
    if len(files) < batch:
        raise typer.BadParameter(f"{folder} holds {len(files)} radiographs; expected at least a batch of {batch}")
    inputs = [network_input(read_radiograph(file).pixels, opened.manifest.preprocess) for file in files]
    here = environment()
    results = compare_precisions(opened, inputs, batch)
    table = Table(
        *("what", "ms a batch", "images/s", f"x {YARDSTICK}", "mean error", "99th percentile", "meets the bar"),
        title=f"{opened.manifest.network.name}, batch {batch}, {len(files)} radiographs, {here}",
        caption="errors: absolute differences of probabilities",
    )
    for result in results:
        name, ms, rate, ratio, mean, p99, met = result.values()
        table.add_row(
            name, f"{ms:.1f}", f"{rate:.1f}", f"{ratio:.2f}", f"{mean:.4f}", f"{p99:.4f}", "yes" if met else "no"
        )
    console = Console(stderr=True)
    console.print(table)
    console.print(conclusion(results))
    print(
        json.dumps(
            {
                "scenario": "precisions",
                "environment": msgspec.to_builtins(here),
                "bundle": opened.sha256,
                "batch": batch,
                "images": len(files),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
