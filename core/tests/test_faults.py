"""A move that fails at any step: all bytes recoverable, residency and guard truthful, the same call then works."""

import dis
import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch
from core_toys import KINDS, Trainer, assert_same, junk, raw, snapshot

import megastow
from megastow import (
    DeviceMemoryError,
    OffloadedError,
    Residency,
    TransferError,
    create_memory_manager,
    faults,
)
from megastow.device import CpuDevice

BACK = [name for name in faults.POINTS if name.startswith("onload") or name == "disk.read"]
ON_DISK = [name for name in faults.POINTS if name.startswith("disk")]
BY_WAY_OF_BUFFERS = ["host.allocate", "host.lock", *(name for name in faults.POINTS if "load" in name)]
ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)
SIZES = {"bucket_bytes": 4096, "chunk_bytes": 512}
TOKENS = torch.zeros(1, dtype=torch.long)


@functools.cache
def count(name, kinds, host_memory="pinned", disk_folder=None):
    """How often a move of `kinds` passes a point."""
    trainer = Trainer()
    trainer.step()
    where = {"host_memory": host_memory, "disk_folder": disk_folder}
    manager = create_memory_manager(trainer.model, trainer.optimizer, **SIZES, **where)
    with faults.inject(name, RuntimeError, after=1 << 40) as passed:
        manager.offload(*kinds, keep_grads=True)
        manager.onload()
    return passed[0]


def fails(call, name, error, after):
    ours = TransferError if issubclass(error, Exception) else error
    fault = faults.inject(name, lambda: error("injected"), after=after)
    with fault as passed, pytest.raises(ours, match="injected") as raised:
        call()
    assert passed[0] > after
    if issubclass(error, Exception):
        assert isinstance(raised.value.__cause__, error)


def assert_guarded(trainer, kind, away):
    """The guard says the same as the residency."""
    uses = {
        "weights": lambda: trainer.model(TOKENS),
        "main_weights": trainer.optimizer.step,
        "optimizer_states": trainer.optimizer.state_dict,
        "grad_buffers": trainer.optimizer.zero_grad,
    }
    if away:
        with pytest.raises(OffloadedError, match=kind):
            uses[kind]()
    elif kind == "weights":
        uses[kind]()


@pytest.mark.parametrize("kinds", [("weights",), ("optimizer_states",), ("grad_buffers",), KINDS], ids="+".join)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", [name for name in faults.POINTS if not name.startswith(("disk", "derive"))])
def test_every_step_can_fail(name, error, kinds):
    strike(name, error, kinds)


@pytest.mark.parametrize("kinds", [("optimizer_states",), KINDS], ids="+".join)
@pytest.mark.parametrize("error", ERRORS[1:])
@pytest.mark.parametrize("name", [*ON_DISK, *BY_WAY_OF_BUFFERS])
def test_every_step_can_fail_where_copies_are_on_disk(name, error, kinds, disk_folder):
    strike(name, error, kinds, host_memory="disk", disk_folder=disk_folder)


@pytest.mark.parametrize("error", ERRORS[1:])
@pytest.mark.parametrize("name", BY_WAY_OF_BUFFERS)
def test_every_step_can_fail_where_copies_are_pageable(name, error):
    strike(name, error, KINDS, host_memory="pageable")


