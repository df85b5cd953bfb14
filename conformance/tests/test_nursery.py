"""The process that forks workers: where they begin, and what is left when one of them, or it, has ended."""

import os
import signal
import subprocess
from pathlib import Path

import machinery_checks as checks
import pytest
from machinery_groups import ROW, SCENARIO, make_group, wait_until_gone

from megastow_conformance import nursery as nurseries
from megastow_conformance import workers
from megastow_conformance.nursery import Nursery
from megastow_conformance.workers import WorkerGroup


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def pair(nursery, monkeypatch):
    monkeypatch.setattr(workers, "nursery", lambda: nursery)
    with make_group(2) as group:
        yield group


def test_workers_are_forked_by_it_while_it_has_one_thread(pair, nursery):
    assert pair.run(checks.passes, SCENARIO).verdict == "passed"
    assert {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pair.pids} == {
        nursery.pid
    }
    assert len(list(Path(f"/proc/{nursery.pid}/task").iterdir())) == 1


def test_a_worker_begins_where_torch_is_imported_and_no_megatron(pair):
    outcome = pair.run(checks.has_imported_torch_only, SCENARIO)
    assert outcome.verdict == "passed", outcome.report()


def test_it_keeps_no_descriptor_of_a_worker_that_has_ended(pair, nursery):
    def count():
        return len(list(Path(f"/proc/{nursery.pid}/fd").iterdir()))

    pair.run(checks.passes, SCENARIO)
    pair.close()
    before = count()
    for _ in range(3):
        pair.run(checks.passes, SCENARIO)
        pair.close()
    assert count() == before


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV])
def test_it_tells_how_a_worker_ended(pair, end):
    pair.run(checks.passes, SCENARIO)
    process = pair._workers[1].process
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.kill(process.pid, end)
    assert process.wait(30) == process.poll() == -end
    process.send_signal(signal.SIGUSR1)  # to nobody


def test_it_takes_its_workers_with_it_and_another_follows(monkeypatch):
    monkeypatch.setattr(nurseries, "_nurseries", {})
    with WorkerGroup(ROW, 1, harness="machinery_harness") as group:
        group.run(checks.passes, SCENARIO)
        first, pids = nurseries.nursery(), group.pids
        os.kill(first.pid, signal.SIGKILL)
        assert not wait_until_gone([first.pid, *pids])
        assert group.run(checks.passes, SCENARIO).verdict == "passed"
        assert nurseries.nursery() is not first
        first.close()
        nurseries.nursery().close()


def test_one_that_has_ended_forks_nothing(tmp_path):
    made = Nursery()
    os.kill(made.pid, signal.SIGKILL)
    assert not wait_until_gone([made.pid])
    with (tmp_path / "log").open("wb") as log, pytest.raises((RuntimeError, BrokenPipeError)):
        made.fork(log.fileno(), log.fileno(), log.fileno(), tmp_path, {})
    made.close()
