"""Moves in the background: what holds while one is under way, what it ends in, and that nobody waits for ever."""

import copy
import itertools
import logging
import random
import sys
import textwrap
import threading
import types
from concurrent.futures import Future

import pytest
import torch
from core_toys import KINDS, Trainer, assert_same, device_bytes, moved, raw, run_python, snapshot

from megastow import (
    DeviceMemoryError,
    HostMemoryError,
    OffloadedError,
    Residency,
    StateChangedError,
    StateKind,
    TransferError,
    create_memory_manager,
    faults,
)
from megastow.device import CpuDevice
from megastow.guard import Blocked, Guard, GuardedCalls, call_table
from megastow.refill import Refill
from megastow.transport import Transport

SECONDS = 30.0


class Gate:
    """Stops the copies of one direction at a given storage until it is opened."""

    def __init__(self, monkeypatch, method, after=0):
        self.reached, self._open = threading.Event(), threading.Event()
        original, number = getattr(Transport, method), itertools.count()

        def held(transport, *arguments):
            if next(number) == after:
                self.reached.set()
                assert self._open.wait(SECONDS), "nobody opened the gate"
            original(transport, *arguments)

        monkeypatch.setattr(Transport, method, held)

    def wait(self):
        assert self.reached.wait(SECONDS), "no copy came"

    def open(self):
        self._open.set()


def make(trainer, **sizes):
    return create_memory_manager(trainer.model, trainer.optimizer, **sizes)


@pytest.fixture
def manager(trainer):
    made = make(trainer, bucket_bytes=2048, chunk_bytes=100)
    yield made
    made.close(discard=True)


def test_a_cycle_in_the_background_is_a_cycle(trainer, manager):
    before = snapshot(trainer.tensors())
    for _ in range(3):
        out = manager.offload(keep_grads=True, non_blocking=True)
        report = out.wait(SECONDS)
        assert out.done()
        assert (report.direction, report.device_bytes) == ("offload", out.wait().device_bytes)
        assert device_bytes(moved(trainer.tensors())) == 0
        assert manager.onload(non_blocking=True).wait(SECONDS).device_bytes == report.device_bytes
        assert_same(before, snapshot(trainer.tensors()))


def test_training_goes_on_as_if_nothing_had_happened():
    trainer, twin = Trainer(), Trainer()
    manager = make(trainer)
    for _ in range(5):
        manager.offload(non_blocking=True)
        manager.onload(non_blocking=True)
        assert torch.equal(raw(trainer.step()), raw(twin.step()))  # its first call waits
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))


def test_the_call_returns_at_once_and_uses_are_refused(trainer, manager, monkeypatch):
    gate = Gate(monkeypatch, "copy_out")
    handle = manager.offload("weights", "optimizer_states", non_blocking=True)
    assert not handle.done()
    assert {kind: manager.residency(kind) for kind in KINDS} == {
        "weights": Residency.OFFLOADING,
        "main_weights": Residency.RESIDENT,
        "optimizer_states": Residency.OFFLOADING,
        "grad_buffers": Residency.RESIDENT,
    }
    with pytest.raises(OffloadedError, match="weights"):
        trainer.model(torch.zeros(1, dtype=torch.long))
    with pytest.raises(OffloadedError):
        trainer.optimizer.step()
    with pytest.raises(TimeoutError, match="still under way"):
        handle.wait(0.01)
    gate.open()
    handle.wait(SECONDS)
    assert manager.residency("weights") is Residency.OFFLOADED
    with pytest.raises(OffloadedError):
        trainer.model(torch.zeros(1, dtype=torch.long))


def test_storages_are_released_one_by_one(trainer, manager, monkeypatch):
    released = []

    class Arrival:
        def wait(self):
            released.append(device_bytes(moved(trainer.tensors(KINDS[:3]))))

    monkeypatch.setattr(type(manager._device), "arrival", lambda device: Arrival())
    manager.offload(*KINDS[:3])
    assert len(released) > 3
    assert released == sorted(released, reverse=True)
    assert len(set(released)) == len(released)