def strike(name, error, kinds, **where):
    """Make a move fail at a step: early, late, and in between."""
    passes = count(name, kinds, **where)
    if not passes:
        assert name.startswith("pack"), f"nothing passes {name}"
        assert kinds == ("grad_buffers",)  # are never packed
    for after in sorted({0, passes // 2, passes - 1}) if passes else ():
        trainer = Trainer()
        trainer.step()
        before = snapshot(trainer.tensors())
        manager = create_memory_manager(trainer.model, trainer.optimizer, **SIZES, **where)
        if name in BACK:
            manager.offload(*kinds, keep_grads=True)
            call, resting = manager.onload, Residency.OFFLOADED
        else:
            call, resting = lambda m=manager: m.offload(*kinds, keep_grads=True), Residency.RESIDENT
        fails(call, name, error, after)
        for kind in KINDS:
            assert manager.residency(kind) is (resting if kind in kinds else Residency.RESIDENT)
            assert_guarded(trainer, kind, manager.residency(kind) is Residency.OFFLOADED)
        if resting is Residency.RESIDENT:
            assert_same(before, snapshot(trainer.tensors()))
        call()
        blocks = junk([4096] * 4)
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))
        trainer.step()
        manager.close()
        del blocks


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("name", ["pack.bucket", "pack.repoint"])
def test_a_packing_cut_short_is_finished_later_and_wastes_nothing(trainer, name, after):
    before = snapshot(trainer.tensors())
    sizes = {"bucket_bytes": 4096 if name == "pack.bucket" else 1 << 20}
    manager = create_memory_manager(trainer.model, trainer.optimizer, **sizes)
    fails(manager.offload, name, RuntimeError, after)
    assert_same(before, snapshot(trainer.tensors()))
    manager.offload(keep_grads=True)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    other = Trainer()
    other.step()
    other.step()
    undisturbed = create_memory_manager(other.model, other.optimizer, **sizes)
    undisturbed.offload(keep_grads=True)
    assert manager.host_bytes <= undisturbed.host_bytes + 4 * 4096
    undisturbed.onload()


@pytest.mark.parametrize("error", ERRORS)
def test_gradients_that_are_not_kept_survive_every_fault_before_the_last_way_back(trainer, error):
    before = snapshot(trainer.tensors())
    manager = create_memory_manager(trainer.model, trainer.optimizer, **SIZES)
    for name in ("offload.chunk", "offload.confirm", "offload.release", "offload.drop"):
        fails(manager.offload, name, error, 0)
        assert_same(before, snapshot(trainer.tensors()))
    fails(lambda: manager.offload("grad_buffers"), "offload.drop", error, 0)
    assert_same(before, snapshot(trainer.tensors()))


@pytest.mark.parametrize("second", ["onload.reserve", "onload.chunk", "onload.confirm"])
@pytest.mark.parametrize("kinds", [("weights",), KINDS], ids="+".join)
def test_an_undoing_that_fails_too_leaves_everything_on_the_host(trainer, kinds, second):
    before = snapshot(trainer.tensors())
    manager = create_memory_manager(trainer.model, trainer.optimizer, **SIZES)
    point = "offload.release"
    after = count(point, kinds) - 1
    first = faults.inject(point, lambda: RuntimeError("injected"), after=after)
    undoing = faults.inject(second, lambda: MemoryError("no room to undo"))
    with first, undoing, pytest.raises(TransferError, match=r"no room to undo.*in host memory"):
        manager.offload(*kinds, keep_grads=True)
    for kind in kinds:
        assert manager.residency(kind) is Residency.OFFLOADED
        assert_guarded(trainer, kind, away=True)
    blocks = junk([4096] * 4)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    del blocks
    trainer.step()


def test_device_memory_that_is_gone_while_undoing(trainer, monkeypatch):
    before = snapshot(trainer.tensors())
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    monkeypatch.setattr(manager._device, "free_bytes", lambda: 1)
    fault = faults.inject("offload.release", lambda: RuntimeError("injected"), after=1)
    with fault, pytest.raises(DeviceMemoryError, match="then onload") as raised:
        manager.offload()
    assert raised.value.free_bytes == 1
    assert raised.value.needed_bytes > 0
    assert manager.residency("weights") is Residency.OFFLOADED
    with pytest.raises(DeviceMemoryError):
        manager.onload()
    monkeypatch.undo()
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


