"""Decoding in worker processes: bytes that crash or hang a decoder cost the request they came with, nothing else.

Owns the workers and what they may take of the machine. They run `thoraxrt.engine.decode.decode`, as threads would; this
module knows no image format. Linux only. `python -m thoraxrt.server.decoding` is the worker, for `ProcessDecoder` to start.

A worker is a fresh interpreter with a minimal environment and no descriptors but its own. It gets a file and gives
pixels through shared memory, one image at a time, and says what they are in JSON over a socket. Once it has read a
hostile file it may say anything: what it says is checked, and its pixels are copied. Its limits are not a sandbox,
since system calls are not filtered: that is the service manager's, see `SystemCallFilter=` in systemd.exec(5).
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import math
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Annotated, Final, Literal, NoReturn, Self

import msgspec
import numpy as np

from thoraxrt.engine import errors
from thoraxrt.engine.decode import DecodeLimits, Provenance, Radiograph, corrupt, decode
from thoraxrt.engine.errors import BackendUnavailableError, ImageError, ImageLimitError

__all__ = ["ProcessDecoder", "WorkerLimits"]

_COMMAND: Final = (sys.executable, "-P", "-m", "thoraxrt.server.decoding")

_START_S: Final = 30.0  # for an interpreter and its imports, 0.3 to 1 s where the disk is not cold
_SPARED_S: Final = 1.0  # for a file that nobody waits for any more: less would cost more, in new workers
_ATTEMPTS: Final = 3  # to replace a worker, before it counts as impossible
_BACKOFF_S: Final = 0.1  # after a failed start, doubled up to the longest
_LONGEST_BACKOFF_S: Final = 5.0

# glibc's mallopt(3): else it gives the memory of each image back, and the next one's costs 1 ms of page faults.
_KEEP_MEMORY: Final = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}

_TABLE_BYTES: Final = 65536
_KEPT_BYTES: Final = 16 * 1024 * 1024  # what a larger image took of shared memory is given back at once
_REPLY_BYTES: Final = 8192

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What one image may take of a worker process.

    `seconds` of wall time, after which the worker is killed, and of CPU time. `memory_bytes` of address space beyond
    what a worker has when it starts. The defaults suffice for any image that `DecodeLimits` allows by default: the
    largest, 50 million pixels of JPEG 2000, took 0.7 GiB and 8 s of a core. One of 12 million took 2 s.

    Example: `WorkerLimits(seconds=5)`. Raises ValueError where a limit makes no sense.
    """

    seconds: float = 10.0
    memory_bytes: int = 1024 * 1024 * 1024

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"WorkerLimits seconds is {self.seconds}; expected a number of seconds above 0")
        if self.memory_bytes < 16 * 1024 * 1024:
            raise ValueError(f"WorkerLimits memory_bytes is {self.memory_bytes}; expected at least 16 MiB")


_DEFAULT_LIMITS = DecodeLimits()
_DEFAULT_WORKER_LIMITS = WorkerLimits()


