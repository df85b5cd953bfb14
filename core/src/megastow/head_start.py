"""What an offload will most likely have to copy: the storages that came back with the last onload.

Finding out what there is to copy takes Python milliseconds, and the link could be busy meanwhile. So an offload begins
with the copies of the last one, to the same places, and holds them against its plan when it has one: a storage that the
plan sends to the very place to which it is on its way need not be copied again. All others were copied in vain, to
places that held nothing.

Nothing here keeps a storage alive, nor counts as an owner of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megastow.digest import Digest
from megastow.staging import StagedArrival
from megastow.state import StateKind
from megastow.tiers import Region, Tier
from megastow.transport import HostSlice


class Begun(NamedTuple):
    """A copy out that was queued ahead of the plan."""

    host: HostSlice
    arrival: StagedArrival
    digest: Digest | None


@dataclass(frozen=True)
class _Place:
    storage: StorageWeakRef
    host: HostSlice


class LastPlaces:
    """Where the storages of each kind were in host memory when they were there last."""

    def __init__(self) -> None:
        self._places: dict[StateKind, list[_Place]] = {}

    def remember(self, kind: StateKind, storages: Iterable[tuple[torch.UntypedStorage, HostSlice]]) -> None:
        """Take note of the storages of a kind that were kept, instead of what was known of it.

        Only of those in page-locked memory: what copies go to by way of buffers is slower than any inventory, and a
        file is not to be held open.
        """
        self._places[kind] = [
            _Place(StorageWeakRef(storage), host) for storage, host in storages if host.region.tier is Tier.PINNED
        ]

    def clear(self) -> None:
        """Forget everything."""
        self._places.clear()

    def recall(
        self, kinds: Collection[StateKind], is_ready: Callable[[Region], bool]
    ) -> Iterator[tuple[StateKind, torch.UntypedStorage, HostSlice]]:
        """The storages of kinds that still are what they were, with where they were; hold none of them any longer.

        Args:
            kinds: which.
            is_ready: whether copies may be queued to a region of host memory.
        """
        for kind in kinds:
            for place in self._places.get(kind, ()):
                if not is_ready(place.host.region):
                    continue
                found = torch.UntypedStorage._new_with_weak_ptr(place.storage.cdata)
                storage = cast("torch.UntypedStorage | None", found)
                del found
                if storage is not None and storage.nbytes() == place.host.storage_bytes:
                    yield kind, storage, place.host
                del storage
