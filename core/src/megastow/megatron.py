"""Which Megatron is importable, found without importing it.

Importing Megatron takes seconds, wants a GPU in some releases and fails in others; and importing it here would choose
for the user when it happens. So the files are looked at: the version they state and the classes they define.
"""

from __future__ import annotations

import ast
import enum
import functools
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version


class Generation(str, enum.Enum):
    """How a Megatron lays out gradients and parameters; the value is what it is called among people."""

    MEMORY_BUFFER = "MemoryBuffer (Megatron-LM v2.6 to 23.08)"
    """`ddp._grad_buffers`: a `MemoryBuffer` for each dtype."""

    TYPED_MEMORY_BUFFER = "ParamBufferType (the Qwen-MoE fork)"
    """`ddp._grad_buffers`: for each buffer type a `MemoryBuffer` for each dtype."""

    GRAD_BUFFER = "GradBuffer (October 2023 to March 2024, megatron-core 0.4 and 0.5)"
    """`ddp.grad_buffers`: gradients in buckets, parameters apart."""

    PARAM_AND_GRAD_BUFFER = "ParamAndGradBuffer (megatron-core 0.6 to 0.8)"
    """`ddp.param_to_buffer`: gradients and, under the distributed optimizer, parameters in flat buffers."""

    BUCKET_GROUPS = "_ParamAndGradBuffer (megatron-core 0.9 and later)"
    """`ddp.bucket_groups`: the same with groups of buckets that communicate together."""

    def __str__(self) -> str:
        return self.value


# The classes that tell the generations apart, in the order in which they must be looked for: 0.9.0 still has a class
# with the name of the generation before it, and from 0.12 an unrelated one lives in the FSDP package. So it counts in
# which file a class is.
_SIGNALS: tuple[tuple[Generation, Mapping[str, frozenset[str]]], ...] = (
    (Generation.TYPED_MEMORY_BUFFER, {"model/distributed.py": frozenset({"ParamBufferType"})}),
    (Generation.BUCKET_GROUPS, {"core/distributed/param_and_grad_buffer.py": frozenset({"_ParamAndGradBuffer"})}),
    (
        Generation.PARAM_AND_GRAD_BUFFER,
        {
            "core/distributed/param_and_grad_buffer.py": frozenset({"ParamAndGradBuffer"}),
            "core/distributed/grad_buffer.py": frozenset({"ParamAndGradBuffer"}),
        },
    ),
    (
        Generation.GRAD_BUFFER,
        {
            "core/distributed/grad_buffer.py": frozenset({"GradBuffer"}),
            "core/distributed.py": frozenset({"GradBuffer"}),
        },
    ),
    (Generation.MEMORY_BUFFER, {"model/distributed.py": frozenset({"MemoryBuffer"})}),
)


@dataclass(frozen=True)
class MegatronInfo:
    """A Megatron that `import megatron` would find.

    Attributes:
        path: the folder of the `megatron` package.
        version: what `megatron/core/package_info.py` states; None if there is none. It may lie: the branch
            24.09-alpha states 0.9.0rc0, and has the layout before 0.9.
    """

    path: Path
    version: Version | None

    def defines(self, file: str, name: str) -> bool:
        """Whether `file` (relative to the package) defines or imports `name` at its top level."""
        return name in _names(self.path / file)

    @property
    def features(self) -> frozenset[str]:
        """Those of the names that tell the generations apart which are there, as "core/distributed/x.py:Name"."""
        return frozenset(
            f"{file}:{name}"
            for _, signals in _SIGNALS
            for file, names in signals.items()
            for name in names
            if self.defines(file, name)
        )

    @property
    def generation(self) -> Generation | None:
        """The layout that the files are for; None if it is none that is known."""
        for generation, signals in _SIGNALS:
            if any(self.defines(file, name) for file, names in signals.items() for name in names):
                return generation
        return None

    def __str__(self) -> str:
        return f"Megatron {self.version or 'of no stated version'} at {self.path}"


def generation_of(chunk: object) -> Generation | None:
    """The layout that a DDP chunk has, by its attributes; None if it has that of none."""
    if hasattr(chunk, "bucket_groups"):
        return Generation.BUCKET_GROUPS
    if hasattr(chunk, "param_to_buffer"):
        return Generation.PARAM_AND_GRAD_BUFFER
    if hasattr(chunk, "grad_buffers"):
        return Generation.GRAD_BUFFER
    buffers = getattr(chunk, "_grad_buffers", None)
    if isinstance(buffers, Mapping):
        is_typed = any(isinstance(of_type, Mapping) for of_type in buffers.values())
        return Generation.TYPED_MEMORY_BUFFER if is_typed else Generation.MEMORY_BUFFER
    return None


def detect_megatron() -> MegatronInfo | None:
    """Look for Megatron on the import path, now; None if there is none."""
    for folder in _package_folders():
        core = folder / "core"
        if core.is_dir() or (folder / "model").is_dir():
            return MegatronInfo(folder, _version(core / "package_info.py"))
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


def _names(file: Path) -> frozenset[str]:
    """The names that a file defines or imports at its top level; parsed again only if the file has changed."""
    try:
        status = file.stat()
    except OSError:
        return frozenset()
    return _names_as_of(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _names_as_of(file: Path, _mtime_ns: int, _size: int) -> frozenset[str]:
    names: set[str] = set()
    for node in _top_level(file):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return frozenset(names)


def _top_level(file: Path) -> list[ast.stmt]:
    try:
        return ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []
