"""Mixed traffic with faults, for as long as asked: `python -m thoraxrt.benchmarks.soak BUNDLE [IMAGES...] --minutes 10`.

The scenario: a server in a process of its own, as `thoraxrt serve` runs it, and clients that behave in every way at
once, over TLS and with tokens: single images, studies, streams, STAT and routine, files that are no images, messages
that are none, deadlines too short, calls that are cancelled, connections that vanish, tensors and streams of them in
the Open Inference Protocol, a second model that is unloaded and loaded, strangers. Meanwhile its decoding workers are
killed, its bundle is replaced, now and then by a damaged one, its wall clock is set forwards and back (where
there is a C compiler), and the audit log's disk is full for a moment (where a file system can be mounted: as root). The
claims, each counted: every call ends once, with a status that it may have;
every answer is that image's; the server's own books of calls begun and ended agree; the audit log is whole; memory and
descriptors are in the end what they were. Exit status 1 where one does not hold. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from hashlib import sha256
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import msgspec
import numpy as np
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from PIL import Image
from rich.console import Console
from rich.table import Table

from thoraxrt.benchmarks.served import Served
from thoraxrt.engine.bundle import MANIFEST, Bundle
from thoraxrt.engine.engine import Engine, read_image
from thoraxrt.export.phantoms import phantom
from thoraxrt.export.publish import publish
from thoraxrt.proto.oip import open_inference_pb2 as oip
from thoraxrt.proto.oip import open_inference_pb2_grpc
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.proto.v1 import thoraxrt_pb2_grpc
from thoraxrt.server.audit import AuditOptions, verify
from thoraxrt.server.certificates import TlsOptions
from thoraxrt.server.models import EngineOptions
from thoraxrt.server.principal import Role
from thoraxrt.server.security import SecurityOptions
from thoraxrt.server.status import ERROR_KEY
from thoraxrt.server.tokens import TokenOptions, add_token
from thoraxrt.server.wire import MODEL_KEY, ORDER_KEY, PRIORITY_KEY

__all__ = ["Report", "main", "soak"]

_CLIENTS: Final = 12
_KILL_S: Final = 4.0
_SWAP_S: Final = 2.0
"""From one bundle that is put in place to the next, at least: a good one must have answered first."""

_JUMP_S: Final = 1.5
_FULL_EVERY_S: Final = 10.0
_FULL_FOR_S: Final = 0.5
"""How long the disk is full; the audit log finds out that it has room again within a second."""

_BACK_OFF_S: Final = 0.2
"""How long a client that was refused waits."""

_SAY_S: Final = 30.0

_WARM: Final = 1 / 3
"""Of the time, after which memory and descriptors should grow no more."""

_HANG_S: Final = 60.0
_CLOSE: Final = 0.05
"""How far an answer may be from the expected logits: batches of other sizes add in other orders."""

_SERVED: Final = "served"
"""The model whose bundle is replaced; the other one is unloaded and loaded."""

_SPARE: Final = "spare"
_ROLES: Final[dict[str, tuple[Role, ...]]] = {"predict": ("predict",), "admin": ("predict", "admin")}
_BAD: Final = (b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40))
_KILLED: Final = "ended its process"

_STATUS: Final = grpc.StatusCode
_NOT_NOW: Final = {("RESOURCE_EXHAUSTED", "OverloadedError"), ("UNAVAILABLE", "AuditError")}
"""What any call may be told; AuditError while the disk of the audit log is full."""

_NOT_NOW_WORDS: Final = ("try again", "the audit log cannot be written")
"""The same where a stream has the message alone."""

_NOT_THERE: Final = ("NOT_FOUND", "ModelNotFoundError")

_UNSEEN: Final = "Internal error from Core"
"""What grpc.aio's client says where the server ends a call that it is still writing to: its status stays unseen here,
but not in the server's own books."""

_JUMPS_S: Final = (-86_400, -3600, -5, 0, 5, 3600, 86_400)
_CLOCK: Final = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long *ahead;

