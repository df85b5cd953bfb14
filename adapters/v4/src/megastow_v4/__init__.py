"""megastow's adapter for the Qwen-MoE fork of Megatron-LM: gradient buffers by `ParamBufferType`."""

from megastow_v4.declaration import ADAPTER

__all__ = ["ADAPTER"]
