"""Strangers stay out: real servers and channels, certificates and keys made on the fly, a provider on loopback."""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from thoraxrt.cli import app
from thoraxrt.engine.errors import AccessError, AuthenticationError, ConfigError, RequestError
from thoraxrt.server import security, watched
from thoraxrt.server.audit import AuditLog, AuditOptions
from thoraxrt.server.calls import Calls, client_of
from thoraxrt.server.certificates import TlsOptions, principal_from_certificate, server_credentials
from thoraxrt.server.oidc import Oidc, OidcOptions
from thoraxrt.server.principal import Principal, Role, current_principal
from thoraxrt.server.security import (
    AccessInterceptor,
    Authenticator,
    SecurityOptions,
    check_exposure,
    is_loopback,
    required_role,
)
from thoraxrt.server.status import ERROR_KEY
from thoraxrt.server.telemetry import NullTelemetry
from thoraxrt.server.tokens import TokenOptions, Tokens, add_token

PREDICT = "/thoraxrt.v1.PredictionService/Predict"
STREAM = "/thoraxrt.v1.PredictionService/PredictStream"
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"
LIVE = "/inference.GRPCInferenceService/ServerLive"

DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Certified:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    def write(self, folder: Path, name: str = "server") -> tuple[Path, Path]:
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        key.write_bytes(self.key_pem)
        certificate.write_bytes(self.pem)
        return certificate, key


def certify(name: str, issuer: Certified | None = None, *, days: tuple[float, float] = (-1, 1)) -> Certified:
    """A certificate for 127.0.0.1, of an issuer or, as an authority, of its own."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = [
        x509.DNSName(f"{name}.example"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.UniformResourceIdentifier(f"spiffe://hospital/{name}"),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer.key if issuer else key, hashes.SHA256())
    )
    return Certified(certificate, key)


@pytest.fixture(scope="module")
def authority() -> Certified:
    return certify("authority")


def tls_options(folder: Path, authority: Certified, clients: dict[str, tuple[Role, ...]] | None = None) -> TlsOptions:
    certificate, key = certify("server", authority).write(folder)
    if clients is None:
        return TlsOptions(certificate=certificate, private_key=key)
    (folder / "ca.pem").write_bytes(authority.pem)
    return TlsOptions(certificate=certificate, private_key=key, client_ca=folder / "ca.pem", clients=clients)


class Service:
    """Handlers of all four kinds under real method names; each answers with its caller's name."""

    def __init__(self) -> None:
        self.entered = 0

    async def unary(self, request: bytes, context: Any) -> bytes:
        self.entered += 1
        await asyncio.sleep(0.002)
        return current_principal.get().name.encode()

    async def stream(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        self.entered += 1
        async for _ in requests:
            yield current_principal.get().name.encode()

    async def stream_unary(self, requests: Any, context: Any) -> bytes:
        return [await self.unary(request, context) async for request in requests][-1]

    async def unary_stream(self, request: bytes, context: Any) -> None:
        await context.write(await self.unary(request, context))

    def handlers(self) -> tuple[Any, ...]:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        services: dict[str, dict[str, Any]] = {
            "thoraxrt.v1.PredictionService": {
                "Predict": unary(self.unary),
                "PredictStream": stream(self.stream),
                "PredictStudy": grpc.stream_unary_rpc_method_handler(self.stream_unary),
                "GetModel": grpc.unary_stream_rpc_method_handler(self.unary_stream),
            },
            "inference.GRPCInferenceService": {
                "RepositoryModelLoad": unary(self.unary),
                "ServerLive": unary(self.unary),
            },
        }
        return tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in services.items())


class Server:
    def __init__(self, port: int, service: Service) -> None:
        self.port, self.service = port, service

    @asynccontextmanager
    async def channel(self, authority: Certified | None = None, client: Certified | None = None) -> AsyncIterator[Any]:
        """A connection of its own, with TLS where an authority is given."""
        address, options = f"127.0.0.1:{self.port}", [("grpc.use_local_subchannel_pool", 1)]
        if authority is None:
            channel = grpc.aio.insecure_channel(address, options)
        else:
            shown = (client.key_pem, client.pem) if client else (None, None)
            channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authority.pem, *shown), options)
        async with channel:
            yield channel

    async def call(
        self,
        token: str | None = None,
        method: str = PREDICT,
        authority: Certified | None = None,
        client: Certified | None = None,
    ) -> str | grpc.StatusCode:
        """The caller's name as the handler saw it, or the status's code."""
        metadata = [("authorization", f"Bearer {token}")] if token else []
        async with self.channel(authority, client) as channel:
            try:
                return str((await channel.unary_unary(method)(b"x", metadata=metadata, timeout=5)).decode())
            except grpc.aio.AioRpcError as error:
                return error.code()


