"""What is measured of megastow. A row is one function; goals are those of the issue "Link speed", for one H200 or two.

A row whose figures this version of the library cannot have says so (``NotAvailable``) and measures nothing else in
their place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from megastow import TransferHandle, TransferReport, create_memory_manager
from megastow import swap as swap_places
from megastow.handle import DEFAULT_WINDOW_BYTES
from megastow.residue import beside_the_allocator
from megastow_conformance.bench import baselines
from megastow_conformance.bench.registry import NotAvailable, row
from megastow_conformance.bench.result import Figure, Goal, Spread, Unit
from megastow_conformance.bench.session import PHASE_SECONDS, STEPS, Cycle, Session, Tenant
from megastow_conformance.bench.subjects import TrainerSubject

_CUDA_TENSORS, _CPU_TENSORS = 20_000, 300
_SMALLEST, _LARGEST = 4 << 10, 4 << 20
_AT_ONCE_REPEATS = 2
_CYCLE_TENSORS = 1_000
_CYCLE_REPEATS = 20
_LOOKED_AT = 0.75
_POLL_SECONDS = 0.0005

_BLOCK_SLACK_BYTES = 64 << 20
"""Torch's allocator gives a cached block whole if less than 1 MiB of it would be left; a trainer has some dozens."""


@row("cold", "first offload, host memory not prepared, over torch's page-locked buffers", {"offload": Goal(6.0)})
def cold(session: Session) -> Iterator[Figure]:
    """Both make their host memory in it, and ours packs small tensors too; so a trainer has only one first time.

    Each repeat has a new one. Torch's way is measured once.
    """
    kept_bytes = session.untouched().kept_bytes
    if not session.page_locked:
        session.page_locked = baselines.page_locked_cycles(session, session.untouched())
    theirs = session.page_locked[0].out

    def first_offload() -> float:
        tenant = session.untouched()
        seconds, _ = session.timed(tenant.manager.offload)
        tenant.manager.onload()
        tenant.check()
        return seconds

    ours = Spread.of(session.repeated(first_offload))
    session.note(f"torch's way took {theirs:.3f} s, once; each of ours is with a new trainer and new host memory")
    ratios = Spread.of(theirs / seconds for seconds in ours.values)
    yield Figure("offload", ratios, against="the time of torch's buffers", seconds=ours, nbytes=kept_bytes)


@row(
    "steady", "offload and onload of a trainer, from the second cycle on", {"offload": Goal(0.98), "onload": Goal(0.97)}
)
def steady(session: Session) -> Iterator[Figure]:
    """From the call to all bytes confirmed and device memory given back to the driver."""
    tenant = session.settled()
    yield from session.over_bounds(tenant.kept_bytes, session.repeated(tenant.cycle))
    at_once = [tenant.cycle(phase_seconds=0.0).back for _ in range(_AT_ONCE_REPEATS)]
    yield session.over_bound("onload at once", "in", tenant.kept_bytes, at_once)
    session.memory["offloaded"] = tenant.manager.offload().after
    session.memory["onloaded"] = tenant.manager.onload().after
    session.timeline = tenant.watched_cycle()


@row(
    "digest",
    'a steady cycle with verify="digest", over one without',
    {"offload": Goal(1.03, at_most=True), "onload": Goal(1.03, at_most=True)},
)
def digest(session: Session) -> Iterator[Figure]:
    """The digest of every storage is computed before it leaves, and when it is back."""
    yield from _over_the_usual(session, session.settled(), verify="digest")


@row(
    "derived",
    "a steady cycle with derive_weights=True, over one without",
    {"offload": Goal(1.0, at_most=True), "onload": Goal(1.0, at_most=True)},
)
def derived(session: Session) -> Iterator[Figure]:
    """Weights that are a cast of main weights are in no copy; they are proved to be, and rebuilt."""
    tenant = session.settled()
    group = torch.distributed.group.WORLD if session.world > 1 else None
    yield from _over_the_usual(session, tenant, derive_weights=True, group=group)


