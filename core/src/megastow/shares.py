"""Which bytes of a storage a rank keeps where several ranks of a host hold the same ones.

[Note: how a storage is shared]
It is cut into pieces of a chunk for each rank, in their order: of N ranks, rank r keeps chunk r of every piece. So the
chunks that all ranks have kept of a piece lie beside each other in it, and an all-gather rebuilds the piece in place,
with no buffer on the device, while the chunk of the next piece is on its way over the link. Chunks are whole units of
4096 bytes, and those of the last piece smaller. What is left at the end, less than a unit for each rank, every rank
keeps itself: nothing is padded, and nobody reads or writes outside the storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

UNIT_BYTES = 4096
"""What chunks are a multiple of: a block of a file, which two of them must not share."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a storage that one all-gather rebuilds.

    Attributes:
        start: where it begins.
        nbytes: how long it is: a chunk for each rank.
        own_start: where the chunk begins that this rank keeps.
        chunk_bytes: how long a chunk is.
    """

    start: int
    nbytes: int
    own_start: int
    chunk_bytes: int


@dataclass(frozen=True)
class Share:
    """The part of one rank. See [Note: how a storage is shared].

    Attributes:
        ranks: who shares, by their global numbers, in ascending order; at least two.
        rank: the one whose part it is.
        nbytes: the storage's.
        chunk_bytes: the most that a chunk has, a multiple of 4096, and the same on all ranks.
    """

    ranks: tuple[int, ...]
    rank: int
    nbytes: int
    chunk_bytes: int

    @property
    def index(self) -> int:
        """Which of the chunks of a piece are this rank's."""
        return self.ranks.index(self.rank)

    @property
    def rest_bytes(self) -> int:
        """What every rank keeps itself, at the end of the storage."""
        return self.nbytes % (len(self.ranks) * UNIT_BYTES)

    @property
    def kept_bytes(self) -> int:
        """What this rank keeps in all, which is the same for each."""
        return (self.nbytes - self.rest_bytes) // len(self.ranks) + self.rest_bytes

    def pieces(self) -> Iterator[Piece]:
        """What all-gathers rebuild, from the begin of the storage on."""
        end = self.nbytes - self.rest_bytes
        start = 0
        while start < end:
            chunk = min(self.chunk_bytes, (end - start) // len(self.ranks))
            nbytes = chunk * len(self.ranks)
            yield Piece(start, nbytes, start + self.index * chunk, chunk)
            start += nbytes
