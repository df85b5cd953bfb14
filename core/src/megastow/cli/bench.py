"""``megastow bench``: what this machine can do, and what megastow and others make of it.

What measures is in ``megastow_conformance.bench``, because core knows no Megatron; ranks are started by ``launch``.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megastow.cli import launch
from megastow.cli.bench_tables import bench_table, bench_verdict
from megastow.cli.console import Narrator, SilentNarrator, make_console, print_group

if TYPE_CHECKING:
    from megastow_conformance.bench.result import BenchResult

_HUNG_SECONDS = 300  # after the time limit, which only decides what is begun


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
        size: Name of a preset.
        ranks: Processes to start.
        rows: Names of what to measure; empty for everything.
        repeats: How often a steady thing is measured.
        json_file: Where to write everything, or None.
        plot_file: Where to draw it, or None.
        time_limit: Seconds after which no further row is begun.
    """

    size: str
    ranks: int
    rows: tuple[str, ...]
    repeats: int
    json_file: Path | None
    plot_file: Path | None
    time_limit: int


def run_bench(settings: Settings) -> int:
    """Runs the benchmark, as the parent of several ranks, as one of them, or as the only one.

    Returns:
        The exit status: 0 if every bit was the same, 1 if not, 3 if a row failed or the run could not be finished.
    """
    problem = (
        launch.what_is_missing(settings.size, settings.ranks)
        or _what_else_is_missing(settings)
        or launch.what_cannot_be_written([settings.json_file, settings.plot_file])
    )
    if problem is not None:
        print(f"megastow bench: {problem}", file=sys.stderr)
        return launch.UNFINISHED
    return launch.run_job(
        launch.Job("bench", _arguments(settings), settings.ranks, run_rank=lambda: _run_rank(settings))
    )


def _what_else_is_missing(settings: Settings) -> str | None:
    """What this command needs beyond a trainer; None if it is there."""
    from megastow_conformance.bench.registry import choose_rows

    try:
        choose_rows(settings.rows)
    except ValueError as error:
        return str(error)
    if settings.plot_file is not None and importlib.util.find_spec("matplotlib") is None:
        return (
            "--plot draws with matplotlib, which is missing: pip install matplotlib, or write --json FILE here "
            "and draw it elsewhere (see benchmarks/README.md)"
        )
    return None


def _run_rank(settings: Settings) -> int:
    """Takes part as one rank, or alone; rank 0 tells what happens and what came out."""
    from megastow_conformance import demo
    from megastow_conformance.bench import run
    from megastow_conformance.bench.registry import choose_rows
    from megastow_conformance.demo_models import SIZES

    size, rows = SIZES[settings.size], choose_rows(settings.rows)
    is_first = launch.is_first_rank()
    console = make_console() if is_first else Console(quiet=True)
    json_file = settings.json_file if is_first else None
    narrator: Narrator | SilentNarrator = SilentNarrator()
    with launch.limited("bench", settings.time_limit + _HUNG_SECONDS):
        try:
            if is_first:  # asking for a device's name takes memory of it
                console.print(launch.headline(), markup=False, soft_wrap=True)
            console.print("loading megatron-core ...", markup=False)
            demo.join()
            console.print(f"size {size.name}: {size.description}", markup=False, soft_wrap=True)
            if is_first:
                narrator = Narrator(console, run.num_activities(rows))
            result = run.run(
                size,
                rows,
                repeats=settings.repeats,
                time_limit=settings.time_limit,
                command=shlex.join(["megastow", "bench", *_arguments(settings)]),
                listener=narrator,
                keep=partial(_write, json_file),
            )
            narrator.close()
            print_group(console, bench_table(result))
            _write(json_file, result)
            if json_file is not None:
                console.print(f"everything is in {json_file}", markup=False, soft_wrap=True)
            if is_first and settings.plot_file is not None:
                from megastow.cli.bench_plot import draw

                draw(result.as_dict(), settings.plot_file)
                console.print(f"drawn in {settings.plot_file}", markup=False, soft_wrap=True)
            console.print(bench_verdict(result), markup=False, soft_wrap=True)
            sys.stdout.flush()
            demo.leave()
        except Exception as error:
            narrator.close()
            traceback.print_exc()
            print(f"megastow bench: not finished: {type(error).__name__}: {error}", file=sys.stderr)
            return launch.UNFINISHED
    if result.differences:
        return launch.DIFFERENT
    return launch.UNFINISHED if result.failed else launch.IDENTICAL


def _write(file: Path | None, result: BenchResult) -> None:
    """Writes what was found to the file that was asked for, if one was: all of it, or what was there stays."""
    if file is None:
        return
    text = json.dumps(result.as_dict(), indent=1) + "\n"
    place = file.resolve()
    if place.exists() and not place.is_file():  # /dev/stdout, a pipe
        place.write_text(text, encoding="utf-8")
        return
    part = place.with_name(f"{place.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(place)


def _arguments(settings: Settings) -> list[str]:
    """What each rank is given."""
    arguments = [f"--size={settings.size}", f"--ranks={settings.ranks}", f"--repeats={settings.repeats}"]
    arguments.append(f"--time-limit={settings.time_limit}")
    if settings.rows:
        arguments.append(f"--rows={','.join(settings.rows)}")
    if settings.json_file is not None:
        arguments.append(f"--json={settings.json_file}")
    if settings.plot_file is not None:
        arguments.append(f"--plot={settings.plot_file}")
    return arguments
