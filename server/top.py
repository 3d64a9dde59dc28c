"""`thoraxrt top`: what a server does right now, read from its Prometheus endpoint.

Knows the metrics' names (`thoraxrt.server.telemetry`) and nothing else of the server: it may be far away, or restart.
"""

from __future__ import annotations

import http.client
import itertools
import math
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from thoraxrt.engine.errors import ServerError

__all__ = ["URL", "Scrape", "quantile", "screen", "top"]

URL: Final = "http://127.0.0.1:8501/metrics"

_LONGEST_ANSWER: Final = 16 * 1024 * 1024
_TIMEOUT_S: Final = 5.0
_STAGES: Final = ("read", "queue", "decode", "batch_wait", "network", "draw", "write")
_BAR: Final = 24  # characters
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy's loopback is another one


@dataclass(frozen=True, slots=True, eq=False)
class Scrape:
    """One answer of the endpoint: each sample's value by name and labels, and when it was read (seconds)."""

    samples: dict[str, list[tuple[dict[str, str], float]]]
    at: float

    @classmethod
    def from_text(cls, text: str, at: float) -> Scrape:
        """Parse Prometheus's text format. Raises ValueError for anything else."""
        samples = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = {label: escape(value) for label, value in sample.labels.items()}  # rich reads [] as markup
                samples[sample.name].append((labels, sample.value))
        return cls(dict(samples), at)

    def by(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """A metric's values summed by these labels' values; empty where it has no samples."""
        sums: Counter[tuple[str, ...]] = Counter()
        for found, value in self.samples.get(name, ()):
            sums[tuple(found.get(label, "") for label in labels)] += value  # type: ignore[assignment]  # floats add too
        return sums

    def value(self, name: str) -> float:
        """A metric's values summed; 0 where it has no samples."""
        return self.by(name)[()]


@dataclass(frozen=True, slots=True)
class Window:
    """What changed between two scrapes; where the server was restarted between them, all that it did since."""

    new: Scrape
    old: Scrape | None

    @property
    def seconds(self) -> float:
        """What the window spans: without an old scrape, the server's life."""
        if self.old is None:
            return max(self.new.at - self.new.value("process_start_time_seconds"), 1e-3)
        return max(self.new.at - self.old.at, 1e-3)

    def by(self, name: str, *labels: str) -> Counter[tuple[str, ...]]:
        """A counter's increase, by labels."""
        increase = self.new.by(name, *labels)
        if self.old is not None:
            increase.subtract(self.old.by(name, *labels))
        return increase

    def buckets(self, name: str, label: str) -> dict[str, dict[float, float]]:
        """A histogram's increase by a label's values: its cumulative counts by upper bound, ascending."""
        found: dict[str, dict[float, float]] = defaultdict(dict)
        for (value, bound), count in self.by(f"{name}_bucket", label, "le").items():
            found[value][float(bound)] = count
        return {value: dict(sorted(counts.items())) for value, counts in found.items()}


def window(new: Scrape, old: Scrape | None) -> Window:
    """The window between two scrapes; a server that started in between counts from its start."""
    start = "process_start_time_seconds"
    return Window(new, None if old is None or old.value(start) != new.value(start) else old)


def quantile(counts: dict[float, float], share: float) -> float:
    """The value below which a `share` of a histogram's observations lie, as PromQL's `histogram_quantile` has it.

    `counts`: cumulative by upper bound, ascending, the last bound infinite. Linear within a bucket; the highest finite
    bound for what lies beyond it; NaN without observations.
    """
    bounds = list(counts)
    if not bounds or not (total := counts[bounds[-1]]) > 0:
        return math.nan
    wanted, lower, below = share * total, 0.0, 0.0
    for bound, count in counts.items():
        if count >= wanted and count > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower


def screen(view: Window) -> RenderableType:
    """Everything on one screen."""
    return Group(*(part for part in (_head(view), _stages(view), _calls(view), _models(view), _batches(view)) if part))


def top(
    url: str = URL,
    *,
    interval_s: float = 2.0,
    once: bool = False,
    console: Console | None = None,
    clock: Callable[[], float] = time.time,
) -> None:
    """Show a server's numbers until Ctrl-C, each for the last interval.

    With `once`, or where the console is no terminal: since the server's start, and return. `url` may leave out http://
    and /metrics. Whoever watches waits for a server that does not answer; otherwise that, or an answer that is not
    thoraxrt's, raises ServerError.
    """
    console = console or Console()
    url = _url(url)
    if once or not console.is_terminal:
        console.print(screen(window(_scrape(url, clock), None)))
        return
    old: Scrape | None = None
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            try:
                new = _scrape(url, clock)
            except ServerError as error:
                live.update(Text(f"{error}\nwaiting for it; Ctrl-C ends", style="yellow"), refresh=True)
            else:
                live.update(Group(screen(window(new, old)), Text("Ctrl-C ends", style="dim")), refresh=True)
                old = new
            time.sleep(max(began + interval_s - time.monotonic(), 0.1))


def _url(given: str) -> str:
    url = given if "://" in given else f"http://{given}"
    if not url.startswith(("http://", "https://")):
        raise ServerError(f"{given} cannot be asked for metrics; expected http://HOST:PORT")
    return url if url.partition("://")[2].partition("/")[2] else f"{url.rstrip('/')}/metrics"


def _scrape(url: str, clock: Callable[[], float]) -> Scrape:
    try:
        with _OPENER.open(url, timeout=_TIMEOUT_S) as answer:
            scrape = Scrape.from_text(answer.read(_LONGEST_ANSWER).decode(), clock())
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)
        reason = (getattr(cause, "strerror", None) or str(cause)).strip() or type(cause).__name__
        raise ServerError(
            f"no metrics at {url}: {reason}; expected the address that `thoraxrt serve` announces for them"
        ) from error
    if "thoraxrt_build_info" not in scrape.samples:
        raise ServerError(f"what answers at {url} is not thoraxrt; give the address of its metrics")
    return scrape


