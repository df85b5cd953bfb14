"""One megatron-core trainer: where its state lives, what is in flight, and which calls would touch it.

Mirrors megatron/core/distributed/{distributed_data_parallel,param_and_grad_buffer}.py of 0.9.0 to 0.19.2. Nothing here
imports Megatron: the instances are there already, and their attributes say what they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from megastow import collect
from megastow.errors import TransferError
from megastow.guard import COPY_METHODS, GuardedCall, module_calls
from megastow.plain import TORCH_OPTIMIZER_CALLS
from megastow.state import ALL_KINDS, Inventory, StateKind
from megastow_mcore.layout import bucket_groups, flat_buffers, refuse_unsupported
from megastow_mcore.optimizers import add_optimizer, device_part, leaves

QUIESCE_SECONDS = 300.0
"""How long communication in flight may take to end before a move gives up; under NCCL's own ten minutes."""

W, M, S, G = StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS, StateKind.OPTIMIZER_STATES, StateKind.GRAD_BUFFERS


class McoreBinding:
    """DDP chunks and the optimizer over them."""

    def __init__(self, model: Sequence[torch.nn.Module], optimizer: Any) -> None:
        refuse_unsupported(model, optimizer)
        self._model: list[Any] = list(model)
        self._optimizer = optimizer
        self._device = collect.find_device(self._model)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._device

    @property
    def facts(self) -> Mapping[str, object]:
        """What was found, in the words of the classic factory's arguments."""
        return {
            "use_distributed_optimizer": all(c.ddp_config.use_distributed_optimizer for c in self._model),
            "accumulate_allreduce_grads_in_fp32": all(c.ddp_config.grad_reduce_in_fp32 for c in self._model),
            "params_dtype": collect.largest_dtype(self._model),
        }

    def inventory(self) -> Inventory:
        """Everything on the device, found anew.

        Raises:
            UnsupportedLayoutError: the layout has become one that cannot be moved (a CUDA graph was captured).
        """
        refuse_unsupported(self._model, self._optimizer)
        inventory = Inventory(self._device)
        weights = inventory.group(W, "flat parameter buffers")
        grads = inventory.group(G, "flat gradient buffers", keep=False)
        for number, buffer in enumerate(self._flat_buffers()):
            weights.add(f"buffers[{number}].param_data", buffer.param_data)
            grads.add(f"buffers[{number}].grad_data", buffer.grad_data)
            for index, tensor in enumerate(getattr(buffer, "extra_main_grads", None) or ()):  # 0.17+
                grads.add(f"buffers[{number}].extra_main_grads[{index}]", tensor)
        collect.add_modules(inventory, self._model)
        self._add_dispatchers(inventory)
        add_optimizer(inventory, self._optimizer)
        collect.add_grads(grads, collect.named_parameters(self._model))
        return inventory

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """Wait until no collective reads or writes the buffers; Megatron's own bookkeeping stays as it is.

        The handles are not waited for but asked: `wait()` belongs to Megatron, and on gloo each call of it writes the
        result out once more. A device synchronisation covers NCCL's streams; this covers everything else.

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
        deadline = time.monotonic() + QUIESCE_SECONDS
        for group in groups:
            for handle in (group.param_gather_handle, group.grad_reduce_handle):
                for work in _works(handle):
                    while _is_busy(work):
                        if time.monotonic() > deadline:
                            raise TransferError(
                                f"a collective of bucket group {groups.index(group)} has not ended within "
                                f"{QUIESCE_SECONDS:.0f} s; is another rank gone? Nothing was moved"
                            )
                        time.sleep(1e-4)

    def guarded_calls(self) -> Iterable[GuardedCall]:
        """Everything that reads or writes state: modules, DDP, bucket groups, buffers, optimizers."""
        yield from module_calls(module for chunk in self._model for module in chunk.modules())
        for chunk in self._model:
            yield from _guard(chunk, _DDP_CALLS)
            # Megatron's schedules keep bound methods of the DDP object, taken before any guard; they end up here.
            for group in bucket_groups(chunk):
                yield from _guard(group, _BUCKET_GROUP_CALLS)
            for buffer in flat_buffers(chunk):
                yield from _guard(buffer, _BUFFER_CALLS)
        if self._optimizer is not None:
            yield from _guard(self._optimizer, _OPTIMIZER_CALLS)
        for leaf in leaves(self._optimizer):
            if leaf is not self._optimizer:
                yield from _guard(leaf, _OPTIMIZER_CALLS)
            for inner in {id(o): o for o in (leaf.optimizer, device_part(leaf.optimizer)) if o is not None}.values():
                yield from _guard(inner, TORCH_OPTIMIZER_CALLS)

    def entrances(self) -> Sequence[torch.nn.Module]:
        """The modules inside the wrappers: whoever calls whichever wrapper gets there."""
        return [_unwrap(chunk) for chunk in self._model]

    def _flat_buffers(self) -> Iterator[Any]:
        for chunk in self._model:
            yield from flat_buffers(chunk)

    def _add_dispatchers(self, inventory: Inventory) -> None:
        """What MoE token dispatchers have left from the last forward, and their constants.

        They are plain objects beside the modules. Their leftovers are moved with the weights rather than dropped:
        between forward and backward they are still needed, and nothing tells that moment from another.
        """
        group = inventory.group(W, "tensors of MoE token dispatchers", transient=True)
        for chunk in self._model:
            for path, module in chunk.named_modules():
                for name in ("token_dispatcher", "_training_token_dispatcher", "_saved_token_dispatcher"):
                    dispatcher = vars(module).get(name)
                    if dispatcher is not None:
                        collect.add_attributes(group, f"{path}.{name}", dispatcher)
                        manager = getattr(dispatcher, "_comm_manager", None)  # flex dispatcher, 0.12+
                        if manager is not None:
                            collect.add_attributes(group, f"{path}.{name}._comm_manager", manager)


_HELD = ("works", "handles", "all_to_all_handle")
"""Where handles keep what they wait for: torch's coalescing manager, Megatron's layer-wise and fp32 reductions."""


def _works(handle: Any) -> Iterator[Any]:
    """The pieces of work behind a handle: itself, or what a coalescing manager or a list of handles holds."""
    if handle is None:
        return
    if hasattr(handle, "is_completed"):
        yield handle
        return
    parts = handle if isinstance(handle, (list, tuple)) else [getattr(handle, name, None) for name in _HELD]
    for part in parts:
        yield from _works(part)


def _is_busy(work: Any) -> bool:
    """Whether a piece of work may still read or write the tensors that it was given.

    gloo's reduce-scatter never says that it has ended before somebody waits for it, and has no future. It works on a
    copy that it made when it was called, and writes its result only in `wait` (torch's ProcessGroupGloo.cpp), so the
    buffers are free of it.
    """
    if work.is_completed():
        return False
    try:
        work.get_future()
    except RuntimeError:
        return False
    return True


def _unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The innermost module of wrappers that keep what they wrap as `module`."""
    while isinstance(inner := getattr(module, "module", None), torch.nn.Module):
        module = inner
    return module


def _guard(owner: object, calls: Mapping[str, Iterable[StateKind]]) -> Iterator[GuardedCall]:
    for method, kinds in calls.items():
        yield GuardedCall(owner, method, frozenset(kinds))


def _table(*rows: tuple[Sequence[StateKind], str]) -> dict[str, tuple[StateKind, ...]]:
    return {method: tuple(kinds) for kinds, methods in rows for method in methods.split()}


# Public methods of 0.9.0 to 0.19.2 by what they read or write; a name that a version does not have is passed over.
_DDP_CALLS = _table(
    ((W,), "start_param_sync disable_forward_pre_hook broadcast_params free_overlap_buffers"),
    ((G,), "start_grad_sync finish_grad_sync scale_gradients zero_grad_buffer"),
    ((G,), "offload_grad_buffers restore_grad_buffers"),
)
_BUCKET_GROUP_CALLS = _table(
    ((W,), "start_param_sync finish_param_sync"),
    ((G,), "start_grad_sync finish_grad_sync check_grads check_for_nan_in_grad register_grad_ready"),
)
_BUFFER_CALLS = _table(
    ((G,), "reset scale_gradients"),
    ((W, G), "offload_to_cpu reload_from_cpu"),
)
_OPTIMIZER_CALLS = _table(
    (ALL_KINDS, f"step step_with_ready_grads {' '.join(COPY_METHODS)}"),
    ((M, G), "prepare_grads"),
    ((G,), "get_grad_norm clip_grad_norm count_zeros get_main_grads_for_grad_norm get_grads_for_grad_norm zero_grad"),
    ((W, M), "reload_model_params start_param_sync allgather_params broadcast_params"),
    ((W, M, G), "_copy_main_params_to_param_buffer prepare_model_params_for_param_sync"),
    ((W, M, S), "state_dict load_state_dict sharded_state_dict offload_to_cpu restore_from_cpu"),
    ((W, M, S), "save_parameter_state load_parameter_state"),
    ((W, M, S), "get_parameter_state_dp_zero get_parameter_state_fs_bucket_space get_parameter_state_dp_reshardable"),
    ((W, M, S), "load_parameter_state_from_dp_zero load_parameter_state_from_fs_model_space"),
    ((W, M, S), "load_parameter_state_from_fs_bucket_space load_parameter_state_from_dp_zero_legacy"),
    ((W, M, S), "load_parameter_state_from_dp_reshardable load_parameter_state_from_fully_reshardable"),
)
