"""One call of a manager on its way: what it is called, where it is made, and what it gathers for its report."""

from __future__ import annotations

import enum
import time
import traceback
from collections.abc import Sequence

from megastow.agreement import ALONE, Ballot, Call
from megastow.report import Direction, KindReport, MemoryFigures, TransferReport
from megastow.state import StateKind


class Where(enum.Enum):
    """In which thread a move is made: the caller's, or one of its own, where the caller goes on or waits beside it."""

    HERE = enum.auto()
    BACKGROUND = enum.auto()
    BESIDE = enum.auto()


class Move:
    """What a move gathers for its report; its time runs from here.

    Attributes:
        direction: out or back.
        call: as the other ranks hear of it.
        ballot: of the ranks, once the call is made with them.
        kinds: what it did with each.
        notes: what a reader of the report should know.
    """

    def __init__(self, direction: Direction, before: MemoryFigures, call: Call) -> None:
        self._start = time.perf_counter()
        self.direction: Direction = direction
        self.kinds: dict[StateKind, KindReport] = {}
        self.notes: list[str] = []
        self.call = call
        self.ballot: Ballot = ALONE
        self._seconds = 0.0
        self._before = self._after = before

    def finish(self, after: MemoryFigures) -> None:
        """Its time is over, with so much memory in use."""
        self._seconds = time.perf_counter() - self._start
        self._after = after

    def report(self) -> TransferReport:
        """What it did."""
        return TransferReport(self.direction, self.kinds, self._seconds, self._before, self._after, tuple(self.notes))


def in_words(direction: Direction, kinds: Sequence[StateKind], *options: str) -> str:
    """A call as ranks compare it, and as their errors show it."""
    return f"{direction}({', '.join([*kinds, *filter(None, options)])})"


def clear_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, and of those behind it: plans and records, and so device memory."""
    seen: set[int] = set()  # errors may lead to each other in a circle
    left = [error]
    while left:
        error = left.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            left += [error.__cause__, error.__context__]
