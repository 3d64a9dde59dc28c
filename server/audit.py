"""The audit log: a line of JSON for each answer, on disk before the answer leaves.

    {"n":7,"time":"2026-11-24T09:08:15.123456Z","who":"pacs","via":"token","method":"Predict","model":"<sha256>",
     "input":"<sha256>","backend":"openvino","precision":"bf16",
     "findings":[{"finding":"Effusion","probability":0.83,"reported":true}],"boxes":2,"prev":"<sha256>"}

`n` counts from 1 through all files; `prev` is the sha256 of the line before, 64 zeros in the first, so that a line that
was changed, taken out or put in shows (`verify`). The chain has no secret: who may write the file can make a whole new
one, and cutting off its end leaves a chain. So its last hash goes to the server's own log at the start, at each change
of files and at the end: keep that elsewhere, and give it to `verify`. An answer that failed has `error`, its name, in
place of what was found. Who loaded or unloaded a model stands here too, with the model's `name` in place of the sha256
and of what was found. There are no images in here, no names or identifiers of patients.

A line is one write to the end of the file. A process that is killed loses nothing that it wrote. Where the machine
itself stops, with `sync_ms` 0 nothing is lost either, because the answer waits for the disk; otherwise up to `sync_ms`
milliseconds of lines are. What a crash or a full disk left half-written is closed off by the next line, which has its
length and hash. A full file is renamed to <path>.<number of its last line>, and the oldest of more than `keep` removed.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import logging
import math
import mmap
import os
import queue
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, NamedTuple, Self

import msgspec

from thoraxrt.engine.engine import Prediction
from thoraxrt.engine.errors import AuditError, ConfigError, ThoraxrtError
from thoraxrt.server.principal import current_principal
from thoraxrt.server.telemetry import NullTelemetry

__all__ = ["AuditLog", "AuditOptions", "Verified", "verify"]

_START: Final = "0" * 64
_AGAIN_S: Final = 1.0
_AT_ONCE: Final = 1024  # lines that share a sync

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """Where the log is and what it promises.

    A file has up to `max_bytes` and a line; `keep` full ones stay beside it. `sync_ms`: 0 has each answer wait for the
    disk, more has the disk asked every so many milliseconds. `on_failure`, while nothing can be written: "refuse"
    answers nobody, "serve" answers without a record. `peer` records the client's address, here and, of a call that is
    refused, in the server's own log.

    Raises ValueError where a value makes no sense. Example: `AuditOptions(path=Path("/var/log/thoraxrt/audit.jsonl"))`.
    """

    path: Path
    max_bytes: int = 64 * 2**20
    keep: int = 100
    sync_ms: float = 0.0
    on_failure: Literal["refuse", "serve"] = "refuse"
    peer: bool = False

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"AuditOptions max_bytes is {self.max_bytes}; expected at least 1")
        if self.keep < 1:
            raise ValueError(f"AuditOptions keep is {self.keep}; expected at least 1")
        if not 0 <= self.sync_ms < math.inf:
            raise ValueError(f"AuditOptions sync_ms is {self.sync_ms}; expected 0 or more milliseconds")


class _Entry(NamedTuple):
    fields: bytes  # of JSON, without the braces
    written: Future[None]


class AuditLog:
    """The log, open for one server: nothing of it blocks an event loop, two threads do the writing.

    Raises ConfigError where the path cannot be used; AuditError where it cannot be written now and `on_failure` is
    "refuse".

    Example:
        with AuditLog(AuditOptions(path=Path("audit.jsonl"))) as audit:
            audit.check()
            digest = audit.hashed(image)
            ...
            await audit.record("Predict", prediction, model=sha256, input_sha256=await asyncio.wrap_future(digest))
    """

    def __init__(self, options: AuditOptions, telemetry: NullTelemetry | None = None) -> None:
        self._options, self._telemetry = options, telemetry or NullTelemetry()
        self._chain = _Chain(options)
        self._lock_file = _locked(options.path)
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._failure: str | None = None
        self._unrecorded = 0
        self._ended = Event()
        self._hashing = ThreadPoolExecutor(2, thread_name_prefix="audit-hash")
        self._threads = [Thread(target=self._write_on, name="audit-write", daemon=True)]
        if options.sync_ms:
            self._threads.append(Thread(target=self._sync_on, name="audit-sync", daemon=True))
        for thread in self._threads:
            thread.start()
        try:
            self._submit({"event": "started"}).result()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Return where an answer can be recorded, as far as is known. Raises AuditError where there must be none."""
        if self._failure is not None and self._options.on_failure == "refuse":
            raise self._error(self._failure)

    def hashed(self, data: bytes) -> Future[str]:
        """The sha256 of an image's bytes, in hex, from a thread: start it early, it takes about a ms per MB."""
        return self._hashing.submit(lambda: hashlib.sha256(data).hexdigest())

    def address(self, peer: str | None) -> str | None:
        """The client's address, of gRPC's `peer`, where it may be written down."""
        return peer.rpartition(":")[0] if peer and self._options.peer else None  # ipv4:192.0.2.1:50000

    async def record(
        self,
        method: str,
        outcome: Prediction | ThoraxrtError | str | None,
        *,
        name: str | None = None,
        model_sha256: str | None = None,
        input_sha256: str | None = None,
        peer: str | None = None,
    ) -> None:
        """Record one answer of the caller in `current_principal`, and return when it is written as `sync_ms` promises.

        `outcome` is the prediction, or the error, or an error's name. A call with several images has a line for each.
        Of a model that is loaded or unloaded, `name` is its own, and the outcome None where that succeeded. `peer` is
        gRPC's. Raises AuditError where it cannot be written and `on_failure` is "refuse": do not answer.
        """
        principal = current_principal.get()
        fields = {
            "who": principal.name,
            "via": principal.via,
            "peer": self.address(peer),
            "method": method,
            "name": name,
            "model": model_sha256,
            "input": input_sha256,
            **_outcome(outcome),
        }
        written = self._submit({name: value for name, value in fields.items() if value is not None})
        await asyncio.wrap_future(written)

    def close(self) -> None:
        """Write what was given, sync and close; closing twice is harmless."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._entries.put(None)
        for thread in self._threads:
            thread.join()
        self._hashing.shutdown()
        os.close(self._lock_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, fields: Mapping[str, Any]) -> Future[None]:
        if self._ended.is_set():
            raise AuditError("the audit log is closed, so that there is no answer; the server is stopping")
        entry = _Entry(_json_fields(fields), Future())
        self._entries.put(entry)
        return entry.written

    def _write_on(self) -> None:
        going = True
        while going:
            entries, going = self._next()
            self._write(entries)
        self._chain.close()

    def _next(self) -> tuple[list[_Entry], bool]:
        """What waits to be written, and whether more may come; nothing after a second in which nothing could be."""
        entries: list[_Entry] = []
        try:
            entry = self._entries.get(timeout=_AGAIN_S if self._failure else None)
            while entry is not None:
                entries.append(entry)
                if len(entries) == _AT_ONCE:
                    return entries, True
                entry = self._entries.get_nowait()
        except queue.Empty:
            return entries, True
        return entries, False

    def _write(self, entries: list[_Entry]) -> None:
        """Write the entries, with one sync for all, or the one line that ends a failure."""
        error: AuditError | None = None
        try:
            self._chain.open()
            if self._failure is not None:
                self._chain.append(_json_fields({"event": "resumed", "unrecorded": self._unrecorded}))
            for entry in entries:
                self._chain.append(entry.fields)
            if not self._options.sync_ms:
                self._chain.sync()
        except OSError as failure:
            error = self._fail(failure.strerror or str(failure), len(entries))
        except ConfigError as failure:  # somebody put another file in its place
            error = self._fail(str(failure), len(entries))
        else:
            self._succeed()
        for entry in entries:
            if not entry.written.set_running_or_notify_cancel():
                continue  # its client has gone
            if error is not None and self._options.on_failure == "refuse":
                entry.written.set_exception(error)
            else:
                entry.written.set_result(None)

    def _fail(self, reason: str, entries: int) -> AuditError:
        self._chain.close()
        if self._failure is None:
            _log.error("%s", self._error(reason))
        self._failure = reason
        self._unrecorded += entries if self._options.on_failure == "serve" else 0
        for _ in range(entries):
            self._telemetry.audit_failed()
        return self._error(reason)

    def _succeed(self) -> None:
        if self._failure is not None:
            _log.warning("the audit log %s is written again", self._options.path)
            self._failure, self._unrecorded = None, 0

    def _error(self, reason: str) -> AuditError:
        result = "there is no answer" if self._options.on_failure == "refuse" else "answers are not recorded"
        return AuditError(
            f"the audit log cannot be written ({reason}), so that {result}; once the disk has room and the server may "
            "write there, it goes on by itself"
        )

    def _sync_on(self) -> None:
        while not self._ended.wait(self._options.sync_ms / 1000):
            self._chain.sync_beside()


class _Chain:
    """The file and the end of the chain. One thread's, but for `sync_beside`. Everything raises OSError."""

    def __init__(self, options: AuditOptions) -> None:
        self._options = options
        self._fd: int | None = None
        self._swapping = Lock()  # held while the file is closed
        self._count, self._head, self._size = 0, _START, 0
        self._dirty = False
        self._not_synced: OSError | None = None
        with suppress(OSError):  # which `open` will meet again
            self._read_end()  # ConfigError at once, where the file is something else

    def open(self) -> None:
        """Open the file where it is not, and close off what an earlier writer left half-written."""
        if self._fd is not None:
            return
        torn = self._read_end()
        path = self._options.path
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        with self._swapping:
            self._fd, self._not_synced = fd, None
        _sync_folder(path.parent)
        self._size = os.fstat(fd).st_size
        _log.info("the audit log %s goes on after line %d, of hash %s", path, self._count, self._head)
        if _link(torn.rpartition(b"\n")[2]) is not None:  # a line that lacks its end only
            os.write(fd, b"\n")
            torn = self._read_end()
        if torn:
            said = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
            self._write(_json_fields({"event": "recovered", "torn": said}), before=b"\n")

    def append(self, fields: bytes) -> None:
        """Add a line."""
        if self._size >= self._options.max_bytes:
            self._rotate()
        self._write(fields)

    def sync(self) -> None:
        """Return once the lines are on the disk."""
        if self._fd is not None and self._dirty:
            os.fsync(self._fd)
            self._dirty = False

    def sync_beside(self) -> None:
        """The same from another thread, which keeps nobody waiting; where it fails, the next line does."""
        with self._swapping:
            if self._fd is None or not self._dirty:
                return
            self._dirty, fd = False, os.dup(self._fd)
        try:
            os.fsync(fd)
        except OSError as error:
            self._not_synced = error
        finally:
            os.close(fd)

    def close(self) -> None:
        """Sync as far as that goes, and close; harmless where it is closed."""
        if self._fd is None:
            return
        try:
            self.sync()
        except OSError as error:
            _log.error("the last lines of the audit log may be lost when the machine stops: %s", error.strerror)
        with self._swapping:
            os.close(self._fd)
            self._fd = None
        _log.info("the audit log %s ends with line %d, of hash %s", self._options.path, self._count, self._head)

    def _write(self, fields: bytes, before: bytes = b"") -> None:
        if self._not_synced is not None:
            raise self._not_synced
        assert self._fd is not None
        time = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        line = b'{"n":%d,"time":"%s",%s,"prev":"%s"}' % (self._count + 1, time.encode(), fields, self._head.encode())
        data = before + line + b"\n"
        if os.write(self._fd, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._dirty = True
        self._count, self._head, self._size = self._count + 1, hashlib.sha256(line).hexdigest(), self._size + len(data)

    def _rotate(self) -> None:
        path = self._options.path
        self.sync()  # what `close` does as well, but for raising
        self.close()
        path.rename(f"{path}.{self._count:012d}")
        for old in _full_files(path)[: -self._options.keep]:
            old.unlink()
        self.open()

    def _read_end(self) -> bytes:
        """Take up the chain where the files end; gives what is half-written there."""
        path = self._options.path
        end = _read_end(path)
        torn = end.torn
        if end.link is None:
            if not b'{"n":'.startswith(torn.lstrip(b"\0\n")[:5]):
                raise ConfigError(f"{path} is no audit log: name another path, or move it away")
            full = _full_files(path)
            end = _read_end(full[-1]) if full else end
        self._count, self._head = (end.link.n, end.head) if end.link else (0, _START)
        return torn


def _json_fields(fields: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(fields)[1:-1]


class _Torn(msgspec.Struct, frozen=True):
    bytes: int
    sha256: str


class _Link(msgspec.Struct, frozen=True):
    """What the chain needs of a line."""

    n: int
    prev: str
    torn: _Torn | None = None


class _End(NamedTuple):
    link: _Link | None
    head: str
    torn: bytes


def _read_end(path: Path) -> _End:
    """The last whole line of a file, its hash, and the bytes after it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return _End(None, _START, b"")
    with file:
        if not os.fstat(file.fileno()).st_size:
            return _End(None, _START, b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = data.rfind(b"\n")
            while end >= 0:
                start = data.rfind(b"\n", 0, end) + 1
                line = data[start:end]
                if (link := _link(line)) is not None:
                    return _End(link, hashlib.sha256(line).hexdigest(), data[end + 1 :])
                end = start - 1
            return _End(None, _START, data[:])


def _link(line: bytes) -> _Link | None:
    try:
        return msgspec.json.decode(line, type=_Link)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _full_files(path: Path) -> list[Path]:
    """The renamed files, the oldest first."""
    return sorted(path.parent.glob(f"{path.name}.[0-9]*"))


def _locked(path: Path) -> int:
    """Keep every other process from the log. Raises ConfigError."""
    try:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"nothing can be made beside the audit log {path}: {error.strerror}; correct it") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"another server writes the audit log {path}: name another for this one") from error
    return fd


def _sync_folder(folder: Path) -> None:
    """Have a new or renamed file's name on the disk, too."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _outcome(outcome: Prediction | ThoraxrtError | str | None) -> dict[str, Any]:
    if outcome is None:
        return {}
    if not isinstance(outcome, Prediction):
        return {"error": outcome if isinstance(outcome, str) else type(outcome).__name__}
    return {
        "backend": outcome.backend,
        "precision": outcome.precision,
        "findings": [
            {"finding": finding.finding, "probability": finding.probability, "reported": finding.reported}
            for finding in outcome.findings
        ],
        "boxes": len(outcome.boxes),
    }


class Verified(NamedTuple):
    """What an unbroken log holds: lines `first` to `last` and the last one's hash.

    `recovered` is how often something half-written was closed off, `unfinished` how many bytes are half-written at the
    end: a crash and no start since, or a server at work.
    """

    first: int
    last: int
    head: str
    recovered: int
    unfinished: int


def verify(path: Path, noted: str | None = None) -> Verified:
    """Check a log's chain through all its files, the oldest first; `noted` is a hash that must be a line's.

    Raises AuditError saying where it is broken, ConfigError where there is no log to read.
    """
    first, last, head, recovered, found = 0, 0, _START, 0, noted is None
    torn: list[bytes] = []
    for place, line in _lines(path):
        link = _link(line)
        if link is None:
            torn.append(line)
            continue
        _check_torn(torn, link, place)
        if not first and link.n > 1:  # what came before has been removed
            last, head = link.n - 1, link.prev
        if link.n != last + 1 or link.prev != head:
            raise AuditError(f"{place}: line {link.n} does not follow line {last}: one was changed, added or removed")
        recovered += bool(torn)
        first, last, head, torn = first or link.n, link.n, hashlib.sha256(line).hexdigest(), []
        found = found or head == noted
    if not first:
        raise ConfigError(f"{path} holds no line of an audit log: correct the path")
    if not found:
        raise AuditError(f"{path} has no line of hash {noted}: what it ended with has been removed or changed")
    return Verified(first, last, head, recovered, len(b"\n".join(torn)))


def _check_torn(torn: list[bytes], link: _Link, place: str) -> None:
    """See that a line vouches for what stands before it that is no line."""
    before = b"\n".join(torn) if torn else None
    vouched = None if link.torn is None else (link.torn.bytes, link.torn.sha256)
    if vouched != (None if before is None else (len(before), hashlib.sha256(before).hexdigest())):
        raise AuditError(
            f"{place}: what stands before line {link.n} is not what it says: a line was changed or removed"
        )


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line with its place; the last of a file may lack its end.

    `path` is opened before the full files are listed, because a server at work may make it one of them meanwhile.
    """
    try:
        with _opened(path) as newest:
            for file in _full_files(path):
                with _opened(file) as lines:
                    if os.path.sameopenfile(lines.fileno(), newest.fileno()):
                        break
                    yield from _placed(file, lines)
            yield from _placed(path, newest)
    except OSError as error:
        raise ConfigError(f"the audit log {error.filename or path} cannot be read: {error.strerror}") from error


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except FileNotFoundError:  # killed between two files, or the oldest has just been removed
        return os.fdopen(os.memfd_create("nothing"), "rb")


def _placed(file: Path, lines: BinaryIO) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(lines, 1):
        yield f"{file}:{number}", line.removesuffix(b"\n")
