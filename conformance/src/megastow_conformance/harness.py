"""Finds what builds trainers, and fills in what it does not say.

A harness is a module, or a class or object in one, and only ``build(scenario)`` must be there: to run the suite on a
Megatron of one's own, one function is enough. Nothing here imports torch before a process group is joined.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from megastow_conformance.scenarios import Scenario
    from megastow_conformance.trainer import Trainer


class HarnessError(ValueError):
    """There is no such harness, or it is none."""


class Harness(Protocol):
    """What knows one Megatron family; ``megastow_conformance.megatron_core`` is one."""

    def load(self) -> object:
        """Imports Megatron, made runnable on this machine. Without it: nothing is done before ``build``."""
        ...

    def init_distributed(self, rank: int, world: int, store: Store) -> None:
        """Joins the process group. Without it: ``join``."""
        ...

    def build(self, scenario: Scenario) -> Trainer:
        """Builds a trainer of a scenario, from the same seed each time."""
        ...

    def lacks(self, version: str, device: str) -> Mapping[str, str]:
        """What this Megatron cannot do, by any way of using it. Without it: nothing.

        Called in processes that must not load Megatron.

        Args:
            version: The row's ``megatron``: a version, a tag or a name.
            device: ``"cpu"`` or ``"cuda"``.

        Returns:
            Reasons, by the words of ``scenarios.WORDS``; several words joined by ``+`` cannot be done together.
        """
        ...

    def missing_here(self, device: str) -> Mapping[str, str]:
        """What this machine lacks, in the same words: a package, say. Without it: nothing.

        Unlike ``lacks``, it may differ from one machine to the next; the committed list of skips is silent about it.
        """
        ...


@dataclass(frozen=True)
class _Harness:
    """A harness with nothing left open."""

    build: Callable[[Scenario], Trainer]
    load: Callable[[], object]
    init_distributed: Callable[[int, int, Store], None]
    lacks: Callable[[str, str], Mapping[str, str]]
    missing_here: Callable[[str], Mapping[str, str]]


def find(spec: str) -> Harness:
    """The harness of a name.

    Args:
        spec: ``module`` or ``module:attribute``. The attribute may be an object, a class (called without arguments) or
            the function ``build`` itself, whatever it is called.

    Raises:
        HarnessError: If there is none of that name.
    """
    module_name, _, attribute = spec.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise HarnessError(f"no harness {spec!r}: there is no module {error.name!r} to import") from error
    for part in attribute.split(".") if attribute else ():
        if not hasattr(found, part):
            raise HarnessError(f"no harness {spec!r}: {getattr(found, '__name__', found)} has no {part!r}")
        found = getattr(found, part)
    if inspect.isclass(found):
        found = found()
    build = found if inspect.isroutine(found) else getattr(found, "build", None)
    if not callable(build):
        raise HarnessError(f"{spec!r} is no harness: it has no function build(scenario)")
    return _Harness(
        build,
        getattr(found, "load", lambda: None),
        getattr(found, "init_distributed", join),
        getattr(found, "lacks", lambda version, device: {}),
        getattr(found, "missing_here", lambda device: {}),
    )


def join(rank: int, world: int, store: Store) -> None:
    """Joins the default process group: gloo on a CPU, NCCL on GPUs, one GPU for each rank of the host."""
    import torch

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(rank % torch.cuda.device_count())
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
