"""Ranks that move together: all of them or none, errors on every one, and nobody waits for ever."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist
from rank_group import RankGroup

from megastow import (
    AgreementError,
    InvalidArgumentError,
    InvalidTypeError,
    PeerError,
    agreement,
    create_memory_manager,
)
from megastow.agreement import Call, GroupAgreement


@pytest.fixture(scope="module")
def ranks():
    made = RankGroup(3)
    yield made
    made.close()


@pytest.mark.parametrize(
    "scenario",
    [
        "cycles",
        "calls_with_nothing_to_do",
        "several_managers",
        "many_cycles",
        "faults_of_an_offload",
        "faults_of_an_offload_in_the_background",
        "interruptions_of_an_offload",
        "what_one_rank_leaves_behind",
        "faults_of_an_onload",
        "an_onload_in_the_background_stops_at_the_same_kind",
        "an_undoing_that_fails_on_one_rank",
        "an_interruption_after_all_have_confirmed",
        "faults_while_the_last_copies_are_on_their_way",
        "what_cannot_be_started_is_told",
        "a_manager_that_cannot_be_made",
        "a_manager_by_classic_arguments",
        "different_calls",
        "one_closes",
        "one_comes_late",
        "a_block_that_raises_on_one_rank",
        "a_block_of_ranks_that_were_parted",
        "a_block_leaves_away_what_was_away_on_all_ranks",
        "a_wait_that_is_interrupted",
        "derived_weights",
        "derived_weights_that_one_rank_has_differently",
        "derived_weights_on_some_ranks_only",
        "closing_while_derived_weights_are_away",
        "derived_weights_and_a_fault_on_one_rank",
    ],
)
def test_two_ranks(ranks, scenario):
    ranks.run(scenario, world=2)


@pytest.mark.parametrize("scenario", ["cycles", "faults_of_an_onload", "derived_weights"])
def test_three_ranks(ranks, scenario):
    ranks.run(scenario, world=3)


def test_one_of_three_is_killed(ranks):
    ranks.run("one_is_killed", world=3, lost=[2])


# --- the protocol, without processes ---------------------------------------------------------------------------------


def agreements(store, world, seconds=30.0):
    return [GroupAgreement(store, range(world), rank, seconds) for rank in range(world)]


def at_once(*calls):
    """What calls return or raise that are made at the same time."""

    def outcome(call):
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def make_call(agreement, what="offload"):
    with agreement.making(Call(what)) as ballot:
        ballot.confirm()
    return "made"


class Line:
    """A connection to a store whose operations a test can disturb; its clones are disturbed no more."""

    def __init__(self, store, **disturbed):
        self._store, self._disturbed = store, disturbed

    def __getattr__(self, name):
        return self._disturbed[name] if name in self._disturbed else getattr(self._store, name)


@pytest.mark.parametrize("lost", ["get", "compare_set"])
def test_an_answer_that_is_lost_does_not_part_the_ranks(lost):
    store = dist.HashStore()
    pair = agreements(store, 2)

    def answer_is_lost(*arguments):
        getattr(store, lost)(*arguments)
        raise RuntimeError("connection reset by peer")

    for each in pair:
        each._line._idle = Line(store, **{lost: answer_is_lost})
    assert at_once(*[partial(make_call, each) for each in pair]) == ["made", "made"]


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    made, _ = agreements(dist.HashStore(), 2, seconds=0.2)
    monkeypatch.setattr(agreement, "_GRACE_SECONDS", 0.2)
    answer = threading.Event()
    silent = {name: lambda *_: answer.wait(30) for name in ("clone", "check", "set", "add", "compare_set")}
    made._line._origin = made._line._idle = Line(None, **silent)
    with pytest.raises(PeerError, match="did not answer within"):
        make_call(made)
    answer.set()


def test_who_may_wait_for_memory_is_waited_for():
    quick, slow = agreements(dist.HashStore(), 2)
    call = Call("onload", patience=30.0)

    def vote_early():
        with quick.making(call):
            quick._seconds = 0.01  # of the last round

    def vote_late():
        with slow.making(call):
            time.sleep(0.3)

    assert at_once(vote_early, vote_late) == [None, None]


def test_what_each_rank_called_is_said():
    three = agreements(dist.HashStore(), 3)
    calls = ["onload(weights)", "offload(weights)", "onload(weights)"]
    for found in at_once(*[partial(make_call, a, what) for a, what in zip(three, calls, strict=True)]):
        assert isinstance(found, AgreementError)
        assert "ranks 0, 2 called onload(weights)" in str(found)
        assert "rank 1 called offload(weights)" in str(found)
    assert at_once(*[partial(make_call, a) for a in three]) == ["made"] * 3


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"agree_timeout": "long"}, InvalidTypeError, "agree_timeout is a str"),
        ({"agree_timeout": 0}, InvalidArgumentError, "agree_timeout is 0"),
        ({"agree_timeout": float("nan")}, InvalidArgumentError, "agree_timeout is nan"),
        ({"group": [0, 1]}, InvalidTypeError, r"group is a list; expected a torch\.distributed\.ProcessGroup"),
        ({"group": dist.GroupMember.NON_GROUP_MEMBER}, InvalidTypeError, "that this process is in"),
    ],
)
def test_what_is_no_group_or_no_limit_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        create_memory_manager(torch.nn.Linear(2, 2), **arguments)
