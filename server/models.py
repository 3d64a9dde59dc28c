"""Which models and versions are served: loaded, replaced and unloaded while requests are being answered.

Owns the engines and schedulers, and the order in which one takes another's place: the new one is opened, verified and
warm before it is given to anybody, and the old one is closed after its last user. Knows neither gRPC nor signals.

A model repository is laid out as Triton's, each version a bundle: `REPOSITORY/<name>/<version>/manifest.json`, where
versions are positive integers. Other names are passed over, those that begin with a dot among them, so that a bundle
can be copied in beside its place and renamed. A folder that is itself a bundle is served alone, as version 1 of a
model with the folder's stem as its name.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakValueDictionary

from thoraxrt.engine.bundle import MANIFEST, Bundle
from thoraxrt.engine.decode import Decoder, Radiograph
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import BackendError, BundleError, ModelNotFoundError, ServerError, ThoraxrtError
from thoraxrt.engine.execute import DeviceMemory
from thoraxrt.engine.receipt import require_parity
from thoraxrt.server.batching import BatchingOptions
from thoraxrt.server.scheduler import Scheduler
from thoraxrt.server.telemetry import NullTelemetry

__all__ = ["EngineOptions", "Loaded", "ModelState", "ModelStatus", "Models"]

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")

_TRIES: Final = 3
"""To open a bundle that is replaced while it is being read."""

_UNLOADED: Final = "unloaded by request"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How every bundle is opened; see `Engine.open`.

    With `trusted`, public keys or folders of them, a bundle must be signed by one of them. With `require_parity` its
    parity receipt must say that this backend passed at this precision, and nothing else may take over from a lost GPU.
    Raises ValueError where `require_parity` and `fall_back` are both set. Example: `EngineOptions(device="cuda",
    fall_back=True)`.
    """

    backend: str | None = None
    precision: str | None = None
    device: str | None = None
    fall_back: bool = False
    trusted: Sequence[Path] | None = None
    require_parity: bool = False

    def __post_init__(self) -> None:
        if self.require_parity and self.fall_back:
            raise ValueError(
                "EngineOptions has require_parity and fall_back; expected one: no receipt is of a stand-in"
            )


_DEFAULT_ENGINE: Final = EngineOptions()


class ModelState(Enum):
    """A version's state; the values are the words of the Open Inference Protocol's repository index."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One version of a model, as `Models.index` gives it.

    `sha256` is the manifest's, `backend` and `precision` what is executed; all three empty where nothing is served.
    `reason` says why a version is UNAVAILABLE, and of a READY one why the bundle that now lies in its place was
    refused, while the earlier one is served.
    """

    name: str
    version: int
    state: ModelState
    reason: str
    sha256: str = ""
    backend: str = ""
    precision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    """One version that answers requests; it stays open as long as its `Models.lease`."""

    name: str
    version: int
    bundle: Bundle
    engine: Engine
    scheduler: Scheduler


@dataclass(slots=True, eq=False)
class _Served:
    """A loaded version and how many hold it."""

    loaded: Loaded
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class _Slot:
    """A version's place; `stamp` is of the folder as it was last tried, `reason` why that is not what is served."""

    state: ModelState = ModelState.LOADING  # while nothing is served
    reason: str = ""
    served: _Served | None = None
    stamp: _Stamp | None = None

    def status(self, name: str, version: int) -> ModelStatus:
        if self.served is None:
            return ModelStatus(name=name, version=version, state=self.state, reason=self.reason)
        engine = self.served.loaded.engine
        return ModelStatus(
            name=name,
            version=version,
            state=ModelState.READY,
            reason=self.reason,
            sha256=engine.bundle.sha256,
            backend=engine.backend,
            precision=engine.precision,
        )


