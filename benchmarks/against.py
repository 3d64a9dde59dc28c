"""`thoraxrt bench against`: this thoraxrt and another one, or another bundle, side by side in the same rounds.

The sure way to tell a slower build from a slower hour: both see the same machine at the same time. Owns the processes of
the two sides, the order of their turns, and the verdict.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from thoraxrt.benchmarks.rounds import MARGIN, Change, mean_ms, median_interval, verdict_from_interval
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import RequestError
from thoraxrt.export import Track, no_progress
from thoraxrt.server.client import Client
from thoraxrt.server.models import EngineOptions

__all__ = ["Work", "against", "alternating", "change_from_pairs"]

Work = Callable[[int], object]
"""What is timed, given the number of the round: in one round, both sides do the same."""

_SIDE: Final = Path(__file__).with_name("against_side.py")
_FEWEST: Final = 8
"""Rounds: fewer give no 99 % interval of a median."""
_TIMEOUT_S: Final = 30.0


def against(
    bundle: Path,
    images: Sequence[bytes],
    ran: EngineOptions,
    other: Path,
    *,
    batch: int,
    rounds: int = 26,
    margin: float = MARGIN,
    track: Track = no_progress,
) -> tuple[Change, ...]:
    """What changed from `other` to this thoraxrt with this bundle: an image and a batch in the engine, an image served.

    `other` is the Python of another environment, whose thoraxrt then opens the same bundle, or the folder of another
    bundle, which this thoraxrt opens. Each side is an engine and a server in fresh processes; all four stand until the
    end, and one at a time works. The number of rounds is best even: each side is then first as often as the other.
    `images` are encoded files; `ran` names backend, precision and device; what it leaves open each side chooses.

    Raises RequestError where `other` is neither, there are no images or fewer than 8 rounds, or a side cannot run;
    BundleError for a folder that is no bundle; what `Client.predict` raises.
    """
    if rounds < _FEWEST or not images:
        raise RequestError(f"{rounds} rounds of {len(images)} images; expected at least {_FEWEST} rounds and an image")
    ours, inherited = Path(sys.executable), dict(os.environ)
    if other.is_dir():
        sides = [(ours, inherited, Bundle.open(other).path), (ours, inherited, bundle)]
    elif os.access(other, os.X_OK):  # not resolved: a virtual environment's Python is a link
        without = {
            name: value for name, value in inherited.items() if name != "PYTHONPATH"
        }  # may lead to this thoraxrt
        sides = [(other.absolute(), without, bundle), (ours, inherited, bundle)]
    else:
        raise RequestError(
            f"{other} is no folder and cannot be run; expected another bundle, or a Python with thoraxrt"
        )
    with ExitStack() as opened:
        before, after = (opened.enter_context(_side(*side, images, ran, batch)) for side in sides)
        found = alternating({name: (before[name], after[name]) for name in after}, rounds, track)
    return tuple(change_from_pairs(name, *times, margin) for name, times in found.items())


def alternating(
    works: Mapping[str, tuple[Work, Work]], rounds: int, track: Track = no_progress
) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Milliseconds of each pair of works by round: one right after the other, the second first in every other round."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in works}
    for number in track(range(rounds), "Side by side", rounds):
        for name, pair in works.items():
            for side in (number % 2, 1 - number % 2):
                work = partial(pair[side], number)
                work()  # not timed: its own weights into the cache
                times[name][side].append(mean_ms(work))
    return {name: (tuple(before), tuple(after)) for name, (before, after) in times.items()}


def change_from_pairs(figure: str, before: Sequence[float], after: Sequence[float], margin: float = MARGIN) -> Change:
    """The change of one figure's milliseconds, by round: the median of the rounds' ratios, see `median_interval`.

    Raises RequestError with fewer than 8 rounds.
    """
    ratio, interval = median_interval(tuple(b / a for a, b in zip(before, after, strict=True)), 0.99)
    if interval is None:
        raise RequestError(f"{figure}: {len(before)} rounds; expected at least {_FEWEST}")
    return Change(
        figure=figure,
        before_ms=statistics.median(before),
        after_ms=statistics.median(after),
        ratio=ratio,
        interval=interval,
        verdict=verdict_from_interval(interval, margin),
    )


@contextmanager
def _side(
    python: Path, environment: Mapping[str, str], bundle: Path, images: Sequence[bytes], ran: EngineOptions, batch: int
) -> Iterator[dict[str, Work]]:
    """What one side does, by figure."""
    named = {"backend": ran.backend, "precision": ran.precision, "device": ran.device}
    options = {name: value for name, value in named.items() if value is not None}
    with ExitStack() as opened:
        log = opened.enter_context(tempfile.TemporaryFile())
        engine = opened.enter_context(_Process(python, environment, log, _SIDE))
        encoded = [base64.b64encode(image).decode() for image in images]  # over the pipe: no patient's image on a disk
        engine.ask(json.dumps({"bundle": str(bundle), "options": options, "batch": batch, "images": encoded}), "ready")
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        server = opened.enter_context(
            _Process(
                python,
                environment,
                log,
                "-m",
                "thoraxrt.cli",
                "serve",
                bundle,
                "--port",
                0,
                "--metrics-port",
                0,
                *flags,
            )
        )
        address = server.said("serving ").rpartition(" ")[2]
        client = opened.enter_context(Client(address, timeout=_TIMEOUT_S))
        yield {
            "engine, an image": lambda number: engine.ask(f"{number} image", "done"),
            f"engine, {batch} images": lambda number: engine.ask(f"{number} batch", "done"),
            "grpc, an image": lambda number: client.predict(images[number % len(images)]),
        }


class _Process:
    """A child that answers in lines, to the end of the block."""

    def __init__(self, python: Path, environment: Mapping[str, str], log: IO[bytes], *arguments: object) -> None:
        self._python, self._log = python, log
        # -P: neither this folder's modules nor a checkout that happens to be the working directory are its own
        self._process = subprocess.Popen(
            [str(python), "-P", *map(str, arguments)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._told, self._answers = self._process.stdin, self._process.stdout

    def ask(self, line: str, answer: str) -> str:
        """Its answer to a line. Raises RequestError where it has ended."""
        with suppress(BrokenPipeError):  # then it says nothing more
            print(line, file=self._told, flush=True)
        return self.said(answer)

    def said(self, start: str) -> str:
        """The next line on its stdout that starts so. Raises RequestError where none will come."""
        for line in self._answers:
            if line.startswith(start):
                return line.strip()
        self._process.wait()
        self._log.seek(0)
        logged = self._log.read().decode(errors="replace")
        last = ["its log is empty", *re.findall(r"\w.*[^\s│]", logged)][-1]  # without the frame round a usage error
        raise RequestError(f"{self._python} has ended ({last}); expected a Python whose thoraxrt can run this")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever it has left behind
        self._process.wait()
        self._answers.close()
        with suppress(BrokenPipeError):
            self._told.close()
