"""Weights that are not kept, because they are a cast of main weights: proved on the way out, rebuilt on the way back.

[Note: what is proved]
An adapter says how a flat parameter buffer would be rebuilt: which main weight is cast to which place, and which group
gathers which bucket. That is a claim, and nothing is released on its word. On each offload this rank's shards are
rebuilt in a small window, zeros where there is no main weight, and compared bit by bit with what is there; and ranks
that gather a buffer together tell each other its digest. A buffer is derived if every one of them found its own shards
to be equal and all have the same digest. So padding, parameters without a main weight, NaN payloads that a cast does
not keep, and replicas that have drifted apart need no rule: where they would not come back, the proof fails, on all
ranks, and the buffer is kept as ever.

[Note: what is rebuilt]
Exactly what was proved, by the same function, written into the storage itself, and then one all-gather for each bucket
over Megatron's own group. A rank that has its weights, because it kept them while others could not know, gathers too.
Megatron's copy (`_copy_main_params_to_model_params`) casts in the same way, but always into all buffers, those among
them that were kept because they are no cast; and its gather sets marks that overlapped communication relies on. The
digest of the offload decides at the end whether the weights are what they were.

A collective is only begun when all ranks of the manager's group have heard that every rank which any of the collectives
needs is about to begin it, and nothing that could fail comes in between.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from megastow import faults
from megastow.agreement import Answers, Ballot
from megastow.device import Device
from megastow.digest import Digest, Digester, digest
from megastow.errors import InvalidArgumentError, OffloadedError, StateChangedError, TransferError
from megastow.report import format_bytes
from megastow.state import StateKind
from megastow.storages import StorageRecord, byte_view, storage_id

WINDOW_BYTES = 16 << 20
"""Device memory that a proof takes meanwhile, beside the scratch memory of a digest."""

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Dtypes of weights that can be derived, and integers of their size, to compare bits."""


@dataclass(frozen=True)
class Bucket:
    """A part of a flat buffer that ranks gather together, each an equal shard of it.

    Attributes:
        start: its first element in the buffer.
        end: one past its last.
        group: who gathers it, as Megatron does; None where one rank has all of it.
    """

    start: int
    end: int
    group: dist.ProcessGroup | None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks that have a shard of it; empty where it is this one alone."""
        return () if self.group is None else tuple(dist.get_process_group_ranks(self.group))

    @property
    def shard(self) -> tuple[int, int]:
        """This rank's elements of the buffer: the first, and one past the last."""
        if self.group is None:
            return self.start, self.end
        length = (self.end - self.start) // self.group.size()
        start = self.start + length * self.group.rank()
        return start, start + length


