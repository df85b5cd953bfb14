"""Host memory: exact size, pieces, reuse, and all of it given back."""

import ctypes
import errno
import gc
import time
import weakref

import pytest
import torch
from core_toys import run_python

from megastow import faults, host, machine
from megastow.device import CpuDevice
from megastow.errors import HostMemoryError
from megastow.host import HostArena, HostRegion, align_up, check_host_memory
from megastow.staging import Staging
from megastow.tiers import Tier

PAGE = machine.PAGE_BYTES


class Locks(CpuDevice):
    """A device that notes which pages are locked, and refuses from some lock on."""

    def __init__(self, refuse_from=1 << 40):
        super().__init__(torch.device("cpu"))
        self.locked = {}
        self._left = refuse_from

    def lock_pages(self, address, nbytes):
        self._left -= 1
        if self._left < 0:
            raise HostMemoryError("refused")
        assert address % PAGE == 0
        self.locked[address] = nbytes

    def unlock_pages(self, address):
        del self.locked[address]


def test_align_up():
    assert [align_up(n) for n in (0, 1, 511, 512, 513)] == [0, 512, 512, 512, 1024]
    assert align_up(5, 4) == 8


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, 5 * PAGE + 1])
def test_a_region_has_exactly_the_pages_it_needs_and_all_are_locked(nbytes):
    device = Locks()
    region = HostRegion.make(nbytes, device, piece_bytes=2 * PAGE)
    assert region.nbytes == region.bytes.nbytes == align_up(nbytes, PAGE)
    assert sum(device.locked.values()) == region.nbytes
    assert max(device.locked.values()) <= 2 * PAGE
    region.bytes.fill_(7)
    region.close()
    region.close()
    assert not device.locked
    assert region.bytes.nbytes == 0


def test_no_chunk_spans_two_pieces():
    region = HostRegion.make(10 * PAGE, Locks(), piece_bytes=3 * PAGE)
    for offset, nbytes, chunk in (
        (0, 10 * PAGE, 1 << 40),
        (512, 9 * PAGE, 2 * PAGE),
        (3 * PAGE - 512, 1024, PAGE),
        (0, 1, 1),
    ):
        chunks = list(region.chunks(offset, nbytes, chunk))
        assert [start for start, _ in chunks] == [sum(n for _, n in chunks[:i]) for i in range(len(chunks))]
        assert sum(n for _, n in chunks) == nbytes
        for start, length in chunks:
            assert 0 < length <= chunk
            first, last = offset + start, offset + start + length - 1
            assert first // (3 * PAGE) == last // (3 * PAGE)


def test_a_refused_lock_leaves_nothing_locked():
    device = Locks(refuse_from=2)
    with pytest.raises(HostMemoryError):
        HostRegion.make(8 * PAGE, device, piece_bytes=2 * PAGE)
    assert not device.locked
    with faults.inject("host.lock", lambda: KeyboardInterrupt(), after=1), pytest.raises(KeyboardInterrupt):
        HostRegion.make(8 * PAGE, Locks(), piece_bytes=2 * PAGE)


def test_a_region_nobody_holds_is_unlocked():
    device = Locks()
    region = HostRegion.make(PAGE, device)
    gc.disable()
    try:
        del region
        assert not device.locked
    finally:
        gc.enable()


def test_a_size_that_no_machine_has_is_refused():
    with pytest.raises(HostMemoryError, match="could not be mapped"):
        HostRegion.make(1 << 62, Locks())
    with pytest.raises(HostMemoryError, match="can be had"):
        check_host_memory(1 << 60)


def test_the_arena_reuses_replaces_and_forgets():
    arena = HostArena(Locks())
    first = arena.reserve({"a": 100})["a"]
    assert arena.reserve({"a": PAGE})["a"] is first  # the same pages
    assert arena.reserve({"b": 3 * PAGE})["b"] is not first
    assert arena.nbytes == 4 * PAGE
    gone = weakref.ref(first)
    del first
    assert arena.reserve({"a": PAGE + 1})["a"].nbytes == 2 * PAGE
    assert gone() is None
    assert arena.nbytes == 5 * PAGE
    arena.close()
    arena.close()
    assert arena.nbytes == 0


def test_a_region_is_locked_while_the_next_is_touched():
    size = 64 << 20
    seen = []

    class Waits(Locks):
        def lock_pages(self, address, nbytes):
            deadline = time.monotonic() + 30
            while not self.locked and machine.resident_bytes() < before + 1.9 * size and time.monotonic() < deadline:
                time.sleep(0.001)
            seen.append(machine.resident_bytes() - before)
            super().lock_pages(address, nbytes)

    arena = HostArena(Waits())
    before = machine.resident_bytes()
    regions = arena.reserve({"a": size, "b": size})
    assert seen[0] > 1.9 * size, "the second was not touched while the first was being locked"
    assert all(region.bytes.sum() == 0 for region in regions.values())
    arena.close()


