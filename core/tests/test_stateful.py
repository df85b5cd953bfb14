"""Random walks: any sequence of moves, steps, loads and faults equals a twin that knows nothing of megastow."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from core_toys import KEPT, KINDS, Trainer, assert_same, junk, raw, snapshot, storages
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from megastow import OffloadedError, Residency, TransferError, create_memory_manager, faults

subsets = st.sets(st.sampled_from(KINDS), min_size=1)


class RandomWalk(RuleBasedStateMachine):
    @initialize(
        bucket=st.sampled_from([1, 2048, 8192, 1 << 20]),
        chunk=st.sampled_from([100, 4096]),
        host_memory=st.sampled_from(["pinned", "pageable"]),
    )
    def start(self, bucket, chunk, host_memory):
        self.trainer, self.twin = Trainer(width=8), Trainer(width=8)
        self.manager = create_memory_manager(
            self.trainer.model, self.trainer.optimizer, bucket_bytes=bucket, chunk_bytes=chunk, host_memory=host_memory
        )
        self.away = set()
        self.blocks = []

    def _grads_are_dropped(self):
        for p in (*self.twin.trained, *self.twin.main):
            if p.grad is not None:
                p.grad.zero_()

    @rule(kinds=subsets, keep=st.booleans())
    def offload(self, kinds, keep):
        sizes = storages(self.trainer.tensors()).values()
        dropped = "grad_buffers" in kinds - self.away and not keep
        self.manager.offload(*kinds, keep_grads=keep)
        if dropped:
            self._grads_are_dropped()
        self.away |= kinds
        self.blocks = junk(sizes)

    @rule(kinds=subsets)
    def onload(self, kinds):
        self.manager.onload(*kinds)
        self.away -= kinds

    @rule(
        name=st.sampled_from(faults.POINTS),
        error=st.sampled_from([RuntimeError, MemoryError, KeyboardInterrupt]),
        after=st.integers(0, 6),
        kinds=subsets,
        out=st.booleans(),
    )
    def fail(self, name, error, after, kinds, out):
        call = (lambda: self.manager.offload(*kinds, keep_grads=True)) if out else (lambda: self.manager.onload(*kinds))
        self.manager.wait()  # a preparation would take the fault, for which a move makes up in silence
        with faults.inject(name, lambda: error("injected"), after=after) as passed:
            try:
                call()
            except (TransferError, KeyboardInterrupt):
                # An undoing takes the steps of an onload; threads go on with their chunks of what is not page-locked.
                goes_on = name.startswith("onload") or name == "offload.copied"
                assert passed[0] == after + 1 or (goes_on and passed[0] > after)
            else:
                assert passed[0] <= after
                self.away = self.away | kinds if out else self.away - kinds

    @precondition(lambda self: not self.away)
    @rule()
    def step(self):
        assert torch.equal(raw(self.trainer.step()), raw(self.twin.step()))

    @precondition(lambda self: not self.away)
    @rule(kinds=subsets)
    def cycle_between_forward_and_backward(self, kinds):
        expected, loss = self.twin.forward(), self.trainer.forward()
        self.manager.offload(*kinds)
        self.manager.onload()
        assert torch.equal(raw(self.twin.backward(expected)), raw(self.trainer.backward(loss)))
        self.twin.update()
        self.trainer.update()

    @precondition(lambda self: not self.away)
    @rule()
    def load(self):
        for trainer in (self.trainer, self.twin):
            trainer.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
            trainer.model.load_state_dict(copy.deepcopy(trainer.model.state_dict()))

    @precondition(lambda self: not self.away)
    @rule()
    def drop_grads(self):
        for trainer in (self.trainer, self.twin):
            for p in (*trainer.trained, *trainer.main):
                p.grad = None

    @precondition(lambda self: self.away)
    @rule()
    def use_what_is_away(self):
        with pytest.raises(OffloadedError):
            self.trainer.optimizer.step()

    @rule(wait=st.booleans())
    def prepare(self, wait):
        self.manager.prepare(wait=wait)

    @rule()
    def exchange_the_manager(self):
        self.manager.close()
        self.away = set()
        self.manager = create_memory_manager(self.trainer.model, self.trainer.optimizer)

    @invariant()
    def residency_is_true(self):
        for kind in KINDS:
            expected = Residency.OFFLOADED if kind in self.away else Residency.RESIDENT
            assert self.manager.residency(kind) is expected

    @invariant()
    def what_is_here_is_right(self):
        here = [k for k in KINDS if k not in self.away]
        assert_same(snapshot(self.twin.tensors(here)), snapshot(self.trainer.tensors(here)))

    @invariant()
    def what_is_away_takes_no_memory(self):
        for kind in self.away & set(KEPT):
            tensors = {n: t for n, t in self.trainer.tensors((kind,)).items() if not n.endswith(".step")}
            assert sum(storages(tensors).values()) == 0

    def teardown(self):
        if hasattr(self, "manager"):
            self.manager.onload()
            assert_same(snapshot(self.twin.tensors()), snapshot(self.trainer.tensors()))
            self.manager.close()


RandomWalk.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    derandomize=True,  # what is new each time is for `nox -s soak`
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
TestRandomWalk = RandomWalk.TestCase
