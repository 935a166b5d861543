from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tandem.config import WorkerConfig
from tandem.engine.build import build_engine, count_pages, engine_config
from tandem.engine.engine import Engine
from tandem.engine.sequence import Seq
from tandem.errors import ConfigError
from tandem.kv import KvLayout, LayerGroup, Span
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint
from tandem.testing.engine import LAYOUT, make_seq

PROMPT = [(17 * index) % 300 + 6 for index in range(75)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), CheckpointSpec(layers=2))


def settings(model: Path | str = "unused", **values: object) -> WorkerConfig:
    return WorkerConfig.model_validate({"model": str(model), "dtype": "float32", **values})


def build(model: Path, **values: object) -> Engine:
    return build_engine(settings(model, **values))[0]


def run(engine: Engine, *seqs: Seq) -> list[list[int]]:
    for seq in seqs:
        engine.add(seq)
    while engine.has_work():
        engine.step()
        engine.check_integrity()
    return [seq.tokens[seq.prompt_len :] for seq in seqs]


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> list[int]:
    """The continuation without cache, chunks or company."""
    tokens = run(build(checkpoint, pages=64, prefix_cache=False), make_seq("whole", PROMPT, max_tokens=12))[0]
    assert len(set(tokens)) > 3
    return tokens


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_real_model_says_the_same_cached_chunked_and_in_company(
    checkpoint: Path, whole: list[int], page_size: int
) -> None:
    engine = build(checkpoint, page_size=page_size, pages=512 // page_size, max_batch_tokens=24)
    cold = run(engine, make_seq("cold", PROMPT, max_tokens=12))
    others = [make_seq(f"other{index}", PROMPT[: 40 + index], max_tokens=12) for index in range(3)]
    warm = run(engine, make_seq("warm", PROMPT, max_tokens=12), *others)
    assert cold == [whole]
    assert warm[0] == whole
    assert engine.idle_leaks() == []


def test_a_real_model_goes_on_from_imported_kv(checkpoint: Path, whole: list[int]) -> None:
    sender, receiver = build(checkpoint, page_size=4, pages=64), build(checkpoint, page_size=16, pages=64)
    source = make_seq("p", PROMPT[:-1], prefill_only=True)
    run(sender, source)
    seq = make_seq("d", PROMPT, max_tokens=12)
    assert receiver.reserve(seq) == 0
    for start in range(0, len(PROMPT) - 1, 30):
        span = Span(start, min(30, len(PROMPT) - 1 - start))
        data = np.zeros(sender.layout.span_bytes(span, len(PROMPT) - 1), dtype=np.uint8)
        sender.export_span(source, span, data)
        receiver.import_span(seq, span, data)
    sender.release(source)
    receiver.landed(seq, len(PROMPT) - 1)
    assert run(receiver) == []
    assert seq.tokens[seq.prompt_len :] == whole
    assert sender.idle_leaks() == receiver.idle_leaks() == []


def test_a_real_model_says_the_same_after_retraction(checkpoint: Path) -> None:
    prompts = [[7 + index] * 5 for index in range(3)]
    roomy = run(build(checkpoint, page_size=4, pages=64), *[make_seq(f"s{i}", p, 40) for i, p in enumerate(prompts)])
    engine = build(checkpoint, page_size=4, pages=20)
    assert run(engine, *[make_seq(f"s{i}", p, 40) for i, p in enumerate(prompts)]) == roomy
    assert engine.status().retractions > 0


def test_memory_is_divided_into_pages() -> None:
    assert LAYOUT.token_bytes == 24
    assert count_pages(settings(kv_mib=1, page_size=16), LAYOUT) == ((1 << 20) // (24 * 16),)
    assert count_pages(settings(kv_mib=1, page_size=16, pages=7), LAYOUT) == (7,)


def layers_of(*groups: tuple[int, int | None]) -> KvLayout:
    """(layers, window) of each group; 24 bytes a token and layer."""
    made, first = [], 0
    for count, window in groups:
        made.append(LayerGroup(tuple(range(first, first + count)), window))
        first += count
    return KvLayout(LAYOUT.planes, tuple(made))


def test_a_window_has_as_many_pages_as_full_attention_while_all_windows_would_need_more() -> None:
    layout = layers_of((2, None), (2, 4096))
    assert count_pages(settings(kv_mib=1, page_size=16), layout) == ((1 << 20) // (4 * 24 * 16),) * 2
    assert count_pages(settings(page_size=16, pages=7), layout) == (7, 7)


def test_what_windows_do_not_need_goes_to_full_attention() -> None:
    """8 sequences of a window of 1024 and chunks of 256 hold 64 + 16 + 1 pages of 16 each."""
    layout = layers_of((1, None), (5, 1024))
    made = count_pages(settings(kv_mib=64, page_size=16, max_running=8, max_batch_tokens=256), layout)
    assert made[1] == 8 * 81
    page = 24 * 16
    assert 0 <= (64 << 20) - page * (made[0] + 5 * made[1]) < page
    assert made[0] > 2 * count_pages(settings(kv_mib=64, page_size=16), layers_of((6, None)))[0]


def test_a_window_has_at_least_what_one_hand_over_needs() -> None:
    """Of a window of 4: the block that it begins in, and the one that the prompt ends in."""
    made = count_pages(
        settings(pages=500, page_size=16, max_running=1, max_batch_tokens=16), layers_of((1, None), (1, 4))
    )
    assert made == (500, 8)


def test_without_full_attention_the_widest_window_has_what_others_do_not_need() -> None:
    layout = layers_of((1, 4096), (1, 512))
    made = count_pages(settings(kv_mib=64, page_size=16, max_running=2, max_batch_tokens=64), layout)
    assert made[1] == 2 * (32 + 4 + 1)
    assert made[0] + made[1] == (64 << 20) // (24 * 16)


def test_memory_for_less_than_a_page_is_refused() -> None:
    layout = KvLayout(LAYOUT.planes * 64, LAYOUT.groups)
    with pytest.raises(ConfigError, match=r"kv_mib is 0.01; one page of this model needs 0.0938") as caught:
        count_pages(settings(kv_mib=0.01, page_size=64), layout)
    assert caught.value.param == "kv_mib"


def test_settings_reach_the_engine() -> None:
    config = engine_config(settings(max_batch_tokens=9, max_running=3, ageing_s=0.5, prefix_cache=False))
    assert (config.max_batch_tokens, config.max_running, config.ageing_s, config.prefix_cache) == (9, 3, 0.5, False)
