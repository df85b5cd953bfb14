"""What no run of a real trainer can time: collectives that are still in flight, and who is blocked meanwhile.

The conformance suite trains with the real thing; there, on one machine, every collective has ended before anyone looks.
"""

from types import SimpleNamespace

import pytest
import torch

from megastow import OffloadedError, StateKind, TransferError, UnsupportedLayoutError, megatron_parts
from megastow.guard import Guard
from megastow_legacy_v3 import ADAPTER


class Work:
    """A collective that ends once it has been asked a few times, and that nobody but Megatron may wait for."""

    def __init__(self, polls):
        self.polls = polls

    def is_completed(self):
        self.polls -= 1
        return self.polls < 0

    def get_future(self):
        return None

    def wait(self):
        raise AssertionError("waiting belongs to Megatron")


class Bucket:
    def __init__(self):
        self.communication_handle = None

    def start_grad_sync(self):
        pass


def make_buffer(grad_dtype=torch.float32):
    return SimpleNamespace(
        param_data=torch.zeros(4),
        grad_data=torch.zeros(4, dtype=grad_dtype),
        grad_dtype=grad_dtype,
        buckets=[Bucket()],
        data_parallel_group=None,
    )


class Chunk(torch.nn.Module):
    """A DDP chunk of this generation, as far as an adapter looks at it."""

    __module__ = "megatron.core.distributed.distributed_data_parallel"

    def __init__(self, *buffers):
        super().__init__()
        self.module = torch.nn.Linear(2, 2, bias=False)
        self.param_to_buffer = {}
        self.buffers = list(buffers) or [make_buffer()]
        self.expert_parallel_buffers = [make_buffer()]

    def zero_grad_buffer(self):
        pass


class Optimizer:
    """A leaf of this generation; `overlap` is what makes it gather parameters in `zero_grad`."""

    __module__ = "megatron.core.optimizer.distrib_optimizer"

    def __init__(self, *, overlap):
        self.optimizer = None
        self.overlap_param_gather = overlap
        self.all_gather_handles = [None, None]

    def zero_grad(self):
        pass


ALL = tuple(StateKind)


@pytest.mark.parametrize("keep_grads", [True, False])
def test_a_move_waits_for_reductions_and_gathers_and_leaves_their_handles(keep_grads):
    chunk, optimizer = Chunk(), Optimizer(overlap=True)
    works = [Work(polls=3) for _ in range(3)]
    chunk.buffers[0].buckets[0].communication_handle = works[0]
    chunk.expert_parallel_buffers[0].buckets[0].communication_handle = works[1]
    optimizer.all_gather_handles[1] = works[2]
    ADAPTER.bind([chunk], SimpleNamespace(chained_optimizers=[optimizer])).quiesce(ALL, keep_grads=keep_grads)
    assert [work.polls for work in works] == [-1, -1, -1]
    assert chunk.buffers[0].buckets[0].communication_handle is works[0]
    assert optimizer.all_gather_handles == [None, works[2]]


@pytest.mark.parametrize("where", ["buckets[0]", "optimizer[0]"])
def test_a_collective_that_does_not_end_is_named(where, monkeypatch):
    monkeypatch.setattr(megatron_parts, "QUIESCE_SECONDS", 0.01)
    chunk, optimizer = Chunk(), Optimizer(overlap=True)
    if where == "optimizer[0]":
        optimizer.all_gather_handles[0] = Work(polls=10**9)
    else:
        chunk.buffers[0].buckets[0].communication_handle = Work(polls=10**9)
    with pytest.raises(TransferError) as raised:
        ADAPTER.bind([chunk], optimizer).quiesce(ALL, keep_grads=True)
    assert where in str(raised.value)


@pytest.mark.parametrize("is_chain", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_zero_grad_needs_the_weights_only_where_it_gathers_them(overlap, is_chain):
    leaf = Optimizer(overlap=overlap)
    whole = leaf
    if is_chain:
        whole = SimpleNamespace(chained_optimizers=[Optimizer(overlap=overlap), leaf], zero_grad=leaf.zero_grad)
    binding, guard = ADAPTER.bind([Chunk()], whole), Guard()
    guard.update({StateKind.WEIGHTS}, binding.guarded_calls)
    for optimizer in (whole, leaf):
        if overlap:
            with pytest.raises(OffloadedError, match="zero_grad"):
                optimizer.zero_grad()
        else:
            optimizer.zero_grad()
    guard.close()
    whole.zero_grad()


def test_buckets_are_blocked_behind_the_chunk_too():
    chunk = Chunk()
    binding, guard = ADAPTER.bind([chunk], None), Guard()
    guard.update({StateKind.GRAD_BUFFERS}, binding.guarded_calls)
    for call in (chunk.zero_grad_buffer, chunk.expert_parallel_buffers[0].buckets[0].start_grad_sync):
        with pytest.raises(OffloadedError, match="grad_buffers"):
            call()
    guard.close()


def test_facts_are_what_the_buffers_show():
    facts = ADAPTER.bind([Chunk(make_buffer(torch.bfloat16))], None).facts
    assert facts == {
        "use_distributed_optimizer": True,
        "accumulate_allreduce_grads_in_fp32": False,
        "params_dtype": torch.float32,
    }
    chunk = Chunk()
    chunk.buffers[0].param_data = None
    facts = ADAPTER.bind([chunk], None).facts
    assert not facts["use_distributed_optimizer"]
    assert facts["accumulate_allreduce_grads_in_fp32"]


class Float8Tensor(torch.Tensor):
    """Has the name of Transformer Engine's class."""


def test_what_cannot_be_moved_is_refused_when_bound_and_at_each_move():
    chunk = Chunk()
    binding = ADAPTER.bind([chunk], None)
    chunk.module.cuda_graphs = [object()]  # 0.7 and 0.8: transformer_block.py
    for look in (binding.inventory, lambda: ADAPTER.bind([chunk], None)):
        with pytest.raises(UnsupportedLayoutError, match="cuda_graphs of module module"):
            look()
    del chunk.module.cuda_graphs
    binding.inventory()
    chunk.module.weight = torch.nn.Parameter(torch.zeros(2).as_subclass(Float8Tensor))
    with pytest.raises(UnsupportedLayoutError, match=r"parameter module\.weight .* \(Float8Tensor\)"):
        binding.inventory()
