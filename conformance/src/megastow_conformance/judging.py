"""Running the whole suite on a subject, and saying invariant by invariant whether it holds.

The suite's own test functions are what is run, so that a test that is added there is asked here too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megastow_conformance import report
from megastow_conformance.case import Check
from megastow_conformance.marks import suite_marks
from megastow_conformance.plan import lacks_of
from megastow_conformance.scenarios import Scenario, reason_against
from megastow_conformance.workers import Outcome, WorkerGroup

INVARIANTS = report.INVARIANTS
"""The ids, as in docs/invariants.md."""

WALK = "test_order_random_sequences"
"""The test that holds a random walk against a twin: whatever is broken, it objects."""


Judgement = Literal["holds", "broken", "not asked"]


@dataclass(frozen=True)
class Finding:
    """What one test of the suite says of a subject.

    Attributes:
        test: The test function.
        verdict: Whether it holds.
        outcome: All of it.
    """

    test: str
    verdict: Judgement
    outcome: Outcome

    @property
    def invariant(self) -> str:
        """The id of the invariant that the test is about."""
        return invariant_of(self.test)

    @property
    def reason(self) -> str:
        """Why, in one line."""
        return self.outcome.reason


def judge(
    group: WorkerGroup,
    scenario: Scenario,
    subject: str,
    *,
    leave_out: Collection[str] = (),
    last: Collection[str] = (),
    thorough: bool = False,
) -> Iterator[Finding]:
    """Runs those tests of the suite that are for a scenario.

    Args:
        group: Where they run.
        scenario: What is trained.
        subject: What is judged, as ``module:name``.
        leave_out: Tests that are not run.
        last: Invariants that are asked at the end: an objection ends a group of several ranks, and another takes long.
        thorough: Run the other tests of an invariant, too, when one has objected.
    """
    lacks = lacks_of(group.row, group.device)
    objected: set[str] = set()
    marks = suite_marks()
    for test in sorted(marks, key=lambda test: (invariant_of(test) in last, test)):
        mark = marks[test]
        is_meant = mark.wanted(scenario) and (mark.worlds is None or group.world in mark.worlds)
        if test in leave_out or not is_meant or reason_against(lacks, scenario.needs | mark.needs):
            continue
        if invariant_of(test) in objected and not thorough:
            continue
        for check, parameters in _asked_by(test):
            outcome = group.run(check, scenario, parameters=parameters, subject=subject, seconds=mark.seconds)
            finding = Finding(test, _WORDS[outcome.verdict], outcome)
            if finding.verdict == "broken":
                objected.add(finding.invariant)
            yield finding


_WORDS: dict[str, Judgement] = {"passed": "holds", "failed": "broken", "skipped": "not asked"}


def invariant_of(test: str) -> str:
    """The id that a test is named after."""
    return report.invariant(test)


def _asked_by(test: str) -> list[tuple[Check, dict[str, Any]]]:
    """What a test of the suite runs: checks, and their parameters."""
    from megastow_conformance.suite import test_invariants

    recorder = _Recorder([])
    getattr(test_invariants, test)(recorder)
    return recorder.asked


@dataclass(frozen=True)
class _Recorder:
    """Stands in for the fixture ``conformance``: notes what a test would run."""

    asked: list[tuple[Check, dict[str, Any]]]

    def run(self, check: Check, /, **parameters: Any) -> None:
        self.asked.append((check, parameters))
