"""Process groups; see the package's docstring."""

from megastow_conformance.doubles.process import (
    destroy_model_parallel,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_src_rank,
    get_data_parallel_world_size,
    get_model_parallel_group,
    initialize_model_parallel,
    model_parallel_is_initialized,
)

__all__ = [
    "destroy_model_parallel",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_src_rank",
    "get_data_parallel_world_size",
    "get_model_parallel_group",
    "initialize_model_parallel",
    "model_parallel_is_initialized",
]
