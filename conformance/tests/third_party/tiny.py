"""Somebody's own adapter, for somebody's own data-parallel wrapper: as little as an adapter can be."""

import torch

from megastow.plain import PlainAdapter, PlainBinding


class TinyDataParallel(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, values):
        return self.module(values)

    def reduce(self):
        for parameter in self.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()


class TinyOptimizer:
    """Not one of torch's, so the adapter for plain modules refuses it."""

    def __init__(self, model):
        self.optimizer = torch.optim.AdamW([p for chunk in model for p in chunk.parameters() if p.requires_grad])

    def scale_loss(self, loss):
        return loss

    def get_loss_scale(self):
        return torch.ones(1)

    def step(self):
        self.optimizer.step()
        return True, None, None


class TinyAdapter(PlainAdapter):
    name = "tiny"
    supports = "TinyDataParallel and TinyOptimizer"

    def refuses(self, model, optimizer):
        given = [*model, *([] if optimizer is None else [optimizer])]
        return [f"{type(part).__name__} is nothing of mine" for part in given if type(part).__module__ != __name__]

    def bind(self, model, optimizer):
        return PlainBinding(model, None if optimizer is None else optimizer.optimizer)


ADAPTER = TinyAdapter()
