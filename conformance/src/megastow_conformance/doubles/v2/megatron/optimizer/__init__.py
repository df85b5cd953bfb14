"""Making the optimizer that the arguments ask for; see the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megastow_conformance.doubles.optimizers import MegatronOptimizer, inner_optimizer, param_groups
from megatron import get_args
from megatron.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

__all__ = [
    "ChainedOptimizer",
    "DistributedOptimizer",
    "FP32Optimizer",
    "Float16OptimizerWithFloat16Params",
    "get_megatron_optimizer",
]


def get_megatron_optimizer(model_chunks: Sequence[Any]) -> MegatronOptimizer | ChainedOptimizer:
    """The optimizer over chunks: one, or a chain where there are experts, whose optimizer is never distributed."""
    groups = param_groups(model_chunks, separate_experts=True)
    buffers = {index: list(chunk.grad_buffers.values()) for index, chunk in enumerate(model_chunks)}
    dense = [group for group in groups if not group["is_expert_parallel"]]
    experts = [group for group in groups if group["is_expert_parallel"]]
    optimizer = _over(dense, buffers)
    return ChainedOptimizer([optimizer, _over(experts, None)]) if experts else optimizer


def _over(groups: list[dict[str, Any]], buffers: dict[int, list[Any]] | None) -> MegatronOptimizer:
    args = get_args()
    inner = inner_optimizer(args, groups)
    if args.use_distributed_optimizer and buffers is not None:
        optimizer: MegatronOptimizer = DistributedOptimizer(inner, args, buffers)
    elif args.fp16 or args.bf16:
        optimizer = Float16OptimizerWithFloat16Params(inner, args, ())
    else:
        optimizer = FP32Optimizer(inner, args, ())
    return optimizer
