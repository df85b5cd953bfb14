"""Moves of storages: what is shared between kinds, what is taken, order and accounting."""

import pytest
import torch
from core_toys import Tensors, assert_same, device_bytes, junk, raw, snapshot

from megastow import engine, faults, refill
from megastow.agreement import Ballot
from megastow.device import CpuDevice
from megastow.engine import Engine, RegionKey
from megastow.errors import TransferError
from megastow.state import Inventory, Residency, StateKind
from megastow.transport import Transport

W, M, S, G = StateKind
CPU = torch.device("cpu")


class Counting(CpuDevice):
    """Counts what a driver would have to do."""

    def __init__(self):
        super().__init__(CPU)
        self.calls = []

    def synchronize(self):
        self.calls.append("synchronize")

    def synchronize_stream(self):
        self.calls.append("synchronize_stream")

    def confirm(self):
        self.calls.append("confirm")

    def release_cached(self):
        self.calls.append("release_cached")


class Rig:
    """An engine over tensors given by kind; gradients are dropped."""

    def __init__(self, bucket_bytes=1 << 20, digests=False, **tensors):
        self.device = Counting()
        self.engine = Engine(self.device, bucket_bytes=bucket_bytes, chunk_bytes=64, digests=digests)
        self.tensors = {StateKind(kind): list(values) for kind, values in tensors.items()}

    def inventory(self):
        made = Inventory(CPU)
        for kind, tensors in self.tensors.items():
            group = made.group(kind, "test", keep=kind is not G)
            for index, tensor in enumerate(tensors):
                group.add(str(index), tensor)
        return made

    def offload(self, *kinds, keep_grads=False):
        return self.engine.offload(self.inventory, kinds, keep_grads=keep_grads)

    @property
    def all(self):
        return Tensors((f"{k}{i}", t) for k, ts in self.tensors.items() for i, t in enumerate(ts))


def test_a_storage_under_two_kinds_moves_with_the_first():
    shared = torch.randn(64)
    rig = Rig(weights=[shared[:32]], main_weights=[shared], grad_buffers=[torch.ones(8), shared[60:]])
    before = raw(shared)
    assert rig.offload(M)[M].num_tensors == 0
    assert rig.offload(G)[G].num_tensors == 1
    assert torch.equal(raw(shared), before)  # not dropped with the gradients
    report = rig.offload(W)[W]
    assert (report.num_tensors, report.device_bytes) == (3, 256)
    blocks = junk([256, 32])
    rig.engine.onload([W, M, G])
    assert torch.equal(raw(shared), before)
    assert not raw(rig.tensors[G][0]).any()
    del blocks


def test_nothing_is_released_before_it_has_arrived_and_what_is_dropped_goes_last():
    rig = Rig(weights=[torch.randn(8)], optimizer_states=[torch.randn(8)], grad_buffers=[torch.randn(8)])
    sizes = []

    class Arrival:
        def wait(self):
            sizes.append(device_bytes(rig.all))

    rig.device.arrival = Arrival
    rig.device.confirm = lambda: sizes.append(device_bytes(rig.all))
    rig.offload(W, S, G)
    assert sizes == [96, 96, 64, 32]  # the first: nothing is under way of an interrupted move
    assert device_bytes(rig.all) == 0


def test_the_device_is_waited_for_before_and_released_after():
    rig = Rig(weights=[torch.randn(8), torch.randn(8)])
    rig.offload(W)
    assert rig.device.calls[:2] == ["confirm", "synchronize"]
    assert "confirm" in rig.device.calls[2:-1]
    assert rig.device.calls[-1] == "release_cached"
    rig.device.calls.clear()
    rig.engine.onload([W])
    assert rig.device.calls == [
        "confirm",
        "synchronize_stream",
        "confirm",
    ]  # the device may be busy with another tenant's copies
    rig.engine.offload(rig.inventory, [W], keep_grads=False, give_back=False)
    assert "release_cached" not in rig.device.calls
    assert device_bytes(rig.all) == 0


@pytest.fixture
def mapped_pages(monkeypatch):
    """A device that gives memory back beside copies, every 100 bytes; and takes as little at a time."""
    monkeypatch.setattr(Counting, "frees_beside_copies", True)
    for module, name in ((engine, "IN_FLIGHT_BYTES"), (engine, "RETURNED_BYTES"), (refill, "TAKEN_BYTES")):
        monkeypatch.setattr(module, name, 100)


@pytest.mark.parametrize("in_flight_bytes", [100, 1 << 20])
def test_memory_goes_back_to_the_driver_while_others_are_on_their_way(mapped_pages, monkeypatch, in_flight_bytes):
    """Also if all copies are queued at once."""
    monkeypatch.setattr(engine, "IN_FLIGHT_BYTES", in_flight_bytes)
    rig = Rig(bucket_bytes=1, weights=[torch.randn(20) for _ in range(6)])
    left = []
    rig.device.release_cached = lambda: left.append(device_bytes(rig.all))
    rig.offload(W)
    assert left == [320, 160, 0, 0]  # two storages each, and at the end in any case
    rig.engine.onload([W])
    left.clear()
    rig.engine.offload(rig.inventory, [W], keep_grads=False, give_back=False)
    assert not left


