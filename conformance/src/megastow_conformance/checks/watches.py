"""Instruments that a check puts around a move or a step: what is allocated, which hooks run, what is made to fail."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.trainer import Trainer

ALIGNMENT_BYTES = 512
"""What torch's CUDA allocator rounds each storage up to."""


def aligned(nbytes: int) -> int:
    """Bytes, rounded up as torch's CUDA allocator does."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class WatchAllocations(TorchDispatchMode):
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
        if oracle.is_on_device(tensor, self._device) and storage._cdata not in self._known:
            self._known[storage._cdata] = StorageWeakRef(storage)

    def in_use(self) -> int:
        """Bytes, each storage rounded up as torch's CUDA allocator does."""
        storages: list[Any] = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._known.values()]
        return sum(aligned(storage.nbytes()) for storage in storages if storage is not None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class FailingOperation(TorchDispatchMode):
    """Makes one of torch's operations fail, by its number, as it would for want of memory."""

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = number
        self.struck = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left == -1:
            self.struck = True
            raise RuntimeError("injected")
        return func(*args, **(kwargs or {}))


def count_accumulations(case: Case, trainer: Trainer) -> dict[str, int]:
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


@contextlib.contextmanager
def calls_by_autograd(folders: Collection[str]) -> Iterator[Counter[str]]:
    """Count the calls that autograd makes to Python functions in folders of these names: hooks, and backward functions.

    Hooks that Megatron has set on nodes of the autograd graph show nowhere but when they run. On a GPU, backward passes
    run in a thread of their own, and nothing is counted.

    Yields:
        Function to number of calls.
    """
    counts: Counter[str] = Counter()
    wanted = set(folders)

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code, caller = frame.f_code, frame.f_back
        if event != "call" or caller is None or wanted.isdisjoint(Path(code.co_filename).parts):
            return
        if Path(caller.f_code.co_filename).parent == _AUTOGRAD:
            counts[f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(before)


_AUTOGRAD = Path(torch.autograd.__file__).parent
