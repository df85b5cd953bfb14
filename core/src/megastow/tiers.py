"""Where the copy of a kind is kept, and how that is decided before anything is taken.

A region holds the copies of one kind: of one `Tier`, whose ways in and out are the only thing in which tiers differ.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

HostMemory = Literal["pinned", "pageable", "disk", "auto"]
"""Where a caller wants copies: all in one tier, or each kind in the fastest one that the host has room for."""

HOST_MEMORY: tuple[str, ...] = get_args(HostMemory)


class Tier(str, enum.Enum):
    """Where the copy of a kind is kept. The value is the word that the interface takes."""

    PINNED = "pinned"
    """Page-locked host memory, which the device reads and writes by itself."""

    PAGEABLE = "pageable"
    """Host memory that is not page-locked; the bytes go through a small page-locked buffer."""

    DISK = "disk"
    """A private file; the bytes go through the same buffer."""

    def __str__(self) -> str:
        return self.value


class Region(ABC):
    """A run of bytes on the host that the copies of one kind lie in.

    Attributes:
        nbytes: usable bytes, a whole number of pages.
    """

    nbytes: int

    @property
    @abstractmethod
    def tier(self) -> Tier:
        """Where the bytes are. `PINNED` promises that `view` is memory that the device copies to and from."""

    @abstractmethod
    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 tensor of shape [nbytes] with what is kept from `offset`: the memory itself, or what a file says now.

        Raises:
            OSError: a file could not be read.
        """

    @abstractmethod
    def lend(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """A storage of `nbytes` for others to look at what is kept: over the memory itself, or over what a file says.

        Raises:
            OSError: a file could not be read.
        """

    @property
    def is_lent(self) -> bool:
        """Whether somebody still looks at the memory, which must not be written to meanwhile."""
        return False

    @abstractmethod
    def write(self, offset: int, buffer: torch.Tensor, nbytes: int) -> None:
        """Keep the first `nbytes` of a buffer; returns when they are kept. Any thread may call it.

        Args:
            offset: where; of a file, a multiple of its block size.
            buffer: uint8 tensor of whole pages, page-aligned.
            nbytes: at most the size of the buffer.

        Raises:
            OSError: they could not be written.
        """

    @abstractmethod
    def read(self, offset: int, buffer: torch.Tensor, nbytes: int) -> None:
        """Fill the first `nbytes` of a buffer, as `write` has kept them.

        Raises:
            OSError: they could not be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the memory or the file back. Not to be used again; calling it twice is fine."""

    def chunks(self, offset: int, nbytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
        """Cut a run of bytes into copies of at most `chunk_bytes`.

        Yields:
            Offset within the run and number of bytes.
        """
        for start in range(0, nbytes, chunk_bytes):
            yield start, min(chunk_bytes, nbytes - start)


@dataclass(frozen=True)
class Placement:
    """Where regions would go, and what that would take.

    Attributes:
        tiers: the tier of each region.
        memory_bytes: host memory that it takes beyond what is held; negative if it gives some back.
        disk_bytes: the same on disk.
        reasons: for each region that is not in the tier it would be in if there were room, why.
        problem: why that cannot be had, with the figures; None if it can.
    """

    tiers: Mapping[Hashable, Tier]
    memory_bytes: int
    disk_bytes: int
    reasons: Mapping[Hashable, str]
    problem: str | None


Lack = Callable[[int], str | None]
"""Says why so many bytes more cannot be had; None if they can, and for any number that is not positive."""


def place(
    host_memory: HostMemory,
    sizes: Mapping[Hashable, int],
    held: Mapping[Hashable, tuple[Tier, int]],
    staging_bytes: int,
    memory_lacks: Lack,
    disk_lacks: Lack,
) -> Placement:
    """Decide where regions go; takes nothing.

    With "auto", what is held already stays where it is, and of the others the coldest go to disk until the rest fits
    into memory, each if the disk has room for it.

    Args:
        host_memory: what the caller asked for.
        sizes: the bytes of each region, the one that is needed soonest first.
        held: tier and bytes of the regions that are there already.
        staging_bytes: host memory that the first region takes which is not page-locked memory.
        memory_lacks: tells whether memory lacks.
        disk_lacks: tells whether the disk lacks room.
    """
    first = Tier.PINNED if host_memory == "auto" else Tier(host_memory)
    settled = {key: held[key][0] for key, nbytes in sizes.items() if key in held and held[key][1] == nbytes}
    tiers = {key: settled.get(key, first) for key in sizes}
    reasons: dict[Hashable, str] = {}

    def taken(where: Mapping[Hashable, Tier], on_disk: bool) -> int:
        new = sum(nbytes for key, nbytes in sizes.items() if (where[key] is Tier.DISK) is on_disk)
        return new - sum(held[key][1] for key in sizes if key in held and (held[key][0] is Tier.DISK) is on_disk)

    def in_memory(where: Mapping[Hashable, Tier]) -> int:
        staged = any(tier is not Tier.PINNED for tier in where.values())
        return taken(where, on_disk=False) + (staging_bytes if staged else 0)

    refused: str | None = None
    for key in [key for key in reversed(list(sizes)) if key not in settled] if host_memory == "auto" else ():
        lack = memory_lacks(in_memory(tiers))
        if lack is None:
            break
        colder = {**tiers, key: Tier.DISK}
        refused = disk_lacks(taken(colder, on_disk=True))
        if refused is None:
            tiers, reasons[key] = colder, lack
    for key in [
        key for key in sizes if key in reasons
    ]:  # colder than others, but too small to have made the difference
        warmer = {**tiers, key: first}
        if memory_lacks(in_memory(warmer)) is None:
            tiers = warmer
            del reasons[key]
    memory_bytes, disk_bytes = in_memory(tiers), taken(tiers, on_disk=True)
    lack = memory_lacks(memory_bytes)
    problem = f"{lack}; {refused}" if lack and refused else lack or disk_lacks(disk_bytes)
    return Placement(tiers, memory_bytes, disk_bytes, reasons, problem)
