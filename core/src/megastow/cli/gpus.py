"""The GPUs that torch sees, with what only NVIDIA's management library can tell of them.

That library comes with an extra, and may find no driver: every question is answered with None then. Nothing here starts
a CUDA context, which would take device memory from a job that is running.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megastow import machine


@dataclass(frozen=True)
class Gpu:
    """One CUDA device.

    Attributes:
        index: torch's index.
        name: what it is.
        total_bytes: its memory.
        used_bytes: what all processes use of it now.
        pci_bus_id: such as "0000:3b:00.0".
        numa_node: the NUMA node it hangs on.
        pcie_generation: of the link now, which an idle device slows down to save power.
        pcie_generation_max: the best that device and slot can do.
        pcie_width: lanes now.
        pcie_width_max: the most lanes that device and slot can do.
    """

    index: int
    name: str
    total_bytes: int
    used_bytes: int | None = None
    pci_bus_id: str | None = None
    numa_node: int | None = None
    pcie_generation: int | None = None
    pcie_generation_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None

    @property
    def link(self) -> str:
        """The PCIe link in words."""
        if self.pcie_generation_max is None or self.pcie_width is None:
            return "PCIe link unknown"
        slowed = self.pcie_generation is not None and self.pcie_generation < self.pcie_generation_max
        return (
            f"PCIe generation {self.pcie_generation_max} x{self.pcie_width}"
            + (f" of x{self.pcie_width_max}" if self.pcie_width_max not in (None, self.pcie_width) else "")
            + (f" (generation {self.pcie_generation} while idle)" if slowed else "")
        )


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver on this machine.

    Attributes:
        version: its version, or None if there is none.
        num_gpus: GPUs it sees, whether or not torch can use them; None if it could not be asked.
    """

    version: str | None
    num_gpus: int | None


def find_gpus() -> list[Gpu]:
    """Every device that torch sees; empty without one, or with a CPU build of torch."""
    if not torch.cuda.is_available():
        return []
    with _management() as nvml:
        return [_describe(index, nvml) for index in range(torch.cuda.device_count())]


def find_driver(root: Path = Path("/")) -> Driver:
    """The driver, asked through its library or read from the kernel's module. `root` is there for tests."""
    with _management() as nvml:
        version = _ask(lambda: nvml.nvmlSystemGetDriverVersion())
        count = _ask(lambda: nvml.nvmlDeviceGetCount())
    if version is None:
        with contextlib.suppress(OSError):
            found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", (root / "proc/driver/nvidia/version").read_text())
            version = found[1] if found else None
    return Driver(version.decode() if isinstance(version, bytes) else version, count)


def _describe(index: int, nvml: Any) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(index)
    parts: list[Any] = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    domain, bus, slot = parts
    bus_id = None if None in parts else f"{domain:04x}:{bus:02x}:{slot:02x}.0"
    handle = None if bus_id is None else _ask(lambda: nvml.nvmlDeviceGetHandleByPciBusId(bus_id.encode()))

    def ask(function: str) -> Any:
        return None if handle is None else _ask(lambda: getattr(nvml, function)(handle))

    memory = ask("nvmlDeviceGetMemoryInfo")
    return Gpu(
        index=index,
        name=properties.name,
        total_bytes=int(properties.total_memory),
        used_bytes=None if memory is None else int(memory.used),
        pci_bus_id=bus_id,
        numa_node=None if bus_id is None else machine.pci_numa_node(bus_id),
        pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        pcie_generation_max=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
        pcie_width_max=ask("nvmlDeviceGetMaxPcieLinkWidth"),
    )


@contextlib.contextmanager
def _management() -> Iterator[Any]:
    """The management library, started; None if it is not installed or finds no driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _ask(question: Callable[[], Any]) -> Any:
    """The answer, or None where the library is missing, or says that this device or container does not tell."""
    try:
        return question()
    except Exception:  # AttributeError of a missing library, NVMLError of many kinds
        return None
