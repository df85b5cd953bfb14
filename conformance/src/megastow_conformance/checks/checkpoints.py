"""Checks of saving and loading between moves."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import away, cycle, trained
from megastow_conformance.trainer import Trainer

if TYPE_CHECKING:
    from megastow import MemoryManager


def load_state_dict(case: Case) -> None:
    """A load between two cycles is an ordinary thing: what was loaded moves, and what it replaced leaves no memory."""
    trainer = trained(case)
    manager = case.manager(trainer, bucket_bytes=32 << 10)
    saved = trainer.checkpoint()
    cycle(case, manager, trainer)
    without = _growth(case, manager, trainer, lambda: None)
    stays = _resident_bytes(case, manager, trainer)
    trainer.restore(saved)
    cycle(case, manager, trainer)
    grown = _growth(case, manager, trainer, lambda: trainer.restore(saved))
    assert grown == without, f"with each load host and device memory grow by {grown} bytes, without by {without}"
    left = _resident_bytes(case, manager, trainer)
    assert left <= stays, f"after a load {left} bytes stay on the device during an offload, before it {stays}"


def _growth(case: Case, manager: MemoryManager, trainer: Trainer, act: Callable[[], object]) -> tuple[int, int]:
    """By how many bytes host and device memory grow with three cycles, each after an act."""
    act()
    cycle(case, manager, trainer)
    host_bytes, device_bytes = manager.host_bytes, oracle.live_bytes(case.device)
    for _ in range(3):
        act()
        cycle(case, manager, trainer)
    return manager.host_bytes - host_bytes, oracle.live_bytes(case.device) - device_bytes


def _resident_bytes(case: Case, manager: MemoryManager, trainer: Trainer) -> int:
    """Bytes of the state that have not left the device while everything is away."""
    with away(case, manager, trainer):
        sizes = oracle.storage_sizes(t for t in trainer.named_state().values() if t.device == case.device)
    return sum(sizes.values())


def checkpoint(case: Case) -> None:
    """What is saved after a cycle is what would have been saved without it, and loads into a trainer that was moved."""
    undisturbed = trained(case)
    plain = oracle.snapshot(leaves(undisturbed.checkpoint()))
    undisturbed.close()
    trainer = trained(case)
    manager = case.manager(trainer)
    cycle(case, manager, trainer)
    saved = trainer.checkpoint()
    oracle.assert_same(plain, oracle.snapshot(leaves(saved)), "checkpoint")
    fresh = case.build()
    cycle(case, case.manager(fresh), fresh)
    fresh.restore(saved)
    oracle.assert_same(
        oracle.snapshot(trainer.named_state()), oracle.snapshot(fresh.named_state()), "state after a load"
    )


def checkpoint_sharded(case: Case) -> None:
    """The same with Megatron's distributed checkpoints: one saved before a cycle and one after it are as good."""
    before, after = shared_folder(case), shared_folder(case)
    trainer = trained(case)
    manager = case.manager(trainer)
    trainer.save_sharded(before)
    cycle(case, manager, trainer)
    trainer.save_sharded(after)
    saved = oracle.snapshot(trainer.named_state())
    for folder in (before, after):
        fresh = case.build()
        cycle(case, case.manager(fresh), fresh)
        fresh.load_sharded(folder)
        oracle.assert_same(saved, oracle.snapshot(fresh.named_state()), "state after a load")
    dist: Any = torch.distributed
    dist.barrier()  # rank 0 removes the folders as soon as it is through


def shared_folder(case: Case) -> Path:
    """A new folder that every rank knows, removed when the check is over on rank 0."""
    name = [""]
    if case.rank == 0:
        name = [tempfile.mkdtemp(prefix="megastow-")]
        case.on_close(partial(shutil.rmtree, name[0], ignore_errors=True))
    torch.distributed.broadcast_object_list(name)
    return Path(name[0])


def leaves(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dicts and lists, by their paths."""
    found: dict[str, torch.Tensor] = {}
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, (list, tuple)):
        items = iter(enumerate(value))
    for key, item in items:
        found.update(leaves(item, f"{path}/{key}"))
    return found
