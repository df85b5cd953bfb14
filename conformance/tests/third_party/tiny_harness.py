"""How the suite builds a trainer of it. ``build`` would do; the class also says what is lacking."""

import contextlib

import tiny
import torch

from megastow_conformance.base_trainer import BaseTrainer
from megastow_conformance.toy_model import ToyModel


class TinyTrainer(BaseTrainer):
    def _no_sync(self, chunk):
        return contextlib.nullcontext()

    def _reduce_grads(self):
        for chunk in self.model:
            chunk.reduce()

    def clear_grads(self):
        self.optimizer.optimizer.zero_grad()

    def _walk_grad_buffers(self, number, chunk):
        return iter(())


def build(scenario):
    torch.manual_seed(1)
    model = [tiny.TinyDataParallel(ToyModel(scenario))]
    return TinyTrainer(scenario, 1, model, tiny.TinyOptimizer(model), torch.device("cpu"))


class TinyHarness:
    build = staticmethod(build)

    def lacks(self, version, device):
        return dict.fromkeys(["gpt", "distributed_optimizer"], f"Megatron {version} on {device} is tiny")
