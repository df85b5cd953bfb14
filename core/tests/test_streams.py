"""What is queued behind what on a GPU, shown on a CPU: a double of CUDA's streams notes what each thing waits for.

The double keeps the rules of `CudaDevice`: things on a stream are done in order, and a stream waits for another up to a
moment. Whether NCCL and a driver keep them too, only a GPU can show.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from megastow import faults
from megastow.clock import KindClock
from megastow.device import Arrival, CpuDevice, Direction
from megastow.digest import Digester
from megastow.errors import PeerError
from megastow.gather import Gathering, Step
from megastow.parked import Parked
from megastow.refill import Refill
from megastow.replicas import Replicas
from megastow.shares import Share
from megastow.state import StateKind
from megastow.storages import storage_id
from megastow.tiers import Tier
from megastow.transport import HostSlice, Transport

W, M, S = StateKind.WEIGHTS, StateKind.MAIN_WEIGHTS, StateKind.OPTIMIZER_STATES
UNIT = 4096


class Moment(Arrival):
    def __init__(self, device, behind):
        self.device, self.behind = device, frozenset(behind)

    def wait(self):
        stuck = self.behind & self.device.stuck
        assert not stuck, f"waits without a limit for {stuck}"


class StreamsDevice(CpuDevice):
    """Things are done at once, as on a CPU, and what they would wait for on a GPU is in `behind`."""

    queues_collectives = True

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.names = {}  # of storages
        self.streams = {name: set() for name in ("caller", *Direction, "beside", "gathering", "filling", "nccl")}
        self.current = "caller"
        self.behind = {}
        self.stuck = set()

    def queue(self, what):
        """Something is done on the current stream."""
        self.behind[what] = frozenset(self.streams[self.current])
        self.streams[self.current].add(what)

    def queue_collective(self, what):
        """It is done on a stream of NCCL's, behind the current one; who comes later has to `follow` it."""
        self.streams["nccl"] |= self.streams[self.current]
        self.behind[what] = frozenset(self.streams["nccl"])
        self.streams["nccl"].add(what)

    @contextlib.contextmanager
    def _on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def copying(self, direction):
        for stream in (direction, "filling"):
            self.streams[stream] |= self.streams[self.current]
        with super().copying(direction), self._on(direction):
            yield

    def _behind(self, stream, after=None):
        self.streams[stream] |= self.streams[self.current] if after is None else after.behind
        return self._on(stream)

    def beside(self, after=None):
        return self._behind("beside", after)

    def gathering(self, after=None):
        return self._behind("gathering", after)

    @contextlib.contextmanager
    def filling(self):
        with self._on("filling"):
            yield
            self.queue(("zeros", len(self.behind)))
        self.streams[self.current] |= self.streams["filling"]

    def arrival(self):
        return Moment(self, self.streams[self.current])

    def follow(self, work):
        self.streams[self.current] |= {work.what, *self.behind[work.what]}

    def check(self, work):
        work.wait()


class Peers(Replicas):
    """This rank and another, whose all-gathers are done at once unless they are stuck."""

    is_closed = False
    ranks = (0, 1)

    def __init__(self, device):
        self.device = device

    def gathering(self, ballot):
        return Gathering(ballot, 0.2)

    def meet(self, entries, gathering, ballot):
        gathering.begin(Step(self, entry.storage, piece) for entry in entries for piece in entry.share.pieces())

    def all_gather(self, whole, own, works):
        what = ("gathered", self.device.names[storage_id(whole.untyped_storage())], whole.storage_offset())
        self.device.queue_collective(what)
        done = what[:2] not in self.device.stuck
        works.append(SimpleNamespace(what=what, is_completed=lambda: done or self.is_closed, wait=lambda *_: True))
        if not done:
            self.device.stuck.add(what)

    def close(self, **_):
        self.is_closed = True


class Region:
    tier = Tier.PINNED

    def __init__(self, nbytes):
        self.memory = torch.arange(nbytes).to(torch.uint8)

    def view(self, offset, nbytes):
        return self.memory[offset : offset + nbytes]

    def chunks(self, _offset, nbytes, most):
        return ((start, min(most, nbytes - start)) for start in range(0, nbytes, most))