@asynccontextmanager
async def serving(options: SecurityOptions, audit: AuditLog | None = None) -> AsyncIterator[Server]:
    authenticator, service = Authenticator(options), Service()
    await authenticator.start()
    server = grpc.aio.server(interceptors=[Calls(NullTelemetry()), AccessInterceptor(authenticator, options, audit)])
    server.add_generic_rpc_handlers(service.handlers())
    if options.tls:
        port = server.add_secure_port("127.0.0.1:0", server_credentials(options.tls))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Server(port, service)
    finally:
        await server.stop(0)


# TLS


def test_tls_and_who_is_not_the_authority(tmp_path: Path, authority: Certified) -> None:
    async def check() -> None:
        async with serving(SecurityOptions(tls=tls_options(tmp_path, authority))) as server:
            assert await server.call(authority=authority) == "anonymous"
            assert await server.call(authority=certify("other")) is grpc.StatusCode.UNAVAILABLE
            assert await server.call() is grpc.StatusCode.UNAVAILABLE  # no TLS

    asyncio.run(check())


def test_client_certificates(tmp_path: Path, authority: Certified) -> None:
    clients: dict[str, tuple[Role, ...]] = {
        "dns:pacs.example": ("predict",),
        "uri:spiffe://hospital/pipeline": ("predict",),
        "subject:CN=ops": ("admin",),
    }

    async def check() -> None:
        async with serving(SecurityOptions(tls=tls_options(tmp_path, authority, clients))) as server:

            async def call(client: Certified | None, method: str = PREDICT) -> str | grpc.StatusCode:
                return await server.call(method=method, authority=authority, client=client)

            pacs, ops = certify("pacs", authority), certify("ops", authority)
            assert await call(pacs) == "dns:pacs.example"
            assert await call(pacs, LOAD) is DENIED
            assert await call(certify("pipeline", authority)) == "uri:spiffe://hospital/pipeline"
            assert await call(ops) is DENIED
            assert await call(ops, LOAD) == "subject:CN=ops"
            assert await call(certify("guest", authority)) is UNKNOWN  # connects, and is nobody
            entered = server.service.entered
            for stranger in (None, certify("pacs", certify("authority")), certify("pacs", authority, days=(-2, -1))):
                assert await call(stranger) is grpc.StatusCode.UNAVAILABLE
            assert server.service.entered == entered

    asyncio.run(check())


def test_every_certificate_of_an_authority(tmp_path: Path, authority: Certified) -> None:
    options = SecurityOptions(tls=tls_options(tmp_path, authority, {"dns:ops.example": ("admin",), "*": ("predict",)}))

    async def check() -> None:
        async with serving(options) as server:
            guest = certify("guest", authority)
            assert await server.call(authority=authority, client=guest) == "subject:CN=guest"
            assert await server.call(authority=authority, client=certify("ops", authority)) is DENIED

    asyncio.run(check())


def test_a_certificate_that_expires_while_connected(tmp_path: Path, authority: Certified) -> None:
    options = tls_options(tmp_path, authority, {"*": ("predict",)})
    with pytest.raises(AuthenticationError, match="expired on"):
        principal_from_certificate(options, {"x509_pem_cert": [certify("pacs", authority, days=(-2, -1)).pem]})


def test_a_renewed_certificate_is_used_and_no_call_fails(
    tmp_path: Path, authority: Certified, caplog: pytest.LogCaptureFixture
) -> None:
    """Under load: calls on old connections, new connections all the time, bad replacements in between."""
    caplog.set_level(logging.INFO)
    new_authority = certify("new authority")
    options = tls_options(tmp_path, authority)

    async def check() -> None:
        async with serving(SecurityOptions(tls=options)) as server:
            answers: list[str | grpc.StatusCode] = []
            trusted = Certified(authority.certificate, authority.key)
            ended = asyncio.Event()

            async def keep_calling() -> None:
                async with server.channel(authority) as channel:
                    call = channel.unary_unary(PREDICT)
                    while not ended.is_set():
                        answers.append((await call(b"x", timeout=5)).decode())

            async def keep_connecting() -> None:
                while not ended.is_set():
                    answers.append(await server.call(authority=trusted))

            async with asyncio.TaskGroup() as clients:
                for client in (keep_calling, keep_calling, keep_connecting, keep_connecting):
                    clients.create_task(client())
                for _ in range(3):
                    certify("server", authority).write(tmp_path)  # two files: a new connection may come between
                    await asyncio.sleep(0.05)
                options.certificate.write_bytes(b"half a certi")
                await asyncio.sleep(0.1)
                options.certificate.unlink()
                await asyncio.sleep(0.1)
                ended.set()
            assert set(answers) == {"anonymous"}
            assert len(answers) > 50
            certify("server", new_authority).write(tmp_path)
            assert await server.call(authority=new_authority) == "anonymous"  # at once
            assert await server.call(authority=authority) is grpc.StatusCode.UNAVAILABLE

    asyncio.run(check())
    assert "what it held before stays in force" in caplog.text
    assert "PRIVATE KEY" not in caplog.text


