from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.client import Sample
from benchmarks.load import Measured
from benchmarks.report import Latency, Objective, as_json, percentile, plot, show, summarize, tpot, ttft, write_json


def sample(first: float, gap: float, tokens: int, error: str = "", chunks: int | None = None) -> Sample:
    """First chunk after `first` seconds, then one every `gap`."""
    count = tokens if chunks is None else chunks
    arrived = [10 + first + gap * at for at in range(count)]
    ended = arrived[-1] if arrived else 11.0
    return Sample(10.0, tokens, ended, arrived, 100, tokens, 25, error=error)


def test_percentiles_are_interpolated() -> None:
    assert [percentile([1.0, 2.0, 3.0], share) for share in (0, 0.25, 0.5, 1)] == [1, 1.5, 2, 3]
    assert percentile([7.0], 0.99) == 7
    assert Latency.of([]) == Latency()
    two = Latency.of([0.003, 0.001])
    assert (two.mean, two.p50, two.max) == (2, 2, 3)
    assert (two.p90, two.p99) == pytest.approx((2.8, 2.98))


def test_times_are_by_request() -> None:
    one = sample(0.5, 0.02, 11)
    assert ttft(one) == pytest.approx(0.5)
    assert tpot(one) == pytest.approx(0.02)
    grouped = sample(0.5, 0.1, 11, chunks=3)
    assert tpot(grouped) == pytest.approx(0.02)
    assert ttft(sample(0.5, 0.02, 1, chunks=0)) == 1.0
    assert tpot(sample(0.5, 0.02, 1)) is None


def test_the_first_chunks_tokens_are_not_in_the_time_after_it() -> None:
    """Ten tokens, 10 ms each, of which the first five come at once."""
    five = dataclasses.replace(sample(0.5, 0.01, 10, chunks=6), first_tokens=5)
    assert tpot(five) == pytest.approx(0.01)
    assert tpot(dataclasses.replace(five, first_tokens=0)) == pytest.approx(0.05 / 9)
    assert tpot(dataclasses.replace(five, first_tokens=10)) is None


def test_an_answer_in_one_chunk_is_in_no_percentile_and_held_to_its_whole_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = sample(2.0, 0.0, 10, chunks=1)
    samples = (whole, sample(0.1, 0.03, 10), sample(0.1, 0.03, 1))
    for limit_ms, kept in ((20, 1), (31, 2), (210, 3)):
        assert summarize(Measured(samples, 1.0, 0.0), Objective(tpot_ms=limit_ms)).goodput_per_s == kept
    held_back = sample(2.0, 0.0, 10, chunks=0)  # all of its text was empty, and a second passed
    for limit_ms, kept in ((99, 0), (101, 1)):
        assert summarize(Measured((held_back,), 1.0, 0.0), Objective(tpot_ms=limit_ms)).goodput_per_s == kept
    report = summarize(Measured(samples, 1.0, 0.0))
    assert report.tpot.p50 == report.tpot.max == pytest.approx(30)
    assert (report.tpot_none, report.tpot_assumed) == (1, 1)
    show(report, "title")
    told = capsys.readouterr().out.splitlines()
    assert any("answers without TPOT" in line and "1 of 3" in line for line in told)
    assert any("TPOT if first chunk has 1" in line and "1 of 3" in line for line in told)


def test_a_server_may_say_what_the_first_chunk_had() -> None:
    def chunk(text: str | None, tokens: int | None) -> dict[str, Any]:
        delta = {"role": "assistant"} if text is None else {"content": text}
        usage = None if tokens is None else {"prompt_tokens": 7, "completion_tokens": tokens}
        return {"choices": [{"index": 0, "delta": delta}], "usage": usage}

    told, silent = Sample(0.0, 9), Sample(0.0, 9)
    for at, (text, tokens) in enumerate(((None, 0), ("abc", 3), ("de", 5), ("f", 9))):
        told.take(chunk(text, tokens), float(at))
        silent.take(chunk(text, None), float(at))
    silent.take({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}}, 4.0)
    assert (told.first_tokens, silent.first_tokens) == (3, 0)
    assert (tpot(told), tpot(silent)) == (2 / 6, 2 / 8)


def test_a_load_in_numbers() -> None:
    samples = (sample(0.1, 0.01, 11), sample(0.3, 0.03, 11), sample(0.2, 0.01, 11, error="http 500"))
    report = summarize(Measured(samples, 2.0, 0.1), Objective(ttft_ms=200))
    assert report.requests == 3
    assert report.errors == {"http 500": 1}
    assert report.requests_per_s == 1
    assert report.output_tokens_per_s == 11
    assert report.total_tokens_per_s == 111
    assert report.cached_share == 0.25
    assert report.client_cpu_share == 0.05
    assert report.ttft.p50 == pytest.approx(200)
    assert report.itl.p50 == pytest.approx(20)
    assert report.goodput_per_s == 0.5
    assert report.goodput_share == pytest.approx(1 / 3)


def test_goodput_asks_for_every_objective() -> None:
    samples = (sample(0.1, 0.01, 5), sample(0.1, 0.05, 5), sample(0.9, 0.01, 5))
    for objective, kept in (
        (Objective(), None),
        (Objective(ttft_ms=500), 2.0),
        (Objective(tpot_ms=20), 2.0),
        (Objective(ttft_ms=500, tpot_ms=20), 1.0),
    ):
        assert summarize(Measured(samples, 1.0, 0.0), objective).goodput_per_s == kept


def test_nothing_measured_is_no_number(tmp_path: Path) -> None:
    report = summarize(Measured((), 0.0, 0.0), Objective(ttft_ms=1))
    assert report.output_tokens_per_s == 0
    assert report.goodput_share == 0
    write_json(tmp_path / "a.json", as_json(report))
    assert json.loads((tmp_path / "a.json").read_text())["ttft"]["p50"] == 0


def test_a_picture_is_drawn_or_says_what_it_needs(tmp_path: Path) -> None:
    measured = Measured((sample(0.1, 0.01, 5), sample(0.2, 0.01, 5)), 1.0, 0.0)
    if importlib.util.find_spec("matplotlib"):
        plot(tmp_path / "a.png", measured, "title")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    else:
        with pytest.raises(ModuleNotFoundError, match=r"tandem-serve\[bench\]"):
            plot(tmp_path / "a.png", measured, "title")


def test_ratios_are_medians_of_rounds() -> None:
    zeros = dict.fromkeys(compare.FIGURES, 0.0)
    ours = [{**zeros, "output_tokens_per_s": value} for value in (10.0, 30.0, 90.0)]
    theirs = [{**zeros, "output_tokens_per_s": value} for value in (10.0, 10.0, 90.0)]
    assert compare.ratios(ours, theirs) == {"output_tokens_per_s": 1.0}
    assert compare.medians(ours)["output_tokens_per_s"] == 30
