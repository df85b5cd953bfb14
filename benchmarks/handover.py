"""Measures the hand-over of a real megatron-core trainer: seconds, bytes, bits, and what the driver says is left.

    python benchmarks/handover.py --size 1.4b --cycles 5 --json benchmarks/results/NAME.json
    torchrun --standalone --nproc-per-node 2 benchmarks/handover.py --size 1.4b --json ...

Speed is given over the bound that a plain page-locked copy of 1 GiB reaches in the same run. After every cycle the
state is compared with a copy made before, bit for bit, outside the timed part. Nothing holds a reference to a tensor
over a move, which would keep memory alive and falsify the figures. Needs megastow, megastow-mcore,
megastow-conformance and megatron-core.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from megastow import TransferReport, create_memory_manager
from megastow.device import device_for
from megastow.report import format_bytes
from megastow_conformance import demo, megatron_core, oracle
from megastow_conformance.demo_models import SIZES, build_trainer


def main() -> int:
    """Run, print a line for each move, write the result; exit status 1 if a bit was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--prepare", action="store_true", help="make host memory ready before the first offload")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rank, world = demo.join()
    device = device_for(megatron_core.device())
    memory = {"before the model": device.memory()}
    bound = demo.copy_bound(device.torch_device, nbytes=1 << 30) if device.torch_device.type == "cuda" else {}
    if bound:
        torch.cuda.empty_cache()

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)  # noqa: T201 - it is a script

    say(f"bound: { {way: f'{speed / 1e9:.2f} GB/s' for way, speed in bound.items()} }")
    trainer = build_trainer(SIZES[arguments.size])
    for index in range(2):
        trainer.train_step(index)
    memory["trained"] = device.memory()
    before = oracle.snapshot(trainer.named_state())
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    prepare_seconds = None
    if arguments.prepare:
        start = time.perf_counter()
        manager.prepare(wait=True)
        prepare_seconds = time.perf_counter() - start
    moves: list[dict[str, Any]] = []
    lost: list[str] = []
    for cycle in range(1, arguments.cycles + 1):
        for report in (manager.offload(), manager.onload()):
            moves.append({"cycle": cycle, **report.as_dict(), **over_bound(report, bound)})
            memory[f"{report.direction}ed"] = report.after
            say(f"cycle {cycle}: {report}  {over_bound(report, bound)}")
        lost += differences(before, trainer.named_state())
    trainer.train_step(2)
    torch.distributed.barrier()  # type: ignore[attr-defined]
    verdicts: list[Any] = [None] * world
    torch.distributed.all_gather_object(verdicts, (moves, lost))  # type: ignore[attr-defined]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device.torch_device),
        "versions": demo.versions(),
        "size": arguments.size,
        "ranks": world,
        "tensors_compared": len(before),
        "bytes_compared": sum(kept.numel() for kept in before.values()),
        "differences": [difference for _, found in verdicts for difference in found],
        "copy_bound_bytes_per_second": bound,
        "prepare_seconds": prepare_seconds,
        "memory": {moment: vars(figures) for moment, figures in memory.items()},
        "steady": steady(moves),
        "moves_by_rank": [found for found, _ in verdicts],
    }
    say(f"steady, from the second cycle on: {result['steady']}")
    say(f"driver: { {moment: format_bytes(figures.driver_bytes) for moment, figures in memory.items()} }")
    say(f"allocator: { {moment: format_bytes(figures.allocated_bytes) for moment, figures in memory.items()} }")
    say(f"{len(before)} tensors, {format_bytes(result['bytes_compared'])} compared: {result['differences'] or 'equal'}")
    if arguments.json and rank == 0:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    manager.close()
    trainer.close()
    demo.leave()
    return 1 if result["differences"] else 0


def differences(before: oracle.Snapshot, now: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not what they were, to the last bit; compared on the device, one at a time."""
    found = sorted(before.keys() ^ now.keys())
    for name in before.keys() & now.keys():
        here = now[name].detach().contiguous().reshape(-1).view(torch.uint8)
        if not torch.equal(here, before[name].to(here.device)):
            found.append(name)
    return found


def over_bound(report: TransferReport, bound: dict[str, float]) -> dict[str, float]:
    """Bytes copied (gradient buffers are not) over the seconds of the whole call, and that over the bound."""
    copied = sum(kind.device_bytes for kind in report.kinds.values() if kind.host_bytes)
    speed = copied / report.seconds
    way = "out" if report.direction == "offload" else "in"
    limit = next((value for name, value in bound.items() if way in name), None)
    return {"copied_bytes_per_second": speed, **({"over_bound": speed / limit} if limit else {})}


def steady(moves: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and spread over the cycles after the first."""
    found = {}
    for direction in ("offload", "onload"):
        later = [move for move in moves if move["direction"] == direction and move["cycle"] > 1]
        for figure in ("seconds", "copied_bytes_per_second", "over_bound"):
            values = [move[figure] for move in later if figure in move]
            if values:
                spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
                found[f"{direction} {figure}"] = spread
    return found


def hardware(device: torch.device) -> dict[str, object]:
    """What it ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "device_type": device.type, "platform": platform.platform()}


if __name__ == "__main__":
    sys.exit(main())
