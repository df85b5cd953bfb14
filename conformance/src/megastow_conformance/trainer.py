"""What a conformance check may assume about the trainer in front of it.

Checks are written against this protocol and never against Megatron, so the same check runs on every Megatron
generation and on a third party's fork. A trainer trains in steps that are a deterministic function of the step's index,
reports what a step did as exact bytes, and can list its own state by a walk that shares nothing with megastow: that
list is the oracle the adapters are held against.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megastow_conformance.scenarios import Scenario


class Point(enum.Enum):
    """A place inside a training step where a check may act on the trainer."""

    MID_ACCUMULATION = "mid_accumulation"
    """After the first microbatch's backward. Absent from a step of one microbatch."""
    AFTER_FORWARD = "after_forward"
    """Between forward and backward of the last microbatch: activations and the autograd graph are alive."""
    AFTER_BACKWARD = "after_backward"
    """After the last backward: gradients are local, or on their way when communication overlaps."""
    AFTER_GRAD_SYNC = "after_grad_sync"
    """After ``finalize_model_grads``, before ``optimizer.step``."""
    AFTER_STEP = "after_step"
    """After ``optimizer.step``: the gradients are used but not cleared yet."""
    AFTER_ZERO_GRAD = "after_zero_grad"
    """After the gradients were cleared: the step is over."""


STEP_POINTS: tuple[Point, ...] = tuple(Point)
"""The points in the order in which a step reaches them."""


@dataclass(frozen=True)
class StepRecord:
    """What one training step did, in bytes, so that ``==`` is exact even for NaN and -0.0.

    Attributes:
        losses: The loss of each microbatch, float32.
        grad_norm: The gradient norm that the optimizer reported, float64; ``None`` if it reported none.
        updated: Whether the optimizer applied the step; ``False`` when the loss scaler found an overflow.
        loss_scale: The loss scale after the step, float64; ``None`` if the optimizer has none.
    """

    losses: tuple[bytes, ...]
    grad_norm: bytes | None
    updated: bool
    loss_scale: bytes | None

    def __str__(self) -> str:
        losses = ", ".join(repr(struct.unpack("<f", loss)[0]) for loss in self.losses)
        norm = None if self.grad_norm is None else struct.unpack("<d", self.grad_norm)[0]
        scale = None if self.loss_scale is None else struct.unpack("<d", self.loss_scale)[0]
        return f"losses=[{losses}] grad_norm={norm!r} updated={self.updated} loss_scale={scale!r}"


def float32_bytes(value: float | torch.Tensor) -> bytes:
    """The little-endian float32 bytes of a scalar."""
    return struct.pack("<f", float(value))


def float64_bytes(value: float | torch.Tensor) -> bytes:
    """The little-endian float64 bytes of a scalar; widening a float32 loses nothing."""
    return struct.pack("<d", float(value))


Use = tuple[str, Callable[[], object]]
"""A call that touches state, and what it is called in messages."""

Layout = tuple[str, object, str, object]
"""A layout that cannot be moved: a word of its refusal; owner, name and value of the attribute that shows it."""


