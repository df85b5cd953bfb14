"""The configuration of a module; see the package's docstring."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TransformerConfig:
    """As much of a language model's configuration as the wrapper hands on.

    Attributes:
        num_layers: Megatron insists on it.
        hidden_size: Megatron insists on it.
        num_attention_heads: Megatron insists on it.
        expert_model_parallel_size: Over how many ranks experts are spread.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    expert_model_parallel_size: int = 1
