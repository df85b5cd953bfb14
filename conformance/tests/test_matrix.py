"""Reading the matrix, and what rows, scenarios and harnesses say to each other; no process is started here."""

import sys
from types import SimpleNamespace

import pytest
import real_megatron

from megastow_conformance import harness
from megastow_conformance.marks import suite_marks
from megastow_conformance.plan import lacks_of
from megastow_conformance.rows import DOUBLES, MatrixError, Row, parse_trees, read_matrix, select_rows
from megastow_conformance.scenarios import BRIEF, CORE, SCENARIOS, WORDS, reason_against, unknown_words

MATRIX = """
[default]
harness = "h"
source = "tree"
python = "3.11"
torch = "2.13.0"
image = "nvcr.io/nvidia/pytorch:25.11-py3"
device = "any"
evidence = "real"
scope = "core"
ci = false

[[row]]
id = "one"
adapter = "a"
megatron = "1.0"

[[row]]
id = "two"
adapter = "a"
megatron = "d"
source = "double"
scope = "full"
ci = true
"""


@pytest.fixture
def matrix(tmp_path):
    def write(text):
        (tmp_path / "matrix.toml").write_text(text)
        return tmp_path / "matrix.toml"

    return write


def test_rows_take_what_they_do_not_say_from_the_defaults(matrix):
    rows = read_matrix(matrix(MATRIX))
    assert list(rows) == ["one", "two"]
    assert rows["one"] == Row(
        "one",
        "a",
        "1.0",
        harness="h",
        source="tree",
        python="3.11",
        torch="2.13.0",
        image="nvcr.io/nvidia/pytorch:25.11-py3",
        scope="core",
    )
    assert (rows["two"].scope, rows["two"].ci, rows["two"].source) == ("full", True, "double")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ci = false", "ci = 'no'"), "ci must be of type bool, not 'no'"),
        (('megatron = "1.0"', "megatron = 1.0"), "megatron must be of type str, not 1.0"),
        (('source = "double"', "source = 'git'"), "source must be one of pypi, double, tree, not 'git'"),
        (('scope = "full"', "scope = 'most'"), "scope must be one of full, core, brief, not 'most'"),
        (('device = "any"', "device = 'gpu'"), "device must be one of any, cuda, not 'gpu'"),
        (('evidence = "real"', "evidence = 'good'"), "evidence must be one of real, double, not 'good'"),
        (("evidence =", "evidense ="), "row 'one': missing or unknown: evidence, evidense"),
        (('"two"', '"one"'), "two rows have the id 'one'"),
        (("[default]", "[defaults]"), "unknown: defaults"),
        (("[[row]]", "#"), "there is no \\[\\[row\\]\\] in it"),
        (("[default]", "[default"), "matrix.toml: "),
    ],
)
def test_a_wrong_matrix_is_refused(matrix, change, message):
    before, after = change
    text = MATRIX.partition(before)[0] if before == "[[row]]" else MATRIX.replace(before, after)
    with pytest.raises(MatrixError, match=message):
        read_matrix(matrix(text))


def test_a_double_is_found_without_being_given_and_any_row_can_be_given(matrix, tmp_path):
    rows = read_matrix(matrix(MATRIX))
    (tmp_path / "megatron").mkdir()
    with pytest.raises(MatrixError, match=f"row 'two': {DOUBLES}/d holds no package 'megatron'"):
        select_rows(rows, ["two"], {})
    with pytest.raises(MatrixError, match=r"row 'one' needs to know where Megatron 1\.0 is"):
        select_rows(rows, ["one"], {})
    found = select_rows(rows, ["two", "one", "two"], parse_trees([f"one={tmp_path}", f"two={tmp_path}"]))
    assert [(row.id, row.path) for row in found] == [("two", tmp_path), ("one", tmp_path)]


def test_the_core_is_of_scenarios_on_worlds_that_they_are_for():
    assert all(world in SCENARIOS[name].worlds and world in (1, 2) for name, world in CORE)


def test_the_core_reaches_every_kind_of_state_with_and_without_a_language_model():
    everywhere = ("distributed_optimizer", "experts", "virtual_pipeline", "overlap", "bf16_grads", "fp16")
    for word in (*everywhere, "fp32_params", "fp32_model", "frozen", "tied", "mixed_chain"):
        assert any({word} <= SCENARIOS[name].needs and "gpt" not in SCENARIOS[name].needs for name, _ in CORE), word
    for word in ("gpt", "expert_parallel", "tensor_parallel"):
        assert any(word in SCENARIOS[name].needs for name, _ in CORE), word
    by_optimizer = {(SCENARIOS[name].distributed_optimizer, world) for name, world in CORE}
    assert by_optimizer == {(True, 1), (True, 2), (False, 1), (False, 2)}


