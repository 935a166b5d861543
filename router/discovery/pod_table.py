"""All pods that may hold a worker, and what follows from them for each address. Pure: events in, changes out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from router.discovery.pods import Pod
from tandem.cluster import Role

DELETED_KEPT = 1024
"""Pods that were deleted are remembered against late news of them: so many, until the next whole list."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a roster must be told."""

    address: str
    role: Role | None
    """What to expect there; None: nothing new must go there."""
    pod: str
    why: str


class PodTable:
    """Pods by uid. An address is followed while any pod that is ready has it, and held back while only others have it.

    Addresses are used again: a pod's successor may be described before its own end is. News that is older than what is
    known of the same pod changes nothing; nothing does after its deletion, because a uid never comes back.
    """

    def __init__(self) -> None:
        self._pods: dict[str, Pod] = {}
        self._at: defaultdict[str, dict[str, Pod]] = defaultdict(dict)
        self._told: dict[str, Role | None] = {}
        self._deleted: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._pods)

    def replace(self, pods: Iterable[Pod]) -> list[Change]:
        """Takes a whole list: it is the truth, also where its versions are lower (a restored etcd)."""
        listed = {pod.uid: pod for pod in pods}
        self._deleted.clear()
        touched = [self._forget(uid) for uid in [uid for uid in self._pods if uid not in listed]]
        for pod in listed.values():
            touched += self._take(pod)
        return self._settle(pod for pod in touched if pod is not None)

    def put(self, pod: Pod) -> list[Change]:
        """Takes news of one pod."""
        known = self._pods.get(pod.uid)
        if pod.uid in self._deleted or (known is not None and _older(pod, known)):
            return []
        return self._settle(self._take(pod))

    def delete(self, pod: Pod) -> list[Change]:
        """The pod is gone, or no longer selected."""
        self._deleted[pod.uid] = None
        if len(self._deleted) > DELETED_KEPT:
            del self._deleted[next(iter(self._deleted))]
        known = self._forget(pod.uid)
        return [] if known is None else self._settle([known])

    def ready(self) -> int:
        """How many addresses are followed."""
        return sum(role is not None for role in self._told.values())

    def check_integrity(self) -> None:
        """Raises AssertionError unless all parts agree."""
        placed = {uid: pod for pods in self._at.values() for uid, pod in pods.items()}
        assert placed == {uid: pod for uid, pod in self._pods.items() if pod.address}
        assert all(pod.address == address for address, pods in self._at.items() for pod in pods.values())
        assert self._told == {address: self._wanted(address) for address in self._at}
        assert not self._deleted.keys() & self._pods.keys()
        assert len(self._deleted) <= DELETED_KEPT

    def _take(self, pod: Pod) -> list[Pod]:
        """Notes a pod; it and what it was before."""
        before = self._forget(pod.uid)
        self._pods[pod.uid] = pod
        if pod.address:
            self._at[pod.address][pod.uid] = pod
        return [pod] if before is None else [before, pod]

    def _forget(self, uid: str) -> Pod | None:
        known = self._pods.pop(uid, None)
        if known is not None and known.address:
            del self._at[known.address][uid]
        return known

    def _settle(self, touched: Iterable[Pod]) -> list[Change]:
        """Changes at the addresses of pods that were touched; what is let go comes first."""
        addresses = {pod.address: pod for pod in touched if pod.address}
        changes = [change for address, pod in addresses.items() for change in self._settle_one(address, pod)]
        return sorted(changes, key=lambda change: change.role is not None)

    def _settle_one(self, address: str, touched: Pod) -> Iterator[Change]:
        pods = self._at.get(address)
        if not pods:
            self._at.pop(address, None)
            if self._told.pop(address) is not None:
                yield Change(address, None, touched.name, "it is gone")
            return
        wanted = self._wanted(address)
        if address in self._told and self._told[address] is wanted:
            return
        self._told[address] = wanted
        pod = max(pods.values(), key=_standing)
        yield Change(address, wanted, pod.name, pod.why)

    def _wanted(self, address: str) -> Role | None:
        pod = max(self._at[address].values(), key=_standing)
        return pod.role if pod.ready else None


def _standing(pod: Pod) -> tuple[bool, int, str]:
    """Of several pods at one address the one that counts: a ready one, then the one that changed last."""
    return pod.ready, pod.version or 0, pod.uid


def _older(pod: Pod, known: Pod) -> bool:
    return pod.version is not None and known.version is not None and pod.version < known.version
