"""`tandem doctor`: what this machine has, what Tandem makes of it, and how to mend what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec

from rich.console import Console

from tandem.cli.doctor.machine import check_machine
from tandem.cli.doctor.packages import check_packages
from tandem.cli.doctor.report import Group, as_json, failed, show
from tandem.cli.doctor.settings import check_ports
from tandem.config import ProcessConfig


def examine(model: str = "") -> list[Group]:
    """Looks at everything that is installed: where there is no engine, only a router can run."""
    groups = [check_machine(), check_packages()]
    if find_spec("torch") is not None:
        from tandem.cli.doctor.engine import check_kernels
        from tandem.cli.doctor.transports import check_transports

        groups += [check_kernels(), check_transports()]
        if model:
            from tandem.cli.doctor.models import check_model

            groups.append(check_model(model))
    return [*groups, check_ports()]


def doctor(model: str, json_wanted: bool) -> int:
    """Prints the report of this machine; returns the exit code: 1 where something is wrong."""
    return tell("this machine", examine(model), json_wanted)


def doctor_of_cluster(routers: Sequence[str], config: ProcessConfig, json_wanted: bool) -> int:
    """Prints the report of a running cluster; returns the exit code."""
    from tandem.cli.doctor.cluster import examine_cluster

    return tell(f"cluster of {', '.join(routers)}", examine_cluster(routers, config), json_wanted)


def tell(title: str, groups: list[Group], json_wanted: bool) -> int:
    """Prints a report; returns the exit code."""
    if json_wanted:
        print(json.dumps(as_json(groups)))
    else:
        show(title, groups, Console(soft_wrap=True))
    return int(failed(groups))
