"""The words of megastow: kinds of state, their residency, and the inventory that an adapter hands to the engine.

This is the bottom layer. It knows tensors, but not how they move.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megastow.errors import InvalidArgumentError, UnsupportedTensorError


class StateKind(str, enum.Enum):
    """What a trainer keeps on the device. The value is the word that the interface takes."""

    WEIGHTS = "weights"
    """The model's own parameters and buffers, trained and frozen."""

    MAIN_WEIGHTS = "main_weights"
    """fp32 master copies that the optimizer steps on, where they are not the weights themselves."""

    OPTIMIZER_STATES = "optimizer_states"
    """Adam moments and whatever else the inner optimizer keeps on the device."""

    GRAD_BUFFERS = "grad_buffers"
    """Gradient buffers, and gradients outside them. Not copied on offload unless asked; zero-filled on onload."""

    def __str__(self) -> str:
        return self.value


KindLike = StateKind | str

Ranks = tuple[int, ...]
"""Ranks by their global numbers, in ascending order."""

ALL_KINDS: tuple[StateKind, ...] = tuple(StateKind)

ORDER_OF_USE = (StateKind.WEIGHTS, StateKind.GRAD_BUFFERS, StateKind.MAIN_WEIGHTS, StateKind.OPTIMIZER_STATES)
"""How a training step comes to the kinds: forward, backward, optimizer."""


class Residency(str, enum.Enum):
    """Where the bytes of a kind are."""

    RESIDENT = "resident"
    """On the device, usable. Host memory may be held ready for the next offload; its content means nothing."""

    OFFLOADING = "offloading"
    """A move to the host is under way. The device copy is complete until the move is confirmed."""

    OFFLOADED = "offloaded"
    """In host memory only (gradient buffers: nowhere). Storages of the kind have zero bytes; use raises."""

    ONLOADING = "onloading"
    """A move to the device is under way. The host copy is complete until the move is confirmed."""

    def __str__(self) -> str:
        return self.value


def parse_kinds(kinds: Iterable[KindLike]) -> tuple[StateKind, ...]:
    """Turn what a caller wrote into kinds, without repetitions, in the order of `StateKind`; nothing means all.

    Raises:
        InvalidArgumentError: a word is not the name of a kind.
    """
    wanted: set[StateKind] = set()
    for kind in kinds:
        try:
            wanted.add(StateKind(kind))
        except ValueError:
            known = ", ".join(repr(k.value) for k in StateKind)
            raise InvalidArgumentError(
                f"there is no kind of state called {kind!r}; expected one of {known}, or nothing for all of them"
            ) from None
    return tuple(k for k in ALL_KINDS if k in wanted) or ALL_KINDS


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of one kind that move in the same way.

    Attributes:
        kind: the kind that a caller names to move them.
        label: what the group is, for people ("gradient buffers", "inner optimizer state").
        keep: the bytes must be copied out; False means that the content may be dropped and comes back as zeros.
        transient: other tensors, of other sizes, may be here at the next move (what a forward pass left behind). They
            are not packed, and have host memory of their own, so that their sizes do not disturb anything lasting.
        replicas: the ranks of the process group over which the bytes are the same as a rule, by their global numbers;
            none if there is no such group. It is checked before anything depends on it, so that an exception (ranks
            between a step and its parameter gather) costs host memory, and nothing else.
        tensors: name and tensor. A tensor of any dtype, shape and stride; several may lie on one storage.
    """

    kind: StateKind
    label: str
    keep: bool = True
    transient: bool = False
    replicas: Ranks = ()
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    def add(self, name: str, tensor: torch.Tensor | None) -> None:
        """List a tensor; None (an empty shard, a missing gradient) is passed over.

        A wrapper subclass that can name its inner tensors (`__tensor_flatten__`) is listed as those.

        Raises:
            UnsupportedTensorError: the tensor has no storage of its own and does not say what it consists of.
        """
        if tensor is None:
            return
        if type(tensor) in PLAIN_TYPES and tensor.layout is _STRIDED:
            self.tensors.append((name, tensor))
        else:
            self.tensors.extend(_plain_tensors(name, tensor))


@dataclass
class Inventory:
    """All that an adapter found on the device, made anew for each move.

    Listing more than one tensor of a storage is fine; listing a storage under two kinds too: it moves with the kind
    that comes first in `StateKind`, and is kept if any group asks for it.
    """

    device: torch.device
    groups: list[TensorGroup] = field(default_factory=list)

    def group(
        self, kind: StateKind, label: str, *, keep: bool = True, transient: bool = False, replicas: Ranks = ()
    ) -> TensorGroup:
        """Open a new group of `kind` and return it to be filled."""
        group = TensorGroup(kind, label, keep, transient, replicas)
        self.groups.append(group)
        return group


class Workspace(NamedTuple):
    """Memory that a library keeps on the device for reuse, that holds nothing needed, and that comes back by itself.

    Attributes:
        name: what it is, for people.
        tensors: finds its tensors.
        drop: lets go of them.
    """

    name: str
    tensors: Callable[[], Iterable[torch.Tensor]]
    drop: Callable[[], object]


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensor` itself, or what a wrapper subclass consists of."""
    if torch.nn.parameter.is_lazy(tensor):
        raise UnsupportedTensorError(
            f"{name} is not initialised yet (a lazy module), so it has no memory. Nothing was moved. "
            "Run a forward pass before creating a manager"
        )
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        attributes, _context = flatten()
        for attribute in attributes:
            yield from _plain_tensors(f"{name}.{attribute}", getattr(tensor, attribute))
        return
    if type(tensor) not in PLAIN_TYPES and not _has_storage(tensor):
        raise UnsupportedTensorError(
            f"{name} is a {type(tensor).__module__}.{type(tensor).__qualname__}, which wraps other tensors and does "
            "not name them (no __tensor_flatten__): megastow cannot know which memory is its own, and moved nothing. "
            "Keep this tensor out of the model, or use a version of its library that implements __tensor_flatten__"
        )
    if tensor.layout is not torch.strided:
        raise UnsupportedTensorError(
            f"{name} has layout {tensor.layout}; only strided tensors have one storage that can be moved. "
            "Nothing was moved. Make it dense, or keep it out of the model"
        )
    yield name, tensor


_STRIDED = torch.strided
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""The classes of tensors that are nothing but a view on a storage."""


def _has_storage(tensor: torch.Tensor) -> bool:
    """Whether a tensor of an unknown subclass has a storage of its own behind it."""
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return False
    return True
