"""The invariants, each a test named after its id, for every row, world size and scenario."""

from __future__ import annotations

import pytest

from megastow_conformance.checks import faults, interface, moves, training
from megastow_conformance.plugin import Conformance


def test_bitexact(conformance: Conformance) -> None:
    conformance.run(moves.bitexact)


def test_identity(conformance: Conformance) -> None:
    conformance.run(moves.identity)


def test_training(conformance: Conformance) -> None:
    conformance.run(training.training)


def test_training_drops_used_grads(conformance: Conformance) -> None:
    conformance.run(training.training_drops_used_grads)


def test_training_every_point(conformance: Conformance) -> None:
    conformance.run(training.training_every_point)


def test_training_with_subsets(conformance: Conformance) -> None:
    conformance.run(training.training_with_subsets)


def test_training_forward_without_optimizer(conformance: Conformance) -> None:
    conformance.run(training.forward_without_optimizer)


def test_released(conformance: Conformance) -> None:
    conformance.run(moves.released)


def test_peak(conformance: Conformance) -> None:
    conformance.run(moves.peak)


def test_host(conformance: Conformance) -> None:
    conformance.run(moves.host)


def test_grads(conformance: Conformance) -> None:
    conformance.run(training.grads)


def test_order(conformance: Conformance) -> None:
    conformance.run(moves.order)


def test_order_of_neighbours(conformance: Conformance) -> None:
    conformance.run(moves.neighbours)


def test_failure(conformance: Conformance) -> None:
    conformance.run(faults.failure)


def test_failure_inside_the_block(conformance: Conformance) -> None:
    conformance.run(faults.interrupted_block)


def test_guard(conformance: Conformance) -> None:
    conformance.run(faults.guard)


def test_guard_of_backward(conformance: Conformance) -> None:
    conformance.run(faults.guard_backward)


@pytest.mark.megastow(needs={"restore"})
def test_checkpoint(conformance: Conformance) -> None:
    conformance.run(training.checkpoint)


@pytest.mark.megastow(needs={"restore"})
def test_checkpoint_load_state_dict(conformance: Conformance) -> None:
    conformance.run(training.load_state_dict)


@pytest.mark.megastow(scenarios=lambda scenario: scenario.model == "gpt", needs={"sharded_checkpoint"})
def test_checkpoint_sharded(conformance: Conformance) -> None:
    conformance.run(training.checkpoint_sharded)


def test_select(conformance: Conformance) -> None:
    conformance.run(moves.select)


def test_select_refuses_layouts(conformance: Conformance) -> None:
    conformance.run(interface.refused)


def test_order_by_classic_names(conformance: Conformance) -> None:
    conformance.run(interface.classic)


def test_host_prepared(conformance: Conformance) -> None:
    conformance.run(interface.prepared)
