"""The queue's policy on a clock that the tests turn: hand-worked cases, a state machine, and simulated load."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from thoraxrt.engine.errors import DeadlineError, ImageLimitError, OverloadedError, RequestError
from thoraxrt.server.batching import Batcher, BatchingOptions, Job, Priority, RefusedError, Stage, Ticket

ROUTINE, STAT = Priority.ROUTINE, Priority.STAT


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Arrival:
    """A request: when it comes, with how long a deadline, and how long its body takes to arrive."""

    at: float
    deadline_s: float = 1.0
    priority: Priority = ROUTINE
    client: str = "a"
    reading_s: float = 0.0
    patience_s: float = math.inf
    admitted: bool = False
    retry_after_s: float = 0.0
    outcomes: list[str] = field(default_factory=list)
    answered_at: float = math.nan
    batch_wait_s: float = math.nan


class Simulation:
    """A server in a loop: what the scheduler's threads do, in simulated time and without threads.

    `decode_s()` is one image's time in the decoder, `batch_s(n)` a batch's in the engine, which runs one at a time.
    """

    def __init__(
        self,
        options: BatchingOptions,
        decode_s: Callable[[], float],
        batch_s: Callable[[int], float],
        *,
        ahead: int = 0,
        warm: bool = True,
    ) -> None:
        self.clock = Clock()
        self.policy: Batcher[Arrival] = Batcher(options, ahead=ahead, clock=self.clock)
        self.decode_s, self.batch_s = decode_s, batch_s
        self.ahead = ahead
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.in_flight: list[list[Job[Arrival]]] = []
        self.engine_free_at = 0.0
        self.waiting_for_result = False
        self.batches: list[list[Job[Arrival]]] = []
        if warm:
            for size in options.sizes:
                self.policy.times.learn_batch(size, batch_s(size))

    def at(self, time: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), do))

    def run(self, arrivals: list[Arrival]) -> None:
        start = self.clock.now
        for arrival in arrivals:
            self.at(start + arrival.at, lambda arrival=arrival: self.arrive(arrival))
        while self.events:
            self.clock.now, _, do = heapq.heappop(self.events)
            do()
            self.work()

    def arrive(self, arrival: Arrival) -> None:
        try:
            ticket = self.policy.admit(arrival.deadline_s, arrival.priority, arrival.client)
        except OverloadedError as error:
            arrival.retry_after_s = error.retry_after_s
            return
        arrival.admitted = True
        self.at(ticket.deadline, lambda: None)  # the scheduler's timer
        self.at(self.clock.now + arrival.reading_s, lambda: self.enter(ticket, arrival))

    def enter(self, ticket: Ticket[Arrival], arrival: Arrival) -> None:
        try:
            job = self.policy.enter(ticket, 1000, arrival)
        except DeadlineError:
            arrival.outcomes.append("expired")
            return
        if arrival.patience_s < math.inf:
            self.at(self.clock.now + arrival.patience_s, lambda: self.cancel(job))

    def cancel(self, job: Job[Arrival]) -> None:
        if not job.item.outcomes:
            self.policy.drop(job)
            job.item.outcomes.append("cancelled")

    def work(self) -> None:
        for job in self.policy.expired():
            job.item.outcomes.append("expired")
        while job := self.policy.next_to_decode():
            self.at(self.clock.now + self.decode_s(), lambda job=job: self.policy.decoded(job))
        while not self.waiting_for_result:  # the engine's thread
            if jobs := self.policy.next_batch():
                self.start(jobs)
            if self.in_flight and (not jobs or len(self.in_flight) > self.ahead):
                self.waiting_for_result = True
            elif not jobs:
                break

    def start(self, jobs: list[Job[Arrival]]) -> None:
        assert all(not job.dropped and self.clock.now < job.ticket.deadline for job in jobs)
        self.batches.append(jobs)
        self.in_flight.append(jobs)
        for job in jobs:
            job.item.batch_wait_s = self.clock.now - job.decode_ended
        self.engine_free_at = max(self.engine_free_at, self.clock.now) + self.batch_s(len(jobs))
        self.at(self.engine_free_at, self.finish)

    def finish(self) -> None:
        self.waiting_for_result = False
        for job in self.in_flight.pop(0):
            if not job.dropped:
                job.item.outcomes.append("answered")
                job.item.answered_at = self.clock.now
        self.policy.batch_done()


def poisson(rate: float, seconds: float, seed: int, make: Callable[[float], Arrival] = Arrival) -> list[Arrival]:
    rng, now, arrivals = random.Random(seed), 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        arrivals.append(make(now))
    return arrivals


# By hand


class Hands:
    """A policy on a fake clock, and an image's steps by name."""

    def __init__(self, *, ahead: int = 0, **options: object) -> None:
        self.clock = Clock()
        self.policy: Batcher[str] = Batcher(
            BatchingOptions(**{"workers": 1000, **options}),  # type: ignore[arg-type]
            ahead=ahead,
            clock=self.clock,
        )

    def enter(self, item: str, priority: Priority = ROUTINE, deadline_s: float | None = None) -> Job[str]:
        return self.policy.enter(self.policy.admit(deadline_s, priority, "a"), 10, item)

    def decode(self) -> list[str]:
        """Decode all that may be decoded now, in no time; what was taken, in order."""
        taken = []
        while job := self.policy.next_to_decode():
            taken.append(job)
        for job in taken:
            self.policy.decoded(job)
        return [job.item for job in taken]

    def ready(self, items: str, priority: Priority = ROUTINE) -> None:
        for item in items:
            self.enter(item, priority)
        self.decode()

    def batch(self) -> str:
        return "".join(job.item for job in self.policy.next_batch())


