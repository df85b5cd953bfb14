"""How long each kind's part of a move takes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from megastow.device import Device, Stopwatch
from megastow.state import StateKind


class KindClock:
    """Seconds that each kind's part of a move took, on the host and on the copy streams."""

    def __init__(self) -> None:
        self._host: defaultdict[StateKind, float] = defaultdict(float)
        self._watches: list[tuple[StateKind, Stopwatch]] = []

    @contextlib.contextmanager
    def running(self, kind: StateKind) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._host[kind] += time.perf_counter() - start

    def add(self, kind: StateKind, seconds: float) -> None:
        self._host[kind] += seconds

    @contextlib.contextmanager
    def copying(self, kind: StateKind, device: Device) -> Iterator[None]:
        watch = device.stopwatch()
        self._watches.append((kind, watch))
        yield
        watch.stop()

    def seconds(self) -> Mapping[StateKind, float]:
        """By kind; valid once the copies have been confirmed."""
        found = defaultdict(float, self._host)
        for kind, watch in self._watches:
            found[kind] += watch.seconds()
        return found
