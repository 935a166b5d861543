"""The settings of every process: one schema for flags, environment (`TANDEM_*`) and YAML; the only environment reader.

Precedence: flag, then environment, then the YAML file named by `--config`, then the default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from tandem.errors import ConfigError
from tandem.ports import is_loopback
from tandem.text.formats.registry import REASONING_PARSERS, TOOL_PARSERS

Port = Annotated[int, Field(ge=0, le=65535)]
Dtype = Literal["auto", "bfloat16", "float32"]
Transport = Literal["auto", "nixl", "tcp"]


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Addresses = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""host:port of each; in the environment separated by commas."""


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="TANDEM_", frozen=True, extra="forbid", hide_input_in_errors=True)

    config: Path | None = Field(None, description="YAML file with any of these settings")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["text", "json"] = Field("text", description="one line of text or one JSON object per record")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = getattr(init_settings, "init_kwargs", {}).get("config") or os.environ.get("TANDEM_CONFIG")
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        return (*sources, _yaml(settings_cls, Path(path))) if path else sources


def _yaml(settings_cls: type[BaseSettings], path: Path) -> YamlConfigSettingsSource:
    """The library takes a missing file for an empty one; here it is an error like any other wrong setting."""
    if not path.is_file():
        raise ConfigError(f"--config is {path}; there is no such file", "config")
    try:
        return YamlConfigSettingsSource(settings_cls, yaml_file=path)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config is {path}; it must be a YAML mapping of settings: {reason}", "config") from None