def test_the_brief_scope_is_a_part_of_the_core_with_both_optimizers_experts_and_ranks():
    assert BRIEF < CORE
    assert {(SCENARIOS[name].distributed_optimizer, world) for name, world in BRIEF} >= {(True, 2), (False, 1)}
    for word in ("experts", "mixed_chain", "gpt", "expert_parallel"):
        assert any(word in SCENARIOS[name].needs for name, _ in BRIEF), word


def test_brief_rows_of_ci_are_followed_by_a_row_with_the_core():
    for adapter in {row.adapter for row in CI_ROWS.values()}:
        assert [row.scope for row in CI_ROWS.values() if row.adapter == adapter][-1] == "core", adapter


CI_ROWS = {row_id: row for row_id, row in read_matrix(real_megatron.MATRIX).items() if row.ci}


@pytest.mark.parametrize("row", CI_ROWS.values(), ids=CI_ROWS)
def test_what_a_test_asks_for_in_the_core_scope_is_trained_by_each_row_of_ci(row):
    lacks = lacks_of(row, "cpu")
    pairs = [(SCENARIOS[name], world) for name, world in CORE if row.includes(name, world)]
    trained = [(scenario, world) for scenario, world in pairs if not reason_against(lacks, scenario.needs)]
    for test, mark in suite_marks().items():
        if not all(mark.in_core(scenario) for scenario in SCENARIOS.values()):
            worlds = mark.worlds or (1, 2)
            assert any(mark.wanted(s) and mark.in_core(s) and world in worlds for s, world in trained), test


def test_every_word_is_needed_by_a_scenario_or_known_to_be_asked_for_by_checks():
    needed = frozenset().union(*(scenario.needs for scenario in SCENARIOS.values()))
    asked_for = frozenset().union(*(mark.needs for mark in suite_marks().values()))
    assert needed | asked_for == WORDS
    assert not needed & asked_for


def test_scenarios_differ_in_more_than_their_names():
    setups = {tuple(v for k, v in vars(s).items() if k not in ("name", "summary")) for s in SCENARIOS.values()}
    assert len(setups) == len(SCENARIOS)


def test_words_joined_by_plus_must_all_be_needed():
    lacks = {"gpt": "no language model", "restore+hybrid": "not together"}
    assert reason_against(lacks, {"gpt", "tied"}) == "no language model"
    assert reason_against(lacks, {"hybrid"}) is None
    assert reason_against(lacks, {"hybrid", "restore"}) == "not together"
    assert unknown_words({"gpt+hybird": "x", "restore": "y"}) == ["hybird"]


class Family:
    """A harness as a class: only what it must have, and lacks."""

    def build(self, scenario):
        return scenario.name

    def lacks(self, version, device):
        if version == "odd":
            return {"quantum": "none"}
        if version == "bad":
            raise ValueError("not a version")
        return {"gpt": f"none in {version} on {device}"}


def build_something(scenario):
    return f"{scenario.name} by a function"


FAMILY = Family()


@pytest.mark.parametrize("attribute", ["Family", "FAMILY"])
def test_a_harness_is_a_class_or_an_object_with_one_function(attribute):
    found = harness.find(f"{__name__}:{attribute}")
    assert found.build(SCENARIOS["gpt_distopt"]) == "gpt_distopt"
    assert found.load() is None
    assert found.init_distributed is harness.join
    assert found.missing_here("cuda") == {}
    assert found.lacks("1.0", "cpu") == {"gpt": "none in 1.0 on cpu"}


def test_a_harness_is_the_function_itself():
    found = harness.find(f"{__name__}:build_something")
    assert found.build(SCENARIOS["gpt_distopt"]) == "gpt_distopt by a function"
    assert found.lacks("1.0", "cpu") == {}


def test_a_harness_is_a_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_harness", SimpleNamespace(build=build_something))
    assert harness.find("a_harness").build is build_something


def test_a_harness_that_fails_to_import_says_so_itself(monkeypatch, tmp_path):
    (tmp_path / "half_harness.py").write_text("import does_not_exist\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="does_not_exist"):
        harness.find("half_harness")


def test_lacks_must_be_understood():
    def row(version):
        return Row("r", "a", version, harness=f"{__name__}:Family")

    assert lacks_of(row("1.0"), "cuda") == {"gpt": "none in 1.0 on cuda"}
    with pytest.raises(MatrixError, match="lacks what nobody asks for: quantum"):
        lacks_of(row("odd"), "cpu")
    with pytest.raises(MatrixError, match="knows no Megatron 'bad': not a version"):
        lacks_of(row("bad"), "cpu")
