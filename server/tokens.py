"""Static bearer tokens: one file of hashes, read again when it changes.

A token is `thoraxrt_<id>_<secret>`: the id, no secret, finds its entry; the secret is 256 random
bits. That is why one SHA-256 is enough, without salt or stretching: those slow down a search through
passwords that people choose, and nobody searches 2^256. A stretched hash (scrypt) would only let
strangers make the server work 50 ms for each wrong token. Nothing but generated tokens is taken.

    [[token]]
    name = "pacs"
    id = "5f0c2a9be1d4"
    roles = ["predict"]
    sha256 = "9b74c9897bac770ffc029102a200c5de..."
    expires = 2027-11-24T00:00:00Z   # or never

A token is revoked by deleting its entry: no call is let in a second later, no image of an open stream two seconds later.
A missing or broken file revokes nothing, because that is how files look while they are edited: to revoke all, leave the
file empty.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec

from thoraxrt.engine.errors import AuthenticationError, ConfigError, RequestError
from thoraxrt.server.principal import ROLES, Principal, Role
from thoraxrt.server.watched import Watched, read_file

__all__ = ["PREFIX", "TokenOptions", "Tokens", "add_token"]

PREFIX: Final = "thoraxrt_"
"""What every token begins with, so that secret scanners find one that leaked."""

_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_NO_HASH: Final = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOptions:
    """Callers who show a token of this file; `add_token` writes it.

    Example: `TokenOptions(file=Path("/etc/thoraxrt/tokens.toml"))`.
    """

    file: Path


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    id: Annotated[str, msgspec.Meta(min_length=1)]
    roles: Annotated[tuple[Role, ...], msgspec.Meta(min_length=1)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    token: tuple[_Entry, ...] = ()


class Tokens:
    """The tokens of one file. Raises ConfigError where it cannot be used."""

    def __init__(self, options: TokenOptions) -> None:
        self._entries = Watched([options.file], lambda: _entries(options.file))

    async def principal(self, token: str) -> Principal:
        """Whose token this is. Raises AuthenticationError."""
        entries = await self._entries.latest()
        identifier, _, secret = token.removeprefix(PREFIX).partition("_")
        entry = entries.get(identifier)
        digest = hashlib.sha256(secret.encode(errors="replace")).hexdigest()
        if not hmac.compare_digest(digest, entry.sha256 if entry else _NO_HASH) or entry is None:
            raise AuthenticationError("the token is none that this server knows: ask its operator for one")
        if entry.expires is not None and datetime.now(UTC) >= entry.expires:
            raise AuthenticationError(
                f"the token of {entry.name!r} expired on {entry.expires.isoformat()}: ask the server's operator for one"
            )
        return Principal(entry.name, frozenset(entry.roles), "token")


def add_token(file: Path, name: str, roles: tuple[Role, ...], expires: datetime | None = None) -> str:
    """Make a token for `name`, append its hash to the file, and give it back: nothing holds it after that.

    The file is made where there is none, readable by its owner only. A name may have several tokens, so
    that a client can change from one to the next. Raises RequestError where an argument makes no sense or the
    file cannot be written, ConfigError where it holds something else.
    """
    if not roles or not set(roles) <= set(ROLES):
        raise RequestError(f"the roles of {name!r} are {', '.join(roles) or 'none'}: expected {' or '.join(ROLES)}")
    if not name or not name.isprintable():
        raise RequestError(f"a token's name is {name!r}: expected printable characters")
    if expires is not None and expires.tzinfo is None:
        raise RequestError(f"the token expires at {expires}, of no time zone: add one, UTC say")
    if expires is not None and expires <= datetime.now(UTC):
        raise RequestError(f"the token expires at {expires.isoformat()}, which has passed: correct the date")
    if file.exists():
        _entries(file)  # else what is appended would be lost on the server
    identifier, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    lines = [
        "",
        "[[token]]",
        f"name = {json.dumps(name, ensure_ascii=False)}",
        f'id = "{identifier}"',
        f"roles = {json.dumps(roles)}",
        f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"',
        *([f"expires = {expires.isoformat()}"] if expires else []),
        "",
    ]
    try:
        with open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as out:
            out.write("\n".join(lines).encode())
    except OSError as error:
        raise RequestError(f"the token file {file} cannot be written: {error.strerror}; name another") from error
    return f"{PREFIX}{identifier}_{secret}"


def _entries(file: Path) -> dict[str, _Entry]:
    """The file's entries by id."""
    data = read_file(file, "token file")
    if stat.S_IMODE(file.stat().st_mode) & stat.S_IWOTH:
        raise ConfigError(f"anybody may write the token file {file} and give themselves a role: `chmod o-w {file}`")
    try:
        entries = msgspec.toml.decode(data, type=_File).token
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"the token file {file} makes no sense: {error}; `thoraxrt token` writes entries") from error
    repeated = [identifier for identifier, count in Counter(entry.id for entry in entries).items() if count > 1]
    if repeated:
        raise ConfigError(f"the token file {file} has the id {repeated[0]} more than once: delete all but one")
    return {entry.id: entry for entry in entries}
