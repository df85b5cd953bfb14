"""Weights that are rebuilt from main weights: the same bits, or kept; never without what they follow from."""

import threading

import pytest
import torch
from core_toys import Trainer, assert_same, junk, moved, raw, snapshot, storages
from derive_toys import FlatTrainer, derive

from megastow import (
    InvalidArgumentError,
    NotOnHostError,
    OffloadedError,
    Residency,
    StateChangedError,
    TransferError,
    TransferHandle,
    create_memory_manager,
    derived,
    faults,
    swap,
)
from megastow.agreement import Ballot
from megastow.device import CpuDevice
from megastow.digest import SCRATCH_BYTES

BOTH = ("weights", "main_weights")
ERRORS = (RuntimeError, KeyboardInterrupt)


@pytest.fixture
def trainer():
    return stepped()


def stepped(seed=0):
    made = FlatTrainer(seed=seed)
    made.step()
    return made


def flat_bytes(trainer):
    return trainer.flat.numel() * 2


def away_for_a_while(manager, trainer, *kinds, **options):
    sizes = storages(moved(trainer.tensors())).values()
    report = manager.offload(*kinds, **options)
    blocks = junk(sizes)
    manager.onload(*kinds)
    return report, blocks


def finish(move):
    """What a move reports, in the background or not."""
    return move.wait() if isinstance(move, TransferHandle) else move


def where(manager):
    return {kind: manager.residency(kind) for kind in BOTH}


# --- what is derived -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"verify": "digest"}, {"bucket_bytes": 1 << 20}], ids=str)
def test_all_bytes_come_back_and_the_host_keeps_fewer(trainer, options):
    before = snapshot(trainer.tensors())
    manager = derive(trainer, **options)
    for _ in range(3):
        report, blocks = away_for_a_while(manager, trainer)
        assert report.derived_bytes == report.kinds["weights"].derived_bytes == flat_bytes(trainer)
        assert not report.notes
        assert_same(before, snapshot(trainer.tensors()))
        del blocks
    keeping = derive(trainer, **options, derive_weights=False)
    kept = keeping.offload()
    assert kept.derived_bytes == 0
    assert kept.host_bytes - report.host_bytes == -(-flat_bytes(trainer) // 512) * 512
    assert keeping.host_bytes - manager.host_bytes >= flat_bytes(trainer)
    assert kept.device_bytes == report.device_bytes
    keeping.onload()


def test_training_goes_on_as_if_nothing_had_happened():
    trainer, twin = FlatTrainer(), FlatTrainer()
    manager = derive(trainer)
    for number in range(6):
        assert torch.equal(raw(trainer.step()), raw(twin.step()))
        report, blocks = away_for_a_while(manager, trainer, *(BOTH if number % 2 else ()))
        assert report.derived_bytes == flat_bytes(trainer)
        del blocks
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))


def test_weights_leave_alone_and_come_back_from_main_weights_that_stay(trainer):
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    report, _blocks = away_for_a_while(manager, trainer, "weights")
    assert report.derived_bytes == flat_bytes(trainer)
    assert_same(before, snapshot(trainer.tensors()))


def test_main_weights_may_follow_and_come_back_first(trainer):
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    manager.offload("weights")
    manager.offload("main_weights")
    manager.onload("main_weights")
    manager.onload("weights")
    assert_same(before, snapshot(trainer.tensors()))


def test_tensors_are_the_same_objects_with_the_same_versions(trainer):
    before = {name: (id(t), t._version, t.storage_offset()) for name, t in trainer.tensors().items()}
    away_for_a_while(derive(trainer, bucket_bytes=1), trainer)
    assert before == {name: (id(t), t._version, t.storage_offset()) for name, t in trainer.tensors().items()}


def test_bits_that_a_cast_gives_back_are_derived(trainer):
    """Infinities, signed zeros, and what becomes a subnormal of bf16."""
    start, main = max(trainer.main, key=lambda each: each[1].numel())
    values = [0.0, -0.0, float("inf"), float("-inf"), 1e-40, -1e-40, 9.2e-41]
    main.data[: len(values)] = torch.tensor(values)
    trainer.gather()
    before = snapshot(trainer.tensors())
    report, _blocks = away_for_a_while(derive(trainer), trainer)
    assert report.derived_bytes == flat_bytes(trainer)
    assert_same(before, snapshot(trainer.tensors()))
    assert trainer.flat[start : start + 2].view(torch.int16).tolist() == [0, -0x8000]


