"""Several models and versions with real engines: reload under load, what is refused, unloading, order, the end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from onnx import numpy_helper

from tests.server.conftest import tiny_graph, write_bundle
from thoraxrt.engine.bundle import MANIFEST, Bundle, FileEntry, Manifest
from thoraxrt.engine.decode import ThreadDecoder
from thoraxrt.engine.engine import Engine, Prediction
from thoraxrt.engine.errors import BackendError, BundleError, ModelNotFoundError, ServerError, SignatureError
from thoraxrt.export.publish import publish, sign_bundle
from thoraxrt.server.batching import BatchingOptions, Priority
from thoraxrt.server.models import EngineOptions, Loaded, Models, ModelState
from thoraxrt.server.telemetry import NullTelemetry

GRAPH = "model.fp32.onnx"
READY, UNAVAILABLE = ModelState.READY, ModelState.UNAVAILABLE
BATCHING = BatchingOptions(max_batch=2)


def graph_with(shift: float) -> bytes:
    """The tiny graph with so much more in every logit."""
    model = onnx.load_from_string(tiny_graph())
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + shift, "bias"))
    return bytes(model.SerializeToString())


def bundle_files(folder: Path, graph: bytes) -> dict[str, bytes]:
    bundle = write_bundle(folder / f"made-{next(_numbers)}.bundle", graph)
    return {file.name: file.read_bytes() for file in bundle.path.iterdir()}


_numbers = itertools.count()


class Repository:
    """A model repository, and the shift of the logits of each bundle that was ever published in it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "models"
        self.path.mkdir()
        self._folder = folder
        self.shifts: dict[str, float] = {}

    def put(self, version: int, shift: float, name: str = "tiny") -> str:
        """Publish a bundle as the exporter does, in the place of another; its manifest's sha256."""
        out = self.path / name / str(version)
        publish(bundle_files(self._folder, graph_with(shift)), out, replace=True)
        sha256 = Bundle.open(out).sha256
        self.shifts[sha256] = shift
        return sha256

    def put_files(self, version: int, **changed: Any) -> None:
        """Publish a bundle with what is wrong with it: `graph`, `manifest`, or a file that was `damaged`."""
        files = bundle_files(self._folder, changed.get("graph", graph_with(50)))
        if "manifest" in changed:
            files[MANIFEST] = changed["manifest"]
        if "damaged" in changed:
            files[changed["damaged"]] += b"!"
        publish(files, self.path / "tiny" / str(version), replace=True)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


class Opened:
    """Every engine that is opened, for real; `before` is called in the loading thread each time."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.most = 0
        self.before: Callable[[Path], object] = lambda path: None

    @property
    def open(self) -> int:
        return sum(not engine._closed for engine in self.engines)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    record, really_open = Opened(), Engine.open

    def open_(bundle: Bundle, **options: Any) -> Engine:
        record.before(bundle.path)
        engine = really_open(bundle, **options)
        record.engines.append(engine)
        record.most = max(record.most, record.open)
        return engine

    monkeypatch.setattr(Engine, "open", open_)
    yield record
    assert record.open == 0, "engines were left open"


class Record(NullTelemetry):
    """Telemetry that keeps what it is told of models."""

    def __init__(self) -> None:
        self.served: dict[tuple[str, str], str] = {}
        self.failures: list[str] = []

    def loaded(self, model: str, version: str, *, sha256: str, backend: str, precision: str) -> None:
        self.served[model, version] = sha256

    def unloaded(self, model: str, version: str) -> None:
        del self.served[model, version]

    def load_failed(self, model: str) -> None:
        self.failures.append(model)


@asynccontextmanager
async def models_of(
    path: Path,
    telemetry: NullTelemetry | None = None,
    *,
    trusted: list[Path] | None = None,
    require_parity: bool = False,
    batching: BatchingOptions = BATCHING,
    **options: Any,
) -> AsyncIterator[Models]:
    engine = EngineOptions(backend="onnxruntime", trusted=trusted, require_parity=require_parity)
    with ThreadDecoder(1) as decoder:
        async with Models(path, decoder, batching, telemetry or NullTelemetry(), engine=engine, **options) as models:
            yield models


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run it, and fail where it hangs or the event loop had anything to complain of."""
    complaints: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(60):
            await scenario()
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        gc.collect()  # an exception that nobody took is told of by its future's end

    asyncio.run(watched())
    assert not complaints


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def answer(loaded: Loaded, data: bytes) -> Prediction:
    ticket = loaded.scheduler.admit(30.0, Priority.ROUTINE, "client")
    try:
        return await loaded.scheduler.predict(ticket, data)
    finally:
        loaded.scheduler.release(ticket)


