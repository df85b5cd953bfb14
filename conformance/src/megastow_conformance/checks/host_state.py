"""Checks of state that is looked at and saved while it is away."""

from __future__ import annotations

import torch

from megastow import Residency
from megastow_conformance import oracle
from megastow_conformance.base_trainer import through_a_file
from megastow_conformance.case import Case
from megastow_conformance.checks.checkpoints import leaves, shared_folder
from megastow_conformance.checks.common import KINDS, away, cycle, need_megastow, trained
from megastow_conformance.trainer import Trainer

_WHY_NOT = "views on what is away are megastow's own"


def host_state(case: Case) -> None:
    """Views show the bytes that are away, and what is saved from them is what the device would have given.

    It loads into a fresh trainer, and nothing has moved or changed for it.
    """
    trainer = trained(case)
    manager = case.manager(trainer)
    need_megastow(case, manager, _WHY_NOT)
    cycle(case, manager, trainer)
    on_device = oracle.snapshot(leaves(trainer.checkpoint()))  # first: it gathers weights, which needs the device
    before = oracle.snapshot(trainer.named_state())
    layouts = {name: _layout(tensor) for name, tensor in trainer.named_state().items()}
    with away(case, manager, trainer):
        released = _released(trainer)
        assert released, "nothing is away"
        views = {name: manager.host_tensor(tensor) for name, tensor in released.items()}
        oracle.assert_same({name: before[name] for name in views}, oracle.snapshot(views), "views")
        odd = [name for name, view in views.items() if _layout(view) != layouts[name] or view.device.type != "cpu"]
        assert not odd, f"views that lie otherwise than what they show: {odd}"
        listed = [view for kind in KINDS[:3] for view in manager.host_state_dict(kind).values()]
        missing = {oracle.storage_key(view) for view in views.values()} - {oracle.storage_key(view) for view in listed}
        assert not missing, f"host_state_dict leaves out {len(missing)} storages"
        saved = through_a_file(manager.on_host(trainer.live_checkpoint))
        oracle.assert_same(on_device, oracle.snapshot(leaves(saved)), "a checkpoint saved while away")
        assert _released(trainer).keys() == released.keys()
        assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}
    oracle.assert_same(before, oracle.snapshot(trainer.named_state()), "state after it was looked at")
    fresh = case.build()
    fresh.restore(saved)
    oracle.assert_same(before, oracle.snapshot(fresh.named_state()), "state after a load")


def host_state_sharded(case: Case) -> None:
    """The same with Megatron's distributed checkpoints, whose writers are processes of their own."""
    folder = shared_folder(case)
    trainer = trained(case)
    manager = case.manager(trainer)
    need_megastow(case, manager, _WHY_NOT)
    cycle(case, manager, trainer)
    before = oracle.snapshot(trainer.named_state())
    with away(case, manager, trainer):
        trainer.save_sharded(folder, manager.on_host(trainer.sharded_checkpoint))
    fresh = case.build()
    fresh.load_sharded(folder)
    oracle.assert_same(before, oracle.snapshot(fresh.named_state()), "state after a load")
    torch.distributed.barrier()  # rank 0 removes the folder as soon as it is through


def _released(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The state that has no memory at present."""
    return {name: tensor for name, tensor in trainer.named_state().items() if not oracle.has_memory(tensor)}


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    size = tensor.untyped_storage().nbytes()
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), size
