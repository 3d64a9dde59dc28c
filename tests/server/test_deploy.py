"""What is deployed with: every file is read as its reader would, as far as that goes without the reader itself."""

from __future__ import annotations

import configparser
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from thoraxrt.engine.execute import DeviceMemory
from thoraxrt.server.config import Config, check, exit_status, load_config
from thoraxrt.server.telemetry import Telemetry

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "server" / "deploy"

DECODER_S = 15
"""What the example's servers may need beyond their grace: decoders end what they decode, traces are sent."""


def written(path: Path, *, uncommented: bool) -> str:
    """The example; where `uncommented` with each `#key = value` and `#[section]` in force."""
    text = (DEPLOY / "thoraxrt.toml").read_text()
    path.write_text(re.sub(r"(?m)^#(?=[a-z\[])", "", text) if uncommented else text)
    return text


def options(kind: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Each option below a section: dotted key, its type's owner and field."""
    owners = [owner for owner in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(owner)]
    if not owners:
        return
    hints = typing.get_type_hints(owners[0])
    for field in dataclasses.fields(owners[0]):
        nested = list(options(hints[field.name], f"{key}.{field.name}"))
        yield from nested or [(f"{key}.{field.name}", owners[0], field)]


def value(config: Config, key: str) -> Any:
    place: Any = config
    for part in key.split("."):
        place = getattr(place, part)
    return place


EVERY = [entry for name, field in Config.model_fields.items() for entry in options(field.annotation, name)]
OWN = {
    *("models.backend", "models.precision", "models.device", "models.trusted", "models.poll_s", "models.path"),
    *("server.max_message_bytes", "decoding.workers", "batching.workers", "tracing.endpoint"),
    *("security.oidc.roles", "security.tls.clients", "security.tls.client_ca"),
}
"""Those without a default, or with one that depends on the machine or on other keys."""


def test_the_example_is_a_configuration(tmp_path):
    written(tmp_path / "thoraxrt.toml", uncommented=False)
    config = load_config(tmp_path / "thoraxrt.toml")
    assert config == load_config(None, {"models.path": config.models.path})


def test_the_examples_comments_are_every_key_with_its_default(tmp_path):
    written(tmp_path / "thoraxrt.toml", uncommented=True)
    config = load_config(tmp_path / "thoraxrt.toml")
    text = (tmp_path / "thoraxrt.toml").read_text()
    checked = 0
    for key, _, field in EVERY:
        assert key == "batching.workers" or re.search(rf"(?m)^{field.name} = ", text), key
        if key not in OWN and field.default is not dataclasses.MISSING and value(config, key) is not None:
            assert value(config, key) == field.default, key
            checked += 1
    assert checked > 35
    assert config.max_message_bytes == load_config(None, {"models.path": "x"}).max_message_bytes


# systemd


@pytest.fixture(scope="module")
def unit() -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(DEPLOY / "thoraxrt.service")
    return parser["Service"]


def test_the_unit_stops_the_server_alone_and_waits_for_it(unit):
    assert unit["KillMode"] == "mixed"
    grace = load_config(None, {"models.path": "x"}).server.grace_s
    assert int(unit["TimeoutStopSec"]) >= 2 * grace + DECODER_S
    assert unit["OOMPolicy"] == "continue"


def test_the_unit_is_started_again_whatever_ended_it(unit):
    assert unit["Restart"] == "always"


def test_the_units_steps_run_nothing_that_is_not_there_and_install_from_here():
    text = (DEPLOY / "thoraxrt.service").read_text()
    steps = [shlex.split(line) for line in re.findall(r"(?m)^#   (?:until )?(\S.*)$", text)]
    system = {"useradd", "python3", "install", "cp", "chmod", "systemctl"}
    assert {step[0] for step in steps if not step[0].startswith("/opt/thoraxrt/bin/")} == system
    (pip,) = [step for step in steps if step[0] == "/opt/thoraxrt/bin/pip"]
    assert (REPOSITORY / pip[-1].partition("[")[0] / "pyproject.toml").is_file()
    files = [word for step in steps for word in step if word.startswith("server/deploy/")]
    assert files
    assert all((REPOSITORY / name).is_file() for name in files)
    models = load_config(DEPLOY / "thoraxrt.toml").models.path
    (copied,) = [step[-1] for step in steps if step[0] == "cp"]
    assert Path(copied).parents[1] == models


def test_the_unit_runs_the_command_line(unit):
    program, command, flag, file = shlex.split(unit["ExecStart"])
    assert (Path(program).name, command, flag, file) == ("thoraxrt", "serve", "--config", "/etc/thoraxrt/thoraxrt.toml")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit_and_little_exposed(tmp_path):
    text = (DEPLOY / "thoraxrt.service").read_text()
    (tmp_path / "thoraxrt.service").write_text(text.replace("/opt/thoraxrt/bin/thoraxrt", sys.executable))
    analyse = ["systemd-analyze", "--man=no"]
    verified = subprocess.run([*analyse, "verify", tmp_path / "thoraxrt.service"], capture_output=True, text=True)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    limits = ["--offline=yes", "--threshold=20"]  # 2.0 of 10
    exposed = subprocess.run(
        [*analyse, "security", *limits, tmp_path / "thoraxrt.service"], capture_output=True, text=True
    )
    assert exposed.returncode == 0, exposed.stdout


# The image


@pytest.fixture(scope="module")
def stages() -> list[list[list[str]]]:
    """The Dockerfile's instructions, by stage: instruction and arguments."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text()).replace("\\\n", " ")
    stages: list[list[list[str]]] = [[]]
    for line in filter(None, map(str.strip, text.splitlines())):
        words = line.split(maxsplit=1)
        if words[0] == "FROM":
            stages.append([])
        stages[-1].append(words)
    return stages[1:]


def test_the_image_holds_each_room_and_nothing_that_is_ignored(stages):
    copied = {shlex.split(rest)[0] for name, rest in stages[0] if name == "COPY" and len(shlex.split(rest)) == 2}
    rooms = {path.readlink().name for path in (REPOSITORY / "thoraxrt").iterdir() if path.is_symlink()}
    assert rooms | {"thoraxrt"} == copied
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied | {"pyproject.toml", "README.md", "LICENSE"}
    assert all((REPOSITORY / name).exists() for name in kept)


def test_the_last_stage_runs_as_nobody_and_builds_nothing(stages):
    last = {name: rest for name, rest in stages[-1] if name in ("USER", "ENTRYPOINT", "HEALTHCHECK", "STOPSIGNAL")}
    assert last["USER"] == "65532:65532"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"])[:2] == ["thoraxrt", "serve"]
    runs = " ".join(rest for name, rest in stages[-1] if name == "RUN")
    assert re.search(r"install -d -o 65532 .*/var/cache/thoraxrt /var/log/thoraxrt\b", runs)
    assert "pip uninstall" in runs
    assert not re.search(r"apt-get|pip install|gcc|make", runs)
    assert not [rest for name, rest in stages[-1] if name == "COPY" and "--from=build" in rest and "/source" in rest]


def test_the_images_health_check_is_the_servers_health(stages, address, tmp_path, monkeypatch):
    (check_,) = [rest for name, rest in stages[-1] if name == "HEALTHCHECK"]
    command = check_.partition(" CMD ")[2]
    assert command.split()[:2] == ["thoraxrt", "health"]
    script = tmp_path / "thoraxrt"  # as installing makes it
    script.write_text(f"#!{sys.executable}\nfrom thoraxrt.cli import main\nmain()\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("THORAXRT_SERVER__PORT", address.rpartition(":")[2])
    asked = ["sh", "-c", command]
    assert subprocess.run(asked, timeout=20).returncode == 0
    monkeypatch.setenv("THORAXRT_SERVER__PORT", "1")
    refused = subprocess.run(asked, timeout=20, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "no server answers at 127.0.0.1:1 " in refused.stderr


def test_every_probe_that_is_shown_is_one_that_there_is():
    for name in ("Dockerfile", "kubernetes.yaml", "thoraxrt.service"):
        text = (DEPLOY / name).read_text()
        assert re.search(r"thoraxrt,? health", text), name
        assert set(re.findall(r"--tls-\w+", text)) == {"--tls-ca", "--tls-name", "--tls-cert", "--tls-key"}, name


# Kubernetes


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    """The objects by kind."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return {entry["kind"]: entry for entry in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


@pytest.fixture
def pods_configuration(manifest, tmp_path: Path) -> Config:
    (tmp_path / "thoraxrt.toml").write_text(manifest["ConfigMap"]["data"]["thoraxrt.toml"])
    return load_config(tmp_path / "thoraxrt.toml")


def test_each_object_is_one_of_kubernetes(manifest):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    assert set(manifest) == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    for entry in manifest.values():
        validate(entry, "1.30", strict=True)


def test_the_pod_may_do_nothing_but_serve(manifest):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"requests", "limits"} <= container["resources"].keys()
    writable = [mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["cache", "log", "tmp"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_pod_is_probed_where_it_listens_and_ended_no_sooner_than_it_has_drained(manifest, pods_configuration):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": pods_configuration.server.port, "metrics": pods_configuration.metrics.port}
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["grpc"] == {"port": ports["grpc"]}
    # Not its health, which is readiness: a pod whose last model was unloaded is not helped by a restart.
    assert container["livenessProbe"].items() >= {"tcpSocket": {"port": ports["grpc"]}}.items()
    assert "grpc" not in container["livenessProbe"]
    _, before = container["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(before) + pods_configuration.server.grace_s + DECODER_S
    assert pod["terminationGracePeriodSeconds"] >= needed


def test_the_pods_decoders_fit_into_it_whatever_the_node(manifest, pods_configuration):
    (container,) = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == "8Gi"
    decoding = pods_configuration.decoding
    assert str(decoding.workers) == container["resources"]["requests"]["cpu"]
    assert decoding.workers * decoding.memory_bytes <= 4 * 2**30


def test_the_pods_configuration_serves(pods_configuration, tiny_bundle, tmp_path):
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("")
    values = {"models.path": tiny_bundle.path, "security.tokens.file": tokens, "server.port": 0, "metrics.port": 0}
    findings = check(load_config(tmp_path / "thoraxrt.toml", values))
    assert exit_status(findings) == 0, findings


# Grafana


def test_the_dashboard_asks_for_nothing_that_the_server_does_not_report():
    telemetry = Telemetry()
    telemetry.gpu_memory(lambda: [DeviceMemory(gpu="0", used=1, total=2)])
    telemetry.stage("m", "decode", 0.1)
    telemetry.batch("m", 1)
    telemetry.queue("m", 1)
    telemetry.refused("m", "images")
    telemetry.begun("/m")
    telemetry.answered("/m", "OK", 0.1)
    telemetry.loaded("m", "1", sha256="a", backend="b", precision="c")
    samples: dict[str, set[str]] = {}
    for family in telemetry.registry.collect():
        for sample in family.samples:
            samples.setdefault(sample.name, {"instance"}).update(sample.labels)
    text = (DEPLOY / "grafana.json").read_text()
    expressions = re.findall(r'"(?:expr|definition)": "((?:[^"\\]|\\.)*)"', text)
    asked: set[str] = set()
    for expression in expressions:
        names = set(re.findall(r"\b(?:thoraxrt|process)_\w+", expression))
        assert names, expression
        for name, selector in re.findall(r"\b((?:thoraxrt|process)_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)(?:=~|=)", selector)) <= samples[name], expression
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert all(set(labels.split(", ")) <= samples[name] for name in names), expression
        asked |= names
    assert asked <= samples.keys()
    reported = {name for name in samples if name.startswith("thoraxrt_") and not name.endswith("_created")}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in reported} <= shown  # nothing is reported unseen


def test_the_dashboards_panels_do_not_overlap():
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