@pytest.fixture(params=[0, 1], ids=["cpu", "gpu"])
def ahead(request) -> int:
    return request.param


def test_a_lone_request_waits_for_nothing(ahead):
    hands = Hands(ahead=ahead, max_delay_s=10)
    hands.ready("a")
    assert hands.batch() == "a"  # and the clock has not moved


@pytest.mark.parametrize("batch_ms", [1, 100])
def test_a_lone_request_takes_its_own_time_and_no_more(ahead, batch_ms):
    options = BatchingOptions(workers=2, max_delay_s=10)
    simulation = Simulation(options, lambda: 0.005, lambda n: n * batch_ms / 1000, ahead=ahead)
    arrivals = [Arrival(at=float(i)) for i in range(50)]
    simulation.run(arrivals)
    for arrival in arrivals:
        assert arrival.answered_at - 1000 - arrival.at == pytest.approx(0.005 + batch_ms / 1000)
        assert arrival.batch_wait_s == 0


def test_an_idle_engine_takes_what_there_is_and_a_busy_one_lets_it_gather():
    hands = Hands(max_batch=4)
    hands.ready("abc")
    assert hands.batch() == "abc"
    hands.ready("defghi")
    assert hands.batch() == ""
    hands.policy.batch_done()
    assert hands.batch() == "defg"
    hands.policy.batch_done()
    assert hands.batch() == "hi"


def test_a_batch_is_started_ahead_once_it_is_full_or_has_waited():
    hands = Hands(ahead=1, max_batch=3, max_delay_s=0.5)
    hands.ready("a")
    assert hands.batch() == "a"
    hands.ready("bcde")
    assert hands.batch() == "bcd"  # full
    assert hands.batch() == ""  # two are in flight
    hands.policy.batch_done()
    assert hands.batch() == ""
    hands.clock.now += 0.4
    hands.ready("f")
    assert hands.batch() == ""
    hands.clock.now += 0.1
    assert hands.batch() == "ef"
    hands.policy.batch_done()
    hands.policy.batch_done()
    assert hands.batch() == ""


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.1, 8: 1.2}, "abcde"),  # a GPU: 8 cost little more than 4
        ({1: 1.0, 2: 1.8, 4: 3.2, 8: 6.4}, "abcd"),  # 5 cost 8
        ({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, "a"),  # nothing is gained by waiting for others
        ({}, "abcde"),
    ],
)
def test_what_fills_no_bucket_goes_where_it_costs_least(times, taken):
    hands = Hands(buckets=(1, 2, 4, 8), max_batch=8, default_deadline_s=60)
    for size, seconds in times.items():
        hands.policy.times.learn_batch(size, seconds)
    hands.ready("abcde")
    assert hands.batch() == taken


@pytest.mark.parametrize(
    ("per_image", "taken"),
    [
        ((1.0, 0.926, 0.94, 0.95, 0.96, 0.97, 0.97, 0.97), "ab"),  # DenseNet-121 on two CPUs
        ((1.0, 0.9, 0.8, 0.7, 0.62, 0.61, 0.6, 0.6), "abcdef"),  # six are within 3 % of eight
        ((1.02, 1.1, 1.2, 1.1, 1.1, 1.1, 1.0, 1.1), "a"),  # as good as the best, and no wait
    ],
)
def test_a_batch_is_no_larger_than_pays(per_image, taken):
    hands = Hands(max_batch=8, default_deadline_s=60)
    for size, seconds in enumerate(per_image, 1):
        hands.policy.times.learn_batch(size, size * seconds)
    hands.ready("abcdefghij")
    assert hands.batch() == taken


def test_the_size_that_pays_stays_until_another_clearly_pays_more():
    """Whoever does not fit because it got smaller waits for a whole batch more."""
    hands = Hands(max_batch=4, default_deadline_s=60)
    seconds = {1: 0.12, 2: 0.12, 3: 0.1, 4: 0.099}  # that an image takes
    for size, each in seconds.items():
        hands.policy.times.learn_batch(size, size * each)
    taken = []
    for seconds[3] in (0.12, 0.09, 0.12, 0.09, 0.13, 0.13, 0.13, 0.13):  # of the latest, a fifth is learned
        hands.ready("abcd")
        while batch := hands.batch():
            taken.append(batch)
            hands.clock.now += len(batch) * seconds[len(batch)]
            hands.policy.batch_done()
    assert taken[:8] == ["abc", "d"] * 4
    assert taken[-1] == "abcd"


