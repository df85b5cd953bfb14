"""What each rank does in the tests of `test_replicas.py`; run in all processes of `rank_scenarios.GROUP` at once."""

import contextlib
import logging
import logging.handlers
import os
import signal
import threading
import time
from functools import partial

import pytest
import rank_scenarios as ranks
import torch
import torch.distributed as dist
from core_toys import KEPT, KINDS, Trainer, assert_same, device_bytes, junk, moved, raw, snapshot
from rank_scenarios import BACK, LONG, assert_all, everywhere, fails_everywhere, others_fault

from megastow import (
    MegastowError,
    NotOnHostError,
    PeerError,
    Residency,
    StateChangedError,
    create_memory_manager,
    faults,
    machine,
    swap,
)
from megastow.agreement import _GroupBallot
from megastow.digest import Digester
from megastow.gather import Communicator, Gathering
from megastow.host import HostRegion
from megastow.plain import PlainBinding
from megastow.refill import Refill
from megastow.replicas import HostReplicas
from megastow.storages import storage_id

OUT = ["pack.bucket", "host.allocate", "offload.chunk", "offload.copied", "offload.confirm", "offload.drop"]
UNIT = 4096  # what chunks are a multiple of
WIDTH = 96  # so that there is something to share
SIZES = {"bucket_bytes": 1 << 16, "chunk_bytes": 4096}


BEYOND_A_PAUSE = 10.0
"""A limit, gloo's own too, that a machine which stands still for some seconds does not use up."""


def make(seconds=LONG, seed=0, steps=1, model=None, **options):
    """A trainer that is the same on all ranks, and its manager."""
    trainer = Trainer(seed, width=WIDTH) if model is None else model
    for _ in range(steps if model is None else 0):
        trainer.step()
    everywhere(None)  # see `rank_scenarios.make`
    arguments = {"group": ranks.GROUP, "agree_timeout": seconds, "replicas": True, **SIZES, **options}
    return trainer, create_memory_manager(trainer.model, trainer.optimizer, **arguments)


class Flat:
    """Parameters of these sizes, with the same bytes on all ranks."""

    def __init__(self, *sizes, seed=0):
        torch.manual_seed(seed)
        self.model = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randint(0, 256, (n,), dtype=torch.uint8), requires_grad=False) for n in sizes
        )
        self.optimizer = None

    def tensors(self, kinds=KINDS):
        return dict(self.model.named_parameters()) if "weights" in kinds else {}


def differences(report):
    """What a report says of storages that could not be shared."""
    return [note for note in report.notes if "not the same" in note]


