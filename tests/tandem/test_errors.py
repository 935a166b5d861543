"""The one table that maps errors to HTTP and gRPC."""

from __future__ import annotations

import inspect
import re

import grpc
import pytest

from tandem import errors
from tandem.errors import BY_GRPC_CODE, BadRequest, ContextTooLong, Internal, Overloaded, TandemError, UnknownModel

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, TandemError)]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_exist(kind: type[TandemError]) -> None:
    assert kind.grpc_code in grpc.StatusCode.__members__
    assert 400 <= kind.http_status <= 599


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_keeps_its_line_and_its_field(kind: type[TandemError]) -> None:
    assert str(kind("top_p is 2", "top_p")) == "top_p is 2"
    assert kind("x", "top_p").param == "top_p"
    assert kind("x").param is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(kind, BadRequest)])
def test_the_clients_faults_are_4xx_and_say_so(kind: type[TandemError]) -> None:
    assert kind.http_status < 500
    assert kind.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("kind", "status"),
    [(BadRequest, 400), (ContextTooLong, 400), (UnknownModel, 404), (Overloaded, 429), (Internal, 500)],
)
def test_statuses_clients_rely_on(kind: type[TandemError], status: int) -> None:
    assert kind.http_status == status


def test_a_grpc_code_leads_back_to_the_most_general_error_of_that_code() -> None:
    for code, kind in BY_GRPC_CODE.items():
        assert kind.grpc_code == code
        others = [other for other in KINDS if other.grpc_code == code and other not in (TandemError, *kind.__mro__)]
        assert all(issubclass(other, kind) or other.http_status == kind.http_status for other in others)
    assert {kind.grpc_code for kind in KINDS} == set(BY_GRPC_CODE)


def test_the_drawing_of_the_tree_shows_every_error_with_its_status() -> None:
    drawing = errors.__doc__ or ""
    assert set(re.findall(r"── (\w+)", drawing)) == {kind.__name__ for kind in KINDS} - {"TandemError"}
    for name, status in re.findall(r"── (\w+) .*?\b(\d{3})\b", drawing):
        assert getattr(errors, name).http_status == int(status), name
