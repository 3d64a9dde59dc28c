"""The policy of one model's queue: who is admitted, what is decoded next, which images form the next batch.

Pure: no threads, no sleep, no engine, no gRPC. Its clock is injected and must never run backwards
(`time.monotonic`: what is done to the wall clock does not matter). One caller at a time.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import math
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from thoraxrt.engine.errors import DeadlineError, ImageLimitError, OverloadedError, RequestError

__all__ = ["Batcher", "BatchingOptions", "Job", "Priority", "RefusedError", "Stage", "Ticket"]

T = TypeVar("T")

_BATCHES_AHEAD: Final = 2
"""Decoded images of one priority that may wait, in largest batches: one to start next, one being filled."""

_MARGIN: Final = 1.25
"""An image is admitted where the predicted time, so many times over, fits its deadline: half of what is
admitted on the prediction alone would miss it, and cost the network for nothing."""

_COMING: Final = 4
"""Of another client's images that have not come yet, so many at most are work ahead: a server reads few of one client at
a time, and what a slow line brings later goes behind what has come meanwhile."""

_WEIGHT: Final = 0.2
"""Of the latest observation in a learned time."""

_SHARE_WEIGHT: Final = 0.05
"""Of the latest image in the learned share of routine ones."""

_ENOUGH: Final = 1.03
"""A batch pays where an image in it takes at most so many times what one takes in the best batch."""

_CLEARLY: Final = 1.1
"""A size that paid goes on to until it takes so many times the best: times scatter, and whenever a smaller size gets its
turn, those who do not fit wait for one batch more."""

_SLACK: Final = 2.0
"""A batch's learned time is not believed where it is so many times what other sizes say; see `_Times`."""


