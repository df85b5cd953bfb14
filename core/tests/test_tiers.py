"""Where copies are kept: what is decided before anything is taken, and that the bytes come back from everywhere."""

import itertools
import json
import logging

import pytest
import torch
from core_toys import KEPT, KINDS, Trainer, assert_same, device_bytes, junk, moved, raw, run_python, snapshot, storages

from megastow import HostMemoryError, InvalidArgumentError, InvalidTypeError, Residency, create_memory_manager, machine
from megastow import swap as change_places
from megastow.device import CpuDevice
from megastow.machine import HostLimits
from megastow.tiers import HOST_MEMORY, Tier, place

SIZES = [{}, {"bucket_bytes": 2048, "chunk_bytes": 100}, {"bucket_bytes": 1, "chunk_bytes": 5000}]


def make(trainer, host_memory, disk_folder, **sizes):
    return create_memory_manager(
        trainer.model, trainer.optimizer, host_memory=host_memory, disk_folder=disk_folder, **sizes
    )


@pytest.fixture(params=["pageable", "disk"])
def slow(request):
    """The tiers that the device does not reach by itself."""
    return request.param


# --- the bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("host_memory", HOST_MEMORY)
def test_all_bytes_come_back(trainer, host_memory, sizes, disk_folder):
    before = [snapshot(trainer.tensors(kinds)) for kinds in (KEPT, KINDS)]
    with make(trainer, host_memory, disk_folder, **sizes) as manager:
        for keep in (True, True, False):
            held = storages(moved(trainer.tensors()))
            manager.offload(keep_grads=keep)
            assert device_bytes(moved(trainer.tensors())) == 0
            blocks = junk(held.values())
            manager.onload()
            assert_same(before[keep], snapshot(trainer.tensors(KINDS if keep else KEPT)))
            del blocks
        assert not any(raw(g).any() for g in trainer.tensors(["grad_buffers"]).values())
    assert (manager.host_bytes, manager.disk_bytes) == (0, 0)


def test_storages_of_any_size_beside_each_other(slow, disk_folder):
    lengths = [1, 2, 511, 512, 513, 4095, 4096, 4097, 8192, 12289, 100_000]
    model = torch.nn.Module()
    for n in lengths:
        content = torch.randint(0, 256, (n,), dtype=torch.uint8)
        model.register_parameter(f"p{n}", torch.nn.Parameter(content, requires_grad=False))
    before = snapshot(dict(model.named_parameters()))
    for bucket, chunk in itertools.product([1, 1 << 20], [1, 4096, 6000, 1 << 26]):
        with create_memory_manager(
            model, host_memory=slow, disk_folder=disk_folder, bucket_bytes=bucket, chunk_bytes=chunk
        ) as manager:
            manager.offload()
            manager.onload()
        assert_same(before, snapshot(dict(model.named_parameters())))


def test_training_goes_on_as_if_nothing_had_happened(slow, disk_folder):
    trainer, twin = Trainer(), Trainer()
    manager = make(trainer, slow, disk_folder, bucket_bytes=4096)
    for step in range(6):
        manager.offload(*KINDS[step % 3 :], non_blocking=bool(step % 2))
        manager.onload(non_blocking=bool(step % 2))
        assert torch.equal(raw(trainer.step()), raw(twin.step()))
    manager.close()
    assert_same(snapshot(twin.tensors(KEPT)), snapshot(trainer.tensors(KEPT)))


@pytest.mark.parametrize("window", [0, 1 << 30])
def test_two_tenants_change_places(slow, disk_folder, window):
    tenants = []
    for seed, width in enumerate((16, 48)):
        trainer = Trainer(seed, width)
        trainer.step()
        before = snapshot(trainer.tensors(KEPT))
        tenants.append((make(trainer, slow, disk_folder, bucket_bytes=1), trainer, before))
    tenants[1][0].offload()
    for _ in range(3):
        (here, _, _), (away, trainer, before) = tenants
        change_places(here, away, window_bytes=window)
        assert here.residency("weights") is Residency.OFFLOADED
        assert_same(before, snapshot(trainer.tensors(KEPT)))
        tenants.reverse()
    for manager, _, _ in tenants:
        manager.close(discard=True)


