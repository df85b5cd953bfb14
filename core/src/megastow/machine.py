"""What this machine can give in host memory, read from the kernel; and where a GPU sits.

Plain files under /proc and /sys, no dependency. Every reader returns None (or an empty answer) where the system does
not tell, and an amount that nobody tells counts as unlimited, so that a missing file never stops a move.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class CgroupMemory:
    """A memory limit set on a control group that this process is in.

    Attributes:
        path: the folder of the group.
        limit_bytes: what the group may use.
        used_bytes: what it uses, without file pages that the kernel can drop at once.
    """

    path: str
    limit_bytes: int
    used_bytes: int

    @property
    def available_bytes(self) -> int:
        """What is left below the limit."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True)
class HostLimits:
    """What stands between this process and the host memory it wants.

    Attributes:
        total_bytes: physical memory, or the tightest cgroup limit where that is smaller.
        available_bytes: what can be had now, by the kernel's estimate and by every cgroup limit.
        cgroup: the tightest cgroup with a limit, or None.
        memlock_bytes: the soft RLIMIT_MEMLOCK; None if unlimited. CUDA's page-locking does not count against it on
            the drivers we know of, so it informs and does not refuse (see docs/adr/0003).
        local_ranks: processes of this job on this host, from LOCAL_WORLD_SIZE; 1 if unset.
    """

    total_bytes: int
    available_bytes: int
    cgroup: CgroupMemory | None
    memlock_bytes: int | None
    local_ranks: int


def host_limits(root: Path = Path("/")) -> HostLimits:
    """Read the limits as they are now. `root` is there for tests; it stands for the file system's root."""
    meminfo = _meminfo(root)
    total = meminfo.get("MemTotal", sys.maxsize)
    available = meminfo.get("MemAvailable", meminfo.get("MemFree", sys.maxsize))
    groups = list(_cgroups(root))
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return HostLimits(
        total_bytes=min([total, *(g.limit_bytes for g in groups)]),
        available_bytes=min([available, *(g.available_bytes for g in groups)]),
        cgroup=min(groups, key=lambda g: g.available_bytes, default=None),
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        local_ranks=local_ranks(),
    )


def host_identity(root: Path = Path("/")) -> str:
    """What tells this host from others: its name, and the number that its kernel made up when it started."""
    return f"{socket.gethostname()} {_read(root / 'proc/sys/kernel/random/boot_id') or ''}"


def local_ranks() -> int:
    """Processes of this job on this host, as torchrun tells them; 1 if nobody says."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(value)) if value.isdecimal() else 1


def resident_bytes() -> int:
    """The resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def usable_cpus() -> set[int]:
    """The CPUs this process may run on."""
    return os.sched_getaffinity(0)


def cpu_model(root: Path = Path("/")) -> str | None:
    """What the CPU calls itself; None if the system does not tell."""
    found = re.search(r"^model name\s*: (.+)$", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    return found[1] if found else None


def numa_cpus(node: int, root: Path = Path("/")) -> set[int]:
    """The CPUs of a NUMA node; empty if the system does not tell."""
    text = _read(root / f"sys/devices/system/node/node{node}/cpulist")
    return _parse_ranges(text) if text else set()


def pci_numa_node(pci_bus_id: str, root: Path = Path("/")) -> int | None:
    """The NUMA node that a PCI device (such as "0000:3b:00.0") hangs on; None if unknown or on no node."""
    text = _read(root / "sys/bus/pci/devices" / pci_bus_id.lower() / "numa_node")
    node = int(text) if text and re.fullmatch(r"-?\d+", text) else -1
    return node if node >= 0 else None


def file_system(path: Path, root: Path = Path("/")) -> str | None:
    """What kind of file system a path is on ("ext4", "tmpfs"); None if the system does not tell."""
    wanted = path.resolve()
    found: tuple[int, str] | None = None
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        place, _, source = line.partition(" - ")
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), place.split()[4]))
        depth = len(mounted.parts)
        if wanted.is_relative_to(mounted) and (found is None or depth >= found[0]):  # of two on one place, the later
            found = depth, source.split()[0]
    return found[1] if found else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    text = _read(root / "proc/meminfo") or ""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _cgroups(root: Path) -> Iterator[CgroupMemory]:
    """Every control group with a memory limit from ours up to the root, of version 1 and of version 2."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            base, limit, used, reclaimable = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        top = root / base
        folder = top / path.lstrip("/")
        if not folder.is_dir():  # inside a container our own group is often mounted as the root
            folder = top
        for group in (folder, *folder.parents):
            found = _cgroup_limit(group, limit, used, reclaimable)
            if found:
                yield found
            if group == top:
                break


def _cgroup_limit(folder: Path, limit: str, used: str, reclaimable: str) -> CgroupMemory | None:
    limit_text, used_text = _read(folder / limit), _read(folder / used)
    if not limit_text or not limit_text.isdecimal() or not used_text or not used_text.isdecimal():
        return None
    if int(limit_text) >= 1 << 60:  # version 1 writes "no limit" as a huge number
        return None
    stat = re.search(rf"^{reclaimable} (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE)
    return CgroupMemory(str(folder), int(limit_text), max(0, int(used_text) - (int(stat[1]) if stat else 0)))


def _parse_ranges(text: str) -> set[int]:
    """Read "0-3,8" as {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus
