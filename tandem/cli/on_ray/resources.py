"""What workers need of a Ray cluster, and what a cluster lacks of it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.config import UpConfig

Amounts = Mapping[str, float]
"""Ray's resources by name: CPU, GPU, memory, and those that a cluster's operator made up."""
FLAGS = {"prefill": "--ray-prefill-resources", "decode": "--ray-decode-resources"}


@dataclass(frozen=True, slots=True)
class Node:
    """A live node of the cluster."""

    id: str
    address: str
    """Its IP address, as Ray knows it."""
    total: Amounts
    head: bool


def amounts(texts: Sequence[str]) -> dict[str, float]:
    """NAME=AMOUNT of each; amounts of 0 are left out."""
    pairs = (text.partition("=") for text in texts)
    return {name: float(amount) for name, _, amount in pairs if float(amount)}


def demands(config: UpConfig, nodes: Sequence[Node]) -> dict[str, dict[str, float]]:
    """Role -> what each of its workers needs.

    Where nodes have a resource called `prefill` or `decode`, workers of that role go there: each takes 1 of it, unless
    the setting says how much.
    """
    found = {}
    for role, texts in (("prefill", config.ray_prefill_resources), ("decode", config.ray_decode_resources)):
        marked = any(node.total.get(role) for node in nodes) and not any(text.startswith(role + "=") for text in texts)
        found[role] = amounts(texts) | ({role: 1.0} if marked else {})
    return found


def lacking(counts: Mapping[str, int], demand: Mapping[str, Amounts], available: Amounts, nodes: Sequence[Node]) -> str:
    """Why the workers cannot be placed: one line that names what was asked for, what there is and the setting.

    counts: workers of each role. available: what nobody uses now, of the whole cluster. Empty where nothing is missing
    in sum and each worker fits on some node.
    """
    asked: dict[str, float] = {}
    for role, count in counts.items():
        for name, amount in demand[role].items():
            asked[name] = asked.get(name, 0.0) + count * amount
    complaints = []
    for name, amount in asked.items():
        total = sum(node.total.get(name, 0.0) for node in nodes)
        if amount > (free := available.get(name, 0.0)):
            flags = " and ".join(FLAGS[role] for role, count in counts.items() if count and name in demand[role])
            complaints.append(f"{name}: {amount:g} asked for by {flags}, {free:g} available of {total:g}")
    for role, count in counts.items():
        if count and not complaints and not any(fits(demand[role], node) for node in nodes):
            complaints.append(f"no single node has {shown(demand[role])}, which {FLAGS[role]} asks for")
    return "; ".join(complaints)


def fits(demand: Amounts, node: Node) -> bool:
    """Whether an idle node could hold a worker."""
    return all(node.total.get(name, 0.0) >= amount for name, amount in demand.items())


def shown(given: Amounts) -> str:
    """As the settings write them."""
    return ",".join(f"{name}={amount:g}" for name, amount in given.items()) or "nothing"
