"""The demo behind ``megastow demo``: a trainer and a reference model share one device in turns, and nothing changes.

A GPT trainer (the real megatron-core: DDP, DistributedOptimizer, Adam, bf16 weights with fp32 main weights) trains for
some rounds. After each it is offloaded, a reference model comes onto the device, generates, and leaves again. A twin of
the trainer has done the same steps before, without any interruption, and what it did is the truth: losses, gradient
norms, weights, main weights and moments must be the same to the last bit.

Nothing here prints; what happens is told to a ``Listener``.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch

from megastow import MemoryFigures, MemoryManager, create_memory_manager
from megastow.device import device_for
from megastow.report import Direction, format_bytes
from megastow_conformance import megatron_core
from megastow_conformance.demo_models import SEED, ReferenceModel, Size, build_trainer
from megastow_conformance.demo_outcome import SORTS, Comparison, Move, Outcome, sort_of, versions
from megastow_conformance.megatron_core import MegatronCoreTrainer
from megastow_conformance.oracle import as_bytes
from megastow_conformance.trainer import StepRecord

_PROMPT_TOKENS = 8
_SHOWN_TOKENS = 8

T = TypeVar("T")


class Listener(Protocol):
    """Who is told what the demo does. Each activity is begun and ended, never two at a time."""

    def begin(self, activity: str) -> None:
        """Something starts that takes time."""
        ...

    def end(self, result: str) -> None:
        """It has ended, with this result."""
        ...


# --- the run ----------------------------------------------------------------------------------------------------------


def join() -> tuple[int, int]:
    """Loads megatron-core and joins the process group: alone, or with the ranks that torchrun has started.

    Returns:
        Rank and number of ranks.

    Raises:
        ModuleNotFoundError: If there is no megatron-core on the path.
    """
    megatron_core.load()
    dist: Any = torch.distributed  # it declares no exports
    if dist.is_torchelastic_launched():
        store, rank, world = next(dist.rendezvous("env://"))
        megatron_core.init_distributed(rank, world, store)
        return rank, world
    megatron_core.init_distributed()
    return 0, 1


def leave() -> None:
    """Waits for the other ranks and leaves the process group."""
    dist: Any = torch.distributed
    dist.barrier()
    dist.destroy_process_group()


def num_activities(rounds: int, steps: int) -> int:
    """How many activities ``run`` begins and ends."""
    return 2 * rounds * steps + 5 * rounds + (9 if torch.cuda.is_available() else 8)


def run(size: Size, *, rounds: int, steps: int, listener: Listener) -> Outcome:
    """Runs the demo on this rank; ``join`` first, and call it on every rank.

    Device memory: one trainer or one reference model at a time, and activations. Host memory: the twin's result (14
    bytes a parameter, less what other ranks hold), and what is offloaded.

    Raises:
        MegastowError: If a move could not be made.
    """
    return _Demo(size, rounds, steps, listener).run()


class _Demo:
    """One run of the demo on one rank."""

    def __init__(self, size: Size, rounds: int, steps: int, listener: Listener) -> None:
        dist: Any = torch.distributed
        self.size = size
        self.rounds = rounds
        self.steps = steps
        self.listener = listener
        self.rank: int = dist.get_rank()
        self.world: int = dist.get_world_size()
        self.device = megatron_core.device()
        self.comparison = Comparison(self.rank)
        self.moves: list[Move] = []
        self.memory: dict[str, MemoryFigures] = {}
        self.steps_done: list[str] = []

    def run(self) -> Outcome:
        """Runs everything, in order."""
        start = time.perf_counter()
        self._note_memory("at the start")
        bound = self._measure_bound()
        records, state = self._train_twin()
        reference = _Reference(self)
        trainer = self.doing("building the trainer, its twin over again", lambda: build_trainer(self.size))
        manager = create_memory_manager(trainer.model, trainer.optimizer)
        done: list[StepRecord] = []
        for number in range(1, self.rounds + 1):
            for _ in range(self.steps):
                done.append(self._train(f"round {number}: trainer", trainer, len(done)))
                if len(done) == 1:
                    manager.prepare()  # the moments exist now; host memory gets ready while training goes on
            self.move(number, "trainer", manager, "offload")
            self.move(number, "reference", reference.manager, "onload")
            reference.generate(number)
            self.move(number, "reference", reference.manager, "offload")
            self.move(number, "trainer", manager, "onload")
        self.doing(
            "comparing the trainer with its twin, bit for bit",
            lambda: self._compare(records, done, state, trainer.named_state()),
        )
        manager.close()
        trainer.close()
        reference.check_weights()
        everything = self._gather()
        return Outcome(
            size=self.size,
            device=self.device.type,
            ranks=self.world,
            rounds=self.rounds,
            steps=self.steps,
            versions=versions(),
            steps_done=tuple(self.steps_done),
            moves=tuple(self.moves),
            memory=self.memory,
            copy_bound=bound,
            comparison=everything,
            seconds=time.perf_counter() - start,
        )

    # --- the twin and the trainer -------------------------------------------------------------------------------------

    def _train_twin(self) -> tuple[list[StepRecord], dict[str, torch.Tensor]]:
        """Trains the twin from beginning to end; what is left of it is in host memory."""
        twin = self.doing("building the twin", lambda: build_trainer(self.size))
        records = [self._train("twin", twin, index) for index in range(self.rounds * self.steps)]
        self._note_memory("twin trained")
        self.listener.begin("keeping the twin's weights, main weights and moments, and freeing it")
        state = {name: as_bytes(tensor) for name, tensor in twin.named_state().items()}
        twin.close()
        del twin
        figures = self._note_memory("twin gone")
        self.listener.end(
            f"{format_bytes(sum(kept.numel() for kept in state.values()))} kept on the host, "
            f"{format_bytes(figures.driver_bytes)} of {_device_memory(self.device)} in use"
        )
        return records, state

    def _train(self, who: str, trainer: MegatronCoreTrainer, index: int) -> StepRecord:
        """One training step, told to the listener."""
        self.listener.begin(f"{who}: step {index + 1} of {self.rounds * self.steps}")
        record = trainer.train_step(index)
        losses = [struct.unpack("<f", loss)[0] for loss in record.losses]
        norm = struct.unpack("<d", record.grad_norm)[0] if record.grad_norm is not None else float("nan")
        result = f"loss {sum(losses) / len(losses):.4f}, gradient norm {norm:.4f}"
        self.listener.end(result)
        if who != "twin":
            self.steps_done.append(result)
        return record

    def move(self, number: int, tenant: str, manager: MemoryManager, direction: Direction) -> None:
        """One offload or onload of everything, told to the listener."""
        where = f"round {number}" if number else "before the first round"
        self.listener.begin(f"{where}: {direction}ing the {_TENANTS[tenant]}")
        report = manager.offload() if direction == "offload" else manager.onload()
        self.moves.append(Move(number, tenant, report))
        self.listener.end(
            f"{format_bytes(report.device_bytes)} in {report.seconds:.3f} s, {report.bytes_per_second / 1e9:.2f} GB/s"
        )

    # --- comparing ----------------------------------------------------------------------------------------------------

    def _compare(
        self,
        twin_steps: list[StepRecord],
        steps: list[StepRecord],
        twin_state: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
    ) -> None:
        """Losses and gradient norms as the bytes they are; tensors one at a time, they may be many gigabytes."""
        seen = self.comparison
        for step, (expected, found) in enumerate(zip(twin_steps, steps, strict=True), start=1):
            seen.counts["losses"] += len(expected.losses)
            seen.counts["gradient norms"] += expected.grad_norm is not None
            if expected.losses != found.losses:
                seen.differs(f"loss of step {step}", f"{found} instead of {expected}")
            if (expected.grad_norm, expected.updated) != (found.grad_norm, found.updated):
                seen.differs(f"gradient norm of step {step}", f"{found} instead of {expected}")
        for name in sorted(twin_state.keys() ^ state.keys()):
            owner = "twin" if name in twin_state else "trainer"
            seen.differs(f"{SORTS[sort_of(name)]} {name}", f"only the {owner} has it")
        for name, expected_bytes in twin_state.items():
            if name in state:
                seen.tensor(sort_of(name), name, expected_bytes, state[name])

    def _gather(self) -> Comparison:
        """What all ranks found together."""
        dist: Any = torch.distributed
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, self.comparison)
        total = Comparison(self.rank)
        for part in parts:
            total.add(part)
        return total

    # --- small tools --------------------------------------------------------------------------------------------------

    def doing(self, activity: str, work: Callable[[], T]) -> T:
        """Does something that takes time, told to the listener with the seconds it took."""
        start = time.perf_counter()
        self.listener.begin(activity)
        result = work()
        self.listener.end(f"{time.perf_counter() - start:.1f} s")
        return result

    def _note_memory(self, moment: str) -> MemoryFigures:
        self.memory[moment] = device_for(self.device).memory()
        return self.memory[moment]

    def _measure_bound(self) -> dict[str, float]:
        """What a plain page-locked copy reaches here; the moves can be held against it."""
        if self.device.type != "cuda":
            return {}
        self.listener.begin("measuring the page-locked copy bound")
        bound = copy_bound(self.device)
        torch.cuda.empty_cache()
        self.listener.end(", ".join(f"{way} {speed / 1e9:.1f} GB/s" for way, speed in bound.items()))
        return bound


_TENANTS = {"trainer": "trainer", "reference": "reference model"}


def _device_memory(device: torch.device) -> str:
    return "device memory" if device.type == "cuda" else "resident memory"


def copy_bound(device: torch.device, nbytes: int = 256 << 20, repeats: int = 8) -> dict[str, float]:
    """Bytes per second of plain copies between page-locked host memory and a CUDA device, each way, at best."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=device)
    bound = {}
    for way, target, source in (("out", host, there), ("in", there, host)):
        seconds = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source, non_blocking=True)
            stop.record()
            stop.synchronize()
            seconds.append(float(start.elapsed_time(stop)) / 1e3)
        bound[way] = nbytes / min(seconds)
    return bound


