"""What others do: the classic technique breaks training where Megatron began to cache views, and the table says so."""

import json

import pytest
import real_megatron

from megastow_conformance.comparison import table
from megastow_conformance.comparison.classic import classic_technique
from megastow_conformance.judging import INVARIANTS, judge
from megastow_conformance.marks import suite_marks
from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup

CLASSIC = f"{classic_technique.__module__}:{classic_technique.__name__}"


@pytest.mark.parametrize(("row_id", "trains"), [("mcore-0.13", True), ("mcore-0.14", False), ("mcore-0.16", False)])
def test_the_classic_technique_breaks_training_from_0_14_on(row_id, trains):
    row = real_megatron.row(row_id)
    with WorkerGroup(row, 1, harness=row.harness, lasting=True) as group:
        others = {test for test in suite_marks() if not test.startswith(("test_training", "test_identity"))}
        found = {f.test: f for f in judge(group, SCENARIOS["toy_distopt"], CLASSIC, leave_out=others, thorough=True)}
    # It replaces tensors everywhere, and is honest about it only as long as nobody has kept a view of the old ones.
    assert found["test_identity"].verdict == "broken"
    asked = {test: f for test, f in found.items() if test.startswith("test_training") and f.verdict != "not asked"}
    assert len(asked) >= 5
    assert (asked["test_training"].verdict == "holds") is trains, asked["test_training"].outcome.report()
    if trains:
        assert {f.verdict for f in asked.values()} == {"holds"}
    else:
        assert "undisturbed it was" in asked["test_training"].reason


def test_what_is_committed_is_a_table_of_what_was_found():
    root = real_megatron.MATRIX.parent
    found = json.loads((root / "benchmarks/results/comparison.json").read_text(encoding="utf-8"))
    assert (root / "docs/comparison.md").read_text(encoding="utf-8") == table.markdown(found)
    by_subject = {}
    for entry in found:
        assert tuple(entry["invariants"]) == INVARIANTS
        by_subject.setdefault(entry["subject"], []).append(entry)
    assert by_subject.keys() == {contender.name for contender in table.CONTENDERS}
    for entry in by_subject["megastow"]:
        assert {judged["verdict"] for judged in entry["invariants"].values()} == {"holds"}


def test_a_reason_names_no_path_of_a_machine():
    assert table.without_paths("no file /home/somebody/x/y.py here") == "no file ... here"


def test_contenders_are_for_rows_of_the_matrix():
    rows = table.read_matrix(real_megatron.MATRIX)
    for contender in table.CONTENDERS:
        assert set(contender.rows) <= rows.keys()
