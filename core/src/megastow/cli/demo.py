"""``megastow demo``: starts the ranks, sees that they end, and tells what came out.

What trains and moves is in ``megastow_conformance.demo``, because core knows no Megatron. One rank runs in this
process. Several are started by torch's elastic agent, the one behind ``torchrun``, each as this same command; started
by torchrun itself, the command takes part as the rank it is given.

A hang must be a loud failure: every rank has a time limit of its own, after which it prints where it stands and exits,
and the agent then ends the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import traceback
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import megastow
from megastow.cli.console import Narrator, SilentNarrator, make_console
from megastow.cli.tables import moves_table, verdict

if TYPE_CHECKING:
    from megastow_conformance.demo_models import Size

IDENTICAL, DIFFERENT, UNFINISHED = 0, 1, 3
_RANK_DIFFERENT = 11  # what one of several ranks ends with: 1 is also what Python ends with after an uncaught exception

_GRACE_SECONDS = 10
_M_MMAP_THRESHOLD = -3  # from malloc.h
_PR_SET_PDEATHSIG = 1  # from sys/prctl.h


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
        size: Name of a preset.
        ranks: Processes to start.
        rounds: Rounds.
        steps: Training steps a round.
        json_file: Where to write everything, or None.
        time_limit: Seconds until the demo counts as hung; None for the preset's own.
    """

    size: str
    ranks: int
    rounds: int
    steps: int
    json_file: Path | None
    time_limit: int | None


def run_demo(settings: Settings) -> int:
    """Runs the demo, as the parent of several ranks, as one of them, or as the only one.

    Returns:
        The exit status: 0 if everything was identical, 1 if not, 3 if the demo could not be finished.
    """
    problem = _what_is_missing(settings)
    if problem is not None:
        print(f"megastow demo: {problem}", file=sys.stderr)
        return UNFINISHED
    _prepare_environment()
    if _is_started_by_torchrun():
        _die_with_parent()
        status = _run_rank(settings)
        sys.stdout.flush()
        sys.stderr.flush()
        if status == UNFINISHED:
            os._exit(status)  # an ordinary end could wait for ranks that never come
        return _RANK_DIFFERENT if status == DIFFERENT else status
    return _run_rank(settings) if settings.ranks == 1 else _launch(settings)


def _is_started_by_torchrun() -> bool:
    dist: Any = torch.distributed  # it declares no exports
    return bool(dist.is_torchelastic_launched())


def _die_with_parent() -> None:
    """Has the kernel end this rank when the process that started it is gone, even by a signal it could not catch."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _what_is_missing(settings: Settings) -> str | None:
    """Why the demo cannot run here, and what to do; None if it can."""
    try:
        from megastow_conformance.demo_models import SIZES
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("megastow_conformance"):
            raise
        return 'the trainer it trains is in megastow-conformance, which is missing: pip install "megastow[demo]"'
    if settings.size not in SIZES:
        return f"there is no size {settings.size!r}; there are {', '.join(SIZES)}"
    if megastow.detect_megatron() is None:
        return (
            "no Megatron is on the import path: pip install megatron-core numpy, or put a tree of it on PYTHONPATH "
            "(`nox -s demo` in megastow's repository does all of that in an environment of its own)"
        )
    if torch.cuda.is_available() and settings.ranks > torch.cuda.device_count():
        return (
            f"{settings.ranks} ranks need as many GPUs, and there are {torch.cuda.device_count()}: pass fewer --ranks, "
            'or hide the GPUs (CUDA_VISIBLE_DEVICES="") to run on the CPU'
        )
    return None


def _prepare_environment() -> None:
    """Settings that must stand before CUDA, gloo or a child process starts; what the user has set stays."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products that repeat bit for bit
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.platform == "linux":  # all ranks are on this host, whose own name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not torch.cuda.is_available():
        _return_freed_memory_at_once()
    warnings.simplefilter("ignore")  # what Megatron and torch have to say of each other helps nobody here


