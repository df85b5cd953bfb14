"""What the figures of a run depend on beside what they measure: hardware, versions and settings, by name."""

from __future__ import annotations

import dataclasses
import os
import platform
from typing import Any

import torch

import megastow
from megastow import machine
from megastow.cli import gpus
from megastow_conformance import demo_outcome
from megastow_conformance.revision import find_revision

_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
"""What of the environment changes figures."""


def hardware(device: torch.device) -> dict[str, object]:
    """What it runs on. What the system, the driver or its library does not tell is None."""
    limits = machine.host_limits()
    found: dict[str, object] = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu": machine.cpu_model(),
        "usable_cpus": len(machine.usable_cpus()),
        "host_bytes": limits.total_bytes,
        "host_available_bytes": limits.available_bytes,
        "environment": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }
    if device.type == "cuda":
        gpu = gpus.find_gpus()[torch.cuda.current_device()]
        found["device"] = gpu.name
        found["device_bytes"] = gpu.total_bytes
        found["num_devices"] = torch.cuda.device_count()
        found["link"] = {name: value for name, value in dataclasses.asdict(gpu).items() if name.startswith("pcie_")}
        found["driver"] = gpus.find_driver().version
        found["cuda"] = torch.version.cuda
    return found


def versions(device: torch.device) -> dict[str, str | None]:
    """What takes part; the revision is None where megastow does not lie in a clone of its repository."""
    found = {
        "megastow": megastow.__version__,
        "revision": find_revision(megastow.__file__),
        **demo_outcome.versions(),
    }
    if device.type == "cuda":
        dist: Any = torch.distributed  # it declares no exports
        nccl: Any = torch.cuda.nccl
        found["nccl"] = ".".join(map(str, nccl.version())) if dist.is_nccl_available() else None
    return found
