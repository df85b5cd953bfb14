"""Checks of gradient buffers, whose content is dropped and comes back as zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megastow import Residency, TransferError
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import away, trained
from megastow_conformance.trainer import Point, Trainer

if TYPE_CHECKING:
    from megastow import MemoryManager


def grads(case: Case) -> None:
    """Gradient buffers come back zeroed, are the same tensors, and reduce correctly in the next step.

    Once a step has used its gradients up, whatever is in their memory is worth nothing: here, rubbish. Unless it is
    the only copy of new weights, which then has to come back as it was.
    """
    undisturbed = trained(case)
    expected = _reduced_grads(undisturbed, 2)
    undisturbed.close()
    trainer = trained(case, steps=1)
    manager = case.manager(trainer)
    reached: list[Point] = []

    def at(point: Point) -> None:
        if point is Point.AFTER_STEP:
            reached.append(point)
            _expect_zeroed(case, trainer, manager)

    trainer.train_step(1, at)
    assert reached
    oracle.assert_same(expected, _reduced_grads(trainer, 2), "gradients of the next step")


def _expect_zeroed(case: Case, trainer: Trainer, manager: MemoryManager) -> None:
    """Drop gradients. Those that stay on the device are for `released` to judge."""
    before = _device_grads(case, trainer)
    staged = {oracle.storage_key(tensor) for tensor in trainer.staged_weights()}
    kept = {name: tensor for name, tensor in before.items() if oracle.storage_key(tensor) in staged}
    weights = oracle.snapshot(kept)
    with torch.no_grad():
        for name in before.keys() - kept.keys():
            before[name].fill_(1.0)
    homes = {name: _home(tensor) for name, tensor in before.items()}
    with away(case, manager, trainer, "grad_buffers"):
        gone = [name for name, tensor in before.items() if not oracle.has_memory(tensor)]
    after = _device_grads(case, trainer)
    others = [n for n in homes.keys() | after.keys() if n not in after or homes.get(n) != _home(after[n])]
    assert not others, f"other gradient tensors came back: {sorted(others)[:5]}"
    assert gone, "no gradients were dropped"
    if kept:
        oracle.assert_same(weights, oracle.snapshot(kept), "weights in gradient memory")
    dirty = [name for name in gone if name not in kept and bool(oracle.as_bytes(after[name]).any())]
    assert not dirty, f"not zeroed: {dirty[:5]}"


def _home(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), oracle.storage_key(tensor)


def _device_grads(case: Case, trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in trainer.named_grads().items() if tensor.device == case.device}


def _reduced_grads(trainer: Trainer, index: int) -> oracle.Snapshot:
    """The gradients of a step as the optimizer finds them."""
    found: list[oracle.Snapshot] = []

    def at(point: Point) -> None:
        if point is Point.AFTER_GRAD_SYNC:
            found.append(oracle.snapshot(trainer.named_grads()))

    trainer.train_step(index, at)
    return found[0]


def grads_in_flight(case: Case) -> None:
    """Gradients whose reduction is under way are not dropped: that is refused, and the step is as if nobody had asked.

    With communication that overlaps the backward pass, that is the moment between the pass and the waiting for it.
    """
    undisturbed = trained(case)
    expected = _reduced_grads(undisturbed, 2)
    undisturbed.close()
    trainer = trained(case)
    manager = case.manager(trainer)
    found: list[oracle.Snapshot] = []

    def at(point: Point) -> None:
        if point is Point.AFTER_BACKWARD:
            try:
                manager.offload("grad_buffers")
            except TransferError as error:
                assert "keep_grads" in str(error), f"the refusal does not say what to do: {error}"
            else:
                raise AssertionError("gradients were dropped while their reduction was under way")
            assert manager.residency("grad_buffers") is Residency.RESIDENT
        elif point is Point.AFTER_GRAD_SYNC:
            found.append(oracle.snapshot(trainer.named_grads()))

    trainer.train_step(2, at)
    oracle.assert_same(expected, found[0], "gradients of a step that was asked to drop them")
