"""Settings of a draft head's training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from tandem.config.fields import Dtype
from tandem.config.process import Settings
from tandem.units import COUNT, MEBIBYTES


class TrainDraftConfig(Settings):
    """`tandem train-draft`"""

    model: str = Field(description="the target: model folder or hub id; `demo` is the shipped one")
    prompts: Path | None = Field(
        None,
        description="file with a JSON object a line: messages (a chat) or prompt, which the target continues, or text",
    )
    out: Path = Field(Path("draft-head"), description="folder that the head is written to")
    steps: Annotated[int, Field(ge=1), COUNT] = Field(1000, description="steps of the optimisation")
    unroll: Annotated[int, Field(ge=1, le=16)] = Field(
        4, description="drafted tokens that a training step goes through"
    )
    batch_tokens: Annotated[int, Field(ge=1), COUNT] = Field(1024, description="tokens of a step, padding included")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="the peak of AdamW's")
    intermediate: Annotated[int, Field(ge=0), COUNT] = Field(
        0, description="width of the head's network; 0 takes the model's"
    )
    draft_vocab: Annotated[int, Field(ge=0), COUNT] = Field(
        0, description="tokens that the head can draft, the most frequent; 0 is all, with the model's own output layer"
    )
    max_tokens: Annotated[int, Field(ge=2), COUNT] = Field(
        96, description="tokens by which a prompt is continued at most"
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.8, description="of every other continuation; those between are greedy"
    )
    seed: int = Field(0, description="of everything that is drawn")
    dtype: Dtype = Field("auto", description="the model's; auto takes the checkpoint's")
    device: str = Field("cpu", description="torch device")
    kv_mib: Annotated[float, Field(gt=0), MEBIBYTES] = Field(
        256.0, description="memory for KV while prompts are continued, MiB"
    )
    threads: Annotated[int, Field(ge=0)] = Field(0, description="compute threads; 0 takes all cores")

    @model_validator(mode="after")
    def _with_prompts(self) -> TrainDraftConfig:
        if self.prompts is None:
            raise ValueError(
                "--prompts: a file is needed; for the demo model, python -m tandem.demo.prompts writes one"
            )
        return self