def logit(prediction: Prediction) -> float:
    return prediction.findings[0].logit


def states(models: Models) -> dict[tuple[str, int], ModelState]:
    return {(status.name, status.version): status.state for status in models.index()}


def served(models: Models, name: str | None = None, version: int | None = None) -> str:
    with models.lease(name, version) as loaded:
        return loaded.bundle.sha256


# What is served


@pytest.mark.parametrize(("latest", "expected"), [(1, [10]), (2, [2, 10]), (None, [1, 2, 10])])
def test_the_highest_versions_of_each_model_are_served(
    repository: Repository, opened: Opened, latest: int | None, expected: list[int]
) -> None:
    for version in (1, 2, 10):
        repository.put(version, version)
    other = repository.put(3, 5.0, "other")
    for name in ("tiny/0", "tiny/01", "tiny/.11.unfinished", "tiny/x", ".hidden/1", "not a name/1", "empty"):
        (repository.path / name).mkdir(parents=True)
    (repository.path / "tiny" / "11").write_text("no folder")

    async def scenario() -> None:
        async with models_of(repository.path, latest=latest) as models:
            await models.start()
            assert states(models) == {("other", 3): READY} | {("tiny", version): READY for version in expected}
            for status in models.index():
                assert (status.reason, status.backend, status.precision) == ("", "onnxruntime", "fp32")
                assert status.sha256 == served(models, status.name, status.version)
                assert models.ready(status.name, status.version)
            with models.lease("tiny") as loaded:
                assert (loaded.name, loaded.version) == ("tiny", 10)
                assert loaded.engine.bundle is loaded.bundle
            assert served(models, "other") == other
            assert models.ready()
            assert models.device_memory() == []  # on a CPU
            assert models.ready("tiny")
            assert not models.ready("tiny", 9)
            assert not models.ready("nobody")

    run(scenario)


def test_a_bundle_alone_is_version_1_of_its_stem(tmp_path: Path, opened: Opened, radiograph: Any) -> None:
    bundle = write_bundle(tmp_path / "chest.v2.bundle", tiny_graph())

    async def scenario() -> None:
        async with models_of(bundle.path) as models:
            await models.start()
            with models.lease() as loaded:
                assert (loaded.name, loaded.version, loaded.bundle.sha256) == ("chest.v2", 1, bundle.sha256)
                here = await answer(loaded, radiograph())
            publish(bundle_files(tmp_path, graph_with(3.0)), bundle.path, replace=True)
            await models.refresh()
            with models.lease() as loaded:
                assert logit(await answer(loaded, radiograph())) == pytest.approx(logit(here) + 3.0, abs=1e-5)
            shutil.rmtree(bundle.path)
            await models.refresh()
            (status,) = models.index()
            assert status.state is READY
            assert "cannot be read" in status.reason

    run(scenario)


def test_who_asks_for_what_is_not_there_is_told_what_is(repository: Repository, opened: Opened) -> None:
    repository.put(1, 0.0)
    repository.put(4, 0.0, "other")

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            with (
                pytest.raises(ModelNotFoundError, match=r"'chest'.*other version 4, tiny version 1"),
                models.lease("chest"),
            ):
                pass
            with pytest.raises(ModelNotFoundError, match=r"'tiny' version 2.*tiny version 1"), models.lease("tiny", 2):
                pass
            with (
                pytest.raises(ModelNotFoundError, match="no model is named; expected one of other, tiny"),
                models.lease(),
            ):
                pass
            for change in (
                models.load("tiny", 7),
                models.load("chest"),
                models.unload("chest"),
                models.unload("tiny", 7),
            ):
                with pytest.raises(ModelNotFoundError, match="tiny version 1"):
                    await change
            assert set(states(models)) == {("other", 4), ("tiny", 1)}

    run(scenario)


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_folder_without_a_model_is_an_error_and_takes_nothing_away(
    repository: Repository, opened: Opened, what: str
) -> None:
    sha256 = repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            shutil.rmtree(repository.path)
            if what == "empty":  # as the place of a file system that is not mounted
                repository.path.mkdir()
            with pytest.raises(BundleError, match="mounted"):
                await models.refresh()
            assert served(models) == sha256
            assert models.ready()
        async with models_of(repository.path) as models:
            with pytest.raises(BundleError, match="mounted"):
                await models.start()
            assert not models.ready()

    run(scenario)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with ThreadDecoder(1) as decoder, pytest.raises(ValueError, match="latest is 0; expected at least 1"):
        Models(tmp_path, decoder, BATCHING, NullTelemetry(), latest=0)


