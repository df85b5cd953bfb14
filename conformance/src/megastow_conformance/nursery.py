"""A process that has imported torch, and forks a worker whenever it is asked for one.

Two thirds of the seconds that a worker takes to start are torch and what every Megatron imports of it, and a test run
starts hundreds. The nursery imports that once, and each worker begins where it has ended: with one thread, no tensor,
no Megatron and none of our own adapters. Nothing is ever forked from the process that runs the tests, which has threads
and has imported who knows what. Only for the CPU: a CUDA driver that has been asked anything does not survive a fork.

It is started as ``python -m megastow_conformance.nursery SOCKET``, an inherited file descriptor, and ends when nobody
has the other end of that any more.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from megastow_conformance import worker

PRELOADED = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "hypothesis.stateful",
)
"""What every worker needs sooner or later, and nothing that a row's own folder may have in another version."""

_MOST_BYTES = 1 << 20
_DEATH = -signal.SIGKILL


class Process(Protocol):
    """What the test process needs of a worker's process; ``subprocess.Popen`` has it, too."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...


class ForkedProcess:
    """A worker that the nursery has forked: no child of this process, so that the nursery tells how it ended."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self._status = status
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; ``None`` while it runs."""
        if self._code is None and select.select([self._status], [], [], 0.0)[0]:
            self._read()
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The same, when it has ended.

        Raises:
            subprocess.TimeoutExpired: If it has not within that many seconds.
        """
        if self._code is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"worker {self.pid}", timeout or 0.0)
        return self._read() if self._code is None else self._code

    def send_signal(self, sig: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def _read(self) -> int:
        """A nursery that is gone has taken its workers with it."""
        self._code = int(os.read(self._status, 64) or _DEATH)
        os.close(self._status)
        return self._code


class Nursery:
    """The process, seen from the one that runs the tests."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megastow_conformance.nursery", str(theirs.fileno())],
                cwd=tempfile.gettempdir(),
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                    "PYTHONUNBUFFERED": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                },
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._socket = ours
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process, and with it the workers that it has forked. Closing twice is fine."""
        atexit.unregister(self.close)
        self._socket.close()
        self._process.wait()

    def fork(self, connection: int, lifeline: int, log: int, folder: Path, environment: Mapping[str, str]) -> Process:
        """Forks a worker.

        Args:
            connection: The file descriptor that it serves (see ``worker.main``).
            lifeline: The one whose other end only this process has.
            log: Where its output goes.
            folder: Where it runs.
            environment: Its environment variables. What ``PYTHONPATH`` names comes first in ``sys.path``.

        Raises:
            RuntimeError: If the nursery cannot.
        """
        status, theirs = os.pipe()
        try:
            message = json.dumps({"folder": str(folder), "environment": dict(environment)}).encode()
            socket.send_fds(self._socket, [message], [connection, lifeline, log, theirs])
            answer = self._socket.recv(_MOST_BYTES).decode() or "the process that forks them has ended"
            if not answer.isdecimal():
                raise RuntimeError(f"no worker could be forked: {answer}")
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(theirs)
        return ForkedProcess(int(answer), status)


_nurseries: dict[int, Nursery] = {}


def nursery() -> Nursery:
    """The nursery of this process, started if there is none."""
    found = _nurseries.get(os.getpid())
    if found is None or not found.alive():
        found = _nurseries[os.getpid()] = Nursery()
    return found


# --- in the nursery ---------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Serves until nobody has the other end of the socket."""
    line = socket.socket(fileno=int(arguments[0]))
    for module in PRELOADED:
        with contextlib.suppress(ImportError):  # the worker will say so
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or a collection in a worker would copy every page
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    statuses: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([line.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 1 << 10)
            _tell_who_has_ended(statuses)
        if line.fileno() in ready and not _answer(line, (woken, wakes), statuses):
            return


def _tell_who_has_ended(statuses: dict[int, int]) -> None:
    for pid in list(statuses):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with contextlib.suppress(BrokenPipeError):
                os.write(statuses[pid], str(os.waitstatus_to_exitcode(status)).encode())
            os.close(statuses.pop(pid))


def _answer(line: socket.socket, others: Sequence[int], statuses: dict[int, int]) -> bool:
    """Forks a worker, which tells its process id itself once it can be found by it; false if nobody asks any more."""
    message, fds, _, _ = socket.recv_fds(line, _MOST_BYTES, 4)
    if not message:
        return False
    connection, lifeline, log, status = fds
    try:
        pid = os.fork()
    except OSError as error:
        line.send(str(error).encode())
    else:
        if pid == 0:
            for fd in (*others, status, *statuses.values()):
                os.close(fd)
            _become_worker(line, connection, lifeline, log, **json.loads(message))
        statuses[pid] = os.dup(status)
    for fd in fds:
        os.close(fd)  # so that each has one end only, that of the worker
    return True


def _become_worker(
    line: socket.socket, connection: int, lifeline: int, log: int, folder: str, environment: dict[str, str]
) -> NoReturn:
    """What ``python -m megastow_conformance.worker`` does, from where the imports are done."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        line.send(str(os.getpid()).encode())
        line.close()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:1] = [folder, *added]  # instead of the folder that the nursery was started in
        worker.main([str(connection), str(lifeline), str(os.getppid())])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