def test_a_replaced_client_authority_counts_for_new_connections(tmp_path: Path, authority: Certified) -> None:
    async def check() -> None:
        async with serving(SecurityOptions(tls=tls_options(tmp_path, authority, {"*": ("predict",)}))) as server:
            old, new_authority = certify("old", authority), certify("new authority")
            async with server.channel(authority, old) as channel:
                call = channel.unary_unary(PREDICT)
                await call(b"x")
                (tmp_path / "ca.pem").write_bytes(new_authority.pem)
                new = certify("new", new_authority)
                assert await server.call(authority=authority, client=new) == "subject:CN=new"
                assert await server.call(authority=authority, client=old) is grpc.StatusCode.UNAVAILABLE
                await call(b"x")  # the connection stays

    asyncio.run(check())


def test_an_authority_that_expired_beside_a_valid_one(
    tmp_path: Path, authority: Certified, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the file that a change of authorities is made with."""
    options, old = tls_options(tmp_path, authority, {"*": ("predict",)}), certify("old", days=(-2, -1))
    (tmp_path / "ca.pem").write_bytes(old.pem + authority.pem)

    async def check() -> None:
        async with serving(SecurityOptions(tls=options)) as server:
            pacs = certify("pacs", authority)
            assert await server.call(authority=authority, client=pacs) == "subject:CN=pacs"
            of_old = certify("pacs", old)
            assert await server.call(authority=authority, client=of_old) is grpc.StatusCode.UNAVAILABLE

    asyncio.run(check())
    assert "the certificate of 'CN=old' expired on" in caplog.text
    (tmp_path / "ca.pem").write_bytes(old.pem)
    with pytest.raises(ConfigError, match="'CN=old' expired on"):
        server_credentials(options)


def unusual_key(folder: Path, authority: Certified) -> None:
    """Ed25519: gRPC's clients offer no such signature, as tried with grpcio 1.85."""
    key = ed25519.Ed25519PrivateKey.generate()
    (folder / "server.key").write_bytes(
        key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def encrypted_key(folder: Path, authority: Certified) -> None:
    key = certify("server", authority).key
    secret = serialization.BestAvailableEncryption(b"secret")
    (folder / "server.key").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, secret))


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda folder, _: (folder / "server.pem").unlink(), "server.pem cannot be read: No such file"),
    "not PEM": (lambda folder, _: (folder / "server.pem").write_bytes(b"\x30\x82"), "server.pem holds no certificate"),
    "key not PEM": (lambda folder, _: (folder / "server.key").write_bytes(b"key"), "server.key holds no private key"),
    "other key": (lambda folder, ca: (folder / "server.key").write_bytes(ca.key_pem), "is not that of the first"),
    "encrypted": (encrypted_key, "server.key is encrypted"),
    "unusual": (unusual_key, "expected RSA, P-256 or P-384"),
    "expired": (lambda folder, ca: certify("server", ca, days=(-2, -1)).write(folder), "'CN=server' expired on"),
    "not yet": (lambda folder, ca: certify("server", ca, days=(1, 2)).write(folder), "is valid from"),
    "authority": (lambda folder, _: (folder / "ca.pem").write_bytes(b""), "ca.pem holds no certificate"),
    "folder": (lambda folder, _: ((folder / "ca.pem").unlink(), (folder / "ca.pem").mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used(tmp_path: Path, authority: Certified, fault: str) -> None:
    options = tls_options(tmp_path, authority, {"*": ("predict",)})
    server_credentials(options)
    spoil, message = FAULTS[fault]
    spoil(tmp_path, authority)
    with pytest.raises(ConfigError, match=message) as raised:
        server_credentials(options)
    assert "PRIVATE KEY-----\n" not in str(raised.value)


def test_a_key_that_the_server_may_not_read(tmp_path: Path, authority: Certified) -> None:
    options = tls_options(tmp_path, authority)
    options.private_key.chmod(0)
    script = (
        "import os, sys; from pathlib import Path; from thoraxrt.server.certificates import *\n"
        "options = TlsOptions(certificate=Path('server.pem'), private_key=Path('server.key'))\n"
        "os.getuid() or os.setuid(65534)\nserver_credentials(options)"
    )
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "ConfigError: the TLS private key server.key cannot be read: Permission denied" in done.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clients": {"*": ("predict",)}}, "client_ca"),
        ({"client_ca": Path("ca"), "clients": {"pacs": ("predict",)}}, "subject:..., dns:..."),
        ({"client_ca": Path("ca"), "clients": {"dns:": ("predict",)}}, "'dns:'"),
        ({"client_ca": Path("ca"), "clients": {"*": ()}}, "no role"),
    ],
)
def test_tls_options_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TlsOptions(certificate=Path("a"), private_key=Path("b"), **values)


