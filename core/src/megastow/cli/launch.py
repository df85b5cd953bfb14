"""Commands that run as one rank or as several: who starts them, how long they may take, and how they end.

One rank runs in this process. Several are started by torch's elastic agent, the one behind ``torchrun``, each as this
same command; started by torchrun itself, the command takes part as the rank it is given.

A hang must be a loud failure: every rank has a time limit of its own, after which it prints where it stands and exits,
and the agent then ends the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import megastow
from megastow import machine
from megastow.cli import gpus
from megastow.cli.console import make_console

IDENTICAL, DIFFERENT, UNFINISHED = 0, 1, 3
_RANK_DIFFERENT = 11  # what one of several ranks ends with: 1 is also what Python ends with after an uncaught exception

_GRACE_SECONDS = 10
_M_MMAP_THRESHOLD = -3  # from malloc.h
_PR_SET_PDEATHSIG = 1  # from sys/prctl.h


@dataclass(frozen=True)
class Job:
    """A command that runs as one rank or as several.

    Attributes:
        command: Its name.
        arguments: What each rank is given after the name; the same that this process was given.
        ranks: Processes to start.
        run_rank: Takes part as one rank, or alone, and returns the exit status.
    """

    command: str
    arguments: Sequence[str]
    ranks: int
    run_rank: Callable[[], int]


def run_job(job: Job) -> int:
    """Runs a job, as the parent of several ranks, as one of them, or as the only one.

    Returns:
        The exit status: 0 if everything was identical, 1 if not, 3 if it could not be finished.
    """
    _prepare_environment()
    if is_started_by_torchrun():
        _die_with_parent()
        status = job.run_rank()
        sys.stdout.flush()
        sys.stderr.flush()
        if status == UNFINISHED:
            os._exit(status)  # an ordinary end could wait for ranks that never come
        return _RANK_DIFFERENT if status == DIFFERENT else status
    return job.run_rank() if job.ranks == 1 else _launch(job)


def what_is_missing(size: str, ranks: int) -> str | None:
    """Why a command that trains cannot run here, and what to do; None if it can."""
    try:
        from megastow_conformance.demo_models import SIZES
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("megastow_conformance"):
            raise
        return (
            'the trainer it trains is in megastow-conformance, which is missing: install the extra "demo" '
            '(in a clone: pip install -e "core[demo]" -e adapters/mcore -e conformance)'
        )
    if size not in SIZES:
        return f"there is no size {size!r}; there are {', '.join(SIZES)}"
    if megastow.detect_megatron() is None:
        return (
            "no Megatron is on the import path: pip install megatron-core numpy, or put a tree of it on PYTHONPATH "
            "(`nox -s demo` in megastow's repository does all of that in an environment of its own)"
        )
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        return (
            f"{ranks} ranks need as many GPUs, and there are {torch.cuda.device_count()}: pass fewer --ranks, "
            'or hide the GPUs (CUDA_VISIBLE_DEVICES="") to run on the CPU'
        )
    return None


def what_cannot_be_written(files: Iterable[Path | None]) -> str | None:
    """Which file a command could not make at its end, and why; None if all can be."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            return f"{file} cannot be written: there is no folder {file.absolute().parent}. Make it, or name another"
    return None


def headline() -> str:
    """Versions and device, in one line."""
    megatron = megastow.detect_megatron()
    assert megatron is not None
    device = "no CUDA device, gloo"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, driver {gpus.find_driver().version or 'unknown'}, NCCL"
    return (
        f"megastow {megastow.__version__}, torch {torch.__version__}, megatron-core {megatron.version} "
        f"({megatron.path}), {machine.cpu_model() or 'CPU'}, {device}"
    )


def is_started_by_torchrun() -> bool:
    """Whether this process is one of several ranks."""
    dist: Any = torch.distributed  # it declares no exports
    return bool(dist.is_torchelastic_launched())


def is_first_rank() -> bool:
    """Whether this process is the one that tells what happens."""
    return not is_started_by_torchrun() or os.environ.get("RANK") == "0"


@contextlib.contextmanager
def limited(command: str, seconds: float) -> Iterator[None]:
    """Ends the process with status 3 and every thread's stack if it is still in here after that time."""

    def end() -> None:
        print(
            f"\nmegastow {command}: not finished after {seconds:.0f} s, so it counts as hung; is another rank gone? "
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


def _die_with_parent() -> None:
    """Has the kernel end this rank when the process that started it is gone, even by a signal it could not catch."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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


# --- several ranks ----------------------------------------------------------------------------------------------------


def _launch(job: Job) -> int:
    """Starts the ranks with torch's elastic agent on a free port, and waits; no rank outlives this call."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quieten_the_agent()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 60},
        max_restarts=0,
        monitor_interval=0.2,
        local_addr="localhost",
    )
    make_console().print(f"starting {job.ranks} ranks ...", markup=False)
    try:
        elastic_launch(config, sys.executable)("-m", "megastow.cli", job.command, *job.arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        # All ranks come to the same verdict, but the agent ends the others as soon as the first has said so.
        if _RANK_DIFFERENT in codes.values() and set(codes.values()) <= {_RANK_DIFFERENT, -signal.SIGTERM}:
            return DIFFERENT
        found = ", ".join(f"rank {rank} with status {code}" for rank, code in sorted(codes.items()))
        print(f"megastow {job.command}: not finished: {found} (a negative status is a signal)", file=sys.stderr)
        return UNFINISHED
    except SignalException as stopped:
        print(f"megastow {job.command}: ended by signal {stopped.sigval.name}, and all ranks with it", file=sys.stderr)
        return 128 + stopped.sigval.value
    return IDENTICAL


def _quieten_the_agent() -> None:
    """The agent's log says in fifty lines what one of ours says."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
