"""What the demo found: moves, comparisons and the verdict, as data for the command line and for machines."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megastow import MemoryFigures, TransferReport, detect_megatron
from megastow_conformance.demo_models import Size
from megastow_conformance.oracle import as_bytes

SORTS: Mapping[str, str] = {
    "weights": "weight",
    "main weights": "main weight",
    "moments": "moment",
    "other states": "state",
    "reference weights": "reference weight",
}
"""The sorts of tensors that are compared, and what one of them is called."""


@dataclass(frozen=True)
class Move:
    """One offload or onload.

    Attributes:
        round: The round, from 1; 0 before the first.
        tenant: ``"trainer"`` or ``"reference"``.
        report: What the manager reported.
    """

    round: int
    tenant: str
    report: TransferReport


@dataclass(frozen=True)
class Difference:
    """Something that is not what it is in the twin.

    Attributes:
        rank: Where it was found.
        name: The tensor or figure, such as ``"weight chunk0.param.module..."``.
        detail: How it differs.
    """

    rank: int
    name: str
    detail: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.name}: {self.detail}"


@dataclass
class Comparison:
    """What was compared on a rank or on all, and what of it differs.

    Attributes:
        rank: The rank.
        counts: Compared things by sort: losses, gradient norms, weights, main weights, moments and so on.
        nbytes: Bytes of the compared tensors.
        differences: What is not the same.
    """

    rank: int
    counts: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def num_tensors(self) -> int:
        """Tensors among what was compared."""
        return sum(count for sort, count in self.counts.items() if sort in SORTS)

    def tensor(self, sort: str, name: str, expected: torch.Tensor, live: torch.Tensor) -> None:
        """Compares a tensor with the bytes that it should have (``oracle.as_bytes``)."""
        self.counts[sort] += 1
        self.nbytes += expected.numel()
        found = as_bytes(live)
        if found.numel() != expected.numel():
            self.differs(f"{SORTS[sort]} {name}", f"{found.numel()} bytes instead of {expected.numel()}")
        elif not torch.equal(found, expected):
            wrong = (found != expected).nonzero().flatten()
            detail = f"{wrong.numel()} of {expected.numel()} bytes differ, the first at byte {int(wrong[0])}"
            self.differs(f"{SORTS[sort]} {name}", detail)

    def differs(self, name: str, detail: str) -> None:
        """Notes that something is not what it should be."""
        self.differences.append(Difference(self.rank, name, detail))

    def add(self, other: Comparison) -> None:
        """Takes in what another rank compared."""
        self.counts.update(other.counts)
        self.nbytes += other.nbytes
        self.differences += other.differences


@dataclass(frozen=True)
class Outcome:
    """What the demo found. The comparison covers all ranks; steps, moves and memory are those of the rank that has it.

    Attributes:
        size: The preset.
        device: The kind of device: ``"cuda"`` or ``"cpu"``.
        ranks: Data-parallel ranks.
        rounds: Rounds.
        steps: Training steps a round.
        versions: Versions and paths, by name.
        steps_done: Loss and gradient norm of each step, for people.
        moves: Every move in order.
        memory: Memory in use at named moments outside of moves.
        copy_bound: Bytes per second of a plain page-locked copy ``"out"`` of and ``"in"`` to the device, measured in
            the same run; empty on the CPU, where no such thing exists.
        comparison: What was compared on all ranks.
        seconds: Time the whole took.
    """

    size: Size
    device: str
    ranks: int
    rounds: int
    steps: int
    versions: Mapping[str, str]
    steps_done: tuple[str, ...]
    moves: tuple[Move, ...]
    memory: Mapping[str, MemoryFigures]
    copy_bound: Mapping[str, float]
    comparison: Comparison
    seconds: float

    @property
    def is_identical(self) -> bool:
        """Whether everything compared was the same to the last bit, and there was something to compare."""
        return self.comparison.num_tensors > 0 and not self.comparison.differences

    def as_dict(self) -> dict[str, Any]:
        """Everything in plain types that ``json`` takes."""
        return {
            "identical": self.is_identical,
            "size": dataclasses.asdict(self.size),
            "device": self.device,
            "ranks": self.ranks,
            "rounds": self.rounds,
            "steps_per_round": self.steps,
            "versions": dict(self.versions),
            "steps": list(self.steps_done),
            "moves": [{"round": m.round, "tenant": m.tenant, **m.report.as_dict()} for m in self.moves],
            "memory": {moment: dataclasses.asdict(figures) for moment, figures in self.memory.items()},
            "copy_bound_bytes_per_second": dict(self.copy_bound),
            "compared": {
                "counts": dict(self.comparison.counts),
                "tensors": self.comparison.num_tensors,
                "bytes": self.comparison.nbytes,
            },
            "differences": [dataclasses.asdict(difference) for difference in self.comparison.differences],
            "seconds": self.seconds,
        }


def sort_of(name: str) -> str:
    """The sort of a tensor of ``Trainer.named_state``."""
    if ".param." in name:
        return "weights"
    if name.endswith(".main"):
        return "main weights"
    return "moments" if name.endswith((".exp_avg", ".exp_avg_sq")) else "other states"


def versions() -> dict[str, str]:
    """What takes part, by name."""
    megatron = detect_megatron()
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    if megatron is not None:
        found |= {"megatron-core": str(megatron.version), "megatron-core path": str(megatron.path)}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
