"""Copies in chunks: every byte once, nothing beside it touched."""

import sys
import threading

import pytest
import torch
from core_toys import odd_floats, raw

from megastow import faults
from megastow.device import CpuDevice, Direction
from megastow.host import HostRegion
from megastow.machine import PAGE_BYTES
from megastow.staging import Staging
from megastow.transport import HostSlice, Transport


@pytest.mark.parametrize("chunk_bytes", [1, 7, 4096, 1 << 30])
@pytest.mark.parametrize("offset", [0, 512, PAGE_BYTES - 512])
def test_out_and_back(chunk_bytes, offset):
    device = CpuDevice(torch.device("cpu"))
    transport = Transport(device, chunk_bytes)
    region = HostRegion.make(4 * PAGE_BYTES, device, piece_bytes=PAGE_BYTES)
    region.bytes.fill_(0xAB)
    source = odd_floats().repeat(40)
    expected = raw(source)
    place = HostSlice(region, offset, source.nbytes)
    with device.copying(Direction.OUT), faults.inject("offload.chunk", RuntimeError, after=1 << 40) as passed:
        transport.copy_out(source.untyped_storage(), place)
    assert passed[0] >= -(-source.nbytes // chunk_bytes)
    assert torch.equal(place.bytes(), expected)
    assert region.bytes[:offset].eq(0xAB).all()
    assert region.bytes[offset + source.nbytes :].eq(0xAB).all()
    source.fill_(0)
    with device.copying(Direction.IN):
        transport.copy_in(place, source.untyped_storage())
    assert torch.equal(raw(source), expected)


# --- the threads behind buffers --------------------------------------------------------------------------------------


def staging_threads():
    return [thread for thread in threading.enumerate() if thread.name == "megastow-staging"]


def interrupted_at(line, call):
    """Raise at an executed line of `staging.py`, by its number; says whether there were as many."""
    left = [line]

    def watch(_frame, event, _):
        left[0] -= event == "line"
        if left[0] < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return watch

    outer = sys.gettrace()
    sys.settrace(lambda frame, *_: watch if frame.f_code.co_filename.endswith("megastow/staging.py") else None)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


@pytest.mark.parametrize("interrupted", ["use", "close"])
def test_threads_end_wherever_an_interruption_came(interrupted):
    device = CpuDevice(torch.device("cpu"))
    line, more = 0, True
    while more:
        before = set(staging_threads())
        staging = Staging(device)
        buffers = torch.empty(staging.nbytes, dtype=torch.uint8)
        if interrupted == "close":
            staging.use(buffers)
        more = interrupted_at(line, (lambda s=staging, b=buffers: s.use(b)) if interrupted == "use" else staging.close)
        staging.close()
        staging.use(buffers)  # all of them work, whoever is left of those before
        source, region = torch.arange(256, dtype=torch.uint8), HostRegion.make(PAGE_BYTES, device, lock=False)
        with device.copying(Direction.OUT):
            for _ in range(16):
                staging.write(source, region, 0)
        for future in staging.queued():
            future.result(60)
        assert torch.equal(region.bytes[:256], source)
        staging.close()
        for thread in set(staging_threads()) - before:  # started by an interrupted call that did not know it yet
            thread.join(60)
            assert not thread.is_alive(), f"line {line} of {interrupted}"
        line += 1
    assert line > 10
