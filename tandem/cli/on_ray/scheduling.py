"""Which node an actor comes to: workers by placement groups, routers by node."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from tandem.cli.on_ray.connect import Connection
from tandem.cli.on_ray.processes import Unit
from tandem.cli.on_ray.resources import Amounts, lacking
from tandem.cli.on_ray.supervisor import Supervisor
from tandem.errors import Unavailable

POLL_S = 0.5


class Scheduling:
    """One placement group for each role, spread over the nodes: losing a node costs as little of a role as can be.

    A bundle whose node is lost is placed again by Ray, at once where there is room, else when a node comes.
    """

    def __init__(self, connection: Connection, demand: Mapping[str, Amounts], counts: Mapping[str, int]) -> None:
        """demand: role -> what each worker needs. counts: role -> workers."""
        self._connection = connection
        self._demand = demand
        self._counts = counts
        self._groups: dict[str, Any] = {}
        self._placement = importlib.import_module("ray.util.placement_group")
        self._strategies = importlib.import_module("ray.util.scheduling_strategies")

    async def reserve(self, wait_s: float) -> None:
        """Takes what all workers need. Raises Unavailable, with what is missing, when that is not there in time."""
        available = self._connection.available()
        for role, count in self._counts.items():
            if count:
                bundles = [dict(self._demand[role])] * count
                self._groups[role] = self._placement.placement_group(bundles, strategy="SPREAD")
        deadline = asyncio.get_running_loop().time() + wait_s
        for group in self._groups.values():
            while not await asyncio.to_thread(group.wait, POLL_S):
                if asyncio.get_running_loop().time() < deadline:
                    continue
                why = lacking(self._counts, self._demand, available, self._connection.nodes())
                self.release()
                reason = why or "the nodes have them only in parts that fit no worker; see `ray status`"
                raise Unavailable(f"the Ray cluster lacks resources after --ray-wait-s {wait_s:g}: {reason}")

    async def worker(self, unit: Unit) -> Any:
        """A new actor in the unit's bundle; it waits for its node where there is none."""
        demand = dict(self._demand[unit.role])
        strategy = self._strategies.PlacementGroupSchedulingStrategy(
            self._groups[unit.role], placement_group_bundle_index=unit.index
        )
        options = {
            "num_cpus": demand.pop("CPU", 0),
            "num_gpus": demand.pop("GPU", 0),
            "memory": demand.pop("memory", None),
            "resources": demand,
            "scheduling_strategy": strategy,
        }
        return self._actor(unit, options)

    async def router(self, unit: Unit) -> Any:
        """A new actor on the node that has the unit's address, once there is one."""
        while True:
            here = [node for node in self._connection.nodes() if node.address == unit.node]
            if here:
                break
            await asyncio.sleep(POLL_S)
        strategy = self._strategies.NodeAffinitySchedulingStrategy(here[0].id, soft=False)
        return self._actor(unit, {"num_cpus": 0, "scheduling_strategy": strategy})

    def _actor(self, unit: Unit, options: dict[str, Any]) -> Any:
        remote = self._connection.ray.remote(Supervisor)
        return remote.options(max_restarts=0, **options).remote(unit.name)

    def release(self) -> None:
        """Gives everything back; actors in it are ended."""
        for group in self._groups.values():
            self._placement.remove_placement_group(group)
        self._groups.clear()
