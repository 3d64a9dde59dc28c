"""The plan cache: compiled plans by what they were made from, handed out only where somebody vouches for them.

    $THORAXRT_CACHE              else $XDG_CACHE_HOME/thoraxrt, else ~/.cache/thoraxrt
    ├── machine.key              this machine's key, see `thoraxrt.engine.trust`
    └── plans/<onnx sha256>/<runtime>-<version>-<targets>-<precision>-<key>/
        ├── engine.plan
        ├── timing.cache         tensorrt only
        ├── plan.json            `PlanRecord`: the whole key, and the hash of both files above
        ├── plan.tag, plan.sig   this machine's HMAC of plan.json, or a person's Ed25519 signature
        └── kernels-<GPU>.cache  tensorrt_rtx only: what it compiled on that GPU, after this machine's HMAC of it

`<key>` is the first 12 hex digits of the sha256 of the whole key: plans that differ in any option or
batch bucket have folders of their own, and the same inputs always have the same one. A plan is code,
so nothing in it reaches a runtime unless its `plan.json` is vouched for and every hash matches;
otherwise it is compiled again from the bundle's verified graph. The HMAC counts in this machine's own
cache only: a folder from elsewhere may bring a key of its own, so there a signature must vouch. Nothing
is ever removed but what is replaced: delete the folder to free its space.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from thoraxrt.engine.backends.tensorrt_plan import (
    Device,
    Flavour,
    LayerTypes,
    Plan,
    PlanOptions,
    current_device,
    host_platform,
    installed_flavour,
    plan_from_onnx,
    supported_options,
    version_numbers,
)
from thoraxrt.engine.bundle import Bundle, FileEntry, read_bounded
from thoraxrt.engine.errors import BackendUnavailableError, BundleError, PlanError, RequestError
from thoraxrt.engine.trust import machine_tag, machine_tag_matches, sign, verify

__all__ = [
    "PRECISIONS",
    "CachedPlan",
    "Compiled",
    "FoundPlans",
    "Machine",
    "PlanCache",
    "PlanKey",
    "PlanRecord",
    "cache_folder",
    "compile_plans",
    "find_plans",
    "misfit",
    "plan_key",
    "this_machine",
]

PRECISIONS: Final = ("fp32", "fp16", "int8")
"""What plans are made for: each is a graph of its own."""

_PLAN, _TIMINGS, _RECORD, _TAG, _SIGNATURE = "engine.plan", "timing.cache", "plan.json", "plan.tag", "plan.sig"
_SCHEMA_VERSION: Final = 1
_RECORD_BYTES: Final = 1 << 20
_KERNELS_BYTES: Final = 1 << 30
_TAG_LENGTH: Final = 64  # hex digits
_DEAD_AFTER: Final = 3600.0  # seconds; writing a plan takes a few


class PlanKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what a plan is: of its bundle the graph alone, so that it outlives a new manifest.

    `platform` as "linux-x86_64"; `device` the GPU's name where the plan is tuned for one model, else
    None; `options.targets` is never empty.
    """

    onnx_sha256: str
    precision: str
    runtime: str
    runtime_version: str
    platform: str
    device: str | None
    options: PlanOptions

    @property
    def folder(self) -> Path:
        """Where the cache keeps the plan, from the cache's root."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]
        targets = "+".join(self.options.targets)
        name = f"{self.runtime}-{self.runtime_version}-{targets}-{self.precision}-{digest}"
        return Path("plans", self.onnx_sha256, name)


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`plan.json`: a plan's key, its files' hashes, and the types of the network it was built from."""

    schema_version: int
    key: PlanKey
    plan: FileEntry
    timing_cache: FileEntry | None
    layers: LayerTypes


class CachedPlan(NamedTuple):
    """A plan whose record is vouched for and whose hashes match: fit for a runtime."""

    folder: Path
    record: PlanRecord
    plan: bytes
    timing_cache: bytes