USES = {
    "a call": lambda trainer: raw(trainer.model(torch.zeros(1, 2, dtype=torch.long))),
    "a submodule": lambda trainer: raw(trainer.model.norm(torch.ones(16, dtype=torch.bfloat16))),
    "state_dict": lambda trainer: raw(trainer.model.state_dict()["odd"]),
    "deepcopy": lambda trainer: raw(copy.deepcopy(trainer.model).embed.weight),
    "step": lambda trainer: trainer.optimizer.step() or raw(trainer.main[0]),
    "moments": lambda trainer: raw(trainer.optimizer.state_dict()["state"][0]["exp_avg"]),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_waits_for_what_is_on_its_way_back(trainer, use, monkeypatch):
    twin = Trainer()
    twin.step()
    twin.step()
    expected = USES[use](twin)
    manager = make(trainer)
    manager.offload(keep_grads=True)
    gate = Gate(monkeypatch, "copy_in", after=1)
    handle = manager.onload(non_blocking=True)
    gate.wait()
    assert manager.residency("weights") is Residency.ONLOADING
    found = []
    thread = threading.Thread(target=lambda: found.append(USES[use](trainer)))
    thread.start()
    thread.join(0.2)
    assert not found, "the use did not wait"
    gate.open()
    thread.join(SECONDS)
    assert torch.equal(found[0], expected)
    handle.wait(SECONDS)
    manager.close()


def test_a_compiled_module_waits_too(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.compile(backend="eager")
    expected = raw(model(torch.ones(1, 2)))
    copied = copy.deepcopy(model)  # has the attribute of a compiled module, set to None
    for each in (model, copied):
        with create_memory_manager(each) as manager:
            manager.offload()
            manager.onload(non_blocking=True)
            assert torch.equal(raw(each(torch.ones(1, 2))), expected)


def test_a_backward_pass_waits_for_what_is_on_its_way_back(trainer, monkeypatch):
    twin = Trainer()
    for each in (trainer, twin):
        for _ in range(2 if each is twin else 0):
            each.step()
    manager = make(trainer)
    loss, other = trainer.forward(), twin.forward()
    manager.offload("weights", "grad_buffers", keep_grads=True)
    gate = Gate(monkeypatch, "copy_in")
    manager.onload(non_blocking=True)
    gate.wait()
    threading.Timer(0.2, gate.open).start()
    assert torch.equal(raw(trainer.backward(loss)), raw(twin.backward(other)))
    manager.close()
    trainer.update()
    twin.update()
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))


def test_only_what_has_arrived_may_be_used(trainer, manager):
    """An onload of some kinds brings those back; a call that needs others still raises."""
    manager.offload()
    manager.onload("weights", non_blocking=True)
    with pytest.raises(OffloadedError, match="main_weights, optimizer_states"):
        trainer.optimizer.step()
    trainer.model(torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("point", ["offload.chunk", "offload.confirm", "offload.release", "offload.drop"])
def test_a_failed_offload_is_undone_and_told(trainer, manager, point, caplog):
    before = snapshot(trainer.tensors())
    with (
        faults.inject(point, lambda: RuntimeError("cable pulled"), after=0 if point.endswith("drop") else 2),
        caplog.at_level(logging.WARNING),
    ):
        handle = manager.offload(non_blocking=True)
        with pytest.raises(TransferError, match="cable pulled"):
            handle.wait(SECONDS)
    assert handle.done()
    assert "offload in the background failed" in caplog.text
    assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
    assert_same(before, snapshot(trainer.tensors()))
    trainer.model(torch.zeros(1, dtype=torch.long))
    manager.offload(non_blocking=True).wait(SECONDS)


def test_a_failed_onload_is_undone_and_who_waited_for_it_is_told_why(trainer, manager, monkeypatch):
    before = snapshot(trainer.tensors(KINDS[:3]))
    manager.offload()
    gate = Gate(monkeypatch, "copy_in")
    with faults.inject("onload.confirm", lambda: RuntimeError("cable pulled")):
        handle = manager.onload(non_blocking=True)
        gate.wait()
        threading.Timer(0.1, gate.open).start()
        with pytest.raises(OffloadedError, match="weights") as refused:
            trainer.model(torch.zeros(1, dtype=torch.long))
    assert "cable pulled" in str(refused.value.__cause__)
    with pytest.raises(TransferError, match="cable pulled"):
        handle.wait()
    assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_a_fault_between_two_releases_refills_what_is_gone(trainer, manager):
    """Also where the memory has been taken meanwhile: then all counts as offloaded, and nothing is lost."""
    before = snapshot(trainer.tensors())
    for number in range(4):
        with faults.inject("offload.release", lambda: RuntimeError("no"), after=number), pytest.raises(TransferError):
            manager.offload(keep_grads=True)
        assert_same(before, snapshot(trainer.tensors()))
    with (
        faults.inject("offload.release", lambda: RuntimeError("no"), after=2),
        faults.inject("onload.reserve", lambda: RuntimeError("taken")),
        pytest.raises(TransferError, match="taken"),
    ):
        manager.offload(keep_grads=True)
    assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}
    with pytest.raises(OffloadedError):
        trainer.optimizer.step()
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


