"""Which Megatron is importable, found without importing it.

Importing Megatron takes seconds, wants a GPU in some releases and fails in others; and importing it here would choose
for the user when it happens. So the files are looked at: the version they state and the classes they define.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import InvalidVersion, Version

_LAYOUT_FILES = (
    "core/distributed/distributed_data_parallel.py",
    "core/distributed/param_and_grad_buffer.py",
    "core/distributed/grad_buffer.py",
    "core/distributed.py",
    "model/distributed.py",
)


@dataclass(frozen=True)
class MegatronInfo:
    """A Megatron that `import megatron` would find.

    Attributes:
        path: the folder of the `megatron` package.
        version: what `megatron/core/package_info.py` states; None if there is none. It may lie: a pre-release branch
            states the release it became the opposite of.
        classes: the classes that the files of the data-parallel layer define, as "core/distributed/x.py:Name".
    """

    path: Path
    version: Version | None
    classes: frozenset[str] = field(default_factory=frozenset)

    def defines(self, file: str, name: str) -> bool:
        """Whether `file` (relative to the package) defines the class `name` at its top level."""
        return f"{file}:{name}" in self.classes


def detect_megatron() -> MegatronInfo | None:
    """Look for Megatron on the import path, now; None if there is none."""
    for folder in _package_folders():
        core = folder / "core"
        if core.is_dir() or (folder / "model").is_dir():
            return MegatronInfo(folder, _version(core / "package_info.py"), frozenset(_classes(folder)))
    return None


def _package_folders() -> Iterator[Path]:
    loaded = sys.modules.get("megatron")
    if loaded is not None:
        yield from (Path(entry) for entry in getattr(loaded, "__path__", ()))
        return
    spec = importlib.util.find_spec("megatron")
    if spec is not None:
        yield from (Path(entry) for entry in spec.submodule_search_locations or ())


def _version(file: Path) -> Version | None:
    """The version in a package_info.py: MAJOR, MINOR, PATCH and PRE_RELEASE, assigned one by one."""
    values: dict[str, object] = {}
    for node in _top_level(file):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            values.update((t.id, node.value.value) for t in node.targets if isinstance(t, ast.Name))
    if "MAJOR" not in values:
        return None
    numbers = ".".join(str(values[name]) for name in ("MAJOR", "MINOR", "PATCH") if name in values)
    try:
        return Version(numbers + str(values.get("PRE_RELEASE", "")))
    except InvalidVersion:
        return None


def _classes(folder: Path) -> Iterator[str]:
    for file in _LAYOUT_FILES:
        for node in _top_level(folder / file):
            if isinstance(node, ast.ClassDef):
                yield f"{file}:{node.name}"
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{file}:{alias.asname or alias.name}" for alias in node.names)


def _top_level(file: Path) -> list[ast.stmt]:
    try:
        return ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []
