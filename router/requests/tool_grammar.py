"""What grammar holds an answer's tool calls: those that are forced, and those of functions that are strict."""

from __future__ import annotations

from router.requests.formats import ModelFormats
from router.requests.tools import ToolUse
from tandem.errors import BadRequest
from tandem.text.formats.held import CallGrammar, functions_of
from tandem.types import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, TokenIds


def calls_grammar(use: ToolUse, formats: ModelFormats, after: TokenIds) -> Grammar | None:
    """The grammar of a chat answer that may call tools; None where nothing was asked for that needs one.

    after: see `Grammar.after`. Raises BadRequest naming the field when this model's calls cannot be held so.
    """
    form = formats.tools
    if form is None or not (use.forced or use.strict):
        return None
    functions = functions_of(use.tools, use.strict)
    calls = CallGrammar(form.spelling(formats.template), functions, formats.special)
    if unheld := calls.unheld():
        reason = f"strict is not supported for calls of the form {form.name!r}; leave it out"
        raise BadRequest(f"{unheld} cannot be held to: {reason}", "tools")
    if use.forced:
        source = calls.forced(form.prefill(formats.template, use.function), use.function, use.one_call)
    else:
        source = calls.free(form.openings, form.bare, use.one_call)
    if (size := len(source.encode())) > MAX_GRAMMAR_BYTES:
        raise BadRequest(f"tools make a grammar of {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed", "tools")
    return Grammar(GrammarKind.STRUCTURAL_TAG, source, after)
