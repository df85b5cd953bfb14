"""A check of what is said about memory that stays: nothing of the trainer's, and a planted leak by its name."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from megastow import Residency, ResidueError, create_memory_manager
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, cycle, everything, need_megastow, trained

if TYPE_CHECKING:
    from megastow import LeftStorage, Residue

SCALAR_BYTES = 64
LEAK_ELEMENTS = 8 << 20
LEAK_BYTES = 4 * LEAK_ELEMENTS
SLACK_BYTES = 8 << 20
"""How much more may lie idle in the allocator's segments at one moment than at another."""


def residue(case: Case) -> None:
    """After an offload nothing of the trainer is left, and says `explain_residue`; a stale copy is found by name.

    A strict offload fails because of it, with every byte back in place and gradients kept, and passes without it.
    """
    foreign = _left_before_the_trainer(case)
    trainer = trained(case)
    manager = case.manager(trainer)
    need_megastow(case, manager, "only megastow explains what is left")
    cycle(case, manager, trainer)  # what an ordinary cycle does to bytes is for `bitexact` to judge
    manager.offload()
    clean = manager.explain_residue()
    left = [storage for storage in clean.storages if not _is_known(storage) and not _takes(foreign, storage)]
    still = sum(storage.nbytes for storage in left)
    assert still <= trainer.hidden_bytes(), f"{still} bytes of the trainer stay: {'; '.join(map(str, left[:8]))}"
    assert not clean.resident, f"said to be on the device: {clean.resident}"
    manager.onload()
    before = oracle.snapshot(everything(trainer, grads=True))
    chunk: Any = trainer.model[0]
    chunk.stale = {"copies": [torch.empty(LEAK_ELEMENTS, device=case.device)]}
    case.on_close(lambda: vars(chunk).pop("stale", None))
    try:
        manager.offload(max_residue_bytes=clean.residue_bytes + SLACK_BYTES)
    except ResidueError as error:
        _expect_the_leak(error.residue, "stale['copies'][0]")
    else:
        raise AssertionError(f"a strict offload leaves {LEAK_BYTES} bytes more than it may")
    where = {kind: manager.residency(kind) for kind in KINDS}
    assert set(where.values()) == {Residency.RESIDENT}, f"after a strict offload that failed: {where}"
    oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), "after a strict offload that failed")
    del chunk.stale
    manager.offload(max_residue_bytes=clean.residue_bytes + SLACK_BYTES)
    manager.onload()


def _left_before_the_trainer(case: Case) -> Counter[object]:
    """What is on the device for reasons of its own, told by a manager of something else."""
    bystander = create_memory_manager(torch.nn.Linear(1, 1, bias=False).to(case.device))
    case.on_close(bystander.close)
    return Counter(map(_looks, bystander.explain_residue(most_storages=0).storages))


def _looks(storage: LeftStorage) -> object:
    return storage.nbytes, frozenset((tensor.type, tensor.dtype, tensor.shape) for tensor in storage.tensors)


def _takes(counted: Counter[object], storage: LeftStorage) -> bool:
    """Whether something that looks like it was counted, and not taken yet."""
    key = _looks(storage)
    counted[key] -= 1
    return counted[key] >= 0


def _is_known(storage: LeftStorage) -> bool:
    """Counters, states of random generators (which are on the CPU wherever the device is), and workspaces."""
    states = torch.get_rng_state()
    is_random = all(t.dtype == "uint8" and t.shape == tuple(states.shape) for t in storage.tensors)
    return storage.nbytes <= SCALAR_BYTES or is_random or storage.workspace is not None


def _expect_the_leak(residue: Residue, path: str) -> None:
    (leak,) = (storage for storage in residue.storages if storage.nbytes == LEAK_BYTES)
    assert any(owner.path.endswith(path) for owner in leak.owners), f"{path} is called {leak}"
