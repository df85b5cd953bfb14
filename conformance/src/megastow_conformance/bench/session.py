"""What the rows of a run share: the tenants that move, the copy that their bits are compared with, and the clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from megastow import MemoryFigures, MemoryManager, create_memory_manager
from megastow.device import Device
from megastow_conformance.bench.bits import StateCopy, not_zero
from megastow_conformance.bench.bounds import forget_page_locked
from megastow_conformance.bench.meeting import Meeting
from megastow_conformance.bench.result import Bound, Figure, Spread, Timeline
from megastow_conformance.bench.sampling import Sampler
from megastow_conformance.bench.subjects import ManyTensors, Subject, TrainerSubject, device_storages
from megastow_conformance.demo_models import Size

STEPS = 2
"""Training steps behind a trainer when it is measured: there are moments, and they have changed once."""

PHASE_SECONDS = 0.2
"""How long a phase between two moves lasts, where nothing else is asked for; in a job it is seconds or minutes."""

_SLOW_SECONDS = 8.0
_BEYOND_DOUBT = 1.03  # of a bound; less is within its own spread
_PAUSE_SECONDS = 0.1

T = TypeVar("T")
S = TypeVar("S", bound=Subject)


@dataclass(frozen=True)
class Cycle:
    """Seconds that an offload and the onload after it took, each from the call to the return."""

    out: float
    back: float


class Tenant(Generic[S]):
    """A subject, the copy of its state, and the manager that moves it once somebody asks for one.

    Attributes:
        subject: What is moved.
        kept_bytes: Bytes of the storages on the device that hold its state, before anything was packed.
        device_bytes: The same with gradients.
    """

    def __init__(self, session: Session, subject: S, copy: StateCopy) -> None:
        device = session.device.torch_device
        self._session = session
        self._copy = copy
        self._manager: MemoryManager | None = None
        self.subject = subject
        kept = {storage._cdata: storage.nbytes() for storage in device_storages(subject.state(), device)}
        dropped = {storage._cdata: storage.nbytes() for storage in device_storages(subject.grads(), device)}
        self.kept_bytes = sum(kept.values())
        self.device_bytes = sum({**dropped, **kept}.values())

    @property
    def is_untouched(self) -> bool:
        """Whether no manager has been made for it."""
        return self._manager is None

    @property
    def manager(self) -> MemoryManager:
        """Its memory manager."""
        if self._manager is None:
            self._manager = create_memory_manager(self.subject.model, self.subject.optimizer)
        return self._manager

    def cycle(self, phase_seconds: float = PHASE_SECONDS) -> Cycle:
        """Offloads and onloads everything with its manager; see ``cycle_by``."""
        return self.cycle_by(self.manager.offload, self.manager.onload, phase_seconds)

    def cycle_by(
        self, offload: Callable[[], object], onload: Callable[[], object], phase_seconds: float = PHASE_SECONDS
    ) -> Cycle:
        """An offload and an onload, each timed, and then all bits are compared.

        Args:
            offload: Moves everything out, and waits for it.
            onload: Brings everything back, and waits for it.
            phase_seconds: How long it stays away. A driver clears memory that it was given back, some 20 ms for 12 GB
                on an H100, and a copy that follows at once shares the device with that.
        """
        out, _ = self._session.timed(offload)
        time.sleep(phase_seconds)
        back, _ = self._session.timed(onload)
        self.check()
        return Cycle(out, back)

    def watched_cycle(self) -> Timeline:
        """A cycle that is looked at instead of timed."""
        with Sampler(self._session.device) as sampler:
            sampler.begin("resident")
            time.sleep(_PAUSE_SECONDS)
            sampler.begin("offload")
            self.manager.offload()
            sampler.begin("offloaded")
            time.sleep(_PAUSE_SECONDS)
            sampler.begin("onload")
            self.manager.onload()
            sampler.begin("resident again")
            time.sleep(_PAUSE_SECONDS)
        self.check()
        return sampler.timeline()

    def check(self, more: Sequence[str] = ()) -> None:
        """Compares all bits with what they were, and tells the session what differs.

        Gradients must be zero: a training step has left them so, and that is how they come back from a move.

        Args:
            more: What differs beside the state.
        """
        wrong_grads = not_zero(self.subject.grads())
        self._session.compared([*more, *wrong_grads, *self._copy.differences(self.subject.state())])

    def close(self) -> None:
        """Drops everything, wherever it is; what is offloaded is not brought back."""
        if self._manager is not None:
            self._manager.close(discard=True)
            self._manager = None
        self.subject.close()
        self._copy = StateCopy({})


class Session:
    """One run on one rank.

    Attributes:
        size: The trainer's size.
        repeats: How often a steady thing is measured.
        device: The accelerator.
        meeting: Where the ranks meet.
        bounds: What the machine can do, by key.
        memory: Memory in use at named moments.
        timeline: Device memory through one cycle.
        page_locked: What torch's page-locked buffers reached in this run, once that was measured: the cycles, the first
            of which makes the buffers.
    """

    def __init__(self, size: Size, repeats: int, device: Device, meeting: Meeting) -> None:
        self.size = size
        self.repeats = repeats
        self.device = device
        self.meeting = meeting
        self.bounds: dict[str, Bound] = {}
        self.memory: dict[str, MemoryFigures] = {}
        self.timeline = Timeline()
        self.page_locked: Sequence[Cycle] = ()
        self._trained: StateCopy | None = None
        self._living: Tenant[TrainerSubject] | None = None
        self._notes: list[str] = []
        self._differences: list[str] = []
        self._num_compared = 0

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.meeting.world

    @property
    def copied_bytes(self) -> int:
        """Host memory in the copy of the trainer's state that bits are compared with."""
        return self._trained.nbytes if self._trained is not None else 0

    # --- tenants ------------------------------------------------------------------------------------------------------

    def untouched(self) -> Tenant[TrainerSubject]:
        """A trainer that no manager has packed, on a device without another one; the session keeps it."""
        if self._living is None or not self._living.is_untouched:
            self.drop()
            self._living = self._new_trainer()
        return self._living

    def settled(self) -> Tenant[TrainerSubject]:
        """A trainer whose manager has made its first cycle, on a device without another one; the session keeps it."""
        if self._living is None or self._living.is_untouched:
            self._living = self.untouched()
            self._living.cycle()
        return self._living

    def drop(self) -> None:
        """Lets go of the trainer that is kept."""
        living, self._living = self._living, None
        if living is not None:
            living.close()
        self.device.release_cached()

    def forget(self) -> None:
        """Lets go of what later rows would use again: where a row has failed, some ranks may have it and others not."""
        self.page_locked = ()
        self._trained = None

    @contextlib.contextmanager
    def trainer(
        self, *, steps: int = STEPS, region: contextlib.AbstractContextManager[object] | None = None
    ) -> Iterator[Tenant[TrainerSubject]]:
        """One more trainer, for the length of a ``with`` block.

        Args:
            steps: Training steps that it has made; whoever asks for fewer makes the others before bits are compared.
            region: What to build and train it in.
        """
        with self._staying(self._new_trainer(steps, region)) as tenant:
            yield tenant

    @contextlib.contextmanager
    def replicated_trainer(self) -> Iterator[Tenant[TrainerSubject]]:
        """A trainer without the distributed optimizer alone on the device, for the length of a ``with`` block.

        All of its lasting state is the same on all ranks.
        """
        self.drop()
        subject = TrainerSubject(self.size, distributed_optimizer=False)
        for _ in range(STEPS):
            subject.train()
        with self._staying(Tenant(self, subject, StateCopy(subject.state()))) as tenant:
            yield tenant

    @contextlib.contextmanager
    def many_tensors(self, num_tensors: int, smallest: int, largest: int) -> Iterator[Tenant[ManyTensors]]:
        """Tensors of many sizes alone on the device, for the length of a ``with`` block; see ``ManyTensors``."""
        self.drop()
        subject = ManyTensors(num_tensors, smallest, largest, self.device.torch_device)
        try:
            with self._staying(Tenant(self, subject, StateCopy(subject.state()))) as tenant:
                yield tenant
        finally:
            forget_page_locked()

    @contextlib.contextmanager
    def _staying(self, tenant: Tenant[S]) -> Iterator[Tenant[S]]:
        """A tenant that leaves with the ``with`` block, and its memory with it."""
        try:
            yield tenant
        finally:
            tenant.close()
            self.device.release_cached()

    def _new_trainer(
        self, steps: int = STEPS, region: contextlib.AbstractContextManager[object] | None = None
    ) -> Tenant[TrainerSubject]:
        if self._trained is None and steps < STEPS:
            self.untouched()  # for the copy of a state after all steps
        with region or contextlib.nullcontext():
            subject = TrainerSubject(self.size)
            for _ in range(steps):
                subject.train()
        self.device.synchronize()
        self.device.release_cached()
        if self._trained is None:
            self.memory["trained"] = self.device.memory()
            self._trained = StateCopy(subject.state())
        return Tenant(self, subject, self._trained)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def timed(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds from the call to the return of something that waits for its own end, and what it returned."""
        self._meet()
        start = time.perf_counter()
        result = work()
        return time.perf_counter() - start, result

    def repeated(self, measure: Callable[[], T]) -> list[T]:
        """Measures as often as the session repeats things; less often what is slow."""
        found: list[T] = []
        start = time.perf_counter()
        while len(found) < self.repeats and not (found and self.any_rank(time.perf_counter() - start > _SLOW_SECONDS)):
            found.append(measure())
        return found

    def over_bounds(self, nbytes: int, cycles: Sequence[Cycle]) -> Iterator[Figure]:
        """Offload and onload of so many bytes, over the bounds of this run."""
        yield self.over_bound("offload", "out", nbytes, [cycle.out for cycle in cycles])
        yield self.over_bound("onload", "in", nbytes, [cycle.back for cycle in cycles])

    def over_bound(self, name: str, bound_key: str, nbytes: int, seconds: Sequence[float]) -> Figure:
        """Bytes over seconds, over one of the bounds of this run."""
        bound = self.bounds[bound_key]
        ratios = Spread.of(nbytes / each / bound.bytes_per_second for each in seconds)
        if ratios.median > _BEYOND_DOUBT:
            self.note(f"{name} was faster than the {bound.name}, so that was measured too low; run this again")
        return Figure(name, ratios, against=bound.name, seconds=Spread.of(seconds), nbytes=nbytes)

    def any_rank(self, flag: bool) -> bool:
        """Whether it is so on any rank; a decision that all ranks have to take alike."""
        return any(self.gather(flag))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        self.meeting.meet()
        found: list[Any] = [value] * self.world
        if self.world > 1:
            dist: Any = torch.distributed  # it declares no exports
            dist.all_gather_object(found, value)
        return found

    def _meet(self) -> None:
        """Has all ranks begin at once, with nothing left to do on the device."""
        self.meeting.meet()
        if self.world > 1:  # all are there now; a barrier lets them go closer together than a store
            dist: Any = torch.distributed
            dist.barrier()
        self.device.synchronize()

    # --- what a row says ----------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Something that the reader of the row's figures should know."""
        self._notes.append(text)

    def compared(self, differences: Sequence[str]) -> None:
        """The whole of a state was compared."""
        self._num_compared += 1
        self._differences += differences

    def take_findings(self) -> tuple[tuple[str, ...], tuple[str, ...], int]:
        """Notes, differences and number of comparisons since the last time."""
        found = tuple(self._notes), tuple(self._differences), self._num_compared
        self._notes, self._differences, self._num_compared = [], [], 0
        return found
