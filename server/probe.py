"""Whether a server is ready, asked as `grpc.health.v1`, and how a client's connection is encrypted.

Imports little: a service manager asks every few seconds, each time by a new process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from thoraxrt.engine.errors import ServerError
from thoraxrt.server.status import error_from_status
from thoraxrt.server.watched import read_file

__all__ = ["ClientTls", "health"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """How the connection is encrypted, and what the client shows of itself; PEM files.

    `ca` holds the certificates that may vouch for the server; without it, gRPC's own list of public authorities.
    `certificate` and `private_key` are for a server that asks for a certificate.

    Raises ValueError for one of the two without the other. Example: `ClientTls(ca=Path("ca.pem"))`.
    """

    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("ClientTls certificate and private_key go together; expected both, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC makes of the files. Raises ConfigError where one cannot be read."""
        named = ((self.ca, "CA file"), (self.private_key, "private key"), (self.certificate, "certificate"))
        return grpc.ssl_channel_credentials(*(read_file(path, what) if path else None for path, what in named))


def health(
    address: str, *, service: str = "", tls: ClientTls | None = None, tls_name: str | None = None, timeout: float = 4.0
) -> None:
    """Return where the server at HOST:PORT says SERVING, within `timeout` seconds; of a `service` where one is named.

    `tls_name` is the name in the server's certificate, where that is not the address's host: a probe on the server's
    own machine asks 127.0.0.1. Raises ServerError where it is not serving or does not answer, ConfigError for a file
    that cannot be read, AccessError where the server tells its health to known callers only, DeadlineError.

    Example: `health("127.0.0.1:8500", tls=ClientTls(ca=Path("ca.pem")), tls_name="server.hospital.example")`.
    """
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if tls_name:
        options.append(("grpc.ssl_target_name_override", tls_name))
    credentials = tls.credentials() if tls else None
    with (
        grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
    ) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout).status
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise ServerError(f"{address} has no service {service!r}; ask without one, for the server's") from None
            trailing: Any = error.trailing_metadata() or ()
            raise error_from_status(error.code(), error.details() or "", dict(trailing), address) from None
    if status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        raise ServerError(f"{address} says {name}, expected SERVING: it starts, stops or has no model; see its log")
