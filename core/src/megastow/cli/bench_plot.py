"""The picture of a benchmark: every ratio as a bar against its bound, and device memory through one cycle.

It is made of what ``--json`` writes, so that a run on a machine without matplotlib can be drawn elsewhere. That library
is an extra, imported only here, and needs no display.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture

_OURS, _OTHERS, _GOAL, _MARK = "#2f6f9f", "#b9bec4", "#c0392b", "#444444"
_USED, _ALLOCATED = "#2f6f9f", "#d98032"
_SPEEDS = ("out", "in", "both")  # the bounds that ratios of speeds are held against


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draws rank 0's figures.

    Args:
        result: ``BenchResult.as_dict``, or the same read from a file.
        file: Becomes a PNG, whatever it is called.
    """
    picture: Any = Picture(figsize=(11, 11), layout="constrained")
    bars, memory = picture.subplots(2, 1, height_ratios=(2, 1))
    hardware = result["hardware"]
    picture.suptitle(
        f"megastow bench, size {result['size']['name']}, {hardware.get('device') or hardware['processor']}, "
        f"{len(result['ranks'])} rank{'s' * (len(result['ranks']) > 1)}, {result['date']}"
    )
    _draw_bars(bars, result["ranks"][0])
    _draw_memory(memory, result["ranks"][0]["timeline"], is_cuda=result["device"] == "cuda")
    picture.savefig(file, format="png", dpi=120)


def _draw_bars(axes: Any, rank: Mapping[str, Any]) -> None:
    """What is held against a bound of the machine: others grey, ours blue, the spread as a line, the goal as a mark."""
    bounds = {bound["name"] for key, bound in rank["bounds"].items() if key in _SPEEDS}
    found = [(row, figure) for row in rank["rows"] for figure in row["figures"] if figure["against"] in bounds]
    for position, (row, figure) in enumerate(found):
        value = figure["value"]
        fill, ink = (_OTHERS, "black") if row["baseline"] else (_OURS, "white")
        axes.barh(position, value["median"], color=fill, height=0.7)
        axes.plot([value["min"], value["max"]], [position, position], color="black", linewidth=1.5)
        axes.text(0.005, position, f"{value['median']:.3f}", va="center", color=ink)
        if figure["goal"]:
            axes.plot([figure["goal"]["limit"]] * 2, [position - 0.4, position + 0.4], color=_GOAL, linewidth=2)
    axes.axvline(1.0, color=_MARK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(found)), [f"{row['id']} {figure['name']}" for row, figure in found])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("speed over the bound measured in the same run (dashed); goal in red, spread in black")


def _draw_memory(axes: Any, timeline: Mapping[str, Any], *, is_cuda: bool) -> None:
    """What the driver sees in use, and what torch's allocator has handed out where there is one."""
    samples = [dict(zip(timeline["columns"], sample, strict=True)) for sample in timeline["samples"]]
    seconds = [sample["seconds"] for sample in samples]
    used = [sample["driver_bytes"] / 2**30 for sample in samples]
    axes.plot(seconds, used, color=_USED, label="in use, by the driver" if is_cuda else "resident")
    if is_cuda:
        allocated = [sample["allocated_bytes"] / 2**30 for sample in samples]
        axes.plot(seconds, allocated, color=_ALLOCATED, label="handed out by torch")
    for phase, start in timeline["phases"].items():
        axes.axvline(start, color=_MARK, linestyle=":", linewidth=1)
        where = {"xycoords": ("data", "axes fraction"), "xytext": (3, 4), "textcoords": "offset points"}
        axes.annotate(phase, (start, 0.0), **where, va="bottom", rotation=90, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds, one cycle of the trainer")
    axes.set_ylabel("device memory, GiB" if is_cuda else "resident memory, GiB")
    axes.legend(loc="lower right")
