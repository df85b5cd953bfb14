"""The way back of a move: device memory is taken and filled, and nothing is let through before it is known to be right.

Host copies stay as they are whatever happens, so a way back that fails is undone by giving the memory up again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megastow import faults
from megastow.agreement import ALONE, Ballot
from megastow.clock import KindClock
from megastow.derived import WeightDeriver
from megastow.device import Arrival, Device, Direction
from megastow.digest import SCRATCH_BYTES, Digest, Digester, digest
from megastow.errors import CorruptionError, DeviceMemoryError, StateChangedError
from megastow.parked import Parked
from megastow.replicas import Replicas
from megastow.report import format_bytes
from megastow.staging import StagedArrival
from megastow.state import StateKind
from megastow.storages import _some, byte_view, storage_id
from megastow.transport import Transport

TAKEN_BYTES = 1 << 30
"""Device memory that is taken before the copies to it are queued; the link is busy with them while more is taken."""

_RETRY_SECONDS = 0.001


class Permit(Protocol):
    """Asked before device memory is taken."""

    def __call__(self, sizes: Sequence[int], taken: int) -> int:
        """Wait until one of the storages that are left may be taken; raise if none ever can.

        Args:
            sizes: their bytes, the one that is wanted soonest first.
            taken: bytes that the move has taken before.

        Returns:
            The first that may be taken, as an index.
        """

    def may_wait(self) -> bool:
        """Whether it is worth trying again where an allocation has failed all the same."""


@dataclass
class _Return:
    """A move on its way back.

    Attributes:
        plans: what comes back, in the order in which it is needed.
        clock: what it takes.
        permit: asked before memory is taken; None if all of it is free.
        unverified: whether no digest is looked at.
        ballot: of the ranks.
        scratch_bytes: device memory for digests.
        taken: what has memory again.
        arrivals: when the last copy of each kind has arrived.
        copied: when the copies of what is shared have, by identity of what is parked.
        gathered: when the last all-gather of each kind is done.
        digests: of what has left, and of what has come.
    """

    plans: Mapping[StateKind, Sequence[Parked]]
    clock: KindClock
    permit: Permit | None
    unverified: bool
    ballot: Ballot
    scratch_bytes: int = 0
    taken: list[Parked] = field(default_factory=list)
    arrivals: dict[StateKind, StagedArrival] = field(default_factory=dict)
    copied: dict[int, Arrival] = field(default_factory=dict)
    gathered: dict[StateKind, Arrival] = field(default_factory=dict)
    digests: list[tuple[Parked, Digest, Digest]] = field(default_factory=list)

    def released(self, kinds: Iterable[StateKind]) -> list[Parked]:
        """What of kinds has no memory, or is being filled."""
        return [parked for kind in kinds for parked in self.plans[kind] if parked.released]


class Refill:
    """Brings back what one manager has away."""

    def __init__(
        self,
        device: Device,
        transport: Transport,
        digester: Digester,
        makes_digests: bool,
        deriver: WeightDeriver | None,
        replicas: Replicas,
    ) -> None:
        """Begin nothing.

        Args:
            device: the accelerator.
            transport: copies.
            digester: makes digests of what has come.
            makes_digests: whether all that leaves has one.
            deriver: rebuilds weights, where some are not kept.
            replicas: what is shared with other ranks.
        """
        self._device = device
        self._transport = transport
        self._digester = digester
        self._makes_digests = makes_digests
        self._deriver = deriver
        self._replicas = replicas

    def run(
        self,
        plans: Mapping[StateKind, Sequence[Parked]],
        clock: KindClock,
        permit: Permit | None = None,
        arrived: Callable[[StateKind], None] | None = None,
        unverified: bool = False,
        ballot: Ballot = ALONE,
    ) -> None:
        """Take device memory for everything that was released, fill it, and compare digests; all of it or nothing.

        With `arrived` it is kind by kind: that is called with each whose bytes are all here, and a failure after it
        undoes the other kinds only. What all ranks have confirmed is not undone.
        """
        for entries in plans.values():
            for parked in entries:
                _check_untouched(parked)
        move = _Return(plans, clock, permit, unverified, ballot)
        released = move.released(plans)
        if any(parked.digest is not None and self._has_to_prove(move, parked) for parked in released):
            is_shared = any(parked.share is not None for parked in released)
            move.scratch_bytes = SCRATCH_BYTES * (2 if is_shared else 1)  # on a stream each
        needed = sum(parked.nbytes for parked in released) + move.scratch_bytes
        if permit is None:
            free = self._device.free_bytes()
            if free is not None and needed > free:
                raise _no_device_memory(plans, needed, free)
        try:
            self._fill_shared(move)
            if permit is None:
                for kind in plans:
                    self._fill(move, [kind])
            for kinds in [[*plans]] if arrived is None else [[kind] for kind in plans]:
                if permit is not None:  # what somebody is told of before the next kind waits for memory
                    self._fill(move, kinds)
                self._finish(move, kinds)
                if arrived is not None:
                    (kind,) = kinds
                    ballot.confirm(kind)
                    for parked in plans[kind]:
                        parked.released = False
                    arrived(kind)
            self._transport.confirm()
            if arrived is None:
                ballot.confirm()
        except BaseException as error:
            self._transport.settle()  # nothing writes any more; what failed the copies is known already
            is_confirmed = not ballot.withdraw(error)
            for parked in move.taken:
                if is_confirmed or ballot.has_confirmed(parked.kind):
                    parked.released = False
                elif parked.released:
                    parked.storage.resize_(0)
            self._device.release_cached()
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise _no_device_memory(plans, needed, self._device.free_bytes()) from error
            raise
        for parked in move.taken:
            parked.released = False

    # --- steps ---------------------------------------------------------------------------------------------------

    def _fill_shared(self, move: _Return) -> None:
        """What ranks share, first of all: the others wait for it. Gathered when all ranks have memory for it."""
        shared = [parked for parked in move.released(move.plans) if parked.share is not None]
        gathering = self._replicas.gathering(move.ballot)
        self._transport.gather(gathering)
        for part in self._taking(move, shared):
            self._copy_in(move, part)
        self._replicas.meet(shared, gathering, move.ballot)
        with self._device.copying(Direction.IN):
            for parked in shared:
                assert parked.host is not None
                move.gathered[parked.kind] = self._transport.gather_shared(parked.host, parked.storage)
                self._begin_digest(move, parked)

    def _fill(self, move: _Return, kinds: Iterable[StateKind]) -> None:
        """Take memory for all else of kinds, and fill it: part by part, so that the link is busy meanwhile."""
        for part in self._taking(move, [parked for parked in move.released(kinds) if parked.share is None]):
            self._copy_in(move, part)

    def _taking(self, move: _Return, left: list[Parked]) -> Iterator[list[Parked]]:
        """Take device memory, and tell what can be filled: in large parts, or with a permit as there is room for it."""
        if move.permit is None:
            while left:
                reach = itertools.accumulate(parked.nbytes for parked in left)
                number = next((n for n, nbytes in enumerate(reach, 1) if nbytes >= TAKEN_BYTES), len(left))
                part, left = left[:number], left[number:]
                self._take(move, part)
                yield part
            return
        left = sorted(left, key=lambda parked: parked.host is None)  # the link need not wait for memory of zeros
        sizes = [parked.nbytes + move.scratch_bytes for parked in left]
        taken_bytes = sum(parked.nbytes for parked in move.taken)
        while left:
            chosen = move.permit(sizes, taken_bytes)
            part = [left.pop(chosen)]
            taken_bytes += sizes.pop(chosen) - move.scratch_bytes
            self._take(move, part)
            yield part

    @staticmethod
    def _take(move: _Return, part: Iterable[Parked]) -> None:
        """Take device memory for storages, and note which."""
        for parked in part:
            with move.clock.running(parked.kind):
                faults.point("onload.reserve")
                move.taken.append(parked)
                while parked.storage.nbytes() != parked.nbytes:
                    try:
                        parked.storage.resize_(parked.nbytes)
                    except torch.cuda.OutOfMemoryError:  # what is free may be in pieces
                        if move.permit is None or not move.permit.may_wait():
                            raise
                        time.sleep(_RETRY_SECONDS)

    def _copy_in(self, move: _Return, part: Iterable[Parked]) -> None:
        """Queue the filling of storages, with their bytes or with zeros; of what is shared, with this rank's part."""
        with self._device.copying(Direction.IN):
            for parked in part:
                with move.clock.copying(parked.kind, self._device):
                    if parked.host is None:
                        with self._device.filling():
                            byte_view(parked.storage).zero_()
                    else:
                        self._transport.copy_in(parked.host, parked.storage)
                    if parked.share is None:
                        self._begin_digest(move, parked)
                    else:
                        move.copied[id(parked)] = self._device.arrival()
                move.arrivals[parked.kind] = self._transport.arrival()

    def _has_to_prove(self, move: _Return, parked: Parked) -> bool:
        """Whether a storage is let through only with the digest with which it left."""
        return not move.unverified and (self._makes_digests or parked.is_derived)

    def _begin_digest(self, move: _Return, parked: Parked) -> None:
        """Queue the digest of what comes from the host, behind it; call within `device.copying()`.

        Of what is shared it is behind the all-gathers, and so that nothing else is: one of another rank may be stuck.
        """
        if parked.host is not None and parked.digest is not None and self._has_to_prove(move, parked):
            self._transport.begin_reading(parked.host)
            behind = self._device.beside() if parked.share is None else self._device.gathering(move.copied[id(parked)])
            with behind:
                move.digests.append((parked, parked.digest, self._digester.begin_here(parked.storage)))

    def _finish(self, move: _Return, kinds: Collection[StateKind]) -> None:
        """Wait until all of kinds has arrived, compare digests, and rebuild what is derived."""
        for kind in kinds:
            faults.point("onload.confirm")
            if kind in move.arrivals:
                arrival = move.arrivals[kind]
                arrival.wait()
                move.clock.add(kind, arrival.host_seconds)
            if kind in move.gathered:
                move.gathered[kind].wait()
        self._compare([each for each in move.digests if each[0].kind in kinds])
        if StateKind.WEIGHTS in kinds:
            self._rebuild(move)

    def _compare(self, digests: Sequence[tuple[Parked, Digest, Digest]]) -> None:
        """Hold the digests of storages when they left against those of what has arrived.

        Raises:
            CorruptionError: some differ.
        """
        self._digester.read(digest for _, left, came in digests for digest in (left, came))
        damaged = [parked for parked, left, came in digests if left.value != came.value]
        if damaged:
            raise _corrupted(damaged)

    def _rebuild(self, move: _Return) -> None:
        """Fill the weights that are derived, if that is what has arrived but for it; see `WeightDeriver.rebuild`."""
        if self._deriver is None:
            return
        weights = move.plans[StateKind.WEIGHTS]
        derived = {storage_id(p.storage): p.digest for p in weights if p.released and p.host is None and p.digest}
        if not derived and move.ballot is ALONE:  # nobody else asks for ours; so it is in an undoing
            return
        with move.clock.running(StateKind.WEIGHTS):
            self._deriver.rebuild(derived, move.ballot, unverified=move.unverified)


