"""Tool calls of Llama 3.1, 3.2 and 3.3: a JSON object as the whole answer, or after `<|python_tag|>`."""

from __future__ import annotations

from tandem.text.formats.calls import Calls, ToolFormat, json_call
from tandem.text.formats.held import CallSpelling
from tandem.text.formats.reader import Reader, Steps

TAG = "<|python_tag|>"


class Llama3(ToolFormat):
    """`{"name": ..., "parameters": {...}}`; several are separated by semicolons or newlines.

    Without the tag nothing tells a call from an answer in JSON but its fields and the name of a declared function.
    """

    name = "llama3"
    openings = (TAG,)
    bare = "{"
    tokens = (TAG,)

    def fits(self, template: str) -> bool:
        """The smaller models' template has no tag, but these words."""
        return TAG in template or '"parameters": dictionary of argument name' in template

    def block(self, reader: Reader, calls: Calls) -> Steps[None]:
        """See `ToolFormat`. Code after the tag, for an interpreter, is text."""
        tagged = yield from reader.literal(TAG)
        yield from reader.spaces()
        while True:
            yield from json_call(reader, calls, strict=not tagged)
            end = reader.at
            yield from reader.spaces()
            if (yield from reader.literal(";")):
                yield from reader.spaces()
            if (yield from reader.peek()) != "{":
                reader.at = end
                return

    def prefill(self, template: str, name: str | None) -> str:
        """See `ToolFormat`."""
        return '{"name":' + ("" if name is None else f' "{name}", "parameters":')

    def spelling(self, template: str) -> CallSpelling:
        """See `ToolFormat`."""
        return CallSpelling('{"name": "', '", "parameters": ', "}", separator="; ")
