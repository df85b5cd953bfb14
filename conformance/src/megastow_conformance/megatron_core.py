"""Trainers made of the real megatron-core, 0.9 to 0.19, on the CPU (gloo) or on GPUs (NCCL).

The suite is worth what its trainers are worth, so these use Megatron's own DDP, optimizers, ``GPTModel`` and
``finalize_model_grads``, in the order in which Megatron's training loop calls them. Models are tiny: state lives in the
same places whatever its size.

One process runs many scenarios one after the other, so nothing here may leak from one trainer into the next: every
build and every step seeds all random state anew.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from megastow_conformance import shim
from megastow_conformance.base_trainer import BaseTrainer, links, through_a_file
from megastow_conformance.scenarios import Scenario
from megastow_conformance.toy_model import DTYPES, ToyModel, as_experts
from megastow_conformance.trainer import Layout, Use

_HIDDEN = 32
_VOCABULARY = 64
_SEQUENCE = 16
_BATCH = 2
_EXPERTS = 4


# --- the process ------------------------------------------------------------------------------------------------------


@functools.cache
def load() -> Version:
    """Imports megatron-core, with the shim where it is needed, once in a process.

    Returns:
        The version that was imported.
    """
    version = shim.find_core_version()
    shim.install(version)
    shim.install_gpt(version)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for module in ("parallel_state", "distributed", "optimizer", "models.gpt.gpt_layer_specs"):
        core_module(module)
    shim.post_import(version)
    gc.collect()
    gc.freeze()  # or every trainer's close() walks all of torch and Megatron again: 0.2 s each
    return version


def core_module(module: str) -> Any:
    """A module of megatron.core, imported."""
    return importlib.import_module(f"megatron.core.{module}")


def device() -> torch.device:
    """The device that trainers of this process live on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def init_distributed(rank: int = 0, world: int = 1, store: Store | None = None) -> None:
    """Joins the default process group: gloo on the CPU, NCCL on GPUs, one GPU for each rank of the host.

    Args:
        rank: This process's rank; on a host with GPUs its GPU is the rank modulo their number.
        world: The number of processes.
        store: Where the ranks meet. Alone, none is needed, and no port is taken.
    """
    torch.set_num_threads(1)
    if store is None:
        if world != 1:
            raise ValueError(f"{world} ranks need a store to meet in")
        store = HashStore()
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(rank % torch.cuda.device_count())
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def _init_model_parallel(expert_parallel: int) -> None:
    """Sets up ``parallel_state``; a layout that fits is kept, and the groups of another are freed.

    Megatron only forgets its process groups. With NCCL each holds memory of the device, gigabytes after a few layouts.
    """
    parallel_state = core_module("parallel_state")
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_expert_model_parallel_world_size() == expert_parallel:
            return
        parallel_state.destroy_model_parallel()
        dist: Any = torch.distributed  # it declares no exports
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    core_module("tensor_parallel").model_parallel_cuda_manual_seed(seed)


