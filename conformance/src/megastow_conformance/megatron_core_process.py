"""The process that trains: one megatron-core imported, its groups, its random state.

One process runs many scenarios one after the other. Whatever of Megatron outlives a trainer is here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import os
from typing import Any

import torch
from packaging.version import Version
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from megastow_conformance import shim


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
    shim.freeze_imports()
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


def init_model_parallel(tensor_parallel: int, expert_parallel: int) -> None:
    """Sets up ``parallel_state``; a layout that fits is kept, and the groups of another are freed.

    Megatron only forgets its process groups. With NCCL each holds memory of the device, gigabytes after a few layouts.
    """
    parallel_state = core_module("parallel_state")
    if parallel_state.model_parallel_is_initialized():
        if (tensor_parallel, expert_parallel) == (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
        ):
            return
        parallel_state.destroy_model_parallel()
        dist: Any = torch.distributed  # it declares no exports
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel, expert_model_parallel_size=expert_parallel
    )


def seed_everything(seed: int) -> None:
    """Seeds all random state that building and forward passes draw from."""
    torch.manual_seed(seed)
    core_module("tensor_parallel").model_parallel_cuda_manual_seed(seed)


def supported(config_class: Any, **values: Any) -> Any:
    """Builds a Megatron configuration from those values that this release's dataclass has."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in values.items() if name in names})
