"""Hand-overs between workers in this process: everything arrives, or another worker or this one makes up for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtransfer.backends.inproc import InprocLanding
from tandem.cluster import new_id
from tandem.engine.sequence import Seq
from tandem.errors import Overloaded
from tandem.kv import Span
from tandem.testing.pair import Answer, Pair, pair
from tandem.types import FinishReason, SamplingParams, Usage

PROMPT = tuple(range(10, 210))
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SPANS: dict[str, Any] = {"span_tokens": 32}


class Exports:
    """Counts a prefill worker's exports; after `free` of them it holds the others back until `open` is set."""

    def __init__(self, workers: Pair, patch: pytest.MonkeyPatch, index: int = 0, free: int = 1 << 30) -> None:
        self.spans: list[Span] = []
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        source = workers.prefill[index].services._engine_source  # type: ignore[attr-defined]
        export = source.export

        async def counted(ticket: str, span: Span, out: Any) -> None:
            if len(self.spans) >= free:
                self.reached.set()
                await self.open.wait()
            self.spans.append(span)
            await export(ticket, span, out)

        patch.setattr(source, "export", counted)


async def expected(workers: Pair) -> list[int]:
    """What is answered without any hand-over."""
    (answer,) = await workers.generate(PROMPT, GREEDY, hand_over=False, salt="local")
    return answer.tokens


def usage_of(answer: Answer, tokens: list[int]) -> Usage:
    """The usage of an answer that ended well with these tokens."""
    assert (answer.finish, answer.error, answer.tokens) == (FinishReason.LENGTH, "", tokens)
    assert answer.usage is not None
    return answer.usage


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_a_prompt_without_output_ends_and_moves_unless_it_is_scored(
    logprobs: int | None, small_model: Path
) -> None:
    async with pair(small_model, decode_settings=SPANS) as workers:
        asked = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=logprobs)
        answers = await workers.answer(await workers.submit(PROMPT, asked, choices=2))
        moved = len(PROMPT) - 1 if logprobs is None else 0
        assert [usage_of(answer, []).moved_tokens for answer in answers] == [moved] * 2
        scores = answers[0].prompt_logprobs
        assert [score.token for score in scores if score] == list(PROMPT[1:] if logprobs is not None else ())
        (again,) = await workers.generate(PROMPT, GREEDY, hand_over=False)
        assert usage_of(again, await expected(workers)).decode_cached_tokens == 192, "its whole pages are cached"


def failures(workers: Pair) -> float:
    """Hand-overs that the decode worker counts as failed."""
    return float(workers.decode.metrics.failures.labels("hand_over")._value.get())