def test_what_a_batch_of_the_size_that_pays_can_answer_is_not_late():
    hands = Hands(max_batch=8, default_deadline_s=60)
    hands.enter("a", deadline_s=3)
    hands.ready("bcdefgh")
    for size in range(1, 9):
        hands.policy.times.learn_batch(size, size + (size == 1))  # all eight would take 8 s
    assert hands.batch() == "ab"
    assert hands.policy.expired() == []


def test_stat_goes_first_at_both_stages_and_routine_has_its_turn():
    hands = Hands(max_batch=12, routine_every=4, workers=1000)
    for item in "abc":
        hands.enter(item)
    for item in "STUVWXYZ":
        hands.enter(item, STAT)
    assert "".join(hands.decode()) == "STUaVWXbYZc"
    assert hands.batch() == "STUaVWXbYZc"


def test_stat_overtakes_decoded_routine_images_and_is_decoded_where_their_room_is_full():
    hands = Hands(max_batch=2)
    hands.ready("abcdef")  # two batches' worth is decoded
    assert hands.batch() == "ab"
    hands.ready("S", STAT)
    hands.policy.batch_done()
    assert hands.batch() == "Sc"


def test_a_flood_of_stat_images_leaves_routine_ones_their_room_in_the_decoder():
    hands = Hands(max_batch=2)
    hands.ready("STUVWX", STAT)
    hands.enter("a")
    assert hands.decode() == ["a"]


def test_images_are_decoded_ahead_for_two_batches_and_in_as_many_workers_as_there_are():
    hands = Hands(max_batch=3)
    for item in "abcdefgh":
        hands.enter(item)
    assert len(hands.decode()) == 6
    assert hands.batch() == "abc"
    assert hands.decode() == ["g", "h"]
    hands = Hands(workers=2)
    jobs = [hands.enter(item) for item in "abc"]
    assert [hands.policy.next_to_decode(), hands.policy.next_to_decode()] == jobs[:2]
    assert hands.policy.next_to_decode() is None
    hands.policy.drop(jobs[0])  # the decoder still works on it
    assert hands.policy.next_to_decode() is None
    hands.policy.decoded(jobs[0])
    assert hands.policy.next_to_decode() is jobs[2]


def test_images_go_in_the_order_in_which_they_came_not_in_which_they_were_decoded():
    hands = Hands()
    for item in "abc":
        hands.enter(item)
    taken = [hands.policy.next_to_decode() for _ in range(3)]
    for job in reversed(taken):
        hands.policy.decoded(job)
    assert hands.batch() == "abc"


@pytest.mark.parametrize("stage", list(Stage))
def test_what_is_dropped_leaves_no_trace(stage):
    hands = Hands(max_images=1, max_batch=1)
    job = hands.enter("a")
    steps = [hands.policy.next_to_decode, lambda: hands.policy.decoded(job), hands.batch, hands.policy.batch_done]
    index = list(Stage).index(stage)
    for step in steps[:index]:
        step()
    assert job.stage is stage
    hands.policy.drop(job)
    hands.policy.drop(job)
    if stage in (Stage.DECODING, Stage.RUNNING):
        assert hands.policy.images == 1  # its memory is still in use
        steps[index]()
    assert job.stage is Stage.GONE
    assert hands.policy.images == 0
    assert hands.batch() == ""
    hands.ready("b")
    assert hands.batch() == "b"


@pytest.mark.parametrize("stage", list(Stage)[:-1])
def test_what_expires_is_named_once_and_never_handed_out(stage):
    hands = Hands()
    job = hands.enter("a", deadline_s=2)
    other = hands.enter("b")
    assert hands.policy.next_deadline() == 1002
    index = list(Stage).index(stage)
    for step in [hands.policy.next_to_decode, lambda: hands.policy.decoded(job), hands.batch][:index]:
        step()
    hands.clock.now += 2
    assert hands.decode() == ["b"]
    assert hands.batch() == ("b" if stage is not Stage.RUNNING else "")
    assert hands.policy.expired() == [job]
    assert hands.policy.expired() == []
    assert hands.policy.next_deadline() == other.ticket.deadline


def test_a_batch_of_what_has_expired_is_none():
    hands = Hands()
    job = hands.enter("a", deadline_s=2)
    hands.decode()
    hands.clock.now += 2
    assert hands.batch() == ""
    assert hands.policy.expired() == [job]


