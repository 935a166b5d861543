"""The public JSON-Schema test suite, draft 2020-12, against the endpoint and against the grammars themselves.

    pip download --no-deps --no-binary :all: jsonschema==4.26.0     # its source archive carries the suite
    python -m benchmarks.schema_suite jsonschema-4.26.0.tar.gz

Each schema is asked for over HTTP: it is served or refused with 400, and every answer that finished must be valid for
`jsonschema`. Each of its instances is then walked through the grammar: an invalid one must be rejected; a valid one
that is rejected counts as over-strict.
"""

from __future__ import annotations

import asyncio
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import jsonschema
import typer
import xgrammar
from rich.console import Console
from rich.table import Table

from benchmarks.report import write_json
from benchmarks.shapes import checkpoint
from benchmarks.structured import BATCH, MESSAGES, SYSTEM
from benchmarks.systems import Peers, Setting, StartError, server
from tandem.engine.grammar.schema.document import Unfit
from tandem.engine.grammar.schema.lower import lower
from tandem.errors import ConfigError

FILE = re.compile(r"(?:^|/)tests/draft2020-12/([\w-]+)\.json$")


@dataclass(frozen=True, slots=True)
class SuiteCase:
    """One schema of the suite and its instances."""

    keyword: str
    about: str
    schema: Any
    instances: tuple[tuple[Any, bool], ...]
    """Each with whether it is valid."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one case; answers and instances are counted only where the schema is served."""

    keyword: str
    about: str
    refusal: str = ""
    """The endpoint's words, where it refuses the schema."""
    disagree: bool = False
    """Whether the endpoint serves what the grammar alone refuses, or the other way round."""
    finished: int = 0
    wrong: tuple[str, ...] = ()
    """Answers that finished and are not valid."""
    accepted: int = 0
    strict: int = 0
    """Valid instances that the grammar rejects."""
    rejected: int = 0
    unsound: tuple[str, ...] = ()
    """Invalid instances that it accepts."""


def cases(suite: Path) -> list[SuiteCase]:
    """All core cases of a folder or of a source archive. Raises ConfigError when there are none."""
    found = [
        SuiteCase(name, case["description"], case["schema"], tuple((t["data"], t["valid"]) for t in case["tests"]))
        for name, text in sorted(_files(suite))
        for case in json.loads(text)
    ]
    if not found:
        raise ConfigError(f"{suite} has no tests/draft2020-12/*.json", "suite")
    return found


def _files(suite: Path) -> Iterator[tuple[str, bytes]]:
    if suite.is_dir():
        for path in suite.rglob("*.json"):
            if name := FILE.search(path.as_posix()):
                yield name[1], path.read_bytes()
        return
    with tarfile.open(suite) as archive:
        for member in archive:
            if (name := FILE.search(member.name)) and (file := archive.extractfile(member)) is not None:
                yield name[1], file.read()


class Walker:
    """Walks texts through grammars, byte by byte: what a grammar accepts does not depend on the vocabulary."""

    def __init__(self) -> None:
        texts = [bytes([byte]) for byte in range(256)]
        vocabulary = xgrammar.TokenizerInfo(texts, xgrammar.VocabType.RAW, stop_token_ids=[0])
        self._compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)

    def accepts(self, schema: Any, values: Sequence[Any]) -> list[bool]:
        """Of each value, as JSON on one line. Raises Unfit where the schema is refused."""
        compiled = self._compiler.compile_json_schema(json.dumps(lower(schema)), any_whitespace=False)
        found = []
        for value in values:
            matcher = xgrammar.GrammarMatcher(compiled)
            text = json.dumps(value, ensure_ascii=False)
            found.append(bool(matcher.accept_string(text) and matcher.is_completed()))
        return found


