"""The plan cache with real plans: what is made once, what is refused, and what is made again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from thoraxrt.engine.backends.tensorrt_plan import (
    Device,
    Flavour,
    LayerTypes,
    Plan,
    PlanOptions,
    current_device,
    installed_flavour,
)
from thoraxrt.engine.bundle import Bundle
from thoraxrt.engine.errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    PlanError,
    RequestError,
    SignatureError,
)
from thoraxrt.engine.plans import (
    CachedPlan,
    Compiled,
    Machine,
    PlanCache,
    PlanKey,
    cache_folder,
    compile_plans,
    misfit,
    plan_key,
    this_machine,
)
from thoraxrt.engine.trust import machine_tag, sign

SM86 = PlanOptions(buckets=(1,), targets=("sm86",))
KEY = PlanKey(
    onnx_sha256="b" * 64,
    precision="fp16",
    runtime="tensorrt",
    runtime_version="10.3.0",
    platform="linux-x86_64",
    device="NVIDIA A10",
    options=SM86,
)


pytestmark = pytest.mark.usefixtures("rtx")


@dataclasses.dataclass
class Filled:
    """A cache that holds one compiled plan, and the file contents to put back after tampering."""

    cache: PlanCache
    plan: CachedPlan
    files: dict[str, bytes]

    def write(self, files: dict[str, bytes]) -> None:
        shutil.rmtree(self.plan.folder)
        self.plan.folder.mkdir()
        for name, data in files.items():
            (self.plan.folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def compiled(sample_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """This machine's cache, while no test names another."""
    cache = PlanCache(tmp_path_factory.mktemp("cache"))
    (done,) = compile_plans(sample_bundle, ["fp16"], SM86, cache)
    files = {path.name: path.read_bytes() for path in done.cached.folder.iterdir()}
    assert set(files) == {"engine.plan", "plan.json", "plan.tag"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THORAXRT_CACHE", str(cache.root))
        yield Filled(cache, done.cached, files)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanCache:
    """An empty cache that is this machine's."""
    monkeypatch.setenv("THORAXRT_CACHE", str(tmp_path))
    return PlanCache()


@pytest.fixture
def filled(compiled: Filled) -> Iterator[Filled]:
    yield compiled
    compiled.write(compiled.files)


def only(compiled: Iterator[Compiled]) -> Compiled:
    (one,) = compiled
    return one


def test_a_plan_is_compiled_once_and_holds_its_whole_key(filled: Filled, sample_bundle: Bundle) -> None:
    again = only(compile_plans(sample_bundle, ["fp16"], SM86, filled.cache))
    assert again == (filled.plan, None, None)
    folder = filled.plan.folder
    assert folder.parent == filled.cache.root / "plans" / sample_bundle.manifest.files["model.fp16.onnx"].sha256
    assert folder.name.startswith(f"tensorrt_rtx-{installed_flavour().version}-sm86-fp16-")
    key = filled.plan.record.key
    assert key.onnx_sha256 == sample_bundle.manifest.files["model.fp16.onnx"].sha256
    assert key.options == SM86
    assert filled.plan.record.layers.convolutions["fp16"] > 30
    assert filled.cache.folders(sample_bundle) == [folder]


def test_a_new_manifest_over_the_same_graphs_keeps_their_plans(
    filled: Filled, sample_bundle: Bundle, tmp_path: Path
) -> None:
    path = shutil.copytree(sample_bundle.path, tmp_path / "recommending.bundle") / "manifest.json"
    manifest = json.loads(path.read_bytes()) | {"recommended": {"backend": "tensorrt", "precision": "fp16"}}
    path.unlink()
    path.write_text(json.dumps(manifest))
    recommending = Bundle.open(path.parent)
    assert recommending.sha256 != sample_bundle.sha256
    assert filled.cache.folders(recommending) == [filled.plan.folder]
    assert only(compile_plans(recommending, ["fp16"], SM86, filled.cache)) == (filled.plan, None, None)


options = st.builds(
    PlanOptions,
    buckets=st.lists(st.sampled_from([1, 2, 8, 32]), min_size=1, max_size=3).map(tuple),
    targets=st.lists(st.sampled_from(["sm86", "sm89", "sm120"]), min_size=1, max_size=3).map(tuple),
    optimization_level=st.integers(0, 5),
    workspace_mib=st.none() | st.integers(1, 1024),
    hardware_compatible=st.booleans(),
    version_compatible=st.booleans(),
    strip_weights=st.booleans(),
)


@given(one=options, other=options)
def test_plans_share_a_folder_only_where_every_option_is_the_same(one: PlanOptions, other: PlanOptions) -> None:
    folders = [msgspec.structs.replace(KEY, options=options).folder for options in (one, other)]
    assert (folders[0] == folders[1]) == (one == other)
    shuffled = msgspec.structs.replace(one, buckets=one.buckets[::-1], targets=one.targets[::-1] * 2)
    assert msgspec.structs.replace(KEY, options=shuffled).folder == folders[0]


@pytest.mark.parametrize("field", ["onnx_sha256", "precision", "runtime", "runtime_version", "platform", "device"])
def test_every_part_of_the_key_is_in_its_folder(field: str) -> None:
    assert msgspec.structs.replace(KEY, **{field: "other"}).folder != KEY.folder


@pytest.mark.parametrize("name", ["engine.plan", "plan.json", "plan.tag"])
def test_any_flipped_byte_is_refused_by_name(name: str, filled: Filled) -> None:
    data = filled.files[name]
    for position in {*range(0, len(data), max(1, len(data) // 100)), len(data) - 1}:
        flipped = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        (filled.plan.folder / name).write_bytes(flipped)
        with pytest.raises(PlanError, match=name) as refusal:
            filled.cache.read(filled.plan.folder)
        assert str(filled.plan.folder) in str(refusal.value)


@pytest.mark.parametrize("name", ["engine.plan", "plan.json", "plan.tag"])
def test_missing_cut_and_grown_files_are_refused_and_the_plan_is_compiled_again(
    name: str, filled: Filled, sample_bundle: Bundle
) -> None:
    data = filled.files[name]
    for wrong in (None, b"", data[:-1], data + b"\n"):
        filled.write({other: content for other, content in filled.files.items() if other != name})
        if wrong is not None:
            (filled.plan.folder / name).write_bytes(wrong)
        with pytest.raises(PlanError, match=name):
            filled.cache.load(filled.plan.record.key)
    again = only(compile_plans(sample_bundle, ["fp16"], SM86, filled.cache))
    assert again.seconds is not None
    assert again.reason is not None
    assert name in again.reason
    assert again.cached == filled.plan  # rebuilt from the verified graph, to the same bytes
    assert filled.cache.load(filled.plan.record.key) == filled.plan


@pytest.mark.parametrize("name", ["engine.plan", "plan.json", "plan.tag"])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(name: str, filled: Filled) -> None:
    (filled.plan.folder / name).unlink()
    os.mkfifo(filled.plan.folder / name)
    with pytest.raises(PlanError, match=f"{name} is no regular file"):
        filled.cache.read(filled.plan.folder)


def paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where everything in a JSON document is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for name, part in inner for found in paths(part, (*path, name)))]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
machine = Machine("linux-x86_64", Flavour(None, "tensorrt_rtx", "1.7.1.116"), Device("NVIDIA A10", "sm86"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_fuzzed_record_is_refused_even_where_this_machine_vouches_for_it(
    compiled: Filled, data: st.DataObject
) -> None:
    record = json.loads(compiled.files["plan.json"])
    *parents, last = data.draw(st.sampled_from(paths(record)[1:]))
    part: Any = record
    for name in parents:
        part = part[name]
    part[last] = data.draw(documents)
    fuzzed = data.draw(st.just(json.dumps(record).encode()) | st.binary(max_size=200))
    (compiled.plan.folder / "plan.json").write_bytes(fuzzed)
    try:
        with pytest.raises(PlanError, match=r"plan\.json"):  # nobody vouches for it
            compiled.cache.read(compiled.plan.folder)
        (compiled.plan.folder / "plan.tag").write_text(machine_tag(fuzzed, compiled.cache.root))
        try:
            read = compiled.cache.read(compiled.plan.folder)
        except PlanError as error:
            assert str(compiled.plan.folder) in str(error)  # noqa: PT017 - most documents are refused, not all
        else:  # what was drawn changed nothing that matters: the layers' counts, or nothing
            assert read.record.key == compiled.plan.record.key
            assert read.plan == compiled.plan.plan
            misfit(read.record.key, machine)
    finally:
        compiled.write(compiled.files)


def test_a_plan_moved_to_another_key_is_refused(filled: Filled) -> None:
    key = filled.plan.record.key
    for other in (
        msgspec.structs.replace(key, onnx_sha256="c" * 64),
        msgspec.structs.replace(key, options=PlanOptions(buckets=(8,), targets=("sm86",))),
    ):
        shutil.copytree(filled.plan.folder, filled.cache.root / other.folder)
        with pytest.raises(PlanError, match="holds the plan of another key"):
            filled.cache.load(other)
        shutil.rmtree(filled.cache.root / other.folder)


def test_another_machines_plan_is_compiled_again(filled: Filled, sample_bundle: Bundle, own_cache: PlanCache) -> None:
    shutil.copytree(filled.plan.folder, own_cache.root / filled.plan.record.key.folder)
    with pytest.raises(PlanError, match="not this machine's tag"):
        own_cache.load(filled.plan.record.key)
    again = only(compile_plans(sample_bundle, ["fp16"], SM86, own_cache))
    assert "plan.tag is not this machine's" in str(again.reason)
    assert own_cache.load(filled.plan.record.key).plan == filled.plan.plan


@pytest.fixture
def theirs(sample_bundle: Bundle, tmp_path: Path) -> CachedPlan:
    """What a stranger sends: a cache with any bytes as a plan that Triton could run, and the key that vouches for it."""
    key = msgspec.structs.replace(KEY, onnx_sha256=sample_bundle.manifest.files["model.fp16.onnx"].sha256)
    return PlanCache(tmp_path / "theirs").store(key, Plan(b"theirs", None, LayerTypes(convolutions={}, layers={})))


def test_a_key_that_comes_with_a_plan_vouches_for_nothing(
    theirs: CachedPlan, sample_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THORAXRT_CACHE", str(tmp_path / "ours"))
    with pytest.raises(PlanError, match=r"plan\.tag counts only in this machine's own cache, .*ours"):
        PlanCache(tmp_path / "theirs").load(theirs.record.key)
    (tmp_path / "innocent").symlink_to("theirs")
    for root in ("theirs", "innocent"):
        folder = tmp_path / root / theirs.record.key.folder
        arguments = ("export-triton", sample_bundle.path, tmp_path / "models", "--plan", folder)
        refused = thoraxrt(tmp_path / "ours", *arguments, status=2)
        assert "elsewhere a trusted plan.sig must vouch (--require-signature)" in refused.stderr
    assert not (tmp_path / "models").exists()
    thoraxrt(tmp_path / "theirs", *arguments)  # the same folder as this machine's cache, by its real path
    assert (tmp_path / "models" / "sample" / "1" / "model.plan").read_bytes() == b"theirs"


def test_a_plan_from_elsewhere_is_taken_with_a_trusted_signature(
    theirs: CachedPlan, sample_bundle: Bundle, keys: dict[str, Path], tmp_path: Path
) -> None:
    bundle = signed(sample_bundle, tmp_path / "sample.bundle", keys)
    folder = PlanCache(tmp_path / "shipped").ship(theirs, keys["ours.key"])
    shutil.copyfile(theirs.folder / "plan.tag", folder / "plan.tag")  # and a tag beside it does no harm
    arguments = ("export-triton", bundle, tmp_path / "models", "--plan", folder, "--require-signature")
    assert "no key in" in thoraxrt(tmp_path / "ours", *arguments, keys["theirs.pem"], status=2).stderr
    thoraxrt(tmp_path / "ours", *arguments, keys["ours.pem"])
    assert (tmp_path / "models" / "sample" / "1" / "model.plan").read_bytes() == b"theirs"


def signed(bundle: Bundle, copy: Path, keys: dict[str, Path]) -> Path:
    shutil.copytree(bundle.path, copy)
    (copy / "manifest.sig").write_bytes(sign((copy / "manifest.json").read_bytes(), keys["ours.key"]))
    return copy


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / f"{name}.key").write_bytes(pem)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(public)
    return {path.name: path for path in folder.iterdir()}


def test_a_signed_plan_is_taken_only_where_its_key_is_trusted(
    filled: Filled, keys: dict[str, Path], sample_bundle: Bundle, tmp_path: Path
) -> None:
    folder = PlanCache(tmp_path / "out").ship(filled.plan, keys["ours.key"])
    assert {path.name for path in folder.iterdir()} == {"engine.plan", "plan.json", "plan.sig"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plans"]  # no key of this machine leaves it
    edge = tmp_path / "edge"
    shutil.copytree(tmp_path / "out", edge)
    for trusted in ([], [keys["theirs.pem"]]):
        with pytest.raises(PlanError, match=r"plan\.sig does not vouch for plan\.json"):
            PlanCache(edge, trusted).load(filled.plan.record.key)
    cache = PlanCache(edge, [keys["theirs.pem"], keys["ours.pem"]])
    assert only(compile_plans(sample_bundle, ["fp16"], SM86, cache)).seconds is None
    signature = edge / filled.plan.record.key.folder / "plan.sig"
    for position, byte in enumerate(signed := signature.read_bytes()):
        signature.write_bytes(signed[:position] + bytes([byte ^ 128]) + signed[position + 1 :])
        with pytest.raises(PlanError, match=r"plan\.sig"):
            cache.load(filled.plan.record.key)
    signature.write_bytes(signed)
    (signature.parent / "engine.plan").write_bytes(filled.plan.plan[:-1] + b"x")
    with pytest.raises(PlanError, match=r"engine\.plan is not the file"):
        cache.load(filled.plan.record.key)


def test_writers_and_readers_at_once_never_mix_plans(own_cache: PlanCache) -> None:
    cache = own_cache
    layers = LayerTypes(convolutions={}, layers={})
    contents = [bytes([number]) * 5000 for number in range(4)]
    machine_tag(b"", cache.root)  # made before the race, which is not about keys
    seen, failures = [], []

    def write(data: bytes) -> None:
        try:
            for _ in range(10):
                cache.store(KEY, Plan(data, data[:9], layers))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        try:
            seen.append(cache.load(KEY))
        except PlanError:
            continue  # between two plans there may be none
    for thread in threads:
        thread.join()
    assert not failures
    for plan in [*seen, cache.load(KEY)]:
        assert plan.plan in contents
        assert plan.timing_cache == plan.plan[:9]
    assert [path.name for path in (cache.root / KEY.folder).parent.iterdir()] == [KEY.folder.name]


def test_what_a_killed_writer_left_goes_after_an_hour(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    left = [(tmp_path / KEY.folder).parent / name for name in (".old", ".new")]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "engine.plan").write_bytes(b"half")
    os.utime(left[0], (time.time() - 7200,) * 2)
    cache.store(KEY, Plan(b"plan", None, LayerTypes(convolutions={}, layers={})))
    assert [folder.exists() for folder in left] == [False, True]


def test_timings_are_kept_and_start_the_next_build_of_the_same_gpu(own_cache: PlanCache) -> None:
    cache = own_cache
    layers = LayerTypes(convolutions={}, layers={})
    assert cache.timings(KEY) == b""
    cache.store(KEY, Plan(b"plan", b"short", layers))
    other = msgspec.structs.replace(KEY, precision="int8", onnx_sha256="d" * 64)
    kept = cache.store(other, Plan(b"other plan", b"longer timings", layers))
    assert cache.timings(KEY) == b"longer timings"
    assert cache.timings(msgspec.structs.replace(KEY, device="NVIDIA L4")) == b""
    assert cache.timings(msgspec.structs.replace(KEY, runtime_version="10.3.1")) == b""
    (kept.folder / "timing.cache").write_bytes(b"longer timingS")
    assert cache.timings(KEY) == b"short"
    with pytest.raises(PlanError, match=r"timing\.cache is not the file"):
        cache.load(other)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("in the way")
    plan = Plan(b"plan", None, LayerTypes(convolutions={}, layers={}))
    with pytest.raises(PlanError, match=r"cannot be written: .*THORAXRT_CACHE"):
        PlanCache(tmp_path).store(KEY, plan)


def spoilt(sample_bundle: Bundle, path: Path) -> Bundle:
    """A sound bundle whose FP16 graph no builder takes."""
    shutil.copytree(sample_bundle.path, path)
    graph, manifest = b"no graph", json.loads((path / "manifest.json").read_bytes())
    manifest["files"]["model.fp16.onnx"] = {"sha256": hashlib.sha256(graph).hexdigest(), "size": len(graph)}
    for name, data in (("model.fp16.onnx", graph), ("manifest.json", json.dumps(manifest).encode())):
        (path / name).unlink()
        (path / name).write_bytes(data)
    return Bundle.open(path)


def test_a_cache_that_cannot_be_written_is_found_before_a_plan_is_built(sample_bundle: Bundle, tmp_path: Path) -> None:
    bundle = spoilt(sample_bundle, tmp_path / "spoilt.bundle")
    with pytest.raises(BackendError):  # what building it says
        only(compile_plans(bundle, ["fp16"], SM86, PlanCache(tmp_path / "cache")))
    (folder,) = (tmp_path / "cache" / "plans").iterdir()
    assert (folder.name, list(folder.iterdir())) == (bundle.manifest.files["model.fp16.onnx"].sha256, [])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        SignatureError, match=r"machine\.key cannot be made: .*; name another place with THORAXRT_CACHE$"
    ):
        only(compile_plans(bundle, ["fp16"], SM86, PlanCache(tmp_path / "file")))
    shutil.rmtree(tmp_path / "cache" / "plans")
    (tmp_path / "cache" / "plans").write_text("in the way")
    with pytest.raises(PlanError, match=r"cannot be written: .*; name another place with THORAXRT_CACHE$"):
        only(compile_plans(bundle, ["fp16"], SM86, PlanCache(tmp_path / "cache")))


def test_a_damaged_graph_is_never_compiled(sample_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(sample_bundle.path, tmp_path / "copy")
    graph = tmp_path / "copy" / "model.fp16.onnx"
    graph.chmod(0o644)
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"model\.fp16\.onnx is not the file"):
        only(compile_plans(Bundle.open(tmp_path / "copy"), ["fp16"], SM86, PlanCache(tmp_path / "cache")))
    with pytest.raises(BundleError, match=r"holds no model\.int8\.onnx"):
        plan_key(sample_bundle, "int8", SM86)
    with pytest.raises(RequestError, match="bf16"):
        plan_key(sample_bundle, "bf16", SM86)


A10, L4 = Device("NVIDIA A10", "sm86"), Device("NVIDIA L4", "sm89")
NOTHING = BackendUnavailableError("there is none")


@pytest.mark.parametrize(
    ("changes", "flavour", "device", "reason"),
    [
        ({}, "tensorrt 10.3.0", A10, None),
        (
            {},
            "tensorrt 10.3.0",
            Device("NVIDIA RTX A4000", "sm86"),
            "tuned for NVIDIA A10, this GPU is NVIDIA RTX A4000",
        ),
        ({}, "tensorrt 10.3.0", L4, "made for sm86, this GPU is sm89"),
        ({}, "tensorrt 10.3.1", A10, "made with tensorrt 10.3.0, installed is tensorrt 10.3.1"),
        ({}, "tensorrt_rtx 10.3.0", A10, "made with tensorrt 10.3.0, installed is tensorrt_rtx 10.3.0"),
        ({}, None, A10, "there is none"),
        ({}, "tensorrt 10.3.0", None, "there is none"),
        ({"platform": "linux-aarch64"}, "tensorrt 10.3.0", A10, "made for linux-aarch64, this is linux-x86_64"),
        ({"hardware_compatible": True}, "tensorrt 10.3.0", L4, None),
        ({"hardware_compatible": True}, "tensorrt 10.3.0", Device("T4", "sm75"), "sm80 and later, this GPU is sm75"),
        ({"version_compatible": True}, "tensorrt 10.16.1", A10, None),
        ({"version_compatible": True}, "tensorrt 10.2.9", A10, "installed is tensorrt 10.2.9"),
        ({"version_compatible": True}, "tensorrt 11.0.0", A10, "installed is tensorrt 11.0.0"),
        ({"device": None, "targets": ("sm86", "sm89")}, "tensorrt 10.3.0", L4, None),
    ],
)
def test_why_a_plan_does_not_fit_a_machine(
    changes: dict[str, Any], flavour: str | None, device: Device | None, reason: str | None
) -> None:
    key = msgspec.structs.replace(
        KEY, **{name: value for name, value in changes.items() if name in ("platform", "device")}
    )
    own = {name: value for name, value in changes.items() if name not in ("platform", "device")}
    key = msgspec.structs.replace(key, options=msgspec.structs.replace(SM86, **own))
    runtime = Flavour(None, *flavour.split()) if flavour else NOTHING
    said = misfit(key, Machine("linux-x86_64", runtime, device or NOTHING))
    assert said == reason or (reason is not None and said is not None and said.endswith(reason))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("THORAXRT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PlanCache().root == tmp_path / ".cache" / "thoraxrt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert PlanCache().root == tmp_path / "xdg" / "thoraxrt"
    monkeypatch.setenv("THORAXRT_CACHE", str(tmp_path / "here"))
    assert PlanCache().root == tmp_path / "here"


def test_without_a_home_folder_the_commands_name_the_remedy(
    sample_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("THORAXRT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "~")  # as for a user without HOME and without a line in /etc/passwd
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="has no home folder; name a place with THORAXRT_CACHE"):
        cache_folder()
    assert "THORAXRT_CACHE" in thoraxrt(None, "compile", sample_bundle.path, "--target", "sm86", status=2).stderr
    (place,) = PlanCache().folders(sample_bundle)  # as `info` asks, which shows the reason in its table of plans
    with pytest.raises(PlanError, match="has no home folder; name a place with THORAXRT_CACHE"):
        PlanCache().read(place)
    thoraxrt(None, "export-triton", sample_bundle.path, "models")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_cache_that_may_not_be_read_is_named_with_the_remedy_and_the_rest_is_shown(
    level: int, sample_bundle: Bundle, theirs: CachedPlan, tmp_path: Path
) -> None:
    locked = theirs.folder.parents[level]  # the graph's folder, plans, the cache itself
    locked.chmod(0o000)
    try:
        said = reasons(sample_bundle, tmp_path / "theirs")
    finally:
        locked.chmod(0o755)
    assert all("cannot be read: Permission denied" in reason for reason in said)


def test_a_cache_that_is_no_folder_is_named_with_the_remedy_and_the_rest_is_shown(sample_bundle: Bundle) -> None:
    assert all(os.devnull in reason for reason in reasons(sample_bundle, Path(os.devnull)))


def reasons(bundle: Bundle, cache: Path) -> list[str]:
    """What `info`, which shows the rest, and `compile`, which cannot go on, say of a cache without use."""
    facts = json.loads(thoraxrt(cache, "info", bundle.path, "--json", weak=True).stdout)
    (plan,), line = facts["plans"], thoraxrt(cache, "compile", bundle.path, "--target", "sm86", status=2, weak=True)
    assert facts["sha256"] == bundle.sha256
    assert "THORAXRT_CACHE" in thoraxrt(cache, "info", bundle.path, weak=True).stdout
    said = [plan["reason"], line.stderr.strip()]
    assert all(reason.endswith("name another place with THORAXRT_CACHE") for reason in said)
    return said


def thoraxrt(
    cache: Path | None, *arguments: str | Path, status: int = 0, weak: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command. `weak`: without root's power to read and write whatever the mode."""
    powers = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if weak and os.geteuid() == 0 else []
    result = subprocess.run(
        [*powers, sys.executable, "-m", "thoraxrt.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "250"} | ({"THORAXRT_CACHE": str(cache)} if cache else {}),
    )
    assert result.returncode == status, result.stderr
    return result


def test_the_commands_compile_sign_and_tell(
    filled: Filled, sample_bundle: Bundle, keys: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("compile", sample_bundle.path, "--target", "sm86", "--batch", "1")
    done = thoraxrt(filled.cache.root, *arguments, "--sign", keys["ours.key"], "--out", tmp_path / "out")
    single, half = done.stdout.splitlines()
    assert "fp32 for sm86, batches of 1: compiled in" in single
    assert "fp16 for sm86, batches of 1: compiled before" in half
    assert str(filled.plan.record.layers) in half
    assert done.stderr == ""
    assert PlanCache(tmp_path / "out", [keys["ours.pem"]]).load(filled.plan.record.key).plan == filled.plan.plan

    (filled.plan.folder / "plan.tag").write_text("0" * 64)
    plans = json.loads(thoraxrt(filled.cache.root, "info", sample_bundle.path, "--json").stdout)["plans"]
    refused, sound = sorted(plans, key=lambda plan: plan["precision"] or "")
    assert refused["folder"] == str(filled.plan.folder)
    assert "plan.tag is not this machine's" in refused["reason"]
    assert (sound["precision"], sound["targets"], sound["batches"]) == ("fp32", ["sm86"], [1])
    fp32 = PlanCache().read(Path(sound["folder"]))
    assert sound["reason"] == misfit(fp32.record.key, this_machine())
    text = thoraxrt(filled.cache.root, "info", sample_bundle.path).stdout
    assert filled.plan.folder.name in text
    shutil.rmtree(fp32.folder)


def test_a_required_signature_vouches_for_shipped_plans_too(
    filled: Filled, sample_bundle: Bundle, keys: dict[str, Path], tmp_path: Path
) -> None:
    bundle = signed(sample_bundle, tmp_path / "signed.bundle", keys)
    PlanCache(tmp_path / "edge").ship(filled.plan, keys["ours.key"])
    for arguments, vouched in (([], False), (["--require-signature", keys["ours.pem"]], True)):
        (plan,) = json.loads(thoraxrt(tmp_path / "edge", "info", bundle, "--json", *arguments).stdout)["plans"]
        assert plan["reason"] == misfit(filled.plan.record.key, this_machine()) or not vouched
        assert ("plan.sig does not vouch" in str(plan["reason"])) is not vouched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm86", "--batch", "1.5"), "--batch 1.5"),
        (("--target", "sm87"), "sm87"),
        (("--target", "sm86", "--version-compatible"), "version compatibility"),
        (("--target", "sm86", "--out", "somewhere"), "--sign KEY and --out DIR"),
    ],
)
def test_what_compile_refuses_is_one_line(
    arguments: tuple[str, ...], message: str, sample_bundle: Bundle, tmp_path: Path
) -> None:
    (line,) = thoraxrt(tmp_path, "compile", sample_bundle.path, *arguments, status=2).stderr.splitlines()
    assert message in line


def test_without_a_target_a_machine_without_a_gpu_says_what_to_do(sample_bundle: Bundle) -> None:
    try:
        pytest.skip(f"there is a GPU here, {current_device().name}")
    except BackendUnavailableError:
        with pytest.raises(BackendUnavailableError, match="without --target needs a GPU"):
            plan_key(sample_bundle, "fp16", PlanOptions())
