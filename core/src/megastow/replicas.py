"""Which storages the ranks of this host share, so that each keeps only a part of them in host memory.

[Note: when ranks share a storage]
An adapter says over which ranks a tensor is the same as a rule. That is a hint, and nothing depends on it: in every
offload, digests of such storages are computed beside the copies and told to the other ranks of the host, before
anything of it is released. What then has the same size and digest on all of them, in the same place of their lists, is
shared; of anything else each rank keeps the whole, as without replicas. Ranks do differ now and then, between a step
and the gather of its parameters, for instance.

Copies do not wait for that: each rank copies its share at first, and all of it where the digests turn out to differ.
What has differed is copied as a whole at once in the next offload, and shared again in the one after that if it was the
same.

What is shared is released when all ranks have confirmed the move (`agreement.py`), never before; so no offload has to
be undone for which the help of the others would be needed. An onload begins with a comparison of what the ranks have
away.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from megastow.agreement import Ballot
from megastow.device import Device
from megastow.errors import StateChangedError
from megastow.gather import NOTHING_TO_GATHER, Communicator, Gathering, Step
from megastow.shares import UNIT_BYTES, Share
from megastow.state import Ranks, StateKind
from megastow.storages import StorageRecord


class Shared(Protocol):
    """A storage that ranks share, or may share, as the engine knows it."""

    storage: torch.UntypedStorage
    nbytes: int
    kind: StateKind
    names: tuple[str, ...]
    released: bool

    @property
    def peers(self) -> Ranks: ...
    @property
    def share(self) -> Share | None: ...
    @property
    def digest_value(self) -> int | None: ...


S = TypeVar("S", bound=Shared)


class Replicas:
    """What a manager shares with others; this one is of a manager that shares nothing."""

    def assign(self, records: Iterable[StorageRecord]) -> None:
        """Say of each storage with whom it may be shared, and what this rank is to keep of it then."""

    def compare(self, entries: Sequence[S], ballot: Ballot) -> list[S]:
        """Tell the other ranks what is about to be released, and find what cannot be shared after all.

        Args:
            entries: all that may be shared of the kinds of this call, what is away already included, in the order in
                which all ranks list them; with digests.
            ballot: of the move.

        Returns:
            Those of which this rank has copied its share only, and has to keep the whole.

        Raises:
            StateChangedError: some of it is away already, and the others have something else.
            PeerError: another rank failed or did not come in time.
        """
        return []

    def gathering(self, ballot: Ballot) -> Gathering:
        """All-gathers of a move, none of which is listed yet; see `meet`."""
        return NOTHING_TO_GATHER

    def meet(self, entries: Sequence[Shared], gathering: Gathering, ballot: Ballot) -> None:
        """Tell the other ranks what is about to come back, and list the all-gathers for it: all are made from here on.

        Args:
            entries: all that is shared of what comes back, with device memory, in the order in which all ranks list it.
            gathering: of the move; knows of what is on its way to that memory.
            ballot: of the move.

        Raises:
            StateChangedError: the others have something else away.
            PeerError: another rank failed or did not come in time.
        """

    def close(self) -> None:
        """Let go of what connects the ranks."""


NO_REPLICAS = Replicas()


@dataclass(frozen=True)
class Circle:
    """The ranks among which those of one host may share.

    Attributes:
        group: the ranks that move together.
        hosts: the host of each of them, by its global number.
        seconds: how long they wait for each other.
        name: what no other manager of the group is called, and this one on all ranks.
    """

    group: dist.ProcessGroup
    hosts: Mapping[int, str]
    seconds: float
    name: str


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others of one storage."""

    kind: str
    nbytes: int
    digest: int | None
    is_share: bool


@dataclass
class _Link:
    """How this rank is connected with some others of its host.

    Attributes:
        number: how many connections with them were given up before, on the rank that has given up most.
        communicator: the connection; None until the first is needed.
    """

    number: int = 0
    communicator: Communicator | None = None

    def renew(self, number: int) -> None:
        """Give the connection up if a later one is to be made."""
        if self.number < number:
            if self.communicator is not None:
                self.communicator.close()
            self.number, self.communicator = number, None


