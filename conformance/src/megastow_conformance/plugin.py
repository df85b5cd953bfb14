"""The pytest plugin: command line, one test for each (row, world size, scenario), and the verdicts of worker processes.

A test asks for the fixture ``conformance`` and hands it a check::

    @pytest.mark.megastow(scenarios=("toy_distopt", "gpt_distopt"), worlds=(2,))  # both optional: everything by default
    def test_bitexact(conformance: Conformance) -> None:
        conformance.run(bitexact)

What is not tested is said: a scenario that a Megatron release cannot train is no test, and the terminal summary lists
it with its reason; a world size that the machine has no GPUs for is a skip with its reason; a run without any row is an
error.

Each pytest process keeps one worker group at a time, and the tests are put in such an order that this is enough. Under
pytest-xdist with ``--dist loadgroup`` all tests of a row and world size go to one process (see ``xdist_groups``).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megastow_conformance.case import Check
from megastow_conformance.messages import Device
from megastow_conformance.rows import MatrixError, Row, parse_trees, read_matrix, select_rows
from megastow_conformance.scenarios import SCENARIOS, Scenario
from megastow_conformance.workers import CHECK_SECONDS, WorkerGroup

TREES_VARIABLE = "MEGASTOW_MEGATRON"
"""The environment variable that gives ``ID=FOLDER`` pairs, separated as in PATH."""

NO_ROW = f"""\
The conformance suite trains with a real Megatron, and no Megatron was given.
Either run the whole matrix:     nox -s tests
or name a row and its Megatron:  pytest --megastow-matrix matrix.toml --megastow-row mcore-0.16.1 \\
                                     --megastow-megatron mcore-0.16.1=FOLDER
