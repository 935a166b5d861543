"""Fields of a generation request that need no model of their own: ignored ones, unserved ones, unknown ones.

As with OpenAI, a field that nobody knows is refused: a misspelt limit must not become the default in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.errors import BadRequest

IGNORED = frozenset(
    {
        # They name, file or bill a request, or ask for what is always so; none of them changes an answer.
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
        "request_id",
        "rid",
        "parallel_tool_calls",
    }
)
"""Accepted with any value of moderate size, on both endpoints."""
MAX_IGNORED_TEXT = 4096
MAX_IGNORED_VALUES = 256

INERT: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "echo": (False,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_logprob": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "lora_path": (),
    "mm_processor_kwargs": ({},),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
"""Fields of vLLM's and SGLang's that Tandem does not serve, and the values (beside null) that ask for nothing."""


def check_fields(body: object, served: Mapping[str, tuple[Any, ...]], extra: Mapping[str, Any]) -> None:
    """Refuses what is not served, then what is not known.

    body: the parsed request. served: of its own fields, those with only inert values, and which. extra: what its model
    does not declare. Raises BadRequest naming the field.
    """
    for name, inert in served.items():
        _only(name, getattr(body, name), inert)
    for name, value in extra.items():
        if name in INERT:
            _only(name, value, INERT[name])
        elif name in IGNORED:
            _check_size(name, value)
        else:
            raise BadRequest(f"Unrecognized request argument supplied: {name[:80]}", name[:80])


def _check_size(name: str, value: object) -> None:
    todo, count = [value], 0
    while todo:
        each, count = todo.pop(), count + 1
        if isinstance(each, dict):
            todo += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            todo += each
        unfit = isinstance(each, int | float) and not abs(each) < float(1 << 63)
        if unfit or count + len(todo) > MAX_IGNORED_VALUES or (isinstance(each, str) and len(each) > MAX_IGNORED_TEXT):
            most = f"at most {MAX_IGNORED_VALUES} values, texts of {MAX_IGNORED_TEXT} characters and 64-bit numbers"
            raise BadRequest(f"{name} is too large, though nothing depends on it; {most} are allowed", name)


def _only(name: str, value: object, inert: tuple[Any, ...]) -> None:
    # True is equal to 1, and False to 0; neither stands for the other here.
    if value is not None and not any(value == each and type(value) is type(each) for each in inert):
        raise BadRequest(f"{name} is not supported yet", name)
