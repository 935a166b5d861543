"""Dataclass <-> message, one pair of functions a type; total on valid values and round-trip tested.

`*_from_wire` raises ValueError whose text starts with the field at fault; `generate_request_from_wire`, whose messages
come from routers on behalf of clients, raises BadRequest with the same text and the field as `param`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

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
from tandem.kv import DTYPE_BYTES, BlockHash, KvLayout, LayerGroup, Plane
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
from tandem.wire.v1 import common_pb2 as pb
from tandem.wire.v1 import worker_pb2

HASH_BYTES = 16

_T = TypeVar("_T")

_OUTPUT_KIND: dict[OutputKind, pb.OutputKind] = {
    OutputKind.TOKENS: pb.OUTPUT_KIND_TOKENS,
    OutputKind.EMBEDDING: pb.OUTPUT_KIND_EMBEDDING,
    OutputKind.SCORES: pb.OUTPUT_KIND_SCORES,
}
_GRAMMAR_KIND: dict[GrammarKind, pb.GrammarKind] = {
    GrammarKind.JSON_OBJECT: pb.GRAMMAR_KIND_JSON_OBJECT,
    GrammarKind.JSON_SCHEMA: pb.GRAMMAR_KIND_JSON_SCHEMA,
    GrammarKind.REGEX: pb.GRAMMAR_KIND_REGEX,
    GrammarKind.EBNF: pb.GRAMMAR_KIND_EBNF,
    GrammarKind.STRUCTURAL_TAG: pb.GRAMMAR_KIND_STRUCTURAL_TAG,
}
_FINISH: dict[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_ROLE: dict[Role, pb.Role] = {Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE}
_EVENT: dict[EventKind, pb.EventKind] = {
    EventKind.PROMISED: pb.EVENT_KIND_PROMISED,
    EventKind.STORED: pb.EVENT_KIND_STORED,
    EventKind.EVICTED: pb.EVENT_KIND_EVICTED,
    EventKind.WITHDRAWN: pb.EVENT_KIND_WITHDRAWN,
}
_OUTPUT_KIND_BACK = {int(wire): kind for kind, wire in _OUTPUT_KIND.items()}
_GRAMMAR_KIND_BACK = {int(wire): kind for kind, wire in _GRAMMAR_KIND.items()}
_FINISH_BACK = {int(wire): reason for reason, wire in _FINISH.items()}
_ROLE_BACK = {int(wire): role for role, wire in _ROLE.items()}
_EVENT_BACK = {int(wire): kind for kind, wire in _EVENT.items()}


def _enum(field: str, table: Mapping[int, _T], value: int) -> _T:
    try:
        return table[int(value)]
    except KeyError:
        raise ValueError(f"{field} is {int(value)}; it must be one of {sorted(table)}") from None


def _positive(field: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{field} is {value}; it must be at least 1")
    return value


def _not_negative(field: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{field} is {value}; it must not be negative")
    return value


def _present(field: str, value: str) -> str:
    if not value:
        raise ValueError(f"{field} is empty")
    return value


def sampling_params_to_wire(params: SamplingParams) -> pb.SamplingParams:
    """SamplingParams as a message."""
    return pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=[pb.LogitBias(token=token, bias=bias) for token, bias in params.logit_bias],
        seed=params.seed,
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        grammar=None if params.grammar is None else _grammar_to_wire(params.grammar),
    )


def _grammar_to_wire(grammar: Grammar) -> pb.Grammar:
    return pb.Grammar(kind=_GRAMMAR_KIND[grammar.kind], source=grammar.source, after=grammar.after)


def _grammar_from_wire(message: pb.Grammar) -> Grammar:
    return Grammar(_enum("grammar.kind", _GRAMMAR_KIND_BACK, message.kind), message.source, tuple(message.after))


def sampling_params_from_wire(message: pb.SamplingParams) -> SamplingParams:
    """The inverse; raises ValueError for a value out of range."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple((entry.token, entry.bias) for entry in message.logit_bias),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        grammar=_grammar_from_wire(message.grammar) if message.HasField("grammar") else None,
    )


def generate_request_to_wire(request: GenerateRequest) -> pb.GenerateRequest:
    """GenerateRequest as a message."""
    return pb.GenerateRequest(
        request_id=request.request_id,
        model=request.model,
        prompt=request.prompt,
        sampling=sampling_params_to_wire(request.sampling),
        choices=request.choices,
        attempt=request.attempt,
        output_kind=_OUTPUT_KIND[request.output_kind],
        salt=request.salt,
        adapter=request.adapter,
        priority=request.priority,
        tenant=request.tenant,
        cost=request.cost,
        generated=[pb.TokenIds(tokens=tokens) for tokens in request.generated],
        ended=request.ended,
        follows=request.follows,
        traceparent=request.traceparent,
        tracestate=request.tracestate,
    )


