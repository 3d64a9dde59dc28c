"""The one table between the error tree and gRPC statuses, for both ends of the wire.

Owns what an error looks like on the wire: a status code for anyone, its message, and in trailing
metadata the error's name for our own client and when to try again for any. Knows nothing of calls or servers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import grpc

from thoraxrt.engine import errors
from thoraxrt.engine.errors import (
    AccessError,
    AuthenticationError,
    BackendError,
    BackendUnavailableError,
    BundleError,
    DeadlineError,
    ImageError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    ServerError,
    ThoraxrtError,
)

__all__ = ["ERROR_KEY", "PUSHBACK_KEY", "Status", "error_from_status", "fault", "status_from_error"]

ERROR_KEY: Final = "thoraxrt-error"
"""The trailing metadata key that holds the error's name; part of the wire contract."""

PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
"""gRPC's own key for when to try again, in whole milliseconds: see its proposal A6, "Pushback"."""

_CODES: Final = {
    # Image limits too: RESOURCE_EXHAUSTED is what clients retry, and this image will never fit.
    ImageError: grpc.StatusCode.INVALID_ARGUMENT,
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    AccessError: grpc.StatusCode.PERMISSION_DENIED,
    AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    # Not UNAVAILABLE, which clients retry: someone has to repair the server first.
    BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    BackendUnavailableError: grpc.StatusCode.FAILED_PRECONDITION,
    BackendError: grpc.StatusCode.INTERNAL,
    ServerError: grpc.StatusCode.UNAVAILABLE,
    ThoraxrtError: grpc.StatusCode.INTERNAL,
}
"""An error has the code of its nearest ancestor here."""

_TYPES: Final[dict[str, type[ThoraxrtError]]] = {name: getattr(errors, name) for name in errors.__all__}

# gRPC sends the message percent-encoded within 8 KiB of trailing metadata: 3 bytes for each of these.
_MESSAGE_BYTES: Final = 2000


class Status(NamedTuple):
    """How a call ends that has no result: `grpc.aio.ServicerContext.abort` takes it."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str], ...]


def status_from_error(error: ThoraxrtError) -> Status:
    """The status of an error of ours; a message beyond 2,000 bytes of UTF-8 is cut."""
    kinds = [kind for kind in type(error).__mro__ if kind in _CODES]
    named = next(kind for kind in type(error).__mro__ if kind in _TYPES.values())
    metadata = [(ERROR_KEY, named.__name__)]
    if isinstance(error, OverloadedError):
        metadata.append((PUSHBACK_KEY, str(math.ceil(1000 * error.retry_after_s))))
    return Status(_CODES[kinds[0]], _cut(str(error)), tuple(metadata))


def fault() -> Status:
    """The status of an exception that is a fault in the server; what it says stays in the server."""
    return Status(grpc.StatusCode.INTERNAL, "the server failed on this request; its log names the fault", ())


def error_from_status(
    code: grpc.StatusCode, details: str, trailing_metadata: Mapping[str, object], address: str
) -> ThoraxrtError:
    """The error that a call to `address` ended with: the engine's own where the server named it.

    Anything else is a DeadlineError or a ServerError that says what to do.
    """
    kind = _TYPES.get(str(trailing_metadata.get(ERROR_KEY)))
    if kind is OverloadedError:
        return OverloadedError(details, retry_after_s=_pushback_s(trailing_metadata))
    if kind is not None:
        return kind(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"{address} did not answer in time; try again, or allow it a longer timeout")
    return ServerError(_server_message(code, details, address))


def _pushback_s(trailing_metadata: Mapping[str, object]) -> float:
    """Seconds; 0 where the server gave no such hint."""
    value = str(trailing_metadata.get(PUSHBACK_KEY))
    return int(value) / 1000 if value.isdecimal() else 0.0


def _server_message(code: grpc.StatusCode, details: str, address: str) -> str:
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return (
                f"no server answers at {address} ({details}); start one with `thoraxrt serve BUNDLE --port PORT`, "
                "or correct the address"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"{address} is no thoraxrt server, or one of another version ({details}); correct the address"
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return (
                f"{address}: a message is too large ({details}); send a smaller file, or raise the limit on both ends"
            )
        case grpc.StatusCode.CANCELLED:
            return f"the call to {address} was cancelled ({details}); try again"
        case _:
            return f"{address} failed with {code.name}: {details}; see the server's log"


def _cut(message: str) -> str:
    encoded = message.encode()
    if len(encoded) <= _MESSAGE_BYTES:
        return message
    return encoded[: _MESSAGE_BYTES - 3].decode(errors="ignore") + "..."
