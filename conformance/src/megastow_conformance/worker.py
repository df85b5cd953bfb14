"""One rank of a worker group: a process that loads one Megatron release and runs checks until it is killed.

Why a process of its own: two Megatron releases cannot be loaded in one process, a use of released memory ends in a
segmentation fault, and a deadlock in a collective can only be ended from outside. It is started as
``python -m megastow_conformance.worker CONNECTION LIFELINE PARENT``, the first two being inherited file descriptors.

stdout and stderr go to a log that the test process shows when a check fails; they are no part of the protocol.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib.metadata
import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from megastow_conformance import harness as harnesses
from megastow_conformance.case import Case, Check, CheckSkipped, resolve
from megastow_conformance.harness import Harness
from megastow_conformance.messages import Reply, Request, Setup

if TYPE_CHECKING:
    import torch

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Serves one group until the test process closes the connection or dies."""
    connection_fd, lifeline_fd, parent = (int(argument) for argument in arguments)
    _die_with_parent(lifeline_fd, parent)
    faulthandler.enable()
    status = 0
    try:
        _serve(Connection(connection_fd))
    except (EOFError, BrokenPipeError):
        pass  # the test process is gone, or wants no more
    except BaseException:
        traceback.print_exc()
        status = 1
    # No interpreter shutdown: it could wait for ever for a communication thread, and nothing here is worth it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _die_with_parent(lifeline_fd: int, parent: int) -> None:
    """Makes sure that this process never outlives the test process, however that one ends.

    The kernel's own signal works even while a C call holds the interpreter lock, but exists only on Linux; the pipe,
    whose other end only the test process has, works everywhere.
    """
    die_with(parent)

    def watch() -> None:
        os.read(lifeline_fd, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="megastow-lifeline", daemon=True).start()


def die_with(parent: int) -> None:
    """Has the kernel end this process when its parent dies, where it can; at once if that is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(connection: Connection) -> None:
    """Sets up, then answers each request."""
    setup: Setup = connection.recv()
    # All Python stacks go to this file on SIGUSR1, also while a collective hangs in C. It stays open for that.
    stacks = open(setup.stacks, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    sys.path.extend(entry for entry in setup.sys_path if entry not in sys.path)
    try:
        harness, device = _set_up(setup)
    except BaseException as error:
        connection.send(_failure(error))
        return
    connection.send(Reply("passed"))
    while True:
        message = connection.recv_bytes()
        connection.send(_answer(message, setup, harness, device))


def _set_up(setup: Setup) -> tuple[Harness, torch.device]:
    """Loads Megatron and joins the process group."""
    _list_what_is_installed_once()
    import torch

    torch.set_num_threads(1)
    if setup.device == "cuda":
        device = torch.device("cuda", setup.rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    harness = harnesses.find(setup.harness)
    dist: Any = torch.distributed  # it declares no exports
    store = dist.HashStore() if setup.world == 1 else dist.FileStore(setup.store, setup.world)
    harness.load()
    harness.init_distributed(setup.rank, setup.world, store)
    return harness, device


def _list_what_is_installed_once() -> None:
    """Remembers entry points: each new manager asks for the adapters, and nothing is installed while a worker lives.

    megastow must not have been imported yet: it takes the function as it finds it.
    """
    setattr(importlib.metadata, "entry_points", functools.cache(importlib.metadata.entry_points))  # noqa: B010


def _find_check(path: str) -> Check:
    """The check of a name; what it imports is taken out of the garbage collector's sight.

    Garbage is collected at least twice a check, which would walk all of that each time.
    """
    known = len(sys.modules)
    check: Check = resolve(path)
    if len(sys.modules) > known:
        gc.collect()
        gc.freeze()
    return check


def _answer(message: bytes, setup: Setup, harness: Harness, device: torch.device) -> Reply:
    """Runs the check that a message asks for.

    After a failure nothing is closed, unless the group is to last: closing could wait for a rank that will never come,
    and the process is killed anyway.
    """
    case: Case | None = None
    try:
        request: Request = pickle.loads(message)
        check = _find_check(f"{request.module}:{request.name}")
        case = Case(
            harness,
            request.scenario,
            rank=setup.rank,
            world=setup.world,
            row=setup.row,
            device=device,
            subject=request.subject,
        )
        try:
            check(case, **request.parameters)
        except CheckSkipped as skipped:
            case.close()
            return Reply("skipped", str(skipped))
        case.close()
        reply = Reply("passed")
    except BaseException as error:
        reply = _failure(error)
        if not setup.lasting:
            return reply
        traceback.clear_frames(error.__traceback__)
        with contextlib.suppress(Exception):
            if case is not None:
                case.close()
    gc.collect()
    return reply


def _failure(error: BaseException) -> Reply:
    """The reply for an exception, without this module's own frame."""
    trace = error.__traceback__
    if trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return Reply("failed", "".join(traceback.format_exception(type(error), error, trace)))


if __name__ == "__main__":
    main(sys.argv[1:])
