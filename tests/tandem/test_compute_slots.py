"""Compute slots across processes: bounded, in order, given back by the dead, no wall before the stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tandem.compute_slots import ComputeSlots

HOLDER = """
import sys
from tandem.compute_slots import ComputeSlots
with ComputeSlots(int(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def slots() -> Iterator[ComputeSlots]:
    """One slot, and little patience."""
    made = ComputeSlots.create(1, patience_s=0.05)
    yield made
    made.remove()


def hold_elsewhere(slots: ComputeSlots) -> subprocess.Popen[str]:
    """A process that holds the slot until its input ends."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(slots.key)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_slot_is_held_and_given_back(slots: ComputeSlots) -> None:
    with slots.held():
        assert slots.free() == 0
    assert slots.free() == 1 and slots.overtaken == 0


def test_a_step_that_raises_gives_its_slot_back(slots: ComputeSlots) -> None:
    with pytest.raises(RuntimeError), slots.held():
        raise RuntimeError
    assert slots.free() == 1


def test_a_killed_holder_gives_its_slot_back(slots: ComputeSlots) -> None:
    holder = hold_elsewhere(slots)
    assert slots.free() == 0
    holder.kill()
    holder.communicate()
    assert slots.free() == 1


def test_a_stopped_holder_does_not_stop_others(slots: ComputeSlots) -> None:
    holder = hold_elsewhere(slots)
    os.kill(holder.pid, signal.SIGSTOP)
    with slots.held():
        assert slots.overtaken == 1
    assert slots.free() == 0, "a slot that was not taken was given back"
    os.kill(holder.pid, signal.SIGCONT)
    holder.communicate(input="")
    assert slots.free() == 1


def test_no_two_hold_one_slot() -> None:
    slots = ComputeSlots.create(1, patience_s=30.0)
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with slots.held():
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and slots.free() == 1
    slots.remove()


def test_slots_that_are_gone_are_an_error_at_start(slots: ComputeSlots) -> None:
    other = ComputeSlots.create(1)
    other.remove()
    with pytest.raises(OSError, match="semctl"):
        ComputeSlots(other.key)


def test_a_signal_does_not_end_the_wait() -> None:
    made = ComputeSlots.create(1, patience_s=60.0)
    was = signal.signal(signal.SIGUSR1, lambda *_: None)
    reached, left = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        with made.held():
            left.set()

    waiting = threading.Thread(target=wait)
    try:
        with made.held():
            waiting.start()
            reached.wait()
            for _ in range(200):  # one of them at least while it waits in the kernel
                signal.pthread_kill(waiting.ident or 0, signal.SIGUSR1)
                assert not left.wait(0.001), "it went on without a slot"
        waiting.join()
        assert made.overtaken == 0 and made.free() == 1
    finally:
        signal.signal(signal.SIGUSR1, was)
        made.remove()
