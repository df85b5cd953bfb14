"""The demo end to end, with the real Megatron: that it finds nothing where nothing is wrong, and what is wrong."""

from collections import Counter

import pytest

from megastow.cli.tables import verdict
from megastow_conformance import demo
from megastow_conformance.demo_models import SIZES
from megastow_conformance.demo_outcome import Comparison, Outcome, sort_of

SHORT = ("--rounds=1", "--steps=1")

# What every process of the demo runs at its start.
MEDDLE = """
import os, time
import megastow

create, onload, models, flipped = megastow.create_memory_manager, megastow.MemoryManager.onload, {{}}, []


def remembering(model, optimizer=None):
    manager = create(model, optimizer)
    models[manager] = (model[0] if isinstance(model, list) else model, optimizer)
    return manager


def flip(model):
    if not flipped:  # a second flip would put it right
        flipped.append(next(model.parameters()).detach().view(-1).view(__import__("torch").uint8))
        flipped[0][5] ^= 1


def meddled(manager, *kinds):
    report = onload(manager, *kinds)
    model, optimizer = models[manager]
    is_trainer = optimizer is not None
    if {condition} and report.num_tensors:
        {action}
    return report


megastow.create_memory_manager = remembering
megastow.MemoryManager.onload = meddled
"""
FLIP = "flip(model)"


@pytest.fixture
def run_demo(run_megastow):
    """Runs `megastow demo`, perhaps with somebody meddling."""

    def run(*arguments, condition="False", action="pass"):
        return run_megastow("demo", *arguments, meddle=MEDDLE.format(condition=condition, action=action))

    return run


@pytest.mark.slow
def test_nothing_differs_where_nobody_meddles(run_demo):
    result, outcome = run_demo("--rounds=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert outcome["identical"]
    assert "IDENTICAL, bit for bit" in result.stdout
    turns = [("trainer", "offload"), ("reference", "onload"), ("reference", "offload"), ("trainer", "onload")]
    assert [(m["tenant"], m["direction"]) for m in outcome["moves"]] == [("reference", "offload"), *turns, *turns]
    for move in outcome["moves"]:
        if move["tenant"] == "trainer":
            assert all(kind["moved"] and kind["device_bytes"] for kind in move["kinds"].values())
            # bf16 weights, fp32 main weights, two moments, fp32 gradients
            weights = move["kinds"]["weights"]["device_bytes"]
            assert move["device_bytes"] == pytest.approx(weights / 2 * 18, rel=0.01)
    counts = outcome["compared"]["counts"]
    assert counts["losses"] == 8
    assert counts["gradient norms"] == 4
    assert counts["generations"] == 2
    assert counts["weights"] == counts["main weights"] == counts["moments"] / 2 > 0
    assert counts["reference weights"] > 0
    assert result.stdout.count(" s  ") == demo.num_activities(rounds=2, steps=2)
    assert "loss" in outcome["steps"][0]


@pytest.mark.slow
@pytest.mark.parametrize("tenant", ["trainer", "reference"])
def test_one_flipped_bit_is_found_and_named(run_demo, tenant):
    condition = "is_trainer" if tenant == "trainer" else "not is_trainer"
    result, outcome = run_demo(*SHORT, condition=condition, action=FLIP)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "DIFFERENT" in result.stdout
    if tenant == "trainer":
        (difference,) = outcome["differences"]
        assert difference["name"].startswith("weight chunk0.param.")
        assert difference["name"] in result.stdout
        assert difference["detail"].startswith("1 of ")
    else:
        names = [d["name"] for d in outcome["differences"] if d["name"].startswith("reference weight ")]
        assert len(names) == 1
        assert names[0] in result.stdout


@pytest.mark.slow
def test_the_verdict_covers_every_rank(run_demo):
    result, outcome = run_demo(
        *SHORT, "--ranks=2", condition="is_trainer and os.environ.get('RANK') == '1'", action=FLIP
    )
    assert result.returncode == 1, result.stdout + result.stderr
    (difference,) = outcome["differences"]
    assert difference["rank"] == 1
    assert f"rank 1: {difference['name']}" in result.stdout
    assert outcome["compared"]["counts"]["gradient norms"] == 2


@pytest.mark.slow
def test_a_hang_is_a_loud_failure(run_demo):
    result, outcome = run_demo(
        *SHORT, "--ranks=2", "--time-limit=15", condition="os.environ.get('RANK') == '1'", action="time.sleep(600)"
    )
    assert result.returncode == 3, result.stdout + result.stderr
    assert "counts as hung" in result.stderr
    assert outcome is None


def test_a_size_that_does_not_exist_is_refused_at_once(run_demo):
    result, _ = run_demo("--size=huge")
    assert result.returncode == 3
    assert "'huge'" in result.stderr
    assert "tiny" in result.stderr


def test_sizes_are_what_they_are_called():
    assert next(iter(SIZES)) == "tiny"
    assert all(size.name == name for name, size in SIZES.items())
    assert SIZES["1.4b"].num_parameters == pytest.approx(1.4e9, rel=0.03)
    assert SIZES["355m"].num_parameters == pytest.approx(3.55e8, rel=0.2)


def test_state_is_sorted_by_what_it_is():
    names = (
        "chunk0.param.a.weight",
        "optimizer0.group0.1.main",
        "optimizer0.state3.exp_avg_sq",
        "optimizer0.state3.step",
    )
    assert [sort_of(name) for name in names] == ["weights", "main weights", "moments", "other states"]


def outcome_of(comparison):
    return Outcome(SIZES["tiny"], "cpu", 1, 1, 1, {}, (), (), {}, {}, comparison, 1.0)


def test_a_run_that_compared_nothing_shows_nothing():
    outcome = outcome_of(Comparison(0))
    assert not outcome.is_identical
    assert "UNKNOWN" in verdict(outcome)


def test_many_differences_are_counted_and_not_all_listed():
    comparison = Comparison(0, Counter({"weights": 30}), 60)
    for number in range(30):
        comparison.differs(f"weight {number}", "2 of 2 bytes differ")
    text = verdict(outcome_of(comparison))
    assert "30 things" in text
    assert "and 20 more" in text
    assert len(text.splitlines()) == 12
