"""The optimizers that are not distributed, and the chain; see the package's docstring."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from megastow_conformance.doubles import optimizers
from megastow_conformance.doubles.optimizers import MegatronOptimizer, MixedPrecisionOptimizer, Outcome

__all__ = [
    "ChainedOptimizer",
    "FP32Optimizer",
    "Float16OptimizerWithFloat16Params",
    "MegatronOptimizer",
    "MixedPrecisionOptimizer",
]


class Float16OptimizerWithFloat16Params(optimizers.Float16OptimizerWithFloat16Params):
    """fp16 or bf16 parameters, and fp32 copies of all of them on every rank."""


class FP32Optimizer(optimizers.FP32Optimizer):
    """fp32 parameters, which are stepped on directly."""


class ChainedOptimizer:
    """An optimizer over dense parameters and one over those of experts, one after the other.

    Args:
        chained_optimizers: The optimizers.
    """

    def __init__(self, chained_optimizers: Sequence[MegatronOptimizer]) -> None:
        self.chained_optimizers: list[Any] = list(chained_optimizers)
        self.param_groups = [group for optimizer in self.chained_optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Each optimizer's."""
        for optimizer in self.chained_optimizers:
            optimizer.zero_grad(set_to_none)

    def get_loss_scale(self) -> torch.Tensor:
        """The first optimizer's."""
        return self.chained_optimizers[0].get_loss_scale()  # type: ignore[no-any-return]

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss, multiplied by the loss scale."""
        return self.get_loss_scale() * loss

    def reload_model_params(self) -> None:
        """Each optimizer's."""
        for optimizer in self.chained_optimizers:
            optimizer.reload_model_params()

    def state_dict(self) -> list[Any]:
        """Each optimizer's."""
        return [optimizer.state_dict() for optimizer in self.chained_optimizers]

    def load_state_dict(self, state_dict: list[Any]) -> None:
        """Each optimizer's."""
        for optimizer, state in zip(self.chained_optimizers, state_dict, strict=True):
            optimizer.load_state_dict(state)

    def step(self, args: Namespace, timers: Any) -> Outcome:
        """Each optimizer's, whatever becomes of the others; the norm is that of all."""
        outcomes = [optimizer.step(args, timers) for optimizer in self.chained_optimizers]
        norm = math.sqrt(sum((norm or 0.0) ** 2 for _, norm, _ in outcomes))
        return all(updated for updated, _, _ in outcomes), norm, None

    def finish_param_sync(self, model_index: int) -> None:
        """Each distributed optimizer's."""
        for optimizer in self.chained_optimizers:
            if hasattr(optimizer, "finish_param_sync"):
                optimizer.finish_param_sync(model_index)