# Replacing


@pytest.mark.parametrize("as_version", ["same", "next"])
def test_under_load_every_request_is_answered_once_by_one_of_the_bundles(
    repository: Repository, opened: Opened, radiograph: Any, as_version: str
) -> None:
    first = repository.put(1, 0.0)
    images = [radiograph(seed) for seed in range(3)]

    async def scenario() -> None:
        record = Record()
        async with models_of(repository.path, record) as models:
            await models.start()
            with models.lease() as loaded:
                base = [logit(await answer(loaded, image)) for image in images]
            answered: Counter[str] = Counter()
            asked, ending = 0, False

            async def client(number: int) -> None:
                nonlocal asked
                for index in itertools.cycle(range(len(images))):
                    if ending:
                        return
                    asked += 1
                    with models.lease() as loaded:
                        prediction = await answer(loaded, images[index])
                    # The network of the bundle that the lease names is the one that has answered.
                    shift = repository.shifts[loaded.bundle.sha256]
                    assert logit(prediction) == pytest.approx(base[index] + shift, abs=1e-4)
                    answered[loaded.bundle.sha256] += 1

            async with asyncio.TaskGroup() as clients:
                for number in range(8):
                    clients.create_task(client(number))
                bundles = [first]
                for change in range(1, 4):
                    await until(lambda: answered[bundles[-1]] > 0)
                    bundles.append(repository.put(change + 1 if as_version == "next" else 1, 10.0 * change))
                    await models.refresh()
                    assert served(models) == bundles[-1]
                    (status,) = models.index()
                    assert (status.sha256, status.state, status.reason) == (bundles[-1], READY, "")
                    assert opened.open == 1
                    assert [*record.served.values()] == [bundles[-1]]
                await until(lambda: answered[bundles[-1]] > 0)
                ending = True
            assert answered.total() == asked
            assert set(answered) == set(bundles)
            assert opened.most == 2

    run(scenario)


