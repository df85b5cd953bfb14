"""Trainers made of source trees from before megatron-core 0.6: Megatron-LM v2.5 to 23.08, megatron-core 0.4 and 0.5.

There is no package to install for them: their optimizers, and mostly their DDP, belong to a training program. A row
names the folder of a checkout (see ``legacy_package`` for what of it is imported), or of something with the same
modules and signatures: the doubles, and forks. What a tree can do is read from its signatures and attributes, never
from its version, so that a fork is driven like what it was forked from.

Their language models need fused kernels and tokenizers of their time, so only the toy model is trained.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from packaging.version import Version

from megastow_conformance import harness, legacy_package, shim
from megastow_conformance.base_trainer import NO_REDUCTION_IN_FLIGHT, BaseTrainer, distributed_links
from megastow_conformance.legacy_package import TIMERS, has
from megastow_conformance.megatron_core_process import device
from megastow_conformance.scenarios import Scenario
from megastow_conformance.toy_model import DTYPES, ToyModel
from megastow_conformance.trainer import Use

_BUCKET_SIZE = 40_000_000
"""Megatron's own default: elements a bucket where gradient reduction overlaps."""

# --- the process ------------------------------------------------------------------------------------------------------


@functools.cache
def load() -> None:
    """Imports DDP and optimizers of the tree, with the shim where it is needed, once in a process."""
    legacy_package.register()
    shim.install(_core_version())
    logging.getLogger("megatron").setLevel(logging.ERROR)
    legacy_package.register_model()
    _ddp_class()
    _optimizers()
    shim.freeze_imports()


init_distributed = harness.join


def _core_version() -> Version:
    """The version of megatron-core in the tree; 0 if there is none in it yet."""
    try:
        return shim.find_core_version()
    except (ModuleNotFoundError, FileNotFoundError):
        return Version("0")


def _ddp_class() -> Any:
    """The tree's ``DistributedDataParallel``."""
    core = "megatron.core.distributed"  # a module at first, a package since 0.4
    return importlib.import_module(core if has(core) else "megatron.model.distributed").DistributedDataParallel


def _optimizers() -> Any:
    """The tree's package of optimizers."""
    core = "megatron.core.optimizer"
    return importlib.import_module(core if has(core) else "megatron.optimizer")


def _parallel_state() -> Any:
    """The tree's process groups; ``megatron.mpu`` was the whole of tensor parallelism before there was a core."""
    core = "megatron.core.parallel_state"
    return importlib.import_module(core if has(core) else "megatron.mpu")


# --- what trees cannot do ---------------------------------------------------------------------------------------------

_NO_OVERLAP = "DistributedDataParallel communicates after the backward pass only, until October 2023 (GradBuffer)"
_NO_EXPERTS = "DistributedDataParallel reduces all gradients over one group, until October 2023 (GradBuffer)"
_OF_ALL = {
    "gpt": "language models from before megatron-core 0.6 need fused CUDA kernels; these trees train the toy model",
    "tensor_parallel": "the toy model is not made of parallel layers",
    "mixed_chain": "until megatron-core 0.5 there is one optimizer over all chunks, and no chain to put together",
    "hybrid": "HybridDeviceOptimizer came with megatron-core 0.12",
    "precision_aware": "the precision-aware optimizer came with megatron-core 0.11",
    "sgd_distopt": "Megatron's DistributedOptimizer accepts no SGD, because of its checkpoints",
    "sharded_checkpoint": "distributed checkpoints of the optimizer came with megatron-core 0.6",
    "reduction_in_flight": NO_REDUCTION_IN_FLIGHT,
}
_V2_6 = {
    "distributed_optimizer": "DistributedOptimizer came after Megatron-LM v2.6, in March 2022",
    "experts": _NO_EXPERTS,
    "overlap": _NO_OVERLAP,
    "frozen": "clip_grads.py calls a method on the gradient of every parameter, and a frozen one's is None",
}
_NO_DISTRIBUTED_EXPERTS = {
    "experts+distributed_optimizer": "until megatron-core 0.5, DistributedOptimizer leaves experts untrained"
}
_NO_FP32_OPTIMIZER = {
    "fp32_model+plain_optimizer": "of the fork only MixedPrecisionOptimizers are known; its adapter refuses an "
    "FP32Optimizer"
}