class ProcessDecoder:
    """A `thoraxrt.engine.decode.Decoder` on worker processes, which gives what `decode` gives and raises.

    A file whose decoding ends its worker, or takes longer than it may, gives ImageFormatError or ImageLimitError. The
    worker is replaced at once, and files that were only waiting go to any worker. While none can be started, they get
    BackendUnavailableError.

    `workers` is the number of processes, by default as many as the CPUs that this process may use; for `keep_stored`
    see `decode`. `on_replaced` is called, in any thread, when a worker has ended. Returns when the first worker is
    ready. Raises ValueError where `workers` is below 1, BackendUnavailableError where no worker can be started;
    `submit` after `close` raises RuntimeError.

    Example: `with ProcessDecoder() as decoder: radiograph = decoder.submit(data).result()`.
    """

    def __init__(
        self,
        workers: int | None = None,
        limits: DecodeLimits = _DEFAULT_LIMITS,
        *,
        keep_stored: bool = False,
        worker_limits: WorkerLimits = _DEFAULT_WORKER_LIMITS,
        on_replaced: Callable[[], None] = lambda: None,
        _command: Sequence[str] = _COMMAND,
    ) -> None:
        if sys.platform != "linux":
            raise BackendUnavailableError("decoding in processes needs Linux; on this system decode in threads")
        if workers is not None and workers < 1:
            raise ValueError(
                f"ProcessDecoder workers is {workers}; expected at least 1, or None for as many as there are CPUs"
            )
        self.workers = workers or len(os.sched_getaffinity(0))
        self._limits = limits
        self._order = _Order(limits=limits, keep_stored=keep_stored, worker_limits=worker_limits)
        self._on_replaced = on_replaced
        self._command = _command
        self._jobs: SimpleQueue[_Decoding | None] = SimpleQueue()
        self._closing = threading.Event()
        self._submitting = threading.Lock()  # so that nothing is queued once the decoder closes
        self._settled = threading.Event()  # a worker is ready, or none can be started
        self._failing: list[str | None] = [None] * self.workers  # why a thread cannot have a worker, where it cannot
        self._threads = [
            # A worker dies with the thread that started it (PR_SET_PDEATHSIG), so each thread starts its own.
            threading.Thread(target=self._serve, args=(number,), name=f"decode_{number}", daemon=True)
            for number in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()
        self._settled.wait()
        if reason := self._all_failing():
            self.close()
            raise BackendUnavailableError(reason)

    def submit(self, data: bytes) -> Future[Radiograph]:
        """Start decoding one file; the future gives what `decode` returns or raises.

        Where it is cancelled too late for that, it still gives so, or an ImageError within a second.
        """
        future = _Decoding()
        with self._submitting:
            if self._closing.is_set():
                raise RuntimeError("the decoder is closed")
            try:
                self._limits.check_bytes(len(data))
            except ImageLimitError as error:
                future.set_exception(error)
            else:
                future.data = data
                self._jobs.put(future)
        return future

    def close(self) -> None:
        """Finish what runs, cancel what waits, and end the workers; bounded by what an image may take."""
        with self._submitting:
            self._closing.set()
        self._cancel_waiting()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._cancel_waiting()  # what a thread put back

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cancel_waiting(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return
            if job is not None:
                job.cancel()
                job.set_running_or_notify_cancel()

    # In a worker's thread

    def _serve(self, number: int) -> None:
        """Keep a worker running, and give it one image after the other."""
        worker = self._started(number)
        while worker is not None and self._answer_next(worker):
            if not worker.alive:
                worker.close()
                self._on_replaced()
                worker = self._started(number)
        if worker is not None:
            worker.close()

    def _answer_next(self, worker: _Worker) -> bool:
        """Wait for a file and resolve its future; False where the decoder closes."""
        job = self._jobs.get()
        if job is None:
            return False
        try:
            if not worker.alive and job.put_back < self.workers:  # it died idle, as all may: not this file's doing
                job.put_back += 1
                self._jobs.put(job)
            elif job.set_running_or_notify_cancel():
                try:
                    radiograph = worker.decode(job)
                except BaseException as error:
                    job.set_exception(error)
                else:
                    job.set_result(radiograph)
        finally:
            del job  # the error's traceback holds this frame, and the future the error
        return True

    def _started(self, number: int) -> _Worker | None:
        """A worker that is ready, however many attempts it takes; None where the decoder closes."""
        failures = 0
        while not self._closing.is_set():
            try:
                worker = _Worker(self._command, self._order)
            except BackendUnavailableError as error:
                _log.error("%s", error)
                failures += 1
                if failures >= _ATTEMPTS or not self._settled.is_set():  # at first, the caller waits for it
                    self._failing[number] = str(error)
                self._back_off(min(_BACKOFF_S * 2 ** (failures - 1), _LONGEST_BACKOFF_S))
            else:
                self._failing[number] = None
                self._settled.set()
                return worker
        return None

    def _back_off(self, seconds: float) -> None:
        """Wait; as long as no thread can have a worker, fail what comes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._closing.is_set():
            reason = self._all_failing()
            if reason is None:
                self._closing.wait(left)
                continue
            self._settled.set()
            try:
                job = self._jobs.get(timeout=left)
            except Empty:
                return
            if job is not None and job.set_running_or_notify_cancel():
                job.set_exception(BackendUnavailableError(reason))

    def _all_failing(self) -> str | None:
        """Why no thread can have a worker, where none can."""
        return self._failing[-1] if all(self._failing) else None


class _Decoding(Future[Radiograph]):
    """A file that waits, and its future, which remembers that it was cancelled even where that came too late."""

    data = b""
    unwanted = False
    put_back = 0

    def cancel(self) -> bool:
        self.unwanted = True
        if cancelled := super().cancel():
            self.data = b""  # nobody counts it any more, although the future may stay in the queue
        return cancelled


# What is said over a worker's socket, a packet each: `_READY` once, then a `_REQUEST` and its reply in turn.

_READY: Final = b"ready"
_REQUEST: Final = struct.Struct("<QQ")  # the request's number, and the bytes of the file in the shared memory


class _Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is started with."""

    limits: DecodeLimits
    keep_stored: bool
    worker_limits: WorkerLimits

    @property
    def memory_bytes(self) -> int:
        """The shared memory: a file, and in its place the values and the table of its radiograph."""
        return max(self.limits.max_bytes, 2 * self.limits.max_pixels + _TABLE_BYTES)


_Word = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9+-]{1,16}\Z")]
_Uid = Annotated[str, msgspec.Meta(pattern=r"\A[0-9.]{1,64}\Z")]
_Voi = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9 ./+_-]{1,64}\Z")]
_Line = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f]{1,1000}\Z")]


