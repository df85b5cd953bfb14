"""How the conformance suite builds a trainer of your fork. This file and the adapter are all that you write.

The scenarios are data (`megastow_conformance.scenarios`): `build` makes what one asks for, and `lacks` says what this
fork cannot do, with the reason that people will read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from megastow_conformance.base_trainer import BaseTrainer
from megastow_conformance.scenarios import Scenario
from megastow_conformance.toy_model import ToyModel
from megastow_conformance.trainer import Use

_SEED = 1234


def lacks(version: str, device: str) -> dict[str, str]:
    """What this fork cannot do, by the words of `Scenario.needs`, with the reason."""
    plain = "this fork has one optimizer, one process group and no pipeline"
    words = "distributed_optimizer experts expert_parallel tensor_parallel virtual_pipeline overlap bf16_grads"
    return {
        **dict.fromkeys(words.split(), plain),
        **dict.fromkeys(("fp16", "sgd", "sgd_distopt", "mixed_chain", "hybrid", "precision_aware"), plain),
        "gpt": "the template trains the suite's toy model only",
        "sharded_checkpoint": "this fork has no distributed checkpoints",
    }


def build(scenario: Scenario) -> AcmeTrainer:
    """A trainer of the scenario, bit-identical at each call."""
    from megatron.core.distributed import FlatDataParallel
    from megatron.core.optimizer import FlatOptimizer

    torch.manual_seed(_SEED)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model: list[torch.nn.Module] = [FlatDataParallel(ToyModel(scenario).to(device))]
    return AcmeTrainer(scenario, _SEED, model, FlatOptimizer(model, lr=0.01), device)


class AcmeTrainer(BaseTrainer):
    """What this fork does differently from the others; everything else is the suite's."""

    hook_folders = frozenset({"megatron"})  # what the fork hangs on the autograd graph comes from there

    def _no_sync(self, chunk: Any) -> Any:
        return contextlib.nullcontext()  # this fork reduces when it is told to, and only then

    def _reduce_grads(self) -> None:
        for chunk in self.model:
            chunk.reduce_grads()  # type: ignore[operator]

    def clear_grads(self) -> None:
        """The buffer, and the views on it that main weights have."""
        for chunk in self.model:
            chunk.zero_grads()  # type: ignore[operator]
        self.optimizer.zero_grad()

    def _walk_grad_buffers(self, number: int, chunk: Any) -> Iterator[tuple[str, Any]]:
        yield f"chunk{number}.flat_grads", chunk.flat_grads

    def uses(self, kind: str) -> list[Use]:
        """The calls of this fork that must raise while a kind is away, besides those that every Megatron has."""
        chunk: Any = self.model[0]
        own: list[Use] = [("zero_grads", chunk.zero_grads), ("reduce_grads", chunk.reduce_grads)]
        return super().uses(kind) + (own if kind == "grad_buffers" else [])

    def live_checkpoint(self) -> dict[str, Any]:
        """What the fork's own `state_dict` methods give."""
        model = [chunk.state_dict() for chunk in self.model]
        return {"model": model, "optimizer": self.optimizer.state_dict()}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """The fork's own `load_state_dict` methods."""
        state = copy.deepcopy(checkpoint)
        for chunk, saved in zip(self.model, state["model"], strict=True):
            chunk.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
