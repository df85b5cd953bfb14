"""The data-parallel wrapper with one gradient buffer for each dtype; see the package's docstring."""

from __future__ import annotations

from typing import Any

import torch

from megastow_conformance.doubles.memory_buffer import MemoryBuffer, MemoryBufferWrapper
from megatron.core import mpu

__all__ = ["DistributedDataParallel", "MemoryBuffer"]

_dist: Any = torch.distributed  # it declares no exports


class DistributedDataParallel(MemoryBufferWrapper):
    """Adds gradients up in one buffer for each dtype; see the base for the arguments."""

    def __init__(
        self, module: torch.nn.Module, accumulate_allreduce_grads_in_fp32: bool, use_contiguous_buffers: bool
    ) -> None:
        super().__init__(module, accumulate_allreduce_grads_in_fp32, use_contiguous_buffers)
        params = [param for _, param in self.trained()]
        self._grad_buffers, self._grad_buffer_param_index_map = self.allocate(
            params, mpu.get_data_parallel_world_size()
        )
        self._hook_parameters()

    def zero_grad_buffer(self) -> None:
        """Zeroes the gradients."""
        for buffer in self._grad_buffers.values():
            buffer.zero()

    def allreduce_gradients(self) -> None:
        """Averages the gradients of all ranks."""
        for buffer in self._grad_buffers.values():
            buffer.data /= mpu.get_data_parallel_world_size()
            _dist.all_reduce(buffer.data, group=mpu.get_data_parallel_group())
