"""thoraxrt beside other servers of the same FP32 graph through ONNX Runtime, under the same load.

Every server first gives the same logits for one image. Then they are loaded one at a time, in turn, each for the same
seconds; the peers that are not are frozen, because one that polls while it is idle takes the CPU from the one that is
measured. A peer that does not start, gives other logits or answers nothing is named with the reason.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import grpc
import msgspec
import numpy as np
import numpy.typing as npt

from thoraxrt.benchmarks import serving_peers
from thoraxrt.benchmarks.served import PREDICT, Served, predict_request
from thoraxrt.benchmarks.serving_load import Answer, Load, Target
from thoraxrt.engine.bundle import Bundle
from thoraxrt.proto.oip import open_inference_pb2 as oip
from thoraxrt.proto.v1 import thoraxrt_pb2 as pb
from thoraxrt.server.models import EngineOptions

__all__ = ["CONCURRENCY", "OURS", "compared"]

OURS: Final = "thoraxrt"
CONCURRENCY: Final = (1, 8, 32)

_START_S: Final = 60.0
_CELL_S: Final = 2.5
_DEADLINE_S: Final = 30.0
"""Of a request. On a slow machine a shorter one has thoraxrt refuse what its peers answer late."""

_CLOSE: Final = 1e-3  # ONNX Runtime of another version may add in another order


class _Kind(NamedTuple):
    """A server's name, its method or path, and what goes over the wire."""

    name: str
    path: str
    content_type: str  # over HTTP; empty over gRPC
    request: Callable[[bytes], bytes]
    logits: Callable[[bytes], Sequence[float]]


_Rounds = defaultdict[tuple[_Kind, int], list[list[Answer]]]


def _logits(answer: bytes) -> Sequence[float]:
    """Raises RuntimeError where something else than ONNX Runtime in FP32 has answered."""
    prediction = pb.PredictResponse.FromString(answer).prediction
    if (ran := (prediction.backend, prediction.precision)) != ("onnxruntime", "fp32"):
        raise RuntimeError(f"thoraxrt answers with {ran}; expected what the peers run, onnxruntime in fp32")
    return [finding.logit for finding in prediction.findings]