async def test_all_but_the_last_token_is_handed_over(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with pair(small_model, decode_settings=SPANS) as workers:
        exports = Exports(workers, monkeypatch)
        (answer,) = await workers.generate(PROMPT, GREEDY)
        usage = usage_of(answer, await expected(workers))
        assert (usage.moved_tokens, usage.sender) == (199, workers.prefill[0].info.incarnation)
        assert usage.hand_over_ms > 0
        covered = sorted(token for span in exports.spans for token in range(span.start, span.end))
        assert covered == list(range(199))
        size = workers.decode.info.layout.token_bytes * 199
        (move,) = workers.decode.services.report().moves
        assert (move.sender, move.bytes, move.tickets) == (workers.prefill[0].info.incarnation, size, 1)


async def test_the_next_turn_moves_only_what_is_new(small_model: Path) -> None:
    async with pair(small_model, decode_settings=SPANS) as workers:
        (first,) = await workers.generate(PROMPT, GREEDY)
        turn = (*PROMPT, *first.tokens, *range(50, 90))
        (second,) = await workers.generate(turn, GREEDY)
        assert second.usage is not None
        reusable = (len(PROMPT) + 8 - 1) // 16 * 16
        assert second.usage.decode_cached_tokens == reusable
        assert second.usage.moved_tokens == len(turn) - 1 - reusable


async def test_small_misses_and_small_prompts_stay_here(small_model: Path) -> None:
    async with pair(small_model, decode_settings={"local_prefill_tokens": 32}) as workers:
        for prompt, moved in ((PROMPT[:33], 0), (PROMPT[100:134], 33), (PROMPT[:1], 0)):
            (answer,) = await workers.generate(prompt, GREEDY)
            assert answer.usage is not None
            assert answer.usage.moved_tokens == moved


async def test_prompt_log_probabilities_are_computed_here(small_model: Path) -> None:
    async with pair(small_model) as workers:
        sampling = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
        (answer,) = await workers.generate(PROMPT, sampling)
        assert answer.usage is not None
        assert (answer.usage.moved_tokens, len(answer.prompt_logprobs)) == (0, len(PROMPT))


@pytest.mark.parametrize("stopped", [1, 2])
async def test_a_sender_that_is_gone_is_passed_over(stopped: int, small_model: Path) -> None:
    """With the last one gone too, the decode worker computes the prompt; the client sees no error."""
    async with pair(small_model, prefill=2, decode_settings=SPANS) as workers:
        tokens = await expected(workers)
        for index in range(stopped):
            await workers.stop(workers.prefill[index])
        (answer,) = await workers.generate(PROMPT, GREEDY)
        assert usage_of(answer, tokens).moved_tokens == (199 if stopped == 1 else 0)
        failed = {move.sender: move.failures for move in workers.decode.services.report().moves}
        for index, worker in enumerate(workers.prefill):
            assert failed.get(worker.info.incarnation, 0) == (1 if index < stopped else 0)
        assert failures(workers) == stopped


async def test_what_a_tenant_uses_is_reported(small_model: Path) -> None:
    async with pair(small_model, decode_settings=SPANS) as workers:
        await workers.generate(PROMPT, GREEDY, tenant="t")
        await workers.generate(PROMPT, GREEDY)
        (use,) = workers.decode.services.report().tenants
        assert (use.tenant, use.requests, use.tokens, use.running) == ("t", 1, len(PROMPT) + 8, 0)


@pytest.mark.parametrize("senders", [1, 2])
async def test_a_sender_that_stops_in_the_middle_is_made_up_for(
    senders: int, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had landed stays: the next sender, or this worker, goes on behind it."""
    async with pair(small_model, prefill=senders, decode_settings=SPANS) as workers:
        tokens = await expected(workers)
        landed: list[Span] = []
        land = workers.decode.engine.import_span

        def landing(seq: Seq, span: Span, data: Any) -> None:
            land(seq, span, data)
            landed.append(span)

        monkeypatch.setattr(workers.decode.engine, "import_span", landing)
        exports = Exports(workers, monkeypatch, free=2)
        others = Exports(workers, monkeypatch, index=1) if senders == 2 else None
        name = await workers.submit(PROMPT, GREEDY)
        await exports.reached.wait()
        while len(landed) < 2:
            await asyncio.sleep(0.001)
        stopping = asyncio.create_task(workers.stop(workers.prefill[0]))
        (answer,) = await workers.answer(name)
        exports.open.set()
        await stopping
        usage = usage_of(answer, tokens)
        assert usage.moved_tokens == (64 if others is None else 199)
        assert others is None or min(span.start for span in others.spans) == 64
        assert failures(workers) == 1


async def test_a_sender_that_refuses_is_followed_by_the_next(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> int:
        raise Overloaded("too many prompts")

    async with pair(small_model, prefill=2) as workers:
        tokens = await expected(workers)
        monkeypatch.setattr(workers.prefill[0].services._engine_source, "open", refuse)  # type: ignore[attr-defined]
        (answer,) = await workers.generate(PROMPT, GREEDY)
        assert usage_of(answer, tokens).moved_tokens == 199
        assert failures(workers) == 1


async def test_a_restarted_sender_is_not_mistaken_for_the_former(small_model: Path) -> None:
    """Its address answers, but with another incarnation: refused, and the prompt computed here."""
    async with pair(small_model) as workers:
        tokens = await expected(workers)
        workers.prefill[0].info = replace(workers.prefill[0].info, incarnation=new_id())
        (answer,) = await workers.generate(PROMPT, GREEDY)
        assert usage_of(answer, tokens).moved_tokens == 0
        assert failures(workers) == 1


async def test_damaged_kv_is_never_decoded(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A span whose bytes change on the way is found by its digest; the prompt is computed here."""
    write, damaged = InprocLanding.write, []

    def damaging(landing: InprocLanding, view: Any, offset: int, manifest: bytes) -> None:
        write(landing, view, offset, manifest)
        if armed:
            landing.memory[offset] ^= 1
            damaged.append(offset)

    armed: list[bool] = []
    monkeypatch.setattr(InprocLanding, "write", damaging)
    async with pair(small_model, decode_settings=SPANS) as workers:
        tokens = await expected(workers)
        await workers.generate(PROMPT, GREEDY, salt="first")
        armed.append(True)
        (answer,) = await workers.generate(PROMPT, GREEDY)
        usage_of(answer, tokens)
        assert damaged
        assert failures(workers) == 1


async def test_what_a_plan_counted_on_and_is_gone_is_fetched_although_it_said_local(small_model: Path) -> None:
    async with pair(small_model) as workers:
        worker = workers.decode.services.worker  # type: ignore[attr-defined]
        seen = []
        submit = worker.submit

        async def planned_local(*arguments: Any) -> Any:
            *others, expected_cached, _ = arguments
            assert expected_cached == 0
            seen.append(await submit(*others, 190, True))
            return seen[-1]

        worker.submit = planned_local
        (answer,) = await workers.generate(PROMPT, GREEDY)
        assert seen == [(0, workers.prefill[0].info.incarnation)]
        assert answer.usage is not None
        assert answer.usage.moved_tokens == 199


async def test_pages_that_a_ticket_of_another_worker_held_go_to_who_waits_for_them(small_model: Path) -> None:
    """No step runs meanwhile: the end of the ticket alone must wake the one that waits."""
    async with pair(small_model, decode_settings={"pages": 24}) as workers:
        await workers.generate(PROMPT, GREEDY)
        source = workers.decode.services._source  # type: ignore[attr-defined]
        assert await source.open("t", PROMPT[:192], "", "", 0, lambda computed: None) == 192
        name = await workers.submit(tuple(range(290, 0, -1)), GREEDY)
        while (await workers.decode.thread.call(workers.decode.engine.status)).waiting != 1:
            await asyncio.sleep(0.005)
        for _ in range(20):
            await workers.decode.thread.call(lambda: None)
        await source.close("t")
        (answer,) = await workers.answer(name)
        assert answer.finish is FinishReason.LENGTH


async def test_shutting_down_ends_every_request_with_an_error(small_model: Path) -> None:
    async with pair(small_model) as workers:
        long = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True)
        names = [await workers.submit(PROMPT[at:], long) for at in range(3)]
        await workers.decode.services.finish()
        for name in names:
            (answer,) = await workers.answer(name)
            assert (answer.finish, answer.error) == (FinishReason.ERROR, "the worker is shutting down")
        assert workers.decode.services.report().draining


async def test_senders_take_turns_with_slabs_where_the_cap_leaves_too_few(small_model: Path) -> None:
    """A pair over which nothing moves is closed for one that a request needs."""
    settings = {**SPANS, "slab_mib": 1.0, "slabs_max_mib": 1.0}
    async with pair(small_model, prefill=2, decode_settings=settings) as workers:
        first, second = workers.prefill
        moved = []
        for sender, shift in ((first, 0), (second, 1), (first, 2)):
            workers.prefill = [sender]
            (answer,) = await workers.generate([token + shift for token in PROMPT], GREEDY)
            assert answer.usage is not None
            moved.append(answer.usage.moved_tokens)
        workers.prefill = [first, second]
        assert moved == [199, 199, 199]