def _one_of(names: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return AfterValidator(check)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError("there is no such file")
    return path


ChatTemplate = Annotated[Path, AfterValidator(_existing)]
CHAT_TEMPLATE_HELP = "file with the jinja template of chats; default: the checkpoint's own"
ToolParser = Annotated[str, _one_of(TOOL_PARSERS)]
ReasoningParser = Annotated[str, _one_of(REASONING_PARSERS)]
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


def _strong(secret: SecretStr) -> SecretStr:
    value = secret.get_secret_value()
    if len(value) < MIN_SECRET or not all("!" <= character <= "~" for character in value):
        raise ValueError(f"at least {MIN_SECRET} characters are needed, printable ASCII without blanks")
    return secret


MIN_SECRET = 16
Secret = Annotated[SecretStr, AfterValidator(_strong)]
"""From the environment or the YAML file; no flag, because command lines are for all to see."""
PemFile = Annotated[Path, AfterValidator(_existing)]
OPEN_GRPC = (
    "whoever reaches it could use the cluster: set TANDEM_TOKEN to the same secret for all its processes, or give "
    "--tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1"
)
OPEN_METRICS = (
    "whoever reaches it could read the metrics: set TANDEM_METRICS_TOKEN, which Prometheus then sends as a bearer "
    "token, or listen on 127.0.0.1"
)
OPEN_HTTP = "whoever reaches it could use the models: give --api-keys FILE, or listen on 127.0.0.1"


class _Process(_Settings):
    """Settings of every process that speaks gRPC: by what it knows the others."""

    token: Secret | None = Field(None, description="secret that all processes of a cluster share")
    metrics_token: Secret | None = Field(None, description="secret that readers of metrics show")
    tls_cert: PemFile | None = Field(None, description="PEM file with this process's certificate, for gRPC")
    tls_key: PemFile | None = Field(None, description="PEM file with its key")
    tls_ca: PemFile | None = Field(None, description="PEM file with who must have signed the others' certificates")
    tls_name: str = Field("", description="name in the others' certificates; default: the address they are called at")

    @model_validator(mode="after")
    def _whole_tls(self) -> _Process:
        if len({self.tls_cert is None, self.tls_key is None, self.tls_ca is None}) > 1:
            raise ValueError("--tls-cert, --tls-key and --tls-ca are needed together")
        return self

    def _check_grpc(self, setting: str, host: str) -> None:
        if not is_loopback(host) and self.token is None and self.tls_cert is None:
            raise ValueError(f"{setting} is {host}; {OPEN_GRPC}")


class RouterConfig(_Process):
    """`tandem router`"""

    model: str | None = Field(None, description="model folder or hub id; default: what the workers report")
    served_model_name: str | None = Field(
        None, description="name clients use; default: the last part of the model's path"
    )
    host: str = Field("127.0.0.1", description="address of the HTTP port")
    port: Port = Field(8000, description="HTTP port")
    processes: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="processes that share the HTTP port, each with its own subscription to every worker"
    )
    control_host: str = Field("127.0.0.1", description="address of the gRPC port that workers register at")
    control_port: Port = Field(8001, description="gRPC port that workers register at")
    workers: Addresses = Field((), description="host:port of workers, for clusters without registration")
    workers_file: Annotated[Path, AfterValidator(_existing)] | None = Field(
        None, description="YAML or JSON list of such addresses, read again when it changes"
    )
    policy: Literal["cost", "longest_prefix", "least_loaded", "round_robin"] = Field(
        "cost", description="how plans are made"
    )
    replicas: Annotated[int, Field(ge=0)] = Field(
        2, description="popular prefixes that are copied to another worker at once; 0 copies none; policy cost only"
    )
    replicas_mib_s: Annotated[float, Field(gt=0)] = Field(256.0, description="MiB a second that copies may move")
    tool_parser: ToolParser = Field("auto", description=TOOL_PARSER_HELP)
    reasoning_parser: ReasoningParser = Field("auto", description=REASONING_PARSER_HELP)
    chat_template: ChatTemplate | None = Field(None, description=CHAT_TEMPLATE_HELP)
    cluster_key: str = Field("tandem", description="part of every block hash; equal on all processes of a cluster")
    generation_config: Literal["auto", "none"] = Field(
        "auto", description="auto takes sampling defaults from the model's generation_config.json, none takes none"
    )
    cors_origins: Addresses = Field(
        (), description="origins whose pages may call this, such as https://chat.example; * allows all"
    )
    max_body_mib: Annotated[float, Field(gt=0)] = Field(16.0, description="largest request body, MiB")
    max_connections: Annotated[int, Field(ge=1)] = Field(
        8192, description="HTTP connections open at once in a process; more get 503"
    )
    api_keys: Annotated[Path, AfterValidator(_existing)] | None = Field(
        None, description="YAML file of tenants with API keys and limits, read again when it changes; default: no keys"
    )
    max_inflight: Annotated[int, Field(ge=1)] = Field(1024, description="requests admitted at once; more wait")
    max_queued: Annotated[int, Field(ge=0)] = Field(256, description="requests that wait for that; more get 429")
    queue_s: Annotated[float, Field(gt=0)] = Field(30.0, description="seconds that one waits at most; then it gets 503")
    worker_backlog: Annotated[int, Field(ge=1)] = Field(
        128, description="sequences waiting at every decode worker from which on requests wait at the router"
    )
    index_max_blocks: Annotated[int, Field(ge=1)] = Field(4_000_000, description="blocks the prefix index keeps")
    index_max_age_s: Annotated[float, Field(gt=0)] = Field(
        14_400.0, description="seconds an unused index entry is kept"
    )
    explain_requests: Annotated[int, Field(ge=0)] = Field(
        4096, description="recent requests of which plan and outcome are remembered; 0 is none"
    )
    explain_mib: Annotated[float, Field(gt=0)] = Field(32.0, description="memory for them, MiB")
    explain_age_s: Annotated[float, Field(gt=0)] = Field(3600.0, description="seconds for which they are remembered")
    ladder_blocks: Annotated[int, Field(ge=0)] = Field(
        131_072, description="blocks that the hit ladder remembers, about 350 bytes each; 0 computes none"
    )
    lease_s: Annotated[float, Field(gt=0)] = Field(10.0, description="seconds after which a silent worker is forgotten")
    stream_queue: Annotated[int, Field(ge=1)] = Field(
        4096, description="tokens buffered for one slow reader before it is cut"
    )
    drain_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="seconds that answers under way get to end after SIGTERM; a second signal ends them at once"
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        2, description="other workers tried before a first token was made"
    )

    @model_validator(mode="after")
    def _guarded(self) -> RouterConfig:
        if not is_loopback(self.host) and self.api_keys is None:
            raise ValueError(f"--host is {self.host}; {OPEN_HTTP}")
        self._check_grpc("--control-host", self.control_host)
        return self


