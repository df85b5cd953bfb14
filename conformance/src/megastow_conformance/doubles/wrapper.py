"""What every generation's ``DistributedDataParallel`` does alike: pass calls on, and collect gradients by hooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from megastow_conformance.doubles.process import get_data_parallel_group, get_data_parallel_src_rank

_dist: Any = torch.distributed  # it declares no exports


class Wrapper(torch.nn.Module):
    """A wrapper around a module whose gradients are added up in ``main_grad``, outside autograd's own ``grad``.

    A generation makes the buffers, points each parameter's ``main_grad`` into them, and calls ``_hook_parameters``.

    Args:
        module: What is wrapped.
        config: The configuration of the module, in generations that have one.
    """

    def __init__(self, module: torch.nn.Module, config: Any = None) -> None:
        super().__init__()
        self.config = config
        self.module = module
        self.grad_accs: list[Any] = []

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self.module(*inputs, **kwargs)

    def trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Name and parameter of all that is trained."""
        return ((name, param) for name, param in self.module.named_parameters() if param.requires_grad)

    def _hook_parameters(self) -> None:
        """Hooks the nodes of the autograd graph that accumulate gradients.

        torch makes such a node when it is first asked for and forgets it when nobody holds it, and its hooks with it.
        """
        for _, param in self.trained():
            node: Any = param.expand_as(param).grad_fn
            accumulator = node.next_functions[0][0]
            accumulator.register_hook(self._make_param_hook(param))
            self.grad_accs.append(accumulator)

    def _make_param_hook(self, param: Any) -> Callable[..., None]:
        def hook(*unused: Any) -> None:
            if param.grad is not None and not getattr(param, "grad_added_to_main_grad", False):
                param.main_grad.add_(param.grad.detach())
            param.grad = None

        return hook

    def broadcast_params(self) -> None:
        """Gives every rank the parameters of the first."""
        for param in self.module.parameters():
            _dist.broadcast(param.data, src=get_data_parallel_src_rank(), group=get_data_parallel_group())

    def state_dict(  # type: ignore[override]
        self, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The module's state, without a trace of the wrapper in its names."""
        return self.module.state_dict(prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what ``state_dict`` gave."""
        return self.module.load_state_dict(state_dict, strict=strict)


IndexMap = dict[torch.nn.Parameter, tuple[int, int]]
"""Start and end of each parameter's gradient in a flat buffer."""


def lay_out(params: list[torch.nn.Parameter]) -> IndexMap:
    """Where gradients lie in a buffer: that of the last parameter first, as backward passes reach them.

    Args:
        params: The parameters, in whose order the result is.
    """
    ends = list(itertools.accumulate(param.numel() for param in reversed(params)))[::-1]
    return {param: (end - param.numel(), end) for param, end in zip(params, ends, strict=True)}
