"""One trainer of megatron-core 0.6 to 0.8: its flat buffers, what is in flight, and which calls would touch them.

Mirrors megatron/core/distributed/{distributed_data_parallel,param_and_grad_buffer}.py and
optimizer/distrib_optimizer.py of 0.6.0, 0.7.0 and 0.8.0; the weeks before 0.6.0 (grad_buffer.py) and the branch
24.09-alpha after 0.8.0 have the same attributes. Nothing here imports Megatron: the instances are there already.

In all of them the buckets communicate gradients, and the distributed optimizer gathers parameters: under
`overlap_param_gather` it launches the first gather in `zero_grad`, and each further one in a forward pre-hook once the
one before has arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megastow import collect
from megastow.derived import DerivableBuffer
from megastow.guard import GuardedCalls, call_table
from megastow.megatron_binding import MegatronBinding
from megastow.megatron_derived import derivable_buffers
from megastow.megatron_layouts import quantized_parameters, refuse
from megastow.megatron_parts import ReplicaGroups, launched_by_buckets, leaves, ranks_of, wait_until_idle
from megastow.state import Inventory, StateKind

W, G = StateKind.WEIGHTS, StateKind.GRAD_BUFFERS

# Methods of 0.6.0 to 0.8.0 by what they read or write; a name that a version does not have is passed over.
_CHUNK_CALLS = call_table(
    ((W,), "broadcast_params"),
    ((G,), "start_grad_sync finish_grad_sync scale_gradients zero_grad_buffer"),
)
_BUFFER_CALLS = call_table(((G,), "reset start_grad_sync finish_grad_sync scale_gradients register_grad_ready"))
_BUCKET_CALLS = call_table(((G,), "start_grad_sync finish_grad_sync register_grad_ready"))
_GATHER_CALLS = call_table(((W,), "zero_grad finish_param_sync disable_pre_hook"))


class LegacyV3Binding(MegatronBinding):
    """DDP chunks and the optimizer over them.

    Raises:
        UnsupportedLayoutError: the layout is one that cannot be moved; so does each inventory, since a CUDA graph may
            have been captured meanwhile.
    """

    chunk_calls = _CHUNK_CALLS

    def __init__(self, model: Sequence[torch.nn.Module], optimizer: Any) -> None:
        super().__init__(model, optimizer)
        self.refuse_unsupported(collect.named_modules(self._model))

    @property
    def facts(self) -> Mapping[str, object]:
        """What was found, by looking at the buffers: where 0.6 keeps its settings, 0.7 and 0.8 keep them elsewhere."""
        buffers = [buffer for _, buffer in self._buffers()]
        return {
            "use_distributed_optimizer": all(buffer.param_data is not None for buffer in buffers),
            "accumulate_allreduce_grads_in_fp32": all(buffer.grad_dtype is torch.float32 for buffer in buffers),
            "params_dtype": collect.largest_dtype(self._model),
        }

    def refuse_unsupported(self, modules: collect.NamedModules) -> None:
        """CUDA graphs and quantised parameters."""
        super().refuse_unsupported(modules)
        refuse(quantized_parameters(modules))

    def add_buffers(self, inventory: Inventory) -> None:
        """The `ParamAndGradBuffer`s; buckets, shards and the optimizer's views lie on the same storages."""
        grads = inventory.group(G, "flat gradient buffers", keep=False)
        for path, buffer in self._buffers():
            replicas = ranks_of(buffer.data_parallel_group)
            weights = inventory.group(W, "flat parameter buffer", replicas=replicas)
            weights.add(f"{path}.param_data", buffer.param_data)
            grads.add(f"{path}.grad_data", buffer.grad_data)

    def derivable_buffers(self) -> Iterable[DerivableBuffer]:
        """The buffers of the distributed optimizer, each gathered by its data-parallel group."""
        return derivable_buffers(self._buffers(), self._optimizer, lambda buffer, _: buffer.data_parallel_group)

    def replica_groups(self) -> ReplicaGroups:
        """Those of the buffers."""
        return ReplicaGroups.of_buffers(
            (buffer for chunk in self._model for buffer in chunk.buffers),
            (buffer for chunk in self._model for buffer in chunk.expert_parallel_buffers),
        )

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """Wait until no collective reads or writes the buffers; why that is all: see `launched_by_buckets`.

        Raises:
            TransferError: a collective did not end.
        """
        wait_until_idle(launched_by_buckets(self._buffers(), self._optimizer))

    def buffer_calls(self) -> Iterator[GuardedCalls]:
        """Buffers and buckets, which autograd hooks reach past the chunk, and the optimizers that gather parameters."""
        for _, buffer in self._buffers():
            yield GuardedCalls(buffer, _BUFFER_CALLS)
            for bucket in buffer.buckets:
                yield GuardedCalls(bucket, _BUCKET_CALLS)
        gathering = [leaf for leaf in leaves(self._optimizer) if getattr(leaf, "overlap_param_gather", False)]
        if gathering:
            # The whole as well: what it passes on to one part must not be refused by the next.
            for optimizer in {id(each): each for each in (self._optimizer, *gathering)}.values():
                yield GuardedCalls(optimizer, _GATHER_CALLS)

    def _buffers(self) -> Iterator[tuple[str, Any]]:
        """The buffers of all chunks, for dense and for expert parameters, with their paths."""
        for number, chunk in enumerate(self._model):
            for attribute in ("buffers", "expert_parallel_buffers"):
                for index, buffer in enumerate(getattr(chunk, attribute)):
                    yield f"chunk{number}.{attribute}[{index}]", buffer
