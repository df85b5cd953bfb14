"""A random walk: any sequence of moves, steps, faults, loads and managers equals a twin that knows nothing of moves.

[Note: several ranks]
Every rank walks by itself, and all must walk the same way: the choices come from a seed that is made of the names of
row and scenario, and no choice depends on what a rank holds. Before each action the ranks compare what they are about
to do, so that a difference is a failure with both sides named, not a deadlock. With one rank a failure is shrunk and
shown as the shortest sequence that was found. With several it cannot be: the ranks would have to fail alike. There the
first failure ends the walk, with the sequence that led to it.
"""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, reject, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from megastow import OffloadedError, Residency, faults
from megastow_conformance import oracle
from megastow_conformance.case import Case
from megastow_conformance.checks.checkpoints import leaves
from megastow_conformance.checks.common import KINDS, everything, need_megastow
from megastow_conformance.trainer import Point, Trainer

EXAMPLES = {"brief": 1, "core": 1, "full": 12}
"""Walks by the scope of the row: many rows are run after every change, so each takes other paths and few of them."""
STEPS = 20
MOST_SHRINKS = 60

_GRADS_ARE_DEAD = (Point.AFTER_STEP, Point.AFTER_ZERO_GRAD)

_subsets = st.lists(st.sampled_from(KINDS), min_size=1, unique=True)


def random_sequences(case: Case, examples: int | None = None, steps: int = STEPS) -> None:
    """Random sequences of all that a job may do with a trainer and its manager; see the module's docstring."""
    trainer = case.build()
    need_megastow(case, case.manager(trainer), "the walk also prepares, and makes named steps fail")
    trainer.close()
    machine: type[_Walk] = type("Walk", (_Walk,), {"case": case, "failures": []})
    name = f"{case.row.id}/{case.scenario.name}/{case.world}"
    walk = settings(
        max_examples=examples or EXAMPLES[case.row.scope],
        stateful_step_count=steps,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(zlib.crc32(name.encode()))(machine), settings=walk)
    except BaseException:
        if not machine.failures:
            raise
    if machine.failures:
        steps_done, text = min(machine.failures, key=lambda failure: len(failure[0]))
        listing = "\n".join(f"  {number}. {step}" for number, step in enumerate(steps_done, start=1))
        raise AssertionError(f"a walk of {len(steps_done)} steps failed:\n{listing}\n{text}")


class _EndOfWalk(BaseException):
    """The walk has failed and is over. No `Exception`, so that hypothesis does not try to repeat it."""


