"""The nouns of a request: what is asked, how it is sampled, what comes back. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum

TokenIds = tuple[int, ...]


class FinishReason(Enum):
    """Why a choice ended. Every admitted choice gets exactly one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class OutputKind(Enum):
    """What a request asks the engine for. Only tokens are served today; the others are seams."""

    TOKENS = "tokens"
    EMBEDDING = "embedding"
    SCORES = "scores"


class GrammarKind(Enum):
    """What language a grammar is written in."""

    JSON_OBJECT = "json_object"
    """Any JSON object; the source is empty."""
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"
    """GBNF, as llama.cpp has it, with the rule `root`."""
    STRUCTURAL_TAG = "structural_tag"
    """XGrammar's structural tags, JSON."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the output's text must be a sentence of."""

    kind: GrammarKind
    source: str = ""
    after: TokenIds = ()
    """The output is free until it has held these tokens in a row: the end of a reasoning model's thoughts."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _within("the grammar's length", len(self.source.encode()), 0, MAX_GRAMMAR_BYTES)
        _within("the grammar's `after`", len(self.after), 0, MAX_STOP_IDS)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Ranges are enforced here once, so that no later layer has to ask."""

    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest, in [0, 1]."""
    frequency_penalty: float = 0.0
    """Subtracted per earlier occurrence in the output, in [-2, 2]."""
    presence_penalty: float = 0.0
    """Subtracted once if the token occurred in the output, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, if negative) logits of tokens in prompt or output; in (0, 10]."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias in [-100, 100]) pairs added to the logits."""
    seed: int = 0
    """Philox key (64 bits); the router draws one when the client gave none."""
    max_tokens: int = 16
    """Output tokens at most; 0 only computes the prompt (and its log-probabilities), and ends with reason LENGTH."""
    min_tokens: int = 0
    """No stop token is sampled before this many output tokens."""
    stop_token_ids: TokenIds = ()
    """Extra ids that end the output; they are included in the token stream, with reason STOP."""
    ignore_eos: bool = False
    """Go on after the model's own end-of-sequence ids."""
    logprobs: int | None = None
    """Report each output token's log-probability and this many of the likeliest alternatives; None reports none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens; None reports none."""
    grammar: Grammar | None = None
    """What the output must be a sentence of; None leaves it free."""

    def __post_init__(self) -> None:
        """Raises ValueError whose text names the field, the value and the limit."""
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("top_k", self.top_k, 0, 1 << 31)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _within("seed", self.seed, 0, (1 << 64) - 1)
        _within("max_tokens", self.max_tokens, 0, 1 << 31)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _within(name, value, 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids has {len(self.stop_token_ids)} ids; at most {MAX_STOP_IDS} are allowed")
        for token, bias in self.logit_bias:
            _within(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change what comes next."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_IDS = 64
MAX_CHOICES = 128
MAX_GRAMMAR_BYTES = 1 << 18


def _within(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} is {value}; it must be in {bracket}{low:g}, {high:g}]")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request as the router hands it to the cluster: token ids in, token ids out."""

    request_id: str
    """32 hexadecimal digits, drawn by the router; never a client's."""
    model: str
    prompt: TokenIds
    sampling: SamplingParams
    choices: int = 1
    """How many independent continuations (`n`); choice i samples with Philox counter word i."""
    attempt: int = 0
    """Raised by the router each time it submits the request anew; older attempts are fenced."""
    output_kind: OutputKind = OutputKind.TOKENS
    salt: str = ""
    """The tenant's salt; part of the root of every block hash."""
    adapter: str = ""
    """Name of the LoRA adapter, empty for none; part of the root of every block hash."""
    priority: int = 0
    """Higher is served sooner."""
    tenant: str = ""
    """Whose it is: workers share their time fairly among tenants. Empty where no keys are configured."""
    cost: int = 0
    """Tokens, prompt and output, that it is expected to take; what a tenant's share is charged with."""
    generated: tuple[TokenIds, ...] = ()
    """The output of each choice so far, where the request goes on after a worker was lost; empty for a new one."""
    ended: tuple[int, ...] = ()
    """Choices that had ended by then."""
    follows: bool = False
    """Came with another prompt, in one HTTP request, which is counted with that one."""
    traceparent: str = ""
    """What its spans belong to (W3C Trace Context); empty where it is not traced."""
    tracestate: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field."""
        if not self.prompt:
            raise ValueError("prompt is empty; at least 1 token is needed")
        _within("n", self.choices, 1, MAX_CHOICES)
        if self.generated and len(self.generated) != self.choices:
            raise ValueError(f"generated has {len(self.generated)} choices; n is {self.choices}")
        if any(choice not in range(self.choices) for choice in self.ended):
            raise ValueError(f"ended names choices {self.ended}; n is {self.choices}")
        if len(set(self.ended)) == self.choices:
            raise ValueError("ended names every choice; at least 1 must be left")
        for choice, tokens in enumerate(self.generated):
            if choice not in self.ended and tokens and len(tokens) >= self.sampling.max_tokens:
                raise ValueError(f"generated has {len(tokens)} tokens; max_tokens is {self.sampling.max_tokens}")

    def again(self, generated: tuple[TokenIds, ...] = (), ended: tuple[int, ...] = ()) -> GenerateRequest:
        """The same request as its next attempt, from where it stands."""
        return replace(self, attempt=self.attempt + 1, generated=generated, ended=ended)

    def made(self, choice: int) -> TokenIds:
        """A choice's output so far."""
        return self.generated[choice] if self.generated else ()

    @property
    def lead(self) -> int:
        """The first choice that has not ended: it gets the prompt's KV, and the others find it in the cache."""
        return next(choice for choice in range(self.choices) if choice not in self.ended)

    @property
    def known(self) -> TokenIds:
        """What is known of that choice: the prompt, and its output so far."""
        return self.prompt + self.made(self.lead)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural, before penalties and temperature) of one token and its likeliest rivals, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice. `first_index` counts output tokens, so that a reader can drop repeats."""

    request_id: str
    attempt: int
    choice: int
    first_index: int
    tokens: TokenIds = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token when asked for, else empty."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """Only in a choice's first delta, when asked for; the first prompt token has None."""
    finish: FinishReason | None = None
    stop_token: int | None = None
    """The id that ended the choice when `finish` is STOP."""
    error: str = ""
    """One line for the client when `finish` is ERROR."""
    leaving: bool = False
    """Whether `finish` is ERROR only because the worker ends: another one can go on."""
    usage: Usage | None = None
    """In a choice's last delta; in its first, too, for a choice that the router ends by itself at a stop string."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one finished choice, and where its prompt's KV came from."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV no worker had to compute: found on the decode worker or on the prefill worker."""
    decode_cached_tokens: int = 0
    """Of those, found in the decode worker's own cache."""
    moved_tokens: int = 0
    """Prompt tokens whose KV was handed over."""
    sender: str = ""
    """Incarnation of the worker that handed it over, the last one tried; empty when none was asked."""
    hand_over_ms: float = 0.0
    """Milliseconds from asking for the prompt's KV to the end of the hand-over."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a router must know about the model that a worker serves."""

    name: str
    """The name clients use."""
    path: str
    """Folder or hub id that the worker loaded; the router loads its tokeniser from it."""
    fingerprint: str
    """Hex digest over configuration and weights' names, shapes and a sample of their bytes."""
    vocab_size: int
    max_context: int
    """Prompt plus output tokens at most."""
    eos_token_ids: TokenIds = field(default=())
