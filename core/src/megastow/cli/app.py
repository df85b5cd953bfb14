"""The commands and their options; what they do is in the modules beside this one, imported when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import megastow

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stow a Megatron trainer's GPU memory in host memory between phases, and bring it back bit for bit.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"megastow {megastow.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print what megastow finds here, and whether an offload can work.

    Exit status 1 if no adapter fits or a limit would break an offload.
    """
    from megastow.cli.console import make_console
    from megastow.cli.doctor import examine
    from megastow.cli.tables import diagnosis_tables

    diagnosis = examine()
    if as_json:
        typer.echo(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        make_console().print(diagnosis_tables(diagnosis))
    raise typer.Exit(0 if diagnosis.is_healthy else 1)


@app.command()
def demo(
    size: Annotated[
        str, typer.Option(help="tiny, small, 125m, 355m or 1.4b parameters; the larger ones are for a GPU.")
    ] = "tiny",
    ranks: Annotated[int, typer.Option(min=1, help="Processes to start, as torchrun does: data-parallel ranks.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often the two tenants take turns.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps a round.")] = 2,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", dir_okay=False, help="Write everything that was found to FILE."),
    ] = None,
    time_limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="When the demo counts as hung. Default: by size."),
    ] = None,
) -> None:
    """Let a trainer and a reference model share one device in turns, and compare with a trainer that never moved.

    On a GPU where there is one, else on the CPU, with the megatron-core that is on the import path.

    Exit status 0 if everything was the same bit for bit, 1 if anything differed, 3 if the demo could not be finished.
    """
    from megastow.cli.demo import Settings, run_demo

    raise typer.Exit(run_demo(Settings(size, ranks, rounds, steps, json_file, time_limit)))


@app.command()
def bench(
    size: Annotated[
        str, typer.Option(help="tiny, small, 125m, 355m or 1.4b parameters; the larger ones are for a GPU.")
    ] = "tiny",
    ranks: Annotated[int, typer.Option(min=1, help="Processes to start, as torchrun does: data-parallel ranks.")] = 1,
    rows: Annotated[
        str, typer.Option(metavar="A,B", help="Measure only these rows (an unknown one lists them). Default: all.")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="How often a steady thing is measured.")] = 5,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", dir_okay=False, help="Write what was found to FILE, after every row."),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", dir_okay=False, help="Draw it: bars, and memory through a cycle."),
    ] = None,
    time_limit: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="After this time no further row is begun.")
    ] = 120,
) -> None:
    """Measure what this machine can do, what megastow makes of it, and what others do, as ratios within one run.

    On a GPU where there is one, else on the CPU, with the megatron-core that is on the import path. All bits are
    compared after every cycle that is timed.

    Exit status 0 if every bit was the same, 1 if anything differed, 3 if something could not be measured that should.
    """
    from megastow.cli.bench import Settings, run_bench

    names = tuple(name.strip() for name in rows.split(",") if name.strip())
    raise typer.Exit(run_bench(Settings(size, ranks, names, repeats, json_file, plot_file, time_limit)))