class _Walk(RuleBasedStateMachine):
    """A trainer under a manager, and its twin."""

    case: ClassVar[Case]
    failures: ClassVar[list[tuple[list[str], str]]]
    shrinks: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        if self.failures:
            type(self).shrinks += 1
            if self.shrinks > MOST_SHRINKS:
                raise _EndOfWalk

    # --- what may happen -------------------------------------------------------------------------------------------

    @initialize(trained=st.sampled_from([None, 0, 1, 2]))
    def start(self, trained: int | None) -> None:
        if trained is None:
            reject()  # hypothesis begins with the simplest walk that there is: twenty times `evaluate`, and no move
        self._do(f"train {trained} steps", partial(self._start, trained))

    def _start(self, trained: int) -> None:
        self.trainer, self.twin = self.case.build(), self.case.build()
        self.away: set[str] = set()
        self.index = 0
        self.is_trained = False
        self.saved: dict[str, Any] | None = None
        for _ in range(trained):
            self._step(None)
        self.manager = self.case.manager(self.trainer)

    @rule(kinds=_subsets, in_background=st.booleans())
    def offload(self, kinds: list[str], in_background: bool) -> None:
        what = f"offload {kinds}{' in the background' * in_background}"
        self._do(what, partial(self._offload, kinds, in_background))

    def _offload(self, kinds: list[str], in_background: bool) -> None:
        sizes = [t.untyped_storage().nbytes() for t in self._live(self.trainer).values()]
        if in_background:
            self.manager.offload(*kinds, non_blocking=True).wait()
        else:
            self.manager.offload(*kinds)
        self.away |= set(kinds)
        self.garbage = oracle.Garbage(sizes, self.case.device)

    @rule(kinds=_subsets, in_background=st.booleans())
    def onload(self, kinds: list[str], in_background: bool) -> None:
        what = f"onload {kinds}{' in the background' * in_background}"
        self._do(what, partial(self._onload, kinds, in_background))

    def _onload(self, kinds: list[str], in_background: bool) -> None:
        if in_background:
            self.manager.onload(*kinds, non_blocking=True).wait()
        else:
            self.manager.onload(*kinds)
        self.away -= set(kinds)

    @precondition(lambda self: not self.away)
    @rule()
    def step(self) -> None:
        self._do("step", partial(self._step, None))

    @precondition(lambda self: not self.away)
    @rule(point=st.sampled_from(Point), kinds=_subsets, keep=st.booleans())
    def step_with_a_cycle_inside(self, point: Point, kinds: list[str], keep: bool) -> None:
        keep |= point not in _GRADS_ARE_DEAD
        what = f"step with {kinds} away {point.value}{', gradients kept' * keep}"

        def at(reached: Point) -> None:
            if reached is point:
                with self.manager.offloaded(*kinds, keep_grads=keep):
                    pass

        self._do(what, partial(self._step, at))

    def _step(self, at: Callable[[Point], None] | None) -> None:
        expected, got = self.twin.train_step(self.index), self.trainer.train_step(self.index, at)
        assert got == expected, f"step {self.index} was {got}, undisturbed it was {expected}"
        self.index += 1
        self.is_trained |= got.updated

    # Weights that are still to be gathered in gradient memory need that memory, too.
    @precondition(lambda self: "weights" not in self.away and not (self.away and self.twin.staged_weights()))
    @rule()
    def evaluate(self) -> None:
        self._do("evaluate", self._evaluate)

    def _evaluate(self) -> None:
        for trainer in (self.trainer, self.twin):
            trainer.gather_weights()
        expected = self.twin.evaluate(self.index)
        assert self.trainer.evaluate(self.index) == expected, "a forward pass gives something else"

    @precondition(lambda self: self.away)
    @rule(choice=st.integers(0, 99))
    def use_what_is_away(self, choice: int) -> None:
        uses = [use for kind in sorted(self.away) for use in self.trainer.uses(kind)]
        what, call = uses[choice % len(uses)]
        self._do(f"use what is away: {what}", partial(self._expect_refusal, what, call))

    @staticmethod
    def _expect_refusal(what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except OffloadedError:
            return
        raise AssertionError(f"{what} went through")

    @rule(
        name=st.sampled_from(faults.POINTS),
        error=st.sampled_from([RuntimeError, MemoryError, KeyboardInterrupt]),
        after=st.integers(0, 3),
        kinds=_subsets,
        out=st.booleans(),
    )
    def move_with_a_fault(self, name: str, error: type[BaseException], after: int, kinds: list[str], out: bool) -> None:
        what = f"{'offload' if out else 'onload'} {kinds} with {error.__name__} at {name}, after {after}"
        self._do(what, partial(self._move_with_a_fault, name, error, after, kinds, out))

    def _move_with_a_fault(
        self, name: str, error: type[BaseException], after: int, kinds: list[str], out: bool
    ) -> None:
        call = partial(self.manager.offload, keep_grads=True) if out else self.manager.onload
        self.manager.wait()  # a preparation would take the fault, for which a move makes up in silence
        with faults.inject(name, lambda: error("injected"), after=after) as passed:
            try:
                call(*kinds)
            except BaseException as raised:
                assert passed[0] > after and "injected" in f"{raised} {raised.__cause__}", f"{raised!r} on its own"
            else:
                assert passed[0] <= after, f"the fault at {name} was swallowed"
                self.away = self.away | set(kinds) if out else self.away - set(kinds)

    # A distributed optimizer's state_dict asserts that there has been a step.
    @precondition(lambda self: self.is_trained and not self.away and self.case.lacks("restore") is None)
    @rule()
    def save_or_load(self) -> None:
        self._do("save" if self.saved is None else "load", self._save_or_load)

    def _save_or_load(self) -> None:
        if self.saved is None:
            self.saved, expected = self.trainer.checkpoint(), self.twin.checkpoint()
            oracle.assert_same(oracle.snapshot(leaves(expected)), oracle.snapshot(leaves(self.saved)), "checkpoint")
            return
        for trainer in (self.trainer, self.twin):
            trainer.restore(self.saved)
        self.saved = None

    @rule(wait=st.booleans())
    def prepare(self, wait: bool) -> None:
        self._do(f"prepare{' and wait' * wait}", partial(self.manager.prepare, wait=wait))

    @rule(bucket_bytes=st.sampled_from([1, 4096, 1 << 20]), chunk_bytes=st.sampled_from([100, 4096]))
    def exchange_the_manager(self, bucket_bytes: int, chunk_bytes: int) -> None:
        what = f"another manager, with buckets of {bucket_bytes} and chunks of {chunk_bytes} bytes"
        self._do(what, partial(self._exchange, bucket_bytes=bucket_bytes, chunk_bytes=chunk_bytes))

    def _exchange(self, **options: int) -> None:
        self.manager.close()
        self.away = set()
        self.manager = self.case.manager(self.trainer, **options)

    # --- what must be true -----------------------------------------------------------------------------------------

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        self._guarded("look", self._look)

    def _look(self) -> None:
        for kind in KINDS:
            wanted = Residency.OFFLOADED if kind in self.away else Residency.RESIDENT
            where = self.manager.residency(kind)
            assert where is wanted, f"{kind} is {where}, expected {wanted}"
        live, twins = self._live(self.trainer), self._live(self.twin)
        assert live.keys() == twins.keys(), f"tensors of only one: {sorted(live.keys() ^ twins.keys())[:8]}"
        here = {name for name, tensor in live.items() if oracle.has_memory(tensor)}
        assert self.away or here == live.keys(), f"without memory: {sorted(live.keys() - here)[:8]}"
        if here:
            expected, found = ({name: tensors[name] for name in here} for tensors in (twins, live))
            oracle.assert_same(oracle.snapshot(expected), oracle.snapshot(found), "what is here")

    def teardown(self) -> None:
        """Brings everything back and trains on; nothing of the example may outlive it."""
        if hasattr(self, "manager") and not self.failed:
            self._do("bring everything back", self._finish)
        for name in ("manager", "trainer", "twin"):
            if hasattr(self, name):
                getattr(self, name).close()

    failed = False

    def _finish(self) -> None:
        self.manager.onload()
        self.away = set()
        self._look()
        self._step(None)
        self._look()

    # --- how it is done --------------------------------------------------------------------------------------------

    def _do(self, what: str, act: Callable[[], object]) -> None:
        """Does something on every rank at once, and notes it."""
        self.done.append(what)
        self._guarded(what, act)

    def _guarded(self, what: str, act: Callable[[], object]) -> None:
        """Lets nothing pass by which ranks could come apart. See [Note: several ranks]."""
        try:
            if self.case.world > 1:
                plans: list[Any] = [None] * self.case.world
                torch.distributed.all_gather_object(plans, what)
                assert len(set(plans)) == 1, f"the ranks are about to do different things: {plans}"
            act()
        except Exception as error:
            self.failed = True
            self.failures.append((list(self.done), "".join(traceback.format_exception(error)).rstrip()))
            if self.case.world > 1:
                raise _EndOfWalk from error
            raise

    def _live(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        """All state and gradients."""
        return everything(trainer, grads=True)
