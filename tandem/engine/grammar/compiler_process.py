"""The process in which grammars are compiled: it may be killed at any time, and nothing but its request is lost.

Reads one line of JSON for each grammar, the arguments of `compile_one`, and answers with one line of JSON,
`{"bytes": n}` followed by n bytes, or `{"error": why}`. The first line it writes, `{"bytes": n}`, precedes the
vocabulary in serialised form.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import xgrammar

from tandem.engine.grammar.schema.document import Unfit
from tandem.engine.grammar.schema.lower import lower
from tandem.engine.grammar.vocabulary import load_vocabulary
from tandem.text.formats.held import TAG_START

NICENESS = 10
"""The engine beside it must not notice."""
TOO_MUCH = "compiling it needs too much memory"
MAX_COMPLAINT = 300
LOCATION = re.compile(r"^(\[.*?\] )?(/\S+?:\d+: )?(Check failed: \(.*?\) is false: )?")
ESCAPE = re.compile(r"(\\\\)|\\x([0-9a-f]{2})")
"""A backslash that stands for itself, or the code of a character as XGrammar prints it in EBNF."""
MAX_WHITESPACE = 8
"""Blanks and newlines that may stand between two parts of a JSON text: a model must not write them for ever."""


def compile_one(
    compiler: xgrammar.GrammarCompiler, kind: str, source: str, any_whitespace: bool = False
) -> xgrammar.CompiledGrammar:
    """any_whitespace: see `CompilerSettings`. Raises ValueError or RuntimeError with the compiler's complaint."""
    match kind:
        case "json_object" | "json_schema":
            schema = json.dumps(lower(json.loads(source))) if source else '{"type": "object"}'
            most = MAX_WHITESPACE if any_whitespace else None
            return compiler.compile_json_schema(schema, any_whitespace=any_whitespace, max_whitespace_cnt=most)
        case "regex":
            return compiler.compile_regex(source)
        case "ebnf":
            return compiler.compile_grammar(source)
        case "structural_tag":
            return compiler.compile_structural_tag(with_grammars(source, any_whitespace))
    raise ValueError(f"no such kind of grammar: {kind}")


class UnfitSchema(ValueError):
    """A schema inside a structural tag does not compile."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(why)
        self.field = field


def with_grammars(source: str, any_whitespace: bool) -> str:
    """A structural tag whose schemas of tools are grammars: laid out as other JSON, and each with its own complaint.

    The schemas of a client's own tags stay schemas. Raises UnfitSchema, Unfit.
    """
    tag = json.loads(source)
    if not source.startswith(TAG_START):
        _lower_within(tag)
        return json.dumps(tag)
    made: dict[str, str] = {}
    todo = [tag.pop("format")]
    tag = {"type": tag["type"], "format": todo[0]}
    while todo:
        piece = todo.pop()
        if isinstance(piece, list):
            todo += [each for each in piece if isinstance(each, dict | list)]
        elif piece.get("type") == "json_schema":
            field = str(piece.pop("field", ""))
            if field not in made:
                made[field] = schema_grammar(piece["json_schema"], field, any_whitespace)
            piece.clear()
            piece.update(type="grammar", grammar=made[field])
        else:
            todo += [piece[name] for name in ("elements", "content", "rules") if name in piece]
    return json.dumps(tag)


def _lower_within(tag: object) -> None:
    """Lowers the JSON schemas in a structural tag; other spellings of values are XGrammar's alone."""
    todo = [tag]
    while todo:
        piece = todo.pop()
        if isinstance(piece, list):
            todo += piece
        elif isinstance(piece, dict):
            for name in ("json_schema", "schema"):
                if isinstance(piece.get(name), dict | bool) and piece.get("style", "json") == "json":
                    piece[name] = lower(piece[name])
            todo += [value for name, value in piece.items() if name not in ("json_schema", "schema")]


def schema_grammar(schema: object, field: str, any_whitespace: bool) -> str:
    """A JSON schema as EBNF. Raises UnfitSchema."""
    most = MAX_WHITESPACE if any_whitespace else None
    try:
        made = xgrammar.Grammar.from_json_schema(
            json.dumps(lower(schema)), any_whitespace=any_whitespace, max_whitespace_cnt=most
        )
    except (RuntimeError, Unfit) as error:
        raise UnfitSchema(field, complaint(error)) from error
    # Read again, the two digits after an x would take in those letters of the text that are digits, too: "\xe9c".
    return ESCAPE.sub(lambda found: found[1] or rf"\u00{found[2]}", str(made))


def limit_memory(more_bytes: int) -> None:
    """Lets the process grow by so much from now on, and not further."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))


def serve(compiler: xgrammar.GrammarCompiler, requests: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """Answers until the requests end, or until one takes longer than `seconds`: SIGALRM then ends the process."""
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            compiled = compile_one(compiler, **request).serialize_json().encode()
        except MemoryError:
            answer(answers, {"error": TOO_MUCH})
        except Exception as error:  # noqa: BLE001 - whatever a hostile text provokes is the text's fault
            answer(answers, {"error": complaint(error), "field": getattr(error, "field", "")})
        else:
            answer(answers, {"bytes": len(compiled)}, compiled)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def complaint(error: Exception) -> str:
    """What a client can use of the compiler's text: its first line, without the compiler's own source."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "bad_alloc" in text:
        return TOO_MUCH
    return LOCATION.sub("", text)[:MAX_COMPLAINT]


def answer(answers: BinaryIO, head: dict[str, object], body: bytes = b"") -> None:
    """One header line, then the body."""
    answers.write(json.dumps(head).encode() + b"\n" + body)
    answers.flush()


def main(folder: str, vocab_size: int, stop_ids: list[int], memory_mib: int, seconds: float) -> None:
    """Loads the vocabulary, sends it, and serves."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that a library writes gets between the answers
    os.nice(NICENESS)
    vocabulary = load_vocabulary(folder, vocab_size, stop_ids)
    serialised = vocabulary.serialize_json().encode()
    answer(answers, {"bytes": len(serialised)}, serialised)
    limit_memory(memory_mib << 20)
    serve(xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False), sys.stdin.buffer, answers, seconds)


if __name__ == "__main__":
    stops = [int(part) for part in sys.argv[3].split(",") if part]
    main(sys.argv[1], int(sys.argv[2]), stops, int(sys.argv[4]), float(sys.argv[5]))
