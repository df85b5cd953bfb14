"""What the test process and its worker processes say to each other.

Plain data, in a module of its own that imports neither torch nor Megatron, because both sides must be able to unpickle
it before anything else is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megastow_conformance.rows import Row
from megastow_conformance.scenarios import Scenario

Device = Literal["cpu", "cuda"]

Verdict = Literal["passed", "skipped", "failed"]

DEFAULT_SUBJECT = "megastow:create_memory_manager"
"""What is under test where nothing else is said: megastow itself, with the adapter that it chooses."""


@dataclass(frozen=True)
class Setup:
    """The first message to a worker: who it is.

    Attributes:
        row: The Megatron release to load; its folder is on the worker's ``PYTHONPATH`` already.
        rank: The worker's rank.
        world: The number of ranks.
        device: The device type to run on; on ``"cuda"`` a rank has the GPU of its own number.
        harness: What initialises Megatron and builds trainers (see ``harness.find``).
        store: A path that no file is at yet, through which the ranks find each other.
        stacks: The file that the worker writes its Python stacks to on SIGUSR1.
        sys_path: The test process's module search path; what the worker lacks of it is appended.
        lasting: Whether the worker is to clean up after a check that failed, because it will be asked for more.
    """

    row: Row
    rank: int
    world: int
    device: Device
    harness: str
    store: str
    stacks: str
    sys_path: tuple[str, ...]
    lasting: bool = False


@dataclass(frozen=True)
class Request:
    """Run one check.

    Attributes:
        module: The module that the check is in.
        name: The check's qualified name in it.
        scenario: What to train.
        parameters: Keyword arguments for the check.
        subject: What is under test, as ``module:name``; see ``case.Subject``.
    """

    module: str
    name: str
    scenario: Scenario
    parameters: dict[str, Any] = field(default_factory=dict)
    subject: str = DEFAULT_SUBJECT

    def __str__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.parameters.items())
        of = "" if self.subject == DEFAULT_SUBJECT else f" of {self.subject}"
        return f"{self.module}.{self.name}({self.scenario.name}{given}){of}"


@dataclass(frozen=True)
class Reply:
    """How one rank's part of a set-up or of a check went.

    Attributes:
        verdict: The result.
        detail: The traceback of a failure, the reason of a skip.
    """

    verdict: Verdict
    detail: str = ""