__attribute__((constructor)) static void map_file(void)
{
    int file = open(getenv("SOAK_CLOCK"), O_RDONLY);
    void *mapped = mmap(0, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED)
        abort();
    ahead = mapped;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += *ahead;
    return failed;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec spec;
    clock_gettime(CLOCK_REALTIME, &spec);
    now->tv_sec = spec.tv_sec;
    now->tv_usec = spec.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now)
{
    struct timespec spec;
    clock_gettime(CLOCK_REALTIME, &spec);
    return now ? (*now = spec.tv_sec) : spec.tv_sec;
}
"""
"""In front of the C library: the wall clock of whatever runs in the process, gRPC's core too, so many seconds ahead."""

_DISK_BYTES: Final = 16 * 2**20
_LOG_BYTES: Final = 2**20  # of each of the audit log's files, four of which are kept


@dataclass(slots=True)
class Report:
    """What happened: calls by kind and status, and each claim that did not hold."""

    seconds: float = 0.0
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    images: int = 0
    killed: int = 0
    hit: int = 0  # images whose worker was killed
    swapped: int = 0
    filled: int = 0  # times that the audit log's disk was full
    jumps: int = 0  # times that the wall clock was set
    recorded: int = 0  # lines of the audit log
    seen: Counter[str] = field(default_factory=Counter)  # manifests that answered, how often
    faults: list[str] = field(default_factory=list)
    memory_bytes: tuple[int, int] = (0, 0)  # after the warm-up, in the end
    descriptors: tuple[int, int] = (0, 0)

    def claim(self, holds: bool, what: str) -> None:
        """Note what does not hold."""
        if not holds:
            self.faults.append(what)


@dataclass(slots=True)
class _Expected:
    """An image and what the engine says of it in process."""

    data: bytes
    width: int
    height: int
    logits: list[float]


