"""Host memory for what is offloaded: exact size, huge pages, near the device, page-locked once, kept for reuse.

torch's own page-locked blocks are rounded up to a power of two and locked page by page as they are first touched. Here
a region is anonymous memory of exactly the pages needed, advised to use huge pages, touched by several threads that run
on the device's NUMA node, and then page-locked in pieces, while the next region is being touched. It lives as long as
its manager and serves every cycle.

Where a caller wants it so, or there is no room, a region is not page-locked, or is a file: see `tiers` and `disk`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from megastow import faults, loans, machine, threads
from megastow.device import Device
from megastow.disk import BLOCK_BYTES, DiskFolder, DiskSpace, disk_shortage
from megastow.errors import ForkedProcessError, HostMemoryError, InvalidArgumentError
from megastow.report import format_bytes
from megastow.staging import Staging
from megastow.tiers import HostMemory, Placement, Region, Tier, place

logger = logging.getLogger(__name__)

ALIGNMENT_BYTES = 512
"""Where a unit may start within a region: what torch's CUDA allocator aligns to, so that a copy is never split."""

PIECE_BYTES = 64 << 30
"""The most that is page-locked at once. No copy may span two pieces: CUDA answers "invalid argument"."""

_TOUCH_BYTES = 16 << 20
"""What a thread touches at a time. By 256 MiB, sixteen threads were less than half as fast; see docs/performance.md."""

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it yet


