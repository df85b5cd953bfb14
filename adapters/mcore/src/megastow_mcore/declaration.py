"""What the adapter is for and what it refuses. Loads without Megatron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from packaging.version import Version

from megastow.adapter import BoundAdapter
from megastow.megatron import Generation
from megastow.megatron_adapter import MegatronAdapter

SHARDING_WRAPPERS = frozenset({"FullyShardedDataParallel", "TorchFullyShardedDataParallel"})
"""Megatron's own (core/distributed/custom_fsdp, fsdp/mcore_fsdp_adapter.py) and its wrapper of torch's."""


class McoreAdapter(MegatronAdapter):
    """The adapter for the `_ParamAndGradBuffer` generation of megatron-core."""

    name = "mcore"
    supports = "megatron-core 0.9 to 0.19: DistributedDataParallel chunks and a MegatronOptimizer, or none"
    generations = frozenset({Generation.BUCKET_GROUPS})
    tested_below = Version("0.20")

    def refuses_unknown_layout(self, index: int, chunk: torch.nn.Module) -> list[str]:
        """Why not; nothing for this Megatron's sharding wrappers, which are named when they are bound."""
        names = {base.__name__ for base in type(chunk).__mro__}
        return [] if names & SHARDING_WRAPPERS else super().refuses_unknown_layout(index, chunk)

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Take charge of the chunks and the optimizer.

        Raises:
            UnsupportedLayoutError: Megatron-FSDP, buffers registered with NCCL, CUDA graphs and other layouts whose
                memory cannot simply be released.
        """
        from megastow_mcore.binding import McoreBinding

        return McoreBinding(model, optimizer)


ADAPTER = McoreAdapter()
