"""The data-parallel wrapper and the reduction of its gradients; see the package's docstring."""

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

__all__ = ["DistributedDataParallel", "finalize_model_grads"]
