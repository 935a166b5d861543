"""`tandem doctor --cluster`: a running cluster seen from here: who is reached, who agrees, and how fast KV moves."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from statistics import median
from typing import Any

import httpx

from tandem.cli.doctor.report import Check, Group, State, ok_or
from tandem.cli.fleet_client import FleetClient
from tandem.cluster import Role
from tandem.config import ProcessConfig
from tandem.errors import TandemError
from tandem.trust import Trust
from tandem.wire.probe import Answered, Measured, ask_workers, measure_pairs

MIB = 1 << 20
CLOCK_S = 2.0
"""HTTP's `Date` counts whole seconds: less than this cannot be told from none."""
SLOW = 0.25
"""Share of the median rate below which a pair is slow."""
MAX_PAIRS = 64
SHORT_ID = 8
Fleet = Mapping[str, Any]


def examine_cluster(routers: Sequence[str], config: ProcessConfig) -> list[Group]:
    """Asks the routers, then every worker that any of them knows, then lets KV travel between each pair."""
    clients = [FleetClient(router, config) for router in routers]
    fleets: dict[str, Fleet] = {}
    groups = [Group("routers", [check for client in clients for check in _router(client, fleets)])]
    if not fleets:
        return groups
    trust = Trust.of(config)
    known = _known(fleets)
    answers, silent = asyncio.run(ask_workers(sorted({each["address"] for each in known.values()}), trust))
    first = next(client for client in clients if client.url in fleets)
    groups.append(Group("workers", _workers(known, answers, silent, first)))
    groups.append(Group("agreement", _agreement(fleets, answers)))
    pairs = [
        (sender, receiver)
        for receiver in answers.values()
        for sender in answers.values()
        if receiver.info.role is Role.DECODE and sender.info.role is Role.PREFILL
    ]
    measured = asyncio.run(measure_pairs(pairs[:MAX_PAIRS], trust))
    groups.append(Group("transfers", _transfers(measured, len(pairs)) if pairs else [_no_pair(known, answers)]))
    return groups


# Routers ------------------------------------------------------------------------------------------------------------


def _router(client: FleetClient, fleets: dict[str, Fleet]) -> list[Check]:
    name = client.url
    try:
        ready, answer = client.get("/health"), client.fleet()
    except TandemError as error:
        problem, _, fix = str(error).removeprefix("--router: ").partition("; ")
        return [Check(name, problem, State.ERROR, fix or "give --router HOST:PORT of the router's HTTP port")]
    fleets[name] = answer
    counts = Counter(each["role"] for each in answer["workers"])
    fix = "start workers with --router HOST:PORT of this router's control port, or look into its log"
    found = f"knows {counts['prefill']} prefill and {counts['decode']} decode workers, policy {answer['policy']}"
    return [ok_or(found, name, bool(counts["decode"]), fix, State.ERROR), _clock(f"clock of {name}", ready)]


def _clock(name: str, answer: httpx.Response) -> Check:
    """How far another machine's clock is from this one's, as far as HTTP tells."""
    try:
        there = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):
        return Check(name, "not told")
    off = (datetime.now(UTC) - answer.elapsed / 2 - there).total_seconds()
    fine = -CLOCK_S < off < CLOCK_S + 1
    found = "as here, to the second" if fine else f"{abs(off):.0f} s {'behind' if off > 0 else 'ahead of'} this one"
    return ok_or(found, name, fine, "run chrony on both machines: logs and traces do not line up")


def _known(fleets: Mapping[str, Fleet]) -> dict[str, Fleet]:
    """All workers that any router knows, by incarnation."""
    return {each["incarnation"]: each for fleet in fleets.values() for each in fleet["workers"]}


# Workers ------------------------------------------------------------------------------------------------------------


def _workers(
    known: Mapping[str, Fleet], answers: Mapping[str, Answered], silent: Mapping[str, str], client: FleetClient
) -> list[Check]:
    checks = []
    at = Counter(each["address"] for each in known.values())
    for address, count in at.items():
        if count > 1:
            fix = "wait for a lease to pass; if it stays, two workers announce one address: give each its own --port"
            checks.append(Check(address, f"{count} incarnations are known there", State.WARNING, fix))
    for incarnation, worker in known.items():
        address = worker["address"]
        checks.append(_worker(incarnation, worker, answers.get(address), silent.get(address, "")))
        checks += _metrics(worker, client)
    seen = Counter(answer.info.incarnation for answer in answers.values())
    fix = "one worker has two addresses: list it once, or let it register and take it off the list"
    checks += [
        Check(incarnation[:SHORT_ID], f"answers at {count} addresses", State.ERROR, fix)
        for incarnation, count in seen.items()
        if count > 1
    ]
    return checks


def _worker(incarnation: str, worker: Fleet, answer: Answered | None, error: str) -> Check:
    name = f"{worker['role']} {worker['address']}"
    if answer is None:
        fix = "is it running, and may this machine reach its gRPC port? TANDEM_TOKEN or --tls-* must be the cluster's"
        fix += "; `tandem up` draws its own: start it with TANDEM_TOKEN set"
        return Check(name, error, State.ERROR, fix)
    if answer.info.incarnation != incarnation:
        found = f"the router knows {incarnation[:SHORT_ID]}, {answer.info.incarnation[:SHORT_ID]} answers"
        return Check(name, found, State.WARNING, "it was restarted; the router follows within a lease, else look there")
    found = f"{incarnation[:SHORT_ID]}, {worker['running']} running, {worker['waiting']} waiting, {worker['state']}"
    fixes = {
        "draining": "it takes no new requests: it was told to end, or its transport lost a page; see its log",
        "silent": "the router hears nothing of it: look at its log, and at the network between the two",
    }
    fine = worker["state"] == "ready"
    return ok_or(found, name, fine, fixes.get(worker["state"], "see its log"))