def supported(config_class: Any, **values: Any) -> Any:
    """Builds a Megatron configuration from those values that this release's dataclass has."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in values.items() if name in names})


# --- building ---------------------------------------------------------------------------------------------------------


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
    reason = scenario.unsupported_on(version, "cuda" if torch.cuda.is_available() else "cpu")
    if reason is not None:
        raise ValueError(f"{scenario.name} on megatron-core {version}: {reason}")
    _init_model_parallel(scenario.expert_parallel)
    _seed_everything(seed)
    config = _transformer_config(scenario)
    make_module = _toy_module if scenario.model == "toy" else _gpt_module
    model = [
        core_module("distributed").DistributedDataParallel(
            config,
            _ddp_config(scenario, distributed_optimizer=distributed),
            make_module(scenario, config, chunk),
            disable_bucketing=chunk > 0,
        )
        for chunk, distributed in enumerate(_distributed_chunks(scenario))
    ]
    return MegatronCoreTrainer(scenario, seed, model, _optimizer(scenario, model), device())


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
        expert_model_parallel_size=scenario.expert_parallel,
        **(experts if is_moe else {}),
    )


def _ddp_config(scenario: Scenario, *, distributed_optimizer: bool) -> Any:
    return supported(
        core_module("distributed").DistributedDataParallelConfig,
        grad_reduce_in_fp32=scenario.grad_reduce_in_fp32,
        overlap_grad_reduce=scenario.overlap,
        overlap_param_gather=scenario.overlap and distributed_optimizer,
        use_distributed_optimizer=distributed_optimizer,
        bucket_size=scenario.bucket_size,
    )


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
        vocab_size=_VOCABULARY,
        max_sequence_length=_SEQUENCE,
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


# --- training ---------------------------------------------------------------------------------------------------------


class MegatronCoreTrainer(BaseTrainer):
    """A ``Trainer`` (see ``megastow_conformance.trainer``) over real megatron-core."""

    def _seed_everything(self, seed: int) -> None:
        _seed_everything(seed)

    def _data_parallel_rank(self) -> int:
        rank: int = core_module("parallel_state").get_data_parallel_rank()
        return rank

    def _reduce_grads(self) -> None:
        core_module("distributed").finalize_model_grads(self.model)

    def clear_grads(self) -> None:
        """Buffers, then what hangs on parameters and main weights; see ``Trainer``."""
        for chunk in self.model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()

    def _gpt_loss(self, generator: torch.Generator) -> torch.Tensor:
        tokens = torch.randint(_VOCABULARY, (_BATCH, _SEQUENCE + 1), generator=generator).to(device())
        positions = torch.arange(_SEQUENCE, device=device()).expand(_BATCH, -1)
        is_future = torch.ones(1, 1, _SEQUENCE, _SEQUENCE, device=device()).triu(1).bool()
        labels = tokens[:, 1:].contiguous()
        output: torch.Tensor | None = None
        for chunk in self.model:
            if output is not None:
                chunk.module.set_input_tensor(output.to(DTYPES[self.scenario.precision]))  # type: ignore[operator, union-attr]
            output = chunk(tokens[:, :-1].contiguous(), positions, is_future, labels=labels)
        assert output is not None
        return output.float().mean()

    def checkpoint(self) -> dict[str, Any]:
        """What Megatron's own ``state_dict`` methods give, and the shards that they leave out; see ``Trainer``."""
        with self._whole_weights():
            state: dict[str, Any] = {
                "model": [chunk.state_dict() for chunk in self.model],
                "optimizer": self.optimizer.state_dict(),
                "shards": [
                    {"inner": link.optimizer.state_dict(), "main": _stepped_on(link.optimizer)}
                    for link in _distributed_links(self.optimizer)
                ],
            }
            return through_a_file(state)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Megatron's own ``load_state_dict`` methods in Megatron's order, then the shards; see ``Trainer``.

        Megatron's own loading of shards, ``load_parameter_state_from_dp_zero``, expects the optimizers of Apex or
        Transformer Engine: with torch's, it fails on the state "step".
        """
        # What is loaded becomes the optimizers' own. A deep copy also takes it out of the memory of `torch.load`, which
        # no storage can be resized in; with a GPU, the move to the device does that.
        state = copy.deepcopy(checkpoint)
        for chunk, saved in zip(self.model, state["model"], strict=True):
            chunk.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        for link, saved in zip(_distributed_links(self.optimizer), state["shards"], strict=True):
            link.optimizer.load_state_dict(saved["inner"])
            for group, saved_group in zip(_stepped_on(link.optimizer), saved["main"], strict=True):
                for main, saved_main in zip(group, saved_group, strict=True):
                    main.copy_(saved_main)

    def save_sharded(self, folder: Path) -> None:
        """Saves with ``megatron.core.dist_checkpointing`` in the format ``torch_dist``; see ``Trainer``."""
        with self._whole_weights(), shim.answered_synchronize():
            core_module("dist_checkpointing").save(self._sharded_state(is_loading=False), str(folder))

    def load_sharded(self, folder: Path) -> None:
        """Loads what ``save_sharded`` saved; see ``Trainer``.

        Megatron's distributed optimizer expects an inner one of Apex or Transformer Engine, which keeps no number of
        steps with each parameter. Torch's does, so it is taken out of the way while Megatron loads.
        """
        with contextlib.ExitStack() as stack:
            for link in _distributed_links(self.optimizer):
                if isinstance(link.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
                    stack.enter_context(_steps_out_of_the_way(link))
            state = core_module("dist_checkpointing").load(self._sharded_state(is_loading=True), str(folder))
            for i, chunk in enumerate(self.model):
                _unwrapped(chunk).load_state_dict(state[f"model{i}"])
            self.optimizer.load_state_dict(state["optimizer"])

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """What Megatron's training loop hands to ``dist_checkpointing``."""
        metadata = _sharding_metadata(self.scenario)
        state: dict[str, Any] = {}
        for i, chunk in enumerate(self.model):
            state[f"model{i}"] = _unwrapped(chunk).sharded_state_dict(metadata=metadata)
            if len(self.model) > 1:
                # Without a pipeline, Megatron numbers the layers of each chunk from 0: their names would collide.
                core_module("dist_checkpointing.utils").add_prefix_for_sharding(state[f"model{i}"], f"chunk{i}.")
        optimizer_state = self.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        return {**state, "optimizer": optimizer_state}

    @contextlib.contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Gathers the parameters that overlapped communication would gather in the next forward only.

        Megatron's training loop does the same before it saves: it has no other way to ask for it.
        """
        overlapped = [chunk for chunk in self.model if chunk.ddp_config.overlap_param_gather]  # type: ignore[union-attr]
        for chunk in overlapped:
            chunk.disable_forward_pre_hook()  # type: ignore[operator]
        try:
            yield
        finally:
            for chunk in overlapped:
                chunk.enable_forward_pre_hook()  # type: ignore[operator]

    def _walk_grad_buffers(self, number: int, chunk: Any) -> Iterator[tuple[str, Any]]:
        for kind in ("buffers", "expert_parallel_buffers"):
            for j, buffer in enumerate(getattr(chunk, kind)):
                yield f"chunk{number}.{kind}{j}.grad_data", buffer.grad_data

    def parts(self) -> list[object]:
        """What all generations have, bucket groups and buffers; see ``Trainer``."""
        chunks: list[Any] = list(self.model)
        return [*super().parts(), *(part for chunk in chunks for part in (*chunk.bucket_groups, *chunk.buffers))]

    def uses(self, kind: str) -> list[Use]:
        """Calls that touch a kind; see ``Trainer``."""
        chunk: Any = self.model[0]
        uses = super().uses(kind)
        if kind == "weights" and self.scenario.distributed_optimizer:
            uses.append(("start_param_sync", lambda: chunk.start_param_sync()))
        if kind in ("main_weights", "optimizer_states"):
            uses.append(("optimizer.sharded_state_dict", lambda: self.optimizer.sharded_state_dict({})))
        if kind == "grad_buffers":
            uses.append(("zero_grad_buffer", lambda: chunk.zero_grad_buffer()))
            uses.append(("finish_grad_sync", lambda: chunk.finish_grad_sync()))
        return uses

    def unsupported_layouts(self) -> list[Layout]:
        """Marks put on by hand in the place where Megatron would show them; see ``Trainer``."""
        chunk: Any = self.model[0]
        module = next(m for m in chunk.modules() if m is not chunk)
        captured = SimpleNamespace(cudagraph_runners=[SimpleNamespace(fwd_graph=object(), bwd_graph=None)])
        return [
            ("nccl_ub", chunk.buffers[0], "nccl_ub", True),
            ("share one buffer", chunk.buffers[0], "shared_buffer", torch.zeros(1)),
            ("cudagraph_manager", module, "cudagraph_manager", captured),
            ("cuda_graphs", module, "cuda_graphs", [object()]),
        ]

    def foreign_wrappers(self) -> list[torch.nn.Module]:
        """The real classes of the sharding wrappers that this Megatron has, around nothing; see ``Trainer``."""
        found: list[torch.nn.Module] = []
        for path in _SHARDING_WRAPPERS:
            with contextlib.suppress(ImportError):
                module = core_module(path)
                for name in ("FullyShardedDataParallel", "TorchFullyShardedDataParallel"):
                    kind: Any = getattr(module, name, None)
                    if kind is not None:
                        wrapper: torch.nn.Module = kind.__new__(kind)
                        torch.nn.Module.__init__(wrapper)
                        wrapper.register_parameter("weight", torch.nn.Parameter(torch.zeros(2)))
                        found.append(wrapper)
        assert found or load() < Version("0.10"), "this Megatron's sharding wrappers were not found"
        return found

    def scratch(self) -> list[torch.Tensor]:
        """Megatron's global memory buffer; see ``Trainer``."""
        return list(core_module("parallel_state").get_global_memory_buffer().buffer.values())

    def _break_cycles(self, chunk: Any) -> None:
        """As in all generations, and more.

        A MoE token dispatcher holds the routing of the last microbatch, and so its autograd graph, and so the
        accumulators, whose hooks hold the DDP chunk.
        """
        for handle in dict(getattr(chunk, "remove_forward_pre_hook_handles", {})).values():
            handle.remove()
        super()._break_cycles(chunk)
        for module in chunk.modules():
            dispatcher = getattr(module, "token_dispatcher", None)
            for name, value in list(getattr(dispatcher, "__dict__", {}).items()):
                if isinstance(value, torch.Tensor):
                    setattr(dispatcher, name, None)


