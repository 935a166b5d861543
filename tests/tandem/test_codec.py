"""Every type survives the wire unchanged, and malformed messages are refused by field name."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.cluster import (
    CacheEvent,
    Candidate,
    EventKind,
    MoveStat,
    Plan,
    Role,
    Status,
    StepTiming,
    TenantUse,
    WorkerInfo,
    WorkerUpdate,
)
from tandem.errors import BadRequest
from tandem.kv import KvLayout, LayerGroup, Plane
from tandem.types import (
    Delta,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    ModelInfo,
    OutputKind,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from tandem.wire import codec
from tandem.wire.v1 import common_pb2 as pb
from tandem.wire.v1 import worker_pb2

U32 = st.integers(0, 2**32 - 1)
COUNT = st.integers(0, 2**31 - 1)
BIG = st.integers(0, 2**63 - 1)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
F64 = st.floats(allow_nan=False, allow_infinity=False)
F32 = st.floats(width=32, allow_nan=False)
TOKENS = st.lists(U32, max_size=5).map(tuple)
HASHES = st.lists(st.binary(min_size=16, max_size=16), max_size=4).map(tuple)
OPTIONAL_N = st.none() | st.integers(0, 20)

SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 2**31),
    min_p=st.floats(0, 1),
    frequency_penalty=st.floats(-2, 2),
    presence_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    logit_bias=st.lists(st.tuples(U32, st.floats(-100, 100)), max_size=3).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(8, 2**31),
    min_tokens=st.integers(0, 8),
    stop_token_ids=TOKENS,
    ignore_eos=st.booleans(),
    logprobs=OPTIONAL_N,
    prompt_logprobs=OPTIONAL_N,
    grammar=st.none() | st.builds(Grammar, st.sampled_from(GrammarKind), TEXT, TOKENS),
)
REQUEST = st.builds(
    GenerateRequest,
    request_id=NAME,
    model=TEXT,
    prompt=st.lists(U32, min_size=1, max_size=5).map(tuple),
    sampling=SAMPLING,
    choices=st.integers(1, 128),
    attempt=COUNT,
    output_kind=st.sampled_from(OutputKind),
    salt=TEXT,
    adapter=TEXT,
    priority=st.integers(-(2**31), 2**31 - 1),
    tenant=TEXT,
    cost=BIG,
)
LOGPROB = st.builds(TokenLogprob, token=U32, logprob=F32, top=st.lists(st.tuples(U32, F32), max_size=3).map(tuple))
USAGE = st.builds(Usage, BIG, BIG, BIG, BIG, BIG, TEXT, F64)
HEAD = {
    "request_id": NAME,
    "attempt": COUNT,
    "choice": st.integers(0, 127),
    "first_index": BIG,
    "tokens": TOKENS,
    "logprobs": st.lists(LOGPROB, max_size=2).map(tuple),
    "prompt_logprobs": st.lists(st.none() | LOGPROB, max_size=3).map(tuple),
    "usage": st.none() | USAGE,
}
DELTA = st.builds(Delta, **HEAD) | st.builds(
    Delta,
    **HEAD,
    finish=st.sampled_from(FinishReason),
    stop_token=st.none() | U32,
    error=TEXT,
)
MODEL = st.builds(
    ModelInfo,
    name=NAME,
    path=TEXT,
    fingerprint=NAME,
    vocab_size=st.integers(1, 2**40),
    max_context=st.integers(1, 2**40),
    eos_token_ids=TOKENS,
)
PLANE = st.builds(
    Plane,
    name=NAME,
    heads=st.integers(1, 99),
    head_dim=st.integers(1, 999),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


@st.composite
def layouts(draw: st.DrawFn) -> KvLayout:
    cuts = draw(st.lists(st.integers(1, 3), max_size=3))
    planes = draw(st.lists(PLANE, max_size=3))
    names = st.lists(st.sampled_from([plane.name for plane in planes]), max_size=2) if planes else st.just([])
    groups, at = [], 0
    for size in cuts:
        layers = tuple(range(at, at + size))
        groups.append(LayerGroup(layers, draw(st.none() | st.integers(1, 9999)), tuple(draw(names))))
        at += size
    return KvLayout(tuple(planes), tuple(groups))


INFO = st.builds(
    WorkerInfo,
    incarnation=NAME,
    role=st.sampled_from(Role),
    address=NAME,
    model=MODEL,
    layout=layouts(),
    kv_dtype=TEXT,
    page_size=st.integers(1, 64),
    total_pages=st.integers(1, 2**40),
    max_batch_tokens=st.integers(1, 2**31 - 1),
    transport=TEXT,
    metrics_port=st.integers(0, 65535),
    threads=COUNT,
    pid=COUNT,
)
STATUS = st.builds(
    Status,
    incarnation=NAME,
    running=COUNT,
    waiting=COUNT,
    queued_tokens=BIG,
    free_pages=BIG,
    total_pages=BIG,
    timing=st.none() | st.builds(StepTiming, F64, F64),
    move_bytes_per_ms=F64,
    dispatches=st.dictionaries(TEXT, BIG, max_size=3),
    draining=st.booleans(),
    moves=st.lists(st.builds(MoveStat, NAME, NAME, TEXT, BIG, F64, BIG, BIG), max_size=3).map(tuple),
    tenants=st.lists(st.builds(TenantUse, TEXT, NAME, BIG, BIG, COUNT), max_size=3).map(tuple),
)
EVENT = st.builds(
    CacheEvent,
    kind=st.sampled_from(EventKind),
    hashes=HASHES,
    parent=st.sampled_from([b"", b"p" * 16]),
    tier=TEXT,
)
UPDATE = st.builds(
    WorkerUpdate,
    incarnation=NAME,
    sequence=BIG,
    events=st.lists(EVENT, max_size=3).map(tuple),
    status=st.none() | STATUS,
    snapshot=st.booleans(),
)
CANDIDATE = st.builds(
    Candidate,
    decode=NAME,
    prefill=st.none() | NAME,
    decode_cached=BIG,
    prefill_cached=BIG,
    costs=st.dictionaries(TEXT, F64, max_size=3),
)
PLAN = st.builds(Plan, candidates=st.lists(CANDIDATE, min_size=1, max_size=3).map(tuple), policy=TEXT)


@settings(max_examples=60)
@given(value=SAMPLING | REQUEST | USAGE | DELTA | MODEL | layouts() | INFO | STATUS | EVENT | UPDATE | PLAN)
def test_every_type_survives_the_wire(value: Any) -> None:
    pairs: dict[type, tuple[Any, Any]] = {
        SamplingParams: (codec.sampling_params_to_wire, codec.sampling_params_from_wire),
        GenerateRequest: (codec.generate_request_to_wire, codec.generate_request_from_wire),
        Usage: (codec.usage_to_wire, codec.usage_from_wire),
        Delta: (codec.delta_to_wire, codec.delta_from_wire),
        ModelInfo: (codec.model_info_to_wire, codec.model_info_from_wire),
        KvLayout: (codec.kv_layout_to_wire, codec.kv_layout_from_wire),
        WorkerInfo: (codec.worker_info_to_wire, codec.worker_info_from_wire),
        Status: (codec.status_to_wire, codec.status_from_wire),
        CacheEvent: (codec.cache_event_to_wire, codec.cache_event_from_wire),
        WorkerUpdate: (codec.worker_update_to_wire, codec.worker_update_from_wire),
        Plan: (codec.plan_to_wire, codec.plan_from_wire),
    }
    to_wire, from_wire = pairs[type(value)]
    message = to_wire(value)
    parsed = type(message).FromString(message.SerializeToString())
    assert from_wire(parsed) == value


@given(INFO)
@settings(max_examples=20)
def test_the_layout_digest_survives(info: WorkerInfo) -> None:
    assert codec.worker_info_from_wire(codec.worker_info_to_wire(info)).layout.digest() == info.layout.digest()


def _request() -> pb.GenerateRequest:
    return codec.generate_request_to_wire(GenerateRequest("0" * 32, "m", (1, 2), SamplingParams()))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (lambda m: setattr(m, "request_id", ""), "request_id"),
        (lambda m: m.ClearField("prompt"), "prompt"),
        (lambda m: m.ClearField("sampling"), "sampling"),
        (lambda m: setattr(m, "choices", 0), "n"),
        (lambda m: setattr(m, "attempt", -1), "attempt"),
        (lambda m: setattr(m, "output_kind", 17), "output_kind"),
        (lambda m: setattr(m, "output_kind", 0), "output_kind"),
        (lambda m: setattr(m.sampling, "temperature", math.nan), "temperature"),
        (lambda m: setattr(m.sampling, "top_p", 0.0), "top_p"),
        (lambda m: setattr(m.sampling, "max_tokens", -1), "max_tokens"),
        (lambda m: setattr(m.sampling, "logprobs", 21), "logprobs"),
    ],
)
def test_malformed_requests_name_the_field(change: Any, param: str) -> None:
    message = _request()
    change(message)
    with pytest.raises(BadRequest, match=f"^{param} ") as caught:
        codec.generate_request_from_wire(message)
    assert caught.value.param == param


def test_malformed_messages_of_workers_name_the_field() -> None:
    cases: list[tuple[Any, Any, str]] = [
        (codec.cache_event_from_wire, pb.CacheEvent(kind=pb.EVENT_KIND_STORED, hashes=b"x" * 17), "hashes is 17 bytes"),
        (codec.cache_event_from_wire, pb.CacheEvent(kind=pb.EVENT_KIND_STORED, parent=b"x"), "parent is 1 bytes"),
        (codec.cache_event_from_wire, pb.CacheEvent(), "kind is 0"),
        (codec.delta_from_wire, pb.Delta.FromString(b"\x40\x63"), "finish is 99"),
        (codec.delta_from_wire, pb.Delta(logprobs=[pb.TokenLogprob(top_tokens=[1])]), "top_logprobs has 0 entries"),
        (codec.plan_from_wire, pb.Plan(), "candidates is empty"),
        (codec.worker_info_from_wire, pb.WorkerInfo(incarnation="i"), "role is 0"),
        (codec.status_from_wire, pb.Status(incarnation="i", running=-1), "status.running is -1"),
        (codec.worker_update_from_wire, worker_pb2.WorkerUpdate(), "incarnation is empty"),
        (codec.kv_layout_from_wire, pb.KvLayout(groups=[pb.LayerGroup(layers=[1])]), "layer groups must cover"),
        (codec.kv_layout_from_wire, pb.KvLayout(planes=[pb.Plane(name="k", dtype="int3")]), "dtype is 'int3'"),
    ]
    for function, message, text in cases:
        with pytest.raises(ValueError, match=text):
            function(message)


def test_a_hash_of_the_wrong_length_is_not_sent() -> None:
    with pytest.raises(ValueError, match="hashes has a block hash of 3 bytes"):
        codec.cache_event_to_wire(CacheEvent(EventKind.STORED, (b"abc",)))
