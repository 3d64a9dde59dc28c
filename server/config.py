"""A server's configuration: flags over environment over one TOML file over defaults, and a check before it serves.

Owns which keys there are and what is said where one is wrong. The parts' own option classes are its sections, so that
no option is described twice; see `deploy/thoraxrt.toml` for all of them.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from thoraxrt.engine.backends import choose
from thoraxrt.engine.bundle import MANIFEST, Bundle
from thoraxrt.engine.decode import DecodeLimits
from thoraxrt.engine.errors import ConfigError, ThoraxrtError
from thoraxrt.engine.receipt import require_parity
from thoraxrt.server.audit import AuditOptions
from thoraxrt.server.batching import BatchingOptions
from thoraxrt.server.certificates import server_credentials
from thoraxrt.server.decoding import ProcessDecoder, WorkerLimits
from thoraxrt.server.models import EngineOptions
from thoraxrt.server.oidc import NO_KEYS, Oidc
from thoraxrt.server.security import Authenticator, SecurityOptions, check_exposure, is_loopback
from thoraxrt.server.serve import ServeOptions, try_port
from thoraxrt.server.telemetry import tracing
from thoraxrt.server.wire import ENVELOPE_BYTES, MAX_MESSAGE_BYTES

__all__ = ["Config", "Finding", "check", "exit_status", "load_config"]

_PREFIX: Final = "THORAXRT_"
_NESTING: Final = "__"

_FLAGS: Final = "the flags"
_ENVIRONMENT: Final = "the environment"


def _check_port(options: object, port: int) -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"{type(options).__name__} port is {port}; expected 0 to 65535, where 0 takes a free one")


_EXPECTED: Final = {"path_type": "a path", "dataclass_type": "a table of keys", "tuple_type": "a list"}
"""Where pydantic speaks of Python's types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server listens and how it ends.

    `port` 0 takes a free one. Calls in flight have `grace_s` seconds once it stops. A message has at most
    `max_message_bytes`, by default those of one image and what surrounds it: more only serves studies of large images.
    `insecure` allows an address beyond loopback without TLS or without authentication.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    grace_s: float = 10.0
    max_message_bytes: int | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        _check_port(self, self.port)
        most = MAX_MESSAGE_BYTES if self.max_message_bytes is None else self.max_message_bytes
        ServeOptions(max_message_bytes=most, grace_s=self.grace_s)  # which raises


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsOptions(EngineOptions):
    """What is served: `path` is a bundle, or a repository of them (see `thoraxrt.server.models`).

    Of each model of a repository the `latest` versions are served, or "all", and its folder is looked at every
    `poll_s` seconds where that is given.
    """

    path: Path
    latest: int | Literal["all"] = 1
    poll_s: float | None = None

    def __post_init__(self) -> None:
        super(ModelsOptions, self).__post_init__()  # with slots the class is made anew, and super() means the first one
        if self.latest != "all" and self.latest < 1:
            raise ValueError(f'ModelsOptions latest is {self.latest}; expected at least 1, or "all"')
        if self.poll_s is not None and not 0 < self.poll_s < math.inf:
            raise ValueError(f"ModelsOptions poll_s is {self.poll_s}; expected a number of seconds above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingOptions(WorkerLimits):
    """Where untrusted files are decoded: by `workers` processes, by default as many as there are CPUs.

    Without `processes`, by threads: a file that crashes a decoder then ends the server.
    """

    processes: bool = True
    workers: int | None = None

    def __post_init__(self) -> None:
        WorkerLimits.__post_init__(self)
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"DecodingOptions workers is {self.workers}; expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsOptions:
    """Where Prometheus finds the metrics; neither encrypted nor authenticated."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = 8501

    def __post_init__(self) -> None:
        _check_port(self, self.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingOptions:
    """The OpenTelemetry collector that gets the traces, http://HOST:4317 or https://; none without."""

    endpoint: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"TracingOptions endpoint is {self.endpoint!r}; expected http://HOST:PORT or https://...")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingOptions:
    """What stderr gets: from which `level` on, and whether as JSON lines."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    json: bool = False


class Config(BaseModel):
    """A whole configuration, valid in itself; whether its files are there is `check`'s.

    Example: `load_config(Path("thoraxrt.toml"), {"server.port": 8600})`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    server: ServerOptions = ServerOptions()
    models: ModelsOptions
    batching: BatchingOptions = BatchingOptions()
    limits: DecodeLimits = DecodeLimits()
    decoding: DecodingOptions = DecodingOptions()
    security: SecurityOptions = SecurityOptions()
    audit: AuditOptions | None = None
    metrics: MetricsOptions = MetricsOptions()
    tracing: TracingOptions = TracingOptions()
    logging: LoggingOptions = LoggingOptions()

    @property
    def max_message_bytes(self) -> int:
        """The largest message that is taken: so that the decoder, not gRPC, says why an image is too large."""
        return self.server.max_message_bytes or self.limits.max_bytes + ENVELOPE_BYTES

    @field_validator("batching", mode="before")
    @classmethod
    def _workers_are_the_decoders(cls, given: Any) -> Any:
        if isinstance(given, dict) and "workers" in given:
            raise ValueError("workers is not set here; expected it as decoding.workers")
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        server, metrics = self.server, self.metrics
        if metrics.enabled and server.port and (server.host, server.port) == (metrics.host, metrics.port):
            raise ValueError(f"server.port and metrics.port are both {server.port}; expected two ports")
        return self