class Rig:
    def __init__(self, monkeypatch, **plans):
        self.device = StreamsDevice()
        self.transport = Transport(self.device, UNIT)
        self.digester = Digester(self.device)
        self.refill = Refill(self.device, self.transport, self.digester, True, None, Peers(self.device))
        self.plans = {StateKind(kind): [self.parked(kind, *each) for each in plans[kind]] for kind in plans}
        point, begin = faults.point, Digester.begin_here

        def copied(name, *chunk):
            point(name, *chunk)
            if name.endswith(".copied"):
                self.device.queue(("copied", self.name_of(chunk[0].untyped_storage()), chunk[0].storage_offset()))

        def digested(digester, storage):
            self.device.queue(("digest", self.name_of(storage)))
            return begin(digester, storage)

        monkeypatch.setattr(faults, "point", copied)
        monkeypatch.setattr(Digester, "begin_here", digested)

    def parked(self, kind, name, nbytes, how=""):
        storage = torch.zeros(nbytes, dtype=torch.uint8).untyped_storage()
        share = Share((0, 1), 0, nbytes, UNIT) if how == "shared" else None
        kept = nbytes if share is None else share.kept_bytes
        host = None if how == "zeros" else HostSlice(Region(kept), 0, kept, share)
        parked = Parked(storage, nbytes, StateKind(kind), (name,), host, (0, 1) if share else ())
        if host is not None:
            parked.digest = self.digester.begin_here(storage)
        self.device.names[storage_id(storage)] = name
        storage.resize_(0)
        parked.released = True
        return parked

    def name_of(self, storage):
        return self.device.names[storage_id(storage)]

    def run(self, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Refill, "_compare", _reads_only)
            self.refill.run(self.plans, KindClock(), **options)
        return self.device.behind


def _reads_only(refill, digests):
    """Waits for digests as the real one does; what the other rank would have brought is not there to be compared."""
    refill._digester.read(came for _, _, came in digests)


def of(what, *names):
    return {each for each in what if each[0] in names}


def test_an_all_gather_waits_for_its_own_chunk_and_for_no_later_one(monkeypatch):
    shared = [("a", 4 * UNIT, "shared"), ("b", 4 * UNIT + 8, "shared")]
    behind = Rig(monkeypatch, weights=shared, main_weights=[("c", UNIT)]).run()
    gathered = sorted(of(behind, "gathered"))
    assert gathered == [("gathered", name, start) for name in "ab" for start in (0, 2 * UNIT)]
    chunks = [("copied", name, start) for _, name, start in gathered]
    for number, each in enumerate(gathered):
        assert of(behind[each], "copied") == set(chunks[: number + 1])
    assert all(not of(behind[chunk], "gathered", "digest") for chunk in of(behind, "copied"))


def test_a_digest_waits_for_all_of_its_storage(monkeypatch):
    rig = Rig(
        monkeypatch,
        weights=[("a", 4 * UNIT + 8, "shared"), ("small", 8, "shared"), ("own", 2 * UNIT)],
        optimizer_states=[("moments", 2 * UNIT, "shared"), ("rest", UNIT)],
    )
    behind = rig.run()
    rest = ("copied", "a", 4 * UNIT)  # what each rank keeps itself
    assert {("gathered", "a", 0), ("gathered", "a", 2 * UNIT), rest} <= behind[("digest", "a")]
    assert ("copied", "small", 0) in behind[("digest", "small")]
    assert {("copied", "own", 0), ("copied", "own", UNIT)} <= behind[("digest", "own")]
    for name in ("a", "small"):
        assert ("gathered", "moments", 0) not in behind[("digest", name)]
    for name in ("own", "rest"):
        assert not of(behind[("digest", name)], "gathered")


def test_zeros_are_written_beside_the_copies_and_waited_for(monkeypatch):
    rig = Rig(monkeypatch, weights=[("w", 2 * UNIT)], grad_buffers=[("g", UNIT, "zeros")], main_weights=[("m", UNIT)])
    behind = rig.run()
    (zeros,) = of(behind, "zeros")
    assert not of(behind[zeros], "copied")
    assert zeros in behind[("copied", "m", 0)]  # so that the moment when a kind is there covers them
    assert zeros not in behind[("copied", "w", UNIT)]


@pytest.mark.parametrize("shared", [True, False])
def test_a_stuck_rank_holds_up_only_what_needs_it(monkeypatch, shared):
    """And that no longer than ranks wait for each other."""
    weights = [("w", 2 * UNIT, "shared")] if shared else []
    rig = Rig(
        monkeypatch,
        weights=[*weights, ("own", UNIT)],
        main_weights=[("m", UNIT)],
        optimizer_states=[("moments", 2 * UNIT, "shared")],
    )
    rig.device.stuck.add(("gathered", "moments"))
    arrived = []
    with pytest.raises(PeerError, match="was not done within"):
        rig.run(arrived=arrived.append)
    assert arrived == [W, M]
    assert [p.storage.nbytes() for p in rig.plans[S]] == [0]


def test_a_copy_out_does_not_wait_for_its_digest(monkeypatch):
    rig = Rig(monkeypatch, weights=[("w", UNIT)])
    rig.run()
    (parked,) = rig.plans[W]
    rig.device.behind.clear()
    rig.device.names[storage_id(parked.host.bytes().untyped_storage())] = "host"
    with rig.device.copying(Direction.OUT):
        before = rig.device.arrival()
        rig.transport.copy_out(parked.storage, parked.host)
        digest = rig.digester.begin(parked.storage, before)
    assert not of(rig.device.behind[("copied", "host", 0)], "digest")
    assert ("copied", "host", 0) not in rig.device.behind[("digest", "w")]
    assert ("digest", "w") in digest.computed.behind
