"""The pytest plugin: which tests there are, how their verdicts show, and that nothing is left out in silence."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest

from megastow_conformance.rows import CORE_SCENARIOS
from megastow_conformance.scenarios import SCENARIOS

MATRIX = """
[[row]]
id = "full-0.16.1"
adapter = "mcore"
megatron = "0.16.1"
python = "3.11"
evidence = "real"
scope = "full"
tier = 1

[[row]]
id = "core-0.9.0"
adapter = "mcore"
megatron = "0.9.0"
python = "3.11"
evidence = "real"
scope = "core"
tier = 1
"""

SUITE = """
import machinery_checks as checks
import pytest

SOME = ("toy_distopt", "gpt_ep2_plainopt")


@pytest.mark.megastow(scenarios=SOME)
def test_passes(conformance):
    conformance.run(checks.passes)


@pytest.mark.megastow(scenarios="toy_distopt", worlds=(2,))
def test_fails(conformance):
    conformance.run(checks.fails)


@pytest.mark.megastow(scenarios=lambda scenario: scenario.name == "toy_distopt", worlds=(1,), seconds=1)
def test_hangs(conformance):
    conformance.run(checks.hangs)


@pytest.mark.megastow(scenarios=SOME[:1], worlds=(1,))
def test_skips(conformance):
    conformance.run(checks.skips)


@pytest.mark.megastow(scenarios=SOME[:1])
def test_says_pid(conformance):
    conformance.run(checks.says_pid, folder=FOLDER)


def test_without_megatron():
    pass
