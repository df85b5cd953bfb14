"""Flat device buckets: many small storages become few large ones, once, without anybody noticing.

Megatron keeps main weights and moments as hundreds or thousands of storages of their own. Copying, releasing and taking
them one by one costs bandwidth and driver calls in every cycle. So they are packed: a bucket is one storage, every
tensor on a packed storage is re-pointed at its place in the bucket (`tensor.data = ...`, which keeps the object, its
version, its autograd hooks and whatever refers to it), and from then on the ordinary rules for storages apply. Nothing
has to remember a bucket in order to move it: the next inventory finds its tensors on it.

[Note: who else owns a storage]
Re-pointing is only right if every tensor on the storage is re-pointed. The inventory may not know all of them: a view
in somebody's cache, a tensor that autograd saved, a base that a view keeps alive. The storage's reference count tells:
it must be exactly one for each tensor that we know, plus one for the handle in hand. If it is not, the storage is left
alone and moves on its own, which is always right and merely slower. The same goes for tensors that are more than shape,
stride and offset (subclasses, lazy conjugates, tensors made in inference mode): re-pointing would take that from them.

[Note: one dtype to a bucket]
`torch.save` refuses tensors of different dtypes on one storage. A bucket holds tensors of one dtype, so that a
checkpoint can be saved after a packing as before it.

[Note: alignment]
torch aligns CUDA blocks to 512 bytes, and some kernels (reductions, vectorised loads) choose their order of work by
alignment. A tensor packed more tightly could therefore be summed in another order and give other bits. Members keep
512-byte alignment; that is also what the allocator rounds each of them up to when they stand alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megastow import faults
from megastow.device import Device
from megastow.host import ALIGNMENT_BYTES, align_up
from megastow.state import PLAIN_TYPES
from megastow.storages import StorageRecord, belongs_to, byte_view, storage_id

logger = logging.getLogger(__name__)


Group = Sequence[StorageRecord]
"""Storages for one bucket."""


@dataclass(frozen=True)
class _Run:
    """A stretch of bytes that tensors of one storage cover, and where it goes."""

    start: int
    nbytes: int
    target: int = 0

    @property
    def end(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class _Bucket:
    """What was packed into a storage that we made.

    Attributes:
        storage: whether it is still alive.
        num_tensors: tensors of the inventory that were pointed at it.
        live_bytes: bytes that they covered.
    """

    storage: StorageWeakRef
    num_tensors: int
    live_bytes: int


class FlatTensors:
    """Packs the small storages of one manager into device buckets, and knows which storages are its buckets."""

    def __init__(self, device: Device, bucket_bytes: int) -> None:
        """Start with no bucket.

        Args:
            device: where the buckets are made.
            bucket_bytes: size of a bucket, and the most extra device memory that packing takes at a time. Storages
                from half this size on are large enough to move as they are.
        """
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._buckets: dict[int, _Bucket] = {}  # by identity of the storage

    def groups(self, records: Iterable[StorageRecord]) -> Sequence[Group]:
        """What can be packed, and is not yet: bucket by bucket.

        Args:
            records: storages with bytes on the device.
        """
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if not bucket.storage.expired()}
        return list(self._fill([r for r in records if self._is_candidate(r)]))

    @staticmethod
    def buckets(groups: Iterable[Group]) -> list[StorageRecord]:
        """The storages that groups would be after packing, without memory (on torch's device "meta")."""
        found = []
        for group in groups:
            nbytes = sum(map(_packed_bytes, group))
            storage = torch.empty(nbytes, dtype=torch.uint8, device="meta").untyped_storage()
            tensors = [entry for record in group for entry in record.tensors]
            found.append(StorageRecord(storage, group[0].kind, True, replicas=group[0].replicas, tensors=tensors))
        return found

    def pack(self, groups: Iterable[Group]) -> None:
        """Pack groups. Values, identities and aliases of all tensors are unchanged.

        Work is queued on the current stream; the caller has synchronised before and synchronises after. Peak extra
        device memory is one bucket. A failure part of the way leaves everything valid, with fewer storages packed.

        Args:
            groups: as `groups` has found them. A packed record ends up holding its bucket.
        """
        for group in groups:
            self._pack_group(group)
            self._device.release_cached()  # or the small blocks just left would add up to a second copy
            logger.debug("packed %d storages into a device bucket", len(group))

    def _is_candidate(self, record: StorageRecord) -> bool:
        if not record.keep or record.transient:
            return False
        bucket = self._buckets.get(storage_id(record.storage))
        if bucket is not None:  # one of ours: worth another packing only if tensors have died and left holes
            has_lost = len(record.tensors) < bucket.num_tensors and _live_bytes(record) < bucket.live_bytes
            return has_lost and _owned(record)
        return record.nbytes < self._bucket_bytes // 2 and _owned(record)

    def _fill(self, candidates: Sequence[StorageRecord]) -> Iterator[list[StorageRecord]]:
        """Candidates that may lie together, bucket by bucket; a lone newcomer gains nothing by moving house.

        Those are of one kind, of one dtype ([Note: one dtype to a bucket]), and the same on the same ranks, so that
        their bucket is, too, also for another manager that shares more than this one.
        """
        families: dict[object, list[StorageRecord]] = {}
        for record in candidates:
            dtypes = frozenset(t.dtype for _, t in record.tensors)
            families.setdefault((record.kind, dtypes, record.replicas), []).append(record)
        for family in families.values():
            group: list[StorageRecord] = []
            size = 0
            for record in family:
                nbytes = _packed_bytes(record)
                if group and size + nbytes > self._bucket_bytes:
                    if self._is_worth_it(group):
                        yield group
                    group, size = [], 0
                group.append(record)
                size += nbytes
            if self._is_worth_it(group):
                yield group

    def _is_worth_it(self, group: Group) -> bool:
        return len(group) > 1 or storage_id(group[0].storage) in self._buckets

    def _pack_group(self, group: Group) -> None:
        placed: list[tuple[StorageRecord, list[_Run]]] = []
        size = 0
        for record in group:
            runs = []
            for run in _live_runs(record):
                runs.append(_Run(run.start, run.nbytes, size))
                size += align_up(run.nbytes)
            placed.append((record, runs))
        faults.point("pack.bucket")
        # Zeros between the members, so that the buckets of ranks which hold the same have the same bytes.
        bucket = torch.zeros(size, dtype=torch.uint8, device=self._device.torch_device)
        for record, runs in placed:
            for run in runs:
                bucket[run.target : run.target + run.nbytes].copy_(byte_view(record.storage)[run.start : run.end])
        self._device.synchronize()  # the sources may be reused from here on, by whichever stream they came from
        storage = bucket.untyped_storage()
        # Known as ours before it is used: if the next steps are cut short, the next packing sees holes and fills them.
        self._buckets[storage_id(storage)] = _Bucket(
            StorageWeakRef(storage), sum(len(r.tensors) for r in group), sum(_live_bytes(r) for r in group)
        )
        for record, runs in placed:
            faults.point("pack.repoint")
            _repoint(record, runs, storage)
            record.storage = storage  # lets go of the old one, so that no more than a bucket is held twice


def _known_tensors(record: StorageRecord) -> list[torch.Tensor]:
    """The tensors of the inventory on a storage, and the bases that those which are views keep alive."""
    tensors = {id(t): t for _, t in record.tensors}
    bases = [t._base for t in tensors.values() if t._base is not None]
    # A view whose `.data` was set lies on another storage than its base.
    tensors.update((id(b), b) for b in bases if storage_id(b.untyped_storage()) == storage_id(record.storage))
    return list(tensors.values())


def _owned(record: StorageRecord) -> bool:
    """Whether we know every tensor on the storage. See [Note: who else owns a storage]."""
    known = _known_tensors(record)
    return all(map(_is_plain, known)) and belongs_to(record, len(known))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nothing but a shape, strides and an offset on its storage."""
    ordinary = type(tensor) in PLAIN_TYPES
    return ordinary and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor within its storage, and one past its last."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def _live_runs(record: StorageRecord) -> list[_Run]:
    """The bytes that the known tensors cover, overlapping tensors joined.

    A run starts where an alignment unit starts, so that every tensor keeps its distance from the boundary.
    """
    runs: list[_Run] = []
    for first, end in sorted(_span(t) for t in _known_tensors(record)):
        start = first - first % ALIGNMENT_BYTES
        if runs and start < runs[-1].end:
            runs[-1] = _Run(runs[-1].start, max(end, runs[-1].end) - runs[-1].start)
        else:
            runs.append(_Run(start, end - start))
    return runs


def _packed_bytes(record: StorageRecord) -> int:
    """What a storage takes of a bucket."""
    return sum(align_up(run.nbytes) for run in _live_runs(record))


def _live_bytes(record: StorageRecord) -> int:
    return sum(run.nbytes for run in _live_runs(record))


def _repoint(record: StorageRecord, runs: Sequence[_Run], bucket: torch.UntypedStorage) -> None:
    """Point all tensors on a storage at their places in the bucket, or none of them."""
    moves: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # tensor, where it is, where it goes
    for tensor in _known_tensors(record):
        start, _ = _span(tensor)
        run = next(run for run in runs if run.start <= start < run.end)
        offset = (start - run.start + run.target) // tensor.element_size()
        moves.append((tensor, tensor.data, _place(tensor, bucket, offset)))
    try:
        for tensor, _, there in moves:
            tensor.data = there
    except BaseException:
        for tensor, here, _ in moves:
            tensor.data = here
        raise


def _place(tensor: torch.Tensor, storage: torch.UntypedStorage, offset: int) -> torch.Tensor:
    """A tensor like `tensor`, `offset` elements into `storage`."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, offset, tensor.size(), tensor.stride())