def align_up(nbytes: int, unit: int = ALIGNMENT_BYTES) -> int:
    """`nbytes` rounded up to a multiple of `unit`."""
    return -(-nbytes // unit) * unit


class HostRegion(Region):
    """One run of host memory, page-locked where the device wants that.

    Attributes:
        nbytes: usable bytes, a whole number of pages.
        bytes: uint8 tensor of shape [nbytes] over the memory.
    """

    def __init__(self, nbytes: int, device: Device, piece_bytes: int = PIECE_BYTES) -> None:
        """Map it, which takes no time and no memory; see `make`.

        Args:
            nbytes: the bytes wanted.
            device: the accelerator that is to reach them.
            piece_bytes: the most that is page-locked at once.

        Raises:
            HostMemoryError: the memory could not be mapped; nothing is left behind.
        """
        self.nbytes = align_up(nbytes, machine.PAGE_BYTES)
        self._piece_bytes = align_up(piece_bytes, machine.PAGE_BYTES)
        faults.point("host.allocate")
        try:
            memory = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise HostMemoryError(
                f"{format_bytes(self.nbytes)} of host memory could not be mapped ({error}); nothing was moved. "
                "Leave more memory to this process, or offload fewer kinds"
            ) from error
        memory.madvise(mmap.MADV_DONTFORK)  # a child must neither inherit nor copy page-locked memory
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            logger.debug("this kernel has no transparent huge pages; page-locking will be slower")
        self._memory: mmap.mmap | None = memory
        self._pid = os.getpid()
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._device = device
        self._locked: list[int] = []
        # Nobody unmaps: the tensor holds the mapping, and the kernel gets it back with the last view. Closing the
        # mapping by hand would succeed under a living view, and the next use of that view would crash.
        self._finalizer = weakref.finalize(self, _unlock, device, self._locked, os.getpid())

    @classmethod
    def make(cls, nbytes: int, device: Device, piece_bytes: int = PIECE_BYTES, *, lock: bool = True) -> HostRegion:
        """Map, touch and page-lock; takes as long as the kernel needs for that many pages.

        Args:
            nbytes: the bytes wanted.
            device: the accelerator that is to reach them.
            piece_bytes: the most that is page-locked at once.
            lock: page-lock now; otherwise `lock` does, or nobody.

        Raises:
            HostMemoryError: the memory could not be mapped or page-locked; nothing is left behind.
        """
        region = cls(nbytes, device, piece_bytes)
        try:
            with _touching([region], device.numa_node()) as wait_for:
                wait_for(region)
                if lock:
                    region.lock()
        except BaseException:
            region.close()
            raise
        return region

    def lock(self) -> None:
        """Page-lock all of it, so that its tier is `PINNED`.

        Raises:
            HostMemoryError: the driver refused; nothing is locked.
        """
        address = self.bytes.data_ptr()
        try:
            for start, nbytes in self._pieces(0, self.nbytes):
                faults.point("host.lock")
                self._locked.append(
                    address + start
                )  # before: what interrupts a call of seconds comes when it has locked
                try:
                    self._device.lock_pages(address + start, nbytes)
                except HostMemoryError:
                    self._locked.pop()
                    raise
        except BaseException:
            _unlock(self._device, self._locked, os.getpid())
            raise

    @property
    def tier(self) -> Tier:
        """`Tier.PINNED` or `Tier.PAGEABLE`."""
        return Tier.PINNED if self._locked else Tier.PAGEABLE

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """The memory itself."""
        return self.bytes[offset : offset + nbytes]

    def write(self, offset: int, buffer: torch.Tensor, nbytes: int) -> None:
        """Copy from a buffer in host memory."""
        self.view(offset, nbytes).copy_(buffer[:nbytes])

    def read(self, offset: int, buffer: torch.Tensor, nbytes: int) -> None:
        """Copy into a buffer in host memory."""
        buffer[:nbytes].copy_(self.view(offset, nbytes))

    def close(self) -> None:
        """Unlock, and unmap when nobody has a view any more. Not to be used again; calling it twice is fine."""
        _unlock(self._device, self._locked, self._pid)
        self._finalizer.detach()
        self._memory = None
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def lend(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """A storage over some of the bytes, without a copy, for others to look at; see `loans`.

        Raises:
            ForkedProcessError: this is a child that was forked since, without the memory.
        """
        assert self._memory is not None, "the region is closed"
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                f"the bytes are in the host memory of process {self._pid}, and this is a fork of it, {os.getpid()}, "
                "without that memory. Make views there before the fork"
            )
        return loans.lend(memoryview(self._memory)[offset : offset + nbytes], self.bytes.data_ptr() + offset)

    @property
    def is_lent(self) -> bool:
        """Whether somebody still looks at some of the bytes."""
        return loans.is_lent(self.bytes.data_ptr(), self.nbytes)

    def _pieces(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Cut a run of bytes where separately page-locked pieces meet."""
        end = offset + nbytes
        while offset < end:
            stop = min(end, (offset // self._piece_bytes + 1) * self._piece_bytes)
            yield offset, stop - offset
            offset = stop

    def chunks(self, offset: int, nbytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
        """Cut a run of bytes into copies: at most `chunk_bytes` each, none across two pieces.

        Yields:
            Offset within the run and number of bytes.
        """
        for start, length in self._pieces(offset, nbytes):
            for inner in range(0, length, chunk_bytes):
                yield start + inner - offset, min(chunk_bytes, length - inner)


class HostArena:
    """The host memory and the files of one manager: a region for each key, made when first needed and kept.

    A region is replaced when the bytes that its key has to keep have changed, so that what is held is what is needed;
    and when somebody still looks at what it held, who keeps the old memory.
    """

    def __init__(
        self,
        device: Device,
        host_memory: HostMemory = "pinned",
        folder: DiskFolder | None = None,
        staging: Staging | None = None,
    ) -> None:
        """Take nothing yet.

        Args:
            device: the accelerator.
            host_memory: where regions are to be.
            folder: where files go.
            staging: what copies to and from regions that are not page-locked; gets its buffers with the first of them.
        """
        self._device = device
        self._host_memory = host_memory
        self._folder = folder or DiskFolder()
        self._staging = staging or Staging(device)
        self._buffers: HostRegion | None = None
        self._regions: dict[Hashable, Region] = {}
        self._tiers: dict[Hashable, Tier] = {}
        self._reasons: dict[Hashable, str] = {}
        self._lock = threading.Lock()

    @property
    def unit_bytes(self) -> int:
        """What a storage's place in a region is a multiple of: where a region may be a file, its block."""
        return BLOCK_BYTES if self._host_memory in ("disk", "auto") else ALIGNMENT_BYTES

    def place(self, sizes: Mapping[Any, int]) -> Placement:
        """Where these regions would go, and what they would take beyond what is held; changes nothing.

        Args:
            sizes: the bytes of each, the one that is needed soonest first.
        """
        with self._lock:
            held = {key: (r.tier, r.nbytes) for key, r in self._regions.items() if not r.is_lent}
            staging_bytes = 0 if self._buffers else self._staging.nbytes
        return place(
            self._host_memory,
            {key: align_up(nbytes, machine.PAGE_BYTES) for key, nbytes in sizes.items()},
            held,
            staging_bytes,
            lambda nbytes: shortage(nbytes, machine.host_limits()) if nbytes > 0 else None,
            self._lacks_on_disk,
        )

    def disk_space(self) -> DiskSpace | None:
        """What the disk can give now; None if no file is ever made, or there is no disk."""
        if self._host_memory not in ("disk", "auto"):
            return None
        with contextlib.suppress(InvalidArgumentError):
            return self._folder.space()
        return None

    def check(self, sizes: Mapping[Any, int]) -> None:
        """Decide where `reserve` puts these, and see that it could give all of them together; takes nothing.

        Raises:
            HostMemoryError: the machine cannot give that much.
        """
        placement = self.place(sizes)
        _refuse(placement.problem)
        with self._lock:
            self._tiers.update(placement.tiers)
            self._reasons.update(placement.reasons)

    def reserve(
        self,
        sizes: Mapping[Any, int],
        making: Callable[[Any], contextlib.AbstractContextManager[object]] = lambda key: contextlib.nullcontext(),
    ) -> dict[Any, Region]:
        """A region for each key, with room for exactly so many bytes (whole pages).

        The content of a region that has to be replaced is lost: call it only while nothing is kept under these keys.

        Args:
            sizes: the bytes of each, the one that is needed soonest first.
            making: entered while the region of a key is waited for.

        Raises:
            HostMemoryError: the machine cannot give that much. What had to be replaced is gone, other regions are not.
            InvalidArgumentError: the disk folder cannot be used.
        """
        with self._lock:
            new = {key: nbytes for key, nbytes in sizes.items() if not self._has(key, nbytes)}
            if new:
                self._make(new, making)
            return {key: self._regions[key] for key in sizes}

    def is_ready(self, region: Region) -> bool:
        """Whether a region is one of ours that may be written to now, if nothing is kept in it. Waits for nobody."""
        return region in tuple(self._regions.values()) and not region.is_lent

    def demoted(self) -> Mapping[Hashable, tuple[Tier, str]]:
        """The tier of each key that is not where it would be if there were room, and why. Waits for nobody."""
        regions = dict(self._regions)
        return {key: (regions[key].tier, why) for key, why in dict(self._reasons).items() if key in regions}

    @property
    def nbytes(self) -> int:
        """Host memory held now. Waits for nobody, not even for memory that is just being made."""
        memory = [region for region in tuple(self._regions.values()) if region.tier is not Tier.DISK]
        return sum(region.nbytes for region in (*memory, *filter(None, [self._buffers])))

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk held now. Waits for nobody."""
        return sum(region.nbytes for region in tuple(self._regions.values()) if region.tier is Tier.DISK)

    def close(self) -> None:
        """Give everything back."""
        self._staging.close()
        with self._lock:
            while self._regions:
                self._regions.popitem()[1].close()
            if self._buffers is not None:
                self._buffers.close()
                self._buffers = None

    def _tier(self, key: Hashable) -> Tier:
        """Where a new region goes."""
        return self._tiers.get(key, Tier.PINNED if self._host_memory == "auto" else Tier(self._host_memory))

    def _has(self, key: Hashable, nbytes: int) -> bool:
        """Whether there is a region for a key that can be used as it is."""
        region = self._regions.get(key)
        if region is None or region.nbytes != align_up(nbytes, machine.PAGE_BYTES) or region.is_lent:
            return False
        if region.tier is Tier.PINNED:
            self._reasons.pop(key, None)  # it was to be demoted, and need not be
        return True

    def _drop(self, key: Hashable) -> None:
        """Give back what a key has, if anything."""
        if key in self._regions:
            self._device.confirm()  # an offload may have begun to copy to it, before it knew better
            self._regions.pop(key).close()

    def _make(self, new: Mapping[Any, int], making: Callable[[Any], contextlib.AbstractContextManager[object]]) -> None:
        """Make regions in the place of those that keys have, if any; one is page-locked while the next is touched."""
        for key in new:
            self._drop(key)
        sizes = {key: nbytes for key, nbytes in new.items() if self._tier(key) is not Tier.DISK}
        if sizes:
            check_host_memory(sum(sizes.values()))
        in_memory: dict[Any, HostRegion] = {}
        try:
            for key, nbytes in sizes.items():
                in_memory[key] = HostRegion(nbytes, self._device)
            with _touching(list(in_memory.values()), self._device.numa_node()) as wait_for:
                for key, nbytes in new.items():
                    with making(key):
                        if key in in_memory:
                            wait_for(in_memory[key])
                            self._finish(key, in_memory[key])
                            self._regions[key] = in_memory.pop(key)
                        else:
                            self._regions[key] = self._make_file(nbytes)
        except BaseException:
            for region in in_memory.values():
                region.close()
            raise

    def _make_file(self, nbytes: int) -> Region:
        self._make_buffers()
        _refuse(self._lacks_on_disk(nbytes))
        return self._folder.create(nbytes)

    def _finish(self, key: Hashable, region: HostRegion) -> None:
        """Make of memory that was touched what its tier asks for."""
        if self._tier(key) is Tier.PINNED:
            self._lock_pages(key, region)
        if region.tier is Tier.PAGEABLE:
            self._make_buffers()

    def _lock_pages(self, key: Hashable, region: HostRegion) -> None:
        """Page-lock a region; with "auto" it stays as it is where the driver refuses."""
        self._reasons.pop(key, None)
        try:
            region.lock()
        except HostMemoryError as error:
            if self._host_memory != "auto":
                raise
            self._reasons[key] = str(error)

    def _make_buffers(self) -> None:
        """Give the staging its memory, page-locked unless the driver refuses even that little."""
        if self._buffers is None:
            buffers = HostRegion.make(self._staging.nbytes, self._device, lock=False)
            try:
                buffers.lock()
            except HostMemoryError as error:
                logger.warning("copies go through memory that is not page-locked, and are slower for it: %s", error)
            self._buffers = buffers
            try:
                self._staging.use(buffers.bytes)
            except BaseException:
                self._staging.close()
                self._buffers = None
                buffers.close()
                raise

    def _lacks_on_disk(self, nbytes: int) -> str | None:
        """Why `nbytes` more cannot be had on disk, and as much by every process of the job on this host; or None."""
        if nbytes <= 0:
            return None
        try:
            return disk_shortage(nbytes, self._folder.space(), machine.local_ranks())
        except InvalidArgumentError as error:
            return str(error)


def check_host_memory(nbytes: int) -> None:
    """See that `nbytes` more can be had by this process, and as much by every process of the job on this host.

    Raises:
        HostMemoryError: it cannot, with the figures.
    """
    _refuse(shortage(nbytes, machine.host_limits()))


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise HostMemoryError(f"{problem}; nothing was moved. {_REMEDY}")


_REMEDY = (
    "Leave more room to the job, raise the limit, offload fewer kinds, or let copies go to a disk "
    "(host_memory='auto' and disk_folder)"
)


def shortage(nbytes: int, limits: machine.HostLimits) -> str | None:
    """Why `nbytes` more cannot be had by this process, and as much by every process of the job on this host.

    The second is held against the machine's whole memory: other ranks may have taken theirs already, and counting
    them twice would refuse what fits.

    Returns:
        The reason, with the figures; None if it can be had.
    """
    everyone = nbytes * limits.local_ranks
    if nbytes <= limits.available_bytes and everyone <= limits.total_bytes:
        return None
    group = limits.cgroup
    others = f" and {format_bytes(everyone)} in all {limits.local_ranks} processes of this host"
    return (
        f"an offload needs {format_bytes(nbytes)} of host memory in this process"
        + (others if limits.local_ranks > 1 else "")
        + f", but {format_bytes(limits.available_bytes)} of {format_bytes(limits.total_bytes)} can be had"
        + (f" (control group {group.path} is limited to {format_bytes(group.limit_bytes)})" if group else "")
    )


def _unlock(device: Device, locked: list[int], pid: int) -> None:
    while locked and os.getpid() == pid:  # a forked child has neither the memory nor the driver
        device.unlock_pages(locked[-1])
        locked.pop()


@contextlib.contextmanager
def _touching(regions: Sequence[HostRegion], numa_node: int | None) -> Iterator[Callable[[HostRegion], None]]:
    """Make the kernel find the pages of regions, one region after the other, beside the block.

    With several threads on the CPUs of `numa_node`. All of it is there when the block has ended well.

    Yields:
        What waits for one of the regions, and raises `HostMemoryError` if the kernel has no pages left.
    """
    nbytes = sum(region.nbytes for region in regions)
    allowed = machine.usable_cpus()
    near = machine.numa_cpus(numa_node) & allowed if numa_node is not None else set()
    cpus = near or allowed
    workers = max(1, min(16, len(cpus) // machine.local_ranks(), -(-nbytes // _TOUCH_BYTES)))
    libc = ctypes.CDLL(None, use_errno=True)

    def touch(region: HostRegion, start: int) -> bool:
        """Whether there were pages; an error would hold the memory that is to be given back."""
        memory = region.bytes  # so that it stays mapped while a thread writes
        length = min(_TOUCH_BYTES, memory.nbytes - start)
        address = memory.data_ptr() + start
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_WRITE):
            if ctypes.get_errno() == errno.ENOMEM:
                return False
            ctypes.memset(address, 0, length)  # an old kernel, or a signal: write instead
        return True

    def begin() -> None:
        threads.enter()
        if near:
            with contextlib.suppress(OSError):  # the CPUs may be others by now
                os.sched_setaffinity(0, near)  # of this thread only

    touched: Mapping[int, Sequence[Callable[[], bool]]]
    parts = {
        id(region): [partial(touch, region, start) for start in range(0, region.nbytes, _TOUCH_BYTES)]
        for region in regions
    }

    def wait_for(region: HostRegion) -> None:
        if not all(there() for there in touched[id(region)]):
            raise HostMemoryError(
                f"the kernel has no pages left for {format_bytes(nbytes)} of host memory; nothing was moved. "
                "Leave more memory to this process, or offload fewer kinds"
            )

    with ThreadPoolExecutor(workers, "megastow-touch", begin) as pool:
        try:
            try:
                touched = {key: [pool.submit(part).result for part in each] for key, each in parts.items()}
            except RuntimeError:  # the interpreter is ending, and starts no thread any more
                touched = parts
            yield wait_for
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for region in regions:
        wait_for(region)
