"""Managers that derive weights, over real trainers: what the suite's own checks do not ask of them."""

import pytest
import torch

from megastow import InvalidArgumentError, PeerError, StateChangedError, TransferError, create_memory_manager, faults
from megastow_conformance import oracle
from megastow_conformance.checks.common import assert_continues, cycle, everything, trained

SIZES = {"bucket_bytes": 4096, "chunk_bytes": 2048}


def deriving(model, optimizer=None, **options):
    """A subject for the suite."""
    group = torch.distributed.group.WORLD
    return create_memory_manager(model, optimizer, derive_weights=True, group=group, **options)


def keeping(model, optimizer=None, **options):
    """The same without."""
    return create_memory_manager(model, optimizer, group=torch.distributed.group.WORLD, **options)


def half_buffers(trainer):
    """The flat parameter buffers that are not fp32; found in Megatron's own attributes."""
    buffers = [b for chunk in trainer.model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return [b.param_data for b in buffers if b.param_data is not None and b.param_data.dtype is not torch.float32]


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saves_the_weights(case):
    """Host memory is less by the flat buffers, everything comes back, and training goes on as it would have."""
    trainer = trained(case)
    before = oracle.snapshot(everything(trainer, grads=False))
    flats = half_buffers(trainer)
    whole = [oracle.as_bytes(flat) for flat in flats]
    manager = case.manager(trainer)
    for kinds in ((), ("weights", "main_weights"), ("weights",), ("main_weights", "weights", "optimizer_states")) * 2:
        report = manager.offload(*kinds)
        assert report.derived_bytes == bytes_of(flats) > 0, f"{report}"
        assert all(flat.untyped_storage().nbytes() == 0 for flat in flats)
        oracle.Garbage([bytes_of(flats), *(flat.numel() for flat in flats)], case.device)
        manager.onload(*kinds)
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=False)), f"after a cycle of {kinds}")
        assert all(torch.equal(a, oracle.as_bytes(b)) for a, b in zip(whole, flats, strict=True)), "padding"
    derived = manager.offload()
    manager.onload()
    manager.close()
    other = keeping(trainer.model, trainer.optimizer)
    kept = other.offload()
    other.onload()
    other.close()
    saved = kept.host_bytes - derived.host_bytes
    assert 0 <= saved - derived.derived_bytes <= 512 * len(flats), f"{saved} of {derived.derived_bytes}"
    assert_continues(case, trainer)


def comes_back(case, share):
    """Whatever is derived and whatever is kept of it; `share` is how much of the flat buffers is derived."""
    trainer = trained(case)
    before = oracle.snapshot(everything(trainer, grads=False))
    manager = case.manager(trainer, **SIZES)
    flats = half_buffers(trainer)
    for kinds in ((), ("weights",)):
        report = manager.offload(*kinds)
        least, most = share
        assert least * bytes_of(flats) <= report.derived_bytes <= most * bytes_of(flats), f"{report}"
        oracle.Garbage([bytes_of(flats)], case.device)
        manager.onload(*kinds)
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=False)), f"after a cycle of {kinds}")
    assert_continues(case, trainer)


def in_the_background(case):
    """A step that begins while everything is on its way waits for the rebuilt weights."""
    trainer = trained(case, 0)
    manager = case.manager(trainer)
    for index in range(2):
        trainer.train_step(index)
        manager.offload(non_blocking=True).wait()
        handle = manager.onload(non_blocking=True)
        handle.wait()
        assert handle.wait().derived_bytes == bytes_of(half_buffers(trainer))
    assert_continues(case, trainer)