class _Traffic:
    """Clients of one server until a time is over, with the roles' tokens."""

    def __init__(
        self,
        address: str,
        roots: bytes,
        tokens: Mapping[str, str],
        images: Sequence[_Expected],
        report: Report,
        seed: int,
    ) -> None:
        self._address = address
        self._roots = roots
        self._tokens = tokens
        self._administering = asyncio.Lock()
        self._images = images
        self._report = report
        self._random = random.Random(seed)
        self._refused = False
        self._kinds: list[tuple[Callable[[Any], Awaitable[None]], int]] = [
            (self._predict, 8),
            (self._study, 2),
            (self._stream, 2),
            (self._bad, 2),
            (self._malformed, 1),
            (self._hurried, 2),
            (self._cancelled, 2),
            (self._vanishing, 1),
            (self._tensors, 2),
            (self._tensor_stream, 1),
            (self._administer, 1),
            (self._stranger, 1),
        ]

    async def run(self, until: float) -> None:
        """One thing after the other, by several clients at once."""
        async with self._channel() as channel, asyncio.TaskGroup() as clients:
            for _ in range(_CLIENTS):
                clients.create_task(self._client(channel, until))

    async def _client(self, channel: grpc.aio.Channel, until: float) -> None:
        stub: Any = thoraxrt_pb2_grpc.PredictionServiceStub(channel)
        kinds, weights = zip(*self._kinds, strict=True)
        while time.monotonic() < until:
            (kind,) = self._random.choices(kinds, weights)
            began = time.monotonic()
            self._refused = False  # of any client: they were refused together
            await kind(stub)
            self._report.claim(time.monotonic() - began < _HANG_S, f"{kind.__name__} took {_HANG_S:g} s")
            if self._refused:
                await asyncio.sleep(_BACK_OFF_S)

    def _channel(self) -> grpc.aio.Channel:
        """A connection of its own, which shares none with another channel."""
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(self._address, grpc.ssl_channel_credentials(self._roots), options)

    def _metadata(self, *more: tuple[str, str], role: str = "predict") -> tuple[tuple[str, str], ...]:
        priority = self._random.choice(("stat", "routine"))
        shown = ("authorization", f"Bearer {self._tokens[role]}")
        return (shown, (MODEL_KEY, _SERVED), (PRIORITY_KEY, priority), *more)

    async def _ended(self, kind: str, call: Any, *allowed: tuple[str, str]) -> Any:
        """The call's answer, where it has one; it may also end with a status and error that are `allowed`."""
        try:
            answer = await call
            self._report.calls[kind, "OK"] += 1
            return answer
        except grpc.aio.AioRpcError as error:
            self._failed(kind, error, {*allowed, *_NOT_NOW})
            return None

    def _failed(self, kind: str, error: grpc.aio.AioRpcError, allowed: set[tuple[str, str]]) -> None:
        name = str(dict(error.trailing_metadata() or ()).get(ERROR_KEY, ""))
        if error.details() == _UNSEEN:
            self._report.calls[kind, "unseen"] += 1
            return
        self._report.calls[kind, error.code().name] += 1
        self._refused = self._refused or (error.code().name, name) in _NOT_NOW
        if not self._is_hit(name, error.details() or ""):
            self._report.claim((error.code().name, name) in allowed, f"{kind}: {error.code().name} {error.details()}")

    def _is_hit(self, name: str, details: str) -> bool:
        """Whether an image was with a worker that was killed; each kill may have hit one."""
        hit = name == "ImageFormatError" and _KILLED in details
        self._report.hit += hit
        return hit

    def _check(self, kind: str, response: pb.PredictResponse, image: _Expected) -> None:
        self._report.images += 1
        self._report.seen[response.manifest_sha256] += 1
        prediction = response.prediction
        same = (prediction.width, prediction.height) == (image.width, image.height) and all(
            abs(finding.logit - logit) < _CLOSE
            for finding, logit in zip(prediction.findings, image.logits, strict=True)
        )
        self._report.claim(same, f"{kind}: another image's answer, or a wrong one")

    async def _predict(self, stub: Any) -> None:
        image = self._random.choice(self._images)
        options = pb.PredictOptions(overlay=self._random.random() < 0.1, cam=self._random.random() < 0.1)
        request = pb.PredictRequest(image=image.data, options=options)
        if response := await self._ended("predict", stub.Predict(request, timeout=_HANG_S, metadata=self._metadata())):
            self._check("predict", response, image)

    async def _study(self, stub: Any) -> None:
        sent = {str(number): self._any() for number in range(self._random.randint(1, 4))}
        request = pb.PredictStudyRequest(images=[pb.StudyImage(id=i, image=d) for i, (d, _) in sent.items()])
        call = stub.PredictStudy(request, timeout=_HANG_S, metadata=self._metadata())
        if response := await self._ended("study", call):
            self._check_answers("study", response.answers, sent)

    async def _stream(self, stub: Any) -> None:
        sent = {str(number): self._any() for number in range(self._random.randint(0, 40))}
        order = self._random.choice(("request", "completion"))
        requests = iter([pb.PredictStreamRequest(id=i, image=data) for i, (data, _) in sent.items()])
        call = stub.PredictStream(requests, timeout=_HANG_S, metadata=self._metadata((ORDER_KEY, order)))

        async def answers() -> list[pb.ImageAnswer]:
            return [response.answer async for response in call]

        found = await self._ended("stream", answers())
        if found is not None:
            self._check_answers("stream", found, sent)
            if order == "request":
                self._report.claim([answer.id for answer in found] == list(sent), "stream: out of order")

    def _any(self) -> tuple[bytes, _Expected | None]:
        if self._random.random() < 0.1:
            return self._random.choice(_BAD), None
        image = self._random.choice(self._images)
        return image.data, image

    def _check_answers(
        self, kind: str, answers: Sequence[pb.ImageAnswer], sent: dict[str, tuple[bytes, _Expected | None]]
    ) -> None:
        self._report.claim(
            sorted(answer.id for answer in answers) == sorted(sent), f"{kind}: not one answer for each image"
        )
        for answer in answers:
            image = sent[answer.id][1]
            if answer.WhichOneof("answer") == "response":
                self._report.claim(image is not None, f"{kind}: an answer for what is no image")
                if image:
                    self._check(kind, answer.response, image)
            elif not self._is_hit(answer.failure.error, answer.failure.message) and image:
                refused = answer.failure.error in {error for _, error in _NOT_NOW}
                self._report.claim(refused, f"{kind}: {answer.failure.error}: {answer.failure.message}")

    async def _tensors(self, stub: Any) -> None:
        model, sent = self._random.choice((_SERVED, _SPARE)), self._some()
        allowed = [_NOT_THERE] if model == _SPARE else []
        async with self._channel() as channel:
            infer = _oip(channel).ModelInfer(_infer(model, sent), timeout=_HANG_S, metadata=self._metadata())
            if response := await self._ended("tensors", infer, *allowed):
                self._check_logits("tensors", response, sent)

    async def _tensor_stream(self, stub: Any) -> None:
        sent = {str(number): self._some() for number in range(self._random.randint(0, 12))}
        requests = iter([_infer(_SERVED, images, number) for number, images in sent.items()])
        found = []
        async with self._channel() as channel:
            call = _oip(channel).ModelStreamInfer(requests, timeout=_HANG_S, metadata=self._metadata())

            async def answers() -> list[oip.ModelStreamInferResponse]:
                return [response async for response in call]

            found = await self._ended("tensor stream", answers())
        if found is None:
            return
        whole = sorted(one.infer_response.id for one in found) == sorted(sent)
        self._report.claim(whole, "tensor stream: not one answer for each request")
        for one in found:
            if not one.error_message:
                self._check_logits("tensor stream", one.infer_response, sent[one.infer_response.id])
            elif not self._is_hit("ImageFormatError", one.error_message):
                refused = any(words in one.error_message for words in _NOT_NOW_WORDS)
                self._report.claim(refused, f"tensor stream: {one.error_message}")

    async def _administer(self, stub: Any) -> None:
        """Unload the spare model, which then answers nobody, and load it, which then answers; one client at a time."""
        if self._administering.locked():
            return  # to wait for it would count as a call that hangs
        metadata, sent = self._metadata(role="admin"), self._some()
        async with self._administering, self._channel() as channel:
            calls = _oip(channel)

            async def asked(kind: str, *allowed: tuple[str, str]) -> Any:
                infer = calls.ModelInfer(_infer(_SPARE, sent), timeout=_HANG_S, metadata=metadata)
                return await self._ended(kind, infer, *allowed)

            unload = calls.RepositoryModelUnload(
                oip.RepositoryModelUnloadRequest(model_name=_SPARE), timeout=_HANG_S, metadata=metadata
            )
            if await self._ended("unload", unload, _NOT_THERE) is not None:
                self._report.claim(await asked("unloaded", _NOT_THERE) is None, "unload: the model still answers")
            load = calls.RepositoryModelLoad(
                oip.RepositoryModelLoadRequest(model_name=_SPARE), timeout=_HANG_S, metadata=metadata
            )
            if await self._ended("load", load) is not None and (response := await asked("loaded")):
                self._check_logits("loaded", response, sent)

    async def _stranger(self, stub: Any) -> None:
        """Who shows no token, and who may not do this with theirs."""
        request = pb.PredictRequest(image=self._images[0].data)
        answer = await self._ended(
            "stranger", stub.Predict(request, timeout=_HANG_S), ("UNAUTHENTICATED", "AuthenticationError")
        )
        async with self._channel() as channel:
            unload = _oip(channel).RepositoryModelUnload(
                oip.RepositoryModelUnloadRequest(model_name=_SERVED), timeout=_HANG_S, metadata=self._metadata()
            )
            done = await self._ended("stranger", unload, ("PERMISSION_DENIED", "AuthorizationError"))
        self._report.claim(answer is None and done is None, "stranger: was let in")

    def _some(self) -> list[_Expected]:
        return [self._random.choice(self._images) for _ in range(self._random.randint(1, 3))]

    def _check_logits(self, kind: str, response: oip.ModelInferResponse, sent: Sequence[_Expected]) -> None:
        self._report.images += len(sent)
        logits = np.frombuffer(response.raw_output_contents[0], "<f4")
        expected = np.array([image.logits for image in sent], "<f4").ravel()
        same = logits.shape == expected.shape and bool((np.abs(logits - expected) < _CLOSE).all())
        self._report.claim(same, f"{kind}: another image's logits, or wrong ones")

    async def _bad(self, stub: Any) -> None:
        request = pb.PredictRequest(image=self._random.choice(_BAD))
        answer = await self._ended(
            "bad",
            stub.Predict(request, timeout=_HANG_S, metadata=self._metadata()),
            ("INVALID_ARGUMENT", "ImageFormatError"),
        )
        self._report.claim(answer is None, "bad: an answer for what is no image")

    async def _malformed(self, stub: Any) -> None:
        async with self._channel() as channel:
            method = self._random.choice(("Predict", "PredictStudy", "PredictStream"))
            call: Any = channel.stream_stream(f"/thoraxrt.v1.PredictionService/{method}")
            good = pb.PredictStreamRequest(image=self._images[0].data).SerializeToString()
            sent = [good] * self._random.randint(0, 3) * (method == "PredictStream")
            answers = call(iter([*sent, b"\xff\xff\xff"]), timeout=_HANG_S, metadata=self._metadata())

            async def all_of() -> list[bytes]:
                return [answer async for answer in answers]

            await self._ended("malformed", all_of(), ("INVALID_ARGUMENT", "RequestError"))

    async def _hurried(self, stub: Any) -> None:
        image = self._random.choice(self._images)
        request, timeout = pb.PredictRequest(image=image.data), self._random.uniform(0, 0.03)
        call = stub.Predict(request, timeout=timeout, metadata=self._metadata())
        late = [("DEADLINE_EXCEEDED", name) for name in ("", "DeadlineError")]
        if response := await self._ended("hurried", call, *late):
            self._check("hurried", response, image)

    async def _cancelled(self, stub: Any) -> None:
        request = pb.PredictRequest(image=self._random.choice(self._images).data)
        call = stub.Predict(request, timeout=_HANG_S, metadata=self._metadata())
        await asyncio.sleep(self._random.uniform(0, 0.03))
        call.cancel()
        code = await call.code()
        self._report.calls["cancelled", code.name] += 1
        self._report.claim(
            code
            in {
                _STATUS.OK,
                _STATUS.CANCELLED,
                _STATUS.RESOURCE_EXHAUSTED,
                _STATUS.UNAVAILABLE,
                _STATUS.INVALID_ARGUMENT,  # the worker that had the image was killed before the call was cancelled
            },
            f"cancelled: {code}",
        )

    async def _vanishing(self, stub: Any) -> None:
        """A stream whose connection is gone in the middle of it."""
        async with self._channel() as channel:
            mine: Any = thoraxrt_pb2_grpc.PredictionServiceStub(channel)
            images = [self._random.choice(self._images).data for _ in range(20)]
            requests = iter([pb.PredictStreamRequest(image=data) for data in images])
            call = mine.PredictStream(requests, timeout=_HANG_S, metadata=self._metadata())
            with contextlib.suppress(grpc.aio.AioRpcError):
                for _ in range(self._random.randint(0, 5)):
                    if await call.read() is grpc.aio.EOF:
                        break
        self._report.calls["vanishing", "gone"] += 1


