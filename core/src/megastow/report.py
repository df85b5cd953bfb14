"""What a move did, as data for machines and as one line for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megastow.state import StateKind

Direction = Literal["offload", "onload"]


def format_bytes(count: float | None) -> str:
    """`count` bytes in binary units, four significant digits; a dash for None."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


@dataclass(frozen=True)
class MemoryFigures:
    """Memory in use at one moment.

    Attributes:
        allocated_bytes: what torch's allocator has handed out; None on the CPU, where it does not count.
        reserved_bytes: what torch's allocator holds, its caches included; None on the CPU.
        driver_bytes: what the driver reports as used on the whole device, by every process; on the CPU the resident
            set of this process.
    """

    allocated_bytes: int | None
    reserved_bytes: int | None
    driver_bytes: int


@dataclass(frozen=True)
class KindReport:
    """One kind's part in a move.

    Attributes:
        kind: the kind.
        moved: False if there was nothing to do, because the kind was already where the call wanted it.
        num_tensors: distinct tensors moved; views that only alias another tensor's elements count too.
        device_bytes: bytes of device storage released or taken.
        host_bytes: bytes of host memory that hold the copy, alignment included; 0 for what was not copied.
        seconds: time that reserving, copying, zero-filling and releasing this kind took.
        disk_bytes: bytes of the file that holds the copy instead.
        derived_bytes: bytes of device storage that are in no copy, because they are rebuilt from main weights.
    """

    kind: StateKind
    moved: bool
    num_tensors: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    seconds: float = 0.0
    disk_bytes: int = 0
    derived_bytes: int = 0

    @property
    def bytes_per_second(self) -> float:
        """Device bytes over seconds; 0.0 if nothing was moved."""
        return self.device_bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class TransferReport:
    """What `offload` or `onload` did.

    Attributes:
        direction: "offload" or "onload".
        kinds: one entry for each kind that the call named.
        seconds: from the call to the return, everything included.
        before: memory when the call came.
        after: memory when the call returned.
        notes: what a reader should know: a kind that was already there, memory that was packed, state that vanished.
    """

    direction: Direction
    kinds: Mapping[StateKind, KindReport]
    seconds: float
    before: MemoryFigures
    after: MemoryFigures
    notes: tuple[str, ...] = ()

    @property
    def num_tensors(self) -> int:
        """Tensors moved, over all kinds."""
        return sum(k.num_tensors for k in self.kinds.values())

    @property
    def device_bytes(self) -> int:
        """Device bytes released or taken, over all kinds."""
        return sum(k.device_bytes for k in self.kinds.values())

    @property
    def host_bytes(self) -> int:
        """Host bytes that hold the copies, over all kinds."""
        return sum(k.host_bytes for k in self.kinds.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of files that hold copies, over all kinds."""
        return sum(k.disk_bytes for k in self.kinds.values())

    @property
    def derived_bytes(self) -> int:
        """Device bytes that are in no copy, because they are rebuilt from main weights."""
        return sum(k.derived_bytes for k in self.kinds.values())

    @property
    def bytes_per_second(self) -> float:
        """Device bytes over the seconds of the whole call."""
        return self.device_bytes / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types that `json` takes."""
        kinds = {
            str(kind): {**dataclasses.asdict(entry), "kind": str(kind), "bytes_per_second": entry.bytes_per_second}
            for kind, entry in self.kinds.items()
        }
        return {
            "direction": self.direction,
            "kinds": kinds,
            "num_tensors": self.num_tensors,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "derived_bytes": self.derived_bytes,
            "seconds": self.seconds,
            "bytes_per_second": self.bytes_per_second,
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        moved = [k for k in self.kinds.values() if k.moved]
        if not moved:
            return f"{self.direction}: nothing to do ({'; '.join(self.notes) or 'no kind named'})"
        names = ", ".join(str(k.kind) for k in moved)
        return (
            f"{self.direction} of {names}: {self.num_tensors} tensors, {format_bytes(self.device_bytes)} of device "
            f"memory in {self.seconds:.3f} s ({self.bytes_per_second / 1e9:.2f} GB/s), "
            f"{format_bytes(self.host_bytes)} of host memory"
            + (f" and {format_bytes(self.disk_bytes)} on disk" if self.disk_bytes else "")
            + (f", {format_bytes(self.derived_bytes)} from main weights" if self.derived_bytes else "")
            + ", device in use "
            f"{format_bytes(self.before.driver_bytes)} -> {format_bytes(self.after.driver_bytes)}"
            + (f" [{'; '.join(self.notes)}]" if self.notes else "")
        )
