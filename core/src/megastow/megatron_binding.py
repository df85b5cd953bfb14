"""What the bound adapters of every Megatron generation do alike; a generation adds its buffers and its calls.

One inventory is: the flat buffers of the DDP chunks, what modules hold, what MoE dispatchers have left, what the
optimizers keep, and gradients outside the buffers. Only the first differs between generations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from megastow import collect
from megastow.guard import CallTable, GuardedCall, guarded, module_calls
from megastow.megatron_parts import add_dispatchers, add_optimizer, optimizer_calls, unwrap
from megastow.state import Inventory, StateKind


class MegatronBinding:
    """DDP chunks and the optimizer over them; the base of each adapter's binding.

    Args:
        model: The chunks.
        optimizer: What `get_megatron_optimizer` returned, or None.

    Attributes:
        chunk_calls: The methods of a chunk that read or write state, beyond those that every module has.
    """

    chunk_calls: ClassVar[CallTable] = {}

    def __init__(self, model: Sequence[torch.nn.Module], optimizer: Any) -> None:
        self._model: list[Any] = list(model)
        self._optimizer = optimizer
        self._device = collect.find_device(self._model)

    # --- what a generation says ----------------------------------------------------------------------------------

    @property
    def facts(self) -> Mapping[str, object]:
        """What was found, in the words of the classic factory's arguments."""
        raise NotImplementedError

    def add_buffers(self, inventory: Inventory) -> None:
        """List the flat buffers of the chunks, and whatever lies on their storages."""
        raise NotImplementedError

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """See `BoundAdapter`."""
        raise NotImplementedError

    def buffer_calls(self) -> Iterator[GuardedCall]:
        """The calls on buffers, buckets and whatever else a chunk delegates to."""
        yield from ()

    # --- what all have in common ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._device

    def inventory(self) -> Inventory:
        """Everything on the device, found anew."""
        inventory = Inventory(self._device)
        self.add_buffers(inventory)
        collect.add_modules(inventory, self._model)
        add_dispatchers(inventory, self._model)
        add_optimizer(inventory, self._optimizer)
        grads = inventory.group(StateKind.GRAD_BUFFERS, "gradients on parameters", keep=False)
        collect.add_grads(grads, collect.named_parameters(self._model))
        return inventory

    def guarded_calls(self) -> Iterable[GuardedCall]:
        """Everything that reads or writes state: modules, DDP chunks, their buffers, optimizers."""
        yield from module_calls(module for chunk in self._model for module in chunk.modules())
        for chunk in self._model:
            yield from guarded(chunk, self.chunk_calls)
        yield from self.buffer_calls()
        yield from optimizer_calls(self._optimizer)

    def entrances(self) -> Sequence[torch.nn.Module]:
        """The modules inside the wrappers: whoever calls whichever wrapper gets there."""
        return [unwrap(chunk) for chunk in self._model]
