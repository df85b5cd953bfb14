"""What this machine can do with nothing around it: copies each way and both ways at once, all-gather, page-locking.

Ratios are held against these, in the same run. On a GPU the host side is page-locked by torch; without one, a copy is
the plain one from memory to memory, both sides touched before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from megastow import machine
from megastow.device import CpuDevice, Device
from megastow.host import HostRegion
from megastow_conformance.bench.result import Bound, Spread

_COPIES = 8  # one after the other in a repeat, so that starting them weighs nothing
_CUDA_COPY_BYTES, _CPU_COPY_BYTES = 512 << 20, 64 << 20
_CUDA_GATHER_BYTES, _CPU_GATHER_BYTES = 1 << 30, 8 << 20
_LOCK_BYTES = 2 << 30
_LOCK_REPEATS = 2
_SHARE_OF_HOST = 0.7  # of what can be had; the rest is left to others

Clock = Callable[[Callable[[], None]], tuple[float, None]]
"""Runs something and tells the seconds, as ``Session.timed`` does: with all ranks at once."""


def first_touch(wanted: int) -> Bound:
    """Has the machine find as much host memory as the run will use, and gives it back.

    In a virtual machine that grows, memory is slow the first time that anybody touches it. Whoever came first would
    pay for all others.
    """
    limits = machine.host_limits()
    nbytes = max(machine.PAGE_BYTES, min(wanted, int(_SHARE_OF_HOST * limits.available_bytes / limits.local_ranks)))
    start = time.perf_counter()
    HostRegion.make(nbytes, CpuDevice(torch.device("cpu"))).close()
    return Bound("first touch of host memory", nbytes, Spread((time.perf_counter() - start,)))


def copy_bounds(clock: Clock, device: Device, repeats: int) -> Mapping[str, Bound]:
    """Copies out of the device, into it, and both ways at once: keys ``"out"``, ``"in"`` and ``"both"``.

    Host memory is new in each repeat, and what was used before is kept until the end, so that the next is elsewhere:
    some of it may be further from the device than the rest, without the system knowing (a quarter slower on two H200
    of a virtual machine).
    """
    found = _copies(clock, device, repeats)
    device.release_cached()
    forget_page_locked()
    return found


def _copies(clock: Clock, device: Device, repeats: int) -> Mapping[str, Bound]:
    is_cuda = device.torch_device.type == "cuda"
    nbytes = _CUDA_COPY_BYTES if is_cuda else _CPU_COPY_BYTES
    what = "page-locked copy" if is_cuda else "memory copy"
    host: list[torch.Tensor] = []  # all of it, the last two in use
    there = [torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device).fill_(1) for _ in range(2)]
    streams: list[Any] = [torch.cuda.Stream(device.torch_device) if is_cuda else None for _ in range(2)]

    def copy(target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        with torch.cuda.stream(stream):
            for _ in range(_COPIES):
                target.copy_(source, non_blocking=True)
                # One at a time: with CUDA_DEVICE_MAX_CONNECTIONS=1, which Megatron wants, a copy that is queued behind
                # another one of its stream would hold up the other direction.
                if stream is not None:
                    stream.synchronize()

    def out() -> None:
        copy(host[-2], there[0], streams[0])

    def back() -> None:
        copy(there[1], host[-1], streams[1])

    with ThreadPoolExecutor(2, "megastow-bench-copy") as pool:

        def both() -> None:
            for future in [pool.submit(out), pool.submit(back)]:
                future.result()

        ways = {"out": out, "in": back, "both": both}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            # Written to, because memory that nobody has touched is not there yet.
            host += [torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_cuda).fill_(1) for _ in range(2)]
            for way, work in ways.items():
                seconds[way] += _seconds(clock, work, 1).values
    names = {"out": "out", "in": "in", "both": "both ways"}
    return {
        way: Bound(f"{what} {names[way]}", (2 if way == "both" else 1) * _COPIES * nbytes, Spread.of(seconds[way]))
        for way in ways
    }


def gather_bound(clock: Clock, device: Device, world: int, repeats: int) -> Mapping[str, Bound]:
    """An all-gather over all ranks, key ``"all_gather"``: bytes of the whole that every rank ends up with."""
    if world == 1:
        return {}
    found = _gather(clock, device, world, repeats)
    device.release_cached()
    return {"all_gather": found}


def _gather(clock: Clock, device: Device, world: int, repeats: int) -> Bound:
    dist: Any = torch.distributed  # it declares no exports
    nbytes = _CUDA_GATHER_BYTES if device.torch_device.type == "cuda" else _CPU_GATHER_BYTES
    part = torch.ones(nbytes // world, dtype=torch.uint8, device=device.torch_device)
    whole = torch.empty(part.numel() * world, dtype=torch.uint8, device=device.torch_device)

    def gather() -> None:
        dist.all_gather_into_tensor(whole, part)
        device.synchronize()

    return Bound(f"all-gather over {world} ranks", whole.numel(), _seconds(clock, gather, repeats))


def lock_bounds(clock: Clock, device: Device) -> Mapping[str, Bound]:
    """Making host memory page-locked, torch's way and ours: keys ``"lock_torch"`` and ``"lock_ours"``."""
    if device.torch_device.type != "cuda":
        return {}

    def torch_way() -> None:
        torch.empty(_LOCK_BYTES, dtype=torch.uint8, pin_memory=True)

    def our_way() -> None:
        regions.append(HostRegion.make(_LOCK_BYTES, device))

    regions: list[HostRegion] = []
    torch_seconds: list[float] = []
    our_seconds: list[float] = []
    for _ in range(_LOCK_REPEATS):
        torch_seconds.append(clock(torch_way)[0])
        forget_page_locked()
        our_seconds.append(clock(our_way)[0])
        regions.pop().close()
    return {
        "lock_torch": Bound("page-locking by torch's pin_memory", _LOCK_BYTES, Spread.of(torch_seconds)),
        "lock_ours": Bound("page-locking by megastow", _LOCK_BYTES, Spread.of(our_seconds)),
    }


def forget_page_locked() -> None:
    """Has torch give back the page-locked memory that it caches, where this torch can."""
    getattr(torch._C, "_host_emptyCache", lambda: None)()


def _seconds(clock: Clock, work: Callable[[], None], repeats: int) -> Spread:
    """How long something takes that waits for its own end; it is done once more before, to get warm."""
    work()
    return Spread.of(clock(work)[0] for _ in range(repeats))
