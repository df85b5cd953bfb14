"""The soak: that a short one finds nothing, that it sees what grows and what is wrong, and that its faults strike."""

import json
import os
import subprocess
import sys

import pytest

from megastow_conformance.soak import Outcome, Sample

GIB = 1 << 30

# What the process of a soak runs at its start.
LEAK = """
import megastow
onload, leaked = megastow.MemoryManager.onload, []


def leaking(manager, *kinds, **options):
    leaked.append(__import__("torch").ones(1 << 20))
    return onload(manager, *kinds, **options)


megastow.MemoryManager.onload = leaking
"""
FLIP = """
import megastow
from megastow.transport import Transport
copy_in, number = Transport.copy_in, iter(range(10**9))


def flipping(transport, host, storage):
    copy_in(transport, host, storage)
    if next(number) == 100:
        storage[5] = storage[5] ^ 1


Transport.copy_in = flipping
"""


@pytest.fixture
def run_soak(megatron_tree, tmp_path):
    def run(*arguments, meddle=""):
        (tmp_path / "sitecustomize.py").write_text(meddle)
        paths = [str(tmp_path), str(megatron_tree), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        outcome = tmp_path / "outcome.json"
        line = [sys.executable, "-m", "megastow_conformance.soak", f"--json={outcome}", *arguments]
        result = subprocess.run(line, check=False, capture_output=True, text=True, timeout=240, env=environment)
        return result, json.loads(outcome.read_text()) if outcome.exists() else None

    return run


@pytest.mark.slow
def test_a_short_soak_is_flat(run_soak):
    result, outcome = run_soak("--cycles=30")
    assert result.returncode == 0, result.stdout + result.stderr
    assert outcome["moves"] >= 60 + outcome["faults"]
    assert outcome["faults"] > 5
    assert outcome["problems"] == []
    assert outcome["bytes_per_cycle"]["device"] == 0
    assert "all bits are right" in result.stdout


@pytest.mark.slow
def test_a_leak_is_told_in_figures(run_soak):
    result, outcome = run_soak("--cycles=10", "--most-growth=1000000", meddle=LEAK)
    assert result.returncode == 1
    assert outcome["bytes_per_cycle"]["device"] > 1 << 22
    assert len(outcome["problems"]) == 2
    assert "device memory grows from" in result.stderr


@pytest.mark.slow
def test_a_wrong_bit_ends_it_with_what_led_to_it(run_soak):
    result, outcome = run_soak("--cycles=30", meddle=FLIP)
    assert result.returncode == 1
    assert outcome is None
    assert "1 of " in result.stderr
    assert "cycle " in result.stderr
    assert "; onload " in result.stderr or "swap out" in result.stderr


def outcome_of(resident, device, host):
    samples = tuple(Sample(i, *values) for i, values in enumerate(zip(resident, device, host, strict=True)))
    return Outcome(len(samples), 0, 0, 1.0, samples)


def test_what_settles_in_the_warm_up_is_not_growth():
    flat = [GIB] * 80
    outcome = outcome_of([GIB // 2] * 20 + flat, [1] * 20 + [5] * 80, [7] * 100)
    assert outcome.slope("resident") == outcome.slope("device") == 0
    assert outcome.problems(0) == []


@pytest.mark.parametrize(
    ("resident", "device", "host", "found"),
    [
        ([GIB + i * 1000 for i in range(100)], [5] * 100, [7] * 100, "resident set grows by 77"),
        ([GIB] * 100, [5] * 60 + [6] * 40, [7] * 100, "device memory grows from 5 B to 6 B"),
        ([GIB] * 100, [5] * 100, [7] * 99 + [9], "host memory grows from 7 B to 9 B"),
    ],
)
def test_each_figure_that_grows_is_a_problem(resident, device, host, found):
    (problem,) = outcome_of(resident, device, host).problems(50_000)
    assert found in problem


def test_the_slope_is_in_bytes_a_cycle():
    assert outcome_of([1000 + 250 * i for i in range(50)], [1] * 50, [1] * 50).slope("resident") == pytest.approx(250)
