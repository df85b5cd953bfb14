"""Tells pytest-xdist which tests share worker processes.

pytest-xdist's own way, the mark ``xdist_group``, renames tests through a private attribute of pytest: with pytest 9.2
and pytest-xdist 3.8 it silently groups nothing. A conformance test's id names its group, so the id is all that is
needed. Imported only where pytest-xdist is in use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
from xdist.scheduler import LoadGroupScheduling


class _WorkerGroupScheduling(LoadGroupScheduling):  # type: ignore[misc] # xdist is untyped
    """Sends all tests of a row and world size to one process, and other tests where xdist sends them."""

    row_ids: tuple[str, ...] = ()

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid, self.row_ids) or str(super()._split_scope(nodeid))


def group_of(nodeid: str, row_ids: Iterable[str]) -> str | None:
    """The worker group that a test's id names, such as ``mcore-0.16-w2``; ``None`` if it is no conformance test."""
    rows = "|".join(re.escape(row_id) for row_id in row_ids)
    match = re.search(rf"\[((?:{rows})-w\d+)-", nodeid)
    return match[1] if match else None


def scheduler(config: pytest.Config, log: Any, row_ids: Iterable[str]) -> LoadGroupScheduling:
    """Makes the scheduler.

    Args:
        config: pytest's configuration.
        log: xdist's logger.
        row_ids: The rows that are run.
    """
    made = _WorkerGroupScheduling(config, log)
    made.row_ids = tuple(row_ids)
    return made