def test_of_regions_that_are_made_together_those_stay_that_were_ready():
    device = Locks(refuse_from=2)
    arena = HostArena(device)
    before = arena.reserve({"a": PAGE})["a"]
    with pytest.raises(HostMemoryError, match="refused"):
        arena.reserve({"a": PAGE, "b": 2 * PAGE, "c": 3 * PAGE, "d": PAGE})
    assert arena.nbytes == 3 * PAGE
    assert sorted(device.locked.values()) == [PAGE, 2 * PAGE]
    assert arena.reserve({"a": PAGE})["a"] is before
    with faults.inject("host.allocate", lambda: KeyboardInterrupt(), after=1), pytest.raises(KeyboardInterrupt):
        arena.reserve({"b": PAGE, "c": PAGE})
    assert sorted(device.locked.values()) == [PAGE]
    arena.close()
    assert not device.locked


class _NoPagesLeft:
    """libc on a machine that has no pages left after some calls."""

    def __init__(self, *_, **__):
        self.libc = _CDLL(None, use_errno=True)
        self.left = 3

    def madvise(self, *arguments):
        self.left -= 1
        if self.left >= 0:
            return self.libc.madvise(*arguments)
        ctypes.set_errno(errno.ENOMEM)
        return -1


_CDLL = ctypes.CDLL


def test_a_machine_without_pages_gets_its_memory_back_at_once(monkeypatch):
    part = host._TOUCH_BYTES
    arena = HostArena(Locks())
    before = machine.resident_bytes()
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(host.ctypes, "CDLL", _NoPagesLeft)
            with pytest.raises(HostMemoryError, match="no pages left"):
                arena.reserve({"a": 2 * part, "b": 4 * part})
        held = arena.nbytes  # the first, if its parts came first
        assert machine.resident_bytes() < before + held + part // 2
    finally:
        gc.enable()
    assert [region.nbytes for region in arena.reserve({"a": 2 * part, "b": 4 * part}).values()] == [2 * part, 4 * part]
    arena.close()


def test_memory_is_touched_where_no_thread_can_be_started(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("cannot schedule new futures after shutdown")

    arena = HostArena(Locks())
    before = machine.resident_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(host.ThreadPoolExecutor, "submit", refuse)
        regions = arena.reserve({"a": 32 << 20, "b": 32 << 20})
    assert machine.resident_bytes() > before + (60 << 20)
    assert all(region.tier is Tier.PINNED for region in regions.values())
    arena.close()


def test_only_what_cannot_be_locked_is_kept_in_other_memory():
    arena = HostArena(Locks(refuse_from=1), "auto", staging=Staging(Locks(), PAGE))
    regions = arena.reserve({"a": PAGE, "b": 2 * PAGE})
    assert [region.tier for region in regions.values()] == [Tier.PINNED, Tier.PAGEABLE]
    assert list(arena.demoted()) == ["b"]
    arena.close()


def test_the_arena_checks_everything_together_and_counts_what_it_holds(monkeypatch):
    arena = HostArena(Locks())
    arena.reserve({"a": 4 * PAGE})
    asked = []
    monkeypatch.setattr("megastow.host.shortage", lambda nbytes, limits: asked.append(nbytes))
    arena.check({"a": 4 * PAGE, "b": 1, "c": PAGE})
    arena.check({"a": 4 * PAGE})
    arena.check({"a": PAGE, "b": 2 * PAGE})
    assert set(asked) == {2 * PAGE}
    assert arena.nbytes == 4 * PAGE


def test_memory_is_given_back_and_a_view_outlives_its_region():
    run_python(f"""
import torch
from pathlib import Path
from megastow.device import CpuDevice
from megastow.host import HostArena, HostRegion

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * {PAGE}

size = 512 << 20
device = CpuDevice(torch.device("cpu"))
before = resident()
arena = HostArena(device)
region = arena.reserve({{"x": size}})["x"]
assert resident() - before > 0.95 * size, "not touched"
region.bytes.fill_(1)
assert resident() - before < 1.05 * size + (8 << 20), "more than its size"
del region
arena.close()
assert resident() - before < (32 << 20), "not given back"

region = HostRegion.make(1 << 20, device)
view = region.bytes[-8:]
view.fill_(9)
region.close()
assert view.tolist() == [9] * 8
view.fill_(3)
del region
assert view.tolist() == [3] * 8
""")