def test_the_next_call_waits_for_the_move_before(trainer, manager, monkeypatch):
    before = snapshot(trainer.tensors(KINDS[:3]))
    gate = Gate(monkeypatch, "copy_out")
    first = manager.offload(non_blocking=True)
    gate.wait()
    threading.Timer(0.1, gate.open).start()
    report = manager.onload()
    assert first.done()
    assert report.device_bytes == first.wait().device_bytes
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_what_is_there_already_is_done_at_once(manager):
    report = manager.onload("weights", non_blocking=True).wait(SECONDS)
    assert not report.kinds["weights"].moved
    assert "weights was resident already" in str(report)


def test_close_waits(trainer, monkeypatch):
    before = snapshot(trainer.tensors(KINDS[:3]))
    manager = make(trainer)
    gate = Gate(monkeypatch, "copy_out")
    handle = manager.offload(non_blocking=True)
    threading.Timer(0.1, gate.open).start()
    manager.close()
    assert handle.done()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_a_thread_that_cannot_be_started_moves_nothing(trainer, manager, monkeypatch):
    def cannot(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", cannot)
    with pytest.raises(RuntimeError, match="can't start"):
        manager.offload(non_blocking=True)
    monkeypatch.undo()
    assert manager.residency("weights") is Residency.RESIDENT
    trainer.model(torch.zeros(1, dtype=torch.long))
    manager.offload()


def test_two_tenants_pass_each_other(monkeypatch):
    trainers = [Trainer(seed) for seed in range(2)]
    for trainer in trainers:
        trainer.step()
    before = [snapshot(trainer.tensors(KINDS[:3])) for trainer in trainers]
    managers = [make(trainer, bucket_bytes=1) for trainer in trainers]
    managers[1].offload()
    for leaving, coming in ((0, 1), (1, 0), (0, 1)):
        handles = [managers[leaving].offload(non_blocking=True), managers[coming].onload(non_blocking=True)]
        for handle in handles:
            handle.wait(SECONDS)
        assert device_bytes(moved(trainers[leaving].tensors())) == 0
        assert_same(before[coming], snapshot(trainers[coming].tensors(KINDS[:3])))
    for manager in managers:
        manager.close()


def test_many_threads_on_one_manager(trainer, manager):
    before = snapshot(trainer.tensors(KINDS[:3]))
    errors = []

    def move(seed):
        choose = random.Random(seed)
        try:
            for _ in range(25):
                kinds = choose.sample(KINDS, choose.randint(1, 4))
                call = choose.choice([manager.offload, manager.onload])
                result = call(*kinds, non_blocking=choose.random() < 0.5)
                if hasattr(result, "wait") and choose.random() < 0.5:
                    result.wait(SECONDS)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=move, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert not errors, errors
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_the_interpreter_ends_a_move_under_way_before_it_ends():
    printed = run_python(
        textwrap.dedent("""
        import time
        from core_toys import Trainer
        from megastow import create_memory_manager
        from megastow.transport import Transport
        original = Transport.copy_out
        Transport.copy_out = lambda *arguments: (time.sleep(0.05), original(*arguments))
        trainer = Trainer()
        trainer.step()
        manager = create_memory_manager(trainer.model, trainer.optimizer)
        manager.offload(non_blocking=True)
        print("end of the script")
        """)
    )
    assert printed == "end of the script\n"


def test_workspaces_are_dropped_on_request_only(trainer, manager, monkeypatch):
    buffer = {("mpu", torch.float32): torch.ones(1000)}
    state = types.SimpleNamespace(_GLOBAL_MEMORY_BUFFER=types.SimpleNamespace(buffer=buffer))
    base = types.SimpleNamespace(
        _dummy_wgrads={"w": torch.ones(2)}, _multi_stream_cublas_workspace=[], _cublas_workspace=torch.ones(3)
    )
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", base)
    from megastow.megatron_parts import workspaces

    monkeypatch.setattr(type(manager._trainer), "workspaces", lambda self: workspaces())
    manager.offload()
    manager.onload()
    assert buffer
    report = manager.offload(release_workspaces=True)
    assert not buffer
    assert not base._dummy_wgrads
    assert base._cublas_workspace is None
    (note,) = [note for note in report.notes if "workspaces" in note]
    assert "Megatron's global memory buffer" in note
    assert "_cublas_workspace" in note
    assert "_multi_stream" not in note  # it was empty


class KindByKind:
    """Lets kinds arrive one by one: the first `number` at once, and the others when the gate is opened."""

    def __init__(self, monkeypatch, number):
        self.opened = threading.Event()
        waits = itertools.count()

        class Arrival:
            def wait(arrival):
                if next(waits) >= number:
                    assert self.opened.wait(SECONDS), "nobody opened the gate"

        monkeypatch.setattr(CpuDevice, "arrival", lambda device: Arrival())


def test_a_forward_pass_waits_for_the_weights_only(trainer, manager, monkeypatch):
    tokens = torch.zeros(1, 2, dtype=torch.long)
    expected = raw(trainer.model(tokens))
    manager.offload()
    gate = KindByKind(monkeypatch, number=1)
    handle = manager.onload(non_blocking=True)
    assert torch.equal(raw(trainer.model(tokens)), expected)
    assert not handle.done()
    where = [manager.residency(kind) for kind in KINDS]
    assert where == [Residency.RESIDENT, *[Residency.ONLOADING] * 3]
    found = []
    step = threading.Thread(target=lambda: found.append(trainer.optimizer.step()))
    step.start()
    step.join(0.2)
    assert not found, "the step did not wait for the moments"
    gate.opened.set()
    step.join(SECONDS)
    assert found == [None]
    handle.wait(SECONDS)


def test_forward_and_backward_go_on_while_the_optimizer_is_coming(trainer, manager, monkeypatch):
    twin = Trainer()
    twin.step()
    twin.step()
    for parameter in (*trainer.trained, *trainer.main):
        parameter.grad = None  # no gradients are away, so none have to arrive
    manager.offload()
    gate = KindByKind(monkeypatch, number=1)
    manager.onload(non_blocking=True)
    losses = [each.backward(each.forward()) for each in (trainer, twin)]
    assert torch.equal(*map(raw, losses))
    assert manager.residency("main_weights") is Residency.ONLOADING
    threading.Timer(0.1, gate.opened.set).start()
    trainer.update()
    twin.update()
    assert_same(snapshot(twin.tensors()), snapshot(trainer.tensors()))


def test_what_has_arrived_stays_when_the_rest_fails(trainer, manager):
    before = snapshot(trainer.tensors(KINDS[:3]))
    manager.offload()
    with faults.inject("onload.confirm", lambda: RuntimeError("cable pulled"), after=2):
        handle = manager.onload(non_blocking=True)
        with pytest.raises(TransferError, match="main_weights, optimizer_states in host memory and weights, grad_buf"):
            handle.wait(SECONDS)
    where = [manager.residency(kind) for kind in KINDS]
    assert where == [Residency.RESIDENT, Residency.OFFLOADED, Residency.OFFLOADED, Residency.RESIDENT]
    trainer.model(torch.zeros(1, dtype=torch.long))
    with pytest.raises(OffloadedError, match="main_weights, optimizer_states"):
        trainer.optimizer.step()
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_an_onload_that_blocks_is_all_or_nothing(trainer, manager):
    manager.offload()
    with faults.inject("onload.confirm", lambda: RuntimeError("cable pulled"), after=2), pytest.raises(TransferError):
        manager.onload()
    assert {manager.residency(kind) for kind in KINDS} == {Residency.OFFLOADED}


def test_a_guard_is_never_open_while_it_changes(trainer, manager):
    """Whatever comes and goes, a step needs what is still away at each moment, and another thread may ask at any."""
    manager.offload()
    seen, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            if not isinstance(vars(trainer.optimizer).get("step"), Blocked):
                seen.append("open")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(30):
            manager.onload("weights", "grad_buffers", non_blocking=True).wait(SECONDS)
            manager.offload("weights", "grad_buffers", non_blocking=True).wait(SECONDS)
    finally:
        stop.set()
        thread.join(SECONDS)
        sys.setswitchinterval(interval)
    assert not seen


def test_a_call_that_is_interrupted_while_its_thread_starts_moves_nothing(trainer, manager, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.offload(non_blocking=True)
    monkeypatch.undo()
    manager.wait()
    for thread in threading.enumerate():
        if thread.name.startswith("megastow"):
            thread.join(SECONDS)
    assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
    assert "forward" not in vars(trainer.model)
    trainer.model(torch.zeros(1, dtype=torch.long))
    manager.offload(non_blocking=True).wait(SECONDS)


def test_a_second_manager_of_what_is_just_leaving_is_refused(trainer, manager, monkeypatch):
    before = snapshot(trainer.tensors(KINDS[:3]))
    other = make(trainer)
    gate = Gate(monkeypatch, "copy_out")
    handle = manager.offload(non_blocking=True)
    gate.wait()
    with pytest.raises(StateChangedError, match="by another manager"):
        other.offload()
    gate.open()
    handle.wait(SECONDS)
    with pytest.raises(StateChangedError):
        other.offload()
    manager.onload()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))
    other.offload()
    other.close()
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_an_offload_that_could_be_neither_made_nor_undone_is_finished_by_the_next(trainer, manager):
    before = snapshot(trainer.tensors())
    with (
        faults.inject("offload.release", lambda: RuntimeError("no"), after=2),
        faults.inject("onload.reserve", lambda: RuntimeError("taken")),
        pytest.raises(TransferError, match="taken"),
    ):
        manager.offload(keep_grads=True)
    left = device_bytes(moved(trainer.tensors()))
    assert left > 0
    assert manager.offload(keep_grads=True).device_bytes == left
    assert device_bytes(moved(trainer.tensors())) == 0
    assert manager.offload(keep_grads=True).device_bytes == 0
    manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