def _return_freed_memory_at_once() -> None:
    """Lets the resident memory show what is released: by itself, glibc keeps freed blocks of less than 32 MiB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library may have no such function
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 << 10)


# --- one rank ---------------------------------------------------------------------------------------------------------


def _run_rank(settings: Settings) -> int:
    """Takes part as one rank, or alone; rank 0 tells what happens and what came out."""
    from megastow_conformance import demo
    from megastow_conformance.demo_models import SIZES

    size = SIZES[settings.size]
    is_first = not _is_started_by_torchrun() or os.environ.get("RANK") == "0"
    console = make_console() if is_first else Console(quiet=True)
    narrator: Narrator | SilentNarrator = SilentNarrator()
    with _limited(settings.time_limit or size.seconds):
        try:
            if is_first:
                console.print(_headline(), markup=False, soft_wrap=True)
            console.print("loading megatron-core ...", markup=False)
            _rank, world = demo.join()
            console.print(_plan(settings, size, world), markup=False, soft_wrap=True)
            if is_first:
                narrator = Narrator(console, demo.num_activities(settings.rounds, settings.steps))
            outcome = demo.run(size, rounds=settings.rounds, steps=settings.steps, listener=narrator)
            narrator.close()
            console.print(moves_table(outcome))
            if is_first and settings.json_file is not None:
                settings.json_file.write_text(json.dumps(outcome.as_dict(), indent=2) + "\n", encoding="utf-8")
                console.print(f"everything is in {settings.json_file}", markup=False, soft_wrap=True)
            console.print(verdict(outcome), markup=False, soft_wrap=True)
            sys.stdout.flush()
            demo.leave()
        except Exception as error:
            narrator.close()
            traceback.print_exc()
            print(f"megastow demo: not finished: {type(error).__name__}: {error}", file=sys.stderr)
            return UNFINISHED
    return IDENTICAL if outcome.is_identical else DIFFERENT


def _headline() -> str:
    """Versions and device, in one line."""
    megatron = megastow.detect_megatron()
    assert megatron is not None
    device = f"{torch.cuda.get_device_name()}, NCCL" if torch.cuda.is_available() else "CPU (no CUDA device), gloo"
    return (
        f"megastow {megastow.__version__}, torch {torch.__version__}, megatron-core {megatron.version} "
        f"({megatron.path}), {device}"
    )


def _plan(settings: Settings, size: Size, world: int) -> str:
    """What is about to happen."""
    return (
        f"size {size.name}: a GPT of {size.num_parameters / 1e6:.3g} million parameters ({size.layers} layers of "
        f"{size.hidden}, {size.heads} heads, {size.sequence} tokens a sequence), bf16 with fp32 main weights, Adam in "
        f"Megatron's DistributedOptimizer; {world} rank{'s' * (world > 1)}, {settings.rounds} rounds of "
        f"{settings.steps} steps"
    )


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Ends the process with status 3 and every thread's stack if it is still in here after that time."""

    def end() -> None:
        print(
            f"\nmegastow demo: not finished after {seconds} s, so it counts as hung; is another rank gone? "
            "(--time-limit gives it longer.) Where every thread stood:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(UNFINISHED)

    faulthandler.enable()
    # The timer needs the interpreter; if C code never gives that back, faulthandler's own thread ends the process.
    faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True)
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


# --- several ranks ----------------------------------------------------------------------------------------------------


def _launch(settings: Settings) -> int:
    """Starts the ranks with torch's elastic agent on a free port, and waits; no rank outlives this call."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten_the_agent()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=settings.ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 60},
        max_restarts=0,
        monitor_interval=0.2,
        local_addr="localhost",
    )
    make_console().print(f"starting {settings.ranks} ranks ...", markup=False)
    try:
        elastic_launch(config, sys.executable)(*_command(settings))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        # All ranks come to the same verdict, but the agent ends the others as soon as the first has said so.
        if _RANK_DIFFERENT in codes.values() and set(codes.values()) <= {_RANK_DIFFERENT, -signal.SIGTERM}:
            return DIFFERENT
        found = ", ".join(f"rank {rank} with status {code}" for rank, code in sorted(codes.items()))
        print(f"megastow demo: not finished: {found} (a negative status is a signal)", file=sys.stderr)
        return UNFINISHED
    except SignalException as stopped:
        print(f"megastow demo: ended by signal {stopped.sigval.name}, and all ranks with it", file=sys.stderr)
        return 128 + stopped.sigval.value
    return IDENTICAL


def _command(settings: Settings) -> list[str]:
    """What each rank's interpreter is given."""
    command = ["-m", "megastow.cli", "demo", f"--size={settings.size}", f"--ranks={settings.ranks}"]
    command += [f"--rounds={settings.rounds}", f"--steps={settings.steps}"]
    if settings.json_file is not None:
        command.append(f"--json={settings.json_file}")
    if settings.time_limit is not None:
        command.append(f"--time-limit={settings.time_limit}")
    return command


def _quieten_the_agent() -> None:
    """The agent's log says in fifty lines what one of ours says."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