def _head(view: Window) -> RenderableType:
    new = view.new
    ((version,), _), *_ = new.by("thoraxrt_build_info", "version").items()
    up = max(new.at - new.value("process_start_time_seconds"), 0.0)
    answered, refused = view.by("thoraxrt_call_seconds_count")[()], view.by("thoraxrt_refused_total")[()]
    span = "since its start" if view.old is None else f"in the last {view.seconds:.1f} s"
    line = (
        f"[bold]thoraxrt {version}[/]",
        f"up {_duration(up)}",
        f"[bold]{answered / view.seconds:.1f}[/] calls/s",
        f"{view.by('thoraxrt_batch_images_sum')[()] / view.seconds:.1f} images/s",
        f"[{'red' if refused else 'none'}]{refused / view.seconds:.1f} refused/s[/]",
        f"[dim]{span}[/]",
    )
    memory = [f"memory {_bytes(new.value('process_resident_memory_bytes'))}"]
    memory.append(f"files {new.value('process_open_fds'):.0f}")
    gpus = new.by("thoraxrt_gpu_memory_bytes", "gpu", "kind")
    names = sorted({gpu for gpu, _ in gpus})
    memory += [f"GPU {gpu} {_bytes(gpus[gpu, 'used'])} of {_bytes(gpus[gpu, 'total'])}" for gpu in names]
    memory.append(f"in flight {new.value('thoraxrt_calls_in_flight'):.0f}")
    for words, name in (
        ("decode workers replaced", "thoraxrt_decode_worker_restarts_total"),
        ("audit records lost", "thoraxrt_audit_failures_total"),
    ):
        if count := new.value(name):
            memory.append(f"[yellow]{words} {count:.0f}[/]")
    return Group(*(Text.from_markup("   ".join(parts)) for parts in (line, memory)), Text())


