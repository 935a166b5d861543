"""What `tandem up --on ray` asks of Ray, tells its processes, and says when it cannot."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.cli.app import run
from tandem.cli.on_ray.connect import bootstrap_address, check_reachable, connect, explained
from tandem.cli.on_ray.keeper import lost
from tandem.cli.on_ray.launch import check_listable, up_on_ray
from tandem.cli.on_ray.processes import Commands, Unit
from tandem.cli.on_ray.resources import Node, amounts, demands, lacking
from tandem.cli.on_ray.serve import Launcher, application
from tandem.cli.on_ray.targets import targets, write
from tandem.cli.options import build
from tandem.cluster import Role
from tandem.config import UpConfig, own_settings, search_path
from tandem.errors import ConfigError, Unavailable
from tandem.ports import free_ports
from tandem.testing.workers import fake_info

SECRET = "a-secret-of-sixteen-characters"
HEAD = Node("1", "10.0.0.1", {"CPU": 4, "GPU": 0}, True)
GPUS = Node("2", "10.0.0.2", {"CPU": 16, "GPU": 2, "prefill": 2}, False)
CPUS = Node("3", "10.0.0.3", {"CPU": 16, "decode": 8}, False)
NODES = (HEAD, GPUS, CPUS)


def settings(**given: Any) -> UpConfig:
    return build(UpConfig, {"model": "demo", "on": "ray", **given})


def test_resources_are_names_and_amounts() -> None:
    config = settings(ray_prefill_resources=["CPU=4,GPU=1", "fast=0.5"], ray_decode_resources="CPU=2,memory=1000")
    assert amounts(config.ray_prefill_resources) == {"CPU": 4, "GPU": 1, "fast": 0.5}
    assert amounts(config.ray_decode_resources) == {"CPU": 2, "memory": 1000}
    assert amounts(("CPU=0", "GPU=1")) == {"GPU": 1}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"ray_decode_resources": "CPU"}, "--ray-decode-resources: 'CPU' is not NAME=AMOUNT, such as CPU=4 or GPU=1"),
        ({"ray_decode_resources": "GPU=1.5"}, "--ray-decode-resources: GPU=1.5: amounts above 1 must be whole"),
        ({"ray_prefill_resources": "CPU=1,CPU=2"}, "--ray-prefill-resources: CPU is given twice"),
        ({"ray_prefill_resources": "CPU=0"}, "--ray-prefill-resources: nothing is asked for; CPU=1 is the default"),
        ({"on": "local", "ray_address": "a:1"}, "--ray-address is given; it needs --on ray"),
        ({"ray_wait_s": -1}, "--ray-wait-s: "),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**given)
    assert str(caught.value).startswith(line)


def test_workers_go_where_nodes_are_marked_for_their_role() -> None:
    found = demands(settings(ray_prefill_resources="GPU=1"), NODES)
    assert found == {"prefill": {"GPU": 1, "prefill": 1}, "decode": {"CPU": 1, "decode": 1}}
    assert demands(settings(ray_decode_resources="CPU=2,decode=4"), NODES)["decode"] == {"CPU": 2, "decode": 4}
    assert demands(settings(ray_decode_resources="CPU=2,decode=0"), NODES)["decode"] == {"CPU": 2}
    assert demands(settings(), (HEAD,)) == {"prefill": {"CPU": 1}, "decode": {"CPU": 1}}


def test_what_is_lacking_is_named_with_its_setting() -> None:
    demand = {"prefill": {"GPU": 1.0}, "decode": {"CPU": 10.0}}
    free = {"CPU": 36.0, "GPU": 2.0}
    assert lacking({"prefill": 2, "decode": 2}, demand, free, NODES) == ""
    assert lacking({"prefill": 3, "decode": 2}, demand, free, NODES) == (
        "GPU: 3 asked for by --ray-prefill-resources, 2 available of 2"
    )
    assert lacking({"prefill": 1, "decode": 1}, demand, {"CPU": 4.0}, NODES) == (
        "GPU: 1 asked for by --ray-prefill-resources, 0 available of 2; "
        "CPU: 10 asked for by --ray-decode-resources, 4 available of 36"
    )
    both = {"prefill": {"CPU": 20.0}, "decode": {"CPU": 17.0}}
    assert lacking({"prefill": 1, "decode": 1}, both, free, NODES) == (
        "CPU: 37 asked for by --ray-prefill-resources and --ray-decode-resources, 36 available of 36"
    )
    assert lacking({"prefill": 0, "decode": 1}, both, free, NODES) == (
        "no single node has CPU=17, which --ray-decode-resources asks for"
    )


def flags(arguments: list[str]) -> dict[str, str]:
    return dict(itertools.pairwise(arguments))


def test_processes_are_told_where_and_with_what(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("tenants: []\n")
    config = settings(token=SECRET, metrics_token=SECRET, api_keys=keys, host="0.0.0.0")
    commands = Commands(config, {"prefill": {"GPU": 2.0, "CPU": 4.0}, "decode": {"CPU": 0.5}})
    router = Unit("router", "router", 0, host="10.0.0.1", port=5, http_port=8000)
    arguments, environment = commands.router(router)
    told = flags(arguments)
    assert (told["--host"], told["--port"], told["--control-host"], told["--control-port"]) == (
        "0.0.0.0", "8000", "10.0.0.1", "5",
    )  # fmt: skip
    assert (told["--api-keys"], environment["TANDEM_TOKEN"], environment["TANDEM_METRICS_TOKEN"]) == (
        str(keys), SECRET, SECRET,
    )  # fmt: skip
    worker, environment = commands.worker(Unit("prefill-0", "prefill", 0, host="10.0.0.2", port=7), [router.address])
    told = flags(worker)
    assert worker[:2] == ["prefill", "demo"]
    assert (told["--host"], told["--port"], told["--router"]) == ("10.0.0.2", "7", "10.0.0.1:5")
    assert (told["--threads"], told["--device"], environment["OMP_NUM_THREADS"]) == ("4", "cuda", "4")
    assert "--kv-mib" not in told  # a worker on a GPU takes what is left there
    worker, _ = commands.worker(Unit("decode-0", "decode", 0, host="10.0.0.3", port=7), ["a:1", "b:2"])
    assert (flags(worker)["--threads"], worker.count("--router")) == ("1", 2)
    assert "--device" not in worker
    assert SECRET not in " ".join(arguments + worker)


def test_without_a_secret_for_readers_workers_show_metrics_to_nobody() -> None:
    commands = Commands(settings(token=SECRET), {"prefill": {"CPU": 1.0}, "decode": {"CPU": 1.0}})
    _, router = commands.router(Unit("router", "router", 0, host="10.0.0.1", port=5, http_port=8000))
    workers = [commands.worker(Unit(role, role, 0, host="10.0.0.3", port=7), [])[1] for role in ("prefill", "decode")]
    assert "TANDEM_METRICS_TOKEN" not in router  # its page is read as ever
    assert len({worker["TANDEM_METRICS_TOKEN"] for worker in workers}) == 1
    assert SECRET not in workers[0]["TANDEM_METRICS_TOKEN"] and len(workers[0]["TANDEM_METRICS_TOKEN"]) >= 32


def test_settings_from_the_environment_travel_and_secrets_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in own_settings():
        monkeypatch.delenv(name)
    for name in ("TANDEM_TOKEN", "TANDEM_METRICS_TOKEN", "TANDEM_API_KEY", "TANDEM_TLS_KEY", "TANDEM_RAY_ADDRESS"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("TANDEM_SLAB_MIB", "64")
    assert own_settings() == {"TANDEM_SLAB_MIB": "64"}


def test_children_import_what_their_actor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    assert search_path(Path("/srv/tandem")) == {"PYTHONPATH": "/srv/tandem:/theirs"}
    assert search_path(Path("/lib/site-packages")) == {}


def test_without_ray_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(["up", "demo", "--on", "ray"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tandem: --on is ray; ray cannot be imported (") and said.count("\n") == 1
    assert said.endswith("pip install 'tandem-serve[ray]'\n")


def test_an_address_where_nothing_listens_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert run(["up", "demo", "--on", "ray", "--ray-address", f"127.0.0.2:{port}"]) == 1
    said = capsys.readouterr().err
    assert (
        said == f"tandem: --ray-address: no Ray cluster answers at 127.0.0.2:{port}: [Errno 111] Connection refused\n"
    )
    with pytest.raises(Unavailable, match="--ray-address"):
        check_reachable("no port")


def test_addresses_of_ray_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--ray-address: .*ray://head:10001; .*ray job submit"):
        bootstrap_address("ray://head:10001")


def test_another_version_of_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = importlib.import_module("ray")

    def refuse(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.11.7\n")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("tandem.cli.on_ray.connect.check_reachable", lambda _: None)
    with pytest.raises(ConfigError) as caught:
        connect("10.0.0.9:6379")
    assert str(caught.value) == (
        "--ray-address: the cluster at 10.0.0.9:6379 runs another version: "
        "Version mismatch: The cluster was started with: Ray: 2.9.0 Python: 3.11.7"
    )
    assert "could not be started here: no" in str(explained(OSError("no"), None))


def test_how_an_actor_was_lost_is_said_in_a_line() -> None:
    assert lost(RuntimeError("The actor died.\n\tThe actor is dead because its node has died. Node Id: 1")) == (
        "was lost with its node"
    )
    unavailable = type("ActorUnavailableError", (RuntimeError,), {})
    assert lost(unavailable("The actor 1 is unavailable: RPC error")) == "was lost: its actor cannot be reached"
    assert lost(RuntimeError("The actor died\nModuleNotFoundError: No module named 'tandem'\n")) == (
        "was lost with its actor: ModuleNotFoundError: No module named 'tandem'"
    )


def test_every_metrics_page_that_stands_is_listed(tmp_path: Path) -> None:
    info = fake_info(Role.DECODE, address="10.0.0.2:6", metrics_port=9)
    units = [
        Unit("router", "router", 0, host="10.0.0.1", port=5, http_port=8000, pid=1),
        Unit("decode-0", "decode", 0, host="10.0.0.2", port=6, pid=2, info=info),
        Unit("decode-1", "decode", 1, host="10.0.0.3", port=6, pid=3, info=info, lost_at=1.0),
        Unit("decode-2", "decode", 2),
    ]
    file = tmp_path / "targets.json"
    write(file, targets(units, "0.0.0.0", "chat"))
    router, decode = json.loads(file.read_text())
    # What deploy/prometheus/rules and the dashboards select by.
    labels = {"component": "router", "model": "chat", "node": "10.0.0.1"}
    assert router == {"targets": ["10.0.0.1:8000"], "labels": labels}
    labels = {"component": "decode", "model": "chat", "instance": "10.0.0.2:6", "node": "10.0.0.2"}
    assert decode == {"targets": ["10.0.0.2:9"], "labels": labels}
    assert targets(units[:1], "127.0.0.1", "chat")[0]["targets"] == ["127.0.0.1:8000"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_list_that_could_not_be_written_is_told_before_anything_starts(tmp_path: Path) -> None:
    for file, why in (
        (tmp_path / "none" / "targets.json", f"there is no folder {tmp_path}/none"),
        (tmp_path, f"{tmp_path} is a folder; give a file in it"),
    ):
        with pytest.raises(ConfigError, match=f"^--ray-targets: {why}$"):
            check_listable(file)
    check_listable(tmp_path / "targets.json")
    assert list(tmp_path.iterdir()) == []


def test_a_list_is_looked_at_once_ray_has_made_its_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed: list[bool] = []
    connection = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr("tandem.cli.on_ray.launch.connect", lambda _: connection)
    with pytest.raises(ConfigError, match=r"^--ray-targets: there is no folder"):
        up_on_ray(settings(ray_targets=tmp_path / "none" / "targets.json"))
    assert closed == [True]


def test_serve_hears_of_a_launcher_that_ended(tmp_path: Path) -> None:
    replica = Launcher(f"{tmp_path}/none --ray-wait-s -1", "127.0.0.2:1")
    os.waitid(os.P_PID, replica.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(RuntimeError, match=r"^tandem up ended with status 2; its log is this replica's$"):
        replica.check_health()


def test_what_serve_is_given_must_be_a_command() -> None:
    for given in ({}, {"commands": "demo"}, {"command": "demo", "more": "1"}):
        with pytest.raises(ConfigError, match=r"^args are .*; they must be `command`"):
            application(given)