@pytest.mark.parametrize("window", [6, 34, 1 << 20])
def test_the_proof_looks_at_every_element_whatever_its_window(trainer, window, monkeypatch):
    monkeypatch.setattr(derived, "WINDOW_BYTES", window)
    manager = derive(trainer)
    before = snapshot(trainer.tensors())
    assert away_for_a_while(manager, trainer)[0].derived_bytes == flat_bytes(trainer)
    for number in (0, trainer.flat.numel() // 2 + 3, trainer.flat.numel() - 1):
        trainer.flat.data.view(torch.int16)[number] ^= 1
        assert away_for_a_while(manager, trainer)[0].derived_bytes == 0
        trainer.flat.data.view(torch.int16)[number] ^= 1
    assert_same(before, snapshot(trainer.tensors()))


# --- what is kept ----------------------------------------------------------------------------------------------------


def one_bit(trainer):
    trainer.flat.data.view(torch.int16)[trainer.ranges[3][0] + 5] ^= 1


def a_negative_zero(trainer):
    trainer.main[2][1].data[1] = 0.0
    trainer.gather()
    trainer.flat.data[trainer.main[2][0] + 1] = -0.0


def a_payload(trainer):
    start, main = trainer.main[2]
    main.data[1] = float("nan")
    trainer.gather()
    trainer.flat.data.view(torch.int16)[start + 1] = 0x7F81


def padding(trainer):
    trainer.flat.data.view(torch.int16)[trainer.ranges[1][1] + 1] = -0x8000


@pytest.mark.parametrize("doctor", [one_bit, a_negative_zero, a_payload, padding])
def test_a_buffer_that_is_no_cast_is_kept_and_said(trainer, doctor):
    doctor(trainer)
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    for _ in range(2):
        report, blocks = away_for_a_while(manager, trainer)
        assert report.derived_bytes == 0
        assert any("the flat buffer is kept" in note and "cast of main weights" in note for note in report.notes)
        assert_same(before, snapshot(trainer.tensors()))
        del blocks
    trainer.gather()
    trainer.flat.data[trainer.ranges[1][1] : trainer.ranges[2][0]] = 0
    assert away_for_a_while(manager, trainer)[0].derived_bytes == flat_bytes(trainer)


def test_weights_are_kept_where_main_weights_have_left_before(trainer):
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    manager.offload("main_weights")
    report = manager.offload("weights")
    assert report.derived_bytes == 0
    assert any("away already" in note for note in report.notes)
    manager.onload("weights")
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


@pytest.mark.parametrize("part", ["of the buckets", "of the storage"])
def test_a_claim_that_does_not_cover_its_storage_is_kept(trainer, part):
    if part == "of the storage":
        trainer.flat = trainer.flat[: trainer.buckets[0].end]
        trainer.main = [each for each in trainer.main if each[0] < trainer.flat.numel()]
    trainer.buckets.pop()
    before = snapshot(trainer.tensors())
    report, _blocks = away_for_a_while(derive(trainer), trainer)
    assert report.derived_bytes == 0
    assert any("no flat buffer" in note for note in report.notes)
    assert_same(before, snapshot(trainer.tensors()))


def test_an_adapter_that_cannot_tell_is_refused():
    other = Trainer()
    with pytest.raises(InvalidArgumentError, match="derive_weights is not available for this adapter"):
        create_memory_manager(other.model, other.optimizer, derive_weights=True)
    create_memory_manager(other.model, other.optimizer).close()


# --- what weights follow from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("non_blocking", [False, True])
def test_weights_do_not_come_back_without_main_weights(trainer, non_blocking):
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    manager.offload()
    state = {name: t.untyped_storage().nbytes() for name, t in trainer.tensors().items()}
    with pytest.raises(OffloadedError, match=r"onload\('weights', 'main_weights'\)"):
        finish(manager.onload("weights", non_blocking=non_blocking))
    assert set(where(manager).values()) == {Residency.OFFLOADED}
    assert state == {name: t.untyped_storage().nbytes() for name, t in trainer.tensors().items()}
    manager.onload(*BOTH)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


@pytest.mark.parametrize("non_blocking", [False, True])
def test_main_weights_that_changed_meanwhile_are_seen(trainer, non_blocking):
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    manager.offload("weights")
    main = trainer.main[1][1]
    kept = main.data.clone()
    main.data[3] += 1
    for _ in range(2):
        with pytest.raises(StateChangedError, match="main weights have changed"):
            finish(manager.onload("weights", non_blocking=non_blocking))
        assert where(manager) == {"weights": Residency.OFFLOADED, "main_weights": Residency.RESIDENT}
        assert trainer.flat.untyped_storage().nbytes() == 0
    main.data.copy_(kept)
    manager.onload("weights")
    assert_same(before, snapshot(trainer.tensors()))


def test_a_cast_of_changed_main_weights_comes_back_on_request(trainer):
    manager = derive(trainer)
    manager.offload("weights")
    trainer.main[1][1].data[3] += 1
    manager.onload("weights", unverified=True)
    found = raw(trainer.flat)
    trainer.gather()
    assert torch.equal(found, raw(trainer.flat))


def test_what_was_not_kept_is_not_on_the_host(trainer):
    manager = derive(trainer)
    manager.offload()
    weight = trainer.model.layers[0].weight
    for look in (
        lambda: manager.host_tensor(weight),
        lambda: manager.host_state_dict("weights"),
        lambda: manager.on_host(trainer.model.state_dict),
    ):
        with pytest.raises(NotOnHostError, match="rebuilt from main weights"):
            look()
    kept = {"frozen": manager.host_tensor(trainer.model.frozen), "main": manager.host_tensor(trainer.main[0][1])}
    kept = {name: raw(tensor) for name, tensor in kept.items()}
    manager.onload()
    assert_same(kept, {"frozen": raw(trainer.model.frozen), "main": raw(trainer.main[0][1])})


# --- when it happens -------------------------------------------------------------------------------------------------


def test_weights_count_as_arrived_when_they_are_rebuilt_and_not_before(trainer):
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    manager.offload()
    seen, outputs = {}, []
    inputs = torch.ones(1, 20, dtype=torch.bfloat16)
    forward = threading.Thread(target=lambda: outputs.append(trainer.model(inputs)))

    def look():
        seen.update(where(manager))
        forward.start()
        forward.join(0.2)
        seen["waits"] = forward.is_alive() and not outputs

    with faults.meddle("derive.rebuild", look):
        manager.onload(non_blocking=True).wait()
    forward.join(30)
    assert seen == {"weights": Residency.ONLOADING, "main_weights": Residency.RESIDENT, "waits": True}
    assert torch.equal(raw(outputs[0]), raw(trainer.model(inputs)))
    assert_same(before, snapshot(trainer.tensors()))


def test_two_managers_change_places():
    one, other = stepped(1), stepped(2)
    before = [snapshot(t.tensors()) for t in (one, other)]
    first, second = derive(one), derive(other)
    second.offload()
    swap(leaving=first, coming=second)
    assert_same(before[1], snapshot(other.tensors()))
    swap(leaving=second, coming=first)
    second.onload()
    assert_same(before[0], snapshot(one.tensors()))
    assert_same(before[1], snapshot(other.tensors()))


@pytest.fixture
def on_streams(monkeypatch):
    """What has been begun on which stream beside the caller's, in order."""
    seen = []
    copying, beside = CpuDevice.copying, CpuDevice.beside
    monkeypatch.setattr(CpuDevice, "copying", lambda *given: (seen.append("copying"), copying(*given))[1])
    monkeypatch.setattr(CpuDevice, "beside", lambda *given: (seen.append("beside"), beside(*given))[1])
    return seen


@pytest.mark.parametrize("verify", ["none", "digest"])
def test_the_proof_waits_for_no_copy_that_has_begun_before_it(trainer, verify, on_streams):
    manager = derive(trainer, verify=verify)
    manager.offload()
    manager.onload()
    trainer.step()
    before = snapshot(trainer.tensors())
    on_streams.clear()
    asked, ask = [], Ballot.ask
    with pytest.MonkeyPatch.context() as patch, faults.meddle("derive.prove", lambda: on_streams.append("proof")):
        patch.setattr(Ballot, "ask", lambda *said: (asked.append(list(on_streams)), ask(*said))[1])
        report = manager.offload()
    assert report.derived_bytes == flat_bytes(trainer)
    assert asked[0][0] == "copying"
    assert asked[0].index("proof") == len(asked[0]) - 1
    assert on_streams[len(asked[0]) :] == ["copying"]  # and all that is kept had begun
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


@pytest.mark.parametrize("verify", ["none", "digest"])
@pytest.mark.parametrize("is_cast_at_first", [False, True])
def test_what_was_kept_last_time_may_be_derived_now_and_the_other_way_round(trainer, is_cast_at_first, verify):
    manager = derive(trainer, verify=verify)
    is_cast = is_cast_at_first
    for _ in range(4):
        trainer.step()
        if not is_cast:
            one_bit(trainer)
        before = snapshot(trainer.tensors())
        report, blocks = away_for_a_while(manager, trainer)
        assert report.derived_bytes == is_cast * flat_bytes(trainer)
        assert_same(before, snapshot(trainer.tensors()))
        del blocks
        is_cast = not is_cast


@pytest.mark.parametrize("non_blocking", [False, True])
def test_they_come_back_where_memory_comes_in_pieces(trainer, non_blocking, monkeypatch):
    """They wait for room while what fits is taken, and are here when weights are."""
    before = snapshot(trainer.tensors())
    manager = derive(trainer, bucket_bytes=1)
    manager.offload()
    asked = []
    with faults.meddle("onload.reserve", lambda: None) as taken:

        def free_bytes(self):
            asked.append(taken[0])
            waits = asked[-3:] == [taken[0]] * 3
            return 1 << 40 if waits else flat_bytes(trainer) - 1 + SCRATCH_BYTES

        monkeypatch.setattr(CpuDevice, "free_bytes", free_bytes)
        report = finish(manager.onload(wait_for_memory=20, non_blocking=non_blocking))
    waited = [number for number in set(asked) if asked.count(number) >= 3]
    assert len(waited) == 1  # once, for the one that is too large
    assert waited[0] > 0
    assert report.kinds["weights"].derived_bytes == flat_bytes(trainer)
    assert_same(before, snapshot(trainer.tensors()))


def test_plans_and_preparations_count_on_it(trainer):
    manager = derive(trainer)
    plan = manager.plan()
    manager.prepare(wait=True)
    prepared = manager.host_bytes
    report = manager.offload()
    assert plan.kinds["weights"].derived_bytes == report.derived_bytes == flat_bytes(trainer)
    assert plan.kinds["weights"].host_bytes >= report.kinds["weights"].host_bytes
    assert "to be rebuilt" in str(plan)
    assert "from main weights" in str(report)
    assert report.as_dict()["derived_bytes"] == flat_bytes(trainer)
    assert manager.host_bytes == prepared
    assert manager.plan().kinds["weights"].derived_bytes == flat_bytes(trainer)
    manager.onload()


def test_closing_brings_them_back(trainer):
    before = snapshot(trainer.tensors())
    with derive(trainer) as manager:
        manager.offload()
    assert_same(before, snapshot(trainer.tensors()))


# --- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
def test_a_proof_can_fail_while_the_first_copies_are_under_way(trainer, error):
    manager = derive(trainer)
    manager.offload()
    manager.onload()
    trainer.step()
    before = snapshot(trainer.tensors())
    with (
        faults.meddle("offload.copied", lambda chunk: None) as copied,
        faults.inject("derive.prove", lambda: error("injected")),
        pytest.raises(error if error is KeyboardInterrupt else TransferError, match="injected"),
    ):
        manager.offload()
    assert copied[0] > 0
    assert set(where(manager).values()) == {Residency.RESIDENT}
    assert_same(before, snapshot(trainer.tensors()))
    trainer.step()
    before = snapshot(trainer.tensors())
    assert away_for_a_while(manager, trainer)[0].derived_bytes == flat_bytes(trainer)
    assert_same(before, snapshot(trainer.tensors()))


@pytest.mark.parametrize("non_blocking", [False, True])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "name", ["derive.prove", "offload.release", "offload.drop", "onload.reserve", "onload.confirm", "derive.rebuild"]
)
def test_every_step_can_fail(trainer, name, error, non_blocking):
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    resting, call = Residency.RESIDENT, manager.offload
    back = name in ("onload.reserve", "onload.confirm", "derive.rebuild")
    if back:
        manager.offload()
        resting, call = Residency.OFFLOADED, manager.onload
    raises = pytest.raises(error if error is KeyboardInterrupt else TransferError, match="injected")
    with faults.inject(name, lambda: error("injected")) as passed, raises:
        finish(call(non_blocking=non_blocking))
    assert passed == [1]
    assert manager.residency("weights") is resting
    if not back:
        assert_same(before, snapshot(trainer.tensors()))
    call()
    blocks = junk([4096] * 4)
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    trainer.step()
    del blocks


def test_an_offload_that_is_interrupted_while_it_drops_ends(trainer, monkeypatch):
    """Its first byte is gone, and nothing else than a rebuilding brings it back."""
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    dropped = []
    clock = type(manager._engine)._drop

    def interrupt(engine, plans, watch):
        clock(engine, plans, watch)
        if not dropped:
            dropped.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(type(manager._engine), "_drop", interrupt)
    with pytest.raises(KeyboardInterrupt):
        manager.offload()
    assert set(where(manager).values()) == {Residency.OFFLOADED}
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


def test_a_failing_cast_leaves_them_away(trainer, monkeypatch):
    before = snapshot(trainer.tensors())
    manager = derive(trainer)
    manager.offload()

    def fail(buffer):
        buffer.flat.data[:100].fill_(7)
        raise RuntimeError("halfway")

    with monkeypatch.context() as patch:
        patch.setattr(derived, "_cast", fail)
        with pytest.raises(TransferError, match="halfway"):
            manager.onload()
    assert set(where(manager).values()) == {Residency.OFFLOADED}
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
