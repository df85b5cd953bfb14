"""The accelerator behind torch: memory figures, streams, page-locking. CUDA, and the CPU for development.

All that differs between the two lives here, so that no other module asks which it is. On the CPU backend "device"
memory is ordinary memory: storages are released and filled all the same, and whoever touches one while it is away
crashes, which makes it a fair place to test.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch

from megastow import machine
from megastow.errors import HostMemoryError, InvalidArgumentError
from megastow.report import MemoryFigures, format_bytes

logger = logging.getLogger(__name__)


class Direction(enum.Enum):
    """Which way copies go."""

    OUT = "out"
    IN = "in"


class Stopwatch(ABC):
    """Seconds between two moments on a copy stream."""

    @abstractmethod
    def stop(self) -> None:
        """Mark the end. On CUDA it is marked on the stream and comes to pass later."""

    @abstractmethod
    def seconds(self) -> float:
        """Seconds between start and stop; valid once the copies have been waited for."""


class Work(Protocol):
    """A collective under way, as torch hands it out."""

    def is_completed(self) -> bool: ...
    def wait(self, timeout: timedelta = ...) -> object: ...


class Arrival(ABC):
    """A moment on a stream that can be waited for."""

    @abstractmethod
    def wait(self) -> None:
        """Return when everything that was queued before it has arrived; errors of it surface here."""


@dataclass(frozen=True)
class Block:
    """Memory that torch's allocator has handed out: address, and bytes as rounded by it."""

    address: int
    nbytes: int


@dataclass(frozen=True)
class Segment:
    """Memory that torch's allocator has from the driver in one piece.

    Attributes:
        address: where it begins.
        nbytes: its size.
        page_bytes: what of it can go back on its own, counted from its beginning: all of it, unless it is expandable.
        is_private: whether it belongs to a pool of its own, as those of CUDA graphs; it goes back with that.
        blocks: what of it is handed out.
    """

    address: int
    nbytes: int
    page_bytes: int
    is_private: bool
    blocks: tuple[Block, ...]


