"""Ranks of a group move together: each call happens on all of them or on none, and nobody waits for ever.

[Note: how ranks agree]
A call has rounds of voting: one at its start, in which all must have called the same, and one before what cannot be
undone, which all must have reached; and between them, if the call needs it, one in which ranks answer questions with
their votes, and one in which each leaves a note for some of the others. The rounds of a manager are numbered, and every
rank goes through the same ones in the same order. What becomes of a round is one key of a key-value store, the
decision, which can be written once (`compare_set`): by the last rank to vote, by a rank that has failed, or by one that
has waited for too long. Whoever comes later finds it there. So all ranks follow the same decision, whenever they look,
and a call ends at the first one that is not "agreed": the next call begins with the next round, on all ranks. A rank
that finds that the others have given up on several rounds without it passes over those.

The store is that of the process group (`store.py`), and no collective is involved: those would hang with the rank that
is missing, and a gloo group is of no use any more after its first time-out.

What remains is a rank that votes and then loses the store. It cannot know the decision, undoes its part, and says so.
The residencies of the ranks may then differ until the call, or its opposite, is made again.

Of a round there are two keys, the decision and how many have come, and one for each vote and each note. When all have
come to a later round, nobody looks at them any more: each rank deletes its own while it waits in the one after that,
and the first to come to it deletes the two. So a vote takes a rank five requests, and the last to come some more,
however many there are: the process that serves the store answers some 50,000 a second, and a job may have a thousand
ranks.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar

import torch.distributed as dist

from megastow import arguments
from megastow.errors import AgreementError, MegastowError, PeerError
from megastow.state import StateKind
from megastow.store import Store, StoreLine, store_of, wait_for

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

DEFAULT_AGREE_SECONDS = 60.0
"""How long ranks wait for each other in a round; NCCL's own limit is 10 minutes."""

_GRACE_SECONDS = 20.0
"""How long the store may take to answer, beyond the time for which it was asked to wait: the process that serves it may
stand still for seconds, behind a slow disk for example, while the others go on."""

_MESSAGE_CHARACTERS = 1000
"""The most that one rank tells the others about its error."""


ANSWERS: Literal["answers"] = "answers"
"""The round of a call in which ranks answer the same questions, and all hear the result; see `Ballot.ask`."""

NOTES: Literal["notes"] = "notes"
"""The round of a call in which ranks leave notes, each for some of the others; see `Ballot.exchange`."""

Point = StateKind | Literal["start", "answers", "notes"] | None
"""What a round is about: the start of a call, what ranks tell each other, or a kind (None: all of them) to confirm."""

Answers = Mapping[str, Mapping[str, int]]
"""By question, which answers were given, and by how many ranks."""


@dataclass(frozen=True)
class Call:
    """What ranks call together.

    Attributes:
        what: the call in words, which have to be the same on all ranks.
        points: what its rounds after the start are about, in their order: what is confirmed (kinds that are let through
            one by one, or None for the whole), and where in between the ranks tell each other something (`ANSWERS`,
            `NOTES`), each at most once.
        patience: seconds that a rank may take longer for it than another for good reasons, beyond the usual limit.
    """

    what: str
    points: tuple[Point, ...] = (None,)
    patience: float = 0.0


class Ballot:
    """What the ranks of a call have agreed on so far; this one is of a manager without a group, and agrees to all."""

    def confirm(self, kind: StateKind | None = None) -> None:
        """Vote, before what cannot be undone: all that could fail has gone well here. Waits for the others.

        Args:
            kind: what has arrived, where kinds are let through one by one; None where the call ends as a whole.

        Raises:
            PeerError: another rank failed or did not come in time; undo the call, as it does.
        """

    def ask(self, answers: Mapping[str, str]) -> Answers:
        """Tell the others what was found here, and hear what they have found; for a call with `ANSWERS`.

        Waits for the others, as `confirm` does. All of them get the same. A rank that confirms without having asked
        gives no answers.

        Args:
            answers: by question; ranks may be asked different ones.

        Raises:
            PeerError: another rank failed or did not come in time; undo the call, as it does.
        """
        return {question: {answer: 1} for question, answer in answers.items()}

    def exchange(self, note: str, ranks: Collection[int]) -> Mapping[int, str]:
        """Leave a note for some of the others, and wait for theirs; for a call with `NOTES`.

        What one rank is told may be long, and is read by those who want it only. Who goes on to confirm without having
        left a note has told nothing, which is an empty one.

        Args:
            note: what this rank tells.
            ranks: those whose notes are wanted.

        Returns:
            The notes of these, this rank's own included; none of a manager without a group.

        Raises:
            PeerError: another rank failed or did not come in time; undo the call, as it does.
        """
        return {}

    def look(self) -> None:
        """See whether another rank has given the call up already; waits for nobody.

        Raises:
            PeerError: one has; undo the call, as it does.
        """

    def has_confirmed(self, kind: StateKind) -> bool:
        """Whether all ranks have confirmed a kind of a call that lets kinds through one by one: none of them undoes it.

        Does not wait, and tells nobody anything.
        """
        return False

    def withdraw(self, error: BaseException) -> bool:
        """Tell the others that the call failed here. Asking again is fine.

        Returns:
            Whether to undo it. False if all ranks have confirmed it: the others will not undo it, so this one must not.
        """
        return True


