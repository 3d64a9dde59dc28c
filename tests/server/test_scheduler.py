"""One model's queue for real: event loop, decoder and engine thread; order, overload, faults and the end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thoraxrt.engine.backends import open_backend
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import Radiograph, ThreadDecoder
from thoraxrt.engine.engine import Engine, Prediction
from thoraxrt.engine.errors import (
    BackendError,
    DeadlineError,
    ImageContentError,
    ImageFormatError,
    OverloadedError,
    RequestError,
    ServerError,
)
from thoraxrt.engine.execute import HostExecutor, NetworkInput
from thoraxrt.server.batching import BatchingOptions, Priority, Stage
from thoraxrt.server.decoding import ProcessDecoder, WorkerLimits
from thoraxrt.server.scheduler import FaultError, Scheduler
from thoraxrt.server.telemetry import NullTelemetry

ROUTINE, STAT = Priority.ROUTINE, Priority.STAT


class Record(NullTelemetry):
    """Telemetry that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []
        self.batches: list[int] = []
        self.refusals: list[str] = []
        self.depths: list[int] = []
        self.models: set[str] = set()

    def stage(self, model: str, stage: str, seconds: float) -> None:
        self.models.add(model)
        self.stages.append((stage, seconds))

    def batch(self, model: str, size: int) -> None:
        self.batches.append(size)

    def refused(self, model: str, reason: str) -> None:
        self.refusals.append(reason)

    def queue(self, model: str, depth: int) -> None:
        self.depths.append(depth)

    def count(self, stage: str) -> int:
        return sum(name == stage for name, _ in self.stages)


class HeldDecoder:
    """The real decoder's answers, given when a test says so; where it is `busy`, it has not begun with what it holds."""

    def __init__(self, *, busy: bool = False) -> None:
        self.busy = busy
        self.held: list[tuple[Future[Radiograph], Future[Radiograph]]] = []
        self._decoder = ThreadDecoder(1)

    def submit(self, data: bytes) -> Future[Radiograph]:
        answer: Future[Radiograph] = Future()
        if not self.busy:
            answer.set_running_or_notify_cancel()
        self.held.append((answer, self._decoder.submit(data)))
        return answer

    def give(self) -> None:
        while self.held:
            answer, decoding = self.held.pop(0)
            answer.set_result(decoding.result())

    def close(self) -> None:
        self._decoder.close()

    def __enter__(self) -> HeldDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FailingDecoder(HeldDecoder):
    """Raises, or gives futures that have failed already."""

    def __init__(self, error: Callable[[], Exception], *, at_once: bool) -> None:
        super().__init__()
        self.error = error
        self.at_once = at_once
        self.failing = False

    def submit(self, data: bytes) -> Future[Radiograph]:
        if not self.failing:
            return super().submit(data)
        if self.at_once:
            raise self.error()
        failed: Future[Radiograph] = Future()
        failed.set_exception(self.error())
        return failed


@asynccontextmanager
async def scheduling(
    engine: Engine,
    *,
    decoder: Any = None,
    telemetry: Record | None = None,
    queued: Counter[str] | None = None,
    **options: Any,
) -> AsyncIterator[Scheduler]:
    """A warm scheduler; at the end nothing is left in it, whatever happened."""
    scheduler = Scheduler(
        engine,
        decoder or engine.decoder,
        BatchingOptions(**{"workers": 2, "max_batch": 4, **options}),
        telemetry or Record(),
        model="tiny",
        queued=queued,
    )
    await scheduler.warm_up()
    for size in scheduler.options.sizes * 50:  # what the tiny network really takes is chance; now larger batches pay
        scheduler._policy.times.learn_batch(size, 0.001)
    try:
        yield scheduler
        await asyncio.wait_for(scheduler.drain(), 20)
        assert scheduler._policy.images == 0
    finally:
        await scheduler.close()


