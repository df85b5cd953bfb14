"""How ranks stay in step, whoever fails, comes late or leaves: threads with one store in place of processes."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megastow import AgreementError, PeerError
from megastow.agreement import ANSWERS, NOTES, Call, GroupAgreement

SECONDS = 0.4


@pytest.fixture
def store():
    return dist.HashStore()


def members(store, seconds=SECONDS):
    return [GroupAgreement(store, (0, 1), rank, seconds) for rank in (0, 1)]


def make(agreement, what="offload", within=lambda: None):
    """One call; what came of it."""
    try:
        with agreement.making(Call(what)):
            within()
    except (PeerError, AgreementError, RuntimeError) as error:
        return error
    return "made"


def together(*calls):
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(run, call) for call in calls]]


def both(pair, **call):
    return together(*(lambda member=member: make(member, **call) for member in pair))


def test_calls_are_made_by_both_or_by_none(store):
    pair = members(store, 30.0)
    assert both(pair) == both(pair) == ["made", "made"]
    results = together(lambda: make(pair[0], "offload"), lambda: make(pair[1], "onload"))
    assert all(isinstance(result, AgreementError) for result in results)
    assert both(pair) == ["made", "made"]


@pytest.mark.parametrize("missed", [1, 3])
def test_ranks_that_try_again_at_the_same_time_meet(store, missed):
    pair = members(store)
    for _ in range(missed):
        assert isinstance(make(pair[0]), PeerError)
    assert any(both(pair) == ["made", "made"] for _ in range(3)), "they never met"
    assert both(pair) == ["made", "made"]


def test_ranks_meet_after_a_call_that_one_declined_and_the_other_never_came_to(store):
    pair = members(store)
    for _ in range(2):
        pair[0].decline(RuntimeError("interrupted"))
    assert any(both(pair) == ["made", "made"] for _ in range(3)), "they never met"


def test_managers_made_at_the_same_time_meet_after_one_was_missed(store):
    alone = GroupAgreement(store, (0, 1), 0, SECONDS)
    assert isinstance(make(alone, "create"), PeerError)
    assert any(both(members(store), what="create") == ["made", "made"] for _ in range(3)), "they never met"


def test_ranks_tell_each_other_what_they_have_found(store):
    pair = members(store, 5.0)
    heard = {}

    def ask(rank, answers):
        with pair[rank].making(Call("offload", (ANSWERS, None))) as ballot:
            heard[rank] = None if answers is None else ballot.ask(answers)
            ballot.confirm()

    together(lambda: ask(0, {"a": "1", "b": "1"}), lambda: ask(1, {"a": "1", "b": "2", "c\n": "3"}))
    assert heard[0] == heard[1] == {"a": {"1": 2}, "b": {"1": 1, "2": 1}, "c\n": {"3": 1}}
    together(lambda: ask(0, {"a": "1"}), lambda: ask(1, None))  # confirms without having asked
    assert heard == {0: {"a": {"1": 1}}, 1: None}
    together(lambda: ask(0, {}), lambda: ask(1, {}))
    assert heard == {0: {}, 1: {}}
    assert both(pair) == ["made", "made"]


def test_a_rank_that_fails_before_it_is_asked_is_not_waited_for(store):
    pair = members(store, 30.0)

    def call(rank):
        try:
            with pair[rank].making(Call("offload", (ANSWERS, None))) as ballot:
                if rank == 1:
                    raise RuntimeError("injected")
                ballot.ask({"a": "1"})
        except (PeerError, RuntimeError) as error:
            return error
        return None

    asking, failing = together(lambda: call(0), lambda: call(1))
    assert isinstance(asking, PeerError)
    assert "injected" in str(asking)
    assert type(failing) is RuntimeError
    assert both(pair) == ["made", "made"]


def test_who_begins_a_call_is_not_taken_for_one_who_ends_it(store):
    """Rank 1 has voted, and loses the store before it learns that all have; then it makes the same call again."""
    pair = members(store)
    vote = pair[1].vote

    def lose_the_store(number, *said):
        vote(number, *said)
        pair[1].vote = vote
        raise ConnectionError("gone")

    pair[1].vote = lose_the_store
    pair[1].stop = lambda number, why: (_failed(), number + 1)

    def second():
        with pytest.raises(ConnectionError):
            make(pair[1])
        del pair[1].stop
        return make(pair[1])

    results = together(lambda: make(pair[0]), second)
    assert results[0] != "made", "a call was confirmed by a rank that had only begun it"


def _failed():
    from megastow.agreement import Decision

    return Decision("failed", "rank 1 failed", (1,))


def test_a_vote_does_not_stand_for_the_next_call(store, monkeypatch):
    """Rank 0 is interrupted while it waits for the others, and once more while it tells them so."""
    pair = members(store)
    vote, begun = pair[0].vote, []

    def interrupted(*said):
        begun.append(threading.Thread(target=vote, args=said))
        begun[0].start()
        while not store.check([pair[0]._key(0, 0)]):
            time.sleep(0.001)
        raise KeyboardInterrupt

    def interrupted_again(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pair[0], "vote", interrupted)
        patch.setattr(pair[0], "stop", interrupted_again)
        with pytest.raises(KeyboardInterrupt):
            make(pair[0], "offload")
    done = []
    results = together(lambda: make(pair[0], "onload", lambda: done.append(0)), lambda: make(pair[1], "offload"))
    begun[0].join(30)
    assert not done, "an offload was taken for an onload"
    assert all(isinstance(result, PeerError) for result in results), results
    assert any(both(pair) == ["made", "made"] for _ in range(3)), "they never met"


def test_every_call_fails_at_once_when_a_rank_has_left(store):
    pair = members(store, seconds=30.0)
    assert both(pair) == ["made", "made"]
    pair[1].leave()
    for _ in range(3):
        error = make(pair[0])
        assert isinstance(error, PeerError)
        assert "rank 1 has closed its manager" in str(error)
        assert "make new ones" in str(error)


def test_leaving_is_told_behind_rounds_that_the_other_has_given_up(store):
    pair = members(store)
    for _ in range(2):
        assert isinstance(make(pair[0]), PeerError)
    pair[1].leave()
    assert "has closed" in str(make(pair[0]))
    pair[0].leave()


def test_an_interrupted_vote_counts_once(store):
    ranks = [GroupAgreement(store, (0, 1, 2), rank, SECONDS) for rank in range(3)]
    key = ranks[0]._key(0, 0)
    ranks[0].vote(0, "offload", 0.0)  # late: nobody else has come
    assert store.check([key])
    before = store.add(ranks[0]._key(0, "come"), 0)
    ranks[0].vote(0, "offload", 0.0)
    assert store.add(ranks[0]._key(0, "come"), 0) == before == 1


# --- notes -----------------------------------------------------------------------------------------------------------


def exchange(agreement, note, within=lambda: None):
    """A call in which ranks tell each other something; what this one has heard, or the error."""
    try:
        with agreement.making(Call("offload", (NOTES, None))) as ballot:
            within()
            return ballot.exchange(note, (0, 1))
    except (PeerError, RuntimeError) as error:
        return error


def test_ranks_hear_what_the_others_tell(store):
    pair = members(store, 30.0)
    for number in range(3):
        told = {0: f"zero {number}", 1: f"one {number}"}
        assert together(*(lambda r=r, note=note: exchange(pair[r], note) for r, note in told.items())) == [told, told]


def test_the_store_is_kept_tidy(store):
    pair = members(store, 30.0)
    told = {0: "zero", 1: "one"}
    sizes = []
    for _ in range(20):
        assert together(*(lambda r=r, note=note: exchange(pair[r], note) for r, note in told.items())) == [told, told]
        sizes.append(store.num_keys())
    # The numbers of two managers; of each of the last rounds the decision, a count, and votes; and notes.
    assert max(sizes) <= 2 + 3 * (2 + 2) + 2 * 2, sizes


def test_who_tells_nothing_has_told_nothing(store):
    pair = members(store, 30.0)
    silent = lambda: make_exchanging(pair[1])  # noqa: E731
    assert together(lambda: exchange(pair[0], "zero"), silent) == [{0: "zero", 1: ""}, "made"]


def make_exchanging(agreement):
    with agreement.making(Call("offload", (NOTES, None))):
        pass
    return "made"


def test_who_fails_before_telling_is_not_waited_for(store):
    pair = members(store, seconds=30.0)

    def fail():
        raise RuntimeError("no memory")

    heard, raised = together(lambda: exchange(pair[0], "zero"), lambda: exchange(pair[1], "one", fail))
    assert isinstance(heard, PeerError)
    assert "rank 1 failed: RuntimeError: no memory" in str(heard)
    assert isinstance(raised, RuntimeError)
    assert together(*(lambda r=r: exchange(pair[r], "again") for r in (0, 1))) == [{0: "again", 1: "again"}] * 2


def test_a_rank_that_works_sees_that_another_has_given_up(store):
    pair = members(store, seconds=30.0)
    given_up = threading.Event()

    def works():
        with pair[0].making(Call("onload")) as ballot:
            ballot.look()  # nobody has
            assert given_up.wait(30)
            ballot.look()

    def gives_up():
        with contextlib.suppress(RuntimeError), pair[1].making(Call("onload")) as ballot:
            ballot.withdraw(RuntimeError("interrupted"))
            given_up.set()
            raise RuntimeError("interrupted")

    def outcome(work):
        try:
            return work()
        except PeerError as error:
            return str(error)

    seen, _ = together(lambda: outcome(works), gives_up)
    assert "rank 1 failed: RuntimeError: interrupted" in seen
    assert both(pair) == ["made", "made"]