@dataclass(frozen=True)
class DerivableBuffer:
    """How an adapter believes that a flat buffer of weights can be rebuilt. Nothing is released on its word.

    Attributes:
        name: what it is called; the same on all ranks that gather it together, and another for each buffer of a rank.
        flat: the whole buffer, bf16 or fp16 of shape [numel].
        buckets: its buckets, which cover it.
        main: first element of a main weight's place in `flat`, and the main weight, contiguous, of any shape, whose
            elements in order are cast into it; those of this rank's shards, in the order of their places.
    """

    name: str
    flat: torch.Tensor
    buckets: Sequence[Bucket]
    main: Sequence[tuple[int, torch.Tensor]]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The global ranks that are needed to rebuild it; empty if it is this one alone."""
        return tuple(sorted({rank for bucket in self.buckets for rank in bucket.ranks}))

    @property
    def question(self) -> str:
        """What ranks call it when they talk about it, with their number in front; others may have one of that name."""
        return f"{len(self.ranks)} ranks, {min(self.ranks, default=0)} the first, with {self.name}"


@runtime_checkable
class DerivesWeights(Protocol):
    """A bound adapter that can say how weights are derived."""

    def derivable_buffers(self) -> Iterable[DerivableBuffer]:
        """The buffers that may be casts of main weights, as they are now; also while either is away.

        Their `main` tensors are listed in the inventory under `main_weights`.
        """
        ...


def derivable_buffers_of(bound: object, group: dist.ProcessGroup | None) -> Callable[[], Iterable[DerivableBuffer]]:
    """How to ask an adapter for what may be derived, in a manager that moves with a group of ranks.

    Raises:
        InvalidArgumentError: the adapter cannot tell, or ranks would have to gather weights that do not move together.
    """
    if not isinstance(bound, DerivesWeights):
        raise InvalidArgumentError(
            f"derive_weights is not available for this adapter ({type(bound).__qualname__}), which does not say how "
            "weights follow from main weights. Leave it out, and the weights are kept"
        )
    together = () if group is None else dist.get_process_group_ranks(group)
    for buffer in bound.derivable_buffers():
        missing = sorted(set(buffer.ranks).difference(together))
        if missing:
            raise InvalidArgumentError(
                f"derive_weights needs all ranks that gather {buffer.name} together ({len(buffer.ranks)}) to move "
                f"together, and {len(missing)} of them would not. Give a group that contains them, such as "
                "group=torch.distributed.group.WORLD"
            )
    return bound.derivable_buffers


class WeightDeriver:
    """Proves and rebuilds the derived weights of one manager. See [Note: what is proved].

    Attributes:
        notes: what was kept all the same at the last proof, and why.
    """

    def __init__(self, device: Device, digester: Digester, buffers: Callable[[], Iterable[DerivableBuffer]]) -> None:
        self._device = device
        self._digester = digester
        self._buffers = buffers
        self.notes: tuple[str, ...] = ()

    def candidates(self, records: Collection[StorageRecord]) -> dict[int, DerivableBuffer]:
        """What might be derived among storages on the device, by identity of the storage; nothing is proved yet."""
        weights = {storage_id(r.storage): r for r in records if r.kind is StateKind.WEIGHTS}
        found = {}
        for buffer in self._buffers():
            key = storage_id(buffer.flat.untyped_storage())
            if key in weights and self._is_sound(buffer, weights):
                found[key] = buffer
        return found

    def prove(self, records: Collection[StorageRecord], main_is_here: bool, ballot: Ballot) -> dict[int, Digest | None]:
        """What may be derived among the storages that are to move, by identity: with its digest if it can be, or None.

        All ranks come to the same result for buffers that they gather together. Waits for them, and for the caller's
        stream, but not for copies under way, which may be reading the same storages.

        Args:
            records: storages on the device; nothing writes to them.
            main_is_here: whether main weights are on the device, too.
            ballot: what all ranks of the manager's group ask each other by.

        Raises:
            PeerError: another rank failed or did not come in time.
        """
        faults.point("derive.prove")
        candidates = self.candidates(records)
        digests, equal = self._examine(candidates) if main_is_here else ({}, set())
        answers = ballot.ask(
            {
                buffer.question: f"{digests[key].value:x}" if key in equal else "no cast"
                for key, buffer in candidates.items()
                if buffer.ranks
            }
        )
        proved = {key for key in equal if _is_unanimous(candidates[key], answers)}
        self.notes = tuple(_why_kept(candidates, equal, proved, main_is_here))
        return {key: digests[key] if key in proved else None for key in candidates}

    def rebuild(self, storages: Mapping[int, Digest], ballot: Ballot, *, unverified: bool) -> None:
        """Make derived weights anew in storages that have been taken; main weights have arrived.

        Waits for other ranks, and for the device. All-gathers over the groups of the buffers.

        Args:
            storages: those to fill, by identity, with the digests of what they held.
            ballot: what all ranks of the manager's group ask each other by.
            unverified: look at no digest.

        Raises:
            OffloadedError: a main weight is not on the device.
            StateChangedError: other weights would come back than have left.
            TransferError: ranks are missing that have to rebuild them too.
            PeerError: another rank failed or did not come in time.
        """
        faults.point("derive.rebuild")
        buffers = {storage_id(buffer.flat.untyped_storage()): buffer for buffer in self._buffers()}
        missing = storages.keys() - buffers.keys()
        if missing:
            raise StateChangedError(
                f"{len(missing)} buffers of weights were left to be rebuilt from main weights, and are not among those "
                "of the trainer now. Their optimizer was replaced while they were away: put it back"
            )
        for key in storages:
            _check_main_is_here(buffers[key])
        answers = ballot.ask(
            {
                buffer.question: "rebuild" if key in storages else "here"
                for key, buffer in buffers.items()
                if buffer.ranks and buffer.flat.untyped_storage().nbytes()
            }
        )
        _check_all_are_ready(answers)
        # Not on a copy stream, where optimizer states may be queued.
        for key in storages:
            _cast(buffers[key])
        for key, buffer in buffers.items():
            if key in storages or "rebuild" in answers.get(buffer.question, {}):
                _gather(buffer)
        found = {
            buffers[key].name: (left, digest(byte_view(buffers[key].flat.untyped_storage())))
            for key, left in storages.items()
        }
        self._device.synchronize_stream()
        values = self._device.fetch([value for _, value in found.values()])
        changed = [name for name, value in zip(found, values, strict=True) if value != found[name][0].value]
        if changed and not unverified:
            raise StateChangedError(
                f"the weights in {', '.join(changed)} are rebuilt from main weights, and would not be what they were: "
                "main weights have changed meanwhile. Nothing was brought back. Give main weights the values that they "
                "had and repeat the call; or call onload(unverified=True) for a cast of main weights as they are now"
            )

    def _is_sound(self, buffer: DerivableBuffer, weights: Collection[int]) -> bool:
        """Whether a claim is about the whole of a storage, and about main weights that are none of these weights."""
        flat = buffer.flat
        return (
            flat.dtype in _BITS
            and flat.is_contiguous()
            and flat.device == self._device.torch_device
            and flat.numel() * flat.element_size() == flat.untyped_storage().nbytes()
            and _covers([(b.start, b.end) for b in buffer.buckets], flat.numel(), with_gaps=False)
            and _covers([(first, first + main.numel()) for first, main in buffer.main], flat.numel(), with_gaps=True)
            and all(b.group is None or (b.end - b.start) % b.group.size() == 0 for b in buffer.buckets)
            and all(
                main.device == flat.device
                and main.is_contiguous()
                and storage_id(main.untyped_storage()) not in weights
                for _, main in buffer.main
            )
        )

    def _examine(self, candidates: Mapping[int, DerivableBuffer]) -> tuple[dict[int, Digest], set[int]]:
        """Digests of buffers, and those of which this rank's shards are what a rebuilding would make of them."""
        digests: dict[int, Digest] = {}
        differing: dict[int, torch.Tensor] = {}
        here = self._device.as_here()  # on the caller's stream: the others may be busy with the head start's copies
        with here():
            for key, buffer in candidates.items():
                differing[key] = _count_of_differing_windows(buffer)
                digests[key] = self._digester.begin_here(buffer.flat.untyped_storage())
        self._digester.read(digests.values())  # waits for what was queued before them, too
        counts = self._device.fetch(list(differing.values()))
        return digests, {key for key, count in zip(differing, counts, strict=True) if count == 0}


