"""What the command line asks for: which rows, on which device and world sizes, and what of that can be trained."""

from __future__ import annotations

import importlib.machinery
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from megastow_conformance import harness
from megastow_conformance.messages import Device
from megastow_conformance.rows import DEFAULT_HARNESS, MatrixError, Row, at, parse_trees, read_matrix, select_rows
from megastow_conformance.scenarios import SCENARIOS, Scenario, reason_against, unknown_words

TREES_VARIABLE = "MEGASTOW_MEGATRON"
"""The environment variable that gives ``ID=FOLDER`` pairs, separated as in PATH."""

DEFAULT_WORLDS = (1, 2)
"""The world sizes of a run that names none."""

NO_ROW = f"""\
The conformance suite trains with a real Megatron, and no Megatron was given.
Either run the whole matrix:      nox -s tests
or name a row and its Megatron:   pytest --megastow-row mcore-0.16 --megastow-megatron mcore-0.16=FOLDER
or an adapter and its harness:    pytest --pyargs megastow_conformance --megastow-adapter NAME --megastow-harness MODULE
FOLDER is the one that holds the package 'megatron'; the variable {TREES_VARIABLE}="ID=FOLDER" serves as well. With
--megastow-adapter, the Megatron is the one that Python finds, unless --megatron-path FOLDER names another."""


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
class Plan:
    """What is to be run.

    Attributes:
        rows: The rows, each with its folder.
        worlds: The world sizes.
        device: The device type to run on.
        gpus: How many GPUs there are; 0 on ``"cpu"``.
        lacks: By row id, what its Megatron cannot do, with the reasons.
        missing: By row id, what this machine lacks, in the same words.
    """

    rows: tuple[Row, ...] = ()
    worlds: tuple[int, ...] = DEFAULT_WORLDS
    device: Device = "cpu"
    gpus: int = 0
    lacks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def pairs(self) -> list[tuple[Scenario, int]]:
        """Every scenario on every world size that it makes sense on, whatever a row's scope and Megatron."""
        return [
            (scenario, world)
            for world in sorted(self.worlds)
            for scenario in SCENARIOS.values()
            if world in scenario.worlds
        ]

    def targets(
        self,
        wanted: Callable[[Scenario], bool] = lambda scenario: True,
        worlds: Sequence[int] | None = None,
        needs: frozenset[str] = frozenset(),
        in_core: Callable[[Scenario], bool] = lambda scenario: True,
    ) -> Iterator[Target]:
        """Everything that can be trained, of what a test is for.

        Args:
            wanted: Which scenarios the test is for.
            worlds: The world sizes that it is for; ``None``: all.
            needs: What it asks of a Megatron besides.
            in_core: Which of its scenarios are enough for rows with another scope than ``"full"``.
        """
        for row in self.rows:
            for scenario, world in self.pairs():
                if (
                    (worlds is None or world in worlds)
                    and wanted(scenario)
                    and row.includes(scenario.name, world)
                    and (row.scope == "full" or in_core(scenario))
                    and self.why_not(row, scenario, needs) is None
                ):
                    yield Target(row, world, scenario)

    def why_not(self, row: Row, scenario: Scenario, needs: frozenset[str] = frozenset()) -> str | None:
        """Why a scenario cannot be trained there, or not by a test that needs more."""
        return reason_against({**self.lacks[row.id], **self.missing[row.id]}, scenario.needs | needs)

    def missing_gpus(self, world: int) -> str | None:
        """Why this machine cannot run a world size."""
        if self.device == "cpu" or world <= self.gpus:
            return None
        return f"{world} ranks need {world} GPUs, and there are {self.gpus}"


def add_options(group: pytest.OptionGroup) -> None:
    """Adds the options that ``read_plan`` reads."""
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
        "--megatron-path",
        action="append",
        default=[],
        metavar="[ID=]FOLDER",
        help="where a row's Megatron is: the folder that holds the package 'megatron' (also: "
        f"${TREES_VARIABLE}); without ID where there is one row only",
    )
    group.addoption(
        "--megastow-adapter",
        metavar="NAME",
        help="test this adapter, by its entry point name; without a row, on the Megatron that Python finds",
    )
    group.addoption(
        "--megastow-harness",
        metavar="MODULE[:ATTRIBUTE]",
        help=f"what builds trainers (default: the row's own; without a row {DEFAULT_HARNESS})",
    )
    group.addoption(
        "--megastow-evidence",
        choices=("real", "double"),
        help="whether the Megatron is what people run, or stands in for it (default: the row's own; real without one)",
    )
    group.addoption(
        "--megastow-scope",
        choices=("core", "full"),
        help="every scenario, or those that reach each kind of storage once (default: the row's own; full without one)",
    )
    group.addoption(
        "--megastow-world",
        action="append",
        default=[],
        type=int,
        metavar="N",
        help=f"a number of ranks (may be given several times; default: {' and '.join(map(str, DEFAULT_WORLDS))})",
    )
    group.addoption(
        "--megastow-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="what checks run on (default: cuda if there is a GPU)",
    )