def _over_the_usual(session: Session, tenant: Tenant[TrainerSubject], **options: Any) -> Iterator[Figure]:
    """A manager with options and the usual one take turns, so that both are measured under the same conditions."""
    with create_memory_manager(tenant.subject.model, tenant.subject.optimizer, **options) as special:
        reports: list[TransferReport] = []

        def cycle() -> Cycle:
            return tenant.cycle_by(lambda: reports.append(special.offload()), special.onload)

        cycle()  # makes its host memory
        pairs = session.repeated(lambda: (tenant.cycle(), cycle()))
        held = special.host_bytes
    against = "the same without"
    for name, seconds in (
        ("offload", [(usual.out, other.out) for usual, other in pairs]),
        ("onload", [(usual.back, other.back) for usual, other in pairs]),
    ):
        ratios = Spread.of(other / usual for usual, other in seconds)
        taken = Spread.of(other for _, other in seconds)
        yield Figure(name, ratios, against=against, seconds=taken, nbytes=tenant.kept_bytes)
    if reports[-1].derived_bytes:
        yield Figure("host memory", Spread((held / tenant.kept_bytes,)), against="bytes kept without", nbytes=held)
    for note in reports[-1].notes:
        session.note(note)


@row("host", "host memory held, over the bytes kept", {"host memory": Goal(1.001, at_most=True)})
def host(session: Session) -> Iterator[Figure]:
    """What the manager holds after cycles, over the bytes that the tensors had before any."""
    tenant = session.settled()
    held = tenant.manager.host_bytes
    yield Figure("host memory", Spread((held / tenant.kept_bytes,)), against="bytes kept", nbytes=held)


@row(
    "blocked",
    "the caller's wait in a non-blocking move, over the move",
    {"offload": Goal(0.02, at_most=True), "onload": Goal(0.02, at_most=True), "released at 3/4": Goal(0.5)},
)
def blocked(session: Session) -> Iterator[Figure]:
    """How long `offload(non_blocking=True)` holds its caller, over the time until all has arrived.

    And what it has released after three quarters of that, in a move that is not timed: memory goes as its copies
    arrive, but for the last 2 GiB, which are on their way, and for gradients, which go last.
    """
    tenant = session.settled()
    manager = tenant.manager

    def started(move: Callable[..., Any]) -> tuple[float, float]:
        start = time.perf_counter()
        handle = move(non_blocking=True)
        held = time.perf_counter() - start
        handle.wait()
        return held, time.perf_counter() - start

    def cycle() -> tuple[tuple[float, float], tuple[float, float]]:
        found = session.timed(lambda: started(manager.offload))[1], session.timed(lambda: started(manager.onload))[1]
        tenant.check()
        return found

    cycles = session.repeated(cycle)
    for name, waits in (("offload", [out for out, _ in cycles]), ("onload", [back for _, back in cycles])):
        ratios = Spread.of(held / whole for held, whole in waits)
        seconds = Spread.of(whole for _, whole in waits)
        yield Figure(name, ratios, against="the time of the move", seconds=seconds, nbytes=tenant.kept_bytes)
    _, released = session.timed(lambda: _released_at(_LOOKED_AT, lambda: manager.offload(non_blocking=True)))
    manager.onload()
    tenant.check()
    yield Figure("released at 3/4", Spread((released / tenant.kept_bytes,)), against="bytes kept", nbytes=released)


def _released_at(part: float, offload: Callable[[], TransferHandle]) -> int:
    """What an offload in the background had released after a part of its time."""
    start = time.perf_counter()
    handle = offload()
    seen = []
    while not handle.done():
        seen.append((time.perf_counter() - start, handle.released_bytes))
        time.sleep(_POLL_SECONDS)
    end = time.perf_counter() - start
    handle.wait()
    return max((nbytes for seconds, nbytes in seen if seconds <= part * end), default=0)


@row(
    "residue",
    "what torch's allocator holds after an offload with release_workspaces=True",
    {"reserved": Goal(64 << 20, at_most=True, unit=Unit.BYTES)},
)
def residue(session: Session) -> Iterator[Figure]:
    """Beside it the driver's figure, and its parts: what torch's allocator does not hold, by what brought it.

    That is CUDA's context, other processes, NCCL's communicators and loaded modules. Without a GPU: resident memory
    beyond what was before the model.
    """
    tenant = session.settled()
    manager = tenant.manager
    seconds, report = session.timed(lambda: manager.offload(release_workspaces=True))
    manager.onload()
    tenant.check()
    after, before = report.after, session.memory["before the model"]
    if after.reserved_bytes is None:
        grown = after.driver_bytes - before.driver_bytes - manager.host_bytes - session.copied_bytes
        yield _memory("resident", max(0, grown), seconds)
        session.note("there is no allocator to ask; what Python and Megatron themselves took since is part of it")
        return
    yield _memory("reserved", after.reserved_bytes, seconds)
    yield _memory("driver", after.driver_bytes)
    moments = {name: session.memory[moment] for moment, name in _MOMENTS.items()}
    parts = beside_the_allocator(after, moments)
    parts["by moves, since"] = parts.pop("since")
    for name, nbytes in parts.items():
        yield _memory(name, nbytes)


