"""What ``megastow bench`` shows: one table of ratios, and what came out in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megastow.report import format_bytes

if TYPE_CHECKING:
    from megastow_conformance.bench.result import BenchResult, Bound, Figure, RowResult

_SHOWN_DIFFERENCES = 10
_AGAINST_WIDTH = 22  # the longest takes two lines of it
_STYLES = {"failed": "bold red", "not run": "yellow", "not available": "dim"}


def bench_table(result: BenchResult) -> Group:
    """Bounds, rows and baselines of rank 0, and what the figures mean here."""
    title = "Ratios within this run" + (" (rank 0)" if len(result.ranks) > 1 else "")
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("row", no_wrap=True, style="bold")
    table.add_column("figure", no_wrap=True)
    for heading in ("median", "min", "max", "goal"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("against", max_width=_AGAINST_WIDTH)
    for heading in ("seconds", "bytes", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    first = result.ranks[0]
    for bound in first.bounds.values():
        table.add_row("bound", bound.name, *[""] * 5, *_bound_cells(bound))
    for is_baseline in (False, True):
        table.add_section()
        for row in first.rows:
            if row.is_baseline is is_baseline:
                _add_row(table, row, is_cuda=result.device == "cuda")
    notes = [Text(f"{row.id}: {'; '.join(row.notes)}", "dim") for row in first.rows if row.notes]
    memory = [f"{moment} {format_bytes(figures.driver_bytes)}" for moment, figures in first.memory.items()]
    where = "device memory, by the driver" if result.device == "cuda" else "resident memory"
    part = (
        ""
        if result.device == "cuda"
        else " (the host memory for copies, and the copies to compare with, are part of it)"
    )
    notes.append(Text(f"{where}: {', '.join(memory)}{part}", "dim"))
    return Group(Text(), table, *notes, Text(_caption(result), "dim"), Text())


def _bound_cells(bound: Bound) -> tuple[str, str, str]:
    return f"{bound.seconds.minimum:.4f}", format_bytes(bound.nbytes), f"{bound.bytes_per_second / 1e9:.2f}"


def _add_row(table: Table, row: RowResult, *, is_cuda: bool) -> None:
    """A line for each figure; one with the goals where there are none, for the reason that is among the notes."""
    if not row.figures:
        goals = ", ".join(dict.fromkeys(map(str, row.goals.values())))
        table.add_row(row.id, Text(str(row.status), _STYLES[str(row.status)]), "", "", "", goals)
    for index, figure in enumerate(row.figures):
        table.add_row("" if index else row.id, *_figure_cells(figure, is_cuda=is_cuda))


def _figure_cells(figure: Figure, *, is_cuda: bool) -> list[str | Text]:
    values, shown = figure.value, figure.unit.show
    style = ""
    if figure.goal is not None and is_cuda:
        style = "green" if figure.goal.is_met_by(values.median) else "yellow"
    speed = figure.bytes_per_second
    is_repeated = len(values.values) > 1
    return [
        figure.name,
        Text(shown(values.median), style),
        shown(values.minimum) if is_repeated else "",
        shown(values.maximum) if is_repeated else "",
        str(figure.goal or ""),
        figure.against,
        f"{figure.seconds.median:.4f}" if figure.seconds else "",
        format_bytes(figure.nbytes) if figure.nbytes is not None else "",
        f"{speed / 1e9:.2f}" if speed is not None else "",
    ]


def _caption(result: BenchResult) -> str:
    meaning = (
        "A ratio of speeds is bytes kept over the seconds of the whole call, from the call to the return with device "
        "memory given back, over the bound; a bound is the best of its repeats. All bits are compared after a cycle."
    )
    if result.device == "cuda":
        return meaning
    return (
        "There is no GPU here, so rows mean less: the device is ordinary memory, bounds are plain copies within it, "
        "nothing is page-locked, and memory in use is the resident memory of this process. The goals are for a GPU and "
        f"a trainer of 1.4b, and are only shown. {meaning}"
    )


def bench_verdict(result: BenchResult) -> str:
    """What came out, in plain words."""
    lines = []
    if result.differences:
        shown = result.differences[:_SHOWN_DIFFERENCES]
        if len(result.differences) > len(shown):
            shown.append(f"and {len(result.differences) - len(shown)} more")
        lines.append(f"DIFFERENT: {len(result.differences)} times a tensor was not what it was before a move:")
        lines += [f"  - {line}" for line in shown]
    elif result.num_compared:
        lines.append(f"IDENTICAL, bit for bit, in all {result.num_compared} comparisons of a whole state.")
    else:
        lines.append("Nothing was moved, so nothing was compared.")
    if result.failed:
        lines.append(f"FAILED: {', '.join(result.failed)}. Tracebacks are above; these rows have no figures.")
    lines.append(f"{result.seconds:.0f} s in all.")
    return "\n".join(lines)