def test_the_new_one_is_warm_before_anybody_gets_it(
    repository: Repository, opened: Opened, radiograph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = repository.put(1, 0.0)
    may_warm: asyncio.Event
    warm_up = Models.__init__.__globals__["Scheduler"].warm_up

    async def held(scheduler: Any) -> None:
        await warm_up(scheduler)
        await may_warm.wait()

    monkeypatch.setattr(Models.__init__.__globals__["Scheduler"], "warm_up", held)

    async def scenario() -> None:
        nonlocal may_warm
        may_warm = asyncio.Event()
        async with models_of(repository.path) as models:
            starting = asyncio.create_task(models.start())
            await until(lambda: opened.open == 1)
            assert states(models) == {("tiny", 1): ModelState.LOADING}
            assert not models.ready()
            assert not models.ready("tiny")
            with pytest.raises(ServerError, match="not loaded yet"), models.lease():
                pass
            may_warm.set()
            await starting
            assert models.ready()
            assert models.ready("tiny", 1)
            may_warm.clear()
            new = repository.put(1, 1.0)
            loading = asyncio.create_task(models.refresh())
            await until(lambda: opened.open == 2)
            for _ in range(5):
                with models.lease() as loaded:
                    assert loaded.bundle.sha256 == old
                    await answer(loaded, radiograph())
            assert states(models) == {("tiny", 1): READY}
            may_warm.set()
            await loading
            assert served(models) == new

    run(scenario)


def test_the_same_bundle_again_is_not_loaded_again(repository: Repository, opened: Opened) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            await models.refresh()
            await models.load("tiny")
            (repository.path / "tiny" / "1" / "parity.json").write_text("{}")  # as the parity check leaves it
            await models.refresh()
            repository.put(1, 0.0)
            await models.refresh()
            await models.start()
            assert len(opened.engines) == 1
            assert states(models) == {("tiny", 1): READY}

    run(scenario)


def test_a_bundle_that_is_replaced_while_it_is_loaded_ends_as_the_latest(
    repository: Repository, opened: Opened
) -> None:
    repository.put(1, 0.0)
    latest = ""

    def replaced(path: Path) -> None:
        nonlocal latest
        if not latest:  # the engine then finds another graph than the manifest's
            latest = repository.put(1, 1.0)

    opened.before = replaced

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            assert served(models) == latest
            assert models.index()[0].reason == ""

    run(scenario)


# Refusing


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a damaged file": ({"damaged": GRAPH}, BundleError, "bytes, expected at most"),
    "half a manifest": ({"manifest": b'{"schema_version": 2}'}, BundleError, "is damaged"),
    "another schema": ({"manifest": b'{"schema_version": 99}'}, BundleError, "update thoraxrt"),
    "no network": ({"graph": b"\x00" * 100}, BackendError, "cannot load the fp32 graph"),
    "fails at warm-up": ({"graph": tiny_graph(faulty=True)}, BackendError, "not finite"),
}