def kept(nbytes, world):
    """The host bytes of one of `world` ranks for a storage, each of them rounded up."""
    rest = nbytes % (world * UNIT)
    mine = (nbytes - rest) // world + rest
    return -(-mine // 512) * 512


def fails_and_is_undone(trainer, manager, match):
    """An onload that something is in the way of: it leaves on the device what was there before, and nothing else."""
    left = device_bytes(trainer.tensors(KEPT))
    with pytest.raises(MegastowError, match=match):
        manager.onload()
    assert_all(manager, Residency.OFFLOADED)
    assert device_bytes(trainer.tensors(KEPT)) == left


# --- what goes well --------------------------------------------------------------------------------------------------


def cycles():
    def look(report):
        assert not differences(report), differences(report)

    ranks.go_through_cycles(*make(), Trainer(0, width=WIDTH), look)


def host_memory_is_shared():
    world = ranks.GROUP.size()
    sizes = [world * UNIT * 20, world * UNIT * 33 + 7, 1, UNIT, world * UNIT - 1, world * UNIT + 1]
    trainer, manager = make(model=Flat(*sizes), bucket_bytes=1, chunk_bytes=8192)
    before = snapshot(trainer.tensors())
    plan = manager.plan("weights")
    report = manager.offload("weights")
    assert report.host_bytes == plan.host_bytes == sum(kept(n, world) for n in sizes)
    assert manager.host_bytes == -(-report.host_bytes // machine.PAGE_BYTES) * machine.PAGE_BYTES
    assert report.device_bytes == sum(sizes)
    assert manager.plan("weights").host_bytes == report.host_bytes  # also while away
    blocks = junk(sizes)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    del blocks
    manager.close()


@contextlib.contextmanager
def _noting_at_inventory(count):
    """What a count is at each moment at which an inventory is made."""
    noted = []
    make = PlainBinding.inventory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainBinding, "inventory", lambda binding: noted.append(count[0]) or make(binding))
        yield noted


def an_offload_begins_with_its_parts():
    """The copies of the last one, before the inventory is made, and none of them twice; with digests for the others."""
    world = ranks.GROUP.size()
    trainer, manager = make(model=Flat(world * UNIT * 4, world * UNIT * 2), bucket_bytes=1)
    for number in range(3):
        for parameter in trainer.model:
            parameter.data.random_(0, 256, generator=torch.Generator().manual_seed(number))
        before = snapshot(trainer.tensors())
        with faults.meddle("offload.chunk", lambda: None) as copied, _noting_at_inventory(copied) as ahead:
            report = manager.offload("weights")
        assert ahead[0] == (6 if number else 0)
        assert copied[0] == 6
        assert not differences(report), differences(report)
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def all_tiers():
    for tier in ("pageable", "disk"):
        trainer, manager = make(host_memory=tier)
        before = snapshot(trainer.tensors(KEPT))
        for _ in range(2):
            report = manager.offload()
            assert not differences(report), differences(report)
            blocks = junk([4096] * 4)
            manager.onload()
            assert_same(before, snapshot(trainer.tensors(KEPT)))
            del blocks
        manager.close()


def digests_are_compared():
    trainer, manager = make(model=Flat(32768), verify="digest")
    before = snapshot(trainer.tensors())
    manager.offload()

    def flip(there):
        there[3] ^= 1

    meddled = faults.meddle("onload.copied", flip) if dist.get_rank() == 1 else contextlib.nullcontext()
    with meddled, pytest.raises(MegastowError, match=r"other bytes came back") as raised:  # on all ranks
        manager.onload()
    assert "keep parts of it" in str(raised.value)
    assert_all(manager, Residency.OFFLOADED)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def two_managers_change_places():
    (first, one), (second, other) = make(), make(seed=1)
    before = [snapshot(t.tensors(KEPT)) for t in (first, second)]
    other.offload()
    swap(leaving=one, coming=other)
    swap(leaving=other, coming=one)
    other.onload()
    for trainer, expected in zip((first, second), before, strict=True):
        assert_same(expected, snapshot(trainer.tensors(KEPT)))
    one.close()
    other.close()


def closing_brings_back_together():
    trainer, manager = make()
    before = snapshot(trainer.tensors(KEPT))
    manager.offload()
    manager.close()
    assert_same(before, snapshot(trainer.tensors(KEPT)))


def views_are_refused():
    trainer, manager = make()
    manager.offload("weights", "optimizer_states")
    with pytest.raises(NotOnHostError, match=r"shared by ranks 0, 1.*onload it"):
        manager.host_tensor(trainer.trained[0])
    with pytest.raises(NotOnHostError, match="replicas=True"):
        manager.host_state_dict("optimizer_states")
    with pytest.raises(NotOnHostError, match="replicas=True"):
        manager.on_host(trainer.model.state_dict)
    buffer = raw(manager.host_tensor(trainer.model.odd))  # which is not shared
    manager.onload()
    assert torch.equal(buffer, raw(trainer.model.odd))
    manager.close()


# --- who shares ------------------------------------------------------------------------------------------------------


def ranks_that_differ_keep_all():
    trainer, manager = make(model=Flat(32768, 32768, 32768), bucket_bytes=1)
    second = trainer.model[1]
    for number in range(5):
        differs = number in (0, 1)
        second.data.fill_(7)
        if differs and dist.get_rank() == 1:
            second.data[5000] = 8
        before = snapshot(trainer.tensors())
        report = manager.offload("weights")
        whole = differs or number == 2  # it was the same again, which is of use in the next one
        assert report.host_bytes == 2 * kept(32768, ranks.GROUP.size()) + (
            32768 if whole else kept(32768, ranks.GROUP.size())
        )
        assert any("1 storages of weights (with 1) are not the same" in note for note in report.notes) == whole, number
        blocks = junk([32768] * 3)
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))
        del blocks
    manager.close()


