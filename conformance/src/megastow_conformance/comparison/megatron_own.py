"""What megatron-core 0.16 ships itself, wrapped: the offloading of buffers and of optimizer state.

`_ParamAndGradBuffer.offload_to_cpu` and `DistributedDataParallel.offload_grad_buffers` (0.16), and
`MegatronOptimizer.offload_to_cpu` (0.15); megatron/core/optimizer/optimizer.py and
megatron/core/distributed/{param_and_grad_buffer,distributed_data_parallel}.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from megastow import StateKind
from megastow_conformance import oracle
from megastow_conformance.base_trainer import links
from megastow_conformance.comparison.wrapped import Move, Wrapped, chunks_of, to_host


def own_offload(model: Any, optimizer: Any, **_options: Any) -> Wrapped:
    """Megatron's own calls, each for the kinds that it says it is for."""
    chunks = chunks_of(model)
    device = next(chunks[0].parameters()).device
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def each(method: str, **arguments: Any) -> None:
        with _cpu_as_device(device, optimizer):
            for buffer in buffers:
                getattr(buffer, method)(**arguments)

    def ask_optimizer(method: str) -> None:
        with _cpu_as_device(device, optimizer):
            getattr(optimizer, method)()

    def held() -> Iterable[torch.Tensor]:
        copies = [buffer.param_data_cpu for buffer in buffers if buffer.param_data_cpu is not None]
        return [
            *copies,
            *(tensor for tensor in _optimizer_tensors(optimizer) if not oracle.is_on_device(tensor, device)),
        ]

    weights, grads = {"move_params": True, "move_grads": False}, {"move_params": False, "move_grads": True}
    return Wrapped(
        [
            # First, because some of what the optimizer steps on lies in the weights' memory.
            Move(
                (StateKind.MAIN_WEIGHTS, StateKind.OPTIMIZER_STATES),
                partial(ask_optimizer, "offload_to_cpu"),
                partial(ask_optimizer, "restore_from_cpu"),
            ),
            Move(
                (StateKind.WEIGHTS,),
                partial(each, "offload_to_cpu", **weights),
                partial(each, "reload_from_cpu", **weights),
            ),
            # What ddp.offload_grad_buffers and restore_grad_buffers do for each buffer, without their synchronisation.
            Move(
                (StateKind.GRAD_BUFFERS,),
                partial(each, "offload_to_cpu", **grads),
                partial(each, "reload_from_cpu", **grads),
            ),
        ],
        held,
        device,
    )


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """What inner optimizers step on and keep, but for torch's step counters."""
    for link in links(optimizer):
        for group in link.optimizer.param_groups:
            yield from group["params"]
        for state in link.optimizer.state.values():
            yield from (value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step")


@contextlib.contextmanager
def _cpu_as_device(device: torch.device, optimizer: Any) -> Iterator[None]:
    """Lets Megatron's code tell host from device on a machine that has only one of them.

    Where the device is the CPU, host memory is what cannot be resized (see ``to_host``), and what torch would have kept
    on the host: step counters. Beside a GPU nothing is changed.
    """
    if device.type != "cpu":
        yield
        return
    inner = [link.optimizer for link in links(optimizer)]
    counters = {id(state.get("step")) for torch_optimizer in inner for state in torch_optimizer.state.values()}
    stand_ins: dict[str, Any] = {
        "is_cuda": property(lambda tensor: oracle.is_on_device(tensor, device) and id(tensor) not in counters),
        "cpu": to_host,
        "cuda": lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor),
        "pin_memory": lambda tensor: tensor,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, stand_in))
        yield
