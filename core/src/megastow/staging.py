"""Copies between the device and a region that it cannot reach by itself: through page-locked buffers, by threads.

Each thread takes a chunk the whole way, through a buffer of its own: from the device into the buffer and from there to
the region, or back. So the device's copy of one chunk runs beside the reading or writing of others, and the buffers
bound the memory that it takes.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import torch

from megastow import faults, threads
from megastow.device import Arrival, Device
from megastow.machine import PAGE_BYTES
from megastow.tiers import Region

_WORKERS = 4

_MOST_BUFFER_BYTES = 16 << 20
"""What one buffer holds at most: a disk and a link are both at their speed with much less."""


class Staging:
    """The threads and the buffers of one manager.

    Attributes:
        chunk_bytes: the most that one buffer holds, a whole number of pages.
        nbytes: host memory that all buffers take.
    """

    def __init__(self, device: Device, chunk_bytes: int = _MOST_BUFFER_BYTES) -> None:
        """Start with no thread and no buffer.

        Args:
            device: the accelerator.
            chunk_bytes: the most that one copy carries, where that is less than a buffer would hold.
        """
        self._device = device
        self.chunk_bytes = -(-min(chunk_bytes, _MOST_BUFFER_BYTES) // PAGE_BYTES) * PAGE_BYTES
        self.nbytes = self.chunk_bytes * _WORKERS
        self._crew = _Crew()
        self._pending: list[_Task] = []

    def use(self, buffers: torch.Tensor) -> None:
        """Start the threads, to work through this memory: a page-aligned uint8 tensor of shape [nbytes]."""
        self._crew = crew = _Crew()
        weakref.finalize(self, crew.dismiss)
        try:
            for buffer in buffers.split(self.chunk_bytes):
                crew.hire(buffer)
        except BaseException:
            self.close()
            raise

    def write(self, source: torch.Tensor, region: Region, offset: int) -> None:
        """Queue the copy of device memory (uint8, at most `chunk_bytes`) to a region; call within `copying()`."""

        def work(buffer: torch.Tensor) -> None:
            buffer[: source.nbytes].copy_(source, non_blocking=True)
            self._device.arrival().wait()
            faults.point("offload.copied", buffer[: source.nbytes])
            region.write(offset, buffer, source.nbytes)

        self._queue(work)

    def read(self, region: Region, offset: int, target: torch.Tensor) -> Future[None]:
        """Queue the copy of a region's bytes into device memory, as `write` takes it; done when they are there."""

        def work(buffer: torch.Tensor) -> None:
            region.read(offset, buffer, target.nbytes)
            target.copy_(buffer[: target.nbytes], non_blocking=True)
            self._device.arrival().wait()
            faults.point("onload.copied", target)

        return self._queue(work)

    def queued(self) -> list[Future[None]]:
        """What was queued and is not done, or has failed."""
        self._pending = [task for task in self._pending if not _has_succeeded(task.future)]
        return [task.future for task in self._pending]

    def settle(self) -> None:
        """Let go of what has not begun, and wait for the rest, however it ends: nothing is under way any more."""
        for task in self._pending:
            if not task.cancel():
                task.future.exception()
        self._pending = []

    def close(self) -> None:
        """Wait for what is under way, and let go of threads and buffers. Calling it twice is fine."""
        self.settle()
        self._crew.dismiss()

    def _queue(self, work: Callable[[torch.Tensor], None]) -> Future[None]:
        if not self._crew.takes_work:
            raise RuntimeError(
                "the threads that copy by way of buffers have ended, with their manager or the interpreter"
            )
        enter = self._device.as_here()

        def there(buffer: torch.Tensor) -> None:
            with enter(), torch.no_grad():
                work(buffer)

        task = _Task(there)
        self._pending.append(task)  # before it is queued: whatever interrupts us, `settle` knows of it
        self._crew.tasks.put(task)
        return task.future


class _Crew:
    """Threads that work through a queue of their own until it ends. Once dismissed it takes no more work.

    However many of them there are, and whichever of them somebody knows (an interruption may have come while one was
    started): each that comes to the end of the queue leaves the end there for the next.

    Attributes:
        tasks: what they are to do; None is the end.
        takes_work: whether there is anybody to work, and for longer than what is queued.
    """

    def __init__(self) -> None:
        self.tasks: _Tasks = queue.SimpleQueue()
        self.takes_work = False
        self._threads: list[threading.Thread] = []  # those that were started, or were about to be

    def hire(self, buffer: torch.Tensor) -> None:
        """Start one more, with a buffer of its own."""
        # Not waited for before the finalizers run when the interpreter ends: moves in threads that are need it.
        thread = threading.Thread(target=_work, args=(self.tasks, buffer), name="megastow-staging", daemon=True)
        self._threads.append(thread)
        thread.start()
        self.takes_work = True

    def dismiss(self) -> None:
        """Let threads end, and wait for that: one that is caught in torch by the end of the interpreter aborts it.

        Doing it again is fine, also after an interruption.
        """
        self.takes_work = False
        self.tasks.put(None)
        for thread in self._threads:
            # The last to have known the staging may be one of them, and one that was never started has no number.
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join()
        self._threads.clear()


class _Task:
    """A copy that a thread is to make. What it needs for that holds device memory, whose owners others count.

    Attributes:
        future: what becomes of it.
    """

    def __init__(self, work: Callable[[torch.Tensor], None]) -> None:
        self.future: Future[None] = Future()
        self._work: Callable[[torch.Tensor], None] | None = work

    def cancel(self) -> bool:
        """See to it that it is never made, and let go of what it needs; False if it is being made, or was."""
        if self.future.cancel():
            self._work = None
        return self.future.cancelled()

    def run(self, buffer: torch.Tensor) -> None:
        """Make it, by way of a buffer; everything is let go of before others are told."""
        if not self.future.set_running_or_notify_cancel():
            return
        work, self._work = self._work, None
        assert work is not None
        error: BaseException | None = None
        try:
            work(buffer)
        except BaseException as raised:
            error = raised
        del work
        if error is None:
            self.future.set_result(None)
        else:
            traceback.clear_frames(error.__traceback__)
            self.future.set_exception(error)
        del error


_Tasks = queue.SimpleQueue["_Task | None"]


def _work(tasks: _Tasks, buffer: torch.Tensor) -> None:
    """What each thread does: knows nobody who would have to outlive it."""
    threads.enter()
    while (task := tasks.get()) is not None:
        task.run(buffer)
        del task
    tasks.put(None)


class StagedArrival(Arrival):
    """The moment when what was queued on a copy stream, and what threads were given, has arrived.

    Attributes:
        host_seconds: how long `wait` has waited for threads, which no stopwatch on a copy stream sees.
    """

    def __init__(self, arrival: Arrival, queued: list[Future[None]]) -> None:
        self._arrival = arrival
        self._queued = queued
        self.host_seconds = 0.0

    def wait(self) -> None:
        """Return when it has; the first error of a thread is raised here."""
        start = time.perf_counter()
        for future in self._queued:
            future.result()
        if self._queued:
            self.host_seconds += time.perf_counter() - start
        self._queued = []
        self._arrival.wait()


def _has_succeeded(future: Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
