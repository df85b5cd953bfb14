"""What a move in the background is held by: a question, and a way to wait."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from megastow.report import TransferReport


class TransferHandle:
    """A move that is made in a thread of its own; returned by `offload` and `onload` with `non_blocking=True`.

    The move does not need the handle: dropped, it goes on, and every later call of the manager waits for it.
    """

    def __init__(self, future: Future[TransferReport]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether the move is over, well or not. Does not wait."""
        return self._future.done()

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
