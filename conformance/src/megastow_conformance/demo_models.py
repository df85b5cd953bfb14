"""What takes part in the demo: a GPT trainer of a chosen size, and a reference model of the same size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from megastow_conformance import megatron_core
from megastow_conformance.megatron_core import MegatronCoreTrainer, core_module, supported
from megastow_conformance.scenarios import SCENARIOS, Scenario

SEED = 20_241
"""Decides weights, data and dropout of every model of the demo."""


@dataclass(frozen=True)
class Size:
    """How large the trainer and the reference model are.

    Attributes:
        name: What ``--size`` takes.
        hidden: Width of the residual stream; attention heads have ``hidden / heads`` elements.
        layers: Transformer layers.
        heads: Attention heads.
        sequence: Tokens a sequence.
        vocabulary: Tokens there are.
        batch: Sequences a microbatch; a step has two microbatches.
        learning_rate: Adam's.
        new_tokens: Tokens that the reference model generates a round, for each of two prompts.
        seconds: When the whole demo counts as hung, unless the user says otherwise.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    sequence: int
    vocabulary: int
    batch: int = 1
    learning_rate: float = 3e-4
    new_tokens: int = 32
    seconds: int = 1800

    @property
    def num_parameters(self) -> int:
        """Parameters of the trainer's model, biases and norms left out."""
        per_layer = 12 * self.hidden * self.hidden
        return self.layers * per_layer + (2 * self.vocabulary + self.sequence) * self.hidden

    @property
    def description(self) -> str:
        """The trainer, in words."""
        return (
            f"a GPT of {self.num_parameters / 1e6:.3g} million parameters ({self.layers} layers of {self.hidden}, "
            f"{self.heads} heads, {self.sequence} tokens a sequence), bf16 with fp32 main weights, Adam in Megatron's "
            "DistributedOptimizer"
        )


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        size.name: size
        for size in (
            Size("tiny", 256, 4, 8, 64, 8192, batch=2, learning_rate=1e-3, new_tokens=16, seconds=300),
            Size("small", 512, 8, 8, 256, 16384, batch=2, learning_rate=1e-3),
            Size("125m", 768, 12, 12, 1024, 50304),
            Size("355m", 1024, 24, 16, 1024, 50304),
            Size("1.4b", 2048, 24, 16, 2048, 50304),
        )
    }
)
"""The presets by name; the first is the default, and takes seconds on a CPU."""


# --- the trainer ------------------------------------------------------------------------------------------------------


