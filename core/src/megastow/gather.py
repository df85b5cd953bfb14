"""All-gathers that rebuild storages of which each rank of a host keeps a share: bounded, and the same on all ranks.

[Note: the same all-gathers on all ranks]
A rank that left one out would leave the others waiting in it. So all of a move are listed before the first one begins
(`begin`), when all ranks have said that they have the memory and what belongs into it; only the copies of their own
chunks may be under way before. The order is the same on all ranks, and whatever fails on a rank meanwhile, the rest of
them is made all the same (`settle`), with bytes that nobody will use: the vote that follows undoes the move everywhere.
From then on a rank begins all of them before it waits for anything else, for a neighbour's memory or for votes: another
rank may be waiting in one meanwhile. (Where collectives are not queued, and digests are compared, it waits for those of
a storage before it begins with the next; so do the others, in the same order.) Groups that overlap do not wait for each
other in a circle, because each rank takes them in the order of their ranks, kind by kind.

Not every rank gets that far: one is killed, or interrupted once more. The others look into the store now and then while
they wait, for one that has withdrawn, and give up after a time. A communicator that was given up is aborted, and the
next move makes a new one.

[Note: what cannot be bounded]
Memory that an all-gather still writes to must not be given back, so `settle` waits for its end, also of one that was
given up. gloo ends each within its own limit, at the latest. NCCL's ends when the communicator has been aborted, which
torch tries in a thread here, and which NCCL may not manage; then this rank waits, as any use of its device would. When
torch's watchdog notices that a peer has died, it ends the process, as it does in training
(`TORCH_NCCL_ASYNC_ERROR_HANDLING`). The same wait may come where memory for what is not shared is taken beside an
all-gather, and a driver gives some back for that. NCCL also wants collectives of several communicators to begin in the
same order on all ranks: those that another thread makes on the device beside an onload in the background are the
caller's to order. Nothing of that changes what is on the host.

The communicators are ours alone: of the ranks of one host, apart from those of the training, so that no collective of
the training can come between, also not from another thread. Each takes the device memory that NCCL takes for one.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megastow import threads
from megastow.agreement import ALONE, Ballot
from megastow.device import Arrival, Device, Direction, Work
from megastow.errors import MegastowError, PeerError
from megastow.shares import Piece, Share
from megastow.state import Ranks
from megastow.storages import byte_view, storage_id
from megastow.store import StoreLine, store_of

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2e-4
_LOOK_SECONDS = 0.25

_C10D: Any = dist  # torch's stubs leave the stores out

_TRIALS: dict[int, torch.Tensor] = {}
"""Memory that a collective may still write to, of communicators that did not come about; a few bytes each."""

_ABORT_SECONDS = 10.0


class Communicator:
    """What the ranks of a host that share storages gather them through.

    Attributes:
        device: where the storages are.
        ranks: who takes part, by their global numbers, in ascending order.
    """

    def __init__(self, backend: Any, device: Device, ranks: Ranks) -> None:
        self._backend = backend
        self.device = device
        self.ranks = ranks

    @classmethod
    def connect(
        cls,
        group: dist.ProcessGroup,
        device: Device,
        ranks: Ranks,
        rank: int,
        name: str,
        ballot: Ballot,
        seconds: float,
    ) -> Communicator:
        """Make one with all of its ranks, and try it out; collective over them, and synchronises with the device.

        Args:
            group: the ranks that move together; they find each other in its store.
            device: where the storages are.
            ranks: who takes part.
            rank: this one.
            name: what no other communicator in that store is called.
            ballot: of the move; looked at for others that have given up.
            seconds: how long others are waited for.

        Raises:
            PeerError: another rank did not come, or gave up.
        """
        enter = device.as_here()
        index, size = ranks.index(rank), len(ranks)

        def make(store: Any) -> Communicator:
            with enter(), torch.no_grad():
                made = cls(device.communicator(_C10D.PrefixStore(name, store), index, size, seconds), device, ranks)
                # NCCL connects at the first collective. Whether it can is to be known before anything depends on it.
                trial = torch.full((size,), size, dtype=torch.uint8, device=device.torch_device)
                trial[index] = index
                _TRIALS[id(trial)] = trial
                works: list[Work] = []
                made.all_gather(trial, trial[index : index + 1], works)
                _Gather(made, works[0], ballot, seconds).wait()
                del _TRIALS[id(trial)]
                if trial.tolist() != list(range(size)):
                    raise RuntimeError(f"a trial gave {trial.tolist()}")
                return made

        try:
            return StoreLine(store_of(group)).ask(make, 2 * seconds)  # in a thread: connecting may hang
        except MegastowError:
            raise
        except Exception as error:
            raise PeerError(f"{_names(ranks)} could not connect: {error}", ranks=()) from error

    def all_gather(self, whole: torch.Tensor, own: torch.Tensor, works: list[Work]) -> None:
        """Queue one, behind what is queued on the current stream.

        Args:
            whole: uint8 of shape [N * n], contiguous: what all N ranks have, in their order.
            own: uint8 of shape [n]: this rank's part; may lie at its place in `whole`.
            works: gets the one that is queued. Both happen in one call of C code, so that no signal's handler comes
                between, and what the other ranks know of is known here, too.

        Raises:
            PeerError: it was closed.
        """
        if self._backend is None:
            raise PeerError(f"the connection of {_names(self.ranks)} was given up", ranks=())
        works.extend(map(self._backend._allgather_base, (whole,), (own,)))

    def close(self, *, wait: bool = False) -> None:
        """Abort what is under way, in a thread. Closing twice is fine.

        Args:
            wait: give it some seconds; where nothing is under way, and the interpreter may be about to end.
        """
        backend, self._backend = self._backend, None
        if backend is not None:
            thread = threading.Thread(target=_abort, args=(backend,), name="megastow-abort", daemon=True)
            thread.start()
            thread.join(_ABORT_SECONDS if wait else 0.0)

    @property
    def is_closed(self) -> bool:
        """Whether it was given up."""
        return self._backend is None


def _abort(backend: Any) -> None:
    threads.enter()
    abort = getattr(backend, "abort", None) or getattr(backend, "_shutdown", None)  # the older name; gloo had neither
    if abort is not None:
        try:
            abort()
        except Exception as error:
            logger.debug("a communicator could not be aborted: %s", error)


class _Gather:
    """An all-gather under way, that is waited for no longer than the other ranks are with it."""

    def __init__(self, communicator: Communicator, work: Work, ballot: Ballot, seconds: float) -> None:
        self.communicator = communicator
        self._work = work
        self._ballot = ballot
        self._seconds = seconds

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            PeerError: a rank gave up, or did not come; the communicator is closed.
        """
        try:
            start = looked = time.monotonic()
            while not self._work.is_completed():
                now = time.monotonic()
                if self.communicator.is_closed:
                    raise PeerError(f"the connection of {_names(self.communicator.ranks)} was given up", ranks=())
                if now - looked > _LOOK_SECONDS:
                    self._ballot.look()
                    looked = now
                if now - start > self._seconds:
                    raise PeerError(
                        f"an all-gather over {_names(self.communicator.ranks)} was not done within "
                        f"{self._seconds:g} s: one of them is gone, or stuck",
                        ranks=(),
                    )
                time.sleep(_POLL_SECONDS)
            self.communicator.device.check(self._work)
        except BaseException:
            self.communicator.close()
            raise

    def end(self) -> None:
        """Return when it writes no more, however it ended. See [Note: what cannot be bounded]."""
        while not self._work.is_completed():
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Step:
    """One all-gather of a move."""

    communicator: Communicator
    storage: torch.UntypedStorage
    piece: Piece


