"""What the distributed optimizers before megatron-core 0.6 do alike; our own code.

Gradients lie in flat buffers (or buckets of such), one rank after the other: each rank reduces, steps on and hands out
its own part, wherever in a parameter that part begins or ends. Parameters have storages of their own; new ones are
gathered in the memory of the gradients, which the step has used up, and copied from there. Mirrors
megatron/optimizer/distrib_optimizer.py of Megatron-LM 23.08 and core_v0.5.0.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megastow_conformance.doubles.optimizers import (
    Groups,
    MixedPrecisionOptimizer,
    carry_attributes,
    is_fp32,
    main_copy,
    pairwise,
    take_gradients,
)
from megastow_conformance.doubles.process import get_data_parallel_world_size

_dist: Any = torch.distributed  # it declares no exports


@dataclass(frozen=True)
class Range:
    """A part of a flat tensor, from `start` to before `end`."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.end - self.start

    def moved(self, distance: int) -> Range:
        """The same number of elements, further on."""
        return Range(self.start + distance, self.end + distance)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of a tensor, flattened; a view."""
        return tensor.view(-1)[self.start : self.end]


class Piece:
    """A flat piece of gradients that is shared out over the ranks of a group.

    Args:
        grads: The gradients, padded so that they can be shared out evenly; their storage may be longer.
        index_map: Start and end of each parameter's gradient in them.
        group: The ranks.
        params_dtype: The dtype in which parameters are gathered, no larger than the gradients'.

    Attributes:
        params: What parameters are gathered in: it begins where the gradients do, in their memory.
        ranks: Over how many ranks the piece is shared out.
        size: The elements of each rank's part.
        own: This rank's part.
        param_map: For each parameter of which this rank owns something, where that lies: "gbuf_world" in the piece,
            "gbuf_local" in this rank's part of it, "param" in the flattened parameter.
    """

    def __init__(
        self,
        grads: torch.Tensor,
        index_map: Mapping[torch.nn.Parameter, tuple[int, int]],
        group: Any,
        params_dtype: torch.dtype,
    ) -> None:
        self.grads = grads
        self.index_map = index_map
        self.group = group
        offset = grads.storage_offset() * grads.element_size() // params_dtype.itemsize
        self.params = torch.empty(0, dtype=params_dtype, device=grads.device)
        self.params.set_(grads.untyped_storage(), offset, grads.shape, (1,))
        if self.params.data_ptr() != grads.data_ptr():
            raise ValueError(f"{params_dtype} parameters cannot begin where {grads.dtype} gradients do")
        self.ranks = int(_dist.get_world_size(group))
        self.size = grads.numel() // self.ranks
        self.own = Range(0, self.size).moved(self.size * _dist.get_rank(group))
        self.param_map = dict(self._ranges())

    def _ranges(self) -> Iterator[tuple[torch.nn.Parameter, dict[str, Range]]]:
        for param, (start, end) in self.index_map.items():
            world = Range(max(start, self.own.start), min(end, self.own.end))
            if world.size > 0:
                yield (
                    param,
                    {
                        "gbuf_world": world,
                        "gbuf_local": world.moved(-self.own.start),
                        "param": world.moved(-start),
                    },
                )

    def facts(self) -> dict[str, Any]:
        """Where everything lies, as Megatron keeps it."""
        return {
            "local": self.own.moved(-self.own.start),
            "world": self.own,
            "world_all": [Range(0, self.size).moved(self.size * rank) for rank in range(self.ranks)],
            "param_map": self.param_map,
            "max_range_size": self.size,
        }

    def shards(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each rank's part of the gradients or of the parameters; views."""
        return list(flat.split(self.size))

    def reduce(self) -> None:
        """Averages the gradients over the data; each rank has only its own part then."""
        self.grads /= get_data_parallel_world_size()
        _dist.reduce_scatter_tensor(self.own.of(self.grads), self.grads, group=self.group)

    def gather(self, *, async_op: bool = False) -> Any:
        """Collects each rank's part of the parameters; the work if it goes on."""
        return _dist.all_gather_into_tensor(self.params, self.own.of(self.params), group=self.group, async_op=async_op)

    def hand_out(self) -> None:
        """Copies the gathered parameters to where the model has them."""
        for param, (start, end) in self.index_map.items():
            param.detach().view(-1).copy_(self.params[start:end])


