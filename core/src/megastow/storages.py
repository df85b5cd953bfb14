"""From tensors to storages: what an inventory means in memory that can be released and refilled.

Moves work on storages, because that is where aliases meet: every view, shard, bucket and cached slice of a buffer is
another tensor on one storage. Release the storage and all of them are empty; refill it and all of them are back, with
nothing rebuilt. This module finds the distinct storages behind an inventory and refuses what cannot be moved, before
anything is touched.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megastow.errors import StateChangedError, UnsupportedTensorError
from megastow.shares import Share
from megastow.state import ALL_KINDS, Inventory, Ranks, StateKind


@dataclass
class StorageRecord:
    """One storage and what the inventory knows of it.

    Attributes:
        storage: the storage itself; holding it keeps its memory, so records live no longer than a move.
        kind: the kind it moves with.
        keep: whether its bytes must be copied out.
        transient: whether only passing tensors lie on it (see `TensorGroup`).
        replicas: the ranks that hold the same bytes as a rule, by all groups that name any.
        peers: those of them with which this rank may share it, itself among them; none if it shares nothing.
        share: what this rank is to keep of it; None for the whole.
        tensors: name and tensor, each tensor object once.
        derived: whether its bytes follow from others, and need not be copied out (`derived.py`).
    """

    storage: torch.UntypedStorage
    kind: StateKind
    keep: bool
    transient: bool = False
    replicas: Ranks = ()
    peers: Ranks = ()
    share: Share | None = None
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    derived: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the storage now."""
        return self.storage.nbytes()

    @property
    def kept_bytes(self) -> int:
        """Bytes that a copy has of which this rank keeps its share."""
        return self.nbytes if self.share is None else self.share.kept_bytes

    @property
    def names(self) -> tuple[str, ...]:
        """What the inventory calls the tensors on it."""
        return tuple(name for name, _ in self.tensors)


def storage_id(storage: torch.UntypedStorage) -> int:
    """Identity of a storage, the same for every tensor on it, released or not. Valid while the storage lives."""
    return int(storage._cdata)


class _Holder(Protocol):
    """Something that holds a storage in hand, as its attribute."""

    storage: torch.UntypedStorage


def belongs_to(holder: _Holder, known: int) -> bool:
    """Whether a storage belongs to exactly `known` tensors, and to nobody else but the one handle of `holder`.

    torch counts the owners, and all handles in Python as one, because they are one object; Python counts those.
    Autograd's saved views, C++ caches and forgotten views all count.
    """
    owners = torch._C._storage_Use_Count(storage_id(holder.storage))
    return bool(owners == known + 1) and sys.getrefcount(holder.storage) == _lone_references(known > 0)


@functools.cache
def _lone_references(has_tensors: bool) -> int:
    """What Python counts for a storage with one handle in hand; tried out, as it differs between torch versions."""
    tensor = torch.empty(1, device="cpu")
    record = StorageRecord(
        tensor.untyped_storage() if has_tensors else torch.UntypedStorage(1), ALL_KINDS[0], keep=True
    )
    return sys.getrefcount(record.storage)


def find_storages(inventory: Inventory, kinds: Collection[StateKind], away: Collection[int]) -> list[StorageRecord]:
    """The distinct device storages of `kinds`, checked, in the order of `StateKind`.

    Tensors that live elsewhere (the CPU part of an optimizer that is split over devices, a `step` counter) are left
    where they are, and so is what has no elements.

    Args:
        inventory: what the adapter found. All of it is looked at: a storage belongs to the first kind that claims it.
        kinds: the kinds to return.
        away: identities of the storages that this manager itself has released.

    Raises:
        UnsupportedTensorError: a storage of `kinds` cannot be resized.
        StateChangedError: a storage of `kinds` has no bytes, and it was not this manager that took them.
    """
    found = [r for key, r in list_storages(inventory).items() if r.kind in kinds and key not in away]
    for record in found:
        _check_movable(record)
    return found


def list_storages(inventory: Inventory) -> dict[int, StorageRecord]:
    """All distinct device storages of an inventory by identity, unchecked, each with the first kind that claims it."""
    records: dict[int, StorageRecord] = {}
    known: dict[int, StorageRecord] = {}  # by identity of the tensor
    device = inventory.device
    last: StorageRecord | None = None
    for group in sorted(inventory.groups, key=lambda group: ALL_KINDS.index(group.kind)):
        keep, transient, replicas = group.keep, group.transient, group.replicas
        told: StorageRecord | None = None  # what has heard of this group last
        for entry in group.tensors:
            tensor = entry[1]
            record = known.get(id(tensor))
            if record is None:
                if tensor.numel() == 0:
                    continue
                storage = tensor.untyped_storage()
                record = last
                if record is None or storage is not record.storage:  # what is packed mostly lies where the last one did
                    if tensor.device != device:
                        continue
                    key = storage_id(storage)
                    record = records.get(key)
                    if record is None:
                        record = records[key] = StorageRecord(storage, group.kind, keep, transient, replicas)
                    last = record
                record.tensors.append(entry)
                known[id(tensor)] = record
            if record is told:
                continue
            told = record
            if keep:
                record.keep = True
            if not transient:
                record.transient = False
            if replicas and record.replicas != replicas:
                record.replicas = tuple(r for r in replicas if r in record.replicas) if record.replicas else replicas
    return records


def _check_movable(record: StorageRecord) -> None:
    is_shared = record.storage.device.type == "cpu" and record.storage.is_shared()
    if record.nbytes and record.storage.resizable() and not is_shared:
        return
    names = _some(record.names)
    if record.nbytes == 0:
        raise StateChangedError(
            f"{names} ({record.kind}) has no storage: its bytes were released by another manager or by other code. "
            "Expected state on the device. Bring it back where it was released, then call again; nothing was moved. If "
            "that was closed with discard=True, it is lost: make a new model, and load a checkpoint"
        )
    if not record.storage.resizable():
        raise UnsupportedTensorError(
            f"the storage of {names} ({record.kind}, {record.nbytes} bytes) cannot be resized: it was made by "
            "from_numpy, frombuffer, a memory-mapped load or another foreign owner. Nothing was moved. Clone the "
            "tensor into memory of torch's own allocator before training"
        )
    raise UnsupportedTensorError(
        f"the storage of {names} ({record.kind}) is shared with other processes; releasing it would not free it. "
        "Nothing was moved. Clone the tensor into private memory"
    )


def _some(names: tuple[str, ...], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def byte_view(storage: torch.UntypedStorage) -> torch.Tensor:
    """The whole of a storage as a flat uint8 tensor of shape [nbytes]; no copy."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
