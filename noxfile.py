"""The development tasks: ``nox -s demo``, ``nox -s tests``, ``nox -s lint``. Nothing has to be installed by hand.

What is delicate here is torch. It is large, the right build depends on the machine, and a working one must never be
replaced. So:

* Sessions have environments of their own. Nothing outside the ``.nox`` folder is ever changed.
* If the interpreter that runs nox can import torch (a GPU machine with its own CUDA build, say), the sessions use that
  very torch: its site-packages folder is put at the end of the session's path, and pip is bound to exactly its version.
* Otherwise a Linux machine without a GPU gets the version in CPU_TORCH. On PyPI that version carries CUDA libraries of
  several GB; set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds, and pip prefers the small one from there.

Megatron is never installed into a session. Each row of matrix.toml has a folder of its own, made once, and worker
processes put one of them on their path.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nox
from nox.project import load_toml

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "virtualenv"  # pip must see a borrowed torch; uv would not
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
CPU_TORCH = "2.13.0"
ROWS: list[dict[str, Any]] = load_toml(ROOT / "matrix.toml")["row"]
SUITE = "conformance/src/megastow_conformance/suite"
TEST_PATHS = ("tests", "core/tests", "adapters", "conformance/tests", SUITE)

OURS = ("-e", "core[cli]", "-e", "adapters/mcore", "-e", "conformance")
# What megatron-core needs at run time besides torch; its own requirements ask for much more.
MEGATRON_NEEDS = ("numpy", "packaging")
TEST_TOOLS = ("pytest>=8.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100")
# Pinned: a new release of these must not fail a change that has nothing to do with it.
LINT_TOOLS = ("ruff==0.17.6", "mypy==2.4.1")


@nox.session
def demo(session: nox.Session) -> None:
    """Shows what megastow does, with a real Megatron trainer; arguments go to ``megastow demo``."""
    install(session, *MEGATRON_NEEDS)
    row = next(row for row in ROWS if row["scope"] == "full")
    tree = megatron_tree(session, row)
    session.log("running the demo on megatron-core %s", row["megatron"])
    session.run("megastow", "demo", *session.posargs, env=megatron_environment({row["id"]: tree}, path=tree))


@nox.session
def tests(session: nox.Session) -> None:
    """Unit tests, and the conformance suite on every row of the matrix, in one pytest run; arguments go to pytest.

    ``--megastow-row ID`` among the arguments runs that row only.
    """
    install(session, *MEGATRON_NEEDS, *TEST_TOOLS)
    rows = chosen_rows(session.posargs)
    trees = {row["id"]: megatron_tree(session, row) for row in rows}
    arguments = [f"--megastow-matrix={ROOT / 'matrix.toml'}"]
    if not any(argument.startswith("--megastow-row") for argument in session.posargs):
        arguments += [f"--megastow-row={row['id']}" for row in rows]
    if not names_a_path(session.posargs):
        arguments += [path for path in TEST_PATHS if (ROOT / path).exists()]
    arguments += parallel(session)
    session.log("running the unit tests and the conformance suite on %s", ", ".join(trees))
    session.run("python", "-m", "pytest", *arguments, *session.posargs, env=megatron_environment(trees))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and types."""
    install(session, *LINT_TOOLS, *TEST_TOOLS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


def install(session: nox.Session, *tools: str) -> None:
    """Installs tools and then our distributions, with a torch that fits the machine."""
    folder = Path(
        session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True).strip()
    )
    link = folder / "zz_borrowed_torch.pth"  # the last of its kind, so that our own editable installs come first
    link.unlink(missing_ok=True)
    if tools:
        # Before torch is borrowed: else pip would be content with tools of the other environment, and not install
        # their commands here.
        session.log("installing tools")
        session.install("--quiet", *tools)
    constraints = Path(session.virtualenv.location) / "constraints.txt"
    constraints.write_text(torch_constraint(session, link), encoding="utf-8")
    session.log("installing megastow, its adapters and its conformance suite (editable)")
    session.install("--quiet", "--constraint", str(constraints), *OURS)
    session.run(
        "python", "-W", "ignore", "-c", "import torch; print('torch', torch.__version__, 'from', torch.__path__[0])"
    )


def torch_constraint(session: nox.Session, link: Path) -> str:
    """Decides which torch a session uses, borrows it if there is one, and returns pip's constraint for it."""
    if importlib.util.find_spec("torch") is not None:
        version = importlib.metadata.version("torch")
        folders = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
        if (link.parent / "torch").exists():  # from a run whose interpreter had none
            session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "torch")
        link.write_text("\n".join([*folders, ""]), encoding="utf-8")
        session.log("using torch %s of the interpreter that runs nox", version)
        return f"torch=={version}\n"
    if sys.platform == "linux" and not any(Path("/dev").glob("nvidia[0-9]*")):
        session.log("no torch here and no GPU: installing torch %s (a CPU build if pip can find one)", CPU_TORCH)
        return f"torch=={CPU_TORCH}\n"
    session.log("no torch here: pip installs its newest for this machine")
    return ""


def megatron_tree(session: nox.Session, row: dict[str, Any]) -> Path:
    """The folder with a row's megatron-core; made if it is not complete yet."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    tree = Path(session.cache_dir).resolve() / "megatron" / row["id"]
    marker = tree / "complete.txt"
    content = f"megatron-core {row['megatron']} for Python {python}\n"
    if marker.is_file() and marker.read_text(encoding="utf-8") == content:
        session.log("megatron-core %s is there already", row["megatron"])
        return tree
    if row["python"] != python:
        session.warn(f"{row['id']} is tested with Python {row['python']}, this is {python}")
    session.log("installing megatron-core %s into a folder of its own", row["megatron"])
    shutil.rmtree(tree, ignore_errors=True)
    # Without its requirements, which ask for more than the tests need. Releases from 0.17 on declare Python 3.12, but
    # have wheels for 3.11 and run there.
    session.run(
        *("python", "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python", "--no-compile"),
        *("--target", str(tree), f"megatron-core=={row['megatron']}"),
    )
    marker.write_text(content, encoding="utf-8")
    return tree


def megatron_environment(trees: dict[str, Path], path: Path | None = None) -> dict[str, str]:
    """The environment that tells the conformance plugin where each row's Megatron is."""
    environment = {"MEGASTOW_MEGATRON": os.pathsep.join(f"{row}={tree}" for row, tree in trees.items())}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    return environment


def chosen_rows(arguments: list[str]) -> list[dict[str, Any]]:
    """The rows that ``--megastow-row`` names, or all."""
    ids = [argument.partition("=")[2] for argument in arguments if argument.startswith("--megastow-row=")]
    ids += [after for argument, after in itertools.pairwise(arguments) if argument == "--megastow-row"]
    return [row for row in ROWS if not ids or row["id"] in ids]


def names_a_path(arguments: list[str]) -> bool:
    """Whether somebody asks for particular test files or tests."""
    return any((ROOT / argument.partition("::")[0]).exists() for argument in arguments if not argument.startswith("-"))


def parallel(session: nox.Session) -> list[str]:
    """Several pytest processes, each with its worker group; on GPUs one, since groups would share the GPUs' memory."""
    own_choice = ("-n", "--numprocesses", "--dist", "--pdb", "-s", "--capture")
    if any(argument.startswith(own_choice) for argument in session.posargs) or any(Path("/dev").glob("nvidia[0-9]*")):
        return []
    return [f"--numprocesses={min(os.cpu_count() or 1, 2 * len(ROWS))}", "--dist=loadgroup"]
