"""What an interruption of locking, closing or undoing leaves to the next call; and what a view shows then."""

import contextlib
import gc

import pytest
import torch
from core_toys import KEPT, KINDS, Trainer, assert_same, device_bytes, moved, raw, run_python, snapshot

from megastow import ManagerClosedError, NotOnHostError, OffloadedError, Residency, create_memory_manager, faults
from megastow.device import CpuDevice
from megastow.engine import Engine
from megastow.transport import Transport


def make(trainer, **how):
    return create_memory_manager(trainer.model, trainer.optimizer, **how)


def test_pages_that_were_locked_in_an_interrupted_call_are_unlocked(trainer, monkeypatch):
    locked = set()

    def lock(device, address, nbytes):
        locked.add(address)
        raise KeyboardInterrupt  # as it comes out of a driver's call: when that has done its work

    monkeypatch.setattr(CpuDevice, "lock_pages", lock)
    monkeypatch.setattr(CpuDevice, "unlock_pages", lambda device, address: locked.remove(address))
    with pytest.raises(KeyboardInterrupt):
        make(trainer).offload()
    assert not locked


def test_a_close_that_discards_and_is_interrupted_does_not_call_anything_resident(trainer, monkeypatch):
    manager = make(trainer)
    manager.offload()
    close = Engine.close

    def interrupted(engine):
        close(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.close(discard=True)
    monkeypatch.undo()
    with pytest.raises(ManagerClosedError):
        manager.onload()
    manager.close()
    assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}
    with pytest.raises(OffloadedError):
        trainer.model(torch.zeros(1, dtype=torch.long))


def test_an_offload_gives_back_what_an_onload_left_that_was_not_undone_to_its_end(trainer, monkeypatch):
    before = snapshot(trainer.tensors(KEPT))
    manager = make(trainer)
    manager.offload()

    settle, calls = Transport.settle, iter(("at the beginning", "in the undoing"))

    def impatient(transport):
        if next(calls) == "in the undoing":
            raise KeyboardInterrupt("again")
        settle(transport)

    with contextlib.ExitStack() as during:
        during.enter_context(faults.inject("onload.confirm", lambda: KeyboardInterrupt("once"), after=2))
        during.enter_context(pytest.raises(KeyboardInterrupt, match="again"))
        patched = during.enter_context(pytest.MonkeyPatch.context())
        patched.setattr(Transport, "settle", impatient)
        manager.onload()
    assert device_bytes(moved(trainer.tensors())) > 0
    manager.offload()
    assert device_bytes(moved(trainer.tensors())) == 0
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KEPT)))


def test_a_kind_that_is_half_away_has_no_state_dict_with_holes(trainer, monkeypatch):
    manager = make(trainer, bucket_bytes=1)
    monkeypatch.setattr(manager._device, "free_bytes", lambda: 1)
    fault = faults.inject("offload.release", lambda: RuntimeError("cable pulled"), after=1)
    with fault, pytest.raises(MemoryError):
        manager.offload("weights")
    assert manager.residency("weights") is Residency.OFFLOADED
    with pytest.raises(NotOnHostError, match="still on the device"):
        manager.host_state_dict("weights")
    monkeypatch.undo()
    manager.offload("weights")
    assert manager.host_state_dict("weights")
    manager.onload()


def test_a_thread_keeps_nothing_of_a_copy_that_was_cancelled(trainer):
    before = snapshot(trainer.tensors(KEPT))
    manager = make(trainer, host_memory="pageable", chunk_bytes=4096)
    with faults.inject("offload.copied", lambda: RuntimeError("cable pulled")), pytest.raises(RuntimeError):
        manager.offload()
    gc.collect()
    owners = {n: torch._C._storage_Use_Count(t.untyped_storage()._cdata) for n, t in trainer.tensors(KEPT).items()}
    plain = Trainer()
    plain.step()
    plain.step()
    other = make(plain)
    with faults.inject("offload.copied", lambda: RuntimeError("cable pulled")), pytest.raises(RuntimeError):
        other.offload()
    gc.collect()
    counted = {n: torch._C._storage_Use_Count(t.untyped_storage()._cdata) for n, t in plain.tensors(KEPT).items()}
    assert owners == counted
    assert_same(before, snapshot(trainer.tensors(KEPT)))


def test_a_view_whose_memory_torch_has_moved_does_not_stand_for_later_ones(trainer):
    manager = make(trainer)
    parameter = trainer.model.layers[0].weight
    manager.offload()
    old = manager.host_tensor(parameter)
    torch.Tensor.untyped_storage(old).share_memory_()  # as sending it to another process does
    manager.onload()
    trainer.step()
    expected = raw(parameter).clone()
    manager.offload()
    assert torch.equal(raw(manager.host_tensor(parameter)), expected)
    del old
    manager.onload()


@pytest.mark.parametrize("clone", [False, True])
def test_an_array_made_on_the_host_is_no_way_to_write_to_what_is_away(trainer, clone):
    before = snapshot(trainer.tensors(KEPT))
    manager = make(trainer)
    parameter = trainer.main[0]
    manager.offload()
    array = manager.on_host(lambda: parameter.detach().numpy(), clone=clone)
    if clone:
        array[...] = 12345.0
    else:
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 12345.0
    with pytest.raises(OffloadedError):
        manager.on_host(lambda: parameter.detach().__dlpack__())
    del array
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KEPT)))


def test_a_child_that_is_forked_while_state_is_read_is_refused_and_does_not_crash():
    run_python("""
import os
from core_toys import Trainer
from megastow import ForkedProcessError, create_memory_manager

trainer = Trainer()
trainer.step()
manager = create_memory_manager(trainer.model, trainer.optimizer)
manager.offload()
handle = manager.onload("weights", non_blocking=True)
handle.wait(30)
manager.offload()


def read_in_a_child():
    child = os.fork()
    if not child:
        try:
            trainer.main[0].detach().clone()
        except ForkedProcessError:
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


assert manager.on_host(read_in_a_child) == 0
child = os.fork()
if not child:
    for ask in (lambda: manager.host_bytes, lambda: manager.disk_bytes, manager.release_cached):
        try:
            ask()
        except ForkedProcessError:
            continue
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
manager.onload()
""")
