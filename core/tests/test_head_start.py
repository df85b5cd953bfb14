"""An offload begins with the copies of the last one: nothing is copied twice, and no guess of it is ever believed."""

import gc
import itertools

import pytest
import torch
from core_toys import Trainer, assert_same, raw, snapshot
from test_engine import Counting, G, M, W
from test_engine import Rig as EngineRig
from torch.multiprocessing.reductions import StorageWeakRef

from megastow import CorruptionError, StateChangedError, TransferError, create_memory_manager, engine, faults
from megastow.device import Arrival
from megastow.transport import Transport


class Rig(EngineRig):
    def __init__(self, **arguments):
        super().__init__(bucket_bytes=1 << 10, **arguments)


@pytest.fixture
def copies(monkeypatch):
    """Sizes of the storages whose copies out were queued, in order."""
    queued = []
    copy_out = Transport.copy_out

    def counted(self, storage, host):
        queued.append(storage.nbytes())
        copy_out(self, storage, host)

    monkeypatch.setattr(Transport, "copy_out", counted)
    return queued


def cycled(rig, *kinds):
    rig.offload(*kinds)
    rig.engine.onload(kinds)


def test_copies_are_queued_before_the_inventory_is_made_and_only_once(copies):
    rig = Rig(weights=[torch.randn(1 << 8)], main_weights=[torch.randn(1 << 8), torch.randn(1 << 7)])
    cycled(rig, W, M)
    sizes = [1 << 10, 1 << 10, 1 << 9]
    assert copies == sizes
    copies.clear()
    make, seen = rig.inventory, []

    def inventory():
        seen.append(list(copies))
        return make()

    rig.inventory = inventory
    for tensor in rig.all.values():
        tensor.normal_()
    before = snapshot(rig.all)
    cycled(rig, W, M)
    assert seen == [sizes]
    assert copies == sizes
    assert_same(before, snapshot(rig.all))


def test_only_kinds_that_move_are_begun_with(copies):
    rig = Rig(weights=[torch.randn(1 << 8)], main_weights=[torch.randn(1 << 7)])
    cycled(rig, W, M)
    copies.clear()
    cycled(rig, M)
    assert copies == [1 << 9]


@pytest.mark.parametrize("change", ["another storage", "larger", "smaller", "one more", "one less", "in another order"])
def test_what_has_changed_is_copied_as_it_is_now(change):
    rig = Rig(weights=[torch.randn(1 << 8) for _ in range(3)], main_weights=[torch.randn(1 << 8)])
    cycled(rig, W, M)
    weights = rig.tensors[W]
    if change == "one more":
        weights.insert(0, torch.randn(1 << 8))
    elif change == "one less":
        del weights[1]
    elif change == "in another order":
        weights.reverse()
    else:
        numbers = {"another storage": 1 << 8, "larger": 1 << 9, "smaller": 1 << 7}[change]
        weights[1].data = torch.randn(numbers)
    before = snapshot(rig.all)
    for _ in range(2):
        cycled(rig, W, M)
        assert_same(before, snapshot(rig.all))


def test_a_storage_that_was_resized_meanwhile_is_not_begun_with(copies):
    rig = Rig(weights=[torch.randn(1 << 8), torch.randn(1 << 7)])
    cycled(rig, W)
    copies.clear()
    rig.tensors[W][0].untyped_storage().resize_(1 << 9)
    rig.tensors[W][0] = torch.empty(0).set_(rig.tensors[W][0].untyped_storage(), 0, (1 << 7,), (1,))
    before = snapshot(rig.all)
    cycled(rig, W)
    assert copies == [1 << 9] * 3  # the second one in vain, since its place is another now
    assert_same(before, snapshot(rig.all))


def test_it_holds_no_storage():
    rig = Rig(weights=[torch.randn(1 << 8)])
    cycled(rig, W)
    gone = StorageWeakRef(rig.tensors[W][0].untyped_storage())  # in torch 2.4 its object of Python would outlive it
    rig.tensors[W].clear()
    gc.collect()
    assert gone.expired()
    rig.tensors[W].append(torch.randn(1 << 8))
    before = snapshot(rig.all)
    cycled(rig, W)
    assert_same(before, snapshot(rig.all))