def generate_request_from_wire(message: pb.GenerateRequest) -> GenerateRequest:
    """The inverse; raises BadRequest whose text and `param` name the field."""
    try:
        if not message.HasField("sampling"):
            raise ValueError("sampling is missing")
        return GenerateRequest(
            request_id=_present("request_id", message.request_id),
            model=message.model,
            prompt=tuple(message.prompt),
            sampling=sampling_params_from_wire(message.sampling),
            choices=message.choices,
            attempt=_not_negative("attempt", message.attempt),
            output_kind=_enum("output_kind", _OUTPUT_KIND_BACK, message.output_kind),
            salt=message.salt,
            adapter=message.adapter,
            priority=message.priority,
            tenant=message.tenant,
            cost=_not_negative("cost", message.cost),
            generated=tuple(tuple(choice.tokens) for choice in message.generated),
            ended=tuple(message.ended),
            follows=message.follows,
            traceparent=message.traceparent,
            tracestate=message.tracestate,
        )
    except ValueError as error:
        # Every such text starts with the field's name, here and in tandem.types.
        raise BadRequest(str(error), param=str(error).split(" ", 1)[0]) from None


def _logprob_to_wire(entry: TokenLogprob | None) -> pb.TokenLogprob:
    if entry is None:
        return pb.TokenLogprob(absent=True)
    return pb.TokenLogprob(
        token=entry.token,
        logprob=entry.logprob,
        top_tokens=[token for token, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def _logprob_from_wire(message: pb.TokenLogprob) -> TokenLogprob:
    if len(message.top_tokens) != len(message.top_logprobs):
        raise ValueError(
            f"top_logprobs has {len(message.top_logprobs)} entries for {len(message.top_tokens)} top_tokens"
        )
    return TokenLogprob(
        message.token, message.logprob, tuple(zip(message.top_tokens, message.top_logprobs, strict=True))
    )


def _prompt_logprob_from_wire(message: pb.TokenLogprob) -> TokenLogprob | None:
    return None if message.absent else _logprob_from_wire(message)


def usage_to_wire(usage: Usage) -> pb.Usage:
    """Usage as a message."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        decode_cached_tokens=usage.decode_cached_tokens,
        moved_tokens=usage.moved_tokens,
        sender=usage.sender,
        hand_over_ms=usage.hand_over_ms,
    )


def usage_from_wire(message: pb.Usage) -> Usage:
    """The inverse."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        decode_cached_tokens=message.decode_cached_tokens,
        moved_tokens=message.moved_tokens,
        sender=message.sender,
        hand_over_ms=message.hand_over_ms,
    )


def delta_to_wire(delta: Delta) -> pb.Delta:
    """Delta as a message, logprobs as float32. Runs once a sequence and step: absent fields are not touched."""
    message = pb.Delta(
        request_id=delta.request_id,
        attempt=delta.attempt,
        choice=delta.choice,
        first_index=delta.first_index,
        tokens=delta.tokens,
    )
    if delta.logprobs:
        message.logprobs.extend(map(_logprob_to_wire, delta.logprobs))
    if delta.prompt_logprobs:
        message.prompt_logprobs.extend(map(_logprob_to_wire, delta.prompt_logprobs))
    if delta.finish is not None:
        message.finish = _FINISH[delta.finish]
        message.error = delta.error
        message.leaving = delta.leaving
        if delta.stop_token is not None:
            message.stop_token = delta.stop_token
    if delta.usage is not None:
        message.usage.CopyFrom(usage_to_wire(delta.usage))
    return message


def delta_from_wire(message: pb.Delta) -> Delta:
    """The inverse; raises ValueError for an unknown finish reason or ragged logprobs."""
    if not message.finish and not message.HasField("usage"):
        return Delta(
            message.request_id,
            message.attempt,
            message.choice,
            message.first_index,
            tuple(message.tokens),
            tuple(map(_logprob_from_wire, message.logprobs)) if message.logprobs else (),
            tuple(map(_prompt_logprob_from_wire, message.prompt_logprobs)) if message.prompt_logprobs else (),
        )
    return Delta(
        request_id=message.request_id,
        attempt=message.attempt,
        choice=message.choice,
        first_index=message.first_index,
        tokens=tuple(message.tokens),
        logprobs=tuple(map(_logprob_from_wire, message.logprobs)) if message.logprobs else (),
        prompt_logprobs=tuple(map(_prompt_logprob_from_wire, message.prompt_logprobs))
        if message.prompt_logprobs
        else (),
        finish=_enum("finish", _FINISH_BACK, message.finish) if message.finish else None,
        stop_token=message.stop_token if message.HasField("stop_token") else None,
        error=message.error,
        leaving=message.leaving,
        usage=usage_from_wire(message.usage) if message.HasField("usage") else None,
    )


def model_info_to_wire(model: ModelInfo) -> pb.ModelInfo:
    """ModelInfo as a message."""
    return pb.ModelInfo(
        name=model.name,
        path=model.path,
        fingerprint=model.fingerprint,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        eos_token_ids=model.eos_token_ids,
    )


def model_info_from_wire(message: pb.ModelInfo) -> ModelInfo:
    """The inverse; raises ValueError for an empty name or fingerprint or a size below 1."""
    return ModelInfo(
        name=_present("model.name", message.name),
        path=message.path,
        fingerprint=_present("model.fingerprint", message.fingerprint),
        vocab_size=_positive("model.vocab_size", message.vocab_size),
        max_context=_positive("model.max_context", message.max_context),
        eos_token_ids=tuple(message.eos_token_ids),
    )


def kv_layout_to_wire(layout: KvLayout) -> pb.KvLayout:
    """KvLayout as a message."""
    return pb.KvLayout(
        planes=[pb.Plane(name=p.name, heads=p.heads, head_dim=p.head_dim, dtype=p.dtype) for p in layout.planes],
        groups=[pb.LayerGroup(layers=g.layers, window=g.window, planes=g.planes) for g in layout.groups],
    )


def _plane_from_wire(message: pb.Plane) -> Plane:
    if message.dtype not in DTYPE_BYTES:
        raise ValueError(f"layout.planes.dtype is {message.dtype!r}; it must be one of {sorted(DTYPE_BYTES)}")
    return Plane(
        name=_present("layout.planes.name", message.name),
        heads=_positive("layout.planes.heads", message.heads),
        head_dim=_positive("layout.planes.head_dim", message.head_dim),
        dtype=message.dtype,
    )


def kv_layout_from_wire(message: pb.KvLayout) -> KvLayout:
    """The inverse; raises ValueError for an unknown dtype or plane, an empty shape or layers not covered once each."""
    groups = tuple(
        LayerGroup(tuple(g.layers), g.window if g.HasField("window") else None, tuple(g.planes)) for g in message.groups
    )
    return KvLayout(planes=tuple(map(_plane_from_wire, message.planes)), groups=groups)


def worker_info_to_wire(info: WorkerInfo) -> pb.WorkerInfo:
    """WorkerInfo as a message."""
    return pb.WorkerInfo(
        incarnation=info.incarnation,
        role=_ROLE[info.role],
        address=info.address,
        model=model_info_to_wire(info.model),
        layout=kv_layout_to_wire(info.layout),
        kv_dtype=info.kv_dtype,
        page_size=info.page_size,
        total_pages=info.total_pages,
        max_batch_tokens=info.max_batch_tokens,
        transport=info.transport,
        metrics_port=info.metrics_port,
        threads=info.threads,
        pid=info.pid,
    )


def worker_info_from_wire(message: pb.WorkerInfo) -> WorkerInfo:
    """The inverse; raises ValueError naming the field."""
    return WorkerInfo(
        incarnation=_present("incarnation", message.incarnation),
        role=_enum("role", _ROLE_BACK, message.role),
        address=_present("address", message.address),
        model=model_info_from_wire(message.model),
        layout=kv_layout_from_wire(message.layout),
        kv_dtype=message.kv_dtype,
        page_size=_positive("page_size", message.page_size),
        total_pages=_positive("total_pages", message.total_pages),
        max_batch_tokens=_positive("max_batch_tokens", message.max_batch_tokens),
        transport=message.transport,
        metrics_port=message.metrics_port,
        threads=message.threads,
        pid=message.pid,
    )


def status_to_wire(status: Status) -> pb.Status:
    """Status as a message."""
    timing = status.timing
    return pb.Status(
        incarnation=status.incarnation,
        running=status.running,
        waiting=status.waiting,
        queued_tokens=status.queued_tokens,
        free_pages=status.free_pages,
        total_pages=status.total_pages,
        timing=None if timing is None else pb.StepTiming(base_ms=timing.base_ms, per_token_ms=timing.per_token_ms),
        move_bytes_per_ms=status.move_bytes_per_ms,
        dispatches=status.dispatches,
        draining=status.draining,
        moves=[
            pb.MoveStat(
                sender=move.sender,
                receiver=move.receiver,
                transport=move.transport,
                bytes=move.bytes,
                seconds=move.seconds,
                tickets=move.tickets,
                failures=move.failures,
            )
            for move in status.moves
        ],
        tenants=[
            pb.TenantUse(
                tenant=use.tenant,
                router_id=use.router_id,
                requests=use.requests,
                tokens=use.tokens,
                running=use.running,
            )
            for use in status.tenants
        ],
    )


def status_from_wire(message: pb.Status) -> Status:
    """The inverse; raises ValueError for a negative count."""
    timing = message.timing
    return Status(
        incarnation=_present("status.incarnation", message.incarnation),
        running=_not_negative("status.running", message.running),
        waiting=_not_negative("status.waiting", message.waiting),
        queued_tokens=_not_negative("status.queued_tokens", message.queued_tokens),
        free_pages=_not_negative("status.free_pages", message.free_pages),
        total_pages=_not_negative("status.total_pages", message.total_pages),
        timing=StepTiming(timing.base_ms, timing.per_token_ms) if message.HasField("timing") else None,
        move_bytes_per_ms=message.move_bytes_per_ms,
        dispatches=dict(message.dispatches),
        draining=message.draining,
        moves=tuple(
            MoveStat(move.sender, move.receiver, move.transport, move.bytes, move.seconds, move.tickets, move.failures)
            for move in message.moves
        ),
        tenants=tuple(
            TenantUse(use.tenant, use.router_id, use.requests, use.tokens, use.running) for use in message.tenants
        ),
    )


def _hashes_from_wire(field: str, data: bytes) -> tuple[BlockHash, ...]:
    if len(data) % HASH_BYTES:
        raise ValueError(f"{field} is {len(data)} bytes; it must be a multiple of {HASH_BYTES}")
    return tuple(data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES))


