"""What must agree across the files of this repository, so that nobody has to remember it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megastow_conformance import skips
from megastow_conformance.rows import DOUBLES, read_matrix

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = [
    "core",
    "conformance",
    *sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.glob("adapters/*/pyproject.toml")),
]
ROWS = read_matrix(ROOT / "matrix.toml")


def project(folder):
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]


def test_all_distributions_have_one_version():
    assert len({project(folder)["version"] for folder in FOLDERS}) == 1


def test_the_changelog_knows_the_version():
    assert f"## [{project('core')['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_distributions_ask_for_each_other_in_the_version_they_have():
    major, minor, _ = project("core")["version"].split(".")
    for folder in FOLDERS:
        given = project(folder)
        wanted = given["dependencies"] + [
            line for extra in given.get("optional-dependencies", {}).values() for line in extra
        ]
        for line in wanted:
            if line.startswith("megastow") and "[" not in line:
                assert line.endswith(f">={major}.{minor},<{major}.{int(minor) + 1}"), (folder, line)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_distribution_carries_the_license_and_its_types(folder):
    assert (ROOT / folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    (package,) = [path for path in (ROOT / folder / "src").iterdir() if (path / "__init__.py").is_file()]
    assert (package / "py.typed").is_file()
    assert package.name == project(folder)["name"].replace("-", "_")


def test_core_needs_torch_and_packaging_only():
    assert sorted(re.split(r"[<>=!~\[ ;]", line)[0] for line in project("core")["dependencies"]) == [
        "packaging",
        "torch",
    ]


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_every_row_is_of_things_that_exist(row):
    declared = {
        name for folder in FOLDERS for name in project(folder).get("entry-points", {}).get("megastow.adapters", {})
    }
    assert row.adapter in declared
    package, _, module = row.harness.partition(".")
    assert (ROOT / "conformance" / "src" / package / f"{module}.py").is_file()
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:2\d\.(0[1-9]|1[0-2])-py3", row.image), "no pinned image"
    if row.source == "double":
        assert (DOUBLES / row.megatron / "megatron").is_dir()
    elif row.source == "pypi":
        assert re.fullmatch(r"\d+\.\d+\.\d+", row.megatron), "no exact version"


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_row_says_what_kind_of_evidence_it_gives(row):
    assert (row.evidence == "double") == (row.source == "double")
    assert row.id.endswith("-double") == (row.source == "double")
    if row.source == "pypi":
        assert row.id == f"{row.id.partition('-')[0]}-{row.megatron.rpartition('.')[0]}"


def test_rows_are_run_with_pythons_that_the_distributions_support():
    oldest = project("core")["requires-python"].removeprefix(">=")
    for row in ROWS.values():
        assert tuple(map(int, row.python.split("."))) >= tuple(map(int, oldest.split("."))), row.id


def test_ci_runs_every_adapter_every_change_of_layout_and_only_what_it_can_get():
    chosen = [row for row in ROWS.values() if row.ci]
    assert {row.adapter for row in chosen} == {row.adapter for row in ROWS.values()}
    assert {row.megatron for row in chosen if row.source == "pypi"} >= {
        *("0.6.0", "0.8.0", "0.9.0", "0.10.0", "0.12.3", "0.13.1", "0.14.0", "0.16.1", "0.19.2")
    }
    assert all(row.source != "tree" and row.device == "any" and row.scope != "full" for row in chosen)
    assert len({row.torch for row in chosen}) == 1, "they are run in one session"


def test_the_declared_skips_are_those_of_the_harnesses():
    declared = skips.read_skips(ROOT / "conformance" / "skips.json")
    assert list(declared) == list(ROWS)
    found = skips.static_differences(declared, ROWS.values())
    assert not found, "\n".join([*found, f"if that is meant: {skips.COMMAND}"])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before Python 3.11, nox brings tomli")
def test_noxfile_can_read_the_matrix_before_anything_is_installed():
    code = "import sys; sys.path.insert(0, 'conformance/src'); import megastow_conformance.rows"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd=ROOT)


def test_importing_the_plugin_loads_neither_torch_nor_megatron():
    code = (
        "import sys, megastow_conformance.plugin\n"
        "print(*[name for name in sys.modules if name in ('torch', 'megatron', 'megastow')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


# --- layers ----------------------------------------------------------------------------------------------------------

CORE = ROOT / "core" / "src" / "megastow"


def imported_modules(file):
    """The modules of the core that one of its files imports, wherever it does; not what only type checkers read."""
    tree = ast.parse(file.read_text())
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in unread:
            package, _, module = (node.module or "").partition(".")
            if package == "megastow":
                yield from [module.partition(".")[0]] if module else [alias.name for alias in node.names]


def test_imports_point_down_the_layers_that_the_architecture_lists():
    _, _, table = (
        (ROOT / "docs" / "architecture.md").read_text().partition("| module | why it exists |\n| --- | --- |\n")
    )
    names = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.partition("\n\n")[0].splitlines()]
    modules = {path.stem for path in CORE.glob("*.py")} - {"__init__"} | {"cli"}
    layers = {name: number for number, layer in enumerate(names) for name in layer}
    assert modules == layers.keys()
    assert sum(map(len, names)) == len(modules), "one is listed twice"
    upward = [
        f"{name} imports {other}"
        for name in modules
        for file in ((CORE / name).glob("*.py") if name == "cli" else [CORE / f"{name}.py"])
        for other in imported_modules(file)
        if layers.get(other, len(names)) < layers[name]
    ]
    assert upward == []
