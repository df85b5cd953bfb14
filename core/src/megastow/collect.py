"""Filling an inventory from the things that every trainer has: modules, torch optimizers, gradients.

Shared by the adapters, so that each of them only says what is special about its Megatron generation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch

from megastow.errors import InvalidArgumentError
from megastow.state import Inventory, Ranks, StateKind, TensorGroup


class NamedModules(list[tuple[str, torch.nn.Module]]):
    """What `named_modules` found: one walk serves a whole inventory."""

    @cached_property
    def registered_parameters(self) -> Sequence[tuple[str, torch.nn.Parameter]]:
        """The parameters of the modules, by all their names, as they were when this was first asked."""
        return [
            (f"{path}.{name}" if path else name, parameter)
            for path, module in self
            if module._parameters
            for name, parameter in list(module._parameters.items())
            if parameter is not None
        ]

    @cached_property
    def parameters(self) -> Sequence[tuple[str, torch.nn.Parameter]]:
        """The same, each once, by the first of its names."""
        found: dict[int, tuple[str, torch.nn.Parameter]] = {}
        for entry in self.registered_parameters:
            found.setdefault(id(entry[1]), entry)
        return list(found.values())


def named_modules(model: Sequence[torch.nn.Module]) -> NamedModules:
    """All modules of all chunks, each once, by paths as torch's, with the chunk in front if there are several.

    What torch's generators find, in a fifth of their time: an inventory is made at every move.
    """
    found = NamedModules()
    seen: set[int] = set()
    for index, chunk in enumerate(model):
        _walk(f"chunk{index}" if len(model) > 1 else "", chunk, found, seen)
    return found


def _walk(path: str, module: torch.nn.Module, found: NamedModules, seen: set[int]) -> None:
    """Not a function within `named_modules`: that would be a reference cycle, with the whole model in it."""
    if id(module) in seen:
        return
    seen.add(id(module))
    found.append((path, module))
    if module._modules:
        for name, child in list(module._modules.items()):
            if child is not None:
                _walk(f"{path}.{name}" if path else name, child, found, seen)


def every_module(model: Sequence[torch.nn.Module]) -> Sequence[torch.nn.Module]:
    """All modules of all chunks, each once, without their paths, which take as long again to make."""
    found = {id(chunk): chunk for chunk in model}
    modules = list(found.values())
    for module in modules:  # which grows
        if module._modules:
            for child in tuple(module._modules.values()):
                if child is not None and id(child) not in found:
                    found[id(child)] = child
                    modules.append(child)
    return modules


def find_device(modules: Sequence[torch.nn.Module]) -> torch.device:
    """The one device that holds all parameters.

    Raises:
        InvalidArgumentError: there are no parameters, some are not made yet, or they are spread over devices.
    """
    devices: Counter[torch.device] = Counter()
    for name, parameter in named_parameters(modules):
        if torch.nn.parameter.is_lazy(parameter):
            raise InvalidArgumentError(
                f"parameter {name} is not initialised yet (a lazy module); run a forward pass before creating a manager"
            )
        devices[parameter.device] += 1
    if not devices:
        raise InvalidArgumentError("the model has no parameters, so there is nothing to manage")
    if len(devices) > 1:
        found = ", ".join(f"{count} on {device}" for device, count in devices.items())
        raise InvalidArgumentError(
            f"the parameters are on several devices ({found}); expected all of a manager's parameters on one. "
            "Create one manager for the modules on each device, or move the model to one device first"
        )
    return next(iter(devices))


def named_parameters(modules: Sequence[torch.nn.Module]) -> Sequence[tuple[str, torch.nn.Parameter]]:
    """Parameters of all chunks, each once, with the chunk in front of the name if there are several."""
    return named_modules(modules).parameters


def largest_dtype(modules: Sequence[torch.nn.Module]) -> torch.dtype:
    """The dtype that most elements of the parameters have."""
    sizes: Counter[torch.dtype] = Counter()
    for _, parameter in named_parameters(modules):
        sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def add_modules(
    inventory: Inventory, modules: NamedModules, replicas: Callable[[torch.Tensor], Ranks] = lambda parameter: ()
) -> None:
    """Parameters, registered buffers, and tensors that modules keep as plain attributes (rotary frequencies).

    What an adapter has listed before keeps the kind that it was given: a wrapper's own flat gradient buffer, kept as an
    attribute, is no weight.

    Args:
        inventory: where they are listed.
        modules: the modules.
        replicas: over which ranks a parameter is the same (see `TensorGroup`); buffers often are not.
    """
    listed = {_storage_of(tensor) for known in inventory.groups for _, tensor in known.tensors}
    groups: dict[Ranks, TensorGroup] = {(): inventory.group(StateKind.WEIGHTS, "parameters and buffers")}
    others = inventory.group(StateKind.WEIGHTS, "tensor attributes of modules", transient=True)
    for name, parameter in modules.registered_parameters:
        ranks = replicas(parameter)
        if ranks not in groups:
            groups[ranks] = inventory.group(StateKind.WEIGHTS, "replicated parameters", replicas=ranks)
        groups[ranks].add(name, parameter)
    no_tensors: set[type] = set()
    for path, module in modules:
        if module._buffers:
            for name, tensor in list(module._buffers.items()):
                groups[()].add(f"{path}.{name}" if path else name, tensor)
        for name, value in tensor_attributes(module, no_tensors):
            if _storage_of(value) not in listed:
                others.add(f"{path}.{name}" if path else name, value)


def add_attributes(group: TensorGroup, path: str, owner: object) -> None:
    """The tensors among the plain attributes of an object."""
    for name, value in tensor_attributes(owner, set()):
        group.add(f"{path}.{name}" if path else name, value)


def tensor_attributes(owner: object, no_tensors: set[type]) -> Iterator[tuple[str, torch.Tensor]]:
    """Attributes that are tensors with memory; what the owner has emptied itself is passed over.

    Args:
        owner: whose.
        no_tensors: classes of which no instance is a tensor; grows by those that are met. A model has ten thousand
            attributes of a few dozen classes, and to ask each whether it is a tensor takes most of the time.
    """
    attributes = vars(owner)
    if no_tensors.issuperset(map(type, list(attributes.values()))):
        return
    for name, value in list(attributes.items()):  # a list, for another thread may set attributes meanwhile
        if isinstance(value, torch.Tensor):
            if _has_bytes(value):
                yield name, value
        elif value.__class__ is type(value):  # else it stands for something, and another one may for a tensor
            no_tensors.add(type(value))


def _storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def add_main_weights(
    group: TensorGroup, optimizer: torch.optim.Optimizer, prefix: str = "", listed: Collection[int] = ()
) -> None:
    """What a torch optimizer steps on. Where that is a parameter of the model, it moves with the weights.

    Args:
        group: where to list it.
        optimizer: the optimizer.
        prefix: stands in front of its names.
        listed: identities of tensors that are listed already, in this group or as weights, and are passed over.
    """
    for number, param_group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(param_group["params"]):
            if id(parameter) not in listed:
                group.add(f"{prefix}param_groups[{number}][{index}]", parameter)


def add_optimizer_states(group: TensorGroup, optimizer: torch.optim.Optimizer, prefix: str = "") -> None:
    """Everything that a torch optimizer keeps: per parameter, and in its parameter groups.

    Left out is bookkeeping: `step` counters that torch keeps on the host, also where the device is the CPU; and numbers
    in parameter groups, `lr` and `betas` of a capturable optimizer, which schedulers and loggers read at any time.
    """
    for index, state in enumerate(list(optimizer.state.values())):
        name = f"{prefix}state[{index}]"
        for key, value in list(state.items()):
            if key != "step" or not _is_on_host(value):
                _add_nested(group, _entry(name, key), value)
    for number, param_group in enumerate(optimizer.param_groups):
        others = {key: value for key, value in param_group.items() if key != "params"}
        _add_nested(group, f"{prefix}param_groups[{number}]", others, takes=_is_no_number)


def add_grads(group: TensorGroup, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """The `.grad` of tensors."""
    for name, tensor in named:
        if (tensor.is_leaf or tensor.retains_grad) and (grad := tensor.grad) is not None:
            group.add(f"{name}.grad", grad)


def _has_bytes(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > 0


def _is_no_number(tensor: torch.Tensor) -> bool:
    return tensor.numel() != 1


def _is_on_host(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cpu


def _entry(name: str, key: object) -> str:
    return f"{name}[{key!r}]" if isinstance(key, str) else f"{name}[{len(name)}]"


def _add_nested(
    group: TensorGroup, name: str, value: object, takes: Callable[[torch.Tensor], bool] | None = None
) -> None:
    if isinstance(value, torch.Tensor):
        if takes is None or takes(value):
            group.add(name, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _add_nested(group, _entry(name, key), item, takes)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _add_nested(group, f"{name}[{index}]", item, takes)