def _stages(view: Window) -> RenderableType:
    table = Table("stage", title="latency, ms", title_justify="left", box=None, pad_edge=False)
    for column in ("images/s", "p50", "p99"):
        table.add_column(column, justify="right")
    table.add_column("p50 of all stages")
    found = view.buckets("thoraxrt_stage_seconds", "stage")
    medians = {stage: quantile(counts, 0.5) for stage, counts in found.items()}
    longest = max((median for median in medians.values() if not math.isnan(median)), default=0.0)
    for stage in sorted(found, key=lambda stage: _STAGES.index(stage) if stage in _STAGES else len(_STAGES)):
        counts = found[stage]
        table.add_row(stage, *_latency(counts, view.seconds), _bar(medians[stage], longest))
    return table if found else Text("no image yet", style="dim")


def _calls(view: Window) -> RenderableType | None:
    found = view.buckets("thoraxrt_call_seconds", "method")
    if not found:
        return None
    table = Table("method", title="\ncalls, ms", title_justify="left", box=None, pad_edge=False)
    for column in ("calls/s", "p50", "p99"):
        table.add_column(column, justify="right")
    table.add_column("codes")
    codes = view.by("thoraxrt_call_seconds_count", "method", "code")
    for method, counts in sorted(found.items()):
        own = sorted((code, count) for (name, code), count in codes.items() if name == method and count)
        said = "  ".join(f"{code if code == 'OK' else f'[red]{code}[/]'} {count:.0f}" for code, count in own)
        table.add_row(method.rpartition("/")[2], *_latency(counts, view.seconds), said)
    return table


def _models(view: Window) -> RenderableType | None:
    new = view.new
    infos = sorted(new.by("thoraxrt_model_info", "model", "version", "backend", "precision", "sha256"))
    queues, loads = new.by("thoraxrt_queue_images", "model"), new.by("thoraxrt_model_loads_total", "model", "outcome")
    refused = view.by("thoraxrt_refused_total", "model", "reason")
    names = sorted({model for model, *_ in [*infos, *queues, *loads, *refused]})
    if not names:
        return None
    table = Table("model", title="\nmodels", title_justify="left", box=None, pad_edge=False)
    table.add_column("versions")
    table.add_column("queue", justify="right")
    table.add_column("refused")
    for name in names:
        versions = [f"{v} {backend} {precision} {sha[:8]}" for m, v, backend, precision, sha in infos if m == name]
        if failed := loads[name, "failed"]:
            versions.append(f"[red]{failed:.0f} loads failed[/]")
        reasons = "  ".join(
            f"[red]{why}[/] {count:.0f}" for (m, why), count in sorted(refused.items()) if m == name and count
        )
        table.add_row(name, "\n".join(versions), f"{queues[name,]:.0f}", reasons or "-")
    return table


def _batches(view: Window) -> RenderableType | None:
    found = view.buckets("thoraxrt_batch_images", "model")
    shown = [(name, list(_shares(counts))) for name, counts in sorted(found.items()) if counts.get(math.inf)]
    if not shown:
        return None
    table = Table("model", title="\nbatch sizes", title_justify="left", box=None, pad_edge=False)
    for column in ("images", "batches"):
        table.add_column(column, justify="right")
    table.add_column("share")
    for name, shares in shown:
        for row, (images, count, share) in enumerate(shares):
            table.add_row(name if row == 0 else "", images, f"{count:.0f}", f"{_bar(share, 1.0)} {share:.0%}")
    return table


def _shares(counts: dict[float, float]) -> Iterator[tuple[str, float, float]]:
    """Images in a batch, in words; how many such batches; their share. Of the sizes that occurred."""
    total = counts[math.inf]
    for (lower, below), (bound, count) in itertools.pairwise([(0.0, 0.0), *counts.items()]):
        if count > below:
            words = (
                f"> {lower:.0f}"
                if math.isinf(bound)
                else f"{bound:.0f}"
                if bound - lower == 1
                else f"{lower + 1:.0f}-{bound:.0f}"
            )
            yield words, count - below, (count - below) / total


def _latency(counts: dict[float, float], seconds: float) -> Sequence[str]:
    percentiles = (quantile(counts, share) for share in (0.5, 0.99))
    return (f"{counts[math.inf] / seconds:.1f}", *("-" if math.isnan(s) else f"{1000 * s:.3g}" for s in percentiles))


def _bar(value: float, longest: float) -> str:
    return "█" * round(_BAR * value / longest) if value > 0 and longest > 0 else ""


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
