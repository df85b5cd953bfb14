"""The pytest plugin: command line, one test for each (row, world size, scenario), and the verdicts of worker processes.

A test asks for the fixture ``conformance`` and hands it a check::

    @pytest.mark.megastow(scenarios=("toy_distopt", "gpt_distopt"), worlds=(2,))  # both optional: everything by default
    def test_bitexact(conformance: Conformance) -> None:
        conformance.run(bitexact)

What is not tested is said: a scenario that a Megatron cannot train is no test, and the terminal summary lists it with
the reason that its harness gives; a world size that the machine has no GPUs for is a skip with its reason; a run
without any row is an error. ``--megastow-skips FILE`` holds all of that against a committed list (see ``skips``), and
``--megastow-report FILE`` keeps the verdicts (see ``report``).

Each pytest process keeps one worker group at a time, and the tests are put in such an order that this is enough. Under
pytest-xdist with ``--dist loadgroup`` all tests of a row and world size go to one process (see ``xdist_groups``).
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megastow_conformance import recorder, skips
from megastow_conformance.case import Check
from megastow_conformance.marks import Mark, MarkError, read_mark
from megastow_conformance.messages import Device
from megastow_conformance.plan import NO_ROW, Plan, Target, add_options, read_plan
from megastow_conformance.report import write_report
from megastow_conformance.rows import MatrixError
from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup


@dataclass(frozen=True)
class Conformance:
    """What the fixture ``conformance`` gives to a test.

    Attributes:
        target: What the test runs on.
    """

    target: Target
    _pool: _Pool
    _item: pytest.Item
    _seconds: float

    def run(self, check: Check, /, **parameters: Any) -> None:
        """Runs a check on every rank; fails or skips the test as the check says.

        Args:
            check: A function ``check(case, **parameters)`` at the top level of a module that workers can import.
            **parameters: Keyword arguments for it; they are pickled.
        """
        __tracebackhide__ = True
        group = self._pool.group(self.target, self._item)
        outcome = group.run(check, self.target.scenario, seconds=self._seconds, parameters=parameters)
        if outcome.verdict == "failed":
            pytest.fail(outcome.report(), pytrace=False)
        if outcome.verdict == "skipped":
            pytest.skip(outcome.report())


class _Pool:
    """The one worker group that this pytest process keeps.

    Args:
        device: The device type that groups run on.
        asks: Whether somebody wants to know what the workers run on.
    """

    def __init__(self, device: Device, *, asks: bool) -> None:
        self._device = device
        self._asks = asks
        self._described: set[str] = set()
        self._group: WorkerGroup | None = None

    def group(self, target: Target, item: pytest.Item) -> WorkerGroup:
        """The group for a test; another one is ended first."""
        row, world = target.row, target.world
        if self._group is None or (self._group.row, self._group.world) != (row, world):
            self.close()
            self._group = WorkerGroup(row, world, device=self._device, harness=row.harness)
        if self._asks and row.id not in self._described:
            with recorder.answer_file() as file:
                outcome = self._group.run(recorder.describe, target.scenario, parameters={"file": str(file)})
                if outcome.verdict == "passed":
                    recorder.attach_facts(item, row.id, json.loads(file.read_text(encoding="utf-8")))
                    self._described.add(row.id)
        return self._group

    def close(self) -> None:
        """Ends the group."""
        if self._group is not None:
            self._group.close()
            self._group = None


_POOL = pytest.StashKey[_Pool]()
_PLAN = pytest.StashKey[Plan]()
_RECORDER = pytest.StashKey[recorder.Recorder]()
_DIFFERENCES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the command line options."""
    group = parser.getgroup("megastow", "megastow conformance")
    add_options(group)
    group.addoption(
        "--megastow-report",
        type=Path,
        metavar="FILE",
        help="write what was tested, on what, and with which verdicts to this JSON file",
    )
    group.addoption(
        "--megastow-skips",
        type=Path,
        metavar="FILE",
        help="fail if something is left out that this file does not declare, or the other way round",
    )
    group.addoption(
        "--megastow-update-skips", action="store_true", help="write that file anew instead, for the rows of this run"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declares the markers and reads what the command line asks for."""
    config.addinivalue_line(
        "markers",
        "megastow(scenarios=..., worlds=..., core=..., needs=..., seconds=...): which scenarios (a name, names or a "
        "predicate) and world sizes a conformance test is for, and which of them in the core scope, what it needs of a "
        "Megatron besides, and how long it may take",
    )
    try:
        plan = read_plan(config, lambda: _count_gpus())
    except MatrixError as error:
        raise pytest.UsageError(f"megastow: {error}") from error
    config.stash[_PLAN] = plan
    config.stash[_POOL] = _Pool(plan.device, asks=config.getoption("--megastow-report") is not None)
    if plan.rows and not hasattr(config, "workerinput"):  # under pytest-xdist, where all reports arrive
        config.stash[_RECORDER] = recorder.Recorder()
        config.pluginmanager.register(config.stash[_RECORDER], "megastow-recorder")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the workers, whatever ended the run."""
    if _POOL in config.stash:
        config.stash[_POOL].close()


def pytest_report_header(config: pytest.Config) -> str | None:
    """Says what the suite runs against."""
    plan = config.stash[_PLAN]
    if not plan.rows:
        return None
    return f"megastow: {', '.join(f'{row.id} ({row.scope})' for row in plan.rows)}, on {plan.device}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one test for each target of a function that asks for the fixture ``conformance``."""
    if "conformance" not in metafunc.fixturenames:
        return
    plan = metafunc.config.stash[_PLAN]
    if not plan.rows:
        raise pytest.Collector.CollectError(NO_ROW)
    try:
        mark = _mark(metafunc.definition)
    except MarkError as error:
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {error}") from error
    targets = list(plan.targets(mark.wanted, mark.worlds, mark.needs, mark.in_core))
    parameters = [pytest.param(target, id=str(target), marks=_marks(plan, target)) for target in targets]
    if not parameters:
        reason = f"no scenario of this test is for {', '.join(row.id for row in plan.rows)}"
        parameters = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("conformance", parameters, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests of one worker group next to each other, after all other tests.

    Within a group, those of one model-parallel layout: another layout means other process groups.
    """
    rows = [row.id for row in config.stash[_PLAN].rows]
    for item in items:
        if (target := _target(item)) is not None:
            recorder.label(item, target)

    def key(item: pytest.Item) -> tuple[int, ...]:
        target = _target(item)
        if target is None:
            return (-1,)
        scenario = target.scenario
        return (rows.index(target.row.id), target.world, scenario.expert_parallel, scenario.tensor_parallel)

    items.sort(key=key)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps the tests of one worker group in one process under pytest-xdist with ``--dist loadgroup``."""
    rows = config.stash[_PLAN].rows
    if not rows or config.getoption("dist") != "loadgroup":
        return None
    from megastow_conformance.xdist_groups import scheduler

    return scheduler(config, log, [row.id for row in rows])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the report, and compares what was left out with what is declared."""
    config = session.config
    plan = config.stash[_PLAN]
    if _RECORDER not in config.stash or config.getoption("collectonly"):
        return
    results = list(config.stash[_RECORDER].results.values())
    report: Path | None = config.getoption("--megastow-report")
    if report is not None:
        write_report(config.invocation_params.dir / report, config, plan, config.stash[_RECORDER])
    file: Path | None = config.getoption("--megastow-skips")
    if file is None:
        return
    file = config.rootpath / file
    declared = skips.read_skips(file)
    if config.getoption("--megastow-update-skips"):
        skips.write_skips(file, skips.updated(declared, plan.rows, plan.device, results))
        return
    found = skips.static_differences(declared, plan.rows) + skips.run_differences(declared, plan.device, results)
    config.stash[_DIFFERENCES] = found
    if found and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Lists what Megatron itself cannot train and what the rows' scopes leave out."""
    plan = config.stash[_PLAN]
    if not plan.rows:
        return
    terminalreporter.section("megastow: declared, not tested")
    pairs = plan.pairs()
    for row in plan.rows:
        left_out = sum(not row.includes(scenario.name, world) for scenario, world in pairs)
        if left_out:
            terminalreporter.line(
                f"{row.id}: the scope is {row.scope!r}: it leaves out {left_out} of {len(pairs)} pairs of scenario and "
                "world size"
            )
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, scenario in SCENARIOS.items():
            if reason := plan.why_not(row, scenario):
                reasons[reason].append(name)
        for reason, names in reasons.items():
            terminalreporter.line(f"{row.id}: {reason}: {', '.join(names)}")
    if found := config.stash.get(_DIFFERENCES, []):
        file = config.getoption("--megastow-skips")
        terminalreporter.section(f"megastow: {file} says otherwise", red=True, bold=True)
        for difference in found:
            terminalreporter.line(difference)
        terminalreporter.line(f"If that is meant, run this again with --megastow-update-skips, or {skips.COMMAND}.")


@pytest.fixture
def conformance(request: pytest.FixtureRequest) -> Conformance:
    """Runs checks on the test's row, world size and scenario."""
    item = request.node
    return Conformance(request.param, request.config.stash[_POOL], item, _mark(item).seconds)


def _mark(definition: pytest.Item | pytest.Function) -> Mark:
    """What a test's mark says.

    Raises:
        MarkError: If something in it is unknown.
    """
    marker = definition.get_closest_marker("megastow")
    return read_mark(marker.kwargs if marker else {})


def _count_gpus() -> int:
    """The number of CUDA devices, found without initialising CUDA in this process."""
    import torch

    return torch.cuda.device_count()


def _marks(plan: Plan, target: Target) -> list[pytest.MarkDecorator]:
    reason = plan.missing_gpus(target.world)
    return [pytest.mark.skip(reason=reason)] if reason else []


def _target(item: pytest.Item) -> Target | None:
    """What a test runs on, if it is a conformance test."""
    callspec = getattr(item, "callspec", None)
    target = callspec.params.get("conformance") if callspec is not None else None
    return target if isinstance(target, Target) else None