# By the names of tags, releases, commits and doubles: for this the tree itself must not be looked at.
_OF_SOME: tuple[tuple[str, dict[str, str]], ...] = (
    (r"v2\.\d+", _V2_6 | {"lora": _V2_6["frozen"]}),
    (r"v1|2[34]\.\d+", {"experts": _NO_EXPERTS, "overlap": _NO_OVERLAP}),
    (r"v4|fork", {"overlap": _NO_OVERLAP} | _NO_FP32_OPTIMIZER),
    (r"core_v0\.4\.\d+", _NO_DISTRIBUTED_EXPERTS),
)


def lacks(version: str, device: str) -> dict[str, str]:
    """What a tree cannot do; see ``harness.Harness``.

    Args:
        version: A tag of Megatron-LM (``"v2.6"``, ``"23.08"``, ``"core_v0.5.0"``), ``"fork"`` for the one with
            ``ParamBufferType``, or the name of a double.
        device: ``"cpu"`` or ``"cuda"``; they can do the same on both.
    """
    return _OF_ALL | next((found for pattern, found in _OF_SOME if re.fullmatch(pattern, version)), {})


# --- building ---------------------------------------------------------------------------------------------------------


def build(scenario: Scenario, *, seed: int = 1234) -> LegacyTrainer:
    """Builds a trainer; the default process group must exist.

    Two calls with the same arguments give bit-identical trainers, whatever ran between them.

    Args:
        scenario: What to build.
        seed: Decides weights and data.
    """
    load()
    if not _parallel_state().model_parallel_is_initialized():
        _parallel_state().initialize_model_parallel()
    args = legacy_package.set_args(**_arguments(scenario))
    torch.manual_seed(seed)
    model = [_wrap(ToyModel(scenario).to(device()), chunk, args) for chunk in range(scenario.chunks)]
    optimizer = _optimizer(model, args)
    return LegacyTrainer(scenario, seed, model, optimizer, args)


def _optimizer(model: list[Any], args: Any) -> Any:
    """The tree's optimizer over the chunks; in megatron.core it has a configuration instead of the command line."""
    optimizers = _optimizers()
    make = optimizers.get_megatron_optimizer
    if "config" in inspect.signature(make).parameters:
        return make(with_known(optimizers.OptimizerConfig, **vars(args)), model)
    return make(model)


def _arguments(scenario: Scenario) -> dict[str, Any]:
    """The command line, with all that DDP and optimizers of any tree ask it for."""
    return {
        "DDP_impl": "local",
        "accumulate_allreduce_grads_in_fp32": scenario.grad_reduce_in_fp32,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
        "barrier_with_L1_time": False,
        "bf16": scenario.precision == "bf16",
        "bucket_size": scenario.bucket_size or _BUCKET_SIZE,
        "check_for_nan_in_loss_and_grad": False,
        "clip_grad": 1.0,
        "fp16": scenario.precision == "fp16",
        "hysteresis": 1,
        "initial_loss_scale": scenario.initial_loss_scale or 2.0**32,
        "log_num_zeros_in_grad": False,
        "loss_scale": None,
        "loss_scale_window": 1000,
        "lr": 0.01,
        "min_loss_scale": 1.0,
        "optimizer": scenario.optimizer,
        "overlap_grad_reduce": scenario.overlap,
        "overlap_param_gather": scenario.overlap and scenario.distributed_optimizer,
        "params_dtype": DTYPES[scenario.precision],
        "pipeline_model_parallel_size": 1,
        "pipeline_model_parallel_split_rank": None,
        "sequence_parallel": False,
        "sgd_momentum": 0.9,
        "use_contiguous_buffers_in_local_ddp": True,
        "use_distributed_optimizer": scenario.distributed_optimizer,
        "weight_decay": 0.01,
    }


