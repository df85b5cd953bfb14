"""What is left on the device, and whose it is: tensors by owner, allocator segments held open, and what nobody shows.

[Note: what counts as residue]
What torch's allocator has handed out, except to the state of kinds that are on the device (they are meant to be), and
what it cannot give back because such memory holds a segment open. Where there is no allocator that counts (on the CPU),
the storages of all tensors that Python knows, those with memory that torch did not allocate left out (the host memory
of managers, NumPy's, mapped files). Other tenants of the process count, and are named like everything else.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import gc
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from megastow.device import Block, Device, Segment
from megastow.forking import process_lock
from megastow.referrers import MOST_SECONDS, UNSEEN, Owner, OwnerSearch, class_name
from megastow.report import MemoryFigures, format_bytes
from megastow.state import StateKind
from megastow.storages import storage_id

DEFAULT_RESIDUE_BYTES = 64 << 20
"""What may stay after a strict offload, unless somebody says otherwise: a cuBLAS workspace and a few scalars."""

DEFAULT_STORAGES = 64
"""How many storages owners are looked for, the largest ones."""


# --- what is told ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftTensor:
    """A tensor that stays, without the tensor.

    Attributes:
        type: The name of its class; a storage that somebody keeps as such is one of uint8.
        dtype: Its dtype, without `torch.`.
        shape: Its shape.
        owners: Who holds it, the first few; empty if nobody looked, or not for long enough.
    """

    type: str
    dtype: str
    shape: tuple[int, ...]
    owners: tuple[Owner, ...] = ()

    def __str__(self) -> str:
        return f"{self.type} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class LeftStorage:
    """A storage that stays.

    Attributes:
        nbytes: Its device memory, as it asked for it.
        tensors: Those that Python knows of.
        workspace: Which workspace it belongs to, of those that the adapter names.
        is_garbage: Whether only reference cycles held it that nobody could reach any more.
    """

    nbytes: int
    tensors: tuple[LeftTensor, ...]
    workspace: str | None = None
    is_garbage: bool = False

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Who holds any of the tensors; what nothing in Python holds is only told if that is all."""
        found = tuple(dict.fromkeys(owner for tensor in self.tensors for owner in tensor.owners))
        return tuple(owner for owner in found if owner != UNSEEN) or found

    def __str__(self) -> str:
        views = f" and {len(self.tensors) - 1} more on it" if len(self.tensors) > 1 else ""
        holders = self.workspace or "; ".join(map(str, self.owners)) or "owners not looked for"
        return f"{self.tensors[0]}{views}: {holders}"


@dataclass(frozen=True)
class OpenSegment:
    """A segment of torch's allocator that residue lies in; of an expandable one, the pages that it lies in.

    Attributes:
        nbytes: What the driver has given for it, or for them.
        idle_bytes: What of it nobody uses, and the driver gets back only if the rest goes; nothing of a segment, or a
            page, in which state of a kind lies that is on the device.
        is_private: Whether it belongs to the pool of a CUDA graph, or to another pool of its own.
        held_by: The residue in it.
    """

    nbytes: int
    idle_bytes: int
    is_private: bool
    held_by: tuple[str, ...]


