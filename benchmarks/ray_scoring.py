"""The same pass on a Ray cluster: blocks of images to engines, one per GPU or machine, rows back to the one writer.

Owns what Ray is told, and the translation of its errors. Knows no Parquet.

Only the process that started the run writes parts, so a block counts when its rows have come back, whole and once: Ray
gives the block of a worker that died to another one, and what the dead one had done of it is nowhere.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple, cast

import pyarrow as pa
import pyarrow.ipc

from thoraxrt.benchmarks.scores import PART_ROWS, Header, Row, Writer, table_from_rows
from thoraxrt.benchmarks.scoring import Answerer, Item, answered_rows, engine_answerer, open_engine, versions
from thoraxrt.engine import errors
from thoraxrt.engine.backends import choose
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import BackendError, BackendUnavailableError, BundleError, RequestError, ThoraxrtError
from thoraxrt.export import Track, no_progress

# Ray reads these when it is imported.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent to anyone
if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
    # The ports of a cluster of its own are open to the network, and run what they are given: from this process alone.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
import ray
import ray.data
from ray.exceptions import RayError

__all__ = ["ray_header", "score_on_ray"]

_BLOCKS_EACH: Final = 8
"""Blocks an engine gets at least, where there are images enough, so that all end at about the same time."""
_EXECUTOR_S: Final = 10.0


def ray_header(bundle: Bundle, backend: str | None, precision: str | None, device: str | None) -> Header:
    """The header of what a cluster's engines will say: what this machine would choose, all of them run.

    Where backend, precision and device are all named, this machine need not be able to run them. Raises what
    `thoraxrt.engine.backends.choose` raises, and RequestError for one GPU by its number: Ray hands them out.
    """
    if device not in (None, "cpu", "cuda"):
        raise RequestError(f"the device is {device!r}; expected cpu or cuda, for it is Ray that hands out GPUs")
    if backend is None or precision is None or device is None:
        chosen = choose(bundle, backend, precision, device)
        backend, precision = cast(ModuleType, chosen.module).__name__.rpartition(".")[2], chosen.precision
    return Header(
        labels=bundle.manifest.labels,
        bundle_sha256=bundle.sha256,
        backend=backend,
        precision=precision,
        through="engine",
        versions=versions(backend),
    )


def score_on_ray(
    items: Sequence[Item],
    bundle: Bundle,
    writer: Writer,
    *,
    device: str | None = None,
    batch: int = 1,
    track: Track = no_progress,
) -> None:
    """What `thoraxrt.benchmarks.scoring.score` does, on the cluster of `RAY_ADDRESS`, else on one of this machine alone.

    Each engine has a GPU, or else a whole machine, since a backend on the CPU uses all of its cores; a container that is
    held to some of them is a machine to Ray, and how a large one is divided. Every machine needs the same versions as
    this one, and bundle and images at the same paths. Blocks are written as they come back, and read in the order of the
    items.

    Raises what an engine raises, BackendError where it fails say or the cluster breaks, BundleError where a machine has
    another bundle, BackendUnavailableError where there is no cluster, it has no such machine or other versions; what was written stays,
    and a further call goes on from there. A worker that dies (its machine is lost, or out of memory) is started again,
    as often as it dies.
    """
    todo = [item for item in items if item.image not in writer.done]
    if todo:
        with _translated(), _cluster():
            for _ in track(_written(todo, bundle, writer, device, batch), "Scoring", len(todo)):
                pass


def _written(items: list[Item], bundle: Bundle, writer: Writer, device: str | None, batch: int) -> Iterator[None]:
    """Score the items and write them; once for each."""
    header = writer.header
    device = device or choose(bundle, header.backend, header.precision).module.DEVICE
    room = _room(gpu=device == "cuda")
    rows = min(PART_ROWS, math.ceil(len(items) / (_BLOCKS_EACH * room.engines)))
    given = [_table(items[start : start + rows]) for start in range(0, len(items), rows)]
    answered = ray.data.from_arrow(given).map_batches(
        _Scorer,
        fn_constructor_args=(str(bundle.path.resolve()), header, device, batch, room.cores),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=room.engines),
        num_cpus=room.cores,
        num_gpus=room.gpus,
    )
    for block in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for part in cast(pa.Table, block).to_pylist():
            rows = pa.ipc.open_stream(part["rows"]).read_all()
            writer.write_table(rows)
            yield from (None for _ in range(len(rows)))
            if part["error"]:
                raise getattr(errors, part["error"])(part["message"])


def _table(items: Sequence[Item]) -> pa.Table:
    return pa.table(
        {
            "index": [item.index for item in items],
            "image": [item.image for item in items],
            "path": [os.fsencode(item.path.absolute()) for item in items],
            "located": pa.array([item.located for item in items], pa.list_(pa.string())),
        }
    )


class _Scorer:
    """One engine in a process of its own, which Ray starts, and starts again where it has died."""

    def __init__(self, bundle: str, header: Header, device: str | None, batch: int, cores: int) -> None:
        self._bundle, self._header, self._device, self._batch, self._cores = bundle, header, device, batch, cores

    @cached_property
    def _answerer(self) -> Answerer:
        """Opened with the first block, whose error it is where it cannot be."""
        opened = Bundle.open(self._bundle)
        if opened.sha256 != self._header.bundle_sha256:
            raise BundleError(
                f"{opened.path} on {os.uname().nodename} is another bundle than where this run began; copy that one there"
            )
        here = versions(self._header.backend)
        others = [
            f"{name} {here.get(name)}" for name, version in self._header.versions.items() if here.get(name) != version
        ]
        if others:
            raise BackendUnavailableError(
                f"{os.uname().nodename} has {', '.join(others)}, which is not what this run began with; install there what "
                "the machine has that started it"
            )
        engine = open_engine(
            opened,
            backend=self._header.backend,
            precision=self._header.precision,
            device=self._device,
            batch=self._batch,
            workers=max(1, self._cores - 1),
        )
        return engine_answerer(engine, located=True)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The block's rows up to the error that ends the run, if there is one: what is raised, Ray gives as text alone."""
        items = [
            Item(**{**item, "path": Path(os.fsdecode(item["path"])), "located": tuple(item["located"])})
            for item in batch.to_pylist()
        ]
        rows: list[Row] = []
        failure: ThoraxrtError | None = None
        try:
            rows.extend(answered_rows(items, self._answerer))
        except ThoraxrtError as error:
            failure = error
        table, sink = table_from_rows(rows, self._header), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return pa.table(
            {
                "rows": [sink.getvalue().to_pybytes()],
                "error": pa.array([failure and type(failure).__name__], pa.string()),
                "message": pa.array([failure and str(failure)], pa.string()),
            }
        )


