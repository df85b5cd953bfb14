"""Shared by the tests of the suite's machinery."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megastow.megatron import detect_megatron
from megastow_conformance.plan import TREES_VARIABLE
from megastow_conformance.rows import parse_trees

# Worker processes import the small checks and the harness without Megatron by name.
MACHINERY = Path(__file__).parent / "machinery"
sys.path.insert(0, str(MACHINERY))

MATRIX = """
[default]
harness = "machinery_harness"
source = "tree"
python = "3.11"
torch = "2.13.0"
image = "nvcr.io/nvidia/pytorch:25.11-py3"
device = "any"
evidence = "real"
ci = true

[[row]]
id = "full-0.16.1"
adapter = "mcore"
megatron = "0.16.1"
scope = "full"

[[row]]
id = "core-0.9.0"
adapter = "mcore"
megatron = "0.9.0"
scope = "core"
"""

SUITE = """
import machinery_checks as checks
import pytest

SOME = ("toy_distopt", "gpt_ep2_plainopt")


@pytest.mark.megastow(scenarios=SOME)
def test_passes(conformance):
    conformance.run(checks.passes)


@pytest.mark.megastow(scenarios="toy_distopt", worlds=(2,))
def test_fails(conformance):
    conformance.run(checks.fails)


@pytest.mark.megastow(scenarios=lambda scenario: scenario.name == "toy_distopt", worlds=(1,), seconds=1)
def test_hangs(conformance):
    conformance.run(checks.hangs)


@pytest.mark.megastow(scenarios=SOME[:1], worlds=(1,))
def test_skips(conformance):
    conformance.run(checks.skips)


@pytest.mark.megastow(scenarios=SOME[:1])
def test_says_pid(conformance):
    conformance.run(checks.says_pid, folder=FOLDER)


def test_without_megatron():
    pass
"""


@pytest.fixture
def suite(pytester, monkeypatch, tmp_path):
    """A small suite with a matrix and folders that stand for two Megatron trees; returns a function that runs it."""
    for name in ("MEGASTOW_MEGATRON", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(str(MACHINERY))
    pytester.makefile(".toml", matrix=MATRIX)
    pytester.makepyfile(test_suite=SUITE.replace("FOLDER", repr(str(tmp_path))))
    (pytester.path / "tree" / "megatron").mkdir(parents=True)
    # The plugin is loaded by its entry point when the distribution is installed, and by its name otherwise.
    plugin = "megastow_conformance.plugin"
    known = (ep.value for dist in __import__("importlib.metadata").metadata.distributions() for ep in dist.entry_points)
    load = [] if plugin in known else ["-p", plugin]
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))

    def run(*arguments, rows=("full-0.16.1",)):
        chosen = [f"--megastow-row={row}" for row in rows] + [f"--megastow-megatron={row}=tree" for row in rows]
        return pytester.runpytest_subprocess(
            *load,
            "-v",
            "-p",
            "no:cacheprovider",
            "--megastow-device=cpu",
            *chosen,
            *arguments,
        )

    return run


@pytest.fixture(scope="session")
def megatron_tree(pytestconfig):
    """The folder that holds a megatron package."""
    pairs = [pair for pair in os.environ.get(TREES_VARIABLE, "").split(os.pathsep) if pair]
    trees = parse_trees([*pairs, *pytestconfig.getoption("--megastow-megatron")])
    if trees:
        return trees.get("mcore-0.16") or next(iter(trees.values()))
    found = detect_megatron()
    if found is None:
        pytest.skip(f"no Megatron: set {TREES_VARIABLE}, or PYTHONPATH to a tree of megatron-core")
    return found.path.parent


@pytest.fixture
def run_megastow(megatron_tree, tmp_path):
    """Runs a command in a process of its own, on the CPU, and reads the JSON it wrote.

    `meddle` is code that every interpreter with the folder on PYTHONPATH runs at its start, so all ranks too.
    """

    def run(command, *arguments, meddle=""):
        (tmp_path / "sitecustomize.py").write_text(meddle)
        paths = [str(tmp_path), str(megatron_tree), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        json_file = tmp_path / "outcome.json"
        json_file.unlink(missing_ok=True)
        line = [sys.executable, "-m", "megastow.cli", command, f"--json={json_file}", *arguments]
        result = subprocess.run(line, check=False, capture_output=True, text=True, timeout=240, env=environment)
        return result, json.loads(json_file.read_text()) if json_file.exists() else None

    return run
