"""`verify="digest"`: a copy that silently damages a byte, either way; what is told, what is kept, how to go on."""

import contextlib
import functools

import pytest
import torch
from core_toys import KINDS, Trainer, assert_same, device_bytes, moved, raw, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from megastow import (
    CorruptionError,
    DeviceMemoryError,
    InvalidArgumentError,
    OffloadedError,
    Residency,
    TransferError,
    create_memory_manager,
    faults,
    swap,
)

ORDER_BACK = ("weights", "grad_buffers", "main_weights", "optimizer_states")
SIZES = {"bucket_bytes": 4096, "chunk_bytes": 512}
TOKENS = torch.zeros(1, dtype=torch.long)


def make(trainer, verify="digest", **where):
    return create_memory_manager(trainer.model, trainer.optimizer, verify=verify, **SIZES, **where)


def stepped(seed=0):
    trainer = Trainer(seed)
    trainer.step()
    return trainer


@functools.cache
def chunks(kind):
    """How many copies a kind takes."""
    trainer = stepped()
    with faults.meddle("offload.copied", print, after=1 << 40) as passed:
        make(trainer).offload(kind, keep_grads=True)
    return passed[0]


def damage(direction, kind=None, bit=1):
    """One bit in the middle of what is copied of a kind, while all kinds move.

    Chunks begin where tensors do or within them; further on there may be a hole between two tensors.
    """
    before = KINDS if direction == "offload" else ORDER_BACK
    before = before[: before.index(kind)] if kind else ()
    after = sum(map(chunks, before)) + (chunks(kind) // 2 if kind else 0)
    return faults.meddle(f"{direction}.copied", lambda chunk: chunk[:1].bitwise_xor_(bit), after=after)


def changed_bits(before, after):
    """By kind."""
    found = dict.fromkeys(KINDS, 0)
    words = {"weights": "weights", "main": "main_weights", "state": "optimizer_states", "grad": "grad_buffers"}
    seen = set()
    for name, old in before.items():
        difference = old ^ after[name]
        place = name.removesuffix("_view")  # aliases, which would count twice
        if place not in seen:
            seen.add(place)
            kind = words[name.partition(".")[0].partition("[")[0]]
            found[kind] += sum(int((difference >> bit & 1).sum()) for bit in range(8))
    return {kind: bits for kind, bits in found.items() if bits}


def assert_away(trainer, manager, kinds):
    """Residency, memory and guard tell the same."""
    for kind in KINDS:
        assert manager.residency(kind) is (Residency.OFFLOADED if kind in kinds else Residency.RESIDENT)
        assert (device_bytes(moved(trainer.tensors((kind,)))) == 0) == (kind in kinds)
    if "weights" in kinds:
        with pytest.raises(OffloadedError, match="weights"):
            trainer.model(TOKENS)
    else:
        trainer.model(TOKENS)
    if "optimizer_states" in kinds:
        with pytest.raises(OffloadedError, match="optimizer_states"):
            trainer.optimizer.state_dict()


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_on_the_way_back_is_told_and_mended_by_repeating(kind, non_blocking):
    trainer, twin = stepped(), stepped()
    before = snapshot(trainer.tensors())
    manager = make(trainer)
    manager.offload(keep_grads=True)

    def onload():
        return manager.onload(non_blocking=True).wait(60) if non_blocking else manager.onload()

    with damage("onload", kind), pytest.raises(CorruptionError, match=r"repeat the call") as raised:
        onload()
    assert not raised.value.host_is_damaged
    assert set(raised.value.tensors) == {kind}
    assert raised.value.tensors[kind][0] in str(raised.value)
    assert kind in str(raised.value)
    arrived = ORDER_BACK[: ORDER_BACK.index(kind)] if non_blocking else ()
    assert_away(trainer, manager, set(KINDS) - set(arrived))
    onload()
    assert_away(trainer, manager, ())
    assert_same(before, snapshot(trainer.tensors()))
    for _ in range(2):
        assert torch.equal(raw(trainer.step()), raw(twin.step()))
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_on_the_way_out_is_told_and_comes_back_only_on_demand(kind, non_blocking):
    trainer = stepped()
    before = snapshot(trainer.tensors())
    manager = make(trainer)
    with damage("offload", kind):
        moving = manager.offload(keep_grads=True, non_blocking=non_blocking)
        if non_blocking:
            moving.wait(60)
    held = manager.host_bytes
    for _ in range(2):
        with pytest.raises(CorruptionError, match=r"host memory itself.*onload\(unverified=True\)") as raised:
            manager.onload(non_blocking=True).wait(60) if non_blocking else manager.onload()
        assert raised.value.host_is_damaged
        assert set(raised.value.tensors) == {kind}
        assert manager.host_bytes == held
        arrived = ORDER_BACK[: ORDER_BACK.index(kind)] if non_blocking else ()
        assert_away(trainer, manager, set(KINDS) - set(arrived))
    manager.onload(unverified=True)
    assert_away(trainer, manager, ())
    assert changed_bits(before, snapshot(trainer.tensors())) == {kind: 1}
    manager.offload(keep_grads=True)  # what is on the device is the truth again
    manager.onload()
    assert changed_bits(before, snapshot(trainer.tensors())) == {kind: 1}


def test_the_other_kinds_can_be_brought_back_alone(trainer):
    before = snapshot(trainer.tensors())
    manager = make(trainer)
    with damage("offload", "main_weights"):
        manager.offload(keep_grads=True)
    others = [kind for kind in KINDS if kind != "main_weights"]
    manager.onload(*others)
    assert_away(trainer, manager, {"main_weights"})
    assert_same(snapshot(trainer.tensors(others)), {n: b for n, b in before.items() if not n.startswith("main")})


def test_all_that_is_damaged_is_named(trainer):
    manager = make(trainer)
    with damage("offload", "weights"):
        manager.offload()
    with damage("onload"), pytest.raises(CorruptionError) as first:
        manager.onload("optimizer_states")
    with pytest.raises(CorruptionError) as both, damage("onload"):
        manager.onload("optimizer_states", "weights")
    assert set(first.value.tensors) == {"optimizer_states"}
    assert not first.value.host_is_damaged
    assert set(both.value.tensors) == {"weights"}
    assert both.value.host_is_damaged
    named = sum(first.value.tensors.values(), ())
    assert named
    assert all(name.startswith("state") for name in named)


def test_memory_that_changes_while_the_state_is_away_is_found(trainer):
    manager = make(trainer)
    host = []
    with faults.meddle("offload.copied", host.append, after=5):
        manager.offload()
    host[0][-1] ^= 0x80
    with pytest.raises(CorruptionError) as raised:
        manager.onload()
    assert raised.value.host_is_damaged
    host[0][-1] ^= 0x80
    manager.onload()


def test_without_digests_the_same_damage_goes_through(trainer):
    """Else the tests above would show nothing."""
    for direction in ("offload", "onload"):
        before = snapshot(trainer.tensors())
        manager = make(trainer, "none")
        with damage(direction, "main_weights"):
            manager.offload(keep_grads=True)
            manager.onload()
        assert changed_bits(before, snapshot(trainer.tensors())) == {"main_weights": 1}


def test_an_undoing_that_meets_damage_tells_of_it_and_keeps_all_there_is(trainer):
    before = snapshot(trainer.tensors())
    manager = make(trainer)
    last = faults.inject("offload.drop", lambda: RuntimeError("injected"))
    with damage("offload", "weights"), last, pytest.raises(CorruptionError, match="unverified") as raised:
        manager.offload(keep_grads=True)
    assert str(raised.value.__context__) == "injected"
    assert_away(trainer, manager, set(KINDS))
    manager.onload(unverified=True)
    assert changed_bits(before, snapshot(trainer.tensors())) == {"weights": 1}


@pytest.mark.parametrize("tier", ["pageable", "disk"])
@pytest.mark.parametrize("direction", ["offload", "onload"])
def test_damage_is_told_in_every_tier(direction, tier, disk_folder):
    trainer = stepped()
    before = snapshot(trainer.tensors())
    manager = make(trainer, host_memory=tier, disk_folder=disk_folder)
    manager.offload(keep_grads=True)
    manager.onload()
    with damage("offload") if direction == "offload" else contextlib.nullcontext():
        manager.offload(keep_grads=True)
    meddling = damage("onload") if direction == "onload" else contextlib.nullcontext()
    with meddling, pytest.raises(CorruptionError) as raised:
        manager.onload()
    assert raised.value.host_is_damaged == (direction == "offload")
    (kind,) = raised.value.tensors  # whichever a thread came to first
    assert_away(trainer, manager, set(KINDS))
    manager.onload(unverified=direction == "offload")
    expected = {kind: 1} if direction == "offload" else {}
    assert changed_bits(before, snapshot(trainer.tensors())) == expected


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", [name for name in faults.POINTS if not name.startswith("derive")])
def test_every_step_can_fail_with_digests_too(name, error, disk_folder):
    where = {"host_memory": "disk", "disk_folder": disk_folder} if name.startswith("disk") else {}
    for after in (0, 3):
        trainer = stepped()
        before = snapshot(trainer.tensors())
        manager = make(trainer, **where)
        resting = set()
        if name.startswith("onload") or name == "disk.read":
            manager.offload(keep_grads=True)
            resting = set(KINDS)
        call = manager.onload if resting else functools.partial(manager.offload, keep_grads=True)
        with faults.inject(name, lambda: error("injected"), after=after) as passed:
            try:
                call()
            except (TransferError, KeyboardInterrupt):
                assert_away(trainer, manager, resting)
                call()
        assert passed[0] or name.startswith("pack")
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))


