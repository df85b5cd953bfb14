"""What the adapter is for. Loads without Megatron."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megastow.adapter import BoundAdapter
from megastow.megatron import Generation
from megastow.megatron_adapter import MegatronAdapter


class LegacyV3Adapter(MegatronAdapter):
    """The adapter for the `ParamAndGradBuffer` generation of megatron-core, to which no release will be added."""

    name = "legacy_v3"
    supports = "megatron-core 0.6 to 0.8: DistributedDataParallel chunks and a MegatronOptimizer, or none"
    generations = frozenset({Generation.PARAM_AND_GRAD_BUFFER})

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Take charge of the chunks and the optimizer.

        Raises:
            UnsupportedLayoutError: CUDA graphs or quantised parameters, whose memory cannot simply be released.
        """
        from megastow_legacy_v3.binding import LegacyV3Binding

        return LegacyV3Binding(model, optimizer)


ADAPTER = LegacyV3Adapter()
