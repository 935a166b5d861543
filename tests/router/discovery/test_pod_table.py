"""The table of pods against a naive one that starts from nothing at each step."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.discovery.pod_table import Change, PodTable
from router.discovery.pods import Pod
from tandem.cluster import Role

UIDS = st.sampled_from("abcde")
ADDRESSES = st.sampled_from(("", "10.0.0.1:9", "10.0.0.2:9", "10.0.0.3:9"))
ROLES = st.sampled_from((Role.PREFILL, Role.DECODE))


class Pods(RuleBasedStateMachine):
    """A cluster whose news may come twice, late, or only with the next list."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PodTable()
        self.followed: dict[str, Role] = {}
        self.held: set[str] = set()
        self.version = 100
        self.life = 0
        self.names: dict[str, str] = {}
        self.truth: dict[str, Pod] = {}
        """What the cluster has, by uid."""
        self.seen: dict[str, Pod] = {}
        """What a router that heard all of it in order would know."""
        self.past: list[Pod] = []
        self.dead: set[str] = set()

    def hear(self, changes: list[Change]) -> None:
        for change in changes:
            if change.role is None:
                self.followed.pop(change.address, None)
                self.held.add(change.address)
            else:
                assert self.followed.get(change.address) is not change.role, "told what was known"
                self.followed[change.address] = change.role
                self.held.discard(change.address)

    def changed(self, name: str, address: str, role: Role, ready: bool) -> Pod:
        """The pod of that name in its present life, changed."""
        self.version += 1
        if name not in self.names:
            self.life += 1
            self.names[name] = f"{name}-{self.life}"
        uid = self.names[name]
        pod = Pod(uid, name, self.version, address, role, ready and bool(address))
        self.truth[uid] = pod
        self.past.append(pod)
        return pod

    @rule(name=UIDS, address=ADDRESSES, role=ROLES, ready=st.booleans())
    def change(self, name: str, address: str, role: Role, ready: bool) -> None:
        pod = self.changed(name, address, role, ready)
        self.seen[pod.uid] = pod
        self.hear(self.table.put(pod))

    @rule(name=UIDS, address=ADDRESSES, role=ROLES, ready=st.booleans())
    def change_unheard(self, name: str, address: str, role: Role, ready: bool) -> None:
        self.changed(name, address, role, ready)

    @rule(name=UIDS, heard=st.booleans())
    def delete(self, name: str, heard: bool) -> None:
        uid = self.names.pop(name, None)
        if uid is None:
            return
        pod = self.truth.pop(uid)
        if heard:
            self.dead.add(uid)
            self.seen.pop(uid, None)
            self.hear(self.table.delete(pod))

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Old news again: of pods that are known to be newer, or gone."""
        known = [pod for pod in self.past if pod.uid in self.dead or self._newer_known(pod)]
        if known:
            assert self.table.put(data.draw(st.sampled_from(known))) == []

    def _newer_known(self, pod: Pod) -> bool:
        seen = self.seen.get(pod.uid)
        assert pod.version is not None
        return seen is not None and seen.version is not None and seen.version >= pod.version

    @rule()
    def relist(self) -> None:
        self.seen = dict(self.truth)
        self.dead = set()
        self.past = list(self.truth.values())
        self.hear(self.table.replace(self.truth.values()))

    @rule()
    def restored(self) -> None:
        """A cluster from a backup: all versions are lower than before."""
        self.version = 10
        for uid, pod in self.truth.items():
            self.version += 1
            self.truth[uid] = Pod(uid, pod.name, self.version, pod.address, pod.role, pod.ready)
        self.relist()

    @invariant()
    def agrees(self) -> None:
        self.table.check_integrity()
        expected: dict[str, set[Role | None]] = {}
        for pod in self.seen.values():
            if pod.ready:
                expected.setdefault(pod.address, set()).add(pod.role)
        assert self.followed.keys() == expected.keys()
        assert all(role in expected[address] for address, role in self.followed.items())
        assert self.table.ready() == len(expected)
        assert {pod.address for pod in self.seen.values() if pod.address} - expected.keys() <= self.held


Pods.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPods = Pods.TestCase


def test_a_successor_keeps_the_address_of_the_one_before() -> None:
    table = PodTable()
    old, new = (Pod(uid, uid, version, "10.0.0.1:9", Role.DECODE, True) for uid, version in (("old", 1), ("new", 2)))
    assert [change.role for change in table.put(old)] == [Role.DECODE]
    assert table.put(new) == []
    assert table.delete(old) == []
    assert [change.role for change in table.delete(new)] == [None]


def test_versions_that_are_no_numbers_tell_no_order() -> None:
    table = PodTable()
    assert len(table.put(Pod("a", "a", None, "10.0.0.1:9", Role.DECODE, True))) == 1
    assert [change.role for change in table.put(Pod("a", "a", None, "10.0.0.1:9", Role.DECODE, False))] == [None]
