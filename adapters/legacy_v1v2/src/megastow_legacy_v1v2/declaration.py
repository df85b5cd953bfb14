"""What the adapter is for. Loads without Megatron."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megastow.adapter import BoundAdapter
from megastow.megatron import Generation, generation_of
from megastow.megatron_adapter import MegatronAdapter


class LegacyV1V2Adapter(MegatronAdapter):
    """The adapter for the generations whose flat buffers hold gradients only; no release will be added to them."""

    name = "legacy_v1v2"
    supports = "Megatron-LM v2.6 to megatron-core 0.5: DistributedDataParallel chunks and a MegatronOptimizer, or none"
    generations = frozenset({Generation.MEMORY_BUFFER, Generation.GRAD_BUFFER})

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Take charge of the chunks and the optimizer."""
        from megastow.megatron_binding import FlatGradientsBinding
        from megastow_legacy_v1v2.binding import GradBufferBinding

        has_buckets = generation_of(model[0]) is Generation.GRAD_BUFFER
        return (GradBufferBinding if has_buckets else FlatGradientsBinding)(model, optimizer)


ADAPTER = LegacyV1V2Adapter()
