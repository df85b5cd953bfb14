"""Digests: 64 bits that tell whether the bytes of a storage are still what they were.

[Note: how a digest is made]
The bytes are taken as 8-byte words, and the words are summed up modulo 2**64 in two ways: by their number modulo C and
modulo C + 2, where C is the smallest odd number that is not below the square root of their count, or one more. Each of
the C + C + 2 sums is put through a bijection of 64 bits (the finaliser of splitmix64) that is another one for each sum
and for each length, and the results are added up. What does not fill a word at the end is one more sum, of itself.

C and C + 2 are odd, so they have no common divisor, and their product exceeds the number of words: two different words
are never in the same sum both ways. So some sum changes, and with it the digest but for a chance of 2**-64, if

* one word changes, by whichever bits; or two words, however their changes fit together;
* any words change within a run of C (64 KiB of a storage of 512 MiB), since each is alone in its sum then;
* two different words, or two different runs of at most C * 2 / 3 words, change places.

Damage that spreads further goes unseen only if it leaves every one of the sums as it was, which takes at least four
words, at fitting distances, changed by fitting amounts. It is no protection against somebody who means harm.

Sums of integers do not depend on their order: the digest is the same on every device, and however bytes were copied.

[Note: what a digest costs]
Two passes that read the storage, and some twenty small kernels on the sums. No temporary is of the storage's size: it
is about 80 bytes for each unit of the square root of the number of words, less than a megabyte for a storage of 1 GiB.
On a GPU the passes run on a stream of their own beside the copies, which are far slower. Only what an onload copies
last has nothing beside it: the two passes over that storage come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from megastow.device import Arrival, Device
from megastow.storages import byte_view

SCRATCH_BYTES = 8 << 20
"""Device memory that digests of storages up to 32 GiB take while they are made; it is taken in blocks of 2 MiB."""

_WORD_BYTES = 8
_LENGTH_SHIFT = 24  # the length above it and the number of a sum below it fit an int64 for storages under 512 GiB


def _signed(word: int) -> int:
    """The int64 that has the bits of an unsigned word."""
    return word - (1 << 64) if word >> 63 else word


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def digest(data: torch.Tensor) -> torch.Tensor:
    """The digest of bytes. Queued on the current stream; does not synchronise. See [Note: how a digest is made].

    Args:
        data: contiguous uint8 tensor of shape [nbytes], 8-byte aligned, on any device; nbytes may be anything.

    Returns:
        int64 tensor without dimensions, on the same device.
    """
    filled = data.numel() // _WORD_BYTES * _WORD_BYTES
    words = data[:filled].view(torch.int64)
    width = math.isqrt(words.numel()) | 1
    sums = [_sums_by_remainder(words, width), _sums_by_remainder(words, width + 2)]
    if filled < data.numel():
        rest = torch.zeros(_WORD_BYTES, dtype=torch.uint8, device=data.device)
        rest[: data.numel() - filled] = data[filled:]
        sums.append(rest.view(torch.int64))
    slots = torch.cat(sums)
    first = data.numel() << _LENGTH_SHIFT
    numbers = torch.arange(first, first + slots.numel(), dtype=torch.int64, device=data.device)
    return _mix_(slots.add_(numbers, alpha=_STEP)).sum()


def _sums_by_remainder(words: torch.Tensor, width: int) -> torch.Tensor:
    """For each remainder the sum of the words whose number leaves it, modulo 2**64; shape [width]."""
    rows = words.numel() // width
    whole = rows * width
    sums = words[:whole].view(rows, width).sum(0)
    sums[: words.numel() - whole] += words[whole:]
    return sums


def _mix_(words: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 on each word, in place: a bijection in which every bit depends on every other."""
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        words ^= (words >> shift).bitwise_and_((1 << 64 - shift) - 1)  # torch shifts the sign in
        words *= factor
    return words


class Digest:
    """The digest of one storage, on its way to the host.

    Attributes:
        computed: when the storage has been read; it must not be released or written before.
        value: the digest, once `Digester.read` has been asked for it.
    """

    def __init__(self, on_device: torch.Tensor, computed: Arrival) -> None:
        self.on_device: torch.Tensor | None = on_device
        self.computed = computed
        self.value: int | None = None


class Digester:
    """Makes digests beside the copies of one manager."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def begin(self, storage: torch.UntypedStorage, after: Arrival) -> Digest:
        """Queue the digest of what the storage holds, beside copies; call within `device.copying()`.

        Keeps 8 bytes on the device (512 in torch's allocator) until it is read.

        Args:
            storage: what to read.
            after: the moment at which it may begin.
        """
        with self._device.beside(after):
            return self.begin_here(storage)

    def begin_here(self, storage: torch.UntypedStorage) -> Digest:
        """Queue the digest of what the storage holds on the current stream, which is one of its device; as `begin`."""
        return Digest(digest(byte_view(storage)), self._device.arrival())

    def read(self, digests: Iterable[Digest]) -> None:
        """Bring digests to the host, in one small copy; waits for these, and for nothing that was queued later."""
        waiting = [(each, each.on_device) for each in digests if each.value is None]
        for each, _ in waiting:
            each.computed.wait()
        values = self._device.fetch([on_device for _, on_device in waiting if on_device is not None])
        for (each, _), value in zip(waiting, values, strict=True):
            each.value, each.on_device = value, None
