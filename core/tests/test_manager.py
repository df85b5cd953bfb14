"""The interface: moves by kind, `offloaded()`, `prepare`, `close`, the classic names, several managers, threads."""

import contextlib
import copy
import gc
import itertools
import logging
import random
import re
import threading
import weakref

import pytest
import torch
from core_toys import (
    KINDS,
    Trainer,
    assert_same,
    device_bytes,
    junk,
    live_bytes,
    moved,
    raw,
    run_python,
    snapshot,
    storages,
)

from megastow import ManagerClosedError, OffloadedError, Residency, TransferError, create_memory_manager, faults
from megastow.engine import Engine


def make(trainer, **sizes):
    return create_memory_manager(trainer.model, trainer.optimizer, **sizes)


def away_for_a_while(manager, trainer, *kinds, **options):
    """Offload, fill the released memory with junk, onload."""
    sizes = storages(trainer.tensors())
    manager.offload(*kinds, **options)
    blocks = junk(sizes.values())
    manager.onload(*kinds)
    return blocks


@pytest.mark.parametrize("sizes", [{}, {"bucket_bytes": 2048, "chunk_bytes": 100}, {"bucket_bytes": 1}])
def test_all_bytes_come_back(trainer, sizes):
    before = snapshot(trainer.tensors())
    manager = make(trainer, **sizes)
    for _ in range(3):
        away_for_a_while(manager, trainer, keep_grads=True)
        assert_same(before, snapshot(trainer.tensors()))


def test_training_goes_on_as_if_nothing_had_happened():
    trainer, twin = Trainer(), Trainer()
    manager = make(trainer, bucket_bytes=4096)
    for step in range(6):
        assert torch.equal(raw(trainer.step()), raw(twin.step()))
        away_for_a_while(manager, trainer, keep_grads=bool(step % 2))
    assert_same(snapshot(twin.tensors(KINDS[:3])), snapshot(trainer.tensors(KINDS[:3])))


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_a_step_can_be_interrupted_by_a_cycle(moment):
    trainer, twin = Trainer(), Trainer()
    manager = make(trainer, bucket_bytes=4096)
    for _ in range(3):
        expected = twin.step()
        loss = trainer.forward()
        if moment == "forward":
            away_for_a_while(manager, trainer)
        found = trainer.backward(loss)
        if moment == "backward":
            away_for_a_while(manager, trainer, keep_grads=True)
        trainer.update()
        assert torch.equal(raw(expected), raw(found))
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))


@pytest.mark.parametrize("subset", [c for n in range(1, 5) for c in itertools.combinations(KINDS, n)])
def test_every_subset_moves_alone_and_back_in_any_order(trainer, subset):
    before = snapshot(trainer.tensors())
    manager = make(trainer)
    manager.offload(*subset, keep_grads=True)
    for kind in KINDS:
        held = device_bytes(moved(trainer.tensors((kind,))))
        assert (held == 0) == (kind in subset), kind
        expected = Residency.OFFLOADED if kind in subset else Residency.RESIDENT
        assert manager.residency(kind) is expected
    back = list(subset)
    random.Random(len(subset)).shuffle(back)
    for kind in back:
        manager.onload(kind)
    assert_same(before, snapshot(trainer.tensors()))


def test_gradients_come_back_zeroed_in_the_same_tensors(trainer):
    grads = trainer.tensors(("grad_buffers",))
    identities = {n: id(g) for n, g in grads.items()}
    manager = make(trainer)
    report = manager.offload("grad_buffers")
    assert report.host_bytes == 0
    assert report.device_bytes > 0
    assert manager.host_bytes == 0
    blocks = junk([report.device_bytes])
    manager.onload()
    assert {n: id(g) for n, g in trainer.tensors(("grad_buffers",)).items()} == identities
    assert not any(raw(g).any() for g in grads.values())
    del blocks


