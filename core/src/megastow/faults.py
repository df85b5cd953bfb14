"""Named places where a test makes a move fail, or damages what it moves.

A move that is undone on failure is only worth something if every step of it has been made to fail. `point(name)` marks
such a step; it does nothing unless a test has armed that name with `inject` or `meddle`. Nothing else in the library
uses this.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch

POINTS = (
    "host.allocate",  # before anonymous memory is mapped
    "host.lock",  # before a piece is page-locked
    "pack.bucket",  # before a device bucket is made
    "pack.repoint",  # before tensors are pointed at it
    "offload.chunk",  # before each chunk's copy is queued
    "offload.copied",  # behind each chunk's copy; at hand are the bytes that it writes, uint8 on the host
    "offload.confirm",  # before the copies are waited for
    "offload.release",  # before each storage is released whose bytes were kept
    "offload.drop",  # before the first storage is released whose bytes were not kept: the last way back
    "onload.reserve",  # before each storage is taken
    "onload.chunk",  # before each chunk's copy is queued
    "onload.copied",  # behind each chunk's copy; at hand are the bytes that it writes, uint8 on the device
    "onload.confirm",  # before the copies are waited for
    # Only where weights are derived; the second behind the last copy of an onload.
    "derive.prove",  # before weights are held against main weights
    "derive.rebuild",  # before they are rebuilt
    # Only where a kind is kept on disk; the last two in threads of the move, whose error ends it.
    "disk.reserve",  # before the blocks of a file are taken
    "disk.write",  # before each chunk is written
    "disk.read",  # before each chunk is read
)

_armed: dict[str, Callable[..., None]] = {}


def point(name: str, *at_hand: torch.Tensor) -> None:
    """Mark a step of a move, and show what it has at hand; does what a test armed for it."""
    if _armed:
        action = _armed.get(name)
        if action is not None:
            action(*at_hand)


@contextlib.contextmanager
def inject(name: str, error: Callable[[], BaseException], *, after: int = 0) -> Iterator[list[int]]:
    """Make `point(name)` raise `error()` once, at its passing number `after` (0: the first).

    Yields:
        A list with one number, how often the point was passed: a test can see that the fault really struck.
    """

    def fail(*_at_hand: torch.Tensor) -> None:
        raise error()

    with meddle(name, fail, after=after) as passed:
        yield passed


@contextlib.contextmanager
def meddle(name: str, action: Callable[..., None], *, after: int = 0) -> Iterator[list[int]]:
    """Call `action` once, at passing number `after` of `point(name)`, with what the point has at hand.

    It may raise, or change the tensors that it is given. Where copies are asynchronous, those of the chunk and its
    neighbours may be under way: an action that writes has to synchronise first.

    Yields:
        The same as `inject`.
    """
    if name not in POINTS:
        raise ValueError(f"there is no fault point {name!r}; there are {', '.join(POINTS)}")
    passed = [0]
    counting = threading.Lock()

    def strike(*at_hand: torch.Tensor) -> None:
        with counting:
            passed[0] += 1
            strikes = passed[0] == after + 1
        if strikes:
            action(*at_hand)

    _armed[name] = strike
    try:
        yield passed
    finally:
        del _armed[name]