_MOMENTS = {
    "context": "by CUDA's context and others",
    "first collective": "by the first collective",
    "before the model": "by measuring bounds",
    "trained": "by training",
}
"""What had come to the device by a moment of the session, in their order."""


@row(
    "swap",
    "a trainer out while another comes in, over both directions of the link",
    {
        "both ways": Goal(0.95),
        "peak beyond the larger": Goal(DEFAULT_WINDOW_BYTES + _BLOCK_SLACK_BYTES, at_most=True, unit=Unit.BYTES),
    },
)
def swap(session: Session) -> Iterator[Figure]:
    """Two trainers take turns; the peak is what torch's allocator had handed out at most, less the larger of them.

    A swap may take as much more as its window. Its copies need no device memory of their own.
    """
    first = session.settled()
    first.manager.offload()
    device = session.device.torch_device
    peaks: list[int] = []
    with session.trainer() as second:
        second.cycle()  # packs, and makes its host memory
        turns = [first, second]
        larger = max(first.device_bytes, second.device_bytes)

        def turn() -> float:
            incoming, outgoing = turns
            turns.reverse()
            before = session.device.memory().allocated_bytes
            if before is not None:
                torch.cuda.reset_peak_memory_stats(device)

            seconds, _ = session.timed(lambda: swap_places(outgoing.manager, incoming.manager))
            if before is not None:
                others = before - outgoing.device_bytes  # workspaces
                peaks.append(torch.cuda.max_memory_allocated(device) - others - larger)
            incoming.check()
            return seconds

        seconds = session.repeated(turn)
    yield session.over_bound("both ways", "both", 2 * first.kept_bytes, seconds)
    if peaks:
        yield Figure("peak beyond the larger", Spread.of(peaks), Unit.BYTES)
        session.note(f"the peak is {1 + max(peaks) / larger:.3f} of the larger trainer")
    session.drop()  # it may be away


@row(
    "prepared",
    "first offload after prepare() beside a training step, over a steady one",
    {"offload": Goal(1.1, at_most=True)},
)
def prepared(session: Session) -> Iterator[Figure]:
    """Once a run, with a new trainer. What the step did not cover of the preparation is waited for, and told."""
    session.drop()
    with session.trainer(steps=STEPS - 1) as tenant:
        start = time.perf_counter()
        tenant.manager.prepare()
        tenant.subject.train()
        session.device.synchronize()
        step = time.perf_counter() - start
        tenant.manager.prepare(wait=True)
        waited = time.perf_counter() - start - step
        session.device.release_cached()  # the step's; a steady offload has none to give back either
        first = tenant.cycle().out
        steady_seconds = Spread.of(cycle.out for cycle in session.repeated(tenant.cycle))
        session.note(f"the step took {step:.3f} s, and preparing {waited:.3f} s longer")
        yield Figure(
            "offload",
            Spread((first / steady_seconds.median,)),
            against="a steady offload",
            seconds=Spread((first,)),
            nbytes=tenant.kept_bytes,
        )


@row(
    "cycle",
    "a steady cycle of 1,000 tensors with next to nothing to copy",
    {"Python": Goal(5e-3, at_most=True, unit=Unit.SECONDS)},
)
def cycle(session: Session) -> Iterator[Figure]:
    """Tensors of one element, so that Python is left; and with what a driver takes to get memory back and give it."""
    with session.many_tensors(_CYCLE_TENSORS, 4, 4) as tenant:
        manager = tenant.manager
        ways: dict[str, Callable[[], object]] = {
            "Python": partial(manager.offload, give_back=False),
            "whole": manager.offload,
        }
        found: dict[str, list[Cycle]] = {name: [] for name in ways}
        for _ in range(1 + max(session.repeats, _CYCLE_REPEATS)):
            for name, offload in ways.items():
                found[name].append(tenant.cycle_by(offload, manager.onload, phase_seconds=0.0))
        for name, cycles in found.items():
            seconds = Spread.of(each.out + each.back for each in cycles[1:])  # the first one packs
            yield Figure(name, seconds, Unit.SECONDS, seconds=seconds)


