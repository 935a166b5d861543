"""Kinds of values that several settings have, with their bounds and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from tandem.text.formats.registry import REASONING_PARSERS, TOOL_PARSERS

Port = Annotated[int, Field(ge=0, le=65535)]
Dtype = Literal["auto", "bfloat16", "float32"]
Transport = Literal["auto", "nixl", "tcp"]
MetricsAlias = Literal["none", "vllm"]
METRICS_ALIAS_HELP = "vllm shows metrics under vLLM's names, too, at /metrics/vllm"


def split_list(value: object) -> object:
    """The parts of a text with commas; other values as they are."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Addresses = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_list)]
"""host:port of each; in the environment separated by commas."""


def one_of(names: tuple[str, ...]) -> AfterValidator:
    """Refuses other values, with the list in the message."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return AfterValidator(check)


def existing_file(path: Path) -> Path:
    """Refuses paths where no file is."""
    if not path.is_file():
        raise ValueError("there is no such file")
    return path


def http_url(value: str) -> str:
    """Refuses what is neither empty nor the URL of a host; what is in it, command lines show."""
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if value and not known:
        raise ValueError("must be a URL such as http://collector:4318")
    if value and "@" in parts.netloc:
        raise ValueError("must not hold a password; OTEL_EXPORTER_OTLP_HEADERS may")
    return value


HttpUrl = Annotated[str, AfterValidator(http_url)]
"""Messages do not show a wrong one: it may hold a password."""
ChatTemplate = Annotated[Path, AfterValidator(existing_file)]
CHAT_TEMPLATE_HELP = "file with the jinja template of chats; default: the checkpoint's own"
ToolParser = Annotated[str, one_of(TOOL_PARSERS), Field(json_schema_extra={"enum": list(TOOL_PARSERS)})]
ReasoningParser = Annotated[str, one_of(REASONING_PARSERS), Field(json_schema_extra={"enum": list(REASONING_PARSERS)})]
DRAFT_MODEL_HELP = (
    "folder or hub id of a draft model, or of a draft head, that guesses tokens ahead; demo is the demo model's; "
    "the same on all workers"
)
TOOL_PARSER_HELP = f"how the model writes tool calls: {', '.join(TOOL_PARSERS)}; auto asks the chat template"
REASONING_PARSER_HELP = f"how the model marks its reasoning: {', '.join(REASONING_PARSERS)}; auto asks the template"


Speculative = Literal["auto", "none", "ngram"]
SPECULATIVE_HELP = (
    "who guesses several tokens ahead, which changes no answer; ngram: what followed the same tokens before; auto: "
    "`draft_model`, where that is set"
)
DRAFT_TOKENS_HELP = "tokens of a draft at most"
DRAFT_BRANCHES_HELP = "likeliest tokens that a draft model or head drafts for one place; more than 1 make drafts trees"
DraftTokens = Annotated[int, Field(ge=1, le=63)]
DraftBranches = Annotated[int, Field(ge=1, le=16)]


def check_drafter(speculative: Speculative, draft_model: str | None, branches: int) -> None:
    """Refuses settings of drafts that contradict one another."""
    if draft_model is not None and speculative != "auto":
        raise ValueError(f"speculative is {speculative}; with a draft_model it must be auto")
    if branches > 1 and draft_model is None:
        raise ValueError(f"draft_branches is {branches}; without a draft_model it must be 1")


def strong_secret(secret: SecretStr) -> SecretStr:
    """Refuses secrets that could be guessed, and those that no header can carry."""
    value = secret.get_secret_value()
    if len(value) < MIN_SECRET or not all("!" <= character <= "~" for character in value):
        raise ValueError(f"at least {MIN_SECRET} characters are needed, printable ASCII without blanks")
    return secret


MIN_SECRET = 16
Secret = Annotated[SecretStr, AfterValidator(strong_secret)]
"""From the environment or the YAML file; no flag, because command lines are for all to see."""
PemFile = Annotated[Path, AfterValidator(existing_file)]
OPEN_GRPC = (
    "whoever reaches it could use the cluster: set TANDEM_TOKEN to the same secret for all its processes, or give "
    "--tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1"
)
OPEN_METRICS = (
    "whoever reaches it could read the metrics: set TANDEM_METRICS_TOKEN, which Prometheus then sends as a bearer "
    "token, or listen on 127.0.0.1"
)
OPEN_HTTP = "whoever reaches it could use the models: give --api-keys FILE, or listen on 127.0.0.1"