class Compiled(NamedTuple):
    """What `compile_plans` did for one precision.

    `seconds` is how long the build took, None where the plan was in the cache; `reason` is why one
    that was there has been compiled again, None where there was none.
    """

    cached: CachedPlan
    seconds: float | None
    reason: str | None


class Machine(NamedTuple):
    """What decides which plans fit: the platform, the installed TensorRT and the GPU, or why there is none."""

    platform: str
    flavour: Flavour | BackendUnavailableError
    device: Device | BackendUnavailableError


def this_machine(index: int = 0) -> Machine:
    """The machine this runs on, with its GPU of that index. Raises RequestError where it has others only."""
    flavour: Flavour | BackendUnavailableError
    device: Device | BackendUnavailableError
    try:
        flavour = installed_flavour()
    except BackendUnavailableError as error:
        flavour = error
    try:
        device = current_device(index)
    except BackendUnavailableError as error:
        device = error
    return Machine(host_platform(), flavour, device)


def misfit(key: PlanKey, machine: Machine) -> str | None:
    """Why a plan cannot run on a machine; None where it can."""
    flavour, device = machine.flavour, machine.device
    if key.platform != machine.platform:
        return f"made for {key.platform}, this is {machine.platform}"
    if isinstance(flavour, BackendUnavailableError):
        return str(flavour)
    if key.runtime != flavour.name or not _reads(flavour.version, key):
        return f"made with {key.runtime} {key.runtime_version}, installed is {flavour.name} {flavour.version}"
    if isinstance(device, BackendUnavailableError):
        return str(device)
    if key.options.hardware_compatible:
        ampere_plus = int(device.architecture.removeprefix("sm")) >= 80
        return None if ampere_plus else f"made for sm80 and later, this GPU is {device.architecture}"
    if device.architecture not in key.options.targets:
        return f"made for {', '.join(key.options.targets)}, this GPU is {device.architecture}"
    if key.device not in (None, device.name):
        return f"tuned for {key.device}, this GPU is {device.name}"
    return None


def _reads(version: str, key: PlanKey) -> bool:
    """Whether a runtime of this version takes the plan: the same one, or a later one of the same major line."""
    if not key.options.version_compatible:
        return version == key.runtime_version
    here, there = version_numbers(version), version_numbers(key.runtime_version)
    return here[:1] == there[:1] and here >= there


def plan_key(bundle: Bundle, precision: str, options: PlanOptions, device: int = 0) -> PlanKey:
    """The key of the plan that this machine would compile, for its GPU number `device` where none is named.

    Raises RequestError for a precision or option that the installed flavour lacks,
    BackendUnavailableError where there is no TensorRT or the options need a GPU that is not there,
    BundleError where the bundle lacks the graph or it is damaged.
    """
    if precision not in PRECISIONS:
        raise RequestError(f"no plan is made for precision {precision!r}; expected {', '.join(PRECISIONS)}")
    flavour = installed_flavour()
    name = bundle.graph_name(precision)
    bundle.read(name)
    return PlanKey(
        onnx_sha256=bundle.manifest.files[name].sha256,
        precision=precision,
        runtime=flavour.name,
        runtime_version=flavour.version,
        platform=host_platform(),
        device=current_device(device).name if flavour.name == "tensorrt" else None,
        options=supported_options(options, flavour, device),
    )


def compile_plans(
    bundle: Bundle,
    precisions: Sequence[str],
    options: PlanOptions | None = None,
    cache: PlanCache | None = None,
    device: int = 0,
) -> Iterator[Compiled]:
    """Bring a plan for each precision into the cache, one after the other as they are asked for.

    A plan that is there and sound is not compiled again; `device` as in `plan_from_onnx`. Raises as `plan_key` does, BackendError
    where TensorRT refuses the graph; before anything is built PlanError where the cache cannot be read
    or written, SignatureError where it can hold no key of this machine.

    Example: `for compiled in compile_plans(bundle, ("fp16",), PlanOptions(targets=("sm86",))): ...`
    """
    options, cache = options or PlanOptions(), cache or PlanCache()
    for precision in precisions:
        key = plan_key(bundle, precision, options, device)
        reason = None
        if cache.has(key):
            try:
                yield Compiled(cache.load(key), None, None)
                continue
            except PlanError as error:
                reason = str(error)
        cache.prepare(key)
        start = time.monotonic()
        plan = plan_from_onnx(bundle.read(bundle.graph_name(precision)), options, cache.timings(key), device)
        seconds = time.monotonic() - start
        yield Compiled(cache.store(key, plan), seconds, reason)


