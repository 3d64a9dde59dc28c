"""Who may call what: a principal from each call's credentials, a role from its method, both before its body is read.

What proves a caller is in `certificates`, `tokens` and `oidc`. Knows nothing of what the methods do.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import grpc

from thoraxrt.engine.errors import AccessError, AuthenticationError, AuthorizationError, RequestError
from thoraxrt.server.audit import AuditLog
from thoraxrt.server.calls import answering, streaming
from thoraxrt.server.certificates import TlsOptions, principal_from_certificate
from thoraxrt.server.oidc import Oidc, OidcOptions
from thoraxrt.server.principal import ANONYMOUS, Principal, Role, current_principal
from thoraxrt.server.tokens import PREFIX, TokenOptions, Tokens

__all__ = [
    "Access",
    "AccessInterceptor",
    "Authenticator",
    "SecurityOptions",
    "check_exposure",
    "is_loopback",
    "required_role",
]

Access = Role | Literal["open"]
"""The role that a method needs, or `open`: anybody may call it."""

_HEALTH: Final = frozenset(
    f"/{service}/{method}"
    for service, methods in {
        "grpc.health.v1.Health": ("Check", "Watch"),
        "inference.GRPCInferenceService": ("ServerLive", "ServerReady", "ModelReady"),
    }.items()
    for method in methods
)
_REFLECTION: Final = "/grpc.reflection."
_PREDICT: Final = frozenset(
    f"/{service}/{method}"
    for service, methods in {
        "thoraxrt.v1.PredictionService": ("Predict", "PredictStream", "PredictStudy", "GetModel"),
        "inference.GRPCInferenceService": (
            *("ServerMetadata", "ModelMetadata", "ModelConfig", "ModelInfer", "ModelStreamInfer"),
            *("ModelStatistics", "RepositoryIndex"),
        ),
    }.items()
    for method in methods
)

_AGAIN_S: Final = 1.0
"""How long a stream's caller is taken for who they were."""

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # generic in the stubs only
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityOptions:
    """Encryption, whom the server answers, and who may call what is neither a prediction nor a model's administration.

    Without `tokens`, `oidc` and `tls.clients` the server asks nobody who they are. `health` is what probes call,
    `reflection` what grpcurl asks for the methods.

    Raises ValueError where the parts do not fit together.
    Example: `SecurityOptions(tokens=TokenOptions(file=Path("tokens.toml")))`.
    """

    tls: TlsOptions | None = None
    tokens: TokenOptions | None = None
    oidc: OidcOptions | None = None
    health: Access = "open"
    reflection: Access = "predict"

    def __post_init__(self) -> None:
        if self.tls and self.tls.client_ca and not self.authenticates:
            raise ValueError(
                "SecurityOptions tls.client_ca gives nobody a role; expected tls.clients (the name * is every "
                "certificate of that authority), tokens or oidc"
            )

    @property
    def authenticates(self) -> bool:
        """Whether callers must show who they are."""
        return bool(self.tokens or self.oidc or (self.tls and self.tls.clients))


def required_role(method: str, options: SecurityOptions) -> Access:
    """What a method, /package.Service/Method, asks of its caller; one that is not known here is an administrator's."""
    if method in _PREDICT:
        return "predict"
    if method in _HEALTH:
        return options.health
    return options.reflection if method.startswith(_REFLECTION) else "admin"


class Authenticator:
    """Finds out who calls. Files are read at once: raises ConfigError where one cannot be used. For one event loop."""

    def __init__(self, options: SecurityOptions) -> None:
        self._options = options
        self._tokens = Tokens(options.tokens) if options.tokens else None
        self._oidc = Oidc(options.oidc) if options.oidc else None

    async def start(self) -> None:
        """Fetch what a provider's tokens are checked with, so that the first call need not wait for it."""
        if self._oidc:
            await self._oidc.fetch()

    async def authenticate(
        self, metadata: Sequence[tuple[str, str | bytes]], auth_context: Mapping[str, Iterable[bytes]]
    ) -> Principal:
        """Whose call this is, by its metadata and by gRPC's `auth_context` of its connection.

        A token counts before a certificate: one that is wrong is refused, whatever the certificate. ANONYMOUS where
        nobody is asked. Raises AuthenticationError.
        """
        if not self._options.authenticates:
            return ANONYMOUS
        if (token := _bearer_token(metadata)) is not None:
            if self._tokens and token.startswith(PREFIX):
                return await self._tokens.principal(token)
            if self._oidc and not token.startswith(PREFIX):
                return await self._oidc.principal(token)
            raise AuthenticationError("the token is of a kind that this server does not take: ask its operator")
        principal = principal_from_certificate(self._options.tls, auth_context) if self._options.tls else None
        if principal is None:
            raise AuthenticationError(f"the call shows nobody's credentials: expected {self._expected()}")
        return principal

    def _expected(self) -> str:
        kinds = ["the metadata `authorization: Bearer TOKEN`"] if self._tokens or self._oidc else []
        if self._options.tls and self._options.tls.clients:
            kinds.append("a client certificate that the server has a role for")
        return " or ".join(kinds)


