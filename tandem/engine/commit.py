"""What sampled tokens do to their sequence: pure bookkeeping after the forward pass."""

from __future__ import annotations

import logging

from tandem.engine.output import SeqOutput
from tandem.engine.sequence import ROOT, Row, Sampled, Seq
from tandem.obs import about
from tandem.types import FinishReason, TokenLogprob

log = logging.getLogger(__name__)


def commit_row(row: Row, sampled: Sampled) -> SeqOutput | None:
    """Counts the row's own positions as computed and appends the sampled token; returns what the sequence got, if any.

    Where that token, and what the grammar forces behind it, are the next tokens of the row's draft, these count as
    computed too, and the token sampled behind them follows. Sets `finish` with the last token, or where there was
    nothing to sample from, but frees nothing. The last token is never computed.
    """
    seq = row.seq
    seq.computed = row.start + row.own
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
    logprobs, forced, path = _follow(row, sampled)
    seq.computed = min(seq.computed + len(path), len(seq.tokens) - 1)
    seq.output_logprobs += logprobs
    tokens = tuple(seq.tokens[seq.prompt_len + first_index :])
    stop = seq.tokens[-1] if seq.finish is FinishReason.STOP else None
    seq.stop_token = stop
    return SeqOutput(seq, first_index, tokens, tuple(logprobs), seq.finish, stop, forced, tuple(path))


def _follow(row: Row, sampled: Sampled) -> tuple[list[TokenLogprob], int, list[int]]:
    """Appends tokens along the row's draft as far as they are what was sampled or forced, and the one behind.

    Returns their log-probabilities, how many were forced, and the nodes that they are.
    """
    seq, node, forced = row.seq, ROOT, 0
    logprobs: list[TokenLogprob] = []
    path: list[int] = []
    while True:
        token, logprob = (sampled.token, sampled.logprob) if node == ROOT else sampled.nodes[node]
        if token is None:
            return logprobs, forced, path  # nothing behind a draft: the next step samples there, and sees to it
        try:
            taken = [token, *_constrain(seq, token)]
        except Exception:  # whatever a grammar's library raises, the other sequences must not notice
            log.exception("the grammar of %s failed; it ends", seq.seq_id, extra=about(seq.request_id))
            seq.finish = FinishReason.ERROR
            return logprobs, forced, path
        if logprob is not None:
            logprobs.append(logprob)
        forced -= 1
        followed: int | None = node
        for each in taken:
            seq.finish = _finish(seq, each, seq.output_len)
            seq.tokens.append(each)
            forced += 1
            followed = None if followed is None else row.draft.child(followed, each)
            if followed is not None:
                path.append(followed)
            if seq.finish is not None:
                return logprobs, forced, path
        if followed is None:
            return logprobs, forced, path
        node = followed


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
