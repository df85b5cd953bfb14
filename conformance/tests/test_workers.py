"""The worker processes: whatever a check does, the test process gets a verdict, soon, and no process is left over."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import machinery_checks as checks
import pytest
from machinery_groups import SCENARIO, gone, make_group, wait_until_gone


@pytest.fixture(scope="module", params=[1, 2], ids=["w1", "w2"])
def shared(request):
    with make_group(request.param) as group:
        yield group


@pytest.fixture(scope="module")
def pair():
    with make_group(2) as group:
        yield group


def test_a_check_passes_on_every_rank(shared):
    outcome = shared.run(checks.passes, SCENARIO)
    assert outcome.verdict == "passed", outcome.report()
    assert len(outcome.ranks) == shared.world


def test_workers_stay_alive_between_checks(shared, tmp_path):
    shared.run(checks.passes, SCENARIO)
    before = shared.pids
    outcome = shared.run(checks.says_pid, SCENARIO, parameters={"folder": str(tmp_path)})
    assert outcome.verdict == "passed", outcome.report()
    assert shared.pids == before
    assert {path.name for path in tmp_path.iterdir()} == {f"none-1.0-{rank}-{pid}" for rank, pid in enumerate(before)}


def test_workers_have_one_thread_and_the_same_module_path(shared):
    outcome = shared.run(checks.checks_environment, SCENARIO)
    assert outcome.verdict == "passed", outcome.report()


def test_a_failure_shows_the_traceback_and_ends_the_group(shared):
    shared.run(checks.passes, SCENARIO)
    before = shared.pids
    outcome = shared.run(checks.fails, SCENARIO)
    assert outcome.verdict == "failed"
    report = outcome.report()
    assert re.match(r"machinery_checks.fails\(toy_distopt\): rank \d failed: AssertionError: 3 of 7 tensors", report)
    for rank in range(shared.world):
        assert f"AssertionError: 3 of 7 tensors differ on rank {rank}" in report
    assert "worker.py" not in report
    assert not wait_until_gone(before)
    assert shared.run(checks.passes, SCENARIO).verdict == "passed"
    assert not set(before) & set(shared.pids)


def test_a_skip_has_its_reason_and_closes_what_was_built(shared):
    outcome = shared.run(checks.skips, SCENARIO)
    assert (outcome.verdict, outcome.report()) == ("skipped", "this release has no such thing")
    before = shared.pids
    outcome = shared.run(checks.builds_and_skips, SCENARIO)
    assert (outcome.verdict, shared.pids) == ("skipped", before)
    assert "trainer closed" in outcome.ranks[0].log


def test_a_skip_on_one_rank_only_is_a_failure(pair):
    outcome = pair.run(checks.one_rank_skips, SCENARIO)
    assert outcome.verdict == "failed"
    assert "rank 1 skipped\nonly here" in outcome.report()


def test_a_crash_names_signal_rank_and_last_output(shared):
    outcome = shared.run(checks.segfaults, SCENARIO)
    assert outcome.verdict == "failed"
    report = outcome.report()
    assert report.startswith("machinery_checks.segfaults(toy_distopt): rank ")
    assert "rank 0 crashed\nthe process was ended by SIGSEGV" in report
    assert "about to read address 0" in report
    assert "in segfaults" in report  # faulthandler's stack
    assert shared.run(checks.passes, SCENARIO).verdict == "passed"


def test_a_worker_that_ends_itself_is_a_failure(shared):
    outcome = shared.run(checks.exits, SCENARIO)
    assert outcome.verdict == "failed"
    assert "the process ended with exit status 3" in outcome.report()


@pytest.mark.parametrize("check", [checks.sys_exits, checks.raises_eof])
def test_no_exception_of_a_check_is_mistaken_for_the_end_of_the_protocol(pair, check):
    outcome = pair.run(check, SCENARIO)
    assert [rank.end for rank in outcome.ranks] == ["failed", "failed"], outcome.report()


@pytest.mark.parametrize("check", [checks.hangs, checks.hangs_in_c])
def test_a_hang_is_a_failure_with_stacks(shared, check):
    shared.run(checks.passes, SCENARIO)
    before = shared.pids
    begin = time.monotonic()
    outcome = shared.run(check, SCENARIO, seconds=1.0)
    assert time.monotonic() - begin < 30
    assert outcome.verdict == "failed"
    report = outcome.report()
    for rank in range(shared.world):
        assert f"rank {rank} did not finish, and was killed\nno answer within 1 s" in report
        assert f"--- stacks of rank {rank} ---" in report
    assert f"in {check.__name__}" in report
    assert not wait_until_gone(before)


@pytest.mark.parametrize(
    ("check", "telling"),
    [
        (checks.rank_1_raises, "ValueError: rank 1 has had enough"),
        (checks.rank_1_segfaults, "the process was ended by SIGSEGV"),
    ],
)
def test_a_failure_on_one_rank_is_told_promptly_though_another_waits(pair, check, telling):
    pair.run(checks.passes, SCENARIO)
    begin = time.monotonic()
    outcome = pair.run(check, SCENARIO)
    assert time.monotonic() - begin < 30
    assert outcome.verdict == "failed"
    assert outcome.ranks[0].rank == 1
    assert telling in outcome.ranks[0].report()
    other = outcome.ranks[1]
    assert (other.rank, other.end) in ((0, "waiting"), (0, "failed"))
    if other.end == "waiting":
        assert check.__name__ in other.stacks


def test_what_a_check_built_is_closed_the_last_thing_first(pair):
    outcome = pair.run(checks.builds, SCENARIO)
    assert outcome.verdict == "passed", outcome.report()
    assert outcome.ranks[0].log.splitlines() == ["after the trainer", "trainer closed", "before the trainer"]


def test_a_failure_to_close_is_a_failure(pair):
    outcome = pair.run(checks.fails_to_close, SCENARIO)
    assert outcome.verdict == "failed"
    assert "RuntimeError: a hook is left" in outcome.report()


def test_a_failure_shows_its_own_last_output_only(pair):
    pair.run(checks.chatters, SCENARIO, parameters={"text": "of an earlier check"})
    report = pair.run(checks.chatters_and_fails, SCENARIO).report()
    assert "of an earlier check" not in report
    assert "line 199" in report
    assert "line 139\n" not in report
    assert "... 140 lines before these ..." in report


def test_a_parameter_shows_in_the_report(pair):
    outcome = pair.run(checks.fails, SCENARIO, parameters={"kind": "weights"})
    assert outcome.verdict == "failed"
    assert "machinery_checks.fails(toy_distopt, kind='weights')" in outcome.report()
    assert "TypeError" in outcome.report()


SUBJECT = "machinery_checks:subject"


def test_a_check_is_given_the_subject_of_its_group_or_of_its_request(shared):
    outcome = shared.run(checks.asks_the_subject, SCENARIO, subject=SUBJECT)
    assert outcome.verdict == "passed", outcome.report()
    assert outcome.ranks[0].log.splitlines()[-2:] == ["manager closed", "trainer closed"]
    with make_group(1, subject=SUBJECT) as group:
        outcome = group.run(checks.asks_the_subject, SCENARIO)
        assert outcome.verdict == "passed", outcome.report()


@pytest.mark.parametrize(
    ("subject", "complaint"),
    [
        ("machinery_checks", "'machinery_checks' is not of the form module:name"),
        ("no_such_module:subject", "No module named 'no_such_module'"),
        ("machinery_checks:nothing", "has no attribute 'nothing'"),
    ],
)
def test_a_subject_that_is_not_there_is_a_failure(shared, subject, complaint):
    outcome = shared.run(checks.passes, SCENARIO, subject=subject)
    assert outcome.verdict == "failed"
    assert complaint in outcome.reason
    assert outcome.report().startswith(f"machinery_checks.passes(toy_distopt) of {subject}: rank ")


def test_a_lasting_group_survives_a_failure_and_no_crash():
    with make_group(1, lasting=True) as group:
        outcome = group.run(checks.builds_and_fails, SCENARIO)
        assert (outcome.verdict, outcome.reason) == ("failed", "AssertionError: after building")
        before = group.pids
        outcome = group.run(checks.passes, SCENARIO)
        assert (outcome.verdict, group.pids) == ("passed", before)
        assert group.run(checks.segfaults, SCENARIO).verdict == "failed"
        assert group.pids == []
        assert group.run(checks.passes, SCENARIO).verdict == "passed"


def test_only_a_group_of_one_rank_may_last():
    with pytest.raises(ValueError, match="2 ranks"):
        make_group(2, lasting=True)


def test_a_group_that_cannot_start_is_a_failure():
    with make_group(2, harness="broken_harness") as group:
        outcome = group.run(checks.passes, SCENARIO)
        assert outcome.verdict == "failed"
        assert outcome.report().startswith("start of none-1.0 with 2 rank(s): rank ")
        assert re.search("RuntimeError: no network for rank [01]", outcome.report())  # whichever was first
        assert group.pids == []


def test_a_worker_that_died_between_checks_is_replaced(pair):
    pair.run(checks.passes, SCENARIO)
    before = pair.pids
    os.kill(before[1], signal.SIGKILL)
    pair._workers[1].process.wait()  # not only its first thread is gone
    outcome = pair.run(checks.passes, SCENARIO)
    assert outcome.verdict == "passed", outcome.report()
    assert not set(before) & set(pair.pids)


def test_an_interrupt_ends_the_group(monkeypatch):
    with make_group(1) as group:
        group.run(checks.passes, SCENARIO)
        before = group.pids

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("megastow_conformance.workers.wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            group.run(checks.hangs, SCENARIO)
        assert not wait_until_gone(before)


def test_close_leaves_no_process_and_no_file():
    group = make_group(2)
    group.run(checks.passes, SCENARIO)
    pids, folder = group.pids, group._folder
    group.close()
    assert not wait_until_gone(pids)
    assert not folder.exists()
    group.close()  # again, which does nothing


@pytest.mark.parametrize("check", ["hangs", "hangs_in_c"])
def test_workers_die_with_a_test_process_that_is_killed(check, tmp_path):
    script = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = {sys.path!r}
        import machinery_checks
        from megastow_conformance.rows import Row
        from megastow_conformance.scenarios import SCENARIOS
        from megastow_conformance.workers import WorkerGroup

        group = WorkerGroup(Row("r", "a", "1"), 2, harness="machinery_harness")
        group.run(machinery_checks.passes, SCENARIOS["toy_distopt"])
        print(*group.pids, flush=True)
        group.run(machinery_checks.{check}, SCENARIOS["toy_distopt"])
        """
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
        time.sleep(0.5)
        parent.kill()
    left = wait_until_gone(pids)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