@pytest.mark.parametrize("as_version", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_its_checks_replaces_nothing(
    repository: Repository, opened: Opened, radiograph: Any, fault: str, as_version: int
) -> None:
    changed, error, reason = FAULTS[fault]
    good = repository.put(1, 0.0)

    async def scenario() -> None:
        record = Record()
        async with models_of(repository.path, record) as models:
            await models.start()
            repository.put_files(as_version, **changed)
            await models.refresh()
            assert served(models) == good
            with models.lease() as loaded:
                await answer(loaded, radiograph())
            status = models.index()[-1]
            assert status.version == as_version
            assert status.state is (READY if as_version == 1 else UNAVAILABLE)
            assert status.sha256 == (good if as_version == 1 else "")
            assert reason in status.reason
            assert models.ready()
            assert opened.open == 1
            assert record.failures == ["tiny"]
            assert record.served == {("tiny", "1"): good}
            await models.refresh()
            assert record.failures == ["tiny"], "nothing has changed"
            with pytest.raises(error, match=reason):
                await models.load("tiny")
            assert record.failures == ["tiny", "tiny"], "who asks for it gets another try"
            assert served(models) == good
            better = repository.put(as_version, 1.0)
            await models.refresh()
            assert served(models) == better
            assert [(status.version, status.reason) for status in models.index()] == [(as_version, "")]

    run(scenario)


@pytest.mark.parametrize("fault", FAULTS)
def test_at_the_start_the_next_lower_version_is_served_else_its_error_raised(
    repository: Repository, opened: Opened, fault: str
) -> None:
    changed, error, reason = FAULTS[fault]
    repository.put_files(2, **changed)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            with pytest.raises(error, match=reason):
                await models.start()
            assert not models.ready()
            assert states(models) == {("tiny", 2): UNAVAILABLE}
            good = repository.put(1, 0.0)
            await models.start()
            assert served(models) == good
            assert states(models) == {("tiny", 1): READY, ("tiny", 2): UNAVAILABLE}

    run(scenario)


def test_a_bundle_must_be_signed_where_keys_are_trusted(
    repository: Repository, opened: Opened, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    stranger = tmp_path / "stranger.pem"
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    stranger.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signed = repository.put(1, 0.0)
    folder = repository.path / "tiny" / "1"

    async def scenario() -> None:
        async with models_of(repository.path, trusted=[public]) as models:
            with pytest.raises(SignatureError, match="no trusted signature"):
                await models.start()
            sign_bundle(Bundle.open(folder), private)
            await models.start()
            assert served(models) == signed
            other = repository.put(1, 1.0)
            sign_bundle(Bundle.open(folder), stranger)
            await models.refresh()
            assert served(models) == signed
            assert "no trusted signature" in models.index()[0].reason
            with pytest.raises(SignatureError):
                await models.load("tiny", 1)
            sign_bundle(Bundle.open(folder), private)
            await models.refresh()
            assert served(models) == other

    run(scenario)


def test_a_file_that_no_backend_opens_is_checked_too(repository: Repository, opened: Opened, tmp_path: Path) -> None:
    files = bundle_files(tmp_path, graph_with(1.0))
    manifest = msgspec.json.decode(files[MANIFEST], type=Manifest)
    entries = {**manifest.files, "model.fp16.onnx": FileEntry.of(b"as it was exported")}
    files[MANIFEST] = msgspec.json.encode(msgspec.structs.replace(manifest, files=entries))
    files["model.fp16.onnx"] = b"as it was falsified"
    publish(files, repository.path / "tiny" / "1", replace=False)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            with pytest.raises(BundleError, match=r"model\.fp16\.onnx"):
                await models.start()

    run(scenario)
    assert not opened.engines


def test_readiness_waits_for_every_model_once(repository: Repository, opened: Opened) -> None:
    repository.put(1, 0.0, "other")
    repository.put_files(1, damaged=GRAPH)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            assert not models.ready()
            assert models.ready("other")
            assert not models.ready("tiny")
            repository.put(1, 1.0)
            await models.refresh()
            assert models.ready()
            repository.put_files(1, damaged=GRAPH)
            (repository.path / "third" / "1").mkdir(parents=True)
            await models.refresh()
            assert models.ready()
            await models.unload("tiny")
            assert models.ready()
            await models.unload("other")
            assert not models.ready()

    run(scenario)


def test_who_loads_a_model_is_told_of_its_highest_version(repository: Repository, opened: Opened) -> None:
    good = repository.put(1, 0.0)
    repository.put_files(2, damaged=GRAPH)
    repository.put_files(3, graph=tiny_graph(faulty=True))

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            with pytest.raises(BackendError, match="not finite"):
                await models.load("tiny")
            with pytest.raises(BundleError, match="bytes, expected at most"):
                await models.load("tiny", 2)
            assert served(models) == good
            await models.load("tiny", 1)

    run(scenario)


def test_a_model_that_was_unloaded_is_not_waited_for(repository: Repository, opened: Opened) -> None:
    repository.put(1, 0.0, "other")
    repository.put_files(1, damaged=GRAPH)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            assert not models.ready()
            await models.unload("tiny")
            assert models.ready()

    run(scenario)


def test_a_file_repaired_in_its_place_is_tried_again(repository: Repository, opened: Opened) -> None:
    sha256 = repository.put(1, 0.0)
    repository.put(1, 1.0, "other")
    file = repository.path / "tiny" / "1" / GRAPH
    good = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(bytes(len(good)))

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            assert states(models) == {("other", 1): READY, ("tiny", 1): UNAVAILABLE}
            await asyncio.sleep(0.02)  # else a coarse clock may give both changes one time
            file.write_bytes(good)
            await models.refresh()
            assert served(models, "tiny") == sha256

    run(scenario)


# Unloading


def test_what_is_unloaded_answers_those_who_use_it(repository: Repository, opened: Opened, radiograph: Any) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            with models.lease() as loaded:
                ticket = loaded.scheduler.admit(30.0, Priority.ROUTINE, "client")
                unloading = asyncio.create_task(models.unload("tiny"))
                await until(lambda: states(models) == {("tiny", 1): ModelState.UNLOADING})
                with pytest.raises(ModelNotFoundError), models.lease("tiny"):
                    pass
                # Neither what has been admitted nor what this lease admits now is refused.
                await loaded.scheduler.predict(ticket, radiograph())
                loaded.scheduler.release(ticket)
                await answer(loaded, radiograph(1))
                assert opened.open == 1
                assert not unloading.done()
            await unloading
            assert opened.open == 0
            (status,) = models.index()
            assert (status.state, status.reason, status.sha256) == (UNAVAILABLE, "unloaded by request", "")
            await models.refresh()
            assert states(models) == {("tiny", 1): UNAVAILABLE}, "a request outlasts the policy"
            await models.load("tiny")
            assert models.ready("tiny", 1)

    run(scenario)


def test_the_queue_is_answered_although_its_leases_have_ended(
    repository: Repository, opened: Opened, radiograph: Any
) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            with models.lease() as loaded:
                waiting = [asyncio.create_task(answer(loaded, radiograph(seed))) for seed in range(12)]
                await asyncio.sleep(0)  # each has been admitted
            await models.unload("tiny")
            assert all(isinstance(prediction, Prediction) for prediction in await asyncio.gather(*waiting))

    run(scenario)


def test_who_holds_it_beyond_the_longest_deadline_gets_an_error(
    repository: Repository, opened: Opened, radiograph: Any
) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path, batching=BatchingOptions(longest_deadline_s=0.01)) as models:
            await models.start()
            with models.lease() as loaded:
                await models.unload("tiny")
                assert opened.open == 0
                with pytest.raises(ServerError, match="unloaded"):
                    await answer(loaded, radiograph())

    run(scenario)


def test_a_body_on_its_way_while_its_model_is_replaced_has_until_its_deadline(
    repository: Repository, opened: Opened, radiograph: Any
) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path, grace_s=0.01) as models:
            await models.start()
            with models.lease() as loaded:
                ticket = loaded.scheduler.admit(30.0, Priority.ROUTINE, "client")
                new = repository.put(1, 1.0)
                replacing = asyncio.create_task(models.refresh())
                await until(lambda: served(models) == new)
                await asyncio.sleep(0.1)
                assert logit(await loaded.scheduler.predict(ticket, radiograph())) == pytest.approx(
                    loaded.engine.predict_one(radiograph()).findings[0].logit, abs=1e-5
                )
                loaded.scheduler.release(ticket)
                assert not replacing.done()
            await replacing

    run(scenario)