def test_what_would_be_late_makes_room_for_what_would_not_but_is_tried_where_nothing_else_is():
    hands = Hands(default_deadline_s=60)
    hands.enter("a", deadline_s=1)
    hands.policy.times.learn_batch(1, 4.0)
    hands.decode()
    assert hands.batch() == "a"
    hands.policy.batch_done()
    hands.enter("b", deadline_s=1)  # the server was idle
    hands.decode()
    assert hands.batch() == "b"
    hands = Hands(default_deadline_s=60)
    hands.enter("a", deadline_s=1)
    hands.enter("b")
    hands.policy.times.learn_batch(1, 4.0)
    hands.decode()
    assert hands.batch() == "b"
    assert [job.item for job in hands.policy.expired()] == ["a"]


def test_the_room_is_bounded_in_images_and_each_refusal_says_when_to_return():
    hands = Hands(max_images=4, max_batch=2, default_deadline_s=60, max_per_client=4)
    hands.policy.times.learn_batch(2, 3.0)
    hands.ready("abcd")
    assert hands.batch() == "ab"
    hands.clock.now += 1
    with pytest.raises(RefusedError, match=r"the queue is full \(4 images, 4 at most\); try again in 2 s") as caught:
        hands.enter("e")
    assert caught.value.reason == "images"
    assert caught.value.retry_after_s == pytest.approx(2)
    hands.clock.now += 2
    hands.policy.batch_done()
    hands.enter("e")


def hint(hands: Hands, client: str = "a", deadline_s: float | None = None) -> float:
    with pytest.raises(RefusedError) as caught:
        hands.policy.admit(deadline_s, ROUTINE, client)
    return caught.value.retry_after_s


def test_where_decoding_governs_the_hint_is_its():
    hands = Hands(max_images=4, max_batch=1, workers=2, default_deadline_s=60)
    hands.policy.times.learn_batch(1, 0.5)
    hands.policy.times.learn_decode(6.0)
    for item in "abcd":
        hands.enter(item)
    assert hint(hands) == pytest.approx(3)


def test_a_clients_own_images_are_expected_to_leave_with_the_others():
    hands = Hands(max_images=8, max_batch=1, max_per_client=2, default_deadline_s=60)
    hands.policy.times.learn_batch(1, 1.0)
    for client in "ababcc":
        hands.policy.admit(None, ROUTINE, client)
    assert hint(hands, "a") == pytest.approx(3)


def test_a_deadline_shorter_than_any_answer_is_told_to_return_when_the_server_is_idle():
    hands = Hands(max_batch=1, default_deadline_s=60)
    hands.policy.times.learn_batch(1, 2.0)
    hands.ready("ab")
    assert hands.batch() == "a"
    hands.clock.now += 1
    assert hint(hands, deadline_s=0.5) == pytest.approx(3)


def test_an_engine_that_is_overdue_is_expected_to_stay_so():
    hands = Hands(max_batch=1, default_deadline_s=60)
    hands.policy.times.learn_batch(1, 1.0)
    hands.ready("a")
    assert hands.batch() == "a"
    hands.policy.release(hands.policy.admit(10.0, ROUTINE, "a"))
    hands.clock.now += 20
    assert hint(hands, deadline_s=10) == pytest.approx(20 - 1 + 1 - 10 / 1.25)


def test_the_room_is_bounded_in_bytes():
    hands = Hands(max_bytes=100, workers=1)
    policy = hands.policy
    with pytest.raises(ImageLimitError, match="101 bytes; expected at most 100"):
        policy.enter(policy.admit(None, ROUTINE, "a"), 101, "huge")
    ticket = policy.admit(None, ROUTINE, "a")
    policy.enter(policy.admit(None, ROUTINE, "a"), 60, "a")
    with pytest.raises(RefusedError, match="60 bytes wait to be decoded, 100 at most") as caught:
        policy.enter(ticket, 41, "b")
    assert caught.value.reason == "bytes"
    policy.enter(ticket, 40, "b")
    with pytest.raises(RefusedError):
        policy.admit(None, ROUTINE, "a")  # before it is read
    job = policy.next_to_decode()
    with pytest.raises(RefusedError):
        policy.admit(None, ROUTINE, "a")
    policy.decoded(job)
    policy.admit(None, ROUTINE, "a")


def test_no_client_takes_all_the_room():
    hands = Hands(max_per_client=2)
    ticket = hands.policy.admit(None, ROUTINE, "a")
    hands.policy.admit(None, STAT, "a")
    with pytest.raises(RefusedError, match="this client has 2 images in the queue, 2 at most") as caught:
        hands.policy.admit(None, STAT, "a")
    assert caught.value.reason == "client"
    hands.policy.admit(None, ROUTINE, "b")
    hands.policy.release(ticket)
    hands.policy.release(ticket)
    hands.policy.admit(None, ROUTINE, "a")
    with pytest.raises(RequestError, match="3 images in one request; expected 1 to 2: send them in parts"):
        hands.policy.admit(None, ROUTINE, "c", images=3)


