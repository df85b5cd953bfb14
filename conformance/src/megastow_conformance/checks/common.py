"""What several checks need: a trained trainer, its twin, and a cycle that leaves nothing to luck."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.trainer import StepRecord, Trainer

if TYPE_CHECKING:
    from megastow import MemoryManager, StateKind

STEPS = 4
KINDS = ("weights", "main_weights", "optimizer_states", "grad_buffers")


@dataclass(frozen=True)
class Twin:
    """What an undisturbed trainer did: the record of each step, and its state and gradients at the end."""

    records: tuple[StepRecord, ...]
    state: oracle.Snapshot


_twins: dict[tuple[str, int, int], Twin] = {}


def twin(case: Case, steps: int = STEPS) -> Twin:
    """Train a trainer of the case's scenario undisturbed; remembered for the worker's other checks."""
    key = (case.scenario.name, case.world, steps)
    if key not in _twins:
        trainer = case.build()
        records = tuple(trainer.train_step(index) for index in range(steps))
        _twins[key] = Twin(records, oracle.snapshot(trainer.named_state()))
        trainer.close()
    return _twins[key]


def trained(case: Case, steps: int = 2) -> Trainer:
    """A trainer after a few whole steps, so that every optimizer state exists and gradients are cleared."""
    trainer = case.build()
    for index in range(steps):
        trainer.train_step(index)
    return trainer


def everything(trainer: Trainer, *, grads: bool) -> dict[str, torch.Tensor]:
    """The live state, and the live gradients if asked."""
    return {**trainer.named_state(), **(trainer.named_grads() if grads else {})}


@contextlib.contextmanager
def away(
    case: Case, manager: MemoryManager, trainer: Trainer, *kinds: str | StateKind, keep_grads: bool = False
) -> Iterator[None]:
    """Offload for the length of the block, with the released memory overwritten before it comes back."""
    live = everything(trainer, grads=True).values()
    sizes = [tensor.untyped_storage().nbytes() for tensor in live if tensor.device == case.device]
    del live
    with manager.offloaded(*kinds, keep_grads=keep_grads):
        oracle.Garbage(sizes, case.device)
        yield


def cycle(case: Case, manager: MemoryManager, trainer: Trainer, *kinds: str, keep_grads: bool = False) -> None:
    """One offload and onload."""
    with away(case, manager, trainer, *kinds, keep_grads=keep_grads):
        pass


def need_megastow(case: Case, manager: object, why: str) -> None:
    """Skip what asks for more than moves and residency where the subject is something of another make."""
    from megastow import MemoryManager

    if not isinstance(manager, MemoryManager):
        case.skip(why)


def shuffled(case: Case) -> random.Random:
    """Random choices that are the same on every rank and in every run."""
    return random.Random(f"{case.scenario.name}/{case.world}")


def assert_continues(case: Case, trainer: Trainer, done: int = 2) -> None:
    """Train on to the end of the twin's steps, and compare with it."""
    expected = twin(case)
    records = tuple(trainer.train_step(index) for index in range(done, STEPS))
    for index, (got, wanted) in enumerate(zip(records, expected.records[done:], strict=True), start=done):
        assert got == wanted, f"step {index} was {got}, undisturbed it was {wanted}"
    oracle.assert_same(expected.state, oracle.snapshot(trainer.named_state()), "state after training on")
