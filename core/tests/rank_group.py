"""Ranks as processes of their own, kept for several tests, because each imports torch. Nothing here calls megastow.

The test process serves the key-value store through which the ranks find each other, on a port that the kernel chooses.
A rank runs the functions of a module of scenarios that it is asked for by name, and answers with a line each time. What
two ranks do is run by the first two of them, in a group of their own: `rank_scenarios.GROUP`.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

SECONDS = 120.0
"""How long a scenario may take."""


class RankGroup:
    """The processes, seen from the test; they are killed at the end, and when a scenario did not go well."""

    def __init__(self, world, scenarios="rank_scenarios"):
        self.world = world
        self.scenarios = scenarios
        self._processes = []

    def run(self, name, world, lost=()):
        """Run a scenario on the first ranks; fails if one of them fails, except those that are `lost` on the way."""
        if not self._processes:
            self._start()
        for process in self._processes:
            process.stdin.write(f"{name} {world}\n".encode())
            process.stdin.flush()
        deadline = time.monotonic() + SECONDS
        try:
            answers = [self._answer(process, deadline) for process in self._processes]
        except BaseException:
            self.close()
            raise
        wrong = [f"rank {r}: {a}" for r, a in enumerate(answers) if a != ("lost" if r in lost else "passed")]
        if wrong or lost:
            self.close()
        assert not wrong, "\n".join(wrong)

    def close(self):
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []

    def _start(self):
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world):
            arguments = [str(n) for n in (rank, self.world, self._store.port, self.scenarios)]
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                )
            )

    def _answer(self, process, deadline):
        """What a rank says; its answers are one at a time, so nothing is left in a buffer."""
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return f"no answer within {SECONDS:g} s"
        line = process.stdout.readline()
        return json.loads(line) if line else "lost"


def main(rank, world, port, scenarios):
    import rank_scenarios

    module = importlib.import_module(scenarios)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever we were started from
    torch.set_num_threads(1)
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SECONDS)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    groups = {size: dist.new_group(list(range(size))) for size in range(2, world + 1)}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    for line in sys.stdin:
        name, size = line.split()
        rank_scenarios.GROUP = groups[int(size)]
        answer = "passed"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                if rank < int(size):
                    getattr(module, name)()
        except BaseException:
            answer = traceback.format_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
