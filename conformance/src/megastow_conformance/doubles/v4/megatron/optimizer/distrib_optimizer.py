"""The distributed optimizer; see the package's docstring."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from megastow_conformance.doubles.memory_buffer import ReducesShards
from megastow_conformance.doubles.sharded import Piece
from megatron.model.distributed import ParamBufferType, reduction_group


class DistributedOptimizer(ReducesShards):
    """Each rank steps on its own part of each gradient buffer, the parts being those of the buffer type's group.

    Attributes:
        model_gbuf_ranges: What of the gradient buffers this rank owns, by chunk, buffer type and dtype.
        model_param_gbuf_map: By buffer type, chunk and dtype of each parameter of which this rank owns something.
        param_buffers: Where parameters are gathered, in the memory of the gradients, by buffer type, chunk and dtype.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, args: Namespace, models: Sequence[Any]) -> None:
        pieces: list[dict[ParamBufferType, dict[torch.dtype, Piece]]] = [
            {
                buffer_type: {
                    dtype: Piece(
                        buffer.data,
                        model._grad_buffer_param_index_map[buffer_type][dtype],
                        reduction_group(buffer_type),
                        args.params_dtype,
                    )
                    for dtype, buffer in of_type.items()
                }
                for buffer_type, of_type in model._grad_buffers.items()
            }
            for model in models
        ]
        every_piece = [piece for chunk in pieces for of_type in chunk.values() for piece in of_type.values()]
        super().__init__(optimizer, args, models, every_piece)
        self.model_gbuf_ranges = [
            {
                buffer_type: {dtype: piece.facts() for dtype, piece in of_type.items()}
                for buffer_type, of_type in chunk.items()
            }
            for chunk in pieces
        ]
        self.model_param_gbuf_map = {
            buffer_type: {
                param: (index, dtype)
                for index, chunk in enumerate(pieces)
                for dtype, piece in chunk[buffer_type].items()
                for param in piece.param_map
            }
            for buffer_type in ParamBufferType
        }
        self.param_buffers = {
            buffer_type: [{dtype: piece.params for dtype, piece in chunk[buffer_type].items()} for chunk in pieces]
            for buffer_type in ParamBufferType
        }
