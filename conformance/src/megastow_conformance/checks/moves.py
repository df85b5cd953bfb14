"""Checks of one move: bytes, identities, memory on both sides, any order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megastow import (
    AdapterSelectionError,
    MegastowError,
    Residency,
    StateChangedError,
    StateKind,
    create_memory_manager,
)
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, assert_continues, away, cycle, everything, shuffled, trained
from megastow_conformance.trainer import Trainer

ALIGNMENT_BYTES = 512
PAGE_BYTES = 4096
SCALAR_BYTES = 64
SMALL_BUCKET_BYTES = 16 << 10
ROUTING_BYTES = 1024
"""What the autograd graph that a MoE token dispatcher of megatron-core 0.9 holds on to may keep: a routing map of 8
bytes a token. It is an activation, in no attribute, and dies with the next forward pass."""


def bitexact(case: Case) -> None:
    """Awkward values in every kind come back to the last bit, through two cycles."""
    trainer = trained(case)
    planted = oracle.plant_awkward_values(everything(trainer, grads=True).values())
    assert planted > 5, f"only {planted} tensors took awkward values"
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES, chunk_bytes=4096)
    before = oracle.snapshot(everything(trainer, grads=True))
    for number in (1, 2):
        cycle(case, manager, trainer, keep_grads=True)
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), f"after cycle {number}")


def identity(case: Case) -> None:
    """Every tensor object alive has its identity, its properties and its aliases as before; hooks fire once."""
    trainer = trained(case)
    fired = _count_hooks(case, trainer)
    trainer.train_step(2)
    expected = dict(fired)
    everything(trainer, grads=True)  # waits for gatherings in flight, which change the version of what they write to
    tensors = [t for t in oracle.live_tensors() if t.device == case.device and t.untyped_storage().nbytes()]
    shapes = [oracle.shape_of(tensor) for tensor in tensors]
    aliases = oracle.alias_map(tensors)
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES)
    assert [oracle.shape_of(tensor) for tensor in tensors] == shapes, "creating a manager changed a tensor"
    for number in (1, 2):
        cycle(case, manager, trainer, keep_grads=True)
        changed = [(a, b) for a, b in zip(shapes, map(oracle.shape_of, tensors), strict=True) if a != b]
        assert not changed, f"cycle {number} changed {len(changed)} tensor objects: {changed[:3]}"
        assert oracle.alias_map(tensors) == aliases, f"cycle {number} changed which tensors share memory"
    fired.clear()
    trainer.train_step(3)
    assert fired == expected, "hooks fired differently after the cycles"


def _count_hooks(case: Case, trainer: Trainer) -> dict[str, int]:
    """Count how often each parameter's gradient is accumulated."""
    fired: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(_parameter: torch.Tensor) -> None:
            fired[name] = fired.get(name, 0) + 1

        return hook

    for chunk_number, chunk in enumerate(trainer.model):
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(count(f"{chunk_number}.{name}"))
                case.on_close(handle.remove)
    return fired


def released(case: Case) -> None:
    """After an offload of everything no storage of the trainer has memory, found by looking at all tensors alive."""
    foreign = set(oracle.storage_sizes(oracle.live_tensors()))
    floor = _device_bytes(case)
    trainer = trained(case)
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES)
    trained_bytes = _device_bytes(case)
    foreign |= oracle.storage_sizes(trainer.scratch()).keys()
    sizes = oracle.storage_sizes(t for t in everything(trainer, grads=True).values() if t.device == case.device)
    held = sum(size for size in sizes.values() if size > SCALAR_BYTES)
    report = manager.offload()
    assert report.device_bytes >= held, f"{report.device_bytes} bytes were released, the trainer held {held}"
    left = [
        tensor
        for tensor in oracle.live_tensors()
        if tensor.device == case.device
        and oracle.storage_key(tensor) not in foreign
        and tensor.untyped_storage().nbytes() > SCALAR_BYTES
        and tensor.untyped_storage().resizable()  # where the device is the CPU: the manager's host memory is not
        and not _is_random_state(tensor)
    ]
    found = [(tuple(t.shape), t.dtype, t.untyped_storage().nbytes()) for t in left]
    most = ROUTING_BYTES if case.scenario.model == "gpt" and case.scenario.experts else 0
    still = sum(oracle.storage_sizes(left).values())
    assert still <= most, f"{still} bytes are still on the device, in {len(found)} tensors: {found[:8]}"
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
    with _WatchAllocations(case.device) as watch:
        manager.offload()
    assert 0 < watch.peak_bytes <= SMALL_BUCKET_BYTES, f"the offload took {watch.peak_bytes} extra bytes"
    manager.onload()
    resident = _WatchAllocations(case.device).in_use()
    manager.offload()
    with _WatchAllocations(case.device) as watch:
        manager.onload()
    assert watch.in_use() == resident, f"{watch.in_use()} bytes are in use, {resident} were before the offload"
    came_back = resident - watch.start_bytes
    assert watch.peak_bytes == came_back > 0, f"the onload took {watch.peak_bytes} bytes to bring {came_back} back"


