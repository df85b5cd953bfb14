"""What an adapter is: it says what lies where, and copies nothing.

An adapter has two parts. The `Adapter` declares: its name, what it supports, and why it would refuse; it loads without
Megatron. `bind` gives the `BoundAdapter`, which knows one model and optimizer and answers the engine's questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from megastow.guard import GuardedCalls
from megastow.megatron import MegatronInfo
from megastow.state import Inventory, StateKind, Workspace


class BoundAdapter(Protocol):
    """One trainer, seen through the eyes of its Megatron generation."""

    @property
    def device(self) -> torch.device:
        """Where the trainer's state lives, with an index for CUDA."""
        ...

    @property
    def facts(self) -> Mapping[str, object]:
        """What was found, for checks and for people: `use_distributed_optimizer`, `params_dtype` and the like."""
        ...

    def inventory(self) -> Inventory:
        """Every device tensor of the trainer, by kind, as it is now. Cheap: it runs at every move.

        Raises:
            UnsupportedLayoutError: something was found that this adapter does not understand.
        """
        ...

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """Wait for communication in flight that no device synchronisation waits for, changing nothing.

        Args:
            kinds: what is about to be offloaded.
            keep_grads: whether gradient buffers would be copied.

        Raises:
            TransferError: it did not end in time, or the move would destroy what is in flight.
        """
        ...

    def guarded_calls(self) -> Iterable[GuardedCalls]:
        """The calls that must not run while a kind is away."""
        ...

    def workspaces(self) -> Iterable[Workspace]:
        """What is kept on the device for reuse, holds nothing that is needed, and comes back by itself."""
        ...

    def entrances(self) -> Sequence[torch.nn.Module]:
        """The modules whose outputs a backward pass enters the trainer's graph by."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """The declaration of an adapter, found through the entry point group `megastow.adapters`.

    Attributes:
        name: how a user forces it.
        supports: what it is for, in one line.
    """

    name: str
    supports: str

    def refuses_installation(self, megatron: MegatronInfo | None) -> list[str]:
        """Why the Megatron that is importable here is not for this adapter; empty if it is."""
        ...

    def refuses(self, model: Sequence[torch.nn.Module], optimizer: object) -> list[str]:
        """Why this model and optimizer are not for this adapter; empty if they are. Decides on the instances."""
        ...

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Look closely, and take charge of a model and optimizer that were not refused.

        Raises:
            UnsupportedLayoutError: a layout that the adapter knows of and does not support.
        """
        ...