class _Decoded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="decoded"):
    """The shared memory holds the values `(height, width)`, uint8, or uint16 with their table after them."""

    number: int
    height: Annotated[int, msgspec.Meta(ge=1)]
    width: Annotated[int, msgspec.Meta(ge=1)]
    table: bool
    format: Literal["png", "jpeg", "dicom"]
    bits: Annotated[int, msgspec.Meta(ge=1, le=16)]
    photometric: _Word
    transfer_syntax: _Uid | None
    voi: _Voi


class _Refused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="refused"):
    """`error` names what `decode` raised."""

    number: int
    error: Literal["ImageFormatError", "ImageLimitError", "ImageContentError"]
    message: _Line


_Reply = _Decoded | _Refused
_REPLY: Final = msgspec.json.Decoder(_Reply)

_SLOW: Final = "it is too slow"
_UNWANTED: Final = "nobody waits for it any more"
_DIED: Final = "it died"


class _Worker:
    """A worker process, its socket and its shared memory, seen from the server; one thread's.

    Raises BackendUnavailableError where it cannot be started.
    """

    def __init__(self, command: Sequence[str], order: _Order) -> None:
        self._order = order
        self._requests = 0
        with ExitStack() as opened:
            try:
                self._open(command, order, opened)
                reason = self._awaited()
            except (OSError, MemoryError, subprocess.SubprocessError) as error:
                reason = getattr(error, "strerror", None) or type(error).__name__
            if reason is not None:
                raise BackendUnavailableError(
                    f"a worker process for decoding cannot be started ({reason}); expected one within {_START_S:g} s: "
                    f"see that `{sys.executable} -c 'import thoraxrt.engine.dicom'` works"
                )
            self._opened = opened.pop_all()

    def _open(self, command: Sequence[str], order: _Order, opened: ExitStack) -> None:
        self._memory_fd = os.memfd_create("thoraxrt-decoding", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        opened.callback(os.close, self._memory_fd)
        os.ftruncate(self._memory_fd, order.memory_bytes)
        # Reading what a worker has cut off would end this process (SIGBUS).
        fcntl.fcntl(self._memory_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._memory = opened.enter_context(mmap.mmap(self._memory_fd, order.memory_bytes))
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        opened.enter_context(self._socket)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(self._memory_fd), msgspec.json.encode(order).decode()],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[self._memory_fd],
                env=_environment(),
            )
        opened.callback(self._end)

    def _end(self) -> None:
        self._process.kill()  # it keeps nothing that it would have to put in order
        self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()

    def _awaited(self) -> str | None:
        """None once the worker is ready, else why it never will be."""
        assert self._process.stderr is not None
        self._socket.settimeout(_START_S)
        try:
            said = self._socket.recv(_REPLY_BYTES)
        except TimeoutError:
            return "it is not ready"
        if said == _READY:
            self._process.stderr.close()
            return None
        self._process.kill()
        status = self._process.wait()
        lines = os.read(self._process.stderr.fileno(), 65536).decode(errors="replace").splitlines()
        return lines[-1][:200] if lines else f"it ended with status {status}"

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def decode(self, job: _Decoding) -> Radiograph:
        """What `thoraxrt.engine.decode.decode` gives or raises; the worker is ended where it does neither."""
        size = len(job.data)
        said = self._answer(job)
        try:
            reply = self._checked(said)
            radiograph = self._radiograph(reply) if isinstance(reply, _Decoded) else None
        except (msgspec.MsgspecError, ValueError, ImageLimitError):
            self._lose("it gave no radiograph")
        if max(size, radiograph.values.nbytes if radiograph else 0) > _KEPT_BYTES:
            self._memory.madvise(mmap.MADV_REMOVE)
        if radiograph is None:
            assert isinstance(reply, _Refused)
            raise getattr(errors, reply.error)(reply.message)
        return radiograph

    def _answer(self, job: _Decoding) -> bytes:
        """The packet that answers a file."""
        data, job.data = job.data, b""
        size = len(data)
        if os.pwrite(self._memory_fd, data, 0) != size:  # else what an earlier file left would be decoded
            raise ImageLimitError(f"not enough memory for a file of {size} bytes; expected less: downscale it")
        del data
        self._requests += 1
        try:
            self._socket.send(_REQUEST.pack(self._requests, size))
            said = self._said(job)
        except OSError:  # its end is closed
            said = b""
        if not said:
            self._lose(_DIED)
        return said

    def _said(self, future: _Decoding) -> bytes:
        until = time.monotonic() + self._order.worker_limits.seconds
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(min(left, _SPARED_S))
            try:
                return self._socket.recv(_REPLY_BYTES)
            except TimeoutError:
                if future.unwanted:
                    self._lose(_UNWANTED)
        self._lose(_SLOW)

    def _checked(self, said: bytes) -> _Reply:
        """The reply, within its bounds. Raises MsgspecError, ValueError or ImageLimitError for any other."""
        reply: _Reply = _REPLY.decode(said)
        if reply.number != self._requests:
            raise ValueError("the answer to another request")
        if isinstance(reply, _Decoded):
            self._order.limits.check_size(reply.width, reply.height)
            if reply.table and not self._order.keep_stored:
                raise ValueError("stored values that nobody asked for")
        return reply

    def _radiograph(self, reply: _Decoded) -> Radiograph:
        """A copy of the pixels: the worker can still write to the shared memory."""
        shape, kind = (reply.height, reply.width), np.uint16 if reply.table else np.uint8
        values = np.ndarray(shape, kind, self._memory).copy()  # numpy lets go of the interpreter's lock
        table = np.ndarray(_TABLE_BYTES if reply.table else 0, np.uint8, self._memory, values.nbytes).copy()
        values.flags.writeable = table.flags.writeable = False
        source = Provenance(
            format=reply.format,
            bits=reply.bits,
            photometric=reply.photometric,
            transfer_syntax=reply.transfer_syntax,
            voi=reply.voi,
        )
        return Radiograph(values=values, source=source, table=table if reply.table else None)

    def _lose(self, fault: str) -> NoReturn:
        """End the worker, and raise what that means for the file it had."""
        self.close()
        status = self._process.returncode
        if fault == _SLOW or status == -signal.SIGXCPU:
            error: ImageError = ImageLimitError(
                f"the file was not decoded within {self._order.worker_limits.seconds:g} s; expected less: downscale it"
            )
        else:
            how = f"exit status {status}" if status >= 0 else signal.strsignal(-status)
            error = corrupt(f"decoding the file ended its process ({how if fault == _DIED else fault})")
        _log.warning("a decoding worker is replaced: %s", error)
        raise error

    def close(self) -> None:
        """End the process and release its memory; closing twice is harmless."""
        self._opened.close()


