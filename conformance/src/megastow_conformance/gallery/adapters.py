"""Adapters that list too little, too much or too late, and that guard or select carelessly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch

from megastow import MegatronInfo, MemoryManager, create_memory_manager, registry
from megastow.guard import GuardedCalls
from megastow.megatron import generation_of
from megastow.megatron_adapter import MegatronAdapter
from megastow.megatron_binding import MegatronBinding
from megastow.megatron_parts import device_part, leaves
from megastow.state import Inventory, StateKind
from megastow_conformance.gallery.exhibit import breaks


def _forget(inventory: Inventory, is_forgotten: Callable[[str, torch.Tensor], bool]) -> Inventory:
    """The inventory without some of its tensors."""
    for group in inventory.groups:
        group.tensors[:] = [entry for entry in group.tensors if not is_forgotten(*entry)]
    return inventory


_STILL_THERE = "what stays is there for whoever looks, and for whoever asks whose it is"


@breaks("released", "residue", because=_STILL_THERE)
class ForgetsExpertBuffers(MegatronBinding):
    """Knows `buffers` and not `expert_parallel_buffers`, so the gradients of experts stay on the device.

    Stands for code from before expert parallelism: a copy of a list that a later release made a second one of.
    """

    def inventory(self) -> Inventory:
        buffers = [buffer for chunk in self._model for buffer in chunk.expert_parallel_buffers]
        storages = {buffer.grad_data.untyped_storage().data_ptr() for buffer in buffers}
        return _forget(super().inventory(), lambda _, t: t.untyped_storage().data_ptr() in storages)


@breaks("released", "residue", because=_STILL_THERE)
class ForgetsTheSecondMoment(MegatronBinding):
    """Moves `exp_avg` and leaves `exp_avg_sq`: four bytes a parameter stay on the device.

    Stands for state listed by names that somebody knew, where the optimizer keeps more.
    """

    def inventory(self) -> Inventory:
        return _forget(super().inventory(), lambda name, _: name.endswith("['exp_avg_sq']"))


@breaks("released", "residue", because=_STILL_THERE)
class ForgetsFrozenParameters(MegatronBinding):
    """Lists what lies in gradient buffers: parameters that are not trained lie in none, and stay.

    Stands for LoRA jobs in which nearly the whole model stayed on the device.
    """

    def inventory(self) -> Inventory:
        return _forget(super().inventory(), lambda _, t: isinstance(t, torch.nn.Parameter) and not t.requires_grad)


@breaks("released", scenario="toy_bf16_grads_plainopt")
class ForgetsGradientsOfMainWeights(MegatronBinding):
    """Knows gradient buffers, and not the fp32 `.grad` that the optimizer's step has hung on each main weight.

    Stands for megatron-core's own `offload_grad_buffers` (0.16), which leaves as much as it releases.
    """

    def inventory(self) -> Inventory:
        inventory = super().inventory()
        inventory.groups[:] = [g for g in inventory.groups if g.label != "gradients on main weights"]
        return inventory


@breaks("checkpoint")
class NeverLooksAgain(MegatronBinding):
    """Makes its inventory once: state that `load_state_dict` has replaced since is not moved.

    Stands for managers that collect the optimizer's tensors in their constructor.
    """

    def inventory(self) -> Inventory:
        found = super().inventory()
        cached: Inventory = vars(self).setdefault("cached", found)
        return cached


@breaks("identity")
class MovesHostState(MegatronBinding):
    """Takes the step counters for device state, because they are in the optimizer's `state` like everything else.

    Stands for `for k, v in state.items(): state[k] = v.cuda()`, after which the optimizer synchronises with the device
    at every step, for every parameter.
    """

    def inventory(self) -> Inventory:
        inventory = super().inventory()
        counters = inventory.group(StateKind.OPTIMIZER_STATES, "step counters")
        for leaf in leaves(self._optimizer):
            inner = device_part(leaf.optimizer)
            for state in inner.state.values() if inner is not None else ():
                counters.add("step", state.get("step"))
        return inventory


@breaks("grads", scenario="toy_overlap_distopt")
class DropsGradientsInFlight(MegatronBinding):
    """Does not wait for them: gradients are released while a reduction still writes them.

    Stands for an offload right after the backward pass of a run with overlapped reduction.
    """

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        super().quiesce([kind for kind in kinds if kind is not StateKind.GRAD_BUFFERS], keep_grads=keep_grads)


@breaks("guard")
class LetsStateDictThrough(MegatronBinding):
    """Guards what computes and not what saves: `state_dict` of released tensors gives whatever lies there.

    Stands for a checkpoint written by a callback in the middle of a rollout, full of zeros.
    """

    def guarded_calls(self) -> Iterable[GuardedCalls]:
        for guarded in super().guarded_calls():
            calls = {method: kinds for method, kinds in guarded.calls.items() if method != "state_dict"}
            yield GuardedCalls(guarded.owner, calls)


@breaks("guard")
def lets_backward_through(model: Any, optimizer: Any = None, **options: Any) -> MemoryManager:
    """Guards calls and not graphs: a backward pass through one from before the offload reads released memory.

    Stands for losses that are computed before a rollout and used after it. On a CPU the process crashes; on a GPU the
    CUDA context is lost.
    """
    manager = create_memory_manager(model, optimizer, **options)
    for hook in manager._guard._hooks:
        hook.remove()
    return manager


class _AcceptsEverything(MegatronAdapter):
    """An adapter that asks no questions."""

    def refuses_installation(self, megatron: MegatronInfo | None) -> list[str]:
        return []

    def refuses(self, model: Sequence[torch.nn.Module], optimizer: object) -> list[str]:
        return []


@breaks("select")
def accepts_any_megatron(model: Any, optimizer: Any = None, **options: Any) -> MemoryManager:
    """The adapter takes whatever comes, a Megatron that nobody has seen and an optimizer that is none included.

    Stands for a check of names that a later release still exports: 0.9.0 has a `ParamAndGradBuffer` too.
    """
    installed = registry.adapters()
    generation = generation_of(model[0])
    right = next(a for a in installed.values() if generation in getattr(a, "generations", ()))
    careless: Any = copy.copy(right)
    careless.__class__ = type("Careless", (_AcceptsEverything, type(right)), {})
    with mock.patch.object(registry, "adapters", return_value={**installed, careless.name: careless}):
        return create_memory_manager(model, optimizer, **options)
