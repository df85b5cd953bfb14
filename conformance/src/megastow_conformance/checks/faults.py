"""Checks of what goes wrong: a fault at every step of a move, and use of what is away."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from megastow import CorruptionError, OffloadedError, Residency, faults
from megastow.storages import byte_view, list_storages
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, cycle, everything, need_megastow, trained
from megastow_conformance.checks.watches import FailingOperation
from megastow_conformance.trainer import Point, Trainer

if TYPE_CHECKING:
    from megastow import MemoryManager

_SMALL: dict[str, Any] = {"bucket_bytes": 4096, "chunk_bytes": 2048}


def failure(case: Case) -> None:
    """A fault at each step of each move: nothing is lost, residency tells the truth, the same call then succeeds.

    In the core scope every step is struck early and late, but not by each error both times.
    """
    trainer = trained(case)
    before = _after_an_ordinary_cycle(case, trainer, keep_grads=True)
    for number, name in enumerate(name for name in faults.POINTS if not name.startswith(("disk", "derive"))):
        first, second = _ERRORS if number % 2 else _ERRORS[::-1]
        strikes = [(first, 0), (second, 2), (second, 0), (first, 2)]
        for error, after in strikes if case.row.scope == "full" else strikes[:2]:
            _strike(case, trainer, name, error, after)
            oracle.assert_same(
                before, oracle.snapshot(everything(trainer, grads=True)), f"{error.__name__} at {name}, {after}"
            )


_ERRORS = (RuntimeError, KeyboardInterrupt)


def _after_an_ordinary_cycle(case: Case, trainer: Trainer, *, keep_grads: bool) -> oracle.Snapshot:
    """All bytes after a move that nothing has disturbed: what that does to them is for other invariants to judge."""
    manager = case.manager(trainer, **_SMALL)
    cycle(case, manager, trainer, keep_grads=keep_grads)
    manager.close()
    return oracle.snapshot(everything(trainer, grads=True))


def failure_of_any_operation(case: Case) -> None:
    """The same for a fault inside torch, in whichever operation of a move; knows nothing of how the move is made."""
    trainer = trained(case)
    before = _after_an_ordinary_cycle(case, trainer, keep_grads=False)
    manager = case.manager(trainer, **_SMALL)
    struck = {"offload": 0, "onload": 0}
    number = 0
    while number < _MOST_OPERATIONS:
        for call, resting in ((_offload, Residency.RESIDENT), (_onload, Residency.OFFLOADED)):
            what = f"{call.__name__[1:]} with a fault in operation {number} of torch"
            fault = FailingOperation(number)
            try:
                with fault:
                    call(manager)
            except Exception as raised:
                assert fault.struck, f"{what}: {raised!r} without a fault"
                where = {kind: manager.residency(kind) for kind in KINDS}
                assert set(where.values()) == {resting}, f"{what}: {where}"
                struck[call.__name__[1:]] += 1
                call(manager)
            else:
                assert not fault.struck, f"{what} told nobody of it"
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), f"operation {number}")
        number += 1 + number // 4
    assert all(struck.values()), f"faults that struck: {struck}"


_MOST_OPERATIONS = 400


def _offload(manager: MemoryManager) -> None:
    manager.offload()


def _onload(manager: MemoryManager) -> None:
    manager.onload()


def _strike(case: Case, trainer: Trainer, name: str, error: type[BaseException], after: int) -> None:
    """Make a new manager fail at one point, in whichever move passes it, and repeat the call."""
    manager = case.manager(trainer, **_SMALL)
    need_megastow(case, manager, "only megastow's own moves have named steps")
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


def damaged_copy(case: Case) -> None:
    """With digests, a byte that is copied wrong is reported, and the host copy kept: by the same call, or as it is."""
    trainer = trained(case)
    manager = case.manager(trainer, verify="digest", **_SMALL)
    need_megastow(case, manager, "only megastow's own copies can be damaged on the way")
    manager.close()
    before = oracle.snapshot(everything(trainer, grads=True))
    if oracle.differences(before, _after_an_ordinary_cycle(case, trainer, keep_grads=True)):
        return  # what loses bytes without being disturbed is for another invariant to judge
    damaged = [kind for kind in KINDS if _damage_a_copy(case, trainer, kind)]
    assert damaged, "there was nothing to damage"


def _damage_a_copy(case: Case, trainer: Trainer, kind: str) -> bool:
    """Change one bit of a kind on its way back, and then on its way out; whether there was one.

    Each by a manager of its own, whose first offload copies each byte once; a later one may begin with copies in vain.
    """
    before = oracle.snapshot(everything(trainer, grads=True))
    manager = case.manager(trainer, verify="digest", **_SMALL)
    if not manager.offload(kind, keep_grads=True).host_bytes:
        manager.close()
        return False
    with faults.meddle("onload.copied", _flip_a_bit):
        error = _corruption(manager, kind)
    assert not error.host_is_damaged, f"{kind} was damaged on its way back: {error}"
    manager.onload(kind)
    oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), f"{kind}, brought back once more")
    kept = _storages(manager, kind)
    manager.close()
    manager = case.manager(trainer, verify="digest", **_SMALL)
    with faults.meddle("offload.copied", _flip_a_bit):
        manager.offload(kind, keep_grads=True)
    for _ in range(2):
        error = _corruption(manager, kind)
        assert error.host_is_damaged, f"{kind} was damaged on its way out: {error}"
    manager.onload(kind, unverified=True)
    found = oracle.differences(kept, _storages(manager, kind))
    manager.close()
    assert found, f"{kind} came back whole, and was called damaged"
    found += oracle.differences(before, oracle.snapshot(everything(trainer, grads=True)))
    assert all(" differs in 1 of " in each for each in found), f"one bit of {kind} was damaged: {found}"
    return True


def _storages(manager: MemoryManager, kind: str) -> oracle.Snapshot:
    """The bits of all that a manager would move of a kind; what a forward pass has left is named by no trainer."""
    records = list_storages(manager._trainer.inventory()).values()
    return oracle.snapshot({record.names[0]: byte_view(record.storage) for record in records if record.kind == kind})


def _corruption(manager: MemoryManager, kind: str) -> CorruptionError:
    """The error of an onload that finds a kind damaged, and leaves it in host memory."""
    try:
        manager.onload(kind)
    except CorruptionError as error:
        assert list(error.tensors) == [kind] and error.tensors[kind], f"{kind} was damaged, and not {error.tensors}"
        assert error.tensors[kind][0] in str(error), f"{error} does not name it"
        assert manager.residency(kind) is Residency.OFFLOADED, f"{kind} is damaged and {manager.residency(kind)}"
        return error
    raise AssertionError(f"{kind} was damaged on the way, and nobody said so")


def _flip_a_bit(data: torch.Tensor) -> None:
    """In the first byte of a chunk; what may still write to it is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    data[:1] ^= 1


