"""Replicas with a real Megatron: adapters say what is replicated, and over which ranks."""

import pytest
import real_megatron
import replica_checks as checks

from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup

KEPT = ("weights", "main_weights", "optimizer_states")
HALF = (0.5, 0.75)  # up to 8 KiB a storage are kept by both, which is much of so small a model
ALL = (0.99, 1.01)
SHARES = {
    "gpt_moe_plainopt": dict.fromkeys(KEPT, HALF),
    "gpt_moe_distopt": {"weights": HALF, "main_weights": ALL, "optimizer_states": ALL},
    "gpt_ep2_distopt": {"weights": (0.6, 0.9), "main_weights": ALL},  # each rank has experts of its own
}
BY_FOUR = {  # experts are the same on two ranks each, and all else on all four
    "gpt_ep2_plainopt": dict.fromkeys(KEPT, (0.25, 0.6)),
    "gpt_ep2_distopt": {"weights": (0.25, 0.6), "main_weights": ALL, "optimizer_states": ALL},
}
ROWS = ("mcore-0.16", "v3-0.8")


@pytest.fixture(scope="module", params=ROWS)
def pair(request):
    with WorkerGroup(real_megatron.row(request.param), 2) as group:
        yield group


@pytest.fixture(scope="module", params=ROWS)
def four(request):
    with WorkerGroup(real_megatron.row(request.param), 4) as group:
        yield group


@pytest.mark.parametrize("scenario", SHARES)
def test_each_rank_keeps_a_part(pair, scenario):
    outcome = pair.run(checks.keeps_a_part, SCENARIOS[scenario], parameters={"shares": SHARES[scenario]})
    assert outcome.verdict == "passed", outcome.report()


@pytest.mark.parametrize("scenario", BY_FOUR)
def test_experts_are_shared_by_those_that_have_the_same(four, scenario):
    outcome = four.run(checks.keeps_a_part, SCENARIOS[scenario], parameters={"shares": BY_FOUR[scenario]})
    assert outcome.verdict == "passed", outcome.report()


def test_what_is_derived_is_not_shared(pair):
    shares = {"weights": (0.0, 0.4), "main_weights": ALL, "optimizer_states": ALL}
    parameters = {"shares": shares, "derive_weights": True}
    outcome = pair.run(checks.keeps_a_part, SCENARIOS["gpt_distopt"], parameters=parameters)
    assert outcome.verdict == "passed", outcome.report()


def test_ranks_that_differ_for_a_while_lose_nothing(pair):
    outcome = pair.run(checks.notices_ranks_between_a_step_and_its_gather, SCENARIOS["gpt_distopt"])
    assert outcome.verdict == "passed", outcome.report()
