"""What each rank does in the tests of `test_ranks.py`; run in all processes of `GROUP` at once."""

import contextlib
import itertools
import os
import signal
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from core_toys import KEPT, KINDS, Trainer, assert_same, device_bytes, junk, moved, raw, snapshot
from derive_toys import FlatTrainer, derive

from megastow import (
    AdapterSelectionError,
    AgreementError,
    InvalidArgumentError,
    ManagerClosedError,
    PeerError,
    Residency,
    ResidueError,
    TransferError,
    create_memory_manager,
    create_trainer_memory_manager,
    engine,
    faults,
    swap,
)
from megastow.agreement import GroupAgreement
from megastow.derived import WeightDeriver
from megastow.device import CpuDevice

GROUP = None
SIZES = {"bucket_bytes": 4096, "chunk_bytes": 512}
LONG, SHORT = 30.0, 3.0
OUT = [name for name in faults.POINTS if not name.startswith(("onload", "disk", "derive"))]
BACK = [name for name in faults.POINTS if name.startswith("onload")]


def make(seconds=LONG, steps=1):
    """A trainer of this rank, other bits on each, and its manager."""
    trainer = Trainer(dist.get_rank())
    for _ in range(steps):
        trainer.step()
    everywhere(None)  # a first step can take longer than a short limit, and not on all at once
    return trainer, create_memory_manager(trainer.model, trainer.optimizer, group=GROUP, agree_timeout=seconds, **SIZES)


def everywhere(value):
    """What all ranks have, in their order; also a barrier."""
    found = [None] * GROUP.size()
    dist.all_gather_object(found, value, GROUP)
    return found


def where(manager):
    return [manager.residency(kind).value for kind in KINDS]


def assert_all(manager, residency):
    assert everywhere(where(manager)) == [[residency.value] * 4] * GROUP.size()


def others_fault(name, error=lambda: RuntimeError("injected"), *, rank, after=0):
    """A fault on one rank."""
    return faults.inject(name, error, after=after) if dist.get_rank() == rank else contextlib.nullcontext()


def tell(word):
    _store().set(word, "told")


def hear(word):
    _store().wait([word], timedelta(seconds=LONG))


def was_told(word):
    return _store().check([word])


def _store():
    return dist.distributed_c10d._get_default_store()


# --- what goes well --------------------------------------------------------------------------------------------------


def cycles():
    go_through_cycles(*make(), Trainer(dist.get_rank()))


def go_through_cycles(trainer, manager, twin, look=lambda report: None):
    """Moves of all kinds, the later ones in the background, beside a twin that has made one step less and never moves.

    `look` is given the report of each offload.
    """
    twin.step()
    for number, kinds in enumerate([(), KINDS[:2], ("grad_buffers",), ("optimizer_states", "weights")] * 2):
        before = snapshot(trainer.tensors())
        in_background = number >= 4
        out = manager.offload(*kinds, keep_grads=True, non_blocking=in_background)
        report = out.wait() if in_background else out
        assert report.device_bytes > 0
        look(report)
        assert device_bytes(moved(trainer.tensors(kinds or KINDS))) == 0
        blocks = junk([4096] * 4)
        back = manager.onload(*kinds, non_blocking=in_background)
        assert (back.wait() if in_background else back).device_bytes > 0
        assert_same(before, snapshot(trainer.tensors()))
        assert torch.equal(raw(trainer.step()), raw(twin.step()))
        del blocks
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))
    manager.close()


def calls_with_nothing_to_do():
    _, manager = make()
    assert not manager.onload("weights").kinds["weights"].moved
    manager.offload("weights")
    handle = manager.onload(non_blocking=True)  # the weights only are away
    assert [k for k in KINDS if handle.wait().kinds[k].moved] == ["weights"]
    assert_all(manager, Residency.RESIDENT)
    manager.close()