@dataclass(frozen=True)
class Residue:
    """What is left on the device, as text and numbers: holding it holds no tensor.

    Attributes:
        resident: The kinds that are on the device, and their bytes. They are meant to be there.
        storages: Everything else that Python knows of, the largest first.
        garbage: What only reference cycles held, until the question was asked: that collects it.
        unseen: Sizes of the blocks that the allocator has handed out and that no tensor of Python lies in: cuBLAS
            workspaces, what autograd has saved, extensions. Empty where no allocator counts.
        segments: Those of the allocator's segments that residue lies in.
        figures: Memory in use, by allocator and driver.
        moments: The same at earlier moments, by what was then.
        notes: What a reader should know.
    """

    resident: Mapping[StateKind, int]
    storages: tuple[LeftStorage, ...]
    garbage: tuple[LeftStorage, ...]
    unseen: tuple[int, ...]
    segments: tuple[OpenSegment, ...]
    figures: MemoryFigures
    moments: Mapping[str, MemoryFigures] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def storage_bytes(self) -> int:
        """Bytes of the storages that Python knows of."""
        return sum(storage.nbytes for storage in self.storages)

    @property
    def unseen_bytes(self) -> int:
        """Bytes that the allocator has handed out beside those."""
        return sum(self.unseen)

    @property
    def idle_bytes(self) -> int:
        """Bytes that nobody uses, in segments that residue holds open."""
        return sum(segment.idle_bytes for segment in self.segments)

    @property
    def residue_bytes(self) -> int:
        """All that stays and is not a kind on the device; what a strict offload is held against."""
        return self.storage_bytes + self.unseen_bytes + self.idle_bytes

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types that `json` takes."""
        return {
            "residue_bytes": self.residue_bytes,
            "storage_bytes": self.storage_bytes,
            "unseen_bytes": self.unseen_bytes,
            "idle_bytes": self.idle_bytes,
            "resident": {str(kind): nbytes for kind, nbytes in self.resident.items()},
            "storages": [dataclasses.asdict(storage) for storage in self.storages],
            "garbage": [dataclasses.asdict(storage) for storage in self.garbage],
            "unseen": list(self.unseen),
            "segments": [dataclasses.asdict(segment) for segment in self.segments],
            "figures": dataclasses.asdict(self.figures),
            "beside_the_allocator": beside_the_allocator(self.figures, self.moments),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        here = ", ".join(f"{kind} {format_bytes(nbytes)}" for kind, nbytes in self.resident.items())
        beside = f", beside what is meant to: {here}" if here else ""
        yield f"{format_bytes(self.residue_bytes)} stay on the device{beside}"
        yield from _table(self.storages)
        if self.unseen:
            yield f"{format_bytes(self.unseen_bytes):>10}  in {len(self.unseen)} blocks without a tensor of Python"
        if self.idle_bytes:
            yield f"{format_bytes(self.idle_bytes):>10}  unused, in segments that the above holds open"
        if self.garbage:
            yield f"garbage in reference cycles, collected now: {format_bytes(sum(s.nbytes for s in self.garbage))}"
            yield from _table(self.garbage)
        parts = beside_the_allocator(self.figures, self.moments)
        if parts:
            yield "beside torch's allocator: " + ", ".join(f"{n} {format_bytes(b)}" for n, b in parts.items())
        yield from self.notes


def _table(storages: Sequence[LeftStorage]) -> Iterator[str]:
    """A line for each of the first storages, and one for the others."""
    for storage in storages[:_MOST_LINES]:
        yield f"{format_bytes(storage.nbytes):>10}  {storage}"
    rest = storages[_MOST_LINES:]
    if rest:
        yield f"{format_bytes(sum(s.nbytes for s in rest)):>10}  in {len(rest)} more storages"


_MOST_LINES = 20


def beside_the_allocator(now: MemoryFigures, moments: Mapping[str, MemoryFigures]) -> dict[str, int]:
    """The driver's figure without what torch's allocator holds, in parts: what each moment added, and what came since.

    That is CUDA's context, NCCL's communicators and loaded kernels, and other processes on the device: which of them
    can only be told by when they came. Empty where no allocator counts.

    Args:
        now: Memory in use.
        moments: The same at earlier moments, in their order, by what had come by then.
    """
    parts: dict[str, int] = {}
    before = 0
    for name, figures in {**moments, "since": now}.items():
        if figures.reserved_bytes is not None:
            parts[name] = figures.driver_bytes - figures.reserved_bytes - before
            before += parts[name]
    return parts


# --- how it is found -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Home:
    """Where a storage is."""

    address: int
    nbytes: int

    @classmethod
    def of(cls, storage: torch.UntypedStorage) -> Home:
        """Where it is now; holds nothing of it."""
        return cls(storage.data_ptr(), storage.nbytes())


@dataclass(frozen=True)
class Subject:
    """What is asked about. Storages are given by identity, so that none is held.

    Attributes:
        device: The device.
        resident: Storages of kinds that are on the device and may stay.
        leaving: Storages that are about to be released.
        workspaces: Storages of workspaces, and what they are.
    """

    device: Device
    resident: Mapping[int, tuple[StateKind, Home]]
    leaving: Mapping[int, Home] = field(default_factory=dict)
    workspaces: Mapping[int, str] = field(default_factory=dict)

    def known(self) -> dict[int, Home]:
        """The storages that are no residue, whether or not Python's collector shows who is on them."""
        return {**{key: home for key, (_, home) in self.resident.items()}, **self.leaving}

    def is_left(self, key: int) -> bool:
        """Whether a storage is residue."""
        return key not in self.resident and key not in self.leaving


