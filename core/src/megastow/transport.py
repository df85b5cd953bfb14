"""Copies between device storages and host memory, in chunks, on the copy stream.

A copy that is queued is not a copy that has arrived: `confirm` waits for all of them, and nobody may release the source
or use the target before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megastow import faults
from megastow.device import Device
from megastow.host import HostRegion
from megastow.storages import byte_view

DEFAULT_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class HostSlice:
    """Where a storage's bytes lie in host memory: `nbytes` from `offset` in `region`."""

    region: HostRegion
    offset: int
    nbytes: int

    def bytes(self) -> torch.Tensor:
        """uint8 tensor of shape [nbytes] on the host; no copy."""
        return self.region.bytes[self.offset : self.offset + self.nbytes]


class Transport:
    """Moves bytes for one manager."""

    def __init__(self, device: Device, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> None:
        """Start with nothing queued.

        Args:
            device: the accelerator.
            chunk_bytes: the most that one copy carries. Under 4 MiB copies fall behind the link.
        """
        self._device = device
        self._chunk_bytes = chunk_bytes

    def copy_out(self, storage: torch.UntypedStorage, host: HostSlice) -> None:
        """Queue the copy of a storage to the host; call within `device.copying()`."""
        source, target = byte_view(storage), host.bytes()
        for start, end in self._chunks(host):
            faults.point("offload.chunk")
            target[start:end].copy_(source[start:end], non_blocking=True)
            faults.point("offload.copied", target[start:end])

    def copy_in(self, host: HostSlice, storage: torch.UntypedStorage) -> None:
        """Queue the copy of host memory into a storage; call within `device.copying()`."""
        source, target = host.bytes(), byte_view(storage)
        for start, end in self._chunks(host):
            faults.point("onload.chunk")
            target[start:end].copy_(source[start:end], non_blocking=True)
            faults.point("onload.copied", target[start:end])

    def _chunks(self, host: HostSlice) -> Iterable[tuple[int, int]]:
        for start, nbytes in host.region.chunks(host.offset, host.nbytes, self._chunk_bytes):
            yield start, start + nbytes
