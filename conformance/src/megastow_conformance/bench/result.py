"""What a benchmark found, as data: figures with their spread, the goals they are held against, and the whole run."""

from __future__ import annotations

import dataclasses
import enum
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megastow import MemoryFigures
from megastow.report import format_bytes


@dataclass(frozen=True)
class Spread:
    """The values of a figure, one for each repeat, in the order in which they were measured.

    Attributes:
        values: At least one.
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of some values."""
        return cls(tuple(values))

    @property
    def minimum(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def median(self) -> float:
        """The one in the middle."""
        return statistics.median(self.values)

    @property
    def maximum(self) -> float:
        """The largest."""
        return max(self.values)

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {"min": self.minimum, "median": self.median, "max": self.maximum, "values": list(self.values)}


class Unit(str, enum.Enum):
    """What the value of a figure is counted in."""

    RATIO = "ratio"
    SECONDS = "seconds"
    BYTES = "bytes"

    def show(self, value: float) -> str:
        """A value for people, with what it is counted in."""
        if self is Unit.BYTES:
            return format_bytes(value)
        return f"{value * 1e3:.3g} ms" if self is Unit.SECONDS else f"{value:.3f}"


@dataclass(frozen=True)
class Goal:
    """What a figure should be on the machine that goals are made for (see the issue "Link speed").

    Attributes:
        limit: The value itself still meets it.
        at_most: Whether smaller is better.
        unit: What the limit is counted in.
    """

    limit: float
    at_most: bool = False
    unit: Unit = Unit.RATIO

    def is_met_by(self, value: float) -> bool:
        """Whether a value is as good as the goal, or better."""
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.unit.show(self.limit)}"


