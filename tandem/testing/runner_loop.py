"""The least that drives a runner: no scheduler, no cache, pages handed out in random order."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from tandem.engine.kv_pool import KvPool
from tandem.engine.model import LoadedModel
from tandem.engine.runner import Runner
from tandem.engine.sequence import Batch, Row, Sampled, Seq
from tandem.types import SamplingParams


class RunnerLoop:
    """Sequences that are computed in chunks and decoded together until each has its `max_tokens`."""

    def __init__(self, loaded: LoadedModel, page_size: int = 16, num_pages: int = 256, seed: int = 0) -> None:
        self.pool = KvPool(loaded.layout, num_pages, page_size, loaded.device)
        self.runner = Runner(loaded.module, self.pool, loaded.config.vocab_size, loaded.device, kernels=loaded.kernels)
        self._free = random.Random(seed).sample(range(num_pages), num_pages)
        self._made = 0

    def add(self, prompt: Sequence[int], sampling: SamplingParams, choice: int = 0) -> Seq:
        """A sequence with pages for all it will hold; it never ends before `max_tokens`."""
        total = len(prompt) + sampling.max_tokens
        self._made += 1
        run = [self._free.pop() for _ in range(-(-total // self.pool.page_size))]
        pages = [list(run) for _ in self.pool.layout.groups]
        name = f"seq-{self._made}"
        return Seq(name, list(prompt), len(prompt), sampling, b"", frozenset(), choice=choice, pages=pages)

    def step(self, seqs: Sequence[Seq], chunk: int) -> list[Sampled]:
        """Computes up to `chunk` tokens of each sequence in one batch, decoding ones first, and takes in what comes."""
        rows = []
        for seq in sorted(seqs, key=lambda seq: seq.pending > 1):
            count = min(seq.pending, chunk)
            rows.append(Row(seq, seq.computed, count, samples=count == seq.pending))
        results = self.runner.run(Batch(tuple(rows)))
        for row, result in zip(rows, results, strict=True):
            row.seq.computed += row.count
            row.seq.prompt_logprobs += result.prompt_logprobs
            if result.token is not None:
                row.seq.tokens.append(result.token)
            if result.logprob is not None:
                row.seq.output_logprobs.append(result.logprob)
        return results

    def finish(self, seqs: Sequence[Seq], chunk: int = 1 << 20) -> list[list[int]]:
        """Steps until all sequences have their tokens; returns each one's output."""
        while active := [seq for seq in seqs if seq.output_len < seq.sampling.max_tokens]:
            self.step(active, chunk)
        return [seq.tokens[seq.prompt_len :] for seq in seqs]

    def logits(self, prompt: Sequence[int], chunk: int = 1 << 20) -> torch.Tensor:
        """`[len(prompt), vocabulary]`, float32: the logits at every position."""
        greedy = SamplingParams(temperature=0.0, max_tokens=1)
        seq, parts = self.add(prompt, greedy), []
        with torch.inference_mode():
            for start in range(0, len(prompt), chunk):
                row = Row(seq, start, min(chunk, len(prompt) - start), samples=False)
                parts.append(self.runner.model.logits(self.runner.forward(Batch((row,)))))
        return torch.cat(parts)
