"""Checks of one move: bytes, identities, memory on both sides, any order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from megastow import Residency, StateChangedError, StateKind, create_memory_manager
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, away, cycle, everything, shuffled, trained
from megastow_conformance.checks.watches import WatchAllocations, aligned, calls_by_autograd, count_accumulations
from megastow_conformance.trainer import Point, Trainer

if TYPE_CHECKING:
    from megastow import MemoryManager

PAGE_BYTES = 4096
SCALAR_BYTES = 64
SMALL_BUCKET_BYTES = 16 << 10


def bitexact(case: Case) -> None:
    """Awkward values in all state come back to the last bit, through two cycles."""
    _expect_every_bit(case, keep_grads=False)


def bitexact_with_grads(case: Case) -> None:
    """So do those in gradients that are to be kept."""
    _expect_every_bit(case, keep_grads=True)


def _expect_every_bit(case: Case, *, keep_grads: bool) -> None:
    trainer = trained(case)
    planted = oracle.plant_awkward_values(everything(trainer, grads=True).values())
    assert planted > 5, f"only {planted} tensors took awkward values"
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES, chunk_bytes=4096)
    _expect_two_cycles(case, manager, trainer, keep_grads=keep_grads)


def _expect_two_cycles(case: Case, manager: MemoryManager, trainer: Trainer, *, keep_grads: bool = False) -> None:
    before = oracle.snapshot(everything(trainer, grads=keep_grads))
    for number in (1, 2):
        cycle(case, manager, trainer, keep_grads=keep_grads)
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=keep_grads)), f"after cycle {number}")


def bitexact_of_other_sizes(case: Case) -> None:
    """Optimizer states that have become larger or smaller since the last cycle come back as they are now."""
    trainer = trained(case)
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES, chunk_bytes=4096)
    cycle(case, manager, trainer)
    for factor in (3.1, 0.26):
        states = [t for name, t in trainer.named_state().items() if ".state" in name and t.dim() and t.numel()]
        states = [tensor for tensor in states if oracle.is_on_device(tensor, case.device)]
        assert states, "no optimizer state is on the device"
        for number, tensor in enumerate(states):
            content = torch.arange(1 + int(factor * tensor.numel()), device=case.device)
            tensor.data = content.add_(number).remainder_(251).to(tensor.dtype)
        _expect_two_cycles(case, manager, trainer)


def identity(case: Case) -> None:
    """Every tensor object alive has its identity, its properties and its aliases as before; hooks fire as before.

    What lives on the host is not even touched.
    """
    trainer = trained(case)
    fired = count_accumulations(case, trainer)
    with calls_by_autograd(trainer.hook_folders) as expected_calls:
        trainer.train_step(2)
    expected = dict(fired)
    everything(trainer, grads=True)  # waits for gatherings in flight, which change the version of what they write to
    assert expected, "no gradient was accumulated"
    hidden = trainer.hook_folders if case.device.type == "cpu" else ()
    assert expected_calls or not hidden, f"autograd called nothing of {', '.join(sorted(hidden))}"
    on_host = trainer.host_state()
    tensors = [t for t in oracle.live_tensors() if t.device == case.device and t.untyped_storage().nbytes()]
    shapes = [oracle.shape_of(tensor) for tensor in tensors]
    aliases = oracle.alias_map(tensors)
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES)
    assert [oracle.shape_of(tensor) for tensor in tensors] == shapes, "creating a manager changed a tensor"
    for number in (1, 2):
        homes, values = _addresses(on_host), oracle.snapshot(on_host)
        with away(case, manager, trainer):
            moved = [name for name, home in _addresses(on_host).items() if home != homes[name]]
            assert not moved, f"cycle {number} moved what lives on the host: {moved[:5]}"
            if on_host:
                oracle.assert_same(values, oracle.snapshot(on_host), "on the host, while the rest is away")
        replaced = [name for name, tensor in trainer.host_state().items() if tensor is not on_host.get(name)]
        assert not replaced, f"cycle {number} replaced what lives on the host: {replaced[:5]}"
        changed = [(a, b) for a, b in zip(shapes, map(oracle.shape_of, tensors), strict=True) if a != b]
        assert not changed, f"cycle {number} changed {len(changed)} tensor objects: {changed[:3]}"
        assert oracle.alias_map(tensors) == aliases, f"cycle {number} changed which tensors share memory"
    fired.clear()
    with calls_by_autograd(trainer.hook_folders) as calls:
        trainer.train_step(3)
    differently = [name for name in expected.keys() | fired.keys() if expected.get(name) != fired.get(name)]
    assert not differently, f"{len(differently)} hooks fired differently after the cycles: {sorted(differently)[:5]}"
    uneven = {n: (expected_calls[n], calls[n]) for n in expected_calls | calls if expected_calls[n] != calls[n]}
    assert not uneven, f"Megatron's own hooks were called so often before and after the cycles: {uneven}"


def _addresses(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int, torch.device]]:
    """Where each tensor's memory is."""
    return {n: (t.data_ptr(), t.untyped_storage().nbytes(), t.device) for n, t in tensors.items()}


