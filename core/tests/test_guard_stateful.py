"""Several guards over the same objects, with wrappers and interruptions: what is refused, and what is left."""

import itertools
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from megastow import OffloadedError, guard
from megastow.guard import Guard, GuardedCalls, call_table
from megastow.state import ALL_KINDS, StateKind

W, M, S, G = StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS, StateKind.OPTIMIZER_STATES, StateKind.GRAD_BUFFERS

TABLES = (
    call_table(((W, G), "first"), ((W,), "second"), ((S, M), "own"), ((G,), "third")),
    call_table(((M,), "first"), ((S,), "second")),
)
METHODS = ("first", "second", "third", "own")
SOME_KINDS = st.frozensets(st.sampled_from(ALL_KINDS))


class Owner:
    def first(self):
        return "first"

    def second(self):
        return "second"

    def third(self):
        return "third"


def own():
    return "own"


def interrupted(work, after):
    """Do something, with Ctrl-C at a line of the guard, if it has so many; whether it came to that."""
    left = itertools.count(after, -1)

    def trace(frame, event, _argument):
        if frame.f_code.co_filename != guard.__file__:
            return None
        if event == "line" and next(left) == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


class Guards(RuleBasedStateMachine):
    @initialize(are_own=st.tuples(*[st.booleans()] * 3))
    def make(self, are_own):
        self.owners = [Owner() for _ in are_own]
        for owner, is_own in zip(self.owners, are_own, strict=True):
            if is_own:
                owner.own = own
        self.at_first = [dict(vars(owner)) for owner in self.owners]
        self.guards = [Guard() for _ in range(3)]
        self.away = [frozenset()] * 3
        self.wrapped = set()

    def calls(self, index):
        """Two of the guards have the first owner twice, with one table or the other first."""
        found = [GuardedCalls(owner, TABLES[0]) for owner in self.owners]
        again = [GuardedCalls(self.owners[0], TABLES[1])]
        return {0: [*found, *again], 1: [*again, *found]}.get(index, found)

    @rule(
        index=st.integers(0, 2), away=SOME_KINDS, after=st.none() | st.integers(0, 80), then=SOME_KINDS | st.booleans()
    )
    def update(self, index, away, after, then):
        """A move begins or ends; if it is interrupted, the next one is made up for it: on, back, or anything else."""

        def work():
            self.guards[index].update(away, lambda: self.calls(index))

        if after is None:
            work()
        elif interrupted(work, after):
            away = {True: away, False: self.away[index]}.get(then, then)
            self.guards[index].update(away, lambda: self.calls(index))
        self.away[index] = away

    @rule(index=st.integers(0, 2))
    def close(self, index):
        """As managers do it: with nothing away."""
        self.update(index, frozenset(), None, True)
        self.guards[index].close()
        self.guards[index] = Guard()

    @rule(number=st.integers(0, 2), method=st.sampled_from(METHODS[:2]))
    def wrap(self, number, method):
        """Somebody puts something around a method, whether it is blocked or not, and leaves it there."""
        inner = getattr(self.owners[number], method)
        setattr(self.owners[number], method, lambda: inner())
        self.wrapped.add(number)

    @invariant()
    def what_is_away_is_refused_and_nothing_else(self):
        for owner, method in itertools.product(getattr(self, "owners", ()), METHODS):
            if not hasattr(owner, method):
                continue
            needed = [
                away & calls.calls.get(method, frozenset())
                for index, away in enumerate(self.away)
                for calls in self.calls(index)
                if calls.owner is owner
            ]
            if any(needed):
                with pytest.raises(OffloadedError):
                    getattr(owner, method)()
            else:
                assert getattr(owner, method)() == method

    @invariant()
    def nothing_is_left_when_all_is_back(self):
        if any(getattr(self, "away", ())):
            return
        for number, owner in enumerate(getattr(self, "owners", ())):
            if number not in self.wrapped:
                assert vars(owner) == self.at_first[number]


TestGuards = Guards.TestCase
TestGuards.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