def test_waiters_are_told_when_a_guard_cannot_be_changed():
    guard, arriving, owner = Guard(), Future(), torch.nn.Linear(2, 2)
    calls = GuardedCalls(owner, call_table(((StateKind.WEIGHTS,), "forward")))
    guard.update({StateKind.WEIGHTS}, lambda: [calls], arriving)
    failed = []

    def use():
        try:
            owner.forward(torch.ones(2))
        except OffloadedError as error:
            failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(0.1)

    def broken():
        raise RuntimeError("the adapter failed")

    with pytest.raises(RuntimeError):
        guard.update({StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS}, broken)
    arriving.set_exception(RuntimeError("and so did the move"))
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert "and so did the move" in str(failed[0].__cause__)
    guard.close()


def test_a_failed_move_keeps_nothing_alive(trainer, manager):
    def owners():
        return [torch._C._storage_Use_Count(main.untyped_storage()._cdata) for main in trainer.main]

    manager.offload()
    manager.onload()
    before = owners()
    with faults.inject("offload.release", lambda: RuntimeError("no"), after=2):
        handle = manager.offload(non_blocking=True)
        with pytest.raises(TransferError):
            handle.wait(SECONDS)
    assert owners() == before


def test_a_block_brings_back_what_leaves_in_the_background_at_its_end(trainer, manager):
    before = snapshot(trainer.tensors(KINDS[:3]))
    with manager.offloaded():
        manager.onload()
        manager.offload(non_blocking=True)
    assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
    assert_same(before, snapshot(trainer.tensors(KINDS[:3])))


