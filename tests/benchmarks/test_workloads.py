from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import Load
from benchmarks.make_trace import chats
from benchmarks.serve import fields, shape_of
from benchmarks.workloads import DEFAULTS, WORKLOADS, Shape, make
from tandem.traces import read_trace

LINE = {"timestamp": 10, "input_length": 700, "output_length": 5, "hash_ids": [0, 7]}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def shape(name: str, tmp_path: Path, **given: Any) -> Shape:
    trace = write(tmp_path / "trace.jsonl", LINE, {**LINE, "timestamp": 510, "hash_ids": [0, 8]})
    return shape_of(name, {"requests": 12, "trace": trace if name == "trace" else None, **given})


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_gives_one_workload_and_another_seed_another(name: str, tmp_path: Path) -> None:
    wished = shape(name, tmp_path)
    assert make(name, wished, 1) == make(name, wished, 1)
    assert make(name, wished, 1) != make(name, wished, 2)
    assert set(DEFAULTS) == set(WORKLOADS)


def test_random_lengths_are_those_asked_for() -> None:
    fixed = make("random", Shape(20, 100, 7), 0)
    assert {(len(each.turns[0].prompt), each.turns[0].max_tokens) for each in fixed} == {(100, 7)}
    varied = make("random", Shape(200, 100, 10, spread=0.5, low_id=3, high_id=5), 0)
    lengths = [len(each.turns[0].prompt) for each in varied]
    assert min(lengths) >= 50 and max(lengths) <= 150 and len(set(lengths)) > 30
    assert {token for each in varied for token in each.turns[0].prompt} == {3, 4}


def test_shared_prompts_share_exactly_the_prefix() -> None:
    prompts = [each.turns[0].prompt for each in make("shared", Shape(8, 40, 4, shared_tokens=32), 0)]
    assert len({prompt[:32] for prompt in prompts}) == 1
    assert len({prompt[32:] for prompt in prompts}) == 8
    with pytest.raises(ValueError, match="shared tokens are 40; they must be below 40"):
        make("shared", Shape(8, 40, 4, shared_tokens=40), 0)


def test_conversations_have_as_many_requests_as_asked_for() -> None:
    chats = make("multiturn", Shape(10, 5, 4, shared_tokens=6, turns=4), 0)
    assert [len(chat.turns) for chat in chats] == [4, 4, 2]
    first = chats[0].turns[0].prompt
    assert isinstance(first, str)
    assert len(first.split()) == 5
    assert len(chats[0].system.split()) == 6


def test_a_trace_gives_equal_blocks_equal_tokens(tmp_path: Path) -> None:
    first, second = make("trace", shape("trace", tmp_path), 0)
    one, other = first.turns[0].prompt, second.turns[0].prompt
    assert len(one) == len(other) == 700
    assert one[:512] == other[:512]
    assert one[512:] != other[512:]
    assert (first.at_s, second.at_s) == (0.0, 0.5)
    small = make("trace", shape("trace", tmp_path, scale=0.1), 0)
    assert [len(each.turns[0].prompt) for each in small] == [70, 70]
    assert small[0].turns[0].prompt[:51] == small[1].turns[0].prompt[:51]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "trace.jsonl:2: Expecting"),
        ("[]", "trace.jsonl:2: a line must be a JSON object"),
        ({**LINE, "timestamp": "x"}, "timestamp is 'x'"),
        ({**LINE, "timestamp": -1}, "timestamp is -1"),
        ({**LINE, "timestamp": 5}, "timestamp is 5, before the last line's 10"),
        ({**LINE, "input_length": 0}, "input_length is 0; a number of at least 1"),
        ({**LINE, "output_length": True}, "output_length is True"),
        ({**LINE, "hash_ids": ["a"]}, "hash_ids must be a list of integers"),
        ({**LINE, "hash_ids": [1, 2, 3]}, "hash_ids has 3 blocks of 512; input_length is 700"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(line: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", LINE, line)
    with pytest.raises(ValueError, match=r"trace\.jsonl:2") as raised:
        list(read_trace(path, 10))
    assert words in str(raised.value)
    assert len(list(read_trace(path, 1))) == 1


def test_wrong_shapes_are_refused() -> None:
    for wrong, words in (
        ({"spread": 1.0}, "spread is 1"),
        ({"low_id": 9, "high_id": 9}, "must not be empty"),
        ({"scale": 0.0}, "scale is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            shape_of("random", {"requests": 1, **wrong})
    with pytest.raises(ValueError, match="workload is nothing; it must be one of random"):
        shape_of("nothing", {})
    with pytest.raises(ValueError, match="needs the path of a trace"):
        make("trace", Shape(1, 1, 1), 0)
    with pytest.raises(ValueError, match="turns are 0"):
        make("multiturn", Shape(1, 1, 1, turns=0), 0)


def test_arrivals_are_poisson_a_traces_or_at_once(tmp_path: Path) -> None:
    asked = make("random", Shape(2000, 1, 1), 0)
    times = Load(rate=50.0, seed=3).arrivals(asked)
    assert times == Load(rate=50.0, seed=3).arrivals(asked) != Load(rate=50.0, seed=4).arrivals(asked)
    assert times[0] == 0 and times == sorted(times)
    assert times[-1] / 1999 == pytest.approx(1 / 50, rel=0.1)
    assert set(Load(concurrency=4).arrivals(asked)) == {0.0}
    traced = make("trace", shape("trace", tmp_path), 0)
    assert Load(speed=5.0).arrivals(traced) == [0.0, 0.1]
    with pytest.raises(ValueError, match="speed is for traces"):
        Load(speed=1.0).arrivals(asked)
    with pytest.raises(ValueError, match="concurrency, rate or a trace's speed"):
        Load()


def test_extra_fields_are_json() -> None:
    assert fields(["top_k=5", 'user="a=b"']) == (("top_k", 5), ("user", "a=b"))
    for wrong in ("top_k", "=5", "a=", "a=b"):
        with pytest.raises(ValueError, match="name=JSON is needed"):
            fields([wrong])


def test_made_traces_are_chats_of_tenants(tmp_path: Path) -> None:
    entries = chats(60, 8.0, 3, 4, 3, 64, seed=1)
    assert entries == chats(60, 8.0, 3, 4, 3, 64, seed=1) != chats(60, 8.0, 3, 4, 3, 64, seed=2)
    path = write(tmp_path / "chats.jsonl", *entries)
    read = list(read_trace(path, 100))
    assert len(read) == 60 and {entry.hash_ids[0] for entry in read} == {0}
    assert len({entry.hash_ids[:4] for entry in read}) == 3
    # A later turn says all that was said before.
    continued = [e for e in read if any(e.hash_ids[: len(o.hash_ids)] == o.hash_ids for o in read if o is not e)]
    assert len(continued) > 20
    assert read[-1].timestamp_ms > 3000
