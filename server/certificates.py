"""TLS: the server's certificate, replaced without a restart, and the certificates of its clients.

gRPC asks for the certificate at every new connection, so that a renewed one is used from the next
connection on and no call is dropped. A connection that is open keeps what it was made with, an
authority that was taken away since too, until the server has its client connect again: see
`grpc.max_connection_age_ms` in `serve`, or start the server again. Knows nothing of tokens and methods.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from thoraxrt.engine.errors import AuthenticationError, ConfigError
from thoraxrt.server.principal import Principal, Role
from thoraxrt.server.watched import Watched, read_file

__all__ = ["TlsOptions", "principal_from_certificate", "server_credentials"]

_KINDS: Final = ("subject", "dns", "uri", "email")
_ANY: Final = "*"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """Encryption, and with `client_ca` clients that must have a certificate of that authority.

    `certificate` is a PEM file with the server's certificate first and the intermediate ones after it, `private_key`
    the unencrypted key of the first. `clients` gives roles to client certificates: by the whole subject as RFC 4514
    writes it, a subject alternative name, or "*" for every certificate of that authority; the first that fits counts.
    A certificate that none fits opens the connection, but its client needs a token as well.

    Raises ValueError where a value makes no sense. Example:
        TlsOptions(
            certificate=Path("server.pem"),
            private_key=Path("server.key"),
            client_ca=Path("hospital-ca.pem"),
            clients={"dns:pacs.hospital.example": ("predict",), "subject:CN=ops,O=Hospital": ("admin",)},
        )
    """

    certificate: Path
    private_key: Path
    client_ca: Path | None = None
    clients: dict[str, tuple[Role, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clients and self.client_ca is None:
            raise ValueError("TlsOptions clients is set without client_ca; expected both, else no client shows one")
        for name, roles in self.clients.items():
            kind, _, value = name.partition(":")
            if name != _ANY and (kind not in _KINDS or not value):
                forms = ", ".join(f"{kind}:..." for kind in _KINDS)
                raise ValueError(f"TlsOptions clients has {name!r}; expected {forms} or {_ANY}")
            if not roles:
                raise ValueError(f"TlsOptions clients gives {name!r} no role; expected predict, admin or both")


def server_credentials(options: TlsOptions) -> grpc.ServerCredentials:
    """What `grpc.aio.Server.add_secure_port` takes; the files are looked at again at every connection.

    Raises ConfigError for a file that is missing, not PEM, expired or not valid yet, and for a key that is another
    certificate's or of a kind that gRPC's clients do not take. Of several authorities, one that is valid is enough. A
    later replacement with such a fault is logged and not used.
    """
    paths = [options.certificate, options.private_key, *([options.client_ca] if options.client_ca else [])]
    watched = Watched(paths, lambda: _configuration(options))
    given = watched.refresh()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC's threads."""
        nonlocal given
        latest = watched.refresh()
        if latest is given:
            return None
        given = latest
        return given

    fetcher: Any = changed  # typed as if it could not say "no change"
    return grpc.dynamic_ssl_server_credentials(given, fetcher, options.client_ca is not None)


def _configuration(options: TlsOptions) -> grpc.ServerCertificateConfiguration:
    chain_pem = read_file(options.certificate, "TLS certificate")
    key_pem = read_file(options.private_key, "TLS private key")
    chain = _certificates(chain_pem, options.certificate)
    _check_key(chain[0], key_pem, options)
    for certificate in chain:
        _check_dates(certificate, options.certificate)
    authorities = None
    if options.client_ca is not None:
        authorities = read_file(options.client_ca, "client certificate authority")
        _check_authorities(_certificates(authorities, options.client_ca), options.client_ca)
    _log.info("the TLS certificate %s is valid until %s", options.certificate, _date(chain[0].not_valid_after_utc))
    return grpc.ssl_server_certificate_configuration([(key_pem, chain_pem)], authorities)


def _certificates(pem: bytes, path: Path) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificate in PEM: expected -----BEGIN CERTIFICATE-----") from error


def _check_key(certificate: x509.Certificate, pem: bytes, options: TlsOptions) -> None:
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise ConfigError(
            f"the private key {options.private_key} is encrypted: "
            "`openssl pkey -in KEY -out PLAIN` takes the password off; keep it readable by the server only"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{options.private_key} holds no private key in PEM: expected a file as `openssl genpkey` writes it"
        ) from error
    elliptic = isinstance(key, EllipticCurvePrivateKey) and isinstance(key.curve, SECP256R1 | SECP384R1)
    if not elliptic and not isinstance(key, RSAPrivateKey):
        raise ConfigError(
            f"no gRPC client takes a certificate with a key like {options.private_key}: expected RSA, P-256 or P-384"
        )
    if key.public_key() != certificate.public_key():
        raise ConfigError(
            f"the private key {options.private_key} is not that of the first certificate in {options.certificate}: "
            "give the key it was issued for, and put the server's own certificate before the intermediate ones"
        )


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    subject, now = certificate.subject.rfc4514_string(), datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise ConfigError(
            f"{path}: the certificate of {subject!r} expired on {_date(certificate.not_valid_after_utc)}: renew it"
        )
    if now < certificate.not_valid_before_utc:
        raise ConfigError(
            f"{path}: the certificate of {subject!r} is valid from {_date(certificate.not_valid_before_utc)}, and now "
            f"it is {_date(now)}: correct the clock, or wait"
        )


def _check_authorities(authorities: Sequence[x509.Certificate], path: Path) -> None:
    """See that one is valid; where authorities change, the old one stays in the file until it expires, and beyond."""
    faults = []
    for certificate in authorities:
        try:
            _check_dates(certificate, path)
        except ConfigError as error:
            faults.append(error)
    if len(faults) == len(authorities):
        raise faults[0]
    for fault in faults:
        _log.warning("%s; whom it certified cannot connect", fault)


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


class _Identity(NamedTuple):
    """What a certificate calls its owner, as `TlsOptions.clients` writes it."""

    subject: str
    names: frozenset[str]
    expires: datetime


def principal_from_certificate(options: TlsOptions, auth_context: Mapping[str, Iterable[bytes]]) -> Principal | None:
    """Whose certificate opened this connection, by gRPC's `auth_context`; None where none did or none of `clients` fits.

    gRPC verified it when the connection was made. Raises AuthenticationError where it has expired since.
    """
    pem = next(iter(auth_context.get("x509_pem_cert", ())), None)
    if pem is None or not options.clients:
        return None
    identity = _identity(pem)
    if datetime.now(UTC) > identity.expires:
        raise AuthenticationError(
            f"the client certificate expired on {_date(identity.expires)}: connect again with a renewed one"
        )
    for name, roles in options.clients.items():
        if name == _ANY or name in identity.names:
            return Principal(identity.subject if name == _ANY else name, frozenset(roles), "certificate")
    return None


@lru_cache(maxsize=1024)  # parsing takes longer than the rest of a call's authentication
def _identity(pem: bytes) -> _Identity:
    certificate = x509.load_pem_x509_certificate(pem)
    subject = f"subject:{certificate.subject.rfc4514_string()}"
    names = {subject}
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        pass  # a subject is enough
    else:
        names |= {f"dns:{name}" for name in alternatives.get_values_for_type(x509.DNSName)}
        names |= {f"uri:{name}" for name in alternatives.get_values_for_type(x509.UniformResourceIdentifier)}
        names |= {f"email:{name}" for name in alternatives.get_values_for_type(x509.RFC822Name)}
    return _Identity(subject, frozenset(names), certificate.not_valid_after_utc)