class FoundPlans(NamedTuple):
    """The cache's plans of one graph on one machine: folders of those that fit, best first, and why the others do not."""

    fitting: list[Path]
    refused: list[str]


def find_plans(bundle: Bundle, precision: str, machine: Machine, cache: PlanCache) -> FoundPlans:
    """Look for plans that a machine can run; their files are not read yet, so `PlanCache.read` may still refuse one.

    A plan made for few GPUs or one version goes before a portable one, then the newest.
    """
    fitting, refused = [], []
    for folder in cache.folders(bundle):
        try:
            key = cache.record(folder).key
            with _reaching(folder, "read"):
                made = (folder / _RECORD).stat().st_mtime_ns
        except PlanError as error:
            refused.append(str(error))
            continue
        if key.precision != precision:
            continue
        if reason := misfit(key, machine):
            refused.append(f"{folder}: {reason}")
            continue
        portable = key.options.hardware_compatible + key.options.version_compatible
        fitting.append((portable, -made, folder))
    return FoundPlans([folder for *_, folder in sorted(fitting)], refused)


class PlanCache:
    """Plans on disk, under `root`, else under `cache_folder()`.

    `trusted`: public keys, PEM files or folders of them, whose signatures are taken too. Under a root
    that is not this machine's `cache_folder()` nothing else is: a key found there may be anybody's.
    """

    def __init__(self, root: Path | None = None, trusted: Sequence[Path] = ()) -> None:
        self._root = root
        self.trusted = tuple(trusted)

    @property
    def root(self) -> Path:
        """The cache's folder, which need not exist. Raises PlanError, see `cache_folder`."""
        return self._root or cache_folder()

    def has(self, key: PlanKey) -> bool:
        """Whether there is something under the key, sound or not. Raises PlanError where that cannot be told."""
        with _reaching(self.root / key.folder, "read") as folder:
            return folder.exists()

    def prepare(self, key: PlanKey) -> None:
        """Make this machine's key, and see that a plan can be kept. Raises PlanError, SignatureError."""
        machine_tag(b"", self.root)
        with _reaching(self.root / key.folder, "written") as folder:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.parent):
                pass

    def load(self, key: PlanKey) -> CachedPlan:
        """The plan of a key. Raises PlanError, see `read`."""
        return self.read(self.root / key.folder)

    def read(self, folder: Path) -> CachedPlan:
        """The plan in one of the cache's folders.

        Raises PlanError saying why it may not be used: missing, vouched for by nobody, damaged, or
        moved from where its key belongs.
        """
        record = self.record(folder)
        timings = b"" if record.timing_cache is None else _verified(folder / _TIMINGS, record.timing_cache)
        return CachedPlan(folder, record, _verified(folder / _PLAN, record.plan), timings)

    def record(self, folder: Path) -> PlanRecord:
        """What a plan is, without its files. Raises PlanError as `read` does, short of what only they can show."""
        root = self.root  # first: without a cache, that is the reason
        data = _bytes(folder / _RECORD, _RECORD_BYTES)
        self._vouched(folder, data)
        record = _record(data, folder)
        if folder != root / record.key.folder:
            raise PlanError(f"{folder} holds the plan of another key: {record.key.folder}")
        return record

    def kernels(self, cached: CachedPlan, gpu: str) -> bytes:
        """What TensorRT-RTX compiled of a plan on this machine's GPU of that name; empty where there is nothing of ours.

        It is code too: only what this machine tagged, for this plan, in its own cache is given out.
        """
        try:
            data = _bytes(_kernels_path(cached, gpu), _KERNELS_BYTES)
            tag, kernels = data[:_TAG_LENGTH].decode("latin-1"), data[_TAG_LENGTH:]
            tagged = self._is_own() and machine_tag_matches(_bound(cached, kernels), tag, self.root)
        except BundleError:  # there is none, or no key: it is compiled once more
            return b""
        return kernels if tagged else b""

    def keep_kernels(self, cached: CachedPlan, gpu: str, kernels: bytes) -> None:
        """Keep them beside the plan, under this machine's tag. Raises PlanError, SignatureError."""
        if not self._is_own():  # nobody would take them from there
            return
        path = _kernels_path(cached, gpu)
        made = path.with_name(f".{path.name}.{os.getpid()}")
        tag = machine_tag(_bound(cached, kernels), self.root)
        with _reaching(path, "written"):
            try:
                made.write_bytes(tag.encode() + kernels)
                made.replace(path)
            finally:
                made.unlink(missing_ok=True)

    def _is_own(self) -> bool:
        """Whether this is this machine's own cache: whoever made a plan elsewhere made the key beside it too."""
        return os.path.realpath(self.root) == os.path.realpath(cache_folder())

    def _vouched(self, folder: Path, record: bytes) -> None:
        """Return where this machine or a trusted key made `plan.json`. Raises PlanError."""
        refusals = []
        if (folder / _TAG).exists():
            try:
                if not self._is_own():
                    refusals.append(
                        f"{_TAG} counts only in this machine's own cache, {cache_folder()}: "
                        f"elsewhere a trusted {_SIGNATURE} must vouch (--require-signature)"
                    )
                elif machine_tag_matches(record, _bytes(folder / _TAG, _TAG_LENGTH).decode("latin-1"), self.root):
                    return
                else:
                    refusals.append(f"{_TAG} is not this machine's tag of {_RECORD}")
            except BundleError as error:
                refusals.append(str(error))
        if (folder / _SIGNATURE).exists():
            try:
                return verify(record, _bytes(folder / _SIGNATURE, 64), self.trusted)
            except BundleError as error:
                refusals.append(f"{_SIGNATURE} does not vouch for {_RECORD}: {error}")
        raise PlanError(f"{folder}: {'; '.join(refusals) or f'neither {_TAG} nor {_SIGNATURE} is there'}")

    def folders(self, bundle: Bundle) -> list[Path]:
        """The folders that hold plans of a bundle's graphs, sound or not, by name.

        Where they cannot be listed, the one that they would be in: `read` refuses it with the reason.
        """
        found: list[Path] = []
        for graph in sorted({entry.sha256 for entry in bundle.manifest.files.values()}):
            made_of_it = Path("plans", graph)
            try:
                made_of_it = self.root / made_of_it
                found += sorted(path for path in made_of_it.iterdir() if path.name[0] != "." and path.is_dir())
            except FileNotFoundError:
                continue
            except (OSError, PlanError):
                return [*found, made_of_it]
        return found

    def timings(self, key: PlanKey) -> bytes:
        """The largest timing cache of the same runtime, version and GPU, of any network; empty where there is none."""
        found = [b""]
        for path in self.root.glob(f"plans/*/{key.runtime}-{key.runtime_version}-*/{_TIMINGS}"):
            with contextlib.suppress(PlanError):  # whatever is wrong with that plan is said when it is asked for
                cached = self.read(path.parent)
                if cached.record.key.device == key.device:
                    found.append(cached.timing_cache)
        return max(found, key=len)

    def store(self, key: PlanKey, plan: Plan) -> CachedPlan:
        """Keep a plan under its key, vouched for by this machine. Raises PlanError, SignatureError."""
        record = PlanRecord(
            schema_version=_SCHEMA_VERSION,
            key=key,
            plan=FileEntry.of(plan.data),
            timing_cache=None if plan.timing_cache is None else FileEntry.of(plan.timing_cache),
            layers=plan.layers,
        )
        cached = CachedPlan(self.root / key.folder, record, plan.data, plan.timing_cache or b"")
        _publish(cached.folder, {**_files(cached), _TAG: machine_tag(_encoded(record), self.root).encode()})
        return cached

    def ship(self, cached: CachedPlan, key: Path) -> Path:
        """Keep a plan in this cache under the signature of a private key (a PEM file), for other machines.

        They take it, copied into their cache, where they trust the public key. Gives the folder.
        Raises PlanError, SignatureError.
        """
        folder = self.root / cached.record.key.folder
        _publish(folder, {**_files(cached), _SIGNATURE: sign(_encoded(cached.record), key)})
        return folder


