"""Device memory over time, looked at by a thread while something else happens. Never while something is timed."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from megastow.device import Device
from megastow_conformance.bench.result import Sample, Timeline

_INTERVAL_SECONDS = 0.002


class Sampler:
    """Takes samples for the length of a ``with`` block."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._samples: list[Sample] = []
        self._phases: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="megastow-bench-sampler", daemon=True)
        self._start = time.perf_counter()

    def begin(self, phase: str) -> None:
        """A phase begins now."""
        self._phases[phase] = time.perf_counter() - self._start
        self._look()

    def timeline(self) -> Timeline:
        """What was seen."""
        return Timeline(tuple(sorted(self._samples, key=lambda sample: sample.seconds)), dict(self._phases))

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        figures = self._device.memory()
        seconds = time.perf_counter() - self._start
        self._samples.append(Sample(seconds, figures.driver_bytes, figures.allocated_bytes))
