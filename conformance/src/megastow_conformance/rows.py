"""The rows of the matrix: which Megatron release a check runs against, and where its files are.

The matrix is data (``matrix.toml``) so that the test sessions, the suite and the tables in the docs cannot disagree
about what is tested. Nothing here imports torch or Megatron.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCOPES = ("full", "core")

CORE_SCENARIOS = frozenset(
    {
        "gpt_distopt",
        "gpt_ep2_distopt",
        "gpt_moe_distopt",
        "gpt_overlap_distopt",
        "gpt_vpp_plainopt",
        "toy_bf16_grads_plainopt",
        "toy_distopt",
        "toy_fp16_distopt",
        "toy_fp32_plainopt",
        "toy_lora_distopt",
        "toy_mixed_chain",
        "toy_plainopt",
    }
)
"""The scenarios that rows of scope ``"core"`` run: together they reach each kind of storage, with both optimizers."""


class MatrixError(ValueError):
    """The matrix, or what the command line says about it, cannot be used."""


@dataclass(frozen=True)
class Row:
    """One Megatron release that checks run against.

    Attributes:
        id: Unique; shows in test ids.
        adapter: The adapter under test, by its entry point name.
        megatron: The version of Megatron.
        python: The Python version that the release's compiled parts are tested with.
        evidence: ``"real"`` if this very release trains in the tests.
        scope: ``"full"`` for every scenario, ``"core"`` for ``CORE_SCENARIOS``.
        tier: 1 if every change is tested against it, 2 if it is tested before a release.
        path: The folder that holds the ``megatron`` package; ``None`` until it is known.
    """

    id: str
    adapter: str
    megatron: str
    python: str
    evidence: str
    scope: str
    tier: int
    path: Path | None = None

    def includes(self, scenario: str) -> bool:
        """Whether the row's scope takes in a scenario."""
        return self.scope == "full" or scenario in CORE_SCENARIOS


def read_matrix(path: Path) -> dict[str, Row]:
    """Reads the rows of a matrix file.

    Args:
        path: A TOML file with one ``[[row]]`` table a row.

    Returns:
        The rows by id, in the order of the file.

    Raises:
        MatrixError: If the file is missing or a row is not as it should be.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("row", [])
    except OSError as error:
        raise MatrixError(f"cannot read the matrix: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise MatrixError(f"{path}: {error}") from error
    rows: dict[str, Row] = {}
    for table in tables:
        row = _row(path, table)
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
        trees: The folder that holds the ``megatron`` package, by row id.

    Returns:
        The rows in the order of ``ids``.

    Raises:
        MatrixError: If there is no such row, or its Megatron is not where it should be.
    """
    rows = []
    for row_id in dict.fromkeys(ids):
        if row_id not in matrix:
            raise MatrixError(f"the matrix has no row {row_id!r}; it has {', '.join(matrix)}")
        if row_id not in trees:
            raise MatrixError(
                f"row {row_id!r} needs to know where megatron-core {matrix[row_id].megatron} is: "
                f"pass --megastow-megatron {row_id}=FOLDER, the folder that holds the package 'megatron'"
            )
        folder = trees[row_id].expanduser().resolve()
        if not (folder / "megatron").is_dir():
            raise MatrixError(f"row {row_id!r}: {folder} holds no package 'megatron'")
        rows.append(replace(matrix[row_id], path=folder))
    return rows


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
    kinds: dict[str, type] = {field.name: int if field.name == "tier" else str for field in fields(Row)}
    del kinds["path"]
    where = f"{path}: row {table.get('id', '?')!r}"
    if odd := kinds.keys() ^ table.keys():
        raise MatrixError(f"{where}: missing or unknown: {', '.join(sorted(odd))}")
    for name, kind in kinds.items():
        if not isinstance(table[name], kind):
            raise MatrixError(f"{where}: {name} must be of type {kind.__name__}, not {table[name]!r}")
    if table["scope"] not in SCOPES:
        raise MatrixError(f"{where}: scope must be one of {', '.join(SCOPES)}, not {table['scope']!r}")
    return Row(**table)
