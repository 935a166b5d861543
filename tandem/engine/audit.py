"""Checks over a whole engine: every page has one owner, every handle one sequence, every state its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tandem.engine.memory import KvMemory
from tandem.engine.radix import Node
from tandem.engine.scheduler import Scheduler
from tandem.engine.sequence import Seq, SeqState


def check_integrity(memory: KvMemory, scheduler: Scheduler, seqs: Iterable[Seq]) -> None:
    """Raises AssertionError naming what disagrees."""
    seqs = list(seqs)
    memory.pages.check_integrity()
    memory.cache.check_integrity()
    for seq in seqs:
        seq.check(memory.page_size)
        assert seq.node is not None or (seq.computed == 0 and not seq.pages), f"{seq.seq_id} has pages but no handle"
    owned = [page for seq in seqs for page in seq.pages[seq.shared_pages :]]
    cached = {page for _, node in memory.cache.nodes() for page in node.pages}
    assert len(owned) == len(set(owned)), "a page has two owners"
    assert not cached & set(owned), "a page belongs to the cache and to a sequence"
    assert cached | set(owned) == memory.pages.used(), "a page is used and has no owner"
    _check_handles(memory, seqs)
    _check_places(scheduler, seqs)


def _check_handles(memory: KvMemory, seqs: list[Seq]) -> None:
    handles = Counter(seq.node for seq in seqs if isinstance(seq.node, Node))
    for _, node in memory.cache.nodes():
        below = sum(child.refs for child in node.children.values())
        assert node.refs == handles.pop(node, 0) + below, "a handle has no sequence"
    assert not handles, "a sequence's handle is not in the tree"
    for seq in seqs:
        path: list[int] = []
        step = seq.node
        while isinstance(step, Node):
            path = step.pages + path
            step = step.parent
        assert path == seq.pages[: seq.shared_pages], f"{seq.seq_id} has other pages than its path"


def _check_places(scheduler: Scheduler, seqs: list[Seq]) -> None:
    by_state = {state: {seq.seq_id for seq in seqs if seq.state is state} for state in SeqState}
    assert {seq.seq_id for seq in scheduler.running} == by_state[SeqState.RUNNING]
    assert {seq.seq_id for seq in scheduler.waiting} == by_state[SeqState.WAITING]
    assert not by_state[SeqState.FINISHED], "a finished sequence is still known"
    orders = [seq.order for seq in scheduler.running]
    assert orders == sorted(orders)


def idle_leaks(memory: KvMemory, seqs: Iterable[Seq]) -> list[str]:
    """One line for each thing that an idle engine should not hold."""
    leaks = [f"sequence {seq.seq_id} is {seq.state.name}" for seq in seqs]
    used, cached = len(memory.pages.used()), memory.cache.num_pages
    if used != cached:
        leaks.append(f"{used} pages are used and {cached} cached")
    held = sum(node.refs for _, node in memory.cache.nodes() if node.parent is None)
    if held:
        leaks.append(f"{held} cache handles are held")
    return leaks