class Models:
    """The models of a repository, or one bundle's.

    `path` is either; `decoder` is shared by all models and stays its owner's, to be closed after them. Of each model
    the `latest` highest versions are served that can be loaded, all for None. What is replaced or unloaded has
    the longest deadline of a request to answer all it has, and `grace_s` seconds once the models are closed; what is
    left then gets ServerError. With `poll_s`, the folder is looked at so often, from `start` on.

    All methods are for one event loop's thread, and none is slow there. A model's changes run one after the other, and
    bundles are opened one at a time: beside the engines that are served there is one that is being opened, and what
    each model's change has replaced or unloaded, until its last users have gone. A change goes on to its end where its
    caller is cancelled.

    Example:
        async with Models(path, decoder, BatchingOptions(), telemetry) as models:
            await models.start()
            with models.lease("chexnet") as loaded:
                ticket = loaded.scheduler.admit(...)
    """

    def __init__(
        self,
        path: Path,
        decoder: Decoder,
        batching: BatchingOptions,
        telemetry: NullTelemetry,
        *,
        engine: EngineOptions = _DEFAULT_ENGINE,
        latest: int | None = 1,
        grace_s: float = 10.0,
        poll_s: float | None = None,
    ) -> None:
        if latest is not None and latest < 1:
            raise ValueError(f"Models latest is {latest}; expected at least 1, or None for all versions")
        self._path = path.absolute()
        self._alone = (path / MANIFEST).is_file()
        self._decoder = decoder
        self._batching = batching
        self._telemetry = telemetry
        self._queued: Counter[str] = Counter()  # images in the server, by model
        self._engine = engine
        self._latest = latest
        self._grace_s = grace_s
        self._poll_s = poll_s
        self._slots: dict[str, dict[int, _Slot]] = {}
        self._asked: dict[tuple[str, int | None], bool] = {}  # to be served or not, whatever the policy says
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # to change a model
        self._opening = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Timeout] = set()
        self._polling: asyncio.Task[None] | None = None
        self._loaded = False  # for the first time
        self._was_ready = False
        self._closing = False

    # Using

    @contextmanager
    def lease(self, name: str | None = None, version: int | None = None) -> Iterator[Loaded]:
        """The model to answer one request with, which stays open while the block runs.

        By default the highest version, of the only model. One lease is for one request: a stream that kept its lease
        would hold up what replaces the model. Raises ModelNotFoundError, or ServerError before the first model has
        been loaded and once the server stops.
        """
        served = self._find(name, version)
        served.users += 1
        served.unused.clear()
        try:
            yield served.loaded
        finally:
            served.users -= 1
            if not served.users:
                served.unused.set()

    def ready(self, name: str | None = None, version: int | None = None) -> bool:
        """Whether a model or a version is served; without a name, whether the server is ready.

        It is once every model in the folder is served, or unloaded by request (else a rollout would go on with a model
        less), and stays so while any model is served (else one bad bundle would take the good ones out of service).
        """
        if name is None and not self._was_ready:
            return False
        try:
            self._find(name or self._names()[0], version)
        except (IndexError, ModelNotFoundError, ServerError):
            return False
        return True

    def index(self) -> list[ModelStatus]:
        """Every version that is served, was to be, or is not by request; by name and version."""
        return [slot.status(name, version) for name, version, slot in self._all()]

    def device_memory(self) -> list[DeviceMemory]:
        """The memory of each GPU that a model runs on; any thread may ask. Raises DeviceError where one is lost."""
        slots = [slot for slots in list(self._slots.values()) for slot in list(slots.values())]
        engines = [served.loaded.engine for slot in slots if (served := slot.served)]
        found = [memory for engine in engines if (memory := engine.device_memory())]
        return list({memory.gpu: memory for memory in found}.values())

    def _all(self) -> list[tuple[str, int, _Slot]]:
        return [(name, v, slot) for name, slots in sorted(self._slots.items()) for v, slot in sorted(slots.items())]

    def _names(self) -> list[str]:
        return sorted({name for name, _, slot in self._all() if slot.served})

    def _find(self, name: str | None, version: int | None) -> _Served:
        if self._closing:
            raise ServerError("the server is stopping; try again later, or another server")
        if not self._loaded:
            raise ServerError("the models are not loaded yet; try again later, or another server")
        if name is None:
            if len(names := self._names()) != 1:
                expected = f"no model is named; expected one of {', '.join(names)}" if names else "no model is served"
                raise ModelNotFoundError(expected)
            name = names[0]
        served = {v: slot.served for v, slot in self._slots.get(name, {}).items() if slot.served}
        if version is None and served:
            version = max(served)
        if version is None or version not in served:
            raise self._not_found(name, version)
        return served[version]

    def _not_found(self, name: str, version: int | None) -> ModelNotFoundError:
        there = ", ".join(f"{name} version {v}" for name, v, slot in self._all() if slot.served)
        what = f"model {name[:128]!r}" + ("" if version is None else f" version {version}")
        return ModelNotFoundError(f"there is no {what}; expected one of those that are served: {there or 'none'}")

    # Changing

    async def start(self) -> None:
        """Load what the policy asks for, and begin to poll.

        Raises BundleError where the folder cannot be read or holds no model; where no version can be loaded, what the
        first one met. Where some are served, it returns: `index` and `ready` tell of the others.
        """
        errors: list[ThoraxrtError] = []
        await self._change(self._refresh(errors, again=True))
        if errors and not self._names():
            raise errors[0]
        if self._poll_s is not None and self._polling is None:
            self._polling = asyncio.create_task(self._poll(self._poll_s))

    async def refresh(self) -> None:
        """Look at the folder: load new versions, replace changed bundles, unload what has gone.

        Why a bundle is refused stands in `index`; it is tried again once a file of it has changed. Raises BundleError
        where the folder cannot be read or holds no model: so does a missing mount, and `unload` is for who means it.
        """
        await self._change(self._refresh([], again=False))

    async def load(self, name: str, version: int | None = None) -> None:
        """Serve a model as the policy says, or a version whatever it says; replace it where its bundle has changed.

        Takes back an `unload`, and tries again what was refused. Raises ModelNotFoundError where the folder has no such
        version, else what the version met (by default the highest that has been tried): BundleError, SignatureError,
        BackendError, RequestError. What was served before is then still served.
        """
        await self._change(self._load(name, version))

    async def unload(self, name: str, version: int | None = None) -> None:
        """Serve a model, or one version of it, no more until `load`; return once it is closed.

        Raises ModelNotFoundError where there is none.
        """
        await self._change(self._unload(name, version))

    async def close(self) -> None:
        """Answer what has been admitted, within the grace, and close every model; closing twice is harmless."""
        self._closing = True
        if self._polling:
            self._polling.cancel()
        until = asyncio.get_running_loop().time() + self._grace_s
        for timeout in self._retiring:
            if not timeout.expired() and (timeout.when() or 0.0) > until:
                timeout.reschedule(until)
        await self._change(self._stop_serving(self._all()))
        while self._changes:
            await asyncio.wait(self._changes)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _change(self, change: Coroutine[Any, Any, None]) -> None:
        """Run a change to its end."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _poll(self, period_s: float) -> None:
        said = ""
        while True:
            await asyncio.sleep(period_s)
            try:
                await self.refresh()
            except Exception as error:  # whatever it is, the next look may succeed
                if str(error) != said:
                    _log.error("the models were not refreshed: %s: %s", type(error).__name__, error)
                said = str(error)
            else:
                said = ""

    def _turn(self, name: str) -> asyncio.Lock:
        return self._turns.setdefault(name, asyncio.Lock())

    async def _refresh(self, errors: list[ThoraxrtError], *, again: bool) -> None:
        for name in sorted((await self._folders()).keys() | self._slots.keys()):
            async with self._turn(name):
                found = await self._folders()  # as it is now
                errors += (await self._sync(name, found.get(name, {}), again=again)).values()
        self._loaded = True
        self._note_ready()

    async def _load(self, name: str, version: int | None) -> None:
        async with self._turn(name):
            found = await self._folders()
            if name not in found or version not in (None, *found[name]):
                there = ", ".join(f"{name} version {v}" for name, versions in found.items() for v in sorted(versions))
                what = f"model {name[:128]!r}" + ("" if version is None else f" version {version}")
                raise ModelNotFoundError(f"{self._path} holds no {what}; expected one of {there}")
            self._ask(name, version, served=version is not None or None)
            errors = await self._sync(name, found[name], again=True)
        self._note_ready()
        if errors and (version is None or version in errors):
            raise errors[max(errors) if version is None else version]

    async def _unload(self, name: str, version: int | None) -> None:
        async with self._turn(name):
            self._check_open()
            slots = self._slots.get(name, {})
            if not slots or version not in (None, *slots):
                raise self._not_found(name, version)
            self._ask(name, version, served=False)
            await self._stop_serving([(name, v, slot) for v, slot in slots.items() if version in (None, v)])
        self._note_ready()

    def _check_open(self) -> None:
        if self._closing:
            raise ServerError("the server is stopping; its models stay as they are")

    async def _folders(self) -> dict[str, dict[int, Path]]:
        self._check_open()
        if self._alone:
            return {self._path.stem: {1: self._path}}
        found = await asyncio.to_thread(_folders, self._path)
        if not found:
            raise BundleError(
                f"{self._path} holds no model; expected a bundle, or folders <name>/<version> that each are one: "
                "see that it is the right folder, and mounted"
            )
        return found

    def _ask(self, name: str, version: int | None, *, served: bool | None) -> None:
        """Remember what was asked for last; for a whole model, it is all that was."""
        for key in [key for key in self._asked if key == (name, version) or (version is None and key[0] == name)]:
            del self._asked[key]
        if served is not None:
            self._asked[name, version] = served

    def _asked_for(self, name: str, version: int) -> bool | None:
        return self._asked.get((name, version), self._asked.get((name, None)))

    def _note_ready(self) -> None:
        self._was_ready |= self._loaded and all(
            any(slot.served or slot.reason == _UNLOADED for slot in slots.values()) for slots in self._slots.values()
        )

    async def _sync(self, name: str, folders: Mapping[int, Path], *, again: bool) -> dict[int, ThoraxrtError]:
        """Serve of a model what its folders hold, as asked for and by the policy; what versions were refused for.

        The highest come first, and what is to go goes last: a version that cannot be loaded replaces none.
        """
        slots = self._slots.setdefault(name, {})
        errors: dict[int, ThoraxrtError] = {}
        kept, loaded = set(), 0
        for version in sorted(folders, reverse=True):
            asked = self._asked_for(name, version)
            if asked is False:
                kept |= slots.keys() & {version}
            elif asked or self._latest is None or loaded < self._latest:
                kept.add(version)
                slot = slots.setdefault(version, _Slot())
                if error := await self._load_changed(name, version, folders[version], slot, again=again):
                    errors[version] = error
                loaded += slot.served is not None
        gone = [(name, version, slot) for version, slot in slots.items() if version not in kept]
        await self._stop_serving(gone)
        for _, version, _ in gone:
            del slots[version]
        if not slots:
            del self._slots[name]
        return errors

    async def _load_changed(
        self, name: str, version: int, folder: Path, slot: _Slot, *, again: bool
    ) -> ThoraxrtError | None:
        """Serve the bundle in a folder, unless it is served or has been refused; what it was refused for."""
        error: ThoraxrtError | None = None
        for _ in range(_TRIES):  # it may be replaced while it is being loaded
            stamp = await asyncio.to_thread(_stamp, folder)
            if stamp == slot.stamp and not (again and slot.reason):
                break
            slot.stamp, again = stamp, False
            try:
                await self._replace(name, version, folder, slot)
            except ThoraxrtError as its_own:
                error = its_own
            except Exception as fault:
                _log.error("loading %s version %d failed", name, version, exc_info=fault)
                error = BackendError(f"loading it failed with {type(fault).__name__}: {fault}")
            else:
                error = None
            slot.state, slot.reason = ModelState.UNAVAILABLE, str(error or "")
        if error and not self._closing:
            _log.error("%s version %d is refused: %s", name, version, error)
            self._telemetry.load_failed(name)
        return error

    async def _replace(self, name: str, version: int, folder: Path, slot: _Slot) -> None:
        """Load a bundle and serve it in the place of the slot's, unless it is the same. Raises what it met."""
        slot.state, old = ModelState.LOADING, slot.served
        async with self._opening:
            self._check_open()
            engine = await asyncio.to_thread(self._open, folder, old.loaded.bundle.sha256 if old else "")
            if engine is None:
                return
            scheduler = Scheduler(
                engine, self._decoder, self._batching, self._telemetry, model=name, queued=self._queued
            )
            loaded = Loaded(name=name, version=version, bundle=engine.bundle, engine=engine, scheduler=scheduler)
            try:
                self._check_open()
                await scheduler.warm_up()
                self._check_open()
            except BaseException:
                await _close(loaded)
                raise
            slot.served = _Served(loaded)
        sha256 = engine.bundle.sha256
        _log.info("%s version %d is served (%s %s, %s)", name, version, engine.backend, engine.precision, sha256[:12])
        self._telemetry.loaded(name, str(version), sha256=sha256, backend=engine.backend, precision=engine.precision)
        if old:
            await self._retire(old)

    def _open(self, folder: Path, served_sha256: str) -> Engine | None:
        """The engine of a bundle of which every file has been checked; None where it is the one that is served."""
        bundle = Bundle.open(folder, self._engine.trusted)
        if bundle.sha256 == served_sha256:
            return None
        bundle.verify()
        options = self._engine
        engine = Engine.open(
            bundle,
            backend=options.backend,
            precision=options.precision,
            device=options.device,
            fall_back=options.fall_back,
            decoder=_Borrowed(self._decoder),
        )
        if options.require_parity:
            try:
                require_parity(bundle, engine.backend, engine.precision)
            except BaseException:
                engine.close()
                raise
        return engine

    async def _stop_serving(self, slots: Sequence[tuple[str, int, _Slot]]) -> None:
        """Give the slots' models to nobody any more, and close them after their last users."""
        retiring = []
        for name, version, slot in slots:
            if slot.served:
                retiring.append(self._retire(slot.served))
                slot.served, slot.state = None, ModelState.UNLOADING
                self._telemetry.unloaded(name, str(version))
        await asyncio.gather(*retiring)
        for _, _, slot in slots:
            slot.state, slot.reason = ModelState.UNAVAILABLE, _UNLOADED

    async def _retire(self, served: _Served) -> None:
        """Wait for those who use a model that nobody gets any more, within the grace; then close it."""
        loaded = served.loaded
        grace_s = self._grace_s if self._closing else self._batching.longest_deadline_s
        try:
            async with asyncio.timeout(grace_s) as timeout:
                self._retiring.add(timeout)
                while served.users:
                    await served.unused.wait()
                await loaded.scheduler.drain()
        except TimeoutError:
            _log.warning("%s version %d was still in use when its time was over", loaded.name, loaded.version)
        finally:
            self._retiring.discard(timeout)
        await _close(loaded)