def ranks_with_other_storages_keep_all():
    sizes = [32768, 32768] if dist.get_rank() == 0 else [32768]
    trainer, manager = make(model=Flat(*sizes), bucket_bytes=1)
    before = snapshot(trainer.tensors())
    for _ in range(2):
        assert manager.offload("weights").host_bytes == sum(sizes)
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def ranks_with_other_storages_of_one_kind():
    """What they list of that keeps none from sharing another, nor from leaving after it."""
    trainer = Flat(32768)
    main = [torch.full((1024 + n,), float(n), requires_grad=True) for n in range(1 + dist.get_rank())]
    trainer.optimizer = torch.optim.Adam(main)
    trainer, manager = make(model=trainer, bucket_bytes=1)
    before = snapshot({**trainer.tensors(), **{f"main[{n}]": t for n, t in enumerate(main)}})
    for first in ((), ("weights",)):
        for kinds in (first, ()):
            report = manager.offload(*kinds)
            assert report.kinds["weights"].host_bytes in (0, kept(32768, ranks.GROUP.size()))
        assert_all(manager, Residency.OFFLOADED)
        blocks = junk([32768] * 3)
        manager.onload()
        assert_same(before, snapshot({**trainer.tensors(), **{f"main[{n}]": t for n, t in enumerate(main)}}))
        del blocks
    manager.close()


def hosts_of_their_own(monkeypatch, host_of):
    monkeypatch.setattr(machine, "host_identity", lambda: host_of(dist.get_rank()))


def ranks_of_several_hosts():
    """Ranks 0 and 1 share one host; the third is alone on its own."""
    with pytest.MonkeyPatch.context() as patch:
        hosts_of_their_own(patch, lambda rank: "first" if rank < 2 else "second")
        trainer, manager = make(model=Flat(49152), bucket_bytes=1)
    before = snapshot(trainer.tensors())
    report = manager.offload("weights")
    assert report.host_bytes == (49152 if dist.get_rank() == 2 else 24576)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    manager.offload("weights")
    manager.close()  # also the rank that shares nothing waits for the others
    assert_same(before, snapshot(trainer.tensors()))


