"""The error tree crosses the wire: every error of ours arrives as itself, and nothing else does."""

from __future__ import annotations

import grpc
import pytest

from thoraxrt.engine import errors
from thoraxrt.engine.errors import (
    BackendUnavailableError,
    DeadlineError,
    ImageFormatError,
    ImageLimitError,
    ServerError,
)
from thoraxrt.server.status import ERROR_KEY, error_from_status, fault, status_from_error


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_arrives_as_the_type_and_message_that_it_was(name):
    error = getattr(errors, name)("received ü; expected u: do this")
    status = status_from_error(error)
    assert status.code is not grpc.StatusCode.OK
    arrived = error_from_status(status.code, status.details, dict(status.trailing_metadata), "host:1")
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImageFormatError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (ImageLimitError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (BackendUnavailableError("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.BackendError("x"), grpc.StatusCode.INTERNAL),
        (errors.RequestError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.ModelNotFoundError("x"), grpc.StatusCode.NOT_FOUND),
        (errors.AuthenticationError("x"), grpc.StatusCode.UNAUTHENTICATED),
        (errors.AuthorizationError("x"), grpc.StatusCode.PERMISSION_DENIED),
        (errors.OverloadedError("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.DeadlineError("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_codes_are_the_protos(error, code):
    assert status_from_error(error).code is code


@pytest.mark.parametrize(("seconds", "hint"), [(0.0, "0"), (0.0001, "1"), (1.5, "1500"), (3600.0, "3600000")])
def test_an_overload_says_in_milliseconds_when_to_try_again(seconds, hint):
    status = status_from_error(errors.OverloadedError("x", retry_after_s=seconds))
    assert dict(status.trailing_metadata) == {ERROR_KEY: "OverloadedError", "grpc-retry-pushback-ms": hint}
    arrived = error_from_status(status.code, status.details, dict(status.trailing_metadata), "host:1")
    assert arrived.retry_after_s == int(hint) / 1000


@pytest.mark.parametrize("hint", [None, "-1", "soon"])
def test_a_hint_that_is_none_is_no_wait(hint):
    arrived = error_from_status(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "x", {ERROR_KEY: "OverloadedError", "grpc-retry-pushback-ms": hint}, "h:1"
    )
    assert arrived.retry_after_s == 0


def test_a_subclass_from_elsewhere_travels_as_its_nearest_ancestor():
    class OwnError(ImageFormatError):
        pass

    assert status_from_error(OwnError("x")).trailing_metadata == ((ERROR_KEY, "ImageFormatError"),)


def test_a_long_message_is_cut_where_gRPC_would_drop_the_status():  # noqa: N802 - its name
    details = status_from_error(errors.RequestError("é" * 5000)).details
    assert len(details.encode()) <= 2000
    assert details.endswith("é...")


def test_a_fault_says_nothing_of_its_cause():
    assert fault().code is grpc.StatusCode.INTERNAL
    assert fault().trailing_metadata == ()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_any_other_status_is_a_server_error_that_names_the_address(code):
    error = error_from_status(code, "why", {}, "host:1")
    assert type(error) is (DeadlineError if code is grpc.StatusCode.DEADLINE_EXCEEDED else ServerError)
    assert "host:1" in str(error)


def test_an_unknown_error_name_is_a_server_error():
    assert type(error_from_status(grpc.StatusCode.INTERNAL, "x", {ERROR_KEY: "SystemExit"}, "a")) is ServerError
