"""Trainers made of the real megatron-core, 0.6 to 0.19, on the CPU (gloo) or on GPUs (NCCL).

The suite is worth what its trainers are worth, so these use Megatron's own DDP, optimizers, ``GPTModel`` and
``finalize_model_grads``, in the order in which Megatron's training loop calls them. Models are tiny: state lives in the
same places whatever its size.

One process runs many scenarios one after the other, so nothing here may leak from one trainer into the next: every
build and every step seeds all random state anew.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from packaging.version import Version

from megastow_conformance.base_trainer import NO_REDUCTION_IN_FLIGHT, links
from megastow_conformance.megatron_core_process import (
    core_module,
    device,
    init_distributed,
    init_model_parallel,
    load,
    seed_everything,
    supported,
)
from megastow_conformance.megatron_core_trainer import SEQUENCE, VOCABULARY, LegacyCoreTrainer, MegatronCoreTrainer
from megastow_conformance.scenarios import Scenario, reason_against
from megastow_conformance.toy_model import DTYPES, ToyModel, as_experts

__all__ = [
    "MegatronCoreTrainer",
    "build",
    "core_module",
    "device",
    "init_distributed",
    "lacks",
    "load",
    "missing_here",
    "supported",
]

_HIDDEN = 32
_EXPERTS = 4


def lacks(version: str, device: str) -> dict[str, str]:
    """What a megatron-core cannot do; see ``harness.Harness``.

    Args:
        version: The version of megatron-core.
        device: ``"cpu"`` or ``"cuda"``.
    """
    release = Version(version)
    found = {
        "sgd_distopt": "Megatron's DistributedOptimizer accepts no SGD, because of its checkpoints",
        "restore+hybrid": "HybridDeviceOptimizer's own load hook ends in a KeyError (seen on 0.16.1, without megastow)",
    }
    if release < Version("0.9"):
        found["reduction_in_flight"] = NO_REDUCTION_IN_FLIGHT
    if release < Version("0.7"):
        found["fp32_model+plain_optimizer"] = "FP32Optimizer of 0.6 lacks a method of its base class and cannot be made"
    if release < Version("0.12"):
        found["hybrid"] = "HybridDeviceOptimizer came with megatron-core 0.12"
    elif device == "cpu":
        found["hybrid"] = "HybridDeviceOptimizer tells host from device by Tensor.is_cuda, so it needs a GPU"
    if release < Version("0.11"):
        found["precision_aware"] = "the precision-aware optimizer came with megatron-core 0.11"
    elif device == "cpu":
        found["precision_aware"] = "the precision-aware optimizer is Transformer Engine's fused Adam: it needs a GPU"
    if release < Version("0.13"):
        found["sharded_checkpoint"] = (
            "before 0.13, distributed checkpoints are written by a private function of torch (_write_item) whose "
            "arguments have changed since"
        )
    return found


def missing_here(device: str) -> dict[str, str]:
    """What this machine lacks; see ``harness.Harness``."""
    if device == "cuda" and importlib.util.find_spec("transformer_engine") is None:
        return {"precision_aware": "Transformer Engine is not installed here"}
    return {}


def build(scenario: Scenario, *, seed: int = 1234) -> MegatronCoreTrainer:
    """Builds a trainer; the default process group must exist (``init_distributed``).

    Two calls with the same arguments give bit-identical trainers, whatever ran between them.

    Args:
        scenario: What to build.
        seed: Decides weights, data and dropout.

    Raises:
        ValueError: If this megatron-core or this device cannot run the scenario; the message says why.
    """
    version = load()
    reason = reason_against({**lacks(str(version), device().type), **missing_here(device().type)}, scenario.needs)
    if reason is not None:
        raise ValueError(f"{scenario.name} on megatron-core {version}: {reason}")
    init_model_parallel(scenario.tensor_parallel, scenario.expert_parallel)
    seed_everything(seed)
    config = _transformer_config(scenario)
    make_module = _toy_module if scenario.model == "toy" else _gpt_module
    model = [
        _ddp(scenario, config, make_module(scenario, config, chunk), chunk, distributed_optimizer=distributed)
        for chunk, distributed in enumerate(_distributed_chunks(scenario))
    ]
    trainer = MegatronCoreTrainer if hasattr(model[0], "bucket_groups") else LegacyCoreTrainer
    return trainer(scenario, seed, model, _optimizer(scenario, model), device())


def _distributed_chunks(scenario: Scenario) -> list[bool]:
    """For each chunk, whether its optimizer is the distributed one."""
    return [scenario.distributed_optimizer and not (scenario.mixed_chain and i > 0) for i in range(scenario.chunks)]


def _transformer_config(scenario: Scenario) -> Any:
    is_moe = scenario.model == "gpt" and scenario.experts
    experts = {
        "num_moe_experts": _EXPERTS,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_token_dispatcher_type": "allgather",
    }
    return supported(
        core_module("transformer").TransformerConfig,
        num_layers=2 if scenario.chunks == 1 else 1,
        hidden_size=_HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=2 * _HIDDEN,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        add_bias_linear=not is_moe,
        bf16=scenario.precision == "bf16",
        fp16=scenario.precision == "fp16",
        params_dtype=DTYPES[scenario.precision],
        pipeline_dtype=DTYPES[scenario.precision],
        tensor_model_parallel_size=scenario.tensor_parallel,
        expert_model_parallel_size=scenario.expert_parallel,
        **(experts if is_moe else {}),
    )


def _ddp(
    scenario: Scenario, config: Any, module: torch.nn.Module, chunk: int, *, distributed_optimizer: bool
) -> torch.nn.Module:
    """Megatron's DDP around a chunk, told what this release's constructor asks for."""
    distributed = core_module("distributed")
    asked = inspect.signature(distributed.DistributedDataParallel).parameters
    settings: dict[str, Any] = {
        "overlap_grad_reduce": scenario.overlap,
        "use_distributed_optimizer": distributed_optimizer,
        "bucket_size": scenario.bucket_size,
    }
    if "ddp_config" in asked:
        settings["grad_reduce_in_fp32"] = scenario.grad_reduce_in_fp32
        settings["overlap_param_gather"] = scenario.overlap and distributed_optimizer  # before 0.9 the optimizer's
        settings = {"ddp_config": supported(distributed.DistributedDataParallelConfig, **settings)}
    else:  # 0.6
        settings["accumulate_allreduce_grads_in_fp32"] = scenario.grad_reduce_in_fp32
    if "data_parallel_group" in asked:  # 0.6 and 0.7
        parallel_state = core_module("parallel_state")
        settings["data_parallel_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        settings["expert_data_parallel_group"] = parallel_state.get_data_modulo_expert_parallel_group()
    wrapped: torch.nn.Module = distributed.DistributedDataParallel(
        config, module=module, disable_bucketing=chunk > 0, **settings
    )
    return wrapped


def _optimizer_config(scenario: Scenario, *, distributed_optimizer: bool) -> Any:
    values: dict[str, Any] = {
        "optimizer": scenario.optimizer,
        "lr": 0.01,
        "min_lr": 0.0,
        "weight_decay": 0.01,
        "clip_grad": 1.0,
        "bf16": scenario.precision == "bf16",
        "fp16": scenario.precision == "fp16",
        "params_dtype": DTYPES[scenario.precision],
        "hysteresis": 1,
        "use_distributed_optimizer": distributed_optimizer,
        "overlap_param_gather": scenario.overlap and distributed_optimizer,
    }
    if scenario.initial_loss_scale is not None:
        values["initial_loss_scale"] = scenario.initial_loss_scale
    if scenario.cpu_offload_fraction:
        values["optimizer_cpu_offload"] = True
        values["optimizer_offload_fraction"] = scenario.cpu_offload_fraction
        values["use_torch_optimizer_for_cpu_offload"] = True
    return supported(core_module("optimizer").OptimizerConfig, **values)


def _optimizer(scenario: Scenario, model: list[torch.nn.Module]) -> Any:
    optimizer_module = core_module("optimizer")
    if not scenario.mixed_chain:
        config = _optimizer_config(scenario, distributed_optimizer=scenario.distributed_optimizer)
        return optimizer_module.get_megatron_optimizer(config, model)
    parts: list[Any] = []
    for chunk, distributed in zip(model, _distributed_chunks(scenario), strict=True):
        config = _optimizer_config(scenario, distributed_optimizer=distributed)
        parts += links(optimizer_module.get_megatron_optimizer(config, [chunk]))
    for part in parts:
        part.config = parts[0].config  # a chain insists on one configuration for all
    return core_module("optimizer.optimizer").ChainedOptimizer(parts)


def _toy_module(scenario: Scenario, config: Any, chunk: int) -> torch.nn.Module:
    return ToyModel(scenario).to(device())


def _gpt_module(scenario: Scenario, config: Any, chunk: int) -> torch.nn.Module:
    spec = core_module("models.gpt.gpt_layer_specs").get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False
    )
    gpt_model = core_module("models.gpt").GPTModel
    module = gpt_model(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=chunk == 0,
        post_process=chunk == scenario.chunks - 1,
        share_embeddings_and_output_weights=scenario.tied,
    ).to(device())
    if scenario.frozen:
        module.embedding.requires_grad_(False)
        module.decoder.layers[0].requires_grad_(False)
    for layer in module.decoder.layers:
        if scenario.experts:
            # Megatron marks experts only when they are spread over ranks; one rank is to have expert buffers too.
            as_experts(layer.mlp.experts)
    return core_module("transformer.module").Float16Module(config, module)  # type: ignore[no-any-return]
