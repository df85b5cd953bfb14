"""Where the commands write: a terminal with live progress, or plain lines where nobody watches."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

_PLAIN_WIDTH = 150  # of sentences where nobody watches
_NO_EDGE = 1000


def make_console() -> Console:
    """A console on stdout."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, _PLAIN_WIDTH))
    return console


def print_group(console: Console, group: Group) -> None:
    """Prints tables and what goes with them; where a terminal is too narrow, it folds the lines of a table.

    Rich would leave out figures instead.
    """
    wide = Console(
        file=console.file, quiet=console.quiet, highlight=False, force_terminal=console.is_terminal, width=_NO_EDGE
    )
    for part in group.renderables:
        (wide if isinstance(part, Table) else console).print(part)


class Narrator:
    """Tells what happens, as a line for each activity; on a terminal with a bar below that shows the present one."""

    def __init__(self, console: Console, num_activities: int) -> None:
        self._console = console
        self._start = time.perf_counter()
        self._activity = ""
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task("", total=num_activities)
            self._progress.start()

    def begin(self, activity: str) -> None:
        """Something starts that takes time."""
        self._activity = f"{time.perf_counter() - self._start:7.1f} s  {activity} ... "
        if self._progress is None:
            self._console.print(self._activity, end="", markup=False, soft_wrap=True)
        else:
            self._progress.update(self._task, description=activity)

    def end(self, result: str) -> None:
        """It has ended, with this result."""
        if self._progress is None:
            self._console.print(result, markup=False, soft_wrap=True)
        else:
            self._console.print(self._activity + result, markup=False)
            self._progress.advance(self._task)
        self._activity = ""

    def close(self) -> None:
        """Takes the bar away, and ends the line of an activity that was broken off."""
        if self._progress is not None:
            self._progress.stop()
        elif self._activity:
            self._console.print()


class SilentNarrator:
    """For ranks other than 0, which do the same."""

    def begin(self, activity: str) -> None:
        """Nothing."""

    def end(self, result: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
