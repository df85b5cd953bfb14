"""A double, our own code, of the Qwen-MoE fork of Megatron-LM, which never was public.

It stands for megatron/model/distributed.py and megatron/optimizer/ of that fork, as far as they are known: the
``MemoryBuffer`` generation of Megatron-LM 23.08 with a buffer type (``ParamBufferType``) above each dtype, since expert
parameters are reduced over another process group. What is not known of the fork is as in 23.08.

Without experts it trained to the same bits as the real 23.08 (torch 2.13, CPU).
"""

from megatron.global_vars import get_args

__all__ = ["get_args"]