def test_device_memory_that_does_not_suffice_on_the_way_back(trainer, monkeypatch):
    before = snapshot(trainer.tensors(KINDS[:3]))
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    with manager.offloaded():
        monkeypatch.setattr(manager._device, "free_bytes", lambda: 0)
        with pytest.raises(DeviceMemoryError):
            manager.close()
        assert_guarded(trainer, "weights", away=True)
        monkeypatch.undo()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_only_known_points_can_be_armed():
    with pytest.raises(ValueError, match=r"pack\.bucket"), faults.inject("pack.buckets", RuntimeError):
        pass


# --- an interruption at every line -----------------------------------------------------------------------------------

_SOURCE = str(Path(megastow.__file__).parent)
_WATCHED = (
    *("engine.py", "refill.py", "clock.py", "guard.py", "manager.py", "flat.py", "transport.py", "staging.py"),
    *("disk.py", "digest.py"),
)


class _Interrupted(KeyboardInterrupt):
    pass


@functools.cache
def _never_interrupted(code):
    """Instructions that begin a line and at which Python looks for no signal, so that only a tracer could raise there.

    They stand between a block and the exit of its `with`, called with three Nones or with what was raised, and between
    the entry of a `with` and a `try` in it (which does nothing): a lock would stay locked for good.
    """
    instructions = list(dis.get_instructions(code))
    triples = zip(instructions, instructions[1:], instructions[2:], strict=False)
    exits = [t[0] for t in triples if all(i.opname == "LOAD_CONST" and i.argval is None for i in t)]
    pairs = itertools.pairwise(instructions)
    raised = [i for pair in pairs if pair[1].opname == "WITH_EXCEPT_START" for i in pair]
    return {i.offset for i in [*exits, *raised, *(i for i in instructions if i.opname == "NOP")]}


def interrupt(call, line, counts=lambda: True):
    """Raise at an executed line of the code under test, by its number among those that count; says whether it did."""
    left = [line]

    def watch(frame, event, _):
        if event == "line" and counts() and frame.f_lasti not in _never_interrupted(frame.f_code):
            left[0] -= 1
            if left[0] < 0:
                sys.settrace(None)
                raise _Interrupted
        return watch

    def enter(frame, _event, _):
        name = frame.f_code.co_filename
        return watch if name.startswith(_SOURCE) and name.endswith(_WATCHED) else None

    outer = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    except _Interrupted:
        return True
    finally:
        sys.settrace(outer)
    return False