def test_prepared_memory_is_what_the_offload_takes(trainer, slow, disk_folder):
    manager = make(trainer, slow, disk_folder, bucket_bytes=1)
    manager.prepare(wait=True)
    held = manager.host_bytes, manager.disk_bytes
    manager.offload()
    assert (manager.host_bytes, manager.disk_bytes) == held
    manager.close()


def test_memory_that_an_offload_to_disk_spares_and_that_close_gives_back(disk_folder):
    run_python(f"""
import torch
from pathlib import Path
from megastow import create_memory_manager

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

size = 192 << 20
model = torch.nn.Module()
model.w = torch.nn.Parameter(torch.randint(0, 255, (size,), dtype=torch.uint8), requires_grad=False)
held = model.w.clone()
manager = create_memory_manager(model)  # what a first manager imports and makes
manager.close()
for host_memory in ("pinned", "pageable", "disk"):
    before = resident()
    manager = create_memory_manager(model, host_memory=host_memory, disk_folder={disk_folder!r})
    manager.offload()
    away = resident() - before
    manager.onload()
    here = resident() - before
    assert torch.equal(model.w, held)
    manager.close()
    left = resident() - before
    kept = size if host_memory != "disk" else 0
    staged = (64 << 20) if host_memory != "pinned" else 0
    slack = 24 << 20
    assert abs(away - (kept - size + staged)) < slack, (host_memory, "away", away)
    assert abs(here - (kept + staged)) < slack, (host_memory, "here", here)
    assert left < slack, (host_memory, "left", left)
""")


# --- what is decided -------------------------------------------------------------------------------------------------


def lacks(room):
    return lambda nbytes: f"{nbytes} of {room}" if nbytes > room else None


HOT, WARM, COLD = "hot", "warm", "cold"
WANTED = {HOT: 10, WARM: 20, COLD: 40}


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [
        (70, 0, {}),
        (69, 40, {COLD: "70 of 69"}),
        (35, 40, {COLD: "70 of 35"}),
        (31, 100, {COLD: "70 of 31", WARM: "32 of 31"}),  # the buffer of two bytes that the first file needs counts too
        (12, 60, {COLD: "70 of 12", WARM: "32 of 12"}),
        (2, 100, {COLD: "70 of 2", WARM: "32 of 2", HOT: "12 of 2"}),
        (65, 30, {WARM: "70 of 65"}),  # the disk has no room for the coldest
    ],
)
def test_the_coldest_go_to_disk_until_the_rest_fits(memory, disk, expected):
    found = place("auto", WANTED, {}, 2, lacks(memory), lacks(disk))
    assert found.reasons == expected
    assert {key for key, tier in found.tiers.items() if tier is Tier.DISK} == set(expected)
    assert set(found.tiers.values()) <= {Tier.DISK, Tier.PINNED}
    assert found.disk_bytes == sum(WANTED[key] for key in expected)
    assert found.memory_bytes == sum(WANTED.values()) - found.disk_bytes + (2 if expected else 0)
    assert found.problem is None


def test_what_is_colder_but_makes_no_difference_stays_in_memory():
    found = place("auto", {HOT: 10, WARM: 50, COLD: 1}, {}, 0, lacks(15), lacks(100))
    assert found.reasons == {WARM: "60 of 15"}
    assert (found.memory_bytes, found.disk_bytes, found.problem) == (11, 50, None)


def test_what_fits_nowhere_is_told_with_both_reasons():
    found = place("auto", WANTED, {}, 2, lacks(5), lacks(45))
    assert found.tiers == {HOT: Tier.PINNED, WARM: Tier.PINNED, COLD: Tier.DISK}
    assert found.problem == "32 of 5; 50 of 45"
    assert place("pinned", WANTED, {}, 2, lacks(69), lacks(100)).problem == "70 of 69"
    assert place("pageable", WANTED, {}, 2, lacks(71), lacks(100)).problem == "72 of 71"
    assert place("disk", WANTED, {}, 2, lacks(2), lacks(69)).problem == "70 of 69"
    assert place("disk", WANTED, {}, 2, lacks(1), lacks(70)).problem == "2 of 1"


