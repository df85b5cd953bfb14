"""Two tenants change places: both or neither, and the device never holds more than the larger and the window."""

import itertools
import threading
from concurrent.futures import Future

import pytest
from core_toys import KINDS, Trainer, assert_same, device_bytes, moved, snapshot

from megastow import DeviceMemoryError, OffloadedError, Residency, TransferError, create_memory_manager, faults, swap
from megastow.device import CpuDevice
from megastow.guard import Guard
from megastow.handle import MemoryPermit, TransferHandle
from megastow.transport import Transport

KEPT = KINDS[:3]


class Tenant:
    def __init__(self, seed, width):
        self.trainer = Trainer(seed, width)
        self.trainer.step()
        self.before = snapshot(self.trainer.tensors(KEPT))
        self.manager = create_memory_manager(self.trainer.model, self.trainer.optimizer, bucket_bytes=1)

    def nbytes(self):
        return device_bytes(moved(self.trainer.tensors()))

    def is_here(self):
        where = {self.manager.residency(kind) for kind in KINDS}
        assert len(where) == 1
        if where == {Residency.RESIDENT}:
            assert_same(self.before, snapshot(self.trainer.tensors(KEPT)))
        return where == {Residency.RESIDENT}


@pytest.fixture(params=[(16, 16), (16, 48), (48, 16)], ids=["alike", "larger comes", "larger leaves"])
def tenants(request):
    here, away = (Tenant(seed, width) for seed, width in enumerate(request.param))
    away.manager.offload()
    yield here, away
    for tenant in (here, away):
        tenant.manager.close(discard=True)


@pytest.mark.parametrize("window", [0, 3000, 1 << 30])
def test_they_change_places_within_the_window(tenants, window, monkeypatch):
    here, away = tenants
    away.manager.onload()
    larger = max(here.nbytes(), away.nbytes())
    away.manager.offload()
    seen = []
    original = Transport.copy_in

    def look(transport, host, storage):
        seen.append(here.nbytes() + away.nbytes())
        original(transport, host, storage)

    monkeypatch.setattr(Transport, "copy_in", look)
    for leaving, coming in ((here, away), (away, here), (here, away)):
        out, back = swap(leaving.manager, coming.manager, window_bytes=window)
        assert (out.direction, back.direction) == ("offload", "onload")
        assert coming.is_here()
        assert not leaving.is_here()
    assert len(seen) > 3
    assert max(seen) <= larger + window


@pytest.mark.parametrize("point", [point for point in faults.POINTS if point.startswith(("offload", "onload"))])
@pytest.mark.parametrize("after", [0, 3])
def test_both_or_neither(tenants, point, after):
    here, away = tenants
    with faults.inject(point, lambda: RuntimeError("cable pulled"), after=after) as passed:
        error = None
        try:
            swap(here.manager, away.manager, window_bytes=3000)
        except TransferError as raised:
            error = raised
    assert (error is not None) == (passed[0] > after)
    if error is None:
        swap(away.manager, here.manager)
    else:
        assert "cable pulled" in f"{error} {error.__cause__}"
    assert here.is_here()
    assert not away.is_here()
    swap(here.manager, away.manager)
    assert away.is_here()
    assert not here.is_here()


def test_a_guard_that_cannot_be_put_up_stops_both(tenants, monkeypatch):
    """It goes up in the thread of the offload, behind the first copies."""
    here, away = tenants
    update, asked = Guard.update, []

    def fails_once(guard, kinds, *details, **options):
        if kinds and guard is here.manager._guard and not asked:
            asked.append(threading.current_thread().name)
            raise RuntimeError("no guard")
        update(guard, kinds, *details, **options)

    monkeypatch.setattr(Guard, "update", fails_once)
    with pytest.raises(TransferError) as raised:
        swap(here.manager, away.manager)
    assert "no guard" in str(raised.value.__cause__)
    assert asked == ["megastow-offload"]
    assert here.is_here()
    assert not away.is_here()
    here.trainer.step()
    here.before = snapshot(here.trainer.tensors(KEPT))
    swap(here.manager, away.manager)
    assert away.is_here()
    with pytest.raises(OffloadedError):
        here.trainer.step()


def test_an_interruption_behind_the_start_of_the_thread_leaves_both_where_they_were(tenants, monkeypatch):
    here, away = tenants
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == "megastow-offload":
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap(here.manager, away.manager)
    assert here.is_here()
    assert not away.is_here()
    swap(here.manager, away.manager)
    assert away.is_here()