class _Chunk(NamedTuple):
    """This rank's part of an all-gather; see `Gathering.follow`."""

    moment: Arrival
    reading: Sequence[Future[None]]


class Gathering:
    """The all-gathers of one move, in the order in which all of their ranks make them.

    See [Note: the same all-gathers on all ranks].
    """

    def __init__(self, ballot: Ballot, seconds: float) -> None:
        """List none yet.

        Args:
            ballot: of the move.
            seconds: how long other ranks are waited for in each.
        """
        self._steps: Sequence[Step] = ()
        self._ballot = ballot
        self._seconds = seconds
        self._chunks: dict[tuple[int, int], _Chunk] = {}  # by identity of the storage, and where the piece begins
        self._works: list[Work] = []  # of each step that was begun
        self._num_done = 0

    def follow(
        self, storage: torch.UntypedStorage, piece: Piece, moment: Arrival, reading: Sequence[Future[None]]
    ) -> None:
        """Note when this rank's chunk of a piece will be there.

        Args:
            storage: into which it is copied.
            piece: which part of it.
            moment: when the chunk has arrived, unless threads take part.
            reading: what threads have to do before it has arrived; their errors are raised by `advance`.
        """
        self._chunks[storage_id(storage), piece.start] = _Chunk(moment, reading)

    def begin(self, steps: Iterable[Step]) -> None:
        """From here on all of these are made, by `advance` or by `settle`."""
        self._steps = tuple(steps)

    def advance(self, storage: torch.UntypedStorage, share: Share) -> None:
        """Queue the next all-gathers, which are those of a storage, each behind the chunk that `follow` was told of.

        Call it within `device.copying()`. Waits for threads that read; not for other ranks.

        Raises:
            PeerError: the connection was given up.
        """
        for piece in share.pieces():
            step = self._next
            if storage_id(step.storage) != storage_id(storage) or step.piece != piece:
                raise RuntimeError(f"the next all-gather is of {step.piece} of another storage, and not of {piece}")
            chunk = self._chunks[storage_id(storage), piece.start]
            for future in chunk.reading:
                future.result()
            self._begin(None if chunk.reading else chunk.moment)

    def confirm(self) -> None:
        """Wait until all are done; errors surface here."""
        self._wait(len(self._steps))

    def arrival(self) -> Arrival:
        """The moment when all that were queued until now are done; waiting for it ends when the ranks give up."""
        return _Gathered(functools.partial(self._wait, len(self._works)))

    def settle(self) -> None:
        """Make what was not made yet, and wait until nothing is under way; of a move that has failed here.

        Gives up if another rank does. Interrupted, it gives up at once, and asked again it waits for the end.
        """
        failed: Exception | None = None
        try:
            while len(self._works) < len(self._steps):
                communicator = self._next.communicator
                if communicator.is_closed:
                    self._works.append(_NEVER_BEGUN)
                    continue
                try:
                    with communicator.device.copying(Direction.IN):
                        self._begin()
                except Exception as error:  # it is of no use any more; what it has begun is waited for
                    failed = failed or error
                    communicator.close()
            for number in range(self._num_done, len(self._steps)):
                gather = self._under_way(number)
                try:
                    gather.wait()
                except Exception as error:
                    failed = failed or error
                gather.end()
                self._num_done += 1
        except BaseException:
            for step in self._steps[self._num_done :]:
                step.communicator.close()
            raise
        if failed is not None:
            logger.warning("shared state could not be gathered to the end: %s", failed)

    @property
    def _next(self) -> Step:
        """The first that was not begun."""
        return self._steps[len(self._works)]

    def _begin(self, moment: Arrival | None = None) -> None:
        step, piece = self._next, self._next.piece
        whole = byte_view(step.storage)[piece.start : piece.start + piece.nbytes]
        own = whole[piece.own_start - piece.start :][: piece.chunk_bytes]
        with step.communicator.device.gathering(moment):
            step.communicator.all_gather(whole, own, self._works)
            step.communicator.device.follow(self._works[-1])

    def _under_way(self, number: int) -> _Gather:
        return _Gather(self._steps[number].communicator, self._works[number], self._ballot, self._seconds)

    def _wait(self, number: int) -> None:
        """Return when the first `number` of them are done."""
        while self._num_done < number:
            self._under_way(self._num_done).wait()
            self._num_done += 1


class _NeverBegun:
    """In the place of an all-gather that was not made, because the communicator was closed before."""

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True


_NEVER_BEGUN = _NeverBegun()

NOTHING_TO_GATHER = Gathering(ALONE, 0.0)
"""Of a move in which nothing is shared."""


class _Gathered(Arrival):
    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def wait(self) -> None:
        self._wait()


def _names(ranks: Ranks) -> str:
    return f"ranks {', '.join(map(str, ranks))}"