def released(case: Case) -> None:
    """After an offload of everything no storage of the trainer has memory, found by looking at all tensors alive.

    Once with the gradients cleared, and once right after the optimizer's step, when what it has made of them still
    hangs on the main weights.
    """
    foreign = set(oracle.storage_sizes(oracle.live_tensors()))
    floor = _device_bytes(case)
    trainer = trained(case)
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES)
    _expect_nothing_left(case, trainer, manager, foreign, floor)
    reached: list[Point] = []

    def at(point: Point) -> None:
        if point is Point.AFTER_STEP:
            reached.append(point)
            _expect_nothing_left(case, trainer, manager, foreign, floor)

    trainer.train_step(2, at)
    assert reached


def _expect_nothing_left(case: Case, trainer: Trainer, manager: MemoryManager, foreign: set[int], floor: int) -> None:
    """Offload everything, look for memory that is left, and bring everything back.

    Args:
        case: The case.
        trainer: The trainer.
        manager: Its manager.
        foreign: Storages from before the trainer.
        floor: Device bytes that the allocator had handed out before the trainer.
    """
    trained_bytes = _device_bytes(case)
    foreign = foreign | oracle.storage_sizes(trainer.scratch()).keys()
    sizes = oracle.storage_sizes(t for t in everything(trainer, grads=True).values() if t.device == case.device)
    held = sum(size for size in sizes.values() if size > SCALAR_BYTES)
    report = manager.offload()
    left = [
        tensor
        for tensor in oracle.live_tensors()
        if oracle.is_on_device(tensor, case.device)
        and oracle.storage_key(tensor) not in foreign
        and tensor.untyped_storage().nbytes() > SCALAR_BYTES
        and not _is_random_state(tensor)
    ]
    found = [(tuple(t.shape), t.dtype, t.untyped_storage().nbytes()) for t in left]
    still = sum(oracle.storage_sizes(left).values())
    assert still <= trainer.hidden_bytes(), (
        f"{still} bytes are still on the device, in {len(found)} tensors: {found[:8]}"
    )
    assert report.device_bytes >= held, f"{report.device_bytes} bytes were released, the trainer held {held}"
    if case.device.type == "cuda":
        freed, remaining = trained_bytes - _device_bytes(case), _device_bytes(case) - floor
        assert freed >= held, f"the allocator gave back {freed} bytes, the trainer held {held}"
        assert remaining <= 128 << 10, f"{remaining} bytes above the level before the trainer"
        cached = torch.cuda.memory_reserved(case.device) - torch.cuda.memory_allocated(case.device)
        assert cached <= 32 << 20, f"torch still holds {cached} bytes back from the driver"
    manager.onload()


def _is_random_state(tensor: torch.Tensor) -> bool:
    """Megatron's tracker keeps states of random generators: CPU tensors of a fixed size, which no device holds."""
    return tensor.dtype is torch.uint8 and torch.equal(
        torch.tensor(tensor.shape), torch.tensor(torch.get_rng_state().shape)
    )


def _device_bytes(case: Case) -> int:
    return torch.cuda.memory_allocated(case.device) if case.device.type == "cuda" else 0


def peak(case: Case) -> None:
    """An offload takes at most one bucket of extra device memory, an onload no more than was released."""
    trainer = trained(case)
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES)
    with WatchAllocations(case.device) as watch:
        manager.offload()
    assert watch.peak_bytes <= SMALL_BUCKET_BYTES, f"the offload took {watch.peak_bytes} extra bytes"
    manager.onload()
    resident = WatchAllocations(case.device).in_use()
    manager.offload()
    with WatchAllocations(case.device) as watch:
        manager.onload()
    assert watch.in_use() == resident, f"{watch.in_use()} bytes are in use, {resident} were before the offload"
    came_back = resident - watch.start_bytes
    assert came_back > 0, "nothing was offloaded"
    assert watch.peak_bytes <= came_back, f"the onload took {watch.peak_bytes} bytes to bring {came_back} back"