def _check_drafter(speculative: Speculative, draft_model: str | None, branches: int) -> None:
    if draft_model is not None and speculative != "auto":
        raise ValueError(f"speculative is {speculative}; with a draft_model it must be auto")
    if branches > 1 and draft_model is None:
        raise ValueError(f"draft_branches is {branches}; without a draft_model it must be 1")


class WorkerConfig(_Process):
    """Settings that both kinds of worker share."""

    model: str = Field(description="model folder or hub id")
    served_model_name: str | None = Field(
        None, description="name clients use; default: the last part of the model's path"
    )
    host: str = Field("127.0.0.1", description="address of the gRPC port")
    port: Port = Field(0, description="gRPC port; 0 takes a free one")
    metrics_port: Port = Field(0, description="Prometheus port; 0 takes a free one")
    router: Addresses = Field((), description="host:port of routers' control ports to register at")
    cluster_key: str = Field("tandem", description="part of every block hash; equal on all processes of a cluster")
    dtype: Dtype = Field("auto", description="weights and KV; auto takes the checkpoint's")
    device: str = Field("cpu", description="torch device")
    page_size: Literal[1, 2, 4, 8, 16, 32, 64] = Field(16, description="tokens in a KV page")
    kv_mib: Annotated[float, Field(gt=0)] | None = Field(
        None, description="memory for KV pages, MiB; default: 256 on CPUs, on GPUs what the weights and a step leave"
    )
    pages: Annotated[int, Field(ge=0)] = Field(0, description="KV pages; 0 derives them from kv_mib")
    draft_model: str | None = Field(None, description=DRAFT_MODEL_HELP)
    max_context: Annotated[int, Field(ge=0)] = Field(0, description="tokens in one sequence; 0 takes the model's")
    max_batch_tokens: Annotated[int, Field(ge=1)] = Field(512, description="tokens computed in one step")
    inter_token_ms: Annotated[float, Field(ge=0)] = Field(
        0.0, description="bound on a step's time while sequences generate, kept by smaller prompt chunks; 0 is none"
    )
    max_running: Annotated[int, Field(ge=1)] = Field(64, description="sequences in one step")
    max_waiting: Annotated[int, Field(ge=1)] = Field(1024, description="requests queued before more get 429")
    ageing_s: Annotated[float, Field(gt=0)] = Field(
        2.0, description="wait after which a request goes first, whatever its prefix"
    )
    prefix_cache: bool = Field(True, description="keep KV of finished sequences for reuse")
    tenant_cache_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="share of the cached KV pages beyond which a tenant's own are evicted first"
    )
    verify_kv: Annotated[float, Field(ge=0, le=1)] = Field(
        0.02, description="share of cached KV pages that are digested, and compared when they are hit; 0 is none"
    )
    threads: Annotated[int, Field(ge=0)] = Field(0, description="compute threads; 0 takes all cores")
    kernels: Literal["auto", "native", "torch", "triton", "flashinfer"] = Field(
        "auto",
        description="auto takes native ones on CPUs, compiled at first use (torch where they cannot be), and torch on "
        "GPUs; triton and flashinfer are for GPUs and unmeasured",
    )
    speculative: Speculative = Field("auto", description=SPECULATIVE_HELP)
    draft_tokens: DraftTokens = Field(8, description=DRAFT_TOKENS_HELP)
    draft_branches: DraftBranches = Field(1, description=DRAFT_BRANCHES_HELP)
    draft_adaptive: bool = Field(
        True, description="draft only as many tokens as was measured to pay, down to none; else always `draft_tokens`"
    )
    cuda_graphs: bool = Field(
        False, description="launch decode steps as CUDA graphs; needs kernels triton on a GPU; unmeasured"
    )
    overlap: Literal["auto", "on", "off"] = Field(
        "auto",
        description="launch a step before the one in front of it is committed; auto is off: on CPUs it is no faster, "
        "and on GPUs unmeasured",
    )
    compute_slots: int | None = Field(
        None, description="System V semaphore that bounds how many workers of this machine compute at once"
    )
    transport: Transport = Field("auto", description="KV backend; auto takes nixl where it is installed, else tcp")
    lease_s: Annotated[float, Field(gt=0)] = Field(
        10.0, description="seconds after which a silent peer or router is given up"
    )
    probe_s: Annotated[float, Field(ge=0)] = Field(
        60.0, description="seconds between pages that the worker sends itself over its transport; 0 sends none"
    )
    quiesce_s: Annotated[float, Field(gt=0)] = Field(5.0, description="seconds to wait for a peer's `quiesced`")
    drain_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="seconds that requests under way get to end after SIGTERM; a second signal ends them at once"
    )

    slab_mib: Annotated[float, Field(gt=0)] = Field(
        32.0, description="landing slab for each worker that KV comes from, MiB"
    )
    slabs_max_mib: Annotated[float, Field(gt=0)] = Field(
        512.0, description="landing slabs in all; over it a decode worker drains and exits"
    )
    span_tokens: Annotated[int, Field(ge=1)] = Field(512, description="tokens pushed at once")
    queue_deadline_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="seconds the sender may compute nothing of a ticket"
    )
    handshake_deadline_s: Annotated[float, Field(gt=0)] = Field(10.0, description="seconds for connecting to a sender")
    transfer_deadline_s: Annotated[float, Field(gt=0)] = Field(
        10.0, description="seconds without progress while computed KV is on its way"
    )

    @model_validator(mode="after")
    def _room_for_a_slab(self) -> WorkerConfig:
        if self.slab_mib > self.slabs_max_mib:
            raise ValueError(f"slab_mib is {self.slab_mib:g}; slabs_max_mib leaves room for {self.slabs_max_mib:g}")
        return self

    @model_validator(mode="after")
    def _one_drafter(self) -> WorkerConfig:
        _check_drafter(self.speculative, self.draft_model, self.draft_branches)
        return self

    @model_validator(mode="after")
    def _guarded(self) -> WorkerConfig:
        self._check_grpc("--host", self.host)
        if not is_loopback(self.host) and self.metrics_token is None:
            raise ValueError(f"--host is {self.host}; {OPEN_METRICS}")
        return self


