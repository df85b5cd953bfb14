"""The benchmark on the CPU with the real Megatron: what it reports, and that it finds and says what goes wrong.

Nothing here asserts a speed.
"""

import contextlib
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console

import megastow
from megastow import machine
from megastow.cli.bench_tables import bench_table, bench_verdict
from megastow.cli.gpus import Driver, Gpu
from megastow.device import device_for
from megastow.handle import DEFAULT_WINDOW_BYTES
from megastow_conformance.bench import circumstances, registry, rows
from megastow_conformance.bench.bits import StateCopy, not_zero
from megastow_conformance.bench.meeting import Meeting, RankError
from megastow_conformance.bench.registry import choose_rows, known_rows
from megastow_conformance.bench.result import (
    BenchResult,
    Bound,
    Figure,
    Goal,
    RankResult,
    RowResult,
    Spread,
    Status,
    Timeline,
    Unit,
)
from megastow_conformance.bench.session import Session
from megastow_conformance.demo_models import SIZES
from megastow_conformance.revision import find_revision

QUICK = ("--repeats=2",)

# One bit of the first weight, after the first onload that brought something.
FLIP = """
import megastow, torch

create, onload, models, flipped = megastow.create_memory_manager, megastow.MemoryManager.onload, {}, []


def remembering(model, optimizer=None):
    manager = create(model, optimizer)
    models[manager] = model[0] if isinstance(model, list) else model
    return manager


def meddled(manager, *kinds, **options):
    report = onload(manager, *kinds, **options)
    if not flipped:
        flipped.append(next(models[manager].parameters()).detach().view(-1).view(torch.uint8))
        flipped[0][5] ^= 1
    return report


megastow.create_memory_manager = remembering
megastow.MemoryManager.onload = meddled
"""

# A gradient that is not zero after the first onload that brought something.
DIRTY = FLIP.replace("next(models[manager].parameters()).detach()", "next(models[manager].parameters()).main_grad")

# A forward pass beside an onload that gives another loss than alone; the state is right.
EARLY = """
import megastow
from megastow_conformance.bench.subjects import TrainerSubject

forward, onload, in_flight = TrainerSubject.forward, megastow.MemoryManager.onload, []


def remembering(manager, *kinds, **options):
    in_flight[:] = [options.get("non_blocking")]
    return onload(manager, *kinds, **options)


def too_early(subject):
    first, *others = forward(subject)
    return (b"\\0" * len(first) if any(in_flight) else first, *others)


megastow.MemoryManager.onload, TrainerSubject.forward = remembering, too_early
"""

BROKEN = """
from megastow_conformance.bench.subjects import ManyTensors

make = ManyTensors.__init__


def broken(self, num_tensors, smallest, largest, device):
    if smallest != largest:
        raise ArithmeticError("meddled with")
    make(self, num_tensors, smallest, largest, device)


ManyTensors.__init__ = broken
"""

BROKEN_ON_RANK_1 = "import os" + BROKEN.replace("if smallest", "if os.environ.get('RANK') == '1' and smallest")

# When the others have what this rank then has not: what a later row would measure anew.
BROKEN_AT_THE_END_ON_RANK_1 = """
import os
from megastow_conformance.bench import baselines

forget, left = baselines.forget_page_locked, [os.environ.get("RANK") == "1"]


def broken():
    forget()
    if any(left) and left.pop():
        raise ArithmeticError("meddled with")


baselines.forget_page_locked = broken
"""

# As the time limit of a rank does it.
ENDED = "import os" + BROKEN.replace('raise ArithmeticError("meddled with")', "os._exit(3)")

# An allocator that counts, and a driver that tells of a MiB more each time that it is asked.
ALLOCATOR = """
import itertools
import torch
from megastow.device import CpuDevice
from megastow.report import MemoryFigures

asked = itertools.count(100)
CpuDevice.memory = lambda device: MemoryFigures(1 << 30, 2 << 20, next(asked) << 20)
torch.cuda.reset_peak_memory_stats = lambda device: None
torch.cuda.max_memory_allocated = lambda device: (1 << 30) + (5 << 20)
"""

# Managers that hold a TiB more on the host than a move has filled.
HOLDING = """
import megastow

held = megastow.MemoryManager.host_bytes
megastow.MemoryManager.host_bytes = property(lambda manager: held.fget(manager) + (1 << 40))
"""