def test_closing_cuts_what_is_being_replaced_to_the_grace(
    repository: Repository, opened: Opened, radiograph: Any
) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path, grace_s=0.01, batching=BatchingOptions(longest_deadline_s=1e6)) as models:
            await models.start()
            with models.lease() as loaded:
                ticket = loaded.scheduler.admit(30.0, Priority.ROUTINE, "client")
                unloading = asyncio.create_task(models.unload("tiny"))
                await until(lambda: states(models) == {("tiny", 1): ModelState.UNLOADING})
                await models.close()
                await unloading
                with pytest.raises(ServerError, match="has been unloaded"):
                    await loaded.scheduler.predict(ticket, radiograph())

    run(scenario)


def test_versions_are_loaded_and_unloaded_by_request(repository: Repository, opened: Opened) -> None:
    for version in (1, 2, 3):
        repository.put(version, version)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            await models.load("tiny", 1)
            await models.refresh()
            assert states(models) == {("tiny", 1): READY, ("tiny", 3): READY}
            await models.unload("tiny", 3)  # back to an earlier one, at once
            with models.lease("tiny") as loaded:
                assert loaded.version == 1
            await models.refresh()
            assert states(models) == {("tiny", 1): READY, ("tiny", 2): READY, ("tiny", 3): UNAVAILABLE}
            await models.unload("tiny")
            await models.refresh()
            assert set(states(models).values()) == {UNAVAILABLE}
            with pytest.raises(ModelNotFoundError, match=r"^no model is served$"), models.lease():
                pass
            await models.load("tiny")
            assert states(models) == {("tiny", 3): READY}

    run(scenario)


def test_what_has_gone_from_the_folder_is_unloaded(repository: Repository, opened: Opened) -> None:
    repository.put(1, 1.0)
    repository.put(2, 2.0)
    repository.put(1, 0.0, "other")

    async def scenario() -> None:
        record = Record()
        async with models_of(repository.path, record) as models:
            await models.start()
            shutil.rmtree(repository.path / "tiny" / "2")
            await models.refresh()
            assert states(models) == {("other", 1): READY, ("tiny", 1): READY}
            shutil.rmtree(repository.path / "tiny")
            await models.refresh()
            assert states(models) == {("other", 1): READY}
            assert set(record.served) == {("other", "1")}
            assert opened.open == 1
            opened.before = shutil.rmtree  # it vanishes while it is being loaded
            repository.put(2, 2.0)
            await models.refresh()
            assert states(models) == {("other", 1): READY, ("tiny", 2): UNAVAILABLE}
            await models.refresh()
            assert states(models) == {("other", 1): READY}

    run(scenario)


