"""One megatron-core trainer: its flat buffers, what is in flight, and which calls would touch them.

Mirrors megatron/core/distributed/{distributed_data_parallel,param_and_grad_buffer}.py of 0.9.0 to 0.19.2. Nothing here
imports Megatron: the instances are there already, and their attributes say what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megastow import collect
from megastow.derived import DerivableBuffer
from megastow.errors import TransferError
from megastow.guard import GuardedCalls, call_table
from megastow.megatron_binding import MegatronBinding
from megastow.megatron_derived import derivable_buffers
from megastow.megatron_parts import ReplicaGroups, ranks_of, wait_until_idle
from megastow.state import Inventory, StateKind
from megastow_mcore.layout import bucket_groups, flat_buffers, refuse_unsupported

W, G = StateKind.WEIGHTS, StateKind.GRAD_BUFFERS

# Public methods of 0.9.0 to 0.19.2 by what they read or write; a name that a version does not have is passed over.
_CHUNK_CALLS = call_table(
    ((W,), "start_param_sync disable_forward_pre_hook broadcast_params free_overlap_buffers"),
    ((G,), "start_grad_sync finish_grad_sync scale_gradients zero_grad_buffer"),
    ((G,), "offload_grad_buffers restore_grad_buffers"),
)
_BUCKET_GROUP_CALLS = call_table(
    ((W,), "start_param_sync finish_param_sync"),
    ((G,), "start_grad_sync finish_grad_sync check_grads check_for_nan_in_grad register_grad_ready"),
)
_BUFFER_CALLS = call_table(
    ((G,), "reset scale_gradients"),
    ((W, G), "offload_to_cpu reload_from_cpu"),
)


class McoreBinding(MegatronBinding):
    """DDP chunks and the optimizer over them.

    Raises:
        UnsupportedLayoutError: the layout is one that cannot be moved; so does each inventory, since a CUDA graph may
            have been captured meanwhile.
    """

    chunk_calls = _CHUNK_CALLS

    def __init__(self, model: Sequence[torch.nn.Module], optimizer: Any) -> None:
        refuse_unsupported(model, collect.named_modules(model), optimizer)
        super().__init__(model, optimizer)

    @property
    def facts(self) -> Mapping[str, object]:
        """What was found, in the words of the classic factory's arguments."""
        return {
            "use_distributed_optimizer": all(c.ddp_config.use_distributed_optimizer for c in self._model),
            "accumulate_allreduce_grads_in_fp32": all(c.ddp_config.grad_reduce_in_fp32 for c in self._model),
            "params_dtype": collect.largest_dtype(self._model),
        }

    def refuse_unsupported(self, modules: collect.NamedModules) -> None:
        """See `layout.refuse_unsupported`."""
        refuse_unsupported(self._model, modules, self._optimizer)

    def add_buffers(self, inventory: Inventory) -> None:
        """The `_ParamAndGradBuffer`s, and gradients that 0.17 and later keep beside them."""
        grads = inventory.group(G, "flat gradient buffers", keep=False)
        for number, buffer in enumerate(buffer for chunk in self._model for buffer in flat_buffers(chunk)):
            replicas = ranks_of(buffer.data_parallel_group)
            weights = inventory.group(W, "flat parameter buffer", replicas=replicas)
            weights.add(f"buffers[{number}].param_data", buffer.param_data)
            grads.add(f"buffers[{number}].grad_data", buffer.grad_data)
            for index, tensor in enumerate(getattr(buffer, "extra_main_grads", None) or ()):
                grads.add(f"buffers[{number}].extra_main_grads[{index}]", tensor)

    def derivable_buffers(self) -> Iterable[DerivableBuffer]:
        """The buffers of the distributed optimizer, gathered by the groups that its bucket groups use."""
        groups = {
            id(bucket): getattr(group, "intra_distributed_optimizer_instance_group", None) or group.data_parallel_group
            for chunk in self._model
            for group in bucket_groups(chunk)
            for bucket in group.buckets
        }
        buffers = [buffer for chunk in self._model for buffer in flat_buffers(chunk)]
        named = [(f"buffers[{number}]", buffer) for number, buffer in enumerate(buffers)]
        return derivable_buffers(named, self._optimizer, lambda _, bucket: groups[id(bucket)])

    def replica_groups(self) -> ReplicaGroups:
        """Those of the buffers."""
        return ReplicaGroups.of_buffers(
            (buffer for chunk in self._model for buffer in chunk.buffers),
            (buffer for chunk in self._model for buffer in chunk.expert_parallel_buffers),
        )

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """Wait until no collective reads or writes the buffers.

        Raises:
            TransferError: gradients would be dropped while their reduction is under way, or a collective did not end.
        """
        groups = [group for chunk in self._model for group in bucket_groups(chunk)]
        reducing = [group for group in groups if group.grad_reduce_handle is not None]
        if reducing and G in kinds and not keep_grads:
            raise TransferError(
                f"the gradients of {len(reducing)} bucket groups are being reduced; releasing their buffers now would "
                "lose them. Call finalize_model_grads (or finish_grad_sync) first, or offload with keep_grads=True; "
                "nothing was moved"
            )
        wait_until_idle(
            (f"bucket group {number}", handle)
            for number, group in enumerate(groups)
            for handle in (group.param_gather_handle, group.grad_reduce_handle)
        )

    def buffer_calls(self) -> Iterator[GuardedCalls]:
        """Megatron's schedules keep bound methods of the DDP object, taken before any guard; they end up here."""
        for chunk in self._model:
            for group in bucket_groups(chunk):
                yield GuardedCalls(group, _BUCKET_GROUP_CALLS)
            for buffer in flat_buffers(chunk):
                yield GuardedCalls(buffer, _BUFFER_CALLS)
