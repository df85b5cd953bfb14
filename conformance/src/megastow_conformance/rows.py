"""The rows of the matrix: which Megatron release a check runs against, and where its files are.

The matrix is data (``matrix.toml``) so that the test sessions, the suite, the images and the tables in the docs cannot
disagree about what is tested. Nothing here imports torch or Megatron, nor anything that has to be installed: noxfile.py
reads the matrix before there is an environment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megastow_conformance.scenarios import BRIEF, CORE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_HARNESS = "megastow_conformance.megatron_core"
"""The harness of a row that names none."""

DOUBLES = Path(__file__).with_name("doubles")
"""Where the doubles are, each a folder that holds a package ``megatron``."""

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "source": ("pypi", "double", "tree"),
    "device": ("any", "cuda"),
    "evidence": ("real", "double"),
    "scope": ("full", "core", "brief"),
}


class MatrixError(ValueError):
    """The matrix, or what the command line says about it, cannot be used."""


@dataclass(frozen=True)
class Row:
    """One Megatron release that checks run against.

    Attributes:
        id: Unique; shows in test ids.
        adapter: The adapter under test, by its entry point name.
        megatron: The version of Megatron, the tag of its source tree, or the name of the double.
        harness: What builds trainers for it (see ``harness.find``).
        source: Where it comes from: ``"pypi"``, ``"double"`` (in this distribution) or ``"tree"`` (somebody's folder).
        python: The Python version that the sessions use.
        torch: The CPU build of torch that they use where there is no torch.
        image: The container image that a GPU image is built from.
        device: ``"any"``, or ``"cuda"`` if a CPU is not enough.
        evidence: ``"real"`` if this very release trains in the tests, ``"double"`` if something stands in for it.
        scope: ``"full"`` for every scenario on every world size, ``"core"`` for the pairs in ``scenarios.CORE``,
            ``"brief"`` for those in ``scenarios.BRIEF``.
        ci: Whether every change is tested against it.
        path: The folder that holds the ``megatron`` package; ``None``: the one that an import finds.
    """

    id: str
    adapter: str
    megatron: str
    _: KW_ONLY
    harness: str = DEFAULT_HARNESS
    source: str = "tree"
    python: str = ""
    torch: str = ""
    image: str = ""
    device: str = "any"
    evidence: str = "real"
    scope: str = "full"
    ci: bool = False
    path: Path | None = None

    def includes(self, scenario: str, world: int) -> bool:
        """Whether the row's scope takes in a scenario on a number of ranks."""
        return self.scope == "full" or (scenario, world) in (BRIEF if self.scope == "brief" else CORE)


def read_matrix(path: Path) -> dict[str, Row]:
    """Reads the rows of a matrix file.

    Args:
        path: A TOML file with one ``[[row]]`` table a row, and a ``[default]`` table for what most of them share.

    Returns:
        The rows by id, in the order of the file.

    Raises:
        MatrixError: If the file is missing or a row is not as it should be.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MatrixError(f"cannot read the matrix: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise MatrixError(f"{path}: {error}") from error
    if odd := content.keys() - {"default", "row"}:
        raise MatrixError(f"{path}: unknown: {', '.join(sorted(odd))}")
    rows: dict[str, Row] = {}
    for table in content.get("row", []):
        row = _row(path, {**content.get("default", {}), **table})
        if row.id in rows:
            raise MatrixError(f"{path}: two rows have the id {row.id!r}")
        rows[row.id] = row
    if not rows:
        raise MatrixError(f"{path}: there is no [[row]] in it")
    return rows


def select_rows(matrix: Mapping[str, Row], ids: Iterable[str], trees: Mapping[str, Path]) -> list[Row]:
    """Picks rows by id and gives each the folder of its Megatron.

    Args:
        matrix: The rows to pick from.
        ids: The ids, each once.
        trees: The folder that holds the ``megatron`` package, by row id; a double needs none.

    Returns:
        The rows in the order of ``ids``.

    Raises:
        MatrixError: If there is no such row, or its Megatron is not where it should be.
    """
    rows = []
    for row_id in dict.fromkeys(ids):
        if row_id not in matrix:
            raise MatrixError(f"the matrix has no row {row_id!r}; it has {', '.join(matrix)}")
        row = matrix[row_id]
        folder = trees.get(row_id, DOUBLES / row.megatron if row.source == "double" else None)
        if folder is None:
            raise MatrixError(
                f"row {row_id!r} needs to know where Megatron {row.megatron} is: "
                f"pass --megastow-megatron {row_id}=FOLDER, the folder that holds the package 'megatron'"
            )
        rows.append(at(row, folder))
    return rows


def at(row: Row, folder: Path) -> Row:
    """The row, with its Megatron in a folder.

    Raises:
        MatrixError: If the folder holds no Megatron.
    """
    folder = folder.expanduser().resolve()
    if not (folder / "megatron").is_dir():
        raise MatrixError(f"row {row.id!r}: {folder} holds no package 'megatron'")
    return replace(row, path=folder)


def parse_trees(pairs: Iterable[str]) -> dict[str, Path]:
    """Reads ``ID=FOLDER`` pairs.

    Raises:
        MatrixError: If a pair is not of that form.
    """
    trees = {}
    for pair in pairs:
        row_id, equals, folder = pair.partition("=")
        if not (row_id and equals and folder):
            raise MatrixError(f"{pair!r} is not of the form ID=FOLDER")
        trees[row_id] = Path(folder)
    return trees


def _row(path: Path, table: dict[str, Any]) -> Row:
    """One row, with every value checked: a typo in the matrix must not turn into a test that never runs."""
    kinds: dict[str, type] = {field.name: bool if field.name == "ci" else str for field in fields(Row)}
    del kinds["path"]
    where = f"{path}: row {table.get('id', '?')!r}"
    if odd := kinds.keys() ^ table.keys():
        raise MatrixError(f"{where}: missing or unknown: {', '.join(sorted(odd))}")
    for name, kind in kinds.items():
        if not isinstance(table[name], kind):
            raise MatrixError(f"{where}: {name} must be of type {kind.__name__}, not {table[name]!r}")
    for name, choices in _CHOICES.items():
        if table[name] not in choices:
            raise MatrixError(f"{where}: {name} must be one of {', '.join(choices)}, not {table[name]!r}")
    return Row(**table)
