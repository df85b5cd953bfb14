"""A flat gradient buffer in buckets, each of which is reduced as soon as it is full; see the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megastow_conformance.doubles.process import current_device

_dist: Any = torch.distributed  # it declares no exports


class Bucket:
    """Gradients that are reduced together.

    Args:
        params: The parameters that they are of.
        data: The gradients, with room at the end.
        offset: Where they begin in their buffer.
        numel_unpadded: The elements that are used.
        data_parallel_group: The ranks that they are reduced over.
        overlap_grad_reduce: Whether the reduction goes on beside the backward pass.
        use_distributed_optimizer: Whether each rank needs only its own part of the outcome.

    Attributes:
        communication_handle: The reduction, from its start until the next ``reset``.
    """

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        data: torch.Tensor,
        offset: int,
        numel_unpadded: int,
        data_parallel_group: Any,
        *,
        overlap_grad_reduce: bool,
        use_distributed_optimizer: bool,
    ) -> None:
        self.params_list = list(params)
        self.params = set(params)
        self.params_with_grad: set[torch.nn.Parameter] = set()
        self.data = data
        self.offset = offset
        self.numel_unpadded = numel_unpadded
        self.data_parallel_group = data_parallel_group
        self.data_parallel_world_size: int = _dist.get_world_size(data_parallel_group)
        self.data_parallel_rank: int = _dist.get_rank(data_parallel_group)
        self.overlap_grad_reduce = overlap_grad_reduce
        self.use_distributed_optimizer = use_distributed_optimizer
        self.communication_handle: Any = None
        self.communication_issued = False

    def reset(self) -> None:
        """Forgets what the last step has done."""
        self.params_with_grad = set()
        self.communication_handle = None
        self.communication_issued = False

    def start_grad_sync(self) -> None:
        """Averages the gradients of all ranks, beside other work if communication overlaps."""
        if self.communication_issued:
            raise RuntimeError("the gradients of this bucket are reduced already; zero_grad_buffer was not called")
        self.data /= self.data_parallel_world_size
        if self.use_distributed_optimizer:
            own = self.data.chunk(self.data_parallel_world_size)[self.data_parallel_rank]
            self.communication_handle = _dist.reduce_scatter_tensor(
                own, self.data, group=self.data_parallel_group, async_op=self.overlap_grad_reduce
            )
        else:
            self.communication_handle = _dist.all_reduce(
                self.data, group=self.data_parallel_group, async_op=self.overlap_grad_reduce
            )
        self.communication_issued = True

    def finish_grad_sync(self) -> None:
        """Waits for the reduction, or makes it where communication does not overlap."""
        if not self.overlap_grad_reduce:
            self.start_grad_sync()
            return
        if self.communication_handle is None:
            ready, all_of_them = len(self.params_with_grad), len(self.params)
            raise RuntimeError(f"only {ready} of the {all_of_them} gradients of a bucket are there to be reduced")
        self.communication_handle.wait()

    def register_grad_ready(self, param: torch.nn.Parameter) -> None:
        """Notes that the last microbatch's gradient of a parameter is there; the last one starts the reduction."""
        self.params_with_grad.add(param)
        if self.params_with_grad == self.params:
            self.start_grad_sync()


class GradBuffer:
    """All gradients of a dtype in one flat tensor, in buckets.

    Args:
        dtype: Their dtype.
        params: The parameters that they are of.
        data_parallel_group: The ranks that they are reduced over.
        bucket_size: The elements that make a bucket full; None for one bucket.
        param_to_name: Not used: it is for logs.
        overlap_grad_reduce: See ``Bucket``.
        use_distributed_optimizer: See ``Bucket``.

    Attributes:
        param_index_map: Start, end and number of the bucket, by parameter.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        params: Sequence[torch.nn.Parameter],
        data_parallel_group: Any,
        bucket_size: int | None,
        param_to_name: dict[torch.nn.Parameter, str],
        overlap_grad_reduce: bool,
        use_distributed_optimizer: bool,
    ) -> None:
        self.dtype = dtype
        self.data_parallel_group = data_parallel_group
        self.data_parallel_world_size: int = _dist.get_world_size(data_parallel_group)
        self.overlap_grad_reduce = overlap_grad_reduce
        self.use_distributed_optimizer = use_distributed_optimizer
        self.is_last_microbatch = True
        self.param_index_map: dict[torch.nn.Parameter, tuple[int, int, int]] = {}
        self.bucket_indices: list[tuple[int, int]] = []
        alignment = self.data_parallel_world_size if use_distributed_optimizer else 1
        filled = _fill(params, bucket_size)
        used: list[int] = []
        end = 0
        for number, members in enumerate(filled):
            start = end
            for param in members:
                self.param_index_map[param] = (end, end + param.numel(), number)
                end += param.numel()
            used.append(end - start)
            end = -(-end // alignment) * alignment
            self.bucket_indices.append((start, end))
        self.numel = end
        self.data = torch.zeros(end, dtype=dtype, device=current_device())
        self.buckets = [
            Bucket(
                members,
                self.data[start:end],
                start,
                numel,
                data_parallel_group,
                overlap_grad_reduce=overlap_grad_reduce,
                use_distributed_optimizer=use_distributed_optimizer,
            )
            for members, (start, end), numel in zip(filled, self.bucket_indices, used, strict=True)
        ]
        self.param_to_bucket = {param: bucket for bucket in self.buckets for param in bucket.params_list}
        for param, (start, end, _) in self.param_index_map.items():
            param.main_grad = self.data[start:end].view(param.shape)  # type: ignore[attr-defined]

    def reset(self, zero_buffer: bool) -> None:
        """Forgets what the last step has done; zeroes the gradients only if asked."""
        if zero_buffer:
            self.data.zero_()
        for bucket in self.buckets:
            bucket.reset()
        self.is_last_microbatch = True

    def start_grad_sync(self) -> None:
        """Starts the reduction of all buckets."""
        for bucket in self.buckets:
            bucket.start_grad_sync()

    def finish_grad_sync(self) -> None:
        """Waits for the reduction of all buckets, or makes it."""
        for bucket in self.buckets:
            bucket.finish_grad_sync()

    def register_grad_ready(self, param: torch.nn.Parameter) -> None:
        """Notes that a gradient is there, if it is complete with this microbatch."""
        if self.is_last_microbatch:
            self.param_to_bucket[param].register_grad_ready(param)


def _fill(params: Sequence[torch.nn.Parameter], bucket_size: int | None) -> list[list[torch.nn.Parameter]]:
    """Deals parameters out to buckets, the last parameter first; no bucket but the last has less than two.

    Two, because a parameter alone in its bucket may be one that no module asks for by itself: Megatron's overlapped
    gather would wait for it too late.
    """
    buckets: list[list[torch.nn.Parameter]] = [[]]
    for param in reversed(params):
        last = buckets[-1]
        if bucket_size is not None and len(last) > 1 and sum(p.numel() for p in last) >= bucket_size:
            last = []
            buckets.append(last)
        last.append(param)
    return buckets
