"""A trainer with flat parameter buffers, sharded as Megatron's distributed optimizer does; it calls no manager.

bf16 parameters lie in one buffer of two buckets, with gaps between them and at the ends of buckets. Each rank has fp32
main weights of its shard of each bucket, steps on those, casts them back, and the ranks gather the buckets. Beside them
there is what is in no main weight: an fp32 layer, a frozen parameter, a registered buffer.
"""

import pytest
import torch
import torch.distributed as dist
from core_toys import Tensors, odd_floats

from megastow import StateKind, create_memory_manager, registry
from megastow.derived import Bucket, DerivableBuffer
from megastow.plain import PlainAdapter, PlainBinding

ALIGNED = 32
WIDTH = 20


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(4))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.frozen = torch.nn.Parameter(odd_floats(torch.bfloat16), requires_grad=False)
        self.register_buffer("odd", odd_floats(torch.bfloat16))

    def forward(self, inputs):
        for layer in self.layers:
            inputs = inputs + torch.tanh(layer(inputs))
        return self.norm(inputs.float())


class FlatTrainer:
    """Trains the same on all ranks of a group, each with its shards."""

    def __init__(self, group=None, seed=0):
        torch.manual_seed(seed)
        self.group = group if group is not None and group.size() > 1 else None
        self.model = Net()
        self._lay_out(list(self.model.layers.parameters()))
        self.main = [
            (start, self.flat.data[start:end].float().requires_grad_())
            for start, end in self._own_ranges()
            if end > start
        ]
        trained = [main for _, main in self.main] + list(self.model.norm.parameters())
        self.optimizer = torch.optim.Adam(trained, lr=0.01)
        self._data = torch.Generator().manual_seed(seed)

    def _lay_out(self, parameters):
        world = 1 if self.group is None else self.group.size()
        self.ranges, self.buckets, start, first = [], [], 0, 0
        for number, parameter in enumerate(parameters):
            self.ranges.append((start, start + parameter.numel()))
            start += _aligned(parameter.numel(), ALIGNED)
            if number in (2, len(parameters) - 1):
                start = first + _aligned(start - first, ALIGNED * world)
                self.buckets.append(Bucket(first, start, self.group))
                first = start
        self.flat = torch.zeros(start, dtype=torch.bfloat16)
        for parameter, (first, last) in zip(parameters, self.ranges, strict=True):
            place = self.flat[first:last].view(parameter.shape)
            place.copy_(parameter.data)
            parameter.data = place
        self.parameters = parameters

    def _own_ranges(self):
        for first, last in (bucket.shard for bucket in self.buckets):
            for start, end in self.ranges:
                yield max(first, start), min(last, end)

    def step(self):
        for p in (*self.model.parameters(), *(main for _, main in self.main)):
            p.grad = None
        loss = self.model(torch.randn(4, WIDTH, generator=self._data).bfloat16()).square().mean()
        loss.backward()
        grads = torch.zeros(self.flat.numel())
        for parameter, (first, last) in zip(self.parameters, self.ranges, strict=True):
            grads[first:last] = parameter.grad.float().view(-1)
        for start, main in self.main:
            main.grad = grads[start : start + main.numel()].clone()
        self.optimizer.step()
        self.gather()
        return loss.detach()

    def gather(self):
        """Cast main weights, and gather what the others have cast."""
        flat = self.flat.data
        for start, main in self.main:
            flat[start : start + main.numel()].copy_(main.detach())
        for bucket in self.buckets if self.group is not None else ():
            start, end = bucket.shard
            dist.all_gather_into_tensor(flat[bucket.start : bucket.end], flat[start:end].clone(), group=self.group)

    def tensors(self):
        found = Tensors(flat=self.flat)
        found.update(self.model.named_parameters(prefix="weights"))
        found.update(self.model.named_buffers(prefix="weights"))
        found.update({f"main[{i}]": main for i, (_, main) in enumerate(self.main)})
        for i, state in enumerate(self.optimizer.state.values()):
            found.update({f"state[{i}].{k}": v for k, v in state.items() if k != "step"})
        return found


def _aligned(count, unit):
    return -(-count // unit) * unit


class FlatAdapter(PlainAdapter):
    """Knows one trainer by its model, and says how its weights are derived."""

    name = "flat"
    trainers = {}  # noqa: RUF012 - by the identity of the model

    def bind(self, model, optimizer):
        return FlatBinding(model, optimizer, self.trainers[id(model[0])])


class FlatBinding(PlainBinding):
    def __init__(self, model, optimizer, trainer):
        super().__init__(model, optimizer)
        self._trainer = trainer

    def inventory(self):
        inventory = super().inventory()
        inventory.group(StateKind.WEIGHTS, "the flat buffer").add("flat", self._trainer.flat)
        return inventory

    def derivable_buffers(self):
        t = self._trainer
        yield DerivableBuffer("the flat buffer", t.flat, t.buckets, sorted(t.main, key=lambda each: each[0]))


class _Entry:
    name = value = "flat"

    def load(self):
        return FlatAdapter()


def derive(trainer, **options):
    """A manager of a flat trainer, with `derive_weights` unless it is given."""
    FlatAdapter.trainers[id(trainer.model)] = trainer
    options = {"derive_weights": True, "bucket_bytes": 4096, "chunk_bytes": 512, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", lambda group: [_Entry()])
        return create_memory_manager(trainer.model, trainer.optimizer, adapter="flat", **options)
