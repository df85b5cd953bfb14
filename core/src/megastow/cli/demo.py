"""``megastow demo``: two tenants in turns on one device, and what came out.

What trains and moves is in ``megastow_conformance.demo``, because core knows no Megatron; ranks are started by
``launch``.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megastow.cli import launch
from megastow.cli.console import Narrator, SilentNarrator, make_console, print_group
from megastow.cli.tables import moves_table, verdict

if TYPE_CHECKING:
    from megastow_conformance.demo_models import Size


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
        size: Name of a preset.
        ranks: Processes to start.
        rounds: Rounds.
        steps: Training steps a round.
        json_file: Where to write everything, or None.
        time_limit: Seconds until the demo counts as hung; None for the preset's own.
    """

    size: str
    ranks: int
    rounds: int
    steps: int
    json_file: Path | None
    time_limit: int | None


def run_demo(settings: Settings) -> int:
    """Runs the demo, as the parent of several ranks, as one of them, or as the only one.

    Returns:
        The exit status: 0 if everything was identical, 1 if not, 3 if the demo could not be finished.
    """
    problem = launch.what_is_missing(settings.size, settings.ranks) or launch.what_cannot_be_written(
        [settings.json_file]
    )
    if problem is not None:
        print(f"megastow demo: {problem}", file=sys.stderr)
        return launch.UNFINISHED
    return launch.run_job(
        launch.Job("demo", _arguments(settings), settings.ranks, run_rank=lambda: _run_rank(settings))
    )


def _run_rank(settings: Settings) -> int:
    """Takes part as one rank, or alone; rank 0 tells what happens and what came out."""
    from megastow_conformance import demo
    from megastow_conformance.demo_models import SIZES

    size = SIZES[settings.size]
    is_first = launch.is_first_rank()
    console = make_console() if is_first else Console(quiet=True)
    narrator: Narrator | SilentNarrator = SilentNarrator()
    with launch.limited("demo", settings.time_limit or size.seconds):
        try:
            if is_first:  # asking for a device's name takes memory of it
                console.print(launch.headline(), markup=False, soft_wrap=True)
            console.print("loading megatron-core ...", markup=False)
            _rank, world = demo.join()
            console.print(_plan(settings, size, world), markup=False, soft_wrap=True)
            if is_first:
                narrator = Narrator(console, demo.num_activities(settings.rounds, settings.steps))
            outcome = demo.run(size, rounds=settings.rounds, steps=settings.steps, listener=narrator)
            narrator.close()
            print_group(console, moves_table(outcome))
            if is_first and settings.json_file is not None:
                settings.json_file.write_text(json.dumps(outcome.as_dict(), indent=2) + "\n", encoding="utf-8")
                console.print(f"everything is in {settings.json_file}", markup=False, soft_wrap=True)
            console.print(verdict(outcome), markup=False, soft_wrap=True)
            sys.stdout.flush()
            demo.leave()
        except Exception as error:
            narrator.close()
            traceback.print_exc()
            print(f"megastow demo: not finished: {type(error).__name__}: {error}", file=sys.stderr)
            return launch.UNFINISHED
    return launch.IDENTICAL if outcome.is_identical else launch.DIFFERENT


def _plan(settings: Settings, size: Size, world: int) -> str:
    """What is about to happen."""
    return (
        f"size {size.name}: {size.description}; {world} rank{'s' * (world > 1)}, {settings.rounds} rounds of "
        f"{settings.steps} steps"
    )


def _arguments(settings: Settings) -> list[str]:
    """What each rank is given."""
    arguments = [f"--size={settings.size}", f"--ranks={settings.ranks}"]
    arguments += [f"--rounds={settings.rounds}", f"--steps={settings.steps}"]
    if settings.json_file is not None:
        arguments.append(f"--json={settings.json_file}")
    if settings.time_limit is not None:
        arguments.append(f"--time-limit={settings.time_limit}")
    return arguments