def measure(subject: Subject) -> int:
    """`residue_bytes` as it is now, without asking whose it is; garbage in reference cycles counts.

    One pass over the objects of the process (0.1 s for a million) and one over the allocator's blocks; does not
    synchronise.
    """
    with _alone():
        homes = _scan(subject).homes
    tally = _tally(subject, homes, {})
    left = sum(home.nbytes for key, home in homes.items() if subject.is_left(key))
    return left + sum(tally.unseen) + sum(segment.idle_bytes for segment in tally.segments)


def explain(
    subject: Subject, moments: Mapping[str, MemoryFigures], *, most_storages: int = DEFAULT_STORAGES
) -> Residue:
    """Whose it is. Collects garbage, which runs finalizers; does not synchronise, and keeps nothing alive.

    Takes a few garbage collections, and one pass over the objects of the process for each hop up to an owner: seconds,
    if it is large. See `referrers.MOST_SECONDS` for the limit.
    """
    with _alone():
        suspects = _garbage(subject, most_storages)
        gc.collect()  # nothing of ours holds the garbage any more
        scan = _scan(subject)
        homes, left = scan.homes, _describe(subject, scan, scan.homes, most_storages)
        del scan
    tally = _tally(subject, homes, left)
    resident: Counter[StateKind] = Counter()
    for kind, home in subject.resident.values():
        resident[kind] += home.nbytes
    return Residue(
        resident={kind: resident[kind] for kind in StateKind if kind in resident},
        storages=tuple(left.values()),
        garbage=tuple(_as_garbage(storage) for key, storage in suspects.items() if key not in homes),
        unseen=tally.unseen,
        segments=tally.segments,
        figures=subject.device.memory(),
        moments=moments,
        notes=tuple(_notes(subject.device, tally)),
    )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One search at a time in the process: what one holds would be residue to another, and owned by megastow.

    Not for ever: a collection runs finalizers, and one of them may wait for whoever waits here.
    """
    is_held = _LOOKING.acquire(timeout=2 * MOST_SECONDS)
    try:
        yield
    finally:
        if is_held:
            _LOOKING.release()


_LOOKING = process_lock()


@dataclass
class _Scan:
    """What was found on the device. Tensors are held by one dictionary only; all else are identities.

    Attributes:
        things: Tensors, and storages that Python has objects of, by identity.
        homes: Storages on the device, by identity.
        on: Which of `things` are on a storage; tensors first.
        links: What C++ holds for a tensor; see `OwnerSearch`.
    """

    things: dict[int, Any] = field(default_factory=dict)
    homes: dict[int, Home] = field(default_factory=dict)
    on: dict[int, list[int]] = field(default_factory=dict)
    links: dict[int, list[tuple[int, str]]] = field(default_factory=dict)


def _scan(subject: Subject) -> _Scan:
    """All tensors that Python has objects of, their gradients and bases, and storages that are kept as such."""
    device = subject.device
    scan = _Scan(homes=subject.known())
    things = _objects_of({id(cls) for cls in _with_subclasses(torch.Tensor, torch.UntypedStorage)})
    with torch._C.DisableTorchFunction():
        storages = [thing for thing in things if issubclass(type(thing), torch.UntypedStorage)]
        tensors = [thing for thing in things if not issubclass(type(thing), torch.UntypedStorage)]
        while tensors:
            tensor = tensors.pop()
            if id(tensor) not in scan.things:
                _take(scan, device, tensor, _storage_of(tensor))
                for label, held in _held_by_tensor(tensor):
                    scan.links.setdefault(id(held), []).append((id(tensor), label))
                    tensors.append(held)
        for storage in storages:
            _take(scan, device, storage, storage)
    return scan


def _objects_of(classes: Set[int]) -> list[Any]:
    """All objects of some classes, given by identity.

    Taken in one call of C code, after which nothing is left of the rest: while we had all of the heap in hand, no other
    thread could go on that builds a tuple item by item. Python raises `SystemError` there if somebody else holds it.
    """
    return list(_among_all_objects(classes))


def _among_all_objects(classes: Set[int]) -> Iterator[Any]:
    """Asks for them when the first is wanted; `tee` does not come before that, or it would be among what it keeps."""
    halves = itertools.chain.from_iterable(map(itertools.tee, map(gc.get_objects, (None,))))
    objects = itertools.chain.from_iterable(itertools.islice(halves, 1))
    kinds = itertools.chain.from_iterable(itertools.islice(halves, 1))
    return itertools.compress(objects, map(classes.__contains__, map(id, map(type, kinds))))


def _with_subclasses(*classes: type) -> Iterator[type]:
    for cls in classes:
        yield cls
        yield from _with_subclasses(*type.__subclasses__(cls))


def _take(scan: _Scan, device: Device, thing: Any, storage: torch.UntypedStorage | None) -> None:
    scan.things[id(thing)] = thing
    with contextlib.suppress(Exception):  # it is of a wrapper around other tensors, without memory, or of an odd class
        if storage is not None and device.is_home_of(storage) and storage.nbytes():
            scan.homes[storage_id(storage)] = Home.of(storage)
            scan.on.setdefault(storage_id(storage), []).append(id(thing))


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The storage of a tensor; None if it has none, being sparse."""
    try:
        return torch.Tensor.untyped_storage(tensor)
    except (RuntimeError, NotImplementedError):
        return None