def test_memory_is_taken_part_by_part_while_copies_are_under_way(monkeypatch):
    monkeypatch.setattr(refill, "TAKEN_BYTES", 100)
    rig = Rig(
        bucket_bytes=1, weights=[torch.randn(20) for _ in range(3)], grad_buffers=[torch.zeros(20), torch.zeros(20)]
    )
    before = snapshot(rig.all)
    rig.offload(W, G)
    blocks = junk([80] * 5)
    copy_in, taken = Transport.copy_in, []

    def noted(self, host, storage):
        taken.append(device_bytes(rig.all))
        copy_in(self, host, storage)

    monkeypatch.setattr(Transport, "copy_in", noted)
    rig.engine.onload([W, G])
    assert taken == [160, 160, 240]  # two storages, then the last of its kind; zeros come after it
    assert_same(before, snapshot(rig.all))
    del blocks


@pytest.mark.parametrize("point", ["offload.confirm", "offload.release", "onload.reserve", "onload.chunk"])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_what_fails_between_two_parts_is_undone(mapped_pages, point, after):
    rig = Rig(bucket_bytes=1, weights=[torch.randn(20) for _ in range(6)])
    before = snapshot(rig.all)
    if point.startswith("onload"):
        rig.offload(W)
    with faults.inject(point, OSError, after=after), pytest.raises(TransferError):
        rig.offload(W) if point.startswith("offload") else rig.engine.onload([W])
    if point.startswith("onload"):
        assert device_bytes(rig.all) == 0
        rig.engine.onload([W])
    assert_same(before, snapshot(rig.all))


@pytest.mark.parametrize("keep", [False, True])
def test_what_was_prepared_is_what_an_offload_then_takes(keep):
    rig = Rig(weights=[torch.randn(100) for _ in range(5)], grad_buffers=[torch.randn(10)])
    needed = rig.engine.prepare(rig.inventory, [W, M, S, G])
    assert needed == {RegionKey(W): 5 * 512}
    held = rig.engine.reserve(needed)
    rig.offload(W, G, keep_grads=keep)
    assert rig.engine.host_bytes == held + keep * 4096
    assert rig.engine.prepare(rig.inventory, [W]) == {}
    rig.engine.onload([W, G])


def test_kinds_may_be_empty():
    rig = Rig(weights=[])
    assert rig.offload(W, M)[W].moved
    assert rig.engine.residency(M) is Residency.OFFLOADED
    reports, notes = rig.engine.onload([W, M, S])
    assert [reports[k].moved for k in (W, M, S)] == [True, True, False]
    assert notes == []


def test_residency_is_in_between_while_moving():
    rig = Rig(weights=[torch.randn(8)])
    seen = []
    rig.device.confirm = lambda: seen.append((rig.engine.residency(W), rig.engine.residency(M)))
    rig.offload(W)
    rig.engine.onload([W])
    assert seen == [(r, Residency.RESIDENT) for r in (Residency.OFFLOADING, Residency.ONLOADING) for _ in range(2)]


def test_tensors_that_join_and_leave_between_moves():
    rig = Rig(weights=[torch.randn(10) for _ in range(4)])
    for cycle in range(5):
        rig.tensors[W][cycle % 4] = torch.randn(10 + cycle)
        rig.tensors[W].append(torch.randn(3))
        before = snapshot(rig.all)
        rig.offload(W)
        rig.engine.onload([W])
        assert_same(before, snapshot(rig.all))


def test_closing_forgets_the_bytes_and_says_so():
    rig = Rig(weights=[torch.randn(8)], main_weights=[torch.randn(8)])
    rig.offload(W)
    rig.engine.close()
    assert rig.engine.host_bytes == 0
    assert rig.engine.residency(W) is Residency.OFFLOADED
    assert rig.engine.residency(M) is Residency.RESIDENT


def test_passing_tensors_have_host_memory_of_their_own():
    lasting, passing = torch.randn(4096), [torch.randn(64)]
    rig = Rig(weights=[lasting])
    plain = rig.inventory

    def inventory():
        found = plain()
        group = found.group(W, "left by a forward pass", transient=True)
        for number, tensor in enumerate(passing):
            group.add(f"left[{number}]", tensor)
        return found

    rig.inventory = inventory
    addresses = set()
    for size in (64, 5000, 3):
        passing[:] = [torch.randn(size), torch.randn(size)]
        tensors = Tensors(lasting=lasting, first=passing[0], second=passing[1])
        before = snapshot(tensors)
        rig.engine.offload(inventory, [W], keep_grads=False)
        assert device_bytes(tensors) == 0
        addresses.add(rig.engine._arena._regions[RegionKey(W)].bytes.data_ptr())
        rig.engine.onload([W])
        assert_same(before, snapshot(tensors))
    assert len(addresses) == 1, "the memory of lasting state was locked anew because of what passes"


def test_what_all_ranks_have_confirmed_stays_when_an_interruption_comes_before_it_is_told():
    class Interrupted(Ballot):
        confirmed = ()

        def confirm(self, kind=None):
            self.confirmed = (kind,)
            raise KeyboardInterrupt

        def has_confirmed(self, kind):
            return kind in self.confirmed

    rig = Rig(weights=[torch.randn(8)], main_weights=[torch.randn(8)])
    before = snapshot(rig.all)
    rig.offload(W, M)
    told = []
    with pytest.raises(KeyboardInterrupt):
        rig.engine.onload([W, M], arrived=told.append, ballot=Interrupted())
    assert (rig.engine.residency(W), rig.engine.residency(M)) == (Residency.RESIDENT, Residency.OFFLOADED)
    assert torch.equal(raw(rig.tensors[W][0]), before["weights0"])
    rig.engine.onload([M])
    assert_same(before, snapshot(rig.all))
