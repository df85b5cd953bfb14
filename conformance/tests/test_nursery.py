"""The process that forks workers: where they begin, and what is left when one of them, or it, has ended."""

import os
import signal
import subprocess
import time
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
    monkeypatch.setattr(workers, "nursery", lambda rank: nursery)
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
        first, pids = nurseries.nursery(0), group.pids
        os.kill(first.pid, signal.SIGKILL)
        assert not wait_until_gone([first.pid, *pids])
        assert group.run(checks.passes, SCENARIO).verdict == "passed"
        assert nurseries.nursery(0) is not first
        first.close()
        nurseries.nursery(0).close()


def test_one_that_has_ended_forks_nothing(tmp_path):
    made = Nursery()
    os.kill(made.pid, signal.SIGKILL)
    assert not wait_until_gone([made.pid])
    with (tmp_path / "log").open("wb") as log, pytest.raises(RuntimeError, match="no worker could be forked"):
        made.fork(log.fileno(), log.fileno(), log.fileno(), tmp_path, {})
    made.close()


def test_ranks_that_follow_each_other_have_other_orders_of_sets(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(nurseries, "_nurseries", {})
    with make_group(2) as group:
        for _ in range(2):
            assert group.run(checks.notes_a_hash, SCENARIO, parameters={"folder": str(tmp_path)}).verdict == "passed"
    for rank in (0, 1):
        nurseries.nursery(rank).close()
    zeroth, first = ((tmp_path / f"rank{rank}").read_text().split() for rank in (0, 1))
    assert len({*zeroth}) == len({*first}) == 1
    assert zeroth != first


def test_a_start_that_is_interrupted_leaves_no_answer_to_the_next(monkeypatch, tmp_path):
    monkeypatch.setattr(nurseries, "_nurseries", {})

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with make_group(1) as group:
            signal.setitimer(signal.ITIMER_REAL, 0.3)  # it is importing torch then
            with pytest.raises(KeyboardInterrupt):
                group.run(checks.passes, SCENARIO)
            outcome = group.run(checks.says_pid, SCENARIO, parameters={"folder": str(tmp_path)})
            assert outcome.verdict == "passed", outcome.report()
            assert [path.name for path in tmp_path.iterdir()] == [f"{ROW.id}-0-{pid}" for pid in group.pids]
    finally:
        signal.signal(signal.SIGALRM, before)
        nurseries.nursery(0).close()


def test_a_fork_of_the_test_process_does_not_keep_it(nursery):
    made = Nursery()
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        begin = time.monotonic()
        made.close()
        assert time.monotonic() - begin < 30
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_environment_may_be_large(nursery, tmp_path):
    lifeline, ours = os.pipe()
    with (tmp_path / "log").open("w+b") as log:
        process = nursery.fork(log.fileno(), lifeline, log.fileno(), tmp_path, {"LARGE": "x" * (1 << 20)})
        assert process.wait(30) == 0  # there is nobody to serve
    os.close(lifeline)
    os.close(ours)