_SHARDING_WRAPPERS = (
    "distributed.custom_fsdp",
    "distributed.fsdp.mcore_fsdp_adapter",
    "distributed.torch_fully_sharded_data_parallel",
)


def _distributed_links(optimizer: Any) -> list[Any]:
    """Those links of a chain that keep main weights and inner state out of ``state_dict``."""
    distributed_optimizer = core_module("optimizer.distrib_optimizer").DistributedOptimizer
    return [link for link in links(optimizer) if isinstance(link, distributed_optimizer)]


def _stepped_on(inner: Any) -> list[list[torch.Tensor]]:
    """What a torch optimizer steps on, group by group."""
    return [[parameter.detach() for parameter in group["params"]] for group in inner.param_groups]


def _unwrapped(chunk: Any) -> Any:
    """The GPTModel inside DDP and Float16Module."""
    return chunk.module.module


def _sharding_metadata(scenario: Scenario) -> dict[str, Any]:
    """How the state is to be laid out, in Megatron's words.

    The distributed optimizer's layout is the default of Megatron's training loop from 0.16 on, and up to 0.14. In 0.15
    the new default cannot be saved with torch's optimizers.
    """
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True}
    if scenario.frozen:
        metadata["non_homogeneous_layers"] = True  # a frozen layer has no optimizer state to be stacked with others'
    if scenario.distributed_optimizer:
        is_new = load() >= Version("0.16")
        metadata["distrib_optim_sharding_type"] = "dp_reshardable" if is_new else "fully_sharded_model_space"
    return metadata


@contextlib.contextmanager
def _steps_out_of_the_way(link: Any) -> Iterator[None]:
    """Lets a distributed optimizer load as if the torch optimizer inside kept no "step" with each parameter.

    Found there, it ends the loading with a KeyError or keeps its old value, and it must be there when Megatron begins,
    or an assertion fails. What Megatron sets it to is put back at the end, each parameter with a tensor of its own:
    Megatron gives all the same one, which then counts each step once for each parameter.
    """
    inner = link.optimizer
    steps: dict[torch.Tensor, torch.Tensor] = {}

    def take(loaded: Any) -> None:
        for parameter, state in loaded.state.items():
            if "step" in state:
                steps[parameter] = state.pop("step").clone()

    link.init_state_fn(inner)
    for state in inner.state.values():
        state.setdefault("step", torch.tensor(0.0))
    handle = inner.register_load_state_dict_post_hook(take)
    try:
        yield
    finally:
        handle.remove()
        for parameter, step in steps.items():
            inner.state[parameter]["step"] = step