@row("small", "offload and onload of many tensors of 4 KiB to 4 MiB", {"offload": Goal(0.95), "onload": Goal(0.95)})
def small(session: Session) -> Iterator[Figure]:
    """As many as a mixture of experts has, on a GPU; fewer without one."""
    num_tensors = _CUDA_TENSORS if session.device.torch_device.type == "cuda" else _CPU_TENSORS
    with session.many_tensors(num_tensors, _SMALLEST, _LARGEST) as tenant:
        session.note(f"{num_tensors:,} tensors")
        tenant.cycle()
        yield from session.over_bounds(tenant.kept_bytes, session.repeated(tenant.cycle))


@row(
    "replicas",
    "replicated state by slices and an all-gather, over the links of all ranks",
    {
        "weights out": Goal(0.95),
        "weights back": Goal(0.95),
        "weights on the host": Goal(1.001, at_most=True),
        "all out": Goal(0.95),
        "all back": Goal(0.95),
        "all on the host": Goal(1.001, at_most=True),
    },
)
def replicas(session: Session) -> Iterator[Figure]:
    """The weights, and all of a trainer without the distributed optimizer, by managers of their own."""
    if session.world == 1:
        raise NotAvailable("there is only one rank, and nobody to share with; --ranks=2 and more")
    yield from _shared(session, session.settled(), "weights", "weights")
    with session.replicated_trainer() as tenant:
        yield from _shared(session, tenant, "all")


def _shared(session: Session, tenant: Tenant[TrainerSubject], name: str, *kinds: str) -> Iterator[Figure]:
    """What a manager with replicas makes of kinds of which all lasting state is the same on all ranks."""
    with create_memory_manager(tenant.subject.model, tenant.subject.optimizer, replicas=True) as sharing:
        reports: list[TransferReport] = []

        def cycle() -> Cycle:
            return tenant.cycle_by(lambda: reports.append(sharing.offload(*kinds)), lambda: sharing.onload(*kinds))

        cycle()  # connects the ranks, and makes host memory
        cycles = session.repeated(cycle)
        held = sharing.host_bytes
    shared = [kind for kind in reports[-1].kinds.values() if kind.host_bytes]
    nbytes = sum(kind.device_bytes for kind in shared)
    for direction, bound_key, seconds in (
        ("out", "out", [each.out for each in cycles]),
        ("back", "in", [each.back for each in cycles]),
    ):
        bound = session.bounds[bound_key]
        yield Figure(
            f"{name} {direction}",
            Spread.of(nbytes / each / (session.world * bound.bytes_per_second) for each in seconds),
            against=f"{session.world} times the {bound.name}",
            seconds=Spread.of(seconds),
            nbytes=nbytes,
        )
    against = f"1/{session.world} of the bytes kept"
    yield Figure(f"{name} on the host", Spread((held * session.world / nbytes,)), against=against, nbytes=held)
    for note in reports[-1].notes:
        session.note(note)


@row(
    "overlap",
    "first forward after an onload in flight, over the longer of the two",
    {"first forward": Goal(1.15, at_most=True)},
)
def overlap(session: Session) -> Iterator[Figure]:
    """From the call of `onload(non_blocking=True)` to the end of a forward pass that begins at once.

    Its losses are compared with those of the forward pass alone.
    """
    tenant = session.settled()
    manager = tenant.manager
    alone = tenant.subject.forward()
    forward = Spread.of(session.repeated(lambda: session.timed(tenant.subject.forward)[0]))

    def onload_and_forward() -> tuple[TransferHandle, Sequence[bytes]]:
        handle = manager.onload(non_blocking=True)
        return handle, tenant.subject.forward()

    def cycle() -> tuple[float, float]:
        manager.offload()
        time.sleep(PHASE_SECONDS)
        seconds, (handle, beside) = session.timed(onload_and_forward)
        transfer = handle.wait().seconds
        pairs = enumerate(zip(alone, beside, strict=True))
        tenant.check([f"loss {i} is {b.hex()} instead of {a.hex()}" for i, (a, b) in pairs if a != b])
        return seconds, transfer

    cycles = session.repeated(cycle)
    ratios = Spread.of(seconds / max(transfer, forward.median) for seconds, transfer in cycles)
    seconds = Spread.of(seconds for seconds, _ in cycles)
    yield Figure("first forward", ratios, against="the longer of onload and forward", seconds=seconds)
    onload = Spread.of(transfer for _, transfer in cycles)
    session.note(
        f"the forward pass alone takes {forward.median:.3f} s; the onload beside it took {onload.median:.3f} s"
    )


def _memory(name: str, nbytes: int, seconds: float | None = None) -> Figure:
    return Figure(name, Spread((nbytes,)), Unit.BYTES, seconds=None if seconds is None else Spread((seconds,)))
