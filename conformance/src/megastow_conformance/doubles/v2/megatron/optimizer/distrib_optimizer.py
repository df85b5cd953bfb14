"""The distributed optimizer, whose gathering of parameters may overlap with the forward pass; see the package.

[Note: where new parameters are]
``step`` leaves this rank's part of the new parameters in the memory of the gradients. Without overlap it gathers them
and copies them to the model at once. With overlap only that memory has them, until a forward pass comes by: a hook on
every module of the process waits for the gather of the bucket that the module's parameters are in, starts the next one,
copies the parameters to the model and zeroes the gradients. The first gather starts in ``zero_grad``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from megastow_conformance.doubles.optimizers import Outcome
from megastow_conformance.doubles.sharded import Piece, ShardedOptimizer

ParamBufferView = tuple[int, torch.dtype, int, torch.Tensor, list[torch.Tensor]]
"""The number of a buffer, its dtype, the number of a bucket, where its parameters are gathered, each rank's part."""


class DistributedOptimizer(ShardedOptimizer):
    """Each rank steps on its own part of each bucket.

    Args:
        optimizer: The inner optimizer, over whole parameters; it steps on slices from now on.
        args: The arguments of the process.
        per_model_grad_buffers: The gradient buffers of each chunk, by its number.

    Attributes:
        grad_buffers: The gradient buffers of all chunks.
        gbuf_ranges: What of a buffer this rank owns: of each buffer by dtype, for each bucket.
        model_param_gbuf_map: Buffer, dtype and bucket of each parameter of which this rank owns something.
        param_buffers: Where parameters are gathered, in the memory of the gradients: of each buffer, for each bucket.
        pbuf_view_items: The same in the order of gathering: of each chunk, the last bucket first.
        all_gather_handles: The gathers that are under way, in that order.
        param_buffer_copied: Whether the model has the new parameters, in that order.
        update_successful: Whether the last step was applied, so that there are new parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        args: Namespace,
        per_model_grad_buffers: Mapping[int, Sequence[Any]],
    ) -> None:
        self.per_model_grad_buffers = per_model_grad_buffers
        self.grad_buffers: list[Any] = [buffer for buffers in per_model_grad_buffers.values() for buffer in buffers]
        owners = [model for model, buffers in per_model_grad_buffers.items() for _ in buffers]
        self.gbuf_idx_to_model_idx_map = dict(enumerate(owners))
        pieces = [
            [_piece(buffer, number, args.params_dtype) for number in range(len(buffer.buckets))]
            for buffer in self.grad_buffers
        ]
        super().__init__(optimizer, args, (), [piece for of_buffer in pieces for piece in of_buffer])
        self.gbuf_ranges = [
            {buffer.dtype: [piece.facts() for piece in of_buffer]}
            for buffer, of_buffer in zip(self.grad_buffers, pieces, strict=True)
        ]
        self.model_param_gbuf_map = {
            param: (index, self.grad_buffers[index].dtype, number)
            for index, of_buffer in enumerate(pieces)
            for number, piece in enumerate(of_buffer)
            for param in piece.param_map
        }
        self.param_buffers = [[piece.params for piece in of_buffer] for of_buffer in pieces]
        self._in_order = [piece for of_buffer in pieces for piece in reversed(of_buffer)]
        self.pbuf_view_items: list[ParamBufferView] = [
            (index, self.grad_buffers[index].dtype, number, piece.params, piece.shards(piece.params))
            for index, of_buffer in enumerate(pieces)
            for number, piece in reversed(list(enumerate(of_buffer)))
        ]
        self.num_all_gather_handles = len(self._in_order)
        self.all_gather_handle_index_to_bucket_index_map = [item[:3] for item in self.pbuf_view_items]
        self.model_index_to_all_gather_handle_index_map: dict[int, list[int]] = {}
        for number, item in enumerate(self.pbuf_view_items):
            self.model_index_to_all_gather_handle_index_map.setdefault(owners[item[0]], []).append(number)
        self.param_to_all_gather_handle_index_map = {
            param: number for number, piece in enumerate(self._in_order) for param in piece.index_map
        }
        self.all_gather_handles: list[Any] = [None] * self.num_all_gather_handles
        self.param_buffer_copied = [False] * self.num_all_gather_handles
        self.update_successful = False
        self.overlap_param_gather: bool = args.overlap_param_gather
        self.remove_pre_hook_handle: Any = None
        if self.overlap_param_gather:
            self.enable_pre_hook()

    def enable_pre_hook(self) -> None:
        """Lets forward passes wait for their parameters: those of every module in the process."""
        self.remove_pre_hook_handle = torch.nn.modules.module.register_module_forward_pre_hook(
            self._make_forward_pre_hook()
        )

    def disable_pre_hook(self) -> None:
        """Gathers all new parameters now, and lets forward passes be."""
        self.remove_pre_hook_handle.remove()
        self.remove_pre_hook_handle = None
        self._reset_metadata_and_sync_gather_all_model_params(force_sync=True)

    def _make_forward_pre_hook(self) -> Callable[..., None]:
        def hook(module: torch.nn.Module, *unused: Any) -> None:
            for param in module.parameters(recurse=False):
                if param.requires_grad:
                    number = self.param_to_all_gather_handle_index_map.get(param)
                    assert number is not None, "a module is not among those that this optimizer gathers parameters for"
                    self._finish_param_sync_helper(number)

        return hook

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for all generations; with overlap, the first gather starts here."""
        super().zero_grad(set_to_none)
        if self.overlap_param_gather:
            self._dispatch_gather_model_params(0)

    @torch.no_grad()
    def step(self, args: Namespace, timers: Any) -> Outcome:
        """As for all generations; without overlap, the model has the new parameters then."""
        outcome = super().step(args, timers)
        self.update_successful = outcome[0]
        self._reset_metadata_and_sync_gather_all_model_params(force_sync=False)
        return outcome

    def finish_param_sync(self, model_index: int, *unused: Any) -> None:
        """Waits for the parameters of a chunk and copies them to it.

        As in core_v0.5.0, what was not gathered yet is copied as it is: this rank's part alone is new.
        """
        for number in self.model_index_to_all_gather_handle_index_map.get(model_index, ()):
            self._finish_param_sync_helper(number)

    def _reset_metadata_and_sync_gather_all_model_params(self, force_sync: bool) -> None:
        self.all_gather_handles = [None] * self.num_all_gather_handles
        self.param_buffer_copied = [False] * self.num_all_gather_handles
        if force_sync or not self.overlap_param_gather:
            for number in range(self.num_all_gather_handles):
                self._dispatch_gather_model_params(number, force_sync=force_sync)

    def _dispatch_gather_model_params(self, all_gather_handle_index: int, force_sync: bool = False) -> None:
        """Gathers the new parameters of a bucket, if there are any; copies them at once unless that overlaps."""
        async_op = self.overlap_param_gather and not force_sync
        if self.update_successful:
            self.all_gather_handles[all_gather_handle_index] = self._in_order[all_gather_handle_index].gather(
                async_op=async_op
            )
        if not async_op:
            self._copy_params_from_param_buffer(all_gather_handle_index)

    def _finish_param_sync_helper(self, all_gather_handle_index: int) -> None:
        handle = self.all_gather_handles[all_gather_handle_index]
        if handle is not None:
            handle.wait()
            self.all_gather_handles[all_gather_handle_index] = None
            if all_gather_handle_index + 1 < self.num_all_gather_handles:
                self._dispatch_gather_model_params(all_gather_handle_index + 1)
        if not self.param_buffer_copied[all_gather_handle_index]:
            self._copy_params_from_param_buffer(all_gather_handle_index)
            self.param_buffer_copied[all_gather_handle_index] = True

    @torch.no_grad()
    def _copy_params_from_param_buffer(self, all_gather_handle_index: int) -> None:
        """Copies the parameters of a bucket to the model, if they are new, and zeroes its gradients."""
        piece = self._in_order[all_gather_handle_index]
        if self.update_successful:
            piece.hand_out()
        piece.grads.zero_()


def _piece(buffer: Any, number: int, params_dtype: torch.dtype) -> Piece:
    """A bucket of a buffer."""
    bucket = buffer.buckets[number]
    places = {
        param: (start - bucket.offset, end - bucket.offset)
        for param, (start, end, of_bucket) in buffer.param_index_map.items()
        if of_bucket == number
    }
    return Piece(bucket.data, places, bucket.data_parallel_group, params_dtype)
