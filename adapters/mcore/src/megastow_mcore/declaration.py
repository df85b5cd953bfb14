"""What the adapter is for and what it refuses. Loads without Megatron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from packaging.specifiers import SpecifierSet

from megastow.adapter import BoundAdapter
from megastow.megatron import MegatronInfo

SUPPORTED = SpecifierSet(">=0.9,<0.20")
_BUFFER_FILE = "core/distributed/param_and_grad_buffer.py"


class McoreAdapter:
    """The adapter for the `_ParamAndGradBuffer` generation of megatron-core."""

    name = "mcore"
    supports = f"megatron-core {SUPPORTED}: DistributedDataParallel chunks and a MegatronOptimizer, or none"

    def refuses_installation(self, megatron: MegatronInfo | None) -> list[str]:
        """Looks at the version that the files state and at the classes they define; version numbers lie."""
        if megatron is None:
            return ["no Megatron is importable"]
        reasons = []
        if megatron.version is None:
            reasons.append(f"{megatron.path} states no megatron-core version")
        elif not SUPPORTED.contains(megatron.version, prereleases=True):
            reasons.append(
                f"megatron-core {megatron.version} is outside {SUPPORTED}, where this adapter was tested; "
                f"if you have checked that it fits, force it with adapter={self.name!r}"
            )
        if not megatron.defines(_BUFFER_FILE, "_ParamAndGradBuffer"):
            reasons.append(f"{_BUFFER_FILE} defines no _ParamAndGradBuffer, so this is an older generation")
        return reasons

    def refuses(self, model: Sequence[torch.nn.Module], optimizer: object) -> list[str]:
        """Looks at the instances: what they are called and which attributes they have."""
        reasons = []
        for chunk in model:
            if not _is_from(chunk, "megatron.core.distributed"):
                reasons.append(
                    f"the model is a {_name(chunk)}; expected a DistributedDataParallel of megatron.core.distributed"
                )
            elif hasattr(chunk, "param_to_buffer"):
                reasons.append(f"the {_name(chunk)} has param_to_buffer, which is the generation before 0.9")
        if optimizer is not None and not _is_from(optimizer, "megatron.core.optimizer"):
            reasons.append(f"the optimizer is a {_name(optimizer)}; expected one that get_megatron_optimizer returned")
        return reasons

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Take charge of the chunks and the optimizer.

        Raises:
            UnsupportedLayoutError: Megatron-FSDP, buffers registered with NCCL, CUDA graphs and other layouts whose
                memory cannot simply be released.
        """
        from megastow_mcore.binding import McoreBinding

        return McoreBinding(model, optimizer)


ADAPTER = McoreAdapter()


def _is_from(instance: object, package: str) -> bool:
    return any(base.__module__.startswith(package) for base in type(instance).__mro__)


def _name(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"
