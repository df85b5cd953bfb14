"""What a move in the background is held by: a question, a way to wait, and what another move may take beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from megastow.engine import Permit
from megastow.errors import DeviceMemoryError, TransferError
from megastow.report import TransferReport, format_bytes

DEFAULT_WINDOW_BYTES = 2 << 30
_POLL_SECONDS = 0.0005


class TransferHandle:
    """A move that is made in a thread of its own; returned by `offload` and `onload` with `non_blocking=True`.

    The move does not need the handle: dropped, it goes on, and every later call of the manager waits for it.
    """

    def __init__(self, future: Future[TransferReport], released: Callable[[], int]) -> None:
        self._future = future
        self._released = released

    def done(self) -> bool:
        """Whether the move is over, well or not. Does not wait."""
        return self._future.done()

    @property
    def released_bytes(self) -> int:
        """Device memory that an offload has given up so far; 0 for an onload. Does not wait."""
        return self._released()

    def wait(self, timeout: float | None = None) -> TransferReport:
        """Wait until the move is over; may be called by several threads, and again.

        Args:
            timeout: the most seconds to wait; None for as long as it takes.

        Returns:
            The report; its seconds run from the call to the end of the move.

        Raises:
            MegastowError: what the move failed with; it was undone, and can be made again.
            TimeoutError: the move is still under way, and goes on.
        """
        try:
            return self._future.result(timeout)
        except FutureTimeoutError:
            if self._future.done():
                raise  # by the move itself
            raise TimeoutError(f"the move is still under way after {timeout} s; it goes on") from None


def make_permit(
    free_bytes: Callable[[], int | None],
    wait_for_memory: float,
    beside: TransferHandle | None,
    window_bytes: int,
) -> Permit | None:
    """What an onload asks before it takes memory; None if it need not ask.

    Args:
        free_bytes: tells what an allocation could get now; None if nobody knows.
        wait_for_memory: seconds that one storage may wait for its memory.
        beside: take no more than this offload has given up, and the window.
        window_bytes: how much more.
    """
    if beside is None and wait_for_memory <= 0:
        return None

    def permit(nbytes: int, wanted: int) -> None:
        while beside is not None and not beside.done() and wanted > beside.released_bytes + window_bytes:
            time.sleep(_POLL_SECONDS)
        if beside is not None and beside.done():
            try:
                beside.wait()
            except Exception as error:
                raise TransferError(
                    "the offload that was to make room has failed, so nothing was brought back"
                ) from error
        deadline = time.monotonic() + wait_for_memory
        while (free := free_bytes()) is not None and free < nbytes:
            if time.monotonic() > deadline and (beside is None or beside.done()):
                raise DeviceMemoryError(
                    f"a storage of {format_bytes(nbytes)} needs device memory, and {format_bytes(free)} are free after "
                    f"{wait_for_memory:g} s: somebody else still holds the device. Everything is safe in host memory; "
                    "free device memory, then onload",
                    needed_bytes=nbytes,
                    free_bytes=free,
                )
            time.sleep(_POLL_SECONDS)

    return permit
