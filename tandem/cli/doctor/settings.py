"""Checks of the settings in the environment, and of the ports that they name."""

from __future__ import annotations

from typing import TypeVar

from tandem.cli.doctor.report import Check, Group, State, ok_or
from tandem.cli.options import build
from tandem.config import DecodeConfig, RouterConfig, Settings
from tandem.errors import ConfigError
from tandem.ports import authority, check_port, is_loopback

S = TypeVar("S", bound=Settings)


def check_ports() -> Group:
    """Of a router and a worker that are started here, now, with the environment's settings and the defaults."""
    checks: list[Check] = []
    router, worker = _settings(RouterConfig, checks), _settings(DecodeConfig, checks, model="m")
    if router is not None:
        checks += [
            _port("router's HTTP port", router.host, router.port, "--port"),
            _port("router's control port", router.control_host, router.control_port, "--control-port"),
            _secret("TANDEM_TOKEN", router.token is not None, router.control_host),
        ]
    if worker is not None:
        checks += [
            _port("worker's gRPC port", worker.host, worker.port, "--port"),
            _port("worker's metrics port", worker.host, worker.metrics_port, "--metrics-port"),
            _secret("TANDEM_METRICS_TOKEN", worker.metrics_token is not None, worker.host),
        ]
    return Group("ports", checks)


def _settings(schema: type[S], checks: list[Check], **given: str) -> S | None:
    """Those of a process, or None and a check that says what is wrong with them."""
    try:
        return build(schema, dict(given))
    except ConfigError as error:
        who = (schema.__doc__ or "").strip()
        fix = "correct TANDEM_* in the environment, or the file that TANDEM_CONFIG names"
        checks.append(Check(f"settings of {who}", str(error), State.ERROR, fix))
        return None


def _port(name: str, host: str, port: int, setting: str) -> Check:
    if port == 0:
        return Check(name, f"a free one of {host}")
    try:
        check_port(host, port, setting)
    except ConfigError as error:
        # Perhaps it is a router that runs here already: that is no error.
        return Check(
            name,
            str(error).partition(";")[0],
            State.WARNING,
            f"stop what listens there, or give another with {setting}",
        )
    return Check(name, f"{authority(host, port)} is free")


def _secret(variable: str, is_set: bool, host: str) -> Check:
    """A port that others reach has been refused above unless something guards it."""
    where = "only this machine can connect" if is_loopback(host) else f"others reach {host}"
    fix = f"set {variable}, or be sure that the certificates are checked"
    return ok_or(f"{'set' if is_set else 'not set'}; {where}", variable, is_set or is_loopback(host), fix)