def _metrics(worker: Fleet, client: FleetClient) -> list[Check]:
    if not worker["metrics"]:
        return []
    name, page = f"metrics {worker['metrics']}", client.worker_page(worker["metrics"], "/health")
    if page is None:
        fix = "let Prometheus, and this machine, reach the worker's --metrics-port"
        return [Check(name, "not reached", State.WARNING, fix)]
    fix = "something else listens there: does a proxy stand before the worker's --metrics-port?"
    answers = ok_or(f"answers {page.status_code}", name, page.status_code == httpx.codes.OK, fix)
    return [answers, _clock(f"clock of {worker['address']}", page)]


# Agreement ----------------------------------------------------------------------------------------------------------


def _agreement(fleets: Mapping[str, Fleet], answers: Mapping[str, Answered]) -> list[Check]:
    found = list(answers.values())
    views = {name: {each["incarnation"] for each in fleet["workers"]} for name, fleet in fleets.items()}
    roots: dict[str, set[str]] = defaultdict(set)
    for answer in found:
        roots[answer.hash_root].add(answer.address)
    for name, fleet in fleets.items():
        if fleet["hash_root"]:
            roots[fleet["hash_root"]].add(name)
    lone = [a.address for a in found if a.info.role is Role.PREFILL and a.info.transport != "nixl"]
    receivers = [a.address for a in found if a.info.role is Role.DECODE and a.info.transport == "nixl"]
    routers = _same(
        "routers' workers",
        {", ".join(sorted(w[:SHORT_ID] for w in view)): {name} for name, view in views.items()},
        "name every router's control port to every worker: --router, repeated",
    )
    if not found:
        names = ("model", "KV layout", "cluster key", "page size", "transport")
        return [routers, *(_unchecked(name) for name in names)]
    return [
        routers,
        _same("model", _by(found, lambda a: f"{a.info.model.name} {a.info.model.fingerprint[:SHORT_ID]}"),
              "start all workers with one checkpoint, dtype and draft model"),
        _same("KV layout", _by(found, lambda a: f"{a.info.kv_dtype} {a.info.layout.digest()[:SHORT_ID]}"),
              "--dtype and --draft-model must be the same on all workers"),
        _same("cluster key", {root[:SHORT_ID]: who for root, who in roots.items()},
              "--cluster-key, model and dtype must be the same on routers and workers: no prefix is found else"),
        _same("page size", _by(found, lambda a: f"{a.info.page_size} tokens"),
              "nothing breaks, but shares of the cache differ; give all workers one --page-size", State.WARNING),
        ok_or(", ".join(sorted({a.info.transport for a in found})), "transport", not (lone and receivers),
              f"{', '.join(lone)} cannot send over nixl, and {', '.join(receivers)} ask for it: install it there, or "
              "--transport tcp on all", State.ERROR),
    ]  # fmt: skip


def _unchecked(name: str, asked: str = "worker") -> Check:
    """What cannot be known while nobody of a kind answers."""
    fix = "mend first what is said of the workers above; of no workers at all, what is said of the routers"
    return Check(name, f"not checked: no {asked} answered", State.WARNING, fix)


def _by(found: Sequence[Answered], key: Any) -> dict[str, set[str]]:
    values: dict[str, set[str]] = defaultdict(set)
    for answer in found:
        values[key(answer)].add(answer.address)
    return values


def _same(name: str, values: Mapping[str, set[str]], fix: str, otherwise: State = State.ERROR) -> Check:
    """Whether all say the same; if not, who says what."""
    if len(values) <= 1:
        return Check(name, next(iter(values), "nothing to compare"))
    told = "; ".join(f"{value}: {', '.join(sorted(who))}" for value, who in sorted(values.items()))
    return Check(name, f"differs: {told}", otherwise, fix)


# Transfers ----------------------------------------------------------------------------------------------------------


def _transfers(measured: Sequence[Measured], pairs: int) -> list[Check]:
    rates = [each.mib_per_s for each in measured if not each.error]
    usual = median(rates) if rates else 0.0
    checks = [_transfer(each, usual) for each in measured]
    if pairs > len(measured):
        checks.append(Check("pairs", f"{len(measured)} of {pairs} were measured, to be done soon"))
    return checks


def _no_pair(known: Mapping[str, Fleet], answers: Mapping[str, Answered]) -> Check:
    """Why there is no pair that could be measured."""
    if not answers:
        return _unchecked("pairs")
    there, heard = {each["role"] for each in known.values()}, {each.info.role for each in answers.values()}
    for role in (Role.PREFILL, Role.DECODE):
        if role.value in there and role not in heard:
            return _unchecked("pairs", f"{role.value} worker")
    return Check("pairs", "none: decode workers prefill locally")


def _transfer(measured: Measured, usual: float) -> Check:
    name = f"{measured.sender} -> {measured.receiver}"
    if measured.error:
        fix = "open the ports between the two, and compare --transport; requests are prefilled elsewhere meanwhile"
        return Check(name, measured.error, State.ERROR, fix)
    found = (
        f"{measured.transport}, {measured.mib_per_s:.0f} MiB/s (best of {measured.writes} writes of "
        f"{measured.write_bytes / MIB:g} MiB, connected in {measured.connect_s:.2f} s)"
    )
    fix = f"others do {usual:.0f} MiB/s: look at the path between the two, and at what else runs there"
    return ok_or(found, name, measured.mib_per_s >= SLOW * usual, fix)
