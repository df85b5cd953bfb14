"""The command line: ``megastow doctor``, ``megastow demo`` and ``megastow bench``.

It stands on typer and rich, which are an extra: training jobs that import megastow need neither.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits the process with its status.

    Args:
        arguments: What follows the command's name; None for those the process was started with.
    """
    try:
        from megastow.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(
            f'megastow: the command line needs {error.name}, which is missing: install the extra "cli" '
            '(in a clone: pip install -e "core[cli]")'
        )
    app(args=None if arguments is None else list(arguments), prog_name="megastow")
