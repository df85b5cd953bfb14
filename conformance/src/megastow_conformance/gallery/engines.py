"""Engines, copies, digests, host memory, guards and ranks with a mistake in them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megastow.agreement import Agreement, Decision
from megastow.digest import digest
from megastow.engine import Engine, Offload
from megastow.flat import FlatTensors
from megastow.guard import Guard
from megastow.head_start import Begun
from megastow.host import HostArena
from megastow.parked import Parked, RegionKey
from megastow.refill import Refill
from megastow.staging import StagedArrival
from megastow.state import ALL_KINDS, Inventory, Residency, StateKind
from megastow.storages import StorageRecord, byte_view
from megastow.tiers import Region
from megastow.transport import HostSlice, Transport
from megastow_conformance.gallery.exhibit import breaks

_LOST_BYTES = "lost bytes are lost for whoever trains on them or saves them"


@breaks("bitexact", "training", "checkpoint", "host_state", because=_LOST_BYTES)
class CopiesAfterRelease(Transport):
    """Releases the memory first and copies what is there afterwards.

    Stands for a copy that is queued, and a release that does not wait for it: somebody else has written meanwhile.
    """

    def copy_out(self, storage: torch.UntypedStorage, host: HostSlice) -> None:
        nbytes = storage.nbytes()
        storage.resize_(0)
        storage.resize_(nbytes)
        byte_view(storage).fill_(0x55)
        super().copy_out(storage, host)


@breaks("bitexact")
class ForgetsTheLastChunk(Transport):
    """Copies one chunk too few, where there are several.

    Stands for an off-by-one that no test with small tensors sees.
    """

    def copy_out(self, storage: torch.UntypedStorage, host: HostSlice) -> None:
        *chunks, last = (chunk for run in host.runs() for chunk in self._chunks(host, run))
        start, _, nbytes = chunks[-1] if chunks else last
        super().copy_out(storage, dataclasses.replace(host, nbytes=start + nbytes))


@breaks("failure", "training", because="after a fault there is nothing left to train on")
class ReleasesAsItCopies(Engine):
    """Gives each storage up as soon as its copy is made, before the others are: the move has no way back.

    Stands for vLLM's `cumem` allocator, which frees block by block.
    """

    def _begin_as_last_time(self, *_details: Any) -> dict[int, Begun]:
        return {}  # it begins when it knows what there is

    def _copy_out(self, parked: Parked, *details: Any) -> StagedArrival:
        arrival = super()._copy_out(parked, *details)
        parked.storage.resize_(0)
        return arrival


@breaks("failure")
class ComparesNothing(Refill):
    """Computes digests, and looks at none of them when the bytes are back.

    Stands for a checksum that is written into a log.
    """

    def _compare(self, *_details: Any) -> None:
        pass


@breaks("failure")
class DigestsWhatHasArrived(Engine):
    """Computes the digest of what lies in host memory after the copy, so that damage on the way out is in it.

    Stands for a checksum over the file that was written.
    """

    def _copy_out(self, parked: Parked, *details: Any) -> StagedArrival:
        arrival = super()._copy_out(parked, *details)
        arrival.wait()
        if parked.digest is not None and parked.host is not None:
            parked.digest.on_device, parked.digest.value = None, int(digest(parked.host.bytes()))
        return arrival


@breaks("peak")
class StagesOnTheDevice(Transport):
    """Brings each storage back by way of a second one on the device.

    Stands for `param.data = cpu_param.to(device)` beside the memory that is there already.
    """

    def copy_in(self, host: HostSlice, storage: torch.UntypedStorage) -> None:
        staged = torch.empty(host.nbytes, dtype=torch.uint8, device=storage.device)
        super().copy_in(host, staged.untyped_storage())
        self.begin_reading(host)
        byte_view(storage).copy_(staged)


@breaks("peak")
class PacksInASecondBucket(FlatTensors):
    """Gathers what it packs in one more bucket first.

    Stands for `torch.cat` of the tensors followed by a copy: twice the memory that was promised, when it is scarcest.
    """

    def _pack_group(self, group: Sequence[StorageRecord]) -> None:
        gathered = torch.cat([byte_view(record.storage) for record in group])
        super()._pack_group(group)
        del gathered


@breaks(
    "checkpoint",
    "host_state",
    "training",
    because="what cannot be saved cannot be resumed from either",
)
class PacksDifferentDtypesTogether(FlatTensors):
    """Fills a bucket with tensors of any dtype, as long as there is room: `torch.save` then refuses them.

    Stands for a first version of megastow's own packing.
    """

    def _fill(self, candidates: Sequence[StorageRecord]) -> Iterator[list[StorageRecord]]:
        for kind in ALL_KINDS:
            group = [record for record in candidates if record.kind is kind]
            fits = sum(record.nbytes for record in group) <= self._bucket_bytes // 2
            yield from [group] if group and fits else super()._fill(group)


@breaks("host")
class LeaksAHostBuffer(HostArena):
    """Takes new host memory for each offload, and keeps the old.

    Stands for a cache whose keys are never found again.
    """

    def reserve(self, sizes: Mapping[Any, int], *details: Any) -> dict[Any, Region]:
        for key in self._regions.keys() & sizes.keys():
            self._regions[object()] = self._regions.pop(key)
        return super().reserve(sizes, *details)


@breaks("residue")
class LooksWhenItIsTooLate(Engine):
    """Asks what is left when everything has gone, gradients included, which nothing brings back.

    Stands for a check behind a move that cannot be undone any more.
    """

    def _move_out(self, plans: Any, begun: Any, asked: Offload) -> None:
        super()._move_out(plans, begun, dataclasses.replace(asked, inspect=None))
        if asked.inspect is not None:
            asked.inspect(())


@breaks("order")
class PreparesOverWhatIsAway(Engine):
    """Makes host memory ready for all kinds, those included whose only copy lies there.

    Stands for a preparation in the background that was written for the first cycle.
    """

    def prepare(self, inventory: Callable[[], Inventory], kinds: Iterable[StateKind]) -> dict[RegionKey, int]:
        away = {RegionKey(kind): 8 for kind in kinds if kind in self._parked}
        return {**super().prepare(inventory, list(kinds)), **away}


@breaks("training")
class CallsItHereTooSoon(Engine):
    """Takes what is on its way back for something that is back.

    Stands for a copy that is queued on another stream, and a flag that is set behind the queueing.
    """

    def residency(self, kind: StateKind) -> Residency:
        found = super().residency(kind)
        return Residency.RESIDENT if found is Residency.ONLOADING else found

    def onload(self, *details: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)  # a CPU has no link that takes its time
        return super().onload(*details, **options)


@breaks("guard")
class LeavesTheGuardBehind(Guard):
    """Puts the methods back as attributes of the instance instead of taking its own away.

    Stands for `owner.step = original_step`: every patch of the class comes to nothing from then on, and the object
    refers to itself.
    """

    def _unblock(self, owner_id: int, staying: Collection[str]) -> None:
        _, standing, _ = self._blocked[owner_id]
        released = {method: standing[method]._owner for method in standing if method not in staying}
        super()._unblock(owner_id, staying)
        if "forward" in released:
            owner = released["forward"]
            vars(owner)["forward"] = getattr(owner, "forward")  # noqa: B009


@breaks("bitexact", "training", "checkpoint", world=2, because=_LOST_BYTES)
class CopiesOnRankZeroOnly(Refill):
    """Takes the optimizer's state to be the same on every rank, and brings it back on the first.

    Stands for de-duplicating data-parallel state under a distributed optimizer, where each rank has another shard.
    """

    def run(self, plans: Mapping[StateKind, Sequence[Parked]], *details: Any) -> None:
        for parked in plans.get(StateKind.OPTIMIZER_STATES, ()) if torch.distributed.get_rank() else ():
            parked.host = None
        super().run(plans, *details)


class _AgreesInstead(Agreement):
    """Takes some decisions of the ranks for an agreement."""

    swallowed: str

    def vote(self, *details: Any) -> tuple[Decision, int]:
        """What the ranks have decided."""
        ranks: Any = super()
        decision, following = ranks.vote(*details)
        return Decision("agreed") if decision.end == self.swallowed else decision, following


@breaks("failure", scenario="toy_dense_distopt", world=2)
class GoesOnWithoutItsPeer(_AgreesInstead):
    """Finishes the move that another rank has undone.

    Stands for a barrier whose error is logged: one rank has its weights and the next one has none.
    """

    swallowed = "failed"


@breaks("failure", scenario="toy_dense_distopt", world=2)
class AsksNobodyWhatTheyCalled(_AgreesInstead):
    """Waits for the other ranks, whatever they move.

    Stands for a barrier before each move: it lets any two calls through that happen at the same time.
    """

    swallowed = "differ"
