"""Worker groups without Megatron, and whether their processes are gone."""

import time
from pathlib import Path

from megastow_conformance.rows import Row
from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup

ROW = Row("none-1.0", "none", "1.0")
SCENARIO = SCENARIOS["toy_distopt"]


def make_group(world, **options):
    return WorkerGroup(ROW, world, **{"harness": "machinery_harness", "device": "cpu", "grace_seconds": 2.0} | options)


def gone(pid):
    """Whether a process is gone, or only waits for somebody to ask for its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pids, seconds=30.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(gone(pid) for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if not gone(pid)]
