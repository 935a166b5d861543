"""The one module that reads and writes the environment."""

from __future__ import annotations

import os
from pathlib import Path

from tandem.ports import is_loopback


def config_file() -> str:
    """The YAML file that `TANDEM_CONFIG` names, or an empty text."""
    return os.environ.get("TANDEM_CONFIG", "")


def standard_otlp_endpoint() -> str:
    """The collector that OpenTelemetry's own variable names, or an empty text."""
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")


def child_environment(overrides: dict[str, str]) -> dict[str, str]:
    """The environment for a process that `tandem up` starts: this one's with `overrides`.

    Without certificates: processes of one machine know each other by a token, and would not understand one another.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_TLS_")}
    return {**inherited, **overrides}


def own_settings() -> dict[str, str]:
    """The `TANDEM_*` settings that this process was given and that processes on other machines need as well.

    Without secrets, which travel by themselves, and without what names a file of this machine's configuration.
    """
    kept = ("TANDEM_TLS_", "TANDEM_TOKEN", "TANDEM_METRICS_TOKEN", "TANDEM_API_KEY", "TANDEM_CONFIG", "TANDEM_RAY_")
    return {
        name: value for name, value in os.environ.items() if name.startswith("TANDEM_") and not name.startswith(kept)
    }


def search_path(folder: Path) -> dict[str, str]:
    """What lets a child import from `folder`, where an interpreter would not do so by itself."""
    if folder.name in ("site-packages", "dist-packages"):
        return {}
    given = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *([given] if given else [])])}


def set_before_import(values: dict[str, str]) -> None:
    """Sets variables that a library reads when it is imported, where the user did not set them."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


def keep_native_ports_local(host: str) -> None:
    """Where a worker listens on loopback, its transport does, too: UCX, under NIXL, takes every interface by itself.

    Call it before NIXL is imported. What the user set (`UCX_NET_DEVICES`) stays.
    """
    if is_loopback(host):
        set_before_import({"UCX_NET_DEVICES": "lo"})


def client_key() -> str:
    """The API key that commands show a router, `TANDEM_API_KEY`: command lines are for all to see."""
    return os.environ.get("TANDEM_API_KEY", "")


def cache_folder() -> Path:
    """Where things that can be made again are kept for this user (`XDG_CACHE_HOME`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem"
