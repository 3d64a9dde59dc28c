"""Where the time goes: spans per stage, as a table and as a trace that Perfetto opens.

Knows no stage by name: whoever does the work records it. Spans of the GPU come from its events, the
others from the host's clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from thoraxrt.engine.errors import RequestError

__all__ = ["Profile", "StageTime", "span"]


class _Span(NamedTuple):
    lane: str
    stage: str
    start: float
    seconds: float
    detail: dict[str, Any]


class StageTime(NamedTuple):
    """One stage's spans: how many, seconds in all, and milliseconds of one at the median and the 99th percentile."""

    lane: str
    stage: str
    spans: int
    seconds: float
    p50_ms: float
    p99_ms: float


class Profile:
    """Spans as they are recorded, from any thread; all are kept, so profile some hundred images, not an archive.

    A *lane* is what does one thing at a time: a thread, a CUDA stream.

    Example:
        profile = Profile()
        with profile.span("network", "network", images=8): ...
        profile.write(Path("trace.json"))
    """

    def __init__(self) -> None:
        self._spans: list[_Span] = []

    def record(self, lane: str, stage: str, start: float, seconds: float, **detail: Any) -> None:
        """Keep one span; `start` is on the clock of `time.perf_counter`, `detail` is shown in the trace."""
        self._spans.append(_Span(lane, stage, start, seconds, detail))

    @contextmanager
    def span(self, lane: str, stage: str, **detail: Any) -> Iterator[None]:
        """Record how long the block took, also where it raised."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.record(lane, stage, start, time.perf_counter() - start, **detail)

    def clear(self) -> None:
        """Forget the spans so far: those of a warm-up."""
        self._spans.clear()

    def stages(self) -> list[StageTime]:
        """Each stage's time, in the order in which the stages first began."""
        groups: dict[tuple[str, str], list[float]] = {}
        for span in sorted(self._spans, key=lambda span: span.start):
            lane = span.lane.rstrip("0123456789 _")  # the threads of a pool count together
            groups.setdefault((lane, span.stage), []).append(span.seconds)
        return [
            StageTime(
                lane,
                stage,
                len(seconds),
                sum(seconds),
                *(1e3 * float(value) for value in np.percentile(seconds, (50, 99))),
            )
            for (lane, stage), seconds in groups.items()
        ]

    def write(self, path: Path) -> None:
        """Write the spans as trace events, times in microseconds from the first one.

        Format: "Trace Event Format" of the Chromium project, complete events. Raises RequestError where
        the file cannot be written.
        """
        begun = min((span.start for span in self._spans), default=0.0)
        threads = {lane: number for number, lane in enumerate(sorted({span.lane for span in self._spans}), 1)}
        names = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}}
            for lane, number in threads.items()
        ]
        spans = [
            {
                "ph": "X",
                "name": span.stage,
                "pid": 1,
                "tid": threads[span.lane],
                "ts": (span.start - begun) * 1e6,
                "dur": span.seconds * 1e6,
                "args": span.detail,
            }
            for span in self._spans
        ]
        try:
            path.write_bytes(msgspec.json.encode({"traceEvents": names + spans, "displayTimeUnit": "ms"}))
        except OSError as error:
            raise RequestError(f"the trace cannot be written to {path}: {error.strerror}") from error


def span(profile: Profile | None, lane: str, stage: str, **detail: Any) -> AbstractContextManager[None]:
    """The profile's span, or nothing where nobody profiles."""
    return nullcontext() if profile is None else profile.span(lane, stage, **detail)