class PrefillConfig(WorkerConfig):
    """`tandem prefill`"""

    staging_mib: Annotated[float, Field(gt=0)] = Field(
        32.0, description="registered memory that spans are sent from, MiB"
    )


class DecodeConfig(WorkerConfig):
    """`tandem decode`"""

    staging_mib: Annotated[float, Field(gt=0)] = Field(
        8.0, description="registered memory that spans are sent from, MiB"
    )
    local_prefill_tokens: Annotated[int, Field(ge=0)] = Field(
        32, description="misses up to this are always computed locally"
    )
    grammar_compile_s: Annotated[float, Field(gt=0)] = Field(
        10.0, description="seconds that compiling a grammar may take"
    )
    grammar_memory_mib: Annotated[int, Field(ge=64)] = Field(
        1024, description="memory that compiling a grammar may take, MiB"
    )
    grammar_cache_mib: Annotated[int, Field(ge=0)] = Field(256, description="memory for compiled grammars, MiB")
    json_any_whitespace: bool = Field(
        False, description="let models lay out the JSON that a request asks for; else it is written on one line"
    )


class UpConfig(_Settings):
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
    kv_mib: Annotated[float, Field(gt=0)] = Field(256.0, description="memory for KV pages of each worker, MiB")
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
    api_keys: Annotated[Path, AfterValidator(_existing)] | None = Field(
        None, description="YAML file of tenants with API keys and limits, read again when it changes; default: no keys"
    )
    token: Secret | None = Field(None, description="secret that the processes share; default: a new one")
    max_context: Annotated[int, Field(ge=0)] = Field(0, description="tokens in one sequence; 0 takes the model's")
    max_batch_tokens: Annotated[int, Field(ge=1)] = Field(512, description="tokens computed in one step")
    inter_token_ms: Annotated[float, Field(ge=0)] = Field(
        0.0, description="bound on a step's time while sequences generate, kept by smaller prompt chunks; 0 is none"
    )
    draft_model: str | None = Field(None, description=DRAFT_MODEL_HELP)
    max_running: Annotated[int, Field(ge=1)] = Field(64, description="sequences in one step")
    kernels: Literal["auto", "native", "torch"] = Field("auto", description="what computes; see `tandem decode --help`")
    drain_s: Annotated[float, Field(ge=0)] = Field(
        2.0, description="seconds that requests under way get to end after Ctrl-C; a second one ends them at once"
    )
    speculative: Speculative = Field("auto", description=SPECULATIVE_HELP)
    draft_tokens: DraftTokens = Field(8, description=DRAFT_TOKENS_HELP)
    draft_branches: DraftBranches = Field(1, description=DRAFT_BRANCHES_HELP)

    @model_validator(mode="after")
    def _one_drafter(self) -> UpConfig:
        _check_drafter(self.speculative, self.draft_model, self.draft_branches)
        return self

    @model_validator(mode="after")
    def _guarded(self) -> UpConfig:
        if not is_loopback(self.host) and self.api_keys is None:
            raise ValueError(f"--host is {self.host}; {OPEN_HTTP}")
        return self