# Order


def test_changes_at_once_are_made_one_after_the_other(repository: Repository, opened: Opened) -> None:
    repository.put(1, 0.0)
    repository.put(1, 5.0, "other")

    def one_at_a_time(path: Path) -> None:
        begun.append(path)
        time.sleep(0.01)
        assert len(begun) == len(opened.engines) + 1

    begun: list[Path] = []
    opened.before = one_at_a_time

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await asyncio.gather(models.load("tiny"), models.load("tiny"), models.load("other"), models.start())
            assert len(opened.engines) == 2
            new = repository.put(2, 1.0)
            await asyncio.gather(*(models.refresh() for _ in range(3)), models.load("tiny", 2))
            assert len(opened.engines) == 3
            assert served(models, "tiny") == new
            assert opened.most == 3
            await asyncio.gather(models.unload("tiny"), models.load("tiny"), models.unload("other"), models.refresh())
            assert states(models) == {("other", 1): UNAVAILABLE, ("tiny", 2): READY}
            assert opened.open == 1

    run(scenario)


def test_a_change_goes_on_where_its_caller_is_cancelled(repository: Repository, opened: Opened) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            new = repository.put(1, 1.0)
            with models.lease():  # which keeps the first change from its end
                callers = [asyncio.create_task(models.refresh()), asyncio.create_task(models.load("tiny"))]
                await until(lambda: opened.open == 2)
                for caller in callers:
                    caller.cancel()
                await asyncio.wait(callers)
                assert all(caller.cancelled() for caller in callers)
            await models.refresh()
            assert served(models) == new
            assert opened.open == 1

    run(scenario)


def test_a_model_that_is_still_used_keeps_no_other_from_being_changed(repository: Repository, opened: Opened) -> None:
    repository.put(1, 0.0)
    repository.put(1, 5.0, "other")

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            with models.lease("tiny"):
                new = repository.put(1, 1.0)
                replacing = asyncio.create_task(models.load("tiny"))
                await until(lambda: served(models, "tiny") == new)
                await models.unload("other")
                await models.load("other")
                assert states(models) == {("other", 1): READY, ("tiny", 1): READY}
                unloading = asyncio.create_task(models.unload("tiny"))  # its own changes wait
                await asyncio.sleep(0.05)
                assert not replacing.done()
                assert served(models, "tiny") == new
            await asyncio.gather(replacing, unloading)
            assert opened.open == 1

    run(scenario)


def test_no_load_makes_the_server_ready_before_its_start_has_ended(repository: Repository, opened: Opened) -> None:
    repository.put(1, 0.0, "first")
    repository.put(1, 0.0, "second")
    found = threading.Event()
    opened.before = lambda path: "first" in path.parts or found.wait(60)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            starting = asyncio.create_task(models.start())
            await until(lambda: READY in states(models).values())
            await models.load("first")
            assert not models.ready()
            with pytest.raises(ServerError, match="not loaded yet"), models.lease("second"):
                pass
            found.set()
            await starting
            assert models.ready()

    run(scenario)


