"""What is moved: the real Megatron trainer of the demo, or many tensors in a plain module under a torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from megastow_conformance import oracle
from megastow_conformance.demo_models import SEED, Size, build_trainer


class Subject(Protocol):
    """Something with state on the device. What it returns is to be let go of before a move."""

    @property
    def model(self) -> Any:
        """What `create_memory_manager` takes as the model."""
        ...

    @property
    def optimizer(self) -> Any:
        """What `create_memory_manager` takes as the optimizer."""
        ...

    def state(self) -> Mapping[str, torch.Tensor]:
        """The state that must be kept, by name."""
        ...

    def grads(self) -> Mapping[str, torch.Tensor]:
        """Gradients, which need not be kept."""
        ...

    def close(self) -> None:
        """Drops everything."""
        ...


class TrainerSubject:
    """A GPT trainer on megatron-core; any two after the same number of steps are the same, bit for bit."""

    def __init__(self, size: Size, *, distributed_optimizer: bool = True) -> None:
        self._trainer = build_trainer(size, distributed_optimizer=distributed_optimizer)
        self._num_steps = 0

    def train(self) -> None:
        """One training step."""
        self._trainer.train_step(self._num_steps)
        self._num_steps += 1

    def forward(self) -> Sequence[bytes]:
        """The losses of a step's forward passes, without gradients; waits for their end."""
        return self._trainer.evaluate(self._num_steps)

    @property
    def model(self) -> Any:
        """The DDP chunks."""
        return self._trainer.model

    @property
    def optimizer(self) -> Any:
        """Megatron's optimizer."""
        return self._trainer.optimizer

    def state(self) -> Mapping[str, torch.Tensor]:
        """Weights, main weights, moments."""
        return self._trainer.named_state()

    def grads(self) -> Mapping[str, torch.Tensor]:
        """The flat gradient buffers and what lies on them."""
        return self._trainer.named_grads()

    def close(self) -> None:
        """Drops the trainer."""
        self._trainer.close()


class ManyTensors:
    """Parameters of many sizes in a plain module, and their momentum, without gradients.

    Args:
        num_tensors: Parameters and momenta together; an even number.
        smallest: Bytes of the smallest.
        largest: Bytes of the largest; sizes in between are spread evenly over the powers of two.
        device: Where they are.
    """

    def __init__(self, num_tensors: int, smallest: int, largest: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(SEED)
        exponents = torch.rand(num_tensors // 2, generator=generator) * math.log2(largest / smallest)
        counts = (smallest / 4 * torch.exp2(exponents)).long().tolist()
        filler = torch.Generator(device).manual_seed(SEED)
        parameters = [torch.empty(count, device=device).normal_(generator=filler) for count in counts]
        self._model = torch.nn.ParameterList(parameters)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3, momentum=0.9)
        for parameter in self._model.parameters():
            parameter.grad = parameter.detach()
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def model(self) -> Any:
        """The module."""
        return self._model

    @property
    def optimizer(self) -> Any:
        """The optimizer with the momenta."""
        return self._optimizer

    def state(self) -> Mapping[str, torch.Tensor]:
        """Parameters and momenta."""
        found = dict(self._model.named_parameters(prefix="parameter"))
        for index, parameter in enumerate(self._model.parameters()):
            found[f"momentum.{index}"] = self._optimizer.state[parameter]["momentum_buffer"]
        return found

    def grads(self) -> Mapping[str, torch.Tensor]:
        """None."""
        return {}

    def close(self) -> None:
        """Drops everything."""
        self._model = torch.nn.ParameterList()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def device_storages(tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[torch.UntypedStorage]:
    """The distinct storages on the device that tensors lie on; to be let go of before a move that drops storages."""
    found = {
        oracle.storage_key(tensor): tensor.untyped_storage()
        for tensor in tensors.values()
        if tensor.numel() and oracle.is_on_device(tensor, device)
    }
    return list(found.values())
