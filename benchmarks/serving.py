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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
from thoraxrt.benchmarks.rounds import median_interval
from thoraxrt.benchmarks.served import PREDICT, Served, answer_all, predict_request
from thoraxrt.benchmarks.serving_compared import CONCURRENCY, OURS, compared
from thoraxrt.benchmarks.serving_load import Answer, Load, Target, due_times
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import decode
from thoraxrt.engine.engine import Engine, read_image
from thoraxrt.server.models import EngineOptions

__all__ = ["main", "open_loop", "served_and_in_process"]

_IMAGES: Final = 64  # of a round
_SINGLE: Final = 16  # of a round, one at a time
_WARM: Final = 4
_DEADLINE_S: Final = 2.0  # of a request under overload
_SAMPLE_S: Final = 0.25  # from one look at the memory to the next
_ANSWER: Final = b"x" * 1500  # about as many bytes as a prediction has


def served_and_in_process(
    engine: Engine, address: str, load: Load, files: Sequence[bytes], rounds: int, images: int = _IMAGES
) -> dict[str, Any]:
    """Throughput and latency of both, in turn.

    `in_process_per_s` and `served_per_s` (by concurrency) are medians of images a second, `ratio` the median of each
    round's best served rate to its rate in process. Of one image at a time, each in process, served, through bare gRPC,
    and in process once more as a server's workers decode it, right after each other: `in_process_ms`, `served_ms`,
    `bare_ms` and `decoded_alike_ms` are medians, `added_ms` the median difference between the first two with its 95 %
    interval, `added_ms_interval`, and `overhead_ms` that to the last, with its own: what all but the decoding adds.
    """
    target, requests = Target(address, PREDICT), [predict_request(data) for data in files]
    turn = [files[number % len(files)] for number in range(images)]
    found: dict[str, list[float]] = {name: [] for name in ("inside", *map(str, CONCURRENCY))}
    for _ in range(rounds + 1):  # the first one is not counted: after it, everything has its memory
        found["inside"].append(images / _seconds(lambda: answer_all(engine, turn)))
        for concurrency in CONCURRENCY:
            found[str(concurrency)].append(_rate(load.closed(target, requests, concurrency, images)))
    inside, *served = (values[1:] for values in found.values())
    alone, asked, bare, alike = np.array(_one_at_a_time(engine, address, files, rounds * _SINGLE)).T * 1000
    added, interval = median_interval(tuple(asked - alone))
    overhead, overhead_interval = median_interval(tuple(asked - alike))
    return {
        "in_process_per_s": statistics.median(inside),
        "served_per_s": {str(c): statistics.median(rates) for c, rates in zip(CONCURRENCY, served, strict=True)},
        "ratio": statistics.median(max(best) / rate for rate, *best in zip(inside, *served, strict=True)),
        "in_process_ms": float(np.median(alone)),
        "served_ms": float(np.median(asked)),
        "bare_ms": float(np.median(bare)),
        "decoded_alike_ms": float(np.median(alike)),
        "added_ms": float(added),
        "added_ms_interval": msgspec.to_builtins(interval),
        "overhead_ms": float(overhead),
        "overhead_ms_interval": msgspec.to_builtins(overhead_interval),
    }


def _one_at_a_time(engine: Engine, address: str, files: Sequence[bytes], times: int) -> list[tuple[float, ...]]:
    """Seconds of images in turn, as `served_and_in_process` names them; the first few are not counted."""
    found = []
    with _bare() as bare, grpc.insecure_channel(address) as ours, grpc.insecure_channel(bare.address) as theirs:
        calls: list[Any] = [channel.unary_unary(PREDICT) for channel in (ours, theirs)]
        for number in range(-_WARM, times):
            data = files[number % len(files)]
            request = predict_request(data)
            works = [partial(engine.predict_one, data), *(partial(call, request) for call in calls)]
            works.append(partial(_predict_decoded_alike, engine, data))
            if number % 2:  # neither always comes first
                works[:2] = works[1::-1]
            seconds = [_seconds(work) for work in works]
            if number % 2:
                seconds[:2] = seconds[1::-1]
            if number >= 0:
                found.append(tuple(seconds))
    return found


def _predict_decoded_alike(engine: Engine, data: bytes) -> None:
    engine.predict_one(decode(data, alone=True))