class FailsAt(TorchDispatchMode):
    """Makes one operation of torch fail."""

    def __init__(self, number):
        super().__init__()
        self.number = self.left = number

    @property
    def struck(self):
        return self.left < 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.left -= 1
        if self.left == -1:
            raise RuntimeError("injected")
        return function(*arguments, **(options or {}))


def test_every_operation_of_a_digest_can_fail():
    model = torch.nn.Linear(37, 1, bias=False)  # 148 bytes: there is a rest
    before = raw(model.weight)
    manager = create_memory_manager(model, verify="digest")
    manager.offload()
    manager.onload()
    for call, resting in ((manager.offload, Residency.RESIDENT), (manager.onload, Residency.OFFLOADED)):
        fault = FailsAt(0)
        while fault.number < 200:
            with contextlib.suppress(TransferError), fault:
                call()
            if not fault.struck:
                break
            assert manager.residency("weights") is resting
            fault = FailsAt(fault.number + 1)
        assert 25 < fault.number < 200
        assert manager.residency("weights") is not resting
    assert torch.equal(before, raw(model.weight))


def test_what_is_not_kept_has_no_digest(trainer):
    manager = make(trainer)
    manager.offload("grad_buffers")
    with faults.meddle("onload.copied", print) as passed:
        manager.onload()
    assert passed == [0]
    assert not any(raw(g).any() for g in trainer.tensors(("grad_buffers",)).values())