class HostReplicas(Replicas):
    """What a manager shares with the ranks of its group that are on the same host.

    Args:
        device: where the storages are.
        circle: the ranks.
        chunk_bytes: the most that a copy carries; the same on all of them.
    """

    def __init__(self, device: Device, circle: Circle, chunk_bytes: int) -> None:
        self._device = device
        self._group = circle.group
        self._rank = dist.get_rank()
        self._local = {rank for rank, host in circle.hosts.items() if host == circle.hosts[self._rank]}
        self._chunk_bytes = max(UNIT_BYTES, chunk_bytes // UNIT_BYTES * UNIT_BYTES)
        self._seconds = circle.seconds
        self._name = circle.name
        self._differed: set[tuple[StateKind, str]] = set()
        self._links: dict[Ranks, _Link] = {}

    def assign(self, records: Iterable[StorageRecord]) -> None:
        for record in records:
            peers = tuple(sorted(self._local.intersection(record.replicas)))
            if len(peers) > 1 and self._rank in peers and record.keep and not record.transient:
                record.peers = peers
                if (record.kind, record.names[0]) not in self._differed:
                    record.share = Share(peers, self._rank, record.nbytes, self._chunk_bytes)

    def compare(self, entries: Sequence[S], ballot: Ballot) -> list[S]:
        mine_of = by_peers(entries)
        told = self._exchange(mine_of, ballot)
        whole: list[S] = []
        for peers, mine in sorted(mine_of.items()):  # as each rank takes the groups that it is in
            rows = _rows_by_kind(mine, [told[rank].get(peers, ()) for rank in peers])
            for entry, row in zip(mine, rows, strict=True):
                key = (entry.kind, entry.names[0])
                (self._differed.discard if _is_same(row) else self._differed.add)(key)
            shares = [(entry, _is_shared(row)) for entry, row in zip(mine, rows, strict=True) if entry.share]
            left = [entry for entry, is_shared in shares if not is_shared]
            away = [entry for entry in left if entry.released]
            if away:
                raise StateChangedError(
                    f"{away[0].names[0]} ({away[0].kind}) is offloaded in parts by ranks {_list(peers)}, and what one "
                    "of them has on the device now is something else. Nothing was moved. Onload on all ranks first; if "
                    "that fails too, load a checkpoint"
                )
            whole.extend(left)
            if len(left) < len(shares):
                self._connect(peers, ballot)
        return whole

    def gathering(self, ballot: Ballot) -> Gathering:
        return Gathering(ballot, self._seconds)

    def meet(self, entries: Sequence[Shared], gathering: Gathering, ballot: Ballot) -> None:
        mine_of = by_peers(entries)
        told = self._exchange(mine_of, ballot)
        for peers, mine in mine_of.items():
            if not all(map(_is_shared, _rows(mine, [told[rank].get(peers, ()) for rank in peers]))):
                raise StateChangedError(
                    f"ranks {_list(peers)} do not have the same state away, of which each keeps a part. Nothing was "
                    "moved. Make the call that offloaded it again on all ranks, and then this one"
                )
        communicators = {peers: self._connect(peers, ballot) for peers in sorted(mine_of)}
        steps = (
            Step(communicators[entry.peers], entry.storage, piece)
            for entry in entries
            if entry.share is not None
            for piece in entry.share.pieces()
        )
        gathering.begin(steps)

    def close(self) -> None:
        for link in self._links.values():
            if link.communicator is not None:
                link.communicator.close(wait=True)
        self._links.clear()

    # --- with the other ranks ----------------------------------------------------------------------------------------

    def _exchange(
        self, mine_of: Mapping[Ranks, Sequence[Shared]], ballot: Ballot
    ) -> dict[int, dict[Ranks, list[_Told]]]:
        """What each rank of this host tells, by who is to share it; and a number for each connection to be made."""
        for link in self._links.values():
            if link.communicator is not None and link.communicator.is_closed:
                link.renew(link.number + 1)
        note = {
            "storages": [[peers, [_tell(entry) for entry in entries]] for peers, entries in mine_of.items()],
            "links": [[peers, link.number] for peers, link in self._links.items()],
        }
        notes = ballot.exchange(json.dumps(note), sorted(self._local))
        told: dict[int, dict[Ranks, list[_Told]]] = {}
        for rank, text in notes.items():
            found = json.loads(text) if text else {"storages": [], "links": []}
            told[rank] = {tuple(peers): [_Told(*each) for each in entries] for peers, entries in found["storages"]}
            for peers, number in found["links"]:
                if self._rank in peers:
                    self._links.setdefault(tuple(peers), _Link()).renew(number)
        return told

    def _connect(self, peers: Ranks, ballot: Ballot) -> Communicator:
        """What connects this rank with others; made if there is nothing, by all of them or by none."""
        link = self._links.setdefault(peers, _Link())
        if link.communicator is None:
            name = f"megastow/replicas/{self._name}/{'-'.join(map(str, peers))}/{link.number}"
            try:
                link.communicator = Communicator.connect(
                    self._group, self._device, peers, self._rank, name, ballot, self._seconds
                )
            except BaseException:
                link.number += 1  # the keys of this one are used up
                raise
        return link.communicator


def _tell(entry: Shared) -> tuple[str, int, int | None, bool]:
    return str(entry.kind), entry.nbytes, entry.digest_value, entry.share is not None


def by_peers(entries: Iterable[S]) -> dict[Ranks, list[S]]:
    """Storages by the ranks that share them, or may."""
    found: dict[Ranks, list[S]] = {}
    for entry in entries:
        found.setdefault(entry.peers, []).append(entry)
    return found


def _rows(mine: Sequence[Shared], lists: Sequence[Sequence[_Told]]) -> list[tuple[_Told, ...]]:
    """What all ranks tell of each storage; nothing, if they do not list as many."""
    return list(zip(*lists, strict=True)) if len({len(told) for told in lists}) == 1 else [()] * len(mine)


def _rows_by_kind(mine: Sequence[Shared], lists: Sequence[Sequence[_Told]]) -> list[tuple[_Told, ...]]:
    """As `_rows`, kind by kind: that ranks do not list as many of one says nothing of the others."""
    found: list[tuple[_Told, ...]] = []
    for kind in dict.fromkeys(entry.kind for entry in mine):
        found += _rows(
            [entry for entry in mine if entry.kind is kind],
            [[each for each in told if each.kind == str(kind)] for told in lists],
        )
    return found


def _is_same(row: Sequence[_Told]) -> bool:
    """Whether ranks have told the same of a storage: as many bytes, and the same ones."""
    return len({(each.kind, each.nbytes, each.digest) for each in row}) == 1 and row[0].digest is not None


def _is_shared(row: Sequence[_Told]) -> bool:
    """Whether each rank can keep its part only."""
    return _is_same(row) and all(each.is_share for each in row)


def _list(ranks: Ranks) -> str:
    return ", ".join(map(str, ranks))
