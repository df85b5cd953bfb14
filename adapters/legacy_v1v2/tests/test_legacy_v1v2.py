"""What is special about gradient memory that parameters pass through; the invariants are the conformance suite's."""

import dataclasses

import legacy_v1v2_checks as checks
import pytest

from megastow.megatron import MegatronInfo
from megastow_conformance.checks import moves, training
from megastow_conformance.rows import DOUBLES, Row, at
from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup
from megastow_legacy_v1v2 import ADAPTER

OVERLAPPED = SCENARIOS["toy_overlap_distopt"]
TWO_CHUNKS = dataclasses.replace(SCENARIOS["toy_vpp_distopt"], name="v1_chunks", overlap=False)


def group(name, world):
    row = at(Row(f"{name}-double", "legacy_v1v2", name, source="double", evidence="double"), DOUBLES / name)
    return WorkerGroup(row, world, harness="megastow_conformance.megatron_legacy")


@pytest.fixture(scope="module", params=[1, 2], ids=["w1", "w2"])
def v1(request):
    with group("v1", request.param) as workers:
        yield workers


@pytest.fixture(scope="module", params=[1, 2], ids=["w1", "w2"])
def v2(request):
    with group("v2", request.param) as workers:
        yield workers


def run(workers, check, scenario):
    outcome = workers.run(check, scenario)
    assert outcome.verdict == "passed", outcome.report()


def test_several_chunks_without_overlap(v1):
    for check in (training.training, training.training_every_point, moves.released, moves.identity):
        run(v1, check, TWO_CHUNKS)


def test_a_move_before_the_gathering(v1):
    run(v1, checks.gradients_kept_between_step_and_gather, SCENARIOS["toy_fp32_params_distopt"])


def test_gradient_memory_is_kept_while_it_holds_parameters(v2):
    for scenario in (OVERLAPPED, SCENARIOS["toy_vpp_distopt"]):
        run(v2, checks.gradient_memory_is_kept_while_it_holds_parameters, scenario)


def test_a_model_alone_can_be_moved(v2):
    run(v2, checks.model_alone, SCENARIOS["toy_distopt"])


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (checks.training_with_parameters_dropped, "step 1 was"),
        (checks.guard_without_the_forward_hooks, "forward before weights are gathered"),
    ],
)
def test_the_suite_catches(v2, broken, complaint):
    outcome = v2.run(broken, OVERLAPPED)
    assert outcome.verdict == "failed"
    assert complaint in outcome.report()


def test_the_generations_are_recognised_without_an_import():
    for name, refuses in (("v1", False), ("v2", False), ("v4", True)):
        reasons = ADAPTER.refuses_installation(MegatronInfo(DOUBLES / name / "megatron", None))
        assert bool(reasons) == refuses, f"{name}: {reasons}"
