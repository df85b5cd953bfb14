"""What a move in the background is held by: a question, a way to wait, and what another move may take beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from megastow import threads
from megastow.errors import DeviceMemoryError, ForkedProcessError, TransferError
from megastow.report import TransferReport, format_bytes

DEFAULT_WINDOW_BYTES = 4 << 30
"""Of what is free at most. With 2 GiB, one direction of the link stood still while 2.6 GiB in one took the other."""

_POLL_SECONDS = 0.0005


class TransferHandle:
    """A move that is made in a thread of its own; returned by `offload` and `onload` with `non_blocking=True`.

    The move does not need the handle: dropped, it goes on, and every later call of the manager waits for it.
    """

    def __init__(self, future: Future[TransferReport], released: Callable[[], int]) -> None:
        self._future = future
        self._released = released
        self._pid = os.getpid()

    def __repr__(self) -> str:
        """Whether the move is over, and how it ended."""
        if not self._future.done():
            how = "under way"
        else:
            error = self._future.exception()
            how = "done" if error is None else f"failed with {type(error).__name__}"
        return f"<TransferHandle: {how}, {format_bytes(self.released_bytes)} released>"

    def done(self) -> bool:
        """Whether the move is over, well or not. Does not wait."""
        return self._future.done()

    @property
    def released_bytes(self) -> int:
        """Device memory that an offload has given up so far; 0 for an onload. Does not wait."""
        return self._released()

    def freeze(self) -> None:
        """Keep `released_bytes` as it is; for the manager, at the end of the move."""
        released = self._released()
        self._released = lambda: released

    def wait(self, timeout: float | None = None) -> TransferReport:
        """Wait until the move is over; may be called by several threads, and again.

        Args:
            timeout: the most seconds to wait; None for as long as it takes.

        Returns:
            The report; its seconds run from the call to the end of the move.

        Raises:
            MegastowError: what the move failed with; it was undone, and can be made again. See `offload` for what ends
                a move instead.
            TransferError: also to a finalizer that happens to run in a thread of a move.
            TimeoutError: the move is still under way, and goes on.
            ForkedProcessError: this is a fork of the process that moves; it will not learn the end.
        """
        if os.getpid() != self._pid and not self._future.done():
            raise ForkedProcessError(
                f"the move is made by process {self._pid}, and this is a fork of it, {os.getpid()}"
            )
        if threads.is_ours() and not self._future.done():
            raise TransferError("a finalizer that runs in a thread of a move cannot wait for one; the move goes on")
        try:
            return self._future.result(timeout)
        except FutureTimeoutError:
            if self._future.done():
                raise  # by the move itself
            raise TimeoutError(f"the move is still under way after {timeout} s; it goes on") from None


class MemoryPermit:
    """What an onload asks before it takes device memory, where it may wait for it.

    Args:
        free_bytes: tells what an allocation could get now; None if nobody knows.
        wait_for_memory: seconds to wait for a neighbour, in all.
        beside: take no more than this offload has given up, and the window.
        window_bytes: how much more.
    """

    def __init__(
        self,
        free_bytes: Callable[[], int | None],
        wait_for_memory: float,
        beside: TransferHandle | None,
        window_bytes: int,
    ) -> None:
        self._free_bytes = free_bytes
        self._wait_for_memory = wait_for_memory
        self._deadline: float | None = None
        self._beside = beside
        self._window_bytes = window_bytes

    def __call__(self, sizes: Sequence[int], taken: int) -> int:
        """Wait until one of these may be taken; see `megastow.engine.Permit`."""
        while True:
            is_leaving = self._is_leaving()
            if not is_leaving:
                self._check_left()
            free = self._free_bytes()
            limits = [] if free is None else [free]
            if is_leaving:
                limits.append(self._released() + self._window_bytes - taken)
            chosen = next((i for i, nbytes in enumerate(sizes) if all(nbytes <= limit for limit in limits)), None)
            if chosen is not None:
                return chosen
            if not is_leaving and not self.may_wait():
                needed = min(sizes)
                raise DeviceMemoryError(
                    f"a storage of {format_bytes(needed)} needs device memory, and {format_bytes(free)} are free after "
                    f"{self._wait_for_memory:g} s: somebody else still holds the device. Everything is safe in host "
                    "memory; free device memory, then onload",
                    needed_bytes=needed,
                    free_bytes=free,
                )
            time.sleep(_POLL_SECONDS)

    def may_wait(self) -> bool:
        """Whether there may be more memory soon; the time to wait runs from the first question without an offload."""
        if self._is_leaving():
            return True
        if self._deadline is None:
            self._deadline = time.monotonic() + self._wait_for_memory
        return time.monotonic() < self._deadline

    def _check_left(self) -> None:
        """Raise if the offload that was to make room has failed."""
        if self._beside is None:
            return
        try:
            self._beside.wait()
        except Exception as error:
            raise TransferError("the offload that was to make room failed, so nothing was brought back") from error

    def _is_leaving(self) -> bool:
        return self._beside is not None and not self._beside.done()

    def _released(self) -> int:
        return 0 if self._beside is None else self._beside.released_bytes