class _WatchAllocations(TorchDispatchMode):
    """Measures device memory after every operation, and keeps the most that was in use beyond the start.

    Storages are watched through weak references, so that watching keeps none alive.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._known: dict[int, StorageWeakRef] = {}
        for tensor in oracle.live_tensors():
            self._watch(tensor)
        self.start_bytes = self.in_use()
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._watch(tensor)
        self.peak_bytes = max(self.peak_bytes, self.in_use() - self.start_bytes)
        return out

    def _watch(self, tensor: torch.Tensor) -> None:
        """Take a tensor's storage in; host memory under test, which is not resizable, does not count."""
        storage = tensor.untyped_storage()
        if tensor.device == self._device and storage.resizable() and storage._cdata not in self._known:
            self._known[storage._cdata] = StorageWeakRef(storage)

    def in_use(self) -> int:
        """Bytes, each storage rounded up as torch's CUDA allocator does."""
        storages: list[Any] = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._known.values()]
        return sum(_aligned(storage.nbytes()) for storage in storages if storage is not None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def host(case: Case) -> None:
    """Host memory is the bytes kept, rounded to the alignment, and stays what it is over ten cycles."""
    trainer = trained(case)
    manager = case.manager(trainer)
    assert manager.host_bytes == 0, "host memory was taken before anything asked for it"
    state = {**trainer.named_state(), **_attributes(trainer)}
    dropped = oracle.storage_sizes(trainer.named_grads().values())  # a wrapper may keep them as an attribute of its own
    kept = [t for t in state.values() if oracle.storage_key(t) not in dropped] + trainer.staged_weights()
    sizes = oracle.storage_sizes(t for t in kept if t.device == case.device)
    del state, kept
    cycle(case, manager, trainer)
    first = manager.host_bytes
    most = sum(map(_aligned, sizes.values())) + len(KINDS) * PAGE_BYTES
    assert sum(sizes.values()) <= first <= most, f"{first} host bytes for {sum(sizes.values())} bytes kept"
    cycle(case, manager, trainer)  # packing may have left holes behind, once
    tensors = len(oracle.live_tensors())
    device = oracle.live_bytes(case.device)
    for number in range(10):
        cycle(case, manager, trainer)
        assert manager.host_bytes == first, f"cycle {number} holds {manager.host_bytes} host bytes, not {first}"
    assert len(oracle.live_tensors()) == tensors, "the number of tensors grew over ten cycles"
    assert oracle.live_bytes(case.device) == device, "device memory grew over ten cycles"
    manager.close()
    assert manager.host_bytes == 0, "close kept host memory"


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


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
    """Every subset of kinds, and kinds one by one out in every order and back in another, repeated calls included."""
    trainer = trained(case)
    manager = case.manager(trainer, bucket_bytes=SMALL_BUCKET_BYTES)
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
    for out, back in zip(orders, choose.sample(orders, len(orders)), strict=True):
        for kind in out:
            assert manager.offload(kind).kinds[StateKind(kind)].moved
            assert not any(k.moved for k in manager.offload(kind).kinds.values()), "a second offload moved something"
        for kind in back:
            assert manager.onload(kind).kinds[StateKind(kind)].moved
            assert not any(k.moved for k in manager.onload(kind).kinds.values()), "a second onload moved something"
        oracle.assert_same(before, oracle.snapshot(trainer.named_state()), f"out {out}, back {back}")
    assert_continues(case, trainer)


def neighbours(case: Case) -> None:
    """Several managers take turns; a second manager on a model that is away is refused and harms nothing."""
    trainer = trained(case)
    reference = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).to(case.device)
    prompt = torch.linspace(-1, 1, 64, device=case.device)
    with torch.no_grad():
        answer = oracle.as_bytes(reference(prompt))
    manager, other = case.manager(trainer), create_memory_manager(reference)
    case.on_close(other.close)
    other.offload()
    for _ in range(2):
        with away(case, manager, trainer):
            try:
                create_memory_manager(trainer.model, trainer.optimizer)
                raise AssertionError("a second manager took a model that is away")
            except StateChangedError as error:
                assert "another manager" in str(error)
            other.onload()
            with torch.no_grad():
                assert torch.equal(oracle.as_bytes(reference(prompt)), answer), "the neighbour computes something else"
            other.offload()
    assert_continues(case, trainer)


def select(case: Case) -> None:
    """The adapter of the row accepts, every other refuses with a reason."""
    from megastow.registry import adapters, choose_adapter

    trainer = case.build()
    chosen = choose_adapter(trainer.model, trainer.optimizer)
    assert chosen.name == case.row.adapter, f"{chosen.name} was chosen"
    for name, adapter in adapters().items():
        if name == case.row.adapter:
            continue
        assert not isinstance(adapter, str), f"adapter {name} is broken: {adapter}"
        reasons = adapter.refuses(trainer.model, trainer.optimizer)
        assert reasons and all(reasons), f"adapter {name} does not say why it refuses"
        try:
            create_memory_manager(trainer.model, trainer.optimizer, adapter=name)
        except AdapterSelectionError as error:
            assert reasons[0] in str(error)
        else:
            raise AssertionError(f"adapter {name} was forced on a trainer that it does not fit")
    for wrong in (torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), object()):
        try:
            create_memory_manager(trainer.model, wrong)
            raise AssertionError(f"{type(wrong).__name__} was accepted as an optimizer")
        except MegastowError as error:
            assert type(wrong).__name__ in str(error)
