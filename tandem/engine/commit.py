"""What a sampled token does to its sequence: pure bookkeeping after the forward pass."""

from __future__ import annotations

import logging

from tandem.engine.output import SeqOutput
from tandem.engine.sequence import Row, Sampled, Seq
from tandem.types import FinishReason

log = logging.getLogger(__name__)


def commit_row(row: Row, sampled: Sampled) -> SeqOutput | None:
    """Counts the row's positions as computed and appends the sampled token; returns what the sequence got, if anything.

    Sets `finish` with the last token, or where there was nothing to sample from, but frees nothing. The last sampled
    token never gets KV.
    """
    seq = row.seq
    seq.computed = row.start + row.count
    _take_prompt_logprobs(seq, sampled)
    if not row.samples:
        return None
    first_index = seq.output_len
    if sampled.token is None:
        seq.finish = FinishReason.ERROR
        return SeqOutput(seq, first_index, (), (), seq.finish, None)
    if seq.sampling.max_tokens == 0:
        # Only the prompt was asked for: what was drawn behind it is dropped.
        seq.finish = FinishReason.LENGTH
        return SeqOutput(seq, first_index, (), (), seq.finish, None)
    try:
        forced = _constrain(seq, sampled.token)
    except Exception:  # whatever a grammar's library raises, the other sequences must not notice
        log.exception("the grammar of %s failed; it ends", seq.seq_id)
        seq.finish = FinishReason.ERROR
        return SeqOutput(seq, first_index, (), (), seq.finish, None)
    taken: list[int] = []
    for token in (sampled.token, *forced):
        taken.append(token)
        seq.tokens.append(token)
        seq.finish = _finish(seq, token, first_index + len(taken) - 1)
        if seq.finish is not None:
            seq.stop_token = token if seq.finish is FinishReason.STOP else None
            break
    logprobs = () if sampled.logprob is None else (sampled.logprob,)
    seq.output_logprobs += logprobs
    return SeqOutput(seq, first_index, tuple(taken), logprobs, seq.finish, seq.stop_token, len(taken) - 1)


def _constrain(seq: Seq, token: int) -> list[int]:
    """Tells the grammar of a token; returns the tokens that it lets no model choose and that follow at once.

    Their KV is computed in one pass with the next sampling (jump-forward decoding: Zheng et al. 2023,
    arXiv:2312.07104). None where log-probabilities are due: each needs its own position's distribution.
    """
    if seq.constraint is None:
        return []
    seq.constraint.accept(token)
    room = seq.sampling.max_tokens - seq.output_len - 1
    return seq.constraint.force(room) if room > 0 and seq.sampling.logprobs is None else []


def _finish(seq: Seq, token: int, earlier: int) -> FinishReason | None:
    """Whether the output ends with `token`, which `earlier` others precede. A stop token beats the length."""
    if token in seq.eos_ids and earlier >= seq.sampling.min_tokens:
        return FinishReason.STOP
    if seq.constraint is not None and seq.constraint.finished:
        return FinishReason.STOP  # whatever `ignore_eos` and `min_tokens` say: nothing may follow a complete text
    return FinishReason.LENGTH if earlier + 1 >= seq.sampling.max_tokens else None


def _take_prompt_logprobs(seq: Seq, sampled: Sampled) -> None:
    """Appends the row's prompt log-probabilities, unless a recomputation brings those that are known."""
    if seq.sampling.prompt_logprobs is None or len(seq.prompt_logprobs) >= seq.prompt_len:
        return
    if not seq.prompt_logprobs:
        seq.prompt_logprobs.append(None)
    room = seq.prompt_len - len(seq.prompt_logprobs)
    seq.prompt_logprobs += sampled.prompt_logprobs[:room]