"""


@pytest.fixture
def suite(pytester, monkeypatch, tmp_path):
    """A small suite with a matrix and folders that stand for two Megatron trees; returns a function that runs it."""
    for name in ("MEGASTOW_MEGATRON", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "machinery"))
    pytester.makefile(".toml", matrix=MATRIX)
    pytester.makepyfile(test_suite=SUITE.replace("FOLDER", repr(str(tmp_path))))
    (pytester.path / "tree" / "megatron").mkdir(parents=True)
    # The plugin is loaded by its entry point when the distribution is installed, and by its name otherwise.
    plugin = "megastow_conformance.plugin"
    known = (ep.value for dist in __import__("importlib.metadata").metadata.distributions() for ep in dist.entry_points)
    load = [] if plugin in known else ["-p", plugin]
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))

    def run(*arguments, rows=("full-0.16.1",)):
        chosen = [f"--megastow-row={row}" for row in rows] + [f"--megastow-megatron={row}=tree" for row in rows]
        return pytester.runpytest_subprocess(
            *load,
            "-v",
            "-p",
            "no:cacheprovider",
            "--megastow-device=cpu",
            "--megastow-harness=machinery_harness",
            *chosen,
            *arguments,
        )

    return run


VERDICTS = [
    "*test_passes*full-0.16.1-w1-toy_distopt* PASSED*",
    "*test_hangs*full-0.16.1-w1-toy_distopt* FAILED*",
    "*test_skips*full-0.16.1-w1-toy_distopt* SKIPPED*this*",
    "*test_passes*full-0.16.1-w2-toy_distopt* PASSED*",
    "*test_passes*full-0.16.1-w2-gpt_ep2_plainopt* PASSED*",
    "*test_fails*full-0.16.1-w2-toy_distopt* FAILED*",
]


def test_each_target_is_a_test_with_a_verdict_and_worker_groups_are_used_one_after_the_other(suite, tmp_path):
    result = suite()
    result.assert_outcomes(passed=6, failed=2, skipped=1)
    lines = [line for line in result.outlines if "::" in line and "%" in line]
    result.stdout.fnmatch_lines_random(["*test_without_megatron PASSED*", *VERDICTS])
    result.stdout.fnmatch_lines(
        ["machinery_checks.fails(toy_distopt): rank * failed: AssertionError: 3 of 7 tensors differ on *"]
    )
    result.stdout.fnmatch_lines(["*rank 0 did not finish, and was killed"])
    assert [("-w1-" in line, "-w2-" in line) for line in lines] == sorted(
        [("-w1-" in line, "-w2-" in line) for line in lines], key=[(False, False), (True, False), (False, True)].index
    )
    # world 1: one group, replaced after the hang; world 2: one group, replaced after the failure
    assert len(list(tmp_path.glob("full-0.16.1-*"))) == 3


def test_it_works_under_xdist(suite):
    pytest.importorskip("xdist")
    result = suite("-n", "2", "--dist", "loadgroup")
    result.assert_outcomes(passed=6, failed=2, skipped=1)
    placed = defaultdict(set)
    for line in result.outlines:
        if line.startswith("[gw") and "[full-" in line:
            placed[line.partition("[full-0.16.1-")[2][:2]].add(line.partition("]")[0])
    assert {group: len(processes) for group, processes in placed.items()} == {"w1": 1, "w2": 1}


def test_several_rows_and_their_scopes(suite):
    result = suite("-k", "test_passes", rows=("core-0.9.0", "full-0.16.1"))
    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(
        [
            "megastow: core-0.9.0 (core), full-0.16.1 (full), on cpu",
            "*test_passes?core-0.9.0-w1-toy_distopt* PASSED*",
            "*test_passes?core-0.9.0-w2-toy_distopt* PASSED*",
            "*test_passes?full-0.16.1-w1-toy_distopt* PASSED*",
        ]
    )


def test_what_is_not_tested_is_listed(suite):
    result = suite("-k", "test_without_megatron", rows=("core-0.9.0", "full-0.16.1"))
    result.stdout.fnmatch_lines(["*megastow: declared, not tested*"])
    left_out = len(SCENARIOS) - len(CORE_SCENARIOS)
    result.stdout.fnmatch_lines([f"core-0.9.0: the row's scope is 'core': {left_out} of {len(SCENARIOS)} scenarios"])
    for name, scenario in SCENARIOS.items():
        if reason := scenario.unsupported_on("0.16.1", "cpu"):
            result.stdout.fnmatch_lines([f"full-0.16.1: {reason}: *{name}*"])


def test_a_test_for_which_the_rows_have_no_scenario_is_a_skip_with_a_reason(suite, pytester):
    pytester.makepyfile(test_suite=SUITE.replace("toy_distopt", "toy_sgd_plainopt").replace("FOLDER", "'.'"))
    result = suite("-k", "test_skips", "-rs", rows=("core-0.9.0",))
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no scenario of this test is for core-0.9.0*"])


def test_a_run_without_a_row_is_an_error_that_says_how_to_give_one(suite):
    result = suite(rows=())
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*no Megatron was given*", "*--megastow-megatron mcore-0.16.1=FOLDER"])


def test_a_world_that_is_larger_than_the_machine_is_a_skip_with_its_reason(suite, pytester):
    pytester.makeconftest("import megastow_conformance.plugin as plugin\n\nplugin._count_gpus = lambda: 1\n")
    result = suite("-k", "w2 and test_passes", "-rs", "--megastow-device=auto")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines(["megastow: full-0.16.1 (full), on cuda", "*2 ranks need 2 GPUs, and there are 1*"])


def test_a_gpu_that_is_asked_for_must_be_there(suite, pytester):
    pytester.makeconftest("import megastow_conformance.plugin as plugin\n\nplugin._count_gpus = lambda: 0\n")
    result = suite("--megastow-device=cuda")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: megastow: --megastow-device cuda, but torch sees no CUDA device"])


def test_core_scenarios_exist():
    assert not CORE_SCENARIOS - SCENARIOS.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--megastow-row=full-9"], "the matrix has no row 'full-9'; it has full-0.16.1, core-0.9.0"),
        (["--megastow-row=core-0.9.0"], "*pass --megastow-megatron core-0.9.0=FOLDER*"),
        (["--megastow-row=core-0.9.0", "--megastow-megatron=core-0.9.0=."], "*holds no package 'megatron'"),
        (["--megastow-row=core-0.9.0", "--megastow-megatron=core-0.9.0"], "*not of the form ID=FOLDER"),
        (["--megastow-row=x", "--megastow-matrix=none.toml"], "cannot read the matrix*"),
    ],
)
def test_a_wrong_command_line_is_refused(suite, arguments, message):
    result = suite(*arguments, rows=())
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: megastow: {message}"])


def test_a_tree_can_come_from_the_environment(suite, monkeypatch):
    monkeypatch.setenv("MEGASTOW_MEGATRON", "full-0.16.1=tree:core-0.9.0=tree")
    result = suite("-k", "test_without_megatron", "--megastow-row=core-0.9.0", rows=())
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("marker", "message"),
    [("scenarios='toy_disopt'", "*no such scenario: toy_disopt"), ("scenario='x'", "*unknown in its mark: scenario")],
)
def test_a_typo_in_a_mark_is_an_error(suite, pytester, marker, message):
    pytester.makepyfile(
        test_suite=f"import pytest\n\n\n@pytest.mark.megastow({marker})\ndef test_it(conformance):\n    pass\n"
    )
    result = suite()
    assert result.ret != 0
    result.stdout.fnmatch_lines([message])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tier = 1", "tier = '1'"), "*tier must be of type int, not '1'"),
        (('scope = "core"', "scope = 'most'"), "*scope must be one of full, core, not 'most'"),
        (("evidence =", "evidense ="), "*row 'full-0.16.1': missing or unknown: evidence, evidense"),
        (("core-0.9.0", "full-0.16.1"), "*two rows have the id 'full-0.16.1'"),
        (("[[row]]", "[[rows]]"), "*there is no ??row?? in it"),
    ],
)
def test_a_wrong_matrix_is_refused(suite, pytester, change, message):
    pytester.makefile(".toml", matrix=MATRIX.replace(*change))
    result = suite()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: megastow: {message}"])
