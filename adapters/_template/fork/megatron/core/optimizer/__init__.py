"""The optimizer of the stand-in: Adam on fp32 copies of the weights."""

from __future__ import annotations

from typing import Any

import torch


class FlatOptimizer:
    """Steps on fp32 main weights, and casts them to the weights.

    Args:
        model: The `FlatDataParallel` chunks.
        lr: The learning rate.
    """

    def __init__(self, model: list[Any], lr: float) -> None:
        self._trained = [p for chunk in model for p in chunk.parameters() if p.requires_grad]
        self.fp32_from_float16_groups = [[p.detach().clone().float() for p in self._trained]]
        self.optimizer = torch.optim.AdamW(self.fp32_from_float16_groups[0], lr=lr, foreach=False)

    def step(self) -> tuple[bool, float, None]:
        """One step; returns whether it was applied, the gradient norm, and nothing for a count that is not made."""
        norms = []
        for parameter, main in zip(self._trained, self.fp32_from_float16_groups[0], strict=True):
            main.grad = parameter.main_grad
            norms.append(parameter.main_grad.norm())
        self.optimizer.step()
        for parameter, main in zip(self._trained, self.fp32_from_float16_groups[0], strict=True):
            parameter.data.copy_(main)
        return True, float(torch.stack(norms).norm()), None

    def zero_grad(self) -> None:
        """Let go of the buffer's views."""
        self.optimizer.zero_grad(set_to_none=True)

    def reload_model_params(self) -> None:
        """Take the weights over into the main weights."""
        for parameter, main in zip(self._trained, self.fp32_from_float16_groups[0], strict=True):
            main.copy_(parameter.detach())

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """No scaling."""
        return loss

    def get_loss_scale(self) -> float:
        """No scaling."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Moments and main weights."""
        return {"inner": self.optimizer.state_dict(), "main": self.fp32_from_float16_groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.optimizer.load_state_dict(state["inner"])
        for main, saved in zip(self.fp32_from_float16_groups[0], state["main"][0], strict=True):
            main.copy_(saved)
