"""The container files and the compose file by their structure: nothing here builds an image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from os import defpath
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import typer
import yaml

from router.admission.tenants import read_keys
from tandem.cli.app import make_app
from tandem.cli.options import build
from tandem.config import DecodeConfig, PrefillConfig, ProcessConfig, RouterConfig
from tests.deploy.monitoring import ROOT

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
    left_out = re.search(r"if not r.startswith\('(\w+)'\)", text)
    # FlashInfer compiles its kernels with nvcc when they are first used, and no image has that.
    assert (left_out is not None and left_out[1] == "flashinfer") == ("cuda" in EXTRAS[file.stem])
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


def commands() -> list[str]:
    """What the compose file's head says to type."""
    lines = [line[4:] for line in COMPOSE.read_text().splitlines() if line.startswith("#   ")]
    return [line for line in lines if not line.startswith(("docker", "curl", "export"))]


def compose() -> dict[str, Any]:
    """The compose file with its variables filled in."""
    text = re.sub(r"\$\{(\w+)(?::\?[^}]*)?\}", lambda match: SECRETS[match[1]], COMPOSE.read_text())
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def mounts(described: dict[str, Any], service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Files of this machine and where a service's container has them, named volumes left out."""
    for volume in service.get("volumes", ()):
        source, target, *_ = volume.split(":")
        if source not in described["volumes"]:
            yield source, target
    for each in service.get("configs", ()):
        source = described["configs"][each["source"]].get("file")
        if source is not None:
            yield source, each["target"]


def unmountable(described: dict[str, Any], made: set[str]) -> list[str]:
    """Why containers would not be made. made: files that the head's commands make.

    Compose mounts `file`s and copies `content` into the container once it is made, which a read-only root refuses, and
    a read-only volume too (docker/compose issue 12031).
    """
    found = []
    for name, service in described["services"].items():
        closed = [each.split(":")[1] for each in service.get("volumes", ()) if each.endswith(":ro")]
        closed += ["/"] if service.get("read_only") else []
        for each in service.get("configs", ()):
            copied = "file" not in described["configs"][each["source"]]
            if copied and any(Path(each["target"]).is_relative_to(folder) for folder in closed):
                found.append(f"{name} gets {each['target']}, which cannot be written")
        for source, _ in mounts(described, service):
            if source not in made and not (COMPOSE.parent / source).exists():
                found.append(f"{name} mounts {source}, which is not there")
    return found


def test_every_container_of_the_compose_file_can_be_made() -> None:
    assert unmountable(compose(), {"./keys.yaml"}) == []


def test_a_container_that_cannot_be_made_is_caught() -> None:
    copied, below, gone = compose(), compose(), compose()
    copied["configs"]["keys"] = {"content": "tenants: []"}
    below["services"]["prometheus"]["volumes"].append("./prometheus:/etc/prometheus:ro")
    gone["services"]["grafana"]["volumes"].append("./grafana/gone:/gone:ro")
    assert unmountable(copied, set()) == ["router gets /etc/tandem/keys.yaml, which cannot be written"]
    assert unmountable(below, {"./keys.yaml"}) == [
        "prometheus gets /etc/prometheus/targets/routers.yaml, which cannot be written"
    ]
    assert unmountable(gone, {"./keys.yaml"}) == ["grafana mounts ./grafana/gone, which is not there"]


def test_prometheus_has_the_files_that_its_configuration_names() -> None:
    described = compose()
    service = described["services"]["prometheus"]
    places = {target for _, target in mounts(described, service)} | {each["target"] for each in service["configs"]}
    configuration = next(flag.partition("=")[2] for flag in service["command"] if flag.startswith("--config.file="))
    (source,) = (source for source, target in mounts(described, service) if target == configuration)
    read = yaml.safe_load((COMPOSE.parent / source).read_text())
    wanted = [f"/etc/prometheus/{name}" for name in read["rule_files"]]
    for job in read["scrape_configs"]:
        wanted.append(job["authorization"]["credentials_file"])
        wanted += [f"/etc/prometheus/{name}" for each in job.get("file_sd_configs", ()) for name in each["files"]]
    assert len(wanted) >= 5
    assert [each for each in wanted if not any(Path(each).is_relative_to(place) for place in places)] == []


def test_every_process_of_the_compose_file_would_start(tmp_path: Path) -> None:
    described = compose()
    (tmp_path / "deploy").mkdir()
    run(["bash", "-ec", "\n".join(commands())], cwd=tmp_path, env={**SECRETS, "PATH": defpath}, check=True)
    keys = tmp_path / "deploy" / described["configs"]["keys"]["file"]
    assert read_keys(keys).tenant(f"Bearer {SECRETS['TANDEM_API_KEY']}", None).operator
    assert SECRETS["TANDEM_API_KEY"] not in keys.read_text()
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
