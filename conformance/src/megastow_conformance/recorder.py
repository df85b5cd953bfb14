"""What became of the conformance tests, collected in the one process that sees all of it.

Under pytest-xdist tests run in other processes, and only their reports arrive. So what a test ran on travels in its
report, and so do the facts about the worker processes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from megastow_conformance.case import Case
from megastow_conformance.plan import Target

Verdict = Literal["passed", "skipped", "failed"]

_TARGET = "megastow"
_FACTS = "megastow_facts"


@dataclass(frozen=True)
class Result:
    """What became of one test.

    Attributes:
        row: The row's id.
        test: The test function's name.
        world: The number of ranks.
        scenario: The scenario's name.
        verdict: The result.
        detail: The reason of a skip, the first line of a failure.
        began: Whether the check was started; a skip before that is the machine's.
        seconds: How long it took.
    """

    row: str
    test: str
    world: int
    scenario: str
    verdict: Verdict
    detail: str
    began: bool
    seconds: float

    @property
    def where(self) -> str:
        """World size and scenario, as in the test's id."""
        return f"w{self.world}-{self.scenario}"


def label(item: pytest.Item, target: Target) -> None:
    """Lets the reports of a test say what it runs on."""
    item.user_properties.append((_TARGET, json.dumps([target.row.id, target.world, target.scenario.name])))


def attach_facts(item: pytest.Item, row: str, facts: dict[str, Any]) -> None:
    """Lets the reports of a test carry the facts about the processes that serve its row."""
    item.user_properties.append((_FACTS, json.dumps([row, facts])))


class Recorder:
    """A pytest plugin that remembers.

    Attributes:
        results: By test id.
        facts: What ``describe`` found, by row id.
    """

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Takes in the report of one phase of a test."""
        said = dict(report.user_properties)
        if _TARGET not in said:
            return
        row, world, scenario = json.loads(str(said[_TARGET]))
        if _FACTS in said:
            told_row, facts = json.loads(str(said[_FACTS]))
            self.facts[told_row] = facts
        before = self.results.get(report.nodeid)
        verdict, detail, seconds = report.outcome, _detail(report), report.duration
        if before is not None:
            seconds += before.seconds
            if report.outcome == "passed" or before.verdict == "failed":
                verdict, detail = before.verdict, before.detail
        began = report.when == "call" or (before is not None and before.began)
        test = report.location[2].partition("[")[0]
        self.results[report.nodeid] = Result(row, test, world, scenario, verdict, detail, began, seconds)


def _detail(report: pytest.TestReport) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr).strip().partition("\n")[0]


@contextmanager
def answer_file() -> Iterator[Path]:
    """A file for what ``describe`` finds, gone after the block."""
    with tempfile.TemporaryDirectory(prefix="megastow-") as folder:
        yield Path(folder, "facts.json")


def describe(case: Case, file: str) -> None:
    """A check that checks nothing: rank 0 writes down what this worker process really runs on, as JSON."""
    if case.rank != 0:
        return
    from importlib.metadata import entry_points, version

    import torch

    from megastow import detect_megatron

    found = detect_megatron()
    adapters = [entry.dist for entry in entry_points(group="megastow.adapters", name=case.row.adapter)]
    on_gpu = case.device.type == "cuda"
    facts = {
        "megatron": None if found is None or found.version is None else str(found.version),
        "megatron_path": None if found is None else str(found.path),
        "versions": {
            "megastow": version("megastow"),
            "adapter": next((dist.version for dist in adapters if dist is not None), None),
            "torch": torch.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        },
        "device": {
            "type": case.device.type,
            "name": torch.cuda.get_device_name(case.device) if on_gpu else "CPU",
            "count": torch.cuda.device_count() if on_gpu else os.cpu_count(),
        },
    }
    Path(file).write_text(json.dumps(facts), encoding="utf-8")
