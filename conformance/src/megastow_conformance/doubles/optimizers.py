"""What the optimizers of the generations before megatron-core 0.6 do alike; our own code.

``MegatronOptimizer`` and what derives from it have the names, attributes and behaviour of those in megatron/optimizer/
{__init__,optimizer}.py of Megatron-LM 23.08, as far as a trainer without tensor and pipeline parallelism reaches them.
The inner optimizers are torch's.
"""

from __future__ import annotations

import abc
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from megastow_conformance.doubles.gradients import clip_by_global_norm, grad_scaler
from megastow_conformance.doubles.process import current_device, get_model_parallel_group

_dist: Any = torch.distributed  # it declares no exports

Groups = list[list[torch.Tensor]]
"""Tensors, by the parameter groups of the inner optimizer."""

Outcome = tuple[bool, float | None, int | None]
"""What a step returns: whether it was applied, the gradient norm, and the number of zeros, which is not counted."""


# --- the inner optimizer ----------------------------------------------------------------------------------------------


def inner_optimizer(args: Namespace, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that the arguments ask for.

    Raises:
        ValueError: If there is no such optimizer.
    """
    if args.optimizer == "adam":
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(
            param_groups, lr=args.lr, weight_decay=args.weight_decay, betas=betas, eps=args.adam_eps
        )
    if args.optimizer == "sgd":
        return torch.optim.SGD(param_groups, lr=args.lr, weight_decay=args.weight_decay, momentum=args.sgd_momentum)
    raise ValueError(f"there is no optimizer {args.optimizer!r}; expected 'adam' or 'sgd'")


def param_groups(chunks: Iterable[torch.nn.Module], *, separate_experts: bool = False) -> list[dict[str, Any]]:
    """Groups with weight decay and without (biases and other vectors); dense ones before those of experts.

    Which is which they only say (``wd_mult``): in Megatron, it is the scheduler of the learning rate that acts on it.
    """
    found: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for chunk in chunks:
        for param in chunk.parameters():
            if param.requires_grad:
                found.setdefault((separate_experts and is_expert(param), param.dim() == 1), []).append(param)
    return [
        {
            "params": params,
            "wd_mult": 0.0 if no_decay else 1.0,
            "lr_mult": 1.0,
            "is_expert_parallel": expert,
        }
        for (expert, no_decay), params in sorted(found.items(), key=lambda item: item[0])
    ]


def is_expert(param: torch.Tensor) -> bool:
    """Whether a parameter is marked as one that is not the same on all ranks."""
    return not getattr(param, "allreduce", True)


_CARRIED = ("tensor_model_parallel", "partition_dim", "partition_stride", "shared")


def carry_attributes(source: torch.Tensor, target: torch.Tensor) -> None:
    """Marks a copy or a slice of a parameter as the parameter is marked."""
    for name in _CARRIED:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


# --- the optimizers ---------------------------------------------------------------------------------------------------


class MegatronOptimizer(abc.ABC):
    """Wraps an inner optimizer.

    Args:
        optimizer: The inner optimizer.
        args: The arguments of the process.
        models: The DDP chunks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, args: Namespace, models: Sequence[Any]) -> None:
        self.optimizer = optimizer
        self.clip_grad: float = args.clip_grad
        self.models = list(models)

    @property
    def state(self) -> Any:
        """The inner optimizer's."""
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.optimizer.param_groups

    def get_parameters(self) -> list[torch.Tensor]:
        """What the inner optimizer steps on."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def get_model_parallel_group(self) -> Any:
        """The ranks whose gradients make up the norm together; None for all."""
        return get_model_parallel_group()

    def get_main_grads_for_grad_norm(self) -> list[torch.Tensor]:
        """The gradients that count on this rank: a parameter that two share counts once."""
        return [
            param.grad
            for param in self.get_parameters()
            if param.grad is not None and not getattr(param, "shared", False)
        ]

    def clip_grad_norm(self, clip_grad: float) -> float:
        """Scales the gradients of what the inner optimizer steps on; see ``clip_by_global_norm``."""
        grads = [param.grad for param in self.get_parameters() if param.grad is not None]
        counted = self.get_main_grads_for_grad_norm()
        return clip_by_global_norm(grads, counted, clip_grad, self.get_model_parallel_group())

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """A loss, multiplied by the loss scale."""
        return self.get_loss_scale() * loss

    @abc.abstractmethod
    def get_loss_scale(self) -> torch.Tensor:
        """The loss scale, a tensor of one element."""

    @abc.abstractmethod
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes ``grad`` off everything that may have one."""

    @abc.abstractmethod
    def reload_model_params(self) -> None:
        """Takes the main weights over from the model."""

    @abc.abstractmethod
    def state_dict(self) -> Any:
        """What goes into a checkpoint."""

    @abc.abstractmethod
    def load_state_dict(self, state_dict: Any) -> None:
        """Loads what ``state_dict`` gave."""

    @abc.abstractmethod
    def step(self, args: Namespace, timers: Any) -> Outcome:
        """Clips the reduced gradients and steps."""