def test_repeating_a_call_does_nothing_and_says_so(trainer):
    manager = make(trainer)
    assert manager.onload().kinds["weights"].moved is False
    manager.offload("weights")
    report = manager.offload("weights", "main_weights")
    assert [report.kinds[k].moved for k in ("weights", "main_weights")] == [False, True]
    assert "weights was offloaded already" in report.notes
    assert "weights was offloaded already" in str(report)
    assert "nothing to do" in str(manager.offload("weights"))
    manager.onload()


def test_identity_and_order_of_what_hangs_on_tensors(trainer):
    fired = []
    parameter = trainer.trained[0]
    handle = parameter.register_post_accumulate_grad_hook(lambda _: fired.append("post"))
    parameter.register_hook(lambda _: fired.append("grad"))
    accumulator = parameter.view_as(parameter).grad_fn.next_functions[0][0]
    versions = {n: t._version for n, t in trainer.tensors().items()}
    manager = make(trainer)
    away_for_a_while(manager, trainer, keep_grads=True)
    assert {n: t._version for n, t in trainer.tensors().items()} == versions
    trainer.step()
    assert fired == ["grad", "post"]
    assert parameter.view_as(parameter).grad_fn.next_functions[0][0] is accumulator
    handle.remove()


# --- what is replaced or made between cycles -------------------------------------------------------------------------


def test_loading_a_checkpoint_between_cycles_keeps_nothing_old():
    trainer, twin = Trainer(), Trainer()
    manager = make(trainer, bucket_bytes=1 << 20)
    for t in (trainer, twin):
        t.step()
    sizes = []
    for cycle in range(10):
        away_for_a_while(manager, trainer)
        for t in (trainer, twin):
            t.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict()))  # replaces every moment
            t.model.load_state_dict({k: v.clone() for k, v in t.model.state_dict().items()})
            t.step()
        if cycle in (1, 9):
            sizes.append((live_bytes(), manager.host_bytes))
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))
    assert sizes[0] == sizes[1], f"memory grows: {sizes}"


def test_optimizer_state_that_is_made_later_is_found():
    trainer, twin = Trainer(), Trainer()
    manager = make(trainer)
    assert manager.offload("optimizer_states").device_bytes == 0
    manager.onload()
    for t in (trainer, twin):
        t.step()
    assert manager.offload("optimizer_states").device_bytes > 0
    manager.onload()
    for t in (trainer, twin):
        t.step()
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))


def test_what_its_owner_drops_while_away_is_not_brought_back(trainer):
    manager = make(trainer)
    manager.offload("grad_buffers")
    for p in (*trainer.trained, *trainer.main):
        p.grad = None
    report = manager.onload()
    assert report.device_bytes == 0
    assert "dropped by their owners" in str(report)


def test_a_storage_that_somebody_holds_without_a_tensor_is_brought_back():
    model = torch.nn.Linear(4, 4, bias=False)
    before = raw(model.weight)
    held = model.weight.untyped_storage()
    manager = create_memory_manager(model)
    manager.offload()
    model.weight = torch.nn.Parameter(torch.zeros(4, 4))
    manager.onload()
    assert torch.equal(torch.empty(0, dtype=torch.uint8).set_(held), before)


# --- the context manager ---------------------------------------------------------------------------------------------


def test_offloaded_brings_back_and_raises_what_the_block_raised(trainer):
    before = snapshot(trainer.tensors(KINDS[:3]))
    manager = make(trainer)
    error = LookupError("the rollout failed")

    def block():
        with manager.offloaded() as report:
            assert report.device_bytes > 0
            raise error

    with pytest.raises(LookupError) as raised:
        block()
    assert raised.value is error
    assert all(manager.residency(k) is Residency.RESIDENT for k in KINDS)
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_nested_blocks_leave_away_what_was_away(trainer):
    manager = make(trainer)
    manager.offload("weights")
    with manager.offloaded("weights", "main_weights"):
        with manager.offloaded():
            assert all(manager.residency(k) is Residency.OFFLOADED for k in KINDS)
        assert manager.residency("optimizer_states") is Residency.RESIDENT
        assert manager.residency("main_weights") is Residency.OFFLOADED
    assert manager.residency("main_weights") is Residency.RESIDENT
    assert manager.residency("weights") is Residency.OFFLOADED
    manager.onload()


