"""Checks of the interface on real trainers: the classic names, and host memory that is made ready ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from megastow import InvalidArgumentError, Residency, create_trainer_memory_manager
from megastow_conformance import oracle, toy_model
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, away, cycle, need_megastow, trained


def classic(case: Case) -> None:
    """The eight classic names move what they say, in the order in which they are classically called."""
    trainer = trained(case)
    manager = case.manager(trainer)
    need_megastow(case, manager, "the classic names are megastow's")
    cycle(case, manager, trainer)
    before = oracle.snapshot(trainer.named_state())
    gone: set[str] = set()
    for kind, offload in (
        ("optimizer_states", manager.offload_optimizer_states),
        ("main_weights", manager.offload_main_weights),
        ("grad_buffers", manager.free_grad_buffers),
        ("weights", manager.offload_weights),
    ):
        offload()
        gone.add(kind)
        assert {k for k in KINDS if manager.residency(k) is Residency.OFFLOADED} == gone
    for kind, onload in (
        ("weights", manager.onload_weights),
        ("grad_buffers", manager.build_grad_buffers),
        ("main_weights", manager.onload_main_weights),
        ("optimizer_states", manager.onload_optimizer_states),
    ):
        onload()
        gone.remove(kind)
        assert {k for k in KINDS if manager.residency(k) is Residency.OFFLOADED} == gone
    oracle.assert_same(before, oracle.snapshot(trainer.named_state()), "after the classic names")


def classic_factory(case: Case) -> None:
    """What megastow's classic factory is told is checked against what is there."""
    trainer = case.build()
    need_megastow(case, case.manager(trainer), "the classic factory is megastow's")
    scenario = case.scenario
    told: dict[str, Any] = {
        "use_distributed_optimizer": scenario.distributed_optimizer and not scenario.mixed_chain,
        "accumulate_allreduce_grads_in_fp32": scenario.grad_reduce_in_fp32,
        "params_dtype": toy_model.DTYPES[scenario.precision],
    }
    wrong_values = {
        "use_distributed_optimizer": not told["use_distributed_optimizer"],
        "accumulate_allreduce_grads_in_fp32": not told["accumulate_allreduce_grads_in_fp32"],
        "params_dtype": torch.float64,
    }
    for name, value in wrong_values.items():
        try:
            create_trainer_memory_manager(trainer.model, trainer.optimizer, **{**told, name: value})
        except InvalidArgumentError as error:
            assert name in str(error)
        else:
            raise AssertionError(f"{name}={value} was believed")
    manager = create_trainer_memory_manager(trainer.model, trainer.optimizer, **told, bucket_size_mb=1)
    case.on_close(manager.close)
    assert manager.offload("weights").device_bytes
    manager.onload()


def prepared(case: Case) -> None:
    """What is made ready beside a training step is what the first offload then uses."""
    trainer = trained(case, steps=1)
    manager = case.manager(trainer)
    need_megastow(case, manager, "preparing is megastow's own")
    manager.prepare()
    trainer.train_step(1)
    manager.prepare(wait=True)
    ready = manager.host_bytes
    report = manager.offload()
    assert ready == manager.host_bytes, f"{ready} bytes were prepared, {manager.host_bytes} are held after the offload"
    assert report.host_bytes <= ready
    manager.onload()


def prepared_while_away(case: Case) -> None:
    """Making host memory ready leaves alone what is kept there of kinds that are away."""
    trainer = trained(case)
    manager = case.manager(trainer)
    need_megastow(case, manager, "preparing is megastow's own")
    cycle(case, manager, trainer)
    before = oracle.snapshot(trainer.named_state())
    for kind in KINDS:
        with away(case, manager, trainer, kind):
            manager.prepare(wait=True)
        oracle.assert_same(before, oracle.snapshot(trainer.named_state()), f"prepared while {kind} was away")
