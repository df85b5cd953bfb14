"""Layouts of megatron-core 0.9 to 0.19.2 that cannot be moved by releasing storages, each with how it shows.

Checked when a manager is made and again before each move, because graphs are captured while training runs. The files
are named at each check.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megastow import megatron_layouts
from megastow.collect import NamedModules
from megastow.megatron_parts import leaves


def refuse_unsupported(model: Sequence[torch.nn.Module], modules: NamedModules, optimizer: Any) -> None:
    """Look for every layout that is not supported.

    Args:
        model: the chunks.
        modules: all modules in them.
        optimizer: the optimizer over them, or None.

    Raises:
        UnsupportedLayoutError: one was found; the message names it, where, and what to do. Nothing was touched.
    """
    megatron_layouts.refuse(_problems(model, modules, optimizer))


def _problems(model: Sequence[torch.nn.Module], modules: NamedModules, optimizer: Any) -> Iterator[str]:
    yield from _sharding_wrappers(model)
    for index, chunk in enumerate(model):
        yield from _buffer_problems(index, chunk)
    yield from _rematerialised_parameters(modules)
    yield from megatron_layouts.quantized_parameters(modules)
    yield from megatron_layouts.captured_modules(modules)
    for name in ("FullCudaGraphWrapper", "OptimizerCudaGraphWrapper"):
        if _whole_graph(name):
            yield (
                f"megatron-core's {name} has captured a CUDA graph over the whole iteration, and with it the addresses "
                "of all state. Train without full-iteration and optimizer CUDA graphs"
            )
    for leaf in leaves(optimizer):
        config = getattr(leaf, "ddp_config", None)
        if getattr(config, "use_megatron_fsdp", False) or getattr(config, "use_custom_fsdp", False):
            yield "the optimizer works on Megatron-FSDP's own buffers. Use DistributedDataParallel without FSDP"


def _sharding_wrappers(model: Sequence[torch.nn.Module]) -> Iterator[str]:
    """Megatron-FSDP (core/distributed/custom_fsdp, fsdp) and torch's FSDP2 wrapper, which have no bucket groups."""
    for index, chunk in enumerate(model):
        if not hasattr(chunk, "bucket_groups") or not hasattr(chunk, "buffers"):
            yield (
                f"chunk {index} is a {type(chunk).__module__}.{type(chunk).__qualname__} without bucket_groups: a "
                "sharding wrapper (Megatron-FSDP or torch's FSDP) that releases and gathers storages itself. Use "
                "megatron.core.distributed.DistributedDataParallel, with the distributed optimizer for sharded state"
            )


def _buffer_problems(index: int, chunk: Any) -> Iterator[str]:
    for buffer in flat_buffers(chunk):
        # param_and_grad_buffer.py, 0.13+
        if getattr(buffer, "nccl_ub", False):
            yield (
                f"a buffer of chunk {index} is registered with NCCL (nccl_ub): its memory belongs to a pool that the "
                "communicator knows by address. Turn nccl_ub off in DistributedDataParallelConfig"
            )
        if getattr(buffer, "shared_buffer", None) is not None:
            yield (
                f"parameters and gradients of chunk {index} share one buffer (reuse_grad_buf_for_mxfp8_param_ag). "
                "Turn that off in DistributedDataParallelConfig"
            )
    for group in bucket_groups(chunk):
        # LayerWiseDistributedOptimizer with overlapped gather, 0.17+: gathered weights lie in gradient memory.
        if any(getattr(bucket, "layerwise_gather_list", None) is not None for bucket in group.buckets):
            yield (
                f"a bucket of chunk {index} holds a layer-wise parameter gather, whose weights lie in gradient memory. "
                "Use the layer-wise optimizer without overlap_param_gather"
            )


def _rematerialised_parameters(modules: NamedModules) -> Iterator[str]:
    for name, parameter in modules.parameters:
        if getattr(parameter, "is_gtp_weight_remat", False):  # tensor_parallel, 0.19
            yield f"parameter {name} is rematerialised from a weight cache (GTP). Turn GTP off"


_GRAPH_MODULES = (
    "megatron.core.full_cuda_graph",
    "megatron.core.optimizer.optimizer_cuda_graph",
)


def _whole_graph(class_name: str) -> bool:
    """Whether a process-wide graph was captured; full_cuda_graph.py (0.14+), optimizer_cuda_graph.py (0.17+)."""
    for module_name in _GRAPH_MODULES:
        wrapper = getattr(sys.modules.get(module_name), class_name, None)
        graph = getattr(wrapper, "cuda_graph", None)
        if any(g is not None for g in graph.values()) if isinstance(graph, dict) else graph is not None:
            return True
    return False


def flat_buffers(chunk: Any) -> list[Any]:
    """A chunk's `_ParamAndGradBuffer`s, for dense and for expert parameters."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def bucket_groups(chunk: Any) -> list[Any]:
    """A chunk's bucket groups, through which it communicates."""
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