def guard(case: Case) -> None:
    """Every use of what is away raises an `OffloadedError` that names it; afterwards nothing is left of the guard."""
    trainer = trained(case)
    manager = case.manager(trainer)
    owners = trainer.parts()
    attributes = [dict(vars(owner)) for owner in owners]
    cycle(case, manager, trainer)
    state = oracle.snapshot(trainer.named_state())
    for kind in KINDS:
        manager.offload(kind)
        for what, call in trainer.uses(kind):
            try:
                call()
            except OffloadedError as error:
                assert kind in str(error) and "onload" in str(error), f"{what}: {error}"
            except Exception as error:
                raise AssertionError(f"{what} was not refused while {kind} was away: {error!r}") from error
            else:
                raise AssertionError(f"{what} went through while {kind} was away")
        manager.onload(kind)
        for owner, before in zip(owners, attributes, strict=True):
            differing = vars(owner).keys() ^ before.keys()
            differing |= {name for name in vars(owner).keys() & before.keys() if vars(owner)[name] is not before[name]}
            assert not differing, f"the guard left something on {type(owner).__name__}: {sorted(differing)}"
    oracle.assert_same(state, oracle.snapshot(trainer.named_state()), "after calls that were refused")


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
    trainer.clear_grads()
    gc.collect()
    cycle(case, manager, trainer)
    trainer.train_step(2)


def interrupted_block(case: Case) -> None:
    """An exception inside `with offloaded()` comes out as it is, with everything back on the device."""
    trainer = trained(case)
    manager = case.manager(trainer)
    cycle(case, manager, trainer)
    before = oracle.snapshot(everything(trainer, grads=True))
    try:
        with manager.offloaded():
            raise LookupError("the rollout failed")
    except LookupError as error:
        assert str(error) == "the rollout failed"
    else:
        raise AssertionError("the exception was swallowed")
    assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
    oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), "after an exception in the block")
