"""Where memory goes back beside copies, what is not kept goes when nothing but the device can fail any more."""

import contextlib
import itertools
import threading

import pytest
import torch
from core_toys import KEPT, KINDS, Trainer, assert_same, device_bytes, junk, moved, raw, snapshot
from test_engine import G, Rig, S, W
from test_faults import Small, interrupt

from megastow import Residency, create_memory_manager, engine, faults
from megastow.agreement import Ballot
from megastow.device import CpuDevice
from megastow.digest import Digester
from megastow.engine import Engine
from megastow.errors import HostMemoryError, ResidueError, TransferError
from megastow.replicas import Replicas
from megastow.transport import Transport

SIZES = {"bucket_bytes": 256, "chunk_bytes": 64}


@pytest.fixture(autouse=True)
def beside_copies(monkeypatch):
    """A device that gives memory back beside copies. Little is on its way at a time."""
    monkeypatch.setattr(CpuDevice, "frees_beside_copies", True)
    monkeypatch.setattr(engine, "IN_FLIGHT_BYTES", 1000)


@pytest.fixture
def trainer():
    made = Trainer()
    made.step()
    return made


class LateArrivals:
    """Arrivals of a rig that come to pass only when they are waited for.

    Attributes:
        sizes: bytes on the device at each wait.
        broken: numbers of the waits that fail, as the device does from then on.
    """

    def __init__(self, rig, broken=()):
        self.sizes = []
        self.broken = broken

        class Late:
            def wait(_self):
                self.sizes.append(device_bytes(rig.all))
                if len(self.sizes) - 1 in self.broken:
                    raise RuntimeError("unspecified launch failure")

        rig.device.arrival = Late
        rig.device.confirm = self._confirm

    def _confirm(self):
        if self.broken:
            raise RuntimeError("unspecified launch failure")


def test_gradients_go_when_all_copies_are_queued_and_the_rest_as_it_arrives():
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8) for _ in range(3)], grad_buffers=[torch.randn(50)])
    late = LateArrivals(rig)
    rig.offload(W, G)
    assert late.sizes == [96, 64, 32]
    assert device_bytes(rig.all) == 0


def test_they_go_when_all_has_arrived_where_memory_stays_with_torch(monkeypatch):
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8) for _ in range(3)], grad_buffers=[torch.randn(50)])
    late = LateArrivals(rig)
    rig.engine.offload(rig.inventory, [W, G], keep_grads=False, give_back=False)
    assert late.sizes == [296, 264, 232]
    rig.engine.onload([W, G])
    monkeypatch.setattr(CpuDevice, "frees_beside_copies", False)
    late.sizes.clear()
    rig.offload(W, G)
    assert late.sizes == [296, 264, 232]


