"""Which threads are megastow's own: no call of a job's may wait in one.

The garbage collector runs finalizers in whatever thread it finds itself in. One that calls a manager, or a model whose
state is away, from a thread that a move is waiting for would wait for that very move, and for ever. So such a thread
says that it is one, and calls in it are refused instead.
"""

from __future__ import annotations

import threading

_here = threading.local()


def enter() -> None:
    """Say that the calling thread is one of ours, until it ends."""
    _here.is_ours = True


def is_ours() -> bool:
    """Whether the calling thread is one of ours."""
    return getattr(_here, "is_ours", False)
