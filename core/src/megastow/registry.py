"""Choosing the adapter: exactly one must accept what the user has, or nobody touches anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch

from megastow.adapter import Adapter
from megastow.errors import AdapterSelectionError
from megastow.megatron import MegatronInfo, detect_megatron
from megastow.plain import PlainAdapter

ENTRY_POINT_GROUP = "megastow.adapters"


@dataclass(frozen=True)
class Verdict:
    """What one adapter says.

    Attributes:
        name: the adapter's name.
        adapter: the adapter, or None if it could not be loaded.
        reasons: why it refuses; empty if it accepts.
    """

    name: str
    adapter: Adapter | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {'; '.join(self.reasons) or 'accepts'}"


def adapters() -> dict[str, Adapter | str]:
    """Every adapter there is, by name: our own for plain modules, and what is installed; an error text if broken."""
    found: dict[str, Adapter | str] = {PlainAdapter.name: PlainAdapter()}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        try:
            loaded = entry.load()
        except Exception as error:  # a broken third party's adapter must not take the others down
            found[entry.name] = f"it could not be loaded from {entry.value}: {type(error).__name__}: {error}"
            continue
        found[entry.name] = (
            loaded if isinstance(loaded, Adapter) else f"{entry.value} is a {type(loaded).__name__}, not an adapter"
        )
    return found


def judge_installation(megatron: MegatronInfo | None) -> list[Verdict]:
    """What each adapter says of the Megatron that is importable."""
    return [
        Verdict(name, None, (a,))
        if isinstance(a, str)
        else Verdict(name, a, _reasons(a.refuses_installation, megatron))
        for name, a in adapters().items()
    ]


def _reasons(ask: Callable[..., Sequence[str]], *arguments: object) -> tuple[str, ...]:
    """What an adapter answers; one that fails refuses, so that it does not take the others down."""
    try:
        return tuple(ask(*arguments))
    except Exception as error:
        return (f"its {ask.__name__} failed: {type(error).__name__}: {error}",)


def choose_adapter(model: Sequence[torch.nn.Module], optimizer: object, name: str | None = None) -> Adapter:
    """The one adapter that accepts this model and optimizer.

    Args:
        model: the chunks.
        optimizer: the optimizer, or None.
        name: force this adapter; its opinion on the Megatron version is then not asked, its look at the instances is.

    Raises:
        AdapterSelectionError: none or several accept, or the forced one does not fit; with each one's reasons.
    """
    megatron = detect_megatron()
    verdicts = judge_installation(megatron)
    if name is not None:
        chosen = next((v for v in verdicts if v.name == name), None)
        if chosen is None:
            known = ", ".join(v.name for v in verdicts)
            raise AdapterSelectionError(f"there is no adapter {name!r} installed; there are: {known}")
        if chosen.adapter is None:
            raise AdapterSelectionError(f"adapter {name!r} cannot be used: {chosen.reasons[0]}")
        reasons = _reasons(chosen.adapter.refuses, model, optimizer)
        if reasons:
            raise AdapterSelectionError(f"adapter {name!r} was asked for and does not fit: {'; '.join(reasons)}")
        return chosen.adapter
    verdicts = [
        v
        if v.adapter is None
        else Verdict(v.name, v.adapter, (*_reasons(v.adapter.refuses, model, optimizer), *v.reasons))
        for v in verdicts
    ]
    accepting = [v.adapter for v in verdicts if v.adapter is not None and not v.reasons]
    if len(accepting) == 1:
        return accepting[0]
    found = megatron or "no Megatron on the import path"
    listing = "\n".join(f"  - {v}" for v in verdicts)
    raise AdapterSelectionError(
        f"{len(accepting)} adapters accept a {type(model[0]).__qualname__} with "
        f"{'no optimizer' if optimizer is None else 'a ' + type(optimizer).__qualname__} ({found}); expected exactly "
        f"one:\n{listing}\n"
        "Install the adapter for your Megatron (megastow-mcore for megatron-core 0.9 to 0.19), hand over Megatron's "
        'DistributedDataParallel chunks with the optimizer made for them, or force an adapter with adapter="NAME" '
        "if you know better"
    )