async def answer(
    scheduler: Scheduler,
    data: bytes,
    *,
    priority: Priority = ROUTINE,
    deadline_s: float | None = None,
    client: str = "a",
    **options: Any,
) -> Prediction:
    ticket = scheduler.admit(deadline_s, priority, client)
    try:
        return await scheduler.predict(ticket, data, **options)
    finally:
        scheduler.release(ticket)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def entered(gate: Any) -> None:
    """The network holds a batch."""
    assert await asyncio.to_thread(gate.entered.acquire, timeout=20)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run it, and fail where the event loop had anything to complain of."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await scenario()
        gc.collect()  # an exception that nobody took is told of by its future's end

    asyncio.run(watched())
    assert not complaints


def test_answers_are_the_engines(engine, radiograph):
    images = [radiograph(seed, width=100 + seed) for seed in range(12)]
    options = [
        {"findings": findings, "cam": cam} for findings in (None, ("Nodule",), (), ("Mass",)) for cam in (0, 1, 0)
    ]

    async def scenario() -> None:
        async with scheduling(engine) as scheduler:
            answers = await asyncio.gather(
                *(answer(scheduler, image, **chosen) for image, chosen in zip(images, options, strict=True))
            )
        for prediction, image, chosen in zip(answers, images, options, strict=True):
            alone = engine.predict_one(image, **chosen)
            assert prediction.to_dict() == alone.to_dict()
            assert (prediction.cam is None) == (not chosen["cam"])
            if chosen["cam"]:
                np.testing.assert_array_equal(prediction.cam, alone.cam)
            np.testing.assert_array_equal(prediction.radiograph.pixels, alone.radiograph.pixels)

    run(scenario)


def test_the_sample_bundle_answers_as_in_process(sample_bundle, radiograph):
    images = [radiograph(seed, width=300, height=280) for seed in range(10)]

    async def scenario(engine: Engine) -> None:
        record = Record()
        async with scheduling(engine, telemetry=record) as scheduler:
            answers = await asyncio.gather(*(answer(scheduler, image) for image in images))
        assert sum(record.batches) == len(images) > len(record.batches)
        for prediction, alone in zip(answers, engine.predict(images), strict=True):
            assert [finding.finding for finding in prediction.findings] == list(engine.manifest.labels)
            np.testing.assert_allclose(
                [finding.logit for finding in prediction.findings],
                [finding.logit for finding in alone.findings],
                atol=1e-4,
            )

    with Engine.open(sample_bundle, backend="onnxruntime", precision="fp32") as engine:
        run(lambda: scenario(engine))


@pytest.mark.parametrize(("buckets", "sizes"), [((), [1, 2, 3, 4]), ((1, 2, 4), [1, 2, 4])])
def test_warming_up_runs_every_batch_size_and_admits_only_then(gated_engine, gate, buckets, sizes):
    seen = []
    run_batch = gate.run
    gate.run = lambda images: (seen.append(len(images)), run_batch(images))[1]

    async def scenario() -> None:
        options = BatchingOptions(max_batch=4, buckets=buckets)
        scheduler = Scheduler(gated_engine, gated_engine.decoder, options, Record())
        with pytest.raises(ServerError, match="not warm yet; try again later"):
            scheduler.admit(None, ROUTINE, "a")
        gate.shut()
        warming = asyncio.create_task(scheduler.warm_up())
        await entered(gate)
        with pytest.raises(ServerError):
            scheduler.admit(None, ROUTINE, "a")
        gate.open()
        await warming
        scheduler.release(scheduler.admit(None, ROUTINE, "a"))
        await scheduler.close()
        assert sorted(set(seen)) == sizes
        assert min(Counter(seen).values()) == 2

    run(scenario)


@pytest.mark.parametrize("error", [BackendError("the runtime broke"), ValueError("broken")])
def test_a_network_that_fails_while_warming_up_is_said_so(gated_engine, gate, error):
    async def scenario() -> None:
        scheduler = Scheduler(gated_engine, gated_engine.decoder, BatchingOptions(), Record())
        gate.error = error
        with pytest.raises(type(error), match="broke"):
            await scheduler.warm_up()
        with pytest.raises(ServerError):
            scheduler.admit(None, ROUTINE, "a")
        await scheduler.close()

    run(scenario)


