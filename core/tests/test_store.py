"""The store of a group: what is asked of it ends in time, and a machine that pauses has not been silent."""

import threading
import time

import pytest
import torch.distributed as dist
from core_toys import run_python

from megastow import PeerError, store
from megastow.store import StoreLine, wait_for


def test_work_has_its_limit():
    line = StoreLine(dist.HashStore())
    assert line.ask(lambda connection: connection.add("number", 2), 30.0) == 2
    over = threading.Event()
    with pytest.raises(PeerError, match=r"did not answer within 0\.05 s"):
        line.ask(lambda _: over.wait(60), 0.05)
    over.set()
    with pytest.raises(TimeoutError, match="of the work itself"):
        line.ask(lambda _: exec("raise TimeoutError('of the work itself')"), 30.0)
    assert line.ask(lambda connection: connection.add("number", 0), 30.0) == 2


def test_a_machine_that_pauses_is_given_time_to_answer():
    """Here a process that is stopped for longer than its limit, in the middle of some work."""
    run_python("""
import os, signal, sys, time
import torch.distributed as dist
from megastow.store import StoreLine

begun, tell = os.pipe()

def work(_):
    now = before = time.monotonic()
    os.write(tell, b"!")  # who reads it may stop us at once
    while now - before < 2.5:  # until this process was stopped in between
        before, now = now, time.monotonic()
    return "answered"

child = os.fork()
if not child:
    os._exit(0 if StoreLine(dist.HashStore()).ask(work, 2.0) == "answered" else 1)
os.read(begun, 1)
os.kill(child, signal.SIGSTOP)
time.sleep(3.0)
os.kill(child, signal.SIGCONT)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")


class Sleepy:
    """A store in which nothing is ever set, on a machine that pauses in the first few waits."""

    def __init__(self, pauses):
        self.pauses = pauses
        self.waits = 0

    def wait(self, keys, timeout):
        self.waits += 1
        time.sleep(0.2 if self.waits <= self.pauses else 0.0)
        raise RuntimeError("over time")


@pytest.mark.parametrize(("pauses", "waits"), [(0, 1), (1, 2), (2, 3), (5, 3)])
def test_a_wait_is_repeated_after_a_pause_and_not_for_ever(pauses, waits, monkeypatch):
    monkeypatch.setattr(store, "_PAUSE_SECONDS", 0.1)
    sleepy = Sleepy(pauses)
    with pytest.raises(RuntimeError, match="over time"):
        wait_for(sleepy, "key", 0.01)
    assert sleepy.waits == waits