class TrainDraftConfig(_Settings):
    """`tandem train-draft`"""

    model: str = Field(description="the target: model folder or hub id; `demo` is the shipped one")
    prompts: Path | None = Field(
        None,
        description="file with a JSON object a line: messages (a chat) or prompt, which the target continues, or text",
    )
    out: Path = Field(Path("draft-head"), description="folder that the head is written to")
    steps: Annotated[int, Field(ge=1)] = Field(1000, description="steps of the optimisation")
    unroll: Annotated[int, Field(ge=1, le=16)] = Field(
        4, description="drafted tokens that a training step goes through"
    )
    batch_tokens: Annotated[int, Field(ge=1)] = Field(1024, description="tokens of a step, padding included")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="the peak of AdamW's")
    intermediate: Annotated[int, Field(ge=0)] = Field(0, description="width of the head's network; 0 takes the model's")
    draft_vocab: Annotated[int, Field(ge=0)] = Field(
        0, description="tokens that the head can draft, the most frequent; 0 is all, with the model's own output layer"
    )
    max_tokens: Annotated[int, Field(ge=2)] = Field(96, description="tokens by which a prompt is continued at most")
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.8, description="of every other continuation; those between are greedy"
    )
    seed: int = Field(0, description="of everything that is drawn")
    dtype: Dtype = Field("auto", description="the model's; auto takes the checkpoint's")
    device: str = Field("cpu", description="torch device")
    kv_mib: Annotated[float, Field(gt=0)] = Field(256.0, description="memory for KV while prompts are continued, MiB")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="compute threads; 0 takes all cores")

    @model_validator(mode="after")
    def _with_prompts(self) -> TrainDraftConfig:
        if self.prompts is None:
            raise ValueError(
                "--prompts: a file is needed; for the demo model, python -m tandem.demo.prompts writes one"
            )
        return self


def child_environment(overrides: dict[str, str]) -> dict[str, str]:
    """The environment for a process that `tandem up` starts: this one's with `overrides`.

    Without certificates: processes of one machine know each other by a token, and would not understand one another.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_TLS_")}
    return {**inherited, **overrides}


def set_before_import(values: dict[str, str]) -> None:
    """Sets variables that a library reads when it is imported, where the user did not set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def keep_native_ports_local(host: str) -> None:
    """Where a worker listens on loopback, its transport does, too: UCX, under NIXL, takes every interface by itself.

    Call it before NIXL is imported. What the user set (`UCX_NET_DEVICES`) stays.
    """
    if is_loopback(host):
        set_before_import({"UCX_NET_DEVICES": "lo"})


def client_key() -> str:
    """The API key that commands show a router, `TANDEM_API_KEY`: command lines are for all to see."""
    return os.environ.get("TANDEM_API_KEY", "")


def cache_folder() -> Path:
    """Where things that can be made again are kept for this user (`XDG_CACHE_HOME`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"


def dump(settings: _Settings) -> dict[str, Any]:
    """The settings as plain JSON values, for logs and banners."""
    return settings.model_dump(mode="json")
