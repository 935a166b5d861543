"""Settings of workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tandem.config.fields import (
    DRAFT_BRANCHES_HELP,
    DRAFT_MODEL_HELP,
    DRAFT_TOKENS_HELP,
    OPEN_METRICS,
    SPECULATIVE_HELP,
    Addresses,
    DraftBranches,
    DraftTokens,
    Dtype,
    Port,
    Speculative,
    Transport,
    check_drafter,
)
from tandem.config.process import ProcessConfig, TracedSettings
from tandem.ports import is_loopback
from tandem.units import COUNT, IN_MILLISECONDS, IN_SECONDS, MEBIBYTES


class WorkerConfig(ProcessConfig, TracedSettings):
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
    kv_mib: Annotated[float, Field(gt=0), MEBIBYTES] | None = Field(
        None, description="memory for KV pages, MiB; default: 256 on CPUs, on GPUs what the weights and a step leave"
    )
    pages: Annotated[int, Field(ge=0), COUNT] = Field(0, description="KV pages; 0 derives them from kv_mib")
    draft_model: str | None = Field(None, description=DRAFT_MODEL_HELP)
    max_context: Annotated[int, Field(ge=0), COUNT] = Field(
        0, description="tokens in one sequence; 0 takes the model's"
    )
    max_batch_tokens: Annotated[int, Field(ge=1), COUNT] = Field(512, description="tokens computed in one step")
    inter_token_ms: Annotated[float, Field(ge=0), IN_MILLISECONDS] = Field(
        0.0, description="bound on a step's time while sequences generate, kept by smaller prompt chunks; 0 is none"
    )
    max_running: Annotated[int, Field(ge=1), COUNT] = Field(64, description="sequences in one step")
    max_waiting: Annotated[int, Field(ge=1), COUNT] = Field(1024, description="requests queued before more get 429")
    ageing_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
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
    lease_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        10.0, description="seconds after which a silent peer or router is given up"
    )
    probe_s: Annotated[float, Field(ge=0), IN_SECONDS] = Field(
        60.0, description="seconds between pages that the worker sends itself over its transport; 0 sends none"
    )
    quiesce_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        5.0, description="seconds to wait for a peer's `quiesced`"
    )
    drain_s: Annotated[float, Field(ge=0), IN_SECONDS] = Field(
        30.0, description="seconds that requests under way get to end after SIGTERM; a second signal ends them at once"
    )

    slab_mib: Annotated[float, Field(gt=0), MEBIBYTES] = Field(
        32.0, description="landing slab for each worker that KV comes from, MiB"
    )
    slabs_max_mib: Annotated[float, Field(gt=0), MEBIBYTES] = Field(
        512.0, description="landing slabs in all; over it a decode worker drains and exits"
    )
    span_tokens: Annotated[int, Field(ge=1), COUNT] = Field(512, description="tokens pushed at once")
    queue_deadline_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        30.0, description="seconds the sender may compute nothing of a ticket"
    )
    handshake_deadline_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        10.0, description="seconds for connecting to a sender"
    )
    transfer_deadline_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        10.0, description="seconds without progress while computed KV is on its way"
    )

    @model_validator(mode="after")
    def _room_for_a_slab(self) -> WorkerConfig:
        if self.slab_mib > self.slabs_max_mib:
            raise ValueError(f"slab_mib is {self.slab_mib:g}; slabs_max_mib leaves room for {self.slabs_max_mib:g}")
        return self

    @model_validator(mode="after")
    def _one_drafter(self) -> WorkerConfig:
        check_drafter(self.speculative, self.draft_model, self.draft_branches)
        return self

    @model_validator(mode="after")
    def _guarded(self) -> WorkerConfig:
        self.check_grpc("--host", self.host)
        if not is_loopback(self.host) and self.metrics_token is None:
            raise ValueError(f"--host is {self.host}; {OPEN_METRICS}")
        return self


class PrefillConfig(WorkerConfig):
    """`tandem prefill`"""

    staging_mib: Annotated[float, Field(gt=0), MEBIBYTES] = Field(
        32.0, description="registered memory that spans are sent from, MiB"
    )


class DecodeConfig(WorkerConfig):
    """`tandem decode`"""

    staging_mib: Annotated[float, Field(gt=0), MEBIBYTES] = Field(
        8.0, description="registered memory that spans are sent from, MiB"
    )
    local_prefill_tokens: Annotated[int, Field(ge=0), COUNT] = Field(
        32, description="misses up to this are always computed locally"
    )
    grammar_compile_s: Annotated[float, Field(gt=0), IN_SECONDS] = Field(
        10.0, description="seconds that compiling a grammar may take"
    )
    grammar_memory_mib: Annotated[int, Field(ge=64), MEBIBYTES] = Field(
        1024, description="memory that compiling a grammar may take, MiB"
    )
    grammar_cache_mib: Annotated[int, Field(ge=0), MEBIBYTES] = Field(
        256, description="memory for compiled grammars, MiB"
    )
    json_any_whitespace: bool = Field(
        False, description="let models lay out the JSON that a request asks for; else it is written on one line"
    )
