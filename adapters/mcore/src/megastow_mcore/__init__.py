"""megastow's adapter for megatron-core 0.9 to 0.19: `_ParamAndGradBuffer`, bucket groups, chained optimizers."""

from megastow_mcore.declaration import ADAPTER

__all__ = ["ADAPTER"]
