"""The megastow adapter for acme's fork of Megatron."""

from megastow_acme.declaration import ADAPTER

__all__ = ["ADAPTER"]
