"""Layouts that cannot be moved by releasing storages, each with how it shows on the instance.

Refusing is done by looking, never by importing Transformer Engine or by trusting a configuration flag: what counts is
whether the thing is there. Checked when a manager is made and again before each move, because graphs are captured while
training runs. Mirrors what 0.9.0 to 0.19.2 have; the files are named at each check.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megastow.errors import UnsupportedLayoutError

_QUANTIZED = {
    "Float8Tensor",
    "Float8BlockwiseQTensor",
    "GroupedTensor",
    "MXFP8Tensor",
    "NVFP4Tensor",
    "QuantizedTensor",
}


def refuse_unsupported(model: Sequence[torch.nn.Module], optimizer: Any) -> None:
    """Look for every layout that is not supported.

    Raises:
        UnsupportedLayoutError: one was found; the message names it, where, and what to do. Nothing was touched.
    """
    found = next(_problems(model), None)
    if found is None and optimizer is not None:
        found = next(_optimizer_problems(optimizer), None)
    if found is not None:
        raise UnsupportedLayoutError(f"{found}. megastow does not understand that layout, and touched nothing")


def _problems(model: Sequence[torch.nn.Module]) -> Iterator[str]:
    for index, chunk in enumerate(model):
        # Megatron-FSDP (core/distributed/custom_fsdp, fsdp) and torch's FSDP2 wrapper have no bucket groups.
        if not hasattr(chunk, "bucket_groups") or not hasattr(chunk, "buffers"):
            yield (
                f"chunk {index} is a {type(chunk).__module__}.{type(chunk).__qualname__} without bucket_groups: a "
                "sharding wrapper (Megatron-FSDP or torch's FSDP) that releases and gathers storages itself. Use "
                "megatron.core.distributed.DistributedDataParallel, with the distributed optimizer for sharded state"
            )
            return
        yield from _buffer_problems(index, chunk)
        yield from _parameter_problems(index, chunk)
        for path, module in chunk.named_modules():
            graphs = _captured_graphs(module)
            if graphs:
                yield (
                    f"{graphs} of chunk {index} module {path or type(module).__name__} hold CUDA graphs, which were "
                    "captured over the addresses of weights and gradients; releasing those would make a replay write "
                    "into foreign memory. Train without CUDA graphs (cuda_graph_impl none, enable_cuda_graph off)"
                )
    for name in ("FullCudaGraphWrapper", "OptimizerCudaGraphWrapper"):
        if _whole_graph(name):
            yield (
                f"megatron-core's {name} has captured a CUDA graph over the whole iteration, and with it the addresses "
                "of all state. Train without full-iteration and optimizer CUDA graphs"
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


def _parameter_problems(index: int, chunk: torch.nn.Module) -> Iterator[str]:
    for name, parameter in chunk.named_parameters():
        kinds = {base.__name__ for tensor in (parameter, parameter.data) for base in type(tensor).__mro__}
        if kinds & _QUANTIZED:
            yield (
                f"parameter {name} of chunk {index} is a quantised tensor ({', '.join(sorted(kinds & _QUANTIZED))}) "
                "whose bytes lie in inner tensors. Keep parameters in bf16 (fp8_param_gather off)"
            )
        if getattr(parameter, "is_gtp_weight_remat", False):  # tensor_parallel, 0.19
            yield f"parameter {name} of chunk {index} is rematerialised from a weight cache (GTP). Turn GTP off"


def _captured_graphs(module: torch.nn.Module) -> str | None:
    """The attributes of a module that hold captured graphs; transformer/cuda_graphs.py, transformer_block.py."""
    # A manager may be an attribute or a registered submodule; vars() shows only the former.
    attributes = {**vars(module), **module._modules}
    managers = [
        name
        for name, value in attributes.items()
        if "cudagraph_manager" in name and any(map(_is_captured, getattr(value, "cudagraph_runners", ())))
    ]
    return " and ".join(managers + ["cuda_graphs"] * bool(attributes.get("cuda_graphs"))) or None


def _is_captured(runner: Any) -> bool:
    """Whether a runner has recorded a graph. 0.9 and 0.10 only make a runner by capturing."""
    if not hasattr(runner, "fwd_graph"):
        return True
    return runner.fwd_graph is not None or getattr(runner, "bwd_graph", None) is not None


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


def _optimizer_problems(optimizer: Any) -> Iterator[str]:
    for child in getattr(optimizer, "chained_optimizers", None) or (optimizer,):
        if child is not optimizer and getattr(child, "chained_optimizers", None) is not None:
            yield from _optimizer_problems(child)
        config = getattr(child, "ddp_config", None)
        if getattr(config, "use_megatron_fsdp", False) or getattr(config, "use_custom_fsdp", False):
            yield "the optimizer works on Megatron-FSDP's own buffers. Use DistributedDataParallel without FSDP"


def flat_buffers(chunk: Any) -> list[Any]:
    """A chunk's `_ParamAndGradBuffer`s, for dense and for expert parameters."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def bucket_groups(chunk: Any) -> list[Any]:
    """A chunk's bucket groups, through which it communicates."""
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
