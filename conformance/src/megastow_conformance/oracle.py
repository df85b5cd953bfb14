"""What is true, found without the code under test: bytes, identities, aliases and live memory.

Nothing here imports megastow. A snapshot is a clone of bytes made before the move; comparisons look at `uint8`, so that
NaN payloads, -0.0 and subnormals count; and the tensors of a trainer are found by asking Python for every tensor that
is alive, so that an alias nobody thought of is looked at too.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

Snapshot = Mapping[str, torch.Tensor]
"""Name to the tensor's elements as a flat uint8 tensor on the CPU."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, in order, as a new flat uint8 tensor on the CPU.

    A tensor whose memory was released fails here; torch would crash on it.
    """
    assert has_memory(tensor), f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} has no memory"
    flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the storage reaches as far as the tensor does."""
    if tensor.numel() == 0:
        return True
    end = tensor.storage_offset() * tensor.element_size() + _span_bytes(tensor)
    return tensor.untyped_storage().nbytes() >= end


def snapshot(tensors: Mapping[str, torch.Tensor]) -> Snapshot:
    """Clone the bytes of named tensors."""
    empty = [name for name, tensor in tensors.items() if not has_memory(tensor)]
    assert not empty, f"{len(empty)} of {len(tensors)} tensors have no memory: {empty[:8]}"
    return {name: as_bytes(tensor) for name, tensor in tensors.items()}


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """What is not the same in two snapshots, in words; empty if they are equal to the last bit."""
    found = [f"{name} is only in the first" for name in before.keys() - after.keys()]
    found += [f"{name} is only in the second" for name in after.keys() - before.keys()]
    for name in before.keys() & after.keys():
        first, second = before[name], after[name]
        if first.numel() != second.numel():
            found.append(f"{name} has {first.numel()} bytes and then {second.numel()}")
        elif not torch.equal(first, second):
            wrong = int((first != second).sum())
            found.append(f"{name} differs in {wrong} of {first.numel()} bytes")
    return sorted(found)


def assert_same(before: Snapshot, after: Snapshot, what: str) -> None:
    """Fail with the names of what differs."""
    found = differences(before, after)
    shown = "; ".join(found[:8])
    assert not found, f"{what}: {len(found)} of {len(before)} tensors differ: {shown}"
    assert before, f"{what}: there was nothing to compare"


def plant_awkward_values(tensors: Iterable[torch.Tensor]) -> int:
    """Write NaN payloads, infinities, -0.0 and subnormals over the first elements; returns how many tensors took them.

    Only for trainers that are not trained any further.
    """
    planted = 0
    for tensor in tensors:
        pattern = _AWKWARD.get(tensor.dtype)
        if pattern is None or tensor.numel() < len(pattern) or not tensor.is_contiguous():
            continue
        bits = torch.tensor(pattern, dtype=_BITS[tensor.dtype])
        tensor.detach().reshape(-1)[: len(pattern)].view(bits.dtype).copy_(bits)
        planted += 1
    return planted


_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_AWKWARD = {
    # a quiet NaN with a payload, a signalling one, a negative one, -0.0, the smallest and largest subnormal, -inf
    torch.float32: [0x7FC12345, 0x7F800001, -0x3EDCBB, -0x80000000, 0x1, 0x7FFFFF, -0x800000],
    torch.bfloat16: [0x7FC5, 0x7F81, -0x3B, -0x8000, 0x1, 0x7F, -0x80],
    torch.float16: [0x7E05, 0x7C01, -0x1FB, -0x8000, 0x1, 0x3FF, -0x400],
}


def live_tensors() -> list[torch.Tensor]:
    """Every tensor object that Python knows of, with memory of its own."""
    gc.collect()
    found = []
    for thing in gc.get_objects():
        try:
            is_tensor = isinstance(thing, torch.Tensor)
        except ReferenceError:  # a weak proxy whose referent has died
            continue
        if is_tensor and thing.layout is torch.strided and type(thing).__name__ != "FakeTensor":
            found.append(thing)
    return found


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage; stays what it is while the storage lives, whatever its size."""
    return int(tensor.untyped_storage()._cdata)


def storage_sizes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each distinct storage."""
    return {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


def live_bytes(device: torch.device) -> int:
    """Bytes of all storages on a device that a tensor alive lies on; host memory does not count (`is_on_device`)."""
    return sum(storage_sizes(tensor for tensor in live_tensors() if is_on_device(tensor, device)).values())


def is_on_device(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor takes device memory.

    Where the device is the CPU, a storage that cannot be resized is host memory: a manager's, or a file's.
    """
    return tensor.device == device and tensor.untyped_storage().resizable()


@dataclass(frozen=True)
class Shape:
    """What must not change about a tensor object, whatever happens to its memory."""

    identity: int
    version: int
    device: torch.device
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    hooks: int


def shape_of(tensor: torch.Tensor) -> Shape:
    """The tensor object's own properties."""
    hooks = len(tensor._backward_hooks or ()) if tensor.requires_grad else 0
    size, stride = tuple(tensor.size()), tuple(tensor.stride())
    return Shape(id(tensor), tensor._version, tensor.device, tensor.dtype, size, stride, tensor.requires_grad, hooks)


def alias_map(tensors: list[torch.Tensor]) -> list[list[tuple[int, int]]]:
    """Which tensors lie on common memory, and at which distances.

    Two tensors are related if the bytes they span overlap, directly or through others. For each such family: index and
    distance in bytes from its first byte. Families are found by address, so tensors must have memory.
    """
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + _span_bytes(tensor), i) for i, tensor in enumerate(tensors))
    families: list[list[tuple[int, int]]] = []
    base = end = -1
    for start, stop, index in spans:
        if start >= end:
            families.append([])
            base, end = start, stop
        families[-1].append((index, start - base))
        end = max(end, stop)
    return sorted(sorted(family) for family in families)


def _span_bytes(tensor: torch.Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


class Garbage:
    """Takes the memory that an offload released, fills it with 0xFF, and gives half of it back.

    So what is onloaded afterwards finds either another address or memory full of NaN, and nothing passes because its
    old bytes happened to be still there.
    """

    def __init__(self, sizes: Iterable[int], device: torch.device) -> None:
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes if size]
        self._kept = blocks[::2]
