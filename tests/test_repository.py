"""What must agree across the files of this repository, so that nobody has to remember it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megastow_conformance.rows import read_matrix

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


@pytest.mark.parametrize("row", read_matrix(ROOT / "matrix.toml").values(), ids=lambda row: row.id)
def test_every_row_names_an_adapter_that_exists(row):
    declared = {
        name for folder in FOLDERS for name in project(folder).get("entry-points", {}).get("megastow.adapters", {})
    }
    assert row.adapter in declared


def test_one_row_runs_every_scenario():
    assert "full" in {row.scope for row in read_matrix(ROOT / "matrix.toml").values()}


def test_importing_the_plugin_loads_neither_torch_nor_megatron():
    code = (
        "import sys, megastow_conformance.plugin\n"
        "print(*[name for name in sys.modules if name in ('torch', 'megatron', 'megastow')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
