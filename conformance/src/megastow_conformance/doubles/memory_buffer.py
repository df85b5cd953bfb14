"""What the generations with ``MemoryBuffer`` do alike: Megatron-LM up to 23.08, and the Qwen-MoE fork; our own code.

Their gradients lie in one flat buffer for each dtype (and buffer type), and their training loop asks the optimizer to
reduce gradients before a step and to gather parameters after it. Mirrors megatron/model/distributed.py and
megatron/optimizer/ of Megatron-LM 23.08.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch

from megastow_conformance.doubles.process import current_device
from megastow_conformance.doubles.sharded import ShardedOptimizer
from megastow_conformance.doubles.wrapper import IndexMap, Wrapper, lay_out


class MemoryBuffer:
    """A flat buffer, with room at the end so that it can be shared out evenly.

    Args:
        numel: The elements that are used.
        numel_padded: The elements that there are.
        dtype: Their dtype.
    """

    def __init__(self, numel: int, numel_padded: int, dtype: torch.dtype) -> None:
        self.numel = numel
        self.numel_padded = numel_padded
        self.dtype = dtype
        self.data = torch.zeros(numel_padded, dtype=dtype, device=current_device())

    def zero(self) -> None:
        """Zeroes everything."""
        self.data.zero_()

    def get(self, shape: torch.Size, start_index: int) -> torch.Tensor:
        """A view of a shape, from an element on."""
        return self.data[start_index : start_index + shape.numel()].view(shape)


class MemoryBufferWrapper(Wrapper):
    """Adds gradients up in ``MemoryBuffer``s, which a generation makes with ``allocate``.

    Args:
        module: What is wrapped.
        accumulate_allreduce_grads_in_fp32: fp32 gradients; otherwise they have the parameters' dtypes.
        use_contiguous_buffers: Must be true: a double has no gradients outside buffers.

    Raises:
        ValueError: If there are to be no buffers.
    """

    def __init__(
        self, module: torch.nn.Module, accumulate_allreduce_grads_in_fp32: bool, use_contiguous_buffers: bool
    ) -> None:
        super().__init__(module)
        if not use_contiguous_buffers:
            raise ValueError("use_contiguous_buffers is false; a double always has gradient buffers")
        self.accumulate_allreduce_grads_in_fp32 = accumulate_allreduce_grads_in_fp32
        self.use_contiguous_buffers = use_contiguous_buffers

    def allocate(
        self, params: Iterable[torch.nn.Parameter], ranks: int
    ) -> tuple[dict[torch.dtype, MemoryBuffer], dict[torch.dtype, IndexMap]]:
        """Makes a buffer for each dtype of gradients, and each parameter's ``main_grad`` a view into its buffer.

        Args:
            params: The parameters, in the order in which the module has them.
            ranks: Over how many ranks the buffers are to be shared out.

        Returns:
            The buffers, and where in them each parameter's gradient lies.
        """
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for param in params:
            by_dtype.setdefault(torch.float32 if self.accumulate_allreduce_grads_in_fp32 else param.dtype, []).append(
                param
            )
        index_maps = {dtype: lay_out(of_dtype) for dtype, of_dtype in by_dtype.items()}
        buffers = {}
        for dtype, places in index_maps.items():
            numel = sum(param.numel() for param in places)
            buffers[dtype] = MemoryBuffer(numel, -(-numel // ranks) * ranks, dtype)
            for param, (start, _) in places.items():
                param.main_grad = buffers[dtype].get(param.shape, start)  # type: ignore[attr-defined]
        return buffers, index_maps


class ReducesWhole:
    """What the training loop calls around the step of an optimizer that is not distributed; mixed into one.

    Attributes:
        models: The DDP chunks.
    """

    models: list[Any]

    def reduce_model_grads(self, args: Namespace, timers: Any) -> None:
        """Averages the gradients over the ranks that have the same parameters."""
        for model in self.models:
            model.allreduce_gradients()

    def gather_model_params(self, args: Namespace, timers: Any) -> None:
        """Nothing: every rank has stepped on everything."""


class ReducesShards(ShardedOptimizer):
    """What the training loop calls around the step of the distributed optimizer."""

    def reduce_model_grads(self, args: Namespace, timers: Any) -> None:
        """Averages the gradients; each rank has only its own part then."""
        for piece in self._pieces:
            piece.reduce()

    def gather_model_params(self, args: Namespace, timers: Any) -> None:
        """Collects what ``step`` has left in the memory of the gradients, and copies it to the model."""
        for piece in self._pieces:
            piece.gather()
        for piece in self._pieces:
            piece.hand_out()