_NOTHING = Call("", ())

ALONE = Ballot()
"""For a move that is nobody else's business."""


class Agreement:
    """What calls of a manager are agreed on with; this one is of a manager without a group.

    Attributes:
        name: what no other manager of the group is called, and this one on all ranks.
    """

    name = ""

    @contextlib.contextmanager
    def making(self, call: Call) -> Iterator[Ballot]:
        """Make a call with all ranks. What fails within makes it fail on all of them, unless all have confirmed it.

        What the block has not confirmed by its end is confirmed then.

        Raises:
            AgreementError: ranks made different calls; nothing was done.
            PeerError: another rank failed or did not come in time.
        """
        yield ALONE

    def decline(self, error: BaseException) -> None:
        """Tell the others that a call failed here before it began."""

    def leave(self) -> None:
        """Tell the others that this rank makes no more calls. Does not wait for them."""


def agreement_of(group: dist.ProcessGroup | None, seconds: float) -> Agreement:
    """The agreement of a new manager; collective over the group, except that it waits for nobody.

    Args:
        group: the ranks that move together; None for a manager that moves on its own.
        seconds: how long ranks wait for each other in a round.

    Raises:
        InvalidTypeError: `group` is not a process group that this process is in, or `seconds` not a number.
        InvalidArgumentError: the limit is not positive.
        PeerError: the store of the group does not answer.
    """
    seconds = arguments.duration("agree_timeout", seconds, is_limit=True)
    if group is None:
        return Agreement()
    words = (
        "a torch.distributed.ProcessGroup that this process is in (torch.distributed.group.WORLD for all ranks; "
        "new_group returns a number to processes that are not in the new group), or None"
    )
    arguments.instance_of("group", group, dist.ProcessGroup, words)
    ranks = dist.get_process_group_ranks(group)
    return GroupAgreement(store_of(group), ranks, dist.get_rank(), seconds) if len(ranks) > 1 else Agreement()