def test_a_ticket_has_room_for_the_images_it_was_given_for():
    hands = Hands()
    ticket = hands.policy.admit(3.0, ROUTINE, "a", images=3)
    assert hands.policy.images == 3
    jobs = [hands.policy.enter(ticket, 1, item) for item in "ab"]
    hands.policy.release(ticket)
    assert hands.policy.images == 2
    with pytest.raises(ValueError, match="no room"):
        hands.policy.enter(ticket, 1, "c")
    hands.clock.now += 3
    with pytest.raises(DeadlineError, match="while the image was being received"):
        hands.policy.enter(ticket, 1, "c")
    assert hands.policy.expired() == jobs
    assert hands.policy.images == 0


def test_a_request_that_never_comes_keeps_its_room_until_its_deadline_alone():
    hands = Hands(max_images=1, max_per_client=1)
    hands.policy.admit(5.0, ROUTINE, "a")
    with pytest.raises(RefusedError):
        hands.policy.admit(5.0, ROUTINE, "a")
    hands.clock.now += 5
    hands.policy.admit(5.0, ROUTINE, "a")
    assert hands.policy.expired() == []


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, math.nan])
def test_a_deadline_that_has_passed_is_said_at_once(deadline_s):
    hands = Hands()
    with pytest.raises(DeadlineError, match="passed already"):
        hands.policy.admit(deadline_s, ROUTINE, "a")
    assert hands.policy.images == 0


def test_deadlines_are_given_and_cut_as_configured():
    hands = Hands(default_deadline_s=7, longest_deadline_s=9)
    assert hands.policy.admit(None, ROUTINE, "a").deadline == 1007
    assert hands.policy.admit(math.inf, ROUTINE, "a").deadline == 1009
    assert hands.policy.admit(8.0, ROUTINE, "a").deadline == 1008


def test_what_cannot_be_answered_in_time_is_refused_at_once_and_taken_when_the_hint_says():
    def loaded(at: float) -> Arrival:
        simulation = Simulation(BatchingOptions(workers=2), lambda: 0.002, lambda n: 0.01 * n)
        simulation.run([*(Arrival(0.0) for _ in range(100)), probe := Arrival(at, deadline_s=0.4)])
        return probe

    refused = loaded(0.05)
    assert not refused.admitted
    assert 0.3 < refused.retry_after_s < 0.6
    assert not loaded(0.05 + 0.95 * refused.retry_after_s).admitted
    assert loaded(0.05 + 1.001 * refused.retry_after_s).outcomes == ["answered"]


def test_a_stat_request_is_not_refused_for_what_it_overtakes():
    hands = Hands(workers=1)
    for size in hands.policy.options.sizes:
        hands.policy.times.learn_batch(size, 0.1)
    for item in range(100):
        hands.enter(str(item))
    with pytest.raises(RefusedError):
        hands.enter("x", deadline_s=1.0)
    hands.enter("x", STAT, deadline_s=1.0)


def test_bodies_that_one_client_is_slow_to_send_keep_nobody_else_out():
    hands = Hands(workers=2)
    for size in hands.policy.options.sizes:
        hands.policy.times.learn_batch(size, 0.025 * size)
    for _ in range(100):
        hands.policy.admit(60.0, ROUTINE, "slow")
    with pytest.raises(RefusedError, match="the answer would take"):
        hands.policy.admit(2.0, ROUTINE, "slow")
    hands.policy.admit(0.2, ROUTINE, "other")


def test_one_terrible_time_is_not_believed_for_ever():
    options = BatchingOptions(workers=2)
    simulation = Simulation(options, lambda: 0.005, lambda n: 0.01 * n)
    for size in options.sizes:
        for _ in range(50):
            simulation.policy.times.learn_batch(size, 1000.0)
    arrivals = poisson(200, 30, 1)
    simulation.run(arrivals)
    late = [arrival for arrival in arrivals if arrival.at > 15]
    answered = sum(arrival.outcomes == ["answered"] for arrival in late)
    assert answered > 0.9 * 100 * 15


def test_a_size_is_not_believed_to_take_more_than_twice_what_the_others_say():
    times = Batcher[str](BatchingOptions(max_batch=8)).times
    assert [times.of(n) for n in (0, 1, 8)] == [0, 0, 0]
    times.learn_batch(2, 1.0)
    assert [times.of(n) for n in (1, 2, 3, 8)] == [2, 1, 4, 8]
    times.learn_batch(8, 100.0)
    assert times.of(8) == 8
    times.learn_batch(8, 0.0)
    assert times.of(8) == 8
    times.learn_batch(8, 0.0)
    for _ in range(20):
        times.learn_batch(8, 3.0)
    assert times.of(8) == pytest.approx(3.0, rel=0.3)


