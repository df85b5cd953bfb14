"""Loss scales and the clipping of gradients, as the generations before megatron-core 0.6 have them; our own code.

Mirrors megatron/optimizer/{grad_scaler,clip_grads}.py of Megatron-LM 23.08.
"""

from __future__ import annotations

import abc
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from megastow_conformance.doubles.process import current_device

_dist: Any = torch.distributed  # it declares no exports


class MegatronGradScaler(abc.ABC):
    """A loss scale, on the device."""

    def __init__(self, initial_scale: float) -> None:
        self._scale = torch.full((1,), float(initial_scale), device=current_device())

    @property
    def scale(self) -> torch.Tensor:
        """What losses are multiplied by."""
        return self._scale

    @property
    def inv_scale(self) -> torch.Tensor:
        """What gradients are multiplied by."""
        return self._scale.double().reciprocal().float()

    @abc.abstractmethod
    def update(self, found_inf: bool) -> None:
        """Takes note of whether a step's gradients were finite."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""

    @abc.abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` gave."""


class ConstantGradScaler(MegatronGradScaler):
    """A loss scale that stays what it is."""

    def update(self, found_inf: bool) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""


class DynamicGradScaler(MegatronGradScaler):
    """A loss scale that falls after overflows and grows after enough steps without."""

    def __init__(
        self, initial_scale: float, min_scale: float, factor: float, growth_interval: int, hysteresis: int
    ) -> None:
        super().__init__(initial_scale)
        self.min_scale = min_scale
        self.factor = factor
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self._growth_tracker = 0
        self._hysteresis_tracker = hysteresis

    def update(self, found_inf: bool) -> None:
        """Falls when overflows have used up the hysteresis; grows, and restores it, after an interval without."""
        if found_inf:
            self._growth_tracker = 0
            self._hysteresis_tracker -= 1
            if self._hysteresis_tracker <= 0:
                self._scale = (self._scale / self.factor).clamp(min=self.min_scale)
            return
        self._growth_tracker += 1
        if self._growth_tracker == self.growth_interval:
            self._growth_tracker = 0
            self._hysteresis_tracker = self.hysteresis
            self._scale = self._scale * self.factor

    def state_dict(self) -> dict[str, Any]:
        """The scale and how close it is to a change."""
        return {
            "scale": self._scale,
            "growth_tracker": self._growth_tracker,
            "hysteresis_tracker": self._hysteresis_tracker,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` gave."""
        self._scale = state_dict["scale"].to(current_device(), copy=True)
        self._growth_tracker = state_dict["growth_tracker"]
        self._hysteresis_tracker = state_dict["hysteresis_tracker"]


def grad_scaler(args: Namespace) -> MegatronGradScaler | None:
    """The scaler that the arguments ask for: constant, dynamic with fp16, or none."""
    if args.loss_scale:
        return ConstantGradScaler(args.loss_scale)
    if args.fp16:
        return DynamicGradScaler(
            args.initial_loss_scale, args.min_loss_scale, 2.0, args.loss_scale_window, args.hysteresis
        )
    return None


def clip_by_global_norm(
    grads: Sequence[torch.Tensor], counted: Sequence[torch.Tensor], max_norm: float, group: Any
) -> float:
    """Scales gradients down to a norm.

    Args:
        grads: fp32, scaled in place.
        counted: Those that make up the norm on this rank.
        max_norm: The largest norm that stays as it is.
        group: The ranks whose gradients make up the norm together; None for all.

    Returns:
        The L2 norm before.
    """
    norms = [grad.norm() for grad in counted] or [torch.zeros((), device=current_device())]
    square = torch.stack(norms).norm() ** 2
    _dist.all_reduce(square, group=group)
    norm: float = square.item() ** 0.5
    coefficient = max_norm / (norm + 1e-6)
    if coefficient < 1.0:
        for grad in grads:
            grad.mul_(coefficient)
    return norm
