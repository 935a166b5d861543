"""The shipped draft head: what it is worth on chats from templates that it never saw."""

from __future__ import annotations

from itertools import islice
from typing import Any

from tandem.config import WorkerConfig
from tandem.demo import HEAD_PATH, MODEL_PATH
from tandem.demo.corpus import held_out
from tandem.demo.prompts import prompts
from tandem.engine.build import build_engine
from tandem.engine.output import DraftOutcome
from tandem.engine.sequence import Seq
from tandem.testing.pair import pair
from tandem.text.tokenizer import Tokenizer
from tandem.types import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=96)


def asked(count: int) -> list[list[int]]:
    tokenizer = Tokenizer.load(str(MODEL_PATH))
    return [tokenizer.encode(tokenizer.render(chat.prompt())) for chat in held_out(3, count)]


def test_at_least_two_drafted_tokens_a_step_are_accepted() -> None:
    """On held-out templates, not counting the target's own token behind them."""
    config = WorkerConfig(
        model=str(MODEL_PATH), draft_model=str(HEAD_PATH), threads=1, kv_mib=64, draft_tokens=6, draft_adaptive=False
    )
    engine, model = build_engine(config)
    eos = frozenset(model.config.eos_token_ids)
    for number, prompt in enumerate(asked(66)):
        engine.add(Seq(str(number), prompt, len(prompt), GREEDY, b"", eos))
    drafts = list[DraftOutcome]()
    while engine.has_work():
        drafts += engine.step().drafts
    assert len(drafts) > 200
    assert sum(draft.accepted for draft in drafts) / len(drafts) >= 2.0


async def test_a_hand_over_costs_few_of_them() -> None:
    settings: dict[str, Any] = {"draft_model": str(HEAD_PATH), "draft_tokens": 6, "draft_adaptive": False, "kv_mib": 16}
    async with pair(MODEL_PATH, **settings) as workers:
        moved = 0
        for prompt in asked(33):
            (answer,) = await workers.generate(prompt, GREEDY)
            assert answer.usage is not None
            moved += answer.usage.moved_tokens
        speculation = workers.decode.engine.speculation
        assert speculation is not None
        assert moved > 300
        assert speculation.accepted / (speculation.drafted / 6) >= 1.5


def test_the_head_is_small() -> None:
    assert (HEAD_PATH / "model.safetensors").stat().st_size < 3_000_000


def test_training_prompts_are_no_held_out_chats() -> None:
    given = list(islice(prompts(7), 3000))
    assert given == list(islice(prompts(7), 3000))
    questions = {tuple(each["content"] for each in messages if each["role"] == "user") for messages in given}
    for chat in held_out(3, 400):
        assert tuple(each["content"] for each in chat.prompt() if each["role"] == "user") not in questions