async def _close(loaded: Loaded) -> None:
    await loaded.scheduler.close()
    try:
        await asyncio.to_thread(loaded.engine.close)
    except Exception as fault:  # what takes its place is served nevertheless
        _log.error("closing %s version %d failed", loaded.name, loaded.version, exc_info=fault)


class _Borrowed:
    """The shared decoder, which an engine that is closed leaves open."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def submit(self, data: bytes) -> Future[Radiograph]:
        """See `Decoder`."""
        return self._decoder.submit(data)

    def close(self) -> None:
        """Leave it open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_Stamp = tuple[tuple[str, int, int, int], ...]


def _stamp(folder: Path) -> _Stamp:
    """What tells that a file of a folder has been changed or replaced; empty where the folder cannot be read.

    The change time covers permissions too, and no copying tool sets it.
    """
    try:
        with os.scandir(folder) as entries:
            statuses = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_ctime_ns) for name, s in statuses))


def _folders(repository: Path) -> dict[str, dict[int, Path]]:
    """The version folders of each model that has one. Raises BundleError where the repository cannot be read."""
    try:
        return {
            model.name: versions
            for model in repository.iterdir()
            if _NAME.fullmatch(model.name) and model.is_dir()
            if (versions := {int(v.name): v for v in model.iterdir() if _VERSION.fullmatch(v.name) and v.is_dir()})
        }
    except OSError as error:
        raise BundleError(
            f"the model repository {repository} cannot be read: {error.strerror}; see that it is mounted and readable"
        ) from error
