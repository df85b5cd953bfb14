"""The command line: what the doctor concludes from facts, and how the commands fail when something is missing."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.version import Version
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from megastow.cli import bench, doctor, gpus
from megastow.cli.app import app
from megastow.cli.console import print_group
from megastow.cli.doctor import Diagnosis, examine
from megastow.cli.gpus import Driver, Gpu
from megastow.cli.launch import what_cannot_be_written
from megastow.cli.tables import diagnosis_tables
from megastow.machine import CgroupMemory, HostLimits
from megastow.megatron import MegatronInfo
from megastow.plain import PlainAdapter
from megastow.registry import Verdict

GIB = 1 << 30
MEGATRON = MegatronInfo(Path("/somewhere/megatron"), Version("0.16.1"))
PLAIN = Verdict("plain", PlainAdapter(), ())


class Fitting:
    """An adapter that is for one Megatron, and for nothing else."""

    name = "fitting"
    supports = "the Megatron of this test"

    def refuses_installation(self, megatron):
        return [] if megatron == MEGATRON else ["not the one of this test"]

    def refuses(self, model, optimizer):
        return []

    def bind(self, model, optimizer):
        raise NotImplementedError


def verdict(adapter, megatron=MEGATRON):
    return Verdict(adapter.name, adapter, tuple(adapter.refuses_installation(megatron)))


def limits(available=1000 * GIB, **others):
    values = {"total_bytes": 2000 * GIB, "cgroup": None, "memlock_bytes": None, "local_ranks": 1, **others}
    return HostLimits(available_bytes=available, **values)


def gpu(**values):
    return Gpu(**{"index": 0, "name": "H200", "total_bytes": 140 * GIB, "used_bytes": 20 * GIB, **values})


def diagnosis(**values):
    healthy = Diagnosis(
        torch_version="2.9",
        torch_path="/somewhere/torch",
        cuda_version="12.8",
        allocator="",
        driver=Driver("570.1", 1),
        gpus=(gpu(),),
        limits=limits(),
        huge_pages="madvise",
        usable_cpus=frozenset(range(16)),
        megatron=MEGATRON,
        verdicts=(PLAIN, verdict(Fitting())),
    )
    return dataclasses.replace(healthy, **values)


def shown(found):
    console = Console(width=200, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(diagnosis_tables(found))
    return capture.get()


def only(found):
    (finding,) = found.findings
    return finding


def test_a_machine_where_all_is_well_has_no_findings():
    found = diagnosis()
    assert found.findings == []
    assert found.is_healthy
    assert found.chosen == ("fitting",)
    assert "fitting would take charge" in found.conclusion


def test_a_megatron_that_no_adapter_accepts_is_a_problem():
    other = MegatronInfo(Path("/somewhere/megatron"), Version("0.5"))
    found = diagnosis(megatron=other, verdicts=(PLAIN, verdict(Fitting(), other)))
    assert only(found).is_problem
    assert not found.is_healthy
    text = shown(found)
    assert "not the one of this test" in text
    assert "PROBLEM" in text


def test_plain_does_not_count_as_an_adapter_for_a_megatron():
    assert not diagnosis(verdicts=(PLAIN,)).is_healthy


def test_without_megatron_plain_is_enough():
    found = diagnosis(megatron=None, verdicts=(PLAIN, verdict(Fitting(), None)))
    assert found.is_healthy
    assert not only(found).is_problem
    assert "no Megatron" in only(found).found


def test_two_adapters_for_one_megatron_are_worth_a_note():
    found = diagnosis(verdicts=(PLAIN, verdict(Fitting()), Verdict("second", Fitting(), ())))
    assert found.is_healthy
    assert "fitting and second" in only(found).found


def test_a_broken_adapter_is_worth_a_note():
    found = diagnosis(verdicts=(PLAIN, verdict(Fitting()), Verdict("broken", None, ("it could not be loaded",))))
    assert found.is_healthy
    assert "it could not be loaded" in str(only(found))


@pytest.mark.parametrize(("ranks", "available", "is_problem"), [(1, 19, True), (8, 159, True), (1, 21, False)])
def test_host_memory_that_cannot_take_what_the_device_holds_is_a_problem(ranks, available, is_problem):
    finding = only(diagnosis(limits=limits(available * GIB, local_ranks=ranks)))
    assert finding.is_problem is is_problem
    assert f"{available} GiB" in finding.found
    assert (f"{20 * ranks} GiB" if is_problem else "140 GiB") in finding.expected


def test_the_cgroup_that_limits_is_named():
    group = CgroupMemory("/sys/fs/cgroup/job", 16 * GIB, 6 * GIB)
    finding = only(diagnosis(limits=limits(10 * GIB, cgroup=group)))
    assert finding.is_problem
    assert "/sys/fs/cgroup/job is limited to 16 GiB" in finding.found


def test_memlock_informs_and_does_not_refuse():
    found = diagnosis(limits=limits(memlock_bytes=8 << 20))
    assert found.is_healthy
    assert "8 MiB" in only(found).found


def test_huge_pages_switched_off_are_worth_a_note():
    assert "huge pages" in only(diagnosis(huge_pages="never")).found


def test_small_pages_of_expandable_segments_are_worth_a_note_where_torch_can_do_better(monkeypatch):
    small, large = "expandable_segments:True", "expandable_segments:True,large_segment_size_mb:64"
    assert "20 MiB at a time" in only(diagnosis(torch_version="2.11.0+cu130", allocator=small)).found
    assert diagnosis(torch_version="2.11.0+cu130", allocator=large).findings == []
    assert diagnosis(torch_version="2.11.0+cu130", allocator="max_split_size_mb:64").findings == []
    assert diagnosis(torch_version="2.10.1", allocator=small).findings == []
    assert diagnosis(torch_version="2.11.0", allocator=small, gpus=(), driver=Driver(None, None)).findings == []
    for version in ("2.11.0-custom-build", "3.0"):
        assert len(diagnosis(torch_version=version, allocator=small).findings) == 1
    for other in ("expandable_segments:True,expandable_segments:False", f"backend:cudaMallocAsync,{small}"):
        assert diagnosis(torch_version="2.11.0", allocator=other).findings == []
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", small)
    assert examine().allocator == small
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments : True, large_segment_size_mb:64")
    assert examine().allocator == large  # which torch takes, of the two


def test_missing_lanes_are_worth_a_note():
    slow = gpu(pcie_generation=1, pcie_generation_max=5, pcie_width=8, pcie_width_max=16)
    assert "8 of 16 PCIe lanes" in only(diagnosis(gpus=(slow,))).found
    assert slow.link == "PCIe generation 5 x8 of x16 (generation 1 while idle)"
    assert gpu().link == "PCIe link unknown"


def test_a_process_bound_away_from_its_gpu_is_worth_a_note(monkeypatch):
    monkeypatch.setattr(doctor.machine, "numa_cpus", lambda node: {64, 65})
    assert "NUMA node 1" in only(diagnosis(gpus=(gpu(numa_node=1),))).found
    assert diagnosis(gpus=(gpu(numa_node=1),), usable_cpus=frozenset({65})).findings == []


def test_gpus_that_torch_cannot_use_are_worth_a_note():
    finding = only(diagnosis(gpus=(), cuda_version=None))
    assert not finding.is_problem
    assert "CPU build" in finding.found


def test_problems_come_before_notes():
    found = diagnosis(limits=limits(GIB, memlock_bytes=1 << 20), huge_pages="never")
    assert [finding.is_problem for finding in found.findings] == [True, False, False]


def test_everything_is_shown_and_is_json():
    found = diagnosis(gpus=(gpu(numa_node=0, pci_bus_id="0000:3b:00.0"),))
    text = shown(found)
    for part in ("2.9", "570.1", "0.16.1", "/somewhere/megatron", "H200", "0000:3b:00.0", "NUMA node 0", "fitting"):
        assert part in text
    as_dict = json.loads(json.dumps(found.as_dict()))
    assert as_dict["healthy"] is True
    assert as_dict["devices"][0]["total_bytes"] == 140 * GIB
    assert as_dict["adapters"][1] == {"name": "fitting", "accepts": True, "reasons": []}


class Result:
    """What `megastow bench` has found so far."""

    def __init__(self, found):
        self.found = found

    def as_dict(self):
        return {"found": self.found}


def test_a_result_of_the_bench_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    file, link = tmp_path / "found.json", tmp_path / "link.json"
    link.symlink_to(file)
    bench._write(link, Result(1))
    bench._write(None, Result(2))
    write = Path.write_text

    def interrupted(self, text, **options):
        write(self, text[:5], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench._write(link, Result(3))
    monkeypatch.setattr(Path, "write_text", write)
    assert json.loads(file.read_text()) == {"found": 1}
    bench._write(link, Result(4))
    assert json.loads(file.read_text()) == {"found": 4}
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json", "link.json"]


def test_a_result_of_the_bench_may_go_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        text = reader.submit((tmp_path / "pipe").read_text)
        bench._write(tmp_path / "pipe", Result(1))
        assert json.loads(text.result(30)) == {"found": 1}


def test_facts_are_read_from_the_kernel(tmp_path):
    files = {
        "proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = examine(tmp_path)
    assert found.huge_pages == "madvise"
    assert found.limits.total_bytes == GIB
    assert found.driver.version is not None
    empty = examine(tmp_path / "nothing")
    assert empty.huge_pages is None


def test_a_management_library_that_refuses_is_no_answer(monkeypatch):
    class Refusing:
        class NVMLError(Exception):
            pass

        def nvmlInit(self):
            raise self.NVMLError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", Refusing())
    assert gpus.find_driver(Path("/nothing")) == Driver(None, None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.find_driver(Path("/nothing")) == Driver(None, None)


@pytest.mark.parametrize("healthy", [True, False])
def test_the_exit_status_tells_whether_an_offload_can_work(monkeypatch, healthy):
    found = diagnosis() if healthy else diagnosis(limits=limits(GIB))
    monkeypatch.setattr(doctor, "examine", lambda: found)
    for arguments in (["doctor"], ["doctor", "--json"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == (0 if healthy else 1)
    assert json.loads(result.stdout)["healthy"] is healthy


def test_the_doctor_runs_here_and_imports_no_megatron():
    code = """
        import json, sys
        from megastow.cli import main
        try:
            main(["doctor", "--json"])
        finally:
            assert not [name for name in sys.modules if name.startswith("megatron")]
    """
    result = run_python(code)
    assert result.returncode in (0, 1), result.stderr
    assert json.loads(result.stdout)["torch"]["version"]


def test_a_missing_extra_is_named():
    result = run_python("import sys; sys.modules['typer'] = None; from megastow.cli import main; main(['doctor'])")
    assert result.returncode == 1
    assert 'pip install -e "core[cli]"' in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_command_that_trains_says_what_to_install_where_its_package_is_missing(command):
    code = "import sys; sys.modules['megastow_conformance'] = None; from megastow.cli import main; "
    result = run_python(code + f"main(['{command}'])")
    assert result.returncode == 3
    assert 'pip install -e "core[demo]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_a_narrow_terminal_shows_all_figures_of_a_table():
    table = Table(*(f"heading {number}" for number in range(9)))
    table.add_row(*(f"{number}.1234567" for number in range(9)))
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True, highlight=False)
    print_group(console, Group(table, Text("and words that are folded at their ends " * 4)))
    lines = written.getvalue().splitlines()
    assert all(f"{number}.1234567" in written.getvalue() for number in range(9))
    assert max(len(line) for line in lines if "words" in line) <= 80


def test_a_file_that_could_not_be_written_at_the_end_is_told_at_the_start(tmp_path):
    missing = tmp_path / "missing" / "result.json"
    assert what_cannot_be_written([None, tmp_path / "result.json", Path("result.json")]) is None
    assert f"there is no folder {missing.parent}" in what_cannot_be_written([None, missing])


def test_the_version_is_printed():
    assert re.fullmatch(r"megastow \S+\n", CliRunner().invoke(app, ["--version"]).stdout)


def run_python(code):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
