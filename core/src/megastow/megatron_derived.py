"""What Megatron's distributed optimizers say of how flat parameter buffers follow from their main weights.

Mirrors megatron/core/optimizer/distrib_optimizer.py of 0.6.0 to 0.19.2, `_copy_main_params_to_model_params`: each main
shard is cast to its range of its bucket. An optimizer that keeps its main weights elsewhere (a precision-aware one), or
that has no such maps, contributes nothing, and its buffers then fail the proof; nothing here has to be complete.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megastow.derived import Bucket, DerivableBuffer
from megastow.megatron_parts import leaves


def derivable_buffers(
    buffers: Iterable[tuple[str, Any]], optimizer: Any, gatherer: Callable[[Any, Any], dist.ProcessGroup]
) -> Iterator[DerivableBuffer]:
    """The flat buffers of half-precision parameters, with what an optimizer has of main weights for them.

    Args:
        buffers: Megatron's buffers, each with a name that is the same on all data-parallel ranks.
        optimizer: over them; None has nothing.
        gatherer: the group that gathers the parameters of a buffer's bucket, both given.
    """
    main = _main_by_bucket(optimizer)
    for name, buffer in buffers:
        if buffer.param_data is None or buffer.param_data.dtype is torch.float32:
            continue
        buckets = []
        mine: list[tuple[int, torch.Tensor]] = []
        for bucket in buffer.buckets:
            group = gatherer(buffer, bucket)
            end = bucket.offset + bucket.param_data.numel()
            buckets.append(Bucket(bucket.offset, end, group if group.size() > 1 else None))
            mine += [(bucket.offset + first, tensor) for first, tensor in main.get(id(bucket), ())]
        yield DerivableBuffer(name, buffer.param_data, buckets, sorted(mine, key=lambda each: each[0]))


def _main_by_bucket(optimizer: Any) -> dict[int, list[tuple[int, torch.Tensor]]]:
    """First element within its bucket, and main weight, by identity of the bucket."""
    found: dict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for leaf in leaves(optimizer):
        places = getattr(leaf, "model_param_gbuf_map", {})
        models = getattr(leaf, "model_float16_groups", ())
        shards = getattr(leaf, "shard_fp32_from_float16_groups", ())
        for parameter, main in _pairs(models, shards):
            if main is None or parameter not in places:
                continue
            buffer, _, bucket = places[parameter]
            place = leaf._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
            if main.numel() == place.size:
                found[id(leaf.buffers[buffer].buckets[bucket])].append((place.start, main))
    return found


def _pairs(models: Any, shards: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    for model_group, shard_group in zip(models, shards, strict=False):
        yield from zip(model_group, shard_group, strict=False)
