"""Configuration: which source wins, what is said where one is wrong, and what `check` finds."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thoraxrt.engine.decode import DecodeLimits
from thoraxrt.engine.errors import ConfigError
from thoraxrt.server import decoding
from thoraxrt.server.batching import BatchingOptions
from thoraxrt.server.config import Config, Finding, check, exit_status, load_config
from thoraxrt.server.decoding import ProcessDecoder
from thoraxrt.server.models import EngineOptions
from thoraxrt.server.tokens import add_token


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("THORAXRT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "thoraxrt.toml"


def loaded(file: Path, text: str, **flags: object) -> Config:
    file.write_text(f'models.path = "chexnet.bundle"\n{text}')
    return load_config(file, {key.replace("__", "."): value for key, value in flags.items()})


def refused(file: Path, text: str, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(file, text, **flags)
    return str(caught.value)


def test_flags_win_over_the_environment_over_the_file_over_defaults(file, monkeypatch):
    text = "[server]\nport = 1\ngrace_s = 1\n[batching]\nmax_batch = 1\nmax_images = 11\n"
    monkeypatch.setenv("THORAXRT_SERVER__PORT", "2")
    monkeypatch.setenv("THORAXRT_BATCHING__MAX_BATCH", "2")
    config = loaded(file, text, server__port=3, server__host=None)
    assert (config.server.port, config.batching.max_batch) == (3, 2)
    assert (config.server.grace_s, config.batching.max_images) == (1, 11)
    assert config.server.host == "127.0.0.1"


def test_without_a_file_the_defaults_are_the_parts_own():
    config = load_config(None, {"models.path": "x"})
    assert config.batching == BatchingOptions()
    assert config.limits == DecodeLimits()
    assert isinstance(config.models, EngineOptions)
    assert config.models.path == Path("x")


def test_a_variable_may_hold_a_list_a_number_or_a_switch(file, monkeypatch):
    monkeypatch.setenv("THORAXRT_BATCHING__BUCKETS", "[1, 2, 8]")
    monkeypatch.setenv("THORAXRT_MODELS__TRUSTED", '["a.pem", "b.pem"]')
    monkeypatch.setenv("THORAXRT_MODELS__LATEST", "all")
    monkeypatch.setenv("THORAXRT_DECODING__PROCESSES", "false")
    monkeypatch.setenv("THORAXRT_CACHE", "elsewhere")  # not the configuration's
    monkeypatch.setenv("THORAXRT_SECURITY__TLS__CLIENTS", '{"*": ["predict"]}')
    config = loaded(file, "security.tls = {certificate = 'a', private_key = 'b', client_ca = 'c'}")
    assert config.security.tls.clients == {"*": ("predict",)}
    assert config.batching.buckets == (1, 2, 8)
    assert config.models.trusted == [Path("a.pem"), Path("b.pem")]
    assert config.models.latest == "all"
    assert config.decoding.processes is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[batching]\nmax_batc = 3", "there is no batching.max_batc; did you mean max_batch?"),
        ("[srever]\nport = 3", "there is no srever; did you mean server?"),
        ("[metrics]\nx = 3", "there is no metrics.x; expected one of enabled, host, port"),
        ("[batching]\nmax_batch = 'x'", "batching.max_batch is 'x'; expected a valid integer"),
        ("[models]\nlatest = 'two'", "models.latest is 'two'; expected a valid integer or 'all'"),
        ("[models]\nlatest = 0", 'models.latest is 0; expected at least 1, or "all"'),
        ("[limits]\nmax_bytes = 0", "limits.max_bytes is 0; expected at least 1"),
        (
            "[limits]\nmin_side = 7072",
            "limits.min_side 7072 leaves no picture of 50000000 pixels; expected values that go together",
        ),
        ("[decoding]\nseconds = -1", "decoding.seconds is -1.0; expected a number of seconds above 0"),
        ("[server]\nport = 65536", "server.port is 65536; expected 0 to 65535, where 0 takes a free one"),
        ("[server]\ngrace_s = inf", "server.grace_s is inf; expected 0 or more seconds"),
        ("[logging]\nlevel = 'loud'", "logging.level is 'loud'; expected 'debug', 'info', 'warning' or 'error'"),
        ("[security.tokens]\nfile = 3", "security.tokens.file is 3; expected a path"),
        ("[security.tokens]\nfil = 'x'\nfile = 'x'", "there is no security.tokens.fil; did you mean file?"),
        ("security.health = 'all'", "security.health is 'all'; expected 'predict' or 'admin' or 'open'"),
        (
            "[security.tls]\ncertificate = 'x'\nprivate_key = 'y'\nclients = {a = ['predict']}",
            "security.tls.clients is set without client_ca; expected both, else no client shows one",
        ),
        ("[audit]\npath = 'x'\nkeep = 0", "audit.keep is 0; expected at least 1"),
        ("server = 3", "server is 3; expected a table of keys"),
        ("[models]\ntrusted = ['a', 3]", "models.trusted is 3; expected a path"),
        ("[batching]\nworkers = 3", "batching.workers is not set here; expected it as decoding.workers"),
        (
            "[tracing]\nendpoint = 'host:4317'",
            "tracing.endpoint is 'host:4317'; expected http://HOST:PORT or https://...",
        ),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_what_was_expected(file, text, said):
    text = text.replace("[models]\n", "models.")  # the table is begun already
    assert refused(file, text) == f"{file}: {said}"


def test_the_source_of_a_wrong_value_is_named(file, monkeypatch):
    monkeypatch.setenv("THORAXRT_SERVER__GRACE_S", "long")
    monkeypatch.setenv("THORAXRT_SERVR__PORT", "3")
    said = refused(file, "[server]\ngrace_s = 3\nport = 4", server__port=-1, metrics__port="many")
    assert "the environment (THORAXRT_SERVER__GRACE_S): server.grace_s is 'long'; expected a valid number" in said
    assert "the environment (THORAXRT_SERVR): there is no servr; did you mean server?" in said
    assert "the flags: metrics.port is 'many'; expected a valid integer" in said


def test_a_variable_that_is_no_json_list_is_named(file, monkeypatch):
    monkeypatch.setenv("THORAXRT_BATCHING__BUCKETS", "[1, 2")
    assert "THORAXRT_BATCHING__BUCKETS is '[1, 2'; expected JSON" in refused(file, "")


@pytest.mark.parametrize("names", [("SERVER__PORT", "SERVER__PORT__X"), ("SERVER__PORT__X", "SERVER__PORT")])
def test_a_variable_under_another_is_named(file, monkeypatch, names):
    for name in names:
        monkeypatch.setenv(f"THORAXRT_{name}", "1")
    assert "the environment: server.port" in refused(file, "")
    assert "is given twice" in refused(file, "")


def test_two_listeners_need_two_ports(file):
    assert "server.port and metrics.port are both 8600" in refused(file, "", server__port=8600, metrics__port=8600)
    assert loaded(file, "", server__port=0, metrics__port=0).server.port == 0
    assert loaded(file, "metrics.enabled = false", server__port=8501).server.port == 8501


def test_without_a_model_it_says_what_is_missing(file):
    file.write_text("[server]\nport = 3\n")
    with pytest.raises(
        ConfigError, match=r"^models.path is missing; expected it in the file, as THORAXRT_MODELS__PATH"
    ):
        load_config(file)


@pytest.mark.parametrize("content", [b"[server", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_no_toml_is_named(file, content):
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{file} is not TOML: "):
        load_config(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml cannot be read: No such file or directory; name a TOML file"):
        load_config(tmp_path / "none.toml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
KEYS = [
    f"{section}.{key.name}"
    for section, field in Config.model_fields.items()
    for kind in (field.annotation, *typing.get_args(field.annotation))
    if dataclasses.is_dataclass(kind)
    for key in dataclasses.fields(kind)
]


@given(st.dictionaries(st.sampled_from([*KEYS, "x.y", "server"]), VALUES, max_size=3))
def test_whatever_is_set_is_taken_or_refused_as_ours(values):
    try:
        said = repr(load_config(None, {"models.path": "x"} | values))
    except ConfigError as error:
        said = str(error)
    assert said.startswith("Config(") or "expected" in said or "did you mean" in said


def test_a_message_holds_an_image_of_the_largest_size(file):
    assert loaded(file, "limits.max_bytes = 1000000").max_message_bytes == 1_000_000 + 64 * 1024
    assert loaded(file, "server.max_message_bytes = 5").max_message_bytes == 5


def test_the_sections_are_what_the_parts_take(file, radiograph):
    config = loaded(file, "decoding.seconds = 5\ndecoding.workers = 1\nlimits.min_side = 90")
    assert dataclasses.replace(config.batching, workers=3).workers == 3
    with ProcessDecoder(config.decoding.workers, config.limits, worker_limits=config.decoding) as decoder:
        assert decoder.submit(radiograph()).result().pixels.shape == (120, 97)
        assert "90" in str(decoder.submit(radiograph(width=80)).exception())


# The check


def checked(path: Path, **flags: object) -> dict[str, Finding]:
    """What is found, by what it is about; no worker is started unless a test asks for it."""
    quick = {"server__port": 0, "metrics__port": 0, "decoding__processes": False}
    flags = quick | {"models__path": path} | flags
    findings = check(load_config(None, {key.replace("__", "."): value for key, value in flags.items()}))
    assert len({finding.about for finding in findings}) == len(findings)
    return {finding.about: finding for finding in findings}


def test_a_bundle_would_be_served(tiny_bundle):
    findings = checked(tiny_bundle.path, models__backend="onnxruntime", decoding__processes=True, decoding__workers=3)
    assert findings[str(tiny_bundle.path)] == Finding(
        level="ok",
        about=str(tiny_bundle.path),
        text=f"tiny, {tiny_bundle.sha256[:12]}, would run on onnxruntime fp32",
    )
    assert {finding.level for finding in findings.values()} == {"ok"}
    assert findings["decoding.processes"].text == "files are decoded by 3 processes"
    assert exit_status(findings.values()) == 0


def test_every_bundle_of_a_repository_is_looked_at(tiny_bundle, tmp_path):
    for name in ("a/1", "a/2", "b/7", ".partial/1"):
        shutil.copytree(tiny_bundle.path, tmp_path / name)

    def levels() -> dict[str, str]:
        return {about: finding.level for about, finding in checked(tmp_path).items() if about.startswith("/")}

    def expected(**found: str) -> dict[str, str]:
        return {str(tmp_path / name.replace("_", "/")): level for name, level in found.items()}

    (tmp_path / "a/2/model.fp32.onnx").write_bytes(b"damaged")
    assert levels() == expected(a_1="ok", a_2="warning", b_7="ok"), "as a server would start, with version 1"
    finding = checked(tmp_path)[str(tmp_path / "a/2")]
    assert "model.fp32.onnx" in finding.text
    assert finding.text.endswith(". Another version of this model can be served")
    (tmp_path / "a/1/model.fp32.onnx").write_bytes(b"damaged")
    assert levels() == expected(a_1="error", a_2="error", b_7="ok")
    assert exit_status(checked(tmp_path).values()) == 2


def test_a_folder_without_a_bundle_is_an_error(tmp_path):
    assert "holds no bundle; expected a bundle, or a folder of MODEL/VERSION" in checked(tmp_path)["models.path"].text


def test_an_unsigned_bundle_is_an_error_where_signatures_are_required(tiny_bundle, keys):
    finding = checked(tiny_bundle.path, models__trusted=[keys[1]])[str(tiny_bundle.path)]
    assert finding.level == "error"


def test_a_backend_that_cannot_run_is_an_error(tiny_bundle):
    finding = checked(tiny_bundle.path, models__precision="int8")[str(tiny_bundle.path)]
    assert finding.level == "error"
    assert "no backend can run int8" in finding.text


def test_a_taken_port_is_a_warning_because_a_running_server_has_it(tiny_bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        findings = checked(tiny_bundle.path, server__port=port)
        assert (findings["server.port"].level, findings["metrics.port"].level) == ("warning", "ok")
        assert "Address already in use" in findings["server.port"].text


def test_metrics_for_everybody_are_a_warning(tiny_bundle):
    findings = checked(tiny_bundle.path, metrics__host="0.0.0.0")
    assert findings["metrics.host"].level == "warning"
    assert exit_status(findings.values()) == 0


@contextmanager
def files_of(folder: Path) -> Iterator[str]:
    """A folder's files over HTTP; gives the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "server.pem", folder / "server.key"
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run(
        ["openssl", "req", "-x509", *options, "-out", files[0], "-keyout", files[1]],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return files


def test_beyond_loopback_it_wants_tls_and_callers_who_say_who_they_are(tiny_bundle, certificate, tmp_path):
    def security(**flags: object) -> Finding:
        return checked(tiny_bundle.path, server__host="0.0.0.0", **flags)["security"]

    add_token(tmp_path / "tokens.toml", "pacs", ("predict",))
    encrypted = {"security__tls__certificate": certificate[0], "security__tls__private_key": certificate[1]}
    closed = {"security__tokens__file": tmp_path / "tokens.toml"}
    assert [security(**flags).level for flags in ({}, encrypted, closed)] == ["error"] * 3
    assert security(**encrypted, **closed).text == "TLS, callers show who they are"
    findings = checked(tiny_bundle.path, server__host="0.0.0.0", server__insecure=True)
    assert (findings["security"].level, findings["server.insecure"].level) == ("ok", "warning")


def test_a_certificate_or_a_token_file_that_cannot_be_used_is_an_error(tiny_bundle, certificate, tmp_path):
    pair = {"security__tls__certificate": certificate[0], "security__tls__private_key": certificate[0]}
    finding = checked(tiny_bundle.path, **pair)["security"]
    assert (finding.level, "holds no private key" in finding.text) == ("error", True)
    finding = checked(tiny_bundle.path, security__tokens__file=tmp_path / "none.toml")["security"]
    assert (finding.level, "none.toml cannot be read" in finding.text) == ("error", True)


def test_a_provider_without_keys_is_a_warning(tiny_bundle, tmp_path):
    def found(url: str) -> Finding:
        return checked(
            tiny_bundle.path, security__oidc={"issuer": "https://id", "audience": "thoraxrt", "jwks_url": url}
        )["security.oidc"]

    key = {"kty": "OKP", "crv": "Ed25519", "kid": "1", "x": "A" * 43}
    (tmp_path / "keys").write_text(json.dumps({"keys": [key]}))
    (tmp_path / "none").write_text(json.dumps({"keys": []}))
    with files_of(tmp_path) as url:
        assert (found(f"{url}/keys").level, found(f"{url}/keys").text) == ("ok", "keys of the provider: 1")
        for wrong in ("none", "missing"):
            assert found(f"{url}/{wrong}").level == "warning"
            assert f"no keys from {url}/{wrong}, and without them every token" in found(f"{url}/{wrong}").text


def test_the_audit_logs_folder_must_be_there_and_writable(tiny_bundle, tmp_path):
    assert checked(tiny_bundle.path, audit__path=tmp_path / "audit.jsonl")["audit.path"].level == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    for path, said in ((tmp_path / "none" / "a.jsonl", "No such file"), (tmp_path / "folder", "Is a directory")):
        finding = checked(tiny_bundle.path, audit__path=path)["audit.path"]
        assert finding.level == "error"
        assert said in finding.text


def test_decoding_in_threads_is_a_warning(tiny_bundle):
    assert checked(tiny_bundle.path)["decoding.processes"].level == "warning"


def test_a_worker_that_cannot_be_started_is_an_error(tiny_bundle, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(decoding.subprocess, "Popen", fails)
    monkeypatch.setattr(decoding, "_BACKOFF_S", 0.01)
    finding = checked(tiny_bundle.path, decoding__processes=True)["decoding.processes"]
    assert (finding.level, "cannot be started" in finding.text) == ("error", True)


def test_tracing_that_is_not_installed_is_an_error(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    finding = checked(tiny_bundle.path, tracing__endpoint="http://127.0.0.1:4317")["tracing.endpoint"]
    assert finding.level == "error"
    assert "thoraxrt[tracing]" in finding.text


def test_the_check_leaves_nothing_open(tiny_bundle):
    before = set(os.listdir("/proc/self/fd"))
    checked(tiny_bundle.path, decoding__processes=True)
    assert set(os.listdir("/proc/self/fd")) == before
