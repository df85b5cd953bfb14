"""Checks of whole training runs: whatever is moved in between, the run is the undisturbed one, bit for bit."""

from __future__ import annotations

import contextlib
from typing import Any

from megastow import MegastowError, faults
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import (
    KINDS,
    STEPS,
    assert_continues,
    away,
    cycle,
    need_megastow,
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
    """At every point, random kinds, one by one out and in another order back."""
    choose = shuffled(case)

    def move(manager: Any, trainer: Trainer, point: Point) -> None:
        out = choose.sample(KINDS, choose.randint(1, len(KINDS)))
        with contextlib.ExitStack() as stack:
            for kind in out:
                stack.enter_context(away(case, manager, trainer, kind, keep_grads=point not in _GRADS_ARE_DEAD))
            for kind in choose.sample(out, len(out)):
                manager.onload(kind)

    _compare_run(case, move)


def training_through_faults(case: Case) -> None:
    """After each step moves are made to fail, and repeated: at every point; in the core scope at a third of them."""
    choose = shuffled(case)
    struck = 0

    def move(manager: Any, trainer: Trainer, point: Point) -> None:
        nonlocal struck
        need_megastow(case, manager, "only megastow's own moves have named steps")
        if point is not Point.AFTER_ZERO_GRAD:
            return
        points = [name for name in faults.POINTS if not name.startswith(("disk", "derive"))]
        most = len(points) // (1 if case.row.scope == "full" else 3)
        for name in choose.sample(points, most):
            try:
                with faults.inject(name, lambda: RuntimeError("injected"), after=choose.randint(0, 2)):
                    cycle(case, manager, trainer)
            except MegastowError:
                struck += 1
            manager.offload()
            manager.onload()

    _compare_run(case, move)
    assert struck, "no fault struck"


def training_in_background(case: Case) -> None:
    """Everything goes out and back in the background; the next step begins at once, and waits by itself."""

    def move(manager: Any, trainer: Trainer, point: Point) -> None:
        need_megastow(case, manager, "moves in the background are megastow's own")
        if point is Point.AFTER_ZERO_GRAD:
            manager.offload(non_blocking=True)
            manager.onload(non_blocking=True)

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
    manager.onload()
    assert moves >= STEPS * (len(Point) - 1), f"only {moves} points were reached"
    if case.scenario.initial_loss_scale is not None:
        assert [record.updated for record in records].count(False) == 1, "the loss scaler was to overflow once"
    oracle.assert_same(expected.state, oracle.snapshot(trainer.named_state()), "state at the end")


def training_resumed(case: Case) -> None:
    """A fresh trainer goes on from what was saved after a cycle as the old one would have."""
    trainer = trained(case)
    cycle(case, case.manager(trainer), trainer)
    saved = trainer.checkpoint()
    fresh = case.build()
    manager = case.manager(fresh)
    cycle(case, manager, fresh)
    fresh.restore(saved)
    cycle(case, manager, fresh)
    assert_continues(case, fresh)


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
