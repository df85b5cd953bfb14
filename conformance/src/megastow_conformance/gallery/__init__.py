"""Broken managers: each has one realistic mistake, and the suite must object to each by the invariant that it breaks.

A suite that has never seen anything fail proves nothing. Every exhibit is megastow's own code with a few lines of it
changed, so that all the rest of it works; `megastow_conformance.judging` runs the suite on them, and
`conformance/tests/test_gallery.py` demands exactly the objections that an exhibit declares.
"""

from __future__ import annotations

from types import ModuleType

from megastow_conformance.gallery import adapters, engines, managers
from megastow_conformance.gallery.exhibit import Exhibit


def _of(module: ModuleType) -> list[Exhibit]:
    return [value for value in vars(module).values() if isinstance(value, Exhibit)]


EXHIBITS: dict[str, Exhibit] = {e.name: e for module in (adapters, engines, managers) for e in _of(module)}
"""All of them, by name."""

__all__ = ["EXHIBITS", "Exhibit"]
