"""The one above several router processes: what it starts again, what it ends for, and whom it does not know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tandem.config import child_environment

SCRIPT = '''
import ctypes, logging, os, signal, socket, subprocess, sys, threading, time
from pathlib import Path
from router import supervisor
from tandem.errors import ConfigError
from tandem.ports import free_ports

PR_SET_CHILD_SUBREAPER = 36
logging.basicConfig(format="%(message)s")
supervisor.RETRY_S = supervisor.SETTINGS_RETRY_S = 0.02
tries, case = Path(sys.argv[1]), sys.argv[2]
orphan = tries.with_name("orphan")
address = ("127.0.0.1", free_ports(1)[0])

def shared():
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind(address)
    made.listen()
    return made

def answered(name):
    """Asks over new connections until the named process answers; whoever is asked must answer."""
    while True:
        with socket.create_connection(address, 60) as client:
            said = client.recv(9)
        assert said, "taken by nobody"
        if said == name:
            return

def answer(place):
    place.listener.listen()
    while True:
        with place.listener.accept()[0] as client:
            client.sendall(b"%d" % place.index)

def serve(place):
    number = len(list(tries.glob("*")))
    if place.index == 0:
        if case == "wrong first":
            signal.pause()
        answer(place)
    (tries / str(number)).touch()
    if case == "orphan" and number == 0:
        orphan.write_text(str(subprocess.Popen(["sleep", "0.05"]).pid))  # left behind: the one above gets it
        return 1
    if case == "wrong first":
        raise ConfigError("the file is missing")
    if case == "wrong later":
        if number == 0:
            return 1
        if 1 < number < 8:  # nobody waits for this one
            for _ in range(4):
                answered(b"0")
        if number < 8:
            raise ConfigError(f"the file is {'missing' if number < 5 else 'empty'}")
    if case != "orphan" or number >= 2:
        threading.Thread(target=lambda: (answered(b"0"), answered(b"1"), os.kill(os.getppid(), signal.SIGTERM))).start()
        answer(place)
    while Path("/proc", orphan.read_text()).exists():  # until the one above has taken note of its end
        time.sleep(0.01)
    return 1

ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
sys.exit(supervisor.supervise([shared(), shared()], serve))
'''


def supervised(tries: Path, case: str) -> tuple[int, list[str], int]:
    """Exit code, lines logged, and how often the second process was tried."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tries), case],
        env=child_environment({}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.splitlines(), len(list(tries.iterdir()))


def test_settings_wrong_at_the_start_end_all(tmp_path: Path) -> None:
    assert supervised(tmp_path, "wrong first") == (2, ["router process 1: the file is missing"], 1)


def test_a_replacement_with_wrong_settings_leaves_the_others_alone(tmp_path: Path) -> None:
    status, lines, tries = supervised(tmp_path, "wrong later")
    assert (status, tries) == (0, 9)
    assert [line for line in lines if "started again" not in line] == [
        "router process 1: the file is missing",
        "router process 1: the file is empty",
    ]


def test_orphans_that_it_inherits_are_none_of_its_own(tmp_path: Path) -> None:
    status, _, tries = supervised(tmp_path, "orphan")
    assert (status, tries) == (0, 3)