def host(case: Case) -> None:
    """Host memory is the bytes kept, rounded to the alignment, and stays what it is over ten cycles."""
    trainer = trained(case)
    manager = case.manager(trainer)
    assert manager.host_bytes == 0, "host memory was taken before anything asked for it"
    homes = _homes(case, trainer)
    with away(case, manager, trainer):
        first = manager.host_bytes
        still_here = _homes(case, trainer)
    sizes = dict(home for name, home in homes.items() if name not in still_here)  # each storage once
    most = sum(map(aligned, sizes.values())) + len(KINDS) * PAGE_BYTES
    assert sizes, "nothing was offloaded"
    assert sum(sizes.values()) <= first <= most, f"{first} host bytes for {sum(sizes.values())} bytes kept"
    cycle(case, manager, trainer)  # packing may have left holes behind, once
    tensors = _count_by_shape(oracle.live_tensors())
    device = oracle.live_bytes(case.device)
    for number in range(10):
        with away(case, manager, trainer):
            held = manager.host_bytes
        assert held == first, f"cycle {number} holds {held} host bytes, not {first}"
    more = _count_by_shape(oracle.live_tensors()) - tensors
    assert not more, f"there are {more.total()} more tensors after ten cycles: {dict(more.most_common(5))}"
    grown = oracle.live_bytes(case.device) - device  # it may shrink: a scalar of a step was seen to go
    assert grown <= 0, f"device memory grew by {grown} bytes over ten cycles"
    manager.close()
    assert manager.host_bytes == 0, "close kept host memory"


def _count_by_shape(tensors: Iterable[torch.Tensor]) -> Counter[str]:
    """How many there are of each shape, dtype and device."""
    return Counter(f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in tensors)


def _homes(case: Case, trainer: Trainer) -> dict[str, tuple[int, int]]:
    """The storage that each tensor of the state has on the device, and its bytes; a tensor without memory has none."""
    grads = oracle.storage_sizes(trainer.named_grads().values())  # a wrapper may keep them as an attribute of its own
    state = {**trainer.named_state(), **_attributes(trainer)}
    kept = {name: tensor for name, tensor in state.items() if oracle.storage_key(tensor) not in grads}
    kept |= {f"staged{number}": tensor for number, tensor in enumerate(trainer.staged_weights())}
    return {
        name: (oracle.storage_key(tensor), tensor.untyped_storage().nbytes())
        for name, tensor in kept.items()
        if oracle.is_on_device(tensor, case.device) and tensor.untyped_storage().nbytes()
    }


def _attributes(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Tensors that modules and their helpers keep as plain attributes."""
    found = {}
    for index, chunk in enumerate(trainer.model):
        for path, module in chunk.named_modules():
            for owner in (module, vars(module).get("token_dispatcher")):
                for name, value in vars(owner).items() if owner is not None else ():
                    if isinstance(value, torch.Tensor):
                        found[f"{index}.{path}.{name}"] = value
    return found


def order(case: Case) -> None:
    """Every subset of kinds, and kinds one by one out in every order and back in another, repeated calls included.

    In the core scope a third of the orders, other ones for each scenario.
    """
    trainer = trained(case)
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES)
    cycle(case, manager, trainer)  # what an ordinary cycle does to bytes is for `bitexact` to judge
    before = oracle.snapshot(trainer.named_state())
    for size in range(1, len(KINDS) + 1):
        for subset in itertools.combinations(KINDS, size):
            with away(case, manager, trainer, *subset):
                where = {kind: manager.residency(kind) for kind in KINDS}
                wanted = {k: Residency.OFFLOADED if k in subset else Residency.RESIDENT for k in KINDS}
                assert where == wanted, f"after offload of {subset}: {where}"
            oracle.assert_same(before, oracle.snapshot(trainer.named_state()), f"after {subset}")
    orders = list(itertools.permutations(KINDS))
    choose = shuffled(case)
    outs = orders if case.row.scope == "full" else choose.sample(orders, len(orders) // 3)
    for out, back in zip(outs, choose.sample(orders, len(outs)), strict=True):
        for kind in out:
            assert manager.offload(kind).kinds[StateKind(kind)].moved
            assert not any(k.moved for k in manager.offload(kind).kinds.values()), "a second offload moved something"
        for kind in back:
            assert manager.onload(kind).kinds[StateKind(kind)].moved
            assert not any(k.moved for k in manager.onload(kind).kinds.values()), "a second onload moved something"
        oracle.assert_same(before, oracle.snapshot(trainer.named_state()), f"out {out}, back {back}")


def neighbours(case: Case) -> None:
    """Several managers take turns; a second manager on a model that is away is refused and harms nothing."""
    trainer = trained(case)
    reference = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).to(case.device)
    prompt = torch.linspace(-1, 1, 64, device=case.device)
    with torch.no_grad():
        answer = oracle.as_bytes(reference(prompt))
    manager, other = case.manager(trainer), create_memory_manager(reference)
    case.on_close(other.close)
    cycle(case, manager, trainer)
    before = oracle.snapshot(everything(trainer, grads=True))
    other.offload()
    for _ in range(2):
        with away(case, manager, trainer):
            try:
                case.create(trainer.model, trainer.optimizer)
            except StateChangedError as error:
                assert "another manager" in str(error)
            except Exception as error:
                raise AssertionError(f"a second manager of a model that is away was not refused: {error!r}") from error
            else:
                raise AssertionError("a second manager took a model that is away")
            other.onload()
            with torch.no_grad():
                assert torch.equal(oracle.as_bytes(reference(prompt)), answer), "the neighbour computes something else"
            other.offload()
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), "beside a neighbour")
