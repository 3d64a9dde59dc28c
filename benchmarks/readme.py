"""The documents' tables from committed result files: `python -m thoraxrt.benchmarks.readme [--check]`.

Between `<!-- table NAME FILE.json -->` and `<!-- /table -->` stands what NAME makes of benchmarks/results/FILE.json.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any, Final

import msgspec
import typer

from thoraxrt.benchmarks.bench import BenchResult
from thoraxrt.benchmarks.receipt import Receipt
from thoraxrt.benchmarks.serving_compared import OURS
from thoraxrt.engine.bundle import Manifest
from thoraxrt.engine.errors import RequestError

__all__ = ["DOCUMENTS", "TABLES", "filled", "main"]

_REPOSITORY: Final = Path(__file__).resolve().parents[1]
_RESULTS: Final = _REPOSITORY / "benchmarks" / "results"
DOCUMENTS: Final = (_REPOSITORY / "README.md", _REPOSITORY / "benchmarks" / "README.md")
_TABLE: Final = re.compile(r"(<!-- table (\S+) (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Rows = Iterable[tuple[str, ...]]


def filled(text: str, results: Path) -> str:
    """The text with every table made anew from the files in `results`.

    Raises RequestError for a table that nobody knows, a file that is not there or holds something else, and a marker
    without its end.
    """
    if text.count("<!-- table ") != len(_TABLE.findall(text)):
        raise RequestError(
            "a table's marker has no end; expected <!-- table NAME FILE.json -->, lines, <!-- /table -->"
        )
    return _TABLE.sub(lambda found: found[1] + _table(found[2], results / found[3]) + found[4], text)


def _table(name: str, file: Path) -> str:
    if name not in TABLES:
        raise RequestError(f"no table is called {name!r}; expected one of {', '.join(TABLES)}")
    try:
        first, *rows = TABLES[name](file.read_bytes())
    except (OSError, msgspec.DecodeError, KeyError) as error:
        raise RequestError(f"{file.name} makes no table {name!r} ({type(error).__name__}: {error})") from error
    heading, *lines = (
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in (first, *rows)
    )
    return f"{heading}|{'---|' * len(first)}\n{''.join(lines)}"


def _results(data: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = msgspec.json.decode(data)["results"]
    return found


def _precisions(data: bytes) -> Rows:
    yield (
        "backend",
        "precision",
        "ms a batch",
        "images/s",
        "x onnxruntime fp32",
        "probability error, mean / 99th percentile",
    )
    for row in _results(data):
        yield (
            *row["name"].split(),
            f"{row['milliseconds']:.0f}",
            f"{row['images_per_second']:.1f}",
            f"{row['speed_up']:.2f}",
            f"{row['mean_error']:.4f} / {row['p99_error']:.4f}",
        )


def _overlap(data: bytes) -> Rows:
    yield "backend", "precision", "predict", "decoding alone", "network alone", "network busy"
    for row in _results(data):
        times = (f"{row[name]:.1f}" for name in ("predict_ms", "decoding_alone_ms", "network_alone_ms"))
        yield row["backend"], row["precision"], *times, f"{100 * row['network_busy']:.0f} %"


def _serving(data: bytes) -> Rows:
    (row,) = _results(data)
    yield "what", "measured", "aim"
    refused = row["refused_p99_ms"]
    yield (
        f"images/s in process, and served; the share, of the best of {'/'.join(row['served_per_s'])} at a time",
        f"{row['in_process_per_s']:.1f}, {max(row['served_per_s'].values()):.1f}; {100 * row['ratio']:.0f} %",
        "90 %",
    )
    yield f"ms that serving adds to the {row['in_process_ms']:.0f} ms of a lone image", f"{row['added_ms']:.1f}", "1.5"
    yield (
        "the same where the image is decoded in process as the server does it; of which bare gRPC",
        f"{row['overhead_ms']:.1f}; {row['bare_ms']:.1f}",
        "",
    )
    yield (
        "99th percentile at 80 % of capacity, in unloaded medians: requests come evenly; by round",
        f"{row['even_p99']:.1f}; " + " / ".join(f"{ratio:.1f}" for ratio in row["even_p99s"]),
        "3",
    )
    yield (
        "the same at random (Poisson); of a queue that costs nothing besides",
        f"{row['steady_p99']:.1f}; {row['queue_p99']:.1f}",
        "3",
    )
    yield (
        "at 300 % of capacity: answered in time, of capacity, by round",
        " / ".join(f"{100 * part:.0f}" for part in row["goodputs"]) + " %",
        "90 %",
    )
    yield "at 300 %: refused within, 99th percentile, ms", "none" if refused is None else f"{refused:.0f}", "20"
    yield "at 300 %: memory grown", f"{100 * row['growth_bytes'] / row['memory_bytes']:.1f} %", "flat"


def _serving_peers(data: bytes) -> Rows:
    yield "server", "requests at a time", "images/s", "p99, ms", "thoraxrt to it: rate", "p99"
    rows: list[dict[str, Any]] = msgspec.json.decode(data)["peers"]
    ours = {row["concurrency"]: row for row in rows if row["name"] == OURS}
    for row in rows:
        if "failed" in row:
            yield row["name"], "", "", "", row["failed"], ""
            continue
        figures = (str(row["concurrency"]), f"{row['per_s']:.1f}", f"{row['p99_ms']:.0f}")
        if row["name"] == OURS:
            yield row["name"], *figures, "", ""
        else:
            p99 = ours[row["concurrency"]]["p99_ms"] / row["p99_ms"]
            yield row["name"], *figures, f"{row['thoraxrt_to_it']:.2f} x", f"{p99:.2f} x"


def _scenarios(data: bytes) -> Rows:
    yield (
        *("scenario", "target", "input", "LoadGen says", "judged by", "that, ms (95 % interval)", "p50, ms"),
        *("offered/s", "images/s"),
    )
    for run in msgspec.json.decode(data, type=BenchResult).scenarios:
        judged, middle = run.judged, run.latency and run.latency.at(50)
        interval = judged and judged.interval_ms
        yield (
            *(run.scenario, run.target, run.input, run.verdict, run.rule),
            f"{judged.ms:.0f} ({interval.low:.0f} to {interval.high:.0f})" if judged and interval else "",
            f"{middle.ms:.0f}" if middle else "",
            *("" if rate is None else f"{rate:.1f}" for rate in (run.offered_per_s, run.images_per_s)),
        )


def _peers(data: bytes) -> Rows:
    yield "what runs", "ms", "x onnxruntime fp32", "95 % interval", "probability error, mean"
    for peer in msgspec.json.decode(data, type=BenchResult).peers:
        interval = f"{peer.interval.low:.2f} to {peer.interval.high:.2f}" if peer.interval else ""
        error = f"{peer.agreement.mean_error:.4f}" if peer.agreement else ""
        if peer.rounds is None or peer.speed_up is None:
            yield peer.name, "", "", peer.reason or "", error
        else:
            yield peer.name, f"{median(peer.rounds.milliseconds):.1f}", f"{peer.speed_up:.2f}", interval, error


def _export(data: bytes) -> Rows:
    yield (
        *("precision", "logits within, of the original", "probability error to fp32, mean / 99th percentile"),
        *("rank correlation", "convolutions in INT8"),
    )
    manifest = msgspec.json.decode(data, type=Manifest)
    for precision, check in manifest.checks.items():
        found, calibration = manifest.agreement.get(precision), manifest.calibration
        yield (
            precision,
            f"{check.max_logit_difference:.1e}",
            f"{found.mean_error:.4f} / {found.p99_error:.4f}" if found else "",
            f"{found.rank_correlation:.4f}" if found else "",
            f"{calibration.quantised} of {calibration.layers}" if calibration and precision == "int8" else "",
        )


def _fuzz(data: bytes) -> Rows:
    yield "what took it", "cases", "how they ended"
    for name, ended in msgspec.json.decode(data)["ended"].items():
        counts = sorted(ended.items(), key=lambda pair: -pair[1])
        yield name, str(sum(ended.values())), ", ".join(f"{status} {count}" for status, count in counts)


def _soak(data: bytes) -> Rows:
    yield "clients", "how their calls ended"
    found = msgspec.json.decode(data)
    clients: dict[str, list[str]] = {}
    for call, count in found["calls"].items():
        kind, status = call.rsplit(" ", 1)
        clients.setdefault(kind, []).append(f"{status} {count}")
    yield from ((kind, ", ".join(statuses)) for kind, statuses in clients.items())
    (before, after), (opened, left) = (found[name] for name in ("memory_bytes", "descriptors"))
    yield (
        "the server",
        f"{found['images']} images in {found['seconds']:.0f} s; {found['killed']} workers killed, {found['swapped']} "
        f"bundles swapped, {found['jumps']} jumps of its clock, {found['filled']} times its disk full; memory "
        f"{before / 2**20:.0f} to {after / 2**20:.0f} MiB, descriptors {opened} to {left}; "
        f"faults: {sum(found['faults'].values())}",
    )


def _parity(data: bytes) -> Rows:
    yield "candidate", "images", "probability error, mean / 99th percentile", "AUROC, mean over findings", "verdict"
    receipt = msgspec.json.decode(data, type=Receipt)
    for result in receipt.results:
        aurocs = [found.auroc.value for found in result.aurocs if found.auroc is not None]
        errors = result.probability_errors
        yield (
            str(result.candidate),
            str(receipt.data.images),
            f"{errors.mean:.4f} / {errors.p99:.4f}" if errors else "",
            f"{mean(aurocs):.4f}" if aurocs else "",
            receipt.outcome(result) or "reference",
        )


TABLES: Final[Mapping[str, Callable[[bytes], Rows]]] = {
    "precisions": _precisions,
    "overlap": _overlap,
    "serving": _serving,
    "serving-peers": _serving_peers,
    "bench-scenarios": _scenarios,
    "bench-peers": _peers,
    "export": _export,
    "fuzz": _fuzz,
    "soak": _soak,
    "parity": _parity,
}
"""By name, what makes a table of a result file's bytes: a heading, then rows."""


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 where a document and the results differ.")
    ] = False,
) -> None:
    """Fill the tables of README.md and benchmarks/README.md from benchmarks/results."""
    for file in DOCUMENTS:
        before = file.read_text()
        try:
            after = filled(before, _RESULTS)
        except RequestError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        if check and after != before:
            print(
                f"{file.relative_to(_REPOSITORY)} is not what benchmarks/results say: "
                "run `python -m thoraxrt.benchmarks.readme`",
                file=sys.stderr,
            )
            raise SystemExit(1)
        if not check:
            file.write_text(after)


if __name__ == "__main__":
    typer.run(main)
