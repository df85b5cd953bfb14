"""The optimizers that are not distributed; see the package's docstring."""

from megastow_conformance.doubles import optimizers
from megastow_conformance.doubles.memory_buffer import ReducesWhole
from megastow_conformance.doubles.optimizers import MegatronOptimizer, MixedPrecisionOptimizer

__all__ = ["FP32Optimizer", "Float16OptimizerWithFloat16Params", "MegatronOptimizer", "MixedPrecisionOptimizer"]


class Float16OptimizerWithFloat16Params(ReducesWhole, optimizers.Float16OptimizerWithFloat16Params):
    """fp16 or bf16 parameters, and fp32 copies of all of them on every rank."""


class FP32Optimizer(ReducesWhole, optimizers.FP32Optimizer):
    """fp32 parameters, which are stepped on directly."""
