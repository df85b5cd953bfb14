"""What a conformance check is given: a scenario, a place to run it in, and things that are closed for it at the end.

A check is a function ``def bitexact(case: Case) -> None`` that every rank of a worker group calls at the same time. It
asks its case for trainers and managers instead of making them, so that one check never leaves hooks, memory or a
half-done move behind for the next one in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn, cast

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
        self, harness: Harness, scenario: Scenario, *, rank: int, world: int, row: Row, device: torch.device
    ) -> None:
        self.scenario = scenario
        self.rank = rank
        self.world = world
        self.row = row
        self.device = device
        self._harness = harness
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
        """Creates the manager under test.

        Args:
            trainer: Whose memory it manages.
            **options: Passed on to ``megastow.create_memory_manager``.

        Returns:
            The manager. It is closed when the check is over, before the trainer is.
        """
        from megastow import create_memory_manager

        manager = create_memory_manager(cast("Any", trainer.model), trainer.optimizer, **options)
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
