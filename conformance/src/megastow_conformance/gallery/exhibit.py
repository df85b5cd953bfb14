"""What a broken subject is, and how it is put together from the real thing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from megastow import MemoryManager, create_memory_manager
from megastow.agreement import Agreement
from megastow.engine import Engine
from megastow.flat import FlatTensors
from megastow.guard import Guard
from megastow.host import HostArena
from megastow.megatron_binding import MegatronBinding
from megastow.refill import Refill
from megastow.transport import Transport

_PLACES: dict[type, str] = {
    MemoryManager: "",
    MegatronBinding: "_trainer",
    Agreement: "_agreement",
    Guard: "_guard",
    Engine: "_engine",
    Refill: "_engine._refill",
    Transport: "_engine._transport",
    FlatTensors: "_engine._flat",
    HostArena: "_engine._arena",
}
"""Where a manager keeps its parts."""


class Exhibit:
    """A subject (see ``case.Subject``) with one realistic mistake, made of megastow's own code.

    Args:
        mistake: Either a subclass of a part of megastow, which replaces that part in a manager that is otherwise the
            real one; or a function that is the subject.
        breaks: The invariants whose checks must object, and no others.
        scenario: The scenario that shows it.
        world: The number of ranks that it takes to show.
        because: Why more than one invariant is broken.
    """

    def __init__(
        self, mistake: type | FunctionType, breaks: frozenset[str], scenario: str, world: int, because: str
    ) -> None:
        if (len(breaks) > 1) != bool(because):
            raise ValueError(f"{mistake.__name__} breaks {len(breaks)} invariants; more than one need a reason")
        self.mistake = mistake
        self.breaks = breaks
        self.scenario = scenario
        self.world = world
        self.because = because
        functools.update_wrapper(self, mistake)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.mistake.__name__

    @property
    def subject(self) -> str:
        """Itself, as ``module:name``."""
        return f"{self.mistake.__module__}:{self.name}"

    def __call__(self, model: Any, optimizer: Any = None, **options: Any) -> MemoryManager:
        """Makes the broken manager of a trainer."""
        if isinstance(self.mistake, FunctionType):
            broken: MemoryManager = self.mistake(model, optimizer, **options)
            return broken
        manager = create_memory_manager(model, optimizer, **options)
        place = next(path for part, path in _PLACES.items() if issubclass(self.mistake, part))
        part: Any = functools.reduce(getattr, filter(None, place.split(".")), manager)
        part.__class__ = type(self.name, (self.mistake, type(part)), {})
        return manager


def breaks(
    *invariants: str, scenario: str = "toy_distopt", world: int = 1, because: str = ""
) -> Callable[[Any], Exhibit]:
    """Declares what a mistake breaks; see ``Exhibit``."""
    return lambda mistake: Exhibit(mistake, frozenset(invariants), scenario, world, because)
