"""The training setups that conformance checks run on, as data.

Each scenario exists because a peer, an upstream release or a trial of ours got that case wrong, or because state lives
somewhere else in it. Nothing of Megatron is imported here: a test runner can list, filter and skip scenarios in a
process that never loads Megatron, and a reason to skip is data that the runner must show, not a branch hidden in code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from packaging.version import Version

Model = Literal["toy", "gpt"]
Precision = Literal["bf16", "fp16", "fp32"]
DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Limit:
    """A range in which Megatron itself cannot run a scenario.

    Attributes:
        reason: Why, for the person who reads the skip.
        first: The first Megatron version concerned; ``None`` means from the beginning.
        before: The first version that is free of it again; ``None`` means none yet.
        device: The device type concerned; ``None`` means any.
    """

    reason: str
    first: str | None = None
    before: str | None = None
    device: DeviceType | None = None

    def covers(self, version: Version, device: DeviceType) -> bool:
        """Whether this limit holds for a Megatron version on a device type."""
        return (
            (self.device is None or self.device == device)
            and (self.first is None or version >= Version(self.first))
            and (self.before is None or version < Version(self.before))
        )


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
        limits: Where Megatron itself cannot run it.
    """

    name: str
    summary: str
    model: Model
    distributed_optimizer: bool
    worlds: tuple[int, ...] = (1, 2)
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
    limits: tuple[Limit, ...] = ()

    def unsupported_on(self, version: str | Version, device: DeviceType = "cpu") -> str | None:
        """Why Megatron cannot run this scenario there.

        Args:
            version: A megatron-core version.
            device: The device type it would run on.

        Returns:
            The reason, or ``None`` if it can.
        """
        return _first_reason(self.limits, version, device)

    @property
    def restore_unsupported(self) -> str | None:
        """Why Megatron cannot load a checkpoint of this scenario, though it can train it; ``None`` if it can."""
        if self.cpu_offload_fraction:
            return "HybridDeviceOptimizer's own load hook ends in a KeyError (seen on 0.16.1, without megastow)"
        return None

    def sharded_checkpoint_unsupported_on(self, version: str | Version, device: DeviceType = "cpu") -> str | None:
        """Why Megatron cannot save this scenario with ``dist_checkpointing`` there, though it can train it.

        Args:
            version: A megatron-core version.
            device: The device type it would run on.

        Returns:
            The reason, or ``None`` if it can.
        """
        if self.model == "toy":
            return "only Megatron's own modules know how their state is sharded"
        return _first_reason(_SHARDED_CHECKPOINT_LIMITS, version, device)


def _first_reason(limits: tuple[Limit, ...], version: str | Version, device: DeviceType) -> str | None:
    parsed = Version(str(version))
    return next((limit.reason for limit in limits if limit.covers(parsed, device)), None)


_SHARDED_CHECKPOINT_LIMITS = (
    Limit(
        "before 0.13, distributed checkpoints are written by a private function of torch (_write_item) whose arguments "
        "have changed since",
        before="0.13",
    ),
)


_NO_HYBRID = (
    Limit("HybridDeviceOptimizer came with megatron-core 0.12", before="0.12"),
    Limit("HybridDeviceOptimizer tells host from device by Tensor.is_cuda, so it needs a GPU", device="cpu"),
)

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
    Scenario("gpt_ep2", "expert parallel over two ranks", "gpt", True, worlds=(2,), experts=True, expert_parallel=2),
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

_ADAM_ONLY = (Limit("Megatron's DistributedOptimizer accepts no SGD, because of its checkpoints"),)

_SINGLES: tuple[Scenario, ...] = (
    Scenario("toy_sgd_distopt", "SGD with momentum", "toy", True, optimizer="sgd", limits=_ADAM_ONLY),
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
        limits=_NO_HYBRID,
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
