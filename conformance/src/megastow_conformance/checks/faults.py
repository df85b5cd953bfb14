"""Checks of what goes wrong: a fault at every step of a move, and use of what is away."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import torch

from megastow import OffloadedError, Residency, faults
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, assert_continues, cycle, everything, trained
from megastow_conformance.trainer import Point, Trainer


def failure(case: Case) -> None:
    """A fault at each step of each move: nothing is lost, residency tells the truth, the same call then succeeds."""
    trainer = trained(case)
    before = oracle.snapshot(everything(trainer, grads=True))
    for name in faults.POINTS:
        for error in (RuntimeError, KeyboardInterrupt):
            for after in (0, 2):
                _strike(case, trainer, name, error, after)
                oracle.assert_same(
                    before, oracle.snapshot(everything(trainer, grads=True)), f"{error.__name__} at {name}, {after}"
                )
    assert_continues(case, trainer)


def _strike(case: Case, trainer: Trainer, name: str, error: type[BaseException], after: int) -> None:
    """Make a new manager fail at one point, in whichever move passes it, and repeat the call."""
    manager = case.manager(trainer, bucket_bytes=4096, chunk_bytes=2048)
    onloading = name.startswith("onload")
    if onloading:
        manager.offload(keep_grads=True)
        call: Callable[[], object] = manager.onload
        resting = Residency.OFFLOADED
    else:
        call = lambda: manager.offload(keep_grads=True)  # noqa: E731 - one of two calls
        resting = Residency.RESIDENT
    struck = False
    with faults.inject(name, lambda: error("injected"), after=after) as passed:
        try:
            call()
        except BaseException as raised:
            struck = True
            assert "injected" in str(raised) or "injected" in str(raised.__cause__), f"{raised!r} hides the cause"
            where = {kind: manager.residency(kind) for kind in KINDS}
            assert set(where.values()) == {resting}, f"after a fault at {name}: {where}"
    may_be_missing = after > 0 or name.startswith("pack")
    assert struck or may_be_missing, f"nothing passed {name}"
    assert struck == (passed[0] > after)
    if struck:
        call()
    manager.onload()
    manager.close()


def guard(case: Case) -> None:
    """Every use of what is away raises an `OffloadedError` that names it; afterwards nothing is left of the guard."""
    trainer = trained(case)
    manager = case.manager(trainer)
    owners = [m for chunk in trainer.model for m in chunk.modules()]
    owners += [trainer.optimizer, *_parts(trainer.optimizer)]
    owners += [g for chunk in trainer.model for g in (*chunk.bucket_groups, *chunk.buffers)]  # type: ignore[misc]
    attributes = [dict(vars(owner)) for owner in owners]
    state = trainer.model[0].state_dict()
    for kind in KINDS:
        manager.offload(kind)
        for what, call in _uses(trainer, state, kind):
            try:
                call()
            except OffloadedError as error:
                assert kind in str(error) and "onload" in str(error), f"{what}: {error}"
            else:
                raise AssertionError(f"{what} went through while {kind} was away")
        manager.onload(kind)
        for owner, before in zip(owners, attributes, strict=True):
            assert vars(owner).keys() == before.keys(), f"the guard left something on {type(owner).__name__}"
            assert all(vars(owner)[name] is value for name, value in before.items())
    assert_continues(case, trainer)


def _parts(optimizer: Any) -> list[Any]:
    children = getattr(optimizer, "chained_optimizers", None)
    if children is not None:
        return [part for child in children for part in (child, *_parts(child))]
    return [optimizer.optimizer] if optimizer.optimizer is not None else []


def _uses(trainer: Trainer, state: Any, kind: str) -> list[tuple[str, Callable[[], object]]]:
    """Calls that touch a kind, with their names."""
    model, optimizer = trainer.model[0], trainer.optimizer
    inner: Any = model.module
    nothing = torch.zeros(1)
    uses: list[tuple[str, Callable[[], object]]] = [("optimizer.step", optimizer.step)]
    if kind == "weights":
        uses += [
            ("training step", lambda: trainer.train_step(2)),
            ("forward", lambda: model(nothing)),
            ("forward of the inner module", lambda: inner(nothing)),
            ("direct forward", lambda: inner.forward(nothing)),
            ("state_dict", model.state_dict),
            ("inner state_dict", inner.state_dict),
            ("load_state_dict", lambda: model.load_state_dict(state)),
            ("deepcopy", lambda: copy.deepcopy(inner)),
            ("pickle", lambda: pickle.dumps(inner)),
            ("to", lambda: inner.to(torch.float64)),
            ("reload_model_params", optimizer.reload_model_params),
        ]
        if hasattr(inner, "sharded_state_dict"):
            uses.append(("sharded_state_dict", inner.sharded_state_dict))
        if trainer.scenario.distributed_optimizer:
            uses.append(("start_param_sync", lambda: model.start_param_sync()))  # type: ignore[operator]
    if kind in ("main_weights", "optimizer_states"):
        uses += [
            ("optimizer.state_dict", optimizer.state_dict),
            ("optimizer.load_state_dict", lambda: optimizer.load_state_dict({})),
            ("optimizer.sharded_state_dict", lambda: optimizer.sharded_state_dict({})),
        ]
    if kind == "grad_buffers":
        uses += [
            ("zero_grad_buffer", lambda: model.zero_grad_buffer()),  # type: ignore[operator]
            ("finish_grad_sync", lambda: model.finish_grad_sync()),  # type: ignore[operator]
            ("optimizer.zero_grad", optimizer.zero_grad),
        ]
    return uses


def guard_backward(case: Case) -> None:
    """A backward pass through a graph from before the offload raises; its state is then as if it had not been tried."""
    trainer = trained(case)
    manager = case.manager(trainer)
    for kind in ("weights", "grad_buffers"):
        reached: list[str] = []

        def at(point: Point, kind: str = kind, reached: list[str] = reached) -> None:
            if point is Point.AFTER_FORWARD:
                reached.append(kind)
                manager.offload(kind, keep_grads=True)

        try:
            trainer.train_step(2, at)
        except OffloadedError as error:
            assert "backward" in str(error) and kind in str(error)
        else:
            raise AssertionError(f"a backward pass went through while {kind} was away")
        assert reached
        manager.onload()
    # The interrupted steps have left half a step's gradients behind; clear them as a caller would, and train on.
    for chunk in trainer.model:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    trainer.optimizer.zero_grad()
    gc.collect()
    cycle(case, manager, trainer)
    trainer.train_step(2)


def interrupted_block(case: Case) -> None:
    """An exception inside `with offloaded()` comes out as it is, with everything back on the device."""
    trainer = trained(case)
    manager = case.manager(trainer)
    try:
        with manager.offloaded():
            raise LookupError("the rollout failed")
    except LookupError as error:
        assert str(error) == "the rollout failed"
    assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
    assert_continues(case, trainer)