def test_while_the_network_is_busy_a_batch_gathers(gated_engine, gate, radiograph):
    async def scenario() -> None:
        record = Record()
        async with scheduling(gated_engine, telemetry=record) as scheduler:
            gate.shut()
            tasks = [asyncio.create_task(answer(scheduler, radiograph(0)))]
            await entered(gate)
            tasks += [asyncio.create_task(answer(scheduler, radiograph(seed))) for seed in range(1, 7)]
            await until(lambda: record.count("decode") == 7)
            gate.open()
            await asyncio.gather(*tasks)
        assert record.batches == [1, 4, 2]

    run(scenario)


def test_stat_goes_before_routine_and_each_in_its_order(gated_engine, gate, radiograph):
    async def scenario() -> None:
        record, order = Record(), []

        async def one(name: str, priority: Priority) -> None:
            await answer(scheduler, radiograph(0), priority=priority)
            order.append(name)

        async with scheduling(gated_engine, telemetry=record, max_batch=1, routine_every=2) as scheduler:
            gate.shut()
            tasks = [asyncio.create_task(one("first", ROUTINE))]
            await entered(gate)
            for name in ("a", "b", "S", "T"):
                tasks.append(asyncio.create_task(one(name, STAT if name.isupper() else ROUTINE)))
                await asyncio.sleep(0)
            await until(lambda: record.count("decode") == 5)
            gate.open()
            await asyncio.gather(*tasks)
        assert order == ["first", "S", "a", "T", "b"]

    run(scenario)


class Ahead(HostExecutor):
    """A CPU that works as a GPU does: a batch is computed when its result is asked for."""

    ahead = 1

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.events: list[str] = []

    def submit(self, pictures: Any, wanted: Any, cam: bool) -> Any:
        self.events.append(f"start {len(pictures)}")
        owner, compute = self, super().submit

        class Pending:
            def result(self) -> Any:
                answers = compute(pictures, wanted, cam).result()
                owner.events.append(f"result {len(pictures)}")
                return answers

        return Pending()


def test_the_next_batch_is_started_before_the_result_is_asked_for(tiny_bundle, gate, radiograph):
    async def scenario() -> None:
        record = Record()
        async with scheduling(engine, telemetry=record, max_batch=2, max_delay_s=1000.0) as scheduler:
            executor.events.clear()
            gate.shut()
            tasks = [asyncio.create_task(answer(scheduler, radiograph(0)))]
            await entered(gate)
            tasks += [asyncio.create_task(answer(scheduler, radiograph(seed))) for seed in range(5)]
            await until(lambda: record.count("decode") >= 5)
            gate.open()
            await asyncio.gather(*tasks)
        assert executor.events[:5] == ["start 1", "result 1", "start 2", "start 2", "result 2"]
        assert Counter(executor.events) == {
            "start 1": 2,
            "result 1": 2,
            "start 2": 2,
            "result 2": 2,
        }  # the last one waited for company only while another ran

    executor = Ahead(gate, tiny_bundle.manifest)
    with Engine(tiny_bundle, executor, ThreadDecoder(2)) as engine:
        run(scenario)


def test_a_full_queue_refuses_at_once_and_takes_again(gated_engine, gate, radiograph):
    async def scenario() -> None:
        record = Record()
        async with scheduling(gated_engine, telemetry=record, max_images=3, max_per_client=2) as scheduler:
            gate.shut()
            tasks = [asyncio.create_task(answer(scheduler, radiograph(0))) for _ in range(2)]
            await entered(gate)
            with pytest.raises(OverloadedError, match="this client has 2 images") as caught:
                await answer(scheduler, radiograph(0))
            assert caught.value.retry_after_s > 0
            tasks.append(asyncio.create_task(answer(scheduler, radiograph(0), client="b")))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError, match="the queue is full"):
                await answer(scheduler, radiograph(0), client="c")
            assert record.refusals == ["client", "images"]
            gate.open()
            await asyncio.gather(*tasks)
            await answer(scheduler, radiograph(0), client="c")

    run(scenario)


