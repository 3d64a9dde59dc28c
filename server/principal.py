"""Who is calling, and what a caller may do.

Knows nothing of how a caller proves it: that is `thoraxrt.server.security`.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final, Literal, NamedTuple, get_args

__all__ = ["ANONYMOUS", "ROLES", "Principal", "Role", "current_principal"]

Role = Literal["predict", "admin"]
"""`predict`: ask for findings and about the model. `admin`: load and unload models. Neither holds the other."""

ROLES: Final[tuple[Role, ...]] = get_args(Role)


class Principal(NamedTuple):
    """A caller by name. `via` is what proved it: a static token, OIDC, a client certificate, or nothing."""

    name: str
    roles: frozenset[Role]
    via: Literal["token", "oidc", "certificate", "none"]


ANONYMOUS: Final = Principal("anonymous", frozenset(ROLES), "none")
"""Every caller of a server that asks nobody who they are."""

current_principal: ContextVar[Principal] = ContextVar("current_principal", default=ANONYMOUS)
"""Who makes the call that this code runs for; set before its handler is entered."""
