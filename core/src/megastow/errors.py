"""Every error that megastow raises on purpose, in one hierarchy.

A message says what was found, what was expected and what to do next. Catch `MegastowError` to catch them all; the
branches below it also derive from the built-in exception that a caller would expect (`ValueError`, `TypeError`,
`MemoryError`), so that code which does not know megastow still handles them sensibly. Broken assumptions of megastow
itself are `assert` statements, not errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megastow.residue import Residue


class MegastowError(Exception):
    """Base of all errors of megastow. All of them can be pickled: jobs send errors from process to process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self.args, vars(self))


def _made_again(cls: type[MegastowError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> MegastowError:
    error = cls.__new__(cls, *arguments)
    error.__dict__.update(attributes)
    return error


# --- what the caller handed in -------------------------------------------------------------------------------------


class InvalidArgumentError(MegastowError, ValueError):
    """An argument has a value that megastow cannot work with: an unknown kind, an impossible size."""


class InvalidTypeError(MegastowError, TypeError):
    """An argument has a type that megastow cannot work with: not a module, not a known optimizer."""


class UnsupportedLayoutError(MegastowError, ValueError):
    """The model or optimizer keeps its memory in a way that megastow does not understand, and therefore refuses."""


class UnsupportedTensorError(UnsupportedLayoutError):
    """One tensor cannot be moved: its storage cannot be resized, or its inner tensors are unknown."""


class AdapterSelectionError(MegastowError, LookupError):
    """Not exactly one adapter accepts the model and the optimizer; the message lists each adapter's reasons."""


# --- what the manager is in the middle of ----------------------------------------------------------------------------


class ManagerClosedError(MegastowError, RuntimeError):
    """The manager was closed; a closed manager holds no memory and moves nothing."""


class ForkedProcessError(MegastowError, RuntimeError):
    """A manager was used in a forked child; it has neither the host memory nor the threads of the one that made it."""


class OffloadedError(MegastowError, RuntimeError):
    """Something was used whose bytes are not on the device at present."""


class NotOnHostError(MegastowError, RuntimeError):
    """Host memory was asked for something whose bytes are not there: on the device, or not kept."""


class ReadOnlyError(MegastowError, RuntimeError):
    """An operation would have written to a view on offloaded state; nothing was written."""


class StateChangedError(MegastowError, RuntimeError):
    """State is not where it should be, or not what it was.

    Another manager has it away (or had, and lost it by `close(discard=True)`), or other code has resized or replaced a
    storage behind the manager's back.
    """


class AgreementError(MegastowError, RuntimeError):
    """The ranks of a group made different calls, so none was carried out."""


# --- a move that could not be made -----------------------------------------------------------------------------------


class TransferError(MegastowError, RuntimeError):
    """A move failed and was undone; the cause is chained, and the same call can be made again."""


class PeerError(TransferError):
    """Another rank of the group failed, or did not come in time, so the call was undone on this one too.

    Attributes:
        ranks: those because of which it was undone, by their global numbers; empty if nobody knows.
    """

    def __init__(self, message: str, *, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class HostMemoryError(TransferError, MemoryError):
    """Host memory does not suffice for what an offload has to keep, or could not be page-locked."""


class ResidueError(TransferError):
    """A strict offload would have left more on the device than it may; everything is back where it was.

    Attributes:
        residue: what would have stayed, and whose it is.
        max_residue_bytes: what may stay.
    """

    def __init__(self, message: str, *, residue: Residue, max_residue_bytes: int) -> None:
        super().__init__(message)
        self.residue = residue
        self.max_residue_bytes = max_residue_bytes


class DeviceMemoryError(TransferError, MemoryError):
    """Device memory does not suffice for what an onload has to bring back.

    Attributes:
        needed_bytes: device memory that the onload asked for.
        free_bytes: device memory that the driver reported as free, or None where it cannot tell.
    """

    def __init__(self, message: str, *, needed_bytes: int, free_bytes: int | None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class CorruptionError(TransferError):
    """Bytes that came back are not those that left, by their digests; the onload was undone, the host copy is kept.

    Attributes:
        tensors: the names of all tensors on the storages that differ, by the name of their kind.
        host_is_damaged: whether a host copy itself has changed, so that a repeated call fails too; if not, only the
            way back was bad. True also where ranks share a copy, and none can tell.
    """

    def __init__(self, message: str, *, tensors: Mapping[str, Sequence[str]], host_is_damaged: bool) -> None:
        super().__init__(message)
        self.tensors = tensors
        self.host_is_damaged = host_is_damaged