def _oip(channel: grpc.aio.Channel) -> Any:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def _infer(model: str, images: Sequence[_Expected], name: str = "") -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model, id=name)
    contents = oip.InferTensorContents(bytes_contents=[image.data for image in images])
    request.inputs.add(name="image_bytes", datatype="BYTES", shape=[len(images)], contents=contents)
    return request


async def _harm(
    server: Served,
    place: Path,
    bundles: Sequence[dict[str, bytes]],
    report: Report,
    until: float,
    *,
    disk: Path | None,
    clock: Path | None,
    say: Callable[[str], None],
) -> None:
    """Kill workers, replace the bundle, by turns good and damaged, set the clock, and fill the disk."""
    randomly = random.Random(1)
    now = time.monotonic()
    kill, swap, fill, jump = now + _KILL_S / 2, now + _SWAP_S / 2, now + _FULL_EVERY_S / 4, now + _JUMP_S
    tell, awaited, answered = now + _SAY_S, None, 0
    while (now := time.monotonic()) < until:
        if now >= tell:
            say(f"{report.images} images answered, {len(report.faults)} faults, {until - now:.0f} s to go")
            tell = now + _SAY_S
        if clock and now >= jump:
            _set(clock, randomly.choice(_JUMPS_S))
            report.jumps += 1
            jump = now + _JUMP_S
        if now >= kill:
            for pid in server.children()[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    report.killed += 1
            kill = now + randomly.uniform(0.5, 1.5) * _KILL_S
        if now >= swap and (awaited is None or report.seen[awaited] > answered):
            files = bundles[report.swapped % len(bundles)]
            await asyncio.to_thread(publish, files, _home(place, _SERVED), replace=True)
            server.refresh()
            awaited = None if files is bundles[-1] else sha256(files[MANIFEST]).hexdigest()  # the last one is damaged
            answered = report.seen[awaited or ""]
            report.swapped += 1
            swap = time.monotonic() + _SWAP_S
        if disk and now >= fill:
            filler = disk / "filler"
            if filler.exists():
                filler.unlink()
                fill = now + _FULL_EVERY_S
            else:
                _fill(filler)
                report.filled += 1
                fill = now + _FULL_FOR_S
        await asyncio.sleep(0.05)
    if disk:
        (disk / "filler").unlink(missing_ok=True)


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:  # until there is no more room
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[Path | None]:
    """A small file system of its own; None where none may be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextlib.contextmanager
def _clock(place: Path) -> Iterator[Path | None]:
    """The file that says how far ahead the wall clock of processes started in the block is; None without a compiler."""
    source, library, clock = place / "clock.c", place / "clock.so", place / "clock"
    source.write_text(_CLOCK)
    compiler = shutil.which("cc")
    if not compiler or subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source]).returncode:
        yield None
        return
    _set(clock, 0)
    before = dict(os.environ)
    preloaded = filter(None, (str(library), before.get("LD_PRELOAD")))
    os.environ.update(LD_PRELOAD=":".join(preloaded), SOAK_CLOCK=str(clock))
    try:
        yield clock
    finally:
        for name in ("LD_PRELOAD", "SOAK_CLOCK"):
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})


def _set(clock: Path, seconds: int) -> None:
    with open(os.open(clock, os.O_WRONLY | os.O_CREAT), "wb") as file:  # not anew: the server has it mapped
        file.write(struct.pack("l", seconds))


def soak(
    bundle: Bundle,
    images: Sequence[bytes],
    seconds: float,
    *,
    backend: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run the scenario for so long; `report.faults` is empty where every claim holds. `say` is told how it goes."""
    report, options = Report(seconds=seconds), EngineOptions(backend=backend)
    with Engine.open(bundle, backend=backend) as engine:
        expected = []
        for data in images:
            said = engine.predict_one(data)
            expected.append(_Expected(data, said.width, said.height, [finding.logit for finding in said.findings]))
    with tempfile.TemporaryDirectory() as name, _disk(Path(name) / "disk") as disk:
        place, bundles = Path(name), bundles_of(bundle)
        for model in (_SERVED, _SPARE):
            _home(place, model).parent.mkdir(parents=True)
            publish(bundles[0], _home(place, model), replace=False)
        tls = _certified(place)
        tokens = {role: add_token(place / "tokens.toml", role, roles) for role, roles in _ROLES.items()}
        security = SecurityOptions(tls=tls, tokens=TokenOptions(file=place / "tokens.toml"))
        audit = AuditOptions(path=(disk or place) / "audit.jsonl", max_bytes=_LOG_BYTES, keep=4, sync_ms=50.0)
        with contextlib.ExitStack() as running:
            with _clock(place) as clock:
                server = running.enter_context(Served(place / "models", options, audit=audit, security=security))
            began, traffic = time.monotonic(), partial(_Traffic, server.address, tls.certificate.read_bytes(), tokens)
            phase = partial(_phase, server, place, bundles, traffic, expected, report, disk=disk, clock=clock, say=say)
            asyncio.run(phase(began + _WARM * seconds, seed=0))
            before = _taken(server)
            asyncio.run(phase(began + seconds, seed=1))
            after = _taken(server)
            begun, answered, status = server.stop()
        report.recorded = verify(audit.path).last
    report.memory_bytes, report.descriptors = (before[0], after[0]), (before[1], after[1])
    report.claim(after[0] < 1.25 * before[0] + 2**26, f"memory has grown: {before[0]} to {after[0]} bytes")
    report.claim(after[1] <= before[1] + 8, f"descriptors have grown: {before[1]} to {after[1]}")
    report.claim(sum(begun.values()) == sum(answered.values()), f"calls begun {begun}, ended {answered}")
    report.claim(not answered.keys() & {"UNKNOWN", "INTERNAL"}, f"statuses of faults: {answered}")
    report.claim(report.hit <= report.killed, f"{report.hit} images lost to {report.killed} killed workers")
    report.claim(report.images > 0 and report.killed > 0 and report.swapped > 0, "nothing has happened")
    report.claim(not clock or report.jumps > 0, "the clock was not set")
    report.claim(report.recorded >= report.images, f"{report.recorded} lines in the audit log")
    report.claim(len(report.seen) > 1, "no replaced bundle has answered")
    report.claim(status == 0, f"the server ended with exit status {status}")
    return report


async def _phase(
    server: Served,
    place: Path,
    bundles: Sequence[dict[str, bytes]],
    traffic: Callable[[Sequence[_Expected], Report, int], _Traffic],
    images: Sequence[_Expected],
    report: Report,
    until: float,
    *,
    seed: int,
    disk: Path | None,
    clock: Path | None,
    say: Callable[[str], None],
) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(traffic(images, report, seed).run(until))
        group.create_task(_harm(server, place, bundles, report, until, disk=disk, clock=clock, say=say))


def _taken(server: Served) -> tuple[int, int]:
    """Memory and descriptors, once nothing is asked for and the last bundle is loaded: the memory has settled."""
    until, memory, before = time.monotonic() + _HANG_S, server.resident_bytes(), 0
    while abs(memory - before) > 0.01 * memory and time.monotonic() < until:
        time.sleep(3.0)
        memory, before = server.resident_bytes(), memory
    return memory, server.descriptors()


def _home(place: Path, model: str) -> Path:
    return place / "models" / model / "1"


def _certified(place: Path) -> TlsOptions:
    """A certificate for 127.0.0.1 that vouches for itself; from before and to after whatever the clock is set to."""
    key, now, name = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC), x509.Name([])
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=7))
        .not_valid_after(now + timedelta(days=7))
        .add_extension(names, critical=True)
        .sign(key, hashes.SHA256())
    )
    options = TlsOptions(certificate=place / "server.pem", private_key=place / "server.key")
    options.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    options.private_key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return options


