"""The support table in README: what reports say and nothing else."""

import json

import pytest

from megastow_conformance import support_table
from megastow_conformance.report import INVARIANTS, SCHEMA
from megastow_conformance.support_table import BEGIN, END

MATRIX = """
[default]
harness = "h"
source = "pypi"
python = "3.11"
torch = "2.13.0"
image = "i"
device = "any"
evidence = "real"
scope = "core"
ci = true

[[row]]
id = "one"
adapter = "a"
megatron = "1.0"

[[row]]
id = "two"
adapter = "b"
megatron = "2.0"
"""


def run(row="one", release="1.0", device="cpu", failed=(), older_than=()):
    passed = {"1": ["toy_distopt"], "2": ["toy_distopt", "gpt_distopt"]}
    return {
        "row": row,
        "adapter": "a",
        "evidence": "real",
        "megatron": {"release": release},
        "device": {"type": device, "name": "H200", "count": 2},
        "versions": {"python": "3.12.7"},
        "date": "2026-11-29",
        "verdicts": [
            {"invariants": [name for name in INVARIANTS if name not in {*failed, *older_than}], "passed": passed},
            {"invariants": list(failed), "passed": passed, "failed": {"2": ["gpt_distopt"]}},
        ],
    }


@pytest.fixture
def files(tmp_path):
    (tmp_path / "matrix.toml").write_text(MATRIX)
    (tmp_path / "README.md").write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    (tmp_path / "reports").mkdir()

    def call(*runs, check=False):
        (tmp_path / "reports" / "a.json").write_text(json.dumps({"schema": SCHEMA, "runs": runs}))
        paths = ["--readme", str(tmp_path / "README.md"), "--matrix", str(tmp_path / "matrix.toml")]
        return support_table.main([*(["--check"] if check else []), *paths, str(tmp_path / "reports")])

    return call


def test_the_table_is_written_between_its_comments_and_then_passes_the_check(files, tmp_path, capsys):
    runs = [run(), run(device="cuda", failed=("peak", "host")), run(device="xpu", older_than=("guard", "residue"))]
    assert files(*runs, check=True) == 1
    assert "is not what the reports say" in capsys.readouterr().err
    assert files(*runs) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\n| row |")
    assert text.endswith(f"|\n\n{END}\n\nafter\n")
    lines = text.splitlines()
    total = len(INVARIANTS)
    some = f"{total - 2} of {total}"
    assert f"| `one` | 1.0 | a | real | CPU | 3.12 | 2026-11-29 | 1, 2 | 2 | {total} of {total} |" in lines
    assert f"| `one` | 1.0 | a | real | 2 x H200 | 3.12 | 2026-11-29 | 1, 2 | 2 | {some} (not peak, host) |" in lines
    assert (
        f"| `one` | 1.0 | a | real | 2 x H200 | 3.12 | 2026-11-29 | 1, 2 | 2 | {some} (not asked: residue, guard) |"
        in lines
    )
    assert "| `two` | 2.0 | b | real | not run |  |  |  |  |  |" in lines
    assert files(*runs, check=True) == 0
    assert files(run(), check=True) == 1


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run(row="three")], "a report of the row 'three', which the matrix does not have"),
        (
            [run(release="0.9")],
            "the report of the row 'one' is of Megatron 0.9, and the matrix names 1.0",
        ),
    ],
)
def test_a_report_that_does_not_fit_the_matrix_is_an_error(files, capsys, runs, message):
    assert files(*runs, check=True) == 2
    assert message in capsys.readouterr().err


def test_a_readme_without_the_comments_is_an_error(files, tmp_path, capsys):
    (tmp_path / "README.md").write_text("nothing\n")
    assert files(run()) == 2
    assert "there is no place for the table" in capsys.readouterr().err
