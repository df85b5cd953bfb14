"""Where the tests of the suite itself find the Megatrons that they judge: among those that the session has prepared."""

import os
from pathlib import Path

import pytest

from megastow_conformance.plan import TREES_VARIABLE
from megastow_conformance.rows import parse_trees, read_matrix, select_rows

MATRIX = Path(__file__).parents[3] / "matrix.toml"


def row(row_id):
    """A row of the matrix with its folder; skips the test where this run has none."""
    trees = parse_trees(pair for pair in os.environ.get(TREES_VARIABLE, "").split(os.pathsep) if pair)
    if row_id not in trees:
        pytest.skip(f"this needs the real Megatron of {row_id}: nox -s tests, or {TREES_VARIABLE}={row_id}=FOLDER")
    return select_rows(read_matrix(MATRIX), [row_id], trees)[0]
