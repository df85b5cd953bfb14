"""Are all bits what they should be? A copy of a state to compare with, and zeros; torch only, outside of timed parts.

The copy lies in page-locked host memory, so that a comparison of many gigabytes takes less than a second. Nothing here
calls megastow or keeps a tensor that it was shown: that would hold memory which a move is measured to release.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megastow_conformance.oracle import has_memory, storage_key

_SLAB_BYTES = 1 << 30  # a power of two, since torch rounds page-locked memory up to one
_SHOWN_BYTES = 4


class StateCopy:
    """The bytes of named tensors as they were, on the host.

    Args:
        tensors: What to copy; their memory must be there.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        left = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.nbytes = left
        for name, tensor in tensors.items():
            there = _as_bytes(tensor)
            here = self._place(there.numel(), left)
            here.copy_(there, non_blocking=True)
            self._kept[name] = here
            left -= there.numel()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def differences(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """What is not the same, in words; empty if all is equal to the last bit.

        Compares where the tensors are, one at a time, and gives the device memory that it took back to the driver.
        """
        found = [f"{name} is gone" for name in self._kept.keys() - tensors.keys()]
        found += [f"{name} was not there before" for name in tensors.keys() - self._kept.keys()]
        equal: dict[str, torch.Tensor] = {}
        for name in self._kept.keys() & tensors.keys():
            kept, tensor = self._kept[name], tensors[name]
            if not has_memory(tensor):
                found.append(f"{name} has no memory")
                continue
            there = _as_bytes(tensor)
            if there.numel() != kept.numel():
                found.append(f"{name} has {there.numel()} bytes instead of {kept.numel()}")
            else:
                equal[name] = (there == kept.to(there.device, non_blocking=True)).all()
        # Asked for at the end: every answer waits for the device.
        found += [self._describe(name, tensors[name]) for name, answer in equal.items() if not bool(answer)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return sorted(found)

    def _place(self, nbytes: int, left: int) -> torch.Tensor:
        """Room for a tensor, in a new slab if the present one is full."""
        start = -(-self._used // 16) * 16
        if start + nbytes > self._slab.numel():
            size = max(nbytes, min(_SLAB_BYTES, left))
            self._slab = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            start = 0
        self._used = start + nbytes
        return self._slab[start : self._used]

    def _describe(self, name: str, tensor: torch.Tensor) -> str:
        wrong = (_as_bytes(tensor).cpu() != self._kept[name]).nonzero().flatten()
        shown = ", ".join(str(int(position)) for position in wrong[:_SHOWN_BYTES])
        return f"{wrong.numel()} of {self._kept[name].numel()} bytes of {name} differ (byte {shown})"


def not_zero(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What is not zero of the storages that tensors lie on, in words; empty if all is, to the last bit.

    Looks where they are, at each storage once, under the name of its first tensor.
    """
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(storage_key(tensor), name)
    found = [f"{name} has no memory" for name in first.values() if not has_memory(tensors[name])]
    whole = {name: bytes_of(tensors[name].untyped_storage()) for name in first.values() if has_memory(tensors[name])}
    answers = {name: there.any() for name, there in whole.items()}
    wrong = [name for name, answer in answers.items() if bool(answer)]
    found += [f"{int(whole[n].count_nonzero())} of {whole[n].numel()} bytes under {n} are not zero" for n in wrong]
    return sorted(found)


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A storage as a flat uint8 tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, in order, as a flat uint8 tensor where the tensor is; no copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8, device=tensor.device)
