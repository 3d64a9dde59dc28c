"""What serving costs, and what it holds under load: `python -m thoraxrt.benchmarks.serving BUNDLE IMAGES...`.

The scenario: encoded radiographs over gRPC on loopback, the server in a process of its own as `thoraxrt serve` runs it,
the load from another. Server, load and, in the same rounds, `Engine.predict` share the machine's CPUs, so that what the
client spends is counted against the server. The ceiling of its throughput is `Engine.predict` in process. The rounds
are interleaved, and ratios are medians over rounds, so that they hold on a shared machine. Open loop: requests come
when they are due whatever is unanswered, and a latency counts from then on.

Two floors stand beside the figures: what the same bodies cost through a bare grpc.aio server that answers at once, and
the 99th percentile of a queue that takes nothing but the time of an image at capacity, for the same arrivals.

With `--peers`, instead: thoraxrt beside other servers of the same FP32 graph through ONNX Runtime, in some 4 minutes.
They give logits only, where thoraxrt also gives boxes, decodes in worker processes and bounds its queue. They run in a
Python of their own:

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install nvidia-pytriton==0.7.0 litserve python-multipart onnxruntime \\
        opencv-python-headless pillow==13.0.0 msgspec
    python -m thoraxrt.benchmarks.serving BUNDLE IMAGES... --peers /tmp/peers/bin/python
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from thoraxrt.benchmarks.environment import environment
from thoraxrt.benchmarks.served import Served
from thoraxrt.benchmarks.serving_compared import CONCURRENCY, OURS, compared
from thoraxrt.benchmarks.serving_load import Answer, Load, Target, due_times
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.engine import Engine, read_image
from thoraxrt.engine.errors import ThoraxrtError
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server.models import EngineOptions

__all__ = ["main", "open_loop", "served_and_in_process"]

PREDICT: Final = "/thoraxrt.v1.PredictionService/Predict"

_IMAGES: Final = 64  # of a round
_SINGLE: Final = 16  # of a round, one at a time
_DEADLINE_S: Final = 2.0  # of a request under overload
_ANSWER: Final = b"x" * 1500  # about as many bytes as a prediction has


def served_and_in_process(
    engine: Engine, address: str, load: Load, files: Sequence[bytes], rounds: int, images: int = _IMAGES
) -> dict[str, Any]:
    """Throughput and latency of both, round by round in turn.

    `in_process_per_s` and `served_per_s` (by concurrency) are medians of images a second, `ratio` the median of each
    round's best served rate to its rate in process. `in_process_ms` and `served_ms` are medians of one image at a
    time, `added_ms` the median of each round's difference; `bare_ms` is of the same bodies through bare gRPC.
    """
    target, requests = Target(address, PREDICT), [_request(data) for data in files]
    turn = [files[number % len(files)] for number in range(images)]
    found: dict[str, list[float]] = {name: [] for name in ("inside", "alone", "asked", "bare", *map(str, CONCURRENCY))}
    with _bare() as bare:
        for _ in range(rounds + 1):  # the first one is not counted: after it, everything has its memory
            found["inside"].append(images / _seconds(lambda: _answered(engine, turn)))
            for concurrency in CONCURRENCY:
                found[str(concurrency)].append(_rate(load.closed(target, requests, concurrency, images)))
            single = turn[:_SINGLE]
            found["alone"].append(statistics.median(_seconds(lambda d=data: engine.predict_one(d)) for data in single))  # type: ignore[misc]
            found["asked"].append(_median(load.closed(target, requests, 1, len(single))))
            found["bare"].append(_median(load.closed(bare, requests, 1, len(single))))
    inside, alone, asked, through_bare, *served = (values[1:] for values in found.values())
    return {
        "in_process_per_s": statistics.median(inside),
        "served_per_s": {str(c): statistics.median(rates) for c, rates in zip(CONCURRENCY, served, strict=True)},
        "ratio": statistics.median(max(best) / rate for rate, *best in zip(inside, *served, strict=True)),
        "in_process_ms": 1000 * statistics.median(alone),
        "served_ms": 1000 * statistics.median(asked),
        "added_ms": 1000 * statistics.median(b - a for a, b in zip(alone, asked, strict=True)),
        "bare_ms": 1000 * statistics.median(through_bare),
    }


def open_loop(server: Served, load: Load, files: Sequence[bytes], capacity: float, seconds: float) -> dict[str, Any]:
    """Requests as they come, at 80 % and at 300 % of `capacity` images a second, for `seconds` each.

    They come at random (Poisson); at 80 % also evenly. `unloaded_ms` is the median of one at a time; `queue_p99_ms` is of
    a queue that takes 1 / `capacity` for each of the same arrivals, and nothing besides. Under overload, `goodput` is what is answered within its deadline
    to the capacity, without the first quarter; `growth_bytes` how much more memory the server took at most in the
    last third of the time than in the second.
    """
    target, requests = Target(server.address, PREDICT), [_request(data) for data in files]
    unloaded = _median(load.closed(target, requests, 1, 2 * _SINGLE))
    steady = load.open(target, requests, 0.8 * capacity, seconds, 60.0)
    even = load.open(target, requests, 0.8 * capacity, seconds, 60.0, "even")
    with _sampled(server.resident_bytes) as memory:
        flood = load.open(target, requests, 3 * capacity, seconds, _DEADLINE_S)
    third = len(memory) // 3
    in_time = [a for a in flood if a.status == "OK" and seconds / 4 <= a.due_s + a.latency_s < seconds]
    return {
        "unloaded_ms": 1000 * unloaded,
        "steady_p50_ms": _percentile_ms(steady, 50),
        "steady_p99_ms": _percentile_ms(steady, 99),
        "queue_p99_ms": 1000 * _queue_p99(due_times("poisson", 0.8 * capacity, seconds), 1 / capacity),
        "even_p99_ms": _percentile_ms(even, 99),
        "steady_statuses": dict(Counter(answer.status for answer in steady)),
        "goodput": len(in_time) / (0.75 * seconds) / capacity,
        "refused_p50_ms": _percentile_ms([a for a in flood if a.status == "RESOURCE_EXHAUSTED"], 50),
        "refused_p99_ms": _percentile_ms([a for a in flood if a.status == "RESOURCE_EXHAUSTED"], 99),
        "statuses": dict(Counter(answer.status for answer in flood)),
        "memory_bytes": max(memory),
        "growth_bytes": max(memory[-third:]) - max(memory[third:-third]),
    }


def _request(data: bytes) -> bytes:
    return pb.PredictRequest(image=data).SerializeToString()


@contextmanager
def _bare() -> Iterator[Target]:
    """A server in a process of its own that reads a body and answers at once."""
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=_serve_bare, args=(theirs,), daemon=True)
    process.start()
    try:
        yield Target(connection.recv(), PREDICT)
    finally:
        process.kill()
        process.join()


def _serve_bare(connection: Connection) -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        return _ANSWER

    async def serve() -> None:
        server = grpc.aio.server()
        service, _, method = PREDICT[1:].partition("/")
        methods: Any = {method: grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        connection.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    asyncio.run(serve())


def _queue_p99(due: Sequence[float], service_s: float) -> float:
    """Seconds, from arrival to end: one after the other (Lindley, Proc. Camb. Phil. Soc. 48:277, 1952)."""
    free, times = 0.0, []
    for at in due:
        free = max(at, free) + service_s
        times.append(free - at)
    return float(np.percentile(times, 99))


@contextmanager
def _sampled(read: Callable[[], int]) -> Iterator[list[int]]:
    """What it reads four times a second, while the block runs."""
    samples, ended = [read()], threading.Event()

    def sample() -> None:
        while not ended.wait(0.25):
            samples.append(read())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _answered(engine: Engine, files: Sequence[bytes]) -> None:
    for answer in engine.predict(files):
        if isinstance(answer, ThoraxrtError):
            raise answer


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _rate(answers: Sequence[Answer]) -> float:
    """Answers a second. Raises RuntimeError where one is not OK."""
    if statuses := {answer.status for answer in answers} - {"OK"}:
        raise RuntimeError(f"a request ended with {statuses.pop()}; expected OK")
    return len(answers) / max(answer.due_s + answer.latency_s for answer in answers)


def _median(answers: Sequence[Answer]) -> float:
    return statistics.median(answer.latency_s for answer in answers)


def _percentile_ms(answers: Sequence[Answer], percent: float) -> float | None:
    return 1000 * float(np.percentile([a.latency_s for a in answers], percent)) if answers else None


def _rows(name: str, cost: dict[str, Any], held: dict[str, Any]) -> Iterator[tuple[str, str, str, str, bool]]:
    """What, figure, target and whether it is met."""
    served = "/".join(f"{rate:.1f}" for rate in cost["served_per_s"].values())
    yield (
        name,
        f"served, at {'/'.join(cost['served_per_s'])} at a time: {served} images/s; in process",
        (f"{cost['in_process_per_s']:.1f}; best {cost['ratio']:.0%}"),
        ">= 90%",
        cost["ratio"] >= 0.9,
    )
    yield (
        name,
        f"one at a time, ms: {cost['in_process_ms']:.2f} in process, served {cost['served_ms']:.2f}",
        (f"{cost['added_ms']:+.2f}, of which bare gRPC {cost['bare_ms']:.2f}"),
        "<= 1.5",
        cost["added_ms"] <= 1.5,
    )
    times = held["steady_p99_ms"] / held["unloaded_ms"]
    yield (
        name,
        f"80% load, ms: unloaded p50 {held['unloaded_ms']:.1f}, p50 {held['steady_p50_ms']:.1f}, p99",
        (
            f"{held['steady_p99_ms']:.1f}; {times:.1f} x, of a bare queue {held['queue_p99_ms'] / held['unloaded_ms']:.1f} x"
        ),
        "<= 3 x",
        times <= 3,
    )
    evenly = held["even_p99_ms"] / held["unloaded_ms"]
    yield (
        name,
        "80% load that comes evenly, ms: p99",
        f"{held['even_p99_ms']:.1f}; {evenly:.1f} x",
        "<= 3 x",
        evenly <= 3,
    )
    yield name, "300% load: answered in time, of capacity", f"{held['goodput']:.0%}", ">= 90%", held["goodput"] >= 0.9
    late = held["refused_p99_ms"]
    yield (
        name,
        f"300% load: refused ({held['statuses'].get('RESOURCE_EXHAUSTED', 0)}), p99, ms",
        ("none" if late is None else f"{late:.1f}"),
        "< 20",
        late is not None and late < 20,
    )
    growth = held["growth_bytes"] / held["memory_bytes"]
    yield (
        name,
        f"300% load: memory, at most {held['memory_bytes'] / 2**20:.0f} MiB; grown",
        f"{growth:+.1%}",
        ("<= 2%"),
        growth <= 0.02,
    )


def _peer_rows(beside: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str, str, str]]:
    """The same columns: ahead is more images a second and a lower p99."""
    ours = {row["concurrency"]: row for row in beside if row["name"] == OURS}
    for row in beside:
        if "failed" in row:
            yield row["name"], f"left out: {row['failed']}", "", "", ""
            continue
        figure = f"{row['per_s']:.1f} images/s, p99 {row['p99_ms']:.0f} ms, {row['statuses']}"
        what = f"{row['name']}, {row['concurrency']} at a time"
        if row["name"] == OURS:
            yield what, figure, "", "", ""
            continue
        quicker = row["p99_ms"] / ours[row["concurrency"]]["p99_ms"]
        met = "met" if min(row["thoraxrt_to_it"], quicker) > 1 else "missed"
        yield what, figure, f"{row['thoraxrt_to_it']:.2f} x rate, {quicker:.2f} x quicker", "> 1 each", met


def main(
    bundle: Path,
    images: Annotated[list[Path], typer.Argument(help="Encoded radiographs.")],
    backends: Annotated[str, typer.Option(help="Which, in their own default precision.")] = "openvino,onnxruntime",
    precision: Annotated[str | None, typer.Option(help="Of every backend; by default FP32.")] = None,
    threads: Annotated[bool, typer.Option("--threads", help="Decode in threads, not in worker processes.")] = False,
    peers: Annotated[Path | None, typer.Option(help="Only compare with the servers that this Python has.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[float, typer.Option(min=4.0, help="Of each open loop.")] = 20.0,
) -> None:
    """Measure each backend, or the peers; a table to stderr, one line of JSON to stdout."""
    opened, files = Bundle.open(bundle), [read_image(path) for path in images[:_IMAGES]]
    here, console = environment(), Console(stderr=True, width=150)
    table = Table(
        *("what runs", "figure", "", "target", ""),
        title=f"{opened.manifest.network.name}, {len(files)} files of {sum(map(len, files)) // len(files)} bytes, "
        f"{here}",
    )
    results: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    if peers:
        beside = compared(opened, files, peers, rounds=rounds, say=console.print)
        for row in _peer_rows(beside):
            table.add_row(*row)
    else:
        with Load() as load:
            for name in backends.split(","):
                console.print(f"measuring {name}")
                results.append(_measured(opened, files, load, name, precision, threads, rounds, seconds))
        for result in results:
            for what, figure, value, target, met in _rows(result["name"], result, result):
                table.add_row(what, figure, value, target, "met" if met else "missed")
    console.print(table)
    said = {"scenario": "serving", "environment": msgspec.to_builtins(here)}
    said |= {"bundle": opened.sha256, "decoding": "threads" if threads else "processes", "files": len(files)}
    print(json.dumps({**said, "results": results, "peers": beside}))


def _measured(
    bundle: Bundle,
    files: Sequence[bytes],
    load: Load,
    backend: str,
    precision: str | None,
    threads: bool,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    options = EngineOptions(backend=backend, precision=precision)
    with Served(bundle.path, options, processes=not threads) as server:
        with Engine.open(bundle, backend=backend, precision=precision) as engine:
            cost = served_and_in_process(engine, server.address, load, files, rounds)
            ran = f"{engine.backend} {engine.precision}"
        held = open_loop(server, load, files, max(cost["served_per_s"].values()), seconds)
    return {"name": ran, **cost, **held}


if __name__ == "__main__":
    typer.run(main)