def _bearer_token(metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
    """The token in a call's metadata, None without one. Raises AuthenticationError for anything else in its place."""
    values = [value for key, value in metadata if key == "authorization"]
    if not values:
        return None
    scheme, _, token = str(values[0]).partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer" or not token.strip():
        raise AuthenticationError("the metadata `authorization` makes no sense: expected one, `Bearer TOKEN`")
    return token.strip()


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call reach its handler once its caller is known and has the role; else raises AccessError in its place.

    It raises before the first message is read, in a unary call too, and in a stream where that has changed since. What
    is raised becomes a status in `thoraxrt.server.calls`, which must come before this one. The handler finds the caller
    in `current_principal`. Where `audit` may hold addresses, the server's own log says where a refused call came from.
    """

    def __init__(self, authenticator: Authenticator, options: SecurityOptions, audit: AuditLog | None = None) -> None:
        self._authenticator, self._options, self._audit = authenticator, options, audit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """See grpc.aio."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        access = required_role(method, self._options)
        if handler is None or access == "open":
            return handler
        metadata: Any = handler_call_details.invocation_metadata
        answer = answering(handler)

        async def answer_if_allowed(requests: Any, context: _Context) -> Any:
            allowed = partial(self._allowed, method, access, metadata, context)
            current_principal.set(await allowed())
            return await answer(_Requests(requests, allowed) if handler.request_streaming else requests, context)

        return streaming(handler, answer_if_allowed)

    async def _allowed(self, method: str, role: Role, metadata: Any, context: _Context) -> Principal:
        """Who calls, where they have the role; else the log says who lacks it. Raises AccessError."""
        try:
            principal = await self._authenticator.authenticate(metadata, context.auth_context())
            if role not in principal.roles:
                raise AuthorizationError(
                    f"{principal.name!r} lacks the role {role}, which {method} needs: ask the server's operator"
                )
        except AccessError as error:
            # Not a line of the audit log: strangers could fill it, until what was answered is removed.
            peer = self._audit and self._audit.address(context.peer())
            _log.warning("refused %s%s: %s", method, f" from {peer}" if peer else "", error)
            raise
        if role == "admin":
            _log.info("%r calls %s", principal.name, method)
        return principal


class _Requests:
    """A stream's requests; who sends them is asked again, so that a token which is revoked brings in no more."""

    def __init__(self, requests: Any, allowed: Callable[[], Awaitable[Principal]]) -> None:
        self._requests, self._allowed = requests, allowed
        self._asked = time.monotonic()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        request = await anext(self._requests)
        if time.monotonic() - self._asked >= _AGAIN_S:
            self._asked = time.monotonic()
            await self._allowed()
        return request


def check_exposure(host: str, tls: bool, insecure: bool, *, authenticates: bool) -> None:
    """Return where strangers cannot reach the host, or find it encrypted and closed, or `insecure` says that is meant.

    Else raise RequestError.
    """
    if is_loopback(host):
        return
    faults = [] if tls else ["images and tokens would travel unencrypted; expected tls.certificate and tls.private_key"]
    faults += [] if authenticates else ["anybody could call it; expected tokens, oidc or tls.clients"]
    if faults and not insecure:
        raise RequestError(
            f"{host} is reachable from other machines: {'. And '.join(faults)}. Or bind 127.0.0.1, or say --insecure "
            "where something else protects it"
        )
    for fault in faults:
        _log.warning("%s is reachable from other machines: %s", host, fault.partition(";")[0])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
