"""One trainer of acme's fork: its gradient buffer, and the calls that touch it.

The base lists what every Megatron has: parameters, buffers and plain tensor attributes of modules, the main weights and
states of optimizers, gradients on parameters. Nothing is copied here: an adapter says what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megastow import collect
from megastow.guard import call_table
from megastow.megatron_binding import MegatronBinding
from megastow.state import Inventory, StateKind


class AcmeBinding(MegatronBinding):
    """`FlatDataParallel` chunks and the optimizer over them."""

    chunk_calls = call_table(((StateKind.GRAD_BUFFERS,), "zero_grads reduce_grads"))

    @property
    def facts(self) -> Mapping[str, object]:
        """What was found, for checks and for people."""
        return {
            "use_distributed_optimizer": False,
            "accumulate_allreduce_grads_in_fp32": True,
            "params_dtype": collect.largest_dtype(self._model),
        }

    def add_buffers(self, inventory: Inventory) -> None:
        """The flat gradient buffer of each chunk. `main_grad` of parameters and main weights are views on it."""
        grads = inventory.group(StateKind.GRAD_BUFFERS, "flat gradient buffers", keep=False)
        for number, chunk in enumerate(self._model):
            grads.add(f"chunk{number}.flat_grads", chunk.flat_grads)

    def quiesce(self, kinds: Sequence[StateKind], *, keep_grads: bool) -> None:
        """Nothing to wait for: this fork communicates synchronously.

        Where yours does not, hand the handles in flight to `megastow.megatron_parts.wait_until_idle`.
        """
