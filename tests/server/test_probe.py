"""`thoraxrt.server.probe` against real servers: ready, not ready, encrypted, closed, absent."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.server.conftest import Gate
from tests.server.test_security import Certified, certify
from thoraxrt.engine.engine import Engine
from thoraxrt.engine.errors import AuthenticationError, ConfigError, ServerError
from thoraxrt.server.certificates import TlsOptions
from thoraxrt.server.probe import ClientTls, health
from thoraxrt.server.security import SecurityOptions
from thoraxrt.server.serve import OneModel, ServeOptions, running_server
from thoraxrt.server.service import SERVICE_NAME
from thoraxrt.server.tokens import TokenOptions


@pytest.fixture(scope="module")
def authority() -> Certified:
    return certify("authority")


def test_a_server_that_is_ready(address: str) -> None:
    health(address)
    health(address, service=SERVICE_NAME)
    with pytest.raises(ServerError, match="has no service 'other'; ask without one"):
        health(address, service="other")


def test_a_server_that_warms_up_is_not_ready(gated_engine: Engine, gate: Gate) -> None:
    gate.shut()
    found = []
    options = ServeOptions(port=_free_port())

    def ask() -> None:
        assert gate.entered.acquire(timeout=20)
        try:
            health(f"127.0.0.1:{options.port}")
        except ServerError as error:
            found.append(str(error))
        gate.open()

    asking = threading.Thread(target=ask)
    asking.start()
    with running_server(OneModel(gated_engine), options) as port:
        asking.join()
        health(f"127.0.0.1:{port}")
    assert found == [
        f"127.0.0.1:{options.port} says NOT_SERVING, expected SERVING: it starts, stops or has no model; see its log"
    ]


def test_nobody_at_the_address_is_said_so() -> None:
    with pytest.raises(ServerError, match="no server answers at"):
        health(f"127.0.0.1:{_free_port()}", timeout=2.0)


@pytest.mark.parametrize("mutual", [False, True])
def test_over_tls(engine: Engine, authority: Certified, tmp_path: Path, mutual: bool) -> None:
    certificate, key = certify("server", authority).write(tmp_path)
    ca, _ = authority.write(tmp_path, "ca")
    shown = certify("probe", authority).write(tmp_path, "probe")
    clients = {"client_ca": ca, "clients": {"*": ("predict",)}} if mutual else {}
    tls = TlsOptions(certificate=certificate, private_key=key, **clients)
    known = ClientTls(ca=ca, certificate=shown[0], private_key=shown[1]) if mutual else ClientTls(ca=ca)
    with running_server(engine, ServeOptions(port=0, security=SecurityOptions(tls=tls))) as port:
        address = f"127.0.0.1:{port}"
        health(address, tls=known)
        health(f"localhost:{port}", tls=known, tls_name="server.example")
        for wrong in (None, ClientTls(ca=shown[0]), *([ClientTls(ca=ca)] if mutual else [])):
            with pytest.raises(ServerError, match=f"no server answers at {address}"):
                health(address, tls=wrong)
        with pytest.raises(ServerError, match="no server answers at"):  # the certificate is not for that name
            health(address, tls=known, tls_name="other.example")
    with pytest.raises(ConfigError, match=r"the CA file .* cannot be read"):
        health(address, tls=ClientTls(ca=tmp_path / "absent.pem"))


def test_a_health_that_is_not_for_strangers(engine: Engine, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("")
    security = SecurityOptions(tokens=TokenOptions(file=tokens), health="predict")
    with (
        running_server(engine, ServeOptions(port=0, security=security)) as port,
        pytest.raises(AuthenticationError),
    ):
        health(f"127.0.0.1:{port}")


def test_a_probe_imports_no_arrays() -> None:
    program = "import sys, thoraxrt.server.probe; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
