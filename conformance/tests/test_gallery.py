"""The gallery of broken managers: what each breaks objects to it and nothing else does; the right one is left alone."""

from dataclasses import replace

import pytest
import real_megatron

from megastow_conformance.gallery import EXHIBITS
from megastow_conformance.judging import INVARIANTS, WALK, invariant_of, judge
from megastow_conformance.marks import suite_marks
from megastow_conformance.messages import DEFAULT_SUBJECT
from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup

ROW = "mcore-0.16"


@pytest.fixture(scope="module")
def groups():
    """A worker group for one rank, which stays when a check fails, and one for two."""
    row = real_megatron.row(ROW)
    thorough = replace(row, scope="full")  # for as many random walks as there are
    with (
        WorkerGroup(thorough, 1, harness=row.harness, lasting=True) as alone,
        WorkerGroup(row, 2, harness=row.harness, grace_seconds=1.0) as pair,
    ):
        yield {1: alone, 2: pair}


def objections(group, subject, scenario, **options):
    findings = judge(group, SCENARIOS[scenario], subject, **options)
    return [finding for finding in findings if finding.verdict == "broken"]


@pytest.mark.parametrize("exhibit", EXHIBITS.values(), ids=EXHIBITS.keys())
def test_a_mistake_is_objected_to_by_what_it_breaks(exhibit, groups):
    # The random walk holds everything against a twin, so it objects to whatever is broken. It is asked only where no
    # test of a single invariant has seen anything.
    group = groups[exhibit.world]
    found = objections(group, exhibit.subject, exhibit.scenario, leave_out={WALK}, last=exhibit.breaks)
    found = found or objections(group, exhibit.subject, exhibit.scenario, leave_out=suite_marks().keys() - {WALK})
    listing = "\n\n".join(finding.outcome.report() for finding in found)
    assert {finding.invariant for finding in found} == exhibit.breaks, listing or "nothing was objected to"


@pytest.mark.parametrize("scenario", sorted({e.scenario for e in EXHIBITS.values() if e.world == 1}))
def test_nothing_is_objected_to_in_the_right_one(scenario, groups):
    # On one rank. On two it is what the suite itself runs of this row, in which the exhibits' scenarios are.
    found = objections(groups[1], DEFAULT_SUBJECT, scenario)
    assert not found, "\n\n".join(finding.outcome.report() for finding in found)


def test_every_invariant_has_an_exhibit():
    assert set().union(*(exhibit.breaks for exhibit in EXHIBITS.values())) == set(INVARIANTS)


def test_every_test_of_the_suite_is_named_after_an_invariant():
    assert {invariant_of(test) for test in suite_marks()} == set(INVARIANTS)


def test_every_exhibit_says_what_it_stands_for():
    for exhibit in EXHIBITS.values():
        assert "\n\n" in exhibit.__doc__, exhibit.name
        assert "Stands for" in exhibit.__doc__, exhibit.name
