"""Checks of what is accepted: this trainer and its Megatron, by the right adapter; everything else is refused."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megastow import AdapterSelectionError, MegastowError, Residency, UnsupportedLayoutError, create_memory_manager
from megastow.registry import adapters, choose_adapter
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.common import KINDS, cycle, everything, need_megastow, trained
from megastow_conformance.trainer import Trainer


def select(case: Case) -> None:
    """The trainer is accepted; with the optimizer of somebody else it is not."""
    trainer = case.build()
    _accepts(case, trainer)
    for wrong in (torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), object()):
        try:
            case.create(trainer.model, wrong)
        except MegastowError as error:
            assert type(wrong).__name__ in str(error)
        else:
            raise AssertionError(f"{type(wrong).__name__} was accepted as an optimizer")


def _accepts(case: Case, trainer: Trainer) -> None:
    """The subject takes the trainer; what chooses nothing is asked no more."""
    manager = case.manager(trainer)
    manager.close()
    need_megastow(case, manager, "there are no adapters to choose from")


def select_adapter(case: Case) -> None:
    """Of the installed adapters the row's is chosen; every other refuses with a reason, also when it is forced."""
    trainer = case.build()
    _accepts(case, trainer)
    chosen = choose_adapter(trainer.model, trainer.optimizer)
    assert chosen.name == case.row.adapter, f"{chosen.name} was chosen"
    for name, adapter in adapters().items():
        if name == case.row.adapter:
            continue
        assert not isinstance(adapter, str), f"adapter {name} is broken: {adapter}"
        reasons = adapter.refuses(trainer.model, trainer.optimizer)
        assert reasons and all(reasons), f"adapter {name} does not say why it refuses"
        try:
            create_memory_manager(trainer.model, trainer.optimizer, adapter=name)
        except AdapterSelectionError as error:
            assert reasons[0] in str(error)
        else:
            raise AssertionError(f"adapter {name} was forced on a trainer that it does not fit")


def select_unknown(case: Case) -> None:
    """A Megatron that nobody knows is refused with reasons: one of another layout, and one newer than what was tested.

    The trainer is as always; the files that an import would find are not.
    """
    trainer = case.build()
    _accepts(case, trainer)
    adapter: Any = adapters()[case.row.adapter]
    kinds = {"another layout": False}
    if getattr(adapter, "tested_below", None) is not None:
        kinds["a newer version"] = True
    for what, same_layout in kinds.items():
        with _pretended_megatron(same_layout=same_layout):
            try:
                case.create(trainer.model, trainer.optimizer)
            except AdapterSelectionError as error:
                assert case.row.adapter in str(error) and "99.0" in str(error), f"{what}: {error}"
            else:
                raise AssertionError(f"a Megatron of {what} was accepted")


@contextlib.contextmanager
def _pretended_megatron(*, same_layout: bool) -> Iterator[None]:
    """Shows another Megatron to whoever looks for its files: one of version 99.0, with today's modules or with none."""
    package = sys.modules["megatron"]
    before = package.__path__
    with tempfile.TemporaryDirectory(prefix="megastow-") as name:
        folder = Path(name, "megatron")
        (folder / "core").mkdir(parents=True)
        (folder / "core" / "package_info.py").write_text("MAJOR = 99\nMINOR = 0\nPATCH = 0\n", encoding="utf-8")
        if same_layout:
            for part in ("", "core"):
                for entry in (entry for root in before for entry in Path(root, part).glob("*")):
                    link = folder / part / entry.name
                    if not link.exists():
                        link.symlink_to(entry)
        package.__path__ = [str(folder)]
        try:
            yield
        finally:
            package.__path__ = before


def refused(case: Case) -> None:
    """A layout that cannot be moved is refused by name, before anything is touched; without it all is well again.

    The trainer is real. That a buffer is registered with NCCL or a CUDA graph was captured is put on by hand, in the
    place where Megatron would show it, since neither can be made on every machine.
    """
    trainer = trained(case)
    _accepts(case, trainer)
    manager = case.manager(trainer)
    cycle(case, manager, trainer)
    before = oracle.snapshot(everything(trainer, grads=True))
    for name, owner, attribute, value in trainer.unsupported_layouts():
        with _attribute(owner, attribute, value):
            for call in (manager.offload, lambda: case.create(trainer.model, trainer.optimizer)):
                _expect_refusal(call, name)
            assert {manager.residency(kind) for kind in KINDS} == {Residency.RESIDENT}
        oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), f"after refusing {name}")
    for wrapper in trainer.foreign_wrappers():
        _expect_refusal(lambda wrapper=wrapper: case.create(wrapper), "bucket_groups")
    cycle(case, manager, trainer)
    oracle.assert_same(before, oracle.snapshot(everything(trainer, grads=True)), "a cycle after the refusals")


def _expect_refusal(call: Any, name: str) -> None:
    try:
        call()
    except UnsupportedLayoutError as error:
        assert name in str(error), f"the refusal does not say {name}: {error}"
    else:
        raise AssertionError(f"{name} was not refused")


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute for the length of the block."""
    attributes = vars(owner)
    before = dict(attributes)
    attributes[name] = value
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)