class FP32Optimizer(MegatronOptimizer):
    """Steps on fp32 parameters themselves."""

    def __init__(self, optimizer: torch.optim.Optimizer, args: Namespace, models: Sequence[Any]) -> None:
        super().__init__(optimizer, args, models)
        self._scale = torch.ones(1, device=current_device())

    def get_loss_scale(self) -> torch.Tensor:
        """One."""
        return self._scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes the gradients off the parameters; they are views of the buffers."""
        take_gradients([self.get_parameters()], set_to_none)

    def reload_model_params(self) -> None:
        """Nothing: there is no other copy."""

    def state_dict(self) -> Any:
        """The inner optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """The inner optimizer's."""
        self.optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, args: Namespace, timers: Any) -> Outcome:
        """Points ``grad`` into the buffers, clips and steps."""
        for param in self.get_parameters():
            param.grad = param.main_grad  # type: ignore[attr-defined]
        norm = self.clip_grad_norm(self.clip_grad) if self.clip_grad > 0.0 else None
        self.optimizer.step()
        return True, norm, None


class MixedPrecisionOptimizer(MegatronOptimizer):
    """Steps on main weights, which are not the model's own parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, args: Namespace, models: Sequence[Any]) -> None:
        super().__init__(optimizer, args, models)
        self.fp16: bool = args.fp16
        self.bf16: bool = args.bf16
        self.params_dtype: torch.dtype = args.params_dtype
        self.grad_scaler = grad_scaler(args)
        if self.grad_scaler is None:
            self._scale_one = torch.ones(1, device=current_device())
        else:
            self.found_inf = torch.zeros(1, device=current_device())

    def get_loss_scale(self) -> torch.Tensor:
        """The scaler's, or one."""
        return self._scale_one if self.grad_scaler is None else self.grad_scaler.scale

    def reload_model_params(self) -> None:
        """Takes the main weights over from the model."""
        self._copy_model_params_to_main_params()

    def _load_grad_scaler(self, state_dict: dict[str, Any]) -> None:
        if self.grad_scaler is not None and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _unscale_main_grads_and_check_for_nan(self) -> bool:
        """Divides the gradients by the loss scale; whether one is not finite, on any rank that has a part of them."""
        assert self.grad_scaler is not None
        grads = [param.grad for param in self.get_parameters() if param.grad is not None]
        inverse = self.grad_scaler.inv_scale
        self.found_inf.zero_()
        for grad in grads:
            self.found_inf += (~torch.isfinite(grad)).any()
            grad.mul_(inverse)
        _dist.all_reduce(self.found_inf, op=_dist.ReduceOp.MAX, group=self.get_model_parallel_group())
        return bool(self.found_inf.item() > 0)

    @torch.no_grad()
    def step(self, args: Namespace, timers: Any) -> Outcome:
        """Gives the main weights their gradients, unscales, clips, steps, and hands the result to the model."""
        self._copy_model_grads_to_main_grads()
        if self.grad_scaler is not None:
            found_inf = self._unscale_main_grads_and_check_for_nan()
            self.grad_scaler.update(found_inf)
            if found_inf:
                return False, None, None
        norm = self.clip_grad_norm(self.clip_grad) if self.clip_grad > 0.0 else None
        self.optimizer.step()
        self._copy_main_params_to_model_params()
        return True, norm, None

    @abc.abstractmethod
    def _copy_model_grads_to_main_grads(self) -> None: ...

    @abc.abstractmethod
    def _copy_main_params_to_model_params(self) -> None: ...

    @abc.abstractmethod
    def _copy_model_params_to_main_params(self) -> None: ...


