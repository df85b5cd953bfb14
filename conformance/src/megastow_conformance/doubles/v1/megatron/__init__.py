"""A double, our own code, of Megatron-LM 23.08: gradients in one ``MemoryBuffer`` for each dtype.

It stands for megatron/model/distributed.py, megatron/optimizer/ and as much of megatron/core/parallel_state.py as a
trainer without tensor and pipeline parallelism needs. What it mirrors: where tensors lie, what aliases what, in which
order gradients are reduced and parameters gathered, and that new parameters go through the memory of the gradients.

Driven by ``megatron_legacy``, it trained to the same bits as the real tree in every toy scenario that both can do, on
one rank and on two (torch 2.13, CPU).
"""

from megatron.global_vars import get_args

__all__ = ["get_args"]
