"""What a conformance test says about itself in its mark ``megastow``: which scenarios it is for, and what it needs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from megastow_conformance.scenarios import SCENARIOS, WORDS, Scenario
from megastow_conformance.workers import CHECK_SECONDS

Selection = str | Iterable[str] | Callable[[Scenario], bool]
"""Which scenarios a test is for: a name, several, or a predicate."""


class MarkError(ValueError):
    """A mark says what nobody understands."""


@dataclass(frozen=True)
class Mark:
    """A mark that has been read.

    Attributes:
        wanted: Which scenarios the test is for.
        worlds: The world sizes it is for; ``None``: all.
        in_core: Which of its scenarios rows with the scope ``"core"`` run it on.
        needs: What it asks of a Megatron besides the scenario, in the words of ``scenarios.WORDS``.
        seconds: How long its check may take.
    """

    wanted: Callable[[Scenario], bool]
    worlds: tuple[int, ...] | None
    in_core: Callable[[Scenario], bool]
    needs: frozenset[str]
    seconds: float


def read_mark(given: Mapping[str, Any]) -> Mark:
    """Reads the keyword arguments of a mark: a typo in one must not turn into a test that never runs.

    Raises:
        MarkError: If something in it is unknown.
    """
    if odd := given.keys() - {"scenarios", "worlds", "core", "needs", "seconds"}:
        raise MarkError(f"unknown in its mark: {', '.join(sorted(odd))}")
    needs = frozenset(given.get("needs", ()))
    if unknown := needs - WORDS:
        raise MarkError(f"no harness says that its Megatron lacks {', '.join(sorted(unknown))}")
    worlds = given.get("worlds")
    return Mark(
        _predicate(given.get("scenarios")),
        None if worlds is None else tuple(worlds),
        _predicate(given.get("core")),
        needs,
        given.get("seconds", CHECK_SECONDS),
    )


def _predicate(selection: Selection | None) -> Callable[[Scenario], bool]:
    if selection is None:
        return lambda scenario: True
    if callable(selection):
        return selection
    names = {selection} if isinstance(selection, str) else set(selection)
    if unknown := names - SCENARIOS.keys():
        raise MarkError(f"no such scenario: {', '.join(sorted(unknown))}")
    return lambda scenario: scenario.name in names


def suite_marks() -> dict[str, Mark]:
    """The marks of the suite's own tests by name, found without pytest."""
    return dict(sorted(_suite_marks()))


def _suite_marks() -> Iterator[tuple[str, Mark]]:
    package = importlib.import_module("megastow_conformance.suite")
    for found in pkgutil.iter_modules(package.__path__):
        if not found.name.startswith("test_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        for name, function in vars(module).items():
            if name.startswith("test_") and "conformance" in signature(function).parameters:
                given: dict[str, Any] = {}
                for mark in getattr(function, "pytestmark", ()):
                    if mark.name == "megastow":
                        given = dict(mark.kwargs)
                yield name, read_mark(given)