def test_what_has_finished_is_forgotten_long_before_its_deadline():
    hands = Hands(longest_deadline_s=1e6, max_per_client=2)
    for i in range(5000):
        hands.enter(str(i), deadline_s=1e6)
        hands.decode()
        hands.batch()
        hands.policy.batch_done()
    assert len(hands.policy._deadlines) < 100
    assert not hands.policy._clients


def test_the_wall_clock_is_never_read(monkeypatch):
    def jumped() -> float:
        raise AssertionError("the wall clock jumps")

    monkeypatch.setattr("time.time", jumped)
    policy: Batcher[str] = Batcher(BatchingOptions())
    policy.enter(policy.admit(None, ROUTINE, "a"), 1, "a")
    policy.decoded(policy.next_to_decode())
    assert [job.item for job in policy.next_batch()] == ["a"]
    policy.batch_done()
    assert policy.images == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"max_batch": 0},
        {"max_images": 0},
        {"max_bytes": -1},
        {"max_per_client": 0},
        {"workers": 0},
        {"max_delay_s": -1.0},
        {"max_delay_s": math.nan},
        {"default_deadline_s": 0.0},
        {"longest_deadline_s": math.inf},
        {"routine_every": 1},
        {"buckets": (1, 4)},
        {"buckets": (2, 8)},
        {"buckets": (1, 8, 4, 8)},
    ],
)
def test_senseless_options_are_refused(fields):
    with pytest.raises(ValueError, match=rf"BatchingOptions {next(iter(fields))} is .*; expected"):
        BatchingOptions(**fields)


# Under load


def answered(arrivals: list[Arrival]) -> int:
    return sum(arrival.outcomes == ["answered"] for arrival in arrivals)


LOADS = {
    "the network governs": (BatchingOptions(workers=2), 0.005, lambda n: 0.002 + 0.01 * n, 0),
    "decoding governs": (BatchingOptions(workers=2), 0.04, lambda n: 0.002 + 0.01 * n, 0),
    "a GPU, batches ahead": (
        BatchingOptions(workers=16, max_batch=32, buckets=(1, 2, 4, 8, 16, 32)),
        0.005,
        lambda n: 0.004 + 0.0004 * (1 << (n - 1).bit_length()),
        1,
    ),
}


@pytest.mark.parametrize("load", [0.8, 3.0])
@pytest.mark.parametrize("batches", [3, 12], ids=["short deadline", "long deadline"])
@pytest.mark.parametrize(("options", "decode_s", "batch_s", "ahead"), LOADS.values(), ids=LOADS)
def test_goodput_holds_at_300_percent_of_capacity(options, decode_s, batch_s, ahead, batches, load):
    rng, most = random.Random(1), options.max_batch
    capacity = min(options.workers / decode_s, most / batch_s(most))
    seconds = 2000 / capacity
    simulation = Simulation(
        options,
        lambda: decode_s * rng.uniform(0.8, 1.2),
        lambda n: batch_s(n) * rng.uniform(0.8, 1.2),
        ahead=ahead,
    )
    deadline_s = batches * (batch_s(most) + decode_s)
    arrivals = poisson(load * capacity, seconds, 2, lambda at: Arrival(at, deadline_s))
    simulation.run(arrivals)
    offered = len(arrivals) / seconds / capacity
    assert answered(arrivals) >= 0.9 * min(1.0, offered) * capacity * seconds
    assert sum(arrival.outcomes == ["expired"] for arrival in arrivals) < 0.02 * len(arrivals)


def mixed(seed: int, rate: float, seconds: float) -> list[Arrival]:
    """Clients that are slow, impatient, urgent, or gone before their body."""
    rng = random.Random(seed)

    def make(at: float) -> Arrival:
        return Arrival(
            at,
            deadline_s=rng.choice([0.1, 0.3, 1.0, 5.0]),
            priority=STAT if rng.random() < 0.3 else ROUTINE,
            client=rng.choice("abcdefgh"),
            reading_s=rng.choice([0.0, 0.0, 0.01, 0.5]),
            patience_s=rng.choice([math.inf, math.inf, math.inf, 0.05]),
        )

    return poisson(rate, seconds, seed, make)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("load", [0.7, 3.0])
def test_every_admitted_request_has_one_end_and_every_batch_keeps_the_rules(seed, load):
    rng = random.Random(seed)
    options = BatchingOptions(workers=2, max_images=60, max_per_client=20, routine_every=4)
    ahead = seed % 2
    simulation = Simulation(
        options, lambda: rng.expovariate(200), lambda n: (0.002 + 0.01 * n) * rng.uniform(0.5, 1.5), ahead=ahead
    )
    arrivals = mixed(seed, load * 97, 20)
    simulation.run(arrivals)
    assert all(len(arrival.outcomes) == arrival.admitted for arrival in arrivals)
    ends = Counter(arrival.outcomes[0] for arrival in arrivals if arrival.admitted)
    assert min(ends[end] for end in ("answered", "expired", "cancelled")) > 10, (
        "a simulation of little would prove little"
    )
    assert simulation.policy.images == 0
    for batch in simulation.batches:
        assert 1 <= len(batch) <= options.max_batch
        for priority in Priority:
            numbers = [job.number for job in batch if job.ticket.priority is priority]
            assert numbers == sorted(numbers)


