"""What the commands show, made of rich's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megastow.report import format_bytes

if TYPE_CHECKING:
    from megastow.cli.doctor import Diagnosis
    from megastow_conformance.demo_outcome import Comparison, Move, Outcome

_SHOWN_DIFFERENCES = 10
_COUNTED = (
    *("losses", "gradient norms", "weights", "main weights", "moments", "other states"),
    *("generations", "reference weights"),
)


def moves_table(outcome: Outcome) -> Group:
    """Every move of the demo, with the kinds that were moved."""
    title = "Every move" + (" on rank 0" if outcome.ranks > 1 else "")
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("round", "tenant", "direction", "kind"):
        table.add_column(heading, no_wrap=True)
    memory = "device memory" if outcome.device == "cuda" else "resident memory"
    for heading in ("tensors", "device", "host", "seconds", "GB/s", f"{memory}\nbefore → after"):
        table.add_column(heading, justify="right")
    for position, move in enumerate(outcome.moves):
        is_last = position + 1 == len(outcome.moves) or outcome.moves[position + 1].round != move.round
        _add_move(table, move, is_last)
    return Group(Text(), table, Text(_caption(outcome), style="dim"), Text())


def _add_move(table: Table, move: Move, ends_section: bool) -> None:
    """A line for each kind if there are several, and a bold one for the whole call."""
    report = move.report
    kinds = [kind for kind in report.kinds.values() if kind.moved and kind.num_tensors]
    where = [str(move.round or "-"), move.tenant, report.direction]
    for kind in kinds if len(kinds) > 1 else ():
        row = [*where, str(kind.kind), *_figures(kind.num_tensors, kind.device_bytes, kind.host_bytes, kind.seconds)]
        table.add_row(*row, "")
        where = ["", "", ""]
    name = str(kinds[0].kind) if len(kinds) == 1 else "all"
    row = [*where, name, *_figures(report.num_tensors, report.device_bytes, report.host_bytes, report.seconds)]
    before, after = format_bytes(report.before.driver_bytes), format_bytes(report.after.driver_bytes)
    table.add_row(*row, f"{before} → {after}", style="bold", end_section=ends_section)


def _figures(num_tensors: int, device_bytes: int, host_bytes: int, seconds: float) -> list[str]:
    speed = f"{device_bytes / seconds / 1e9:.2f}" if seconds and host_bytes else "-"  # dropping bytes has no speed
    return [str(num_tensors), format_bytes(device_bytes), format_bytes(host_bytes), f"{seconds:.4f}", speed]


def _caption(outcome: Outcome) -> str:
    if outcome.device != "cuda":
        return (
            "There is no GPU here, so memory is the resident memory of the process. From the first offload on, the "
            "host memory for the copies is part of it; what comes and goes is what the tenants would hold on a device."
        )
    bound = ", ".join(f"{way} {speed / 1e9:.1f} GB/s" for way, speed in outcome.copy_bound.items())
    return (
        f"Memory is what the driver reports as used on the device. Page-locked copy bound here: {bound}. A first "
        "offload also allocates and page-locks host memory; kinds are timed on the copy stream, calls from end to end."
    )


def verdict(outcome: Outcome) -> str:
    """What came out, in plain words."""
    found = outcome.comparison
    ranks = f" on {outcome.ranks} ranks" if outcome.ranks > 1 else ""
    if not found.num_tensors:
        return "UNKNOWN: there was nothing to compare, so this run shows nothing."
    if not found.differences:
        return (
            f"IDENTICAL, bit for bit{ranks}: {_counted(found)} equal those of a trainer that never left the device and "
            f"of a reference model that never moved; {found.num_tensors} tensors with {found.nbytes:,} bytes compared."
        )
    shown = [str(difference) for difference in found.differences[:_SHOWN_DIFFERENCES]]
    if len(found.differences) > len(shown):
        shown.append(f"and {len(found.differences) - len(shown)} more")
    listing = "\n".join(f"  - {line}" for line in shown)
    return (
        f"DIFFERENT{ranks}: {len(found.differences)} things are not what they are without moves, of {_counted(found)} "
        f"({found.num_tensors} tensors with {found.nbytes:,} bytes compared):\n{listing}"
    )


def _counted(found: Comparison) -> str:
    present = [(found.counts[name], name) for name in _COUNTED if found.counts[name]]
    counts = [f"{count} {name if count > 1 else name.removesuffix('s')}" for count, name in present]
    return f"{', '.join(counts[:-1])} and {counts[-1]}" if len(counts) > 1 else counts[0]


def diagnosis_tables(diagnosis: Diagnosis) -> RenderableType:
    """What the doctor found, what it means, and what to do."""
    facts = Table(title="What is here", title_style="bold", title_justify="left", show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for _section, lines in diagnosis.facts():
        for index, (name, value) in enumerate(lines):
            facts.add_row(name, Text(value), end_section=index + 1 == len(lines))
    adapters = Table(title="Adapters", title_style="bold", title_justify="left")
    adapters.add_column("adapter", style="bold")
    adapters.add_column("verdict")
    adapters.add_column("why", overflow="fold")
    for verdict_ in diagnosis.verdicts:
        accepts = not verdict_.reasons
        reason = verdict_.adapter.supports if accepts and verdict_.adapter else "; ".join(verdict_.reasons)
        adapters.add_row(
            verdict_.name, Text("accepts" if accepts else "refuses", "green" if accepts else "red"), Text(reason)
        )
    parts: list[RenderableType] = [facts, Text(), adapters, Text()]
    for finding in diagnosis.findings:
        mark = Text("PROBLEM  ", "bold red") if finding.is_problem else Text("note     ", "yellow")
        parts.append(mark + Text(str(finding)))
    parts.append(Text(diagnosis.conclusion, "bold green" if diagnosis.is_healthy else "bold red"))
    return Group(*parts)