class Trainer(Protocol):
    """A Megatron trainer that a check can drive.

    Two trainers built from one scenario and seed are bit-identical and train identically, whatever ran in the process
    before.

    Attributes:
        scenario: What was asked for.
        model: The DDP chunks; more than one under a virtual pipeline.
        optimizer: The Megatron optimizer over all chunks.
        hook_folders: Names of folders with functions that the wrappers hang on nodes of the autograd graph, where
            nobody sees them but when they run; empty where there are none.
    """

    scenario: Scenario
    model: list[torch.nn.Module]
    optimizer: Any
    hook_folders: frozenset[str]

    def train_step(self, index: int, at: Callable[[Point], None] | None = None) -> StepRecord:
        """Runs one whole training step.

        Args:
            index: The step's number; the data are a function of it, of the microbatch and of the data-parallel rank.
            at: Called at each ``Point`` of the step, in order.

        Returns:
            What the step did.
        """
        ...

    def evaluate(self, index: int) -> tuple[bytes, ...]:
        """Runs only the forward passes of a step, without gradients.

        Args:
            index: The step whose data are used.

        Returns:
            The loss of each microbatch, float32. Buffers that a forward pass updates are updated.
        """
        ...

    def named_state(self) -> dict[str, torch.Tensor]:
        """Every parameter, buffer, main weight and optimizer state tensor under a unique name, gradients left out.

        The tensors are the live ones, not copies. A tensor that two names reach is listed once, under the first.
        """
        ...

    def host_state(self) -> dict[str, torch.Tensor]:
        """Those tensors of ``named_state`` that belong on the host, and that no move may touch.

        Where the device is the CPU too, what would be on the host beside a GPU: the step counters of torch's
        optimizers.
        """
        ...

    def named_grads(self) -> dict[str, torch.Tensor]:
        """The live gradient tensors: gradient buffers, ``main_grad`` and ``.grad``, under unique names."""
        ...

    def gather_weights(self) -> None:
        """Makes the weights whole, as training loops do before they evaluate or save; every rank must call it.

        Under overlapped communication the weights that a step has made may be gathered in the next forward pass only.
        A forward pass after this needs nothing but the weights. Called between steps.
        """
        ...

    def staged_weights(self) -> list[torch.Tensor]:
        """Tensors in gradient memory that hold, just now, the only copy of new weights.

        That memory is no gradient's at present: it must come back as it was, whatever is said about gradients.
        """
        ...

    def clear_grads(self) -> None:
        """Clears all gradients, as the training loop does at the end of a step."""
        ...

    def parts(self) -> list[object]:
        """Every object whose methods touch state: modules, wrappers, buffers, optimizers; no guard leaves a trace."""
        ...

    def uses(self, kind: str) -> list[Use]:
        """Calls that touch a kind, and that must raise while it is away."""
        ...

    def unsupported_layouts(self) -> list[Layout]:
        """Marks of layouts that the adapter must refuse; a check puts them on and takes them off. May be empty."""
        ...

    def foreign_wrappers(self) -> list[torch.nn.Module]:
        """Instances of Megatron's wrappers whose memory cannot be moved, and that must be refused. May be empty."""
        ...

    def scratch(self) -> list[torch.Tensor]:
        """Memory of the process that Megatron keeps for reuse, beside any trainer: no state, and nobody's to move."""
        ...

    def hidden_bytes(self) -> int:
        """Device memory that Megatron may keep where no attribute leads, such as in an autograd graph; no state."""
        ...

    def checkpoint(self) -> dict[str, Any]:
        """This rank's complete state, as Megatron's own ``state_dict`` methods give it and with what they leave out.

        Every rank must call it. Weights that overlapped communication has not gathered yet are gathered, as Megatron
        does before it saves.

        Returns:
            Nested dicts and lists of CPU tensors and plain values, which share no memory with the trainer.
        """
        ...

    def live_checkpoint(self) -> dict[str, Any]:
        """What ``checkpoint`` saves, with the live tensors; no collective, and nothing that is still to be gathered."""
        ...

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Loads a checkpoint with Megatron's own ``load_state_dict`` methods, whether the trainer has trained or not.

        Args:
            checkpoint: What this rank's ``checkpoint`` gave, of this trainer or of another of the same scenario. It is
                not changed, and the trainer shares no memory with it afterwards.
        """
        ...

    def sharded_checkpoint(self) -> dict[str, Any]:
        """What ``save_sharded`` saves, with the live tensors, as Megatron's ``sharded_state_dict`` methods give it."""
        ...

    def save_sharded(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Saves a distributed checkpoint, as Megatron's training loop does; every rank must call it.

        Args:
            folder: An empty folder, the same on every rank.
            state: What ``sharded_checkpoint`` gave; the state as it is now by default.
        """
        ...

    def load_sharded(self, folder: Path) -> None:
        """Loads a distributed checkpoint; every rank must call it.

        Args:
            folder: Where ``save_sharded`` has saved one, of this trainer or of another of the same scenario.
        """
        ...

    def close(self) -> None:
        """Drops every reference, removes hooks and frees the memory. The trainer cannot be used afterwards."""
        ...
