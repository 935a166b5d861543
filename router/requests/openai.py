"""OpenAI's request bodies: what is accepted, what is refused and with which words.

Fields without a model of their own are in `fields.py` beside this: ignored, not served, unknown. Ranges of the sampling
fields are `SamplingParams`' own; here is what JSON adds to them: types, lengths, nulls.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.requests.fields import check_fields
from tandem.errors import BadRequest
from tandem.types import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS

MAX_MESSAGES = 4096
MAX_PROMPTS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_SALT_CHARS = 256
MAX_NAME_CHARS = 256
MAX_PRIORITY = 1000
MAX_COMMAS = 1 << 20
"""Of a body. They bound the values in it, whose parsing holds the interpreter's lock, in a thread too: 0.2 µs each."""

Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Body):
    """`stream_options`"""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: usage so far in every chunk."""


class GenerationBody(_Body):
    """The fields that chat completions and completions share. None always means the default."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    """-1, as 0, keeps all tokens."""
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    ignore_eos: bool | None = None
    stop: Any = None
    """A string or a list of strings; see `stop_strings`."""
    stop_token_ids: Annotated[list[Id], Field(fail_fast=True, max_length=MAX_STOP_IDS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None

    response_format: Any = None
    """See `router.requests.structured`, for the others down to `structured_outputs` too."""
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None

    not_served: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are refused unless they have one of these values (or null), which ask for nothing."""


class Message(_Body):
    """One turn of a conversation."""

    role: str
    content: Any = None
    """A string, or a list of text parts; see `router.requests.messages`."""
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None
    tool_calls: Any = None
    tool_call_id: str | None = None
    function_call: Any = None
    """The form before `tool_calls`; refused."""
    reasoning_content: str | None = None


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    tools: Any = None
    """See `router.requests.tools`, for the choice too."""
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    """vLLM's: false leaves reasoning out of the answer."""
    separate_reasoning: bool | None = None
    """SGLang's: false leaves reasoning in the text, as the model wrote it."""

    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    chat_template: Any = None

    not_served: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "chat_template": (),
    }


class CompletionBody(GenerationBody):
    """`POST /v1/completions`"""

    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    """0 only scores the prompt, which `echo` and `logprobs` then report."""
    prompt: Any
    """A string, a list of ids, or a list of either; see `prompts`."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    """Whether a prompt that is text gets what the tokeniser puts around texts, such as BOS; True unless it is said."""
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    suffix: Any = None

    not_served: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}


class TokenizeBody(_Body):
    """`POST /tokenize`: text or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    """`POST /detokenize`"""

    model: str | None = None
    tokens: Annotated[list[Id], Field(fail_fast=True, max_length=MAX_COMMAS)]
    skip_special_tokens: bool | None = None


_Parsed = TypeVar("_Parsed", bound=BaseModel)


def parse(kind: type[_Parsed], body: bytes) -> _Parsed:
    """Validates a JSON body. Raises BadRequest naming the first field at fault and its limit."""
    if (commas := body.count(b",")) > MAX_COMMAS:
        raise BadRequest(f"the body has {commas} commas, which bound its values; at most {MAX_COMMAS} are allowed")
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        raise _first_fault(error) from None
    if isinstance(parsed, GenerationBody):
        _check(parsed)
    return parsed


def _first_fault(error: ValidationError) -> BadRequest:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if fault["type"] == "json_invalid":
        return BadRequest(f"the body is not valid JSON: {fault['msg'].removeprefix('Invalid JSON: ')}")
    path = [str(part)[:80] for part in fault["loc"]]
    if not path:
        return BadRequest(f"the body must be a JSON object: {fault['msg']}")
    if fault["type"] == "missing":
        return BadRequest(f"{'.'.join(path)} is required", path[0])
    return BadRequest(f"{'.'.join(path)}: {fault['msg']}", path[0])


def _check(body: GenerationBody) -> None:
    check_fields(body, body.not_served, body.model_extra or {})
    if body.stream_options is not None and not body.stream:
        raise BadRequest("stream_options is only allowed when stream is true", "stream_options")
    if isinstance(body, CompletionBody) and body.best_of is not None:
        if body.best_of < (body.n or 1):
            raise BadRequest(f"best_of is {body.best_of}; it must be at least n, which is {body.n or 1}", "best_of")
        if body.stream and body.best_of > (body.n or 1):
            raise BadRequest("best_of greater than n cannot be streamed: the best are known only at the end", "best_of")


def plain_text(text: str, param: str) -> str:
    """`text` when a tokeniser can take it. Raises BadRequest at NUL characters and lone surrogates."""
    if "\0" in text:
        raise BadRequest(f"{param} contains a NUL character (U+0000) at index {text.index(chr(0))}", param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"{param} contains a lone surrogate at index {error.start}", param) from None
    return text


def stop_strings(stop: Any) -> tuple[str, ...]:
    """The stop strings of a request. Raises BadRequest when there are too many, or one is empty or too long."""
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise BadRequest("stop must be a string or a list of strings", "stop")
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", "stop")
    for index, text in enumerate(stops):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise BadRequest(f"stop[{index}] has {len(text)} characters; 1 to {MAX_STOP_CHARS} are allowed", "stop")
    return tuple(dict.fromkeys(stops))


def prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion: a string, a list of ids, or a list of such. Raises BadRequest for anything else."""
    if isinstance(prompt, str):
        return [plain_text(prompt, "prompt")]
    if not isinstance(prompt, list):
        raise BadRequest("prompt must be a string, a list of token ids, or a list of those", "prompt")
    if not prompt:
        raise BadRequest("prompt is empty; at least 1 token is needed", "prompt")
    if _is_ids(prompt):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise BadRequest(f"prompt has {len(prompt)} prompts; at most {MAX_PROMPTS} are allowed", "prompt")
    for index, each in enumerate(prompt):
        if isinstance(each, str):
            plain_text(each, f"prompt[{index}]")
        elif not (isinstance(each, list) and each and _is_ids(each)):
            raise BadRequest(f"prompt[{index}] must be a string or a non-empty list of token ids", "prompt")
    return prompt


def _is_ids(values: list[Any]) -> bool:
    return set(map(type, values)) == {int}