def load_config(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a file, of variables named THORAXRT_<SECTION>__<KEY>, and of flags by dotted key.

    A flag that is None was not given. In a variable, a list or a table is written as JSON. Relative paths start at the working
    directory. Raises ConfigError that says, for each wrong key, where it stands, what was received and expected.
    """
    layers = _Layers(
        {
            _FLAGS: _nested(_FLAGS, ((k.split("."), value) for k, value in (flags or {}).items() if value is not None)),
            _ENVIRONMENT: _nested(_ENVIRONMENT, _variables()),
            str(file): {} if file is None else _from_toml(file),
        }
    )
    try:
        return Config.model_validate(layers.merged())
    except ValidationError as error:
        wrong: dict[str, list[str]] = {}  # what may be of either of two types is wrong twice
        for detail in error.errors(include_url=False):
            received, expected = layers.explain(detail["loc"], detail["type"], detail["msg"], detail["input"])
            said = wrong.setdefault(received, [])
            said.append(f" or {expected.removeprefix('expected ')}" if said else expected)
        lines = (f"{what}; {first}{''.join(others)}" for what, (first, *others) in wrong.items())
        raise ConfigError("; ".join(lines)) from error


def _from_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; name a TOML file with --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}; see https://toml.io") from error


def _variables() -> Iterator[tuple[list[str], Any]]:
    for name, value in os.environ.items():
        if name.startswith(_PREFIX) and _NESTING in name:  # others are not ours: THORAXRT_CACHE
            yield name.removeprefix(_PREFIX).lower().split(_NESTING), _read(name, value)


def _read(name: str, value: str) -> Any:
    """A variable's value: a list or a table where it is written as one, else the text, which the key's type then reads."""
    if not value.startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{_ENVIRONMENT}: {name} is {value!r}; expected JSON, [1, 2, 4] say") from error


def _nested(source: str, entries: Iterable[tuple[list[str], Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*sections, key), value in entries:
        place: Any = tree
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict) or key in place:
            raise ConfigError(f"{source}: {'.'.join([*sections, key])} is given twice; expected one value for it")
        place[key] = value
    return tree


class _Layers:
    """Values by source, the first one first, so that an error can name the source."""

    def __init__(self, layers: Mapping[str, dict[str, Any]]) -> None:
        self._layers = layers

    def merged(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"models": {}}  # so that it is its `path` that is missing
        for layer in reversed(list(self._layers.values())):
            _merge(tree, layer)
        return tree

    def explain(self, loc: tuple[int | str, ...], kind: str, message: str, received: object) -> tuple[str, str]:
        """Where it stands, its key and what was received; and what was expected, or the nearest key."""
        path, siblings = _known(loc)
        key = ".".join(map(str, path))
        if kind == "missing":
            return f"{key} is missing", f"expected it in the file, as {_variable(path)} or as a flag"
        source = f"{self._source(path)}: " if path else ""
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            near = difflib.get_close_matches(str(path[-1]), siblings, 1)
            remedy = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(siblings))}"
            return f"{source}there is no {key}", remedy
        if kind == "value_error":  # ours: "[<Class> ]<key> is ...; expected ..."
            first, _, rest = message.removeprefix("Value error, ").partition(" ")
            told = rest if first.endswith(("Options", "Limits")) else f"{first} {rest}"
            what, _, expected = f"{source}{key}{'.' if key else ''}{told}".partition("; ")
            return what, expected or "expected values that go together"
        expected = _EXPECTED.get(kind) or message.removeprefix("Input should be ").partition(", unable")[0]
        return f"{source}{key} is {_short(received)}", f"expected {expected}"

    def _source(self, path: tuple[int | str, ...]) -> str:
        for name, layer in self._layers.items():
            place: Any = layer
            for part in path:
                place = place.get(part, _ABSENT) if isinstance(place, dict) else place
            if place is not _ABSENT and layer:
                return f"{name} ({_variable(path)})" if name == _ENVIRONMENT else name
        return "the configuration"


_ABSENT: Final = object()


def _merge(tree: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, dict) else value


def _known(loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], list[str]]:
    """An error's place without what pydantic adds to it (a union's member), and the keys that there are beside it."""
    path: list[int | str] = []
    names, kind = list(Config.model_fields), None
    for part in loc:
        siblings = names
        path.append(part)
        if part not in names:
            break
        hint = Config.model_fields[str(part)].annotation if kind is None else get_type_hints(kind)[str(part)]
        kind = next((option for option in (hint, *get_args(hint)) if is_dataclass(option)), None)  # it may be optional
        if kind is None:
            break
        names = [field.name for field in fields(kind)]
    return tuple(path), siblings if loc else names


def _variable(path: Sequence[int | str]) -> str:
    return _PREFIX + _NESTING.join(map(str, path)).upper()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was checked: what it is about (a key, a folder), and what will be or what is wrong."""

    level: Literal["ok", "warning", "error"]
    about: str
    text: str


