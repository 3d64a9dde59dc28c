"""A thoraxrt server in a process of its own, as `thoraxrt serve` runs it, and what it takes of the machine.

For benchmarks that load it from outside. Linux only.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.decode import Decoder, ThreadDecoder
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import ThoraxrtError
from thoraxrt.engine.profile import Profile
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server.audit import AuditLog, AuditOptions
from thoraxrt.server.batching import BatchingOptions
from thoraxrt.server.decoding import ProcessDecoder
from thoraxrt.server.models import EngineOptions, Models
from thoraxrt.server.security import AccessInterceptor, SecurityOptions
from thoraxrt.server.serve import ServeOptions, serve
from thoraxrt.server.telemetry import Telemetry

__all__ = ["PREDICT", "Served", "answer_all", "engine_memory", "opened_engine", "predict_request"]

PREDICT: Final = "/thoraxrt.v1.PredictionService/Predict"
"""The method that answers an encoded image, for a load that knows bytes alone."""

_OPEN: Final = SecurityOptions()

_SPAWN = multiprocessing.get_context("spawn")  # gRPC's threads do not survive a fork


class Served:
    """The server, from its first answer to the end of the block; `address` is where it listens.

    `processes` decodes in worker processes, otherwise in threads; `audit` keeps a log; `security` is whom it answers.
    Raises RuntimeError where it cannot be started: it has said why on stderr.

    Example: `with Served(path, EngineOptions()) as server: ...`.
    """

    def __init__(
        self,
        path: Path,
        engine: EngineOptions,
        *,
        processes: bool = True,
        audit: AuditOptions | None = None,
        security: SecurityOptions = _OPEN,
    ) -> None:
        self._connection, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, path, engine, processes, audit, security))
        self._process.start()
        theirs.close()
        try:
            self.address: str = self._connection.recv()
        except EOFError:
            raise RuntimeError("the server has not started") from None
        assert self._process.pid
        self.pid = self._process.pid

    def refresh(self) -> None:
        """Have it look at its models again."""
        os.kill(self.pid, signal.SIGHUP)

    def children(self) -> list[int]:
        """The processes that it has started: those that decode."""
        found: list[int] = []
        for task in _tasks(self.pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                found += map(int, (task / "children").read_text().split())
        return found

    def resident_bytes(self) -> int:
        """Memory of the server and its children."""
        page = os.sysconf("SC_PAGE_SIZE")
        return sum(page * int(_read(pid, "statm").split()[1] or 0) for pid in (self.pid, *self.children()))

    def peak_resident_bytes(self) -> int:
        """The most memory that the server itself, which runs the network, has had so far."""
        return _peak_resident_bytes(self.pid)

    def descriptors(self) -> int:
        """Open files and sockets of the server itself."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self) -> tuple[dict[str, int], dict[str, int], int]:
        """End it as a service manager does: calls begun by method, calls answered by status, and its exit status."""
        os.kill(self.pid, signal.SIGTERM)
        begun, answered = self._connection.recv()
        self._process.join(60)
        assert self._process.exitcode is not None, "the server does not end"
        return begun, answered, self._process.exitcode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()


class _Counting(Telemetry):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()

    def begun(self, method: str) -> None:
        super().begun(method)
        self.calls[method] += 1

    def answered(self, method: str, code: str, seconds: float) -> None:
        super().answered(method, code, seconds)
        self.codes[code] += 1


def _serve(
    connection: Connection,
    path: Path,
    engine: EngineOptions,
    processes: bool,
    audit: AuditOptions | None,
    security: SecurityOptions,
) -> None:
    telemetry = _Counting()
    logging.getLogger(AccessInterceptor.__module__).setLevel(logging.ERROR)  # a load is refused on purpose, and often
    decoder: Decoder = ProcessDecoder() if processes else ThreadDecoder()
    batching = BatchingOptions(workers=decoder.workers) if isinstance(decoder, ProcessDecoder) else BatchingOptions()
    with decoder, AuditLog(audit) if audit else nullcontext() as log:
        models = Models(path, decoder, batching, telemetry, engine=engine)
        serve(
            models,
            ServeOptions(port=0, security=security),
            telemetry,
            log,
            announce=lambda line: connection.send(line.rpartition(" ")[2]),
        )
    connection.send((dict(telemetry.calls), dict(telemetry.codes)))


def predict_request(image: bytes) -> bytes:
    """What PREDICT takes, for an encoded image."""
    return pb.PredictRequest(image=image).SerializeToString()


def answer_all(engine: Engine, files: Sequence[bytes]) -> None:
    """Have every file answered. Raises the first error among the answers."""
    for answer in engine.predict(files):
        if isinstance(answer, ThoraxrtError):
            raise answer


def engine_memory(path: Path, options: EngineOptions, batch: int, files: Sequence[bytes]) -> tuple[int, int | None]:
    """The most memory in RAM of a process that opens an engine and answers these files, and its GPU's in use, in bytes.

    The GPU's is whoever's, and None on a CPU. Raises what `Engine.open` raises.
    """
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as alone:
        return alone.submit(_answer, path, options, batch, files).result()


def opened_engine(
    bundle: Path | Bundle, options: EngineOptions, *, batch: int = 1, profile: Profile | None = None
) -> Engine:
    """The engine that a server of these options opens, in this process. Raises what `Engine.open` raises."""
    return Engine.open(
        bundle,
        backend=options.backend,
        precision=options.precision,
        device=options.device,
        batch=batch,
        profile=profile,
    )


def _answer(path: Path, options: EngineOptions, batch: int, files: Sequence[bytes]) -> tuple[int, int | None]:
    with opened_engine(path, options, batch=batch) as engine:
        deque(engine.predict(files), maxlen=0)
        gpu = engine.device_memory()
        return _peak_resident_bytes(os.getpid()), gpu.used if gpu else None


def _peak_resident_bytes(pid: int) -> int:
    """The most memory that a running process has had in RAM so far: the kernel's VmHWM."""
    (kib,) = re.findall(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return 1024 * int(kib)


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just been killed
        return "0 0"
