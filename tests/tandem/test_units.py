"""Numbers with units: what is taken, what it means, and that flags, environment, YAML and the JSON schema agree."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tandem.cli.options import build
from tandem.config import DecodeConfig, RouterConfig, UpConfig
from tandem.errors import ConfigError
from tandem.units import (
    COUNT,
    IN_MILLISECONDS,
    IN_SECONDS,
    MEBIBYTES,
    MEBIBYTES_A_SECOND,
    Quantity,
    quantity_of,
)

ALL = (COUNT, MEBIBYTES, MEBIBYTES_A_SECOND, IN_SECONDS, IN_MILLISECONDS)


@pytest.mark.parametrize(
    ("quantity", "text", "number"),
    [
        (COUNT, "512", 512),
        (COUNT, "32K", 32_768),
        (COUNT, "32k", 32_000),
        (COUNT, "25.6k", 25_600),
        (COUNT, "1.5M", 1_572_864),
        (COUNT, "4_000_000", 4_000_000),
        (COUNT, "1E3", 1000),
        (MEBIBYTES, "5.", 5),
        (MEBIBYTES, "1_024.5GiB", 1_049_088),
        (IN_SECONDS, ".5", 0.5),
        (IN_SECONDS, "1h.5m", 3630),
        (MEBIBYTES, "256", 256),
        (MEBIBYTES, "80GiB", 81_920),
        (MEBIBYTES, "80Gi", 81_920),
        (MEBIBYTES, "512mib", 512),
        (MEBIBYTES, "1.5GiB", 1536),
        (MEBIBYTES, "1048576KiB", 1024),
        (MEBIBYTES, "1GB", 1000**3 / 2**20),
        (MEBIBYTES_A_SECOND, "1GiB/s", 1024),
        (IN_SECONDS, "30", 30),
        (IN_SECONDS, "30s", 30),
        (IN_SECONDS, "5m", 300),
        (IN_SECONDS, "250ms", 0.25),
        (IN_SECONDS, "1h30m", 5400),
        (IN_MILLISECONDS, "50", 50),
        (IN_MILLISECONDS, "50ms", 50),
        (IN_MILLISECONDS, "0.05s", 50),
    ],
)
def test_what_units_mean(quantity: Quantity, text: str, number: float) -> None:
    assert quantity.parse(text) == number
    assert quantity.parse(f" {text} ") == number


@pytest.mark.parametrize(
    ("schema", "given_", "says"),
    [
        (DecodeConfig, {"max_batch_tokens": "32Q"}, "--max-batch-tokens: .*such as 32768, 32K or 1.5M.*'32Q'"),
        (DecodeConfig, {"max_batch_tokens": "0.1K"}, "--max-batch-tokens: .*valid integer"),
        (DecodeConfig, {"max_batch_tokens": "0K"}, "--max-batch-tokens: .*greater than or equal to 1"),
        (DecodeConfig, {"kv_mib": "80G"}, "--kv-mib: .*80GiB.*'80G'"),
        (DecodeConfig, {"kv_mib": "-1GiB"}, "--kv-mib: memory is expected"),
        (DecodeConfig, {"kv_mib": float("inf")}, "--kv-mib: memory is expected"),
        (DecodeConfig, {"lease_s": "5 minutes"}, "--lease-s: .*250ms, 30s, 5m.*plain numbers are seconds"),
        (DecodeConfig, {"lease_s": ""}, "--lease-s: a duration is expected"),
        (DecodeConfig, {"inter_token_ms": "soon"}, "--inter-token-ms: .*plain numbers are milliseconds"),
        (DecodeConfig, {"lease_s": True}, "--lease-s: a duration is expected"),
        (RouterConfig, {"replicas_mib_s": "fast"}, "--replicas-mib-s: a rate is expected, such as 256MiB"),
    ],
)
def test_a_wrong_unit_names_the_setting_and_an_example(schema: Any, given_: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        build(schema, {"model": "m"} | given_)


@pytest.mark.parametrize("text", [".", "_1", "1_", "1__0", "1._5", "1_.5", ".e3", "1e1_0", "4_000_000_000_000_000_000"])
def test_texts_that_look_like_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="a number is expected"):
        COUNT.parse(text)


def test_flag_environment_and_file_take_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = {"kv_mib": "1.5GiB", "max_batch_tokens": "2K", "drain_s": "1m", "inter_token_ms": "0.1s"}
    by_flag = build(UpConfig, {"model": "m"} | given_)
    assert (by_flag.kv_mib, by_flag.max_batch_tokens, by_flag.drain_s, by_flag.inter_token_ms) == (1536, 2048, 60, 100)
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(given_))
    assert build(UpConfig, {"model": "m", "config": file}).model_copy(update={"config": None}) == by_flag
    for name, text in given_.items():
        monkeypatch.setenv(f"TANDEM_{name.upper()}", text)
    assert build(UpConfig, {"model": "m"}) == by_flag


@pytest.mark.parametrize("schema", [RouterConfig, DecodeConfig, UpConfig])
def test_every_memory_and_every_time_takes_units(schema: Any) -> None:
    for name, field in schema.model_fields.items():
        quantity = quantity_of(field.annotation, field.metadata)
        wanted = {"_mib": MEBIBYTES, "mib_s": MEBIBYTES_A_SECOND, "_ms": IN_MILLISECONDS, "_s": IN_SECONDS}
        end = next((end for end in wanted if name.endswith(end)), None)
        assert end is None or quantity is wanted[end], name


UNITS = (
    "",
    "k",
    "K",
    "Mi",
    "MiB",
    "GB",
    "gib",
    "/s",
    "GiB/s",
    "ms",
    "s",
    "m",
    "h",
    "us",
    "e3",
    "E1",
    ".5",
    ".",
    "_",
    "5.",
    "1_0",
    " ",
    "-",
)
NEARLY = st.lists(st.sampled_from([*UNITS, "0", "7", "12", "1.5", "nan", "inf"]), max_size=5).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ALL), NEARLY | st.text(max_size=12))
def test_the_parser_and_the_schema_take_the_same_texts(quantity: Quantity, text: str) -> None:
    allowed = re.search(f"^(?:{quantity.pattern})$", text.strip()) is not None
    if not allowed:
        with pytest.raises(ValueError, match=f"^{re.escape(quantity.what)}$"):
            quantity.parse(text)
    else:
        number = quantity.parse(text)
        assert isinstance(number, int | float)
        assert number >= 0


@settings(max_examples=100, deadline=None)
@given(st.floats(min_value=1e-30, max_value=1e15), st.sampled_from((MEBIBYTES, IN_SECONDS, IN_MILLISECONDS)))
def test_a_plain_number_comes_back_as_it_was_written(number: float, quantity: Quantity) -> None:
    assert quantity.parse(str(number)) == number


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["us", "ms", "s", "m", "h", "d"])), min_size=1, max_size=4)
)
def test_durations_add_up(parts: list[tuple[int, str]]) -> None:
    micros = {"us": 1, "ms": 1000, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86_400 * 10**6}
    text = "".join(f"{number}{unit}" for number, unit in parts)
    total = Fraction(sum(number * micros[unit] for number, unit in parts), 10**6)
    assert IN_SECONDS.parse(text) == float(total)
    assert IN_MILLISECONDS.parse(text) == float(total * 1000)


def test_the_json_schema_takes_numbers_within_bounds_and_texts_with_units() -> None:
    check = Draft202012Validator(DecodeConfig.model_json_schema())

    def wrong(**given_: object) -> bool:
        return not check.is_valid({"model": "m"} | given_)

    assert not wrong(kv_mib=256, max_batch_tokens=512, lease_s=2.5)
    assert not wrong(kv_mib="80GiB", max_batch_tokens="32K", lease_s="1h30m")
    assert wrong(kv_mib=0)
    assert wrong(max_batch_tokens=0)
    assert wrong(kv_mib="80G")
    assert wrong(lease_s="30s, or so")
    assert wrong(lease_s="30 s")
