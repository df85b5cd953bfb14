"""What the trainers of all Megatron generations have in common: the course of a step, and the walk over the state.

A harness derives from ``BaseTrainer`` and says in a method each what its generation does differently: how gradients are
reduced, how the optimizer steps, where gradient buffers hang.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megastow_conformance import toy_model
from megastow_conformance.scenarios import Scenario
from megastow_conformance.trainer import Layout, Point, StepRecord, Use, float32_bytes, float64_bytes

_OVERFLOW_WEIGHT = 2.0**10
"""What the first step's loss is multiplied by under dynamic loss scaling: it overflows, and no other step does."""


NO_REDUCTION_IN_FLIGHT = (
    "up to megatron-core 0.8 a bucket keeps the handle of its reduction until the next zero_grad_buffer: nobody can "
    "tell whether it was waited for"
)
"""Why there is no "reduction_in_flight" (see ``scenarios.WORDS``) in old generations."""


class BaseTrainer:
    """A ``Trainer`` (see ``megastow_conformance.trainer``) but for what a generation must say itself.

    Args:
        scenario: What to train.
        seed: Decides data and dropout.
        model: The DDP chunks.
        optimizer: Megatron's optimizer over them.
        device: Where all of it lives.
    """

    hook_folders: frozenset[str] = frozenset()

    def __init__(
        self, scenario: Scenario, seed: int, model: list[torch.nn.Module], optimizer: Any, device: torch.device
    ) -> None:
        self.scenario = scenario
        self.model = model
        self.optimizer = optimizer
        self._seed = seed
        self._device = device

    # --- what a generation says ---------------------------------------------------------------------------------

    def _seed_everything(self, seed: int) -> None:
        """Seeds all random state that a forward pass draws from."""
        torch.manual_seed(seed)

    def _data_parallel_rank(self) -> int:
        """The rank that decides which data this process gets."""
        return torch.distributed.get_rank()

    def _no_sync(self, chunk: Any) -> contextlib.AbstractContextManager[Any]:
        """What all but the last microbatch run in."""
        context: contextlib.AbstractContextManager[Any] = chunk.no_sync()
        return context

    def _begin_step(self) -> None:
        """What the training loop does before the first forward pass."""

    def _reduce_grads(self) -> None:
        """What the training loop does between the last backward pass and the optimizer."""
        raise NotImplementedError

    def _apply_grads(self) -> tuple[bool, Any]:
        """The optimizer's step: whether it was applied, and the gradient norm or ``None``."""
        updated, grad_norm, _ = self.optimizer.step()
        return bool(updated), grad_norm

    def clear_grads(self) -> None:
        """Clears all gradients, as the training loop does; see ``Trainer``."""
        raise NotImplementedError

    def _gpt_loss(self, generator: torch.Generator) -> torch.Tensor:
        """The loss of a microbatch of the generation's own language model."""
        raise NotImplementedError(f"{type(self).__name__} has no language model")

    def _walk_grad_buffers(self, number: int, chunk: Any) -> Iterator[tuple[str, Any]]:
        """The gradient buffers of a chunk, by name."""
        raise NotImplementedError

    def parts(self) -> list[object]:
        """See ``Trainer``."""
        modules = [module for chunk in self.model for module in chunk.modules()]
        return [*modules, self.optimizer, *optimizer_parts(self.optimizer)]

    def uses(self, kind: str) -> list[Use]:
        """See ``Trainer``. A generation adds its own calls to these."""
        return common_uses(self, kind)

    def unsupported_layouts(self) -> list[Layout]:
        """See ``Trainer``."""
        return []

    def foreign_wrappers(self) -> list[torch.nn.Module]:
        """See ``Trainer``."""
        return []

    def scratch(self) -> list[torch.Tensor]:
        """See ``Trainer``."""
        return []

    def gather_weights(self) -> None:
        """See ``Trainer``. Nothing, where a forward pass does it in the memory of the weights alone."""

    def staged_weights(self) -> list[torch.Tensor]:
        """See ``Trainer``. None, where weights are gathered in memory of their own."""
        return []

    @contextlib.contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """What weights are saved in, so that none is saved that is still to be gathered."""
        self.gather_weights()
        yield

    def hidden_bytes(self) -> int:
        """See ``Trainer``."""
        return 0

    def checkpoint(self) -> dict[str, Any]:
        """What Megatron's own ``state_dict`` methods give, and the shards that they leave out; see ``Trainer``."""
        with self._whole_weights():
            return through_a_file(self.live_checkpoint())

    def live_checkpoint(self) -> dict[str, Any]:
        """The same with the live tensors; see ``Trainer``."""
        return {
            "model": [chunk.state_dict() for chunk in self.model],
            "optimizer": self.optimizer.state_dict(),
            "shards": [
                {"inner": link.optimizer.state_dict(), "main": _stepped_on(link.optimizer)}
                for link in distributed_links(self.optimizer)
            ],
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Megatron's own ``load_state_dict`` methods in Megatron's order, then the shards; see ``Trainer``.

        Megatron's own loading of shards, ``load_parameter_state_from_dp_zero``, expects the optimizers of Apex or
        Transformer Engine: with torch's, it fails on the state "step".
        """
        # What is loaded becomes the optimizers' own. A deep copy also takes it out of the memory of `torch.load`, which
        # no storage can be resized in; with a GPU, the move to the device does that.
        state = copy.deepcopy(checkpoint)
        for chunk, saved in zip(self.model, state["model"], strict=True):
            chunk.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        for link, saved in zip(distributed_links(self.optimizer), state["shards"], strict=True):
            link.optimizer.load_state_dict(saved["inner"])
            for group, saved_group in zip(_stepped_on(link.optimizer), saved["main"], strict=True):
                for main, saved_main in zip(group, saved_group, strict=True):
                    main.copy_(saved_main)

    def sharded_checkpoint(self) -> dict[str, Any]:
        """See ``Trainer``."""
        raise NotImplementedError

    def save_sharded(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """See ``Trainer``."""
        raise NotImplementedError

    def load_sharded(self, folder: Path) -> None:
        """See ``Trainer``."""
        raise NotImplementedError

    def _break_cycles(self, chunk: Any) -> None:
        """Cuts the references through C++ that no garbage collector sees, and that would keep a chunk alive."""
        getattr(chunk, "grad_accs", []).clear()

    # --- the step -----------------------------------------------------------------------------------------------

    def train_step(self, index: int, at: Callable[[Point], None] | None = None) -> StepRecord:
        """Runs one whole training step; see ``Trainer``."""
        reached = at if at is not None else _ignore
        self._seed_everything(self._seed + 1000 * (index + 1))
        self._begin_step()
        losses = tuple(self._microbatch(index, microbatch, reached) for microbatch in range(self.scenario.microbatches))
        reached(Point.AFTER_BACKWARD)
        self._reduce_grads()
        reached(Point.AFTER_GRAD_SYNC)
        updated, grad_norm = self._apply_grads()
        reached(Point.AFTER_STEP)
        self.clear_grads()
        reached(Point.AFTER_ZERO_GRAD)
        return StepRecord(
            losses=losses,
            grad_norm=None if grad_norm is None else float64_bytes(grad_norm),
            updated=updated,
            loss_scale=float64_bytes(self._loss_scale()),
        )

    def evaluate(self, index: int) -> tuple[bytes, ...]:
        """The losses of one step's forward passes, and nothing else; see ``Trainer``."""
        self._seed_everything(self._seed + 1000 * (index + 1))
        with torch.no_grad():
            return tuple(float32_bytes(self._loss(index, number)) for number in range(self.scenario.microbatches))

    def _microbatch(self, index: int, microbatch: int, reached: Callable[[Point], None]) -> bytes:
        """Forward and backward of one microbatch; gradients are communicated with the last one only."""
        is_last = microbatch == self.scenario.microbatches - 1
        with contextlib.ExitStack() as stack:
            if not is_last:
                for chunk in self.model:
                    stack.enter_context(self._no_sync(chunk))
            loss = self._loss(index, microbatch)
            if is_last:
                reached(Point.AFTER_FORWARD)
            self.optimizer.scale_loss(loss / self.scenario.microbatches).backward()
        if microbatch == 0 and not is_last:
            reached(Point.MID_ACCUMULATION)
        return float32_bytes(loss.detach())

    def _loss(self, index: int, microbatch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._data_seed(index, microbatch))
        loss = self._toy_loss(generator) if self.scenario.model == "toy" else self._gpt_loss(generator)
        overflows = index == 0 and self.scenario.initial_loss_scale is not None
        return loss * _OVERFLOW_WEIGHT if overflows else loss

    def _data_seed(self, index: int, microbatch: int) -> int:
        return ((self._seed * 1009 + index) * 64 + microbatch) * 64 + self._data_parallel_rank()

    def _toy_loss(self, generator: torch.Generator) -> torch.Tensor:
        values = toy_model.inputs(generator, self._device)
        for chunk in self.model:
            values = chunk(values)
        return toy_model.loss(values)

    def _loss_scale(self) -> Any:
        return self.optimizer.get_loss_scale()

    # --- the state ----------------------------------------------------------------------------------------------

    def named_state(self) -> dict[str, torch.Tensor]:
        """The live state without gradients; see ``Trainer``."""
        return unique(self._walk_state())

    def host_state(self) -> dict[str, torch.Tensor]:
        """What torch keeps on the host beside a device; see ``Trainer``."""
        beside_gpu = self._device.type != "cpu"
        return {
            name: tensor
            for name, tensor in self.named_state().items()
            if tensor.device.type == "cpu" and (beside_gpu or name.endswith(".step"))
        }

    def named_grads(self) -> dict[str, torch.Tensor]:
        """The live gradients; see ``Trainer``."""
        return unique(self._walk_grads())

    def _walk_state(self) -> Iterator[tuple[str, Any]]:
        for i, chunk in enumerate(self.model):
            for name, parameter in chunk.named_parameters():
                yield f"chunk{i}.param.{name}", parameter
            for name, buffer in chunk.named_buffers():
                yield f"chunk{i}.buffer.{name}", buffer
        for prefix, main in self._walk_main():
            yield f"{prefix}.main", main
        for i, link in enumerate(links(self.optimizer)):
            yield f"optimizer{i}.loss_scale", getattr(getattr(link, "grad_scaler", None), "_scale", None)
        for prefix, inner in self._walk_inner():
            for j, per_parameter in enumerate(inner.state.values()):
                for key, value in sorted(per_parameter.items()):
                    yield f"{prefix}.state{j}.{key}", value

    def _walk_grads(self) -> Iterator[tuple[str, Any]]:
        for i, chunk in enumerate(self.model):
            yield from self._walk_grad_buffers(i, chunk)
            for name, parameter in chunk.named_parameters():
                yield f"chunk{i}.main_grad.{name}", getattr(parameter, "main_grad", None)
                yield f"chunk{i}.grad.{name}", parameter.grad
        for prefix, main in self._walk_main():
            yield f"{prefix}.grad", None if main is None else main.grad

    def _walk_main(self) -> Iterator[tuple[str, Any]]:
        """What the inner optimizers step on: main weights, and views or parameters where there are none."""
        for prefix, inner in self._walk_inner():
            for j, group in enumerate(inner.param_groups):
                for k, main in enumerate(group["params"]):
                    yield f"{prefix}.group{j}.{k}", main

    def _walk_inner(self) -> Iterator[tuple[str, Any]]:
        """The torch optimizers, those inside a HybridDeviceOptimizer included."""
        for i, link in enumerate(links(self.optimizer)):
            inner = getattr(link, "optimizer", None)
            if inner is not None:
                yield f"optimizer{i}", inner
                for j, part in enumerate(getattr(inner, "sub_optimizers", ())):
                    yield f"optimizer{i}.part{j}", part

    def close(self) -> None:
        """Drops everything; see ``Trainer``."""
        for chunk in self.model:
            self._break_cycles(chunk)
        self.model.clear()
        self.optimizer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def common_uses(trainer: BaseTrainer, kind: str) -> list[Use]:
    """Calls that every generation has and that touch a kind, by name."""
    import copy
    import pickle

    model, optimizer = trainer.model[0], trainer.optimizer
    inner: Any = model.module
    nothing = torch.zeros(1)
    uses: list[Use] = [("optimizer.step", optimizer.step)]
    if kind == "weights":
        uses += [
            ("training step", lambda: trainer.train_step(2)),
            ("forward", lambda: model(nothing)),
            ("forward of the inner module", lambda: inner(nothing)),
            ("direct forward", lambda: inner.forward(nothing)),
            ("state_dict", model.state_dict),
            ("inner state_dict", inner.state_dict),
            ("load_state_dict", lambda: model.load_state_dict({})),
            ("deepcopy", lambda: copy.deepcopy(inner)),
            ("pickle", lambda: pickle.dumps(inner)),
            ("to", lambda: inner.to(torch.float64)),
            ("reload_model_params", optimizer.reload_model_params),
        ]
        if hasattr(inner, "sharded_state_dict"):
            uses.append(("sharded_state_dict", inner.sharded_state_dict))
    if kind in ("main_weights", "optimizer_states"):
        uses += [
            ("optimizer.state_dict", optimizer.state_dict),
            ("optimizer.load_state_dict", lambda: optimizer.load_state_dict({})),
        ]
    if kind == "grad_buffers":
        uses.append(("optimizer.zero_grad", optimizer.zero_grad))
    return uses


def links(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, or the optimizer alone."""
    chained = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if chained is None else [link for part in chained for link in links(part)]


def distributed_links(optimizer: Any) -> list[Any]:
    """Those links of a chain that keep main weights and inner state out of ``state_dict``."""
    return [link for link in links(optimizer) if hasattr(link, "shard_fp32_from_float16_groups")]


def _stepped_on(inner: Any) -> list[list[torch.Tensor]]:
    """What a torch optimizer steps on, group by group."""
    return [[parameter.detach() for parameter in group["params"]] for group in inner.param_groups]


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Everything below an optimizer: the links of a chain, and the inner optimizers."""
    children = getattr(optimizer, "chained_optimizers", None)
    if children is not None:
        return [part for child in children for part in (child, *optimizer_parts(child))]
    return [optimizer.optimizer] if optimizer.optimizer is not None else []


def through_a_file(value: dict[str, Any]) -> dict[str, Any]:
    """A copy on the CPU that shares nothing with the original, made the way in which checkpoints are saved."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False)  # type: ignore[no-any-return]


def unique(walk: Iterator[tuple[str, Any]]) -> dict[str, torch.Tensor]:
    """Each tensor of a walk once, under its first name; what is no tensor is left out."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in walk:
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            if name in found:
                raise ValueError(f"two tensors are called {name}")
            seen.add(id(value))
            found[name] = value
    return found


def _ignore(point: Point) -> None:
    """What a step calls when nobody watches it."""
