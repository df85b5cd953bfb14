"""The interface that checks use, over somebody else's way to move a trainer's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megastow import KindReport, MemoryFigures, Residency, StateKind, TransferReport
from megastow.report import Direction
from megastow.state import KindLike, parse_kinds
from megastow_conformance import oracle
from megastow_conformance.case import CheckSkipped

_NO_FIGURES = MemoryFigures(None, None, 0)


@dataclass(frozen=True)
class Move:
    """What is moved by one pair of calls.

    Attributes:
        kinds: The kinds that go together; whoever asks for one of them moves all.
        offload: Moves them out.
        onload: Brings them back.
        offload_kept: Moves gradients out so that they come back as they were; ``None`` if there is no such call.
    """

    kinds: tuple[StateKind, ...]
    offload: Callable[[], object]
    onload: Callable[[], object]
    offload_kept: Callable[[], object] | None = None


class Wrapped:
    """Behaves like a ``megastow.MemoryManager`` as far as moves and residency go, and adds nothing to what it wraps.

    What it wraps knows nothing of faults and guards, and neither does this.

    Args:
        moves: The pairs of calls, in the order in which things go out; they come back in reverse. A kind that is in
            none of them stays where it is.
        held: The host tensors that copies lie in at present.
        device: Where the trainer's state lives.
    """

    def __init__(self, moves: Sequence[Move], held: Callable[[], Iterable[torch.Tensor]], device: torch.device) -> None:
        self._moves = moves
        self._held = held
        self._device = device
        self._away: set[StateKind] = set()

    @property
    def host_bytes(self) -> int:
        """Bytes of the host tensors that copies lie in at present."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held())

    def residency(self, kind: KindLike) -> Residency:
        """Where a kind is, by the calls that were made."""
        return Residency.OFFLOADED if parse_kinds([kind])[0] in self._away else Residency.RESIDENT

    def offload(self, *kinds: KindLike, keep_grads: bool = False) -> TransferReport:
        """Makes the calls that move these kinds out.

        Raises:
            CheckSkipped: Gradients are to be kept, and what is wrapped has no call for that.
        """
        return self._move("offload", parse_kinds(kinds), keep_grads=keep_grads)

    def onload(self, *kinds: KindLike) -> TransferReport:
        """Makes the calls that bring these kinds back."""
        return self._move("onload", parse_kinds(kinds))

    def _move(self, direction: Direction, wanted: Sequence[StateKind], *, keep_grads: bool = False) -> TransferReport:
        is_out = direction == "offload"
        before = oracle.live_bytes(self._device)
        moved: set[StateKind] = set()
        for move in self._moves if is_out else reversed(self._moves):
            if set(move.kinds) & set(wanted) and is_out != (move.kinds[0] in self._away):
                self._call(move, is_out=is_out, keep_grads=keep_grads)
                moved |= set(move.kinds)
                self._away = self._away | moved if is_out else self._away - moved
        nbytes = abs(oracle.live_bytes(self._device) - before)
        reports = {kind: KindReport(kind, moved=kind in moved) for kind in {*wanted, *moved}}
        for kind in sorted(moved)[:1]:  # the bytes of the whole move, told once
            reports[kind] = KindReport(kind, moved=True, device_bytes=nbytes)
        return TransferReport(direction, reports, 0.0, _NO_FIGURES, _NO_FIGURES)

    @staticmethod
    def _call(move: Move, *, is_out: bool, keep_grads: bool) -> None:
        if not is_out:
            move.onload()
        elif not keep_grads or StateKind.GRAD_BUFFERS not in move.kinds:
            move.offload()
        elif move.offload_kept is not None:
            move.offload_kept()
        else:
            raise CheckSkipped("there is no call that keeps gradients")

    @contextlib.contextmanager
    def offloaded(self, *kinds: KindLike, keep_grads: bool = False) -> Iterator[TransferReport]:
        """Out for the length of the block."""
        report = self.offload(*kinds, keep_grads=keep_grads)
        try:
            yield report
        finally:
            self.onload(*(kind for kind, entry in report.kinds.items() if entry.moved))

    def close(self) -> None:
        """Brings everything back."""
        self.onload()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory: page-locked beside a GPU; where the device is the CPU, memory that cannot be resized."""
    if tensor.device.type != "cpu":
        return tensor.detach().cpu().pin_memory()
    memory = bytearray(max(1, tensor.numel() * tensor.element_size()))
    host = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel() or -1)[: tensor.numel()]
    return host.view(tensor.shape).copy_(tensor.detach())


def chunks_of(model: Any) -> list[Any]:
    """The chunks, whether one or a list was given."""
    return list(model) if isinstance(model, (list, tuple)) else [model]