def _held_by_tensor(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that another holds in C++: its gradient, and what it is a view of."""
    if _get("is_leaf", tensor) or _get("retains_grad", tensor):
        grad = _get("grad", tensor)
        if grad is not None:
            yield ".grad", grad
    base = _get("_base", tensor)
    if base is not None:
        yield "._base", base


def _get(name: str, tensor: torch.Tensor) -> Any:
    """An attribute of a tensor as torch has it, whatever a subclass says."""
    return vars(torch._C.TensorBase)[name].__get__(tensor)


def _describe(
    subject: Subject, scan: _Scan, among: Iterable[int], most_storages: int, hidden: Iterable[object] = ()
) -> dict[int, LeftStorage]:
    """What is residue among some storages, and whose it is, the largest first. Uses the scan up."""
    keys = sorted(filter(subject.is_left, among), key=lambda key: scan.homes[key].nbytes, reverse=True)
    tensors = {key: [(each, _described(scan.things[each])) for each in scan.on[key]] for key in keys}
    search = OwnerSearch(scan.things, scan.links, hidden)
    owners = search.find([each for key in keys[:most_storages] for each in scan.on[key][:_MOST_TENSORS]])
    return {
        key: LeftStorage(
            scan.homes[key].nbytes,
            _worth_telling([dataclasses.replace(t, owners=owners.get(each, ())) for each, t in tensors[key]]),
            subject.workspaces.get(key),
        )
        for key in keys
    }


def _garbage(subject: Subject, most_storages: int) -> dict[int, LeftStorage]:
    """What garbage holds, and what hangs in C++ on tensors that are garbage. It is gone after the next collection.

    Told apart from the rest because whatever else garbage refers to would seem to be held by it.
    """
    garbage = _collected()
    dead = {id(thing) for thing in garbage}
    scan = _scan(subject)
    dead |= {held for held, holders in scan.links.items() if dead.intersection(holder for holder, _ in holders)}
    among = [key for key, things in scan.on.items() if dead.intersection(things)]
    return _describe(subject, scan, among, most_storages, [garbage]) if among else {}


_MOST_TENSORS = 8
"""How many tensors of a storage owners are looked for."""


def _worth_telling(tensors: Sequence[LeftTensor]) -> tuple[LeftTensor, ...]:
    """All of them; the Python object of the storage itself only if somebody holds it, or if there is nothing else."""
    found = tuple(t for t in tensors if t.type != torch.UntypedStorage.__name__ or set(t.owners) - {UNSEEN})
    return found or tuple(tensors)


def _described(thing: Any) -> LeftTensor:
    name = class_name(type(thing))
    if not issubclass(type(thing), torch.Tensor):
        return LeftTensor(name, "uint8", (torch.UntypedStorage.nbytes(thing),))
    with torch._C.DisableTorchFunction():
        return LeftTensor(name, str(_get("dtype", thing)).removeprefix("torch."), _shape_of(thing))


def _shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    if torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):  # it may be its class that answers
        storage = _storage_of(tensor)
        return () if storage is None else (torch.UntypedStorage.nbytes(storage) // _get("itemsize", tensor),)
    try:
        return tuple(_get("shape", tensor))
    except RuntimeError:  # a nested tensor has none
        return (torch.Tensor.numel(tensor),)


def _collected() -> list[Any]:
    """Collect garbage, and return it instead of freeing it. Finalizers have run; dropped, it is garbage once more."""
    flags, known = gc.get_debug(), len(gc.garbage)
    try:
        try:
            gc.set_debug(flags | gc.DEBUG_SAVEALL)
            gc.collect()
        finally:
            gc.set_debug(flags)
    finally:
        found = gc.garbage[known:]
        del gc.garbage[known:]
    return found


def _as_garbage(storage: LeftStorage) -> LeftStorage:
    """A storage that went with the garbage; the ways to it led from garbage, too."""
    tensors = [
        dataclasses.replace(
            tensor,
            owners=tuple(dataclasses.replace(owner, kind="garbage", place=_IN_A_CYCLE) for owner in tensor.owners),
        )
        for tensor in storage.tensors
    ]
    return dataclasses.replace(storage, tensors=tuple(tensors), is_garbage=True)


_IN_A_CYCLE = "in a reference cycle that nothing reached"


# --- the allocator's side --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tally:
    """What the allocator adds to what Python knows; see `Residue`."""

    unseen: tuple[int, ...]
    segments: tuple[OpenSegment, ...]


def _tally(subject: Subject, homes: Mapping[int, Home], left: Mapping[int, LeftStorage]) -> _Tally:
    """Compare the allocator's blocks with the storages that lie in them.

    Args:
        subject: What is asked about.
        homes: All storages on the device.
        left: What is known of those that are residue.
    """
    segments = subject.device.segments()
    if segments is None:
        handed_out = subject.device.memory().allocated_bytes
        unseen = max(0, (handed_out or 0) - sum(home.nbytes for home in homes.values()))
        return _Tally((unseen,) if unseen else (), ())
    by_address = sorted((home.address, key) for key, home in homes.items())
    unseen_sizes: list[int] = []
    found: list[OpenSegment] = []
    for segment in segments:
        held_by: list[str] = []
        spans: list[Block] = []  # of residue
        held: set[int] = set()  # the pages that it lies in
        meant: set[int] = set()  # those of what is meant to be here
        for block in segment.blocks:
            start = bisect.bisect_left(by_address, (block.address, 0))
            end = bisect.bisect_left(by_address, (block.address + block.nbytes, 0))
            keys = [key for _, key in by_address[start:end]]
            if any(key in subject.resident for key in keys):
                meant.update(_pages(segment, block))
            lying = [key for key in keys if subject.is_left(key)]
            if not keys:
                unseen_sizes.append(block.nbytes)
                held_by.append(f"a block of {format_bytes(block.nbytes)} without a tensor of Python")
            if lying or not keys:
                held.update(_pages(segment, block))
            spans += [Block(homes[key].address, homes[key].nbytes) for key in lying] if keys else [block]
            held_by += [str(left[key]) for key in lying if key in left]
        if segment.is_private and not meant:
            held.add(0)  # the only one
        if held:
            left_open = held - meant
            idle = sum(_page_nbytes(segment, page) for page in left_open)
            idle -= sum(_nbytes_within(segment, span, left_open) for span in spans)
            nbytes = sum(_page_nbytes(segment, page) for page in held)
            found.append(OpenSegment(nbytes, max(0, idle), segment.is_private, tuple(held_by)))
    return _Tally(tuple(sorted(unseen_sizes, reverse=True)), tuple(found))


def _pages(segment: Segment, block: Block) -> range:
    """The pages of a segment that a part of it lies in, by number."""
    start = block.address - segment.address
    return range(start // segment.page_bytes, -(-(start + block.nbytes) // segment.page_bytes))


def _page_nbytes(segment: Segment, page: int) -> int:
    """The size of a page; the last one may be cut off."""
    return min(segment.page_bytes, segment.nbytes - page * segment.page_bytes)


def _nbytes_within(segment: Segment, span: Block, pages: Collection[int]) -> int:
    """How much of a part of a segment lies in some of its pages."""
    start = span.address - segment.address
    return sum(
        min(start + span.nbytes, (page + 1) * segment.page_bytes) - max(start, page * segment.page_bytes)
        for page in _pages(segment, span)
        if page in pages
    )


def _notes(device: Device, tally: _Tally) -> Iterator[str]:
    if device.memory().allocated_bytes is None:
        yield "there is no allocator to ask here: what only C++ holds does not show"
    if frozen := gc.get_freeze_count():
        yield f"{frozen} objects are frozen (gc.freeze): tensors among them, or held by them only, count as unseen"
    size = device.blas_workspace_bytes()
    if number := sum(1 for nbytes in tally.unseen if size and nbytes == size):
        yield (
            f"{number} of the unseen blocks have the size of a cuBLAS workspace ({format_bytes(size)}); "
            "offload(release_workspaces=True) drops these"
        )