class Priority(enum.Enum):
    """Who goes first; the values are the wire's words."""

    ROUTINE = "routine"
    STAT = "stat"


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingOptions:
    """What bounds one model's queue.

    At most `max_batch` images go to the network at once, fewer where more gain nothing; an engine that has batch sizes
    of its own (a GPU's plan) goes by those. `buckets` are the batch sizes that it runs at, ascending up to
    `max_batch`, where a batch in between costs what the next larger costs (a GPU); empty where every size has its
    own cost (a CPU). While the engine is busy, a decoded image waits at most `max_delay_s` for a full batch before
    it may be started ahead (only an engine that takes batches ahead makes use of it). At most `max_images` are in
    the server, whatever their stage, and `max_bytes` of encoded files that have been read and not yet decoded; at
    most `max_per_client` images are one client's. A request without a deadline gets `default_deadline_s`, one with
    a longer deadline `longest_deadline_s`. `workers` images are in the decoder at once, which should be the
    decoder's own number of workers. At each stage, one in
    `routine_every` images taken is routine, where one waits.

    Raises ValueError where a bound makes no sense. Example: `BatchingOptions(max_batch=16, max_images=512)`.
    """

    max_batch: int = 8
    buckets: tuple[int, ...] = ()
    max_delay_s: float = 0.005
    max_images: int = 256
    max_bytes: int = 512 * 1024 * 1024
    max_per_client: int = 128
    default_deadline_s: float = 10.0
    longest_deadline_s: float = 60.0
    workers: int = field(default_factory=_usable_cpus)
    routine_every: int = 8

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_images", "max_bytes", "max_per_client", "workers"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"BatchingOptions {name} is {value}; expected at least 1")
        for name in ("default_deadline_s", "longest_deadline_s"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"BatchingOptions {name} is {value}; expected a number of seconds above 0")
        if not 0 <= self.max_delay_s < math.inf:
            raise ValueError(f"BatchingOptions max_delay_s is {self.max_delay_s}; expected 0 or more seconds")
        if self.routine_every < 2:
            raise ValueError(f"BatchingOptions routine_every is {self.routine_every}; expected at least 2")
        if self.buckets and (list(self.buckets) != sorted({1, *self.buckets, self.max_batch})):
            raise ValueError(
                f"BatchingOptions buckets is {self.buckets}; expected ascending sizes from 1 to max_batch, "
                f"which is {self.max_batch}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes that the network runs at, ascending."""
        return self.buckets or tuple(range(1, self.max_batch + 1))


class RefusedError(OverloadedError):
    """What is not admitted; `reason` is images, bytes, client or deadline, for metrics."""

    def __init__(self, message: str, *, reason: str, retry_after_s: float) -> None:
        retry_after_s = max(retry_after_s, 0.001)
        super().__init__(f"{message}; try again in {retry_after_s:.3g} s", retry_after_s=retry_after_s)
        self.reason = reason


class Stage(enum.Enum):
    """Where an image stands."""

    WAITING = enum.auto()
    DECODING = enum.auto()
    DECODED = enum.auto()
    RUNNING = enum.auto()
    GONE = enum.auto()


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """A request that has been admitted: room for its images, which are given one by one until `deadline`."""

    priority: Priority
    client: str
    deadline: float
    expected: int = 0
    jobs: set[Job[T]] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """One image in the queue; `item` is the caller's. Times are the clock's: given, decoding, decoded, in a batch, answered.

    Once `dropped`, nobody waits for its answer.
    """

    ticket: Ticket[T]
    item: T
    size: int
    number: int
    entered: float
    stage: Stage = Stage.WAITING
    dropped: bool = False
    decode_began: float = 0.0
    decode_ended: float = 0.0
    batch_began: float = 0.0
    batch_ended: float = 0.0


@dataclass(slots=True)
class _Running(Generic[T]):
    jobs: list[Job[T]]
    began: float
    expected: float


class Batcher(Generic[T]):
    """One model's queue. `ahead` is the engine's: batches worth starting while one is running.

    A ticket comes from `admit`, its images go in by `enter`. The caller asks for work by `next_to_decode` and
    `next_batch`, and reports it done by `decoded` and `batch_done`. Whom `expired` names is to be answered so; whom
    `drop` is told of has been answered otherwise, or has gone.
    """

    def __init__(
        self, options: BatchingOptions, *, ahead: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.options = options
        self.times = _Times(options.sizes)
        self._paying = 0  # a batch's size; see `_batch_size`
        self._ahead = ahead
        self._clock = clock
        self._numbers = itertools.count()
        self._images = 0
        self._bytes = 0
        self._clients: Counter[str] = Counter()
        self._deadlines: list[tuple[float, int, Ticket[T]]] = []  # a heap, finished tickets among them
        self._lapsed: list[Job[T]] = []
        self._expected: Counter[tuple[Priority, str]] = Counter()  # by client
        self._undecoded: Counter[Priority] = Counter()  # waiting or decoding
        self._decoding: Counter[Priority] = Counter()  # the decoder's lanes in use, for dropped images too
        self._waiting: dict[Priority, OrderedDict[Job[T], None]] = {p: OrderedDict() for p in Priority}
        self._decoded: dict[Priority, set[Job[T]]] = {p: set() for p in Priority}
        self._running: deque[_Running[T]] = deque()
        self._batch_ended = -math.inf
        self._routine_share = 1.0  # of the images taken while a routine one waits
        self._decode_turns = _Turns(options.routine_every)
        self._batch_turns = _Turns(options.routine_every)

    @property
    def images(self) -> int:
        """Images in the server: expected, waiting, being worked on."""
        return self._images

    # Admission

    def admit(self, deadline_s: float | None, priority: Priority, client: str, images: int = 1) -> Ticket[T]:
        """Make room for a request of `images` that has `deadline_s` seconds, or refuse it.

        Raises RefusedError where the answers would be late or a bound is reached, DeadlineError where the deadline has
        passed, RequestError for more images than there is ever room for.
        """
        options = self.options
        if not 1 <= images <= (most := min(options.max_images, options.max_per_client)):
            raise RequestError(f"{images} images in one request; expected 1 to {most}: send them in parts")
        if deadline_s is None:
            deadline_s = options.default_deadline_s
        deadline_s = min(deadline_s, options.longest_deadline_s)
        if not deadline_s > 0:
            raise DeadlineError("the deadline has passed already; allow the call more time")
        now = self._clock()
        self._sweep(now)
        self._check_room(client, images, now)
        self._check_time(deadline_s, priority, client, images, now)
        ticket: Ticket[T] = Ticket(priority, client, now + deadline_s)
        heapq.heappush(self._deadlines, (ticket.deadline, next(self._numbers), ticket))
        self._images += images
        self._clients[client] += images
        self._expect(ticket, images)
        return ticket

    def _expect(self, ticket: Ticket[T], images: int) -> None:
        """So many images more are expected of a ticket."""
        ticket.expected += images
        key = ticket.priority, ticket.client
        self._expected[key] += images
        if not self._expected[key]:
            del self._expected[key]

    def _check_room(self, client: str, images: int, now: float) -> None:
        options = self.options
        if (excess := self._images + images - options.max_images) > 0:
            raise RefusedError(
                f"the queue is full ({self._images} images, {options.max_images} at most)",
                reason="images",
                retry_after_s=self._seconds_until_answered(excess, now),
            )
        own = self._clients[client]
        if (excess := own + images - options.max_per_client) > 0:
            raise RefusedError(
                f"this client has {own} images in the queue, {options.max_per_client} at most",
                reason="client",
                # Its images are taken to be spread evenly among all.
                retry_after_s=self._seconds_until_answered(math.ceil(excess * self._images / own), now),
            )
        if self._bytes >= options.max_bytes:
            raise self._too_many_bytes()

    def _too_many_bytes(self) -> RefusedError:
        return RefusedError(
            f"{self._bytes} bytes wait to be decoded, {self.options.max_bytes} at most",
            reason="bytes",
            retry_after_s=self.times.decode_s,
        )

    def _check_time(self, deadline_s: float, priority: Priority, client: str, images: int, now: float) -> None:
        if self._images == 0:
            return  # whatever has been learned: else one bad time would be believed for ever
        predicted = self._predicted(priority, client, images, now)
        if predicted * _MARGIN > deadline_s:
            # What is ahead shrinks as time passes; the request's own time does not.
            alone = self.times.decode_s + self.times.of(min(images, self.options.max_batch))
            excess = min(predicted - deadline_s / _MARGIN, max(predicted - alone, 0.0))
            raise RefusedError(
                f"the answer would take {predicted:.3g} s and has {deadline_s:.3g} s",
                reason="deadline",
                retry_after_s=excess,
            )

    def _predicted(self, priority: Priority, client: str, images: int, now: float) -> float:
        """Seconds until `images` more of a client are answered.

        Two stages that overlap: the slower one governs, and the first or last step of the other is added.
        """
        times = self.times
        undecoded = images + self._undecoded_before(priority, client)
        unanswered = undecoded + len(self._decoded[priority])
        if priority is Priority.ROUTINE:
            # STAT images go first: those that are here and, at the rate of late, those that are yet to come.
            stat = self._undecoded_before(Priority.STAT, client)
            undecoded, unanswered = (
                max(undecoded + stat, math.ceil(undecoded / self._routine_share)),
                max(unanswered + stat + len(self._decoded[Priority.STAT]), math.ceil(unanswered / self._routine_share)),
            )
        decode = times.decode_s * max(1.0, undecoded / self.options.workers)
        last = times.of(self._batch_size(unanswered))
        return max(decode + last, times.decode_s + self._network_s(unanswered, now))

    def _undecoded_before(self, priority: Priority, client: str) -> int:
        """Images that will have to be decoded before a client's next one, those that are yet to come among them."""
        coming = (
            images if other == client else min(images, _COMING)
            for (its, other), images in self._expected.items()
            if its is priority
        )
        return self._undecoded[priority] + sum(coming)

    def _network_s(self, images: int, now: float) -> float:
        """Seconds until the network has run what is in flight and `images` more, in batches of the size that pays."""
        seconds = 0.0
        if self._running:
            first = self._running[0]
            # A batch that is overdue by some time is taken to need as much again.
            seconds = abs(first.began + first.expected - now)
            seconds += sum(running.expected for running in itertools.islice(self._running, 1, None))
        size = self._batch_size(self.options.max_batch if self._running else images)
        full, rest = divmod(images, size)
        if self._running and rest:
            full, rest = full + 1, 0  # those who come meanwhile fill it up
        return seconds + full * self.times.of(size) + self.times.of(rest)

    def _seconds_until_answered(self, images: int, now: float) -> float:
        """Seconds until so many of those in the server have been answered."""
        images = max(images - sum(len(running.jobs) for running in self._running), 0)
        decode = self.times.decode_s * images / self.options.workers
        return max(decode, self._network_s(images, now))

    def enter(self, ticket: Ticket[T], size: int, item: T) -> Job[T]:
        """Put one of a ticket's images, a file of `size` bytes, into the queue.

        Raises RefusedError where too many bytes wait, ImageLimitError for more bytes than may ever wait, DeadlineError
        where the deadline has passed; the ticket then still expects it. Raises ValueError where it expects none.
        """
        now = self._clock()
        self._sweep(now)
        if now >= ticket.deadline:
            raise DeadlineError("the deadline passed while the image was being received; allow the call more time")
        if ticket.expected < 1:
            raise ValueError("the ticket has no room for another image")
        if size > self.options.max_bytes:
            raise ImageLimitError(f"the file has {size} bytes; expected at most {self.options.max_bytes}")
        if self._bytes + size > self.options.max_bytes:
            raise self._too_many_bytes()
        job = Job(ticket, item, size, next(self._numbers), now)
        self._expect(ticket, -1)
        self._undecoded[ticket.priority] += 1
        ticket.jobs.add(job)
        self._bytes += size
        self._waiting[ticket.priority][job] = None
        return job

    def release(self, ticket: Ticket[T]) -> None:
        """Give back the room of the images that a ticket still expects; harmless where it expects none."""
        self._leave(ticket.client, ticket.expected)
        self._expect(ticket, -ticket.expected)

    # Work

    def next_to_decode(self) -> Job[T] | None:
        """The image to hand to the decoder now, if any."""
        self._sweep(self._clock())
        if self._decoding.total() >= self.options.workers:
            return None
        priority = self._decode_turns.next(self._may_decode(Priority.STAT), self._may_decode(Priority.ROUTINE))
        if priority is None:
            return None
        if self._waiting[Priority.ROUTINE]:
            self._routine_share += _SHARE_WEIGHT * ((priority is Priority.ROUTINE) - self._routine_share)
        job, _ = self._waiting[priority].popitem(last=False)
        self._decoding[priority] += 1
        job.stage, job.decode_began = Stage.DECODING, self._clock()
        return job

    def _may_decode(self, priority: Priority) -> bool:
        """Each priority has its own room, so that neither keeps the other from being decoded."""
        ahead = self._decoding[priority] + len(self._decoded[priority])
        return bool(self._waiting[priority]) and ahead < _BATCHES_AHEAD * self.options.max_batch

    def decoded(self, job: Job[T]) -> None:
        """The decoder is done with an image: it waits for a batch, or goes where it has been dropped."""
        now, priority = self._clock(), job.ticket.priority
        self._decoding[priority] -= 1
        self._bytes -= job.size
        job.size = 0
        if job.dropped:
            self._free(job)
            return
        self.times.learn_decode(now - job.decode_began)
        self._undecoded[priority] -= 1
        job.stage, job.decode_ended = Stage.DECODED, now
        self._decoded[priority].add(job)

    def next_batch(self) -> list[Job[T]]:
        """The images to hand to the engine now, none where it is better to wait.

        An engine with nothing to do takes what there is. While it is busy a batch gathers, and is started ahead
        once it is full or has waited long enough.
        """
        now = self._clock()
        self._sweep(now)
        ready = sum(map(len, self._decoded.values()))
        if not ready or len(self._running) > self._ahead:
            return []
        if self._running and ready < self.options.max_batch:
            oldest = min(job.decode_ended for jobs in self._decoded.values() for job in jobs)
            if now < oldest + self.options.max_delay_s:
                return []
        late = now + self.times.of(self._batch_size(ready))
        doomed = [job for jobs in self._decoded.values() for job in jobs if job.ticket.deadline <= late]
        if len(doomed) < ready:  # else one bad time would be believed for ever
            for job in doomed:
                self._lapse(job)
            ready -= len(doomed)
        size = self._batch_size(ready)
        # In the order in which they came, not in which they were decoded.
        stat, routine = (
            sorted(self._decoded[p], key=lambda job: job.number, reverse=True)
            for p in (Priority.STAT, Priority.ROUTINE)
        )
        batch = []
        for _ in range(size):
            priority = self._batch_turns.next(bool(stat), bool(routine))
            batch.append((stat if priority is Priority.STAT else routine).pop())
        for job in batch:
            self._decoded[job.ticket.priority].remove(job)
            job.stage, job.batch_began = Stage.RUNNING, now
        self._running.append(_Running(batch, now, self.times.of(size)))
        return batch

    def _batch_size(self, ready: int) -> int:
        """All that is ready, up to the size that pays; fewer where a smaller bucket clearly pays more."""
        paying = self._size_that_pays(self.options.sizes, self._paying)
        self._paying = paying if self.times.of(1) else 0  # nothing is known yet
        ready = min(ready, paying)
        return self._size_that_pays((*(n for n in self.options.sizes if n < ready), ready), ready)

    def _size_that_pays(self, sizes: Sequence[int], present: int) -> int:
        """The present one unless another gives clearly more images a second, the largest where nothing is known.

        Then the smallest that gives about as many as the best: a larger one delays its first.
        """
        per_image = {n: self.times.of(n) / n for n in sizes}
        best = min(per_image.values())
        if per_image.get(present, math.inf) <= _CLEARLY * best:
            return present
        return min(n for n, seconds in per_image.items() if seconds <= _ENOUGH * best) if best else max(sizes)

    def batch_done(self) -> None:
        """The oldest batch has left the engine, its images are answered."""
        now, running = self._clock(), self._running.popleft()
        # A batch that was started ahead waited for the one before it.
        self.times.learn_batch(len(running.jobs), now - max(running.began, self._batch_ended))
        self._batch_ended = now
        for job in running.jobs:
            job.batch_ended = now
            self._free(job)

    # Leaving

    def expired(self) -> list[Job[T]]:
        """The images whose deadline has passed, each once; none of them is handed out after it."""
        self._sweep(self._clock())
        lapsed, self._lapsed = self._lapsed, []
        return lapsed

    def abandon(self) -> list[Job[T]]:
        """All images that somebody waits for, as if every deadline had passed."""
        self._sweep(math.inf)
        return self.expired()

    def next_deadline(self) -> float | None:
        """The clock's time at which `expired` may have something to say."""
        return self._deadlines[0][0] if self._deadlines else None

    def _sweep(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            ticket = heapq.heappop(self._deadlines)[2]
            self.release(ticket)
            for job in sorted(ticket.jobs, key=lambda job: job.number):
                self._lapse(job)
        if len(self._deadlines) > 2 * self._images + 64:  # the finished ones' deadlines may be far
            self._deadlines = [entry for entry in self._deadlines if entry[2].expected or entry[2].jobs]
            heapq.heapify(self._deadlines)

    def _lapse(self, job: Job[T]) -> None:
        if not job.dropped:
            self._lapsed.append(job)
            self.drop(job)

    def drop(self, job: Job[T]) -> None:
        """Nobody waits for this answer: the image leaves at once, or once the decoder or the engine returns it.

        Harmless where it has gone.
        """
        if job.dropped or job.stage is Stage.GONE:
            return
        job.dropped = True
        priority = job.ticket.priority
        if job.stage in (Stage.WAITING, Stage.DECODING):
            self._undecoded[priority] -= 1
        if job.stage is Stage.WAITING:
            del self._waiting[priority][job]
            self._free(job)
        elif job.stage is Stage.DECODED:
            self._decoded[priority].remove(job)
            self._free(job)

    def _free(self, job: Job[T]) -> None:
        job.stage = Stage.GONE
        job.ticket.jobs.remove(job)
        self._bytes -= job.size
        self._leave(job.ticket.client, 1)

    def _leave(self, client: str, images: int) -> None:
        self._images -= images
        self._clients[client] -= images
        if not self._clients[client]:
            del self._clients[client]


class _Turns:
    """Whose turn it is: STAT's, but for one in `routine_every` where a routine image waits."""

    def __init__(self, routine_every: int) -> None:
        self._most = routine_every - 1
        self._row = 0

    def next(self, stat: bool, routine: bool) -> Priority | None:
        """The priority to take from, given who waits."""
        if stat and (not routine or self._row < self._most):
            self._row += routine
            return Priority.STAT
        self._row = 0
        return Priority.ROUTINE if routine else None


class _Times:
    """What decoding an image and running a batch of each size take, in seconds, exponentially weighted."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes
        self._batch_s: dict[int, float] = {}
        self._believed: dict[int, float] = {}  # what `of` has worked out
        self.decode_s = 0.0

    def learn_decode(self, seconds: float) -> None:
        """One image took so long."""
        self.decode_s = _learned(self.decode_s, seconds)

    def learn_batch(self, images: int, seconds: float) -> None:
        """A batch of so many images took so long."""
        size = self._size(images)
        self._batch_s[size] = _learned(self._batch_s.get(size, 0.0), seconds)
        self._believed.clear()

    def of(self, images: int) -> float:
        """What a batch of so many images takes; 0 for none, and where nothing is known.

        A larger batch takes no less, several smaller ones no less: where those say far less, the size's own time
        is an accident that nothing may ever correct, because it keeps such batches from being admitted.
        """
        if images not in self._believed:
            self._believed[images] = self._of(images) if images else 0.0
        return self._believed[images]

    def _of(self, images: int) -> float:
        size = self._size(images)
        others = (s * max(1, math.ceil(size / known)) for known, s in self._batch_s.items() if known != size)
        seconds = min(self._batch_s.get(size, math.inf), _SLACK * min(others, default=math.inf))
        return 0.0 if seconds == math.inf else seconds

    def _size(self, images: int) -> int:
        return next(size for size in self._sizes if size >= images)


def _learned(known: float, seconds: float) -> float:
    return known + _WEIGHT * (seconds - known) if known else seconds
