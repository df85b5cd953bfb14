"""The key-value store that the ranks of a process group share, asked in a way that always ends.

It is where the ranks found each other, and belongs to torch. Its calls end neither with Ctrl-C nor, if the process that
serves them is stopped, at all; so each is made in a thread of its own. And a connection serves one call at a time, a
wait included; so who waits needs one that nobody else uses.

[Note: pauses]
A machine may pause: a virtual one that is moved, a container that is frozen, a process under a debugger. Who wakes up
then finds its time limit over, though nobody had a chance to answer. So an answer is waited for in parts, of which a
pause uses up one; and a wait in the store, which complains aloud at its end, is repeated if it took longer than asked.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from megastow import threads
from megastow.errors import PeerError

_T = TypeVar("_T")
_C10D: Any = dist  # torch's stubs leave the stores out

_NUM_PARTS = 10

_PAUSE_SECONDS = 1.0
"""What a wait overruns its limit by only if the machine has paused, or has nearly."""

_MOST_PAUSES = 2


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def delete_key(self, key: str, /) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class StoreLine:
    """A connection to a store, for work that ends in time whatever becomes of the store. For one thread at a time."""

    def __init__(self, store: Store) -> None:
        self._origin = store
        self._idle: Store | None = None

    def ask(self, work: Callable[[Store], _T], seconds: float) -> _T:
        """Do some work with the store.

        A connection whose work did not end well, or was not waited for, is left to its thread, and the next work gets a
        new one.

        Raises:
            PeerError: it took longer than `seconds`.
        """
        idle, self._idle = self._idle, None
        done: Future[tuple[Store, _T]] = Future()

        def run() -> None:
            threads.enter()
            try:
                connection = _connect(self._origin) if idle is None else idle
                done.set_result((connection, work(connection)))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="megastow-agree", daemon=True).start()
        part = seconds / _NUM_PARTS  # see [Note: pauses]
        if not any(wait([done], part).done for _ in range(_NUM_PARTS)):
            raise PeerError(f"the store of the process group did not answer within {seconds:g} s", ranks=())
        self._idle, result = done.result()
        return result


def wait_for(store: Store, key: str, seconds: float) -> None:
    """Return when a key was set; see [Note: pauses].

    Raises:
        RuntimeError: it was not within `seconds`, or the store does not answer.
    """
    pauses = 0
    while True:
        start = time.monotonic()
        try:
            store.wait([key], timedelta(seconds=seconds))
        except RuntimeError:
            pauses += 1
            if pauses > _MOST_PAUSES or time.monotonic() - start < seconds + _PAUSE_SECONDS:
                raise
        else:
            return


def store_of(group: dist.ProcessGroup) -> Store:
    """The store through which the ranks of a group found each other, with the group's own part of the keys."""
    if hasattr(group, "get_group_store"):
        public: Store = group.get_group_store()
        return public
    private: Store = _C10D.distributed_c10d._get_process_group_store(group)  # the only way in older releases of torch
    return private


def _connect(store: Any) -> Store:
    """A connection of its own to the same store and the same part of its keys."""
    if hasattr(store, "clone"):
        cloned: Store = store.clone()
        return cloned
    server = store  # before torch 2.8
    while isinstance(server, _C10D.PrefixStore):
        server = server.underlying_store
    if not isinstance(server, _C10D.TCPStore):
        shared: Store = store
        return shared
    prefix = store.compare_set("megastow/prefix", "", uuid.uuid4().hex).decode()
    connection: Store = _C10D.PrefixStore(
        prefix,
        _C10D.TCPStore(server.host, server.port, is_master=False, wait_for_workers=False, timeout=server.timeout),
    )
    return connection
