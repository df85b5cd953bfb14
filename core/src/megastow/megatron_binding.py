"""What the bound adapters of every Megatron generation do alike; a generation adds its buffers and its calls.

One inventory is: the flat buffers of the DDP chunks, what modules hold, what MoE dispatchers have left, what the
optimizers keep, and gradients outside the buffers. Only the first differs between generations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from megastow import collect
from megastow.guard import CallTable, GuardedCalls, call_table, module_calls
from megastow.megatron_layouts import captured_modules, refuse
from megastow.megatron_parts import (
    ReplicaGroups,
    add_dispatchers,
    add_optimizer,
    leaves,
    nested,
    optimizer_calls,
    unwrap,
    workspaces,
)
from megastow.state import Inventory, StateKind, Workspace


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

    def refuse_unsupported(self, modules: collect.NamedModules) -> None:
        """Look for layouts that cannot be moved; asked before each inventory, for graphs are captured while training.

        Raises:
            UnsupportedLayoutError: there is one.
        """
        refuse(captured_modules(modules))

    def add_buffers(self, inventory: Inventory) -> None:
        """List the flat buffers of the chunks, and whatever lies on their storages."""
        raise NotImplementedError

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """See `BoundAdapter`."""
        raise NotImplementedError

    def replica_groups(self) -> ReplicaGroups:
        """Over which ranks parameters are the same as a rule; over none, if a generation does not say."""
        return ReplicaGroups()

    def buffer_calls(self) -> Iterator[GuardedCalls]:
        """The calls on buffers, buckets and whatever else a chunk delegates to."""
        yield from ()

    # --- what all have in common ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._device

    def inventory(self) -> Inventory:
        """Everything on the device, found anew, if it can be moved."""
        modules = collect.named_modules(self._model)
        self.refuse_unsupported(modules)
        inventory = Inventory(self._device)
        self.add_buffers(inventory)
        replicas = self.replica_groups()
        collect.add_modules(inventory, modules, replicas.of_parameter)
        add_dispatchers(inventory, modules)
        add_optimizer(inventory, self._optimizer, replicas)
        grads = inventory.group(StateKind.GRAD_BUFFERS, "gradients on parameters", keep=False)
        collect.add_grads(grads, modules.parameters)
        return inventory

    def guarded_calls(self) -> Iterable[GuardedCalls]:
        """Everything that reads or writes state: modules, DDP chunks, their buffers, optimizers."""
        yield from module_calls(collect.every_module(self._model))
        for chunk in self._model:
            yield GuardedCalls(chunk, self.chunk_calls)
        yield from self.buffer_calls()
        yield from optimizer_calls(self._optimizer)

    def workspaces(self) -> Iterable[Workspace]:
        """See `megatron_parts.workspaces`."""
        return workspaces()

    def entrances(self) -> Sequence[torch.nn.Module]:
        """The modules inside the wrappers: whoever calls whichever wrapper gets there."""
        return [unwrap(chunk) for chunk in self._model]


class FlatGradientsBinding(MegatronBinding):
    """Chunks whose flat buffers are for gradients only, with parameters in storages of their own.

    So it is in every generation before megatron-core 0.6: `MemoryBuffer` (megatron/model/distributed.py of Megatron-LM
    v2.5 to 23.08, and of the Qwen-MoE fork, which nests them one level deeper) and `GradBuffer`. The distributed
    optimizer lays its `param_buffers` over the storage of the gradients, to gather new parameters in. Nothing of that
    is in flight between two calls unless a generation says so in `quiesce`.

    Attributes:
        buffer_attributes: What a chunk calls its buffers: anything nested of objects with the flat tensor as `data`, or
            of tensors.
        flat_calls: The methods of a buffer that read or write it.
    """

    chunk_calls = call_table(
        ((StateKind.WEIGHTS,), "broadcast_params"),
        ((StateKind.GRAD_BUFFERS,), "zero_grad_buffer allreduce_gradients"),
    )
    buffer_attributes: ClassVar[Sequence[str]] = ("_grad_buffers",)
    flat_calls: ClassVar[CallTable] = call_table(((StateKind.GRAD_BUFFERS,), "zero"))

    @property
    def facts(self) -> Mapping[str, object]:
        """What was found; that gradients are fp32 shows in the buffers where a chunk has not noted what is wanted."""
        are_fp32 = {flat.dtype for _, flat in self.flat_gradients()} == {torch.float32}
        return {
            "use_distributed_optimizer": any(hasattr(leaf, "param_buffers") for leaf in leaves(self._optimizer)),
            "accumulate_allreduce_grads_in_fp32": all(
                getattr(chunk, "accumulate_allreduce_grads_in_fp32", are_fp32) for chunk in self._model
            ),
            "params_dtype": collect.largest_dtype(self._model),
        }

    def buffers(self) -> Iterator[tuple[str, Any]]:
        """The buffers of all chunks, with their paths."""
        for number, chunk in enumerate(self._model):
            for attribute in self.buffer_attributes:
                yield from nested(f"chunk{number}.{attribute}", getattr(chunk, attribute, None))

    def flat_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors in which gradients lie, with their paths."""
        for path, buffer in self.buffers():
            yield (path, buffer) if isinstance(buffer, torch.Tensor) else (f"{path}.data", buffer.data)

    def staged_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those gradient tensors on whose storage, just now, the only copy of new parameters lies."""
        yield from ()

    def add_buffers(self, inventory: Inventory) -> None:
        """The gradients, the views of the distributed optimizer on them, and what of it must not be dropped now."""
        grads = inventory.group(StateKind.GRAD_BUFFERS, "flat gradient buffers", keep=False)
        for path, tensor in self.flat_gradients():
            grads.add(path, tensor)
        for number, leaf in enumerate(leaves(self._optimizer)):
            for path, tensor in nested(f"optimizer[{number}].param_buffers", getattr(leaf, "param_buffers", None)):
                grads.add(path, tensor)
        staged = inventory.group(StateKind.GRAD_BUFFERS, "gradient buffers with parameters still to be gathered")
        for path, tensor in self.staged_gradients():
            staged.add(path, tensor)

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """Nothing to wait for: these generations communicate synchronously."""

    def buffer_calls(self) -> Iterator[GuardedCalls]:
        """Whoever holds a buffer may use it without the chunk."""
        for _, buffer in self.buffers():
            if not isinstance(buffer, torch.Tensor):
                yield GuardedCalls(buffer, self.flat_calls)