def test_memory_goes_back_in_ever_smaller_parts_towards_the_end():
    """So that little is left to give back when the last copy has arrived."""
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8) for _ in range(16)], grad_buffers=[torch.randn(8)])
    left = []
    rig.device.release_cached = lambda: left.append(device_bytes(rig.all))
    rig.offload(W, G)
    assert left == [256, 96, 32, 0, 0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("verify", ["none", "digest"])
def test_a_fault_before_that_undoes_the_move_and_one_after_it_ends_it(error, verify):
    ends = []
    for name in ("offload.confirm", "offload.release"):
        for after in range(100):
            trainer = Trainer()
            trainer.step()
            before, grads = snapshot(trainer.tensors(KEPT)), snapshot(trainer.tensors(["grad_buffers"]))
            manager = create_memory_manager(trainer.model, trainer.optimizer, verify=verify, **SIZES)
            with faults.inject(name, lambda: error("injected"), after=after) as passed:
                if not _fails(manager):
                    assert passed[0] <= after
                    break
            resting = {manager.residency(kind) for kind in KINDS}
            assert len(resting) == 1
            ends.append(resting.pop())
            if ends[-1] is Residency.RESIDENT:
                assert_same(grads, snapshot(trainer.tensors(["grad_buffers"])))
            else:
                assert device_bytes(moved(trainer.tensors())) == 0
            blocks = junk([256] * 8)
            manager.onload()
            assert_same(before, snapshot(trainer.tensors(KEPT)))
            if ends[-1] is Residency.OFFLOADED:
                assert not any(data.any() for data in snapshot(trainer.tensors(["grad_buffers"])).values())
            trainer.step()
            manager.close()
            del blocks
        assert ends == sorted(ends, key=[Residency.RESIDENT, Residency.OFFLOADED].index)
        assert set(ends) == {Residency.RESIDENT, Residency.OFFLOADED}
        ends.clear()


def _fails(manager):
    try:
        manager.offload()
    except (TransferError, KeyboardInterrupt) as raised:
        return "injected" in str(raised)
    return False


@pytest.mark.parametrize("then", ["offload", "onload"])
def test_a_second_interruption_at_any_line_of_ending_it_loses_nothing(then):
    line, ended, found_half_away = 0, False, False
    while not ended:
        small = Small()
        before = snapshot(small.kept)
        manager = create_memory_manager(small.model, small.optimizer, bucket_bytes=1, chunk_bytes=8, verify="digest")
        struck = []
        with faults.inject("offload.release", lambda s=struck: s.append(1) or KeyboardInterrupt("once"), after=2):
            try:
                assert interrupt(manager.offload, line, counts=lambda s=struck: s), "swallowed"
            except KeyboardInterrupt:  # the first: it has no more lines
                ended = True
        assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}, f"line {line}"
        found_half_away |= any(t.untyped_storage().nbytes() for t in small.kept.values())
        getattr(manager, then)()
        sizes = [t.untyped_storage().nbytes() for t in (*small.kept.values(), *small.grads.values())]
        assert all(sizes) if then == "onload" else not any(sizes), f"line {line}: {sizes}"
        blocks = junk([8, 16, 24])
        manager.onload()
        assert_same(before, snapshot(small.kept))
        assert not any(raw(grad).any() for grad in small.grads.values()), f"line {line}: half a gradient came back"
        manager.close()
        del blocks
        line += 7
    assert line > 80
    assert found_half_away


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fault_at_the_last_way_back_loses_no_gradient(trainer, error):
    before = snapshot(trainer.tensors())
    manager = create_memory_manager(trainer.model, trainer.optimizer, **SIZES)
    with faults.inject("offload.drop", lambda: error("injected")) as passed:
        assert _fails(manager)
    assert passed[0] == 1
    assert_same(before, snapshot(trainer.tensors()))


def test_what_has_not_arrived_when_the_device_fails_stays_there():
    """The host copy of it may be anything; what has arrived before is safe."""
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8) for _ in range(3)], grad_buffers=[torch.randn(50)])
    kept = snapshot(dict(enumerate(rig.tensors[W])))
    late = LateArrivals(rig, broken={1})
    with pytest.raises(TransferError, match="unspecified launch failure"):
        rig.offload(W, G)
    sizes = [tensor.untyped_storage().nbytes() for tensor in (*rig.tensors[W], *rig.tensors[G])]
    assert sizes == [0, 32, 32, 0]
    assert rig.engine.is_half_away(W)
    assert torch.equal(raw(rig.tensors[W][1]), kept[1])
    late.broken = ()
    rig.engine.onload([W, G])
    assert_same(kept, snapshot(dict(enumerate(rig.tensors[W]))))
    assert not raw(rig.tensors[G][0]).any()
    rig.offload(W, S, G)
    rig.engine.onload([W, S, G])
    assert_same(kept, snapshot(dict(enumerate(rig.tensors[W]))))


def interrupt_the_drop(monkeypatch):
    """Interrupt a move when the first of what is not kept has gone; afterwards nothing is patched any more."""
    drop = Engine._drop

    def cut_short(self, leaving, clock):
        monkeypatch.undo()
        drop(self, itertools.islice(leaving, 1), clock)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "_drop", cut_short)


