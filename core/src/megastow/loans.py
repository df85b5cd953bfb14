"""Host memory on loan: bytes of a region that somebody outside looks at through tensors.

[Note: a storage of its own for each loan]
What is lent are the bytes of one offloaded storage, as a storage of exactly that size. So `torch.save` writes those
bytes and no others, tensors that were on one storage still are, and what torch does to the storage (it moves it to
shared memory when a tensor is sent to another process) leaves the region alone. The storage holds the mapping: the
memory stays there as long as anybody looks at it, whatever the manager does meanwhile. Whether somebody still does
can be told, and then the next offload writes elsewhere (`HostArena.reserve`).

[Note: forks]
Regions are kept from forked children, because a fork copies page-locked memory at once. Writers of checkpoints fork
(megatron-core's do), and a child that reads what it does not have crashes. So what is on loan at that moment, and no
more, is given to the child.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class _Loan:
    """Bytes that are lent as long as the storage lives."""

    storage: StorageWeakRef
    address: int
    nbytes: int

    @property
    def is_over(self) -> bool:
        return bool(self.storage.expired())


_loans: dict[int, _Loan] = {}
"""By address: while a loan lasts, its memory is mapped, and nothing else can be there."""


def lend(memory: memoryview, address: int) -> torch.UntypedStorage:
    """A storage over memory, without a copy; the same one as long as the last one lives.

    Args:
        memory: what is lent; whoever holds the storage holds it.
        address: where that begins.
    """
    known = _loans.get(address)
    if known is not None:
        storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(known.storage.cdata)
        if storage is not None:
            return storage
    for loan in [loan for loan in list(_loans.values()) if loan.is_over]:
        _loans.pop(loan.address, None)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    _loans[address] = _Loan(StorageWeakRef(storage), address, storage.nbytes())
    return storage


def is_lent(address: int, nbytes: int) -> bool:
    """Whether somebody still looks at any of these bytes."""
    return any(address <= loan.address < address + nbytes and not loan.is_over for loan in list(_loans.values()))


def _advise(advice: int) -> None:
    """Tell the kernel of each loan what a fork is to do with its pages."""
    libc = ctypes.CDLL(None)
    for loan in list(_loans.values()):
        if not loan.is_over:
            start = loan.address - loan.address % mmap.PAGESIZE
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(loan.address + loan.nbytes - start), advice)


os.register_at_fork(
    before=lambda: _advise(mmap.MADV_DOFORK),
    after_in_parent=lambda: _advise(mmap.MADV_DONTFORK),
)
