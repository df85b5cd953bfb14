"""How a row is declared: one function with a decorator, which is all that adding a row takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megastow_conformance.bench.result import Figure, Goal

if TYPE_CHECKING:
    from megastow_conformance.bench.session import Session

Measure = Callable[["Session"], Iterable[Figure]]
"""What measures a row: figures, or ``NotAvailable``. What it says to ``Session.note`` is shown beside them."""


class NotAvailable(Exception):  # noqa: N818 - it is an answer and not an error
    """There is nothing to measure here: the library, the machine or the other party lacks it; the message says what."""


@dataclass(frozen=True)
class Row:
    """Something to measure.

    Attributes:
        id: What ``--rows`` takes.
        title: What it measures, for people.
        goals: What its figures should be, by the figure's name.
        is_baseline: Whether it measures how others do it.
        measure: Measures it.
    """

    id: str
    title: str
    goals: Mapping[str, Goal]
    is_baseline: bool
    measure: Measure


_REGISTERED: dict[str, Row] = {}


def row(row_id: str, title: str, goals: Mapping[str, Goal]) -> Callable[[Measure], Measure]:
    """Declares the function as the one that measures a row of megastow's."""
    return _register(row_id, title, goals, is_baseline=False)


def baseline(row_id: str, title: str) -> Callable[[Measure], Measure]:
    """Declares the function as the one that measures how somebody else does it."""
    return _register(row_id, title, {}, is_baseline=True)


def _register(row_id: str, title: str, goals: Mapping[str, Goal], *, is_baseline: bool) -> Callable[[Measure], Measure]:
    def register(measure: Measure) -> Measure:
        _REGISTERED[row_id] = Row(row_id, title, goals, is_baseline, measure)
        return measure

    return register


def known_rows() -> tuple[Row, ...]:
    """Every row, in the order in which they run."""
    from megastow_conformance.bench import baselines, rows  # noqa: F401 - they register what they define

    return tuple(sorted(_REGISTERED.values(), key=lambda known: known.is_baseline))


def choose_rows(names: Sequence[str]) -> tuple[Row, ...]:
    """The rows with these names, in the order in which they run; all of them if no name is given.

    Raises:
        ValueError: If there is no row of that name.
    """
    rows = known_rows()
    unknown = [name for name in names if name not in {known.id for known in rows}]
    if unknown:
        raise ValueError(
            f"there is no row {', '.join(map(repr, unknown))}; there are {', '.join(known.id for known in rows)}"
        )
    return tuple(known for known in rows if known.id in names or not names)
