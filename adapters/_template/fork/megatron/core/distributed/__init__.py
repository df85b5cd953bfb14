"""Data parallelism of the stand-in: one flat fp32 gradient buffer, reduced at the end of a step."""

from __future__ import annotations

from typing import Any

import torch


class FlatDataParallel(torch.nn.Module):
    """Gradients accumulate in one flat buffer, of which each trained parameter's `main_grad` is a view.

    Args:
        module: What is trained, with its parameters on one device.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        trained = [p for p in module.parameters() if p.requires_grad]
        self.flat_grads = torch.zeros(sum(p.numel() for p in trained), device=trained[0].device)
        start = 0
        for parameter in trained:
            grad: Any = self.flat_grads[start : start + parameter.numel()].view(parameter.shape)
            parameter.main_grad = grad  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_add_to_main_grad)
            start += parameter.numel()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module(*args, **kwargs)

    def zero_grads(self) -> None:
        """Clear the buffer."""
        self.flat_grads.zero_()

    def reduce_grads(self) -> None:
        """Average over all ranks."""
        torch.distributed.all_reduce(self.flat_grads)
        self.flat_grads.div_(torch.distributed.get_world_size())


def _add_to_main_grad(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
