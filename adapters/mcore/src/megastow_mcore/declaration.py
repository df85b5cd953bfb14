"""What the adapter is for and what it refuses. Loads without Megatron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from packaging.version import Version

from megastow.adapter import BoundAdapter
from megastow.megatron import Generation
from megastow.megatron_adapter import MegatronAdapter


class McoreAdapter(MegatronAdapter):
    """The adapter for the `_ParamAndGradBuffer` generation of megatron-core."""

    name = "mcore"
    supports = "megatron-core 0.9 to 0.19: DistributedDataParallel chunks and a MegatronOptimizer, or none"
    generations = frozenset({Generation.BUCKET_GROUPS})
    tested_below = Version("0.20")

    def refuses_unknown_layout(self, index: int, chunk: torch.nn.Module) -> list[str]:
        """None: a sharding wrapper of this Megatron is ours to name, with what to do instead, when it is bound."""
        return []

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Take charge of the chunks and the optimizer.

        Raises:
            UnsupportedLayoutError: Megatron-FSDP, buffers registered with NCCL, CUDA graphs and other layouts whose
                memory cannot simply be released.
        """
        from megastow_mcore.binding import McoreBinding

        return McoreBinding(model, optimizer)


ADAPTER = McoreAdapter()
