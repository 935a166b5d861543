"""The tools of a chat request, and which of them the model is to call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.requests.openai import ChatBody, plain_text
from tandem.errors import BadRequest
from tandem.text.formats.calls import NAME

MAX_TOOLS = 128
MAX_TEMPLATE_VALUES = 32
TYPES = (("description", str, "a string"), ("parameters", dict, "an object"), ("strict", bool, "true or false"))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools. Without tools, the model is not told of any and no call is looked for."""

    tools: tuple[dict[str, Any], ...] = ()
    """Declarations as the chat template takes them."""
    forced: bool = False
    """The answer is to start with a call,"""
    function: str | None = None
    """of this function, if one is named."""
    one_call: bool = False
    strict: frozenset[str] = frozenset()
    """Names of the functions whose calls are held to their schemas."""

    @property
    def names(self) -> frozenset[str]:
        """The functions' names."""
        return frozenset(tool["function"]["name"] for tool in self.tools)


def tool_use(body: ChatBody) -> ToolUse:
    """Raises BadRequest naming the field at fault."""
    tools = declarations(body.tools)
    strict = frozenset(tool["function"]["name"] for tool in body.tools or () if tool["function"].get("strict"))
    choice = body.tool_choice if body.tool_choice is not None else "auto"
    if choice in ("none", "auto"):
        # Unknown to the model, tools are not called: with `none` they are left out of the prompt.
        tools = () if choice == "none" else tools
        return ToolUse(tools, one_call=body.parallel_tool_calls is False, strict=strict if tools else frozenset())
    if choice == "required":
        function = None
    else:
        function = _chosen(choice)
    if not tools:
        raise BadRequest("tool_choice is only allowed together with tools", "tool_choice")
    use = ToolUse(tools, True, function, function is not None or body.parallel_tool_calls is False, strict)
    if function is not None and function not in use.names:
        raise BadRequest(f"tool_choice names the function {function!r}, which is not among the tools", "tool_choice")
    return use


def _chosen(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        forms = """'none', 'auto', 'required' or {"type": "function", "function": {"name": ...}}"""
        raise BadRequest(f"tool_choice must be {forms}", "tool_choice")
    return name[:80]


def declarations(tools: Any) -> tuple[dict[str, Any], ...]:
    """The tools of a request, validated. Raises BadRequest."""
    if tools is None:
        return ()
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise BadRequest(f"tools must be a list of at most {MAX_TOOLS} tools", "tools")
    checked = tuple(_declaration(tool, f"tools.{index}") for index, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in checked]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise BadRequest(f"tools.{index}.function.name is {name!r}, which an earlier tool has", "tools")
    return checked


def _declaration(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise BadRequest(f"{where} must be an object with type 'function' and an object 'function'", "tools")
    function = tool["function"]
    where = f"{where}.function"
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadRequest(f"{where}.name must be 1 to 64 letters, digits, _ or -", "tools")
    for key, kind, called in TYPES:
        if not isinstance(function.get(key, kind()), kind | None):
            raise BadRequest(f"{where}.{key} must be {called}", "tools")
    if function.get("strict") and (function.get("parameters") or {"type": "object"}).get("type") != "object":
        raise BadRequest(f"{where}.parameters must have the type 'object' where strict is true", "tools")
    _check_texts(tool, where, "tools")
    # Nulls ask for nothing, but templates would write them.
    kept = {key: value for key, value in function.items() if key != "strict" and value is not None}
    return {**tool, "function": kept}


def template_values(values: Mapping[str, Any] | None, reserved: frozenset[str]) -> Mapping[str, Any]:
    """`chat_template_kwargs`, validated. reserved: names that the template gets from elsewhere. Raises BadRequest."""
    field = "chat_template_kwargs"
    if values is None:
        return {}
    if len(values) > MAX_TEMPLATE_VALUES:
        raise BadRequest(f"{field} has {len(values)} entries; at most {MAX_TEMPLATE_VALUES} are allowed", field)
    for name, value in values.items():
        if not name.isidentifier() or name.startswith("_") or len(name) > 64:
            raise BadRequest(f"{field} has the key {name[:80]!r}; keys must be names", field)
        if name in reserved:
            raise BadRequest(f"{field}.{name} cannot be set: the router sets it", field)
        _check_texts(value, f"{field}.{name}", field)
    return values


def _check_texts(value: Any, where: str, param: str) -> None:
    """Every string in a JSON value must be one that a tokeniser can take."""
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, str):
            try:
                plain_text(each, where)
            except BadRequest as error:
                error.param = param
                raise
        elif isinstance(each, dict):
            todo += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            todo += each
