"""Two tenants change places: one leaves the device while the other comes in, both directions of the link at once."""

from __future__ import annotations

import contextlib
import logging

from megastow import arguments
from megastow.errors import InvalidArgumentError
from megastow.handle import DEFAULT_WINDOW_BYTES, TransferHandle
from megastow.manager import MemoryManager
from megastow.report import TransferReport
from megastow.state import ALL_KINDS, Residency, StateKind

logger = logging.getLogger(__name__)


def swap(
    leaving: MemoryManager, coming: MemoryManager, *, window_bytes: int = DEFAULT_WINDOW_BYTES
) -> tuple[TransferReport, TransferReport]:
    """Offload everything of one manager and onload everything of another, at the same time.

    The one that comes takes device memory as the other gives it back, so that the device holds at most the larger of
    the two and `window_bytes` at a time. Blocks, and synchronises with the device. Both or neither: if either move
    fails, both are brought back to where they were (gradients of the one that was leaving come back zeroed).

    Args:
        leaving: whose kinds go to host memory.
        coming: whose kinds come to the device; another manager on the same device.
        window_bytes: extra device memory, so that neither direction waits for the other. It should hold the largest
            storage of either (a parameter buffer of Megatron's), which leaves and comes as one.

    Returns:
        The reports of the offload and of the onload.

    Raises:
        InvalidTypeError, InvalidArgumentError: these are not two managers, or `window_bytes` is not a number of bytes.
        MegastowError: what the first of the two failed with. What could not be undone either is logged, and nothing is
            lost: ask `residency`, and offload or onload again.
    """
    for name, manager in (("leaving", leaving), ("coming", coming)):
        arguments.instance_of(name, manager, MemoryManager, "a memory manager")
    arguments.whole_number("window_bytes", window_bytes, "bytes")
    if leaving is coming:
        raise InvalidArgumentError("leaving and coming are the same memory manager; expected two of one device")
    for manager in (leaving, coming):
        manager.wait()
    leaves = _kinds(leaving, Residency.RESIDENT)
    comes = _kinds(coming, Residency.OFFLOADED)
    out: TransferHandle | None = None
    try:
        out = leaving._offload_beside()  # and keep the memory: a driver waits for copies in flight before it frees
        arrived = coming.onload(beside=out, window_bytes=window_bytes)
        gone = out.wait()
        leaving.release_cached()
        return gone, arrived
    except BaseException:
        with contextlib.suppress(Exception):
            leaving.wait() if out is None else out.wait()
        _put_back(leaving, leaves, coming, comes)
        raise


def _kinds(manager: MemoryManager, residency: Residency) -> list[StateKind]:
    return [kind for kind in ALL_KINDS if manager.residency(kind) is residency]


def _put_back(leaving: MemoryManager, leaves: list[StateKind], coming: MemoryManager, comes: list[StateKind]) -> None:
    """Bring both to where they were; first the one that came goes, to make room."""
    for manager, kinds, residency in (
        (coming, comes, Residency.RESIDENT),
        (leaving, leaves, Residency.OFFLOADED),
    ):
        wrong = [kind for kind in kinds if manager.residency(kind) is residency]
        if not wrong:
            continue
        try:
            if residency is Residency.RESIDENT:
                manager.offload(*wrong, keep_grads=True)  # they may have been kept
            else:
                manager.onload(*wrong)
        except Exception as error:
            logger.error("a swap failed, and %s could not be put back: %s", ", ".join(wrong), error)
