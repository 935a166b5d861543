"""What grammar holds an answer's tool calls: those that are forced, and those of functions that are strict."""

from __future__ import annotations

from router.formats import ModelFormats
from router.tools import ToolUse
from tandem.errors import BadRequest
from tandem.text.formats.held import CallGrammar, Function
from tandem.types import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, TokenIds

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def calls_grammar(use: ToolUse, formats: ModelFormats, after: TokenIds) -> Grammar | None:
    """The grammar of a chat answer that may call tools; None where nothing was asked for that needs one.

    after: see `Grammar.after`. Raises BadRequest naming the field when this model's calls cannot be held so.
    """
    form = formats.tools
    if form is None or not (use.forced or use.strict):
        return None
    spelling = form.spelling(formats.template)
    functions = []
    for index, tool in enumerate(use.tools):
        name, field = tool["function"]["name"], f"tools.{index}.function"
        if name in use.strict and spelling.arguments:
            reason = f"calls of the form {form.name!r} cannot be held to a schema; leave it out"
            raise BadRequest(f"{field}.strict is not supported: {reason}", "tools")
        schema = tool["function"].get("parameters") or NO_ARGUMENTS
        if use.function in (None, name):
            functions.append(Function(name, f"{field}.parameters", schema if name in use.strict else None))
    calls = CallGrammar(spelling, functions, formats.special)
    if use.forced:
        prefill = form.prefill(formats.template, use.function)
        source = calls.forced(prefill, use.function is not None, use.one_call)
    else:
        source = calls.free(form.openings, form.bare, use.one_call)
    if (size := len(source.encode())) > MAX_GRAMMAR_BYTES:
        raise BadRequest(f"tools make a grammar of {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed", "tools")
    return Grammar(GrammarKind.STRUCTURAL_TAG, source, after)
