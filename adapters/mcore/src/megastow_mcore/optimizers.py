"""Finding the optimizers that do the work, and what each of them keeps on the device.

`get_megatron_optimizer` returns a tree: chains (always since 0.12) of leaves, and each leaf wraps an inner optimizer.
Which attributes a leaf has depends on its class; here they are read by name where they exist, so that a stub, a mixed
chain or a class that joined later needs no case of its own. Mirrors megatron/core/optimizer/{optimizer,
distrib_optimizer}.py and optimizer/cpu_offloading/hybrid_optimizer.py, 0.9.0 to 0.19.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megastow import collect
from megastow.state import Inventory, StateKind

# Lists of lists of what the inner optimizer steps on. The fp32 ones are parameters of the model or views on them: they
# are listed all the same, and move with the weights because their storage does. None stands for a shard that the main
# copy of is elsewhere (precision-aware optimizers keep it in the inner optimizer's state).
_MAIN_GROUPS = (
    "fp32_from_float16_groups",
    "fp32_from_fp32_groups",
    "shard_fp32_from_float16_groups",
    "shard_fp32_groups",
)


def leaves(optimizer: Any) -> Iterator[Any]:
    """The optimizers at the ends of a chain of chains; None (no optimizer) has none."""
    if optimizer is None:
        return
    children = getattr(optimizer, "chained_optimizers", None)
    if children is None:
        yield optimizer
        return
    for child in children:
        yield from leaves(child)


def add_optimizer(inventory: Inventory, optimizer: Any) -> None:
    """List main weights, states, and the gradients that hang on main weights."""
    main = inventory.group(StateKind.MAIN_WEIGHTS, "main weights")
    states = inventory.group(StateKind.OPTIMIZER_STATES, "inner optimizer state")
    for number, leaf in enumerate(leaves(optimizer)):
        prefix = f"optimizer[{number}]"
        for attribute in _MAIN_GROUPS:
            for index, tensor in enumerate(_flatten(getattr(leaf, attribute, ()))):
                main.add(f"{prefix}.{attribute}[{index}]", tensor)
        inner = device_part(leaf.optimizer)
        if inner is not None:
            collect.add_main_weights(main, inner)
            collect.add_optimizer_states(states, inner)
    # A precision-aware optimizer keeps its main copies in the state dictionary.
    main.tensors.extend(entry for entry in states.tensors if _is_main_copy(entry[0]))
    states.tensors[:] = [entry for entry in states.tensors if not _is_main_copy(entry[0])]
    grads = inventory.group(StateKind.GRAD_BUFFERS, "gradients on main weights", keep=False)
    collect.add_grads(grads, main.tensors)
    for name, tensor in main.tensors:
        grads.add(f"{name}.decoupled_grad", getattr(tensor, "decoupled_grad", None))


def _is_main_copy(name: str) -> bool:
    return name.endswith("['master_param']")


def device_part(inner: Any) -> torch.optim.Optimizer | None:
    """The part of an inner optimizer that works on the device; None if there is none.

    HybridDeviceOptimizer (0.12+) splits its parameters between optimizers on the host and one on the device. What is
    on the host stays there, so only the other is looked at: it holds the fp32 copies it steps on as its parameters, and
    their state. (The hybrid's own `state` is put together anew from both at every step.)
    """
    if hasattr(inner, "gpu_optimizer") and hasattr(inner, "cpu_optimizers"):
        inner = inner.gpu_optimizer
    return inner if isinstance(inner, torch.optim.Optimizer) else None


def _flatten(groups: Any) -> Iterator[torch.Tensor | None]:
    for group in groups or ():
        yield from group