def cache_event_to_wire(event: CacheEvent) -> pb.CacheEvent:
    """CacheEvent as a message; its hashes are joined, so each must be 16 bytes (ValueError otherwise)."""
    for block in event.hashes:
        if len(block) != HASH_BYTES:
            raise ValueError(f"hashes has a block hash of {len(block)} bytes; it must be {HASH_BYTES}")
    return pb.CacheEvent(kind=_EVENT[event.kind], hashes=b"".join(event.hashes), parent=event.parent, tier=event.tier)


def cache_event_from_wire(message: pb.CacheEvent) -> CacheEvent:
    """The inverse; raises ValueError for an unknown kind or a hash of the wrong length."""
    if len(message.parent) not in (0, HASH_BYTES):
        raise ValueError(f"parent is {len(message.parent)} bytes; it must be 0 or {HASH_BYTES}")
    return CacheEvent(
        kind=_enum("kind", _EVENT_BACK, message.kind),
        hashes=_hashes_from_wire("hashes", message.hashes),
        parent=message.parent,
        tier=message.tier,
    )


def worker_update_to_wire(update: WorkerUpdate) -> worker_pb2.WorkerUpdate:
    """WorkerUpdate as a message."""
    return worker_pb2.WorkerUpdate(
        incarnation=update.incarnation,
        sequence=update.sequence,
        events=[cache_event_to_wire(event) for event in update.events],
        status=None if update.status is None else status_to_wire(update.status),
        snapshot=update.snapshot,
    )


