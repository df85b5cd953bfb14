"""Making the optimizer that the arguments ask for; see the package's docstring."""

from collections.abc import Sequence
from typing import Any

from megastow_conformance.doubles.optimizers import MegatronOptimizer, inner_optimizer, param_groups
from megatron import get_args
from megatron.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

__all__ = ["DistributedOptimizer", "FP32Optimizer", "Float16OptimizerWithFloat16Params", "get_megatron_optimizer"]


def get_megatron_optimizer(model: Sequence[Any]) -> MegatronOptimizer:
    """The optimizer over the chunks of a model."""
    args = get_args()
    inner = inner_optimizer(args, param_groups(model))
    kind: type[MegatronOptimizer] = Float16OptimizerWithFloat16Params if args.fp16 or args.bf16 else FP32Optimizer
    if args.use_distributed_optimizer:
        kind = DistributedOptimizer
    return kind(inner, args, model)
