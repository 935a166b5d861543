"""The container files and the compose file by their structure: nothing here builds an image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from router.admission.tenants import read_keys
from tandem.cli.app import make_app
from tandem.cli.options import build
from tandem.config import DecodeConfig, PrefillConfig, ProcessConfig, RouterConfig
from tests.helm.chart import ROOT

IMAGES = ROOT / "deploy" / "images"
FILES = tuple(sorted(IMAGES.glob("*.Dockerfile")))
COMPOSE = ROOT / "deploy" / "compose.yaml"
PROCESSES: dict[str, type[ProcessConfig]] = {"router": RouterConfig, "prefill": PrefillConfig, "decode": DecodeConfig}
SECRETS = {"TANDEM_TOKEN": "t" * 20, "TANDEM_METRICS_TOKEN": "m" * 20, "TANDEM_API_KEY": "sk-a-key-of-mine"}
EXTRAS = {"router": {"k8s", "otel"}, "cpu": {"engine", "nixl", "otel"}, "cuda": {"engine", "nixl", "cuda", "otel"}}


def instructions(text: str) -> list[tuple[str, str]]:
    """Instruction and arguments of each line, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def faults(text: str, allowed: set[str]) -> list[str]:
    """What is wrong with a container file. allowed: top-level names that the build context has."""
    found, stages, user = [], 0, ""
    arguments: dict[str, str] = {}
    for word, rest in instructions(text):
        if word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        if word == "FROM":
            stages, user = stages + 1, ""
            image = re.sub(
                r"\$\{(\w+)\}", lambda match: arguments.get(match[1], ""), rest.split()[0].split("${PYTHON_D")[0]
            )
            if not re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image):
                found.append(f"{image} is not pinned")
        if word == "COPY" and not rest.startswith("--from="):
            sources = rest.split()[:-1]
            found += [f"{source} is not in the context" for source in sources if source.split("/")[0] not in allowed]
            found += [f"{source} does not exist" for source in sources if not (ROOT / source).exists()]
        if word == "USER":
            user = rest
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
        found.append(f"its user is {user or 'root'}")
    if stages < 2:
        found.append("it has one stage")
    return found


def context() -> set[str]:
    """Top-level names that .dockerignore lets through."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "what is not named must stay out"
    return {line[1:].strip("/") for line in lines if line.startswith("!")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_image_is_as_it_must_be(file: Path) -> None:
    text = file.read_text()
    assert faults(text, context()) == []
    listed = re.search(r"for e in \(([^)]*)\)", text)
    assert listed is not None and set(re.findall(r"'(\w+)'", listed[1])) == EXTRAS[file.stem]
    assert dict(instructions(text))["ENTRYPOINT"] == '["tandem"]'


def test_all_images_are_there_and_hold_every_package() -> None:
    assert {file.stem for file in FILES} == set(EXTRAS)
    for file in FILES:
        copied = {rest.split()[0] for word, rest in instructions(file.read_text()) if word == "COPY"}
        assert copied >= {"tandem", "router", "prefill_worker", "decode_worker", "kvtransfer", "pyproject.toml"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("USER 10001:10001", "USER root", "its user is root"),
        ("USER 10001:10001", "", "its user is root"),
        (":3.11.14-slim-bookworm", ":latest", "is not pinned"),
        ("COPY kvtransfer kvtransfer", "COPY tests tests", "tests is not in the context"),
        ("COPY kvtransfer kvtransfer", "COPY kvtransfer/gone x", "kvtransfer/gone does not exist"),
    ],
)
def test_a_wrong_image_is_caught(old: str, new: str, said: str) -> None:
    text = FILES[0].read_text()
    assert old in text and any(said in fault for fault in faults(text.replace(old, new), context()))


def compose() -> dict[str, Any]:
    """The compose file with its variables filled in."""
    text = re.sub(r"\$\{(\w+)(?::\?[^}]*)?\}", lambda match: SECRETS[match[1]], COMPOSE.read_text())
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_every_process_of_the_compose_file_would_start(tmp_path: Path) -> None:
    described = compose()
    keys = tmp_path / "keys.yaml"
    keys.write_text(described["configs"]["keys"]["content"])
    assert read_keys(keys).tenant(f"Bearer {SECRETS['TANDEM_API_KEY']}", None).operator
    started: dict[str, Any] = {}
    for name in PROCESSES:
        service = described["services"][name]
        command, *flags = [each.replace("/etc/tandem/keys.yaml", str(keys)) for each in service["command"]]
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in service["environment"].items():
                patch.setenv(variable, value)
            parser = typer.main.get_command(make_app())
            context = parser.commands[command].make_context(command, flags)  # type: ignore[attr-defined]
            given = {key: value for key, value in context.params.items() if value not in (None, (), [])}
            started[name] = build(PROCESSES[command], given)
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert int(service["stop_grace_period"][:-1]) > started[name].drain_s
    assert started["prefill"].router == started["decode"].router == (f"router:{started['router'].control_port}",)
    assert {started[name].host for name in ("prefill", "decode")} == {"prefill", "decode"}


def test_the_compose_file_names_files_and_images_that_are_there() -> None:
    described = compose()
    for name, service in described["services"].items():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        else:
            assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert {each["source"] for each in service.get("configs", ())} <= set(described["configs"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
