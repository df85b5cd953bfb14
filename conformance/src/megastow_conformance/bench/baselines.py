"""How others do it, measured on the same trainer in the same run and over the same bounds.

The first two move what every framework moves by itself, in the way that most of them do: storage by storage, which on
a trainer that nobody has packed is tensor by tensor. Gradient buffers are dropped and come back as zeros, as with us.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megastow_conformance.bench.bits import bytes_of
from megastow_conformance.bench.bounds import forget_page_locked
from megastow_conformance.bench.registry import NotAvailable, baseline
from megastow_conformance.bench.result import Figure
from megastow_conformance.bench.session import Cycle, Session, Tenant
from megastow_conformance.bench.subjects import TrainerSubject, device_storages

Trainer = Tenant[TrainerSubject]


@baseline("pageable", "each tensor by .to('cpu')")
def pageable(session: Session) -> Iterator[Figure]:
    """New pageable memory in each cycle."""
    tenant = session.untouched()
    moves = _StorageMoves(session, tenant, lambda there: there.to("cpu", copy=True))
    yield from session.over_bounds(tenant.kept_bytes, session.repeated(moves.cycle))


@baseline("page-locked", "each tensor into torch's page-locked memory, kept")
def page_locked(session: Session) -> Iterator[Figure]:
    """The first cycle, which makes the buffers, is told apart."""
    tenant = session.untouched()
    if not session.page_locked:
        session.page_locked = page_locked_cycles(session, tenant)
    first, *later = session.page_locked
    session.note(f"the first offload, which makes the buffers, took {first.out:.3f} s")
    yield from session.over_bounds(tenant.kept_bytes, later)


@baseline("megatron", "megatron-core's own methods")
def megatron(session: Session) -> Iterator[Figure]:
    """`offload_to_cpu` of the optimizer and `offload_grad_buffers` of the model; bf16 weights stay where they are."""
    tenant = session.untouched()
    optimizer, chunks = tenant.subject.optimizer, tenant.subject.model
    if not all(hasattr(chunk, "offload_grad_buffers") for chunk in chunks) or not hasattr(optimizer, "offload_to_cpu"):
        raise NotAvailable("this megatron-core has no such methods")
    if session.device.torch_device.type != "cuda":
        raise NotAvailable("these methods move between a CUDA device and the host only")
    weights = {name: tensor for name, tensor in tenant.subject.state().items() if ".param." in name}
    staying = sum(storage.nbytes() for storage in device_storages(weights, session.device.torch_device))
    del weights

    def offload() -> None:
        optimizer.offload_to_cpu()
        for chunk in chunks:
            chunk.offload_grad_buffers()

    def onload() -> None:
        optimizer.restore_from_cpu()
        for chunk in chunks:
            chunk.restore_grad_buffers()

    session.note("weights are not moved, and are not counted")
    yield from session.over_bounds(tenant.kept_bytes - staying, _cycles(session, tenant, offload, onload))


@baseline("memory-saver", "torch_memory_saver as it comes")
def memory_saver(session: Session) -> Iterator[Figure]:
    """The trainer is built and trained in its region, with a copy on the host."""
    yield from _memory_saver(session, retained=False)


@baseline("memory-saver-retained", "torch_memory_saver, host memory kept")
def memory_saver_retained(session: Session) -> Iterator[Figure]:
    """The same with its buffers kept over cycles."""
    yield from _memory_saver(session, retained=True)


# --- how they move ----------------------------------------------------------------------------------------------------


def page_locked_cycles(session: Session, tenant: Trainer) -> Sequence[Cycle]:
    """Cycles with a page-locked buffer of torch's for each storage, made in the first and kept in the later ones.

    Without a GPU the buffers are ordinary memory. The trainer is afterwards as untouched as before.
    """
    buffers: dict[int, torch.Tensor] = {}

    def out(there: torch.Tensor) -> torch.Tensor:
        key = there.untyped_storage()._cdata
        if key not in buffers:
            buffers[key] = torch.empty(there.numel(), dtype=torch.uint8, pin_memory=there.is_cuda)
        return buffers[key].copy_(there, non_blocking=True)

    moves = _StorageMoves(session, tenant, out)
    found = [moves.cycle(), *session.repeated(moves.cycle)]
    del moves
    buffers.clear()
    forget_page_locked()
    return found


class _StorageMoves:
    """Moves a trainer storage by storage, in the obvious way.

    Args:
        session: The run.
        tenant: What is moved.
        out: Starts the copy of a flat uint8 tensor to the host.
    """

    def __init__(self, session: Session, tenant: Trainer, out: Callable[[torch.Tensor], torch.Tensor]) -> None:
        device = session.device.torch_device
        self._session = session
        self._tenant = tenant
        self._out = out
        self._kept = device_storages(tenant.subject.state(), device)
        kept = {storage._cdata for storage in self._kept}
        self._dropped = [
            storage for storage in device_storages(tenant.subject.grads(), device) if storage._cdata not in kept
        ]
        self._sizes = [storage.nbytes() for storage in (*self._kept, *self._dropped)]
        self._copies: list[torch.Tensor] = []

    def cycle(self) -> Cycle:
        """Out and back, each timed; then all bits are compared."""
        return self._tenant.cycle_by(self._offload, self._onload)

    def _offload(self) -> None:
        self._copies = [self._out(bytes_of(storage)) for storage in self._kept]
        self._session.device.synchronize()
        for storage in (*self._kept, *self._dropped):
            storage.resize_(0)
        self._session.device.release_cached()

    def _onload(self) -> None:
        for storage, nbytes in zip((*self._kept, *self._dropped), self._sizes, strict=True):
            storage.resize_(nbytes)
        for storage, copy in zip(self._kept, self._copies, strict=True):
            bytes_of(storage).copy_(copy, non_blocking=True)
        for storage in self._dropped:
            bytes_of(storage).zero_()
        self._session.device.synchronize()
        self._copies.clear()


def _cycles(
    session: Session, tenant: Trainer, offload: Callable[[], None], onload: Callable[[], None]
) -> Sequence[Cycle]:
    return session.repeated(lambda: tenant.cycle_by(offload, onload))


def _memory_saver(session: Session, *, retained: bool) -> Iterator[Figure]:
    if importlib.util.find_spec("torch_memory_saver") is None:
        raise NotAvailable("not installed")
    if session.device.torch_device.type != "cuda":
        raise NotAvailable("it moves memory of CUDA devices only")
    saver: Any = importlib.import_module("torch_memory_saver").torch_memory_saver
    if retained and not hasattr(saver, "retain_cpu_backup"):
        raise NotAvailable("this version of it cannot keep its host memory")
    with contextlib.suppress(AssertionError, AttributeError):  # can be chosen once; releases say so differently
        saver.hook_mode = "torch"
    if retained:
        saver.retain_cpu_backup = True
    session.drop()
    tag = "megastow-bench"

    def offload() -> None:
        session.device.synchronize()
        saver.pause(tag)

    def onload() -> None:
        saver.resume(tag)
        session.device.synchronize()

    with session.trainer(region=saver.region(tag=tag, enable_cpu_backup=True)) as tenant:
        tenant.cycle_by(offload, onload)
        yield from session.over_bounds(tenant.kept_bytes, _cycles(session, tenant, offload, onload))
    session.note("it copies gradient buffers too, which are not counted")