def test_an_authority_without_roles_makes_no_sense() -> None:
    tls = TlsOptions(certificate=Path("a"), private_key=Path("b"), client_ca=Path("c"))
    with pytest.raises(ValueError, match="gives nobody a role"):
        SecurityOptions(tls=tls)
    assert SecurityOptions(tls=tls, tokens=TokenOptions(file=Path("tokens"))).authenticates


# Tokens


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def test_tokens(token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    pacs, ops = add_token(token_file, "pacs", ("predict",)), add_token(token_file, 'the "ops"', ("admin", "predict"))
    old = add_token(token_file, "old", ("predict",), datetime(2999, 12, 31, tzinfo=UTC))
    token_file.write_text(token_file.read_text().replace("2999-", "2025-"))
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert pacs.rpartition("_")[2] not in token_file.read_text()
    identifier = pacs.split("_")[1]
    wrong = [
        *(
            None,
            old,
            pacs[:-1],
            pacs + "x",
            pacs.upper(),
            "thoraxrt_",
            "thoraxrt__",
            "x",
            pacs.removeprefix("thoraxrt_"),
        ),
        *(f"thoraxrt_{identifier}_", f"thoraxrt_{ops.split('_')[1]}_{pacs.split('_', 2)[2]}"),
    ]

    async def check() -> None:
        async with serving(SecurityOptions(tokens=TokenOptions(file=token_file))) as server:
            assert await server.call(pacs) == "pacs"
            assert await server.call(pacs, LOAD) is DENIED
            assert await server.call(ops, LOAD) == 'the "ops"'
            assert await server.call(method=LIVE) == "anonymous"  # health is open
            entered = server.service.entered
            for token in wrong:
                assert await server.call(token) is UNKNOWN, token
            assert server.service.entered == entered

    asyncio.run(check())
    secrets = [token.split("_", 2)[2] for token in (pacs, ops, old)]
    assert "refused" in caplog.text
    assert not any(secret in caplog.text for secret in secrets)


@pytest.mark.parametrize("peer", [True, False])
def test_where_a_refused_call_came_from_is_logged_where_addresses_may_be(
    token_file: Path, caplog: pytest.LogCaptureFixture, peer: bool
) -> None:
    pacs = add_token(token_file, "pacs", ("predict",))

    async def check() -> None:
        with AuditLog(AuditOptions(path=token_file.parent / "audit.jsonl", peer=peer)) as audit:
            async with serving(SecurityOptions(tokens=TokenOptions(file=token_file)), audit) as server:
                assert await server.call(pacs + "x") is UNKNOWN
                assert await server.call(pacs, LOAD) is DENIED

    asyncio.run(check())
    refused = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(refused) == 2
    assert ["from ipv4:127.0.0.1: " in line for line in refused] == [peer, peer]
    assert ["127.0.0.1" in line for line in refused] == [peer, peer]


def test_a_revoked_token_is_refused_and_a_broken_file_changes_nothing(
    token_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "_EVERY_S", 0.1)  # for a quicker test
    pacs, ops = add_token(token_file, "pacs", ("predict",)), add_token(token_file, "ops", ("predict",))
    both = token_file.read_text()

    async def check() -> None:
        async with serving(SecurityOptions(tokens=TokenOptions(file=token_file))) as server:

            async def after(text: str | None) -> list[str | grpc.StatusCode]:
                if text is None:
                    token_file.unlink()
                else:
                    token_file.write_text(text)
                await asyncio.sleep(0.15)
                return [await server.call(token) for token in (pacs, ops)]

            assert await after("[[token") == ["pacs", "ops"]
            assert await after(None) == ["pacs", "ops"]
            assert await after(both[: both.index("[[token]]", 5)]) == ["pacs", UNKNOWN]
            assert await after("") == [UNKNOWN, UNKNOWN]
            new = add_token(token_file, "new", ("predict",))
            await asyncio.sleep(0.15)
            assert await server.call(new) == "new"

    asyncio.run(check())
    assert caplog.text.count("stays in force") == 2


def test_an_open_stream_of_a_revoked_token_gets_no_further_answer(
    token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "_EVERY_S", 0.1)  # for a quicker test
    monkeypatch.setattr(security, "_AGAIN_S", 0.1)
    metadata = [("authorization", f"Bearer {add_token(token_file, 'pacs', ('predict',))}")]

    async def check() -> None:
        async with (
            serving(SecurityOptions(tokens=TokenOptions(file=token_file))) as server,
            server.channel() as channel,
        ):
            stream = channel.stream_stream(STREAM)(metadata=metadata, timeout=10)
            for _ in range(2):
                await stream.write(b"x")
                assert await stream.read() == b"pacs"
                await asyncio.sleep(0.15)
            token_file.write_text("")
            await stream.write(b"x")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stream.read()
            assert raised.value.code() is UNKNOWN

    asyncio.run(check())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[token", "makes no sense"),
        ('[[token]]\nname = "a"\nid = "1"\nroles = ["root"]\nsha256 = "00"', "makes no sense"),
        (f'[[token]]\nname = "a"\nid = "1"\nroles = []\nsha256 = "{"0" * 64}"', "makes no sense"),
        (f'[[token]]\nname = "a"\nid = "1"\nroles = ["admin"]\nsha256 = "{"0" * 64}"\n' * 2, "more than once"),
        ('token = "secret"', "makes no sense"),
    ],
)
def test_token_files_that_make_no_sense(token_file: Path, text: str, message: str) -> None:
    token_file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Authenticator(SecurityOptions(tokens=TokenOptions(file=token_file)))
    with pytest.raises(ConfigError, match=message):
        add_token(token_file, "pacs", ("predict",))
    assert token_file.read_text() == text