def test_what_is_held_already_stays_and_is_not_taken_twice():
    held = {COLD: (Tier.PINNED, 40), WARM: (Tier.DISK, 20), HOT: (Tier.PINNED, 8), "other": (Tier.DISK, 99)}
    found = place("auto", WANTED, held, 0, lacks(2), lacks(0))
    assert found.tiers == {HOT: Tier.PINNED, WARM: Tier.DISK, COLD: Tier.PINNED}
    assert (found.memory_bytes, found.disk_bytes, found.problem) == (2, 0, None)
    found = place("auto", WANTED, held, 0, lacks(1), lacks(10))
    assert found.tiers[HOT] is Tier.DISK
    assert (found.memory_bytes, found.disk_bytes, found.problem) == (-8, 10, None)


# --- what is decided, through the interface --------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch):
    """Sets what host memory can be had."""

    def have(nbytes, ranks=1):
        limits = HostLimits(nbytes * ranks, nbytes, None, 64 << 10, ranks)
        monkeypatch.setattr(machine, "host_limits", lambda: limits)

    return have


def test_auto_puts_the_coldest_on_disk_and_says_so(trainer, room, disk_folder, caplog):
    caplog.set_level(logging.INFO)
    before = snapshot(trainer.tensors())
    with make(trainer, "auto", disk_folder, bucket_bytes=1, chunk_bytes=4096) as manager:
        everything = manager.plan(keep_grads=True)
        assert everything.new_disk_bytes == 0
        states = everything.kinds["optimizer_states"].host_bytes
        room(everything.new_host_bytes - states // 2)
        plan = manager.plan(keep_grads=True)
        assert {kind: entry.tier for kind, entry in plan.kinds.items()} == {
            "weights": Tier.PINNED,
            "main_weights": Tier.PINNED,
            "optimizer_states": Tier.DISK,
            "grad_buffers": Tier.PINNED,
        }
        assert plan.problem is None
        assert plan.new_disk_bytes == plan.disk_bytes == plan.kinds["optimizer_states"].disk_bytes == states
        assert "optimizer_states would be kept on disk: an offload needs" in str(plan)
        assert json.loads(json.dumps(plan.as_dict()))["kinds"]["optimizer_states"]["tier"] == "disk"
        report = manager.offload(keep_grads=True)
        assert (manager.host_bytes, manager.disk_bytes) == (plan.new_host_bytes, plan.new_disk_bytes)
        assert (report.host_bytes, report.disk_bytes) == (plan.host_bytes, plan.disk_bytes)
        [note] = report.notes
        assert "optimizer_states is kept in the tier disk: an offload needs" in note
        assert note in caplog.text
        assert manager.plan("optimizer_states").kinds["optimizer_states"].tier is Tier.DISK  # also while it is there
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))
        room(1 << 30)
        again = manager.offload(keep_grads=True)  # what is held stays where it is
        assert (again.disk_bytes, again.notes) == (report.disk_bytes, report.notes)
        manager.onload()
        assert_same(before, snapshot(trainer.tensors()))


def test_auto_counts_all_ranks_of_this_host(trainer, room, disk_folder, monkeypatch):
    manager = make(trainer, "auto", disk_folder, bucket_bytes=1)
    wanted = manager.plan().new_host_bytes
    limits = HostLimits(
        total_bytes=4 * wanted, available_bytes=4 * wanted, cgroup=None, memlock_bytes=None, local_ranks=8
    )
    monkeypatch.setattr(machine, "host_limits", lambda: limits)
    assert "in all 8 processes of this host" in "".join(manager.plan().notes)
    manager.close()


def test_auto_keeps_pageable_what_the_driver_does_not_lock(trainer, disk_folder, monkeypatch):
    before = snapshot(trainer.tensors(KEPT))
    locked = []

    def lock(device, address, nbytes):
        if sum(locked) + nbytes > most:
            raise HostMemoryError("page-locking failed")
        locked.append(nbytes)

    monkeypatch.setattr(CpuDevice, "lock_pages", lock)
    with make(trainer, "auto", disk_folder, bucket_bytes=1, chunk_bytes=4096) as manager:
        most = manager.plan("weights", "main_weights").new_host_bytes
        report = manager.offload()
        tiers = {
            kind: entry.tier
            for kind, entry in manager.plan("weights", "main_weights", "optimizer_states").kinds.items()
        }
        assert tiers == {"weights": Tier.PINNED, "main_weights": Tier.PINNED, "optimizer_states": Tier.PAGEABLE}
        assert report.notes == ("optimizer_states is kept in the tier pageable: page-locking failed",)
        assert manager.disk_bytes == 0
        manager.onload()
    assert_same(before, snapshot(trainer.tensors(KEPT)))