def test_closing_ends_what_is_being_loaded_and_refuses_the_rest(
    repository: Repository, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    repository.put(1, 5.0, "other")
    opening, closing = threading.Event(), threading.Event()

    async def scenario() -> None:
        record = Record()
        async with models_of(repository.path, record) as models:
            await models.start()
            repository.put_files(1, graph=tiny_graph(faulty=True))
            repository.put(1, 0.0, "waiting")
            opened.before = lambda path: (opening.set(), closing.wait(60))
            changes = [asyncio.create_task(models.load("tiny"))]
            await until(opening.is_set)
            changes += [asyncio.create_task(change) for change in (models.load("waiting"), models.refresh())]
            await until(lambda: ("waiting", 1) in states(models))
            with models.lease("other") as loaded:
                ends = [asyncio.create_task(models.close()) for _ in range(2)]
                await until(lambda: ("other", "1") not in record.served)
                with pytest.raises(ServerError, match="stopping"), models.lease("other"):
                    pass
                assert not models.ready()
                assert not loaded.engine._closed
                closing.set()  # the plan has been built: nobody waits for the model to be warm
                for change in changes:
                    with pytest.raises(ServerError, match="stopping"):
                        await change
            await asyncio.gather(*ends)
            assert opened.open == 0
            assert len(opened.engines) == 2  # and no other was begun
            assert record.served == {}
            assert record.failures == []
            for change in (models.refresh(), models.load("tiny"), models.unload("tiny"), models.start()):
                with pytest.raises(ServerError, match="stopping"):
                    await change

    run(scenario)
    assert not caplog.records


def test_what_gets_warm_while_all_are_closed_is_closed_too(
    repository: Repository, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            warming = asyncio.Event()
            warm_up = Models.__init__.__globals__["Scheduler"].warm_up

            async def noted(scheduler: Any) -> None:
                warming.set()
                await warm_up(scheduler)

            monkeypatch.setattr(Models.__init__.__globals__["Scheduler"], "warm_up", noted)
            starting = asyncio.create_task(models.start())
            await warming.wait()
            await models.close()
            assert [engine._closed for engine in opened.engines] == [True]
            with pytest.raises(ServerError, match="stopping"):
                await starting

    run(scenario)


def test_polling_finds_what_is_new_and_outlives_a_folder_that_cannot_be_read(
    repository: Repository, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    repository.put(1, 0.0)

    async def scenario() -> None:
        async with models_of(repository.path, poll_s=0.005) as models:
            await models.start()
            new = repository.put(1, 1.0)
            await until(lambda: served(models) == new)
            elsewhere = repository.path.with_name("elsewhere")
            repository.path.rename(elsewhere)
            await until(lambda: "were not refreshed" in caplog.text)
            await asyncio.sleep(0.05)  # some more looks, which say nothing new
            elsewhere.rename(repository.path)
            newer = repository.put(2, 2.0)
            await until(lambda: served(models) == newer)
            assert sum("were not refreshed" in line for line in caplog.messages) == 1

    run(scenario)


def test_a_fault_of_a_runtime_is_a_refusal(
    repository: Repository, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    good = repository.put(1, 0.0)

    def fault(path: Path) -> None:
        raise MemoryError("no room for the weights")

    async def scenario() -> None:
        async with models_of(repository.path) as models:
            await models.start()
            opened.before = fault
            repository.put(1, 1.0)
            with pytest.raises(BackendError, match="MemoryError: no room for the weights"):
                await models.load("tiny")
            assert served(models) == good
            assert "MemoryError" in models.index()[0].reason
            assert "Traceback" in caplog.text

    run(scenario)


def test_a_bundle_must_have_passed_parity_where_that_is_required(repository: Repository, opened: Opened) -> None:
    def receipt(sha256: str, *, passed: bool) -> None:
        candidate = {"backend": "onnxruntime", "precision": "fp32", "through": "engine"}
        results = [{"candidate": candidate, "verdict": {"passed": passed}}]
        written = {"version": 1, "bundle": sha256, "environment": {"date": "2026-11-24"}, "data": {"images": 24}}
        written |= {"margin": 0.005, "preprocessing": None, "dicom": [], "results": results}
        (folder / "parity.json").write_text(json.dumps(written))

    first = repository.put(1, 0.0)
    folder = repository.path / "tiny" / "1"

    async def scenario() -> None:
        async with models_of(repository.path, require_parity=True) as models:
            with pytest.raises(BundleError, match="no parity receipt"):
                await models.start()
            receipt(first, passed=False)
            with pytest.raises(BundleError, match="onnxruntime:fp32 has not passed"):
                await models.start()
            receipt(first, passed=True)
            await models.start()
            assert served(models) == first
            second = repository.put(1, 1.0)
            receipt(first, passed=True)  # the earlier bundle's
            await models.refresh()
            assert served(models) == first
            assert "is of the manifest" in models.index()[0].reason
            receipt(second, passed=True)
            await models.refresh()
            assert served(models) == second

    run(scenario)


def test_no_receipt_is_of_a_stand_in() -> None:
    with pytest.raises(ValueError, match="require_parity and fall_back"):
        EngineOptions(require_parity=True, fall_back=True)