def test_stat_images_are_answered_sooner_and_routine_ones_still_are():
    rng = random.Random(3)
    options = BatchingOptions(workers=2, routine_every=5)
    simulation = Simulation(options, lambda: 0.005, lambda n: (0.002 + 0.01 * n) * rng.uniform(0.8, 1.2))
    stat = poisson(300, 20, 1, lambda at: Arrival(at, priority=STAT, client="s"))
    routine = poisson(300, 20, 2, lambda at: Arrival(at, client="r"))
    simulation.run(stat + routine)
    assert answered(stat) + answered(routine) > 0.9 * 97 * 20
    assert answered(stat) > 3 * answered(routine)
    assert answered(routine) > 0.9 * 97 * 20 / 5  # one in five

    simulation = Simulation(options, lambda: 0.005, lambda n: (0.002 + 0.01 * n) * rng.uniform(0.8, 1.2))
    stat = poisson(50, 20, 1, lambda at: Arrival(at, priority=STAT, client="s"))
    routine = poisson(100, 20, 2, lambda at: Arrival(at, client="r"))
    simulation.run(stat + routine)
    assert answered(stat) == len(stat)
    assert answered(stat) + answered(routine) > 0.9 * 97 * 20
    # Those whom STAT images will overtake are refused, not admitted and left to expire.
    assert sum(arrival.outcomes == ["expired"] for arrival in routine) < 0.05 * len(routine)


# Anything, in any order