async def judge(url: str, asked: Sequence[SuiteCase], answers: int, limit: int) -> list[Verdict]:
    """Asks the endpoint for every schema, `BATCH` at a time. Raises ConnectionError at an answer that is none."""
    slots, walker = asyncio.Semaphore(BATCH), Walker()

    async def one(client: httpx.AsyncClient, case: SuiteCase) -> Verdict:
        body = {"messages": MESSAGES, "max_tokens": limit, "json_schema": case.schema, "n": answers, "seed": 1}
        async with slots:
            response = await client.post(url + "/v1/chat/completions", json=body)
        if response.status_code not in (200, 400):
            raise ConnectionError(f"{case.keyword}, {case.about}: {response.status_code} {response.text[:300]}")
        choices = response.json()["choices"] if response.status_code == 200 else []
        texts = [each["message"]["content"] for each in choices if each["finish_reason"] == "stop"]
        try:
            found = walker.accepts(case.schema, [value for value, _ in case.instances])
        except Unfit as refused:
            said = "" if choices else response.json()["error"]["message"]
            return Verdict(case.keyword, case.about, said or str(refused), disagree=bool(choices))
        if not choices:
            return Verdict(case.keyword, case.about, response.json()["error"]["message"], disagree=True)
        pairs = list(zip(found, case.instances, strict=True))
        return Verdict(
            case.keyword,
            case.about,
            finished=len(texts),
            wrong=tuple(text for text in texts if not _valid(text, case.schema)),
            accepted=sum(accepted and valid for accepted, (_, valid) in pairs),
            strict=sum(valid and not accepted for accepted, (_, valid) in pairs),
            rejected=sum(not valid and not accepted for accepted, (_, valid) in pairs),
            unsound=tuple(json.dumps(value) for accepted, (value, valid) in pairs if accepted and not valid),
        )

    async with httpx.AsyncClient(timeout=600) as client:
        return list(await asyncio.gather(*(one(client, case) for case in asked)))


def _valid(text: str, schema: Any) -> bool:
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def show(verdicts: Sequence[Verdict], refusals: bool) -> None:
    """Prints a line for each keyword, and the sums."""
    console, columns = (
        Console(),
        ("schemas", "served", "answers", "wrong", "valid", "over-strict", "invalid", "unsound"),
    )
    table = Table("", *columns, title="JSON-Schema test suite, draft 2020-12")
    names = sorted({each.keyword for each in verdicts})
    for name in [*names, "all"]:
        of = [each for each in verdicts if name in (each.keyword, "all")]
        served = [each for each in of if not each.refusal]
        sums = (
            len(of), len(served), sum(v.finished for v in served), sum(len(v.wrong) for v in served),
            sum(v.accepted + v.strict for v in served), sum(v.strict for v in served),
            sum(v.rejected + len(v.unsound) for v in served), sum(len(v.unsound) for v in served),
        )  # fmt: skip
        table.add_row(name, *map(str, sums), end_section=name == names[-1])
    console.print(table)
    for each in verdicts:
        if each.wrong or each.unsound or each.disagree or (refusals and each.refusal):
            said = each.refusal or f"wrong: {each.wrong} unsound: {each.unsound}"
            console.print(f"{each.keyword}: {each.about}: {said}", markup=False, soft_wrap=True)


def main(
    suite: Annotated[Path, typer.Argument(exists=True, help="folder or source archive that holds the suite")],
    model: Annotated[str, typer.Option(help="demo, a shape, or what `tandem up` takes")] = "demo",
    answers: Annotated[int, typer.Option(min=1, max=16, help="to each schema")] = 2,
    limit: Annotated[int, typer.Option(min=1, help="tokens of an answer")] = 256,
    refusals: Annotated[bool, typer.Option(help="list what is refused, and why")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the verdicts here")] = None,
) -> None:
    """Exits with 1 when an answer or an instance that is accepted is not valid."""
    try:
        asked = cases(suite)
        folder = Path(tempfile.mkdtemp(prefix="tandem-schemas-"))
        with server(SYSTEM, Setting(checkpoint(model)), Peers(), folder).running() as url:
            verdicts = asyncio.run(judge(url, asked, answers, limit))
    except (ConnectionError, ConfigError, StartError, httpx.HTTPError, tarfile.TarError) as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    show(verdicts, refusals)
    if json_file:
        write_json(json_file, {"model": model, "verdicts": [asdict(each) for each in verdicts]})
    if any(each.wrong or each.unsound or each.disagree for each in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