def test_a_block_may_onload_or_close_on_its_own(trainer):
    before = snapshot(trainer.tensors(KINDS[:3]))
    manager = make(trainer)
    with manager.offloaded():
        manager.onload("weights")
    with manager.offloaded():
        manager.close()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


# --- host memory -----------------------------------------------------------------------------------------------------


def test_host_memory_is_what_is_kept_and_stays_constant(trainer):
    kept = storages(moved(trainer.tensors(KINDS[:3])))
    manager = make(trainer)
    assert manager.host_bytes == 0
    manager.offload()
    exact = sum(-(-n // 512) * 512 for n in kept.values())
    assert exact <= manager.host_bytes <= exact + 3 * 4096  # whole pages for each kind
    held = manager.host_bytes
    for _ in range(10):
        manager.onload()
        manager.offload()
        assert manager.host_bytes == held
    manager.close()
    assert manager.host_bytes == 0


def test_prepare_takes_the_memory_ahead_and_keeps_no_tensor(trainer):
    manager = make(trainer)
    manager.prepare(wait=True)
    ahead = manager.host_bytes
    assert ahead > 0
    grad = weakref.ref(trainer.trained[0].grad)
    manager.prepare()
    trainer.trained[0].grad = None
    assert grad() is None
    manager.offload()
    assert manager.host_bytes == ahead
    manager.prepare(wait=True)  # nothing to do for what is away
    manager.onload()


def test_prepare_packs_in_the_call_so_that_the_first_offload_does_not(trainer, monkeypatch):
    before = snapshot(trainer.tensors(KINDS))
    manager = make(trainer)
    storages = {t.untyped_storage()._cdata for t in trainer.tensors(KINDS[:3]).values()}
    reached, go_on, reserve = threading.Event(), threading.Event(), Engine.reserve

    def held(engine, sizes):
        reached.set()
        assert go_on.wait(30)
        return reserve(engine, sizes)

    monkeypatch.setattr(Engine, "reserve", held)
    manager.prepare()
    assert reached.wait(30)
    packed = {t.untyped_storage()._cdata for t in trainer.tensors(KINDS[:3]).values()}
    assert len(packed) < len(storages)
    assert_same(before, snapshot(trainer.tensors(KINDS)))
    trainer.step()
    go_on.set()
    with faults.inject("pack.bucket", lambda: RuntimeError("packed again")) as passed:
        manager.offload()
    assert passed == [0]
    manager.onload()
    twin = Trainer()
    for _ in range(3):
        twin.step()
    assert_same(snapshot(twin.tensors(KINDS[:3])), snapshot(trainer.tensors(KINDS[:3])))


def test_a_packing_ahead_that_fails_leaves_all_as_it_was(trainer):
    before = snapshot(trainer.tensors(KINDS))
    manager = make(trainer)
    fault = faults.inject("pack.repoint", lambda: RuntimeError("cable pulled"), after=2)
    with fault, pytest.raises(TransferError, match="cable pulled"):
        manager.prepare()
    assert_same(before, snapshot(trainer.tensors(KINDS)))
    assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
    manager.prepare(wait=True)
    manager.offload()
    manager.onload()
    assert_same(
        snapshot(trainer.tensors(KINDS[:3])), {n: b for n, b in before.items() if n in trainer.tensors(KINDS[:3])}
    )


def test_close_brings_back_and_leaves_no_trace(trainer):
    before = snapshot(trainer.tensors(KINDS[:3]))
    attributes = [dict(vars(m)) for m in trainer.model.modules()]
    with make(trainer) as manager:
        manager.offload()
    manager.close()
    assert [dict(vars(m)) for m in trainer.model.modules()] == attributes
    assert not trainer.model._forward_hooks
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))
    for call in (manager.offload, manager.onload, manager.prepare, manager.offloaded().__enter__):
        with pytest.raises(ManagerClosedError, match="create_memory_manager"):
            call()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_discarding_says_that_the_state_is_gone(trainer):
    manager = make(trainer)
    manager.offload("weights")
    manager.close(discard=True)
    with pytest.raises(ManagerClosedError, match=r"discard=True.*lost.*checkpoint"):
        manager.onload()
    assert manager.host_bytes == 0
    assert manager.residency("weights") is Residency.OFFLOADED
    assert manager.residency("main_weights") is Residency.RESIDENT
    with pytest.raises(OffloadedError, match="weights"):
        trainer.model(torch.zeros(1, dtype=torch.long))


