"""The training setups that conformance checks run on, as data.

Each scenario exists because a peer, an upstream release or a trial of ours got that case wrong, or because state lives
somewhere else in it. Nothing of Megatron is imported here, nor anything that has to be installed: a test runner can
list, filter and skip scenarios in a process that never loads Megatron. What a scenario asks of a Megatron is a set of
words (``Scenario.needs``); what a Megatron cannot do is said by its harness in the same words, each with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

Model = Literal["toy", "gpt"]
Precision = Literal["bf16", "fp16", "fp32"]
DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Scenario:
    """One training setup.

    Attributes:
        name: Unique, and the key in ``SCENARIOS``.
        summary: What is special about it, in one line.
        model: ``"toy"`` (a plain module with just the parameters asked for) or ``"gpt"`` (Megatron's ``GPTModel``).
        distributed_optimizer: Megatron's DistributedOptimizer, or the plain mixed-precision (or fp32) optimizer.
        worlds: The world sizes it makes sense on.
        precision: The dtype of the model's weights.
        optimizer: The inner optimizer.
        microbatches: Microbatches a step; more than one accumulates under ``no_sync``.
        chunks: Model chunks in one list under one optimizer (virtual pipeline); all but the first without buckets.
        overlap: Overlapped gradient reduction, and under a distributed optimizer overlapped parameter gather: from a
            step to the next forward a rank then has only its own shard of the new weights, so ranks differ in them.
        bucket_size: Elements a bucket; small, so that a tiny model still has many.
        grad_reduce_in_fp32: fp32 gradient buffers; otherwise they have the weights' dtype.
        fp32_params: Some parameters stay fp32 inside a lower-precision model.
        tied: One parameter is used in two places.
        frozen: Some parameters have ``requires_grad=False`` and live in no buffer.
        lora: The base is frozen and only small adapters are trained.
        experts: There are expert parameters, marked ``allreduce=False``: expert buffers and a chained optimizer.
        expert_parallel: Expert-parallel size.
        tensor_parallel: Tensor-parallel size.
        precision_aware: Transformer Engine's fused Adam keeps the main weights, in its own state.
        mixed_chain: Two chunks with optimizers of different kinds in one chain: distributed and plain.
        initial_loss_scale: Where the dynamic loss scaler of fp16 starts.
        cpu_offload_fraction: The part of the optimizer that HybridDeviceOptimizer keeps on the host.
    """

    name: str
    summary: str
    model: Model
    distributed_optimizer: bool
    worlds: tuple[int, ...] = (1, 2, 4)
    precision: Precision = "bf16"
    optimizer: Literal["adam", "sgd"] = "adam"
    microbatches: int = 2
    chunks: int = 1
    overlap: bool = False
    bucket_size: int | None = None
    grad_reduce_in_fp32: bool = True
    fp32_params: bool = False
    tied: bool = False
    frozen: bool = False
    lora: bool = False
    experts: bool = False
    expert_parallel: int = 1
    tensor_parallel: int = 1
    precision_aware: bool = False
    mixed_chain: bool = False
    initial_loss_scale: float | None = None
    cpu_offload_fraction: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        """What it asks of a Megatron, in the words of ``WORDS``."""
        return frozenset(word for word, is_asked in _NEEDS.items() if is_asked(self))


_NEEDS: Mapping[str, Callable[[Scenario], bool]] = MappingProxyType(
    {
        "gpt": lambda scenario: scenario.model == "gpt",
        "distributed_optimizer": lambda scenario: scenario.distributed_optimizer,
        "plain_optimizer": lambda scenario: not scenario.distributed_optimizer,
        "experts": lambda scenario: scenario.experts,
        "expert_parallel": lambda scenario: scenario.expert_parallel > 1,
        "tensor_parallel": lambda scenario: scenario.tensor_parallel > 1,
        "virtual_pipeline": lambda scenario: scenario.chunks > 1,
        "overlap": lambda scenario: scenario.overlap,
        "bf16_grads": lambda scenario: scenario.precision == "bf16" and not scenario.grad_reduce_in_fp32,
        "fp16": lambda scenario: scenario.precision == "fp16",
        "fp32_params": lambda scenario: scenario.fp32_params,
        "fp32_model": lambda scenario: scenario.precision == "fp32",
        "frozen": lambda scenario: scenario.frozen,
        "tied": lambda scenario: scenario.tied,
        "lora": lambda scenario: scenario.lora,
        "sgd": lambda scenario: scenario.optimizer == "sgd",
        "sgd_distopt": lambda scenario: scenario.optimizer == "sgd" and scenario.distributed_optimizer,
        "mixed_chain": lambda scenario: scenario.mixed_chain,
        "hybrid": lambda scenario: scenario.cpu_offload_fraction > 0,
        "precision_aware": lambda scenario: scenario.precision_aware,
    }
)

WORDS = frozenset(_NEEDS) | {"restore", "sharded_checkpoint", "reduction_in_flight"}
"""Everything that a Megatron may lack: what scenarios need, and what checks ask of a trainer besides: to load a plain
checkpoint ("restore"), to save and load a distributed one, and to tell that a reduction of gradients is under way."""


def reason_against(lacks: Mapping[str, str], needs: Set[str]) -> str | None:
    """Why something cannot be done with a Megatron.

    Args:
        lacks: What the Megatron cannot do, with the reasons. A key of several words joined by ``+`` stands for what
            cannot be done together.
        needs: The words of what is to be done.

    Returns:
        The first reason that applies; ``None`` if it can be done.
    """
    return next((reason for words, reason in lacks.items() if needs >= set(words.split("+"))), None)


def unknown_words(lacks: Iterable[str]) -> list[str]:
    """The words in the keys of a harness's ``lacks`` that are not in ``WORDS``: nothing would ever ask for them."""
    return sorted({word for words in lacks for word in words.split("+")} - WORDS)


_BASES: tuple[Scenario, ...] = (
    Scenario(
        "toy",
        "bf16, fp32, tied, frozen and expert parameters in one small module",
        "toy",
        True,
        fp32_params=True,
        tied=True,
        frozen=True,
        experts=True,
    ),
    Scenario(
        "toy_dense",
        "the same without experts, which not every Megatron has",
        "toy",
        True,
        fp32_params=True,
        tied=True,
        frozen=True,
    ),
    Scenario(
        "toy_vpp",
        "two chunks in one list, overlapped, the second without buckets",
        "toy",
        True,
        chunks=2,
        overlap=True,
        bucket_size=600,
    ),
    Scenario("toy_overlap", "overlapped communication, many buckets", "toy", True, overlap=True, bucket_size=600),
    Scenario("toy_frozen", "some parameters frozen, in no buffer", "toy", True, frozen=True),
    Scenario("toy_lora", "frozen base, small trained adapters", "toy", True, lora=True),
    Scenario("toy_tied", "one parameter used twice", "toy", True, tied=True),
    Scenario("toy_fp32_params", "fp32 parameters inside a bf16 model", "toy", True, fp32_params=True),
    Scenario("toy_experts", "expert buffers and a chained optimizer", "toy", True, experts=True),
    Scenario("toy_fp32", "the whole model in fp32", "toy", True, precision="fp32"),
    Scenario(
        "toy_fp16",
        "dynamic loss scaling; the first step overflows, and only it",
        "toy",
        True,
        precision="fp16",
        initial_loss_scale=2.0**12,
    ),
    Scenario(
        "toy_bf16_grads",
        "bf16 gradient buffers: fp32 .grad of main weights in no buffer",
        "toy",
        True,
        grad_reduce_in_fp32=False,
    ),
    Scenario("gpt", "dense GPTModel", "gpt", True),
    Scenario("gpt_moe", "mixture of experts, expert buffers", "gpt", True, experts=True),
    Scenario("gpt_ep2", "expert parallel over two ranks", "gpt", True, worlds=(2, 4), experts=True, expert_parallel=2),
    Scenario("gpt_tp2", "every layer split over two ranks", "gpt", True, worlds=(2, 4), tensor_parallel=2),
    Scenario("gpt_vpp", "two chunks in one list, the second without buckets", "gpt", True, chunks=2),
    Scenario("gpt_overlap", "overlapped communication, many buckets", "gpt", True, overlap=True, bucket_size=3000),
    Scenario("gpt_frozen", "embeddings and first layer frozen", "gpt", True, frozen=True),
    Scenario("gpt_tied", "output layer shares the embedding's weights", "gpt", True, tied=True),
    Scenario(
        "gpt_bf16_grads",
        "bf16 gradient buffers: fp32 .grad of main weights in no buffer",
        "gpt",
        True,
        grad_reduce_in_fp32=False,
    ),
)

_SINGLES: tuple[Scenario, ...] = (
    Scenario("toy_sgd_distopt", "SGD with momentum", "toy", True, optimizer="sgd"),
    Scenario("toy_sgd_plainopt", "SGD with momentum", "toy", False, optimizer="sgd"),
    Scenario(
        "toy_mixed_chain", "a distributed and a plain optimizer in one chain", "toy", True, chunks=2, mixed_chain=True
    ),
    Scenario(
        "toy_hybrid_distopt",
        "HybridDeviceOptimizer: half of the optimizer lives on the host",
        "toy",
        True,
        cpu_offload_fraction=0.5,
    ),
    Scenario(
        "toy_precision_aware_distopt",
        "Transformer Engine's fused Adam keeps the main weights, in its own state",
        "toy",
        True,
        precision_aware=True,
    ),
)


def _both_optimizers(base: Scenario) -> tuple[Scenario, Scenario]:
    """The scenario with the distributed and with the plain optimizer."""
    return (
        replace(base, name=f"{base.name}_distopt", distributed_optimizer=True),
        replace(base, name=f"{base.name}_plainopt", distributed_optimizer=False),
    )


def _table() -> Mapping[str, Scenario]:
    rows = [scenario for base in _BASES for scenario in _both_optimizers(base)] + list(_SINGLES)
    table = {scenario.name: scenario for scenario in rows}
    if len(table) != len(rows):
        raise ValueError("two scenarios have the same name")
    return MappingProxyType(table)


SCENARIOS: Mapping[str, Scenario] = _table()
"""All scenarios by name."""

CORE: frozenset[tuple[str, int]] = frozenset(
    {
        ("toy_distopt", 2),
        ("toy_plainopt", 1),
        ("toy_dense_distopt", 2),
        ("toy_vpp_distopt", 2),
        ("toy_bf16_grads_plainopt", 1),
        ("toy_fp16_distopt", 1),
        ("toy_fp32_plainopt", 2),
        ("toy_mixed_chain", 1),
        ("gpt_ep2_distopt", 2),
        ("gpt_tp2_plainopt", 2),
    }
)
"""Scenarios and world sizes that together reach each kind of storage, with both optimizers, alone and in company: what
is affordable for every release after every change. They suffice without those that need a language model, because not
every Megatron has one, and hold for one without experts, too."""

BRIEF: frozenset[tuple[str, int]] = frozenset(
    {
        ("toy_plainopt", 1),
        ("toy_mixed_chain", 1),
        ("toy_dense_distopt", 2),
        ("toy_distopt", 2),
        ("gpt_ep2_distopt", 2),
    }
)
"""Those of `CORE` for a release next to another that keeps the same things in the same places, and has the core."""
