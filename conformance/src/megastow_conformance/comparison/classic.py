"""The classic technique: copy out, drop the tensors, and make buffers and views anew on the way back.

So it is done where storages are not kept: every view that a release of Megatron holds has to be known, and is attached
again. This knows what megatron-core 0.9 to 0.13 hold. It is written from a description of the technique, not from
anybody's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from megastow import StateKind
from megastow_conformance.base_trainer import distributed_links, links
from megastow_conformance.comparison.wrapped import Move, Wrapped, chunks_of, to_host


def classic_technique(model: Any, optimizer: Any, **_options: Any) -> Wrapped:
    """Buffers and views made anew, for megatron-core from 0.9 on."""
    classic = _Classic(chunks_of(model), optimizer)
    return Wrapped(
        [
            Move((StateKind.WEIGHTS,), classic.drop_weights, classic.make_weights),
            Move((StateKind.MAIN_WEIGHTS,), classic.drop_main_weights, classic.make_main_weights),
            Move((StateKind.OPTIMIZER_STATES,), classic.drop_states, classic.make_states),
            Move((StateKind.GRAD_BUFFERS,), classic.drop_grads, classic.make_grads, classic.keep_grads),
        ],
        classic.held,
        classic.device,
    )


class _Classic:
    """One trainer's tensors, and what was copied of them; copies are found by the identity of what they belong to."""

    def __init__(self, chunks: list[Any], optimizer: Any) -> None:
        self._chunks = chunks
        self._optimizer = optimizer
        self.device: torch.device = next(chunks[0].parameters()).device
        self._buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        self._numel = {id(b): b.grad_data.numel() for b in self._buffers}
        self._numel |= {id(bucket): bucket.grad_data.numel() for b in self._buffers for bucket in b.buckets}
        self._shapes = {id(p): p.shape for chunk in chunks for p in chunk.parameters()}
        self._copies: dict[int, torch.Tensor] = {}
        self._kept_grads: list[Any] = []

    def held(self) -> Iterable[torch.Tensor]:
        """The copies."""
        return [*self._copies.values(), *self._kept_grads]

    # --- weights: flat buffers, the parameters in them, the optimizer's shards of those, and all that is alone ----

    def drop_weights(self) -> None:
        """Copies and lets go."""
        self._drop(self._lone_weights())
        for buffer in self._flat():
            self._copies[id(buffer)] = to_host(buffer.param_data)
            buffer.param_data = None
            for bucket in buffer.buckets:
                bucket.param_data = None
            for parameter in buffer.param_index_map:
                parameter.data = _nothing(parameter)
        for shards, index, _ in self._shards():
            shards[index] = None
        for shard, _ in self._stepped_on():
            shard.data = _nothing(shard)

    def make_weights(self) -> None:
        """Makes buffers, and points everything at them that is known to point at them."""
        for buffer in self._buffers:
            if id(buffer) in self._copies:
                flat = buffer.param_data = self._copies.pop(id(buffer)).to(self.device, copy=True)
                for bucket in buffer.buckets:
                    bucket.param_data = flat[bucket.offset : bucket.offset + self._numel[id(bucket)]]
                for parameter, (start, end, _) in buffer.param_index_map.items():
                    parameter.data = flat[start:end].view(self._shapes[id(parameter)])
        self._make(self._lone_weights())
        for shards, index, view in self._shards():
            shards[index] = view()
        for shard, view in self._stepped_on():
            shard.data = view()

    def _flat(self) -> list[Any]:
        """The buffers that parameters lie in."""
        return [buffer for buffer in self._buffers if buffer.param_data is not None]

    def _lone_weights(self) -> Iterator[torch.Tensor]:
        """Parameters that are in no flat buffer, and registered buffers."""
        flat = {id(parameter) for buffer in self._flat() for parameter in buffer.param_index_map}
        for chunk in self._chunks:
            weights = {id(t): t for t in (*chunk.parameters(), *torch.nn.Module.buffers(chunk.module))}
            yield from (tensor for key, tensor in weights.items() if key not in flat)

    def _shards(self) -> Iterator[tuple[list[Any], int, Callable[[], torch.Tensor]]]:
        """The distributed optimizer's views of parameters: the list and index of each, and what makes it anew.

        Not those of fp32 parameters: the inner optimizer steps on these very views, and knows them by identity.
        """
        for link in distributed_links(self._optimizer):
            for parameters, shards in zip(link.model_float16_groups, link.shard_float16_groups, strict=True):
                for index, parameter in enumerate(parameters):
                    place = link._get_model_param_range_map(parameter)["param"]
                    yield shards, index, partial(_view, parameter, place.start, place.end)

    def _stepped_on(self) -> Iterator[tuple[torch.Tensor, Callable[[], torch.Tensor]]]:
        """The views of fp32 parameters, and where they are to point."""
        for link in distributed_links(self._optimizer):
            for parameters, shards in zip(link.model_fp32_groups, link.shard_fp32_groups, strict=True):
                for parameter, shard in zip(parameters, shards, strict=True):
                    place = link._get_model_param_range_map(parameter)["param"]
                    yield shard, partial(_view, parameter, place.start, place.end)

    # --- gradient buffers -----------------------------------------------------------------------------------------

    def drop_grads(self) -> None:
        """Lets go."""
        self._optimizer.zero_grad()
        for buffer in self._buffers:
            buffer.grad_data = None
            for bucket in buffer.buckets:
                bucket.grad_data = None
            for parameter in buffer.param_index_map:
                parameter.main_grad = None

    def keep_grads(self) -> None:
        """Copies first."""
        self._kept_grads = [to_host(buffer.grad_data) for buffer in self._buffers]
        self.drop_grads()

    def make_grads(self) -> None:
        """Makes buffers of zeros, or of what was copied, and views on them."""
        kept, self._kept_grads = self._kept_grads or [None] * len(self._buffers), []
        for buffer, copy in zip(self._buffers, kept, strict=True):
            zeros = torch.zeros(self._numel[id(buffer)], dtype=buffer.grad_dtype, device=self.device)
            flat = buffer.grad_data = zeros if copy is None else zeros.copy_(copy)
            for bucket in buffer.buckets:
                bucket.grad_data = flat[bucket.offset : bucket.offset + self._numel[id(bucket)]]
            for parameter, (start, end, _) in buffer.param_index_map.items():
                parameter.main_grad = flat[start:end].view(self._shapes[id(parameter)])

    # --- what the optimizer keeps ---------------------------------------------------------------------------------

    def drop_main_weights(self) -> None:
        """Copies and lets go."""
        self._drop(self._main_weights())

    def make_main_weights(self) -> None:
        """Copies back."""
        self._make(self._main_weights())

    def drop_states(self) -> None:
        """Copies and lets go."""
        self._drop(self._states())

    def make_states(self) -> None:
        """Copies back."""
        self._make(self._states())

    def _main_weights(self) -> Iterator[torch.Tensor]:
        for link in links(self._optimizer):
            for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
                yield from _flattened(getattr(link, name, ()))

    def _states(self) -> Iterator[torch.Tensor]:
        for link in links(self._optimizer):
            for state in link.optimizer.state.values():
                yield from (value for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step")

    def _drop(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self._copies[id(tensor)] = to_host(tensor)
            tensor.data = _nothing(tensor)

    def _make(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.data = self._copies.pop(id(tensor)).to(self.device, copy=True)


def _view(parameter: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return parameter.detach().view(-1)[start:end]


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _flattened(groups: Iterable[Iterable[torch.Tensor]]) -> list[torch.Tensor]:
    return [tensor for group in groups for tensor in group]