def _environment() -> dict[str, str]:
    """What a worker needs to import what this process does; nothing else of this process's environment, secrets say."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**kept, **one_thread, **_KEEP_MEMORY, "PYTHONPATH": os.pathsep.join(sys.path)}


# In the worker


def _work(memory_fd: int, order: _Order) -> None:
    """Decode what is asked for until the server closes its end of the socket."""
    _import_all()
    memory = mmap.mmap(memory_fd, order.memory_bytes)
    with socket.socket(fileno=0) as server:
        _confine(order.worker_limits)
        server.send(_READY)
        while request := server.recv(_REQUEST.size):
            number, length = _REQUEST.unpack(request)
            _allow_cpu(order.worker_limits.seconds)
            data = os.pread(memory_fd, length, 0)
            if len(data) != length:
                raise OSError("the shared memory holds less than the file")
            server.send(msgspec.json.encode(_reply(number, data, order, memory)))


def _import_all() -> None:
    """Import what decoding imports when it first needs it: later, no file can be opened."""
    import imagecodecs
    import kornia_rs  # noqa: F401

    import thoraxrt.engine.dicom  # noqa: F401

    for codec in ("dicomrle_decode", "jpeg2k_decode", "jpegls_decode", "jpeg8_decode"):
        getattr(imagecodecs, codec)


def _reply(number: int, data: bytes, order: _Order, memory: mmap.mmap) -> _Reply:
    """Decode a file into the shared memory."""
    try:
        radiograph = decode(data, order.limits, keep_stored=order.keep_stored, alone=True)
        memory.seek(0)
        memory.write(radiograph.values.data)
        if radiograph.table is not None:
            memory.write(radiograph.table.data)
    except ImageError as error:
        return _Refused(number=number, error=type(error).__name__, message=str(error))  # type: ignore[arg-type]
    except MemoryError:
        return _Refused(
            number=number,
            error="ImageLimitError",
            message="not enough memory for this file; expected less: downscale it",
        )
    source = radiograph.source
    return _Decoded(
        number=number,
        height=radiograph.height,
        width=radiograph.width,
        table=radiograph.table is not None,
        format=source.format,  # type: ignore[arg-type]  # no array, since it was a file
        bits=source.bits,
        photometric=source.photometric,
        transfer_syntax=source.transfer_syntax,
        voi=source.voi,
    )


_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38  # linux/prctl.h


def _confine(limits: WorkerLimits) -> None:
    """From here on, nothing can be opened, imported, written or started, and no memory image is left behind."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group or unit: the server finishes what runs
        signal.signal(number, signal.SIG_IGN)
    prctl = ctypes.CDLL(None).prctl  # what a kernel does not know, it refuses, and the rest still holds
    for option, value in (
        (_PR_SET_PDEATHSIG, signal.SIGKILL),
        (_PR_SET_DUMPABLE, 0),  # no core file, which a limit of 0 does not keep from a handler, and no debugger
        (_PR_SET_NO_NEW_PRIVS, 1),
    ):
        prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what a library prints of an image is nobody's to read
    os.close(null)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for name, most in (
        (resource.RLIMIT_AS, taken + limits.memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),  # those that are open stay so
    ):
        resource.setrlimit(name, (most, most))


def _allow_cpu(seconds: float) -> None:
    """Let this process use so much more of the CPU, rounded up; the server's clock is what ends it, as a rule."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), resource.RLIM_INFINITY))


if __name__ == "__main__":
    _work(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=_Order))
