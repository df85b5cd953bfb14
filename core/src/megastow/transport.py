"""Copies between device storages and host memory, in chunks, on copy streams.

What the device cannot reach by itself, memory that is not page-locked and files, is copied by way of `staging`.

A copy that is queued is not a copy that has arrived: `confirm` waits for all of them, and nobody may release the source
or use the target before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megastow import faults
from megastow.device import Device
from megastow.staging import StagedArrival, Staging
from megastow.storages import byte_view
from megastow.tiers import Region, Tier

DEFAULT_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class HostSlice:
    """Where a storage's bytes lie on the host: `nbytes` from `offset` in `region`."""

    region: Region
    offset: int
    nbytes: int

    def bytes(self) -> torch.Tensor:
        """uint8 tensor of shape [nbytes] on the host; no copy, except from a file, which is read."""
        return self.region.view(self.offset, self.nbytes)

    def lend(self) -> torch.UntypedStorage:
        """A storage of `nbytes` over them for others to look at; no copy."""
        return self.region.lend(self.offset, self.nbytes)


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

    def copy_out(self, storage: torch.UntypedStorage, host: HostSlice) -> None:
        """Queue the copy of a storage to the host; call within `device.copying()`."""
        source = byte_view(storage)
        target = host.bytes() if _is_direct(host) else None
        for start, end in self._chunks(host):
            faults.point("offload.chunk")
            if target is None:
                self._staging.write(source[start:end], host.region, host.offset + start)
            else:
                target[start:end].copy_(source[start:end], non_blocking=True)
                faults.point("offload.copied", target[start:end])

    def copy_in(self, host: HostSlice, storage: torch.UntypedStorage) -> None:
        """Queue the copy of what the host keeps into a storage; call within `device.copying()`."""
        target = byte_view(storage)
        source = host.bytes() if _is_direct(host) else None
        for start, end in self._chunks(host):
            faults.point("onload.chunk")
            if source is None:
                self._staging.read(host.region, host.offset + start, target[start:end])
            else:
                target[start:end].copy_(source[start:end], non_blocking=True)
                faults.point("onload.copied", target[start:end])

    def begin_reading(self, host: HostSlice) -> None:
        """Make sure that work queued from here on finds what `copy_in` has queued for a slice; call within `copying()`.

        Waits where threads take part: the device does not know of what they are about to do.
        """
        if not _is_direct(host):
            self.arrival().wait()

    def arrival(self) -> StagedArrival:
        """The moment when what is queued by now has arrived; call within `device.copying()`."""
        return StagedArrival(self._device.arrival(), self._staging.queued())

    def confirm(self) -> None:
        """Wait until every copy has arrived; errors surface here."""
        for future in self._staging.queued():
            future.result()
        self._device.confirm()

    def settle(self) -> None:
        """Make sure that no copy is under way, whatever has become of it: of a move that failed or was interrupted."""
        self._staging.settle()
        with contextlib.suppress(Exception):
            self._device.confirm()

    def _chunks(self, host: HostSlice) -> Iterable[tuple[int, int]]:
        most = self._chunk_bytes if _is_direct(host) else self._staging.chunk_bytes
        for start, nbytes in host.region.chunks(host.offset, host.nbytes, most):
            yield start, start + nbytes


def _is_direct(host: HostSlice) -> bool:
    return host.region.tier is Tier.PINNED
