"""Where settings come from, in which order, and what a wrong one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tandem.config import (
    DecodeConfig,
    PrefillConfig,
    RouterConfig,
    UpConfig,
    child_environment,
    dump,
    set_before_import,
)
from tandem.errors import ConfigError

SCHEMAS = (RouterConfig, PrefillConfig, DecodeConfig, UpConfig)


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in child_environment({}):
        if name.startswith("TANDEM_"):
            monkeypatch.delenv(name)


def written(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text)
    return file


def test_a_flag_beats_the_environment_beats_yaml_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, "port: 2\nhost: 127.0.0.2\nretries: 2\n")
    assert RouterConfig().port == 8000
    assert RouterConfig(config=file).port == 2
    monkeypatch.setenv("TANDEM_PORT", "3")
    monkeypatch.setenv("TANDEM_HOST", "127.0.0.3")
    assert RouterConfig().port == 3
    assert RouterConfig(config=file).port == 3
    settings = RouterConfig(config=file, port=4)
    assert (settings.port, settings.host, settings.retries, settings.policy) == (4, "127.0.0.3", 2, "cost")


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CONFIG", str(written(tmp_path, "policy: round_robin\n")))
    assert RouterConfig().policy == "round_robin"
    other = tmp_path / "other.yaml"
    other.write_text("policy: least_loaded\n")
    assert RouterConfig(config=other).policy == "least_loaded"


def test_lists_come_from_yaml_and_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "workers: ['a:1', 'b:2']\n")
    assert RouterConfig(config=file).workers == ("a:1", "b:2")
    monkeypatch.setenv("TANDEM_WORKERS", "c:3")
    assert RouterConfig(config=file).workers == ("c:3",)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, "")
    assert RouterConfig(config=file) == RouterConfig().model_copy(update={"config": file})


def test_a_missing_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--config is .*/none.yaml; there is no such file$"):
        RouterConfig(config=tmp_path / "none.yaml")
    monkeypatch.setenv("TANDEM_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="no such file"):
        RouterConfig()


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", "just words\n", "!!python/object/apply:os.getcwd []\n"])
def test_a_file_that_is_no_mapping_is_one_clear_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--config is .*; it must be a YAML mapping of settings: [^\n]*$"):
        RouterConfig(config=written(tmp_path, text))


def test_a_misspelt_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="prot"):
        RouterConfig(config=written(tmp_path, "prot: 1\n"))
    with pytest.raises(ValidationError, match="prot"):
        RouterConfig(prot=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("schema", "name", "value"),
    [
        (RouterConfig, "port", 65536),
        (RouterConfig, "port", -1),
        (RouterConfig, "port", "http"),
        (RouterConfig, "policy", "fastest"),
        (RouterConfig, "max_inflight", 0),
        (RouterConfig, "retries", 11),
        (RouterConfig, "lease_s", 0),
        (RouterConfig, "log_level", "loud"),
        (PrefillConfig, "page_size", 48),
        (PrefillConfig, "kv_mib", 0),
        (PrefillConfig, "dtype", "float8"),
        (PrefillConfig, "transport", "pigeon"),
        (DecodeConfig, "span_tokens", 0),
        (DecodeConfig, "slab_mib", -1),
        (DecodeConfig, "threads", -1),
        (UpConfig, "prefill", -1),
        (UpConfig, "prefill", 65),
        (UpConfig, "decode", 0),
    ],
)
def test_a_value_out_of_range_names_its_setting(schema: type[RouterConfig], name: str, value: Any) -> None:
    given = {"model": "m", name: value}
    with pytest.raises(ValidationError) as caught:
        schema(**given)
    assert [error["loc"] for error in caught.value.errors()] == [(name,)]


def test_the_environment_is_checked_like_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_PAGE_SIZE", "48")
    with pytest.raises(ValidationError, match="page_size"):
        PrefillConfig(model="m")


@pytest.mark.parametrize("schema", [PrefillConfig, DecodeConfig, UpConfig])
def test_a_worker_needs_a_model(schema: type[UpConfig]) -> None:
    with pytest.raises(ValidationError, match="model"):
        schema()
    assert schema(model="m").model == "m"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_up_listens_on_loopback(host: str) -> None:
    assert UpConfig(model="demo", host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", ""])
def test_up_refuses_other_addresses(host: str) -> None:
    with pytest.raises(ValidationError, match="--api-keys"):
        UpConfig(model="demo", host=host)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_settings_are_frozen_and_every_one_is_described(schema: type[UpConfig]) -> None:
    settings = schema(model="m")
    with pytest.raises(ValidationError, match="frozen"):
        settings.model = "other"  # type: ignore[misc]
    assert [name for name, field in schema.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_dump_is_json_and_can_be_read_back(schema: type[UpConfig], tmp_path: Path) -> None:
    settings = schema(model="m")
    plain = json.loads(json.dumps(dump(settings)))
    assert schema(config=written(tmp_path, json.dumps(plain))).model_copy(update={"config": None}) == settings


def test_a_child_gets_this_environment_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_A", "1")
    monkeypatch.setenv("TANDEM_B", "1")
    child = child_environment({"TANDEM_B": "2"})
    assert (child["TANDEM_A"], child["TANDEM_B"], child_environment({})["TANDEM_B"]) == ("1", "2", "1")


def test_variables_of_libraries_do_not_override_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_A", "user")
    monkeypatch.delenv("TANDEM_B", raising=False)
    monkeypatch.setattr("tandem.config.environment.os.environ", child_environment({}))
    set_before_import({"TANDEM_A": "default", "TANDEM_B": "default"})
    assert (child_environment({})["TANDEM_A"], child_environment({})["TANDEM_B"]) == ("user", "default")


def test_addresses_in_the_environment_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_WORKERS", "127.0.0.1:9001, 127.0.0.1:9002")
    assert RouterConfig().workers == ("127.0.0.1:9001", "127.0.0.1:9002")
    assert RouterConfig(workers=("127.0.0.1:9003",)).workers == ("127.0.0.1:9003",)


def test_the_cap_over_all_slabs_has_room_for_one() -> None:
    with pytest.raises(ValidationError, match="slab_mib is 32; slabs_max_mib leaves room for 8"):
        DecodeConfig(model="m", slabs_max_mib=8.0)