def test_a_token_from_the_command_line_ends_when_it_says(token_file: Path) -> None:
    def made(*options: str) -> str:
        result = CliRunner().invoke(app, ["token", str(token_file), "pacs", *options])
        assert result.exit_code == 0, result.output
        return result.stdout.strip()

    day = datetime.now(UTC).date() + timedelta(days=2)
    good, over = made("--expires", str(day)), made("--expires", "2999-12-31")
    token_file.write_text(token_file.read_text().replace("2999-", "2025-"))

    async def check() -> None:
        tokens = Tokens(TokenOptions(file=token_file))
        assert (await tokens.principal(good)).name == "pacs"
        with pytest.raises(AuthenticationError, match=r"expired on 2025-12-31T00:00:00\+00:00"):
            await tokens.principal(over)

    asyncio.run(check())


def test_a_token_file_that_anybody_may_write(token_file: Path) -> None:
    add_token(token_file, "pacs", ("predict",))
    token_file.chmod(0o666)
    with pytest.raises(ConfigError, match="anybody may write"):
        Authenticator(SecurityOptions(tokens=TokenOptions(file=token_file)))


def test_tokens_that_cannot_be_made(token_file: Path) -> None:
    for name, roles in (("", ("predict",)), ("a\nb", ("predict",)), ("a", ()), ("a", ("root",))):
        with pytest.raises(RequestError):
            add_token(token_file, name, roles)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="time zone"):
        add_token(token_file, "a", ("predict",), datetime(2030, 1, 1))
    with pytest.raises(RequestError, match=r"2025-11-24T00:00:00\+00:00, which has passed"):
        add_token(token_file, "a", ("predict",), datetime(2025, 11, 24, tzinfo=UTC))
    with pytest.raises(RequestError, match="cannot be written"):
        add_token(token_file / "missing", "a", ("predict",))
    assert not token_file.exists()


