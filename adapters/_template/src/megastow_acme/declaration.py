"""What the adapter is for, and what it refuses.

It loads without Megatron, because megastow asks every adapter that is installed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megastow.adapter import BoundAdapter
from megastow.megatron import MegatronInfo
from megastow.megatron_adapter import is_from_megatron, qualified_name

_FILE = "core/distributed/__init__.py"


class AcmeAdapter:
    """The adapter for trainers with one flat gradient buffer (`FlatDataParallel`)."""

    name = "acme"
    supports = "acme's fork of Megatron: FlatDataParallel chunks and a FlatOptimizer, or none"

    def refuses_installation(self, megatron: MegatronInfo | None) -> list[str]:
        """Looks for the one name that only this fork has."""
        if megatron is None:
            return ["no Megatron is importable"]
        if not megatron.defines(_FILE, "FlatDataParallel"):
            return [f"{_FILE} of {megatron} defines no FlatDataParallel, so it is not acme's fork"]
        return []

    def refuses(self, model: Sequence[torch.nn.Module], optimizer: object) -> list[str]:
        """Decides on the instances: what a chunk has is what will be moved."""
        reasons = [
            f"chunk {index} of the model is a {qualified_name(chunk)}; expected acme's FlatDataParallel (flat_grads)"
            for index, chunk in enumerate(model)
            if not (is_from_megatron(chunk) and hasattr(chunk, "flat_grads"))
        ]
        if optimizer is not None and not is_from_megatron(optimizer):
            reasons.append(f"the optimizer is a {qualified_name(optimizer)}; expected acme's FlatOptimizer")
        return reasons

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Take charge of the chunks and the optimizer."""
        from megastow_acme.binding import AcmeBinding

        return AcmeBinding(model, optimizer)


ADAPTER = AcmeAdapter()
