"""What a move says of itself."""

import json

import pytest
from core_toys import KEPT, KINDS, device_bytes, moved

from megastow import KindReport, MemoryFigures, StateKind, TransferReport, create_memory_manager
from megastow.report import format_bytes


def test_a_report_counts_what_left(trainer):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    expected = {k: device_bytes(moved(trainer.tensors((k,)))) for k in KINDS}
    out = manager.offload()
    back = manager.onload()
    for report in (out, back):
        for kind in KINDS:
            entry = report.kinds[kind]
            assert entry.moved
            # Packing aligns each tensor to 512 bytes; otherwise it is what the storages hold.
            assert expected[kind] <= entry.device_bytes <= expected[kind] + 512 * entry.num_tensors
            assert entry.host_bytes == (entry.device_bytes if kind in KEPT else 0) or entry.host_bytes % 512 == 0
            assert entry.seconds > 0
            assert entry.bytes_per_second == pytest.approx(entry.device_bytes / entry.seconds)
        assert report.device_bytes == sum(e.device_bytes for e in report.kinds.values())
        assert report.seconds >= max(e.seconds for e in report.kinds.values())
        assert report.before.driver_bytes > 0
    assert (out.direction, back.direction) == ("offload", "onload")
    assert out.num_tensors == back.num_tensors
    assert {k: e.device_bytes for k, e in out.kinds.items()} == {k: e.device_bytes for k, e in back.kinds.items()}


@pytest.mark.parametrize("kinds", [(), ("weights",), ("grad_buffers", "weights")])
def test_as_dict_is_for_machines_and_str_is_one_line(trainer, kinds):
    manager = create_memory_manager(trainer.model, trainer.optimizer)
    for report in (manager.offload(*kinds), manager.offload(*kinds), manager.onload(*kinds), manager.onload()):
        plain = json.loads(json.dumps(report.as_dict()))
        assert plain == report.as_dict()
        assert set(plain["kinds"]) == {str(k) for k in report.kinds}
        assert plain["direction"] in str(report)
        assert "\n" not in str(report)


def test_figures_without_a_division_by_zero():
    figures = MemoryFigures(None, None, 5)
    report = TransferReport("offload", {StateKind.WEIGHTS: KindReport(StateKind.WEIGHTS, True)}, 0.0, figures, figures)
    assert report.bytes_per_second == 0.0
    assert report.kinds["weights"].bytes_per_second == 0.0
    assert "5 B -> 5 B" in str(report)


def test_format_bytes():
    sizes = (0, 1023, 1536, 5 << 30, 3 << 40, None)
    assert [format_bytes(n) for n in sizes] == ["0 B", "1023 B", "1.5 KiB", "5 GiB", "3 TiB", "-"]
