"""What a CUDA driver takes for giving memory back and taking it, alone and beside copies: docs/performance.md uses it.

    python benchmarks/driver_costs.py
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/driver_costs.py

Needs torch with CUDA and nothing of megastow. Device memory: 13 GB; host memory: 6.5 GB, page-locked. Each line is one
measurement; a ratio is the time of the plain copies over that of the whole. Where there are two GPUs, a process for
each of them gives memory back, at the same time and one after the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

BLOCKS = 24
BLOCK_BYTES = 512 << 20
PAUSE_SECONDS = 0.4
PROCESSES = 2
REPEATS = 5


def main() -> int:
    """Measure, and print; exit status 1 without a GPU."""
    if not torch.cuda.is_available():
        say("there is no CUDA device here")
        return 1
    costs = Costs()
    for _ in range(2):
        costs.plain(costs.out)  # to get warm
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {BLOCKS} blocks of {BLOCK_BYTES >> 20} MiB")
    out, back = costs.plain(costs.out), costs.plain(costs.back)
    total = BLOCKS * BLOCK_BYTES / 1e9
    for name, seconds in (("out", out), ("in", back)):
        say(f"plain copies {name}: {seconds * 1e3:.1f} ms, {total / seconds:.2f} GB/s")
    costs.free_beside_a_copy()
    costs.take_beside_a_copy()
    costs.result_beside_copies()
    for interleaved in (False, True):
        for pause in (0.0, PAUSE_SECONDS):
            costs.onload(back, interleaved=interleaved, pause=pause)
    for each in (BLOCKS, 1, 4):
        costs.offload(out, each)
    if torch.cuda.device_count() >= PROCESSES:
        barrier = torch.multiprocessing.get_context("spawn").Barrier(PROCESSES)
        torch.multiprocessing.spawn(give_back, (barrier,), PROCESSES)
    return 0


def give_back(number: int, barrier: Any) -> None:
    """One of several processes that give all blocks back, each those of a device of its own."""
    torch.cuda.set_device(number)
    for how, seconds_apart in (("at the same time", 0.0), ("one after the other", PAUSE_SECONDS / 2)):
        found = []
        for _ in range(REPEATS):
            blocks = take()
            for block in blocks:
                block.zero_()
            torch.cuda.synchronize()
            del blocks, block
            barrier.wait()
            time.sleep(PAUSE_SECONDS + number * seconds_apart)
            start = time.perf_counter()
            torch.cuda.empty_cache()
            found.append(f"{(time.perf_counter() - start) * 1e3:.1f}")
        say(f"process {number} of {PROCESSES}, giving all back {how}: {', '.join(found)} ms")
        barrier.wait()


class Costs:
    """The measurements, on one copy stream."""

    def __init__(self) -> None:
        self._host = torch.empty(BLOCKS // 2, BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream()

    def out(self, block: torch.Tensor, number: int) -> None:
        """Queue a copy to the host."""
        with torch.cuda.stream(self._stream):
            self._host[number % len(self._host)].copy_(block, non_blocking=True)

    def back(self, block: torch.Tensor, number: int) -> None:
        """Queue a copy to the device."""
        with torch.cuda.stream(self._stream):
            block.copy_(self._host[number % len(self._host)], non_blocking=True)

    def plain(self, copy: Callable[[torch.Tensor, int], None]) -> float:
        """Seconds of all copies, with the blocks there already."""
        blocks = take()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for number, block in enumerate(blocks):
            copy(block, number)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        del blocks, block
        settle()
        return seconds

    def free_beside_a_copy(self) -> None:
        """One block goes back to the driver while half of the others are being copied."""
        blocks = take()
        torch.cuda.synchronize()
        for number, block in enumerate(blocks[: BLOCKS // 2]):
            self.out(block, number)
        blocks.pop()
        start = time.perf_counter()
        torch.cuda.empty_cache()
        freed = time.perf_counter()
        torch.cuda.synchronize()
        rest = time.perf_counter() - freed
        say(f"giving a block back during a copy: {(freed - start) * 1e3:.2f} ms; the copy went on {rest * 1e3:.2f} ms")
        del blocks, block
        settle()

    def take_beside_a_copy(self) -> None:
        """Blocks are taken from the driver while others are being copied."""
        blocks = take()[: BLOCKS // 2]
        torch.cuda.empty_cache()
        for number, block in enumerate(blocks):
            self.out(block, number)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            blocks.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda"))
            seconds.append(f"{(time.perf_counter() - start) * 1e3:.2f}")
        say(f"taking blocks during a copy: {', '.join(seconds)} ms")
        torch.cuda.synchronize()  # with expandable segments, memory would go back to the driver under the copies
        del blocks, block
        settle()

    def result_beside_copies(self) -> None:
        """A few numbers come to the host while half of the blocks are being copied there: by a copy, by a kernel."""
        blocks = take()[: BLOCKS // 2]
        torch.cuda.empty_cache()
        numbers = torch.arange(8, device="cuda")
        pinned = torch.empty(8, dtype=torch.int64, pin_memory=True)
        storage = torch._C._construct_storage_from_data_pointer(pinned.data_ptr(), numbers.device, pinned.nbytes)
        seen_by_device = torch.empty(0, dtype=torch.int64, device="cuda").set_(storage, 0, (8,), (1,))
        ways: dict[str, Callable[[], object]] = {
            "a copy": numbers.tolist,
            "a kernel": lambda: torch.add(numbers, 1, out=seen_by_device),
        }
        for fetch in ways.values():
            fetch()  # loads the kernel
        for name, fetch in ways.items():
            torch.cuda.synchronize()
            for number, block in enumerate(blocks):
                self.out(block, number)
            start = time.perf_counter()
            fetch()
            torch.cuda.current_stream().synchronize()
            taken = time.perf_counter() - start
            torch.cuda.synchronize()
            rest = time.perf_counter() - start - taken
            say(f"a result during copies, by {name}: {taken * 1e3:.2f} ms; the copies went on {rest * 1e3:.2f} ms")
        del blocks, block
        settle()

    def onload(self, plain: float, *, interleaved: bool, pause: float) -> None:
        """Take and fill all blocks; what they hold was given back to the driver a pause before."""
        take()
        torch.cuda.empty_cache()
        time.sleep(pause)
        start = time.perf_counter()
        blocks = [] if interleaved else take()
        taken = time.perf_counter() - start
        for number in range(BLOCKS):
            if interleaved:
                blocks.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda"))
            self.back(blocks[number], number)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        how = "taking each before its copy" if interleaved else f"taking all at first ({taken * 1e3:.2f} ms)"
        say(f"onload {pause:g} s after an offload, {how}: {seconds * 1e3:.1f} ms, {plain / seconds:.3f}")
        del blocks
        settle()

    def offload(self, plain: float, each: int) -> None:
        """Copy all blocks out, and give them back to the driver, so many at a time, as they arrive."""
        blocks: list[torch.Tensor | None] = list(take())
        torch.cuda.synchronize()
        time.sleep(PAUSE_SECONDS)
        start = time.perf_counter()
        arrivals = []
        for number in range(BLOCKS):
            self.out(blocks[number], number)  # type: ignore[arg-type]
            arrivals.append(self._stream.record_event())
        for number, arrival in enumerate(arrivals):
            arrival.synchronize()
            blocks[number] = None
            if (number + 1) % each == 0:
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - start
        say(f"offload, giving back {each} at a time: {seconds * 1e3:.1f} ms, {plain / seconds:.3f}")
        settle()


def take() -> list[torch.Tensor]:
    """All blocks, from the driver."""
    return [torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(BLOCKS)]


def settle() -> None:
    """Give everything back, and let the driver clear it."""
    torch.cuda.empty_cache()
    time.sleep(PAUSE_SECONDS)


def say(text: str) -> None:
    """Print a line."""
    print(text, flush=True)  # noqa: T201 - it is a script


if __name__ == "__main__":
    sys.exit(main())