@pytest.mark.parametrize("digests", [False, True])
def test_memory_goes_back_after_copies_that_were_begun_in_vain(monkeypatch, digests):
    """Where the driver takes it back beside copies; the owner of one may have dropped it meanwhile."""
    monkeypatch.setattr(Counting, "frees_beside_copies", True)
    for name in ("IN_FLIGHT_BYTES", "RETURNED_BYTES"):
        monkeypatch.setattr(engine, name, 0)
    rig = Rig(weights=[torch.randn(1 << 8) for _ in range(3)], digests=digests)
    cycled(rig, W)
    make, numbers, arrived, returned = rig.inventory, itertools.count(), set(), []

    class NumberedArrival(Arrival):
        def __init__(self):
            self.number = next(numbers)

        def wait(self):
            arrived.add(self.number)

    def inventory():
        del rig.tensors[W][0]
        return make()

    rig.inventory = inventory
    rig.device.arrival = NumberedArrival
    rig.device.release_cached = lambda: returned.append(set(arrived))
    rig.offload(W)
    assert len(returned) > 1
    early = {1, 2} if digests else {1}  # of the first storage, behind the moment before its copy: that, and its digest
    assert all(early <= each for each in returned)


def test_small_tensors_are_packed_after_it_all_the_same():
    rig = EngineRig(weights=[torch.randn(100) for _ in range(3)], main_weights=[torch.randn(1 << 8)])
    cycled(rig, W, M)
    rig.tensors[W].extend(torch.randn(50) for _ in range(3))
    before = snapshot(rig.all)
    for _ in range(2):
        cycled(rig, W, M)
        assert_same(before, snapshot(rig.all))
    del rig.tensors[W][1]  # leaves a hole
    gc.collect()
    before = snapshot(rig.all)
    cycled(rig, W, M)
    assert_same(before, snapshot(rig.all))
    assert len({t.untyped_storage()._cdata for t in rig.tensors[W]}) == 2  # the bucket, and the newcomers'


def test_memory_that_is_lent_is_not_written_to():
    trainer = Trainer()
    trainer.step()
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    manager.offload()
    view = manager.host_tensor(trainer.main[0])
    before = raw(view)
    manager.onload()
    trainer.step()
    after = snapshot(trainer.tensors())
    assert not torch.equal(before, after["main[0]"])
    with manager.offloaded(keep_grads=True):
        assert torch.equal(raw(view), before)
    assert torch.equal(raw(view), before)
    assert_same(after, snapshot(trainer.tensors()))
    manager.close()


def test_a_failure_after_it_leaves_everything_in_place(copies):
    rig = Rig(weights=[torch.randn(1 << 8)])
    cycled(rig, W)
    make, before = rig.inventory, snapshot(rig.all)

    def broken():
        raise RuntimeError("the walk failed")

    rig.inventory = broken
    copies.clear()
    with pytest.raises(TransferError, match="the walk failed"):
        rig.offload(W)
    assert copies == [1 << 10]
    assert_same(before, snapshot(rig.all))
    rig.inventory = make
    cycled(rig, W)
    assert_same(before, snapshot(rig.all))


def test_another_manager_keeps_off_what_is_being_read(copies):
    shared = torch.randn(1 << 8)
    first, second = Rig(weights=[shared]), Rig(weights=[shared])
    cycled(first, W)
    cycled(second, W)
    before, make, refused = raw(shared), first.inventory, []

    def inventory():
        with pytest.raises(StateChangedError, match="another manager"):
            second.offload(W)
        refused.append(True)
        return make()

    first.inventory = inventory
    first.offload(W)
    assert refused
    copies.clear()
    with pytest.raises(StateChangedError):
        second.offload(W)
    assert copies == []
    first.engine.onload([W])
    assert torch.equal(raw(shared), before)
    cycled(second, W)
    assert torch.equal(raw(shared), before)


def test_a_digest_of_a_copy_that_was_begun_early_is_the_one_that_counts():
    rig = Rig(weights=[torch.randn(1 << 8)], digests=True)
    cycled(rig, W)
    rig.tensors[W][0].normal_()
    before = snapshot(rig.all)
    with faults.meddle("offload.copied", lambda chunk: chunk[:1].bitwise_xor_(1)):
        rig.offload(W)
    with pytest.raises(CorruptionError):
        rig.engine.onload([W])
    rig.engine.onload([W], unverified=True)
    cycled(rig, W)
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(rig.all))  # the damage has stayed


def test_gradients_that_were_kept_once_are_not_begun_with_when_they_are_not_kept(copies):
    rig = Rig(weights=[torch.randn(1 << 8)], grad_buffers=[torch.randn(1 << 7)])
    rig.offload(W, G, keep_grads=True)
    rig.engine.onload([W, G])
    copies.clear()
    rig.offload(W, G)
    rig.engine.onload([W, G])
    assert copies == [1 << 10]
    rig.offload(W, G, keep_grads=True)
    rig.engine.onload([W, G])
    assert copies == [1 << 10, 1 << 10, 1 << 9]