@given(name=st.text(min_size=1).filter(str.isprintable))
def test_any_printable_name_is_read_back(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "named.toml"
    file.unlink(missing_ok=True)
    token = add_token(file, name, ("predict",))
    authenticator = Authenticator(SecurityOptions(tokens=TokenOptions(file=file)))
    assert asyncio.run(authenticator.authenticate([("authorization", f"bearer {token}")], {})).name == name


# Every kind of method


def test_every_kind_of_method_is_refused_before_its_handler_and_its_body(token_file: Path) -> None:
    token = add_token(token_file, "pacs", ("predict",))
    right = [("authorization", f"Bearer {token}")]

    async def check() -> None:
        async with (
            serving(SecurityOptions(tokens=TokenOptions(file=token_file))) as server,
            server.channel() as channel,
        ):
            study, model = PREDICT + "Study", "/thoraxrt.v1.PredictionService/GetModel"
            calls = {
                "unary": lambda metadata: channel.unary_unary(PREDICT)(b"x", metadata=metadata),
                "stream": lambda metadata: channel.stream_stream(STREAM)(iter([b"x"]), metadata=metadata).read(),
                "stream_unary": lambda metadata: channel.stream_unary(study)(iter([b"x"]), metadata=metadata),
                "unary_stream": lambda metadata: channel.unary_stream(model)(b"x", metadata=metadata).read(),
            }
            for kind, call in calls.items():
                for metadata in ([], [("authorization", "Bearer x")], right + right, [("authorization", token)]):
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await call(metadata)
                    assert raised.value.code() is UNKNOWN, kind
                    trailing: Any = raised.value.trailing_metadata()
                    assert trailing[ERROR_KEY] == "AuthenticationError"
            assert server.service.entered == 0
            for call in calls.values():
                assert await call(right) == b"pacs"

            endless = channel.stream_stream(PREDICT)(metadata=[])  # a unary call whose body never comes
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await asyncio.wait_for(endless.read(), 5)
            assert raised.value.code() is UNKNOWN
            nothing = channel.stream_unary(PREDICT)(iter([]), metadata=right)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await nothing
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(check())


def test_callers_of_one_name_have_shares_of_their_own_where_it_was_proved_otherwise() -> None:
    def share(principal: Principal) -> str:
        current_principal.set(principal)
        return client_of(None)

    callers = [Principal("pacs", frozenset({"predict"}), via) for via in ("token", "oidc", "certificate")]
    assert len({copy_context().run(share, caller) for caller in callers}) == 3


def test_roles_of_methods() -> None:
    options = SecurityOptions(health="predict", reflection="open")
    roles = {
        PREDICT: "predict",
        "/inference.GRPCInferenceService/ModelInfer": "predict",
        "/inference.GRPCInferenceService/RepositoryModelUnload": "admin",
        "/inference.GRPCInferenceService/SystemSharedMemoryRegister": "admin",
        "/grpc.health.v1.Health/Watch": "predict",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": "open",
        "/other.Service/Method": "admin",
    }
    assert {method: required_role(method, options) for method in roles} == roles


def test_every_method_that_is_served_has_a_role() -> None:
    """One that is added and forgotten here would be an administrator's."""
    from thoraxrt.proto.oip import open_inference_pb2
    from thoraxrt.proto.v1 import thoraxrt_pb2

    services = [
        thoraxrt_pb2.DESCRIPTOR.services_by_name["PredictionService"],
        open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    ]
    methods = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    admins = {method for method in methods if required_role(method, SecurityOptions()) == "admin"}
    assert {method.rpartition("/")[2] for method in admins} == {"RepositoryModelLoad", "RepositoryModelUnload"}


def test_a_fault_in_authentication_lets_nobody_in(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fault(*_: object) -> Principal:
        raise KeyError("secret")

    async def check() -> None:
        async with serving(options) as server:
            assert await server.call(token) is grpc.StatusCode.INTERNAL
            assert server.service.entered == 0

    token = add_token(token_file, "pacs", ("predict",))
    options = SecurityOptions(tokens=TokenOptions(file=token_file))
    monkeypatch.setattr(Authenticator, "authenticate", fault)
    asyncio.run(check())


# OpenID Connect


class Provider:
    """An OpenID Connect provider on loopback: its keys, its tokens, and its faults."""

    def __init__(self) -> None:
        self.keys: dict[str, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey] = {}
        self.extra: list[dict[str, Any]] = []
        self.mode = "good"
        self.fetches = 0
        self.gate = threading.Event()
        self.gate.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.fetches += 1
                assert provider.gate.wait(10)
                body = {"good": json.dumps(provider.jwks()).encode(), "garbage": b"<html>"}.get(provider.mode, b"")
                self.send_response(500 if provider.mode == "error" else 200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Silence."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"

    def add(self, kid: str, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | None = None) -> None:
        self.keys[kid] = key or ec.generate_private_key(ec.SECP256R1())

    def jwks(self) -> dict[str, Any]:
        keys = []
        for kid, key in self.keys.items():
            algorithm: Any = (
                jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
            )
            keys.append(algorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": kid, "use": "sig"})
        return {"keys": keys + self.extra}

    def token(self, kid: str = "a", *, key: Any = None, algorithm: str | None = None, **claims: Any) -> str:
        now, key = int(time.time()), key or self.keys[kid]
        algorithm = algorithm or ("RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256")
        payload = {"iss": "https://id", "aud": "thoraxrt", "sub": "dr", "exp": now + 60, "roles": ["predict"]} | claims
        kept = {name: value for name, value in payload.items() if value is not None}
        return jwt.encode(kept, key, algorithm, headers={"kid": kid})


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    provider.add("a")
    thread = threading.Thread(target=provider.server.serve_forever, args=(0.01,))
    thread.start()
    yield provider
    provider.gate.set()
    provider.server.shutdown()
    thread.join()
    provider.server.server_close()


def oidc_options(provider: Provider, **values: Any) -> OidcOptions:
    return OidcOptions(issuer="https://id", audience="thoraxrt", jwks_url=provider.url, **values)


def outcome(oidc: Oidc, token: str) -> Principal | str:
    async def ask() -> Principal | str:
        try:
            return await oidc.principal(token)
        except AuthenticationError as error:
            return str(error)

    return asyncio.run(ask())


def test_tokens_of_a_provider_and_static_ones_side_by_side(provider: Provider, token_file: Path) -> None:
    pacs = add_token(token_file, "pacs", ("predict",))
    options = SecurityOptions(oidc=oidc_options(provider), tokens=TokenOptions(file=token_file))
    provider.add("r", rsa.generate_private_key(65537, 2048))

    async def check() -> None:
        async with serving(options) as server:
            assert await server.call(pacs) == "pacs"
            for kid in ("a", "r"):
                assert await server.call(provider.token(kid)) == "dr"
                assert await server.call(provider.token(kid), LOAD) is DENIED
            assert await server.call(provider.token(roles=["admin"]), LOAD) == "dr"
            assert await server.call(provider.token(exp=0)) is UNKNOWN
            assert await server.call() is UNKNOWN
            assert provider.fetches == 1

    asyncio.run(check())


def test_tokens_that_are_refused(provider: Provider) -> None:
    provider.extra = [{"kty": "oct", "kid": "oct", "alg": "HS256", "k": base64.urlsafe_b64encode(b"k" * 32).decode()}]
    weak = rsa.generate_private_key(65537, 1024)
    provider.add("weak", weak)
    oidc, good = Oidc(oidc_options(provider)), provider.token()
    public = provider.keys["a"].public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        weakly_signed = provider.token("weak", key=weak)
    head, body, _ = good.split(".")

    def encoded(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    def confused(algorithm: str, key: bytes) -> str:
        """Signed with the public key as if that were a password; PyJWT itself would refuse to make it."""
        signed = f"{encoded({'alg': algorithm, 'kid': 'a'})}.{body}"
        return f"{signed}.{base64.urlsafe_b64encode(hmac.digest(key, signed.encode(), 'sha256')).rstrip(b'=').decode()}"

    refused = {
        "expired": (provider.token(exp=int(time.time()) - 31), "it has expired"),
        "not yet valid": (provider.token(nbf=int(time.time()) + 60), "not valid yet"),
        "audience": (provider.token(aud="other"), "another audience"),
        "issuer": (provider.token(iss="https://id.evil"), "another issuer"),
        "no expiry": (provider.token(exp=None), "lacks a claim"),
        "no audience": (provider.token(aud=None), "lacks a claim"),
        "no issuer": (provider.token(iss=None), "lacks a claim"),
        "no name": (provider.token(sub=None), "lacks a claim"),
        "no text": (provider.token(sub="a\ud800"), "lacks a claim"),
        "line": (provider.token(sub="a\nb"), "lacks a claim"),
        "other key": (provider.token(key=ec.generate_private_key(ec.SECP256R1())), "no JWT that the provider signed"),
        "unknown key": (provider.token("b", key=provider.keys["a"]), "no JWT that the provider signed"),
        "none": (f"{encoded({'alg': 'none', 'kid': 'a'})}.{body}.", "no JWT that the provider signed"),
        "none, signed": (f"{encoded({'alg': 'none', 'kid': 'a'})}.{good.partition('.')[2]}", "no JWT"),
        "HS256 with the public key": (confused("HS256", public), "no JWT that the provider signed"),
        "HS256 under another name": (confused("ES256", public), "no JWT that the provider signed"),
        "symmetric key of the set": (provider.token("oct", key="k" * 32, algorithm="HS256"), "no JWT"),
        "weak key": (weakly_signed, "no JWT that the provider signed"),
        "no kid": (f"{encoded({'alg': 'ES256'})}.{body}.{good.split('.')[2]}", "no JWT"),
        "changed": (f"{head}.{encoded({'sub': 'root'})}.{good.split('.')[2]}", "no JWT"),
        "cut": (good[:-2], "no JWT"),
        "no JWT": ("a.b.c", "no JWT"),
    }
    assert isinstance(outcome(oidc, good), Principal)
    for name, (token, reason) in refused.items():
        said = outcome(oidc, token)
        assert isinstance(said, str), name
        assert reason in said, name
        assert token not in said


@given(token=st.text() | st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode()) | st.just("."))
def test_no_token_is_a_fault(token: str) -> None:
    options = OidcOptions(issuer="a", audience="b", jwks_url="https://127.0.0.1:1/")
    authenticator = Authenticator(SecurityOptions(oidc=options))

    async def ask() -> None:
        for value in (token, f"Bearer {token}", f"Bearer {token}.{token}.{token}"):
            with pytest.raises(AccessError):
                await authenticator.authenticate([("authorization", value)], {})

    logging.disable()
    try:
        asyncio.run(ask())
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("claims", "path", "roles"),
    [
        ({"roles": ["predict", "admin"]}, "roles", {"predict", "admin"}),
        ({"scope": "openid predict"}, "scope", {"predict"}),
        ({"realm_access": {"roles": ["predict"]}}, "realm_access.roles", {"predict"}),
        ({"https://hospital.example/roles": ["admin"]}, "https://hospital.example/roles", {"admin"}),
        ({"roles": ["radiologist", 1, ["predict"], {}]}, "roles", set()),
        ({"roles": {"predict": True}}, "roles", set()),
        ({"roles": None}, "roles", set()),
        ({"realm_access": "roles"}, "realm_access.roles", set()),
    ],
)
def test_roles_of_a_claim(provider: Provider, claims: dict[str, Any], path: str, roles: set[str]) -> None:
    said = outcome(Oidc(oidc_options(provider, roles_claim=path)), provider.token(**{"roles": None} | claims))
    assert said == Principal("dr", frozenset(roles), "oidc")  # type: ignore[arg-type]


def test_names_of_the_provider_for_our_roles(provider: Provider) -> None:
    oidc = Oidc(oidc_options(provider, roles={"ai-users": "predict"}, name_claim="email"))
    said = outcome(oidc, provider.token(roles=["ai-users", "admin"], email="dr@hospital.example"))
    assert said == Principal("dr@hospital.example", frozenset({"predict"}), "oidc")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rotated_keys_and_a_provider_that_fails(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        clock = Clock()
        oidc = Oidc(oidc_options(provider), clock)

        async def accepted(token: str) -> bool:
            try:
                await oidc.principal(token)
            except AuthenticationError:
                return False
            return True

        old = provider.token()
        assert await accepted(old)
        del provider.keys["a"]
        provider.add("b")
        new = provider.token("b")
        assert not await accepted(new)  # fetched just now: strangers cannot have it fetched again and again
        assert provider.fetches == 1
        clock.now += 10
        assert await accepted(new)  # a key that is not there is looked for
        assert not await accepted(old)  # and one that was taken away is gone
        for mode in ("error", "garbage", "empty"):
            provider.mode = mode
            clock.now += 301
            assert await accepted(new)  # the known keys stay good
            await asyncio.sleep(0.05)  # while the fetch, in the background, fails
            assert not await accepted(provider.token("c", key=provider.keys["b"]))
        clock.now += 3600
        assert not await accepted(new)  # but not for ever
        provider.mode = "good"
        assert not await accepted(new)  # not so soon
        clock.now += 10
        assert await accepted(new)

    asyncio.run(check())
    assert caplog.text.count("no keys from") >= 4


def test_a_provider_that_cannot_be_reached_lets_nobody_in() -> None:
    oidc = Oidc(OidcOptions(issuer="https://id", audience="thoraxrt", jwks_url="http://127.0.0.1:1/jwks"))
    provider = Provider()
    provider.add("a")
    assert "no JWT" in str(outcome(oidc, provider.token()))
    provider.server.server_close()


def test_a_slow_provider_holds_up_nobody_else(provider: Provider) -> None:
    """One fetch for all who wait; a caller that gives up leaves it to the others; the loop goes on."""

    async def check() -> None:
        oidc = Oidc(oidc_options(provider))
        provider.gate.clear()
        waiting = [asyncio.create_task(oidc.principal(provider.token())) for _ in range(20)]
        began = time.perf_counter()
        await asyncio.sleep(0.05)
        assert time.perf_counter() - began < 0.5
        waiting[0].cancel()
        await asyncio.sleep(0)
        provider.gate.set()
        said = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(said[0], asyncio.CancelledError)
        assert all(isinstance(answer, Principal) for answer in said[1:])
        assert provider.fetches == 1

    asyncio.run(check())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"jwks_url": "http://id.hospital.example/jwks"}, "https://"),
        ({"jwks_url": "file:///etc/passwd"}, "https://"),
        ({"audience": ""}, "audience is empty"),
        ({"roles": {}}, "roles is empty"),
    ],
)
def test_oidc_options_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"issuer": "https://id", "audience": "thoraxrt", "jwks_url": "https://id/jwks"}
    with pytest.raises(ValueError, match=message):
        OidcOptions(**good | values)


# Where strangers are


def test_a_server_that_asks_nobody() -> None:
    async def check() -> None:
        async with serving(SecurityOptions()) as server:
            assert await server.call() == "anonymous"
            assert await server.call("whatever", LOAD) == "anonymous"

    asyncio.run(check())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "server.example"])
def test_beyond_loopback(host: str, caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(host, True, False, authenticates=True)
    assert not caplog.records
    with pytest.raises(RequestError, match=r"tls\.certificate.*--insecure"):
        check_exposure(host, False, False, authenticates=True)
    with pytest.raises(RequestError, match=r"anybody could call it.*--insecure"):
        check_exposure(host, True, False, authenticates=False)
    check_exposure(host, False, True, authenticates=False)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, False, False, authenticates=False)
