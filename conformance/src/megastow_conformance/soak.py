"""The soak: thousands of random hand-overs with faults among them, and whether anything grows.

``python -m megastow_conformance.soak`` (``nox -s soak``) takes a real megatron-core trainer and a reference model
through random cycles: any kinds, blocking or in the background, by ``swap``, with gradients kept or not, with a fault
at a random step of every other move, with training steps in between. After each cycle all bits of both are compared
with a copy, and memory is measured: the resident set of the process, what torch's allocator holds on the device (on the
CPU, all tensors alive), and the host memory of the managers. The run fails if a bit is wrong, and if memory grows.

All choices come from the seed, and every cycle is said in words when it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megastow import MemoryManager, Residency, StateKind, create_memory_manager, faults, swap
from megastow.report import format_bytes
from megastow.transport import DEFAULT_CHUNK_BYTES
from megastow_conformance import demo, megatron_core, oracle
from megastow_conformance.bench.bits import StateCopy
from megastow_conformance.demo_models import SEED, SIZES, ReferenceModel, Size, build_trainer
from megastow_conformance.demo_outcome import versions

WARM_UP = 0.2
"""Part of the cycles that is left out of the slopes: allocators find their size."""

_FIGURES = ("resident", "device", "host")
_STEP_EVERY = 20
_NEW_MANAGER_EVERY = 25
_CHUNKS = 64
_FIRST_MOVE = ("host", "pack")  # what a manager does only once: points of these names strike after it was exchanged
_ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)
_KINDS = tuple(StateKind)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1 << 16


@dataclass(frozen=True)
class Sample:
    """Memory after a cycle, everything back on the device and garbage collected, in bytes.

    Attributes:
        cycle: its number.
        resident: resident set of the process, without `host`.
        device: what tensors hold on the device; on the CPU, all tensors alive.
        host: what the managers hold; more for one that has kept gradients, and again less for the next manager.
    """

    cycle: int
    resident: int
    device: int
    host: int


@dataclass(frozen=True)
class Outcome:
    """What a soak found.

    Attributes:
        cycles: how many were made.
        moves: moves made, those that failed on purpose among them.
        faults: faults that struck.
        seconds: what all of it took.
        samples: memory after each cycle.
    """

    cycles: int
    moves: int
    faults: int
    seconds: float
    samples: tuple[Sample, ...]

    def slope(self, figure: str) -> float:
        """Bytes a cycle by which a figure grows, by least squares over all cycles after the warm-up."""
        samples = self._settled()
        if len({sample.cycle for sample in samples}) < 2:
            return 0.0
        fit = statistics.linear_regression(
            [sample.cycle for sample in samples], [float(getattr(sample, figure)) for sample in samples]
        )
        return fit.slope

    def problems(self, most_growth_bytes: int) -> list[str]:
        """What grows, in words: the resident set by its slope, what is counted exactly by its peak."""
        samples = self._settled()
        found = []
        growth = self.slope("resident") * (samples[-1].cycle - samples[0].cycle)
        if growth > most_growth_bytes:
            found.append(f"the resident set grows by {format_bytes(round(growth))} over {len(samples)} cycles")
        early, late = self.samples[: len(self.samples) // 2], self.samples[len(self.samples) // 2 :]
        for figure in ("device", "host"):
            peaks = [max(getattr(sample, figure) for sample in part) for part in (early, late)]
            if peaks[1] > peaks[0]:
                found.append(f"{figure} memory grows from {format_bytes(peaks[0])} to {format_bytes(peaks[1])}")
        return found

    def _settled(self) -> tuple[Sample, ...]:
        return self.samples[int(len(self.samples) * WARM_UP) :]


class Soak:
    """A trainer and a reference model that take turns on one device; `megatron_core.load` and `demo.join` first.

    Host memory: two trainers' kept state and two reference models, one copy of each being for the comparison.
    """

    def __init__(self, size: Size, seed: int) -> None:
        self._choose = random.Random(seed)
        self._device = megatron_core.device()
        self._trainer = build_trainer(size, seed=SEED)
        self._index = 0
        for _ in range(2):
            self._train()
        torch.manual_seed(seed)
        self._reference = ReferenceModel(size, self._device).eval()
        state_bytes = sum(tensor.nbytes for tensor in self._trainer.named_state().values())
        self._chunk_bytes = max(1 << 20, min(DEFAULT_CHUNK_BYTES, state_bytes // _CHUNKS))
        self._manager = self._make_manager()
        self._guest = create_memory_manager(self._reference)
        self._guest.offload()
        self._guest_copy: StateCopy | None = None
        self._copy = StateCopy(self._trainer.named_state())
        self._moves = self._faults = 0
        self._story: list[str] = []

    def run(
        self,
        cycles: int,
        listener: Callable[[Sample], None] = lambda sample: None,
        most_seconds: float = math.inf,
    ) -> Outcome:
        """Make cycles, fewer if that takes longer than `most_seconds`; `listener` hears of each.

        Raises:
            AssertionError: a bit is wrong, or a move went another way than it should; with what led to it.
        """
        samples = []
        start = time.perf_counter()
        for number in range(cycles):
            if time.perf_counter() - start > most_seconds:
                break
            self._story.clear()
            try:
                self._cycle()
                self._look()
            except Exception as error:
                raise AssertionError(f"cycle {number}: {'; '.join(self._story)}: {error}") from error
            if number % _NEW_MANAGER_EVERY == _NEW_MANAGER_EVERY - 1:
                self._manager.close()
                self._manager = self._make_manager()
            if number % _STEP_EVERY == _STEP_EVERY - 1:
                self._train()
                self._copy = StateCopy(self._trainer.named_state())
            samples.append(self._sample(number))
            listener(samples[-1])
        return Outcome(len(samples), self._moves, self._faults, time.perf_counter() - start, tuple(samples))

    def close(self) -> None:
        """Bring everything back, and give host memory back."""
        self._manager.close()
        self._guest.close()

    def _make_manager(self) -> MemoryManager:
        bucket_bytes = self._choose.choice((1, 1 << 20, 64 << 20))
        model, optimizer = self._trainer.model, self._trainer.optimizer
        return create_memory_manager(model, optimizer, bucket_bytes=bucket_bytes, chunk_bytes=self._chunk_bytes)

    # --- one cycle ---------------------------------------------------------------------------------------------------

    def _cycle(self) -> None:
        style = self._choose.choice(("blocking", "background", "swap"))
        if style == "swap":
            window = self._choose.choice((0, 1 << 20, 1 << 30))
            self._move("swap in", "", lambda: swap(self._manager, self._guest, window_bytes=window))
            self._look_at_guest()
            self._move("swap out", "", lambda: swap(self._guest, self._manager, window_bytes=window))
            return
        kinds = self._choose.sample(_KINDS, self._choose.randint(1, len(_KINDS)))
        keep = self._choose.random() < 0.5
        background = style == "background"
        what = f"{', '.join(kinds)} {'in the background' if background else ''}"

        def offload() -> object:
            if background:
                return self._manager.offload(*kinds, keep_grads=keep, non_blocking=True).wait()
            return self._manager.offload(*kinds, keep_grads=keep)

        def onload() -> object:
            return (
                self._manager.onload(*kinds, non_blocking=True).wait() if background else self._manager.onload(*kinds)
            )

        self._move(f"offload {what}", "offload", offload)
        assert all(self._manager.residency(kind) is Residency.OFFLOADED for kind in kinds), "something stayed"
        self._move(f"onload {what}", "onload", onload)

    def _move(self, what: str, direction: str, call: Callable[[], object]) -> None:
        """Make a move; every other time with a fault at a step of that direction, if it comes to it, and then again."""
        self._story.append(what)
        self._moves += 1
        with self._perhaps_a_fault(direction) as fault:
            try:
                call()
                return
            except BaseException as error:
                if fault not in f"{error} {error.__cause__}":
                    raise
        self._faults += 1
        self._moves += 1
        call()

    @contextlib.contextmanager
    def _perhaps_a_fault(self, direction: str) -> Iterator[str]:
        if self._choose.random() < 0.5:
            yield "no fault was injected"
            return
        name = self._choose.choice([point for point in faults.POINTS if point.startswith((direction, *_FIRST_MOVE))])
        error = self._choose.choice(_ERRORS)
        text = f"injected {error.__name__} at {name}"
        self._story.append(text)
        with faults.inject(name, lambda: error(text), after=self._choose.randint(0, 3)):
            yield text

    def _train(self) -> None:
        self._trainer.train_step(self._index)
        self._index += 1

    # --- what must be true -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        for manager, where in ((self._manager, Residency.RESIDENT), (self._guest, Residency.OFFLOADED)):
            wrong = [kind for kind in _KINDS if manager.residency(kind) is not where]
            assert not wrong, f"{', '.join(wrong)} should be {where}"
        _demand_equal(self._copy, self._trainer.named_state())

    def _look_at_guest(self) -> None:
        state = dict(self._reference.named_parameters())
        if self._guest_copy is None:
            self._guest_copy = StateCopy(state)
        _demand_equal(self._guest_copy, state)

    def _sample(self, number: int) -> Sample:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        on_gpu = self._device.type == "cuda"
        device = torch.cuda.memory_allocated(self._device) if on_gpu else oracle.live_bytes(self._device)
        host = self._manager.host_bytes + self._guest.host_bytes
        return Sample(number, resident_bytes() - host, device, host)


def _demand_equal(copy: StateCopy, tensors: Mapping[str, torch.Tensor]) -> None:
    wrong = copy.differences(tensors)
    assert not wrong, "; ".join(wrong[:4])


def keep_large_blocks_apart() -> None:
    """Make glibc map each large block by itself, so that the resident set tells what is held, not how the heap lies.

    On the CPU a trainer's storages are such blocks, and each onload allocates them anew.
    """
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def resident_bytes() -> int:
    """The resident set of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak and print what it found; 1 if memory grows."""
    parser = argparse.ArgumentParser(prog="python -m megastow_conformance.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--most-seconds", type=float, default=math.inf, help="make fewer cycles rather than take longer"
    )
    parser.add_argument("--most-growth", type=int, default=64 << 20, help="bytes of the resident set, over the run")
    parser.add_argument("--json", type=Path, help="write figures and samples to this file")
    given = parser.parse_args(arguments)
    keep_large_blocks_apart()
    demo.join()
    gc.collect()
    gc.freeze()  # what is imported stays, and is not looked through after each cycle
    soak = Soak(SIZES[given.size], given.seed)
    every = max(1, given.cycles // 20)

    def listen(sample: Sample) -> None:
        if (sample.cycle + 1) % every == 0:
            figures = ", ".join(f"{name} {format_bytes(getattr(sample, name))}" for name in _FIGURES)
            _say(f"{sample.cycle + 1:>6} cycles: {figures}")

    _say(f"{given.cycles} cycles of {SIZES[given.size].description}")
    outcome = soak.run(given.cycles, listen, given.most_seconds)
    soak.close()
    problems = outcome.problems(given.most_growth)
    slopes = {name: outcome.slope(name) for name in _FIGURES}
    made = f"{outcome.cycles} cycles, {outcome.moves} moves, {outcome.faults} of them made to fail"
    _say(f"{made}, {outcome.seconds:.0f} s; all bits are right")
    _say("bytes a cycle: " + ", ".join(f"{name} {slope:+.1f}" for name, slope in slopes.items()))
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    if given.json is not None:
        given.json.write_text(json.dumps(_as_dict(given, outcome, slopes, problems), indent=1) + "\n", encoding="utf-8")
    demo.leave()
    return 1 if problems else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _as_dict(
    given: argparse.Namespace, outcome: Outcome, slopes: dict[str, float], problems: list[str]
) -> dict[str, Any]:
    kept = max(1, len(outcome.samples) // 100)
    return {
        "command": f"nox -s soak -- --cycles {outcome.cycles} --size {given.size} --seed {given.seed}",
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "moves": outcome.moves,
        "faults": outcome.faults,
        "seconds": outcome.seconds,
        "bytes_per_cycle": slopes,
        "problems": problems,
        "samples": [asdict(sample) for sample in outcome.samples[::kept]],
    }


if __name__ == "__main__":
    sys.exit(main())
