"""The interface: `MemoryManager`, what users call."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Literal, TypeVar, overload

import torch

from megastow import arguments, threads
from megastow.adapter import BoundAdapter
from megastow.agreement import (
    ANSWERS,
    NOTES,
    Agreement,
    Call,
    Point,
)
from megastow.derived import DerivableBuffer
from megastow.device import device_for
from megastow.disk import DiskFolder
from megastow.engine import Engine, Inspection
from megastow.errors import (
    ForkedProcessError,
    InvalidTypeError,
    ManagerClosedError,
    NotOnHostError,
    OffloadedError,
    ResidueError,
    TransferError,
)
from megastow.guard import Guard
from megastow.handle import DEFAULT_WINDOW_BYTES, MemoryPermit, TransferHandle
from megastow.host_view import HostViews, host_state_dict, host_tensor
from megastow.move import Move, Where, clear_frames, in_words
from megastow.on_host import on_host
from megastow.plan import MovePlan
from megastow.replicas import NO_REPLICAS, Circle, HostReplicas
from megastow.report import Direction, TransferReport, format_bytes
from megastow.residue import DEFAULT_RESIDUE_BYTES, DEFAULT_STORAGES, Home, Residue, Subject, explain, measure
from megastow.state import ALL_KINDS, Inventory, KindLike, Residency, StateKind, parse_kinds
from megastow.storages import list_storages, storage_id
from megastow.tiers import HostMemory

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class MemoryManager:
    """Moves one trainer's state between the device and host memory.

    Moves block and synchronise with the device, unless they are asked not to (`non_blocking=True`); calls from several
    threads are served one after the other, and wait for a move in the background. A kind is resident, offloaded, or on
    its way (see `Residency`). While a kind is away, calls that would touch it raise `OffloadedError`; while it is on
    its way back, they wait for it.

    Who loses a manager loses no state: while something is away, the model and the optimizer keep it alive. It takes the
    manager to bring that back, so hold it for as long as the trainer.

    A manager serves the process that made it: in a forked child its calls raise `ForkedProcessError`, and what was away
    or on its way at the fork is away there for good.

    Host memory (or files): as much as the kinds offloaded so far held on the device (gradient buffers take none),
    allocated and page-locked at the first offload or by `prepare`, and kept until `close`.
    """

    def __init__(
        self,
        trainer: BoundAdapter,
        *,
        bucket_bytes: int,
        chunk_bytes: int,
        host_memory: HostMemory = "pinned",
        folder: DiskFolder | None = None,
        digests: bool = False,
        agreement: Agreement | None = None,
        derivable: Callable[[], Iterable[DerivableBuffer]] | None = None,
        circle: Circle | None = None,
    ) -> None:
        """Take charge of what an adapter has bound; use `create_memory_manager` instead.

        Raises:
            StateChangedError: some of the state has no bytes at present.
            UnsupportedTensorError: some of the state cannot be moved.
        """
        self._trainer = trainer
        self._device = device_for(trainer.device)
        self._engine = Engine(
            self._device,
            bucket_bytes=bucket_bytes,
            chunk_bytes=chunk_bytes,
            host_memory=host_memory,
            folder=folder,
            digests=digests,
            derivable=derivable,
            replicas=NO_REPLICAS if circle is None else HostReplicas(self._device, circle, chunk_bytes),
        )
        self._shares = circle is not None
        self._agreement = agreement or Agreement()
        self._guard = Guard()
        self._lock = threading.RLock()
        self._preparing: Future[int] | None = None
        self._pending: Future[TransferReport] | None = None
        self._closing = False
        self._reading = False
        self._closed = False
        self._discarded = False  # from the begin of a close that brings nothing back, however it ends
        self._pid = os.getpid()
        self._moments = {"until the manager was made": self._device.memory()}
        self._engine.find(trainer.inventory(), ALL_KINDS)  # refuse now what could not be moved later
        self._guard.watch_backward(trainer.entrances())

    # --- questions -----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """Where every kind is, and what it takes on the host."""
        if self._closed or self._discarded:
            return "<MemoryManager, closed>"
        where = ", ".join(f"{kind} {self._engine.residency(kind)}" for kind in ALL_KINDS)
        held = format_bytes(self._engine.host_bytes + self._engine.disk_bytes)
        return f"<MemoryManager of {self._trainer.device}: {where}; {held} on the host>"

    @property
    def facts(self) -> Mapping[str, object]:
        """What the adapter found about the trainer."""
        return self._trainer.facts

    @property
    def host_bytes(self) -> int:
        """Host memory that the manager holds now, in use or ready for the next offload."""
        self._check_process()
        return self._engine.host_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk that the manager holds now, in use or ready for the next offload."""
        self._check_process()
        return self._engine.disk_bytes

    def residency(self, kind: KindLike) -> Residency:
        """Where the bytes of `kind` are. Does not wait for a move under way in another thread.

        Raises:
            InvalidArgumentError: there is no such kind.
        """
        return self._engine.residency(parse_kinds([kind])[0])

    def plan(self, *kinds: KindLike, keep_grads: bool = False) -> MovePlan:
        """What offloading kinds would give and take, on this rank and on all ranks of this host; all if none is named.

        Nothing is moved, and no memory is taken. The plan is for the state as it is now: before the first optimizer
        step there are no moments yet. Waits for a move in the background.

        Raises:
            UnsupportedLayoutError: state was found that cannot be moved.
            ManagerClosedError: the manager is closed.
        """
        wanted = parse_kinds(kinds)
        arguments.flags(keep_grads=keep_grads)
        with self._exclusive():
            self._check_open()
            return self._engine.plan(self._trainer.inventory(), wanted, keep_grads=keep_grads)

    def explain_residue(self, *, most_storages: int = DEFAULT_STORAGES) -> Residue:
        """Who owns device memory now, beside the kinds that are on the device: for a look after an offload.

        Tensors by owner, however they are held; workspaces; the allocator's segments that they hold open; what no
        tensor of Python accounts for; and what the driver has given out beside torch's allocator. All tenants of this
        process are in it. Waits for a move in the background, and does not synchronise with the device.

        Collects garbage: what only reference cycles held is told, and gone afterwards. Runs no code of the objects it
        looks at, reads no tensor, and keeps nothing alive. Takes seconds in a large process, for parts of which other
        threads wait for the interpreter; a manager that is not asked does none of it.

        Args:
            most_storages: for how many storages owners are looked for, the largest ones.

        Raises:
            InvalidTypeError, InvalidArgumentError: `most_storages` is not a number of storages.
            UnsupportedLayoutError: state was found that cannot be moved.
            ManagerClosedError: the manager is closed.
        """
        arguments.whole_number("most_storages", most_storages, "storages to look into")
        with self._exclusive():
            self._check_open()
            return explain(self._subject(), self._moments, most_storages=most_storages)

    # --- state while away ----------------------------------------------------------------------------------------

    def host_tensor(self, wanted: str | torch.Tensor) -> torch.Tensor:
        """A read-only CPU tensor over the bytes of one that is offloaded: same dtype, shape, stride and storage offset.

        Nothing is moved or copied, and no memory is taken, except of what is kept in a file: each call reads that into
        new memory. Any tensor on an offloaded storage will do: parameters,
        views and slices of them, flat buffers. All views on what was one storage share one. Waits for a move in the
        background, and does not synchronise with the device.

        A view shows the same bytes for as long as it lives, also after its kind is back or the manager closed. The next
        offload of that kind takes new host memory while there is one, so drop views before. Operations that would write
        to it raise `ReadOnlyError` and write nothing; it can be saved (as an ordinary tensor, with the bytes of its
        storage and no others), copied from and computed with. See `read_only.ReadOnlyTensor` for what nobody watches.

        Args:
            wanted: the tensor, or its name in `host_state_dict`.

        Raises:
            NotOnHostError: it is on the device, or it is a gradient that was not kept.
            InvalidArgumentError: there is no such state.
            InvalidTypeError: neither a name nor a tensor.
            UnsupportedTensorError: a subclass that wraps other tensors.
            ManagerClosedError: the manager is closed.
        """
        with self._exclusive():
            self._check_open()
            return host_tensor(HostViews(self._engine.on_host()), self._trainer.inventory(), wanted)

    def host_state_dict(self, kind: KindLike) -> dict[str, torch.Tensor]:
        """Views, as of `host_tensor`, on everything lasting that was offloaded with a kind, by the inventory's names.

        A tensor that several names reach is listed once, under the first; a storage belongs to the kind that it moved
        with. Left out is what lives on the host anyway, and what modules keep as plain attributes. For the state dicts
        that a model and an optimizer make themselves, see `on_host`.

        Raises:
            NotOnHostError: the kind is on the device, all or part of it, or it was not kept.
            InvalidArgumentError: there is no such kind.
            ManagerClosedError: the manager is closed.
        """
        (which,) = parse_kinds([kind])
        with self._exclusive():
            self._check_open()
            if not self._engine.is_away(which):
                raise NotOnHostError(f"{which} is on the device, not in host memory: use the tensors themselves")
            if self._engine.is_half_away(which):
                raise NotOnHostError(
                    f"some of {which} is still on the device: an offload failed, and so did undoing it. Offload or "
                    "onload it again first"
                )
            return host_state_dict(HostViews(self._engine.on_host()), self._trainer.inventory(), which)

    def on_host(self, function: Callable[[], Result], *, clone: bool = False) -> Result:
        """What a function returns that reads state, such as `model.state_dict`, while some of it is offloaded.

        For the length of the call, and in this thread only, `state_dict`, `sharded_state_dict` and their relatives do
        not raise, and every operation on an offloaded tensor is made on its bytes in host memory. Tensors that are
        offloaded are replaced by views, as of `host_tensor`, in what comes back: in dicts, lists, tuples and attributes
        of objects, which are copied for that and not changed. What is on the device stays there.

        Make a whole checkpoint in one call: Megatron's optimizers find a model's tensors in its sharded state dict by
        identity. No kind can be moved meanwhile, by any thread.

        Args:
            function: called without arguments, under `torch.no_grad()`. It must not write to state, nor hand it to
                collectives; what it starts in other threads or forked children, or returns to be computed later, is not
                helped.
            clone: give clones in memory of torch's own instead of views: ordinary tensors. Megatron's writers of
                distributed checkpoints fork, and a fork copies the page-locked memory behind views once for each child;
                clones are copied once.

        Raises:
            OffloadedError: the function would have written to what is offloaded, or called what does more than read.
            NotOnHostError: it read gradients that were not kept.
            InvalidTypeError: `function` cannot be called: the state dict itself was given, perhaps.
            ManagerClosedError: the manager is closed.
        """
        if not callable(function):
            raise InvalidTypeError(
                f"function is a {type(function).__qualname__}; expected what can be called without arguments, such as "
                "model.state_dict (not model.state_dict(), which is called before)"
            )
        arguments.flags(clone=clone)
        with self._exclusive():
            self._check_open()
            before, self._reading = self._reading, True
            try:
                with self._guard.reading():
                    return on_host(HostViews(self._engine.on_host()), function, clone=clone)
            finally:
                self._reading = before

    # --- moves ---------------------------------------------------------------------------------------------------

    @overload
    def offload(
        self,
        *kinds: KindLike,
        keep_grads: bool = False,
        release_workspaces: bool = False,
        give_back: bool = True,
        strict: bool = False,
        max_residue_bytes: int | None = None,
        non_blocking: Literal[False] = False,
    ) -> TransferReport: ...

    @overload
    def offload(
        self,
        *kinds: KindLike,
        keep_grads: bool = False,
        release_workspaces: bool = False,
        give_back: bool = True,
        strict: bool = False,
        max_residue_bytes: int | None = None,
        non_blocking: Literal[True],
    ) -> TransferHandle: ...

    def offload(
        self,
        *kinds: KindLike,
        keep_grads: bool = False,
        release_workspaces: bool = False,
        give_back: bool = True,
        strict: bool = False,
        max_residue_bytes: int | None = None,
        non_blocking: bool = False,
    ) -> TransferReport | TransferHandle:
        """Copy kinds to host memory and release their device memory; all kinds if none is named.

        Extra device memory: at most one bucket, at the first offload. All kinds of a call move, or none. Memory goes
        back to torch's allocator storage by storage, as copies arrive, and to the driver at the end; with its
        `expandable_segments` also to the driver meanwhile, as that then need not wait for copies in flight.

        Args:
            *kinds: `StateKind`s or their names.
            keep_grads: copy gradient buffers as well, to go on in the middle of an accumulation.
            release_workspaces: also drop what Megatron, Transformer Engine and cuBLAS keep on the device for reuse;
                the next step makes it anew.
            give_back: hand the memory back to the driver at the end. Without it, torch's allocator keeps it: for
                another tenant of this process, which then has it faster.
            strict: undo the offload if more than `max_residue_bytes` would stay on the device beside the kinds that
                are to be there; see `explain_residue`. Looks at every object of the process (0.1 s for a million).
            max_residue_bytes: what may stay, other tenants of the process included; 64 MiB if only `strict` is said. A
                number alone means `strict`.
            non_blocking: return at once, and move in a thread of its own. The kinds are guarded from the return on.
                Errors are raised by the handle's `wait`, and logged.

        Raises:
            HostMemoryError: host memory does not suffice; nothing was moved.
            UnsupportedLayoutError: state was found that cannot be moved; nothing was moved.
            StateChangedError: another manager has it away, or somebody resized what was away; nothing was moved.
            AgreementError: with `group`, ranks made different calls; nothing was moved.
            ResidueError: strict, and too much would stay; everything is on the device as it was, gradients included.
            TransferError: the move failed, here or on another rank (`PeerError`), was undone, and can be made again.
                What comes when gradients have been dropped already, or all ranks have confirmed the move, ends it
                instead (a failure of the device, a signal's handler that raises): `residency` tells.
            ManagerClosedError, ForkedProcessError: the manager is closed, or another process's.
            InvalidTypeError, InvalidArgumentError: no such kind, or an argument is not what it should be.
        """
        wanted = parse_kinds(kinds)
        arguments.flags(
            keep_grads=keep_grads,
            release_workspaces=release_workspaces,
            give_back=give_back,
            strict=strict,
            non_blocking=non_blocking,
        )
        return self._offload(
            wanted,
            keep_grads=keep_grads,
            release_workspaces=release_workspaces,
            give_back=give_back,
            inspect=self._inspection(strict, max_residue_bytes),
            where=Where.BACKGROUND if non_blocking else Where.HERE,
        )

    def _offload_beside(self) -> TransferHandle:
        """For `megastow.swap`: `offload(non_blocking=True, give_back=False)`, with the copies first and then the guard.

        Until the guard is up, which takes milliseconds, the caller must not use the trainer.
        """
        handle = self._offload(ALL_KINDS, give_back=False, where=Where.BESIDE)
        assert isinstance(handle, TransferHandle)
        return handle

    def _offload(
        self,
        wanted: Sequence[StateKind],
        *,
        keep_grads: bool = False,
        release_workspaces: bool = False,
        give_back: bool = True,
        inspect: Inspection | None = None,
        where: Where,
    ) -> TransferReport | TransferHandle:
        def act(move: Move) -> None:
            moving = [k for k in wanted if not self._engine.is_away(k)]
            if moving:
                self._finish_preparing()
                self._trainer.quiesce(moving, keep_grads=keep_grads)

            def inventory() -> Inventory:
                self._guard_what_is_away()  # here, where the first copies are under way
                return self._trainer.inventory()

            reports = self._engine.offload(
                inventory, wanted, keep_grads=keep_grads, give_back=give_back, inspect=inspect, ballot=move.ballot
            )
            move.kinds.update(reports)
            move.notes.extend(self._engine.tier_notes(moving))
            if StateKind.WEIGHTS in moving:
                move.notes.extend(self._engine.derive_notes())
            move.notes.extend(self._engine.sharing_notes(moving))

        what = in_words("offload", wanted, "keep_grads" * keep_grads, "non_blocking" * (where is not Where.HERE))
        rounds = (*[ANSWERS] * self._engine.derives(wanted), *[NOTES] * self._shares, None)
        call = Call(what, rounds)
        return self._run("offload", wanted, act, where, call, release_workspaces=release_workspaces)

    @overload
    def onload(
        self,
        *kinds: KindLike,
        wait_for_memory: float = 0.0,
        beside: TransferHandle | None = None,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        unverified: bool = False,
        non_blocking: Literal[False] = False,
    ) -> TransferReport: ...

    @overload
    def onload(
        self,
        *kinds: KindLike,
        wait_for_memory: float = 0.0,
        beside: TransferHandle | None = None,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        unverified: bool = False,
        non_blocking: Literal[True],
    ) -> TransferHandle: ...

    def onload(
        self,
        *kinds: KindLike,
        wait_for_memory: float = 0.0,
        beside: TransferHandle | None = None,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        unverified: bool = False,
        non_blocking: bool = False,
    ) -> TransferReport | TransferHandle:
        """Bring kinds back to the device, bit for bit; all kinds if none is named.

        Gradient buffers come back zeroed, unless they were kept. Needs as much free device memory as was released. All
        kinds of a call move, or none.

        Args:
            *kinds: `StateKind`s or their names.
            wait_for_memory: seconds to wait, in all, until the neighbour on the device has let go of memory. 0 fails at
                once if not all of it is free.
            beside: an offload under way of another manager on the device. Memory is then taken as that one gives it
                back, and both directions of the link are busy at once; see `megastow.swap`.
            window_bytes: how much more than that offload has given back may be taken; the extra device memory.
            unverified: compare no digests, and bring back what there is: the damaged bytes for which `CorruptionError`
                was raised, too.
            non_blocking: return at once, and move in a thread of its own. A call that touches kinds on their way waits
                for those, and goes on while the others are coming: first the weights, then the gradients, the main
                weights, and the optimizer states (with `derive_weights` the main weights before all). A kind that has
                arrived stays, also if the move fails after it. Errors are raised by the handle's `wait`, and logged.

        Raises:
            DeviceMemoryError: not enough free device memory; everything is still safe on the host, and a repeated call
                goes on from there.
            CorruptionError: with `verify="digest"`, some bytes are not those that left. The move was undone, and the
                host copy is kept; the message says whether repeating the call can help.
            OffloadedError: weights were derived, and main weights would still be away; nothing was moved.
            StateChangedError: another manager has it away, or somebody resized what was away; nothing was moved. Or
                derived weights would not be what they were, because main weights have changed; the move was undone.
            AgreementError: with `group`, ranks made different calls; nothing was moved.
            TransferError: the move failed, here or on another rank (`PeerError`), was undone, and can be made again.
            ManagerClosedError, ForkedProcessError: the manager is closed, or another process's.
            InvalidTypeError, InvalidArgumentError: no such kind, or an argument is not what it should be.
        """
        wanted = parse_kinds(kinds)
        arguments.flags(unverified=unverified, non_blocking=non_blocking)
        arguments.duration("wait_for_memory", wait_for_memory)
        arguments.whole_number("window_bytes", window_bytes, "bytes")
        if beside is not None:
            arguments.instance_of(
                "beside", beside, TransferHandle, "what offload(non_blocking=True) of another manager has returned"
            )

        def act(move: Move) -> None:
            permit = None
            if beside is not None or wait_for_memory > 0:
                permit = MemoryPermit(self._device.free_bytes, wait_for_memory, beside, window_bytes)
            arrived = self._let_through if non_blocking else None
            reports, notes = self._engine.onload(wanted, permit, arrived, unverified=unverified, ballot=move.ballot)
            move.kinds.update(reports)
            move.notes.extend(notes)

        one_by_one = [kind for kind in self._engine.order_of_return if kind in wanted] if non_blocking else [None]
        rounds: list[Point] = [*[NOTES] * self._shares, *one_by_one]
        if self._engine.derives(wanted):
            rounds.insert(rounds.index(StateKind.WEIGHTS if non_blocking else None), ANSWERS)
        call = Call(in_words("onload", wanted, "non_blocking" * non_blocking), tuple(rounds), wait_for_memory)
        return self._run("onload", wanted, act, Where.BACKGROUND if non_blocking else Where.HERE, call)

    def wait(self) -> None:
        """Wait until no move and no preparation of this manager is under way.

        What a move failed with is its handle's to raise; a preparation that failed is logged. Called from inside of
        another call of the manager, by a finalizer or a signal's handler, it waits for nothing.
        """
        with self._exclusive() as is_inside:
            if not is_inside:
                self._finish_preparing()

    def release_cached(self) -> None:
        """Hand memory that torch's allocator keeps, and nobody uses, back to the driver; for `give_back=False`."""
        self._check_process()
        self._device.release_cached()

    @contextlib.contextmanager
    def offloaded(
        self,
        *kinds: KindLike,
        keep_grads: bool = False,
        release_workspaces: bool = False,
        strict: bool = False,
        max_residue_bytes: int | None = None,
    ) -> Iterator[TransferReport]:
        """Offload for the length of a `with` block, and onload what it offloaded however the block ends.

        Arguments are those of `offload`, whose errors keep the block from being entered. What was away before the block
        stays away after it (with `group`, what was away on all ranks). An exception of the block is raised again after
        the onload; if the onload fails too, its error is raised with the block's as context, and the state is still on
        the host.

        Yields:
            The report of the offload.
        """
        report = self.offload(
            *kinds,
            keep_grads=keep_grads,
            release_workspaces=release_workspaces,
            strict=strict,
            max_residue_bytes=max_residue_bytes,
        )
        try:
            yield report
        finally:
            self.wait()  # for what the block may have begun
            back = self._left_by_a_block(report)
            if back:
                self.onload(*back)

    def prepare(self, *kinds: KindLike, wait: bool = False) -> None:
        """Do ahead of time what the first offload would have to: pack small tensors, and get host memory ready.

        Packing happens in the call, which synchronises with the device and takes up to one bucket of extra device
        memory meanwhile; call it where an offload could be made. Host memory is then allocated and page-locked in the
        background, beside training. What is prepared fits the state as it is now; moments that the first optimizer
        step will make are not there before it.

        Args:
            *kinds: the kinds that will be offloaded; all if none is named.
            wait: return only when it is done.

        Raises:
            HostMemoryError: the machine cannot give that much; nothing was packed. What fails in the background is
                raised with `wait`; without, the next offload tries again.
            UnsupportedLayoutError: state was found that cannot be moved.
            TransferError: packing failed; nothing is lost.
            ManagerClosedError: the manager is closed.
        """
        wanted = parse_kinds(kinds)
        arguments.flags(wait=wait)
        with self._exclusive() as is_inside:
            self._check_open()
            self._check_not_reading()
            if is_inside:
                raise _called_inside()
            self._finish_preparing()
            self._trainer.quiesce([k for k in wanted if not self._engine.is_away(k)], keep_grads=True)
            # Only sizes go to the thread: tensors in its hands would outlive the step that drops them.
            sizes = self._engine.prepare(self._trainer.inventory, wanted)
            future: Future[int] = Future()
            self._preparing = future

            def run() -> None:
                threads.enter()
                try:
                    future.set_result(self._engine.reserve(sizes))
                except BaseException as error:
                    future.set_exception(error)

            try:
                threading.Thread(target=run, name="megastow-prepare").start()
            except BaseException as error:
                self._preparing = None
                future.set_exception(error)  # whoever waits for it must not wait for ever
                raise
            if wait:
                future.exception()  # interrupted here, it goes on, and the next move waits for it
                self._preparing = None
                future.result()

    def close(self, *, discard: bool = False) -> None:
        """Bring everything back, remove the hook, and give host memory back. Closing twice is fine.

        With replicas, bringing back takes all ranks: they all close (or call `onload`) while something is offloaded.

        Args:
            discard: do not bring anything back. What is offloaded is lost (with replicas, for the other ranks, too):
                the tensors stay empty, and using the model or the optimizer keeps raising `OffloadedError`. For the end
                of a job.

        Raises:
            DeviceMemoryError: what is offloaded does not fit back; the manager stays open and nothing is lost.
            CorruptionError: as from `onload`; the manager stays open.
            PeerError, AgreementError: with replicas, other ranks did not do the same; the manager stays open.
        """
        arguments.flags(discard=discard)
        with self._exclusive() as is_inside:
            if self._closed:
                return
            self._check_not_reading()
            if is_inside:
                raise _called_inside()
            self._finish_preparing()
            self._discarded |= discard
            if self._discarded:
                self._guard.give_up()
            else:
                away = any(self._engine.is_away(kind) for kind in ALL_KINDS)
                self._closing = True
                try:
                    with contextlib.nullcontext() if self._shares and away else self._apart():
                        self.onload()
                finally:
                    self._closing = False
                self._guard.close()
            self._engine.close()
            self._closed = True
            self._agreement.leave()

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Move without the other ranks of the group."""
        agreement, self._agreement = self._agreement, Agreement()
        try:
            yield
        finally:
            self._agreement = agreement

    def __enter__(self) -> MemoryManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the classic names ---------------------------------------------------------------------------------------

    def offload_weights(self) -> TransferReport:
        """`offload("weights")`."""
        return self.offload(StateKind.WEIGHTS)

    def onload_weights(self) -> TransferReport:
        """`onload("weights")`."""
        return self.onload(StateKind.WEIGHTS)

    def offload_main_weights(self) -> TransferReport:
        """`offload("main_weights")`."""
        return self.offload(StateKind.MAIN_WEIGHTS)

    def onload_main_weights(self) -> TransferReport:
        """`onload("main_weights")`."""
        return self.onload(StateKind.MAIN_WEIGHTS)

    def offload_optimizer_states(self) -> TransferReport:
        """`offload("optimizer_states")`."""
        return self.offload(StateKind.OPTIMIZER_STATES)

    def onload_optimizer_states(self) -> TransferReport:
        """`onload("optimizer_states")`."""
        return self.onload(StateKind.OPTIMIZER_STATES)

    def free_grad_buffers(self) -> TransferReport:
        """`offload("grad_buffers")`."""
        return self.offload(StateKind.GRAD_BUFFERS)

    def build_grad_buffers(self) -> TransferReport:
        """`onload("grad_buffers")`."""
        return self.onload(StateKind.GRAD_BUFFERS)

    # --- inside --------------------------------------------------------------------------------------------------

    def _left_by_a_block(self, report: TransferReport) -> list[StateKind]:
        """What a block has offloaded and not brought back, on this rank or on another that moves with it."""
        mine = [k for k, entry in report.kinds.items() if entry.moved and self.residency(k) is not Residency.RESIDENT]
        with self._exclusive():
            if self._closed or self._discarded:
                return mine
            call = Call(in_words("onload", [*report.kinds], "after a block"), (ANSWERS,))
            with self._agreement.making(call) as ballot:
                found = ballot.ask({kind.value: "away" for kind in mine})
        return [kind for kind in report.kinds if kind.value in found]

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[bool]:
        """One call at a time, and none while a move is under way in the background.

        Yields:
            Whether this thread is in the middle of a call of this manager already; a finalizer can run anywhere.
        """
        self._check_process()  # before any lock: whoever held it at the fork is not here to let go
        is_inside = bool(self._lock._is_owned())  # type: ignore[attr-defined] # as `threading.Condition` asks
        if threads.is_ours() and not is_inside:  # a move may be waiting for this thread
            raise _called_inside()
        while True:
            with self._lock:
                pending = self._pending
                if pending is None or pending.done():
                    self._pending = None
                    yield is_inside
                    return
            if is_inside:  # of the very move that is pending
                raise _called_inside()
            pending.exception()  # not within the lock, which the move takes

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                f"this memory manager belongs to process {self._pid}, and this is a fork of it, {os.getpid()}, without "
                "its host memory. Move in that process, or make the model and its manager after the fork"
            )

    def _run(
        self,
        direction: Direction,
        wanted: Sequence[StateKind],
        act: Callable[[Move], None],
        where: Where,
        call: Call,
        *,
        release_workspaces: bool = False,
    ) -> TransferReport | TransferHandle:
        """Make a move, here or in a thread of its own."""
        with self._exclusive() as is_inside:
            self._check_open()
            self._check_not_reading()
            if sys.is_finalizing():
                raise TransferError(
                    "the interpreter is shutting down, and threads and page-locked memory are gone: nothing can be "
                    "moved any more, and nothing was. Call the manager before the end of the program, or with atexit"
                )
            if is_inside and not self._closing:
                raise _called_inside()
            move = Move(direction, self._device.memory(), call)
            if release_workspaces:  # here in any case: what the caller does next uses them, or is about to
                try:
                    move.notes.append(self._release_workspaces())
                except BaseException as error:
                    self._agreement.decline(error)
                    raise
            if where is Where.HERE:
                return self._make(move, wanted, act)
            return self._start(move, wanted, act, guards=where is Where.BACKGROUND)

    def _make(self, move: Move, wanted: Sequence[StateKind], act: Callable[[Move], None]) -> TransferReport:
        """What every move has around it: the guard brought in line with the truth, the report."""
        try:
            try:
                with self._agreement.making(move.call) as move.ballot:
                    act(move)
            finally:
                self._settle()
        except BaseException:  # what interrupted may have been the settling; state without its guard would crash
            self._settle()
            raise
        move.finish(self._device.memory())
        for kind in wanted:
            if not move.kinds[kind].moved:
                move.notes.append(f"{kind} was {self.residency(kind)} already")
        report = move.report()
        logger.info("%s", report)
        return report

    def _start(
        self, move: Move, wanted: Sequence[StateKind], act: Callable[[Move], None], *, guards: bool
    ) -> TransferHandle:
        """Guard what is about to move, unless the move is to do that when it has begun, and make it in a thread."""
        is_offload = move.direction == "offload"
        going = [kind for kind in wanted if self._engine.is_away(kind) is not is_offload]
        pending: Future[TransferReport] = Future()
        handle = TransferHandle(pending, partial(self._released_since, self._engine.released_bytes))
        enter = self._device.as_here()

        def work() -> None:
            threads.enter()
            try:
                with self._lock, enter():
                    if self._pending is not pending:
                        return  # the call was interrupted after all
                    report = self._make(move, wanted, act)
            except BaseException as error:
                logger.warning("%s in the background failed: %s", move.direction, error)
                handle.freeze()
                clear_frames(error)
                pending.set_exception(error)
            else:
                handle.freeze()
                pending.set_result(report)

        try:
            self._engine.announce(going, Residency.OFFLOADING if is_offload else Residency.ONLOADING)
            if guards:
                self._guard_what_is_away(arriving=None if is_offload else pending)
            self._pending = pending
            threading.Thread(target=work, name=f"megastow-{move.direction}").start()
        except BaseException as error:  # also after the thread was started: it waits for the lock that we hold
            self._pending = None
            pending.set_exception(error)  # whoever waits for it must not wait for ever
            self._settle()
            self._agreement.decline(error)
            raise
        return handle

    def _released_since(self, before: int) -> int:
        return self._engine.released_bytes - before

    def _settle(self) -> None:
        """Bring the guard in line with where things are. Doing it again is fine."""
        self._engine.settle()
        self._guard_what_is_away()

    def _let_through(self, _kind: StateKind) -> None:
        """A kind has arrived while others are on their way."""
        self._guard_what_is_away(arriving=self._pending)

    def _guard_what_is_away(self, arriving: Future[TransferReport] | None = None) -> None:
        away = frozenset(k for k in ALL_KINDS if self._engine.residency(k) is not Residency.RESIDENT)
        self._guard.update(away, self._trainer.guarded_calls, arriving, keeper=self)

    def _release_workspaces(self) -> str:
        """Drop what is kept on the device for reuse; a note for the report."""
        before = self._device.memory().allocated_bytes
        names = []
        for workspace in self._trainer.workspaces():
            workspace.drop()
            names.append(workspace.name)
        self._device.release_workspaces()
        self._device.release_cached()
        after = self._device.memory().allocated_bytes
        size = "" if before is None or after is None else f": {format_bytes(before - after)}"
        return f"workspaces released ({', '.join([*names, 'those of torch'])}){size}"

    def _subject(self, leaving: Sequence[torch.UntypedStorage] = ()) -> Subject:
        """What residue is asked about now: all but the kinds that are on the device and what is about to leave it."""
        return Subject(
            self._device,
            {
                key: (record.kind, Home.of(record.storage))
                for key, record in list_storages(self._trainer.inventory()).items()
                if not self._engine.is_away(record.kind)
            },
            {storage_id(storage): Home.of(storage) for storage in leaving},
            {
                storage_id(tensor.untyped_storage()): workspace.name
                for workspace in self._trainer.workspaces()
                for tensor in workspace.tensors()
            },
        )

    def _inspection(self, strict: bool, max_residue_bytes: int | None) -> Inspection | None:
        """What a strict offload asks before its last step; None if it is not strict.

        Raises:
            InvalidTypeError: something else than a number of bytes.
            InvalidArgumentError: a negative number.
        """
        if max_residue_bytes is None and not strict:
            return None
        most = DEFAULT_RESIDUE_BYTES if max_residue_bytes is None else max_residue_bytes
        arguments.whole_number("max_residue_bytes", most, "bytes that may stay")

        def inspect(leaving: Sequence[torch.UntypedStorage]) -> None:
            subject = self._subject(leaving)
            if measure(subject) <= most:
                return
            residue = explain(subject, self._moments)  # without the garbage it may be little enough
            if residue.residue_bytes > most:
                raise ResidueError(
                    f"{format_bytes(residue.residue_bytes)} would stay on the device, and no more than "
                    f"{format_bytes(most)} may. Everything is where it was. Let go of what is named here, "
                    f"or allow for it with max_residue_bytes:\n{residue}",
                    residue=residue,
                    max_residue_bytes=most,
                )

        return inspect

    def _finish_preparing(self) -> None:
        """Wait for a preparation under way; what failed it fails the move that needs the memory, if it still does."""
        if self._preparing is not None:
            error = self._preparing.exception()
            self._preparing = None
            if error is not None:
                logger.warning("preparing host memory failed: %s", error)

    def _check_open(self) -> None:
        if self._discarded:
            raise ManagerClosedError(
                "this memory manager was closed with discard=True, and what was away is lost: no other manager can "
                "bring it back. Make a new model, load a checkpoint, and create a manager for that"
            )
        if self._closed:
            raise ManagerClosedError("this memory manager is closed; create a new one with create_memory_manager")

    def _check_not_reading(self) -> None:
        if self._reading:
            raise OffloadedError("state is being read on the host by manager.on_host; move it when that has returned")


def _called_inside() -> TransferError:
    return TransferError(
        "this thread is in the middle of a call of a memory manager, and something that runs in it has called once "
        "more: a finalizer (`__del__`, the callback of a weak reference) or a callback of the job. Nothing was done "
        "for that. Leave moves to the job's own course"
    )