def _check_untouched(parked: Parked) -> None:
    found = parked.storage.nbytes()
    if parked.released and found not in (0, parked.nbytes):
        raise StateChangedError(
            f"the storage of {parked.names[0]} ({parked.kind}) was released with {parked.nbytes} bytes to come "
            f"back, and now has {found}: something resized it while it was away. Its bytes are safe in host "
            "memory; resize it to 0 again and repeat the call"
        )


def _no_device_memory(plans: Mapping[StateKind, object], needed: int, free: int | None) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"bringing back {', '.join(plans)} needs {format_bytes(needed)} of device memory, but "
        f"{format_bytes(free)} are free: somebody else still holds the device. Everything is safe in host memory; "
        "free device memory, then onload",
        needed_bytes=needed,
        free_bytes=free,
    )


def _corrupted(damaged: Sequence[Parked]) -> CorruptionError:
    """What to say of storages that came back with other bytes than left; reads their host copies."""
    tensors: dict[str, list[str]] = {}
    for parked in damaged:
        tensors.setdefault(str(parked.kind), []).extend(parked.names)
    found = "; ".join(f"{_some(tuple(names))} ({kind})" for kind, names in tensors.items())
    shared = [p for p in damaged if p.share is not None]
    changed = [p for p in damaged if p.share is None and _is_damaged_on_host(p)]
    if shared and not changed:
        reason = (
            "Several ranks keep parts of it in host memory, and this one cannot tell whether one of those is damaged, "
            "or only the way back was bad. Repeat the call; if it fails again, onload(unverified=True) brings back "
            "what there is: load a checkpoint then, or bear the damage"
        )
    elif changed:
        names = tuple(name for parked in changed for name in parked.names)
        reason = (
            f"The copy in host memory itself is damaged ({_some(names)}), so that a repeated call fails too. It is "
            "kept, and onload(unverified=True) brings it back as it is: load a checkpoint then, or bear the damage"
        )
    else:
        reason = "The copy in host memory is good, and only its way back was bad: repeat the call"
    return CorruptionError(
        f"other bytes came back than have left, and nothing was brought back: storages of {found}. {reason}",
        tensors={kind: tuple(names) for kind, names in tensors.items()},
        host_is_damaged=bool(changed or shared),
    )


def _is_damaged_on_host(parked: Parked) -> bool:
    """Whether what the host keeps is not what left; so it is if it cannot be read."""
    assert parked.host is not None
    assert parked.digest is not None
    try:
        return int(digest(parked.host.bytes())) != parked.digest.value
    except OSError:
        return True