def experts_of_other_ranks():
    """Dense parameters are the same on all three ranks, experts on the first and the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainBinding, "inventory", _with_experts(PlainBinding.inventory))
        trainer, manager = make(model=Flat(49152, 49152, 49152), bucket_bytes=1)
        if dist.get_rank() == 1:
            trainer.model[1].data.fill_(3)
        before = snapshot(trainer.tensors())
        for _ in range(2):
            report = manager.offload("weights")
            assert report.host_bytes == 2 * 16384 + (49152 if dist.get_rank() == 1 else 24576)
            assert not differences(report), differences(report)
            manager.onload()
            assert_same(before, snapshot(trainer.tensors()))
        manager.close()


def _with_experts(inventory):
    def changed(binding):
        found = inventory(binding)
        (group,) = [g for g in found.groups if g.replicas and g.tensors]
        expert = found.group(group.kind, "experts", replicas=(0, 2) if dist.get_rank() != 1 else (1,))
        expert.tensors.append(group.tensors.pop(1))
        return found

    return changed


# --- what fails ------------------------------------------------------------------------------------------------------


def faults_of_an_offload():
    for error in (RuntimeError, KeyboardInterrupt):
        ranks.faults_out(error, points=OUT, make=make)


def faults_of_an_onload():
    trainer, manager = make(host_memory="pinned")
    before = snapshot(trainer.tensors())
    for error in (RuntimeError, KeyboardInterrupt):
        for in_background in (False, True):
            if in_background and error is KeyboardInterrupt:
                continue
            for number, name in enumerate(BACK):
                manager.offload(keep_grads=True)

                def call():
                    moved = manager.onload(non_blocking=in_background)  # noqa: B023
                    return moved.wait() if in_background else moved  # noqa: B023

                fails_everywhere(call, name, number % 2, error)
                assert len({tuple(where) for where in everywhere(ranks.where(manager))}) == 1
                blocks = junk([4096] * 4)
                manager.onload()
                assert_all(manager, Residency.RESIDENT)
                assert_same(before, snapshot(trainer.tensors()))
                del blocks
    manager.close()


def a_rank_that_waits_for_memory():
    """It has begun all that the others need, so that they come to the vote meanwhile."""
    trainer, manager = make(BEYOND_A_PAUSE, host_memory="pageable")
    before = snapshot(trainer.tensors(KEPT))
    manager.offload()
    confirm, meet, device = _GroupBallot.confirm, HostReplicas.meet, manager._device
    has_met = threading.Event()

    def votes(ballot, kind=None):
        ranks.tell("voting")
        confirm(ballot, kind)

    def meets(*arguments):
        meet(*arguments)
        has_met.set()

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(_GroupBallot, "confirm", votes)
        else:
            free = device.free_bytes
            patch.setattr(HostReplicas, "meet", meets)
            patch.setattr(
                device, "free_bytes", lambda: 0 if has_met.is_set() and not ranks.was_told("voting") else free()
            )
        manager.onload(wait_for_memory=LONG)
    assert_same(before, snapshot(trainer.tensors(KEPT)))
    manager.close()


def chunks_that_are_on_their_way_before_the_ranks_meet():
    """Memory for what is shared is taken part by part too, and what follows is made good if another rank gets none."""
    trainer, manager = make(BEYOND_A_PAUSE)
    before = snapshot(trainer.tensors(KEPT))
    meet, queued = HostReplicas.meet, []
    with pytest.MonkeyPatch.context() as patch, faults.meddle("onload.chunk", lambda: None) as chunks:
        patch.setattr(HostReplicas, "meet", lambda *arguments: (queued.append(chunks[0]), meet(*arguments)))
        for _ in range(2):
            manager.offload()
            manager.onload()
            assert_same(before, snapshot(trainer.tensors(KEPT)))
        assert queued[0] > 1
        manager.offload()
        num_shared = sum(parked.share is not None for parked in manager._engine.on_host())
        assert num_shared > 1
        with others_fault("onload.reserve", rank=1, after=num_shared - 1):
            fails_and_is_undone(trainer, manager, "injected")
        manager.onload()
    assert_same(before, snapshot(trainer.tensors(KEPT)))
    manager.close()


def digests_behind_all_gathers_of_their_own():
    """Who waits for the digest of a kind waits for no other kind: a rank may be stuck in one of those.

    And what is not shared waits for no all-gather at all.
    """
    trainer, manager = make(BEYOND_A_PAUSE, verify="digest")
    before = snapshot(trainer.tensors(KEPT))
    manager.offload()
    away = {storage_id(p.storage): p.share is not None for p in manager._engine.on_host() if p.digest is not None}
    queued, streams = [], ["none"]
    advance, begin = Gathering.advance, Digester.begin_here

    @contextlib.contextmanager
    def on(stream, *_after):
        streams.append(stream)
        yield
        streams.pop()

    def gathers(gathering, storage, share):
        queued.append(("gathered", storage_id(storage)))
        advance(gathering, storage, share)

    def digests(digester, storage):
        queued.append((f"digest {streams[-1]}", storage_id(storage)))
        return begin(digester, storage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gathering, "advance", gathers)
        patch.setattr(Digester, "begin_here", digests)
        for name in ("beside", "gathering"):
            patch.setattr(manager._device, name, partial(on, name))
        manager.onload()
    of_shared = [each for each in queued if away[each[1]]]
    assert of_shared == [(what, each) for _, each in of_shared[::2] for what in ("gathered", "digest gathering")]
    assert {what for what, each in queued if not away[each]} == {"digest beside"}
    assert len(of_shared) == 2 * sum(away.values()) > 2
    assert_same(before, snapshot(trainer.tensors(KEPT)))
    manager.close()


def an_all_gather_that_cannot_be_made():
    """The memory is given up again, and the next onload connects anew."""
    trainer, manager = make(BEYOND_A_PAUSE)
    before = snapshot(trainer.tensors(KEPT))
    manager.offload()
    all_gather, made = Communicator.all_gather, []

    def breaks(communicator, *details):
        made.append(1)
        if len(made) > 2:
            raise RuntimeError("remote process exited")
        all_gather(communicator, *details)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(Communicator, "all_gather", breaks)
        fails_and_is_undone(trainer, manager, "remote process exited")
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KEPT)))
    manager.close()


def memory_that_comes_in_another_order():
    """A rank that waits for memory takes what fits; each all-gather is behind the chunk of its own piece even so."""
    big, small = 8 * UNIT, 2 * UNIT
    sizes = {"bucket_bytes": 1, "chunk_bytes": UNIT}
    flat, manager = make(BEYOND_A_PAUSE, model=Flat(big, small), host_memory="pageable", **sizes)
    before = snapshot(flat.tensors())
    manager.offload()
    blocks = junk([big, small])
    asked = []

    def free_bytes():  # the neighbour lets go when it was asked once
        asked.append(1)
        return small if len(asked) == 1 else big + small

    def slow(region, offset, buffer, nbytes):
        time.sleep(0.2)  # of the chunks that the others wait for
        read(region, offset, buffer, nbytes)

    def takes(move, part):
        taken.extend(parked.nbytes for parked in part)
        take(move, part)

    taken, take, read = [], Refill._take, HostRegion.read
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(manager._device, "free_bytes", free_bytes)
            patch.setattr(HostRegion, "read", slow)
            patch.setattr(Refill, "_take", staticmethod(takes))
        manager.onload(wait_for_memory=LONG)
    assert_same(before, snapshot(flat.tensors()))
    assert taken == ([small, big] if dist.get_rank() == 0 else [])
    manager.close()
    del blocks


def a_kind_that_fails_while_others_are_on_their_way():
    """Nobody votes on it who still has to begin what the others need; so the ranks stay connected."""
    trainer, manager = make(BEYOND_A_PAUSE, host_memory="pageable")
    given_up = logging.handlers.BufferingHandler(1000)
    logging.getLogger("megastow.gather").addHandler(given_up)
    before = snapshot(trainer.tensors(KEPT))
    for seconds in (0.0, LONG):
        manager.offload()
        fails_everywhere(
            lambda: manager.onload(non_blocking=True, wait_for_memory=seconds).wait(),  # noqa: B023
            "onload.confirm",
            1,
            RuntimeError,
        )
        assert_all(manager, Residency.OFFLOADED)
        assert not given_up.buffer, given_up.buffer[0].getMessage()
        manager.onload()
        assert_same(before, snapshot(trainer.tensors(KEPT)))
    logging.getLogger("megastow.gather").removeHandler(given_up)
    manager.close()


def a_rank_that_is_interrupted_twice():
    """It makes no all-gather any more; the others notice, and all connect anew."""
    trainer, manager = make(BEYOND_A_PAUSE)
    before = snapshot(trainer.tensors(KEPT))
    for _ in range(2):
        manager.offload()
        start = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(Gathering, "_begin", _interrupted(Gathering._begin, after=3))
            with pytest.raises((KeyboardInterrupt, PeerError), match=r"rank 1 failed: KeyboardInterrupt|^$"):
                manager.onload()
        assert time.monotonic() - start < LONG  # the limit, and what gloo takes to end what was under way
        assert_all(manager, Residency.OFFLOADED)
        manager.onload()
        assert_same(before, snapshot(trainer.tensors(KEPT)))
    manager.close()


def _interrupted(begin, after):
    passed = []

    def begins(gathering):
        passed.append(gathering)
        if after < len(passed) <= after + 2:
            raise KeyboardInterrupt
        begin(gathering)

    return begins


def an_undoing_that_fails_on_one_rank():
    """It counts as offloaded there, with what is shared still on the device; the same call brings all together."""
    trainer, manager = make()
    before = snapshot(trainer.tensors(KEPT))
    with (
        others_fault("offload.drop", lambda: RuntimeError("injected"), rank=0),
        others_fault("onload.confirm", lambda: MemoryError("no room to undo"), rank=1),
        pytest.raises(MegastowError),
    ):
        manager.offload()
    assert everywhere(ranks.where(manager))[0] == ["resident"] * 4
    assert everywhere(ranks.where(manager))[1] == ["offloaded"] * 4
    manager.offload()
    assert_all(manager, Residency.OFFLOADED)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KEPT)))
    manager.close()


def residencies_that_differ():
    """A rank that has away what the others have not is told what to do, and helped by it."""
    trainer, manager = make(model=Flat(32768, 40000))
    before = snapshot(trainer.tensors())
    manager.offload("weights")
    if dist.get_rank() == 0:  # as if it had lost the store between its vote and the decision, and undone its part
        for parked in manager._engine._parked.pop("weights"):
            parked.storage.resize_(parked.nbytes).fill_(0)
        manager._settle()
        for name, tensor in trainer.tensors(("weights",)).items():
            tensor.data.flatten().view(torch.uint8).copy_(before[name])
    with pytest.raises((StateChangedError, PeerError), match="do not have the same state away"):
        manager.onload("weights")
    manager.offload("weights")
    assert_all_of(manager, "weights", Residency.OFFLOADED)
    manager.onload("weights")
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def assert_all_of(manager, kind, residency):
    assert everywhere(manager.residency(kind)) == [residency] * ranks.GROUP.size()


def one_is_killed_on_the_way_back():
    trainer, manager = make(BEYOND_A_PAUSE)
    manager.offload()
    killed = others_fault("onload.chunk", lambda: os.kill(os.getpid(), signal.SIGKILL), rank=2, after=2)
    with killed, pytest.raises(MegastowError):
        manager.onload()
    assert ranks.where(manager) == ["offloaded"] * 4
    assert device_bytes(moved(trainer.tensors())) == 0
    with pytest.raises(PeerError, match="rank 2 did not come"):
        manager.onload()
    manager.close(discard=True)


def replicas_on_some_ranks_only():
    trainer = Trainer()
    with pytest.raises(MegastowError, match="replicas=True"):
        create_memory_manager(trainer.model, trainer.optimizer, group=ranks.GROUP, replicas=dist.get_rank() == 0)
