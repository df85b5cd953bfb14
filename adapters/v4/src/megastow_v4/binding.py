"""One trainer of the Qwen-MoE fork: the layout of `MemoryBuffer`, with a buffer type above each dtype.

Nothing here imports Megatron: the instances are there already.

What lies where is as in Megatron-LM 23.08, and so is what moves (see `FlatGradientsBinding`): parameters have storages
of their own, which the optimizer's slices of them (`shard_float16_groups`, `shard_fp32_groups`) lie on; `param_buffers`
are the gradient storages under the parameters' dtype; and after a step the `grad` of a main weight is a view into a
gradient buffer, or a tensor of its own where gradients are not fp32. The fork keys `_grad_buffers` and `param_buffers`
by `ParamBufferType` first, since the gradients of experts are reduced over other ranks.

[Note: the way of new parameters]
With the distributed optimizer, `step` leaves new parameters in the gradient storage, where `gather_model_params`
collects those of all ranks and copies them to the model. The training loop calls one right after the other. In between,
nothing on the instances tells gradients that are used up from parameters that are not gathered, so whoever moves
gradients just there must say `keep_grads=True`. Before and after, the gradient storage holds no parameters that are
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megastow import collect
from megastow.errors import InvalidTypeError
from megastow.megatron_adapter import qualified_name
from megastow.megatron_binding import FlatGradientsBinding

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class TypedBufferBinding(FlatGradientsBinding):
    """DDP chunks and the optimizer over them.

    Raises:
        InvalidTypeError: the optimizer is none that keeps main weights, or a parameter has another dtype than fp16,
            bf16 and fp32.
    """

    def __init__(self, model: Sequence[torch.nn.Module], optimizer: Any) -> None:
        if optimizer is not None and not _keeps_main_weights(optimizer):
            raise InvalidTypeError(
                f"the optimizer is a {qualified_name(optimizer)}; expected a MixedPrecisionOptimizer of the Qwen-MoE "
                "fork (DistributedOptimizer, Float16OptimizerWithFloat16Params), or None. Train with --bf16, --fp16 or "
                "--use-distributed-optimizer"
            )
        for name, parameter in collect.named_parameters(model):
            if parameter.dtype not in _DTYPES:
                raise InvalidTypeError(
                    f"parameter {name} is {parameter.dtype}; expected one of {', '.join(map(str, _DTYPES))}. Keep it "
                    "as a buffer of its module, or outside the model"
                )
        super().__init__(model, optimizer)


def _keeps_main_weights(optimizer: object) -> bool:
    """Whether an optimizer is a `MixedPrecisionOptimizer` (megatron/optimizer/optimizer.py)."""
    return any(base.__name__ == "MixedPrecisionOptimizer" for base in type(optimizer).__mro__)