class Small:
    """As little as has all four kinds."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.main = torch.nn.Parameter(torch.randn(4))
        self.optimizer = torch.optim.SGD([*self.model.parameters(), self.main], lr=0.1, momentum=0.9)
        (self.model(torch.ones(1, 3)).sum() + self.main.sum()).backward()
        self.optimizer.step()
        self.grads = {p: p.grad for p in (*self.model.parameters(), self.main)}
        self.kept = {
            **dict(self.model.named_parameters()),
            "main": self.main,
            **{f"m{i}": s["momentum_buffer"] for i, s in enumerate(self.optimizer.state.values())},
        }

    def attributes(self):
        return [dict(vars(self.model)), dict(vars(self.optimizer))]


@pytest.mark.parametrize(
    ("direction", "host_memory", "verify", "stride", "beside_copies"),
    [
        *itertools.product(["offload", "onload"], ["pinned"], ["none"], [13], [False]),
        *itertools.product(["offload", "onload"], ["disk"], ["none"], [29], [False]),
        *itertools.product(["offload", "onload"], ["pinned"], ["digest"], [53], [False]),
        ("offload", "pinned", "none", 17, True),
        ("offload", "pinned", "digest", 57, True),
    ],
)
def test_an_interruption_at_any_line_loses_nothing(
    direction, host_memory, verify, stride, beside_copies, disk_folder, monkeypatch
):
    """Also where memory goes back beside copies, and the last way back is earlier."""
    monkeypatch.setattr(CpuDevice, "frees_beside_copies", beside_copies)
    line, ended = 0, False
    while not ended:
        small = Small()
        before, grads = snapshot(small.kept), snapshot(dict(enumerate(small.grads.values())))
        how = {"host_memory": host_memory, "disk_folder": disk_folder, "verify": verify}
        manager = create_memory_manager(small.model, small.optimizer, bucket_bytes=2048, chunk_bytes=8, **how)
        attributes = small.attributes()
        if direction == "onload":
            manager.offload()
        ended = not interrupt(getattr(manager, direction), line)
        resting = {manager.residency(k) for k in KINDS}
        assert resting <= {Residency.RESIDENT, Residency.OFFLOADED}, f"line {line}: {resting}"
        is_away = manager.residency("weights") is Residency.OFFLOADED
        assert ("forward" in vars(small.model)) == is_away, f"line {line}: the guard says otherwise"
        if resting == {Residency.RESIDENT} and direction == "offload":
            assert_same(before, snapshot(small.kept))
            assert_same(grads, snapshot(dict(enumerate(small.grads.values()))))
        manager.offload(non_blocking=True).wait(60)  # in another thread: no lock may have stayed locked
        blocks = junk([8, 16, 24])
        manager.onload()
        assert_same(before, snapshot(small.kept))
        assert not any(raw(g).any() for g in small.grads.values()), f"line {line}: half a gradient came back"
        assert small.attributes() == attributes, f"line {line}: the guard left something behind"
        manager.close()
        del blocks
        line += stride
    assert line > 100


@pytest.mark.parametrize("then", ["offload", "onload"])
@pytest.mark.parametrize(
    ("point", "after", "stride"),
    [("offload.release", 2, 31), ("offload.drop", 0, 31), ("onload.chunk", 2, 7), ("onload.confirm", 2, 7)],
)
def test_a_second_interruption_at_any_line_of_an_undoing_loses_nothing(point, after, stride, then):
    """The state is told truthfully, and the same call as well as its opposite puts all of it in one place again."""
    line, ended, found_half_away = 0, False, False
    while not ended:
        small = Small()
        before, grads = snapshot(small.kept), snapshot(dict(enumerate(small.grads.values())))
        manager = create_memory_manager(small.model, small.optimizer, bucket_bytes=1, chunk_bytes=8)
        attributes = small.attributes()
        calls = {"offload": lambda m=manager: m.offload(keep_grads=True), "onload": manager.onload}
        if point.startswith("onload"):
            calls["offload"]()
        struck = []
        with faults.inject(point, lambda s=struck: s.append(1) or KeyboardInterrupt("once"), after=after):
            try:
                assert interrupt(calls[point.partition(".")[0]], line, counts=lambda s=struck: s), "swallowed"
            except KeyboardInterrupt:  # the first: it has no more lines
                ended = True
        where = {kind: manager.residency(kind) for kind in KINDS}
        assert set(where.values()) <= {Residency.RESIDENT, Residency.OFFLOADED}, f"line {line}: {where}"
        is_away = where["weights"] is Residency.OFFLOADED
        assert ("forward" in vars(small.model)) == is_away, f"line {line}: the guard says otherwise"
        sizes = [t.untyped_storage().nbytes() for t in (*small.kept.values(), *small.grads.values())]
        found_half_away |= any(sizes) and not all(sizes)
        if Residency.OFFLOADED not in where.values():
            assert_same(before, snapshot(small.kept))
        calls[then]()
        sizes = [t.untyped_storage().nbytes() for t in (*small.kept.values(), *small.grads.values())]
        assert all(sizes) if then == "onload" else not any(sizes), f"line {line}: {sizes}"
        blocks = junk([8, 16, 24])
        manager.onload()
        assert_same(before, snapshot(small.kept))
        assert_same(grads, snapshot(dict(enumerate(small.grads.values()))))
        assert small.attributes() == attributes, f"line {line}: the guard left something behind"
        manager.close()
        del blocks
        line += stride
    assert line > 80
    assert found_half_away or point == "offload.drop"  # of which all is released, and comes back at once