def check(config: Config) -> list[Finding]:
    """Look at everything that a server with this configuration would need, without serving.

    Bundles are verified and each one's backend chosen, files are read, ports and folders tried. Never raises for what
    it finds.
    """
    findings: list[Finding] = []
    for look in (
        _look_at_models,
        _look_at_ports,
        _look_at_security,
        _look_at_audit,
        _look_at_decoding,
        _look_at_tracing,
    ):
        findings += look(config)
    return findings


def exit_status(findings: Iterable[Finding]) -> int:
    """0, or 2 where something is wrong that keeps the server from starting."""
    return 2 if any(finding.level == "error" for finding in findings) else 0


def _tried(about: str, look: Callable[[], str]) -> Finding:
    """What `look` says, or the error of ours that it raises."""
    try:
        return Finding(level="ok", about=about, text=look())
    except ThoraxrtError as error:
        return Finding(level="error", about=about, text=str(error))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE  # as it is beside the server whose next start is looked at
        text = f"{error.filename or about}: {error.strerror}" + (", by a running server or another program" * taken)
        return Finding(level="warning" if taken else "error", about=about, text=text)


def _look_at_models(config: Config) -> Iterator[Finding]:
    models = config.models
    manifests = [models.path / MANIFEST]
    if not manifests[0].is_file():
        found = sorted(models.path.glob(f"*/[1-9]*/{MANIFEST}"))
        manifests = [path for path in found if not path.parent.parent.name.startswith(".")]
    if not manifests:
        yield Finding(
            level="error",
            about="models.path",
            text=f"{models.path} holds no bundle; expected a bundle, or a folder of MODEL/VERSION/{MANIFEST}",
        )

    def look(folder: Path) -> str:
        bundle = Bundle.open(folder, models.trusted)
        bundle.verify()
        choice = choose(bundle, models.backend, models.precision, models.device)
        name = choice.module.__name__.rpartition(".")[2]  # type: ignore[attr-defined]  # a module, seen as a protocol
        if models.require_parity:
            require_parity(bundle, name, choice.precision)
        return f"{bundle.manifest.network.name}, {bundle.sha256[:12]}, would run on {name} {choice.precision}"

    looked = {path.parent: _tried(str(path.parent), partial(look, path.parent)) for path in manifests}
    served = {folder.parent for folder, finding in looked.items() if finding.level == "ok"}
    for folder, finding in looked.items():
        if finding.level == "error" and folder.parent in served:  # as the server does, which serves what it can
            text = f"{finding.text}. Another version of this model can be served"
            finding = replace(finding, level="warning", text=text)
        yield finding


