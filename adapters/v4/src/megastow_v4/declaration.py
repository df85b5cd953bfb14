"""What the adapter is for. Loads without Megatron."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from megastow.adapter import BoundAdapter
from megastow.megatron import Generation, MegatronInfo
from megastow.megatron_adapter import MegatronAdapter

HINT = "QWEN_VERSION"
"""An environment variable that code for the fork used to set. It proves nothing: it outlives its Megatron."""


class V4Adapter(MegatronAdapter):
    """The adapter for the fork whose gradient buffers are keyed by a type before the dtype."""

    name = "v4"
    supports = "the Qwen-MoE fork of Megatron-LM: DistributedDataParallel chunks and a MixedPrecisionOptimizer, or none"
    generations = frozenset({Generation.TYPED_MEMORY_BUFFER})

    def refuses_installation(self, megatron: MegatronInfo | None) -> list[str]:
        """As for all generations; says what is wrong with the path where the environment speaks of the fork."""
        reasons = super().refuses_installation(megatron)
        version = os.environ.get(HINT)
        if reasons and version:
            found = megatron or "nothing"
            reasons.append(
                f"{HINT} is {version!r}, so the Qwen-MoE fork may be meant; an import of megatron finds {found}, whose "
                "model/distributed.py defines no ParamBufferType. Put the fork in front of it on the path"
            )
        return reasons

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Take charge of the chunks and the optimizer.

        Raises:
            InvalidTypeError: an optimizer without main weights, or parameters of a dtype that the fork cannot train.
        """
        from megastow_v4.binding import TypedBufferBinding

        return TypedBufferBinding(model, optimizer)


ADAPTER = V4Adapter()
