"""What the declaration of every Megatron adapter does: compare what is found with what the adapter is for.

A Megatron generation shows twice: in the files that an import would find, and on the instance. An adapter decides on
the instance and holds the files against it, because version numbers lie and trees are mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from packaging.version import Version

from megastow.adapter import BoundAdapter
from megastow.megatron import Generation, MegatronInfo, generation_of


class MegatronAdapter:
    """Base of the adapters for Megatron; a subclass states the class attributes and implements `bind`.

    Attributes:
        name: how a user forces it.
        supports: what it is for, in one line.
        generations: the layouts that it understands.
        tested_below: the first megatron-core release that it was not tested with; None where no more will come.
    """

    name: ClassVar[str]
    supports: ClassVar[str]
    generations: ClassVar[frozenset[Generation]]
    tested_below: ClassVar[Version | None] = None

    def refuses_installation(self, megatron: MegatronInfo | None) -> list[str]:
        """Looks at the names that the files define, and at the stated version only for what no test has seen yet."""
        if megatron is None:
            return ["no Megatron is importable"]
        reasons = []
        if megatron.generation not in self.generations:
            found = megatron.generation or "none that is known"
            reasons.append(f"the layout of {megatron} is {found}; this adapter is for {self._layouts()}")
        # By release number: a pre-release of the first untested release is as untested.
        newest = megatron.version and Version(megatron.version.base_version)
        if self.tested_below is not None and newest is not None and newest >= self.tested_below:
            reasons.append(
                f"megatron-core {megatron.version} is newer than what this adapter was tested with (below "
                f"{self.tested_below}); install a newer megastow, or, if you have checked that the layout is the "
                f"same, force it with adapter={self.name!r}"
            )
        return reasons

    def refuses(self, model: Sequence[torch.nn.Module], optimizer: object) -> list[str]:
        """Looks at the instances: which package they are from, and which attributes they have."""
        reasons = []
        for index, chunk in enumerate(model):
            generation = generation_of(chunk)
            if not is_from_megatron(chunk):
                reasons.append(
                    f"chunk {index} of the model is a {qualified_name(chunk)}; expected Megatron's "
                    f"DistributedDataParallel, {self._layouts()}"
                )
            elif generation is None:
                reasons += self.refuses_unknown_layout(index, chunk)
            elif generation not in self.generations:
                reasons.append(
                    f"chunk {index} of the model, a {qualified_name(chunk)}, has the layout {generation}; "
                    f"this adapter is for {self._layouts()}"
                )
        if optimizer is not None and not is_from_megatron(optimizer):
            reasons.append(
                f"the optimizer is a {qualified_name(optimizer)}; expected one that get_megatron_optimizer returned"
            )
        return reasons

    def refuses_unknown_layout(self, index: int, chunk: torch.nn.Module) -> list[str]:
        """Why a chunk of Megatron's that has no layout we know is not for this adapter."""
        return [f"chunk {index} of the model, a {qualified_name(chunk)}, has no gradient buffers that are known"]

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> BoundAdapter:
        """Take charge of chunks and optimizer; see `Adapter`."""
        raise NotImplementedError

    def _layouts(self) -> str:
        return " or ".join(sorted(self.generations))


def is_from_megatron(instance: object) -> bool:
    """Whether a class of Megatron's is among those of an instance."""
    return any(base.__module__.partition(".")[0] == "megatron" for base in type(instance).__mro__)


def qualified_name(instance: object) -> str:
    """The class of an instance, with its module."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"
