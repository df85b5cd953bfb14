"""Checks of ranks that move together: what goes wrong on one of them is undone on all, and said on all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megastow import AgreementError, PeerError, Residency, faults
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, STEPS, everything, need_megastow, trained
from megastow_conformance.checks.faults import _ERRORS, _SMALL, _after_an_ordinary_cycle
from megastow_conformance.trainer import Trainer

if TYPE_CHECKING:
    from megastow import MemoryManager

_LIMIT_SECONDS = 30.0
"""How long ranks wait for each other here. Nothing in these checks takes that: errors are told, not waited for."""

_STEPS_OF_A_MOVE = tuple(name for name in faults.POINTS if name.startswith(("host", "offload", "onload")))


def failure_of_one_rank(case: Case) -> None:
    """A fault on one rank: all raise and undo the move, the same call then succeeds on all, and training goes on.

    In the core scope every step is struck once, on each rank in turn; else on all of them.
    """
    undisturbed = trained(case)
    before = _after_an_ordinary_cycle(case, undisturbed, keep_grads=True)
    expected = [undisturbed.train_step(index) for index in range(2, STEPS)]
    trainer = trained(case)
    _after_an_ordinary_cycle(case, trainer, keep_grads=True)
    manager = _together(case, trainer)
    for number, name in enumerate(_STEPS_OF_A_MOVE):
        for rank in range(case.world) if case.row.scope == "full" else [number % case.world]:
            error = _ERRORS[(number // case.world + rank) % 2]
            if name.startswith("host"):  # a manager takes host memory once
                manager.close()
                manager = _together(case, trainer)
            _strike_one_rank(case, manager, trainer, before, _Strike(name, error, rank))
    assert [trainer.train_step(index) for index in range(2, STEPS)] == expected, "steps after faults are others"
    end = oracle.snapshot(undisturbed.named_state())
    oracle.assert_same(end, oracle.snapshot(trainer.named_state()), "state after training on")


def different_calls(case: Case) -> None:
    """Ranks that move different kinds are told so, all of them, and nothing has moved; the same call then succeeds."""
    trainer = trained(case)
    before = _after_an_ordinary_cycle(case, trainer, keep_grads=True)
    manager = _together(case, trainer)
    for direction, resting in (("offload", Residency.RESIDENT), ("onload", Residency.OFFLOADED)):
        try:
            getattr(manager, direction)(KINDS[case.rank])
        except AgreementError as error:
            missing = [rank for rank in range(case.world) if f"{direction}({KINDS[rank]})" not in str(error)]
            assert not missing, f"what ranks {missing} called is not in: {error}"
        else:
            raise AssertionError(f"ranks moved different kinds: {direction}({KINDS[case.rank]}) went through here")
        assert _places(manager) == {resting}, f"after an {direction} of different kinds: {_places(manager)}"
        _move(manager, direction)
    _assert_same(before, trainer, "after calls that differed")


def _together(case: Case, trainer: Trainer) -> MemoryManager:
    """A manager whose ranks move together."""
    group = torch.distributed.group.WORLD
    manager = case.manager(trainer, group=group, agree_timeout=_LIMIT_SECONDS, **_SMALL)
    need_megastow(case, manager, "only megastow's own managers move together")
    return manager


@dataclass(frozen=True)
class _Strike:
    """A fault on one rank."""

    point: str
    error: type[BaseException]
    rank: int

    def __str__(self) -> str:
        return f"{self.error.__name__} at {self.point} on rank {self.rank}"


def _strike_one_rank(
    case: Case, manager: MemoryManager, trainer: Trainer, before: oracle.Snapshot, what: _Strike
) -> None:
    """Make whichever move passes a point fail at it on one rank, and repeat the call."""
    if what.point.startswith("onload"):
        _move(manager, "offload")
        direction, resting, other = "onload", Residency.OFFLOADED, Residency.RESIDENT
    else:
        direction, resting, other = "offload", Residency.RESIDENT, Residency.OFFLOADED
    strikes = case.rank == what.rank
    with faults.inject(what.point, lambda: what.error("injected")) if strikes else contextlib.nullcontext():
        raised = _raised(lambda: _move(manager, direction))
    assert "injected" in f"{raised} {raised and raised.__cause__}", f"{what}, and here: {raised!r}"
    if strikes:
        assert not isinstance(raised, PeerError), f"{what} is taken for that of another: {raised!r}"
    else:
        assert isinstance(raised, PeerError) and raised.ranks == (what.rank,), f"{what} is not told as such: {raised!r}"
    assert _places(manager) == {resting}, f"after {what}: {_places(manager)}"
    if resting is Residency.RESIDENT:
        _assert_same(before, trainer, f"undone after {what}")
    _move(manager, direction)
    assert _places(manager) == {other}, f"after the call that repeats one with {what}: {_places(manager)}"
    manager.onload()
    _assert_same(before, trainer, f"repeated after {what}")


def _move(manager: MemoryManager, direction: str) -> None:
    """Move all kinds."""
    options: dict[str, Any] = {"keep_grads": True} if direction == "offload" else {}
    getattr(manager, direction)(**options)


def _raised(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


def _places(manager: MemoryManager) -> set[Residency]:
    return {manager.residency(kind) for kind in KINDS}


def _assert_same(before: oracle.Snapshot, trainer: Trainer, what: str) -> None:
    oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), what)
