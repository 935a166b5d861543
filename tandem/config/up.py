"""Settings of a whole cluster: on one machine, or on Ray."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode

from tandem.config.fields import (
    CHAT_TEMPLATE_HELP,
    DRAFT_BRANCHES_HELP,
    DRAFT_MODEL_HELP,
    DRAFT_TOKENS_HELP,
    METRICS_ALIAS_HELP,
    OPEN_HTTP,
    REASONING_PARSER_HELP,
    SPECULATIVE_HELP,
    TOOL_PARSER_HELP,
    Addresses,
    ChatTemplate,
    DraftBranches,
    DraftTokens,
    Dtype,
    MetricsAlias,
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

RESOURCE = re.compile(r"([A-Za-z0-9_.:-]+)=([0-9]+(?:\.[0-9]+)?)")


def split_all(value: object) -> object:
    """The parts of texts with commas, also where several of them are in a list."""
    texts = value if isinstance(value, list | tuple) else [value]
    return [part.strip() for text in texts for part in str(text).split(",") if part.strip()]


def known_amounts(value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses what is no NAME=AMOUNT, names that come twice, and amounts that Ray refuses."""
    names = set()
    for part in value:
        found = RESOURCE.fullmatch(part)
        if found is None:
            raise ValueError(f"{part!r} is not NAME=AMOUNT, such as CPU=4 or GPU=1")
        name, amount = found[1], float(found[2])
        if name in names:
            raise ValueError(f"{name} is given twice")
        if amount > 1 and amount != int(amount):
            raise ValueError(f"{part}: amounts above 1 must be whole")
        names.add(name)
    if not any(float(part.partition("=")[2]) for part in value):
        raise ValueError("nothing is asked for; CPU=1 is the default")
    return value


Resources = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_all), AfterValidator(known_amounts)]
"""NAME=AMOUNT of each, as Ray names them."""


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
    kv_mib: Annotated[float, Field(gt=0), MEBIBYTES] | None = Field(
        None, description="memory for KV pages of each worker, MiB; default: 256 on CPUs, on GPUs what is left"
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
    metrics_token: Secret | None = Field(
        None, description="secret that readers of metrics show; on Ray nobody reads workers' without one"
    )
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
    metrics_alias: MetricsAlias = Field("none", description=METRICS_ALIAS_HELP)
    drain_s: Annotated[float, Field(ge=0), IN_SECONDS] = Field(
        2.0, description="seconds that requests under way get to end after Ctrl-C; a second one ends them at once"
    )
    speculative: Speculative = Field("auto", description=SPECULATIVE_HELP)
    draft_tokens: DraftTokens = Field(8, description=DRAFT_TOKENS_HELP)
    draft_branches: DraftBranches = Field(1, description=DRAFT_BRANCHES_HELP)

    on: Literal["local", "ray"] = Field("local", description="where: this machine, or the machines of a Ray cluster")
    ray_address: str | None = Field(
        None,
        description="host:port of the Ray cluster; default: the one that Ray finds, or a new local one",
    )
    ray_routers: Literal["head", "every"] = Field("head", description="one router on Ray's head, or one on every node")
    ray_prefill_resources: Resources = Field(
        ("CPU=1",), description="what Ray gives each prefill worker: CPU=4,GPU=1 and resources of your own"
    )
    ray_decode_resources: Resources = Field(("CPU=1",), description="the same for each decode worker")
    ray_wait_s: Annotated[float, Field(ge=0), IN_SECONDS] = Field(
        10.0, description="seconds to wait for resources: with an autoscaler, as long as a node takes to come"
    )
    ray_targets: Path | None = Field(
        None, description="file that is kept up to date with all metrics pages, for Prometheus' file_sd_configs"
    )

    @model_validator(mode="after")
    def _ray_settings_mean_something(self) -> UpConfig:
        fields = sorted(name for name in type(self).model_fields if name.startswith("ray_"))
        given = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if given and self.on != "ray":
            raise ValueError(f"--{given[0].replace('_', '-')} is given; it needs --on ray")
        return self

    @model_validator(mode="after")
    def _one_drafter(self) -> UpConfig:
        check_drafter(self.speculative, self.draft_model, self.draft_branches)
        return self

    @model_validator(mode="after")
    def _guarded(self) -> UpConfig:
        if not is_loopback(self.host) and self.api_keys is None:
            raise ValueError(f"--host is {self.host}; {OPEN_HTTP}")
        return self
