"""Managers that do a little more, or a little less, around the real moves."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch

from megastow import MemoryManager, Residency, StateKind, TransferError, TransferReport, create_memory_manager
from megastow.engine import Engine
from megastow.state import ALL_KINDS, KindLike, parse_kinds
from megastow_conformance.gallery.exhibit import breaks

_HOOK_ATTRIBUTE = "_post_accumulate_grad_hooks"


class _AfterWeights(MemoryManager):
    """Does something to the parameters whenever weights have come back."""

    def _make(self, move: Any, *details: Any) -> TransferReport:
        report = super()._make(move, *details)
        entry = report.kinds.get(StateKind.WEIGHTS)
        if report.direction == "onload" and entry is not None and entry.moved:
            chunks: list[Any] = self._trainer._model  # type: ignore[attr-defined]
            self.spoil(chunks, [p for chunk in chunks for p in chunk.parameters() if p.requires_grad])
        return report

    def spoil(self, chunks: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        """What goes wrong."""
        raise NotImplementedError


@breaks("bitexact")
class LosesMinusZero(_AfterWeights):
    """Adds what was saved to zeros, so that -0.0 comes back as 0.0.

    Stands for every restore that computes: a scale of one, a sum with a fresh buffer, a cast there and back.
    """

    def spoil(self, chunks: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data.add_(0.0)


@breaks(
    "identity",
    "training",
    "host",
    "peak",
    because="the optimizer goes on updating the old memory, which stays beside the new one",
)
class RebindsAnAlias(_AfterWeights):
    """Gives a parameter memory of its own, where it was a view of Megatron's buffer.

    Stands for the classic technique when it forgets one of the views of a buffer.
    """

    def spoil(self, chunks: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        parameters[0].data = parameters[0].data.clone()


@breaks(
    "identity",
    "training",
    because="autograd refuses tensors that it has saved, once they were written to",
)
class WritesThroughTheTensors(_AfterWeights):
    """Fills parameters as a caller would, which counts as a change of each.

    Stands for `param.copy_(saved)`: between forward and backward the step is lost.
    """

    def spoil(self, chunks: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(parameter.detach())


@breaks("identity")
class DropsAHook(_AfterWeights):
    """Takes the hooks off a parameter.

    Stands for a parameter that is made anew from what was saved: what others had registered on it is gone.
    """

    def spoil(self, chunks: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        for hooks in (getattr(parameter, _HOOK_ATTRIBUTE, None) for parameter in parameters[:1]):
            if hooks is not None:
                hooks.clear()


@breaks("identity", "training", because="what no hook hands on is in no gradient buffer")
class DropsGradientAccumulators(_AfterWeights):
    """Lets go of the nodes of the autograd graph that carry Megatron's hooks: gradients no longer reach its buffers.

    Stands for a wrapper that is rebuilt around the same parameters without registering its hooks.
    """

    def spoil(self, chunks: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        for chunk in chunks:
            chunk.grad_accs.clear()


@breaks("identity")
class FiresAHookTwice(_AfterWeights):
    """Registers the hooks of parameters again, though they have never been away.

    Stands for a restore that sets a trainer up as it was set up the first time.
    """

    def spoil(self, chunks: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            for hook in list((getattr(parameter, _HOOK_ATTRIBUTE, None) or {}).values()):
                parameter.register_post_accumulate_grad_hook(hook)


@breaks("identity")
class RegistersMegatronsHooksAgain(_AfterWeights):
    """Does the same with Megatron's own hooks; the second call of each finds nothing to do, unless something overlaps.

    Stands for the rebuilding of gradient accumulators in the classic technique.
    """

    def spoil(self, chunks: list[Any], parameters: list[torch.nn.Parameter]) -> None:
        for chunk in chunks:
            for parameter in (p for p in chunk.parameters() if p.requires_grad):
                with torch.enable_grad():
                    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
                node.register_hook(chunk._make_backward_post_hook(parameter))


@breaks(
    "grads",
    "training",
    because="what a training loop has cleared before the rollout, it does not clear again",
)
class ZeroesNothing(MemoryManager):
    """Takes new gradient memory as it comes.

    Stands for `torch.empty` where `torch.zeros` was meant.
    """

    _dropped = False

    def _make(self, move: Any, *details: Any) -> TransferReport:
        report = super()._make(move, *details)
        grads = report.kinds.get(StateKind.GRAD_BUFFERS)
        if report.direction == "offload":
            self._dropped |= grads is not None and grads.moved and not grads.host_bytes
        elif self._dropped and self.residency(StateKind.GRAD_BUFFERS) is Residency.RESIDENT:
            self._dropped = False
            for group in self._trainer.inventory().groups:
                for _, tensor in group.tensors if group.kind is StateKind.GRAD_BUFFERS else ():
                    tensor.data.fill_(0.5)
        return report


@breaks("failure", "residue", because="a strict offload that fails is a fault, too")
class SwallowsFaults(MemoryManager):
    """Logs that a move has failed, and goes on as if it had not.

    Stands for `except Exception: logger.warning(...)` around the whole of an offload.
    """

    def _make(self, move: Any, *details: Any) -> TransferReport:
        with contextlib.suppress(*[TransferError] if move.direction == "offload" else []):
            return super()._make(move, *details)
        return TransferReport(move.direction, {}, 0.0, *2 * (self._device.memory(),))


@breaks("order")
class KeepsOneFlag(MemoryManager):
    """Knows of one trainer that is here or away, and not of its kinds.

    Stands for `self.is_offloaded`.
    """

    def residency(self, kind: KindLike) -> Residency:
        parse_kinds([kind])
        found = {MemoryManager.residency(self, each) for each in ALL_KINDS}
        return next((each for each in found if each is not Residency.RESIDENT), Residency.RESIDENT)


@breaks("order")
def lets_two_managers_in(model: Any, optimizer: Any = None, **options: Any) -> MemoryManager:
    """Makes a manager without looking whether another one has the state away.

    Stands for two frameworks in one process that each keep house for themselves.
    """
    with mock.patch.object(Engine, "find", _find_nothing):
        return create_memory_manager(model, optimizer, **options)


def _find_nothing(*_arguments: object) -> list[Any]:
    return []


@breaks("host_state")
class ForgetsWhereATensorBegins(MemoryManager):
    """Gives a view on the beginning of a storage, wherever on it the tensor lies.

    Stands for `torch.frombuffer(memory, dtype).view(shape)`: right for a tensor that is alone on its storage, and other
    bytes for each that lies in a flat buffer.
    """

    def host_tensor(self, wanted: str | torch.Tensor) -> torch.Tensor:
        view = super().host_tensor(wanted)
        return view.as_strided(view.size(), view.stride(), 0)