@dataclass(frozen=True)
class Figure:
    """One measured thing.

    Attributes:
        name: What of the row it is, such as ``"offload"``.
        value: What the goal is about.
        unit: What the value is counted in.
        against: What a ratio is a ratio to, in words; empty for other units.
        seconds: How long the measured thing took, or None where nothing was timed.
        nbytes: Bytes that were copied or are meant, or None.
        goal: What the value should be, or None.
    """

    name: str
    value: Spread
    unit: Unit = Unit.RATIO
    against: str = ""
    seconds: Spread | None = None
    nbytes: int | None = None
    goal: Goal | None = None

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes over the median of the seconds; None where there is no such thing."""
        if self.seconds is None or self.nbytes is None or not self.seconds.median:
            return None
        return self.nbytes / self.seconds.median

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "name": self.name,
            "unit": self.unit.value,
            "value": self.value.as_dict(),
            "against": self.against,
            "seconds": self.seconds.as_dict() if self.seconds else None,
            "bytes": self.nbytes,
            "bytes_per_second": self.bytes_per_second,
            "goal": dataclasses.asdict(self.goal) if self.goal else None,
            "goal_met": self.goal.is_met_by(self.value.median) if self.goal else None,
        }


@dataclass(frozen=True)
class Bound:
    """What this machine can do, with nothing around it.

    Attributes:
        name: What was done, in words.
        nbytes: Bytes that a repeat moved or made ready; both directions together where it went both ways.
        seconds: Of each repeat.
    """

    name: str
    nbytes: int
    seconds: Spread

    @property
    def bytes_per_second(self) -> float:
        """At best: a bound is what can be reached."""
        return self.nbytes / self.seconds.minimum

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "name": self.name,
            "bytes": self.nbytes,
            "seconds": self.seconds.as_dict(),
            "bytes_per_second": self.bytes_per_second,
        }


class Status(str, enum.Enum):
    """What became of a row."""

    MEASURED = "measured"
    NOT_AVAILABLE = "not available"
    NOT_RUN = "not run"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class RowResult:
    """What became of one row.

    Attributes:
        id: The row.
        title: What it measures.
        is_baseline: Whether it measures how others do it.
        goals: What its figures should be, by name; also where it has none.
        status: Whether it has figures.
        figures: What was measured.
        notes: What a reader should know; the reason where there are no figures.
        seconds: How long the row took, everything included.
        differences: What was not the same, bit for bit, after a move.
        num_compared: Comparisons of the whole state that were made.
    """

    id: str
    title: str
    is_baseline: bool
    goals: Mapping[str, Goal]
    status: Status
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    differences: tuple[str, ...] = ()
    num_compared: int = 0

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "id": self.id,
            "title": self.title,
            "baseline": self.is_baseline,
            "goals": {name: dataclasses.asdict(goal) for name, goal in self.goals.items()},
            "status": str(self.status),
            "figures": [figure.as_dict() for figure in self.figures],
            "notes": list(self.notes),
            "seconds": self.seconds,
            "differences": list(self.differences),
            "states_compared": self.num_compared,
        }


@dataclass(frozen=True)
class Sample:
    """Memory in use at a moment of a cycle.

    Attributes:
        seconds: Since the cycle's first moment.
        driver_bytes: What the driver reports as used on the device; on the CPU the resident set of this process.
        allocated_bytes: What torch's allocator has handed out; None on the CPU.
    """

    seconds: float
    driver_bytes: int
    allocated_bytes: int | None


@dataclass(frozen=True)
class Timeline:
    """Device memory through one cycle of the trainer.

    Attributes:
        samples: In order.
        phases: When each phase began, in seconds, by name.
    """

    samples: tuple[Sample, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """In plain types; samples as rows of a table."""
        return {
            "columns": [f.name for f in dataclasses.fields(Sample)],
            "samples": [list(dataclasses.astuple(sample)) for sample in self.samples],
            "phases": dict(self.phases),
        }


@dataclass(frozen=True)
class RankResult:
    """What one rank found.

    Attributes:
        bounds: What the machine can do, by key.
        rows: In the order in which they ran.
        memory: Memory in use at named moments.
        timeline: Device memory through one cycle; empty if there was no time for it.
    """

    bounds: Mapping[str, Bound]
    rows: tuple[RowResult, ...]
    memory: Mapping[str, MemoryFigures]
    timeline: Timeline

    def as_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "bounds": {key: bound.as_dict() for key, bound in self.bounds.items()},
            "rows": [row.as_dict() for row in self.rows],
            "memory": {moment: dataclasses.asdict(figures) for moment, figures in self.memory.items()},
            "timeline": self.timeline.as_dict(),
        }


@dataclass(frozen=True)
class BenchResult:
    """What a run found, on all ranks.

    Attributes:
        command: What was asked for.
        date: When it began, in UTC.
        device: The kind of device: ``"cuda"`` or ``"cpu"``.
        hardware: What it ran on, by name.
        versions: What took part, by name.
        size: The preset, with everything in it.
        repeats: How often a steady thing was measured.
        time_limit: Seconds after which no further row was begun.
        ranks: What each rank found.
        seconds: How long all of it took.
        is_complete: Whether the run came to its end; before that, rank 0 knows what it has found itself.
    """

    command: str
    date: str
    device: str
    hardware: Mapping[str, object]
    versions: Mapping[str, str | None]
    size: Mapping[str, object]
    repeats: int
    time_limit: float
    ranks: tuple[RankResult, ...]
    seconds: float
    is_complete: bool = True

    @property
    def differences(self) -> list[str]:
        """What was not the same after a move, on any rank."""
        return [
            f"rank {rank}: {row.id}: {difference}"
            for rank, found in enumerate(self.ranks)
            for row in found.rows
            for difference in row.differences
        ]

    @property
    def failed(self) -> list[str]:
        """The rows that raised, each once."""
        return list(dict.fromkeys(r.id for found in self.ranks for r in found.rows if r.status is Status.FAILED))

    @property
    def num_compared(self) -> int:
        """How often the whole of a state was compared, over all ranks."""
        return sum(row.num_compared for found in self.ranks for row in found.rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types that ``json`` takes."""
        return {
            "command": self.command,
            "date": self.date,
            "device": self.device,
            "hardware": dict(self.hardware),
            "versions": dict(self.versions),
            "size": dict(self.size),
            "repeats": self.repeats,
            "time_limit": self.time_limit,
            "seconds": self.seconds,
            "complete": self.is_complete,
            "states_compared": self.num_compared,
            "differences": self.differences,
            "failed": self.failed,
            "ranks": [found.as_dict() for found in self.ranks],
        }
