"""The data-parallel wrapper; see the package's docstring."""

from megatron.model.distributed import DistributedDataParallel

__all__ = ["DistributedDataParallel"]
