"""`plan()`: what an offload would take is what it then takes, and what would refuse it."""

import json

import pytest
from core_toys import KINDS, Trainer, assert_same, device_bytes, moved, snapshot, storages

from megastow import HostMemoryError, ManagerClosedError, Residency, StateKind, create_memory_manager, machine
from megastow.host import ALIGNMENT_BYTES
from megastow.machine import HostLimits
from megastow.tiers import HOST_MEMORY


@pytest.fixture
def manager(trainer):
    with create_memory_manager(trainer.model, trainer.optimizer, bucket_bytes=4096) as made:
        yield made


@pytest.mark.parametrize("keep_grads", [False, True])
def test_an_offload_takes_what_was_planned(trainer, manager, keep_grads):
    before = snapshot(trainer.tensors())
    held = {kind: storages(moved(trainer.tensors([kind]))) for kind in KINDS}
    plan = manager.plan(keep_grads=keep_grads)
    assert manager.host_bytes == 0
    assert_same(before, snapshot(trainer.tensors()))
    assert {kind: entry.device_bytes for kind, entry in plan.kinds.items()} == {
        kind: sum(sizes.values()) for kind, sizes in held.items()
    }
    assert plan.device_bytes == device_bytes(moved(trainer.tensors()))
    grads = sum(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in held["grad_buffers"].values())
    assert plan.kinds[StateKind.GRAD_BUFFERS].host_bytes == (grads if keep_grads else 0)
    report = manager.offload(keep_grads=keep_grads)
    assert manager.host_bytes == plan.new_host_bytes
    assert plan.host_bytes == report.host_bytes
    assert {kind: entry.num_tensors for kind, entry in plan.kinds.items()} == {
        kind: entry.num_tensors for kind, entry in report.kinds.items()
    }


@pytest.mark.parametrize("host_memory", HOST_MEMORY)
def test_a_first_offload_takes_what_was_planned_for_what_it_packs(host_memory, disk_folder):
    """Files, and memory that may become one, are made of whole pages: small storages take less in a bucket."""
    trainer = Trainer(width=48)
    options = {"host_memory": host_memory, "disk_folder": disk_folder, "bucket_bytes": 20_000}
    with create_memory_manager(trainer.model, trainer.optimizer, **options) as manager:
        for kinds in (["weights"], KINDS):
            plan = manager.plan(*kinds)
            held = manager.host_bytes, manager.disk_bytes
            report = manager.offload(*kinds)
            for kind in kinds:
                planned, taken = plan.kinds[kind], report.kinds[kind]
                if taken.moved:
                    assert (planned.host_bytes, planned.disk_bytes) == (taken.host_bytes, taken.disk_bytes)
            assert manager.disk_bytes - held[1] == plan.new_disk_bytes
            makes_buffers = host_memory != "pinned" and not any(held)  # through which slower tiers copy
            assert makes_buffers or manager.host_bytes - held[0] == plan.new_host_bytes
        manager.onload()


def test_packing_is_planned_once(trainer, manager):
    first = manager.plan()
    assert 0 < first.packing_bytes <= 4096
    manager.offload()
    manager.onload()
    again = manager.plan()
    assert again.packing_bytes == 0
    assert again.new_host_bytes == 0
    assert again.host_bytes == first.host_bytes


def test_what_is_away_is_in_the_plan_too(trainer, manager):
    before = manager.plan("weights", "optimizer_states")
    manager.offload("weights")
    plan = manager.plan("weights", "optimizer_states")
    assert plan.kinds["weights"].residency is Residency.OFFLOADED
    assert plan.kinds["weights"].num_tensors == before.kinds["weights"].num_tensors
    assert plan.kinds["weights"].host_bytes == before.kinds["weights"].host_bytes
    assert plan.device_bytes == before.kinds["optimizer_states"].device_bytes
    assert plan.kinds.keys() == {"weights", "optimizer_states"}


def test_a_host_that_is_too_small_is_told_with_the_figures_an_offload_refuses_with(trainer, manager, monkeypatch):
    tight = HostLimits(total_bytes=1 << 20, available_bytes=100, cgroup=None, memlock_bytes=64 << 10, local_ranks=4)
    monkeypatch.setattr(machine, "host_limits", lambda: tight)
    plan = manager.plan()
    assert "in all 4 processes of this host" in plan.problem
    assert "100 B of 1 MiB can be had" in plan.problem
    with pytest.raises(HostMemoryError) as refused:
        manager.offload()
    assert plan.problem in str(refused.value)
    assert manager.plan("grad_buffers").problem is None  # they are not copied


def test_it_prints_and_goes_into_json(trainer, manager):
    plan = manager.plan()
    text = str(plan)
    assert "optimizer_states (resident)" in text
    assert "NUMA node unknown" in text
    assert text.endswith("the host can give that")
    told = json.loads(json.dumps(plan.as_dict()))
    assert told["kinds"]["weights"]["residency"] == "resident"
    assert told["new_host_bytes_of_all_ranks"] == plan.new_host_bytes * plan.limits.local_ranks
    assert told["problem"] is None


def test_a_closed_manager_plans_nothing(trainer):
    manager = create_memory_manager(trainer.model)
    manager.close()
    with pytest.raises(ManagerClosedError):
        manager.plan()
