"""The suite in the hands of somebody with an adapter and a Megatron of their own: no matrix, one function to write."""

import json
import re
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "third_party"
TEMPLATE = Path(__file__).parents[2] / "adapters" / "_template"


@pytest.fixture
def suite(pytester, monkeypatch):
    """Runs the suite on an adapter in a folder with nobody's matrix."""
    for name in ("MEGASTOW_MEGATRON", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)

    def run(adapter, *arguments):
        return pytester.runpytest_subprocess(
            *("--pyargs", "megastow_conformance", "-p", "no:cacheprovider", "-v"),
            *("--megastow-adapter", adapter, "--megastow-device", "cpu", *arguments),
        )

    return run


@pytest.fixture
def run(suite, pytester):
    """Runs the suite in a folder with the files of the third party, whose distribution is installed there."""
    for file in HERE.glob("*.py"):
        shutil.copy(file, pytester.path)
    pretend_installed(pytester.path, "tiny", "1.5", "tiny = tiny:ADAPTER")
    return lambda *arguments, tests: suite("tiny", "-k", tests, *arguments)


def pretend_installed(folder, name, version, entry_point):
    """Put beside a package what pip would write about its distribution."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[megastow.adapters]\n{entry_point}\n")


def test_one_function_is_enough_to_run_invariants_on_one_and_two_ranks(run, pytester):
    tests = "(test_bitexact or test_identity or test_released or test_grads) and toy_plainopt"
    result = run("--megastow-harness", "tiny_harness:build", "--megastow-report", "report.json", tests=tests)
    result.assert_outcomes(passed=12, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["megastow: tiny (full), on cpu", "*test_bitexact?tiny-w2-toy_plainopt? PASSED*"])
    report = (pytester.path / "report.json").read_text()
    assert str(pytester.path) not in report
    (run_,) = json.loads(report)["runs"]
    assert (run_["row"], run_["adapter"], run_["evidence"]) == ("tiny", "tiny", "real")
    assert run_["versions"]["adapter"] == "1.5"
    assert run_["tests"] == {"passed": 12, "skipped": 0, "failed": 0}
    assert run_["verdicts"] == [
        {
            "invariants": ["bitexact", "identity", "released", "grads"],
            "passed": {"1": ["toy_plainopt"], "2": ["toy_plainopt"]},
        }
    ]


def test_a_class_says_what_is_lacking_and_a_folder_holds_the_megatron(run, pytester):
    core = pytester.path / "fork" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 7\nMINOR = 5\n__version__ = f'{MAJOR}.{MINOR}'\n")
    result = run(
        *("--megastow-harness", "tiny_harness:TinyHarness", "--megatron-path", "fork", "--megastow-evidence=double"),
        *("--megastow-report", "report.json"),
        tests="test_grads and w1-toy_experts",
    )
    assert result.parseoutcomes()["passed"] == 1  # toy_experts_distopt is no test
    result.stdout.fnmatch_lines(["tiny: Megatron 7.5 on cpu is tiny: toy_distopt, *gpt_distopt*"])
    (run_,) = json.loads((pytester.path / "report.json").read_text())["runs"]
    assert run_["evidence"] == "double"
    assert run_["megatron"] == {"release": "7.5", "states": "7.5", "path": "fork/megatron"}


def test_a_folder_without_megatron_is_refused(run, pytester):
    result = run("--megastow-harness", "tiny_harness", "--megatron-path", ".", tests="test_grads")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: megastow: row 'tiny': {pytester.path} holds no package 'megatron'"])


def test_the_default_harness_says_that_it_does_not_know_an_unknown_megatron(run):
    result = run(tests="test_grads")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: megastow: row 'tiny': *megatron_core knows no Megatron 'unknown': *"])


def test_the_template_is_green_as_it_stands(suite, pytester, monkeypatch):
    shutil.copytree(TEMPLATE, pytester.path, dirs_exist_ok=True)
    sources = pytester.path / "src"
    declared = re.search(r'^acme = "(.+)"$', (TEMPLATE / "pyproject.toml").read_text(), re.MULTILINE)
    pretend_installed(sources, "megastow_acme", "0.1.0", f"acme = {declared[1]}")
    monkeypatch.setenv("PYTHONPATH", str(sources))
    result = suite("acme", "--megastow-harness", "acme_harness", "--megatron-path", "fork", "--megastow-scope", "core")
    outcomes = result.parseoutcomes()
    assert result.ret == pytest.ExitCode.OK, outcomes
    assert outcomes["passed"] > 20
    result.stdout.fnmatch_lines(["acme: this fork has one optimizer*", "acme: the template trains the suite's toy*"])
