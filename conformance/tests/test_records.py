"""What a run leaves behind: its report, and the comparison of what was left out with what is declared."""

import json
import os
import shutil
import subprocess

import pytest

from megastow_conformance import report, skips
from megastow_conformance.marks import read_mark, suite_marks
from megastow_conformance.recorder import Result
from megastow_conformance.revision import find_revision
from megastow_conformance.rows import Row
from megastow_conformance.scenarios import SCENARIOS

ROW = Row("one", "a", "1.0", harness="machinery_harness")


def result(test, where="w1-toy_distopt", verdict="passed", detail="", began=True, row="one"):
    world, _, scenario = where.partition("-")
    return Result(row, test, int(world[1:]), scenario, verdict, detail, began, 1.0)


# --- declared skips ---


def test_what_a_harness_lacks_is_declared_by_reason_and_device():
    marks = {
        "test_any": read_mark({}),
        "test_sharded": read_mark({"needs": {"sharded_checkpoint"}, "scenarios": lambda s: s.model == "gpt"}),
    }
    assert skips.static_skips(ROW, marks) == {
        "cpu": {
            "no hybrid in 1.0": {"not trained": ["toy_hybrid_distopt"]},
            "shards do not overlap": {"not tested": {"test_sharded": ["gpt_overlap_distopt", "gpt_overlap_plainopt"]}},
        }
    }


def test_the_marks_of_the_suite_are_found():
    marks = suite_marks()
    assert {report.invariant(test) for test in marks} == set(report.INVARIANTS)
    assert marks["test_checkpoint_sharded"].needs == {"sharded_checkpoint"}
    assert not any(marks["test_checkpoint_sharded"].wanted(s) for s in SCENARIOS.values() if s.model == "toy")


def test_a_difference_from_what_is_declared_is_told_in_both_directions():
    declared = {"one": skips.static_skips(ROW)}
    assert skips.static_differences(declared, [ROW]) == []
    declared["one"]["cpu"]["it is cold"] = {"not trained": ["gpt_distopt"]}
    (gone,) = skips.static_differences(declared, [ROW])
    assert "'it is cold': declared" in gone
    assert gone.endswith("now nothing")
    del declared["one"]["cpu"]["it is cold"], declared["one"]["cpu"]["no hybrid in 1.0"]
    (new,) = skips.static_differences(declared, [ROW])
    assert "'no hybrid in 1.0': declared nothing, now" in new


def test_skips_at_run_time_are_compared_in_both_directions():
    declared = {"one": {skips.AT_RUN_TIME: {"cpu": {"test_a": {"too cold": ["w1-toy_distopt"]}}}}}
    skipped = result("test_a", verdict="skipped", detail="too cold")
    assert skips.run_differences(declared, "cpu", [skipped]) == []
    assert skips.run_differences(declared, "cpu", []) == []  # it did not run
    assert skips.run_differences(declared, "cpu", [result("test_a", verdict="failed", detail="x")]) == []
    (other,) = skips.run_differences(declared, "cpu", [result("test_a", verdict="skipped", detail="too warm")])
    assert other == "one: test_a on w1-toy_distopt was skipped, which is not declared: too warm"
    (stale,) = skips.run_differences(declared, "cpu", [result("test_a")])
    assert stale == "one: test_a on w1-toy_distopt passed, but is declared as skipped: too cold"
    assert len(skips.run_differences(declared, "cuda", [skipped])) == 1
    machine = result("test_a", "w2-toy_distopt", verdict="skipped", detail="2 ranks need 2 GPUs", began=False)
    assert skips.run_differences({}, "cuda", [machine, result("test_b")]) == []
    assert skips.run_differences({}, "cuda", [machine]) == ["not one check was started"]


def test_an_update_keeps_what_did_not_run():
    declared = {"one": {skips.AT_RUN_TIME: {"cpu": {"test_a": {"x": ["w1-toy_distopt", "w2-toy_distopt"]}}}}, "two": {}}
    results = [result("test_a"), result("test_b", verdict="skipped", detail="y"), result("test_a", row="two")]
    updated = skips.updated(declared, [ROW], "cpu", results)
    assert updated["one"][skips.AT_RUN_TIME] == {
        "cpu": {"test_a": {"x": ["w2-toy_distopt"]}, "test_b": {"y": ["w1-toy_distopt"]}}
    }
    assert updated["two"] == {}
    assert skips.static_differences(updated, [ROW]) == []


