"""Checks of the interface on real trainers: the classic names, host memory ahead of time, layouts that are refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megastow import (
    InvalidArgumentError,
    Residency,
    UnsupportedLayoutError,
    create_memory_manager,
    create_trainer_memory_manager,
)
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, assert_continues, everything, trained

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def classic(case: Case) -> None:
    """The classic factory and the eight classic names; what the factory is told is checked against what is there."""
    trainer = trained(case)
    scenario = case.scenario
    told = {
        "use_distributed_optimizer": scenario.distributed_optimizer and not scenario.mixed_chain,
        "accumulate_allreduce_grads_in_fp32": scenario.grad_reduce_in_fp32,
        "params_dtype": _DTYPES[scenario.precision],
    }
    wrong_values = {
        "use_distributed_optimizer": not told["use_distributed_optimizer"],
        "accumulate_allreduce_grads_in_fp32": not told["accumulate_allreduce_grads_in_fp32"],
        "params_dtype": torch.float64,
    }
    for name, value in wrong_values.items():
        try:
            create_trainer_memory_manager(trainer.model, trainer.optimizer, **{**told, name: value})  # type: ignore[arg-type]
        except InvalidArgumentError as error:
            assert name in str(error)
        else:
            raise AssertionError(f"{name}={value} was believed")
    manager = create_trainer_memory_manager(trainer.model, trainer.optimizer, **told, bucket_size_mb=1)  # type: ignore[arg-type]
    case.on_close(manager.close)
    manager.offload_optimizer_states()
    manager.offload_main_weights()
    manager.free_grad_buffers()
    manager.offload_weights()
    assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}
    manager.onload_weights()
    manager.build_grad_buffers()
    manager.onload_main_weights()
    manager.onload_optimizer_states()
    assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
    assert_continues(case, trainer)


def prepared(case: Case) -> None:
    """Host memory that is made ready beside a training step is what the first offload then uses."""
    trainer = trained(case, steps=1)
    manager = case.manager(trainer)
    manager.prepare()
    trainer.train_step(1)
    manager.prepare(wait=True)
    ready = manager.host_bytes
    report = manager.offload()
    assert ready == manager.host_bytes, f"{ready} bytes were prepared, {manager.host_bytes} are held after the offload"
    assert report.host_bytes <= ready
    manager.onload()
    assert_continues(case, trainer)


def refused(case: Case) -> None:
    """A layout that cannot be moved is refused by name, before anything is touched; without it all is well again.

    The trainer is real. That a buffer is registered with NCCL or a CUDA graph was captured is put on by hand, in the
    place where Megatron would show it, since neither can be made on every machine.
    """
    trainer = trained(case)
    manager = case.manager(trainer)
    before = oracle.snapshot(everything(trainer, grads=True))
    for name, owner, attribute, value in trainer.unsupported_layouts():
        with _attribute(owner, attribute, value):
            for call in (manager.offload, lambda: create_memory_manager(trainer.model, trainer.optimizer)):
                _expect_refusal(call, name)
            assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), f"after refusing {name}")
    for wrapper in trainer.foreign_wrappers():
        _expect_refusal(lambda wrapper=wrapper: create_memory_manager(wrapper), "bucket_groups")
    manager.offload()
    manager.onload()
    assert_continues(case, trainer)


def _expect_refusal(call: Any, name: str) -> None:
    try:
        call()
    except UnsupportedLayoutError as error:
        assert name in str(error), f"the refusal does not say {name}: {error}"
    else:
        raise AssertionError(f"{name} was not refused")


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute for the length of the block."""
    attributes = vars(owner)
    before = dict(attributes)
    attributes[name] = value
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)
