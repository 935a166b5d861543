"""Settings of a router."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tandem.config.fields import (
    CHAT_TEMPLATE_HELP,
    OPEN_HTTP,
    REASONING_PARSER_HELP,
    TOOL_PARSER_HELP,
    Addresses,
    ChatTemplate,
    Port,
    ReasoningParser,
    ToolParser,
    existing_file,
)
from tandem.config.process import ProcessConfig, TracedSettings
from tandem.ports import is_loopback
from tandem.units import COUNT, IN_SECONDS, MEBIBYTES, MEBIBYTES_A_SECOND

DNS_LABEL = r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$"


class RouterConfig(ProcessConfig, TracedSettings):
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
    workers_file: Annotated[Path, AfterValidator(existing_file)] | None = Field(
        None, description="YAML or JSON list of such addresses, read again when it changes"
    )
    kubernetes_selector: str = Field(
        "", description="labels of the workers' pods, as kubectl -l takes them; default: Kubernetes is not asked"
    )
    kubernetes_namespace: Annotated[str, Field(pattern=DNS_LABEL)] = Field(
        "", description="namespace of those pods; default: the router's own"
    )
    policy: Literal["cost", "longest_prefix", "least_loaded", "round_robin"] = Field(
        "cost", description="how plans are made"
    )
    replicas: Annotated[int, Field(ge=0)] = Field(
        2, description="popular prefixes that are copied to another worker at once; 0 copies none; policy cost only"
    )
    replicas_mib_s: Annotated[float, Field(gt=0), MEBIBYTES_A_SECOND] = Field(
        256.0, description="MiB a second that copies may move"
    )
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
    max_body_mib: Annotated[float, Field(gt=0), MEBIBYTES] = Field(16.0, description="largest request body, MiB")
    max_connections: Annotated[int, Field(ge=1), COUNT] = Field(
        8192, description="HTTP connections open at once in a process; more get 503"
    )
    api_keys: Annotated[Path, AfterValidator(existing_file)] | None = Field(
        None, description="YAML file of tenants with API keys and limits, read again when it changes; default: no keys"
    )
    max_inflight: Annotated[int, Field(ge=1), COUNT] = Field(1024, description="requests admitted at once; more wait")
    max_queued: Annotated[int, Field(ge=0), COUNT] = Field(256, description="requests that wait for that; more get 429")
    queue_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        30.0, description="seconds that one waits at most; then it gets 503"
    )
    worker_backlog: Annotated[int, Field(ge=1), COUNT] = Field(
        128, description="sequences waiting at every decode worker from which on requests wait at the router"
    )
    index_max_blocks: Annotated[int, Field(ge=1), COUNT] = Field(4_000_000, description="blocks the prefix index keeps")
    index_max_age_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        14_400.0, description="seconds an unused index entry is kept"
    )
    turn_cache_mib: Annotated[int, Field(ge=1), MEBIBYTES] = Field(
        64, description="memory for what conversations were tokenised to, MiB"
    )
    explain_requests: Annotated[int, Field(ge=0), COUNT] = Field(
        4096, description="recent requests of which plan and outcome are remembered; 0 is none"
    )
    explain_mib: Annotated[float, Field(gt=0), MEBIBYTES] = Field(32.0, description="memory for them, MiB")
    explain_age_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        3600.0, description="seconds for which they are remembered"
    )
    ladder_blocks: Annotated[int, Field(ge=0), COUNT] = Field(
        131_072, description="blocks that the hit ladder remembers, about 350 bytes each; 0 computes none"
    )
    lease_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        10.0, description="seconds after which a silent worker is forgotten"
    )
    stream_queue: Annotated[int, Field(ge=1), COUNT] = Field(
        4096, description="tokens of each choice buffered for one slow reader before it is cut"
    )
    drain_s: Annotated[float, Field(ge=0), IN_SECONDS] = Field(
        30.0, description="seconds that answers under way get to end after SIGTERM; a second signal ends them at once"
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        2, description="other workers tried before a first token was made"
    )

    @model_validator(mode="after")
    def _guarded(self) -> RouterConfig:
        if not is_loopback(self.host) and self.api_keys is None:
            raise ValueError(f"--host is {self.host}; {OPEN_HTTP}")
        self.check_grpc("--control-host", self.control_host)
        if self.kubernetes_namespace and not self.kubernetes_selector:
            raise ValueError("--kubernetes-namespace is set; without --kubernetes-selector it means nothing")
        return self
