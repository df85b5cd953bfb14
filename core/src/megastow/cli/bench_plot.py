"""The picture of a benchmark: every ratio as a bar against its bound, and device memory through one cycle.

Drawn by matplotlib without a display; it is an extra, and imported only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure as Picture

if TYPE_CHECKING:
    from megastow_conformance.bench.result import BenchResult, Figure, Timeline

_OURS, _OTHERS, _BOUND = "#2f6f9f", "#b9bec4", "#444444"
_DRIVER, _ALLOCATED = "#2f6f9f", "#d98032"
_SPEEDS = ("out", "in", "both")  # the bounds that ratios of speeds are held against


def draw(result: BenchResult, file: Path) -> None:
    """Draws rank 0's figures into a PNG file, whatever the file is called."""
    picture: Any = Picture(figsize=(11, 11), layout="constrained")
    bars, memory = picture.subplots(2, 1, height_ratios=(2, 1))
    hardware = result.hardware.get("device") or f"CPU ({result.hardware['processor']})"
    picture.suptitle(f"megastow bench, size {result.size['name']}, {hardware}, {result.date}")
    _draw_bars(bars, result)
    _draw_memory(memory, result.ranks[0].timeline, is_cuda=result.device == "cuda")
    picture.savefig(file, format="png", dpi=120)


def _draw_bars(axes: Any, result: BenchResult) -> None:
    """What is held against a bound of the machine: others grey, ours blue, the spread as a line, the goal as a mark."""
    names = {bound.name for key, bound in result.ranks[0].bounds.items() if key in _SPEEDS}
    found: Sequence[tuple[str, bool, Figure]] = [
        (f"{row.id} {figure.name}", row.is_baseline, figure)
        for row in result.ranks[0].rows
        for figure in row.figures
        if figure.against in names
    ]
    for position, (_label, is_baseline, figure) in enumerate(found):
        value = figure.value
        axes.barh(position, value.median, color=_OTHERS if is_baseline else _OURS, height=0.7)
        axes.plot([value.minimum, value.maximum], [position, position], color="black", linewidth=1.5)
        axes.text(0.005, position, f"{value.median:.3f}", va="center", color="black" if is_baseline else "white")
        if figure.goal is not None:
            axes.plot([figure.goal.limit] * 2, [position - 0.4, position + 0.4], color="#c0392b", linewidth=2)
    axes.axvline(1.0, color=_BOUND, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(found)), [label for label, _, _ in found])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("speed over the bound measured in the same run (dashed); goal in red, spread in black")


def _draw_memory(axes: Any, timeline: Timeline, *, is_cuda: bool) -> None:
    """What the driver sees in use, and what torch's allocator has handed out where there is one."""
    seconds = [sample.seconds for sample in timeline.samples]
    used = [sample.driver_bytes / 2**30 for sample in timeline.samples]
    axes.plot(seconds, used, color=_DRIVER, label="in use, by the driver" if is_cuda else "resident")
    if is_cuda:
        allocated = [(sample.allocated_bytes or 0) / 2**30 for sample in timeline.samples]
        axes.plot(seconds, allocated, color=_ALLOCATED, label="handed out by torch")
    for phase, start in timeline.phases.items():
        axes.axvline(start, color=_BOUND, linestyle=":", linewidth=1)
        axes.annotate(
            phase, (start, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3), textcoords="offset points",
            va="top", rotation=90, fontsize=8,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds, one cycle of the trainer")
    axes.set_ylabel("device memory, GiB" if is_cuda else "resident memory, GiB")
    if seconds:
        axes.legend(loc="lower right")
