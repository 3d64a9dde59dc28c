"""Bearer tokens of an OpenID Connect provider: JWTs, checked against the provider's published keys.

The keys are fetched on a thread, again when they are 5 minutes old or a token names one that is not
there, and at most every 10 seconds. A provider that does not answer lets nobody new in: keys that were
fetched stay good for an hour, and without keys every token is refused. Only asymmetric algorithms count,
and each key has its own, whatever a token's header says. Knows nothing of roles beyond their names.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import jwt

from thoraxrt.engine.errors import AuthenticationError
from thoraxrt.server.principal import ROLES, Principal, Role

__all__ = ["NO_KEYS", "Oidc", "OidcOptions"]

NO_KEYS: Final = (jwt.PyJWTError, OSError, ValueError)
"""What asking a provider for its keys raises; OSError: a timeout, too."""

_ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_CLOCK_SKEW_S: Final = 30.0
_REFRESH_S: Final = 300.0
_KEEP_S: Final = 3600.0
_COOLDOWN_S: Final = 10.0
_TIMEOUT_S: Final = 5.0

_REASONS: Final[dict[type[Exception], str]] = {
    jwt.ExpiredSignatureError: "it has expired: get a new one from the provider",
    jwt.ImmatureSignatureError: "it is not valid yet: compare the clocks",
    jwt.InvalidAudienceError: "it is for another audience: ask the provider for one for this server",
    jwt.InvalidIssuerError: "another issuer made it: expected one of this server's provider",
    jwt.MissingRequiredClaimError: "it lacks a claim: expected exp, iss, aud and the caller's name",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcOptions:
    """Callers who show a JWT of this provider.

    `jwks_url` is the `jwks_uri` of the provider's discovery document; certificates are checked against
    the system's store, or the one that SSL_CERT_FILE names. `roles_claim` holds a list, or words apart by
    spaces; a dot goes into an object, as in `realm_access.roles`. `roles` maps what is in there to ours.

    Raises ValueError where a value makes no sense. Example:
        OidcOptions(
            issuer="https://id.hospital.example/realms/clinic",
            audience="thoraxrt",
            jwks_url="https://id.hospital.example/realms/clinic/protocol/openid-connect/certs",
            roles_claim="realm_access.roles",
            roles={"radiology-ai": "predict"},
        )
    """

    issuer: str
    audience: str
    jwks_url: str
    roles_claim: str = "roles"
    roles: dict[str, Role] = field(default_factory=lambda: {role: role for role in ROLES})
    name_claim: str = "sub"

    def __post_init__(self) -> None:
        for name in ("issuer", "audience", "roles_claim", "roles", "name_claim"):
            if not getattr(self, name):
                raise ValueError(f"OidcOptions {name} is empty; expected what the provider has there")
        url = urlsplit(self.jwks_url)
        if url.scheme != "https" and not (url.scheme == "http" and url.hostname in _LOOPBACK):
            raise ValueError(
                f"OidcOptions jwks_url is {self.jwks_url!r}; expected https://, because whoever sits between could put "
                "in a key of their own"
            )


class Oidc:
    """The provider's keys, and what its tokens say of a caller. For one event loop; `clock` in seconds."""

    def __init__(self, options: OidcOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        self._client = jwt.PyJWKClient(options.jwks_url, cache_jwk_set=False, timeout=_TIMEOUT_S)
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched = self._attempted = -math.inf
        self._fetching: asyncio.Task[None] | None = None

    async def principal(self, token: str) -> Principal:
        """Whose token this is. Raises AuthenticationError."""
        try:
            key = await self._key(jwt.get_unverified_header(token).get("kid"))
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                issuer=self._options.issuer,
                audience=self._options.audience,
                leeway=_CLOCK_SKEW_S,
                options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:  # whatever a stranger's bytes can provoke
            reason = _REASONS.get(type(error), "it is no JWT that the provider signed")
            raise AuthenticationError(f"the token is refused: {reason}") from None  # the cause may quote the token
        name = claims.get(self._options.name_claim)
        if not isinstance(name, str) or not name or not name.isprintable():
            raise AuthenticationError(f"the token is refused: {_REASONS[jwt.MissingRequiredClaimError]}")
        return Principal(name, self._roles(claims), "oidc")

    def _roles(self, claims: Mapping[str, Any]) -> frozenset[Role]:
        values = _claim(claims, self._options.roles_claim)
        words = values.split() if isinstance(values, str) else values if isinstance(values, list) else []
        return frozenset(
            self._options.roles[word] for word in words if isinstance(word, str) and word in self._options.roles
        )

    async def _key(self, kid: str | None) -> jwt.PyJWK:
        now = self._clock()
        known = kid in self._keys and now - self._fetched < _KEEP_S
        if not known or now - self._fetched >= _REFRESH_S:
            fetching = self._start_fetching(now)
            if fetching is not None and not known:
                await asyncio.wait([fetching])  # not awaited itself: a call that is cancelled leaves it to the others
        key = self._keys.get(kid or "") if self._clock() - self._fetched < _KEEP_S else None
        if key is None:
            raise jwt.InvalidTokenError
        return key

    def _start_fetching(self, now: float) -> asyncio.Task[None] | None:
        """The fetch under way, or a new one; None where the last one has just been."""
        if self._fetching is None and now - self._attempted >= _COOLDOWN_S:
            self._fetching = asyncio.create_task(self.fetch())
        return self._fetching

    def signing_keys(self) -> dict[str, jwt.PyJWK]:
        """The provider's keys that count, by their id, as it gives them now. Raises one of NO_KEYS; takes seconds then."""
        return {str(key.key_id): key for key in self._client.get_signing_keys() if key.algorithm_name in _ALGORITHMS}

    async def fetch(self) -> None:
        """Fetch the keys now, so that the first call need not wait; where it fails, the log says why."""
        self._attempted = self._clock()
        try:
            self._keys = await asyncio.wait_for(asyncio.to_thread(self.signing_keys), 2 * _TIMEOUT_S)
        except NO_KEYS as error:
            _log.error("no keys from %s: %s: %s", self._options.jwks_url, type(error).__name__, error)
        else:
            self._fetched = self._clock()
        finally:
            self._fetching = None


def _claim(claims: Mapping[str, Any], path: str) -> object:
    """The claim of that name, else the one that its dotted parts lead to; names with dots are common (URLs)."""
    if path in claims:
        return claims[path]
    value: object = claims
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
