"""Runs checks in fresh worker processes, one a rank, and turns whatever becomes of them into a verdict.

A conformance check can hang in a collective, crash the interpreter or poison a CUDA context. None of that may hang or
crash the test run, be mistaken for a pass, or touch the next test: workers are never forked from the test process (see
``nursery``), every check has a time limit, and after anything but a clean end the whole group is killed and the next
check gets a new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from megastow_conformance.case import Check
from megastow_conformance.messages import DEFAULT_SUBJECT, Device, Reply, Request, Setup, Verdict
from megastow_conformance.nursery import Process, nursery
from megastow_conformance.rows import Row
from megastow_conformance.scenarios import Scenario

CHECK_SECONDS = 120.0
"""How long a check may take."""

START_SECONDS = 180.0
"""How long a group may take to load Megatron and find its ranks."""

GRACE_SECONDS = 5.0
"""How long the other ranks may still take when one has failed."""

_LOG_LINES = 60
"""How much of a worker's output a failure shows."""

_End = Literal["passed", "skipped", "failed", "crashed", "hung", "waiting"]


@dataclass(frozen=True)
class RankOutcome:
    """What became of one rank.

    Attributes:
        rank: The rank.
        end: ``"crashed"``: the process died; ``"hung"``: it was over the time limit; ``"waiting"``: it was still busy a
            while after another rank had failed, most often in a collective.
        detail: Traceback, reason of a skip, or how the process died.
        stacks: The Python stacks of a rank that had to be killed.
        log: The last lines that the rank wrote to stdout and stderr.
    """

    rank: int
    end: _End
    detail: str = ""
    stacks: str = ""
    log: str = ""

    def report(self) -> str:
        """The rank's part of a failure, for people."""
        words = {
            "waiting": "was still busy after the failure, and was killed",
            "hung": "did not finish, and was killed",
        }
        parts = [f"rank {self.rank} {words.get(self.end, self.end)}", self.detail.rstrip()]
        if self.stacks:
            parts.append(f"--- stacks of rank {self.rank} ---\n{self.stacks.rstrip()}")
        if self.log and self.end != "passed":
            parts.append(f"--- last output of rank {self.rank} ---\n{self.log.rstrip()}")
        return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Outcome:
    """What became of a check.

    Attributes:
        what: What was asked for.
        ranks: One entry a rank, the most telling first.
        seconds: How long it took, the start of the group included.
    """

    what: str
    ranks: tuple[RankOutcome, ...]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Passed or skipped if every rank says so, else failed."""
        ends = {rank.end for rank in self.ranks}
        if ends == {"passed"}:
            return "passed"
        return "skipped" if ends == {"skipped"} else "failed"

    @property
    def reason(self) -> str:
        """The outcome in one line: the last that the most telling rank says; empty if there is nothing to say."""
        return "".join(self.ranks[0].detail.rstrip().splitlines()[-1:])

    def report(self) -> str:
        """The whole outcome, for people."""
        if self.verdict == "skipped":
            return self.ranks[0].detail
        first = self.ranks[0]
        headline = f"{self.what}: rank {first.rank} {first.end}{self.reason and ': '}{self.reason}"
        return "\n\n".join([headline, *(rank.report() for rank in self.ranks)])


class WorkerGroup:
    """The worker processes of one row and world size, kept alive between checks because loading Megatron takes seconds.

    Args:
        row: The Megatron release. A row without a path starts workers that find only what this process finds.
        world: The number of ranks.
        device: The device type to run on.
        harness: The module that initialises Megatron and builds trainers (see ``case.Harness``).
        subject: What is under test, as ``module:name`` (see ``case.Subject``).
        lasting: Keep the workers after a check that failed cleanly, for those who expect failures by the dozen: what
            follows may find what the failure has left behind. Only for one rank, since others might still wait for it.
        start_seconds: The time limit for the start.
        grace_seconds: How long the other ranks may still take when one has failed.
    """

    def __init__(
        self,
        row: Row,
        world: int,
        *,
        device: Device = "cpu",
        harness: str = "megastow_conformance.megatron_core",
        subject: str = DEFAULT_SUBJECT,
        lasting: bool = False,
        start_seconds: float = START_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        if lasting and world != 1:
            raise ValueError(f"a group of {world} ranks cannot last beyond a failure; expected one rank")
        self.row = row
        self.world = world
        self.device = device
        self.subject = subject
        self._lasting = lasting
        self._harness = harness
        self._start_seconds = start_seconds
        self._grace_seconds = grace_seconds
        self._workers: list[_Worker] = []
        self._folder: Path | None = None

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers; none when the group is not running."""
        return [worker.process.pid for worker in self._workers]

    def run(
        self,
        check: Check,
        scenario: Scenario,
        *,
        seconds: float = CHECK_SECONDS,
        parameters: dict[str, Any] | None = None,
        subject: str | None = None,
    ) -> Outcome:
        """Runs a check on every rank.

        Args:
            check: A function at the top level of a module that workers can import.
            scenario: What it trains.
            seconds: The time limit.
            parameters: Keyword arguments for the check; they are pickled.
            subject: What is under test, if not what the group was made for.

        Returns:
            What became of it. After anything but passed or skipped the group has been killed, unless it is lasting and
            the check merely failed.
        """
        request = Request(check.__module__, check.__qualname__, scenario, parameters or {}, subject or self.subject)
        begin = time.monotonic()
        try:
            if any(not worker.alive() for worker in self._workers):
                self.close()
            ranks = None if self._workers else self._start()
            if ranks is None:
                for worker in self._workers:
                    worker.ask(request)
                ranks = self._collect(seconds)
                what = str(request)
            else:
                what = f"start of {self.row.id} with {self.world} rank(s)"
            outcome = Outcome(what, ranks, time.monotonic() - begin)
        except BaseException:
            self.close()  # interrupted: nobody knows what the workers are doing
            raise
        if outcome.verdict == "failed" and not (self._lasting and outcome.ranks[0].end == "failed"):
            self.close()
        return outcome

    def close(self) -> None:
        """Kills the workers. They hold nothing that would be worth a farewell."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> tuple[RankOutcome, ...] | None:
        """Starts the workers; returns what became of them if one could not be set up."""
        self._folder = Path(tempfile.mkdtemp(prefix="megastow-"))
        for rank in range(self.world):
            worker = _Worker(rank, self._folder, _environment(self.row, self.device, rank, self.world), self.device)
            self._workers.append(worker)
            worker.ask(
                Setup(
                    row=self.row,
                    rank=rank,
                    world=self.world,
                    device=self.device,
                    harness=self._harness,
                    store=str(self._folder / "store"),
                    stacks=str(worker.stacks),
                    sys_path=tuple(str(Path(entry).absolute()) for entry in sys.path),
                    lasting=self._lasting,
                )
            )
        ranks = self._collect(self._start_seconds)
        return None if all(rank.end == "passed" for rank in ranks) else ranks

    def _collect(self, seconds: float) -> tuple[RankOutcome, ...]:
        """Waits for every rank's reply, for at most ``seconds``, and only a little once a rank has failed."""
        deadline = time.monotonic() + seconds
        waiting = {worker.connection: worker for worker in self._workers}
        ends: list[RankOutcome] = []
        failed = False
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                outcome = waiting.pop(connection).reply()
                ends.append(outcome)
                if outcome.end in ("failed", "crashed") and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + self._grace_seconds)
        end: _End = "waiting" if failed else "hung"
        detail = "" if failed else f"no answer within {seconds:g} s"
        for worker in waiting.values():
            worker.dump_stacks()
        ends += [worker.outcome(end, detail, stacks=worker.read_stacks()) for worker in waiting.values()]
        telling = ("crashed", "failed", "hung", "waiting", "skipped", "passed")
        return tuple(sorted(ends, key=lambda rank: telling.index(rank.end)))


