"""Tool calls of DeepSeek V3, R1 and V3.1."""

from __future__ import annotations

from tandem.text.formats.calls import NAME, Calls, ToolFormat, arguments
from tandem.text.formats.held import CallSpelling
from tandem.text.formats.reader import Malformed, Reader, Steps

OPEN, CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "\n```json\n"
MAX_NAME = 64


def _in_names(char: str) -> bool:
    return NAME.fullmatch(char) is not None


class DeepSeek(ToolFormat):
    """V3.1 writes a call as name, separator and arguments; V3 and R1 as `function`, separator, name and a fence."""

    name = "deepseek"
    openings = (OPEN,)
    tokens = (OPEN, CLOSE, CALL, SEPARATOR, END)

    def fits(self, template: str) -> bool:
        """See `ToolFormat`."""
        return OPEN in template

    def block(self, reader: Reader, calls: Calls) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.expect(OPEN)
        yield from reader.spaces()
        yield from reader.expect(CALL)
        while True:
            yield from self._call(reader, calls)
            end = reader.at
            yield from reader.spaces()
            if (yield from reader.literal(CLOSE)):
                return
            if not (yield from reader.literal(CALL)):
                reader.at = end
                return

    def _call(self, reader: Reader, calls: Calls) -> Steps[None]:
        name = yield from reader.while_in(_in_names, MAX_NAME)
        yield from reader.expect(SEPARATOR)
        fenced = name == "function" and (yield from reader.peek()) not in ("{", " ", "\n")
        if fenced:
            name = yield from reader.while_in(_in_names, MAX_NAME)
            yield from reader.spaces()
            yield from reader.expect("```json")
        yield from reader.spaces()
        if (yield from reader.peek()) != "{":
            raise Malformed
        calls.start(name)
        yield from arguments(reader, calls)
        end = reader.at
        yield from reader.spaces()
        if fenced:
            yield from reader.literal("```")
        if not (yield from reader.literal(END)):
            reader.at = end

    def prefill(self, template: str, name: str | None) -> str:
        """See `ToolFormat`."""
        fenced = "```json" in template
        begun = OPEN + CALL + (f"function{SEPARATOR}" if fenced else "")
        return begun if name is None else begun + name + (FENCE if fenced else SEPARATOR)

    def spelling(self, template: str) -> CallSpelling:
        """See `ToolFormat`."""
        if "```json" in template:
            head, tail = f"{CALL}function{SEPARATOR}", f"\n```{END}"
            return CallSpelling(head, FENCE, tail, begin=OPEN, separator="\n", end=CLOSE)
        return CallSpelling(CALL, SEPARATOR, END, begin=OPEN, end=CLOSE)
