"""The committed list of what is not tested, and why; nothing may be left out, or come back, without a change of it.

A suite that silently skips everything is worse than none. So what each row of the matrix lacks is computed from its
harness, which needs no Megatron, and compared with a file in the repository: by a test, for all rows, and at the end of
a run, for the rows that ran, together with the skips that only showed while checks ran.

``python -m megastow_conformance.skips --matrix matrix.toml --skips conformance/skips.json`` compares, with ``--update``
it writes. What shows at run time is written by ``pytest --megastow-skips FILE --megastow-update-skips``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megastow_conformance.marks import Mark, suite_marks
from megastow_conformance.plan import lacks_of
from megastow_conformance.recorder import Result
from megastow_conformance.report import dumps
from megastow_conformance.rows import MatrixError, Row, read_matrix
from megastow_conformance.scenarios import SCENARIOS, reason_against

DEVICES = ("cpu", "cuda")

AT_RUN_TIME = "at run time"

COMMAND = "python -m megastow_conformance.skips --update"
"""What writes the file anew."""

Declared = dict[str, dict[str, Any]]
"""The file: by row, for ``"any"`` device or one of ``DEVICES``: by reason, ``"not trained"``: scenarios, and ``"not
tested"``: scenarios by test. And ``AT_RUN_TIME``: by device, test and reason, where a check ended in a skip."""


def read_skips(file: Path) -> Declared:
    """Reads the file; a missing one declares nothing."""
    if not file.is_file():
        return {}
    content: Declared = json.loads(file.read_text(encoding="utf-8"))
    return content


def write_skips(file: Path, declared: Declared) -> None:
    """Writes the file."""
    file.write_text(dumps(declared), encoding="utf-8")


def static_skips(row: Row, marks: Mapping[str, Mark] | None = None) -> dict[str, Any]:
    """What a row's Megatron lacks, and so what is not tested on it, on each device type.

    Args:
        row: The row; its Megatron need not be there.
        marks: The marks of the tests by name; the suite's own by default.
    """
    found = {
        device: dict(_not_tested(lacks_of(row, device), suite_marks() if marks is None else marks))
        for device in DEVICES
    }
    common = {reason: what for reason, what in found["cpu"].items() if found["cuda"].get(reason) == what}
    parts = {
        "any": common,
        **{device: {r: w for r, w in reasons.items() if r not in common} for device, reasons in found.items()},
    }
    return {device: reasons for device, reasons in parts.items() if reasons}


def _not_tested(lacks: Mapping[str, str], marks: Mapping[str, Mark]) -> Iterator[tuple[str, dict[str, Any]]]:
    """By reason, the scenarios that are not trained, and those that are but that a test cannot do with."""
    not_trained: dict[str, list[str]] = {}
    not_tested: dict[str, dict[str, list[str]]] = {}
    for name, scenario in SCENARIOS.items():
        reason = reason_against(lacks, scenario.needs)
        if reason is not None:
            not_trained.setdefault(reason, []).append(name)
            continue
        for test, mark in marks.items():
            reason = reason_against(lacks, scenario.needs | mark.needs)
            if reason is not None and mark.wanted(scenario):
                not_tested.setdefault(reason, {}).setdefault(test, []).append(name)
    for reason in dict.fromkeys(lacks.values()):
        parts = {"not trained": not_trained.get(reason), "not tested": not_tested.get(reason)}
        if any(parts.values()):
            yield reason, {name: part for name, part in parts.items() if part}


def static_differences(declared: Declared, rows: Iterable[Row]) -> list[str]:
    """Where the file and what the harnesses say differ, in words; nothing of the run itself is looked at."""
    found = []
    for row in rows:
        committed = {name: part for name, part in declared.get(row.id, {}).items() if name != AT_RUN_TIME}
        actual = static_skips(row)
        for device in sorted(committed.keys() | actual.keys()):
            was, now = committed.get(device, {}), actual.get(device, {})
            changed = [reason for reason in {**now, **was} if was.get(reason) != now.get(reason)]
            found += [
                f"{row.id} on {device}, {reason!r}: declared {_short(was.get(reason))}, now {_short(now.get(reason))}"
                for reason in changed
            ]
    return found


def run_differences(declared: Declared, device: str, results: Iterable[Result]) -> list[str]:
    """Where the file and what happened at run time differ, in words; tests that did not run are not looked at.

    But that some did run is: a suite whose every test is skipped, for want of a GPU, say, must not look like a pass.
    """
    results = list(results)
    found = ["not one check was started"] if results and not any(result.began for result in results) else []
    for result in results:
        reasons = declared.get(result.row, {}).get(AT_RUN_TIME, {}).get(device, {}).get(result.test, {})
        expected = [reason for reason, places in reasons.items() if result.where in places]
        name = f"{result.row}: {result.test} on {result.where}"
        if _is_skip(result) and result.detail not in expected:
            found.append(f"{name} was skipped, which is not declared: {result.detail}")
        elif expected and result.verdict == "passed":
            found.append(f"{name} passed, but is declared as skipped: {expected[0]}")
    return found


def updated(declared: Declared, rows: Iterable[Row], device: str, results: Iterable[Result]) -> Declared:
    """The file's content with what rows lack now, and what happened to the tests that ran."""
    content = {row_id: dict(parts) for row_id, parts in declared.items()}
    for row in rows:
        at_run_time = content.pop(row.id, {}).get(AT_RUN_TIME, {})
        ran = [result for result in results if result.row == row.id and result.began]
        here = {
            (test, reason, place)
            for test, reasons in at_run_time.get(device, {}).items()
            for reason, places in reasons.items()
            for place in places
        }
        here -= {entry for entry in here if any((r.test, r.where) == (entry[0], entry[2]) for r in ran)}
        here |= {(result.test, result.detail, result.where) for result in ran if _is_skip(result)}
        tree: dict[str, dict[str, list[str]]] = {}
        for test, reason, place in sorted(here):
            tree.setdefault(test, {}).setdefault(reason, []).append(place)
        at_run_time = {d: t for d, t in {**at_run_time, device: tree}.items() if t}
        content[row.id] = {**static_skips(row), **({AT_RUN_TIME: at_run_time} if at_run_time else {})}
    return content


def _is_skip(result: Result) -> bool:
    return result.verdict == "skipped" and result.began


def _short(what: Mapping[str, Any] | None) -> str:
    return "nothing" if not what else json.dumps(what)


def main(arguments: list[str] | None = None) -> int:
    """Compares the file with what the harnesses say of each row of a matrix, or writes it."""
    parser = argparse.ArgumentParser(prog="python -m megastow_conformance.skips", description=__doc__.split("\n")[0])
    parser.add_argument("--matrix", type=Path, default=Path("matrix.toml"))
    parser.add_argument("--skips", type=Path, default=Path("conformance/skips.json"))
    parser.add_argument("--update", action="store_true", help="write the file")
    options = parser.parse_args(arguments)
    try:
        rows = read_matrix(options.matrix)
        declared = read_skips(options.skips)
        if options.update:
            content = updated(declared, rows.values(), "cpu", ())
            write_skips(options.skips, {row_id: content[row_id] for row_id in rows})
            return 0
        differences = static_differences(declared, rows.values())
    except MatrixError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    differences += [f"the matrix has no row {row_id!r}" for row_id in declared if row_id not in rows]
    for difference in differences:
        sys.stderr.write(f"{options.skips}: {difference}\n")
    if differences:
        sys.stderr.write(f"If that is meant: {COMMAND}\n")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