def test_weights_are_there_while_the_others_still_wait_for_memory(trainer, manager, monkeypatch):
    manager.offload()
    tokens = torch.zeros(1, 2, dtype=torch.long)
    weights = len(manager._engine._parked[StateKind.WEIGHTS])
    free = iter([1 << 40] * weights)
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda device: next(free, 0))
    handle = manager.onload(wait_for_memory=0.5, non_blocking=True)
    trainer.model(tokens)
    assert not handle.done()
    with pytest.raises(DeviceMemoryError):
        handle.wait(SECONDS)
    assert manager.residency("weights") is Residency.RESIDENT
    assert manager.residency("optimizer_states") is Residency.OFFLOADED
    monkeypatch.undo()
    manager.onload()


def test_a_handle_keeps_its_figure(manager):
    handle = manager.offload(non_blocking=True)
    handle.wait(SECONDS)
    released = handle.released_bytes
    back = manager.onload(non_blocking=True)
    back.wait(SECONDS)
    manager.offload()
    assert handle.released_bytes == released > 0
    assert back.released_bytes == 0


def test_a_wrapper_put_around_a_blocked_method_ends_in_the_method(trainer, manager):
    tokens = torch.zeros(1, 2, dtype=torch.long)
    expected = raw(trainer.model(tokens))
    manager.offload("weights")
    inner = trainer.model.forward
    trainer.model.forward = lambda tokens: inner(tokens)
    with pytest.raises(OffloadedError):
        trainer.model.forward(tokens)
    manager.offload("optimizer_states")  # blocks the wrapper, too
    with pytest.raises(OffloadedError):
        trainer.model.forward(tokens)
    manager.onload()
    assert torch.equal(raw(trainer.model(tokens)), expected)


