"""Every parser of bytes from outside: garbage is refused with the parser's own error, and nothing else happens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtransfer import manifest
from kvtransfer.backends.inproc import InprocBackend
from kvtransfer.backends.tcp import TcpLink
from kvtransfer.base import TransportError
from router.admission.tenants import Keyring, Tenant, read_keys
from router.discovery.sources import read_addresses
from router.requests.openai import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from tandem.errors import BadRequest, ConfigError, TandemError, Unauthorized
from tandem.traces import read_trace
from tandem.wire import codec
from tandem.wire.v1 import common_pb2, decode_pb2, worker_pb2

EXAMPLES = 100
BYTES = st.binary(max_size=300)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *TokenizeBody.model_fields, "tokens", "tenants",
                "workers", "name", "keys", "timestamp", "input_length", "output_length", "hash_ids"})  # fmt: skip
OBJECTS = st.dictionaries(st.sampled_from(NAMES), JSON_VALUES, max_size=5)
YAML_BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % ((at + 1, at + 1) + (at,) * 8) for at in range(97, 105)
)


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody, TokenizeBody, DetokenizeBody])
def test_http_bodies(kind: Any) -> None:
    @settings(max_examples=EXAMPLES)
    @given(BYTES | OBJECTS.map(lambda value: json.dumps(value).encode()))
    @example(b"[" * 50_000)
    @example(b'{"a":' * 20_000)
    def check(body: bytes) -> None:
        said = "taken"
        try:
            parse(kind, body)
        except BadRequest as error:
            said = str(error)
        assert 0 < len(said) < 1000

    check()


WIRE: list[tuple[type[Message], Callable[[Any], object]]] = [
    (common_pb2.GenerateRequest, codec.generate_request_from_wire),
    (common_pb2.SamplingParams, codec.sampling_params_from_wire),
    (common_pb2.WorkerInfo, codec.worker_info_from_wire),
    (common_pb2.KvLayout, codec.kv_layout_from_wire),
    (common_pb2.Delta, codec.delta_from_wire),
    (common_pb2.Status, codec.status_from_wire),
    (common_pb2.CacheEvent, codec.cache_event_from_wire),
    (worker_pb2.WorkerUpdate, codec.worker_update_from_wire),
]


def numbers(kind: type[Message]) -> st.SearchStrategy[bytes]:
    """Bytes that look like fields of a message: tags that it has, with values of any kind."""
    fields = [each.number for each in kind.DESCRIPTOR.fields]
    varint = st.integers(0, (1 << 64) - 1).map(_varint)
    blob = BYTES.map(lambda data: _varint(len(data)) + data)
    field = st.one_of(
        st.tuples(st.sampled_from(fields), varint).map(lambda pair: _varint(pair[0] << 3) + pair[1]),
        st.tuples(st.sampled_from(fields), blob).map(lambda pair: _varint(pair[0] << 3 | 2) + pair[1]),
        st.tuples(st.sampled_from(fields), st.binary(min_size=8, max_size=8)).map(
            lambda pair: _varint(pair[0] << 3 | 1) + pair[1]
        ),
    )
    return st.lists(field, max_size=8).map(b"".join)


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


@pytest.mark.parametrize(("kind", "convert"), WIRE, ids=lambda each: getattr(each, "__name__", ""))
def test_messages(kind: type[Message], convert: Callable[[Any], object]) -> None:
    @settings(max_examples=EXAMPLES)
    @given(BYTES | numbers(kind))
    def check(data: bytes) -> None:
        said = "taken"
        try:
            convert(kind.FromString(data))
        except DecodeError:
            return
        except (ValueError, TandemError) as error:
            said = str(error)
        assert said

    check()


def test_messages_of_calls() -> None:
    @settings(max_examples=EXAMPLES)
    @given(BYTES)
    def check(data: bytes) -> None:
        for kind in (decode_pb2.SubmitRequest, decode_pb2.StreamRequest, worker_pb2.RegisterRequest):
            try:
                kind.FromString(data)
            except DecodeError:
                continue

    check()


@settings(max_examples=EXAMPLES)
@given(st.binary(max_size=120) | st.binary(min_size=62, max_size=62))
def test_manifests(data: bytes) -> None:
    try:
        read = manifest.parse(data)
    except ValueError:
        return
    assert read.pack() == data


@settings(max_examples=50)
@given(st.binary(max_size=33))
def test_metadata_of_transports(data: bytes) -> None:
    """What a peer says of its landing; shorter than what could name a real port and host."""
    for link in (TcpLink(), InprocBackend().link("a", "b", None)):  # type: ignore[arg-type]
        with pytest.raises(TransportError):
            link.connect(data)
        link.close()


def files(read: Callable[[Path], object], allowed: tuple[type[Exception], ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"

        @settings(max_examples=EXAMPLES)
        @given(BYTES | OBJECTS.map(lambda value: json.dumps(value).encode()) | st.text(max_size=200).map(str.encode))
        @example(YAML_BOMB)
        @example(b"!!python/object/apply:os.system ['touch canary']")
        @example(b"\xff\xfe\x00")
        @example(b"[" * 500)
        def check(data: bytes) -> None:
            path.write_bytes(data)
            said = "taken"
            try:
                read(path)
            except allowed as error:
                said = str(error)
            assert said
            assert [each.name for each in Path(folder).iterdir()] == ["file"]

        check()


def test_key_files() -> None:
    files(read_keys, (ConfigError,))


def test_worker_files() -> None:
    files(read_addresses, (ConfigError,))


def test_traces() -> None:
    files(lambda path: list(read_trace(path, 100)), (ValueError,))


@settings(max_examples=EXAMPLES)
@given(st.text(max_size=80) | st.sampled_from(["Bearer ", "bearer\t", "Basic x"]), st.text(max_size=40))
def test_authorization_headers(authorization: str, api_key: str) -> None:
    keyring = Keyring({"0" * 64: Tenant(name="a")})
    with pytest.raises(Unauthorized):
        keyring.tenant(authorization, api_key)
