"""What the Megatron generations have in common, for their adapters: wrappers, optimizers, dispatchers, work in flight.

Attributes are read by name where they exist; nothing here imports Megatron. Each adapter says only what is special
about its generation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megastow import collect
from megastow.errors import TransferError
from megastow.guard import COPY_METHODS, TORCH_OPTIMIZER_CALLS, GuardedCalls, call_table
from megastow.state import ALL_KINDS, Inventory, Ranks, StateKind, Workspace

_W, _M, _S, _G = StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS, StateKind.OPTIMIZER_STATES, StateKind.GRAD_BUFFERS

QUIESCE_SECONDS = 300.0
"""How long communication in flight may take to end before a move gives up; under NCCL's own ten minutes."""


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The innermost module of wrappers that keep what they wrap as `module`."""
    while isinstance(inner := getattr(module, "module", None), torch.nn.Module):
        module = inner
    return module


def nested(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What dicts and lists, however nested, end in, each with the path to it; None has nothing.

    Args:
        path: How the value itself is called.
        value: A leaf, or dicts, lists and tuples of such.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from nested(f"{path}[{key}]", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from nested(f"{path}[{index}]", item)
    elif value is not None:
        yield path, value


_DISPATCHERS = ("token_dispatcher", "_training_token_dispatcher", "_saved_token_dispatcher")


def add_dispatchers(inventory: Inventory, modules: collect.NamedModules) -> None:
    """What MoE token dispatchers have left from the last forward, and their constants.

    They are plain objects beside the modules. Their leftovers are moved with the weights rather than dropped: between
    forward and backward they are still needed, and nothing tells that moment from another.
    """
    group = inventory.group(StateKind.WEIGHTS, "tensors of MoE token dispatchers", transient=True)
    for path, module in modules:
        attributes = vars(module)
        if attributes.keys().isdisjoint(_DISPATCHERS):
            continue
        for name in _DISPATCHERS:
            dispatcher = attributes.get(name)
            if dispatcher is not None:
                collect.add_attributes(group, f"{path}.{name}", dispatcher)
                manager = getattr(dispatcher, "_comm_manager", None)  # flex dispatcher, 0.12+
                if manager is not None:
                    collect.add_attributes(group, f"{path}.{name}._comm_manager", manager)


# --- replicas ---------------------------------------------------------------------------------------------------------


def ranks_of(group: object) -> Ranks:
    """The ranks of a process group that this process is in; none if it is none, or has only one rank."""
    if not isinstance(group, torch.distributed.ProcessGroup):
        return ()
    ranks = sorted(torch.distributed.get_process_group_ranks(group))
    return tuple(ranks) if len(ranks) > 1 else ()


@dataclass(frozen=True)
class ReplicaGroups:
    """Over which ranks a trainer's state is the same as a rule: parameters, and what an optimizer keeps unsharded.

    Attributes:
        dense: the data-parallel ranks, with those of context parallelism.
        expert: the ranks that have the same experts.
    """

    dense: Ranks = ()
    expert: Ranks = ()

    @classmethod
    def of_buffers(cls, dense: Iterable[Any], expert: Iterable[Any]) -> ReplicaGroups:
        """Those of the flat buffers of chunks, each of which knows its group."""
        first, second = (
            next((ranks_of(getattr(buffer, "data_parallel_group", None)) for buffer in buffers), ())
            for buffers in (dense, expert)
        )
        return cls(first, second)

    def of_parameter(self, parameter: torch.Tensor) -> Ranks:
        """Megatron marks the parameters of experts by `allreduce`."""
        return self.dense if getattr(parameter, "allreduce", True) else self.expert

    def of_leaf(self, leaf: Any) -> Ranks:
        """Those of an optimizer that no chain is around; none of one that each rank has a shard of."""
        if any("DistributedOptimizer" in base.__name__ for base in type(leaf).__mro__):
            return ()
        groups = getattr(leaf.optimizer, "param_groups", ())
        return self.expert if any(group.get("is_expert_parallel") for group in groups) else self.dense


# --- optimizers -------------------------------------------------------------------------------------------------------
#
# `get_megatron_optimizer` returns a tree: chains (always since 0.12, never before 0.6) of leaves, and each leaf wraps
# an inner optimizer. Which attributes a leaf has depends on its class; here they are read by name where they exist, so
# that a stub, a mixed chain or a class that joined later needs no case of its own. Mirrors
# megatron/optimizer/optimizer.py (v2.5 to 23.08), megatron/core/optimizer/{optimizer,distrib_optimizer}.py and
# cpu_offloading/hybrid_optimizer.py (0.6.0 to 0.19.2).

# Lists of lists of what the inner optimizer steps on. The fp32 ones are parameters of the model or views on them: they
# are listed all the same, and move with the weights because their storage does. None stands for a shard that the main
# copy of is elsewhere (precision-aware optimizers keep it in the inner optimizer's state).
_MAIN_GROUPS = (
    "fp32_from_float16_groups",
    "fp32_from_fp32_groups",
    "shard_fp32_from_float16_groups",
    "shard_fp32_groups",
)


def leaves(optimizer: Any) -> Iterator[Any]:
    """The optimizers at the ends of a chain of chains; None (no optimizer) has none."""
    if optimizer is None:
        return
    children = getattr(optimizer, "chained_optimizers", None)
    if children is None:
        yield optimizer
        return
    for child in children:
        yield from leaves(child)


def add_optimizer(inventory: Inventory, optimizer: Any, replicas: ReplicaGroups | None = None) -> None:
    """List main weights, states, and the gradients that hang on main weights."""
    for number, leaf in enumerate(leaves(optimizer)):
        _add_leaf(inventory, leaf, f"optimizer[{number}]", () if replicas is None else replicas.of_leaf(leaf))


def _add_leaf(inventory: Inventory, leaf: Any, prefix: str, replicas: Ranks) -> None:
    main = inventory.group(StateKind.MAIN_WEIGHTS, "main weights", replicas=replicas)
    states = inventory.group(StateKind.OPTIMIZER_STATES, "inner optimizer state", replicas=replicas)
    for attribute in _MAIN_GROUPS:
        for index, tensor in enumerate(_flatten(getattr(leaf, attribute, ()))):
            main.add(f"{prefix}.{attribute}[{index}]", tensor)
    inner = device_part(leaf.optimizer)
    if inner is not None:
        collect.add_main_weights(main, inner, f"{prefix}.", listed={id(tensor) for _, tensor in main.tensors})
        collect.add_optimizer_states(states, inner, f"{prefix}.")
    # A precision-aware optimizer keeps its main copies in the state dictionary.
    main_copies = [entry for entry in states.tensors if _is_main_copy(entry[0])]
    if main_copies:
        main.tensors.extend(main_copies)
        states.tensors[:] = [entry for entry in states.tensors if not _is_main_copy(entry[0])]
    grads = inventory.group(StateKind.GRAD_BUFFERS, "gradients on main weights", keep=False)
    collect.add_grads(grads, main.tensors)
    for name, tensor in main.tensors:
        if (grad := getattr(tensor, "decoupled_grad", None)) is not None:
            grads.add(f"{name}.decoupled_grad", grad)


def _is_main_copy(name: str) -> bool:
    return name.endswith("['master_param']")


def device_part(inner: Any) -> torch.optim.Optimizer | None:
    """The part of an inner optimizer that works on the device; None if there is none.

    HybridDeviceOptimizer (0.12+) splits its parameters between optimizers on the host and one on the device. What is
    on the host stays there, so only the other is looked at: it holds the fp32 copies it steps on as its parameters, and
    their state. (The hybrid's own `state` is put together anew from both at every step.)
    """
    if hasattr(inner, "gpu_optimizer") and hasattr(inner, "cpu_optimizers"):
        inner = inner.gpu_optimizer
    return inner if isinstance(inner, torch.optim.Optimizer) else None


def _flatten(groups: Any) -> Iterator[torch.Tensor | None]:
    for group in groups or ():
        yield from group


def optimizer_calls(optimizer: Any) -> Iterator[GuardedCalls]:
    """What reads or writes state through the optimizer, the parts of a chain and inner optimizers; None has none."""
    if optimizer is None:
        return
    yield GuardedCalls(optimizer, _OPTIMIZER_CALLS)
    for leaf in leaves(optimizer):
        if leaf is not optimizer:
            yield GuardedCalls(leaf, _OPTIMIZER_CALLS)
        for inner in {id(o): o for o in (leaf.optimizer, device_part(leaf.optimizer)) if o is not None}.values():
            yield GuardedCalls(inner, TORCH_OPTIMIZER_CALLS)


# Public methods of all generations by what they read or write; a name that a version does not have is passed over.
_OPTIMIZER_CALLS = call_table(
    (ALL_KINDS, f"step step_with_ready_grads {' '.join(COPY_METHODS)}"),
    ((_M, _G), "prepare_grads"),
    ((_G,), "get_grad_norm clip_grad_norm count_zeros get_main_grads_for_grad_norm get_grads_for_grad_norm zero_grad"),
    ((_W, _M), "reload_model_params start_param_sync allgather_params broadcast_params"),
    ((_W, _G), "gather_model_params"),
    ((_G,), "reduce_model_grads allreduce_layernorm_grads allreduce_embedding_grads"),
    ((_G,), "allreduce_word_embedding_grads allreduce_position_embedding_grads"),
    ((_W, _M, _G), "_copy_main_params_to_param_buffer prepare_model_params_for_param_sync"),
    ((_W, _M, _S), "state_dict load_state_dict sharded_state_dict offload_to_cpu restore_from_cpu"),
    ((_W, _M, _S), "save_parameter_state load_parameter_state"),
    ((_W, _M, _S), "get_parameter_state load_parameter_state_from_state_dict"),
    (
        (_W, _M, _S),
        "get_parameter_state_dp_zero get_parameter_state_fs_bucket_space get_parameter_state_dp_reshardable",
    ),
    ((_W, _M, _S), "load_parameter_state_from_dp_zero load_parameter_state_from_fs_model_space"),
    ((_W, _M, _S), "load_parameter_state_from_fs_bucket_space load_parameter_state_from_dp_zero_legacy"),
    ((_W, _M, _S), "load_parameter_state_from_dp_reshardable load_parameter_state_from_fully_reshardable"),
)


# --- workspaces -------------------------------------------------------------------------------------------------------


def workspaces() -> Iterator[Workspace]:
    """What Megatron and Transformer Engine keep in this process for reuse.

    Megatron's global memory buffer (megatron/core/parallel_state.py, 0.2 to 0.19; `GlobalMemoryBuffer` asks for each
    entry whether it is there). Transformer Engine's dummy gradients and cuBLAS workspaces (pytorch/module/base.py of
    1.0 to 2.9, read and not run): filled when they are next asked for.
    """
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    buffer = getattr(getattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", None), "buffer", None)
    if buffer:
        yield Workspace("Megatron's global memory buffer", partial(_tensors_in, buffer), buffer.clear)
    engine = sys.modules.get("transformer_engine.pytorch.module.base")
    for name in ("_dummy_wgrads", "_multi_stream_cublas_workspace"):
        kept = getattr(engine, name, None)
        if kept:
            yield Workspace(f"Transformer Engine's {name}", partial(_tensors_in, kept), kept.clear)
    name = "_cublas_workspace"
    if getattr(engine, name, None) is not None:
        yield Workspace(
            f"Transformer Engine's {name}",
            lambda: _tensors_in(getattr(engine, name)),
            partial(setattr, engine, name, None),
        )


def _tensors_in(kept: Any) -> list[torch.Tensor]:
    return [tensor for _, tensor in nested("", kept) if isinstance(tensor, torch.Tensor)]


# --- work in flight ---------------------------------------------------------------------------------------------------


def wait_until_idle(handles: Iterable[tuple[str, Any]]) -> None:
    """Wait until no collective behind the handles reads or writes its tensors; Megatron's bookkeeping stays as it is.

    The handles are not waited for but asked: `wait()` belongs to Megatron, and on gloo each call of it writes the
    result out once more. A device synchronisation covers NCCL's streams; this covers everything else.

    Args:
        handles: what each belongs to, in words, and the handle as Megatron keeps it; None is passed over.

    Raises:
        TransferError: a collective has not ended within `QUIESCE_SECONDS`.
    """
    deadline = time.monotonic() + QUIESCE_SECONDS
    for owner, handle in handles:
        for work in _works(handle):
            while _is_busy(work):
                if time.monotonic() > deadline:
                    raise TransferError(
                        f"a collective of {owner} has not ended within {QUIESCE_SECONDS:.0f} s; is another rank gone? "
                        "Nothing was moved"
                    )
                time.sleep(1e-4)


def launched_by_buckets(buffers: Iterable[tuple[str, Any]], optimizer: Any) -> Iterator[tuple[str, Any]]:
    """The work of buckets that reduce gradients and of optimizers that gather parameters, for `wait_until_idle`.

    So it is up to megatron-core 0.8, in distributed/{grad_buffer,param_and_grad_buffer}.py and distrib_optimizer.py.

    That gradients are still to be waited for cannot be told there: a bucket keeps the handle of its reduction, and the
    mark beside it, from the launch until `zero_grad_buffer`, whether `finish_grad_sync` was called or not, and gloo's
    reduce-scatter does not even say that it was waited for. So adapters do not refuse to drop gradients. With the
    reduction over, releasing the memory is safe, and to drop gradients that no step has used is as much the caller's
    decision as it is without overlapped communication.
    """
    for path, buffer in buffers:
        for number, bucket in enumerate(getattr(buffer, "buckets", ())):
            yield f"{path}.buckets[{number}]", bucket.communication_handle
    for number, leaf in enumerate(leaves(optimizer)):
        for handle in getattr(leaf, "all_gather_handles", ()):
            yield f"optimizer[{number}]", handle


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