def _tensor(image: bytes) -> bytes:
    request = oip.ModelInferRequest(model_name="chest")
    request.inputs.add(name="image_bytes", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(len(image).to_bytes(4, "little") + image)
    return request.SerializeToString()


def _form(image: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="request"; filename="image"\r\n\r\n'
    return head + image + b"\r\n--x--\r\n"


def _floats(raw: bytes) -> Sequence[float]:
    return [float(value) for value in np.frombuffer(raw, "<f4")]


_OURS: Final = _Kind(
    OURS,
    PREDICT,
    "",
    predict_request,
    _logits,
)
_PEERS: Final = (
    _Kind("grpc", "/peer.Peer/Predict", "", bytes, _floats),
    _Kind(
        "pytriton",
        "/inference.GRPCInferenceService/ModelInfer",
        "",
        _tensor,
        lambda answer: _floats(oip.ModelInferResponse.FromString(answer).raw_output_contents[0]),
    ),
    _Kind(
        "litserve", "/predict", "multipart/form-data; boundary=x", _form, lambda answer: json.loads(answer)["logits"]
    ),
)
_PORT: Final = 18600


def compared(
    bundle: Bundle, files: Sequence[bytes], python: Path, *, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Each server's images a second and p99 in ms, by concurrency; of its OK answers; `statuses` counts all.

    `python` has the peers installed. `thoraxrt_to_it` is the median of each round's ratio of rates: above 1, thoraxrt
    answers more. Of a peer that failed there is `name` and `failed`, why. `say` is told of the progress. Raises
    RuntimeError where thoraxrt itself does not answer.
    """
    failed: dict[_Kind, str] = {}
    with ExitStack() as running:
        sides = _started(running, bundle, python, files[0], failed, say)
        rounds_of = _measured(running.enter_context(Load()), sides, files, rounds, failed, say)
    measured = [_row(*key, rounds_of) for key in rounds_of if key[0] not in failed]
    return [*measured, *({"name": kind.name, "failed": why} for kind, why in failed.items())]


class _Side(NamedTuple):
    """A server that runs: where it listens, and the block for its turn."""

    target: Target
    turn: Callable[[], AbstractContextManager[None]]


def _started(
    running: ExitStack,
    bundle: Bundle,
    python: Path,
    image: bytes,
    failed: dict[_Kind, str],
    say: Callable[[str], None],
) -> dict[_Kind, _Side]:
    """thoraxrt and the peers that give its logits, to the end of `running`."""
    folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
    server = running.enter_context(Served(bundle.path, EngineOptions(backend="onnxruntime", precision="fp32")))
    ours = Target(server.address, _OURS.path)
    expected = _OURS.logits(_ask(ours, _OURS.request(image)))
    sides = {_OURS: _Side(ours, nullcontext)}
    for number, kind in enumerate(_PEERS):
        say(f"starting {kind.name}")
        target = Target(f"127.0.0.1:{_PORT + 10 * number}", kind.path, kind.content_type)
        peer = running.enter_context(_Peer(bundle, python, kind.name, target.address, folder / str(number)))
        try:
            _check(kind, peer.first_answer(target, kind.request(image)), expected)
            sides[kind] = _Side(target, peer.running)
        except _PeerError as error:
            say(f"{kind.name} is left out: {error}")
            failed[kind] = str(error)
        peer.freeze()
    return sides


def _measured(
    load: Load,
    sides: dict[_Kind, _Side],
    files: Sequence[bytes],
    rounds: int,
    failed: dict[_Kind, str],
    say: Callable[[str], None],
) -> _Rounds:
    """Each round's answers. Who answers nothing has `failed`."""
    rounds_of: _Rounds = defaultdict(list)
    requests = {kind: [kind.request(data) for data in files] for kind in sides}
    for number, concurrency in product(range(rounds + 1), CONCURRENCY):  # the first round is not counted
        rates = []
        for kind, (target, turn) in list(sides.items()):
            with turn():
                got = load.closed(target, requests[kind], concurrency, seconds=_CELL_S, deadline_s=_DEADLINE_S)
            rates.append(f"{kind.name} {_rate(got):.1f}")
            rounds_of[kind, concurrency].extend([got] if number else [])
            if not _rate(got):
                del sides[kind]
                failed[kind] = f"{concurrency} at a time: {dict(Counter(answer.status for answer in got))}"
        said = f"round {number} of {rounds}" if number else "warm-up"
        say(f"{said}, {concurrency} at a time, images/s: {', '.join(rates)}")
        if _OURS in failed:
            raise RuntimeError(f"thoraxrt answered nothing, {failed[_OURS]}")
    return rounds_of


def _row(kind: _Kind, concurrency: int, rounds_of: _Rounds) -> dict[str, Any]:
    rates, ours = ([_rate(got) for got in rounds_of[who, concurrency]] for who in (kind, _OURS))
    answers = [answer for got in rounds_of[kind, concurrency] for answer in got]
    latencies = [answer.latency_s for answer in answers if answer.status == "OK"]
    return {
        "name": kind.name,
        "concurrency": concurrency,
        "per_s": statistics.median(rates),
        "p99_ms": 1000 * float(np.percentile(latencies, 99)),
        "statuses": dict(Counter(answer.status for answer in answers)),
        "thoraxrt_to_it": statistics.median(our / its for our, its in zip(ours, rates, strict=True)),
    }


def _rate(answers: Sequence[Answer]) -> float:
    """Those that are OK, a second."""
    good = [answer.due_s + answer.latency_s for answer in answers if answer.status == "OK"]
    return len(good) / max(good) if good else 0.0


def _check(kind: _Kind, answer: bytes, expected: Sequence[float]) -> None:
    """Raises _PeerError where the answer is not the expected logits."""
    try:
        found: npt.NDArray[np.float64] = np.array(kind.logits(answer), np.float64)
    except Exception as error:  # whatever another server's answer may be
        raise _PeerError(f"its answer is not understood: {error}") from None
    if found.shape != np.shape(expected) or (distance := np.abs(found - expected).max()) > _CLOSE:
        far = "" if found.shape != np.shape(expected) else f", {distance:.3g} away"
        raise _PeerError(f"its logits are not thoraxrt's: shape {found.shape}{far}")


class _PeerError(Exception):
    """A peer does not take part, for this reason."""


class _Peer:
    """A peer in a process group of its own, to the end of the block."""

    def __init__(self, bundle: Bundle, python: Path, name: str, address: str, log: Path) -> None:
        program, self._log = Path(serving_peers.__file__).resolve(), log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *(python, program, name, bundle.path / bundle.graph_name("fp32")),
                    *(msgspec.json.encode(bundle.manifest.preprocess), address.rpartition(":")[2]),
                ],
                env={**os.environ, "PYTHONPATH": str(program.parents[1])},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def first_answer(self, target: Target, request: bytes) -> bytes:
        """Its answer, as soon as it gives one. Raises _PeerError where it does not."""
        until = time.monotonic() + _START_S
        while True:
            try:
                return _ask(target, request)
            except (grpc.RpcError, OSError, http.client.HTTPException) as error:
                if self._process.poll() is not None or time.monotonic() > until:
                    said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                    raise _PeerError(f"no answer ({type(error).__name__}); its log ends with {said}") from None
            time.sleep(0.5)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Thawed for the block, and frozen after it."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.freeze()

    def freeze(self) -> None:
        """Stop it, until it is to run."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)  # whatever it has left behind
        self._process.wait()


def _ask(target: Target, request: bytes) -> bytes:
    """One answer. Raises grpc.RpcError, OSError or HTTPException."""
    host, _, port = target.address.rpartition(":")
    if not target.content_type:
        with grpc.insecure_channel(target.address, [("grpc.enable_http_proxy", 0)]) as channel:
            call: Any = channel.unary_unary(target.path)
            return bytes(call(request, timeout=_DEADLINE_S))
    with closing(http.client.HTTPConnection(host, int(port), timeout=_DEADLINE_S)) as connection:
        connection.request("POST", target.path, request, {"Content-Type": target.content_type})
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(f"status {response.status}")
        return response.read()
