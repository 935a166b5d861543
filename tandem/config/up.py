"""Settings of a cluster on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tandem.config.fields import (
    CHAT_TEMPLATE_HELP,
    DRAFT_BRANCHES_HELP,
    DRAFT_MODEL_HELP,
    DRAFT_TOKENS_HELP,
    OPEN_HTTP,
    REASONING_PARSER_HELP,
    SPECULATIVE_HELP,
    TOOL_PARSER_HELP,
    Addresses,
    ChatTemplate,
    DraftBranches,
    DraftTokens,
    Dtype,
    Port,
    ReasoningParser,
    Secret,
    Speculative,
    ToolParser,
    Transport,
    check_drafter,
    existing_file,
)
from tandem.config.process import TracedSettings
from tandem.ports import is_loopback
from tandem.units import COUNT, IN_MILLISECONDS, IN_SECONDS, MEBIBYTES


class UpConfig(TracedSettings):
    """`tandem up`"""

    model: str = Field(description="model folder or hub id; `demo` is the shipped one")
    prefill: Annotated[int, Field(ge=0, le=64)] = Field(1, description="prefill workers; 0 is the aggregated form")
    decode: Annotated[int, Field(ge=1, le=64)] = Field(1, description="decode workers")
    port: Port = Field(8000, description="HTTP port of the router")
    host: str = Field("127.0.0.1", description="address of the HTTP port")
    served_model_name: str | None = Field(
        None, description="name clients use; default: the last part of the model's path"
    )
    dtype: Dtype = Field("auto", description="weights and KV; auto takes the checkpoint's")
    page_size: Literal[1, 2, 4, 8, 16, 32, 64] = Field(16, description="tokens in a KV page")
    kv_mib: Annotated[float, Field(gt=0), MEBIBYTES] = Field(
        256.0, description="memory for KV pages of each worker, MiB"
    )
    transport: Transport = Field("auto", description="KV backend; auto takes nixl where it is installed, else tcp")
    policy: Literal["cost", "longest_prefix", "least_loaded", "round_robin"] = Field(
        "cost", description="how plans are made"
    )
    tool_parser: ToolParser = Field("auto", description=TOOL_PARSER_HELP)
    reasoning_parser: ReasoningParser = Field("auto", description=REASONING_PARSER_HELP)
    chat_template: ChatTemplate | None = Field(None, description=CHAT_TEMPLATE_HELP)
    generation_config: Literal["auto", "none"] = Field(
        "auto", description="auto takes sampling defaults from the model's generation_config.json, none takes none"
    )
    cors_origins: Addresses = Field((), description="origins whose pages may call this; * allows all")
    api_keys: Annotated[Path, AfterValidator(existing_file)] | None = Field(
        None, description="YAML file of tenants with API keys and limits, read again when it changes; default: no keys"
    )
    token: Secret | None = Field(None, description="secret that the processes share; default: a new one")
    max_context: Annotated[int, Field(ge=0), COUNT] = Field(
        0, description="tokens in one sequence; 0 takes the model's"
    )
    max_batch_tokens: Annotated[int, Field(ge=1), COUNT] = Field(512, description="tokens computed in one step")
    inter_token_ms: Annotated[float, Field(ge=0), IN_MILLISECONDS] = Field(
        0.0, description="bound on a step's time while sequences generate, kept by smaller prompt chunks; 0 is none"
    )
    draft_model: str | None = Field(None, description=DRAFT_MODEL_HELP)
    max_running: Annotated[int, Field(ge=1), COUNT] = Field(64, description="sequences in one step")
    kernels: Literal["auto", "native", "torch"] = Field("auto", description="what computes; see `tandem decode --help`")
    drain_s: Annotated[float, Field(ge=0), IN_SECONDS] = Field(
        2.0, description="seconds that requests under way get to end after Ctrl-C; a second one ends them at once"
    )
    speculative: Speculative = Field("auto", description=SPECULATIVE_HELP)
    draft_tokens: DraftTokens = Field(8, description=DRAFT_TOKENS_HELP)
    draft_branches: DraftBranches = Field(1, description=DRAFT_BRANCHES_HELP)

    @model_validator(mode="after")
    def _one_drafter(self) -> UpConfig:
        check_drafter(self.speculative, self.draft_model, self.draft_branches)
        return self

    @model_validator(mode="after")
    def _guarded(self) -> UpConfig:
        if not is_loopback(self.host) and self.api_keys is None:
            raise ValueError(f"--host is {self.host}; {OPEN_HTTP}")
        return self
