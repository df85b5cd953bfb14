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

from megastow.forking import process_lock


@dataclass(frozen=True)
class _Loan:
    """Bytes that are lent as long as the storage lives, and lies on them: torch moves one that is to be shared."""

    storage: StorageWeakRef
    address: int
    nbytes: int

    def lent(self) -> torch.UntypedStorage | None:
        """The storage; None if the loan is over."""
        storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return None if storage is None or storage.data_ptr() != self.address else storage


_LENDING = process_lock()
"""Held while loans are looked at and entered."""

_loans: dict[int, _Loan] = {}
"""By address: while a loan lasts, its memory is mapped, and nothing else can be there."""


def lend(memory: memoryview, address: int) -> torch.UntypedStorage:
    """A storage over memory, without a copy; the same one as long as the last one lives.

    Args:
        memory: what is lent; whoever holds the storage holds it.
        address: where that begins.
    """
    with _LENDING:
        known = _loans.get(address)
        lent = None if known is None else known.lent()
        if lent is None:
            for loan in [loan for loan in _loans.values() if loan.lent() is None]:
                del _loans[loan.address]
            lent = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
            _loans[address] = _Loan(StorageWeakRef(lent), address, lent.nbytes())
        return lent


def is_lent(address: int, nbytes: int) -> bool:
    """Whether somebody still looks at any of these bytes."""
    with _LENDING:
        return any(address <= loan.address < address + nbytes and loan.lent() is not None for loan in _loans.values())


_given: list[tuple[torch.UntypedStorage, int, int]] = []
"""What a fork under way gives to the child: storages, held so that they stay where they are, and their pages."""


def _give() -> None:
    for loan in list(_loans.values()):
        storage = loan.lent()
        if storage is not None:
            start = loan.address - loan.address % mmap.PAGESIZE
            _given.append((storage, start, loan.address + loan.nbytes - start))
    _advise(mmap.MADV_DOFORK)


def _take_back() -> None:
    _advise(mmap.MADV_DONTFORK)
    _given.clear()


def _advise(advice: int) -> None:
    """Tell the kernel what a fork is to do with the pages of what is given."""
    libc = ctypes.CDLL(None)
    for _, start, nbytes in _given:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice)


os.register_at_fork(before=_give, after_in_parent=_take_back, after_in_child=_given.clear)