def test_a_dropped_manager_gives_everything_back_without_the_collector(trainer):
    manager = make(trainer)
    manager.offload()
    manager.onload()
    region = weakref.ref(next(iter(manager._engine._arena._regions.values())))
    dropped = weakref.ref(manager)
    gc.collect()
    gc.disable()
    try:
        del manager
        assert dropped() is None
        assert region() is None
    finally:
        gc.enable()
    trainer.step()


def test_using_what_a_dropped_manager_took_raises_and_does_not_crash():
    run_python("""
import torch
from core_toys import Trainer
from megastow import OffloadedError, create_memory_manager
trainer = Trainer()
manager = create_memory_manager(trainer.model, trainer.optimizer)
loss = trainer.forward()
manager.offload()
del manager
for use in (loss.backward, trainer.step, trainer.optimizer.step, trainer.model.state_dict):
    try:
        use()
    except OffloadedError:
        continue
    raise SystemExit(f"{use} went through")
""")


def test_what_a_manager_and_a_handle_show_of_themselves(trainer):
    manager = make(trainer)
    assert repr(manager).startswith("<MemoryManager of cpu: weights resident, ")
    handle = manager.offload("weights", non_blocking=True)
    handle.wait()
    assert re.fullmatch(r"<TransferHandle: done, \S+ \w+ released>", repr(handle))
    assert re.search(r"weights offloaded, .*; \S+ KiB on the host>", repr(manager))
    with faults.inject("onload.chunk", RuntimeError):
        failed = manager.onload(non_blocking=True)
        manager.wait()
    assert "failed with TransferError" in repr(failed)
    manager.close()
    assert repr(manager) == "<MemoryManager, closed>"


# --- several managers, threads, modes --------------------------------------------------------------------------------


def test_managers_of_several_trainers_take_turns():
    trainers, twins = [Trainer(seed) for seed in range(3)], [Trainer(seed) for seed in range(3)]
    managers = [make(t, bucket_bytes=4096) for t in trainers]
    for turn in range(6):
        with contextlib.ExitStack() as others:
            for number, manager in enumerate(managers):
                if number != turn % 3:
                    others.enter_context(manager.offloaded())
            assert torch.equal(raw(trainers[turn % 3].step()), raw(twins[turn % 3].step()))
    for trainer, twin in zip(trainers, twins, strict=True):
        assert_same(snapshot(twin.tensors(KINDS[:3])), snapshot(trainer.tensors(KINDS[:3])))


def test_threads_are_served_one_after_the_other(trainer):
    before = snapshot(trainer.tensors())
    manager = make(trainer, chunk_bytes=256)
    errors = []

    def work(seed):
        choose = random.Random(seed)
        try:
            for _ in range(15):
                kinds = choose.sample(KINDS, choose.randint(1, 4))
                choose.choice((manager.onload, lambda *k: manager.offload(*k, keep_grads=True)))(*kinds)
                manager.residency(kinds[0])
                if choose.random() < 0.3:
                    manager.prepare()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))
    trainer.step()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_the_mode_of_the_caller_does_not_matter(trainer, mode):
    twin = Trainer()
    twin.step()
    twin.step()
    manager = make(trainer)
    with mode():
        manager.prepare(wait=True)
        manager.offload(keep_grads=True)
        manager.onload()
    manager.offload(keep_grads=True)
    manager.onload()
    assert not any(t.is_inference() for t in trainer.tensors().values())
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))
    assert torch.equal(raw(trainer.step()), raw(twin.step()))