def read_plan(config: pytest.Config, count_gpus: Callable[[], int]) -> Plan:
    """What the command line and the environment ask for; without a row neither file nor torch is looked at.

    Raises:
        MatrixError: If it cannot be done.
    """
    if not config.getoption("--megastow-row") and not config.getoption("--megastow-adapter"):
        return Plan()
    rows = tuple(_overridden(config, row) for row in _rows(config))
    worlds = tuple(config.getoption("--megastow-world")) or DEFAULT_WORLDS
    if odd := set(worlds) - {world for scenario in SCENARIOS.values() for world in scenario.worlds}:
        raise MatrixError(f"no scenario is for {min(odd)} ranks")
    gpus = 0 if config.getoption("--megastow-device") == "cpu" else count_gpus()
    if config.getoption("--megastow-device") == "cuda" and not gpus:
        raise MatrixError("--megastow-device cuda, but torch sees no CUDA device")
    device: Device = "cuda" if gpus else "cpu"
    if cannot := [row.id for row in rows if row.device == "cuda" and device == "cpu"]:
        raise MatrixError(f"{', '.join(cannot)}: this needs a GPU, and the run is on the CPU")
    here = str(config.invocation_params.dir)
    if here not in sys.path:
        sys.path.append(here)  # where somebody's own harness is, most likely; the command `pytest` leaves it out
    return Plan(
        rows,
        worlds,
        device,
        gpus,
        {row.id: lacks_of(row, device) for row in rows},
        {row.id: _said_by(row, lambda found: found.missing_here(device)) for row in rows},
    )


def lacks_of(row: Row, device: str) -> dict[str, str]:
    """What the Megatron of a row cannot do on a device type, as its harness says; Megatron is not loaded.

    Raises:
        MatrixError: If there is no such harness, or it says what nobody understands.
    """
    return _said_by(row, lambda found: found.lacks(row.megatron, device))


def _said_by(row: Row, ask: Callable[[harness.Harness], Mapping[str, str]]) -> dict[str, str]:
    try:
        said = dict(ask(harness.find(row.harness)))
    except harness.HarnessError as error:
        raise MatrixError(f"row {row.id!r}: {error}") from error
    except ValueError as error:
        raise MatrixError(f"row {row.id!r}: {row.harness} knows no Megatron {row.megatron!r}: {error}") from error
    if odd := unknown_words(said):
        raise MatrixError(f"row {row.id!r}: {row.harness} lacks what nobody asks for: {', '.join(odd)}")
    return said


def _rows(config: pytest.Config) -> list[Row]:
    """The rows that are named, or one made up for the adapter that is, each with its folder."""
    ids: list[str] = config.getoption("--megastow-row")
    folders: list[str] = config.getoption("--megastow-megatron")
    if not ids:
        adapter: str = config.getoption("--megastow-adapter")
        folder = Path(folders[-1].removeprefix(f"{adapter}=")) if folders else None
        row = Row(adapter, adapter, _stated_version(folder))
        return [row if folder is None else at(row, folder)]
    pairs = [pair for pair in os.environ.get(TREES_VARIABLE, "").split(os.pathsep) if pair]
    if len(ids) == 1:
        folders = [folder if "=" in folder else f"{ids[0]}={folder}" for folder in folders]
    matrix = read_matrix(config.rootpath / Path(config.getoption("--megastow-matrix")))
    return select_rows(matrix, ids, parse_trees([*pairs, *folders]))


def _overridden(config: pytest.Config, row: Row) -> Row:
    """The row with what the command line says otherwise."""
    given = {name: config.getoption(f"--megastow-{name}") for name in ("adapter", "harness", "evidence", "scope")}
    return replace(row, **{name: value for name, value in given.items() if value is not None})


def _stated_version(folder: Path | None) -> str:
    """The version that a Megatron states about itself, found without importing it; ``"unknown"`` if it states none."""
    spec = importlib.machinery.PathFinder.find_spec("megatron", None if folder is None else [str(folder)])
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(location, "core", "package_info.py")
        if file.is_file():
            return str(runpy.run_path(str(file)).get("__version__", "unknown"))
    return "unknown"