def build_trainer(size: Size, *, seed: int = SEED, distributed_optimizer: bool = True) -> MegatronCoreTrainer:
    """Builds a GPT trainer of a given size from megatron-core; two calls give bit-identical trainers.

    The layers are Megatron's local ones and no fusion is asked for, so that neither Transformer Engine nor Apex nor any
    compiled extension is needed.

    Args:
        size: How large.
        seed: Of the weights.
        distributed_optimizer: Whether data-parallel ranks have a shard of main weights and states each, or all of them.
    """
    megatron_core.load()
    parallel_state = core_module("parallel_state")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    torch.manual_seed(seed)
    core_module("tensor_parallel").model_parallel_cuda_manual_seed(seed)
    config = supported(
        core_module("transformer").TransformerConfig,
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        ffn_hidden_size=4 * size.hidden,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    module = core_module("models.gpt").GPTModel(
        config=config,
        transformer_layer_spec=core_module("models.gpt.gpt_layer_specs").get_gpt_layer_local_spec(),
        vocab_size=size.vocabulary,
        max_sequence_length=size.sequence,
        share_embeddings_and_output_weights=False,
    )
    distributed = core_module("distributed")
    chunk = distributed.DistributedDataParallel(
        config,
        supported(
            distributed.DistributedDataParallelConfig,
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed_optimizer,
        ),
        core_module("transformer.module").Float16Module(config, module.to(megatron_core.device())),
    )
    optimizer_module = core_module("optimizer")
    optimizer_config = supported(
        optimizer_module.OptimizerConfig,
        optimizer="adam",
        lr=size.learning_rate,
        min_lr=0.0,
        weight_decay=0.01,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed_optimizer,
    )
    scenario = SCENARIOS["gpt_distopt" if distributed_optimizer else "gpt_plainopt"]
    optimizer = optimizer_module.get_megatron_optimizer(optimizer_config, [chunk])
    return _SizedTrainer(scenario, size, seed, chunk, optimizer)


class _SizedTrainer(MegatronCoreTrainer):
    """The suite's trainer with a model of another size, and data that can be learnt: sequences that count upwards."""

    def __init__(self, scenario: Scenario, size: Size, seed: int, chunk: torch.nn.Module, optimizer: Any) -> None:
        super().__init__(scenario, seed, [chunk], optimizer, megatron_core.device())
        self._size = size

    def _gpt_loss(self, generator: torch.Generator) -> torch.Tensor:
        size, device = self._size, megatron_core.device()
        first = torch.randint(size.vocabulary, (size.batch, 1), generator=generator)
        tokens = ((first + torch.arange(size.sequence + 1)) % size.vocabulary).to(device)
        positions = torch.arange(size.sequence, device=device).expand(size.batch, -1)
        is_future = torch.ones(1, 1, size.sequence, size.sequence, device=device).triu(1).bool()
        output: torch.Tensor = self.model[0](
            tokens[:, :-1].contiguous(), positions, is_future, labels=tokens[:, 1:].contiguous()
        )
        return output.float().mean()


# --- the reference model ----------------------------------------------------------------------------------------------


class ReferenceModel(torch.nn.Module):
    """A plain GPT in bf16, of the trainer's size, that only ever generates. Needs no Megatron and no optimizer."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        make: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.sequence = size.sequence
        self.tokens = torch.nn.Embedding(size.vocabulary, size.hidden, **make)
        self.positions = torch.nn.Embedding(size.sequence, size.hidden, **make)
        self.blocks = torch.nn.ModuleList(_Block(size.hidden, size.heads, make) for _ in range(size.layers))
        self.norm = torch.nn.LayerNorm(size.hidden, **make)
        self.output = torch.nn.Linear(size.hidden, size.vocabulary, bias=False, **make)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next token, shape [batch, vocabulary], for tokens of shape [batch, length]."""
        values = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            values = block(values)
        logits: torch.Tensor = self.output(self.norm(values[:, -1]))
        return logits

    @torch.no_grad()
    def generate(self, prompts: torch.Tensor, new_tokens: int, seed: int) -> torch.Tensor:
        """Samples tokens after the prompts; the same weights and seed give the same tokens.

        Returns:
            The new tokens, int64 of shape [batch, new_tokens], on the CPU.
        """
        generator = torch.Generator().manual_seed(seed)
        tokens = prompts
        for _ in range(new_tokens):
            chances = self(tokens[:, -self.sequence :]).float().cpu().softmax(-1)
            sampled = torch.multinomial(chances, 1, generator=generator)
            tokens = torch.cat([tokens, sampled.to(tokens.device)], dim=1)
        return tokens[:, prompts.shape[1] :].cpu()


class _Block(torch.nn.Module):
    """Attention and a feed-forward part, each after a norm and beside a residual connection."""

    def __init__(self, hidden: int, heads: int, make: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(hidden, **make) for _ in range(2))
        self.attention_in = torch.nn.Linear(hidden, 3 * hidden, **make)
        self.attention_out = torch.nn.Linear(hidden, hidden, **make)
        self.up = torch.nn.Linear(hidden, 4 * hidden, **make)
        self.down = torch.nn.Linear(4 * hidden, hidden, **make)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        parts = self.attention_in(self.norms[0](values)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        values = values + self.attention_out(mixed.transpose(1, 2).flatten(-2))
        fed: torch.Tensor = values + self.down(torch.nn.functional.gelu(self.up(self.norms[1](values))))
        return fed
