"""Shared by the tests of the suite's machinery."""

import sys
from pathlib import Path

import pytest

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
