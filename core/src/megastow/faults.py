"""Named places where a test makes a move fail.

A move that is undone on failure is only worth something if every step of it has been made to fail. `point(name)` marks
such a step; it does nothing unless a test has armed that name with `inject`. Nothing else in the library uses this.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

POINTS = (
    "host.allocate",  # before anonymous memory is mapped
    "host.lock",  # before a piece is page-locked
    "pack.bucket",  # before a device bucket is made
    "pack.repoint",  # before tensors are pointed at it
    "offload.chunk",  # before each chunk's copy is queued
    "offload.confirm",  # before the copies are waited for
    "offload.release",  # before each storage is released whose bytes were kept
    "offload.drop",  # before the first storage is released whose bytes were not kept: the last way back
    "onload.reserve",  # before each storage is taken
    "onload.chunk",  # before each chunk's copy is queued
    "onload.confirm",  # before the copies are waited for
    # Only where a kind is kept on disk; the last two in threads of the move, whose error ends it.
    "disk.reserve",  # before the blocks of a file are taken
    "disk.write",  # before each chunk is written
    "disk.read",  # before each chunk is read
)

_armed: dict[str, Callable[[], None]] = {}


def point(name: str) -> None:
    """Mark a step of a move; raises what a test armed for it."""
    if _armed and name in _armed:
        _armed[name]()


@contextlib.contextmanager
def inject(name: str, error: Callable[[], BaseException], *, after: int = 0) -> Iterator[list[int]]:
    """Make `point(name)` raise `error()` once, at its passing number `after` (0: the first).

    Yields:
        A list with one number, how often the point was passed: a test can see that the fault really struck.
    """
    if name not in POINTS:
        raise ValueError(f"there is no fault point {name!r}; there are {', '.join(POINTS)}")
    passed = [0]
    counting = threading.Lock()

    def strike() -> None:
        with counting:
            passed[0] += 1
            strikes = passed[0] == after + 1
        if strikes:
            raise error()

    _armed[name] = strike
    try:
        yield passed
    finally:
        del _armed[name]
