"""What a conformance check is given: a scenario, a place to run it in, and things that are closed for it at the end.

A check is a function ``def bitexact(case: Case) -> None`` that every rank of a worker group calls at the same time. It
asks its case for trainers and managers instead of making them, so that one check never leaves hooks, memory or a
half-done move behind for the next one in the same process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from megastow_conformance.messages import DEFAULT_SUBJECT
from megastow_conformance.scenarios import reason_against

if TYPE_CHECKING:
    import torch

    from megastow import MemoryManager
    from megastow_conformance.harness import Harness
    from megastow_conformance.rows import Row
    from megastow_conformance.scenarios import Scenario
    from megastow_conformance.trainer import Trainer

Check = Callable[..., None]
"""``check(case, **parameters)``, defined at the top level of a module that workers can import."""


Subject = Callable[..., "MemoryManager"]
"""What is under test: called as ``subject(model, optimizer, **options)``, it makes a manager of a trainer's memory.

It has the signature of ``megastow.create_memory_manager``, which it is unless somebody says otherwise. Whatever it
returns is used as a ``megastow.MemoryManager`` is; a check that asks for more than moves and residency says so.
"""


class CheckSkipped(Exception):  # noqa: N818 - it is not an error
    """Raised by ``Case.skip``."""


class Case:
    """One check's view of one rank.

    Attributes:
        scenario: What to train.
        rank: This process's rank.
        world: The number of ranks.
        row: The Megatron release that is loaded.
        device: Where this rank's tensors live.
    """

    def __init__(
        self,
        harness: Harness,
        scenario: Scenario,
        *,
        rank: int,
        world: int,
        row: Row,
        device: torch.device,
        subject: str = DEFAULT_SUBJECT,
    ) -> None:
        self.scenario = scenario
        self.rank = rank
        self.world = world
        self.row = row
        self.device = device
        self._harness = harness
        self._subject: Subject = resolve(subject)
        self._cleanup = ExitStack()

    def build(self) -> Trainer:
        """Builds a trainer of the scenario; each call gives a new one, bit-identical to the others.

        Returns:
            The trainer. It is closed when the check is over.
        """
        trainer = self._harness.build(self.scenario)
        self._cleanup.callback(trainer.close)
        return trainer

    def manager(self, trainer: Trainer, **options: Any) -> MemoryManager:
        """Creates the manager under test for a trainer; see ``create``."""
        return self.create(trainer.model, trainer.optimizer, **options)

    def create(self, model: Any, optimizer: Any = None, **options: Any) -> MemoryManager:
        """Creates the manager under test, for a trainer's parts or for something that it should refuse.

        Args:
            model: The DDP chunks.
            optimizer: The optimizer over them.
            **options: Passed on to the subject.

        Returns:
            The manager. It is closed when the check is over, before the trainer is.
        """
        manager = self._subject(model, optimizer, **options)
        self._cleanup.callback(manager.close)
        return manager

    def on_close(self, action: Callable[[], object]) -> None:
        """Calls ``action`` when the check is over; the last one registered is called first."""
        self._cleanup.callback(action)

    def lacks(self, word: str) -> str | None:
        """Why this Megatron cannot do what a check asks for besides the scenario.

        Args:
            word: One of ``scenarios.WORDS``, such as ``"restore"``.

        Returns:
            The reason, or ``None`` if it can.
        """
        return reason_against(self._harness.lacks(self.row.megatron, self.device.type), self.scenario.needs | {word})

    def skip(self, reason: str) -> NoReturn:
        """Ends the check: it cannot be done here. Every rank must come to the same conclusion."""
        raise CheckSkipped(reason)

    def close(self) -> None:
        """Closes managers and trainers, the last one first."""
        self._cleanup.close()


def resolve(path: str) -> Any:
    """What ``module:name`` names; the name may have dots.

    Raises:
        ValueError: If it is not of that form.
        ImportError: If there is no such module.
        AttributeError: If the module has no such name.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{path!r} is not of the form module:name")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