def _look_at_ports(config: Config) -> Iterator[Finding]:
    def look(host: str, port: int) -> str:
        try_port(host, port)
        return f"{host}, port {port or 'that is free'}, can be listened on"

    yield _tried("server.port", lambda: look(config.server.host, config.server.port))
    if config.metrics.enabled:
        yield _tried("metrics.port", lambda: look(config.metrics.host, config.metrics.port))
        if not is_loopback(config.metrics.host):
            text = f"{config.metrics.host} is reachable from other machines, without encryption and without a password"
            yield Finding(level="warning", about="metrics.host", text=text)


def _look_at_security(config: Config) -> Iterator[Finding]:
    server, security = config.server, config.security

    def look() -> str:
        check_exposure(server.host, security.tls is not None, server.insecure, authenticates=security.authenticates)
        if security.tls:
            server_credentials(security.tls)
        Authenticator(security)
        encrypted = "TLS" if security.tls else "no encryption"
        return f"{encrypted}, {'callers show who they are' if security.authenticates else 'callers are asked nothing'}"

    yield _tried("security", look)
    if server.insecure and not is_loopback(server.host):
        text = f"{server.host} may be reached by others without encryption, or without a password: that is allowed"
        yield Finding(level="warning", about="server.insecure", text=text)
    if oidc := security.oidc:
        try:
            text = f"keys of the provider: {len(Oidc(oidc).signing_keys())}"
            yield Finding(level="ok", about="security.oidc", text=text)
        except NO_KEYS as error:  # no error: the server starts, and asks again
            text = f"no keys from {oidc.jwks_url}, and without them every token is refused: {error}"
            yield Finding(level="warning", about="security.oidc", text=text)


def _look_at_audit(config: Config) -> Iterator[Finding]:
    if audit := config.audit:

        def look() -> str:
            with tempfile.TemporaryFile(dir=audit.path.parent):  # full files are renamed, and the next one made
                pass
            if audit.path.exists():
                audit.path.open("ab").close()
            return f"each answer is recorded in {audit.path}"

        yield _tried("audit.path", look)


def _look_at_decoding(config: Config) -> Iterator[Finding]:
    if not config.decoding.processes:
        text = "files are decoded by threads: one that crashes a decoder ends the server"
        yield Finding(level="warning", about="decoding.processes", text=text)
        return

    def look() -> str:
        with ProcessDecoder(1, config.limits, worker_limits=config.decoding):
            return f"files are decoded by {config.decoding.workers or 'as many'} processes{'' if config.decoding.workers else ' as there are CPUs'}"

    yield _tried("decoding.processes", look)


def _look_at_tracing(config: Config) -> Iterator[Finding]:
    if endpoint := config.tracing.endpoint:

        def look() -> str:
            tracing(endpoint).shutdown()  # sends nothing: there is no span
            return f"traces go to {endpoint}"

        yield _tried("tracing.endpoint", look)
