"""Modules and their configuration; see the package's docstring."""

from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["TransformerConfig"]
