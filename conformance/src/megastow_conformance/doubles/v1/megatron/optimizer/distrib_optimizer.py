"""The distributed optimizer; see the package's docstring."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from megastow_conformance.doubles.memory_buffer import ReducesShards
from megastow_conformance.doubles.sharded import Piece
from megatron.core import mpu


class DistributedOptimizer(ReducesShards):
    """Each rank steps on its own part of each gradient buffer.

    Attributes:
        model_gbuf_ranges: What of the gradient buffers this rank owns, by chunk and dtype.
        model_param_gbuf_map: The chunk and dtype of each parameter of which this rank owns something.
        param_buffers: Where parameters are gathered, in the memory of the gradients, by chunk and dtype.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, args: Namespace, models: Sequence[Any]) -> None:
        pieces: list[dict[torch.dtype, Piece]] = [
            {
                dtype: Piece(
                    buffer.data,
                    model._grad_buffer_param_index_map[dtype],
                    mpu.get_data_parallel_group(),
                    args.params_dtype,
                )
                for dtype, buffer in model._grad_buffers.items()
            }
            for model in models
        ]
        super().__init__(optimizer, args, models, [piece for chunk in pieces for piece in chunk.values()])
        self.model_gbuf_ranges = [{dtype: piece.facts() for dtype, piece in chunk.items()} for chunk in pieces]
        self.model_param_gbuf_map = {
            param: (index, dtype)
            for index, chunk in enumerate(pieces)
            for dtype, piece in chunk.items()
            for param in piece.param_map
        }
        self.param_buffers = [{dtype: piece.params for dtype, piece in chunk.items()} for chunk in pieces]