def keeps_what_is_no_cast(case, where):
    """One bit on one rank: its buffer is kept on all ranks that gather it, and comes back as it was."""
    trainer = trained(case)
    flats = half_buffers(trainer)
    flat = flats[0]
    position = {"first": 3, "last": flat.numel() - 1}[where]  # of the first rank's shard; padding of the last one's
    if case.rank == case.world - 1:
        flat.data.view(torch.int16)[position] ^= 1
    before = oracle.snapshot({**everything(trainer, grads=False), "flat": flat})
    manager = case.manager(trainer)
    for _ in range(2):
        report = manager.offload()
        assert report.derived_bytes == bytes_of(flats[1:]), f"{report}"
        assert any("buffers[0] is kept" in note for note in report.notes), report.notes
        oracle.Garbage([bytes_of(flats)], case.device)
        manager.onload()
        oracle.assert_same(before, oracle.snapshot({**everything(trainer, grads=False), "flat": flat}), "a bit")


def keeps_what_is_not_gathered_yet(case):
    """Overlapped: between a step and the next forward, each rank has new weights in its own shards only."""
    trainer = trained(case)
    before = oracle.snapshot(everything(trainer, grads=False))
    manager = case.manager(trainer)
    report = manager.offload()
    assert report.derived_bytes == 0, f"{report}"
    assert any("not the same" in note for note in report.notes), report.notes
    manager.onload()
    oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=False)), "not gathered yet")
    assert_continues(case, trainer)


def sees_main_weights_that_change(case):
    """On one rank only; all leave the weights away, and all get them back when it is put right."""
    trainer = trained(case)
    before = oracle.snapshot(everything(trainer, grads=False))
    manager = case.manager(trainer)
    manager.offload("weights")
    main = max(
        (p for group in trainer.optimizer.param_groups for p in group["params"] if p.untyped_storage().nbytes()),
        key=torch.numel,
    )
    saved = main.data.clone()
    if case.rank == case.world - 1:
        main.data += 1
    for _ in range(2):
        with pytest.raises((StateChangedError, PeerError), match="main weights have changed"):
            manager.onload("weights")
        assert manager.residency("weights").value == "offloaded"
        assert not any(flat.untyped_storage().nbytes() for flat in half_buffers(trainer))
    main.data.copy_(saved)
    manager.onload("weights")
    oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=False)), "put right")
    assert_continues(case, trainer)


def faults_on_one_rank(case):
    """A fault in the proof or the rebuilding, on one rank: undone on all, and the same call then works."""
    trainer = trained(case)
    before = oracle.snapshot(everything(trainer, grads=True))
    manager = case.manager(trainer, **SIZES)
    for number, (name, error) in enumerate(
        (name, error) for name in ("derive.prove", "derive.rebuild") for error in (RuntimeError, KeyboardInterrupt)
    ):
        rebuilding = name == "derive.rebuild"
        if rebuilding:
            manager.offload(keep_grads=True)
        call = manager.onload if rebuilding else lambda: manager.offload(keep_grads=True)
        strikes = case.rank == number % case.world
        fault = faults.inject(name, lambda error=error: error("injected"), after=0 if strikes else 1 << 30)
        with fault, pytest.raises((TransferError, KeyboardInterrupt), match="injected"):
            call()
        assert manager.residency("weights").value == ("offloaded" if rebuilding else "resident")
        call()
        manager.onload()
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), f"{error} at {name}")


def needs_a_group(case):
    """Where several ranks gather, a manager that moves alone could hang."""
    trainer = case.build()
    with pytest.raises(InvalidArgumentError, match=r"group=torch.distributed.group.WORLD"):
        create_memory_manager(trainer.model, trainer.optimizer, derive_weights=True)


def keeps_where_nothing_is_derived(case):
    """No distributed optimizer, or main weights in the inner optimizer's state: kept, and said."""
    trainer = trained(case)
    before = oracle.snapshot(everything(trainer, grads=False))
    manager = case.manager(trainer)
    report = manager.offload()
    assert report.derived_bytes == 0
    assert any("kept" in note for note in report.notes), report.notes
    manager.onload()
    oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=False)), "kept")
    cycle(case, manager, trainer)
    assert_continues(case, trainer)
