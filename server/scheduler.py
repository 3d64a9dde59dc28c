"""One loaded model's life between the event loop, the decoder and the engine's thread.

Owns that thread and the lock around the policy (`thoraxrt.server.batching`), which decides; this module carries
images and answers. The engine's thread and the decoder's workers take their next work from the policy themselves,
so that neither waits for the event loop. Knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np

from thoraxrt.engine.decode import Decoder, Radiograph
from thoraxrt.engine.engine import Batch, Engine, Prediction
from thoraxrt.engine.errors import DeadlineError, ServerError, ThoraxrtError
from thoraxrt.engine.execute import NetworkInput
from thoraxrt.server.batching import Batcher, BatchingOptions, Job, Priority, RefusedError, Ticket
from thoraxrt.server.telemetry import NullTelemetry

__all__ = ["FaultError", "Scheduler"]

_log = logging.getLogger(__name__)


class FaultError(Exception):
    """An image met a fault of the server, which has been logged by type and place; it says nothing of the image."""


class _Item:
    """What the policy carries of one image: its bytes until they are handed to the decoder, its pixels after it."""

    __slots__ = ("answer", "cam", "decoding", "findings", "image", "picture")

    def __init__(
        self,
        image: bytes | NetworkInput,
        findings: Collection[str] | None,
        cam: bool,
        answer: asyncio.Future[Prediction],
    ) -> None:
        self.image = image
        self.findings = findings
        self.cam = cam
        self.answer = answer
        self.decoding: Future[Any] | None = None
        self.picture: Radiograph | NetworkInput | None = None


_Answer = Prediction | Exception

_STAGES: Final = ("queue", "decode", "batch_wait", "network")
"""Between the times of a job, in their order."""


class Scheduler:
    """Answers one model's images in the order and the batches that `BatchingOptions` ask for.

    Engine and decoder stay their owner's, and are to be closed after the scheduler. `model` names it in `telemetry`;
    `queued` counts each model's images in the server, and is one for all who may report the same model. All methods are
    for one event loop's thread, and none of them is slow there.

    Example:
        scheduler = Scheduler(engine, engine.decoder, BatchingOptions(), telemetry, model="chexnet")
        await scheduler.warm_up()
        ticket = scheduler.admit(2.0, Priority.ROUTINE, "client")
        try:
            prediction = await scheduler.predict(ticket, data)
        finally:
            scheduler.release(ticket)
    """

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        options: BatchingOptions,
        telemetry: NullTelemetry,
        *,
        model: str = "default",
        queued: Counter[str] | None = None,
    ) -> None:
        if engine.buckets:
            options = replace(options, max_batch=engine.buckets[-1], buckets=tuple(sorted({1, *engine.buckets})))
        self.model = model
        self.options = options
        self._engine = engine
        self._decoder = decoder
        self._telemetry = telemetry
        self._queued = Counter() if queued is None else queued
        self._counted = 0  # of the images in it, this scheduler's
        self._policy: Batcher[_Item] = Batcher(options, ahead=engine.ahead)
        self._changed = threading.Condition(threading.Lock())  # around the policy and `_closed`
        self._closed = False
        self._thread: threading.Thread | None = None
        self._refusal: str | None = "the model is not warm yet"
        self._timer: asyncio.TimerHandle | None = None
        self._empty: asyncio.Event | None = None  # while draining

    async def warm_up(self) -> None:
        """Start the engine's thread and run the network twice at every batch size that will be used; then admit.

        Raises what the network failed with.
        """
        self._loop = asyncio.get_running_loop()
        warm: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(warm,), name="engine", daemon=True)
        self._thread.start()
        await asyncio.wrap_future(warm)
        self._refusal = None

    # On the event loop

    def admit(
        self, deadline_s: float | None, priority: Priority, client: str, images: int = 1, *, final: bool = True
    ) -> Ticket[_Item]:
        """Make room for a request before it is read; see `Batcher.admit`. `release` it in any case.

        Who goes on asking has the refusals before the `final` one not counted. Raises RefusedError, DeadlineError or
        RequestError, and ServerError while the model is not served.
        """
        if self._refusal:
            raise self._unserved()
        try:
            with self._changed:
                ticket = self._policy.admit(deadline_s, priority, client, images)
        except RefusedError as error:
            if final:
                self._telemetry.refused(self.model, error.reason)
            raise
        self._note_depth()
        self._watch(ticket.deadline)
        return ticket

    def _unserved(self) -> ServerError:
        return ServerError(f"{self._refusal}; try again later, or another server")

    async def predict(
        self,
        ticket: Ticket[_Item],
        image: bytes | NetworkInput,
        *,
        findings: Collection[str] | None = None,
        cam: bool = False,
    ) -> Prediction:
        """The answer for one of a ticket's images; see `Engine.predict`. Cancelling it takes the image out.

        Raises what the image or the engine met (ThoraxrtError, FaultError), OverloadedError where too many bytes
        wait, DeadlineError once the deadline has passed, ServerError where the scheduler is closed before.
        """
        if self._refusal and not ticket.expected:  # its room was taken back while the image was being received
            raise self._unserved()
        self._engine.check_findings(findings)
        size = len(image) if isinstance(image, bytes) else image.array.nbytes
        item = _Item(image, findings, cam, self._loop.create_future())
        del image  # once it is decoded, nothing keeps the file
        try:
            with self._changed:
                job = self._policy.enter(ticket, size, item)
        except RefusedError as error:
            self._telemetry.refused(self.model, error.reason)
            raise
        self._feed()
        try:
            prediction = await item.answer
        except asyncio.CancelledError:
            with self._changed:
                self._policy.drop(job)
            self._stop_decoding(job)
            self._note_depth()
            raise
        times = (job.entered, job.decode_began, job.decode_ended, job.batch_began, job.batch_ended)
        for stage, (began, ended) in zip(_STAGES, pairwise(times), strict=True):
            self._telemetry.traced(self.model, stage, ended - began, ended)
        return prediction

    def release(self, ticket: Ticket[_Item]) -> None:
        """Give back the room of the images that a ticket's request did not bring."""
        with self._changed:
            self._policy.release(ticket)
        self._note_depth()

    async def drain(self) -> None:
        """Admit nothing more, and wait until what has been admitted is answered; `close` ends what takes too long."""
        self._refusal = "the model is being unloaded"
        self._empty = asyncio.Event()
        self._note_depth()
        await self._empty.wait()

    async def close(self) -> None:
        """Give what is left ServerError, and wait for the engine's thread: it ends after the batch that it runs."""
        self._refusal = "the model has been unloaded"
        if self._timer:
            self._timer.cancel()
        with self._changed:
            jobs = self._policy.abandon()
            self._closed = True
            self._changed.notify()
        error = ServerError("the model was unloaded before this image's turn; try again later, or another server")
        self._deliver([(job.item, error) for job in jobs])
        for job in jobs:
            self._stop_decoding(job)
        if self._thread:
            await asyncio.to_thread(self._thread.join)

    def _watch(self, deadline: float | None) -> None:
        """Have `_expire` called at the deadline, or earlier."""
        if deadline is None:
            return
        delay = max(deadline - time.monotonic(), 0.0)
        if self._timer is None or self._timer.when() > self._loop.time() + delay:
            if self._timer:
                self._timer.cancel()
            self._timer = self._loop.call_later(delay, self._expire)

    def _expire(self) -> None:
        self._timer = None
        with self._changed:
            jobs, deadline = self._policy.expired(), self._policy.next_deadline()
        self._report_late(jobs)
        self._note_depth()
        self._watch(deadline)

    def _deliver(self, answers: Sequence[tuple[_Item, _Answer]]) -> None:
        for item, answer in answers:
            if item.answer.done():  # cancelled or expired meanwhile
                continue
            if isinstance(answer, Exception):
                item.answer.set_exception(answer)
            else:
                item.answer.set_result(answer)
        self._note_depth()

    def _note_depth(self) -> None:
        images = self._policy.images
        if images != self._counted:
            self._queued[self.model] += images - self._counted
            self._counted = images
            self._telemetry.queue(self.model, self._queued[self.model])
        if self._empty and not images:
            self._empty.set()

    # In any thread

    def _feed(self) -> None:
        """Hand the decoder what the policy says, as long as it says something."""
        while job := self._next_to_decode():
            self._telemetry.stage(self.model, "queue", job.decode_began - job.entered)
            job.item.decoding = decoding = self._submitted(job.item)
            if job.dropped:  # meanwhile, so that it could not be cancelled
                decoding.cancel()
            if decoding.done():  # without a callback, which would come back here once more for each image
                self._decoded(job, decoding)
            else:
                decoding.add_done_callback(partial(self._decoded_and_feed, job))

    def _next_to_decode(self) -> Job[_Item] | None:
        with self._changed:
            return self._policy.next_to_decode()

    def _submitted(self, item: _Item) -> Future[Any]:
        image, item.image = item.image, b""
        done: Future[Any] = Future()
        try:
            if isinstance(image, bytes):
                return self._decoder.submit(image)
            done.set_result(image)
        except Exception as error:
            done.set_exception(error)
        return done

    def _decoded_and_feed(self, job: Job[_Item], decoding: Future[Any]) -> None:
        self._decoded(job, decoding)
        self._feed()

    def _stop_decoding(self, job: Job[_Item]) -> None:
        """Have an image that has been dropped decoded no further."""
        if decoding := job.item.decoding:
            decoding.cancel()

    def _decoded(self, job: Job[_Item], decoding: Future[Any]) -> None:
        error: Exception | None = None
        job.item.decoding = None
        try:
            job.item.picture = decoding.result()
        except ThoraxrtError as its_own:
            error = its_own
        except CancelledError as cancelled:
            error = None if job.dropped else _logged("the decoder", cancelled)
        except Exception as fault:
            error = _logged("the decoder", fault)
        with self._changed:
            wanted = not job.dropped
            if error:
                self._policy.drop(job)
            self._policy.decoded(job)
            self._changed.notify()
        if wanted and not error:
            self._telemetry.stage(self.model, "decode", job.decode_ended - job.decode_began)
        else:
            self._post([(job.item, error)] if error else [])

    def _report_late(self, jobs: Sequence[Job[_Item]]) -> None:
        if not jobs:
            return
        for _ in jobs:
            self._telemetry.refused(self.model, "expired")
        error = DeadlineError("the answer would come after the deadline; try again, or allow the call more time")
        self._post([(job.item, error) for job in jobs])
        for job in jobs:
            self._stop_decoding(job)

    def _post(self, answers: Sequence[tuple[_Item, _Answer]]) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._deliver, answers)

    # In the engine's thread

    def _run(self, warm: Future[None]) -> None:
        try:
            self._warm_up()
        except Exception as error:
            warm.set_exception(error)
            return
        warm.set_result(None)
        started: deque[tuple[list[Job[_Item]], Batch | Exception]] = deque()
        while True:
            with self._changed:
                while not (jobs := self._policy.next_batch()) and not started and not self._closed:
                    self._changed.wait()
                late = self._policy.expired()
            self._report_late(late)
            if jobs:
                self._feed()  # there is room for more to be decoded
                self._telemetry.batch(self.model, len(jobs))
                started.append((jobs, self._start(jobs)))
            if started and (not jobs or len(started) > self._engine.ahead):
                self._finish(*started.popleft())
            elif not jobs:
                return

    def _warm_up(self) -> None:
        size = self._engine.manifest.preprocess.input_size
        blank = Radiograph.from_pixels(np.zeros((size, size), np.uint8))
        for images in self._policy.options.sizes:
            for _ in range(2):  # the first run may compile and allocate; the second one is what it takes
                began = time.monotonic()
                for answer in self._engine.predict_batch([blank] * images):
                    if isinstance(answer, ThoraxrtError):
                        raise answer
                seconds = time.monotonic() - began
            with self._changed:
                self._policy.times.learn_batch(images, seconds)

    def _start(self, jobs: Sequence[Job[_Item]]) -> Batch | Exception:
        pictures = [job.item.picture for job in jobs if job.item.picture is not None]
        try:
            cam = any(job.item.cam for job in jobs)
            return self._engine.start(pictures, [job.item.findings for job in jobs], cam=cam)
        except ThoraxrtError as error:
            return error
        except Exception as fault:
            return _logged("the engine", fault)

    def _finish(self, jobs: Sequence[Job[_Item]], batch: Batch | Exception) -> None:
        answers: list[tuple[_Item, _Answer]]
        try:
            if isinstance(batch, Exception):
                raise batch
            results = zip(jobs, batch.result(), strict=True)
            answers = [(job.item, _without_cam(answer, job.item.cam)) for job, answer in results]
        except (ThoraxrtError, FaultError) as error:
            answers = [(job.item, error) for job in jobs]
        except Exception as fault:
            logged = _logged("the engine", fault)
            answers = [(job.item, logged) for job in jobs]
        ended = time.monotonic()
        with self._changed:
            self._policy.batch_done()
        self._post(answers)
        for job in jobs:
            self._telemetry.stage(self.model, "batch_wait", job.batch_began - job.decode_ended)
            self._telemetry.stage(self.model, "network", ended - job.batch_began)


def _without_cam(answer: Prediction | ThoraxrtError, wanted: bool) -> _Answer:
    """The answer without the CAMs that another image of its batch asked for."""
    if wanted or isinstance(answer, ThoraxrtError) or answer.cam is None:
        return answer
    return msgspec.structs.replace(answer, cam=None)


def _logged(where: str, fault: BaseException) -> FaultError:
    """What the images get for an exception that nobody expected; what it says stays unsaid: it may quote a patient."""
    place = "".join(traceback.format_tb(fault.__traceback__))
    _log.error("%s failed with %s\n%s", where, type(fault).__name__, place)
    return FaultError(f"{where} failed with {type(fault).__name__}; the server's log says where")