# --- one buffer ----------------------------------------------------------------------------------------------------


def _covers(ranges: Iterable[tuple[int, int]], numel: int, *, with_gaps: bool) -> bool:
    """Whether ranges follow each other within `numel` elements, or cover all of them."""
    end = 0
    for first, last in ranges:
        if first < end or (first > end and not with_gaps):
            return False
        end = last
    return end <= numel if with_gaps else end == numel


def _cast_into(target: torch.Tensor, start: int, main: Sequence[tuple[int, torch.Tensor]]) -> None:
    """Fill a piece of a buffer: casts of the main weights that lie in it, and zeros elsewhere.

    Args:
        target: the piece, of shape [length].
        start: the number of its first element in the buffer.
        main: as in `DerivableBuffer`.
    """
    end = start + target.numel()
    target.zero_()
    reaching = max(0, bisect_right(main, start, key=_place) - 1)
    for first, tensor in main[reaching : bisect_left(main, end, key=_place)]:
        low, high = max(start, first), min(end, first + tensor.numel())
        if low < high:
            target[low - start : high - start].copy_(tensor.detach().view(-1)[low - first : high - first])


def _place(main: tuple[int, torch.Tensor]) -> int:
    return main[0]


def _count_of_differing_windows(buffer: DerivableBuffer) -> torch.Tensor:
    """How many windows of this rank's shards would be rebuilt with other bits; int64 without dimensions, queued."""
    flat = buffer.flat.data
    length = WINDOW_BYTES // flat.element_size()
    bits = _BITS[flat.dtype]
    window = torch.empty(min(length, flat.numel()), dtype=flat.dtype, device=flat.device)
    count = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first, last in (bucket.shard for bucket in buffer.buckets):
        for start in range(first, last, length):
            made = window[: min(length, last - start)]
            _cast_into(made, start, buffer.main)
            count += made.view(bits).bitwise_xor_(flat[start : start + made.numel()].view(bits)).any()
    return count