FOLDER is the one that holds the package 'megatron'; the variable {TREES_VARIABLE}="ID=FOLDER" serves as well."""

Selection = str | Iterable[str] | Callable[[Scenario], bool]
"""Which scenarios a test is for: a name, several, or a predicate."""


@dataclass(frozen=True)
class Target:
    """What one test runs on.

    Attributes:
        row: The Megatron release.
        world: The number of ranks.
        scenario: What is trained.
    """

    row: Row
    world: int
    scenario: Scenario

    @property
    def group(self) -> str:
        """The name of the worker group that serves it."""
        return f"{self.row.id}-w{self.world}"

    def __str__(self) -> str:
        return f"{self.group}-{self.scenario.name}"


@dataclass(frozen=True)
class Conformance:
    """What the fixture ``conformance`` gives to a test.

    Attributes:
        target: What the test runs on.
    """

    target: Target
    _pool: _Pool
    _seconds: float

    def run(self, check: Check, /, **parameters: Any) -> None:
        """Runs a check on every rank; fails or skips the test as the check says.

        Args:
            check: A function ``check(case, **parameters)`` at the top level of a module that workers can import.
            **parameters: Keyword arguments for it; they are pickled.
        """
        __tracebackhide__ = True
        group = self._pool.group(self.target.row, self.target.world)
        outcome = group.run(check, self.target.scenario, seconds=self._seconds, parameters=parameters)
        if outcome.verdict == "failed":
            pytest.fail(outcome.report(), pytrace=False)
        if outcome.verdict == "skipped":
            pytest.skip(outcome.report())


class _Pool:
    """The one worker group that this pytest process keeps.

    Args:
        device: The device type that groups run on.
        harness: The module that initialises Megatron and builds trainers.
    """

    def __init__(self, device: Device, harness: str) -> None:
        self._device = device
        self._harness = harness
        self._group: WorkerGroup | None = None

    def group(self, row: Row, world: int) -> WorkerGroup:
        """The group for a row and world size; another one is ended first."""
        if self._group is None or (self._group.row, self._group.world) != (row, world):
            self.close()
            self._group = WorkerGroup(row, world, device=self._device, harness=self._harness)
        return self._group

    def close(self) -> None:
        """Ends the group."""
        if self._group is not None:
            self._group.close()
            self._group = None


@dataclass(frozen=True)
class _Plan:
    """What the command line asks for.

    Attributes:
        rows: The rows, each with its folder.
        device: The device type to run on.
        gpus: How many GPUs there are; 0 on ``"cpu"``.
    """

    rows: tuple[Row, ...]
    device: Device
    gpus: int

    def targets(self, wanted: Callable[[Scenario], bool], worlds: Sequence[int] | None) -> Iterator[Target]:
        """Everything that can be trained, of what a test is for."""
        for row in self.rows:
            scenarios = [scenario for scenario in SCENARIOS.values() if row.includes(scenario.name)]
            for world in sorted({world for scenario in scenarios for world in scenario.worlds}):
                if worlds is not None and world not in worlds:
                    continue
                for scenario in scenarios:
                    if world in scenario.worlds and wanted(scenario) and self.why_not(row, scenario) is None:
                        yield Target(row, world, scenario)

    def why_not(self, row: Row, scenario: Scenario) -> str | None:
        """Why Megatron itself cannot train a scenario there."""
        return scenario.unsupported_on(row.megatron, self.device)

    def missing_gpus(self, world: int) -> str | None:
        """Why this machine cannot run a world size."""
        if self.device == "cpu" or world <= self.gpus:
            return None
        return f"{world} ranks need {world} GPUs, and there are {self.gpus}"


_POOL = pytest.StashKey[_Pool]()
_PLAN = pytest.StashKey[_Plan]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the command line options."""
    group = parser.getgroup("megastow", "megastow conformance")
    group.addoption(
        "--megastow-row",
        action="append",
        default=[],
        metavar="ID",
        help="run the conformance suite against this row of the matrix (may be given several times)",
    )
    group.addoption(
        "--megastow-matrix",
        default="matrix.toml",
        metavar="PATH",
        help="the file with the rows (default: %(default)s, from pytest's root folder)",
    )
    group.addoption(
        "--megastow-megatron",
        action="append",
        default=[],
        metavar="ID=FOLDER",
        help=f"where a row's Megatron is: the folder that holds the package 'megatron' (also: ${TREES_VARIABLE})",
    )
    group.addoption(
        "--megastow-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what checks run on (default: cuda if there is a GPU)",
    )
    group.addoption(
        "--megastow-harness",
        default="megastow_conformance.megatron_core",
        metavar="MODULE",
        help="the module that builds trainers, for a Megatron that the default cannot build (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declares the markers and reads what the command line asks for."""
    config.addinivalue_line(
        "markers",
        "megastow(scenarios=..., worlds=..., seconds=...): which scenarios (a name, names or a predicate) and world "
        "sizes a conformance test is for, and how long its check may take",
    )
    try:
        config.stash[_PLAN] = _read_plan(config)
    except MatrixError as error:
        raise pytest.UsageError(f"megastow: {error}") from error
    config.stash[_POOL] = _Pool(config.stash[_PLAN].device, config.getoption("--megastow-harness"))


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
    marker = metafunc.definition.get_closest_marker("megastow")
    options: dict[str, Any] = dict(marker.kwargs) if marker else {}
    if odd := options.keys() - {"scenarios", "worlds", "seconds"}:
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: unknown in its mark: {', '.join(odd)}")
    targets = list(plan.targets(_predicate(metafunc, options.get("scenarios")), options.get("worlds")))
    parameters = [pytest.param(target, id=str(target), marks=_marks(plan, target)) for target in targets]
    if not parameters:
        reason = f"no scenario of this test is for {', '.join(row.id for row in plan.rows)}"
        parameters = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("conformance", parameters, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests of one worker group next to each other, after all other tests.

    Within a group, those of one expert-parallel layout: another layout means other process groups.
    """
    rows = [row.id for row in config.stash[_PLAN].rows]

    def key(item: pytest.Item) -> tuple[int, int, int]:
        target = _target(item)
        if target is None:
            return (-1, 0, 0)
        return (rows.index(target.row.id), target.world, target.scenario.expert_parallel)

    items.sort(key=key)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps the tests of one worker group in one process under pytest-xdist with ``--dist loadgroup``."""
    rows = config.stash[_PLAN].rows
    if not rows or config.getoption("dist") != "loadgroup":
        return None
    from megastow_conformance.xdist_groups import scheduler

    return scheduler(config, log, [row.id for row in rows])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Lists what Megatron itself cannot train and what the rows' scopes leave out."""
    plan = config.stash[_PLAN]
    if not plan.rows:
        return
    terminalreporter.section("megastow: declared, not tested")
    for row in plan.rows:
        left_out = sum(not row.includes(name) for name in SCENARIOS)
        if left_out:
            terminalreporter.line(
                f"{row.id}: the row's scope is {row.scope!r}: {left_out} of {len(SCENARIOS)} scenarios"
            )
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, scenario in SCENARIOS.items():
            if row.includes(name) and (reason := plan.why_not(row, scenario)):
                reasons[reason].append(name)
        for reason, names in reasons.items():
            terminalreporter.line(f"{row.id}: {reason}: {', '.join(names)}")


@pytest.fixture
def conformance(request: pytest.FixtureRequest) -> Conformance:
    """Runs checks on the test's row, world size and scenario."""
    marker = request.node.get_closest_marker("megastow")
    seconds = marker.kwargs.get("seconds", CHECK_SECONDS) if marker else CHECK_SECONDS
    return Conformance(request.param, request.config.stash[_POOL], seconds)


def _read_plan(config: pytest.Config) -> _Plan:
    """What the command line and the environment ask for; without a row neither file nor torch is looked at."""
    ids: list[str] = config.getoption("--megastow-row")
    if not ids:
        return _Plan((), "cpu", 0)
    pairs = [pair for pair in os.environ.get(TREES_VARIABLE, "").split(os.pathsep) if pair]
    trees = parse_trees([*pairs, *config.getoption("--megastow-megatron")])
    matrix = read_matrix(config.rootpath / Path(config.getoption("--megastow-matrix")))
    rows = tuple(select_rows(matrix, ids, trees))
    gpus = 0 if config.getoption("--megastow-device") == "cpu" else _count_gpus()
    if config.getoption("--megastow-device") == "cuda" and not gpus:
        raise MatrixError("--megastow-device cuda, but torch sees no CUDA device")
    return _Plan(rows, "cuda" if gpus else "cpu", gpus)


def _count_gpus() -> int:
    """The number of CUDA devices, found without initialising CUDA in this process."""
    import torch

    return torch.cuda.device_count()


def _predicate(metafunc: pytest.Metafunc, selection: Selection | None) -> Callable[[Scenario], bool]:
    """A mark's ``scenarios`` as a predicate; names must exist."""
    if selection is None:
        return lambda scenario: True
    if callable(selection):
        return selection
    names = {selection} if isinstance(selection, str) else set(selection)
    if unknown := names - SCENARIOS.keys():
        raise pytest.Collector.CollectError(
            f"{metafunc.definition.nodeid}: no such scenario: {', '.join(sorted(unknown))}"
        )
    return lambda scenario: scenario.name in names


def _marks(plan: _Plan, target: Target) -> list[pytest.MarkDecorator]:
    reason = plan.missing_gpus(target.world)
    return [pytest.mark.skip(reason=reason)] if reason else []


def _target(item: pytest.Item) -> Target | None:
    """What a test runs on, if it is a conformance test."""
    callspec = getattr(item, "callspec", None)
    target = callspec.params.get("conformance") if callspec is not None else None
    return target if isinstance(target, Target) else None
