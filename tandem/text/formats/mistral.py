"""Tool calls of Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, later `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import secrets
import string

from tandem.text.formats.calls import Calls, ToolFormat, arguments, json_call
from tandem.text.formats.held import CallSpelling
from tandem.text.formats.reader import Malformed, Reader, Steps

OPEN, ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID_CHARS = string.ascii_letters + string.digits
ID_LENGTH = 9


class Mistral(ToolFormat):
    """A JSON list of calls after one marker, or a marker for each call, its name and its arguments."""

    name = "mistral"
    openings = (OPEN,)
    tokens = (OPEN, ID, ARGS)

    def fits(self, template: str) -> bool:
        """See `ToolFormat`."""
        return OPEN in template

    def block(self, reader: Reader, calls: Calls) -> Steps[None]:
        """See `ToolFormat`."""
        yield from reader.expect(OPEN)
        yield from reader.spaces()
        match (yield from reader.peek()):
            case "[":
                yield from self._list(reader, calls)
            case "{":
                yield from json_call(reader, calls)
            case _:
                yield from self._named(reader, calls)

    def _list(self, reader: Reader, calls: Calls) -> Steps[None]:
        yield from reader.expect("[")
        while True:
            yield from reader.spaces()
            yield from json_call(reader, calls)
            end = reader.at
            yield from reader.spaces()
            if (yield from reader.literal(",")):
                continue
            if not (yield from reader.literal("]")):
                reader.at = end
            return

    def _named(self, reader: Reader, calls: Calls) -> Steps[None]:
        name = yield from reader.while_in(lambda char: char in _ID_CHARS + "_-", 64)
        if (yield from reader.literal(ID)):  # the model's own; ours goes to the client
            yield from reader.while_in(lambda char: char in _ID_CHARS, 64)
        yield from reader.literal(ARGS)
        yield from reader.spaces()
        if (yield from reader.peek()) != "{":
            raise Malformed
        calls.start(name)
        yield from arguments(reader, calls)

    def prefill(self, template: str, name: str | None) -> str:
        """See `ToolFormat`."""
        if ARGS in template:
            return OPEN if name is None else f"{OPEN}{name}{ARGS}"
        return f'{OPEN}[{{"name":' + ("" if name is None else f' "{name}", "arguments":')

    def spelling(self, template: str) -> CallSpelling:
        """See `ToolFormat`."""
        if ARGS in template:
            return CallSpelling(OPEN, ARGS, "", several=False)
        return CallSpelling('{"name": "', '", "arguments": ', "}", begin=f"{OPEN}[", separator=", ", end="]")

    def new_id(self) -> str:
        """Mistral's templates refuse ids of any other form."""
        return "".join(secrets.choice(_ID_CHARS) for _ in range(ID_LENGTH))
