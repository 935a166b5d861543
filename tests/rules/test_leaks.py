"""The leak check of conftest.py catches what a test leaves running, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PLANTED = """
import asyncio, subprocess, sys, threading
import psutil, pytest

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
NEST = [sys.executable, "-c", "import subprocess, sys; subprocess.Popen(%r).wait()" % SLEEP]

@pytest.fixture(scope="module")
def cluster():
    process = subprocess.Popen(SLEEP)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    yield process
    stop.set()
    thread.join()
    process.kill()
    process.wait()

@pytest.fixture(scope="module")
def careless():
    process = subprocess.Popen(NEST)
    wait_for_child(process)
    yield
    process.kill()
    process.wait()

def wait_for_child(process):
    while not psutil.Process(process.pid).children():
        pass

@pytest.fixture
async def task():
    task = asyncio.ensure_future(asyncio.sleep(60))
    yield task
    task.cancel()

def test_clean(cluster):
    subprocess.run([sys.executable, "-c", ""], check=True)

async def test_clean_async(cluster, task):
    await asyncio.sleep(0)

async def test_leaks_task():
    test_leaks_task.task = asyncio.ensure_future(asyncio.sleep(60))

def test_leaks_thread():
    threading.Thread(target=threading.Event().wait, args=(1.5,)).start()

def test_leaks_our_daemon():
    threading.Thread(target=threading.Event().wait, name="engine-0", daemon=True).start()

def test_leaks_process():
    test_leaks_process.process = subprocess.Popen(SLEEP)

def test_leaks_grandchild():
    process = subprocess.Popen(NEST)
    wait_for_child(process)
    test_leaks_grandchild.kill = process

def test_meets_careless_fixture(careless):
    pass

def test_ends_careless_fixture(careless):
    pass

def teardown_function(function):
    if kill := getattr(function, "kill", None):
        kill.kill()
        kill.wait()
"""


def test_planted_leaks_are_caught(root: Path, tmp_path: Path) -> None:
    conftest = (root / "tests" / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(re.sub(r"^GRACE_S = .*$", "GRACE_S = 0.3", conftest, flags=re.M))
    (tmp_path / "test_planted.py").write_text(PLANTED)
    options = ["-o", f"pythonpath={root}", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "-q", "-rE"]
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    failed = re.findall(r"^ERROR test_planted\.py::(\w+)", done.stdout, flags=re.M)
    assert failed == [
        "test_leaks_task",
        "test_leaks_thread",
        "test_leaks_our_daemon",
        "test_leaks_process",
        "test_leaks_grandchild",
        "test_ends_careless_fixture",
    ], done.stdout
    assert "9 passed, 6 errors" in done.stdout