def test_the_classic_names_move_their_kind(trainer):
    before = snapshot(trainer.tensors(KINDS[:3]))
    manager = make(trainer)
    names = {
        "weights": ("offload_weights", "onload_weights"),
        "main_weights": ("offload_main_weights", "onload_main_weights"),
        "optimizer_states": ("offload_optimizer_states", "onload_optimizer_states"),
        "grad_buffers": ("free_grad_buffers", "build_grad_buffers"),
    }
    for kind, (out, back) in names.items():
        assert set(getattr(manager, out)().kinds) == {kind}
        assert [k for k in KINDS if manager.residency(k) is Residency.OFFLOADED] == [kind]
        assert getattr(manager, back)().device_bytes > 0
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_a_move_is_logged_in_one_line(trainer, caplog):
    caplog.set_level(logging.INFO, "megastow")
    manager = make(trainer)
    manager.offload("weights")
    manager.onload("weights")
    lines = [r.getMessage() for r in caplog.records if "of weights" in r.getMessage()]
    assert len(lines) == 2
    assert all("\n" not in line for line in lines)


def test_a_module_without_an_optimizer_has_all_kinds():
    model = torch.nn.Linear(4, 4)
    before = raw(model.weight)
    with create_memory_manager([model]) as manager, manager.offloaded():
        assert manager.residency("optimizer_states") is Residency.OFFLOADED
        assert model.weight.untyped_storage().nbytes() == 0
    assert torch.equal(before, raw(model.weight))


def test_a_preparation_that_is_interrupted_is_waited_for_by_the_next_move(trainer, monkeypatch):
    """Else it would go on beside the move, and replace memory in which bytes lie by then."""
    before = snapshot(trainer.tensors())
    manager = make(trainer)
    go_on = threading.Event()
    reserve = manager._engine.reserve
    monkeypatch.setattr(manager._engine, "reserve", lambda sizes: go_on.wait(30) and reserve(sizes))

    def interrupted(future, timeout=None):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.exception", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.prepare(wait=True)
    trainer.model.register_buffer("more", torch.ones(5000))  # another size than was prepared
    threading.Timer(0.2, go_on.set).start()
    manager.offload(keep_grads=True)
    manager.onload()
    del trainer.model.more
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


def test_a_preparation_whose_thread_cannot_be_started_stops_nothing(trainer, monkeypatch):
    manager = make(trainer)

    def cannot(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", cannot)
    with pytest.raises(RuntimeError, match="can't start"):
        manager.prepare()
    monkeypatch.undo()
    manager.offload()
    manager.close()


def test_numbers_that_schedulers_and_loggers_read_stay():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), capturable=False, foreach=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    manager = create_memory_manager(model, optimizer)
    optimizer.param_groups[0]["betas"] = torch.tensor(0.5), torch.tensor(0.75)
    with manager.offloaded():
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.25
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    optimizer.param_groups[0]["betas"] = 0.5, 0.75
    optimizer.step()


def test_host_memory_can_be_asked_for_while_it_is_made(trainer):
    """By a monitoring thread, or a handler of a signal."""
    manager, asked = make(trainer), []
    with faults.meddle("host.allocate", lambda *_: asked.append((manager.host_bytes, manager.disk_bytes))):
        manager.offload()
    assert asked
    assert asked[0] == (0, 0)
    manager.onload()


def test_a_finalizer_may_wait_in_the_middle_of_a_preparation(trainer, monkeypatch):
    """It waits for nothing then: what it would wait for is what it interrupts."""
    manager, waited = make(trainer), []
    start = threading.Thread.start

    def start_later(thread):
        if thread.name == "megastow-prepare":
            waited.append(manager.wait())
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_later)
    manager.prepare(wait=True)
    assert waited == [None]
