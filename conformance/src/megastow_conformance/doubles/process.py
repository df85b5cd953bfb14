"""What is global in a Megatron process: the arguments, the device and the process groups.

A double's ``megatron.global_vars`` and ``megatron.core.parallel_state`` are made of these. There is no tensor and no
pipeline parallelism: every rank has the whole model, but for its share of the experts.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch

# --- arguments and device ---------------------------------------------------------------------------------------------

_arguments: list[Namespace] = []


def set_args(args: Namespace) -> None:
    """Sets what ``get_args`` answers."""
    _arguments[:] = [args]


def get_args() -> Namespace:
    """The arguments of the process, with Megatron's names.

    Raises:
        RuntimeError: If ``set_args`` was not called.
    """
    if not _arguments:
        raise RuntimeError("the arguments are not set; call megatron.global_vars.set_args first")
    return _arguments[0]


def current_device() -> torch.device:
    """Where parameters, buffers and scalars live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# --- process groups -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Groups:
    """This rank's process groups.

    Attributes:
        data: All ranks, which have the same dense parameters.
        expert_data: The ranks that have the same experts as this one.
        model: This rank alone.
        experts: Over how many ranks the experts are spread.
    """

    data: Any
    expert_data: Any
    model: Any
    experts: int


_groups: list[_Groups] = []
_dist: Any = torch.distributed  # it declares no exports


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1, *, expert_model_parallel_size: int = 1
) -> None:
    """Makes the process groups; the default group must exist, and every rank must call it.

    Raises:
        ValueError: If there is to be tensor or pipeline parallelism, or the experts cannot be spread evenly.
    """
    if tensor_model_parallel_size != 1 or pipeline_model_parallel_size != 1:
        raise ValueError(
            f"tensor parallel {tensor_model_parallel_size} and pipeline parallel {pipeline_model_parallel_size} were "
            "asked for; the doubles have neither"
        )
    world, rank = _dist.get_world_size(), _dist.get_rank()
    if world % expert_model_parallel_size:
        raise ValueError(f"{world} ranks cannot have experts spread over {expert_model_parallel_size} of them")
    data = _dist.new_group(list(range(world)))
    same_experts = [list(range(i, world, expert_model_parallel_size)) for i in range(expert_model_parallel_size)]
    expert_data = [_dist.new_group(ranks) for ranks in same_experts][rank % expert_model_parallel_size]
    model = [_dist.new_group([other]) for other in range(world)][rank]
    _groups[:] = [_Groups(data, expert_data, model, expert_model_parallel_size)]


def destroy_model_parallel() -> None:
    """Forgets the process groups."""
    _groups.clear()


def model_parallel_is_initialized() -> bool:
    """Whether there are process groups."""
    return bool(_groups)


def _of_process() -> _Groups:
    if not _groups:
        raise RuntimeError("there are no process groups; call initialize_model_parallel first")
    return _groups[0]


def get_data_parallel_group(with_context_parallel: bool = False) -> Any:
    """The ranks that share dense parameters."""
    return _of_process().data


def get_expert_data_parallel_group() -> Any:
    """The ranks that share experts."""
    return _of_process().expert_data


def get_model_parallel_group() -> Any:
    """The ranks that the model is spread over: this one."""
    return _of_process().model


def get_data_parallel_world_size(with_context_parallel: bool = False) -> int:
    """The number of ranks that share dense parameters."""
    return int(_dist.get_world_size(_of_process().data))


def get_data_parallel_rank(with_context_parallel: bool = False) -> int:
    """This rank among those that share dense parameters."""
    return int(_dist.get_rank(_of_process().data))


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """The first of the ranks that share dense parameters, in the default group."""
    return 0


def get_expert_model_parallel_world_size() -> int:
    """Over how many ranks experts are spread."""
    return _of_process().experts