def _wrap(module: torch.nn.Module, chunk: int, args: Any) -> Any:
    """A chunk of the model in the tree's DDP, which takes what it needs of all that any tree's does."""
    ddp = _ddp_class()
    known: dict[str, Any] = {
        **vars(args),
        "module": module,
        "use_contiguous_buffers": True,
        "disable_bucketing": chunk > 0,
    }
    parameters = inspect.signature(ddp).parameters
    if "config" in parameters:
        transformer = importlib.import_module("megatron.core.transformer.transformer_config")
        known["config"] = transformer.TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=1)
    if "data_parallel_group" in parameters:
        known["data_parallel_group"] = _parallel_state().get_data_parallel_group()
    if "expert_data_parallel_group" in parameters:
        known["expert_data_parallel_group"] = _parallel_state().get_data_modulo_expert_parallel_group()
    return with_known(ddp, **known)


def with_known(call: Callable[..., Any], **known: Any) -> Any:
    """Calls with those of the arguments that the callee has parameters for."""
    return call(**{name: value for name, value in known.items() if name in inspect.signature(call).parameters})


# --- training ---------------------------------------------------------------------------------------------------------


class LegacyTrainer(BaseTrainer):
    """A ``Trainer`` (see ``megastow_conformance.trainer``) over a source tree.

    The order of calls is that of ``train_step`` in the tree's megatron/training.py.

    Args:
        scenario: What to train.
        seed: Decides the data.
        model: The DDP chunks.
        optimizer: Megatron's optimizer over them.
        args: The command line.
    """

    hook_folders = frozenset({"megatron", "doubles"})

    def __init__(self, scenario: Scenario, seed: int, model: list[Any], optimizer: Any, args: Any) -> None:
        super().__init__(scenario, seed, model, optimizer, device())
        self._args = args
        self._gathering = [link for link in distributed_links(optimizer) if _gathers_ahead(link)]
        self._has_stepped = self._is_staged = False  # since the last forward pass
        for link in self._gathering:
            self._hook_own_modules_only(link)

    def _hook_own_modules_only(self, link: Any) -> None:
        """Puts the hook that finishes the gathering of parameters on the modules of this model only.

        Megatron puts it on all modules of the process, where it fails with an assertion at the parameters of any other
        model: of a reference model, and of a second trainer.
        """
        link.remove_pre_hook_handle.remove()
        hook = link._make_forward_pre_hook()
        for chunk in self.model:
            for module in chunk.modules():
                module.register_forward_pre_hook(hook)

    def _data_parallel_rank(self) -> int:
        rank: int = _parallel_state().get_data_parallel_rank()
        return rank

    def _no_sync(self, chunk: Any) -> contextlib.AbstractContextManager[Any]:
        context: contextlib.AbstractContextManager[Any] = getattr(chunk, "no_sync", contextlib.nullcontext)()
        return context

    def _reduce_grads(self) -> None:
        if hasattr(self.optimizer, "reduce_model_grads"):  # 23.04 to 23.08
            self.optimizer.reduce_model_grads(self._args, TIMERS)
        elif hasattr(self.model[0], "allreduce_gradients"):  # v2.5 and v2.6
            for chunk in self.model:
                chunk.allreduce_gradients()  # type: ignore[operator]
        else:
            place = importlib.import_module("megatron.core.distributed")
            if not hasattr(place, "finalize_model_grads"):  # October 2023
                place = importlib.import_module("megatron.core.pipeline_parallel")
            place.finalize_model_grads(self.model)

    def _apply_grads(self) -> tuple[bool, Any]:
        """Step, and up to October 2023 the gathering of parameters, which is a call of its own."""
        updated, grad_norm, _ = with_known(self.optimizer.step, args=self._args, timers=TIMERS)
        self._has_stepped = True
        self._is_staged = bool(updated and self._gathering)
        if updated and hasattr(self.optimizer, "gather_model_params"):
            self.optimizer.gather_model_params(self._args, TIMERS)
        return bool(updated), grad_norm

    def clear_grads(self) -> None:
        """Buffers, and what hangs on parameters; see ``Trainer``.

        After a step the distributed optimizer zeroes the buffers itself, as soon as there are no new parameters in
        them, so from 0.4 on DDP is told not to. After half a step nobody else does, and there is nothing to gather: 0.4
        fails if it is to begin that twice.
        """
        zeroes_itself = self._args.use_distributed_optimizer and self._has_stepped
        for chunk in self.model:
            with_known(chunk.zero_grad_buffer, zero_buffer=not zeroes_itself)  # type: ignore[arg-type]
        if self._has_stepped or not self._gathering:
            self.optimizer.zero_grad()

    def gather_weights(self) -> None:
        """Finishes what the hooks of the next forward pass would; see ``Trainer``.

        ``disable_pre_hook`` does the same with all buckets at once, but forgets that it has: the next forward pass
        would fill the weights with zeros (seen on core_v0.5.0).
        """
        for link in self._gathering:
            for chunk in range(len(self.model)):
                link.finish_param_sync(chunk)
        self._is_staged = False

    def staged_weights(self) -> list[torch.Tensor]:
        """From a step to the next forward pass, the buffers that parameters are gathered in; see ``Trainer``."""
        buffers = [buffer for chunk in self.model for buffer in _values(chunk.grad_buffers)] if self._is_staged else []
        return [buffer.data for buffer in buffers]

    def _loss(self, index: int, microbatch: int) -> torch.Tensor:
        loss = super()._loss(index, microbatch)
        self._has_stepped = self._is_staged = False
        return loss

    def _settle(self) -> None:
        """Waits for a gathering that ``zero_grad`` has begun and that still writes to gradient memory.

        It leaves the work as it is for Megatron, which waits again.
        """
        for link in self._gathering:
            for handle in link.all_gather_handles:
                if handle is not None:
                    handle.wait()

    def named_grads(self) -> dict[str, torch.Tensor]:
        """The live gradients, once what is on its way to their memory has arrived; see ``Trainer``."""
        self._settle()
        return super().named_grads()

    def _walk_grad_buffers(self, number: int, chunk: Any) -> Iterator[tuple[str, Any]]:
        for kind in _BUFFERS:
            for j, buffer in enumerate(_values(getattr(chunk, kind, ()))):
                yield f"chunk{number}.{kind}{j}", buffer if isinstance(buffer, torch.Tensor) else buffer.data

    def parts(self) -> list[object]:
        """What all generations have, buffers and buckets; see ``Trainer``."""
        buffers = [buffer for chunk in self.model for kind in _BUFFERS for buffer in _values(getattr(chunk, kind, ()))]
        buckets = [bucket for buffer in buffers for bucket in getattr(buffer, "buckets", ())]
        return [*super().parts(), *(buffer for buffer in buffers if not isinstance(buffer, torch.Tensor)), *buckets]

    def uses(self, kind: str) -> list[Use]:
        """Calls that touch a kind; see ``Trainer``."""
        chunk: Any = self.model[0]
        uses = super().uses(kind)
        if kind == "grad_buffers":
            uses.append(("zero_grad_buffer", lambda: with_known(chunk.zero_grad_buffer, zero_buffer=True)))
            uses.append(("reduction", self._reduce_grads))
            if self.staged_weights():
                uses.append(("forward before weights are gathered", lambda: self.evaluate(2)))
                uses.append(("gather_weights", self.gather_weights))
        if kind in ("weights", "grad_buffers") and hasattr(self.optimizer, "gather_model_params"):
            gather = self.optimizer.gather_model_params
            uses.append(("gather_model_params", lambda: gather(self._args, TIMERS)))
        return uses

    def close(self) -> None:
        """Drops everything; see ``Trainer``."""
        self._gathering.clear()
        super().close()


_BUFFERS = ("_grad_buffers", "grad_buffers", "expert_parallel_grad_buffers", "expert_grads")
"""What trees call the gradient memory of a chunk."""


def _values(nested: Any) -> list[Any]:
    """What dicts and lists, however nested, end in."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    return [leaf for item in nested for leaf in _values(item)] if isinstance(nested, (list, tuple)) else [nested]


def _gathers_ahead(link: Any) -> bool:
    """Whether an optimizer gathers parameters by hooks of the next forward pass."""
    return bool(getattr(link, "overlap_param_gather", False))
