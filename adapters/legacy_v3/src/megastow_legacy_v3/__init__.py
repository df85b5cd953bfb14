"""megastow's adapter for megatron-core 0.6 to 0.8: `ParamAndGradBuffer`, where buffers are sharded by the bucket."""

from megastow_legacy_v3.declaration import ADAPTER

__all__ = ["ADAPTER"]
