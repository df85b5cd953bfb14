"""The reduction of all gradients; see the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron.core import parallel_state

_dist: Any = torch.distributed  # it declares no exports


def finalize_model_grads(model: Sequence[Any]) -> None:
    """Reduces what is not reduced yet: buffers over all ranks, experts over those that have the same ones.

    As in core_v0.5.0, experts that are not spread over ranks are not reduced at all.
    """
    for chunk in model:
        chunk.finish_grad_sync()
    spread_over = parallel_state.get_expert_model_parallel_world_size()
    if 1 < spread_over < parallel_state.get_data_parallel_world_size():
        for chunk in model:
            for grad in chunk.expert_grads:
                _dist.all_reduce(grad, group=parallel_state.get_expert_data_parallel_group())
