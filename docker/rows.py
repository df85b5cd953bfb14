#!/usr/bin/env python3
"""What the scripts in this folder ask of the matrix. The matrix itself is read by ``megastow_conformance.rows``.

rows.py list                 every row, with the image that its own is built from and its Megatron, for people
rows.py get ROW FIELD...     fields of one row, one a line
rows.py workflow [ROW...]    these rows, or all, as JSON for the matrix of a workflow. Of the rows that need somebody's
                             source tree, those that MEGASTOW_MEGATRON ("ID=FOLDER:ID=FOLDER") knows a folder for
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conformance" / "src"))  # it is not installed where images are built

try:
    from megastow_conformance.rows import MatrixError, Row, parse_trees, read_matrix
except ImportError as error:
    sys.exit(f"rows.py: {error}. The matrix needs Python 3.11, or 3.10 with tomli; this is {sys.version.split()[0]}")


def list_rows(_: list[str]) -> Iterable[str]:
    """A line for each row, in columns."""
    lines = [("ROW", "IMAGE", "MEGATRON")]
    lines += [(row.id, row.image, f"{row.megatron} ({row.source})") for row in _chosen([])]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return [f"{line[0]:{widths[0]}}  {line[1]:{widths[1]}}  {line[2]}" for line in lines]


def get(arguments: list[str]) -> Iterable[str]:
    """The fields of a row."""
    row_id, *names = arguments
    (row,) = _chosen([row_id])
    return [str(getattr(row, name)) for name in names]


def workflow(arguments: list[str]) -> Iterable[str]:
    """The value of ``jobs.<job>.strategy.matrix``: one job for each row."""
    trees = parse_trees(filter(None, os.environ.get("MEGASTOW_MEGATRON", "").split(os.pathsep)))
    rows = _chosen(arguments)
    if arguments and (lacking := [row.id for row in rows if row.source == "tree" and row.id not in trees]):
        raise MatrixError(f"MEGASTOW_MEGATRON says of no folder that it is the source tree of {', '.join(lacking)}")
    jobs = [
        {"row": row.id, "tree": str(trees[row.id]) if row.source == "tree" else ""}
        for row in rows
        if row.source != "tree" or row.id in trees
    ]
    return [json.dumps({"include": jobs})]


def _chosen(ids: list[str]) -> list[Row]:
    """The rows of these ids, or all."""
    matrix = read_matrix(ROOT / "matrix.toml")
    if unknown := [row_id for row_id in ids if row_id not in matrix]:
        raise MatrixError(f"the matrix has no row {unknown[0]!r}; it has {', '.join(matrix)}")
    return [matrix[row_id] for row_id in ids or matrix]


COMMANDS: dict[str, Callable[[list[str]], Iterable[str]]] = {"list": list_rows, "get": get, "workflow": workflow}


def main(arguments: list[str]) -> None:
    """Runs one of the commands."""
    if not arguments or arguments[0] not in COMMANDS or arguments == ["get"]:
        sys.exit(__doc__)
    try:
        lines = COMMANDS[arguments[0]](arguments[1:])
    except MatrixError as error:
        sys.exit(f"rows.py: {error}")
    sys.stdout.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