class ShardedOptimizer(MixedPrecisionOptimizer):
    """Each rank steps on its own parts of all parameters.

    Between ``step`` and the gathering of parameters, the new ones lie in the memory of the gradients.

    Args:
        optimizer: The inner optimizer, over whole parameters; it steps on slices from now on.
        args: The arguments of the process.
        models: The DDP chunks.
        pieces: All gradients of the parameters that the inner optimizer has.

    Raises:
        TypeError: If the inner optimizer is not Adam.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, args: Namespace, models: Sequence[Any], pieces: Sequence[Piece]
    ) -> None:
        super().__init__(optimizer, args, models)
        if not isinstance(optimizer, torch.optim.AdamW):
            raise TypeError(f"the inner optimizer is {type(optimizer).__name__}; the distributed one needs Adam")
        self._pieces = list(pieces)
        self._piece_of = {param: piece for piece in self._pieces for param in piece.param_map}
        self.model_float16_groups: Groups = []
        self.model_fp32_groups: Groups = []
        self.shard_float16_groups: Groups = []
        self.shard_fp32_groups: Groups = []
        self.shard_fp32_from_float16_groups: Groups = []
        self.opt_group_ranges = [self._owned(group) for group in self.optimizer.param_groups]
        for group in self.opt_group_ranges:
            self._slice(group)
        # As Megatron does: the keys of the inner state are numbered anew.
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def _owned(self, group: dict[str, Any]) -> dict[str, Any]:
        """The parameters of a group of which this rank owns something, in the order of the gradients."""
        members = set(group["params"])
        return {"params": [param for param in self._piece_of if param in members], "orig_group": group}

    def _slice(self, group: dict[str, Any]) -> None:
        """Makes the slices of a group that this rank owns, and the main weights of those that are not fp32."""
        for groups in self._shard_groups():
            groups.append([])
        for param in group["params"]:
            part = self.get_model_param_range_map(param)["param"]
            if is_fp32(param):
                shard = part.of(param)
                self.model_fp32_groups[-1].append(param)
                self.shard_fp32_groups[-1].append(shard)
            else:
                shard = part.of(param.detach())
                self.model_float16_groups[-1].append(param)
                self.shard_float16_groups[-1].append(shard)
                self.shard_fp32_from_float16_groups[-1].append(main_copy(shard, param))
            carry_attributes(param, shard)
        group["orig_group"]["params"] = [*self.shard_fp32_groups[-1], *self.shard_fp32_from_float16_groups[-1]]

    def _shard_groups(self) -> tuple[Groups, ...]:
        return (
            self.model_float16_groups,
            self.model_fp32_groups,
            self.shard_float16_groups,
            self.shard_fp32_groups,
            self.shard_fp32_from_float16_groups,
        )

    def get_model_param_range_map(self, param: torch.Tensor) -> dict[str, Range]:
        """Where this rank's part of a parameter lies; see ``Piece``."""
        return self._piece_of[param].param_map[param]  # type: ignore[index]

    def get_model_parallel_group(self) -> None:
        """None: every rank has a part of the gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Takes the gradients off parameters, slices and main weights."""
        for groups in self._shard_groups():
            take_gradients(groups, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks: no main weights, and no state of the inner optimizer."""
        inner = self.optimizer.state_dict()
        groups = [{key: value for key, value in group.items() if key != "params"} for group in inner["param_groups"]]
        scaler = {} if self.grad_scaler is None else {"grad_scaler": self.grad_scaler.state_dict()}
        return {"optimizer": {"param_groups": groups}, **scaler}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` gave, and makes room for the inner state, of which only the shape is known yet."""
        groups = self.optimizer.state_dict()["param_groups"]
        stepped_on = [
            (number, main)
            for group, own in zip(groups, self.optimizer.param_groups, strict=True)
            for number, main in zip(group["params"], own["params"], strict=True)
        ]
        room = {
            number: {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(main, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(main, requires_grad=False),
            }
            for number, main in stepped_on
        }
        loaded = [
            {**saved, "params": group["params"]}
            for group, saved in zip(groups, state_dict["optimizer"]["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": room, "param_groups": loaded})
        self._load_grad_scaler(state_dict)

    def _copy_model_grads_to_main_grads(self) -> None:
        """Where the buffer is fp32, the gradient of a main weight is a view into it; else a tensor of its own."""
        for param, main in self._model_and_main():
            part = self.get_model_param_range_map(param)["param"]
            main.grad = part.of(param.main_grad).float()  # type: ignore[attr-defined]

    def _copy_main_params_to_model_params(self) -> None:
        """Not to the model yet: to where they are gathered, over the gradients."""
        for param, main in self._model_and_main():
            piece = self._piece_of[param]  # type: ignore[index]
            self.get_model_param_range_map(param)["gbuf_world"].of(piece.params).copy_(main.detach())

    def _copy_model_params_to_main_params(self) -> None:
        for param, main in self._model_and_main():
            main.detach().copy_(self.get_model_param_range_map(param)["param"].of(param.detach()))

    def _model_and_main(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The parameters of which this rank owns something, each with what the inner optimizer steps on."""
        yield from pairwise(self.model_float16_groups, self.shard_fp32_from_float16_groups)
        yield from pairwise(self.model_fp32_groups, self.shard_fp32_groups)