def test_comparing_takes_memory_that_a_shortage_tells_of(trainer, monkeypatch):
    before = snapshot(trainer.tensors())
    manager = make(trainer)
    taken = manager.offload(keep_grads=True).device_bytes
    monkeypatch.setattr(manager._device, "free_bytes", lambda: taken)
    with pytest.raises(DeviceMemoryError) as raised:
        manager.onload()
    assert raised.value.needed_bytes == taken + (8 << 20)
    manager.onload(unverified=True)
    assert_same(before, snapshot(trainer.tensors()))


def test_a_block_raises_it_and_what_the_block_raised_is_its_context(trainer):
    before = snapshot(trainer.tensors())
    manager = make(trainer)

    def block():
        with manager.offloaded(keep_grads=True):
            raise LookupError("the rollout failed")

    with damage("onload"), pytest.raises(CorruptionError) as raised:
        block()
    assert isinstance(raised.value.__context__, LookupError)
    assert_away(trainer, manager, set(KINDS))
    with damage("onload"), pytest.raises(CorruptionError):
        manager.close()
    manager.close()
    assert_same(before, snapshot(trainer.tensors()))


def test_a_swap_brings_both_back_to_where_they_were():
    one, other = stepped(), stepped(1)
    states = [snapshot(t.tensors(KINDS[:3])) for t in (one, other)]
    leaving, coming = make(one), make(other)
    coming.offload()
    with damage("onload", "weights"), pytest.raises(CorruptionError, match="repeat"):
        swap(leaving, coming)
    assert_away(one, leaving, ())
    assert_away(other, coming, set(KINDS))
    swap(leaving, coming)
    leaving.onload()
    for state, trainer in zip(states, (one, other), strict=True):
        assert_same(state, snapshot(trainer.tensors(KINDS[:3])))


@pytest.mark.parametrize("verify", ["checksum", "Digest", "", None, True])
def test_only_known_ways_to_verify_are_taken(verify):
    with pytest.raises(InvalidArgumentError, match="'digest'"):
        create_memory_manager(torch.nn.Linear(2, 2), verify=verify)
