"""Process groups and gradient buffers; see the package's docstring."""

from megatron.core import parallel_state

mpu = parallel_state

__all__ = ["mpu", "parallel_state"]
