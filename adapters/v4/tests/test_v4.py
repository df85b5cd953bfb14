"""What is special about the fork; the invariants are the conformance suite's."""

import dataclasses

import pytest
import v4_checks as checks

from megastow.megatron import MegatronInfo, detect_megatron
from megastow_conformance.checks import moves, training
from megastow_conformance.rows import DOUBLES, Row, at
from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup
from megastow_v4 import ADAPTER

ROW = at(Row("v4-double", "v4", "v4", source="double", evidence="double"), DOUBLES / "v4")
EVERYTHING = SCENARIOS["toy_distopt"]
TWO_CHUNKS = dataclasses.replace(EVERYTHING, name="v4_chunks", chunks=2)


@pytest.fixture(scope="module", params=[1, 2], ids=["w1", "w2"])
def workers(request):
    with WorkerGroup(ROW, request.param, harness="megastow_conformance.megatron_legacy") as group:
        yield group


def run(workers, check, scenario):
    outcome = workers.run(check, scenario)
    assert outcome.verdict == "passed", outcome.report()


def test_the_double_wraps_as_the_fork_does(workers):
    for scenario in (TWO_CHUNKS, SCENARIOS["toy_bf16_grads_plainopt"]):
        run(workers, checks.wrapper_is_as_described, scenario)


def test_the_double_steps_as_the_fork_does(workers):
    for name in ("toy_distopt", "toy_fp32_distopt", "toy_bf16_grads_distopt"):
        run(workers, checks.distributed_optimizer_is_as_described, SCENARIOS[name])
    run(workers, checks.distributed_optimizer_is_as_described, TWO_CHUNKS)


@pytest.mark.parametrize("workers", [2], indirect=True, ids=["w2"])
def test_experts_are_reduced_over_their_own_ranks(workers):
    for name in ("toy_experts_distopt", "toy_experts_plainopt"):
        scenario = dataclasses.replace(SCENARIOS[name], name=f"v4_spread_{name}")
        run(workers, checks.ranks_reduce_by_type, scenario)


def test_chunks(workers):
    for check in (training.training, training.training_every_point, moves.released, moves.identity):
        run(workers, check, TWO_CHUNKS)


def test_buffers_of_all_types_are_found(workers):
    run(workers, checks.storages_are_told_apart, EVERYTHING)


def test_facts_are_found_on_the_instances(workers):
    unasked = dataclasses.replace(SCENARIOS["toy_fp32_distopt"], name="v4_fp32", grad_reduce_in_fp32=False)
    for scenario in (EVERYTHING, SCENARIOS["toy_bf16_grads_plainopt"], unasked):
        run(workers, checks.facts_are_what_was_asked_for, scenario)


def test_a_model_alone_can_be_moved(workers):
    run(workers, checks.model_without_optimizer, EVERYTHING)


@pytest.mark.parametrize(
    ("check", "scenario"),
    [
        (checks.refuses_another_optimizer, "toy_fp32_plainopt"),
        (checks.refuses_another_dtype, "toy_distopt"),
        (checks.refuses_another_wrapper, "toy_distopt"),
    ],
)
def test_what_the_fork_cannot_train_is_refused(workers, check, scenario):
    run(workers, check, SCENARIOS[scenario])


def test_the_fork_is_recognised_without_an_import():
    for name, refuses in (("v4", False), ("v1", True), ("v2", True)):
        reasons = ADAPTER.refuses_installation(MegatronInfo(DOUBLES / name / "megatron", None))
        assert bool(reasons) == refuses, f"{name}: {reasons}"


def test_the_environment_is_a_hint_and_no_proof(monkeypatch):
    other = MegatronInfo(DOUBLES / "v1" / "megatron", None)
    monkeypatch.delenv("QWEN_VERSION", raising=False)
    plain = ADAPTER.refuses_installation(other)
    monkeypatch.setenv("QWEN_VERSION", "qwen_moe_v1")
    assert ADAPTER.refuses_installation(other)[:-1] == plain
    assert "qwen_moe_v1" in ADAPTER.refuses_installation(other)[-1]
    assert str(other.path) in ADAPTER.refuses_installation(other)[-1]
    assert ADAPTER.refuses_installation(None)
    assert not ADAPTER.refuses_installation(MegatronInfo(DOUBLES / "v4" / "megatron", None))


def test_no_double_is_importable_unasked():
    found = detect_megatron()
    assert found is None or DOUBLES not in found.path.parents