class Device(ABC):
    """One accelerator. Methods synchronise with the device only where they say so."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work on every stream of the device; errors of earlier work surface here."""

    @abstractmethod
    def synchronize_stream(self) -> None:
        """Wait for the work on the caller's stream only; errors of earlier work surface here."""

    @abstractmethod
    def memory(self) -> MemoryFigures:
        """Memory in use now."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Device memory that an allocation could get now, torch's own caches included; None if unknown."""

    @abstractmethod
    def segments(self) -> Sequence[Segment] | None:
        """What torch's allocator holds, piece by piece; None where it cannot tell. Does not synchronise."""

    @abstractmethod
    def blas_workspace_bytes(self) -> int | None:
        """The size of the workspace that torch gives to the BLAS library, one a stream; None if there is none."""

    def is_home_of(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage takes memory of the device."""
        return storage.device == self.torch_device

    @abstractmethod
    def release_cached(self) -> None:
        """Give memory that torch caches back to the driver."""

    @property
    @abstractmethod
    def frees_beside_copies(self) -> bool:
        """Whether memory goes back to the driver without waiting for copies in flight."""

    @abstractmethod
    def copying(self, direction: Direction) -> contextlib.AbstractContextManager[object]:
        """Queue copies on the copy stream of a direction for the length of the context.

        They begin when the work that the caller's stream has by now is done.
        """

    @abstractmethod
    def arrival(self) -> Arrival:
        """The moment when what is queued by now on the current stream of this device is done."""

    @abstractmethod
    def beside(self, after: Arrival | None = None) -> contextlib.AbstractContextManager[object]:
        """Queue work on what was copied on a stream of its own, for the length of the context; call within `copying`.

        It begins when the copies queued so far have arrived, and no later copy waits for it.

        Args:
            after: begin at this moment already, an `arrival` of before.
        """

    @abstractmethod
    def gathering(self, after: Arrival | None = None) -> contextlib.AbstractContextManager[object]:
        """As `beside`, for collectives, which may be stuck, and what needs them: nobody else waits behind those."""

    @abstractmethod
    def filling(self) -> contextlib.AbstractContextManager[object]:
        """Queue work on memory that no copy touches, beside the copies, for the length of the context.

        Call it within `copying`: the work begins when that would let copies begin, and what is queued on the copy
        stream after it waits for it.
        """

    @abstractmethod
    def communicator(self, store: Any, index: int, size: int, seconds: float) -> Any:
        """One of torch's collective back ends for memory of this device, apart from all others; may wait for peers.

        Args:
            store: where the ranks find each other; nobody else uses its keys.
            index: this rank's number among them.
            size: how many they are.
            seconds: how long a collective may take, where the back end ends it by itself.
        """

    @property
    @abstractmethod
    def queues_collectives(self) -> bool:
        """Whether collectives run on a stream, so that other work can be queued behind them."""

    @abstractmethod
    def follow(self, work: Work) -> None:
        """Queue what comes next behind a collective, if those are queued; call within `gathering`."""

    @abstractmethod
    def check(self, work: Work) -> None:
        """Raise what a collective that has completed has failed with."""

    @abstractmethod
    def fetch(self, values: Sequence[torch.Tensor]) -> list[int]:
        """Bring int64 tensors without dimensions, which have been computed by now, to the host.

        Waits for no other work, copies in flight included.
        """

    @abstractmethod
    def confirm(self) -> None:
        """Wait until all is done that was queued within `copying` and the contexts in it; what failed is raised."""

    @abstractmethod
    def as_here(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        """What another thread enters to work on the device as this one would: the same device, the same stream."""

    @abstractmethod
    def release_workspaces(self) -> int:
        """Drop what libraries keep for reuse on the device; the bytes that torch had handed out for it."""

    @abstractmethod
    def stopwatch(self) -> Stopwatch:
        """Start timing on the copy stream in use; call within `copying`."""

    @abstractmethod
    def lock_pages(self, address: int, nbytes: int) -> None:
        """Page-lock host memory for direct copies.

        Raises:
            HostMemoryError: the driver refused.
        """

    @abstractmethod
    def unlock_pages(self, address: int) -> None:
        """Undo `lock_pages`."""

    @abstractmethod
    def numa_node(self) -> int | None:
        """The NUMA node nearest to the device; None if unknown."""


class _WallStopwatch(Stopwatch):
    def __init__(self) -> None:
        self._start = self._end = time.perf_counter()

    def stop(self) -> None:
        self._end = time.perf_counter()

    def seconds(self) -> float:
        return self._end - self._start


class _Arrived(Arrival):
    def wait(self) -> None:
        pass


class CpuDevice(Device):
    """The CPU standing in for an accelerator: copies are synchronous, nothing is page-locked."""

    def synchronize(self) -> None:
        pass

    def synchronize_stream(self) -> None:
        pass

    def memory(self) -> MemoryFigures:
        return MemoryFigures(None, None, machine.resident_bytes())

    def free_bytes(self) -> int | None:
        return machine.host_limits().available_bytes

    def segments(self) -> Sequence[Segment] | None:
        return None

    def blas_workspace_bytes(self) -> int | None:
        return None

    def is_home_of(self, storage: torch.UntypedStorage) -> bool:
        """Host memory is what torch did not allocate: a manager's, NumPy's, a file's."""
        return super().is_home_of(storage) and storage.resizable()

    def release_cached(self) -> None:
        pass

    @property
    def frees_beside_copies(self) -> bool:
        return False

    @contextlib.contextmanager
    def copying(self, direction: Direction) -> Iterator[None]:
        with torch.no_grad():
            yield

    def arrival(self) -> Arrival:
        return _Arrived()

    def beside(self, after: Arrival | None = None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def gathering(self, after: Arrival | None = None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def filling(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def communicator(self, store: Any, index: int, size: int, seconds: float) -> Any:
        return _C10D.ProcessGroupGloo(store, index, size, timedelta(seconds=seconds))

    @property
    def queues_collectives(self) -> bool:
        return False

    def follow(self, work: Work) -> None:
        pass

    def check(self, work: Work) -> None:
        work.wait()

    def fetch(self, values: Sequence[torch.Tensor]) -> list[int]:
        return [int(value) for value in values]

    def confirm(self) -> None:
        pass

    def as_here(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        return contextlib.nullcontext

    def release_workspaces(self) -> int:
        return 0

    def stopwatch(self) -> Stopwatch:
        return _WallStopwatch()

    def lock_pages(self, address: int, nbytes: int) -> None:
        pass

    def unlock_pages(self, address: int) -> None:
        pass

    def numa_node(self) -> int | None:
        return None


class _EventStopwatch(Stopwatch):
    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._start.record()

    def stop(self) -> None:
        self._end.record()

    def seconds(self) -> float:
        return float(self._start.elapsed_time(self._end)) / 1e3


class _EventArrival(Arrival):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaDevice(Device):
    """A CUDA device: a copy stream for each direction; others for what follows copies, collectives, fills and results.

    [Note: a stream for each direction]
    Copies on a stream that has ever copied the other way do not run beside copies the other way on another stream: two
    managers that took turns with one copy stream each were seen to wait for one another to the last byte, while streams
    that only know one direction fill both directions of the link (H100, driver 580.159; see docs/performance.md).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._streams = {direction: torch.cuda.Stream(device) for direction in Direction}
        self._beside, self._gathering, self._filling, self._fetching = (torch.cuda.Stream(device) for _ in range(4))
        self._fetched = _page_locked(_FEW_RESULTS)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def synchronize_stream(self) -> None:
        torch.cuda.current_stream(self.torch_device).synchronize()

    def memory(self) -> MemoryFigures:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        allocated, reserved = self._of_allocator()
        return MemoryFigures(allocated, reserved, total - free)

    def free_bytes(self) -> int | None:
        free, _total = torch.cuda.mem_get_info(self.torch_device)
        allocated, reserved = self._of_allocator()
        return free + reserved - allocated

    def _of_allocator(self) -> tuple[int, int]:
        """Bytes that torch's allocator has handed out, and that it holds; one question instead of a flat table each."""
        stats = torch.cuda.memory_stats_as_nested_dict(self.torch_device)
        return stats["allocated_bytes"]["all"]["current"], stats["reserved_bytes"]["all"]["current"]

    def segments(self) -> Sequence[Segment] | None:
        if torch.cuda.get_allocator_backend() != "native":
            return None
        snapshot = torch.cuda.memory._snapshot()
        large_page_bytes = _large_page_bytes(snapshot.get("allocator_settings", {}))
        return [
            Segment(
                segment["address"],
                segment["total_size"],
                _page_bytes(segment, large_page_bytes),
                _is_private(segment),
                tuple(_handed_out(segment)),
            )
            for segment in snapshot["segments"]
            if segment["device"] == self.torch_device.index
        ]

    def blas_workspace_bytes(self) -> int | None:
        asked = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
        if asked:
            return sum(int(kib) * int(count) for kib, count in asked) << 10
        major, _ = torch.cuda.get_device_capability(self.torch_device)
        return 32 << 20 if major >= 9 else (8 << 20) + (128 << 10)

    def release_cached(self) -> None:
        with torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()

    @functools.cached_property
    def frees_beside_copies(self) -> bool:
        """With `expandable_segments`, where pages are mapped; `cudaFree` waits for all that is in flight.

        Asked once, since the answer takes milliseconds. Jobs switch that while they run, so nothing but speed may
        depend on it.
        """
        if torch.cuda.get_allocator_backend() != "native":
            return False
        settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
        return bool(settings.get("expandable_segments"))

    @contextlib.contextmanager
    def copying(self, direction: Direction) -> Iterator[None]:
        # The copy stream starts where the caller's stream is: a block that was handed out there a moment ago may
        # still be in use by work queued earlier.
        stream, caller = self._streams[direction], torch.cuda.current_stream(self.torch_device)
        for each in (stream, self._filling):
            each.wait_stream(caller)
        with torch.no_grad(), torch.cuda.stream(stream):
            yield

    def arrival(self) -> Arrival:
        return _EventArrival(torch.cuda.current_stream(self.torch_device))  # another device may be the current one

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        with torch.cuda.stream(self._filling):
            yield
        torch.cuda.current_stream(self.torch_device).wait_stream(self._filling)

    def beside(self, after: Arrival | None = None) -> contextlib.AbstractContextManager[object]:
        return self._behind(self._beside, after)

    def gathering(self, after: Arrival | None = None) -> contextlib.AbstractContextManager[object]:
        return self._behind(self._gathering, after)

    @contextlib.contextmanager
    def _behind(self, stream: torch.cuda.Stream, after: Arrival | None) -> Iterator[None]:
        if isinstance(after, _EventArrival):
            stream.wait_event(after.event)
        else:
            stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(stream):
            yield

    def communicator(self, store: Any, index: int, size: int, seconds: float) -> Any:
        options = _C10D.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=max(_WATCHDOG_SECONDS, 4 * seconds))  # not before others have given up
        return _C10D.ProcessGroupNCCL(store, index, size, options)

    @property
    def queues_collectives(self) -> bool:
        return True

    def follow(self, work: Work) -> None:
        work.wait()

    def check(self, work: Work) -> None:
        work.wait(timedelta(seconds=1))  # it has completed, or was aborted, which this raises

    def fetch(self, values: Sequence[torch.Tensor]) -> list[int]:
        if not values:
            return []
        # Written by a kernel, into host memory that the device sees at the same address: a copy, however small, goes
        # through the engine of its direction, behind all copies that are queued there on whatever stream. Stacking one
        # tensor is a copy, too (`cat_out_cuda` in ATen/native/cuda/Shape.cu of torch 2.11), so there are always two.
        inputs = [values[0], *values]
        if len(inputs) > len(self._fetched):
            self._fetched = _page_locked(2 * len(inputs))
        found = self._fetched[: len(inputs)]
        try:
            with torch.cuda.stream(self._fetching):
                torch.stack(inputs, out=self._as_on_device(found))
        finally:  # an interruption, too, waits for the kernel: what it reads and writes may be gone after this call
            self._fetching.synchronize()
        return [int(value) for value in found[1:].tolist()]

    def _as_on_device(self, pinned: torch.Tensor) -> torch.Tensor:
        """A page-locked tensor of shape [n], for kernels of the device; valid while the other lives."""
        storage = torch._C._construct_storage_from_data_pointer(pinned.data_ptr(), self.torch_device, pinned.nbytes)
        return torch.empty(0, dtype=pinned.dtype, device=self.torch_device).set_(storage, 0, pinned.shape, (1,))

    def confirm(self) -> None:
        errors = []
        for stream in (*self._streams.values(), self._beside, self._gathering, self._filling, self._fetching):
            try:
                stream.synchronize()
            except RuntimeError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def as_here(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        stream = torch.cuda.current_stream(self.torch_device)
        return lambda: torch.cuda.stream(stream)  # which makes its device the current one, too

    def release_workspaces(self) -> int:
        before, _ = self._of_allocator()
        with torch.cuda.device(self.torch_device):
            torch._C._cuda_clearCublasWorkspaces()
        after, _ = self._of_allocator()
        return before - after

    def stopwatch(self) -> Stopwatch:
        return _EventStopwatch()

    def lock_pages(self, address: int, nbytes: int) -> None:
        with torch.cuda.device(self.torch_device):
            code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _HOST_REGISTER_PORTABLE))
        if code:
            self._forget_error()
            limit = machine.host_limits().memlock_bytes
            raise HostMemoryError(
                f"page-locking {format_bytes(nbytes)} of host memory failed with CUDA error {code} "
                f"({torch.cuda.cudart().cudaGetErrorString(torch.cuda.cudart().cudaError(code))}); nothing was moved. "
                f"The memlock limit is {format_bytes(limit) if limit is not None else 'unlimited'}: raise it "
                "(`ulimit -l`, or --ulimit memlock=-1 for a container), or leave more host memory to this process"
            )

    def unlock_pages(self, address: int) -> None:
        with torch.cuda.device(self.torch_device):  # a thread that has none would begin with the first of the machine
            code = int(torch.cuda.cudart().cudaHostUnregister(address))
        if code:
            self._forget_error()
            logger.warning("unlocking host memory at %#x failed with CUDA error %d", address, code)

    def _forget_error(self) -> None:
        """Take the error of a failed call off the runtime, or the next kernel launch would report it as its own."""
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device=self.torch_device).fill_(0)

    def numa_node(self) -> int | None:
        properties = torch.cuda.get_device_properties(self.torch_device)
        parts = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
        if any(part is None for part in parts):
            return None
        domain, bus, slot = parts
        return machine.pci_numa_node(f"{domain:04x}:{bus:02x}:{slot:02x}.0")


_FEW_RESULTS = 1 << 10
"""How many results a device has host memory for from the start; it takes more when it needs that."""


def _page_locked(length: int) -> torch.Tensor:
    """int64 of shape [length], whatever torch's default device is."""
    return torch.empty(length, dtype=torch.int64, device="cpu", pin_memory=True)


def _handed_out(segment: dict[str, Any]) -> Iterator[Block]:
    """The blocks of a segment, in the order in which they lie, that somebody has at present."""
    address = segment["address"]
    for block in segment["blocks"]:
        if block["state"] == "active_allocated":
            yield Block(address, block["size"])
        address += block["size"]


_SMALL_PAGE_BYTES = 2 << 20
_LARGE_PAGE_BYTES = 20 << 20
"""What torch maps at once of an expandable segment, for blocks of up to 1 MiB and for others: `kSmallBuffer` and
`large_segment_size` in c10/core/AllocatorConfig.h of torch 2.13; older releases have them in other files."""


def allocator_settings() -> str:
    """The settings of torch's allocator in the environment, without spaces; empty if there are none.

    Of the two names the older one goes first, as in torch 2.13 where both are set.
    """
    return re.sub(r"\s", "", os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF", ""))


def _large_page_bytes(settings: Mapping[str, Any]) -> int:
    """The larger page size, for which newer releases (2.11 does) have a setting.

    Args:
        settings: of a snapshot. They are the last ones given to torch, which keeps those given before.
    """
    last = re.sub(r"\s", "", str(settings.get("PYTORCH_CUDA_ALLOC_CONF", "")))
    for given in (last, allocator_settings()):
        asked = re.findall(r"large_segment_size_mb:\+?(\d+)", given)
        if asked and int(asked[-1]) << 20 > _SMALL_PAGE_BYTES:
            return int(asked[-1]) << 20
    return _LARGE_PAGE_BYTES


def _page_bytes(segment: dict[str, Any], large_page_bytes: int) -> int:
    """What of a segment goes back to the driver on its own."""
    if not segment.get("is_expandable") or _is_private(segment):
        return int(segment["total_size"])
    return _SMALL_PAGE_BYTES if segment.get("segment_type") == "small" else large_page_bytes


def _is_private(segment: dict[str, Any]) -> bool:
    return tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)


_C10D: Any = torch.distributed  # torch's stubs leave the back ends out

_WATCHDOG_SECONDS = 600.0
"""When torch's watchdog ends a process that is stuck in a collective; NCCL's own default."""

_HOST_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: locked for every CUDA context of the process


def device_for(device: torch.device) -> Device:
    """The backend for a torch device.

    Raises:
        InvalidArgumentError: neither a CUDA device nor the CPU.
    """
    if device.type == "cuda":
        return CudaDevice(device)
    if device.type == "cpu":
        return CpuDevice(device)
    raise InvalidArgumentError(
        f"the parameters are on {device}; megastow moves memory of CUDA devices (and of the CPU, for development)"
    )