def test_gradients_are_never_half_dropped(monkeypatch):
    """Not by an interruption between two of them either, if the device then fails."""
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8)], grad_buffers=[torch.randn(50) for _ in range(3)])
    late = LateArrivals(rig, broken={0})
    interrupt_the_drop(monkeypatch)
    with pytest.raises((KeyboardInterrupt, TransferError)):
        rig.offload(W, G)
    assert [tensor.untyped_storage().nbytes() for tensor in (*rig.tensors[W], *rig.tensors[G])] == [32, 0, 0, 0]
    assert not late.sizes


def test_a_second_interruption_does_not_leave_them_half_dropped_either(monkeypatch):
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8)], grad_buffers=[torch.randn(50) for _ in range(3)])
    waited = []

    def impatient():
        waited.append(1)
        if len(waited) == 2:  # the first is ahead of the move
            raise KeyboardInterrupt

    interrupt_the_drop(monkeypatch)
    rig.device.confirm = impatient
    with pytest.raises(KeyboardInterrupt):
        rig.offload(W, G)
    assert len(waited) >= 2
    assert device_bytes({str(i): tensor for i, tensor in enumerate(rig.tensors[G])}) == 0


def test_what_was_dropped_by_an_earlier_call_does_not_end_this_one():
    """Some left half away by a device that failed, and gradients that an onload had taken memory for."""
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8) for _ in range(3)], grad_buffers=[torch.randn(50)])
    before = snapshot(dict(enumerate(rig.tensors[W])))
    late = LateArrivals(rig, broken={1})
    with pytest.raises(TransferError, match="unspecified launch failure"):
        rig.offload(W, G)
    assert rig.engine.is_half_away(W)
    late.broken = ()
    rig.tensors[G][0].untyped_storage().resize_(200)
    with faults.inject("offload.chunk", lambda: RuntimeError("injected")), pytest.raises(TransferError):
        rig.offload(W, G)
    assert [tensor.untyped_storage().nbytes() for tensor in rig.tensors[W]] == [32] * 3
    assert_same(before, snapshot(dict(enumerate(rig.tensors[W]))))


def test_a_move_that_is_ended_gives_memory_back_as_any_other():
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8) for _ in range(3)], grad_buffers=[torch.randn(50)])
    left = []
    rig.device.release_cached = lambda: left.append(device_bytes(rig.all))
    with faults.inject("offload.confirm", lambda: KeyboardInterrupt("injected")), pytest.raises(KeyboardInterrupt):
        rig.offload(W, G)
    assert left == [0]


def test_digests_wait_for_no_copy_and_are_no_residue_when_somebody_looks(monkeypatch):
    rig = Rig(bucket_bytes=1, digests=True, weights=[torch.randn(8) for _ in range(3)], grad_buffers=[torch.randn(50)])
    copies, copies_before, waiting, digests = [], {}, [], []
    arrival, beside, copy_out, begin = rig.device.arrival, rig.device.beside, Transport.copy_out, Digester.begin

    def noted():
        made = arrival()
        copies_before[id(made)] = made, len(copies)  # held, so that the number stays its own
        return made

    def behind(after=None):
        waiting.append(copies_before[id(after)][1])
        return beside(after)

    def begun(self, *arguments):
        digests.append(begin(self, *arguments))
        return digests[-1]

    rig.device.arrival, rig.device.beside = noted, behind
    monkeypatch.setattr(Transport, "copy_out", lambda *arguments: copies.append(1) or copy_out(*arguments))
    monkeypatch.setattr(Digester, "begin", begun)
    looks = []

    def inspect(_storages):
        looks.append([digest.on_device is None for digest in digests])

    rig.engine.offload(rig.inventory, [W, G], keep_grads=False, inspect=inspect)
    assert waiting == [0, 0, 0]
    assert looks == [[True] * 3]
    assert len(copies) == 3