class _Reference:
    """The reference model as the second tenant: it must generate what it did when nothing had moved yet."""

    def __init__(self, demo: _Demo) -> None:
        self._demo = demo
        size, device = demo.size, demo.device
        torch.manual_seed(SEED)
        self._model = demo.doing("building the reference model", lambda: ReferenceModel(size, device))
        self._state = {name: as_bytes(tensor) for name, tensor in self._model.state_dict().items()}
        generator = torch.Generator().manual_seed(SEED)
        self._prompts = torch.randint(size.vocabulary, (2, _PROMPT_TOKENS), generator=generator)
        with self._told("before the first round: reference model generates"):
            self._expected = self._tokens = self._sample()
        self.manager = create_memory_manager(self._model)
        demo.move(0, "reference", self.manager, "offload")

    def generate(self, number: int) -> None:
        """Generates once more, and compares."""
        with self._told(f"round {number}: reference model generates"):
            self._tokens = self._sample()
        self._demo.comparison.counts["generations"] += 1
        if not torch.equal(self._tokens, self._expected):
            self._demo.comparison.differs(
                f"generation of round {number}", f"{self._tokens.tolist()} instead of {self._expected.tolist()}"
            )

    def check_weights(self) -> None:
        """Brings the model back a last time and compares its weights with those it had at first."""
        self._demo.doing("comparing the reference model's weights, bit for bit", self._check_weights)

    def _check_weights(self) -> None:
        self.manager.close()
        for name, live in self._model.state_dict().items():
            self._demo.comparison.tensor("reference weights", name, self._state[name], live)

    def _sample(self) -> torch.Tensor:
        prompts = self._prompts.to(self._demo.device)
        return self._model.generate(prompts, self._demo.size.new_tokens, SEED)

    @contextlib.contextmanager
    def _told(self, activity: str) -> Iterator[None]:
        self._demo.listener.begin(activity)
        yield
        digest = hashlib.sha256(self._tokens.numpy().tobytes()).hexdigest()[:8]
        shown = " ".join(str(token) for token in self._tokens[0, :_SHOWN_TOKENS].tolist())
        self._demo.listener.end(f"{self._tokens.numel()} tokens (digest {digest}): {shown} ...")