def open_loop(server: Served, load: Load, files: Sequence[bytes], seconds: float, rounds: int) -> dict[str, Any]:
    """Requests as they come, at 80 % and at 300 % of capacity, for `seconds` each in every round.

    Capacity is what the server answers with 8 in flight, right before; for `goodput`, what is answered in time under
    overload to capacity, right before and right after. Requests come at random (Poisson), at 80 % also evenly.

    Percentiles under steady load are a round's, in multiples of its own unloaded median, measured right before:
    `steady_p50`, `steady_p99`, `even_p99` and `queue_p99` are their medians over the rounds, so that one in which the
    machine got slower does not decide them, and `steady_p50s` and so on hold every round's. `queue_p99` is of a queue
    that takes 1 / capacity for each of the same arrivals, and nothing besides.

    `growth_bytes` is how much more memory the server took at most in the last third of an overload than in the
    second.
    """
    target, requests = Target(server.address, PREDICT), [predict_request(data) for data in files]

    def capacity() -> float:
        return _rate(load.closed(target, requests, 8, _IMAGES))

    found = _Found()
    for _ in range(rounds):
        before = capacity()
        unloaded = statistics.median(_latencies(load.closed(target, requests, 1, _SINGLE)))
        found.unloaded.append(unloaded)
        steady = load.open(target, requests, 0.8 * before, seconds, 60.0)
        found.statuses.update(answer.status for answer in steady)
        even = load.open(target, requests, 0.8 * before, seconds, 60.0, "even")
        queued = _queue(due_times("poisson", 0.8 * before, seconds), 1 / before)
        for name, percent, latencies in (
            ("steady_p50", 50, _latencies(steady)),
            ("steady_p99", 99, _latencies(steady)),
            ("even_p99", 99, _latencies(even)),
            ("queue_p99", 99, queued),
        ):
            found.ratios.setdefault(name, []).append(_percentile(latencies, percent) / unloaded)
        with _sampled(server.resident_bytes) as memory:
            flood = load.open(target, requests, 3 * before, seconds, _DEADLINE_S)
        found.flood += flood
        third = len(memory) // 3
        found.growth.append(max(memory[-third:]) - max(memory[third:-third]))
        found.memory.append(max(memory))
        in_time = [a for a in flood if a.status == "OK" and seconds / 4 <= a.due_s + a.latency_s < seconds]
        found.goodput.append(len(in_time) / (0.75 * seconds) / ((before + capacity()) / 2))
    refused = _latencies(answer for answer in found.flood if answer.status == "RESOURCE_EXHAUSTED")
    return {
        "unloaded_ms": 1000 * statistics.median(found.unloaded),
        **{name: statistics.median(ratios) for name, ratios in found.ratios.items()},
        **{f"{name}s": ratios for name, ratios in found.ratios.items()},
        "steady_statuses": dict(found.statuses),
        "goodput": statistics.median(found.goodput),
        "goodputs": found.goodput,
        "refused_p50_ms": 1000 * _percentile(refused, 50) if refused else None,
        "refused_p99_ms": 1000 * _percentile(refused, 99) if refused else None,
        "statuses": dict(Counter(answer.status for answer in found.flood)),
        "memory_bytes": max(found.memory),
        "growth_bytes": max(found.growth),
    }


@dataclass(slots=True)
class _Found:
    """What the rounds of `open_loop` have given so far."""

    unloaded: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    statuses: Counter[str] = field(default_factory=Counter)
    flood: list[Answer] = field(default_factory=list)
    goodput: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    growth: list[int] = field(default_factory=list)


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


def _queue(due: Sequence[float], service_s: float) -> list[float]:
    """Seconds from arrival to end, one after the other (Lindley, Proc. Camb. Phil. Soc. 48:277, 1952)."""
    free, times = 0.0, []
    for at in due:
        free = max(at, free) + service_s
        times.append(free - at)
    return times


@contextmanager
def _sampled(read: Callable[[], int]) -> Iterator[list[int]]:
    """What it reads again and again, while the block runs."""
    samples, ended = [read()], threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            samples.append(read())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _rate(answers: Sequence[Answer]) -> float:
    """Answers a second. Raises RuntimeError where one is not OK."""
    if statuses := {answer.status for answer in answers} - {"OK"}:
        raise RuntimeError(f"a request ended with {statuses.pop()}; expected OK")
    return len(answers) / max(answer.due_s + answer.latency_s for answer in answers)


def _latencies(answers: Iterable[Answer]) -> list[float]:
    return [answer.latency_s for answer in answers]


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


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
        f"{cost['added_ms']:+.2f}{_between(cost['added_ms_interval'])}",
        "<= 1.5",
        cost["added_ms"] <= 1.5,
    )
    yield (
        name,
        f"the same beside {cost['decoded_alike_ms']:.2f} in process that is decoded as the server does",
        f"{cost['overhead_ms']:+.2f}{_between(cost['overhead_ms_interval'])}; bare gRPC {cost['bare_ms']:.2f}",
        "",
        True,
    )
    yield (
        name,
        f"80% load, at random: p50 {held['steady_p50']:.1f} x the unloaded {held['unloaded_ms']:.1f} ms, p99",
        f"{held['steady_p99']:.1f} x ({_each(held['steady_p99s'])}), of a bare queue {held['queue_p99']:.1f} x",
        "<= 3 x",
        held["steady_p99"] <= 3,
    )
    yield (
        name,
        "80% load, evenly: p99",
        f"{held['even_p99']:.1f} x ({_each(held['even_p99s'])})",
        "<= 3 x",
        held["even_p99"] <= 3,
    )
    yield (
        name,
        "300% load: answered in time, of capacity",
        " / ".join(f"{part:.0%}" for part in held["goodputs"]),
        ">= 90%",
        held["goodput"] >= 0.9,
    )
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


def _each(ratios: Sequence[float]) -> str:
    """Of the rounds."""
    return " / ".join(f"{ratio:.1f}" for ratio in ratios)


def _between(interval: dict[str, float] | None) -> str:
    return f" ({interval['low']:+.2f} to {interval['high']:+.2f})" if interval else ""


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
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(min=4.0, help="Of each open loop of a round.")] = 10.0,
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
                table.add_row(what, figure, value, target, ("met" if met else "missed") if target else "")
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
        held = open_loop(server, load, files, seconds, rounds)
    return {"name": ran, **cost, **held}


if __name__ == "__main__":
    typer.run(main)
