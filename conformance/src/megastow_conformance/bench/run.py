"""The course of a benchmark run: bounds first, then row by row, and a row that fails does not stop the others.

Nothing here prints; what happens is told to a ``Listener``, as in the demo.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
import torch.utils.deterministic

from megastow.device import device_for
from megastow_conformance import megatron_core
from megastow_conformance.bench import bounds
from megastow_conformance.bench.circumstances import hardware, versions
from megastow_conformance.bench.meeting import Meeting, RankError
from megastow_conformance.bench.registry import NotAvailable, Row
from megastow_conformance.bench.result import (
    BenchResult,
    Bound,
    Figure,
    RankResult,
    RowResult,
    Status,
)
from megastow_conformance.bench.session import Session
from megastow_conformance.demo import Listener
from megastow_conformance.demo_models import Size

_STATE_COPIES = 3.5  # host memory that a run holds at most, in states: the copy to compare with, and two managers'


def num_activities(rows: Sequence[Row]) -> int:
    """How many activities ``run`` begins and ends."""
    return len(rows) + 2


def run(
    size: Size,
    rows: Sequence[Row],
    *,
    repeats: int,
    time_limit: float,
    command: str,
    listener: Listener,
    keep: Callable[[BenchResult], None],
) -> BenchResult:
    """Runs the rows on this rank; ``demo.join`` first, and call it on every rank.

    Device memory: two trainers at most. Host memory: about three and a half times the state of a rank.

    Args:
        size: The trainer's size.
        rows: What to measure.
        repeats: How often a steady thing is measured.
        time_limit: Seconds after which no further row is begun.
        command: What was asked for, to be kept with the result.
        listener: Who is told what happens.
        keep: Is given what this rank has found so far, after every row, because a run may be ended from outside.
    """
    return _Run(size, rows, repeats, time_limit, command, listener).run(keep)


class _Run:
    """One run on one rank."""

    def __init__(
        self, size: Size, rows: Sequence[Row], repeats: int, time_limit: float, command: str, listener: Listener
    ) -> None:
        self._start = time.perf_counter()
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._size = size
        self._rows = rows
        self._time_limit = time_limit
        self._command = command
        self._listener = listener
        self._session = Session(size, repeats, device_for(megatron_core.device()), Meeting.of_all())
        self._results: list[RowResult] = []

    def run(self, keep: Callable[[BenchResult], None]) -> BenchResult:
        """Runs everything, in order."""
        # Where deterministic algorithms are asked for, as on a GPU here, torch fills all memory that it hands out. That
        # would be added to what others do with new buffers.
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False
        self._look_at_the_empty_device()
        self._measure_bounds()
        so_far = self._result()
        for row in self._rows:
            self._results.append(self._measure(row))
            keep(dataclasses.replace(so_far, ranks=(self._mine(),), seconds=time.perf_counter() - self._start))
        self._let_go()
        ranks = tuple(self._session.gather(self._mine()))
        return dataclasses.replace(so_far, ranks=ranks, seconds=time.perf_counter() - self._start, is_complete=True)

    def _mine(self) -> RankResult:
        """What this rank has found so far."""
        session = self._session
        return RankResult(session.bounds, tuple(self._results), session.memory, session.timeline)

    def _result(self) -> BenchResult:
        """What is known before the first row."""
        session = self._session
        return BenchResult(
            command=self._command,
            date=self._date,
            device=session.device.torch_device.type,
            hardware=hardware(session.device.torch_device),
            versions=versions(session.device.torch_device),
            size=dataclasses.asdict(self._size),
            repeats=session.repeats,
            time_limit=self._time_limit,
            ranks=(self._mine(),),
            seconds=time.perf_counter() - self._start,
            is_complete=False,
        )

    def _look_at_the_empty_device(self) -> None:
        """What is in use before anything of ours is: the context, and what the first collective brings."""
        session, device = self._session, self._session.device
        torch.zeros(1, device=device.torch_device)
        device.synchronize()
        session.memory["context"] = device.memory()
        dist: Any = torch.distributed
        dist.all_reduce(torch.zeros(1, device=device.torch_device))
        device.synchronize()
        device.release_cached()
        session.memory["first collective"] = device.memory()

    def _measure_bounds(self) -> None:
        session = self._session
        self._listener.begin("touching the host memory that the run will use")
        per_rank = self._size.num_parameters * (2 + 12 / session.world)
        touched = bounds.first_touch(int(_STATE_COPIES * per_rank))
        session.bounds["first_touch"] = touched
        self._listener.end(_speeds([touched]))
        self._listener.begin("measuring what the machine can do")
        session.bounds.update(bounds.copy_bounds(session.timed, session.device, session.repeats))
        session.bounds.update(bounds.gather_bound(session.timed, session.device, session.world, session.repeats))
        session.bounds.update(bounds.lock_bounds(session.timed, session.device))
        session.memory["before the model"] = session.device.memory()
        self._listener.end(_speeds([bound for key, bound in session.bounds.items() if key != "first_touch"]))

    def _measure(self, row: Row) -> RowResult:
        """One row, whatever becomes of it; the ranks agree on that."""
        session = self._session
        start = time.perf_counter()
        self._listener.begin(row.id)
        if session.any_rank(start - self._start > self._time_limit):
            attempt = _Attempt(Status.NOT_RUN, reason=f"out of time: {self._time_limit:.0f} s had passed")
        else:
            attempt = _try(session, row)
        notes, differences, num_compared = session.take_findings()
        failed = session.any_rank(attempt.status is Status.FAILED)
        if failed and attempt.status is not Status.FAILED:
            attempt = _Attempt(
                Status.FAILED, reason="; ".join(filter(None, ["it failed on another rank", attempt.reason]))
            )
        if failed or session.any_rank(bool(differences)):
            self._let_go()
        if failed:
            session.forget()
        result = RowResult(
            id=row.id,
            title=row.title,
            is_baseline=row.is_baseline,
            goals=row.goals,
            status=attempt.status,
            figures=attempt.figures,
            notes=(*([attempt.reason] if attempt.reason else []), *notes),
            seconds=time.perf_counter() - start,
            differences=differences,
            num_compared=num_compared,
        )
        self._listener.end(_summary(result))
        return result

    def _let_go(self) -> None:
        """Drops what a row left behind. After a failure that may fail too, and what was measured must not be lost."""
        try:
            self._session.drop()
        except Exception:
            traceback.print_exc()


@dataclass(frozen=True)
class _Attempt:
    """What came of measuring a row; the reason where there are no figures."""

    status: Status
    figures: tuple[Figure, ...] = ()
    reason: str = ""


def _try(session: Session, row: Row) -> _Attempt:
    """Measures a row; what it raises is an answer too."""
    try:
        with session.meeting.together():
            figures = tuple(
                dataclasses.replace(figure, goal=row.goals.get(figure.name)) for figure in row.measure(session)
            )
    except NotAvailable as reason:
        return _Attempt(Status.NOT_AVAILABLE, reason=str(reason))
    except RankError as reason:
        return _Attempt(Status.FAILED, reason=str(reason))
    except Exception as error:
        traceback.print_exc()
        # Without its stack, whose variables hold tensors.
        return _Attempt(Status.FAILED, reason=f"{type(error).__name__}: {error}")
    return _Attempt(Status.MEASURED, figures)


def _summary(result: RowResult) -> str:
    """A row in one line, with what took how long."""
    wrong = f", {len(result.differences)} DIFFERENCES" if result.differences else ""
    if result.status is not Status.MEASURED:
        return f"{result.status}: {'; '.join(result.notes)}{wrong}"
    return f"{', '.join(map(_short, result.figures))}{wrong} ({result.seconds:.1f} s)"


def _short(figure: Figure) -> str:
    return f"{figure.name} {figure.unit.show(figure.value.median)}"


def _speeds(found: Iterable[Bound]) -> str:
    return ", ".join(f"{bound.name} {bound.bytes_per_second / 1e9:.1f} GB/s" for bound in found)