def test_too_many_bytes_are_refused(engine, radiograph):
    image = radiograph(0)

    async def scenario() -> None:
        with HeldDecoder() as decoder:
            record = Record()
            options = {"max_bytes": int(1.5 * len(image))}
            async with scheduling(engine, decoder=decoder, telemetry=record, **options) as scheduler:
                first = asyncio.create_task(answer(scheduler, image))
                await until(lambda: bool(decoder.held))
                with pytest.raises(OverloadedError, match="bytes wait to be decoded"):
                    await answer(scheduler, image)
                assert record.refusals == ["bytes"]
                decoder.give()
                await first

    run(scenario)


@pytest.mark.parametrize("stage", [Stage.WAITING, Stage.DECODING, Stage.DECODED, Stage.RUNNING])
@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_request_that_ends_early_leaves_wherever_it_stands(gated_engine, gate, radiograph, stage, how):
    async def scenario() -> None:
        decoder, record = HeldDecoder(), Record()
        with decoder:
            async with scheduling(gated_engine, decoder=decoder, telemetry=record, workers=1) as scheduler:
                gate.shut()
                others = []
                if stage in (Stage.WAITING, Stage.DECODED):  # another one occupies the decoder or the network
                    others.append(asyncio.create_task(answer(scheduler, radiograph(0))))
                    await until(lambda: bool(decoder.held))
                    if stage is Stage.DECODED:
                        decoder.give()
                        await entered(gate)
                task = asyncio.create_task(
                    answer(scheduler, radiograph(1), deadline_s=0.3 if how == "expired" else 60.0)
                )
                if stage is Stage.WAITING:
                    await asyncio.sleep(0.01)
                else:
                    await until(lambda: bool(decoder.held))
                if stage in (Stage.DECODED, Stage.RUNNING):
                    decoder.give()
                    await until(lambda: record.count("decode") == 1 + (stage is Stage.DECODED))
                if stage is Stage.RUNNING:
                    await entered(gate)
                runs = gate.runs
                if how == "cancelled":
                    task.cancel()
                with pytest.raises(asyncio.CancelledError if how == "cancelled" else DeadlineError):
                    await task  # while the network, or the decoder, still holds what it holds
                assert record.refusals == ["expired"] * (how == "expired")
                gate.open()
                decoder.give()
                await asyncio.gather(*others)
                await until(lambda: scheduler._policy.images == 0)
                assert gate.runs == max(runs, len(others))  # it reached the network only where it already had
                last = asyncio.create_task(answer(scheduler, radiograph(2)))
                await until(lambda: bool(decoder.held))
                decoder.give()
                assert (await last).width == 97

    run(scenario)


@pytest.mark.parametrize("how", ["cancelled", "expired", "unloaded"])
def test_what_nobody_waits_for_is_not_decoded(engine, radiograph, caplog, how):
    async def scenario() -> None:
        with HeldDecoder(busy=True) as decoder:
            async with scheduling(engine, decoder=decoder) as scheduler:
                deadline_s = 0.05 if how == "expired" else 60.0
                task = asyncio.create_task(answer(scheduler, radiograph(0), deadline_s=deadline_s))
                await until(lambda: bool(decoder.held))
                if how == "cancelled":
                    task.cancel()
                elif how == "unloaded":
                    await scheduler.close()
                with pytest.raises((asyncio.CancelledError, DeadlineError, ServerError)):
                    await task
                await until(lambda: decoder.held[0][0].cancelled())
                assert scheduler._policy.images == 0

    run(scenario)
    assert "CancelledError" not in caplog.text


def test_a_file_that_hangs_takes_its_worker_no_longer_than_its_request(engine, radiograph):
    async def scenario() -> None:
        with ProcessDecoder(1, worker_limits=WorkerLimits(seconds=60)) as decoder:
            async with scheduling(engine, decoder=decoder) as scheduler:
                os.kill(decoding_worker(), signal.SIGSTOP)
                with pytest.raises(DeadlineError):
                    await answer(scheduler, radiograph(0), deadline_s=0.1)
                assert (await answer(scheduler, radiograph(0), deadline_s=20.0)).width == 97

    run(scenario)