class Anything(RuleBasedStateMachine):
    """The policy beside lists that say what it must know."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.tickets: list[Ticket[int]] = []
        self.waiting: list[Job[int]] = []
        self.decoding: list[Job[int]] = []
        self.ready: list[Job[int]] = []
        self.running: list[list[Job[int]]] = []
        self.ends: Counter[Job[int]] = Counter()
        self.jobs: list[Job[int]] = []
        self.rows = [0, 0]  # STAT images taken while a routine one could have been, at each stage

    def start(self, ahead: int, buckets: bool) -> None:
        options = BatchingOptions(
            max_batch=4,
            buckets=(1, 2, 4) if buckets else (),
            max_images=12,
            max_per_client=9,
            max_bytes=100,
            max_delay_s=0.1,
            workers=3,
            routine_every=3,
        )
        self.ahead = ahead
        self.policy: Batcher[int] = Batcher(options, ahead=ahead, clock=self.clock)

    @rule(ahead=st.integers(0, 2), buckets=st.booleans())
    @precondition(lambda self: not hasattr(self, "policy"))
    def begin(self, ahead: int, buckets: bool) -> None:
        self.start(ahead, buckets)

    def held(self, client: str | None = None) -> int:
        tickets = [ticket for ticket in self.tickets if client in (None, ticket.client)]
        jobs = itertools.chain(self.waiting, self.decoding, self.ready, *self.running)
        return sum(ticket.expected for ticket in tickets) + sum(job.ticket in tickets for job in jobs)

    def end(self, job: Job[int]) -> None:
        """Its request is answered: what only waits is gone."""
        self.ends[job] += 1
        for jobs in (self.waiting, self.ready):
            if job in jobs:
                jobs.remove(job)

    def sweep(self) -> None:
        for job in self.policy.expired():
            assert job.ticket.deadline <= self.clock.now + (self.slowest if job in self.ready else 0)
            self.end(job)

    @property
    def slowest(self) -> float:
        return max(self.policy.times.of(size) for size in self.policy.options.sizes)

    @rule(
        deadline_s=st.sampled_from([None, 0.05, 1.0, 30.0]),
        priority=st.sampled_from(Priority),
        client=st.sampled_from("ab"),
        images=st.integers(1, 3),
    )
    @precondition(lambda self: hasattr(self, "policy"))
    def admit(self, deadline_s: float | None, priority: Priority, client: str, images: int) -> None:
        self.sweep()
        held, own = self.held(), self.held(client)
        try:
            ticket = self.policy.admit(deadline_s, priority, client, images)
        except RefusedError as error:
            true = {
                "images": held + images > 12,
                "client": own + images > 9,
                "bytes": sum(job.size for job in (*self.waiting, *self.decoding)) == 100,
                "deadline": held > 0,
            }
            reason = error.reason
            assert true[reason], reason
            return
        assert held + images <= 12
        assert own + images <= 9
        self.tickets.append(ticket)

    @rule(data=st.data(), size=st.integers(0, 60))
    @precondition(lambda self: any(ticket.expected for ticket in self.tickets))
    def enter(self, data: st.DataObject, size: int) -> None:
        ticket = data.draw(st.sampled_from([ticket for ticket in self.tickets if ticket.expected]))
        self.sweep()
        used = sum(job.size for job in (*self.waiting, *self.decoding))
        try:
            job = self.policy.enter(ticket, size, len(self.jobs))
        except RefusedError:
            assert used + size > 100
        except DeadlineError:
            assert ticket.deadline <= self.clock.now
            assert not ticket.expected
        else:
            assert used + size <= 100
            self.jobs.append(job)
            self.waiting.append(job)

    @rule(data=st.data())
    @precondition(lambda self: self.tickets)
    def release(self, data: st.DataObject) -> None:
        self.policy.release(data.draw(st.sampled_from(self.tickets)))

    @rule()
    @precondition(lambda self: hasattr(self, "policy"))
    def decode(self) -> None:
        self.sweep()
        room = {
            p: [job for job in self.waiting if job.ticket.priority is p]
            if sum(job.ticket.priority is p for job in (*self.decoding, *self.ready)) < 8
            else []
            for p in Priority
        }
        job = self.policy.next_to_decode()
        if job is None:
            assert len(self.decoding) == 3 or not any(room.values())
            return
        assert len(self.decoding) < 3
        self.check_turn(0, job, room)
        self.waiting.remove(job)
        self.decoding.append(job)

    def check_turn(self, stage: int, job: Job[int], room: dict[Priority, list[Job[int]]]) -> None:
        """First come, first served in a priority; STAT first, but one in three is routine."""
        priority = job.ticket.priority
        assert job is min(room[priority], key=lambda job: job.number)
        if priority is STAT:
            self.rows[stage] += bool(room[ROUTINE])
            assert self.rows[stage] <= 2
        else:
            assert not room[STAT] or self.rows[stage] == 2
            self.rows[stage] = 0

    @rule(data=st.data())
    @precondition(lambda self: self.decoding)
    def decoded(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.decoding))
        self.decoding.remove(job)
        self.policy.decoded(job)
        if not job.dropped:
            self.ready.append(job)

    @rule()
    @precondition(lambda self: hasattr(self, "policy"))
    def batch(self) -> None:
        self.sweep()
        busy = len(self.running)
        ready = list(self.ready)
        batch = self.policy.next_batch()
        self.sweep()  # what would be late has been left out
        if not batch:
            assert not ready or busy
            if ready and busy <= self.ahead:
                assert len(ready) < 4
                assert self.clock.now < min(job.decode_ended for job in ready) + 0.1
            return
        assert busy <= self.ahead
        assert len(batch) <= 4
        room = {p: [job for job in self.ready if job.ticket.priority is p] for p in Priority}
        for job in batch:
            self.check_turn(1, job, room)
            room[job.ticket.priority].remove(job)
            self.ready.remove(job)
            assert self.clock.now < job.ticket.deadline
        self.running.append(batch)

    @rule()
    @precondition(lambda self: self.running)
    def batch_done(self) -> None:
        for job in self.running.pop(0):
            if not job.dropped:
                self.ends[job] += 1
        self.policy.batch_done()

    @rule(data=st.data())
    @precondition(lambda self: self.jobs)
    def drop(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs[-12:]))
        self.sweep()
        if not self.ends[job]:
            self.policy.drop(job)
            self.end(job)
        else:
            self.policy.drop(job)  # harmless

    @rule(seconds=st.sampled_from([0.001, 0.06, 0.5, 1e5]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def the_count_is_right(self) -> None:
        if hasattr(self, "policy"):
            self.sweep()
            assert self.policy.images == self.held() <= 12
            undecoded = [job for job in (*self.waiting, *self.decoding) if not job.dropped]
            assert self.policy._undecoded.total() == len(undecoded)
            assert self.policy._expected.total() == sum(ticket.expected for ticket in self.tickets)
            assert all(self.policy._expected.values())
            assert all(self.ends[job] <= 1 for job in self.jobs)

    def teardown(self) -> None:
        """Whatever happened: what is left is worked off, and a lone request is served."""
        if not hasattr(self, "policy"):
            return
        for ticket in self.tickets:
            self.policy.release(ticket)
        self.work_off()
        assert all(self.ends[job] == 1 for job in self.jobs)
        assert self.policy.images == 0
        self.jobs.append(job := self.policy.enter(self.policy.admit(1.0, ROUTINE, "a"), 1, 0))
        self.waiting.append(job)
        self.work_off()
        assert self.ends[job] == 1

    def work_off(self) -> None:
        for _ in range(100):
            self.decode()
            if self.decoding:
                self.policy.decoded(job := self.decoding.pop(0))
                self.ready += [] if job.dropped else [job]
            self.batch()
            if self.running:
                self.batch_done()


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