def _cast(buffer: DerivableBuffer) -> None:
    """Fill this rank's shards; queued on the current stream. Leaves the version counters of tensors alone."""
    for start, end in (bucket.shard for bucket in buffer.buckets):
        _cast_into(buffer.flat.data[start:end], start, buffer.main)


def _gather(buffer: DerivableBuffer) -> None:
    """Fill the shards of other ranks; as `_cast`, and collective over the groups of its buckets."""
    flat = buffer.flat.data
    for bucket in buffer.buckets:
        if bucket.group is not None:
            start, end = bucket.shard
            dist.all_gather_into_tensor(flat[bucket.start : bucket.end], flat[start:end], group=bucket.group)


def _is_unanimous(buffer: DerivableBuffer, answers: Answers) -> bool:
    """Whether all ranks that gather a buffer have said the same of it."""
    return not buffer.ranks or list(answers[buffer.question].values()) == [len(buffer.ranks)]


def _check_main_is_here(buffer: DerivableBuffer) -> None:
    if any(main.untyped_storage().nbytes() == 0 for _, main in buffer.main if main.numel()):
        raise OffloadedError(
            f"{buffer.name} is rebuilt from main weights, which are not all on the device. Bring them back in the "
            "same call, or before"
        )


def _check_all_are_ready(answers: Answers) -> None:
    """Whether nobody rebuilds in vain; all ranks of the manager's group come to the same result, whatever they have.

    Raises:
        TransferError: ranks are missing.
    """
    for question, given in answers.items():
        ready = sum(given.values())
        if "rebuild" in given and ready < int(question.split()[0]):
            raise TransferError(
                f"weights are rebuilt together by {question}, and only {ready} of them are about to. Nothing was "
                "brought back. Call onload of weights on all ranks of the manager's group, before close, which each "
                "rank does on its own; where some ranks have their weights on the device, offload them there first"
            )


def _why_kept(
    candidates: Mapping[int, DerivableBuffer], equal: Collection[int], proved: Collection[int], main_is_here: bool
) -> Iterable[str]:
    if not candidates:
        yield "weights are kept: no flat buffer of them follows from main weights"
    for key, buffer in candidates.items():
        if key in proved:
            continue
        if not main_is_here:
            reason = "main weights are away already"
        elif key not in equal:
            reason = "it holds bits that a cast of main weights would not give back"
        else:
            reason = "it is not the same, or no cast of main weights, on all ranks that gather it"
        nbytes = buffer.flat.untyped_storage().nbytes()
        yield f"{buffer.name} is kept ({format_bytes(nbytes)}): {reason}"
