"""A double, our own code, of Megatron-LM core_v0.5.0: gradients in a ``GradBuffer`` of buckets for each dtype.

It stands for megatron/core/distributed/, megatron/optimizer/ and as much of megatron/core as a trainer without tensor
and pipeline parallelism needs. What it mirrors: where tensors lie, what aliases what, overlapped reduction of gradients
and overlapped gathering of parameters, and the hazards of these: from a step to the next forward pass the new
parameters are in the memory of the gradients only; a buffer is zeroed by the optimizer, after its parameters were
copied to the model; and the first gathering starts in ``zero_grad``.

Driven by ``megatron_legacy``, it trained to the same bits as the real tree in every toy scenario that both can do, on
one rank and on two (torch 2.13, CPU).
"""

from megatron.global_vars import get_args

__all__ = ["get_args"]
