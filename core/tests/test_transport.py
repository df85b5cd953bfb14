"""Copies in chunks: every byte once, nothing beside it touched."""

import pytest
import torch
from core_toys import odd_floats, raw

from megastow import faults
from megastow.device import CpuDevice, Direction
from megastow.host import HostRegion
from megastow.machine import PAGE_BYTES
from megastow.transport import HostSlice, Transport


@pytest.mark.parametrize("chunk_bytes", [1, 7, 4096, 1 << 30])
@pytest.mark.parametrize("offset", [0, 512, PAGE_BYTES - 512])
def test_out_and_back(chunk_bytes, offset):
    device = CpuDevice(torch.device("cpu"))
    transport = Transport(device, chunk_bytes)
    region = HostRegion(4 * PAGE_BYTES, device, piece_bytes=PAGE_BYTES)
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