class Float16OptimizerWithFloat16Params(MixedPrecisionOptimizer):
    """fp16 or bf16 parameters with fp32 copies of all of them on every rank; fp32 parameters are stepped on directly.

    After a step the ``grad`` of a main weight is a view into the gradient buffer where that is fp32 (``float()``
    copies nothing), and a tensor of its own where it is not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, args: Namespace, models: Sequence[Any]) -> None:
        super().__init__(optimizer, args, models)
        self.float16_groups: Groups = []
        self.fp32_from_float16_groups: Groups = []
        self.fp32_from_fp32_groups: Groups = []
        for group in self.optimizer.param_groups:
            stepped_on = [param if is_fp32(param) else main_copy(param, param) for param in group["params"]]
            pairs = list(zip(group["params"], stepped_on, strict=True))
            self.float16_groups.append([param for param, main in pairs if main is not param])
            self.fp32_from_float16_groups.append([main for param, main in pairs if main is not param])
            self.fp32_from_fp32_groups.append([param for param, main in pairs if main is param])
            group["params"] = stepped_on

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes the gradients off parameters and main weights."""
        for groups in (self.float16_groups, self.fp32_from_float16_groups, self.fp32_from_fp32_groups):
            take_gradients(groups, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Everything: inner optimizer, loss scale, main weights."""
        scaler = {} if self.grad_scaler is None else {"grad_scaler": self.grad_scaler.state_dict()}
        return {
            "optimizer": self.optimizer.state_dict(),
            **scaler,
            "fp32_from_fp16_params": self.fp32_from_float16_groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` gave."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._load_grad_scaler(state_dict)
        for main, saved in pairwise(self.fp32_from_float16_groups, state_dict["fp32_from_fp16_params"]):
            main.data.copy_(saved.data)

    def _copy_model_grads_to_main_grads(self) -> None:
        for param, main in pairwise(self.float16_groups, self.fp32_from_float16_groups):
            main.grad = param.main_grad.float()  # type: ignore[attr-defined]
            param.grad = None
        for group in self.fp32_from_fp32_groups:
            for param in group:
                param.grad = param.main_grad  # type: ignore[attr-defined]

    def _copy_main_params_to_model_params(self) -> None:
        for param, main in pairwise(self.float16_groups, self.fp32_from_float16_groups):
            param.data.copy_(main.data)

    def _copy_model_params_to_main_params(self) -> None:
        for param, main in pairwise(self.float16_groups, self.fp32_from_float16_groups):
            main.data.copy_(param.data)


def is_fp32(param: torch.Tensor) -> bool:
    """Whether a parameter needs no main copy.

    Raises:
        TypeError: If it is neither fp32 nor fp16 nor bf16.
    """
    if param.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"a parameter is {param.dtype}; expected torch.float32, torch.float16 or torch.bfloat16")
    return param.dtype is torch.float32


def main_copy(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """An fp32 copy of a parameter or of a slice of it, marked as the parameter is."""
    copy = tensor.detach().clone().float()
    carry_attributes(param, copy)
    return copy


def pairwise(first: Groups, second: Groups) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What stands in the same place of two lists of groups."""
    for group, other in zip(first, second, strict=True):
        yield from zip(group, other, strict=True)


def take_gradients(groups: Iterable[Iterable[torch.Tensor]], set_to_none: bool) -> None:
    """Takes ``grad`` off tensors, or zeroes it."""
    for group in groups:
        for tensor in group:
            if tensor.grad is None:
                continue
            if set_to_none:
                tensor.grad = None
            else:
                tensor.grad.detach().zero_()