class _Room(NamedTuple):
    """How many engines the cluster has room for, and what each of them takes."""

    engines: int
    cores: int
    gpus: int


def _room(*, gpu: bool) -> _Room:
    """One per GPU, with its share of the cores, or one per machine."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    if gpu:
        machines = [machine for machine in machines if machine.get("GPU")]
    if not machines:
        raise BackendUnavailableError(
            f"the Ray cluster has no machine with a {'GPU' if gpu else 'CPU'} to give; expected one: see `ray status`"
        )
    gpus = [int(machine["GPU"]) if gpu else 1 for machine in machines]
    cores = min(int(machine["CPU"]) // count for machine, count in zip(machines, gpus, strict=True))
    return _Room(engines=sum(gpus), cores=max(1, cores), gpus=int(gpu))


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """A connection to the cluster: the one this process has, else that of `RAY_ADDRESS`, else one of its own."""
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is drawn
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:  # what Ray raises here is none of its own
        raise BackendUnavailableError(
            f"no Ray cluster at {address} ({' '.join(str(error).split())[:200]}); expected RAY_ADDRESS to name one that "
            "runs this version of Ray and Python, or to be unset for one of this machine alone"
        ) from error
    try:
        yield
    finally:
        for thread in threading.enumerate():  # one that asks Ray for something after its end has it end the process
            if thread.name.startswith("StreamingExecutor"):
                thread.join(_EXECUTOR_S)
        ray.shutdown()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise what Ray raises as a BackendError."""
    try:
        yield
    except RayError as error:
        raise BackendError(
            f"the Ray cluster broke ({type(error).__name__}: {str(error).strip()[-300:]}); see its logs, then run again: "
            "it goes on from here"
        ) from error