@pytest.fixture
def on_disk(trainer, disk_folder, monkeypatch):
    """A manager whose threads have everything queued at once, what is away already apart."""
    monkeypatch.setattr(engine, "IN_FLIGHT_BYTES", 1 << 30)
    how = {"host_memory": "disk", "disk_folder": disk_folder}
    with create_memory_manager(trainer.model, trainer.optimizer, **how, **SIZES) as manager:
        yield manager


@pytest.mark.parametrize("from_the_end", [False, True])
@pytest.mark.parametrize("number", range(3))
def test_where_threads_write_the_last_of_it_can_still_be_undone(trainer, on_disk, number, from_the_end):
    """A disk may be full at the last byte."""
    with faults.meddle("disk.write", lambda: None) as passed:
        on_disk.offload(keep_grads=True)
        num_grads = passed[0]
        on_disk.onload("weights", "main_weights", "optimizer_states")
        on_disk.offload()
        num_writes = passed[0] - num_grads
        on_disk.onload()
    before = snapshot(trainer.tensors())
    after = num_writes - 1 - number if from_the_end else number
    with (
        faults.inject("disk.write", lambda: OSError(28, "No space left on device"), after=after) as passed,
        pytest.raises((HostMemoryError, TransferError), match="No space left"),
    ):
        on_disk.offload()
    assert passed[0] > after
    assert_same(before, snapshot(trainer.tensors()))


def test_a_thread_that_is_not_done_is_waited_for_first(trainer, on_disk):
    before, go_on, is_there = snapshot(trainer.tensors()), threading.Event(), threading.Event()

    def stand_still():
        is_there.set()
        go_on.wait(60)

    with faults.meddle("disk.write", stand_still, after=2):
        handle = on_disk.offload(non_blocking=True)
        assert is_there.wait(60)
        assert device_bytes(trainer.tensors(["grad_buffers"])) > 0
        go_on.set()
        handle.wait(60)
    assert device_bytes(trainer.tensors(["grad_buffers"])) == 0
    on_disk.onload()
    kept = {name: data for name, data in before.items() if not name.startswith("grad")}
    assert_same(kept, snapshot(trainer.tensors(KEPT)))


def test_a_strict_offload_looks_while_copies_are_on_their_way():
    """What they come from is about to go; the look costs no time of its own."""
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8) for _ in range(3)], grad_buffers=[torch.randn(50)])
    before, given = snapshot(rig.all), []
    late = LateArrivals(rig)

    def inspect(storages):
        given.append([storage.nbytes() for storage in storages])
        if len(given) == 1:
            raise ResidueError("too much", residue=None, max_residue_bytes=0)

    for raises in (pytest.raises(ResidueError), contextlib.nullcontext()):
        with raises:
            rig.engine.offload(rig.inventory, [W, G], keep_grads=False, inspect=inspect)
        if len(given) == 1:
            assert_same(before, snapshot(rig.all))
            late.sizes.clear()
    assert given == [[32, 32, 32, 200]] * 2
    assert late.sizes == [96, 64, 32]


@pytest.mark.parametrize(("peers", "expected"), [((), [96, 64, 32]), ((0, 1), [296, 296, 296])])
def test_ranks_vote_while_copies_are_on_their_way_and_shared_bytes_are_waited_for(peers, expected):
    """What another rank has of them is no copy before it has arrived there."""
    rig = Rig(bucket_bytes=1, weights=[torch.randn(8) for _ in range(3)], grad_buffers=[torch.randn(50)])
    late, votes = LateArrivals(rig), []

    class Voting(Ballot):
        def confirm(self, kind=None):
            votes.append(len(late.sizes))

    class Sharing(Replicas):
        def assign(self, records):
            for record in records:
                record.peers = peers if record.kind is W else ()

    rig.engine._replicas = Sharing()
    rig.engine.offload(rig.inventory, [W, G], keep_grads=False, ballot=Voting())
    assert late.sizes[:3] == expected
    assert (votes[0] == 0) == (not peers)
    assert device_bytes(rig.all) == 0