class _Worker:
    """One worker process, seen from the test process.

    Args:
        rank: Its rank.
        folder: Where its log and its stacks go, and where it runs.
        environment: Its environment variables.
        device: The device type that it runs on.
    """

    def __init__(self, rank: int, folder: Path, environment: dict[str, str], device: Device) -> None:
        self.rank = rank
        self.log = folder / f"rank{rank}.log"
        self.stacks = folder / f"rank{rank}.stacks"
        self._log_start = 0
        self.connection, theirs = Pipe()
        # Only this process holds the other end of the lifeline, so its end of file means that this process is gone.
        lifeline, self._lifeline = os.pipe()
        try:
            with self.log.open("wb") as log:
                start = nursery(rank).fork if device == "cpu" and sys.platform == "linux" else _spawn
                self.process = start(theirs.fileno(), lifeline, log.fileno(), folder, environment)
        finally:
            theirs.close()
            os.close(lifeline)

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def ask(self, message: Setup | Request) -> None:
        """Sends a message; a worker that is dead is found out by its reply."""
        self._log_start = self.log.stat().st_size
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(message)

    def reply(self) -> RankOutcome:
        """Reads the reply that is ready, or finds that the process died instead."""
        try:
            reply: Reply = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return self.outcome("crashed", self._how_it_died())
        return self.outcome(reply.verdict, reply.detail)

    def outcome(self, end: _End, detail: str, stacks: str = "") -> RankOutcome:
        """The rank's outcome, with what it wrote since it was last asked something."""
        return RankOutcome(self.rank, end, detail, stacks, self._log_tail())

    def dump_stacks(self) -> None:
        """Asks a hanging process for its stacks; works while it hangs in C, too."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def read_stacks(self, seconds: float = 3.0) -> str:
        """The stacks that were asked for, once they stop growing."""
        deadline = time.monotonic() + seconds
        text = ""
        while time.monotonic() < deadline:
            time.sleep(0.1)
            now = self.stacks.read_text(encoding="utf-8", errors="replace") if self.stacks.exists() else ""
            if now and now == text:
                break
            text = now
        return text or "(none: the process did not answer the signal)"

    def kill(self) -> None:
        """Ends the process and whatever it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        os.close(self._lifeline)

    def _how_it_died(self) -> str:
        try:
            status = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "it closed its connection, but still runs"
        if status >= 0:
            return f"the process ended with exit status {status}"
        return f"the process was ended by {signal.Signals(-status).name}"

    def _log_tail(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        cut = [f"... {len(lines) - _LOG_LINES} lines before these ..."] if len(lines) > _LOG_LINES else []
        return "\n".join(cut + lines[-_LOG_LINES:])


def _spawn(connection: int, lifeline: int, log: int, folder: Path, environment: dict[str, str]) -> Process:
    """Starts a worker from nothing."""
    return subprocess.Popen(
        [sys.executable, "-m", "megastow_conformance.worker", str(connection), str(lifeline), str(os.getpid())],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        pass_fds=(connection, lifeline),
        start_new_session=True,
    )


def _environment(row: Row, device: Device, rank: int, world: int) -> dict[str, str]:
    """A worker's environment: the row's Megatron first, one thread, one host, repeatable arithmetic."""
    environment = dict(os.environ)
    path = [str(row.path)] if row.path is not None else []
    if "PYTHONPATH" in environment:
        path.append(environment["PYTHONPATH"])
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(path)
    environment.update(
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        PYTHONUNBUFFERED="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
    )
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if sys.platform == "linux":
        # All ranks are on this host; a host name that does not resolve must not matter.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