def decoding_worker() -> int:
    """The only one's process."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    (pid,) = (pid for file in children for pid in file.read_text().split() if is_worker(pid))
    return int(pid)


def is_worker(pid: str) -> bool:
    return b"thoraxrt.server.decoding" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_one_of_a_batch_that_is_cancelled_takes_nobody_with_it(gated_engine, gate, radiograph):
    async def scenario() -> None:
        record = Record()
        async with scheduling(gated_engine, telemetry=record) as scheduler:
            gate.shut()
            first = asyncio.create_task(answer(scheduler, radiograph(0)))
            await entered(gate)
            tasks = [asyncio.create_task(answer(scheduler, radiograph(seed))) for seed in range(4)]
            await until(lambda: record.count("decode") == 5)
            gate.open()
            await first
            tasks[1].cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(a) for a in answers] in (
                [Prediction, asyncio.CancelledError, Prediction, Prediction],
                [Prediction] * 4,  # it had been answered already
            )

    run(scenario)


def test_each_deadline_is_kept_while_the_network_holds_everything(gated_engine, gate, radiograph):
    async def scenario() -> None:
        async with scheduling(gated_engine) as scheduler:
            gate.shut()
            tasks = [
                asyncio.create_task(answer(scheduler, radiograph(0), deadline_s=deadline_s))
                for deadline_s in (60.0, 0.2, 0.05, 0.1)
            ]
            for task in (tasks[2], tasks[3], tasks[1]):
                with pytest.raises(DeadlineError):
                    await asyncio.wait_for(task, 20)
            gate.open()
            await tasks[0]

    run(scenario)


def test_an_error_that_comes_just_before_its_request_is_cancelled_is_nobodys(engine, radiograph):
    async def scenario() -> None:
        with HeldDecoder() as decoder:
            async with scheduling(engine, decoder=decoder) as scheduler:
                task = asyncio.create_task(answer(scheduler, radiograph(0)))
                await until(lambda: bool(decoder.held))
                decoder.held.pop()[0].set_exception(ImageFormatError("no image"))
                asyncio.get_running_loop().call_soon(task.cancel)  # after the error's delivery, before the task wakes
                with pytest.raises(asyncio.CancelledError):
                    await task

    run(scenario)


def test_draining_waits_for_what_the_decoder_still_holds(engine, radiograph):
    async def scenario() -> None:
        with HeldDecoder() as decoder:
            async with scheduling(engine, decoder=decoder) as scheduler:
                task = asyncio.create_task(scheduler.predict(scheduler.admit(None, ROUTINE, "a"), radiograph(0)))
                await until(lambda: bool(decoder.held))
                draining = asyncio.create_task(scheduler.drain())
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not draining.done()
                decoder.give()
                await asyncio.wait_for(draining, 20)

    run(scenario)


def test_a_body_that_comes_after_the_deadline_is_too_late(engine, radiograph):
    async def scenario() -> None:
        async with scheduling(engine, max_images=1, max_per_client=1) as scheduler:
            ticket = scheduler.admit(0.01, ROUTINE, "a")
            await asyncio.sleep(0.02)
            with pytest.raises(DeadlineError, match="being received"):
                await scheduler.predict(ticket, radiograph(0))
            assert (await answer(scheduler, radiograph(0))).width == 97  # its room is free

    run(scenario)


def test_an_unknown_finding_is_refused_and_its_room_given_back(engine, radiograph):
    async def scenario() -> None:
        async with scheduling(engine, max_images=1, max_per_client=1) as scheduler:
            with pytest.raises(RequestError, match="unknown finding Fracture"):
                await answer(scheduler, radiograph(0), findings=["Fracture"])
            assert (await answer(scheduler, radiograph(0))).width == 97

    run(scenario)


def test_what_geometry_would_have_made_needs_no_decoder(engine, radiograph):
    rng = np.random.default_rng(3)
    inputs = [NetworkInput(rng.integers(0, 256, (64, 64), np.uint8)) for _ in range(3)]
    wrong = NetworkInput(np.zeros((63, 64), np.uint8))

    async def scenario() -> None:
        async with scheduling(engine) as scheduler:
            answers = await asyncio.gather(
                *(answer(scheduler, image) for image in (*inputs, radiograph(0))),
                answer(scheduler, wrong),
                return_exceptions=True,
            )
        for prediction, image in zip(answers[:4], (*inputs, radiograph(0)), strict=True):
            assert prediction.to_dict() == engine.predict_one(image).to_dict()
        assert type(answers[4]) is ImageContentError

    run(scenario)


def test_a_file_is_let_go_once_it_is_decoded(gated_engine, gate, radiograph):
    async def scenario() -> None:
        record = Record()
        async with scheduling(gated_engine, telemetry=record) as scheduler:
            gate.shut()
            file = radiograph(0)
            references = sys.getrefcount(file)
            task = asyncio.create_task(scheduler.predict(scheduler.admit(None, ROUTINE, "a"), file))
            await entered(gate)
            await until(lambda: sys.getrefcount(file) == references)
            gate.open()
            await task

    run(scenario)


def test_an_engine_that_is_closed_beneath_it_says_so(gated_engine, radiograph):
    async def scenario() -> None:
        with ThreadDecoder(1) as decoder:
            async with scheduling(gated_engine, decoder=decoder) as scheduler:
                gated_engine.close()
                with pytest.raises(BackendError, match="the engine is closed"):
                    await answer(scheduler, radiograph(0))

    run(scenario)


def test_several_images_of_one_ticket(engine, radiograph):
    async def scenario() -> None:
        async with scheduling(engine) as scheduler:
            ticket = scheduler.admit(None, ROUTINE, "a", images=3)
            answers = await asyncio.gather(
                *(scheduler.predict(ticket, radiograph(seed)) for seed in range(2)),
                scheduler.predict(ticket, b"no image"),
                return_exceptions=True,
            )
            assert [type(each) for each in answers] == [Prediction, Prediction, ImageFormatError]

    run(scenario)


def test_a_fault_fails_its_batch_alone_and_its_text_stays_unsaid(gated_engine, gate, radiograph, caplog):
    async def scenario() -> None:
        record = Record()
        async with scheduling(gated_engine, telemetry=record) as scheduler:
            gate.shut()
            tasks = [asyncio.create_task(answer(scheduler, radiograph(0)))]
            await entered(gate)
            tasks += [asyncio.create_task(answer(scheduler, radiograph(seed))) for seed in range(2)]
            await until(lambda: record.count("decode") == 3)
            gate.error = ValueError("patient J. Doe")
            gate.open()
            for failed in await asyncio.gather(*tasks, return_exceptions=True):
                assert type(failed) is FaultError
                assert "Doe" not in str(failed)
            gate.error = None
            assert (await answer(scheduler, radiograph(0))).width == 97
        assert record.batches == [1, 2, 1]

    with caplog.at_level(logging.DEBUG):
        run(scenario)
    assert caplog.text.count("the engine failed with ValueError") == 2
    assert "conftest.py" in caplog.text  # where
    assert "Doe" not in caplog.text


def test_a_backend_that_fails_says_so_in_its_own_words(gated_engine, gate, radiograph, caplog):
    async def scenario() -> None:
        async with scheduling(gated_engine) as scheduler:
            gate.error = BackendError("the runtime broke")
            with pytest.raises(BackendError, match="the runtime broke"):
                await answer(scheduler, radiograph(0))
            gate.error = None
            await answer(scheduler, radiograph(0))

    with caplog.at_level(logging.DEBUG):
        run(scenario)
    assert "broke" not in caplog.text


@pytest.mark.parametrize("at_once", [False, True], ids=["failed future", "submit raises"])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (lambda: ImageFormatError("no image"), ImageFormatError),
        (lambda: RuntimeError("patient J. Doe"), FaultError),
    ],
)
def test_a_decoder_that_fails_fails_one_image(engine, radiograph, caplog, error, kind, at_once):
    async def scenario() -> None:
        with FailingDecoder(error, at_once=at_once) as decoder:
            async with scheduling(engine, decoder=decoder, max_images=500, max_per_client=500) as scheduler:
                # As many as would exhaust the stack if one led to the next.
                first = [asyncio.create_task(answer(scheduler, radiograph(0))) for _ in range(2)]
                await until(lambda: len(decoder.held) == 2)
                decoder.failing = True
                rest = [asyncio.create_task(answer(scheduler, b"x")) for _ in range(400)]
                await asyncio.sleep(0)
                decoder.give()
                answers = await asyncio.gather(*first, *rest, return_exceptions=True)
                assert Counter(map(type, answers)) == {Prediction: 2, kind: 400}

    with caplog.at_level(logging.DEBUG, "thoraxrt"):
        run(scenario)
    assert "Doe" not in caplog.text
    assert ("the decoder failed with RuntimeError" in caplog.text) == (kind is FaultError)


def test_a_decoder_that_is_closed_beneath_it_fails_what_waits_there(engine, radiograph):
    async def scenario() -> None:
        decoder = HeldDecoder()
        async with scheduling(engine, decoder=decoder) as scheduler:
            task = asyncio.create_task(answer(scheduler, radiograph(0)))
            await until(lambda: bool(decoder.held))
            decoder.held.pop()[0].set_exception(CancelledError())
            with pytest.raises(FaultError, match="CancelledError"):
                await task
        decoder.close()

    run(scenario)


def test_draining_answers_what_has_been_admitted_and_admits_no_more(gated_engine, gate, radiograph):
    async def scenario() -> None:
        async with scheduling(gated_engine) as scheduler:
            gate.shut()
            late = scheduler.admit(None, ROUTINE, "a")  # its body is still to come
            tasks = [asyncio.create_task(answer(scheduler, radiograph(seed))) for seed in range(6)]
            await entered(gate)
            draining = asyncio.create_task(scheduler.drain())
            await asyncio.sleep(0)
            with pytest.raises(ServerError, match="being unloaded"):
                scheduler.admit(None, ROUTINE, "a")
            tasks.append(asyncio.create_task(scheduler.predict(late, radiograph(0))))
            assert not draining.done()
            gate.open()
            await draining
            assert all(prediction.width == 97 for prediction in await asyncio.gather(*tasks))

    run(scenario)


def test_a_body_that_comes_after_the_end_is_told_to_go_elsewhere(engine, radiograph):
    async def scenario() -> None:
        async with scheduling(engine) as scheduler:
            ticket = scheduler.admit(60.0, ROUTINE, "a")
            await scheduler.close()
            with pytest.raises(ServerError, match="been unloaded; try again later, or another server"):
                await scheduler.predict(ticket, radiograph(0))
            scheduler.release(ticket)

    run(scenario)


def test_closing_answers_what_is_left(gated_engine, gate, radiograph):
    async def scenario() -> None:
        threads = threading.active_count()
        scheduler = Scheduler(gated_engine, gated_engine.decoder, BatchingOptions(max_batch=1), Record())
        await scheduler.warm_up()
        gate.shut()
        tasks = [asyncio.create_task(answer(scheduler, radiograph(0))) for _ in range(3)]
        await entered(gate)
        closing = asyncio.create_task(scheduler.close())
        for task in tasks:
            with pytest.raises(ServerError, match="unloaded before"):
                await task
        await asyncio.sleep(0.01)
        assert not closing.done()  # the engine may be freed only once its thread has left it
        gate.open()
        await closing
        assert gate.runs == 1
        with pytest.raises(ServerError, match="has been unloaded"):
            scheduler.admit(None, ROUTINE, "a")
        await scheduler.close()
        assert not any(thread.name == "engine" for thread in threading.enumerate())
        assert threading.active_count() <= threads + 4  # the decoder's and asyncio's own

    run(scenario)


def test_telemetry_hears_of_every_stage_and_batch(engine, radiograph):
    async def scenario() -> None:
        record = Record()
        async with scheduling(engine, telemetry=record) as scheduler:
            await asyncio.gather(*(answer(scheduler, radiograph(seed)) for seed in range(9)))
        assert record.models == {"tiny"}
        assert sum(record.batches) == 9
        assert Counter(name for name, _ in record.stages) == dict.fromkeys(
            ("queue", "decode", "batch_wait", "network"), 9
        )
        assert all(seconds >= 0 for _, seconds in record.stages)
        assert max(record.depths) == 9
        assert record.depths[-1] == 0

    run(scenario)


def test_the_queue_is_told_of_as_images_come_and_however_they_leave(gated_engine, gate, radiograph):
    async def scenario() -> None:
        record, queued = Record(), Counter({"tiny": 40})  # another version's
        async with scheduling(gated_engine, telemetry=record, queued=queued) as scheduler:
            with pytest.raises(ImageFormatError):
                await answer(scheduler, b"no image", deadline_s=60.0)
            await until(lambda: record.depths == [41, 40])
            ticket = scheduler.admit(60.0, ROUTINE, "a", images=3)
            scheduler.release(ticket)
            scheduler.admit(0.01, ROUTINE, "a")
            await until(lambda: record.depths == [41, 40, 43, 40, 41, 40])
            gate.shut()
            task = asyncio.create_task(answer(scheduler, radiograph(0), deadline_s=0.1))
            with pytest.raises(DeadlineError):
                await task
            assert record.depths[-1] == 41  # the network still holds it
            gate.open()
            await until(lambda: record.depths[-1] == 40)
        assert queued == {"tiny": 40}

    run(scenario)


def test_only_a_final_refusal_is_counted(engine):
    async def scenario() -> None:
        record = Record()
        async with scheduling(engine, telemetry=record, max_images=1, max_per_client=1) as scheduler:
            ticket = scheduler.admit(None, ROUTINE, "a")
            for final in (False, True):
                with pytest.raises(OverloadedError):
                    scheduler.admit(None, ROUTINE, "b", final=final)
            scheduler.release(ticket)
        assert record.refusals == ["images"]

    run(scenario)


def test_whatever_clients_do_each_gets_one_end(tiny_bundle, radiograph):
    rng = random.Random(5)
    images = [radiograph(seed) for seed in range(4)] + [b"no image"]
    ends: Counter[str] = Counter()

    async def one(scheduler: Scheduler) -> None:
        deadline_s = rng.choice([None, None, 5.0, 0.002])
        try:
            await answer(scheduler, rng.choice(images), priority=rng.choice(list(Priority)), deadline_s=deadline_s)
        except Exception as error:
            ends["OverloadedError" if isinstance(error, OverloadedError) else type(error).__name__] += 1
        else:
            ends["answered"] += 1

    async def scenario(engine: Engine) -> None:
        async with scheduling(engine, max_images=40, max_per_client=40, routine_every=3) as scheduler:
            tasks = []
            for _ in range(600):
                tasks.append(asyncio.create_task(one(scheduler)))
                if rng.random() < 0.2:
                    rng.choice(tasks[-20:]).cancel()
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.choice([0, 0.001, 0.005]))
            results = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
        assert cancelled + sum(ends.values()) == 600
        assert set(ends) <= {"answered", "DeadlineError", "ImageFormatError", "OverloadedError"}
        assert ends["answered"] > 50

    backend = open_backend(tiny_bundle, "onnxruntime")
    with Engine(tiny_bundle, HostExecutor(backend, tiny_bundle.manifest), ThreadDecoder(2)) as engine:
        run(lambda: scenario(engine))


class Planned(HostExecutor):
    """An executor whose network runs at two batch sizes only, as a GPU's plan does."""

    buckets = (2, 4)


def test_a_networks_own_batch_sizes_govern(tiny_bundle: Bundle, told: Any) -> None:
    executor = Planned(open_backend(tiny_bundle, "onnxruntime"), tiny_bundle.manifest)
    with Engine(tiny_bundle, executor, ThreadDecoder(1)) as engine:
        scheduler = Scheduler(engine, engine.decoder, BatchingOptions(max_batch=16), told)
    assert scheduler.options.sizes == (1, 2, 4)
