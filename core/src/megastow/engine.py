"""A move is a transaction: plan, reserve, copy, confirm, release - or nothing happened.

[Note: what is true at which moment]
The bytes of a storage are in one of two places, and a `Parked` entry says which. The entries of an offload are written
before its first copy. A storage is marked as released, and then released, when its own copy has arrived: from then on
the host copy is the truth, and refilling from it is right any number of times, whatever has become of the device side.
Until then, and where there is no entry, the device side is the truth. Entries are deleted after the last copy of an
onload has been confirmed. So an interruption at any instruction leaves a state from which the same call, or its
opposite, goes on.

With digests, a storage is not released before its own has been computed, and an onload (also one that undoes an
offload) is confirmed only where the digest of what has arrived is the same. A host copy that has changed cannot be
mended, but nothing better is left: it is kept, and comes back to a caller who asks for it unverified.

Storages are released one by one while the copies of others are on their way, so that another tenant of the process can
have the memory at once. If the move then fails, what was released is refilled; if even that fails, because somebody has
taken the memory meanwhile, the kinds count as offloaded, with entries that were not released among them, and the next
onload brings back what is missing.

What is not kept (gradient buffers) has no second copy. It is released after everything that could fail, a strict
offload's look at what would stay included; once the first byte of it is gone there is no way back, and an interruption
then ends the move instead of undoing it. So it is with weights that are derived (`derived.py`): they are rebuilt by an
onload of their own, never by an undoing. Where the driver takes memory back beside copies, that is the moment when all
copies are queued, and nothing is left that could fail but the device (`docs/adr/0009-the-last-way-back.md`).

Ranks that move together vote before that, and at the end of an onload (`agreement.py`). A move that fails on one is
undone on all; one that all have confirmed is ended by each, as if the first byte were gone. What they share, or may
share (`replicas.py`), is released after that vote, too: a rank cannot refill it alone.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megastow import faults, machine
from megastow.agreement import ALONE, Ballot
from megastow.clock import KindClock
from megastow.derived import DerivableBuffer, WeightDeriver
from megastow.device import Arrival, Device, Direction
from megastow.digest import Digest, Digester
from megastow.disk import DiskFolder
from megastow.errors import (
    MegastowError,
    OffloadedError,
    StateChangedError,
    TransferError,
)
from megastow.flat import FlatTensors, Group
from megastow.forking import process_lock
from megastow.head_start import Begun, LastPlaces
from megastow.host import HostArena, align_up
from megastow.parked import (
    Parked,
    RegionKey,
    host_sizes,
    is_kept,
    leave_out,
    planned_as_parked,
    planned_for,
    region_key,
    report_on,
)
from megastow.plan import MovePlan
from megastow.refill import Permit, Refill
from megastow.replicas import NO_REPLICAS, Replicas, by_peers
from megastow.report import KindReport
from megastow.staging import StagedArrival, Staging
from megastow.state import ORDER_OF_USE, Inventory, Residency, StateKind
from megastow.storages import StorageRecord, _some, find_storages, storage_id
from megastow.tiers import HostMemory
from megastow.transport import HostSlice, Transport

DEFAULT_BUCKET_BYTES = 512 << 20

IN_FLIGHT_BYTES = 2 << 30
"""Copies of an offload that are queued at a time, if there are that many: enough to keep the link busy, and so few that
storages are given up soon, and that copies of another manager, the other way, are not queued up behind all of them."""


RETURNED_BYTES = 1 << 30
"""What an offload has released when it hands that back to the driver, if it need not wait for copies to do so."""


Inspection = Callable[[Sequence[torch.UntypedStorage]], None]
"""Looks at what would stay on the device; given the storages that are still there, and go when it is content."""


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()
_CLAIMING = process_lock()
"""All engines of the process, and what is held while one of them looks at what the others have."""


@dataclass(frozen=True)
class Offload:
    """What an offload was asked for.

    Attributes:
        kinds: those of the call, with what is away already.
        clock: what it takes.
        give_back: whether the memory goes back to the driver.
        inspect: asked when there is nothing left to do but what cannot be undone.
        ballot: asked before that.
    """

    kinds: Collection[StateKind]
    clock: KindClock
    give_back: bool
    inspect: Inspection | None
    ballot: Ballot


class Engine:
    """Moves kinds between one device and host memory. Not thread-safe; the manager serialises calls.

    Attributes:
        released_bytes: Device memory that offloads have given up since the engine was made, without those undone; any
            thread may read it.
    """

    def __init__(
        self,
        device: Device,
        *,
        bucket_bytes: int,
        chunk_bytes: int,
        host_memory: HostMemory = "pinned",
        folder: DiskFolder | None = None,
        digests: bool = False,
        derivable: Callable[[], Iterable[DerivableBuffer]] | None = None,
        replicas: Replicas = NO_REPLICAS,
    ) -> None:
        self._device = device
        self._replicas = replicas
        self._digester = Digester(device)
        self._makes_digests = digests
        self._deriver = None if derivable is None else WeightDeriver(device, self._digester, derivable)
        staging = Staging(device, chunk_bytes)
        self._arena = HostArena(device, host_memory, folder, staging)
        self._transport = Transport(device, chunk_bytes, staging)
        self._refill = Refill(device, self._transport, self._digester, digests, self._deriver, replicas)
        self._flat = FlatTensors(device, bucket_bytes)
        self._parked: dict[StateKind, list[Parked]] = {}
        self._moving: dict[StateKind, Residency] = {}
        self._last_places = LastPlaces()
        self._claimed: set[int] = set()  # identities of storages that a head start reads
        self.released_bytes = 0
        with _CLAIMING:
            _ENGINES.add(self)

    # --- questions -----------------------------------------------------------------------------------------------

    def residency(self, kind: StateKind) -> Residency:
        """Where the bytes of `kind` are at this moment."""
        settled = Residency.OFFLOADED if kind in self._parked else Residency.RESIDENT
        return self._moving.get(kind, settled)

    def is_away(self, kind: StateKind) -> bool:
        """Whether the bytes of `kind` are in host memory, whatever move is under way or about to begin."""
        return kind in self._parked

    def is_half_away(self, kind: StateKind) -> bool:
        """Whether an offload has failed and could not be undone either, so that only some of `kind` is released."""
        return any(not parked.released for parked in self._parked.get(kind, ()))

    def on_host(self) -> list[Parked]:
        """The storages that are released, between two moves; what is not kept of them has no host memory."""
        return [parked for entries in self._parked.values() for parked in entries if parked.released]

    @property
    def host_bytes(self) -> int:
        """Host memory held for copies, in use or ready."""
        return self._arena.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk held for copies, in use or ready."""
        return self._arena.disk_bytes

    def tier_notes(self, kinds: Collection[StateKind]) -> list[str]:
        """What a reader should know of the tiers in which kinds are kept; nothing if they are where they would be."""
        demoted = self._arena.demoted()
        return [
            f"{kind} is kept in the tier {tier}: {why}"
            for kind in kinds
            for key, (tier, why) in demoted.items()
            if key == RegionKey(kind) or key == RegionKey(kind, is_shared=True)
        ]

    def derives(self, kinds: Collection[StateKind]) -> bool:
        """Whether something of kinds may be left to be rebuilt from others."""
        return self._deriver is not None and StateKind.WEIGHTS in kinds

    @property
    def order_of_return(self) -> tuple[StateKind, ...]:
        """In which order kinds come back: as they are used, but main weights first where weights follow from them."""
        if self._deriver is None:
            return ORDER_OF_USE
        return (StateKind.MAIN_WEIGHTS, *(kind for kind in ORDER_OF_USE if kind is not StateKind.MAIN_WEIGHTS))

    def derive_notes(self) -> tuple[str, ...]:
        """Which weights were kept by the last offload of them, and why; nothing where they are not to be derived."""
        return () if self._deriver is None else self._deriver.notes

    def sharing_notes(self, kinds: Collection[StateKind]) -> list[str]:
        """What a reader should know of storages that ranks could not share; nothing if they share all."""
        notes: list[str] = []
        for kind in kinds:
            found = by_peers(p for p in self._parked.get(kind, ()) if p.peers and p.share is None)
            for peers, whole in found.items():
                names = _some(tuple(name for p in whole for name in p.names))
                notes.append(
                    f"{len(whole)} storages of {kind} (with {names}) are not the same on ranks "
                    f"{', '.join(map(str, peers))}, or were not in the last offload, and each keeps all of them"
                )
        return notes

    def find(self, inventory: Inventory, kinds: Collection[StateKind]) -> list[StorageRecord]:
        """The storages of `kinds` on the device; raises for what could not be moved."""
        away = {storage_id(p.storage) for entries in self._parked.values() for p in entries}
        records = find_storages(inventory, kinds, away)
        self._replicas.assign(records)
        return records

    def plan(self, inventory: Inventory, kinds: Sequence[StateKind], *, keep_grads: bool) -> MovePlan:
        """What an offload of `kinds` would give and take now; changes nothing.

        Raises:
            MegastowError: something of `kinds` could not be moved.
        """
        here = [kind for kind in kinds if not self.is_away(kind)]
        records = self.find(inventory, here)
        candidates = self._mark_candidates(records)
        groups = self._flat.groups(r for r in records if storage_id(r.storage) not in candidates)
        packed = self._after_packing(records, groups)
        unit = self._arena.unit_bytes
        sizes = host_sizes(packed, keep_grads, unit)
        placement = self._arena.place(sizes)
        entries = {
            kind: planned_for(kind, self.residency(kind), records, packed, keep_grads, placement, unit)
            if kind in here
            else planned_as_parked(kind, self.residency(kind), self._parked[kind], unit)
            for kind in kinds
        }
        return MovePlan(
            entries,
            new_host_bytes=max(0, placement.memory_bytes),
            packing_bytes=max((bucket.nbytes for bucket in self._flat.buckets(groups)), default=0),
            limits=machine.host_limits(),
            numa_node=self._device.numa_node(),
            new_disk_bytes=max(0, placement.disk_bytes),
            disk=self._arena.disk_space(),
            problem=placement.problem,
            notes=tuple(
                f"{key.kind} would be kept on disk: {placement.reasons[key]}"
                for key in sizes
                if key in placement.reasons
            ),
        )

    # --- moves ---------------------------------------------------------------------------------------------------

    def prepare(self, inventory: Callable[[], Inventory], kinds: Collection[StateKind]) -> dict[RegionKey, int]:
        """Pack what is small and on the device; returns the host bytes that an offload of `kinds` would keep then.

        Synchronises with the device. Right for the state as it is now; what changes until the offload is made up for
        then.

        Raises:
            MegastowError: something could not be moved or packed; nothing is lost.
        """
        here = [kind for kind in kinds if kind not in self._parked]
        with self._during("preparation", here, Residency.RESIDENT):
            self._device.synchronize()
            records = self._pack(inventory, here, False, self._mark_candidates)
            return host_sizes(records, False, self._arena.unit_bytes)

    def reserve(self, sizes: Mapping[RegionKey, int]) -> int:
        """Make host memory ready for the next offload; returns the bytes now held.

        Holds no tensor and looks at none, so it may run in a thread beside training and beside an onload.

        Args:
            sizes: what `prepare` found; none of these kinds may be offloaded before this has returned.

        Raises:
            HostMemoryError: the host cannot give that much.
        """
        self._arena.check(sizes)
        self._arena.reserve(sizes)
        return self._arena.nbytes

    def offload(
        self,
        inventory: Callable[[], Inventory],
        kinds: Sequence[StateKind],
        *,
        keep_grads: bool,
        give_back: bool = True,
        inspect: Inspection | None = None,
        ballot: Ballot = ALONE,
    ) -> dict[StateKind, KindReport]:
        """Move `kinds` to the host and release their device memory.

        Synchronises with the device before and after. Extra device memory: at most one bucket, while small storages
        are packed for the first time.

        Args:
            inventory: makes the inventory; called anew after a packing, which changes what lies where.
            kinds: what to move; kinds that are away already are passed over.
            keep_grads: copy gradient buffers too.
            give_back: hand the memory back to the driver; otherwise torch's allocator keeps it.
            inspect: asked when there is nothing left to do but what cannot be undone. What it raises undoes the move.
            ballot: asked before what is not kept is dropped, and which weights can be derived.

        Raises:
            MegastowError: the move could not be made, or other ranks could not make it; everything is on the device as
                before.
        """
        moving = [k for k in kinds if k not in self._parked]
        # Left by an offload that failed and could not be undone: known as away, with bytes on the device.
        # Or by an onload that failed and was not undone to its end: its bytes are in host memory and on the device.
        unfinished = {
            k: [p for p in self._parked[k] if not p.released or p.storage.nbytes()] for k in kinds if k in self._parked
        }
        unfinished = {kind: entries for kind, entries in unfinished.items() if entries}
        reports = {k: KindReport(k, moved=False) for k in kinds}
        if not moving and not unfinished:
            self._replicas.compare(self._may_share(kinds), ballot)  # the others may have something to move
            if inspect is not None:
                inspect(())
            return reports
        clock = KindClock()
        proofs: dict[int, Digest | None] = {}

        def prove(records: Sequence[StorageRecord]) -> Collection[int]:
            if self._deriver is not None and StateKind.WEIGHTS in kinds:
                proofs.update(self._deriver.prove(records, self._main_is_here, ballot))
            leave_out(records, [key for key, proof in proofs.items() if proof is not None])
            return proofs.keys()

        with (
            self._during("offload", [*moving, *unfinished], Residency.OFFLOADING),
            self._head_start(moving, keep_grads, clock) as begun,
        ):
            records = self._pack(inventory, moving, keep_grads, prove)
            plans = self._plan(records, moving, keep_grads, clock, proofs)
            del records  # they hold storages
            leaving = {**plans, **{kind: self._parked[kind] for kind in unfinished}}
            self._move_out(leaving, begun, Offload(kinds, clock, give_back, inspect, ballot))
            if give_back:
                self._device.release_cached()
            seconds = clock.seconds()
            for kind, entries in {**plans, **unfinished}.items():
                reports[kind] = report_on(kind, entries, seconds[kind], self._arena.unit_bytes)
        return reports

    def onload(
        self,
        kinds: Sequence[StateKind],
        permit: Permit | None = None,
        arrived: Callable[[StateKind], None] | None = None,
        *,
        unverified: bool = False,
        ballot: Ballot = ALONE,
    ) -> tuple[dict[StateKind, KindReport], list[str]]:
        """Bring `kinds` back to the device; needs device memory for exactly what was released.

        Synchronises with the caller's stream before, and with its own copies after.

        Args:
            kinds: what to move; kinds that are here already are passed over.
            permit: asked before each storage is taken; may wait. Without it all has to be free at once.
            arrived: called with each kind that is back, in the order in which a training step needs them. What has been
                told stays, whatever happens to the others; without it, all of it comes back or nothing.
            unverified: look at no digest.
            ballot: asked before what has come back is let through: all of it, or with `arrived` each kind.

        Returns:
            A report for each kind, and notes.

        Raises:
            DeviceMemoryError: the device has not enough free memory; everything is in host memory as before.
            CorruptionError: other bytes came back than have left; everything is in host memory as before.
            OffloadedError: weights are rebuilt from main weights, which would not be here.
            StateChangedError: weights would be rebuilt to other ones than have left; everything is away as before.
            MegastowError: the move could not be made, or other ranks could not make it; everything is in host memory as
                before.
        """
        moving = [k for k in self.order_of_return if k in kinds and k in self._parked]
        reports = {k: KindReport(k, moved=False) for k in kinds}
        notes: list[str] = []
        if not moving:
            self._replicas.meet([], self._replicas.gathering(ballot), ballot)
            return reports, notes

        def tell(kind: StateKind) -> None:
            assert arrived is not None
            self._forget([kind])
            self._moving.pop(kind, None)
            arrived(kind)

        self._check_sources(moving)
        with self._during("onload", moving, Residency.ONLOADING):
            for kind in moving:
                orphans = [p for p in self._parked[kind] if p.is_orphan]
                if orphans:
                    notes.append(f"{len(orphans)} storages of {kind} were dropped by their owners while away")
                    self._parked[kind] = [p for p in self._parked[kind] if not p.is_orphan]
            self._device.synchronize_stream()  # not the device: it is busy with copies of whoever makes room
            clock = KindClock()
            entries = {kind: self._parked[kind] for kind in moving}
            try:
                self._refill.run(entries, clock, permit, None if arrived is None else tell, unverified, ballot)
            except BaseException as error:
                is_confirmed = not ballot.withdraw(error)
                self._forget([kind for kind in moving if is_confirmed or ballot.has_confirmed(kind)])
                raise
            self._forget(moving)
            seconds = clock.seconds()
            for kind in moving:
                reports[kind] = report_on(kind, entries[kind], seconds[kind], self._arena.unit_bytes)
        return reports, notes

    def announce(self, kinds: Collection[StateKind], residency: Residency) -> None:
        """Show `residency` of kinds that a move is about to begin with; until `settle`."""
        self._moving.update(dict.fromkeys(kinds, residency))

    def settle(self) -> None:
        """Show residencies as they are between moves; the end of every move, which an interruption may have skipped."""
        self._moving.clear()

    def close(self) -> None:
        """Give host memory back. What is parked is lost: tensors on it stay empty, and its kinds stay offloaded."""
        self._parked = {kind: [] for kind in self._parked}
        self._last_places.clear()
        self._transport.settle()  # before the memory goes that an interrupted move may still use
        self._arena.close()
        self._replicas.close()

    # --- steps ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _during(self, move: str, kinds: Sequence[StateKind], residency: Residency) -> Iterator[None]:
        """Show `residency` while a move is under way, and turn a foreign error into one of ours.

        The caller may be in inference mode (a rollout often is). A move is not: what is made or re-pointed in it would
        become inference tensors, which training refuses.
        """
        try:
            self.announce(kinds, residency)
            self._transport.settle()
            self._claimed = set()
            with torch.inference_mode(False), torch.no_grad():
                yield
        except MegastowError:
            raise
        except Exception as error:
            places = {"in host memory": [k for k in kinds if k in self._parked]}
            places["on the device"] = [k for k in kinds if k not in self._parked]
            where = " and ".join(f"{', '.join(found)} {place}" for place, found in places.items() if found)
            raise TransferError(
                f"{move} of {', '.join(kinds)} failed: {type(error).__name__}: {error}. "
                f"Nothing is lost, with {where}, and the call can be made again"
            ) from error
        finally:
            self.settle()

    @contextlib.contextmanager
    def _head_start(
        self, kinds: Sequence[StateKind], keep_grads: bool, clock: KindClock
    ) -> Iterator[Mapping[int, Begun]]:
        """Begin with the copies of the last offload, while it is found out what this one has to copy.

        Synchronises with the device first: what is copied from there on must not change any more.

        Yields:
            What was begun, by identity of the storage; see `head_start`.
        """
        self._device.synchronize()
        try:
            yield self._begin_as_last_time(kinds, keep_grads, clock)
        except BaseException:
            self._transport.settle()
            raise
        finally:
            self._claimed = set()

    def _begin_as_last_time(self, kinds: Sequence[StateKind], keep_grads: bool, clock: KindClock) -> dict[int, Begun]:
        """Queue the copies of the last offload, of storages that no other manager moves; holds none of them after."""
        with _CLAIMING:
            taken = self._taken_by_others()
            again = [kind for kind in kinds if keep_grads or kind is not StateKind.GRAD_BUFFERS]
            places = self._last_places.recall(again, self._arena.is_ready)
            reading = [
                Parked(storage, storage.nbytes(), kind, (), host, () if host.share is None else host.share.ranks)
                for kind, storage, host in places
                if storage_id(storage) not in taken
            ]
            self._claimed = {storage_id(parked.storage) for parked in reading}
        begun: dict[int, Begun] = {}
        start = self._device.arrival()
        with self._device.copying(Direction.OUT):
            for parked in reading:
                assert parked.host is not None
                arrival = self._copy_out(parked, clock, start)
                begun[storage_id(parked.storage)] = Begun(parked.host, arrival, parked.digest)
        return begun

    def _pack(
        self,
        inventory: Callable[[], Inventory],
        kinds: Collection[StateKind],
        keep_grads: bool,
        derive: Callable[[Sequence[StorageRecord]], Collection[int]],
    ) -> list[StorageRecord]:
        """Pack small storages into device buckets, if the host can take all; returns the storages that there are then.

        The caller has synchronised with the device; synchronises with it after packing.

        Args:
            inventory: makes the inventory.
            kinds: what is to move.
            keep_grads: whether gradients are to be copied.
            derive: marks what is derived among storages, and says what must stay in a storage of its own for that.
        """
        records = self.find(inventory(), kinds)
        on_their_own = derive(records)
        groups = self._flat.groups(r for r in records if storage_id(r.storage) not in on_their_own)
        self._arena.check(host_sizes(self._after_packing(records, groups), keep_grads, self._arena.unit_bytes))
        if not groups:
            return records
        self._flat.pack(groups)
        del groups  # they hold storages
        self._device.synchronize()
        derived = {storage_id(r.storage) for r in records if r.derived}
        records = self.find(inventory(), kinds)
        leave_out(records, derived)
        return records

    def _after_packing(self, records: Sequence[StorageRecord], groups: Sequence[Group]) -> list[StorageRecord]:
        """The storages that there are when groups of them are packed, for their sizes."""
        buckets = self._flat.buckets(groups)
        self._replicas.assign(buckets)
        packed = {id(record) for group in groups for record in group}
        return [*(record for record in records if id(record) not in packed), *buckets]

    def _mark_candidates(self, records: Sequence[StorageRecord]) -> Collection[int]:
        """Take for derived what may well be, where nothing moves yet; its storages by identity."""
        candidates = {} if self._deriver is None else self._deriver.candidates(records)
        leave_out(records, candidates if self._main_is_here else ())
        return candidates.keys()

    @property
    def _main_is_here(self) -> bool:
        return StateKind.MAIN_WEIGHTS not in self._parked

    def _check_sources(self, moving: Collection[StateKind]) -> None:
        """Refuse to bring back weights without the main weights that they follow from.

        Raises:
            OffloadedError: main weights are away, and would stay there.
        """
        if self._main_is_here or StateKind.MAIN_WEIGHTS in moving or StateKind.WEIGHTS not in moving:
            return
        if any(p.is_derived and p.released for p in self._parked[StateKind.WEIGHTS]):
            raise OffloadedError(
                "weights were not kept and are rebuilt from main_weights, which are offloaded. Nothing was moved. Call "
                "manager.onload('weights', 'main_weights'), or bring main_weights back before"
            )

    def _plan(
        self,
        records: Sequence[StorageRecord],
        kinds: Sequence[StateKind],
        keep_grads: bool,
        clock: KindClock,
        proofs: Mapping[int, Digest | None],
    ) -> dict[StateKind, list[Parked]]:
        """Give every storage that is kept a place in host memory."""
        plans: dict[StateKind, list[Parked]] = {kind: [] for kind in kinds}
        unit = self._arena.unit_bytes
        sizes = host_sizes(records, keep_grads, unit)
        offsets = dict.fromkeys(sizes, 0)
        regions = self._arena.reserve(sizes, lambda key: clock.running(key.kind))
        for kind in kinds:
            with clock.running(kind):
                # In an order which is the same on all ranks for what they share; see `gather`.
                for record in sorted((r for r in records if r.kind is kind), key=lambda record: record.peers):
                    parked = Parked(record.storage, record.nbytes, kind, record.names, None, record.peers)
                    plans[kind].append(parked)
                    if record.derived:
                        parked.digest = proofs[storage_id(record.storage)]
                    elif is_kept(record, keep_grads):
                        key = region_key(record)
                        parked.host = HostSlice(regions[key], offsets[key], record.kept_bytes, record.share)
                        offsets[key] += align_up(record.kept_bytes, unit)
        return plans

    def _forget(self, kinds: Iterable[StateKind]) -> None:
        """Delete the entries of kinds: the device side is the truth again."""
        for kind in kinds:
            entries = self._parked.pop(kind, ())
            self._last_places.remember(kind, ((p.storage, p.host) for p in entries if p.host is not None))

    def _may_share(self, kinds: Collection[StateKind]) -> list[Parked]:
        """What ranks share of kinds that are away, or may share of those that are about to leave."""
        return [p for kind in ORDER_OF_USE if kind in kinds for p in self._parked.get(kind, ()) if p.peers]

    def _move_out(
        self,
        plans: Mapping[StateKind, list[Parked]],
        begun: Mapping[int, Begun],
        asked: Offload,
    ) -> None:
        """Copy everything that is kept, unless that has begun, and release each storage when its bytes have arrived.

        Undone if interrupted, until all ranks have confirmed it or the first byte goes that was not kept. See [Note:
        what is true at which moment].
        """
        clock, ballot = asked.clock, asked.ballot
        returns = asked.give_back and self._device.frees_beside_copies
        before = returned = self.released_bytes
        leaving = [parked for entries in plans.values() for parked in entries]
        planned = {storage_id(parked.storage): parked.host for parked in leaving}
        for key, copy in begun.items():
            # In vain: its owner may be gone, and with expandable segments its memory go back to the driver under it,
            # also when another thread finds none and torch gives some back for that.
            if copy.host != planned.get(key):
                copy.arrival.wait()
                if copy.digest is not None:
                    copy.digest.computed.wait()
        gone = {id(parked) for parked in leaving if parked.released}
        self._claim(plans)
        try:
            for parked in (p for p in leaving if p.released):
                parked.storage.resize_(0)
            on_their_way: deque[tuple[Parked, StagedArrival]] = deque()
            in_flight = 0

            def release_oldest() -> None:
                nonlocal in_flight, returned
                oldest, arrival = on_their_way.popleft()
                self._release(oldest, arrival, clock)
                in_flight -= oldest.nbytes
                if returns and self.released_bytes - returned > min(RETURNED_BYTES, in_flight):
                    self._device.release_cached()
                    returned = self.released_bytes

            def arrive() -> None:
                while on_their_way:
                    release_oldest()
                self._transport.confirm()  # the clocks stop behind the last copy

            start = self._device.arrival()
            with self._device.copying(Direction.OUT):
                for parked in leaving:
                    if parked.host is None or parked.released:
                        continue
                    early = begun.get(storage_id(parked.storage))
                    if early is not None and early.host == parked.host:
                        parked.digest = early.digest
                        self._begin_digest(parked, start)
                        on_their_way.append((parked, early.arrival))
                    else:
                        on_their_way.append((parked, self._copy_out(parked, clock, start)))
                    in_flight += parked.nbytes
                    while in_flight > IN_FLIGHT_BYTES and len(on_their_way) > 1:
                        release_oldest()
            shared = self._may_share(asked.kinds)
            is_up_to_the_device = returns and not shared and self._transport.is_up_to_the_device
            if not is_up_to_the_device:
                arrive()
            self._digester.read(parked.digest for parked in leaving if parked.digest is not None)
            different = self._replicas.compare(shared, ballot)
            if different:
                self._keep_whole(different, clock)
            if asked.inspect is not None:
                asked.inspect([parked.storage for parked in leaving if not parked.released])
            faults.point("offload.drop")
            ballot.confirm()
            self._drop((parked for parked in leaving if parked.leaves_last), clock)
            if is_up_to_the_device:
                arrive()
        except BaseException as error:
            is_past_it = any(p.released for p in leaving if p.leaves_last and id(p) not in gone)
            if is_past_it:  # half dropped would be neither the old gradients nor zeros
                self._drop((parked for parked in leaving if parked.leaves_last), KindClock())
            self._transport.settle()  # ahead of a wait in which a user loses patience
            is_confirmed = not ballot.withdraw(error)
            if is_past_it or is_confirmed:  # all copies have been queued
                self._transport.confirm()  # if one has failed, what has not been released stays as it is
                self._drop(leaving, KindClock())
                if asked.give_back:
                    self._device.release_cached()
                raise
            # What is shared and was away before the call stays away: it takes all ranks to bring it back.
            undone = {k: entries for k, entries in plans.items() if not any(p.share and p.released for p in entries)}
            self._refill.run(undone, KindClock())
            self.released_bytes = before
            self._forget(undone)
            raise

    def _claim(self, plans: Mapping[StateKind, list[Parked]]) -> None:
        """Note that we are about to move these, unless another manager of the process is at it.

        Raises:
            StateChangedError: another manager moves or has moved some of it.
        """
        with _CLAIMING:
            taken = self._taken_by_others()
            for parked in (p for entries in plans.values() for p in entries):
                if storage_id(parked.storage) in taken or not (parked.released or parked.storage.nbytes()):
                    raise StateChangedError(
                        f"{parked.names[0]} ({parked.kind}) is being offloaded by another manager, or was. Nothing of "
                        "it was moved by this one. Let one manager move it, or wait for the other and onload there"
                    )
            self._parked.update(plans)

    def _taken_by_others(self) -> set[int]:
        """Identities of the storages that other managers of the process move or have moved; hold `_CLAIMING`."""
        taken: set[int] = set()
        for engine in _ENGINES:
            if engine is not self:
                taken |= engine._claimed
                for entries in list(engine._parked.values()):
                    taken.update(storage_id(parked.storage) for parked in entries)
        return taken

    def _copy_out(self, parked: Parked, clock: KindClock, start: Arrival) -> StagedArrival:
        """Queue the copy of a storage, and its digest; what to wait for.

        Args:
            parked: the storage.
            clock: what it takes.
            start: a moment from which on nothing writes to it.
        """
        assert parked.host is not None
        with clock.copying(parked.kind, self._device):
            self._transport.copy_out(parked.storage, parked.host)
            self._begin_digest(parked, start)  # after the copy, so that the link does not wait for Python
            return self._transport.arrival()

    def _begin_digest(self, parked: Parked, start: Arrival) -> None:
        """Queue the digest of a storage that is about to leave, if one is needed and not under way yet.

        It waits for no copy: with `CUDA_DEVICE_MAX_CONNECTIONS=1`, all later kernels of the process would wait with it.
        """
        if parked.digest is None and (self._makes_digests or parked.peers):
            parked.digest = self._digester.begin(parked.storage, start)

    def _release(self, parked: Parked, arrival: StagedArrival, clock: KindClock) -> None:
        """Wait for the copy of a storage, and give up the device side, unless that has to wait for more."""
        faults.point("offload.confirm")
        arrival.wait()
        clock.add(parked.kind, arrival.host_seconds)
        if parked.digest is not None:
            parked.digest.computed.wait()
        if not parked.leaves_last:
            faults.point("offload.release")
            self._give_up(parked, clock)

    def _keep_whole(self, different: Collection[Parked], clock: KindClock) -> None:
        """Copy what ranks cannot share after all, and what has its place on the host beside it; nothing was released.

        Raises:
            StateChangedError: some of that is away already.
        """
        whole = {id(parked) for parked in different}
        for kind in dict.fromkeys(parked.kind for parked in different):
            entries = self._may_share([kind])
            if any(parked.released for parked in entries):
                raise StateChangedError(
                    f"some of {kind} is offloaded in parts by several ranks, and the rest is not the same on all of "
                    "them. Nothing was moved. Onload on all ranks first"
                )
            shares = [None if id(parked) in whole else parked.share for parked in entries]
            kept = [p.nbytes if s is None else s.kept_bytes for p, s in zip(entries, shares, strict=True)]
            key = RegionKey(kind, is_shared=True)
            nbytes = sum(align_up(each, self._arena.unit_bytes) for each in kept)
            with clock.running(kind):
                self._arena.check({key: nbytes})
                region = self._arena.reserve({key: nbytes})[key]
            offset = 0
            with self._device.copying(Direction.OUT), clock.copying(kind, self._device):
                for parked, share, size in zip(entries, shares, kept, strict=True):
                    parked.host = HostSlice(region, offset, size, share)
                    offset += align_up(size, self._arena.unit_bytes)
                    self._transport.copy_out(parked.storage, parked.host)
        self._transport.confirm()

    def _drop(self, leaving: Iterable[Parked], clock: KindClock) -> None:
        """Release what is past the last way back. Doing it again is fine."""
        for parked in leaving:
            if not (parked.released and parked.storage.nbytes() == 0):
                self._give_up(parked, clock)

    def _give_up(self, parked: Parked, clock: KindClock) -> None:
        """Give up the device side of a storage: from here on its host copy is the truth, if it has one."""
        with clock.running(parked.kind):
            parked.released = True
            parked.storage.resize_(0)
            self.released_bytes += parked.nbytes