SLOW = """
import time

from megastow_conformance.bench.subjects import ManyTensors

make = ManyTensors.__init__


def slow(self, *details):
    time.sleep(2)
    make(self, *details)


ManyTensors.__init__ = slow
"""


def rows_of(outcome, rank=0):
    return {row["id"]: row for row in outcome["ranks"][rank]["rows"]}


@pytest.mark.slow
def test_a_run_says_everything_and_compares_all_bits(run_megastow, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "picture"
    chosen = "cold,steady,host,cycle,replicas,page-locked,megatron,memory-saver"
    result, outcome = run_megastow("bench", *QUICK, f"--rows={chosen}", f"--plot={plot}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "There is no GPU here" in result.stdout
    assert "IDENTICAL" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert outcome["command"].startswith("megastow bench --size=tiny")
    assert outcome["versions"]["megatron-core"]
    assert outcome["versions"]["revision"] == find_revision(megastow.__file__)
    assert outcome["hardware"]["host_bytes"] > 0
    assert outcome["hardware"]["cpu"] == machine.cpu_model()
    assert (machine.cpu_model() or "CPU") in result.stdout.splitlines()[0]
    assert outcome["size"]["name"] == "tiny"
    assert outcome["differences"] == outcome["failed"] == []

    (rank,) = outcome["ranks"]
    assert {"first_touch", "out", "in", "both"} == rank["bounds"].keys()
    assert all(bound["bytes_per_second"] > 0 for bound in rank["bounds"].values())
    assert {"before the model", "trained", "offloaded", "onloaded"} <= rank["memory"].keys()
    assert list(rank["timeline"]["phases"]) == ["resident", "offload", "offloaded", "onload", "resident again"]
    assert len(rank["timeline"]["samples"]) > 5

    rows = rows_of(outcome)
    assert ",".join(rows) == chosen
    unavailable = {"replicas", "megatron", "memory-saver"}
    assert {row_id for row_id, row in rows.items() if row["status"] == "not available"} == unavailable
    assert rows["replicas"]["goals"]["all out"]["limit"] == 0.95
    assert all(rows[row_id]["notes"] for row_id in unavailable)
    assert {row_id for row_id, row in rows.items() if row["status"] == "measured"} == rows.keys() - unavailable
    offload, onload, at_once = rows["steady"]["figures"]
    assert [figure["name"] for figure in (offload, onload, at_once)] == ["offload", "onload", "onload at once"]
    size = SIZES["tiny"]
    small_ones = (size.layers * 13 + 2) * size.hidden  # biases and norms
    # A weight of 2 bytes, a main weight and two moments of 4.
    assert offload["bytes"] == pytest.approx(14 * (size.num_parameters + small_ones), rel=1e-4)
    for figure in (offload, onload):
        assert len(figure["value"]["values"]) == len(figure["seconds"]["values"]) == 2
        assert figure["value"]["min"] <= figure["value"]["median"] <= figure["value"]["max"]
        assert figure["goal"]["limit"] in (0.98, 0.97)
        bound = rank["bounds"]["out" if figure["name"] == "offload" else "in"]
        assert figure["against"] == bound["name"]
        for seconds, value in zip(figure["seconds"]["values"], figure["value"]["values"], strict=True):
            assert value == pytest.approx(figure["bytes"] / seconds / bound["bytes_per_second"], rel=0.01)
    # Two repeats, two onloads at once, and once more for the timeline.
    assert rows["steady"]["states_compared"] == 5
    assert len(rows["cold"]["figures"][0]["seconds"]["values"]) == 2
    (held,) = rows["host"]["figures"]
    assert held["value"]["median"] >= 1
    assert outcome["states_compared"] == sum(row["states_compared"] for row in rows.values()) > 20


@pytest.mark.slow
def test_a_wrong_byte_is_found_and_stops_no_other_row(run_megastow):
    result, outcome = run_megastow("bench", *QUICK, "--rows=steady,cycle", meddle=FLIP)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "DIFFERENT" in result.stdout
    rows = rows_of(outcome)
    assert any("chunk0.param." in difference for difference in rows["steady"]["differences"])
    assert all("1 of " in difference and "(byte 5)" in difference for difference in rows["steady"]["differences"])
    assert rows["cycle"]["differences"] == []
    assert rows["cycle"]["status"] == "measured"
    assert rows["steady"]["differences"][0] in outcome["differences"][0]


@pytest.mark.slow
def test_gradients_must_come_back_as_zeros_and_a_forward_pass_must_find_all_that_it_needs(run_megastow):
    result, outcome = run_megastow("bench", *QUICK, "--rows=steady,overlap", meddle=DIRTY)
    assert result.returncode == 1, result.stdout + result.stderr
    rows = rows_of(outcome)
    assert all("buffers0.grad_data are not zero" in difference for difference in rows["steady"]["differences"])
    assert rows["steady"]["differences"][0].startswith("1 of ")
    assert rows["overlap"]["differences"] == []

    result, outcome = run_megastow("bench", *QUICK, "--rows=steady,overlap", meddle=EARLY)
    assert result.returncode == 1, result.stdout + result.stderr
    rows = rows_of(outcome)
    assert rows["steady"]["differences"] == []
    assert [difference.partition(" instead of ")[0] for difference in rows["overlap"]["differences"]] == [
        "loss 0 is 00000000"
    ] * 2


@pytest.mark.slow
def test_a_row_that_raises_is_said_and_stops_no_other_row(run_megastow):
    result, outcome = run_megastow("bench", *QUICK, "--rows=small,cycle", meddle=BROKEN)
    assert result.returncode == 3, result.stdout + result.stderr
    rows = rows_of(outcome)
    assert rows["small"]["status"] == "failed"
    assert rows["small"]["notes"] == ["ArithmeticError: meddled with"]
    assert rows["cycle"]["status"] == "measured"
    assert outcome["failed"] == ["small"]
    assert "FAILED: small" in result.stdout


@pytest.mark.slow
def test_a_row_that_raises_on_one_rank_fails_on_all_and_the_next_is_measured(run_megastow):
    rows = "--rows=blocked,small,overlap"
    result, outcome = run_megastow("bench", *QUICK, rows, "--ranks=2", meddle=BROKEN_ON_RANK_1)
    assert result.returncode == 3, result.stdout + result.stderr
    reasons = [rows_of(outcome, rank)["small"]["notes"][0] for rank in (0, 1)]
    assert reasons == ["it failed on another rank: 1", "ArithmeticError: meddled with"]
    for rank in (0, 1):
        statuses = {row_id: row["status"] for row_id, row in rows_of(outcome, rank).items()}
        assert statuses == {"blocked": "measured", "small": "failed", "overlap": "measured"}
    assert outcome["complete"]
    assert outcome["failed"] == ["small"]


@pytest.mark.slow
def test_ranks_stay_in_step_where_one_has_what_another_failed_to_get(run_megastow):
    rows = "--rows=cold,page-locked"
    result, outcome = run_megastow("bench", *QUICK, rows, "--ranks=2", meddle=BROKEN_AT_THE_END_ON_RANK_1)
    assert result.returncode == 3, result.stdout + result.stderr
    for rank in (0, 1):
        statuses = {row_id: row["status"] for row_id, row in rows_of(outcome, rank).items()}
        assert statuses == {"cold": "failed", "page-locked": "measured"}


@pytest.mark.slow
def test_what_was_measured_outlives_a_run_that_is_ended(run_megastow):
    result, outcome = run_megastow("bench", *QUICK, "--rows=small,cycle", meddle=ENDED)
    assert result.returncode == 3, result.stdout + result.stderr
    assert not outcome["complete"]
    assert {row_id: row["status"] for row_id, row in rows_of(outcome).items()} == {"cycle": "measured"}


@pytest.mark.slow
def test_rows_of_digests_and_of_moves_in_the_background(run_megastow):
    result, outcome = run_megastow("bench", "--repeats=1", "--rows=digest,derived,blocked,residue,swap,overlap")
    assert result.returncode == 0, result.stdout + result.stderr
    figures = {name: [figure["name"] for figure in row["figures"]] for name, row in rows_of(outcome).items()}
    assert figures == {
        "digest": ["offload", "onload"],
        "derived": ["offload", "onload", "host memory"],
        "blocked": ["offload", "onload", "released at 3/4"],
        "residue": ["resident"],
        "swap": ["both ways"],
        "overlap": ["first forward"],
    }


@pytest.mark.slow
def test_device_memory_is_in_figures_where_an_allocator_counts(run_megastow):
    result, outcome = run_megastow("bench", "--repeats=1", "--rows=residue,swap", meddle=ALLOCATOR)
    assert result.returncode == 0, result.stdout + result.stderr
    found = {id_: {f["name"]: f["value"]["median"] for f in row["figures"]} for id_, row in rows_of(outcome).items()}
    parts = dict(found["residue"])
    assert parts["reserved"] == 2 << 20
    assert parts.pop("driver") == sum(parts.values()) > 100 << 20
    assert list(parts) == [
        "reserved",
        *("by CUDA's context and others", "by the first collective", "by measuring bounds", "by training"),
        "by moves, since",
    ]
    assert min(parts.values()) >= 1 << 20
    assert found["swap"]["peak beyond the larger"] == 5 << 20
    goal = rows_of(outcome)["swap"]["goals"]["peak beyond the larger"]
    assert (goal["limit"], goal["at_most"]) == (DEFAULT_WINDOW_BYTES + (64 << 20), True)


@pytest.mark.slow
def test_what_is_left_when_time_is_up_is_said(run_megastow):
    result, outcome = run_megastow("bench", *QUICK, "--rows=small,cycle", "--time-limit=1", meddle=SLOW)
    assert result.returncode == 0, result.stdout + result.stderr
    last = rows_of(outcome)["small"]  # of the two, in the order of the table
    assert last["status"] == "not run"
    assert "out of time" in last["notes"][0]


@pytest.mark.slow
def test_every_rank_measures(run_megastow):
    result, outcome = run_megastow("bench", "--repeats=1", "--rows=cycle,replicas", "--ranks=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(outcome["ranks"]) == 2
    assert outcome["differences"] == []
    for rank in (0, 1):
        rows = rows_of(outcome, rank)
        assert rows["cycle"]["status"] == rows["replicas"]["status"] == "measured"
        figures = {figure["name"]: figure for figure in rows["replicas"]["figures"]}
        ways = ("out", "back", "on the host")
        assert list(figures) == [f"{what} {way}" for what in ("weights", "all") for way in ways]
        assert figures["all out"]["against"] == "2 times the memory copy out"
        assert figures["all out"]["bytes"] > 5 * figures["weights out"]["bytes"]  # main weights and states, too
        for what in ("weights", "all"):
            held = figures[f"{what} on the host"]
            assert 1 <= held["value"]["median"] < 1.2
            assert held["value"]["median"] == pytest.approx(2 * held["bytes"] / figures[f"{what} out"]["bytes"])
        assert not rows["replicas"]["notes"]
        assert outcome["ranks"][rank]["bounds"]["all_gather"]["bytes_per_second"] > 0


@pytest.mark.slow
def test_host_memory_is_what_a_manager_holds(run_megastow):
    result, outcome = run_megastow("bench", "--repeats=1", "--rows=derived,replicas", "--ranks=2", meddle=HOLDING)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = rows_of(outcome)
    held = [figure for row in rows.values() for figure in row["figures"] if "host" in figure["name"]]
    assert [figure["bytes"] >> 40 for figure in held] == [1, 1, 1]


def test_rows_that_do_not_exist_are_refused_with_those_that_do(run_megastow):
    result, outcome = run_megastow("bench", "--rows=steady,steedy")
    assert result.returncode == 3
    assert outcome is None
    assert "'steedy'" in result.stderr
    assert "there are cold, steady, digest, derived, host" in result.stderr


# --- without a process ------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_issue_and_the_baselines_come_last():
    rows = known_rows()
    ours = {row.id: row for row in rows if not row.is_baseline}
    assert set(ours) == {
        *("steady", "small", "cold", "prepared", "host", "swap", "replicas", "blocked", "overlap", "cycle", "residue"),
        *("digest", "derived"),
    }
    assert all(row.goals for row in ours.values())
    assert [row.is_baseline for row in rows] == sorted(row.is_baseline for row in rows)
    assert [row.id for row in choose_rows(["pageable", "cold"])] == ["cold", "pageable"]


def test_a_row_is_one_function(monkeypatch):
    known_rows()
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))

    @registry.row("new", "what it is", {"figure": Goal(1.0)})
    def new(session):
        return [Figure("figure", Spread((1.0,)))]

    (row,) = choose_rows(["new"])
    assert row.measure is new


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Released:
    """A handle of a move that lasts 0.4 s, and releases a byte at each of some moments."""

    def __init__(self, clock, *moments):
        self.clock = clock
        self.moments = moments
        self.start = clock.now

    def seconds(self):
        return self.clock.now - self.start

    def done(self):
        return self.seconds() >= 0.4

    @property
    def released_bytes(self):
        return sum(self.seconds() >= moment for moment in self.moments)

    def wait(self):
        return None


@pytest.mark.parametrize(
    ("moments", "held", "released"),
    [((0.0, 0.1, 0.39), 0.0, 2), ((0.39, 0.39, 0.39), 0.0, 0), ((), 0.0, 0), ((0.1, 0.29), 0.4, 1), ((0.31,), 0.0, 0)],
)
def test_what_is_released_at_the_end_is_not_released_early(monkeypatch, moments, held, released):
    """Three quarters of the time from the call on, of which it holds its caller for a part."""
    clock = Clock()
    monkeypatch.setattr(rows, "time", clock)

    def offload():
        clock.sleep(held)
        return Released(clock, *moments)

    assert rows._released_at(0.75, offload) == released


def test_a_copy_finds_what_is_not_the_same():
    state = {"a": torch.arange(300.0), "b": torch.randn(7, 5).t(), "empty": torch.empty(0), "c": torch.ones(3).bool()}
    copy = StateCopy(state)
    assert copy.nbytes == 300 * 4 + 35 * 4 + 3
    assert copy.differences(state) == []
    assert copy.differences({**state, "more": torch.ones(1)}) == ["more was not there before"]
    assert copy.differences({n: t for n, t in state.items() if n != "b"}) == ["b is gone"]
    assert copy.differences({**state, "a": torch.arange(299.0)}) == ["a has 1196 bytes instead of 1200"]
    state["a"].view(torch.uint8)[1023] ^= 1
    assert copy.differences(state) == ["1 of 1200 bytes of a differ (byte 1023)"]
    state["a"].untyped_storage().resize_(0)
    assert copy.differences(state) == ["a has no memory"]


def test_a_copy_keeps_the_bits_of_nan_and_of_zero():
    state = {"a": torch.tensor([float("nan"), 0.0])}
    copy = StateCopy(state)
    assert copy.differences(state) == []
    state["a"][1] = -0.0
    assert len(copy.differences(state)) == 1


def test_zeros_are_looked_for_in_whole_storages_by_the_bit():
    flat = torch.zeros(100)
    grads = {"flat": flat, "view": flat[10:20], "other": torch.zeros(3, dtype=torch.bfloat16), "empty": torch.empty(0)}
    assert not_zero(grads) == []
    flat[50] = -0.0
    assert not_zero(grads) == ["1 of 400 bytes under flat are not zero"]
    assert not_zero({"view": flat[10:20]}) == ["1 of 400 bytes under view are not zero"]
    flat.untyped_storage().resize_(0)
    assert not_zero(grads) == ["flat has no memory"]


def result_of(*rows, device="cpu"):
    rank = RankResult({}, rows, {}, Timeline())
    return BenchResult("megastow bench", "today", device, {}, {}, {"name": "tiny"}, 1, 60, (rank,), 1.0)


def row_of(**values):
    row = RowResult("row", "what it is", False, {"offload": Goal(0.95)}, Status.MEASURED)
    return dataclasses.replace(row, **values)


def shown(result):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(bench_table(result))
    return capture.get()


def test_a_picture_needs_no_figures(tmp_path):
    pytest.importorskip("matplotlib")
    from megastow.cli.bench_plot import draw

    result = dataclasses.replace(result_of(row_of()), hardware={"processor": "one"})
    draw(result.as_dict(), tmp_path / "picture")
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")


def test_goals_are_shown_where_nothing_was_measured():
    text = shown(result_of(row_of(status=Status.NOT_AVAILABLE, notes=("offload() cannot do that",))))
    assert "≥ 0.950" in text
    assert "not available" in text
    assert f"{row_of().id}: offload() cannot do that" in text


def test_values_are_shown_in_their_units():
    figures = (
        Figure("a", Spread((0.5, 0.7, 0.6)), against="the bound", goal=Goal(0.95)),
        Figure("b", Spread((0.004,)), Unit.SECONDS, goal=Goal(5e-3, at_most=True, unit=Unit.SECONDS)),
        Figure("c", Spread((2.0**20,)), Unit.BYTES),
    )
    text = shown(result_of(row_of(figures=figures)))
    for part in ("0.600", "0.500", "0.700", "the bound", "4 ms", "≤ 5 ms", "1 MiB"):
        assert part in text
    assert json.loads(json.dumps(result_of(row_of(figures=figures)).as_dict()))["ranks"][0]["rows"][0]["figures"]


def test_hardware_and_versions_of_a_gpu_are_said(monkeypatch):
    gpu = Gpu(0, "one", 80 << 30, pcie_generation=1, pcie_generation_max=5, pcie_width=16, pcie_width_max=16)
    monkeypatch.setattr("megastow.cli.gpus.find_gpus", lambda: [gpu])
    monkeypatch.setattr("megastow.cli.gpus.find_driver", lambda: Driver("580.159", 1))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 3))
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    found = circumstances.hardware(torch.device("cuda"))
    assert (found["device"], found["device_bytes"], found["driver"]) == ("one", 80 << 30, "580.159")
    assert found["link"] == {
        "pcie_generation": 1,
        "pcie_generation_max": 5,
        "pcie_width": 16,
        "pcie_width_max": 16,
    }
    assert circumstances.versions(torch.device("cuda"))["nccl"] == "2.28.3"
    assert "nccl" not in circumstances.versions(torch.device("cpu"))


