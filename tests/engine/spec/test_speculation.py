"""Drafts in an engine: what they save, what they cost, and that nobody else notices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tandem.engine.commit import commit_row
from tandem.engine.engine import Engine
from tandem.engine.output import DraftOutcome
from tandem.engine.policy import EngineConfig
from tandem.engine.sequence import NO_DRAFT, ROOT, Draft, Row, Sampled, Seq
from tandem.testing.engine import FakePool, FakeRunner, make_seq, naive_continuation
from tandem.types import FinishReason, SamplingParams, TokenLogprob

PROMPT = [1, 2, 3, 4, 5]


@dataclass
class Knowing:
    """Drafts what it was told, for every sequence."""

    answer: Sequence[int]
    tree: bool = False
    name: str = "knowing"
    free: bool = False
    branches: int = 1
    rows: list[tuple[int, int]] = field(default_factory=list)
    """(drafted, accepted)"""
    forgotten: list[tuple[str, int]] = field(default_factory=list)

    def propose(self, seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
        return [self._one(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]

    def _one(self, seq: Seq, limit: int) -> Draft:
        true = tuple(self.answer[seq.output_len :][:limit])
        if not self.tree:
            return Draft(true)
        # A wrong brother before every right token.
        tokens = tuple(token for each in true for token in ((each + 1) % 50, each))[:limit]
        return Draft(tokens, tuple(max(node // 2 * 2 - 1, ROOT) for node in range(len(tokens))))

    def committed(self, row: Row, accepted: Sequence[int]) -> None:
        if len(row.draft):
            self.rows.append((len(row.draft), len(accepted)))

    def forget(self, seq: Seq) -> None:
        self.forgotten.append((seq.seq_id, seq.computed))


def run(engine: Engine, outcomes: list[DraftOutcome] | None = None) -> int:
    steps = 0
    while engine.has_work():
        step = engine.step()
        if outcomes is not None:
            outcomes += step.drafts
        engine.check_integrity()
        steps += 1
    return steps


def made(drafter: Any, pages: int = 64, page_size: int = 4, **limits: Any) -> Engine:
    pool = FakePool(pages, page_size)
    limits.setdefault("draft_adaptive", False)
    return Engine(FakeRunner(pool), pool, EngineConfig(**limits), drafter=drafter)


@pytest.mark.parametrize(("tree", "steps"), [(False, 5), (True, 10)])
def test_right_drafts_save_steps(tree: bool, steps: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=37, logprobs=0)
    answer = naive_continuation(PROMPT, sampling)
    drafter = Knowing(answer, tree)
    engine = made(drafter)
    seq = make_seq("a", PROMPT, sampling=sampling)
    engine.add(seq)
    outcomes: list[DraftOutcome] = []
    assert run(engine, outcomes) == steps  # after the first, 9 tokens in each, or 5 and at the end fewer
    assert seq.tokens[len(PROMPT) :] == answer
    assert [each.token for each in seq.output_logprobs] == answer
    assert engine.idle_leaks() == []
    assert drafter.forgotten == [("a", len(PROMPT) + 36)]
    assert outcomes == [("knowing", drafted, accepted) for drafted, accepted in drafter.rows]
    assert sum(each.accepted for each in outcomes) == 37 - steps


def test_wrong_drafts_cost_no_token_and_no_page() -> None:
    answer = naive_continuation(PROMPT, SamplingParams(max_tokens=20))
    engine = made(Knowing([(token + 1) % 50 for token in answer]), page_size=1)
    seq = make_seq("a", PROMPT, max_tokens=20)
    engine.add(seq)
    for _ in range(20):
        engine.step()
        assert not seq.pages or len(seq.pages[0]) <= len(seq.tokens)
    assert (seq.tokens[len(PROMPT) :], seq.finish) == (answer, FinishReason.LENGTH)


def test_a_stop_token_within_a_draft_ends_it_there() -> None:
    answer = naive_continuation(PROMPT, SamplingParams(max_tokens=20))
    stop = next(at for at, token in enumerate(answer) if at >= 3 and token not in answer[:at])
    engine = made(Knowing(answer))
    seq = make_seq("a", PROMPT, max_tokens=20, eos_ids=frozenset({answer[stop]}))
    engine.add(seq)
    assert run(engine) == 2
    assert (seq.tokens[len(PROMPT) :], seq.stop_token) == (answer[: stop + 1], answer[stop])
    again = make_seq("b", [*PROMPT, *answer[:stop], 49], max_tokens=1)
    engine.add(again)
    run(engine)
    assert again.cached_tokens == (len(PROMPT) + stop) // 4 * 4


def test_only_real_tokens_are_cached() -> None:
    """What is computed behind the answer's end is nobody's."""
    sampling = SamplingParams(temperature=0, max_tokens=13)
    answer = naive_continuation(PROMPT, sampling)
    for drafter in (Knowing(answer), Knowing([*answer[:4], *[0] * 20])):
        engine = made(drafter, page_size=2)
        engine.add(make_seq("a", PROMPT, sampling=sampling))
        run(engine)
        assert engine.match_len(b"root", [*PROMPT, *answer, *[0] * 20]) == (len(PROMPT) + len(answer) - 1) // 2 * 2


def test_drafts_take_what_the_budget_leaves_and_no_pages_of_others() -> None:
    answer = naive_continuation(PROMPT, SamplingParams(max_tokens=30))
    drafter = Knowing(answer)
    engine = made(drafter, max_batch_tokens=12)
    engine.add(make_seq("a", PROMPT, max_tokens=30))
    engine.step()
    engine.add(make_seq("b", [9] * 20, max_tokens=1))
    assert engine.step().batch_tokens == 12  # one token, and eleven of the other's prompt
    assert drafter.rows == []
    assert engine.step().batch_tokens == 12  # a token, nine of the prompt, and a draft of two
    assert drafter.rows == [(2, 2)]
    tight = made(Knowing(answer), pages=35, page_size=1)
    for name in "ab":
        tight.add(make_seq(name, PROMPT, max_tokens=12))
    run(tight)
    assert tight.status().retractions == 0


def test_one_slow_step_is_no_reason_never_to_draft_again() -> None:
    """It is tried again soon, and found to pay."""
    answer = naive_continuation(PROMPT, SamplingParams(max_tokens=400))
    drafter = Knowing(answer)
    pool = FakePool(256, 4)
    times = iter(range(1 << 30))
    engine = Engine(
        FakeRunner(pool), pool, EngineConfig(draft_tokens=4), clock=lambda: next(times) * 1e-3, drafter=drafter
    )
    speculation = engine.speculation
    assert speculation is not None
    engine.add(make_seq("a", PROMPT, max_tokens=400))
    while not drafter.rows:
        engine.step()
    speculation._drafted.sizes.clear()
    speculation._drafted._known.clear()
    speculation._drafted.add(5, 1.0)  # a hundred times as long as a plain one
    before = len(drafter.rows)
    for _ in range(120):
        engine.step()
    assert len(drafter.rows) > before + 10


def test_drafts_may_not_be_longer_than_they_are_allowed() -> None:
    class Greedy(Knowing):
        def propose(self, seqs: Sequence[Seq], limits: Sequence[int]) -> list[Draft]:
            return [Draft((1,) * 9) for _ in seqs]

    engine = made(Greedy([]), max_batch_tokens=64)
    engine.add(make_seq("a", PROMPT))
    engine.step()
    with pytest.raises(ValueError, match="9 tokens for a; 6 are allowed"):
        engine.step()
    with pytest.raises(ValueError, match="it must be 1 to 63"):
        made(Knowing([]), draft_tokens=64)


# Following a draft --------------------------------------------------------------------------------------------------


class Forcing:
    """A grammar in which 7 is always followed by 8, 9."""

    active, stuck, finished, ends = True, False, False, frozenset[int]()

    def __init__(self) -> None:
        self.taken: list[int] = []

    def accept(self, token: int) -> None:
        if token == 13:
            raise ValueError("13 is not allowed")
        self.taken.append(token)

    def force(self, limit: int) -> list[int]:
        forced = [8, 9][:limit] if self.taken[-1] == 7 else []
        self.taken += forced
        return forced


def follow(draft: Draft, sampled: list[int | None], **fields: Any) -> tuple[list[int], tuple[int, ...], Seq]:
    fields.setdefault("sampling", SamplingParams(max_tokens=9, logprobs=0))
    seq = make_seq("a", [1, 2], **fields)
    wants = seq.sampling.logprobs is not None
    picked = [(token, TokenLogprob(token or 0, -1.0) if wants else None) for token in sampled]
    row = Row(seq, 1, 1 + len(draft), True, draft)
    output = commit_row(row, Sampled(*picked[0], nodes=tuple(picked[1:])))
    assert output is not None and list(output.tokens) == seq.tokens[2:]
    assert len(output.logprobs) == (len(output.tokens) if wants else 0)
    assert seq.computed == min(2 + len(output.accepted), len(seq.tokens) - 1)
    return seq.tokens[2:], output.accepted, seq


def test_tokens_are_taken_as_long_as_they_are_what_was_sampled() -> None:
    assert follow(Draft((3, 4, 5)), [3, 4, 6, 7])[:2] == ([3, 4, 6], (0, 1))
    assert follow(Draft((3, 4, 5)), [4, 4, 6, 7])[:2] == ([4], ())
    assert follow(Draft((3, 4, 5)), [3, 4, 5, 7])[:2] == ([3, 4, 5, 7], (0, 1, 2))
    assert follow(NO_DRAFT, [3])[:2] == ([3], ())


def test_of_a_tree_one_path_is_taken() -> None:
    tree = Draft((3, 4, 5, 6), (ROOT, ROOT, 1, 0))
    assert follow(tree, [4, 0, 5, 9, 0])[:2] == ([4, 5, 9], (1, 2))
    assert follow(tree, [3, 6, 0, 0, 8])[:2] == ([3, 6, 8], (0, 3))


def test_what_has_no_numbers_behind_a_draft_is_left_to_the_next_step() -> None:
    tokens, accepted, seq = follow(Draft((3, 4)), [3, None, 4])
    assert (tokens, accepted, seq.finish, seq.computed) == ([3], (0,), None, 2)


def test_forced_text_runs_along_a_draft_and_leaves_it_where_they_differ() -> None:
    silent = SamplingParams(max_tokens=9)
    along = follow(Draft((7, 8, 9, 5)), [7, 0, 0, 5, 6], constraint=Forcing(), sampling=silent)
    assert along[:2] == ([7, 8, 9, 5, 6], (0, 1, 2, 3))
    beside = follow(Draft((7, 8, 5)), [7, 0, 5, 6], constraint=Forcing(), sampling=silent)
    assert beside[:2] == ([7, 8, 9], (0, 1))
    assert beside[2].computed == 4 and beside[2].pending == 1


def test_a_grammar_that_fails_behind_a_draft_keeps_what_was_before() -> None:
    tokens, accepted, seq = follow(Draft((3, 4)), [3, 13, 4], constraint=Forcing())
    assert (tokens, accepted, seq.finish) == ([3], (0,), FinishReason.ERROR)


# Drafts ---------------------------------------------------------------------------------------------------------------


def test_a_draft_is_a_tree() -> None:
    tree = Draft((3, 4, 5, 6), (ROOT, ROOT, 1, 0))
    assert [tree.depths(), tree.path(2), tree.ahead(3), tree.child(1, 5), tree.child(1, 6)] == [
        [1, 1, 2, 2], (1, 2), (3, 6), 2, None,
    ]  # fmt: skip
    assert tree.keep([1, 2]) == Draft((4, 5), (ROOT, 0))
    chain = Draft((3, 4, 5))
    assert [chain.depths(), chain.path(1), chain.ahead(1), chain.child(0, 4), chain.keep([0])] == [
        [1, 2, 3], (0, 1), (3, 4), 1, Draft((3,)),
    ]  # fmt: skip


@pytest.mark.parametrize("parents", [(0, 0), (ROOT, 1), (ROOT,), (ROOT, -2)])
def test_parents_stand_before_their_children(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must stand before them"):
        Draft((3, 4), parents)


def test_brothers_differ() -> None:
    with pytest.raises(ValueError, match="two drafted tokens are the same"):
        Draft((3, 3), (ROOT, ROOT))