def bundles_of(bundle: Bundle) -> list[dict[str, bytes]]:
    """The same network under other manifests, so that its answers are the same, and one that is damaged."""
    files = {file.name: file.read_bytes() for file in bundle.path.iterdir() if file.name in bundle.manifest.files}
    made = []
    for turn in ("1", "2"):
        manifest = msgspec.structs.replace(bundle.manifest, producer={**bundle.manifest.producer, "soak": turn})
        made.append({**files, MANIFEST: msgspec.json.encode(manifest)})
    damaged = dict(made[0])
    name = next(name for name in files if name.endswith(".onnx"))
    damaged[name] = damaged[name][:-1] + bytes([damaged[name][-1] ^ 1])
    return [made[0], made[1], damaged]


def main(
    bundle: Path,
    images: Annotated[list[Path] | None, typer.Argument(help="Encoded radiographs; by default phantoms.")] = None,
    minutes: Annotated[float, typer.Option(min=0.25)] = 10.0,
    backend: Annotated[str | None, typer.Option(help="By default the bundle's own choice.")] = None,
) -> None:
    """Run the scenario; a table to stderr, one line of JSON to stdout."""
    opened = Bundle.open(bundle)
    files = [read_image(path) for path in images] if images else [_png(index) for index in range(8)]
    console = Console(stderr=True)
    report = soak(opened, files, 60 * minutes, backend=backend, say=console.print)
    table = Table("call", "ended with", "times", title=f"{report.images} images answered in {report.seconds:.0f} s")
    for (kind, status), count in sorted(report.calls.items()):
        table.add_row(kind, status, str(count))
    console.print(table)
    console.print(
        f"{report.killed} workers killed, {report.hit} images lost to it; {report.swapped} bundles put in place; "
        f"clock set {report.jumps} times; disk full {report.filled} times, {report.recorded} lines in the audit log; "
        f"memory {report.memory_bytes[0] / 2**20:.0f} to {report.memory_bytes[1] / 2**20:.0f} MiB, "
        f"descriptors {report.descriptors[0]} to {report.descriptors[1]}"
    )
    for fault, count in Counter(report.faults).most_common(20):
        console.print(f"[red]{count} x {fault}")
    machine = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.machine(), "date": str(date.today())}
    said: dict[str, Any] = {"scenario": "soak", **machine, "bundle": opened.sha256, "seconds": report.seconds}
    said["calls"] = {f"{kind} {status}": count for (kind, status), count in sorted(report.calls.items())}
    for name in ("images", "killed", "hit", "swapped", "jumps", "filled", "recorded", "memory_bytes", "descriptors"):
        said[name] = getattr(report, name)
    print(json.dumps({**said, "faults": Counter(report.faults)}))
    sys.exit(1 if report.faults else 0)


def _png(index: int) -> bytes:
    file = BytesIO()
    Image.fromarray(phantom(7, index).pixels).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    typer.run(main)