# --- one round -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What became of a round, for all ranks.

    Attributes:
        end: "late": somebody did not come in time; "differ": the calls were different ones; "left": somebody will never
            come again, and no later round is begun.
        text: what to tell the user; empty if all agreed.
        ranks: those because of which they did not.
        answers: what ranks have told each other with their votes.
    """

    end: Literal["agreed", "differ", "failed", "late", "left"]
    text: str = ""
    ranks: tuple[int, ...] = ()
    answers: Answers = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, found: bytes) -> Decision:
        fields = json.loads(found)
        return cls(fields["end"], fields["text"], tuple(fields["ranks"]), fields["answers"])

    def error(self, what: str) -> MegastowError:
        """What a rank raises for it."""
        if self.end == "differ":
            return AgreementError(f"{self.text}. Nothing was done; make the same call on all ranks")
        if self.end == "left":
            advice = "Nothing is lost; close the managers of all ranks, and make new ones"
            return PeerError(f"{what}: {self.text}. {advice}", ranks=self.ranks)
        return PeerError(
            f"{what}: {self.text}. What this rank had done of it was undone, and nothing is lost; the call can be made "
            "again, on all ranks",
            ranks=self.ranks,
        )


_Outcome = tuple[Decision, int]
"""The decision of a round, and the number of the next one."""


class _GroupBallot(Ballot):
    """One call of a rank, from round to round.

    Which rounds are left is its whole state, and changes in one step: after an interruption in between the same round
    is asked for again, and the decision found.

    Attributes:
        following: the number of the round that the next call begins with.
    """

    def __init__(self, agreement: GroupAgreement, call: Call, first: int) -> None:
        self._agreement = agreement
        self._call = call
        self._left: deque[tuple[int, Point]] = deque(enumerate(("start", *call.points), first))
        self._is_void = False
        self._last = first + len(call.points)
        self._after_void = first

    @property
    def is_void(self) -> bool:
        """Whether the call has failed for all ranks."""
        return self._is_void

    @property
    def following(self) -> int:
        if self._is_void:
            return self._after_void
        return self._left[0][0] if self._left else self._last + 1

    @property
    def is_under_way(self) -> bool:
        """Whether this rank has voted in a round of it, and knows of no end."""
        return not self._is_void and bool(self._left) and self._left[0][0] <= self._agreement.newest

    def start(self) -> None:
        self._vote_once()

    def finish(self) -> None:
        while self._left:
            self._vote_once()

    def confirm(self, kind: StateKind | None = None) -> None:
        is_done = False
        while self._left and not is_done:
            is_done = self._left[0][1] is kind
            self._vote_once()

    def ask(self, answers: Mapping[str, str]) -> Answers:
        self._come_to(ANSWERS)
        return self._vote_once(json.dumps(answers)).answers

    def exchange(self, note: str, ranks: Collection[int]) -> Mapping[int, str]:
        number = self._come_to(NOTES)
        self._vote_once(note=note)
        return self._agreement.notes(number, ranks)

    def look(self) -> None:
        decision = self._agreement.look(self._left[0][0]) if self._left else None
        if decision is not None:
            self._follow(*decision)
            raise decision[0].error(self._call.what)

    def has_confirmed(self, kind: StateKind) -> bool:
        return kind in self._call.points and kind not in [point for _, point in self._left]

    def withdraw(self, error: BaseException) -> bool:
        while self._left and not self._is_void:
            number, _ = self._left[0]
            self._follow(*self._agreement.stop(number, _words(error)))
        return self._is_void

    def _come_to(self, point: Point) -> int:
        """Vote in the rounds before one of this call; the number of that."""
        assert point in [each for _, each in self._left], f"{self._call.what} has no more {point}"
        while self._left[0][1] != point:
            self._vote_once()
        return self._left[0][0]

    def _vote_once(self, answers: str = "", note: str | None = None) -> Decision:
        number, point = self._left[0]
        patience = 0.0 if point == "start" else self._call.patience
        # Who begins a call must not be taken for one who ends the same.
        where = {"start": "", ANSWERS: ", to the answers", NOTES: ", to the notes", None: ", to the end"}
        what = self._call.what + where.get(point, f", to the end of {point}")
        said = f"{what}\n{answers}" if answers else what
        decision, following = self._agreement.vote(number, said, patience, note)
        self._follow(decision, following)
        if self._is_void:
            raise decision.error(self._call.what)
        return decision

    def _follow(self, decision: Decision, following: int) -> None:
        if decision.end == "agreed":
            self._left.popleft()
        else:
            self._after_void = following
            self._is_void = True


class GroupAgreement(Agreement):
    """The agreement of one manager with those of the other ranks. See [Note: how ranks agree].

    Managers of a group find each other by the order in which they were made, which is the same on all ranks.

    Attributes:
        newest: the last round in which this rank has voted, or has begun to.

    Args:
        store: the key-value store of the group.
        ranks: those of the group, this one among them; by their global numbers, which messages use.
        rank: this one.
        seconds: how long ranks wait for each other.
    """

    def __init__(self, store: Store, ranks: Collection[int], rank: int, seconds: float) -> None:
        self._ranks = tuple(ranks)
        self._rank = rank
        self._seconds = seconds
        self._line = StoreLine(store)
        self._agreed = 0  # the last round that all ranks are known to have come to
        self._tidied = 0  # there are no decisions of rounds before this one
        self._mine: list[tuple[int, str]] = []  # the votes and notes of this rank that are in the store, by round
        self.newest = -1
        self._ballot = _GroupBallot(self, _NOTHING, 0)
        self.name = str(self._ask(self._number))
        self._prefix = f"megastow/{self.name}"

    @contextlib.contextmanager
    def making(self, call: Call) -> Iterator[Ballot]:
        """Make a call with all ranks; see `Agreement.making`."""
        ballot = self._next_ballot(call)
        try:
            ballot.start()
            yield ballot
            ballot.finish()
        except BaseException as error:
            ballot.withdraw(error)
            raise

    def decline(self, error: BaseException) -> None:
        """Tell the others that a call failed here before it began."""
        self._next_ballot(_NOTHING).withdraw(error)

    def leave(self) -> None:
        """Tell the others that this rank makes no more calls. Does not wait for them."""
        left = Decision("left", f"rank {self._rank} has closed its manager", (self._rank,))
        number, decision = self._ballot.following, Decision("late")
        while decision.end not in ("agreed", "left"):  # the others have given up on rounds that we have not seen
            number = self._open(number)
            decision, _ = self._stop(number, left)
            number += 1

    # --- what a ballot asks ------------------------------------------------------------------------------------------

    def vote(self, number: int, said: str, patience: float, note: str | None = None) -> _Outcome:
        """Vote in a round, and wait for the others; the decision, and the number of the next round.

        Args:
            number: of the round.
            said: what is called, and in a second line answers for the others.
            patience: seconds beyond the usual limit.
            note: left for those who want to read it; see `notes`.
        """
        seconds = self._seconds + patience
        is_new = number > self.newest  # asked again after an interruption, it must not count twice
        self.newest = max(self.newest, number)

        def work(store: Store) -> _Outcome:
            if note is not None:
                self._tell(store, number, self._note_key(number, self._rank), note)
            return self._exchange(store, number, said, seconds, is_new)

        try:
            return self._line.ask(work, seconds + _GRACE_SECONDS)
        except Exception as error:  # of the line; perhaps the others have agreed before it broke
            return self.stop(number, _words(error))

    def notes(self, number: int, ranks: Collection[int]) -> Mapping[int, str]:
        """What ranks told in a round that all have agreed in, until this one votes in the next.

        Raises:
            PeerError: the store does not answer.
        """
        keys = {rank: self._note_key(number, rank) for rank in ranks}

        def work(store: Store) -> dict[int, str]:
            found = self._those_there(store, keys)
            return {rank: found.get(rank, b"").decode() for rank in keys}

        return self._ask(work)

    def look(self, number: int) -> _Outcome | None:
        """How a round was decided in which this rank has not voted, and the number of the next; None if it is open."""

        def work(store: Store) -> _Outcome | None:
            found = self._decision(store, number)
            return None if found is None else self._decided(store, number, found)

        try:
            return self._line.ask(work, _GRACE_SECONDS)
        except Exception as error:  # whoever asks votes in it, and hears of it there
            logger.debug("the store could not be asked for a decision: %s", error)
            return None

    def stop(self, number: int, why: str) -> _Outcome:
        """Have a round fail if it is not decided yet; its decision, and the number of the next round."""
        return self._stop(number, Decision("failed", f"rank {self._rank} {why}", (self._rank,)))

    def _stop(self, number: int, decision: Decision) -> _Outcome:
        try:
            return self._line.ask(lambda store: self._decide(store, number, decision), _GRACE_SECONDS)
        except Exception as error:
            logger.warning("the other ranks could not be told that %s: %s", decision.text, error)
            return decision, number + 1

    def _next_ballot(self, call: Call) -> _GroupBallot:
        """That of a new call. It begins with the next round; after a call that has failed, with the next open one."""
        before = self._ballot
        if before.is_under_way:  # interrupted, and so was its withdrawal: its last vote must not stand for this call
            before.withdraw(InterruptedError(f"{call.what or 'another call'} was made instead"))
        first = self._open(before.following) if before.is_void else before.following
        self._ballot = _GroupBallot(self, call, first)
        return self._ballot

    def _open(self, number: int) -> int:
        """The first round from `number` on that is not decided, or in which somebody has left."""

        def look(store: Store) -> int:
            found = number
            while (decision := self._decision(store, found)) is not None and decision.end != "left":
                found += 1
            return found

        try:
            return self._line.ask(look, _GRACE_SECONDS)
        except Exception as error:  # whoever asks votes next, and hears of it there
            logger.debug("the store could not be asked for the next round: %s", error)
            return number

    def _ask(self, work: Callable[[Store], _T]) -> _T:
        """Do something with the store that no vote and no withdrawal depends on."""
        try:
            return self._line.ask(work, _GRACE_SECONDS)
        except MegastowError:
            raise
        except Exception as error:
            raise PeerError(f"the store of the process group does not answer: {error}", ranks=()) from error

    # --- on the line -------------------------------------------------------------------------------------------------

    def _number(self, store: Store) -> int:
        """The number of a new manager: the next one that the others have not waited for in vain."""
        number = store.add(f"megastow/managers/{self._rank}", 1)
        while store.check([f"megastow/{number}/0/decision"]):
            number = store.add(f"megastow/managers/{self._rank}", 1)
        return number

    def _key(self, number: int, name: object) -> str:
        return f"{self._prefix}/{number}/{name}"

    def _note_key(self, number: int, rank: int) -> str:
        return self._key(number, f"{rank}/note")

    def _tell(self, store: Store, number: int, key: str, said: str) -> None:
        """Set a key of this rank's own."""
        self._mine.append((number, key))
        store.set(key, said)

    def _exchange(self, store: Store, number: int, said: str, seconds: float, is_new: bool) -> _Outcome:
        """Vote, and wait for the decision; or take it, as the last to come or after having waited for too long."""
        mine = self._key(number, self._rank)
        is_new = is_new or not store.check([mine])
        if is_new:
            self._tell(store, number, mine, said)
        num_come = store.add(self._key(number, "come"), int(is_new))
        if num_come == len(self._ranks):
            outcome = self._decide(store, number, self._judge(store, number, seconds))
            self._tidy(store, is_first=False)
            return outcome
        self._tidy(store, is_first=num_come == 1)
        with contextlib.suppress(RuntimeError):  # over time; if it is more than that, the next call says so
            wait_for(store, self._key(number, "decision"), seconds)
            found = self._read(store, number)
            if found is not None:
                return self._decided(store, number, found)
        return self._decide(store, number, self._judge(store, number, seconds))

    def _judge(self, store: Store, number: int, seconds: float) -> Decision:
        """What to make of those who have come."""
        found = self._those_there(store, {rank: self._key(number, rank) for rank in self._ranks})
        said = [each.decode().partition("\n") for each in found.values()]
        calls = dict(zip(found, (call for call, _, _ in said), strict=True))
        by_call = {call: [rank for rank in calls if calls[rank] == call] for call in calls.values()}
        told = "; ".join(f"{_names(ranks)} called {call}" for call, ranks in by_call.items())
        missing = tuple(rank for rank in self._ranks if rank not in calls)
        if missing:
            late = f"{_names(missing)} did not come within {seconds:g} s, for which others waited ({told})"
            return Decision("late", late, missing)
        if len(by_call) > 1:
            return Decision("differ", f"the ranks differ: {told}", self._ranks)
        return Decision("agreed", answers=_counted(json.loads(answers) for _, _, answers in said if answers))

    @staticmethod
    def _those_there(store: Store, keys: Mapping[int, str]) -> dict[int, bytes]:
        """What ranks have written under these keys, of those who have."""
        if not store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if store.check([key])}
        return dict(zip(keys, store.multi_get(list(keys.values())), strict=True)) if keys else {}

    def _decision(self, store: Store, number: int) -> Decision | None:
        """How a round was decided; None if it is open."""
        return self._read(store, number) if store.check([self._key(number, "decision")]) else None

    def _read(self, store: Store, number: int) -> Decision | None:
        """A decision that was there a moment ago; None if it is gone since, as it is for a vote that was given up.

        One request, where `get` takes two. Of a round that is open it would wake up all who wait for its decision.
        """
        found = store.compare_set(self._key(number, "decision"), _GONE, _GONE)  # never what is there: writes nothing
        return None if found == _GONE.encode() else Decision.decode(found)

    def _decide(self, store: Store, number: int, decision: Decision) -> _Outcome:
        """Decide a round, if nobody has yet."""
        found = store.compare_set(self._key(number, "decision"), "", decision.encode().decode())
        return self._decided(store, number, Decision.decode(found))

    def _decided(self, store: Store, number: int, decision: Decision) -> _Outcome:
        """Follow a decision: find the next round."""
        if decision.end == "agreed" and number > self._agreed:
            self._tidied, self._agreed = self._agreed, number
        following = number if decision.end == "left" else number + 1
        if decision.end == "late":
            while (ahead := self._decision(store, following)) is not None and ahead.end == "late":
                following += 1
        return decision, following

    def _tidy(self, store: Store, *, is_first: bool) -> None:
        """Delete what is this rank's own of rounds that all have left behind; the first to come, also what is common.

        Whoever comes to a round has seen the last one agreed: all have voted in that, and look at none before.
        """
        agreed = self._agreed
        for _, key in (entry for entry in self._mine if entry[0] < agreed):
            store.delete_key(key)
        self._mine = [entry for entry in self._mine if entry[0] >= agreed]
        for old in range(self._tidied, agreed) if is_first else ():
            store.delete_key(self._key(old, "come"))
            store.delete_key(self._key(old, "decision"))


_GONE = "gone"


def _counted(given: Iterable[Mapping[str, str]]) -> Answers:
    """How many ranks gave which answer to each question."""
    counts: dict[str, dict[str, int]] = {}
    for answers in given:
        for question, answer in answers.items():
            found = counts.setdefault(question, {})
            found[answer] = found.get(answer, 0) + 1
    return counts


def _words(error: BaseException) -> str:
    return f"failed: {type(error).__name__}: {error}"[:_MESSAGE_CHARACTERS]


def _names(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
