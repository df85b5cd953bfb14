"""The adapter for modules without Megatron: reference models, reward models, anything under a torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from megastow import collect
from megastow.errors import UnsupportedLayoutError
from megastow.guard import TORCH_OPTIMIZER_CALLS, GuardedCalls, module_calls
from megastow.megatron import MegatronInfo
from megastow.megatron_layouts import captured_modules, refuse
from megastow.state import Inventory, Ranks, StateKind, Workspace

_SHARDING_WRAPPERS = {"FullyShardedDataParallel", "FSDPModule"}


class PlainAdapter:
    """Accepts any module that no Megatron wrapper is around, with no optimizer or one of torch's."""

    name = "plain"
    supports = "torch.nn.Module without Megatron's DistributedDataParallel; torch.optim.Optimizer or none"

    def refuses_installation(self, megatron: MegatronInfo | None) -> list[str]:
        """Never: Megatron does not matter here."""
        return []

    def refuses(self, model: Sequence[torch.nn.Module], optimizer: object) -> list[str]:
        """Refuses Megatron's wrappers and optimizers."""
        reasons = [
            f"the model is a {type(chunk).__module__}.{type(chunk).__qualname__}, which has gradient buffers of its own"
            for chunk in model
            if is_megatron_wrapper(chunk)
        ]
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            reasons.append(
                f"the optimizer is a {type(optimizer).__module__}.{type(optimizer).__qualname__}; "
                "expected a torch.optim.Optimizer or None"
            )
        return reasons

    def bind(self, model: Sequence[torch.nn.Module], optimizer: object) -> PlainBinding:
        """Take charge of the modules.

        Raises:
            UnsupportedLayoutError: a module is sharded by torch's FSDP, which resizes storages itself, or scripted.
        """
        assert optimizer is None or isinstance(optimizer, torch.optim.Optimizer)
        for chunk in model:
            for path, module in chunk.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    raise UnsupportedLayoutError(
                        f"{path or 'the model'} is a scripted module (torch.jit), whose calls cannot be blocked while "
                        "its state is away; nothing was touched. Hand over the module before scripting"
                    )
                found = _SHARDING_WRAPPERS & {base.__name__ for base in type(module).__mro__}
                if found:
                    raise UnsupportedLayoutError(
                        f"{path or 'the model'} is wrapped by torch's {found.pop()}, which shards, releases and "
                        "gathers storages itself; megastow does not understand that layout and touched nothing. "
                        "Use FSDP's own CPU offload, or hand over the module unwrapped"
                    )
        return PlainBinding(model, optimizer)


def is_megatron_wrapper(module: torch.nn.Module) -> bool:
    """Whether a module is one of Megatron's data-parallel wrappers, of any generation."""
    return any(
        base.__module__.startswith(("megatron.core.distributed", "megatron.model.distributed"))
        for base in type(module).__mro__
    )


def all_ranks() -> Ranks:
    """The ranks of the job; none if it has only one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    world = torch.distributed.get_world_size()
    return tuple(range(world)) if world > 1 else ()


class PlainBinding:
    """Modules, and perhaps a torch optimizer over them."""

    def __init__(self, model: Sequence[torch.nn.Module], optimizer: torch.optim.Optimizer | None) -> None:
        self._model = list(model)
        self._optimizer = optimizer
        self._device = collect.find_device(self._model)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._device

    @property
    def facts(self) -> Mapping[str, object]:
        """What was found."""
        return {"use_distributed_optimizer": False, "params_dtype": collect.largest_dtype(self._model)}

    def inventory(self) -> Inventory:
        """Parameters, buffers, optimizer state and gradients.

        Nothing tells over which ranks they are replicated, so all are taken for such: it is checked.

        Raises:
            UnsupportedLayoutError: CUDA graphs were captured over them.
        """
        inventory = Inventory(self._device)
        modules = collect.named_modules(self._model)
        refuse(captured_modules(modules))
        replicas = all_ranks()
        collect.add_modules(inventory, modules, lambda parameter: replicas)
        parameters: list[tuple[str, torch.Tensor]] = list(modules.parameters)
        if self._optimizer is not None:
            main = inventory.group(
                StateKind.MAIN_WEIGHTS, "parameters that only the optimizer knows", replicas=replicas
            )
            collect.add_main_weights(main, self._optimizer, listed={id(parameter) for _, parameter in parameters})
            states = inventory.group(StateKind.OPTIMIZER_STATES, "optimizer state", replicas=replicas)
            collect.add_optimizer_states(states, self._optimizer)
            parameters += main.tensors
        collect.add_grads(inventory.group(StateKind.GRAD_BUFFERS, "gradients", keep=False), parameters)
        return inventory

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """Nothing to wait for that a device synchronisation does not wait for."""

    def guarded_calls(self) -> Iterable[GuardedCalls]:
        """Every module's calls, and everything the optimizer does."""
        yield from module_calls(collect.every_module(self._model))
        if self._optimizer is not None:
            yield GuardedCalls(self._optimizer, TORCH_OPTIMIZER_CALLS)

    def workspaces(self) -> Iterable[Workspace]:
        """None but torch's own."""
        return ()

    def entrances(self) -> Sequence[torch.nn.Module]:
        """The modules themselves."""
        return self._model
