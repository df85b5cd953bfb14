"""The invariants, each a test named after its id, for every row, world size and scenario."""

from __future__ import annotations

import pytest

from megastow_conformance.checks import (
    checkpoints,
    faults,
    gradients,
    host_state,
    interface,
    moves,
    ranks,
    residue,
    selection,
    stateful,
    training,
)
from megastow_conformance.plugin import Conformance

ONE_OF_ALL = "toy_dense_distopt"
"""Enough in the core scope for what hardly depends on the adapter: each generation trains it, and ranks have shards."""


def test_bitexact(conformance: Conformance) -> None:
    conformance.run(moves.bitexact)


def test_bitexact_with_grads(conformance: Conformance) -> None:
    conformance.run(moves.bitexact_with_grads)


@pytest.mark.megastow(scenarios=lambda scenario: scenario.optimizer == "adam", core=ONE_OF_ALL)
def test_bitexact_of_other_sizes(conformance: Conformance) -> None:
    conformance.run(moves.bitexact_of_other_sizes)


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


def test_training_through_faults(conformance: Conformance) -> None:
    conformance.run(training.training_through_faults)


def test_training_in_background(conformance: Conformance) -> None:
    conformance.run(training.training_in_background)


@pytest.mark.megastow(needs={"restore"})
def test_training_resumed(conformance: Conformance) -> None:
    conformance.run(training.training_resumed)


def test_training_forward_without_optimizer(conformance: Conformance) -> None:
    conformance.run(training.forward_without_optimizer)


def test_released(conformance: Conformance) -> None:
    conformance.run(moves.released)


def test_residue(conformance: Conformance) -> None:
    conformance.run(residue.residue)


def test_peak(conformance: Conformance) -> None:
    conformance.run(moves.peak)


def test_host(conformance: Conformance) -> None:
    conformance.run(moves.host)


def test_grads(conformance: Conformance) -> None:
    conformance.run(gradients.grads)


@pytest.mark.megastow(scenarios=lambda scenario: scenario.overlap, needs={"reduction_in_flight"})
def test_grads_in_flight(conformance: Conformance) -> None:
    conformance.run(gradients.grads_in_flight)


def test_order(conformance: Conformance) -> None:
    conformance.run(moves.order)


def test_order_of_neighbours(conformance: Conformance) -> None:
    conformance.run(moves.neighbours)


def test_order_random_sequences(conformance: Conformance) -> None:
    conformance.run(stateful.random_sequences)


def test_failure(conformance: Conformance) -> None:
    conformance.run(faults.failure)


def test_failure_of_any_operation(conformance: Conformance) -> None:
    conformance.run(faults.failure_of_any_operation)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_failure_of_a_copy(conformance: Conformance) -> None:
    conformance.run(faults.damaged_copy)


@pytest.mark.megastow(worlds=(2, 4), core=ONE_OF_ALL)
def test_failure_of_one_rank(conformance: Conformance) -> None:
    conformance.run(ranks.failure_of_one_rank)


@pytest.mark.megastow(worlds=(2, 4), core=ONE_OF_ALL)
def test_failure_of_ranks_that_differ(conformance: Conformance) -> None:
    conformance.run(ranks.different_calls)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_failure_inside_the_block(conformance: Conformance) -> None:
    conformance.run(faults.interrupted_block)


def test_guard(conformance: Conformance) -> None:
    conformance.run(faults.guard)


def test_guard_of_backward(conformance: Conformance) -> None:
    conformance.run(faults.guard_backward)


@pytest.mark.megastow(needs={"restore"})
def test_checkpoint(conformance: Conformance) -> None:
    conformance.run(checkpoints.checkpoint)


@pytest.mark.megastow(needs={"restore"})
def test_checkpoint_load_state_dict(conformance: Conformance) -> None:
    conformance.run(checkpoints.load_state_dict)


@pytest.mark.megastow(scenarios=lambda scenario: scenario.model == "gpt", needs={"sharded_checkpoint"})
def test_checkpoint_sharded(conformance: Conformance) -> None:
    conformance.run(checkpoints.checkpoint_sharded)


@pytest.mark.megastow(needs={"restore"})
def test_host_state(conformance: Conformance) -> None:
    conformance.run(host_state.host_state)


@pytest.mark.megastow(
    scenarios=lambda scenario: scenario.model == "gpt" and not scenario.overlap, needs={"sharded_checkpoint"}
)
def test_host_state_sharded(conformance: Conformance) -> None:
    conformance.run(host_state.host_state_sharded)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_select(conformance: Conformance) -> None:
    conformance.run(selection.select)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_select_adapter(conformance: Conformance) -> None:
    conformance.run(selection.select_adapter)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_select_unknown(conformance: Conformance) -> None:
    conformance.run(selection.select_unknown)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_select_refuses_layouts(conformance: Conformance) -> None:
    conformance.run(selection.refused)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_select_by_classic_arguments(conformance: Conformance) -> None:
    conformance.run(interface.classic_factory)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_order_by_classic_names(conformance: Conformance) -> None:
    conformance.run(interface.classic)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_host_prepared(conformance: Conformance) -> None:
    conformance.run(interface.prepared)


@pytest.mark.megastow(core=ONE_OF_ALL)
def test_order_of_preparations(conformance: Conformance) -> None:
    conformance.run(interface.prepared_while_away)
