"""Checks of whole training runs: whatever is moved in between, the run is the undisturbed one, bit for bit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import (
    STEPS,
    assert_continues,
    away,
    cycle,
    shuffled,
    trained,
    twin,
)
from megastow_conformance.trainer import Point, StepRecord, Trainer

_GRADS_ARE_DEAD = (Point.AFTER_STEP, Point.AFTER_ZERO_GRAD)


def training(case: Case) -> None:
    """A cycle of everything after each step, gradients dropped as in a real job."""
    _run_with_moves(case, {Point.AFTER_ZERO_GRAD}, keep_grads=False)


def training_drops_used_grads(case: Case) -> None:
    """The same between `optimizer.step` and the clearing of gradients, which the step has used up."""
    _run_with_moves(case, {Point.AFTER_STEP}, keep_grads=False)


def training_every_point(case: Case) -> None:
    """A cycle at every point of every step, gradients kept: mid-accumulation, around forward, backward and sync."""
    _run_with_moves(case, set(Point), keep_grads=True)


def training_with_subsets(case: Case) -> None:
    """At random points, random kinds."""
    choose = shuffled(case)
    kinds = ("weights", "main_weights", "optimizer_states", "grad_buffers")

    def move(manager: Any, trainer: Trainer, point: Point) -> None:
        subset = choose.sample(kinds, choose.randint(1, 4))
        cycle(case, manager, trainer, *subset, keep_grads=point not in _GRADS_ARE_DEAD)

    _compare_run(case, move)


def _run_with_moves(case: Case, points: set[Point], *, keep_grads: bool) -> None:
    def move(manager: Any, trainer: Trainer, point: Point) -> None:
        if point in points:
            cycle(case, manager, trainer, keep_grads=keep_grads)

    _compare_run(case, move)


def _compare_run(case: Case, move: Any) -> None:
    expected = twin(case)
    trainer = case.build()
    manager = case.manager(trainer, bucket_bytes=32 << 10)
    moves = 0

    def at(point: Point) -> None:
        nonlocal moves
        moves += 1
        move(manager, trainer, point)

    records: list[StepRecord] = []
    for index in range(STEPS):
        records.append(trainer.train_step(index, at))
        assert records[-1] == expected.records[index], (
            f"step {index} was {records[-1]}, undisturbed it was {expected.records[index]}"
        )
    assert moves >= STEPS * (len(Point) - 1), f"only {moves} points were reached"
    if case.scenario.initial_loss_scale is not None:
        assert [record.updated for record in records].count(False) == 1, "the loss scaler was to overflow once"
    oracle.assert_same(expected.state, oracle.snapshot(trainer.named_state()), "state at the end")


def forward_without_optimizer(case: Case) -> None:
    """While all but the weights is away, the model still computes the same: log-probabilities between phases."""
    outcomes = []
    for offload in (False, True):
        trainer = trained(case)
        trainer.gather_weights()
        if offload:
            manager = case.manager(trainer)
            with away(case, manager, trainer, "main_weights", "optimizer_states", "grad_buffers"):
                losses = trainer.evaluate(2)
        else:
            losses = trainer.evaluate(2)
        outcomes.append((losses, trainer.train_step(2), oracle.snapshot(trainer.named_state())))
        if not offload:
            trainer.close()
    (losses, record, state), (other_losses, other_record, other_state) = outcomes
    assert losses == other_losses, "a forward pass gives something else while the optimizer is away"
    assert record == other_record
    oracle.assert_same(state, other_state, "state a step later")


def grads(case: Case) -> None:
    """Gradient buffers come back zeroed, are the same tensors, and reduce correctly.

    Once a step has used its gradients up, whatever is in their memory is worth nothing: here, rubbish. Unless it is
    the only copy of new weights, which then has to come back as it was.
    """
    trainer = trained(case, steps=1)
    seen: dict[str, tuple[int, int]] = {}
    manager = case.manager(trainer)

    def at(point: Point) -> None:
        if point is not Point.AFTER_STEP:
            return
        staged = {oracle.storage_key(tensor) for tensor in trainer.staged_weights()}
        tensors = {name: t for name, t in trainer.named_grads().items() if t.device == case.device}
        kept = {name: t for name, t in tensors.items() if oracle.storage_key(t) in staged}
        before = oracle.snapshot(kept)
        with torch.no_grad():
            for name in tensors.keys() - kept.keys():
                tensors[name].fill_(1.0)
        seen.update({name: (id(t), oracle.storage_key(t)) for name, t in tensors.items()})
        with away(case, manager, trainer, "grad_buffers"):
            pass
        after = {name: t for name, t in trainer.named_grads().items() if t.device == case.device}
        assert {n: (id(t), oracle.storage_key(t)) for n, t in after.items()} == seen, "other gradient tensors came back"
        if kept:
            oracle.assert_same(before, oracle.snapshot(kept), "weights in gradient memory")
        dirty = [name for name in after.keys() - kept.keys() if bool(oracle.as_bytes(after[name]).any())]
        assert not dirty, f"not zeroed: {sorted(dirty)[:5]}"

    trainer.train_step(1, at)
    assert seen
    assert_continues(case, trainer)


def load_state_dict(case: Case) -> None:
    """A load of model and optimizer state between two cycles is an ordinary thing, and leaves no memory behind."""
    trainer = trained(case)
    manager = case.manager(trainer, bucket_bytes=32 << 10)
    saved = trainer.checkpoint()
    cycle(case, manager, trainer)
    for _ in range(3):
        trainer.restore(saved)
        cycle(case, manager, trainer)
    host_bytes, device_bytes = manager.host_bytes, oracle.live_bytes(case.device)
    for _ in range(3):
        trainer.restore(saved)
        cycle(case, manager, trainer)
    assert manager.host_bytes == host_bytes, "host memory grows with each load"
    assert oracle.live_bytes(case.device) == device_bytes, "device memory grows with each load"
    assert_continues(case, trainer)


def checkpoint(case: Case) -> None:
    """What is saved after a cycle is what would have been saved without it, and a fresh trainer goes on from it."""
    undisturbed = trained(case)
    plain = oracle.snapshot(_leaves(undisturbed.checkpoint()))
    undisturbed.close()
    trainer = trained(case)
    manager = case.manager(trainer)
    cycle(case, manager, trainer)
    saved = trainer.checkpoint()
    oracle.assert_same(plain, oracle.snapshot(_leaves(saved)), "checkpoint")
    fresh = case.build()
    fresh_manager = case.manager(fresh)
    cycle(case, fresh_manager, fresh)
    fresh.restore(saved)
    cycle(case, fresh_manager, fresh)
    assert_continues(case, fresh)


def checkpoint_sharded(case: Case) -> None:
    """The same with Megatron's distributed checkpoints: one saved before a cycle and one after it are as good."""
    before, after = _shared_folder(case), _shared_folder(case)
    trainer = trained(case)
    manager = case.manager(trainer)
    trainer.save_sharded(before)
    cycle(case, manager, trainer)
    trainer.save_sharded(after)
    assert_continues(case, trainer)
    for folder in (before, after):
        fresh = case.build()
        fresh_manager = case.manager(fresh)
        cycle(case, fresh_manager, fresh)
        fresh.load_sharded(folder)
        cycle(case, fresh_manager, fresh)
        assert_continues(case, fresh)


def _shared_folder(case: Case) -> Path:
    """A new folder that every rank knows, removed when the check is over."""
    name = [""]
    if case.rank == 0:
        name = [tempfile.mkdtemp(prefix="megastow-")]
        case.on_close(partial(shutil.rmtree, name[0], ignore_errors=True))
    torch.distributed.broadcast_object_list(name)
    return Path(name[0])


def _leaves(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, (list, tuple)):
        items = iter(enumerate(value))
    for key, item in items:
        found.update(_leaves(item, f"{path}/{key}"))
    return found