def test_what_cannot_be_put_back_is_told_and_not_lost(tenants, caplog):
    here, away = tenants
    with (
        faults.inject("onload.chunk", lambda: RuntimeError("cable pulled")),
        faults.inject("onload.reserve", lambda: RuntimeError("taken"), after=40),
        faults.inject("onload.confirm", lambda: RuntimeError("still pulled")),
        pytest.raises(TransferError, match="cable pulled"),
    ):
        swap(here.manager, away.manager)
    assert "could not be put back" in caplog.text
    assert here.manager.residency("weights") is Residency.OFFLOADED
    here.manager.onload()
    assert here.is_here()
    away.manager.onload()
    assert away.is_here()


def test_nothing_to_do_on_one_side_is_fine(tenants):
    here, away = tenants
    here.manager.offload()
    out, _ = swap(here.manager, away.manager)
    assert not any(kind.moved for kind in out.kinds.values())
    assert away.is_here()


def test_an_onload_waits_until_the_neighbour_has_let_go(tenants, monkeypatch):
    _, away = tenants
    free = itertools.chain([10, 10, 10], itertools.repeat(1 << 40))
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda device: next(free))
    with pytest.raises(DeviceMemoryError, match="free device memory, then onload"):
        away.manager.onload()
    assert not away.is_here()
    away.manager.onload(wait_for_memory=20.0)
    assert away.is_here()


def test_the_wait_for_memory_ends_with_figures_and_a_repeated_call_goes_on(tenants, monkeypatch):
    _, away = tenants
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda device: 100)
    with pytest.raises(DeviceMemoryError, match=r"100 B are free after 0.05 s") as error:
        away.manager.onload(wait_for_memory=0.05)
    assert error.value.free_bytes == 100
    assert error.value.needed_bytes > 100
    assert not away.is_here()
    assert away.nbytes() == 0
    monkeypatch.undo()
    away.manager.onload()
    assert away.is_here()


def test_an_offload_tells_how_much_it_has_released(tenants, monkeypatch):
    here, _ = tenants
    whole = here.nbytes()
    reached, go_on = threading.Event(), threading.Event()
    original, number = Transport.copy_out, itertools.count()

    def held(transport, *arguments):
        if next(number) == 2:
            reached.set()
            assert go_on.wait(30)
        original(transport, *arguments)

    monkeypatch.setattr("megastow.engine.IN_FLIGHT_BYTES", 0)
    monkeypatch.setattr(Transport, "copy_out", held)
    handle = here.manager.offload(non_blocking=True)
    assert reached.wait(30)
    assert 0 < handle.released_bytes < whole
    assert handle.released_bytes == whole - here.nbytes()
    go_on.set()
    handle.wait(30)
    assert handle.released_bytes == whole
    assert here.manager.onload(non_blocking=True).released_bytes == 0


def test_gradients_that_were_kept_survive_a_swap_that_fails(tenants):
    here, away = tenants
    away.manager.onload()
    away.trainer.backward(away.trainer.forward())
    grads = snapshot(away.trainer.tensors(["grad_buffers"]))
    assert grads
    away.manager.offload(keep_grads=True)
    with faults.inject("offload.drop", lambda: RuntimeError("cable pulled")), pytest.raises(TransferError):
        swap(here.manager, away.manager)
    assert here.is_here()
    assert not away.is_here()
    away.manager.onload()
    assert_same(grads, snapshot(away.trainer.tensors(["grad_buffers"])))


def test_what_fits_need_not_wait_for_what_does_not():
    under_way = Future()
    given_back = [0]
    leaving = TransferHandle(under_way, lambda: given_back[0])
    permit = MemoryPermit(lambda: 1 << 20, 0.0, leaving, window_bytes=100)
    assert permit([300, 90, 20], taken=0) == 1
    given_back[0] = 290
    assert permit([300, 20], taken=90) == 0
    under_way.set_result(None)
    assert permit([1 << 20, 20], taken=390) == 0
    with pytest.raises(DeviceMemoryError) as raised:
        permit([3 << 20, 2 << 20], taken=410)
    assert raised.value.needed_bytes == 2 << 20
    assert raised.value.free_bytes == 1 << 20