def test_zeroing_gradients_of_a_module_needs_them(trainer, manager):
    with manager.offloaded("grad_buffers"), pytest.raises(OffloadedError, match="zero_grad of Net needs grad_buffers"):
        trainer.model.zero_grad(set_to_none=False)
    trainer.model.zero_grad(set_to_none=False)


# --- finalizers, which the collector runs in any thread --------------------------------------------------------------

LAST_WORDS = """
import gc, threading
import torch
from core_toys import KEPT, Trainer, assert_same, snapshot
from megastow import MegastowError, create_memory_manager, faults

class LastWords:
    def __init__(self, act):
        self.act, self.me = act, self
    def __del__(self):
        try:
            self.act()
        except MegastowError as error:
            print("refused:", type(error).__name__, "in", threading.current_thread().name)

gc.disable()  # or it may run before it is asked to
trainer = Trainer()
trainer.step()
before = snapshot(trainer.tensors(KEPT))
"""


@pytest.mark.parametrize(
    ("tier", "point", "act", "expected"),
    [
        ("pinned", "onload.chunk", "trainer.model.state_dict", "OffloadedError in megastow-onload"),
        ("pinned", "onload.chunk", "manager.onload", "TransferError in megastow-onload"),
        ("pinned", "onload.chunk", "lambda: handles[0].wait()", "TransferError in megastow-onload"),
        ("pageable", "onload.copied", "manager.plan", "TransferError in megastow-staging"),
        ("disk", "onload.copied", "manager.offload", "TransferError in megastow-staging"),
        ("disk", "onload.copied", "manager.close", "TransferError in megastow-staging"),
    ],
)
def test_a_finalizer_in_a_thread_of_a_move_is_refused_and_not_waited_for(tier, point, act, expected, disk_folder):
    printed = run_python(f"""{LAST_WORDS}
manager = create_memory_manager(trainer.model, trainer.optimizer, host_memory={tier!r}, disk_folder={disk_folder!r})
manager.offload()
handles, go_on = [], threading.Event()
def collect(*_):
    go_on.wait()
    gc.collect()
with faults.meddle({point!r}, collect):
    LastWords({act})
    handles.append(manager.onload(non_blocking=True))
    go_on.set()
    handles[0].wait({SECONDS})
assert_same(before, snapshot(trainer.tensors(KEPT)))
manager.close()
""")
    assert printed.splitlines() == [f"refused: {expected}"]