def test_a_goal_is_met_by_its_own_limit():
    assert Goal(0.95).is_met_by(0.95)
    assert not Goal(0.95).is_met_by(0.94)
    assert Goal(1.1, at_most=True).is_met_by(1.1)
    assert not Goal(1.1, at_most=True).is_met_by(1.2)


@pytest.mark.parametrize(("seconds", "is_doubted"), [(1.0, False), (0.9, True)])
def test_a_bound_that_was_beaten_is_doubted(seconds, is_doubted):
    session = Session(SIZES["tiny"], 1, device_for(torch.device("cpu")), Meeting())
    session.bounds["out"] = Bound("copy out", 100, Spread((1.2, 1.0)))
    figure = session.over_bound("offload", "out", 100, [seconds] * 3)
    assert figure.value.median == pytest.approx(1 / seconds)
    notes, _, _ = session.take_findings()
    assert [*notes] == [
        "offload was faster than the copy out, so that was measured too low; run this again"
    ] * is_doubted


def meetings(number_of_ranks, work):
    """What becomes of some work on each rank; a rank is a thread here."""
    store = torch.distributed.HashStore()

    def on_rank(rank):
        meeting = Meeting(store, rank, number_of_ranks)
        found = []
        for part in work:
            try:
                with meeting.together():
                    result = part(meeting, rank)
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            found.append(result)
        return found

    with ThreadPoolExecutor(number_of_ranks) as pool:
        ranks = [pool.submit(on_rank, rank) for rank in range(number_of_ranks)]
        return [rank.result(60) for rank in ranks]


