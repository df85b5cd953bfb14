"""derive_weights over real Megatron trainers: bits, host memory, ranks that agree; and the suite's own checks of it."""

import derive_checks as checks
import pytest
import real_megatron

from megastow_conformance.judging import judge
from megastow_conformance.marks import suite_marks
from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup

SUBJECT = "derive_checks:deriving"


def make_groups(row_id, worlds=(1, 2)):
    row = real_megatron.row(row_id)
    return {world: WorkerGroup(row, world, harness=row.harness, lasting=world == 1) for world in worlds}


@pytest.fixture(scope="module", params=["mcore-0.16"])
def groups(request):
    made = make_groups(request.param)
    yield made
    for group in made.values():
        group.close()


def run(group, check, scenario, **parameters):
    outcome = group.run(check, SCENARIOS[scenario], parameters=parameters, subject=SUBJECT, seconds=60.0)
    assert outcome.verdict == "passed", outcome.report()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("scenario", ["toy_distopt", "gpt_distopt", "toy_bf16_grads_distopt", "toy_fp16_distopt"])
def test_weights_take_no_host_memory_and_come_back(groups, scenario, world):
    run(groups[world], checks.saves_the_weights, scenario)


@pytest.mark.parametrize(
    ("scenario", "world", "share"),
    [
        ("gpt_vpp_distopt", 1, (1, 1)),
        ("toy_mixed_chain", 1, (0, 1)),
        ("toy_lora_distopt", 1, (1, 1)),
        ("gpt_ep2_distopt", 2, (1, 1)),
        ("gpt_tp2_distopt", 2, (1, 1)),
    ],
)
def test_all_bits_come_back_whatever_is_derived(groups, scenario, world, share):
    run(groups[world], checks.comes_back, scenario, share=share)


@pytest.mark.parametrize("row", ["v3-0.6", "v3-0.8", "mcore-0.9", "mcore-0.12", "mcore-0.19"])
def test_so_it_is_in_each_generation(row):
    (group,) = make_groups(row, [2]).values()
    with group:
        run(group, checks.saves_the_weights, "toy_distopt")
        run(group, checks.keeps_what_is_no_cast, "toy_distopt", where="first")


@pytest.mark.parametrize("world", [1, 2])
def test_a_move_in_the_background(groups, world):
    run(groups[world], checks.in_the_background, "gpt_distopt")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("where", ["first", "last"])
def test_one_bit_on_one_rank_keeps_the_buffer_on_all(groups, where, world):
    run(groups[world], checks.keeps_what_is_no_cast, "toy_distopt", where=where)


def test_what_is_not_gathered_yet_is_kept(groups):
    run(groups[2], checks.keeps_what_is_not_gathered_yet, "toy_overlap_distopt")


@pytest.mark.parametrize("world", [1, 2])
def test_main_weights_that_change_meanwhile(groups, world):
    run(groups[world], checks.sees_main_weights_that_change, "toy_distopt")


@pytest.mark.parametrize("world", [1, 2])
def test_a_fault_on_one_rank(groups, world):
    run(groups[world], checks.faults_on_one_rank, "toy_distopt")


def test_several_ranks_need_a_group(groups):
    run(groups[2], checks.needs_a_group, "toy_distopt")


@pytest.mark.parametrize("scenario", ["toy_plainopt", "toy_fp32_distopt"])
def test_what_has_no_main_weights_of_a_distributed_optimizer_is_kept(groups, scenario):
    run(groups[1], checks.keeps_where_nothing_is_derived, scenario)


AS_WITHOUT = (
    "test_bitexact",
    "test_identity",
    "test_training_every_point",
    "test_training_through_faults",
    "test_released",
    "test_grads",
    "test_failure",
    "test_failure_of_any_operation",
    "test_guard",
    "test_checkpoint_load_state_dict",
)


@pytest.mark.parametrize(("scenario", "world"), [("toy_distopt", 1), ("toy_distopt", 2), ("toy_overlap_distopt", 2)])
def test_the_invariants_hold(groups, scenario, world):
    assert set(AS_WITHOUT) <= suite_marks().keys()
    asked = set(AS_WITHOUT)
    if world > 1:  # it expects a fault on each rank, and a rank of a group hears of those of others
        asked.remove("test_failure_of_any_operation")
    leave_out = suite_marks().keys() - asked
    findings = list(judge(groups[world], SCENARIOS[scenario], SUBJECT, leave_out=leave_out))
    broken = [finding.outcome.report() for finding in findings if finding.verdict == "broken"]
    assert not broken, "\n\n".join(broken)
    assert len(findings) >= len(asked) - 2