def test_passing_tensors_that_are_kept_elsewhere_are_no_news(disk_folder, monkeypatch):
    model = torch.nn.Linear(64, 64)
    model.left_by_a_forward = torch.ones(8)

    def lock(device, address, nbytes):
        if nbytes <= machine.PAGE_BYTES:
            raise HostMemoryError("page-locking failed")

    monkeypatch.setattr(CpuDevice, "lock_pages", lock)
    options = {"host_memory": "auto", "disk_folder": disk_folder}
    with create_memory_manager(model, **options) as manager:
        report = manager.offload("weights")
        assert manager.plan("weights").kinds["weights"].tier is Tier.PINNED
        assert report.notes == ()
        manager.onload()
    assert torch.equal(model.left_by_a_forward, torch.ones(8))


def test_a_refused_lock_refuses_the_offload_where_pinned_memory_was_asked_for(trainer, monkeypatch):
    def refuse(device, address, nbytes):
        raise HostMemoryError("page-locking failed")

    before = snapshot(trainer.tensors())
    monkeypatch.setattr(CpuDevice, "lock_pages", refuse)
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    with pytest.raises(HostMemoryError, match="page-locking failed"):
        manager.offload()
    assert manager.host_bytes == 0
    assert_same(before, snapshot(trainer.tensors()))
    with create_memory_manager(trainer.model, trainer.optimizer, host_memory="pageable") as manager:
        manager.offload(keep_grads=True)  # the buffer itself is not locked then
        manager.onload()
    assert_same(before, snapshot(trainer.tensors()))


@pytest.mark.parametrize("host_memory", ["disk", "auto"])
def test_a_host_that_is_too_small_in_every_way_is_told_with_figures(
    trainer, room, host_memory, disk_folder, monkeypatch
):
    before = snapshot(trainer.tensors())
    manager = make(trainer, host_memory, disk_folder, chunk_bytes=4096)
    room(20_000)
    space = type(manager._engine._arena._folder).space
    monkeypatch.setattr(
        "megastow.disk.DiskFolder.space",
        lambda folder: type(space(folder))("there", total_bytes=1 << 30, free_bytes=1000),
    )
    plan = manager.plan()
    assert "1000 B of 1 GiB are free in there" in plan.problem
    assert ("of host memory" in plan.problem) == (host_memory == "auto")
    with pytest.raises(HostMemoryError) as refused:
        manager.offload()
    assert plan.problem in str(refused.value)
    assert (manager.host_bytes, manager.disk_bytes) == (0, 0)
    assert_same(before, snapshot(trainer.tensors()))
    manager.close()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"host_memory": "tape"}, InvalidArgumentError, "'tape'; expected one of pinned, pageable, disk, auto"),
        ({"host_memory": None}, InvalidArgumentError, "None; expected one of"),
        ({"disk_folder": 7}, InvalidTypeError, "disk_folder is a int"),
        ({"host_memory": "disk", "disk_folder": "/nowhere/at/all"}, InvalidArgumentError, "No such file or directory"),
    ],
)
def test_arguments(trainer, options, error, match):
    with pytest.raises(error, match=match):
        create_memory_manager(trainer.model, **options)


def test_auto_without_a_disk_says_why_when_it_is_missing(trainer, room):
    manager = make(trainer, "auto", "/nowhere/at/all")
    manager.offload()  # it fits: nobody asks for the disk
    manager.close()
    manager = make(trainer, "auto", "/nowhere/at/all")
    room(100)
    with pytest.raises(HostMemoryError, match=r"of host memory.*/nowhere/at/all cannot be used"):
        manager.offload()
    manager.close()
