"""Copies between device storages and host memory, in chunks, on copy streams.

What the device cannot reach by itself, memory that is not page-locked and files, is copied by way of `staging`.

A copy that is queued is not a copy that has arrived: `confirm` waits for all of them, and nobody may release the source
or use the target before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from megastow import faults
from megastow.device import Arrival, Device
from megastow.gather import NOTHING_TO_GATHER, Gathering
from megastow.shares import Piece, Share
from megastow.staging import StagedArrival, Staging
from megastow.storages import byte_view
from megastow.tiers import Region, Tier

DEFAULT_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Run:
    """Bytes that lie side by side in a storage and on the host.

    Attributes:
        start: where they begin in the storage.
        offset: where they begin in the region.
        nbytes: how many.
        piece: what they are this rank's chunk of; None for what it needs no other rank for.
    """

    start: int
    offset: int
    nbytes: int
    piece: Piece | None = None


@dataclass(frozen=True)
class HostSlice:
    """Where a storage's bytes lie on the host: `nbytes` from `offset` in `region`.

    With a `share` they are only those that this rank keeps of it, in their order.
    """

    region: Region
    offset: int
    nbytes: int
    share: Share | None = None

    def bytes(self) -> torch.Tensor:
        """uint8 tensor of shape [nbytes] on the host; no copy, except from a file, which is read."""
        return self.region.view(self.offset, self.nbytes)

    @property
    def storage_bytes(self) -> int:
        """Bytes of the storage that it is of."""
        return self.nbytes if self.share is None else self.share.nbytes

    def lend(self) -> torch.UntypedStorage:
        """A storage of `nbytes` over them for others to look at; no copy."""
        return self.region.lend(self.offset, self.nbytes)

    def runs(self) -> Iterator[Run]:
        """The stretches of the storage that are kept, in the order in which they lie on the host."""
        if self.share is None:
            yield Run(0, self.offset, self.nbytes)
            return
        offset = self.offset
        for piece in self.share.pieces():
            yield Run(piece.own_start, offset, piece.chunk_bytes, piece)
            offset += piece.chunk_bytes
        if self.share.rest_bytes:
            yield Run(self.share.nbytes - self.share.rest_bytes, offset, self.share.rest_bytes)


class Transport:
    """Moves bytes for one manager."""

    def __init__(self, device: Device, chunk_bytes: int = DEFAULT_CHUNK_BYTES, staging: Staging | None = None) -> None:
        """Start with nothing queued.

        Args:
            device: the accelerator.
            chunk_bytes: the most that one copy carries. Under 4 MiB copies fall behind the link.
            staging: takes copies to and from regions that are not page-locked memory.
        """
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._staging = staging or Staging(device, chunk_bytes)
        self._gathering = NOTHING_TO_GATHER

    def copy_out(self, storage: torch.UntypedStorage, host: HostSlice) -> None:
        """Queue the copy of a storage to the host; call within `device.copying()`."""
        source = byte_view(storage)
        target = host.bytes() if _is_direct(host) else None
        for run in host.runs():
            for start, at, nbytes in self._chunks(host, run):
                faults.point("offload.chunk")
                chunk = source[start : start + nbytes]
                if target is None:
                    self._staging.write(chunk, host.region, at)
                else:
                    there = target[at - host.offset :][:nbytes]
                    there.copy_(chunk, non_blocking=True)
                    faults.point("offload.copied", there)

    def copy_in(self, host: HostSlice, storage: torch.UntypedStorage) -> None:
        """Queue the copy of what the host keeps into a storage; call within `device.copying()`.

        Of what is shared that is this rank's part; `gather_shared` brings the others'.
        """
        target = byte_view(storage)
        source = host.bytes() if _is_direct(host) else None
        for run in host.runs():
            reading: list[Future[None]] = []
            for start, at, nbytes in self._chunks(host, run):
                faults.point("onload.chunk")
                chunk = target[start : start + nbytes]
                if source is None:
                    reading.append(self._staging.read(host.region, at, chunk))
                else:
                    chunk.copy_(source[at - host.offset :][:nbytes], non_blocking=True)
                    faults.point("onload.copied", chunk)
            if run.piece is not None:
                self._gathering.follow(storage, run.piece, self._device.arrival(), reading)

    def gather(self, gathering: Gathering) -> None:
        """Use these all-gathers for what is shared, from here to the end of the move; they begin later."""
        self._gathering = gathering

    def gather_shared(self, host: HostSlice, storage: torch.UntypedStorage) -> Arrival:
        """Queue the all-gathers of a storage that is shared, behind the copies of this rank's part.

        Call it within `device.copying()`, in the order in which all ranks list what they share. Waits for threads that
        read that part.

        Returns:
            The moment when they are done, and all before them.

        Raises:
            PeerError: the connection to the others was given up; also to those who wait for the moment.
        """
        assert host.share is not None
        self._gathering.advance(storage, host.share)
        return self._gathering.arrival()

    def begin_reading(self, host: HostSlice) -> None:
        """Make sure that work queued from here on finds what was queued for a slice; call within `copying()`.

        Waits where threads take part, or collectives that no stream knows of.
        """
        if not _is_direct(host):
            self.arrival().wait()
        if host.share is not None and not self._device.queues_collectives:
            self._gathering.arrival().wait()

    def arrival(self) -> StagedArrival:
        """The moment when what is queued by now has arrived; call within `device.copying()`."""
        return StagedArrival(self._device.arrival(), self._staging.queued())

    @property
    def is_up_to_the_device(self) -> bool:
        """Whether every copy that is queued arrives unless the device fails: threads have nothing left to do."""
        return not self._staging.queued()

    def confirm(self) -> None:
        """Wait until every copy has arrived; errors surface here."""
        for future in self._staging.queued():
            future.result()
        self._gathering.confirm()
        self._device.confirm()
        self._gathering = NOTHING_TO_GATHER

    def settle(self) -> None:
        """Make sure that no copy is under way, whatever has become of it: of a move that failed or was interrupted."""
        self._staging.settle()
        self._gathering.settle()
        self._gathering = NOTHING_TO_GATHER
        with contextlib.suppress(RuntimeError):  # of the device; nothing that a signal's handler raises
            self._device.confirm()

    def _chunks(self, host: HostSlice, run: Run) -> Iterator[tuple[int, int, int]]:
        """Where each copy of a run begins in the storage, and in the region, and its bytes."""
        most = self._chunk_bytes if _is_direct(host) else self._staging.chunk_bytes
        for start, nbytes in host.region.chunks(run.offset, run.nbytes, most):
            yield run.start + start, run.offset + start, nbytes


def _is_direct(host: HostSlice) -> bool:
    return host.region.tier is Tier.PINNED