def _kernels_path(cached: CachedPlan, gpu: str) -> Path:
    return cached.folder / f"kernels-{re.sub('[^A-Za-z0-9]+', '-', gpu)}.cache"


def _bound(cached: CachedPlan, kernels: bytes) -> bytes:
    """What is tagged: the kernels, and the plan that they belong to."""
    return hashlib.sha256(cached.plan).digest() + kernels


def cache_folder() -> Path:
    """Where compiled plans, this machine's key and unfinished calibrations are kept: `$THORAXRT_CACHE`, else XDG's.

    Raises PlanError for a user without a home folder, as in a container, who names neither.
    """
    if named := os.environ.get("THORAXRT_CACHE"):
        return Path(named)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches, "thoraxrt")
    try:
        return Path.home() / ".cache" / "thoraxrt"
    except RuntimeError as error:
        raise PlanError(
            f"there is no place for compiled plans and unfinished calibrations: user {os.geteuid()} has no home folder; "
            "name a place with THORAXRT_CACHE"
        ) from error


def _encoded(record: PlanRecord) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def _files(cached: CachedPlan) -> dict[str, bytes]:
    timings = {} if cached.record.timing_cache is None else {_TIMINGS: cached.timing_cache}
    return {_PLAN: cached.plan, **timings, _RECORD: _encoded(cached.record)}


