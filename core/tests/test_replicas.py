"""Ranks that share what is the same on all of them: each keeps a part, and every byte is back on each."""

import ctypes
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from core_toys import Trainer, assert_same, snapshot
from rank_group import RankGroup

from megastow import InvalidArgumentError, create_memory_manager
from megastow.gather import Communicator
from megastow.shares import UNIT_BYTES, Share


@pytest.fixture(scope="module")
def ranks():
    made = RankGroup(3, "replica_scenarios")
    yield made
    made.close()


@pytest.mark.parametrize(
    "scenario",
    [
        "cycles",
        "host_memory_is_shared",
        "an_offload_begins_with_its_parts",
        "all_tiers",
        "digests_are_compared",
        "two_managers_change_places",
        "closing_brings_back_together",
        "views_are_refused",
        "ranks_that_differ_keep_all",
        "ranks_with_other_storages_keep_all",
        "ranks_with_other_storages_of_one_kind",
        "faults_of_an_offload",
        "faults_of_an_onload",
        "a_rank_that_waits_for_memory",
        "chunks_that_are_on_their_way_before_the_ranks_meet",
        "memory_that_comes_in_another_order",
        "an_all_gather_that_cannot_be_made",
        "digests_behind_all_gathers_of_their_own",
        "a_kind_that_fails_while_others_are_on_their_way",
        "a_rank_that_is_interrupted_twice",
        "an_undoing_that_fails_on_one_rank",
        "residencies_that_differ",
        "replicas_on_some_ranks_only",
    ],
)
def test_two_ranks(ranks, scenario):
    ranks.run(scenario, world=2)


@pytest.mark.parametrize(
    "scenario", ["cycles", "host_memory_is_shared", "ranks_of_several_hosts", "experts_of_other_ranks"]
)
def test_three_ranks(ranks, scenario):
    ranks.run(scenario, world=3)


def test_one_of_three_is_killed(ranks):
    ranks.run("one_is_killed_on_the_way_back", world=3, lost=[2])


def test_an_interrupt_leaves_no_all_gather_unknown():
    """A signal that comes while one is queued is handled when it has been noted, and not before."""
    works = []
    kill = ctypes.CDLL(None).kill  # unlike `os.kill`, it leaves the handling of signals to the interpreter
    communicator = Communicator(SimpleNamespace(_allgather_base=kill), None, (0, 1))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        with pytest.raises(KeyboardInterrupt):
            communicator.all_gather(os.getpid(), signal.SIGINT, works)
    finally:
        signal.signal(signal.SIGINT, before)
    assert works == [0]


# --- the parts, without processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 8192, 65_536, 98_304, 300_001])
@pytest.mark.parametrize("chunk_bytes", [4096, 8192, 1 << 20])
def test_parts_cover_a_storage_once(world, nbytes, chunk_bytes):
    members = tuple(range(10, 10 + world))
    shares = [Share(members, rank, nbytes, chunk_bytes) for rank in members]
    owners = torch.full((nbytes,), -1)
    pieces = [list(share.pieces()) for share in shares]
    assert len({tuple((p.start, p.nbytes, p.chunk_bytes) for p in each) for each in pieces}) == 1
    for index, each in enumerate(pieces):
        for piece in each:
            assert piece.chunk_bytes <= chunk_bytes
            assert piece.chunk_bytes % UNIT_BYTES == 0
            assert piece.own_start == piece.start + index * piece.chunk_bytes
            part = owners[piece.own_start : piece.own_start + piece.chunk_bytes]
            assert part.numel() == piece.chunk_bytes
            assert (part == -1).all()
            part.fill_(index)
    rest = shares[0].rest_bytes
    assert rest < world * UNIT_BYTES
    assert (owners[: nbytes - rest] >= 0).all()
    assert (owners[nbytes - rest :] == -1).all()
    for index, share in enumerate(shares):
        assert share.kept_bytes == int((owners == index).sum()) + rest


# --- arguments -------------------------------------------------------------------------------------------------------


def test_replicas_need_ranks():
    with pytest.raises(InvalidArgumentError, match=r"replicas=True needs torch\.distributed"):
        create_memory_manager(torch.nn.Linear(2, 2), replicas=True)


def test_a_group_of_one_moves_as_without(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        trainer = Trainer()
        trainer.step()
        before = snapshot(trainer.tensors(("weights",)))
        with create_memory_manager(trainer.model, trainer.optimizer, replicas=True) as manager:
            report = manager.offload("weights")
            assert report.host_bytes >= report.device_bytes
            manager.onload()
        assert_same(before, snapshot(trainer.tensors(("weights",))))
    finally:
        torch.distributed.destroy_process_group()
