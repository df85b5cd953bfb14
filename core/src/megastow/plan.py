"""What an offload would take, said before anything moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megastow.disk import DiskSpace
from megastow.machine import HostLimits
from megastow.report import format_bytes
from megastow.state import Residency, StateKind
from megastow.tiers import Tier


@dataclass(frozen=True)
class KindPlan:
    """What one kind would give and take.

    Attributes:
        kind: the kind.
        residency: where it is now.
        num_tensors: tensors that the inventory lists on its storages.
        device_bytes: device memory that an offload would release; what an onload would take, if the kind is away.
        host_bytes: host memory that its copy takes, with small storages packed as an offload packs them, and each
            storage rounded up to 512 bytes (4096 where files are in question); 0 for what is not copied, and for what
            is on disk.
        disk_bytes: the same of a file.
        tier: where its copy goes, or is; None for what is not copied.
        derived_bytes: device memory that needs no copy, because it is rebuilt from main weights; for a kind that is
            still here, if an offload finds that it can be.
    """

    kind: StateKind
    residency: Residency
    num_tensors: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int = 0
    tier: Tier | None = None
    derived_bytes: int = 0


@dataclass(frozen=True)
class MovePlan:
    """What offloading some kinds would give and take, on this rank and on all ranks of this host.

    Attributes:
        kinds: one entry for each kind that the call named.
        new_host_bytes: host memory that would be taken beyond what the manager holds for these kinds already.
        packing_bytes: the most extra device memory, while small storages are packed: at the first offload only.
        limits: what the machine can give, as it was when the plan was made.
        numa_node: the NUMA node that the device hangs on, where the host memory is put; None if unknown.
        new_disk_bytes: bytes on disk that would be taken beyond what the manager holds for these kinds already.
        disk: what the disk can give; None where no file is made.
        problem: why the host cannot give that much, with the figures; None if it can. An offload would refuse with it.
        notes: which kinds would be kept on disk, and why.
    """

    kinds: Mapping[StateKind, KindPlan]
    new_host_bytes: int
    packing_bytes: int
    limits: HostLimits
    numa_node: int | None
    new_disk_bytes: int = 0
    disk: DiskSpace | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Device memory that an offload of those kinds that are here would release."""
        return sum(k.device_bytes for k in self.kinds.values() if k.residency is Residency.RESIDENT)

    @property
    def host_bytes(self) -> int:
        """Host memory that holds the copies of all these kinds."""
        return sum(k.host_bytes for k in self.kinds.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of files that hold the copies of all these kinds."""
        return sum(k.disk_bytes for k in self.kinds.values())

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types that `json` takes."""
        kinds = {
            str(kind): {
                **dataclasses.asdict(entry),
                "kind": str(kind),
                "residency": str(entry.residency),
                "tier": None if entry.tier is None else str(entry.tier),
            }
            for kind, entry in self.kinds.items()
        }
        return {
            "kinds": kinds,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "new_host_bytes": self.new_host_bytes,
            "new_host_bytes_of_all_ranks": self.new_host_bytes * self.limits.local_ranks,
            "packing_bytes": self.packing_bytes,
            "limits": dataclasses.asdict(self.limits),
            "numa_node": self.numa_node,
            "new_disk_bytes": self.new_disk_bytes,
            "new_disk_bytes_of_all_ranks": self.new_disk_bytes * self.limits.local_ranks,
            "disk": None if self.disk is None else dataclasses.asdict(self.disk),
            "notes": list(self.notes),
            "problem": self.problem,
        }

    def __str__(self) -> str:
        limits = self.limits
        memlock = "no limit" if limits.memlock_bytes is None else format_bytes(limits.memlock_bytes)
        everyone = format_bytes(self.new_host_bytes * limits.local_ranks)
        available = f"{format_bytes(limits.available_bytes)} of {format_bytes(limits.total_bytes)}"
        node = "unknown" if self.numa_node is None else self.numa_node
        lines = [
            f"{entry.kind} ({entry.residency}): {entry.num_tensors} tensors, {format_bytes(entry.device_bytes)} "
            + ("on the device" if entry.residency is Residency.RESIDENT else "of the device when it is back")
            + f", {format_bytes(entry.host_bytes)} on the host"
            + (f", {format_bytes(entry.disk_bytes)} on disk" if entry.disk_bytes else "")
            + (f" ({entry.tier})" if entry.tier else "")
            + (f", {format_bytes(entry.derived_bytes)} to be rebuilt" if entry.derived_bytes else "")
            for entry in self.kinds.values()
        ]
        lines.append(
            f"releases {format_bytes(self.device_bytes)} of device memory, and takes "
            f"{format_bytes(self.new_host_bytes)} of host memory more; while packing, "
            f"{format_bytes(self.packing_bytes)} of device memory"
        )
        lines.append(
            f"all ranks of this host ({limits.local_ranks}): {everyone}; available {available}, memlock {memlock}, "
            f"NUMA node {node}"
        )
        if self.disk is not None:
            lines.append(
                f"{format_bytes(self.new_disk_bytes)} more on disk, "
                f"{format_bytes(self.new_disk_bytes * limits.local_ranks)} of all ranks; "
                f"{format_bytes(self.disk.free_bytes)} of {format_bytes(self.disk.total_bytes)} are free in "
                f"{self.disk.path}"
            )
        lines.extend(self.notes)
        lines.append(self.problem or "the host can give that")
        return "\n".join(lines)
