"""The data-parallel wrapper with gradient buffers by type and dtype; see the package's docstring."""

from __future__ import annotations

import enum
from typing import Any

import torch

from megastow_conformance.doubles.memory_buffer import MemoryBuffer, MemoryBufferWrapper
from megatron.core import mpu

__all__ = ["DistributedDataParallel", "MemoryBuffer", "ParamBufferType", "get_param_buffer_type", "reduction_group"]

_dist: Any = torch.distributed  # it declares no exports


class ParamBufferType(enum.Enum):
    """What decides over which ranks a gradient is reduced."""

    allreduce = "allreduce"
    """A parameter that all data-parallel ranks have."""
    moe = "moe"
    """A parameter of an expert, which only some ranks have."""


def get_param_buffer_type(param: torch.Tensor) -> ParamBufferType:
    """The type of a parameter; one that is not marked counts as ``allreduce``."""
    return ParamBufferType.allreduce if getattr(param, "allreduce", True) else ParamBufferType.moe


def reduction_group(buffer_type: ParamBufferType) -> Any:
    """The ranks that gradients of a type are reduced over."""
    if buffer_type is ParamBufferType.moe:
        return mpu.get_expert_data_parallel_group()
    return mpu.get_data_parallel_group()


class DistributedDataParallel(MemoryBufferWrapper):
    """Adds gradients up in one buffer for each type and dtype; see the base for the arguments."""

    def __init__(
        self, module: torch.nn.Module, accumulate_allreduce_grads_in_fp32: bool, use_contiguous_buffers: bool
    ) -> None:
        super().__init__(module, accumulate_allreduce_grads_in_fp32, use_contiguous_buffers)
        self._grad_buffers = {}
        self._grad_buffer_param_index_map = {}
        for buffer_type in ParamBufferType:
            params = [param for _, param in self.trained() if get_param_buffer_type(param) is buffer_type]
            self._grad_buffers[buffer_type], self._grad_buffer_param_index_map[buffer_type] = self.allocate(
                params, _dist.get_world_size(reduction_group(buffer_type))
            )
        self._start_step()
        self._hook_parameters()

    def _start_step(self) -> None:
        for _, param in self.trained():
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def zero_grad_buffer(self) -> None:
        """Zeroes the gradients, at the start of a step."""
        self._start_step()
        for of_type in self._grad_buffers.values():
            for buffer in of_type.values():
                buffer.zero()

    def allreduce_gradients(self) -> None:
        """Averages the gradients of the ranks that have the same parameters.

        Those of experts, too, are divided by the number of all data-parallel ranks: each has seen its part of the data.
        """
        for buffer_type, of_type in self._grad_buffers.items():
            for buffer in of_type.values():
                buffer.data /= mpu.get_data_parallel_world_size()
                _dist.all_reduce(buffer.data, group=reduction_group(buffer_type))