def worker_update_from_wire(message: worker_pb2.WorkerUpdate) -> WorkerUpdate:
    """The inverse; raises ValueError naming the field."""
    return WorkerUpdate(
        incarnation=_present("incarnation", message.incarnation),
        sequence=_not_negative("sequence", message.sequence),
        events=tuple(map(cache_event_from_wire, message.events)),
        status=status_from_wire(message.status) if message.HasField("status") else None,
        snapshot=message.snapshot,
    )


def plan_to_wire(plan: Plan) -> pb.Plan:
    """Plan as a message."""
    return pb.Plan(candidates=_candidates_to_wire(plan.candidates), policy=plan.policy)


def _candidates_to_wire(candidates: Iterable[Candidate]) -> list[pb.Candidate]:
    return [
        pb.Candidate(
            decode=candidate.decode,
            prefill=candidate.prefill or "",
            decode_cached=candidate.decode_cached,
            prefill_cached=candidate.prefill_cached,
            costs=candidate.costs,
        )
        for candidate in candidates
    ]


def plan_from_wire(message: pb.Plan) -> Plan:
    """The inverse; raises ValueError for a plan without candidates."""
    if not message.candidates:
        raise ValueError("candidates is empty; a plan has at least one")
    candidates = (
        Candidate(
            decode=_present("candidates.decode", candidate.decode),
            prefill=candidate.prefill or None,
            decode_cached=candidate.decode_cached,
            prefill_cached=candidate.prefill_cached,
            costs=dict(candidate.costs),
        )
        for candidate in message.candidates
    )
    return Plan(candidates=tuple(candidates), policy=message.policy)
