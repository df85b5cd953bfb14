"""A process that has imported torch, and forks a worker whenever it is asked for one.

Two thirds of the seconds that a worker takes to start are torch and what every Megatron imports of it, and a test run
starts hundreds. The nursery imports that once, and each worker begins where it has ended: with one thread, no tensor,
no Megatron and none of our own adapters. Nothing is ever forked from the process that runs the tests, which has threads
and has imported who knows what. Only for the CPU: a CUDA driver that has been asked anything does not survive a fork.

There is one for ranks with an even number and one for the others: what one has forked has one order of sets and one
layout of addresses, and what comes out of that must not be the same on all ranks in the tests only.

It is started as ``python -m megastow_conformance.nursery SOCKET PARENT``, the first being an inherited file descriptor,
and ends when nobody has the other end of that any more, or its parent dies.
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

FORK_SECONDS = 120.0
"""How long it may take until a worker is forked, the imports of the first included."""

_END_SECONDS = 10.0
_MOST_BYTES = 1 << 12
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
        self._folder = tempfile.TemporaryDirectory(prefix="megastow-nursery-")  # imports look where they are made
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megastow_conformance.nursery", str(theirs.fileno()), str(os.getpid())],
                cwd=self._folder.name,
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
        with contextlib.suppress(OSError):  # closed, or the other end is gone
            self._socket.shutdown(socket.SHUT_RDWR)  # a fork of this process may have the socket, too
        self._socket.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def fork(self, connection: int, lifeline: int, log: int, folder: Path, environment: Mapping[str, str]) -> Process:
        """Forks a worker.

        Args:
            connection: The file descriptor that it serves (see ``worker.main``).
            lifeline: The one whose other end only this process has.
            log: Where its output goes.
            folder: Where it runs.
            environment: Its environment variables. What ``PYTHONPATH`` names comes first in ``sys.path``.

        Raises:
            RuntimeError: If the nursery cannot. It has ended then, as after any other exception: an answer that nobody
                has read would be taken for that to the next call.
        """
        status, theirs = os.pipe()
        try:
            with tempfile.TemporaryFile() as message:  # of any length
                message.write(json.dumps({"folder": str(folder), "environment": dict(environment)}).encode())
                message.flush()
                socket.send_fds(self._socket, [b"fork"], [connection, lifeline, log, theirs, message.fileno()])
            os.close(theirs)
            theirs = -1
            return ForkedProcess(self._answer(status), status)
        except BaseException as error:
            for fd in (status, theirs):
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._process.kill()
            self._process.wait()
            if isinstance(error, OSError):
                raise RuntimeError(f"no worker could be forked: {error}") from error
            raise

    def _answer(self, status: int) -> int:
        """The process id that a worker tells when it can be found by it."""
        ready, _, _ = select.select([self._socket.fileno(), status], [], [], FORK_SECONDS)
        if self._socket.fileno() not in ready:
            reason = f"it ended at once ({os.read(status, 64).decode()})" if ready else f"not within {FORK_SECONDS:g} s"
            raise RuntimeError(f"no worker could be forked: {reason}")
        answer = self._socket.recv(_MOST_BYTES).decode() or "the process that forks them has ended"
        if not answer.isdecimal():
            raise RuntimeError(f"no worker could be forked: {answer}")
        return int(answer)


_nurseries: dict[tuple[int, int], Nursery] = {}


def nursery(rank: int) -> Nursery:
    """The nursery of this process for a rank, started if there is none."""
    key = os.getpid(), rank % 2
    found = _nurseries.get(key)
    if found is None or not found.alive():
        found = _nurseries[key] = Nursery()
    return found


# --- in the nursery ---------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Serves until nobody has the other end of the socket."""
    line, parent = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    worker.die_with(parent)
    for module in PRELOADED:
        with contextlib.suppress(Exception):  # the worker will say so
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
    try:
        asked, fds, _, _ = socket.recv_fds(line, _MOST_BYTES, 5)
    except ConnectionResetError:
        return False
    if not asked:
        return False
    connection, lifeline, log, status, message = fds
    me = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        line.send(str(error).encode())
    else:
        if pid == 0:
            for fd in (*others, status, *statuses.values()):
                os.close(fd)
            _become_worker(line, me, connection, lifeline, log, message)
        statuses[pid] = os.dup(status)
    for fd in fds:
        os.close(fd)  # so that each has one end only, that of the worker
    return True


def _become_worker(
    line: socket.socket, parent: int, connection: int, lifeline: int, log: int, message: int
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
        os.lseek(message, 0, os.SEEK_SET)
        with open(message, encoding="utf-8") as file:
            asked = json.load(file)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:1] = [asked["folder"], *added]  # instead of the folder that the nursery was started in
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # Python does so with its own generator
        worker.main([str(connection), str(lifeline), str(parent)])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
