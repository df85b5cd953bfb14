"""One trainer of Megatron-LM v2.6 to megatron-core 0.5: its gradient buffers, and what lies in them besides gradients.

Nothing here imports Megatron: the instances are there already.

[Note: parameters in gradient memory]
The distributed optimizer of these generations has no memory to gather parameters in: its `param_buffers` are views on
the storage of the gradients. A step writes this rank's new parameters there, the gather adds those of the other ranks,
and from there they are copied into the model. In between, that storage holds the only copy of what the step has done to
the model, and must be copied out rather than dropped, whatever the caller says about gradients.

* Without overlapped communication, step, gather and copy follow each other in one call of the training loop (two calls
  up to October 2023: `step`, then `gather_model_params`). What is left in the storage is worth nothing. Between those
  two calls nothing on the instances tells that it still is worth something: whoever moves there must keep gradients.
* With `overlap_param_gather` (megatron-core 0.4 and 0.5) the copy waits for the next forward pass: for each bucket, a
  hook waits for the gather, copies, and notes that in `param_buffer_copied`. A move between two steps is the ordinary
  case. So a storage is copied out for as long as a bucket on it is not noted after a successful step, and the calls
  that would finish the job are guarded like any use of gradients.

The distributed optimizer also relies on finding the storage zeroed where no parameters lie in it: training loops call
`zero_grad_buffer(zero_buffer=False)`. The engine brings back zeros, or what was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from megastow.guard import CallTable, GuardedCalls, call_table
from megastow.megatron_binding import FlatGradientsBinding
from megastow.megatron_parts import launched_by_buckets, leaves, wait_until_idle
from megastow.state import StateKind

W, G = StateKind.WEIGHTS, StateKind.GRAD_BUFFERS


# Methods by what they read or write, of core/distributed.py (October 2023), and of core/distributed/ from 0.4 on; a
# name that a version does not have is passed over.
_CHUNK_CALLS = call_table(((G,), "start_grad_sync finish_grad_sync grad_sync sync_gradients"))
_BUFFER_CALLS = call_table(
    ((G,), "zero reset start_grad_sync finish_grad_sync register_grad_ready grad_sync done mark_grad_as_done")
)
_BUCKET_CALLS = call_table(((G,), "start_grad_sync finish_grad_sync register_grad_ready communicate done set"))
_GATHER_CALLS = call_table(((W, G), "finish_param_sync disable_pre_hook _finish_param_sync_helper"))


class GradBufferBinding(FlatGradientsBinding):
    """`GradBuffer`, October 2023 to March 2024: gradients in buckets, whose communication may overlap.

    Mirrors megatron/core/distributed/{distributed_data_parallel,grad_buffer}.py and the optimizers beside it, which
    moved from megatron/optimizer/ to megatron/core/optimizer/ in February 2024. Gradients of experts have storages of
    their own (`expert_grads`) until then, and buffers of their own after.
    """

    chunk_calls: ClassVar[CallTable] = {**FlatGradientsBinding.chunk_calls, **_CHUNK_CALLS}
    buffer_attributes = ("grad_buffers", "expert_parallel_grad_buffers", "expert_grads")
    flat_calls = _BUFFER_CALLS

    @property
    def facts(self) -> Mapping[str, object]:
        """As for all generations, but a chunk of this one knows itself which optimizer it is for."""
        is_distributed = all(chunk.use_distributed_optimizer for chunk in self._model)
        return {**super().facts, "use_distributed_optimizer": is_distributed}

    def staged_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buckets whose new parameters no forward pass has copied out yet; see the note above.

        In 0.4, `param_buffer_copied` is empty after a step and grows with each gather that is launched; in 0.5 it has
        an entry for each from the start.
        """
        for number, leaf in self._gathering():
            if leaf.update_successful:
                is_copied = leaf.param_buffer_copied
                for index, (_buffer, _dtype, _bucket, view, _shards) in enumerate(leaf.pbuf_view_items):
                    if index >= len(is_copied) or not is_copied[index]:
                        yield f"optimizer[{number}].pbuf_view_items[{index}]", view

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """Wait until no collective reads or writes the buffers; why that is all: see `launched_by_buckets`.

        Raises:
            TransferError: a collective did not end.
        """
        wait_until_idle(launched_by_buckets(self.buffers(), self._optimizer))

    def buffer_calls(self) -> Iterator[GuardedCalls]:
        """Buffers and buckets, which autograd hooks reach past the chunk; and forward hooks with parameters to copy."""
        yield from super().buffer_calls()
        for _, buffer in self.buffers():
            for bucket in getattr(buffer, "buckets", ()):
                yield GuardedCalls(bucket, _BUCKET_CALLS)
        if any(True for _ in self.staged_gradients()):
            for optimizer in (self._optimizer, *(leaf for _, leaf in self._gathering())):
                yield GuardedCalls(optimizer, _GATHER_CALLS)

    def _gathering(self) -> Iterator[tuple[int, Any]]:
        """The optimizers that gather parameters during the next forward pass, with their numbers."""
        for number, leaf in enumerate(leaves(self._optimizer)):
            if getattr(leaf, "overlap_param_gather", False):
                yield number, leaf
