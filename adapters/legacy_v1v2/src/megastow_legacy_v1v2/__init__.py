"""megastow's adapter for Megatron-LM v2.6 to megatron-core 0.5: `MemoryBuffer` and `GradBuffer`, gradients only."""

from megastow_legacy_v1v2.declaration import ADAPTER

__all__ = ["ADAPTER"]
