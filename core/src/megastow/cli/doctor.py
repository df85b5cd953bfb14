"""``megastow doctor``: what is here, and whether an offload can work.

Facts are gathered first and judged after, by functions that look at nothing else, so that every judgement can be tested
on a machine that has none of the trouble.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megastow
from megastow import machine
from megastow.cli.gpus import Driver, Gpu, find_driver, find_gpus
from megastow.device import allocator_settings
from megastow.machine import HostLimits
from megastow.megatron import MegatronInfo, detect_megatron
from megastow.registry import Verdict, judge_installation
from megastow.report import format_bytes


@dataclass(frozen=True)
class Finding:
    """Something that stands in the way, or that is worth knowing.

    Attributes:
        is_problem: whether an offload would fail; a note otherwise.
        found: what is.
        expected: what should be.
        advice: what to do.
    """

    is_problem: bool
    found: str
    expected: str
    advice: str

    def __str__(self) -> str:
        return f"found: {self.found}; expected: {self.expected}. {self.advice}"


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found.

    Attributes:
        torch_version: torch's version.
        torch_path: where it is.
        cuda_version: the CUDA version that torch was built for; None for a CPU build.
        allocator: the settings of torch's allocator, without spaces; empty if there are none.
        driver: NVIDIA's driver.
        gpus: the devices that torch sees.
        limits: what the host can give.
        huge_pages: the setting of transparent huge pages; None if unknown.
        usable_cpus: CPUs that this process may run on.
        megatron: the Megatron that would be imported.
        verdicts: what each adapter says of it.
    """

    torch_version: str
    torch_path: str
    cuda_version: str | None
    allocator: str
    driver: Driver
    gpus: tuple[Gpu, ...]
    limits: HostLimits
    huge_pages: str | None
    usable_cpus: frozenset[int]
    megatron: MegatronInfo | None
    verdicts: tuple[Verdict, ...]

    @property
    def findings(self) -> list[Finding]:
        """Problems first, then notes."""
        found = [*_judge_adapters(self), *_judge_devices(self), *_judge_host(self)]
        return sorted(found, key=lambda finding: not finding.is_problem)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing stands in the way of an offload."""
        return not any(finding.is_problem for finding in self.findings)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The adapters that would take charge of a trainer of the Megatron that is here."""
        return tuple(
            v.name
            for v in self.verdicts
            # An adapter that accepts any installation is for models without Megatron, whatever else is installed.
            if v.adapter is not None and not v.reasons and v.adapter.refuses_installation(None)
        )

    @property
    def conclusion(self) -> str:
        """What it comes to, in one sentence."""
        problems = sum(finding.is_problem for finding in self.findings)
        if problems:
            return f"An offload cannot work here: {problems} problem{'s' * (problems > 1)}, see above."
        if self.megatron is None:
            return "Plain modules can be offloaded here. There is no Megatron, so there is no trainer of it either."
        return (
            f"An offload can work here: {' or '.join(self.chosen)} would take charge of a trainer of megatron-core "
            f"{self.megatron.version}, and plain of modules without Megatron."
        )

    def facts(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """The facts in words: sections of names and values."""
        cuda = f"built for CUDA {self.cuda_version}" if self.cuda_version else "a CPU build"
        yield (
            "software",
            [
                ("megastow", f"{megastow.__version__}, Python {platform.python_version()} ({sys.platform})"),
                ("torch", f"{self.torch_version}, {cuda} ({self.torch_path})"),
                ("allocator", self.allocator or "torch's, without settings"),
                ("driver", self.driver.version or "none"),
                ("Megatron", _megatron_in_words(self.megatron)),
            ],
        )
        yield "devices", [line for gpu in self.gpus for line in _gpu_lines(gpu)] or [("device", "CPU, for development")]
        yield "host", self._host_lines()

    def _host_lines(self) -> list[tuple[str, str]]:
        limits = self.limits
        memlock = "unlimited" if limits.memlock_bytes is None else format_bytes(limits.memlock_bytes)
        group = "no limit"
        if limits.cgroup is not None:
            used, limit = format_bytes(limits.cgroup.used_bytes), format_bytes(limits.cgroup.limit_bytes)
            group = f"{used} used of {limit} ({limits.cgroup.path})"
        available = f"{format_bytes(limits.available_bytes)} available of {format_bytes(limits.total_bytes)}"
        return [
            ("host memory", available),
            ("cgroup", group),
            ("memlock limit", memlock),
            ("huge pages", self.huge_pages or "unknown"),
            ("CPUs", f"{len(self.usable_cpus)} usable"),
            ("local ranks", f"{limits.local_ranks} (LOCAL_WORLD_SIZE)"),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types that `json` takes."""
        return {
            "healthy": self.is_healthy,
            "conclusion": self.conclusion,
            "megastow": megastow.__version__,
            "python": platform.python_version(),
            "torch": {
                "version": self.torch_version,
                "path": self.torch_path,
                "cuda": self.cuda_version,
                "allocator": self.allocator,
            },
            "driver": dataclasses.asdict(self.driver),
            "devices": [dataclasses.asdict(gpu) for gpu in self.gpus],
            "host": {
                **dataclasses.asdict(self.limits),
                "huge_pages": self.huge_pages,
                "usable_cpus": len(self.usable_cpus),
            },
            "megatron": None
            if self.megatron is None
            else {"version": str(self.megatron.version), "path": str(self.megatron.path)},
            "adapters": [{"name": v.name, "accepts": not v.reasons, "reasons": list(v.reasons)} for v in self.verdicts],
            "chosen": list(self.chosen),
            "findings": [
                {"severity": "problem" if f.is_problem else "note", **_without(dataclasses.asdict(f), "is_problem")}
                for f in self.findings
            ],
        }


def examine(root: Path = Path("/")) -> Diagnosis:
    """Gathers the facts. Imports no Megatron and starts no CUDA context. `root` is there for tests."""
    megatron = detect_megatron()
    return Diagnosis(
        torch_version=torch.__version__,
        torch_path=str(Path(torch.__file__).parent),
        cuda_version=torch.version.cuda,
        allocator=allocator_settings(),
        driver=find_driver(root),
        gpus=tuple(find_gpus()),
        limits=machine.host_limits(root),
        huge_pages=_huge_pages(root),
        usable_cpus=frozenset(machine.usable_cpus()),
        megatron=megatron,
        verdicts=tuple(judge_installation(megatron)),
    )


# --- judgements -------------------------------------------------------------------------------------------------------


def _judge_adapters(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Whether exactly one adapter fits the Megatron that is here."""
    for verdict in diagnosis.verdicts:
        if verdict.adapter is None:
            yield Finding(
                False,
                f"adapter {verdict.name} cannot be used: {'; '.join(verdict.reasons)}",
                "an adapter that loads",
                "Install it again in a version that fits megastow, or remove it.",
            )
    if diagnosis.megatron is None:
        yield Finding(
            False,
            "no Megatron on the import path",
            "the Megatron that your trainer uses",
            "If there is one, run the doctor with the PYTHONPATH of the trainer; plain modules need none.",
        )
    elif not diagnosis.chosen:
        yield Finding(
            True,
            f"no adapter accepts {_megatron_in_words(diagnosis.megatron)}",
            "one adapter that does",
            "Install the adapter for your Megatron (megastow-mcore for megatron-core 0.9 to 0.19), or "
            "use a Megatron that an installed adapter supports; the table says why each one refuses.",
        )
    elif len(diagnosis.chosen) > 1:
        yield Finding(
            False,
            f"{' and '.join(diagnosis.chosen)} all accept {_megatron_in_words(diagnosis.megatron)}",
            "exactly one",
            "If they accept the same trainer as well, name one: create_memory_manager(..., adapter=NAME).",
        )


def _judge_devices(diagnosis: Diagnosis) -> Iterator[Finding]:
    """What of the devices slows an offload down, or hides them."""
    if not diagnosis.gpus and diagnosis.driver.num_gpus:
        why = "is a CPU build" if diagnosis.cuda_version is None else "cannot use any of them"
        yield Finding(
            False,
            f"the driver sees {diagnosis.driver.num_gpus} GPUs, but torch {diagnosis.torch_version} {why}",
            "a torch that can use them",
            "Install a CUDA build of torch that fits the driver; is CUDA_VISIBLE_DEVICES empty?",
        )
    if diagnosis.gpus and _maps_small_pages(diagnosis.allocator) and _has_larger_pages(diagnosis.torch_version):
        yield Finding(
            False,
            f"expandable segments that torch maps 20 MiB at a time ({diagnosis.allocator})",
            "64 MiB or more",
            "Add large_segment_size_mb:64 to these settings: onloads of an H200 took 1.5 % less with it. A block that "
            "stays on the device then keeps as much mapped.",
        )
    for gpu in diagnosis.gpus:
        if gpu.pcie_width is not None and gpu.pcie_width_max is not None and gpu.pcie_width < gpu.pcie_width_max:
            yield Finding(
                False,
                f"GPU {gpu.index} has {gpu.pcie_width} of {gpu.pcie_width_max} PCIe lanes",
                "all of them",
                "Offloads are slower in that proportion. Look at the slot and the riser.",
            )
        near = machine.numa_cpus(gpu.numa_node) if gpu.numa_node is not None else set()
        if near and not near & diagnosis.usable_cpus:
            yield Finding(
                False,
                f"this process may run on no CPU of NUMA node {gpu.numa_node}, where GPU {gpu.index} is",
                "some CPUs of that node",
                "Host memory will lie on another node, which slows copies down. Bind ranks to their GPU's node.",
            )


def _judge_host(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Whether the host can take what the devices hold."""
    limits = diagnosis.limits
    ranks = f" in each of {limits.local_ranks} ranks" if limits.local_ranks > 1 else ""
    limited_by = ""
    if limits.cgroup is not None and limits.cgroup.available_bytes <= limits.available_bytes:
        limited_by = f" (control group {limits.cgroup.path} is limited to {format_bytes(limits.cgroup.limit_bytes)})"
    available = f"{format_bytes(limits.available_bytes)} of host memory available{limited_by}"
    used = max((gpu.used_bytes or 0 for gpu in diagnosis.gpus), default=0)
    total = max((gpu.total_bytes for gpu in diagnosis.gpus), default=0)
    if used * limits.local_ranks > limits.available_bytes:
        yield Finding(
            True,
            available,
            f"{format_bytes(used * limits.local_ranks)} for what the device holds now ({format_bytes(used)}{ranks})",
            "Leave more host memory to the job, raise its limit, run fewer ranks on this host, or offload fewer kinds.",
        )
    elif total * limits.local_ranks > limits.available_bytes:
        yield Finding(
            False,
            available,
            f"{format_bytes(total * limits.local_ranks)} for a device that is full ({format_bytes(total)}{ranks})",
            "A trainer that holds more than is available cannot be offloaded. Gradient buffers need no host memory.",
        )
    if limits.memlock_bytes is not None and diagnosis.gpus:
        yield Finding(
            False,
            f"a memlock limit of {format_bytes(limits.memlock_bytes)}",
            "none, to be on the safe side",
            "CUDA's page-locking is not known to count against it. Should page-locking fail all the same, raise it: "
            "`ulimit -l unlimited`, or --ulimit memlock=-1 for a container.",
        )
    if diagnosis.huge_pages == "never" and diagnosis.gpus:
        yield Finding(
            False,
            "transparent huge pages are switched off",
            "madvise or always",
            "The first offload takes longer. echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )


# --- small tools ------------------------------------------------------------------------------------------------------


def _megatron_in_words(megatron: MegatronInfo | None) -> str:
    if megatron is None:
        return "none on the import path"
    return f"megatron-core {megatron.version or 'of unknown version'} ({megatron.path})"


def _gpu_lines(gpu: Gpu) -> Sequence[tuple[str, str]]:
    used = "unknown" if gpu.used_bytes is None else format_bytes(gpu.used_bytes)
    node = "unknown" if gpu.numa_node is None else str(gpu.numa_node)
    return [
        (f"GPU {gpu.index}", f"{gpu.name}, {used} used of {format_bytes(gpu.total_bytes)}"),
        ("", f"{gpu.link}, NUMA node {node}, PCI {gpu.pci_bus_id or 'unknown'}"),
    ]


def _maps_small_pages(allocator: str) -> bool:
    """Whether torch's allocator has expandable segments with the pages that it has by itself."""
    of_others = re.search(r"backend:(?!native)|large_segment_size_mb:", allocator)
    return re.findall(r"expandable_segments:(\w+)", allocator)[-1:] == ["True"] and not of_others


def _has_larger_pages(torch_version: str) -> bool:
    """Whether it is a release known to have `large_segment_size_mb`; those that do not refuse to start with it."""
    return tuple(map(int, re.findall(r"\d+", torch_version)[:2])) >= (2, 11)


def _huge_pages(root: Path) -> str | None:
    """The chosen one of "always [madvise] never"."""
    try:
        text = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else None


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}
