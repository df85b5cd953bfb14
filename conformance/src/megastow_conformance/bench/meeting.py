"""How the ranks of a run stay together, also when a row fails on one of them.

[Note: in step]
Meetings have numbers, and each rank writes under every one whether it is there, or what they do together has failed on
it. Who fails writes so under its next meeting. The others come to that one, since nobody gets past a meeting without
all; so the next row begins in step. They meet in the store through which they found each other: in a collective they
would wait for a rank that never comes, or that comes with another one. Where all are known to be there, one is safe.
What fails on one rank while others are in a collective of Megatron's is left to the time limit of the whole run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megastow.store import Store, StoreLine, store_of, wait_for

_MOST_SECONDS = 1800.0  # as long as gloo waits in a collective
_GRACE_SECONDS = 20.0
_HERE, _FAILED = "here", "failed"


class RankError(Exception):
    """What all ranks do together has failed on another one."""


class Meeting:
    """Where ranks meet; all of them make it, and call it alike. See [Note: in step].

    Args:
        store: Through which they found each other; None for a rank that is alone.
        rank: This rank.
        world: Number of ranks.
    """

    def __init__(self, store: Store | None = None, rank: int = 0, world: int = 1) -> None:
        self.world = world
        self._rank = rank
        self._line = StoreLine(store) if store is not None and world > 1 else None
        self._name = self._line.ask(lambda s: s.add(f"megastow-bench/{rank}", 1), _GRACE_SECONDS) if self._line else 0
        self._number = 0
        self._failed_on: list[int] = []

    @classmethod
    def of_all(cls) -> Meeting:
        """That of the default process group."""
        dist: Any = torch.distributed  # it declares no exports
        return cls(store_of(dist.group.WORLD), dist.get_rank(), dist.get_world_size())

    def meet(self) -> None:
        """Returns once all ranks are there.

        Raises:
            RankError: If what they do together has failed on another rank.
            RuntimeError: If a rank has not come within half an hour.
        """
        if self._line is not None and not self._failed_on:
            keys = self._next_keys()
            self._failed_on = self._line.ask(lambda store: self._come(store, keys), _MOST_SECONDS + _GRACE_SECONDS)
        if self._failed_on:
            raise self._error()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What all ranks do in a ``with`` block comes to its end on all of them, or on none.

        Raises:
            RankError: If it has failed on another rank.
        """
        try:
            yield
            self.meet()
        except RankError:
            raise
        except Exception as error:
            if self._failed_on:  # what came behind is no reason
                raise self._error() from error
            if self._line is not None:
                mine = self._next_keys()[self._rank]
                self._line.ask(lambda store: store.set(mine, _FAILED), _GRACE_SECONDS)
            raise
        finally:
            self._failed_on = []

    def _error(self) -> RankError:
        return RankError(f"it failed on another rank: {', '.join(map(str, self._failed_on))}")

    def _next_keys(self) -> list[str]:
        """Where each rank writes in the next meeting."""
        self._number += 1
        return [f"megastow-bench/{self._name}/{self._number}/{rank}" for rank in range(self.world)]

    def _come(self, store: Store, keys: list[str]) -> list[int]:
        """Waits for all; those on which it has failed."""
        store.set(keys[self._rank], _HERE)
        for key in keys:
            wait_for(store, key, _MOST_SECONDS)
        return [rank for rank, said in enumerate(store.multi_get(keys)) if said.decode() == _FAILED]