@pytest.mark.parametrize("parallel", [(), ("-n", "2", "--dist", "loadgroup")], ids=["alone", "xdist"])
def test_a_run_fails_unless_what_it_leaves_out_is_declared(suite, pytester, parallel):
    if parallel:
        pytest.importorskip("xdist")
    chosen = ("-k", "test_skips or (test_passes and w1)", "--megastow-skips=skips.json", *parallel)
    file = pytester.path / "skips.json"
    file.write_text(json.dumps({"full-0.16.1": skips.static_skips(Row("r", "a", "0.16.1", harness=ROW.harness))}))
    failed = suite(*chosen)
    failed.assert_outcomes(passed=1, skipped=1)
    assert failed.ret == pytest.ExitCode.TESTS_FAILED
    failed.stdout.fnmatch_lines(
        [
            "*skips.json says otherwise*",
            "full-0.16.1: test_skips on w1-toy_distopt was skipped, *not declared: this release*",
        ]
    )
    if parallel:
        return  # from here on it is all the same
    assert suite(*chosen, "--megastow-update-skips").ret == pytest.ExitCode.OK
    assert suite(*chosen).ret == pytest.ExitCode.OK
    file.write_text(file.read_text().replace("test_skips", "test_passes"))
    stale = suite(*chosen)
    assert stale.ret == pytest.ExitCode.TESTS_FAILED
    stale.stdout.fnmatch_lines(["*test_passes on w1-toy_distopt passed, but is declared as skipped: this release*"])


# --- the report ---


def test_a_report_has_the_verdict_of_every_invariant_and_no_folder_of_the_machine(suite, pytester):
    pytest.importorskip("xdist")
    suite("-n", "2", "--dist", "loadgroup", "--megastow-report", str(pytester.path / "out" / "report.json"))
    file = pytester.path / "out" / "report.json"
    assert str(pytester.path) not in file.read_text()
    (run,) = report.read_report(file)
    assert (run["row"], run["adapter"], run["evidence"], run["scope"]) == ("full-0.16.1", "mcore", "real", "full")
    assert run["megatron"] == {"release": "0.16.1", "states": None, "path": None}
    assert run["versions"]["torch"]
    assert run["device"]["type"] == "cpu"
    assert "--megastow-report out/report.json" in run["command"]
    assert run["tests"] == {"passed": 5, "skipped": 1, "failed": 2}
    assert run["verdicts"] == [
        {"invariants": ["fails"], "failed": {"2": ["toy_distopt"]}},
        {"invariants": ["hangs"], "failed": {"1": ["toy_distopt"]}},
        {"invariants": ["passes"], "passed": {"1": ["toy_distopt"], "2": ["toy_distopt", "gpt_ep2_plainopt"]}},
        {"invariants": ["says"], "passed": {"1": ["toy_distopt"], "2": ["toy_distopt"]}},
        {"invariants": ["skips"], "skipped": {"1": ["toy_distopt"]}},
    ]
    why = {entry["test"]: (entry["on"], entry["verdict"], entry["why"]) for entry in run["not_passed"]}
    assert why.keys() == {"test_fails", "test_hangs", "test_skips"}
    assert why["test_skips"] == ("w1-toy_distopt", "skipped", "this release has no such thing")
    assert "3 of 7 tensors differ" in why["test_fails"][2]
    assert run["not_trained"] == {"no hybrid in 0.16.1": ["toy_hybrid_distopt"]}


def test_an_invariant_holds_where_all_of_its_tests_do():
    verdicts = report._verdicts(
        [
            result("test_training"),
            result("test_training_every_point", verdict="failed", detail="x"),
            result("test_training", "w2-toy_distopt"),
            result("test_checkpoint"),
            result("test_checkpoint_sharded", verdict="skipped", detail="y"),
            result("test_checkpoint_sharded", "w2-toy_distopt", verdict="skipped", detail="y"),
            result("test_host"),
            result("test_peak"),
        ]
    )
    assert verdicts["verdicts"] == [
        {"invariants": ["training"], "failed": {"1": ["toy_distopt"]}, "passed": {"2": ["toy_distopt"]}},
        {"invariants": ["peak", "host"], "passed": {"1": ["toy_distopt"]}},
        {"invariants": ["checkpoint"], "passed": {"1": ["toy_distopt"]}, "skipped": {"2": ["toy_distopt"]}},
    ]
    assert report.holding(verdicts) == ["peak", "host", "checkpoint"]
    assert report.tested(verdicts) == {("toy_distopt", 1), ("toy_distopt", 2)}
    assert verdicts["tests"] == {"passed": 5, "skipped": 2, "failed": 1}
    assert verdicts["seconds"] == 8.0


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 0, "runs": []}'])
def test_what_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(report.ReportError, match=r"x\.json"):
        report.read_report(tmp_path / "x.json")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_report_says_of_which_commit_it_is(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # as in a hook of git
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # somebody may sign all commits
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "report.py").touch()
    file = str(tmp_path / "report.py")
    assert find_revision(file) is None  # no repository
    subprocess.run([*git, "init", "-q"], check=True)
    assert find_revision(file) is None  # lies in one, and is no part of it
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert find_revision(file) == head[:12]
    (tmp_path / "report.py").write_text("changed")
    assert find_revision(file) == f"{head[:12]}-dirty"
    monkeypatch.setenv("PATH", "")
    assert find_revision(file) is None  # git cannot be found
