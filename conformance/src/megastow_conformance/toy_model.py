"""The toy model: a small module with just those kinds of parameters that a scenario asks for. It knows no Megatron."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megastow_conformance.scenarios import Scenario

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The dtype that a scenario's precision stands for."""

WIDTH = 32
"""The number of inputs and of outputs."""

_HIDDEN = 45  # odd, so that shards end inside parameters and buffers need padding
_BATCH = 8


def inputs(generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """One microbatch: float32 of shape (8, `WIDTH`)."""
    return torch.randn(_BATCH, WIDTH, generator=generator).to(device)


def loss(outputs: torch.Tensor) -> torch.Tensor:
    """A scalar float32 of the model's outputs."""
    return outputs.float().square().mean()


class _RunningMean(torch.nn.Module):
    """Buffers that training changes: the mean of what passed by, which differs between data-parallel ranks."""

    mean: torch.Tensor
    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("weight", torch.linspace(0.0, 1.0, WIDTH), persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(values.detach().float().mean(0), 0.1)
        return (self.mean * self.weight).to(values.dtype)


class _Adapted(torch.nn.Module):
    """A frozen linear map with a small trained correction of rank 3."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = torch.nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = torch.nn.Linear(inputs, 3, bias=False)
        self.up = torch.nn.Linear(3, outputs, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        corrected: torch.Tensor = self.base(values) + self.up(self.down(values))
        return corrected


def _perceptron(linear: Callable[[int, int], torch.nn.Module] = torch.nn.Linear) -> torch.nn.Sequential:
    return torch.nn.Sequential(linear(WIDTH, _HIDDEN), torch.nn.Tanh(), linear(_HIDDEN, WIDTH))


def _tied() -> torch.nn.Sequential:
    first, second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    return torch.nn.Sequential(first, torch.nn.Tanh(), second)


def _partly_frozen() -> torch.nn.Sequential:
    half = _perceptron()
    half[0].bias.requires_grad_(False)
    return torch.nn.Sequential(_perceptron().requires_grad_(False), half)


def as_experts(module: torch.nn.Module) -> torch.nn.Module:
    """Marks every parameter the way Megatron marks those of experts: not reduced with the dense ones."""
    for parameter in module.parameters():
        setattr(parameter, "allreduce", False)  # noqa: B010  (a Tensor has no such attribute of its own)
    return module


class ToyModel(torch.nn.Module):
    """Residual parts, one for each kind of parameter that the scenario asks for."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__()
        self.dtype = DTYPES[scenario.precision]
        parts: dict[str, torch.nn.Module] = {"dense": _perceptron(_Adapted if scenario.lora else torch.nn.Linear)}
        if scenario.tied:
            parts["tied"] = _tied()
        if scenario.frozen:
            parts["frozen"] = _partly_frozen()
        if scenario.experts:
            parts["experts"] = as_experts(_perceptron())
        parts["last"] = _perceptron(_Adapted if scenario.lora else torch.nn.Linear)
        self.parts = torch.nn.ModuleDict(parts).to(self.dtype)
        if scenario.fp32_params:
            self.parts["fp32"] = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), _perceptron())
        self.parts["statistics"] = _RunningMean()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = values.to(self.dtype)
        for name, part in self.parts.items():
            inputs = values.float() if name == "fp32" else values
            values = values + part(inputs).to(self.dtype)
        return values