def test_a_finalizer_in_the_thread_of_a_preparation_is_refused():
    printed = run_python(f"""{LAST_WORDS}
manager = create_memory_manager(trainer.model, trainer.optimizer)
LastWords(manager.plan)
go_on = threading.Event()
def collect(*_):
    go_on.wait({SECONDS})
    gc.collect()
with faults.meddle("host.allocate", collect):
    manager.prepare()
    threading.Timer(0.3, go_on.set).start()
    manager.offload()
manager.onload()
assert_same(before, snapshot(trainer.tensors(KEPT)))
""")
    assert printed.splitlines() == ["refused: TransferError in megastow-prepare"]


def test_errors_that_lead_to_each_other_in_a_circle_end_a_move(trainer, manager, monkeypatch):
    def circle(*_, **__):
        one, other = RuntimeError("one"), RuntimeError("other")
        one.__cause__, other.__context__ = other, one
        raise one

    with monkeypatch.context() as patch:
        patch.setattr(manager._trainer, "quiesce", circle)
        with pytest.raises(RuntimeError, match="one"):
            manager.offload(non_blocking=True).wait(SECONDS)
    manager.offload(non_blocking=True).wait(SECONDS)
    manager.onload()


def test_a_retry_beside_an_offload_that_has_failed_ends_each_time():
    leaving, coming = Trainer(), Trainer(1)
    leaving.step()
    out, back = make(leaving), make(coming)
    back.offload()
    with faults.inject("host.allocate", lambda: HostMemoryError("no room")):
        handle = out.offload(non_blocking=True)
        out.wait()
    for _ in range(3):
        try:
            back.onload(beside=handle, non_blocking=True).wait(SECONDS)
        except TransferError:
            with pytest.raises(HostMemoryError):
                handle.wait()
    back.onload()


def test_workspaces_are_released_by_the_caller(trainer, manager, monkeypatch):
    """What the caller does next uses them; so it must not be a thread that lets go of them."""
    seen = []
    monkeypatch.setattr(manager._device, "release_workspaces", lambda: seen.append(threading.current_thread()) or 0)
    handle = manager.offload(release_workspaces=True, non_blocking=True)
    assert seen == [threading.current_thread()]
    assert "workspaces released" in str(handle.wait())
    manager.onload()


@pytest.mark.parametrize("options", [{}, {"wait_for_memory": 60.0}])
def test_kinds_are_brought_in_the_order_in_which_they_are_needed(trainer, manager, monkeypatch, options):
    """Zeros of gradients are not put off to the end, where whoever waits for gradients would wait for all."""
    manager.offload()
    filled, copy_in = [], Refill._copy_in

    def noted(refill, move, part):
        filled.extend(parked.kind.value for parked in part)
        copy_in(refill, move, part)

    monkeypatch.setattr(Refill, "_copy_in", noted)
    manager.onload(non_blocking=True, **options).wait()
    assert list(dict.fromkeys(filled)) == ["weights", "grad_buffers", "main_weights", "optimizer_states"]
    assert filled == sorted(filled, key=list(dict.fromkeys(filled)).index)
