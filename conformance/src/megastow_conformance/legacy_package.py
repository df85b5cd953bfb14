"""Imports the training code of a source tree without what its packages import on the way.

Before megatron-core 0.6 the optimizers, and up to 23.08 the DDP as well, are no library but a part of the training
program: ``import megatron`` loads tokenizers and wants parsed command line arguments, and ``import megatron.model``
loads every language model with its fused CUDA kernels. DDP and optimizers need none of that, only the global functions.
So these two packages are registered empty, with their real folders, and with what their own modules import from them.
Every module inside is the tree's own, as it is.
"""

from __future__ import annotations

import importlib
import sys
import types
from argparse import Namespace
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

_arguments = [Namespace()]


def set_args(**values: Any) -> Namespace:
    """Makes these the arguments of the command line, for whatever asks ``get_args`` from now on, and returns them."""
    _arguments[0] = Namespace(**values)
    return _arguments[0]


def register() -> None:
    """Makes the modules of the Megatron on the path importable; once in a process, and nothing of it imported before.

    Raises:
        ModuleNotFoundError: There is none.
    """
    megatron = _register("megatron", sys.path)
    vars(megatron).update(
        get_args=lambda: _arguments[0],
        get_timers=lambda: TIMERS,
        get_adlr_autoresume=lambda: None,
        get_num_microbatches=lambda: 1,
        print_rank_0=_say_nothing,
        print_rank_last=_say_nothing,
    )


def register_model() -> None:
    """Makes the modules of ``megatron.model`` importable, where there is one; after ``register``."""
    if PathFinder.find_spec("megatron.model", sys.modules["megatron"].__path__) is None:
        return
    model = _register("megatron.model", sys.modules["megatron"].__path__)
    vars(model)["LayerNorm"] = torch.nn.LayerNorm  # in v2.5 and v2.6 its parameters get no weight decay
    for module, name in (("module", "Float16Module"), ("distributed", "DistributedDataParallel")):
        if has(f"megatron.model.{module}"):
            found = importlib.import_module(f"megatron.model.{module}")
            if hasattr(found, name):
                vars(model)[name] = getattr(found, name)


def has(name: str) -> bool:
    """Whether the tree has a module, found without importing anything: of its parents only folders are looked at."""
    path: Sequence[str] | None = sys.modules["megatron"].__path__
    parts = name.split(".")
    for depth in range(2, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


class _Timers:
    """``get_timers()`` and, since a timer is only started and stopped, each timer of it: no call does anything."""

    def __call__(self, *_arguments: Any, **_keywords: Any) -> _Timers:
        return self

    start = stop = __call__


TIMERS = _Timers()
"""What ``get_timers`` returns."""


def _register(name: str, path: Sequence[str]) -> types.ModuleType:
    """An empty package in place of a real one, at the real one's folders."""
    found = PathFinder.find_spec(name, path)
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError(f"there is no package {name!r} on the path", name=name)
    module = types.ModuleType(name)
    module.__path__ = list(found.submodule_search_locations)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__spec__.submodule_search_locations = module.__path__
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


def _say_nothing(*_arguments: Any) -> None:
    """Workers have nobody to read it."""