def several_managers():
    """Their rounds run at the same time, and in another order on each rank."""
    (first, one), (second, other) = make(), make()
    before = [snapshot(t.tensors(KEPT)) for t in (first, second)]
    for _ in range(3):
        managers = [one, other] if dist.get_rank() == 0 else [other, one]
        handles = [manager.offload(non_blocking=True) for manager in managers]
        for handle in handles:
            handle.wait()
        handles = [manager.onload(non_blocking=True) for manager in reversed(managers)]
        for handle in handles:
            handle.wait()
    other.offload()
    swap(leaving=one, coming=other)
    swap(leaving=other, coming=one)
    other.onload()
    for trainer, expected in zip((first, second), before, strict=True):
        assert_same(expected, snapshot(trainer.tensors(KEPT)))
    one.close()
    other.close()


def many_cycles():
    """The store keeps nothing of what is over."""
    _, manager = make()
    keys = []
    for number in range(200):
        manager.offload("main_weights")
        manager.onload("main_weights")
        if number in (3, 199):
            everywhere(None)
            keys.append(_store().num_keys())
            everywhere(None)
    assert abs(keys[0] - keys[1]) <= 2 * GROUP.size(), keys  # those of gloo, and of the last round
    manager.close()


# --- what fails on one rank ------------------------------------------------------------------------------------------


def fails_everywhere(call, name, rank, error):
    with others_fault(name, lambda: error("injected"), rank=rank), pytest.raises(BaseException) as raised:
        call()
    found = raised.value
    if dist.get_rank() != rank:
        assert isinstance(found, PeerError), found
        assert f"rank {rank} failed" in str(found)
        assert "injected" in str(found)
        assert found.ranks == (rank,)
    elif error is KeyboardInterrupt:
        assert isinstance(found, KeyboardInterrupt)
    else:
        assert isinstance(found.__cause__, error)
        assert not isinstance(found, PeerError)


def faults_out(error, in_background=False, points=OUT, make=make):
    for number, name in enumerate(points):
        trainer, manager = make()  # a new one: packing and host memory come once
        before = snapshot(trainer.tensors())

        def call():
            moved = manager.offload(non_blocking=in_background)  # noqa: B023
            return moved.wait() if in_background else moved

        fails_everywhere(call, name, number % 2, error)
        assert_all(manager, Residency.RESIDENT)
        assert_same(before, snapshot(trainer.tensors()))
        call()
        assert_all(manager, Residency.OFFLOADED)
        manager.onload()
        assert_same({n: b for n, b in before.items() if not n.startswith("grad")}, snapshot(trainer.tensors(KEPT)))
        manager.close()


def faults_of_an_offload():
    faults_out(RuntimeError)


def faults_of_an_offload_in_the_background():
    faults_out(MemoryError, in_background=True)


def interruptions_of_an_offload():
    faults_out(KeyboardInterrupt)


def what_one_rank_leaves_behind():
    """A strict offload that leaves too much on one rank is undone on all, also where others are not strict."""
    trainer, manager = make()
    before = snapshot(trainer.tensors())
    most = 0 if dist.get_rank() == 1 else None  # there is always something on the CPU
    calls = (
        lambda: manager.offload(max_residue_bytes=most),
        lambda: manager.offload(max_residue_bytes=most, non_blocking=True).wait(),
    )
    for call in calls:
        with pytest.raises((ResidueError, PeerError), match="would stay on the device") as raised:
            call()
        assert isinstance(raised.value, ResidueError if dist.get_rank() == 1 else PeerError)
        assert_all(manager, Residency.RESIDENT)
        assert_same(before, snapshot(trainer.tensors()))
    manager.offload(strict=True)
    assert_all(manager, Residency.OFFLOADED)
    with pytest.raises((ResidueError, PeerError)):  # nothing to undo
        manager.offload(max_residue_bytes=most)
    assert_all(manager, Residency.OFFLOADED)
    manager.onload()
    assert_same({n: b for n, b in before.items() if not n.startswith("grad")}, snapshot(trainer.tensors(KEPT)))
    manager.close()


def faults_of_an_onload():
    trainer, manager = make()
    before = snapshot(trainer.tensors())
    for error in (RuntimeError, KeyboardInterrupt):
        for number, name in enumerate(BACK):
            manager.offload(keep_grads=True)
            fails_everywhere(manager.onload, name, number % 2, error)
            assert_all(manager, Residency.OFFLOADED)
            assert device_bytes(moved(trainer.tensors())) == 0
            blocks = junk([4096] * 4)
            manager.onload()
            assert_all(manager, Residency.RESIDENT)
            assert_same(before, snapshot(trainer.tensors()))
            del blocks
    manager.close()


def an_onload_in_the_background_stops_at_the_same_kind():
    trainer, manager = make()
    before = snapshot(trainer.tensors())
    for after, arrived in enumerate([(), ("weights",), ("weights", "grad_buffers")]):
        manager.offload(keep_grads=True)
        expected = RuntimeError if dist.get_rank() else PeerError
        with others_fault("onload.confirm", rank=1, after=after), pytest.raises((TransferError, expected)) as raised:
            manager.onload(non_blocking=True).wait()
        assert isinstance(raised.value, PeerError) == (dist.get_rank() == 0)
        resting = [("resident" if kind in arrived else "offloaded") for kind in KINDS]
        assert everywhere(where(manager)) == [resting] * 2
        manager.onload(non_blocking=True).wait()  # some of it is back already
        assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def an_undoing_that_fails_on_one_rank():
    trainer, manager = make()
    before = snapshot(trainer.tensors())
    with (
        others_fault("offload.drop", rank=0),
        others_fault("onload.reserve", lambda: MemoryError("no room to undo"), rank=1),
        pytest.raises(TransferError) as raised,
    ):
        manager.offload(keep_grads=True)
    assert ("no room to undo" in str(raised.value)) == (dist.get_rank() == 1)
    assert everywhere(where(manager)) == [["resident"] * 4, ["offloaded"] * 4]
    manager.offload(keep_grads=True)
    assert_all(manager, Residency.OFFLOADED)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def an_interruption_after_all_have_confirmed():
    """The others do not undo it, so this one must not."""
    trainer, manager = make()
    before = snapshot(trainer.tensors())
    for call, resting in ((manager.offload, Residency.OFFLOADED), (manager.onload, Residency.RESIDENT)):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                votes, vote = iter((False, True)), GroupAgreement.vote

                def interrupted(*arguments):
                    vote(*arguments)  # noqa: B023
                    if next(votes):  # noqa: B023
                        raise KeyboardInterrupt

                    return vote(*arguments)  # noqa: B023

                patch.setattr(GroupAgreement, "vote", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    call()
            else:
                call()
        assert_all(manager, resting)
    assert not any(raw(grad).any() for grad in trainer.tensors(("grad_buffers",)).values())
    manager.offload()
    manager.onload()
    assert_same({n: b for n, b in before.items() if not n.startswith("grad")}, snapshot(trainer.tensors(KEPT)))
    manager.close()


def faults_while_the_last_copies_are_on_their_way():
    """Where memory goes back beside copies, ranks have confirmed a move by then: it ends on all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuDevice, "frees_beside_copies", True)
        for in_flight_bytes, error in itertools.product((0, 1 << 30), (RuntimeError, KeyboardInterrupt)):
            patch.setattr(engine, "IN_FLIGHT_BYTES", in_flight_bytes)
            trainer, manager = make()
            before, grads = snapshot(trainer.tensors(KEPT)), snapshot(trainer.tensors(["grad_buffers"]))
            fails = pytest.raises((TransferError, PeerError, KeyboardInterrupt), match="injected")
            is_early, is_struck = in_flight_bytes == 0, dist.get_rank() == 1
            fault = others_fault("offload.confirm", lambda e=error: e("injected"), rank=1)
            with fault, fails if is_early or is_struck else contextlib.nullcontext():
                manager.offload()
            resting = Residency.RESIDENT if is_early else Residency.OFFLOADED
            assert_all(manager, resting)
            if is_early:
                assert_same(grads, snapshot(trainer.tensors(["grad_buffers"])))
            else:
                assert device_bytes(moved(trainer.tensors())) == 0
            manager.onload()
            assert_same(before, snapshot(trainer.tensors(KEPT)))
            manager.close()


def what_cannot_be_started_is_told():
    _, manager = make()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(threading.Thread, "start", _cannot_start(threading.Thread.start))
        with pytest.raises((RuntimeError, PeerError), match="can't start"):
            manager.offload(non_blocking=True).wait()
    assert_all(manager, Residency.RESIDENT)
    manager.offload()
    manager.close()


def _cannot_start(start):
    def cannot(thread):
        if thread.name == "megastow-offload":
            raise RuntimeError("can't start new thread")
        start(thread)

    return cannot


def a_manager_that_cannot_be_made():
    trainer = Trainer()
    adapter = "plain" if dist.get_rank() == 0 else "unheard of"
    with pytest.raises((PeerError, AdapterSelectionError), match="unheard of"):
        create_memory_manager(trainer.model, trainer.optimizer, group=GROUP, adapter=adapter)
    assert not trainer.model._forward_hooks  # nothing is left of the one that was made
    _, manager = make()
    manager.offload()
    manager.close()


def a_manager_by_classic_arguments():
    """What one rank is told wrong fails on all; the right ones move together, with the options of the other factory."""
    trainer = Trainer(dist.get_rank())
    trainer.step()
    before = snapshot(trainer.tensors())
    right = {
        "use_distributed_optimizer": False,
        "accumulate_allreduce_grads_in_fp32": True,
        "params_dtype": torch.bfloat16,
        "group": GROUP,
        "agree_timeout": LONG,
    }
    told = {**right, "params_dtype": torch.float16} if dist.get_rank() == 1 else right
    with pytest.raises((InvalidArgumentError, PeerError), match="params_dtype is given as") as raised:
        create_trainer_memory_manager(trainer.model, trainer.optimizer, **told)
    assert isinstance(raised.value, InvalidArgumentError if dist.get_rank() == 1 else PeerError)
    assert not trainer.model._forward_hooks
    manager = create_trainer_memory_manager(trainer.model, trainer.optimizer, **right, chunk_bytes=512, verify="digest")
    fails_everywhere(manager.offload, "offload.chunk", 0, RuntimeError)
    assert_all(manager, Residency.RESIDENT)
    assert_same(before, snapshot(trainer.tensors()))
    manager.offload(keep_grads=True)
    assert_all(manager, Residency.OFFLOADED)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


# --- other calls -----------------------------------------------------------------------------------------------------


def different_calls():
    trainer, manager = make()
    before = snapshot(trainer.tensors())
    mine = dist.get_rank()
    pairs = [
        (
            lambda: manager.offload("weights"),
            lambda: manager.offload("main_weights"),
            r"rank 1 called offload\(main_weights\)",
        ),
        (
            lambda: manager.offload(),
            lambda: manager.offload("weights"),
            r"rank 0 called offload\(weights, main_weights",
        ),
        (lambda: manager.offload(keep_grads=True), manager.offload, "rank 0 called offload.*keep_grads"),
        (manager.offload, manager.onload, "rank 1 called onload"),
        (manager.onload, lambda: manager.onload(non_blocking=True).wait(), "rank 1 called onload.*non_blocking"),
    ]
    for resting in (Residency.RESIDENT, Residency.OFFLOADED):
        for pair in pairs:
            with pytest.raises(AgreementError, match=pair[2]):
                pair[mine]()
            assert_all(manager, resting)
        (manager.offload if resting is Residency.RESIDENT else manager.onload)(
            **({"keep_grads": True} if resting is Residency.RESIDENT else {})
        )
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def one_closes():
    trainer, manager = make()
    before = snapshot(trainer.tensors(KEPT))
    manager.offload()
    if dist.get_rank() == 1:
        manager.close()  # brings its own back, and waits for nobody
        with pytest.raises(ManagerClosedError):
            manager.onload()
    else:
        with pytest.raises(PeerError, match="rank 1 has closed its manager"):
            manager.onload()
        assert where(manager) == ["offloaded"] * 4
        manager.close()
    assert_same(before, snapshot(trainer.tensors(KEPT)))


# --- who does not come -----------------------------------------------------------------------------------------------


def one_comes_late():
    trainer, manager = make(SHORT)
    before = snapshot(trainer.tensors())
    if dist.get_rank() == 0:
        for _ in range(2):
            with pytest.raises(PeerError, match=r"rank 1 did not come within 3 s.*rank 0 called offload") as raised:
                manager.offload(keep_grads=True)
            assert raised.value.ranks == (1,)
            assert where(manager) == ["resident"] * 4
        tell("given up")
    else:
        hear("given up")
        with pytest.raises(PeerError, match="rank 1 did not come"):
            manager.offload(keep_grads=True)
    assert_all(manager, Residency.RESIDENT)
    assert_same(before, snapshot(trainer.tensors()))
    manager.offload(keep_grads=True)  # in step again, whoever missed how much
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def a_block_that_raises_on_one_rank():
    trainer, manager = make(SHORT)
    before = snapshot(trainer.tensors(KEPT))

    def rollout():
        with manager.offloaded():
            if dist.get_rank() == 1:
                raise LookupError("the rollout failed")
            hear("left the block")  # still in the rollout

    with pytest.raises(PeerError, match=r"rank 0 did not come.*rank 1 called onload") as raised:
        rollout()
    if dist.get_rank() == 1:
        assert isinstance(raised.value.__context__, LookupError)
        tell("left the block")
    assert_all(manager, Residency.OFFLOADED)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KEPT)))
    manager.close()


def a_block_of_ranks_that_were_parted():
    """It brings back on all ranks what it has offloaded on any of them."""
    for kinds in (("weights",), ("weights", "optimizer_states"), KINDS):
        trainer, manager = make(SHORT)
        before = snapshot(trainer.tensors())
        with (
            others_fault("offload.drop", rank=0),
            others_fault("onload.reserve", lambda: MemoryError("no room to undo"), rank=1),
            pytest.raises(TransferError),
        ):
            manager.offload(*kinds, keep_grads=True)
        parted = [["resident"] * 4, ["offloaded" if kind in kinds else "resident" for kind in KINDS]]
        assert everywhere(where(manager)) == parted
        with manager.offloaded(keep_grads=True):
            assert_all(manager, Residency.OFFLOADED)
            blocks = junk([4096] * 4)
        assert_all(manager, Residency.RESIDENT)
        assert_same(before, snapshot(trainer.tensors()))
        manager.close()
        del blocks


def a_block_leaves_away_what_was_away_on_all_ranks():
    trainer, manager = make(SHORT)
    before = snapshot(trainer.tensors(KEPT))
    manager.offload("weights")
    with manager.offloaded():
        manager.onload("main_weights")
    assert everywhere(where(manager)) == [["offloaded", "resident", "resident", "resident"]] * GROUP.size()
    manager.onload()
    with manager.offloaded():
        manager.close()
    assert where(manager) == ["resident"] * 4
    assert_same(before, snapshot(trainer.tensors(KEPT)))


def a_wait_that_is_interrupted():
    """Ctrl-C ends it at once, and the others learn of it when they come."""
    trainer, manager = make()
    before = snapshot(trainer.tensors())
    if dist.get_rank() == 0:
        timer = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            manager.offload()
        tell("interrupted")
    else:
        hear("interrupted")
        with pytest.raises(PeerError, match="rank 0 failed: KeyboardInterrupt"):
            manager.offload()
    assert_all(manager, Residency.RESIDENT)
    manager.offload(keep_grads=True)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def one_is_killed():
    trainer, manager = make(SHORT)
    before = snapshot(trainer.tensors())
    killed = others_fault("offload.release", lambda: os.kill(os.getpid(), signal.SIGKILL), rank=2, after=3)
    with killed, pytest.raises(PeerError, match="rank 2 did not come") as raised:
        manager.offload()
    assert raised.value.ranks == (2,)
    assert where(manager) == ["resident"] * 4
    assert_same(before, snapshot(trainer.tensors()))
    with pytest.raises(PeerError, match="rank 2 did not come"):
        manager.offload()
    manager.close()
    assert_same(before, snapshot(trainer.tensors()))


# --- weights that are derived ----------------------------------------------------------------------------------------


def derived(**options):
    trainer = FlatTrainer(GROUP)
    trainer.step()
    return trainer, derive(trainer, group=GROUP, agree_timeout=LONG, **options)


def derived_weights():
    """Each rank has the main weights of its shards only, and gets all weights back; also in the background."""
    (trainer, manager), twin = derived(), FlatTrainer(GROUP)
    twin.step()
    for number in range(4):
        before = snapshot(trainer.tensors())
        kinds = KINDS[:2] if number % 2 else ()
        out = manager.offload(*kinds, non_blocking=number > 1)
        report = out.wait() if number > 1 else out
        assert report.derived_bytes == trainer.flat.numel() * 2
        assert trainer.flat.untyped_storage().nbytes() == 0
        blocks = junk([4096] * 4)
        back = manager.onload(*kinds, non_blocking=number > 1)
        assert (back.wait() if number > 1 else back).derived_bytes == report.derived_bytes
        assert_same(before, snapshot(trainer.tensors()))
        assert torch.equal(raw(trainer.step()), raw(twin.step()))
        del blocks
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))
    manager.close()


def derived_weights_that_one_rank_has_differently():
    """In the shard that it gathers from another, in its own, or in neither but for its main weights."""
    trainer, manager = derived()
    (first, last), *_ = (bucket.shard for bucket in trainer.buckets)
    others = first - 1 if first else last
    for number, place in enumerate((others, first)):
        if dist.get_rank() == number:
            trainer.flat.data.view(torch.int16)[place] ^= 1
        before = snapshot(trainer.tensors())
        report = manager.offload()
        assert report.derived_bytes == 0
        assert any("is kept" in note for note in report.notes)
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))
        trainer.gather()
    assert manager.offload().derived_bytes > 0
    manager.close(discard=True)


def derived_weights_on_some_ranks_only():
    """One rank has kept them, as after a decision that it did not learn of: it gathers with the others all the same."""
    trainer, manager = derived()
    before = snapshot(trainer.tensors())
    prove = WeightDeriver.prove
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(WeightDeriver, "prove", lambda *given: dict.fromkeys(prove(*given)))
        report = manager.offload()
    assert (report.derived_bytes == 0) == (dist.get_rank() == 1)
    blocks = junk([4096] * 4)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()
    del blocks


def closing_while_derived_weights_are_away():
    """Nobody gathers alone, or waits for somebody who does not come."""
    trainer, manager = derived()
    before = snapshot(trainer.tensors())
    manager.offload()
    with pytest.raises(TransferError, match=f"together by {GROUP.size()} ranks.* and only 1 of them"):
        manager.close()
    assert_all(manager, Residency.OFFLOADED)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def derived_weights_and_a_fault_on_one_rank():
    trainer, manager = derived()
    before = snapshot(trainer.tensors())
    for number, error in enumerate((RuntimeError, KeyboardInterrupt)):
        fails_everywhere(manager.offload, "derive.prove", number, error)
        assert_all(manager, Residency.RESIDENT)
        assert_same(before, snapshot(trainer.tensors()))
        manager.offload()
        fails_everywhere(manager.onload, "derive.rebuild", number, error)
        assert_all(manager, Residency.OFFLOADED)
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))
    manager.close()
