"""The pytest plugin: which tests there are, how their verdicts show, and that nothing is left out in silence."""

from collections import defaultdict

import pytest

from megastow_conformance.scenarios import CORE, SCENARIOS

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
    assert ("toy_distopt", 2) in CORE
    assert ("toy_distopt", 1) not in CORE
    result = suite("-k", "test_passes", rows=("core-0.9.0", "full-0.16.1"))
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(
        [
            "megastow: core-0.9.0 (core), full-0.16.1 (full), on cpu",
            "*test_passes?core-0.9.0-w2-toy_distopt* PASSED*",
            "*test_passes?full-0.16.1-w1-toy_distopt* PASSED*",
        ]
    )


IN_CORE = """
import machinery_checks as checks
import pytest


@pytest.mark.megastow(scenarios=("toy_distopt", "toy_dense_distopt"), worlds=(2,), core="toy_dense_distopt")
def test_in_core(conformance):
    conformance.run(checks.passes)
"""


def test_a_test_may_ask_for_less_in_the_core_scope(suite, pytester):
    assert {("toy_distopt", 2), ("toy_dense_distopt", 2)} <= CORE
    pytester.makepyfile(test_other=IN_CORE)
    result = suite("-k", "test_in_core", rows=("core-0.9.0", "full-0.16.1"))
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        [
            "*test_in_core?core-0.9.0-w2-toy_dense_distopt* PASSED*",
            "*test_in_core?full-0.16.1-w2-toy_distopt* PASSED*",
            "*test_in_core?full-0.16.1-w2-toy_dense_distopt* PASSED*",
        ]
    )


def test_the_command_line_overrides_a_row(suite):
    result = suite("-k", "test_passes", "--megastow-scope=full", "--megastow-world=2", rows=("core-0.9.0",))
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "megastow: core-0.9.0 (full), on cpu",
            "*test_passes?core-0.9.0-w2-toy_distopt* PASSED*",
            "*test_passes?core-0.9.0-w2-gpt_ep2_plainopt* PASSED*",
        ]
    )


def test_what_is_not_tested_is_listed(suite):
    result = suite("-k", "test_without_megatron", rows=("core-0.9.0", "full-0.16.1"))
    result.stdout.fnmatch_lines(["*megastow: declared, not tested*"])
    pairs = {(name, world) for name, scenario in SCENARIOS.items() for world in (1, 2) if world in scenario.worlds}
    left_out = len(pairs - CORE)
    result.stdout.fnmatch_lines(
        [f"core-0.9.0: the scope is 'core': it leaves out {left_out} of {len(pairs)} pairs of*"]
    )
    result.stdout.fnmatch_lines(["core-0.9.0: no hybrid in 0.9.0: toy_hybrid_distopt"])
    result.stdout.fnmatch_lines(["full-0.16.1: no hybrid in 0.16.1: toy_hybrid_distopt"])


def test_what_a_megatron_lacks_is_no_test(suite, pytester):
    pytester.makepyfile(
        test_suite="""
import machinery_checks as checks
import pytest

@pytest.mark.megastow(scenarios=("toy_plainopt", "toy_overlap_plainopt", "toy_hybrid_distopt"), worlds=(1,))
def test_any(conformance):
    conformance.run(checks.passes)

@pytest.mark.megastow(scenarios=("toy_plainopt", "toy_overlap_plainopt"), worlds=(1,), needs={"sharded_checkpoint"})
def test_sharded(conformance):
    conformance.run(checks.passes)
"""
    )
    result = suite()
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines_random(
        [
            "*test_any*-w1-toy_plainopt? PASSED*",
            "*test_any*-w1-toy_overlap_plainopt? PASSED*",
            "*test_sharded*-w1-toy_plainopt? PASSED*",
        ]
    )


def test_a_test_for_which_the_rows_have_no_scenario_is_a_skip_with_a_reason(suite, pytester):
    file = pytester.path / "test_suite.py"
    file.write_text(file.read_text().replace("toy_distopt", "toy_sgd_plainopt"))
    result = suite("-k", "test_skips", "-rs", rows=("core-0.9.0",))
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no scenario of this test is for core-0.9.0*"])


def test_a_run_without_a_row_is_an_error_that_says_how_to_give_one(suite):
    result = suite(rows=())
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*no Megatron was given*", "*--megastow-megatron mcore-0.16=FOLDER"])


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


ROW = ("--megastow-row=full-0.16.1", "--megastow-megatron=full-0.16.1=tree")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--megastow-row=full-9"], "the matrix has no row 'full-9'; it has full-0.16.1, core-0.9.0"),
        (["--megastow-row=core-0.9.0"], "*pass --megastow-megatron core-0.9.0=FOLDER*"),
        (["--megastow-row=core-0.9.0", "--megastow-megatron=core-0.9.0=."], "*holds no package 'megatron'"),
        ([*ROW, "--megastow-row=core-0.9.0", "--megastow-megatron=tree"], "*'tree' is not of the form ID=FOLDER"),
        (["--megastow-row=x", "--megastow-matrix=none.toml"], "cannot read the matrix*"),
        (
            [*ROW, "--megastow-harness=none"],
            "row 'full-0.16.1': no harness 'none': there is no module 'none' to import",
        ),
        ([*ROW, "--megastow-harness=machinery_checks"], "*'machinery_checks' is no harness: it has no function build*"),
        ([*ROW, "--megastow-harness=machinery_harness:x.y"], "*machinery_harness has no 'x'"),
        ([*ROW, "--megastow-world=3"], "no scenario is for 3 ranks"),
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
    [
        ("scenarios='toy_disopt'", "*no such scenario: toy_disopt"),
        ("scenario='x'", "*unknown in its mark: scenario"),
        ("needs={'restor'}", "*no harness says that its Megatron lacks restor"),
    ],
)
def test_a_typo_in_a_mark_is_an_error(suite, pytester, marker, message):
    pytester.makepyfile(
        test_suite=f"import pytest\n\n\n@pytest.mark.megastow({marker})\ndef test_it(conformance):\n    pass\n"
    )
    result = suite()
    assert result.ret != 0
    result.stdout.fnmatch_lines([message])


def test_a_wrong_matrix_is_refused(suite, pytester):
    file = pytester.path / "matrix.toml"
    file.write_text(file.read_text().replace("evidence =", "evidense ="))
    result = suite()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: megastow: *row 'full-0.16.1': missing or unknown: evidence, evidense"])
