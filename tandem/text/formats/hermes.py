"""Tool calls of Hermes 2 and 3, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from tandem.text.formats.calls import Calls, ToolFormat, json_call
from tandem.text.formats.held import CallSpelling
from tandem.text.formats.reader import Reader, Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    """JSON between tags, one pair of tags a call."""

    name = "hermes"
    openings = (OPEN,)
    tokens = (OPEN, CLOSE)

    def fits(self, template: str) -> bool:
        """Other formats have the same tags around something else than JSON."""
        return OPEN in template and "<function=" not in template and "<arg_key>" not in template

    def block(self, reader: Reader, calls: Calls) -> Steps[None]:
        """See `ToolFormat`. The closing tag may be missing."""
        yield from reader.expect(OPEN)
        yield from reader.spaces()
        yield from json_call(reader, calls)
        end = reader.at
        yield from reader.spaces()
        if not (yield from reader.literal(CLOSE)):
            reader.at = end

    def prefill(self, template: str, name: str | None) -> str:
        """See `ToolFormat`."""
        return f'{OPEN}\n{{"name":' + ("" if name is None else f' "{name}", "arguments":')

    def spelling(self, template: str) -> CallSpelling:
        """See `ToolFormat`."""
        head = f'{OPEN}\n{{"name": "'
        return CallSpelling(head, '", "arguments": ', f"}}\n{CLOSE}", separator="\n", several=False)