@pytest.mark.parametrize("before", [0, 2])
def test_ranks_are_in_step_after_a_failure_of_one(before, monkeypatch):
    monkeypatch.setattr("megastow_conformance.bench.meeting._MOST_SECONDS", 20.0)  # out of step, they would wait

    def uneven(meeting, rank):
        for _ in range(before):
            meeting.meet()
        if rank == 1:
            raise ArithmeticError("only here")
        meeting.meet()
        raise AssertionError("nobody gets here")

    def at_the_end(meeting, rank):
        meeting.meet()
        return 1 // (rank - 2)  # after the last meeting

    def careless(meeting, rank):
        if rank == 0:
            raise ArithmeticError("only here")
        with contextlib.suppress(RankError):
            meeting.meet()
        meeting.meet()  # one more than the others have

    def fine(meeting, rank):
        meeting.meet()
        return "fine"

    def all_of_them(meeting, rank):
        raise KeyError(rank)

    first, second, third = meetings(3, [uneven, fine, at_the_end, careless, all_of_them, fine])
    from_first, from_second = "RankError: it failed on another rank: 0", "RankError: it failed on another rank: 1"
    from_third = "RankError: it failed on another rank: 2"
    raised, divided = "ArithmeticError: only here", "ZeroDivisionError: integer division or modulo by zero"
    assert first == [from_second, "fine", from_third, raised, "KeyError: 0", "fine"]
    assert second == [raised, "fine", from_third, from_first, "KeyError: 1", "fine"]
    assert third == [from_second, "fine", divided, from_first, "KeyError: 2", "fine"]


def test_the_verdict_says_what_was_compared():
    assert "IDENTICAL, bit for bit, in all 3" in bench_verdict(result_of(row_of(num_compared=3)))
    assert "nothing was compared" in bench_verdict(result_of(row_of()))
    different = bench_verdict(result_of(row_of(num_compared=3, differences=("1 of 2 bytes of x differ",) * 12)))
    assert "DIFFERENT: 12 times" in different
    assert "rank 0: row: 1 of 2 bytes of x differ" in different
    assert "and 2 more" in different
