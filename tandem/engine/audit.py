"""Checks over a whole engine: every page has one owner, every handle one sequence, every state its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tandem.engine.memory import KvMemory
from tandem.engine.radix import NO_PAGE, Node
from tandem.engine.scheduler import Scheduler
from tandem.engine.sequence import Seq, SeqState


def check_integrity(memory: KvMemory, scheduler: Scheduler, known: Iterable[Seq], ended: Iterable[Seq] = ()) -> None:
    """Raises AssertionError naming what disagrees. ended: those that have pages until a step in flight is done."""
    known = list(known)
    seqs = [*known, *ended]
    memory.cache.check_integrity()
    for seq in seqs:
        seq.check(memory.page_size)
        assert seq.node is not None or not seq.pages, f"{seq.seq_id} has pages but no handle"
        assert seq.node is None or len(seq.pages) == len(seq.slid) == len(memory.groups), f"{seq.seq_id} lacks a group"
    for group in range(len(memory.groups)):
        _check_owners(memory, group, [seq for seq in seqs if seq.node is not None])
    _check_handles(memory, seqs)
    _check_windows(memory, seqs)
    _check_places(scheduler, known)


def _check_owners(memory: KvMemory, group: int, seqs: list[Seq]) -> None:
    """Every page of a group in use is the cache's or exactly one sequence's."""
    memory.pools[group].check_integrity()
    owned = [page for seq in seqs for page in seq.pages[group][seq.shared_pages :] if page != NO_PAGE]
    cached = {page for _, node in memory.cache.nodes() for page in node.pages[group] if page != NO_PAGE}
    assert len(owned) == len(set(owned)), "a page has two owners"
    assert not cached & set(owned), "a page belongs to the cache and to a sequence"
    assert cached | set(owned) == memory.pools[group].used(), "a page is used and has no owner"
    if group in memory.windowed:
        held = Counter(page for seq in seqs for page in seq.pages[group][: seq.shared_pages] if page != NO_PAGE)
        for page in cached:
            assert memory.cache.page_refs(group, page) == held[page], "a page of a window is held by no sequence"


def _check_handles(memory: KvMemory, seqs: list[Seq]) -> None:
    """Handles are those of sequences, whose first pages are those of the path; in windows they may have fewer."""
    handles = Counter(seq.node for seq in seqs if isinstance(seq.node, Node))
    for _, node in memory.cache.nodes():
        below = sum(child.refs for child in node.children.values())
        assert node.refs == handles.pop(node, 0) + below, "a handle has no sequence"
    assert not handles, "a sequence's handle is not in the tree"
    for seq in seqs:
        for group, pages in enumerate(seq.pages):
            path: list[int] = []
            step = seq.node
            while isinstance(step, Node):
                path = step.pages[group] + path
                step = step.parent
            gaps = NO_PAGE if group in memory.windowed else None
            pairs = zip(path, pages[: seq.shared_pages], strict=True)
            assert all(mine in (page, gaps) for page, mine in pairs), f"{seq.seq_id} has other pages than its path"


def _check_windows(memory: KvMemory, seqs: list[Seq]) -> None:
    """Who is to compute, or is pushed, has the pages that it sees; nobody keeps a page that it has passed."""
    for seq in seqs:
        if seq.node is None:
            continue
        assert seq.state is SeqState.WAITING_KV or memory.sees(seq, seq.computed), f"{seq.seq_id} lacks a page it sees"
        for group in memory.windowed:
            assert set(seq.pages[group][: seq.slid[group]]) <= {NO_PAGE}, f"{seq.seq_id} keeps a page it has passed"


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
    for group, pool in enumerate(memory.pools):
        used, cached = len(pool.used()), memory.cache.cached(group)
        if used != cached:
            leaks.append(f"{used} pages are used and {cached} cached in layer group {group}")
        if group in memory.windowed and memory.cache.evictable(group) != cached:
            leaks.append(f"{cached - memory.cache.evictable(group)} cached pages of layer group {group} are held")
    held = sum(node.refs for _, node in memory.cache.nodes() if node.parent is None)
    if held:
        leaks.append(f"{held} cache handles are held")
    return leaks