def _bytes(path: Path, largest: int) -> bytes:
    try:
        return read_bounded(path, largest, "compile the plan again, or name another place with THORAXRT_CACHE")
    except BundleError as error:
        raise PlanError(str(error)) from error


def _record(data: bytes, folder: Path) -> PlanRecord:
    try:
        record = msgspec.json.decode(data, type=PlanRecord)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError and UnicodeDecodeError are ValueErrors
        raise PlanError(f"{folder / _RECORD} is damaged: {str(error)[:300]}") from error
    if record.schema_version != _SCHEMA_VERSION:
        raise PlanError(
            f"{folder / _RECORD} has schema version {record.schema_version}; this thoraxrt reads {_SCHEMA_VERSION}"
        )
    return record


def _verified(path: Path, entry: FileEntry) -> bytes:
    data = _bytes(path, entry.size)
    if FileEntry.of(data) != entry:
        raise PlanError(
            f"{path} is not the file that was compiled ({len(data)} bytes, sha256 differs; "
            f"{_RECORD} says {entry.size} bytes, {entry.sha256[:12]}...)"
        )
    return data


def _publish(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files beside `folder`, then let them appear under its name at once, in place of what was there."""
    with _reaching(folder, "written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, data in files.items():
                with (made / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            made.chmod(0o755)
            _replace(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        _remove_dead(folder.parent)


@contextlib.contextmanager
def _reaching(folder: Path, done: str) -> Iterator[Path]:
    """Translate what the file system says of a plan's folder. Raises PlanError."""
    try:
        yield folder
    except OSError as error:
        raise PlanError(
            f"{folder} cannot be {done}: {error.strerror}; name another place with THORAXRT_CACHE"
        ) from error


def _replace(made: Path, folder: Path) -> None:
    """Rename, setting an older plan aside first; a reader in between finds none and compiles its own."""
    while True:
        try:
            made.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):  # another writer was faster
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _remove_dead(parent: Path) -> None:
    """Remove what writers left that were killed long ago."""
    for path in parent.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _DEAD_AFTER:
                shutil.rmtree(path, ignore_errors=True)
