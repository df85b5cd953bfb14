"""What the trainers of megatron-core do in a step, in a checkpoint, and when they are looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version

from megastow_conformance import shim
from megastow_conformance.base_trainer import BaseTrainer, distributed_links
from megastow_conformance.megatron_core_process import core_module, device, load, seed_everything
from megastow_conformance.scenarios import Scenario
from megastow_conformance.toy_model import DTYPES
from megastow_conformance.trainer import Layout, Use

VOCABULARY = 64
"""The number of tokens that the language model knows."""

SEQUENCE = 16
"""The number of tokens in a sample."""

_BATCH = 2


class MegatronCoreTrainer(BaseTrainer):
    """A ``Trainer`` (see ``megastow_conformance.trainer``) over real megatron-core."""

    hook_folders = frozenset({"megatron"})

    def _seed_everything(self, seed: int) -> None:
        seed_everything(seed)

    def _data_parallel_rank(self) -> int:
        rank: int = core_module("parallel_state").get_data_parallel_rank()
        return rank

    def _reduce_grads(self) -> None:
        core_module("distributed").finalize_model_grads(self.model)

    def clear_grads(self) -> None:
        """Buffers, then what hangs on parameters and main weights; see ``Trainer``."""
        for chunk in self.model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()

    def _gpt_loss(self, generator: torch.Generator) -> torch.Tensor:
        tokens = torch.randint(VOCABULARY, (_BATCH, SEQUENCE + 1), generator=generator).to(device())
        positions = torch.arange(SEQUENCE, device=device()).expand(_BATCH, -1)
        is_future = torch.ones(1, 1, SEQUENCE, SEQUENCE, device=device()).triu(1).bool()
        labels = tokens[:, 1:].contiguous()
        output: torch.Tensor | None = None
        for chunk in self.model:
            if output is not None:
                chunk.module.set_input_tensor(output.to(DTYPES[self.scenario.precision]))  # type: ignore[operator, union-attr]
            output = chunk(tokens[:, :-1].contiguous(), positions, is_future, labels=labels)
        assert output is not None
        return output.float().mean()

    def sharded_checkpoint(self) -> dict[str, Any]:
        """What Megatron's training loop hands to ``dist_checkpointing``; see ``Trainer``."""
        return self._sharded_state(is_loading=False)

    def save_sharded(self, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Saves with ``megatron.core.dist_checkpointing`` in the format ``torch_dist``; see ``Trainer``."""
        with shim.answered_synchronize():
            if state is None:
                with self._whole_weights():
                    state = self.sharded_checkpoint()
            core_module("dist_checkpointing").save(state, str(folder))

    def load_sharded(self, folder: Path) -> None:
        """Loads what ``save_sharded`` saved; see ``Trainer``.

        Megatron's distributed optimizer expects an inner one of Apex or Transformer Engine, which keeps no number of
        steps with each parameter. Torch's does, so it is taken out of the way while Megatron loads.
        """
        with contextlib.ExitStack() as stack:
            for link in distributed_links(self.optimizer):
                if isinstance(link.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
                    stack.enter_context(_steps_out_of_the_way(link))
            state = core_module("dist_checkpointing").load(self._sharded_state(is_loading=True), str(folder))
            for i, chunk in enumerate(self.model):
                _unwrapped(chunk).load_state_dict(state[f"model{i}"])
            self.optimizer.load_state_dict(state["optimizer"])

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """What Megatron's training loop hands to ``dist_checkpointing``."""
        metadata = _sharding_metadata(self.scenario)
        state: dict[str, Any] = {}
        for i, chunk in enumerate(self.model):
            state[f"model{i}"] = _unwrapped(chunk).sharded_state_dict(metadata=metadata)
            if len(self.model) > 1:
                # Without a pipeline, Megatron numbers the layers of each chunk from 0: their names would collide.
                core_module("dist_checkpointing.utils").add_prefix_for_sharding(state[f"model{i}"], f"chunk{i}.")
        optimizer_state = self.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        return {**state, "optimizer": optimizer_state}

    @contextlib.contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Gathers the parameters that overlapped communication would gather in the next forward only.

        Megatron's training loop does the same before it saves: it has no other way to ask for it.
        """
        owners, hook = self._gatherers()
        for owner in owners if self._gathers_ahead else ():
            getattr(owner, f"disable_{hook}")()
        try:
            yield
        finally:
            for owner in owners if self._gathers_ahead else ():
                getattr(owner, f"enable_{hook}")()

    def _gatherers(self) -> tuple[list[Any], str]:
        """Who gathers parameters, and what the hooks that start it are called there."""
        return list(self.model), "forward_pre_hook"

    @property
    def _gathers_ahead(self) -> bool:
        """Whether parameters are gathered by forward pre-hooks, each bucket while the ones before it are used."""
        return self.scenario.overlap and self.scenario.distributed_optimizer

    def _walk_grad_buffers(self, number: int, chunk: Any) -> Iterator[tuple[str, Any]]:
        for kind in ("buffers", "expert_parallel_buffers"):
            for j, buffer in enumerate(getattr(chunk, kind)):
                yield f"chunk{number}.{kind}{j}.grad_data", buffer.grad_data

    def parts(self) -> list[object]:
        """What all generations have, buffers, and what communicates for them; see ``Trainer``."""
        parts = super().parts()
        for chunk in self.model:
            parts += [*_buffers(chunk), *self._communicators(chunk)]
        return parts

    def _communicators(self, chunk: Any) -> list[Any]:
        return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]

    def uses(self, kind: str) -> list[Use]:
        """Calls that touch a kind; see ``Trainer``."""
        chunk: Any = self.model[0]
        uses = super().uses(kind)
        if kind == "weights":
            uses += self._gathering_uses()
        if kind in ("main_weights", "optimizer_states"):
            uses.append(("optimizer.sharded_state_dict", lambda: self.optimizer.sharded_state_dict({})))
        if kind == "grad_buffers":
            uses.append(("zero_grad_buffer", lambda: chunk.zero_grad_buffer()))
            uses.append(("finish_grad_sync", lambda: chunk.finish_grad_sync()))
        return uses

    def _gathering_uses(self) -> list[Use]:
        """Calls that gather weights."""
        chunk: Any = self.model[0]
        return [("start_param_sync", lambda: chunk.start_param_sync())] if self.scenario.distributed_optimizer else []

    def unsupported_layouts(self) -> list[Layout]:
        """Marks put on by hand in the place where Megatron would show them; see ``Trainer``."""
        chunk: Any = self.model[0]
        module = next(m for m in chunk.modules() if m is not chunk)
        captured = SimpleNamespace(cudagraph_runners=[SimpleNamespace(fwd_graph=object(), bwd_graph=None)])
        return [
            ("cudagraph_manager", module, "cudagraph_manager", captured),
            ("cuda_graphs", module, "cuda_graphs", [object()]),
            *self._unsupported_buffers(chunk.buffers[0]),
        ]

    def _unsupported_buffers(self, buffer: Any) -> list[Layout]:
        return [
            ("nccl_ub", buffer, "nccl_ub", True),
            ("share one buffer", buffer, "shared_buffer", torch.zeros(1)),
        ]

    def foreign_wrappers(self) -> list[torch.nn.Module]:
        """The real classes of the sharding wrappers that this Megatron has, around nothing; see ``Trainer``."""
        found: list[torch.nn.Module] = []
        for path in _SHARDING_WRAPPERS:
            with contextlib.suppress(ImportError):
                module = core_module(path)
                for name in ("FullyShardedDataParallel", "TorchFullyShardedDataParallel"):
                    kind: Any = getattr(module, name, None)
                    if kind is not None:
                        wrapper: torch.nn.Module = kind.__new__(kind)
                        torch.nn.Module.__init__(wrapper)
                        wrapper.register_parameter("weight", torch.nn.Parameter(torch.zeros(2)))
                        found.append(wrapper)
        assert found or load() < Version("0.10"), "this Megatron's sharding wrappers were not found"
        return found

    def scratch(self) -> list[torch.Tensor]:
        """Megatron's global memory buffer; see ``Trainer``."""
        return list(core_module("parallel_state").get_global_memory_buffer().buffer.values())

    def hidden_bytes(self) -> int:
        """A routing map of 8 bytes a token, in the autograd graph that 0.9's token dispatcher holds; see ``Trainer``.

        It is an activation, in no attribute, and dies with the next forward pass.
        """
        is_moe = self.scenario.model == "gpt" and self.scenario.experts
        return 1024 if is_moe and load() < Version("0.10") else 0

    def _break_cycles(self, chunk: Any) -> None:
        """As in all generations, and more.

        A MoE token dispatcher holds the routing of the last microbatch, and so its autograd graph, and so the
        accumulators, whose hooks hold the DDP chunk.
        """
        for handle in dict(getattr(chunk, "remove_forward_pre_hook_handles", {})).values():
            handle.remove()
        super()._break_cycles(chunk)
        for module in chunk.modules():
            dispatcher = getattr(module, "token_dispatcher", None)
            for name, value in list(getattr(dispatcher, "__dict__", {}).items()):
                if isinstance(value, torch.Tensor):
                    setattr(dispatcher, name, None)


class LegacyCoreTrainer(MegatronCoreTrainer):
    """The same before 0.9: buckets communicate one by one, and distributed optimizers gather parameters, not the DDP.

    They launch the first gather in ``zero_grad``, and hook into every module of the process to launch the others.
    """

    def named_state(self) -> dict[str, torch.Tensor]:
        """The live state, once what is on its way to it has arrived; see ``Trainer``.

        Waiting for a gather leaves it as it is for Megatron, which waits again.
        """
        for link in distributed_links(self.optimizer):
            for handle in link.all_gather_handles:
                if handle is not None:
                    handle.wait()
        return super().named_state()

    def _gatherers(self) -> tuple[list[Any], str]:
        return distributed_links(self.optimizer), "pre_hook"

    def _communicators(self, chunk: Any) -> list[Any]:
        return [bucket for buffer in _buffers(chunk) for bucket in buffer.buckets]

    def _gathering_uses(self) -> list[Use]:
        if not self._gathers_ahead:
            return []
        return [
            ("optimizer.disable_pre_hook", self.optimizer.disable_pre_hook),
            ("optimizer.zero_grad", self.optimizer.zero_grad),
        ]

    def _unsupported_buffers(self, buffer: Any) -> list[Layout]:
        return []

    def close(self) -> None:
        """Drops everything, and the hooks into every module; see ``Trainer``."""
        for link in distributed_links(self.optimizer):
            if link.remove_pre_hook_handle is not None:
                link.remove_pre_hook_handle.remove()
        super().close()


_SHARDING_WRAPPERS = (
    "distributed.custom_fsdp",
    "distributed.fsdp.mcore_fsdp_adapter",
    "distributed.torch_fully_sharded_data_parallel",
)


def _buffers(chunk: Any) -> list[Any]:
    """The flat buffers of a chunk, for dense and for expert parameters."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _unwrapped(chunk: Any) -> Any:
    """The GPTModel inside DDP and Float16Module."""
    return chunk.module.module


def _sharding_metadata(scenario: Scenario) -> dict[str, Any]:
    """How the state is to be laid out, in Megatron's words.

    The distributed optimizer's layout is the default of Megatron's training loop from 0.16 on, and up to 0.14. In 0.15
    the new default cannot be saved with torch's optimizers.
    """
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True}
    if scenario.frozen:
        metadata["non_homogeneous_layers"] = True  # a frozen layer has no optimizer state to be stacked with others'
    if scenario.distributed_optimizer:
        is_new = load() >= Version("0.16")
        metadata["distrib_optim_sharding_type"] = "dp_reshardable" if is_new else "fully_sharded_model_space"
    return metadata


@contextlib.contextmanager
def _steps_out_of_the_way(link: Any) -> Iterator[None]:
    """Lets a distributed optimizer load as if the torch optimizer inside kept no "step" with each parameter.

    Found there, it ends the loading with a KeyError or keeps its old value, and it must be there when Megatron begins,
    or an assertion fails. What Megatron sets it to is put back at the end, each parameter with a tensor of its own:
    Megatron gives all the same one, which then counts each step once for each parameter.
    """
    inner = link.optimizer
    steps: dict[torch.Tensor, torch.Tensor] = {}

    def take(loaded: Any) -> None:
        for parameter, state in loaded.state.items():
            if "step" in state:
                steps[parameter] = state.pop("step").clone()

    link.init_state_fn(inner)
    for state in inner.state.values():
        state.setdefault("step", torch.tensor(0.0))
    handle = inner.register_load_state_dict_post_hook(take)
    try:
        yield
    finally:
        handle.remove()
        for parameter, step in steps.items():
            inner.state[parameter]["step"] = step
