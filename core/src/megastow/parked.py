"""A storage that is away or about to leave: where its bytes are, and what it takes here and there.

Of what a kind keeps, what is transient and what ranks may share have regions of host memory of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megastow.digest import Digest
from megastow.host import align_up
from megastow.plan import KindPlan
from megastow.report import KindReport
from megastow.shares import Share
from megastow.state import ORDER_OF_USE, Ranks, Residency, StateKind
from megastow.storages import StorageRecord, belongs_to, storage_id
from megastow.tiers import Placement, Tier
from megastow.transport import HostSlice


class RegionKey(NamedTuple):
    """What has a region of host memory to itself.

    Attributes:
        kind: the kind.
        transient: what is transient of it, or what is lasting.
        is_shared: what ranks may share of it, or what is this rank's own.
    """

    kind: StateKind
    transient: bool = False
    is_shared: bool = False


@dataclass
class Parked:
    """A storage whose bytes are in host memory. See the note in `engine.py`.

    Attributes:
        storage: the released storage; it has zero bytes, and every tensor on it still points at it.
        nbytes: what it had, and gets back.
        kind: the kind it moves with.
        names: what the inventory called the tensors on it.
        host: its bytes, or None if they were not kept and it comes back as zeros, or is rebuilt.
        peers: the ranks that may share it; see `replicas`.
        released: whether the device side was (or was about to be) given up.
        digest: of its bytes when they left; None where none was asked for, and where it comes back as zeros.
    """

    storage: torch.UntypedStorage
    nbytes: int
    kind: StateKind
    names: tuple[str, ...]
    host: HostSlice | None
    peers: Ranks = ()
    released: bool = False
    digest: Digest | None = None

    @property
    def is_derived(self) -> bool:
        """Whether nothing was kept because its bytes are rebuilt from others, and have to be what they were."""
        return self.host is None and self.digest is not None

    @property
    def share(self) -> Share | None:
        """What this rank keeps of it; None for the whole, or nothing."""
        return None if self.host is None else self.host.share

    @property
    def digest_value(self) -> int | None:
        """Its digest, once that was read."""
        return None if self.digest is None else self.digest.value

    @property
    def leaves_last(self) -> bool:
        """Whether it cannot be refilled by this rank alone, and so is released after all that could fail."""
        return self.host is None or bool(self.peers)

    @property
    def is_orphan(self) -> bool:
        """Whether no tensor is left on the storage and nobody else holds it, so that nobody would miss it."""
        return self.share is None and belongs_to(self, 0)


def region_key(record: StorageRecord) -> RegionKey:
    """Which region of host memory a storage goes to."""
    return RegionKey(record.kind, record.transient, bool(record.peers))


def leave_out(records: Iterable[StorageRecord], derived: Collection[int]) -> None:
    """Note which storages, by identity, are derived: they are not copied out, and so not shared with other ranks."""
    for record in records:
        record.derived = storage_id(record.storage) in derived
        if record.derived:
            record.peers, record.share = (), None


def is_kept(record: StorageRecord, keep_grads: bool) -> bool:
    """Whether the bytes of a storage are to be copied out."""
    return not record.derived and (record.keep or keep_grads)


def host_sizes(records: Iterable[StorageRecord], keep_grads: bool, unit: int) -> dict[RegionKey, int]:
    """Host bytes for the storages that are kept, by region, the one that is needed soonest first."""
    sizes: dict[RegionKey, int] = {}
    for record in records:
        if is_kept(record, keep_grads):
            key = region_key(record)
            sizes[key] = sizes.get(key, 0) + align_up(record.kept_bytes, unit)
    return {key: sizes[key] for key in sorted(sizes, key=lambda key: (ORDER_OF_USE.index(key.kind), not key.transient))}


def planned_for(
    kind: StateKind,
    residency: Residency,
    records: Iterable[StorageRecord],
    packed: Iterable[StorageRecord],
    keep_grads: bool,
    placement: Placement,
    unit: int,
) -> KindPlan:
    """What an offload of a kind would give, by the storages that there are, and take, by those after packing."""
    mine = [record for record in records if record.kind is kind]
    moved = [record for record in packed if record.kind is kind]
    lasting = [record for record in moved if not record.transient]
    kept = [(placement.tiers[region_key(r)], align_up(r.kept_bytes, unit)) for r in moved if is_kept(r, keep_grads)]
    return KindPlan(
        kind,
        residency,
        num_tensors=sum(len(r.tensors) for r in mine),
        device_bytes=sum(r.nbytes for r in mine),
        host_bytes=_in_memory(kept),
        disk_bytes=_on_disk(kept),
        tier=next((placement.tiers[key] for key in map(region_key, lasting) if key in placement.tiers), None),
        derived_bytes=sum(r.nbytes for r in mine if r.derived),
    )


def planned_as_parked(kind: StateKind, residency: Residency, entries: Sequence[Parked], unit: int) -> KindPlan:
    """What an offload of a kind that is away has given and taken."""
    report = report_on(kind, entries, 0.0, unit)
    tier = next((p.host.region.tier for p in entries if p.host is not None), None)
    return KindPlan(
        kind,
        residency,
        report.num_tensors,
        report.device_bytes,
        report.host_bytes,
        report.disk_bytes,
        tier,
        report.derived_bytes,
    )


def report_on(kind: StateKind, entries: Sequence[Parked], seconds: float, unit: int) -> KindReport:
    """What a move of a kind has moved."""
    kept = [(p.host.region.tier, align_up(p.host.nbytes, unit)) for p in entries if p.host is not None]
    return KindReport(
        kind,
        moved=True,
        num_tensors=sum(len(p.names) for p in entries),
        device_bytes=sum(p.nbytes for p in entries),
        host_bytes=_in_memory(kept),
        seconds=seconds,
        disk_bytes=_on_disk(kept),
        derived_bytes=sum(p.nbytes for p in entries if p.is_derived),
    )


def _in_memory(kept: Iterable[tuple[Tier, int]]) -> int:
    return sum(nbytes for tier, nbytes in kept if tier is not Tier.DISK)


def _on_disk(kept: Iterable[tuple[Tier, int]]) -> int:
    return sum(nbytes for tier, nbytes in kept if tier is Tier.DISK)
