"""The data-parallel wrapper over ``GradBuffer``s; see the package's docstring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megastow_conformance.doubles.optimizers import is_expert
from megastow_conformance.doubles.process import current_device
from megastow_conformance.doubles.wrapper import Wrapper
from megatron.core.distributed.grad_buffer import GradBuffer

_dist: Any = torch.distributed  # it declares no exports


class DistributedDataParallel(Wrapper):
    """Adds gradients up in one buffer of buckets for each dtype; those of experts have tensors of their own.

    Args:
        config: The configuration of the module.
        module: What is wrapped.
        data_parallel_group: The ranks that dense gradients are reduced over.
        accumulate_allreduce_grads_in_fp32: fp32 gradients; otherwise they have the parameters' dtypes.
        overlap_grad_reduce: Whether buckets are reduced beside the backward pass.
        use_distributed_optimizer: Whether each rank needs only its own part of the reduced gradients.
        disable_bucketing: One bucket a buffer.
        bucket_size: The elements that make a bucket full.
    """

    def __init__(
        self,
        config: Any,
        module: torch.nn.Module,
        data_parallel_group: Any,
        accumulate_allreduce_grads_in_fp32: bool,
        overlap_grad_reduce: bool,
        use_distributed_optimizer: bool,
        disable_bucketing: bool = False,
        bucket_size: int | None = 40000000,
    ) -> None:
        super().__init__(module, config)
        self.overlap_grad_reduce = overlap_grad_reduce
        self.use_distributed_optimizer = use_distributed_optimizer
        self.bucket_size = bucket_size if overlap_grad_reduce and not disable_bucketing else None
        self.data_parallel_world_size: int = _dist.get_world_size(data_parallel_group)
        self.expert_grads: list[torch.Tensor] = []
        by_dtype: dict[torch.dtype, list[Any]] = {}
        names: dict[Any, str] = {}
        for name, param in self.trained():
            names[param] = name
            dtype = torch.float32 if accumulate_allreduce_grads_in_fp32 else param.dtype
            if is_expert(param):
                grad = torch.zeros(param.shape, dtype=dtype, device=current_device())
                param.main_grad = grad  # type: ignore[attr-defined]
                self.expert_grads.append(grad)
            else:
                by_dtype.setdefault(dtype, []).append(param)
        self.grad_buffers = {
            dtype: GradBuffer(
                dtype,
                params,
                data_parallel_group,
                self.bucket_size,
                names,
                overlap_grad_reduce,
                use_distributed_optimizer,
            )
            for dtype, params in by_dtype.items()
        }
        self.grad_buffer_param_index_map = {
            dtype: buffer.param_index_map for dtype, buffer in self.grad_buffers.items()
        }
        self.param_to_grad_buffer = {
            param: buffer for buffer in self.grad_buffers.values() for param in buffer.param_index_map
        }
        self._start_step()
        self._hook_parameters()

    def _start_step(self) -> None:
        for _, param in self.trained():
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def _make_param_hook(self, param: Any) -> Callable[..., None]:
        add_up = super()._make_param_hook(param)

        def hook(*unused: Any) -> None:
            add_up()
            if self.overlap_grad_reduce:
                self.param_to_grad_buffer[param].register_grad_ready(param)

        return hook

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """A block in which gradients are not complete yet."""
        for buffer in self.grad_buffers.values():
            buffer.is_last_microbatch = False
        try:
            yield
        finally:
            for buffer in self.grad_buffers.values():
                buffer.is_last_microbatch = True

    def start_grad_sync(self, *unused: Any) -> None:
        """Starts the reduction of all gradients but those of experts."""
        for buffer in self.grad_buffers.values():
            buffer.start_grad_sync()

    def finish_grad_sync(self) -> None:
        """Waits for the reduction or makes it; of experts, it only divides the gradients."""
        for buffer in self.grad_buffers.values():
            buffer.finish_grad_sync()
        for grad in self.expert_grads:
            grad.div_(self.data_parallel_world_size)

    def zero_grad_buffer(self, zero_buffer: bool) -> None:
        """The start of a step; zeroes the buffers only if asked, since the distributed optimizer does it itself."""
        self._start_step()
        for buffer in self.grad_buffers.values():
            buffer.reset(zero_buffer)
        for grad in self.expert_grads:
            grad.zero_()
