"""The report of a conformance run, as data: what ran, on what, and the verdict of every invariant.

It is the evidence behind the support table, so it is small enough to be committed, names no machine's folders, and says
of each verdict where it comes from. Invariants that have the same verdicts everywhere share one entry, which is what
keeps it small: in a run without failures, nearly all do.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megastow_conformance.plan import Plan
from megastow_conformance.recorder import Recorder, Result
from megastow_conformance.revision import find_revision
from megastow_conformance.rows import Row
from megastow_conformance.scenarios import SCENARIOS

SCHEMA = 1
"""Changes when a reader of reports has to change."""

INVARIANTS = (
    "bitexact",
    "identity",
    "training",
    "released",
    "residue",
    "peak",
    "host",
    "host_state",
    "grads",
    "order",
    "failure",
    "guard",
    "checkpoint",
    "select",
)
"""The ids of the invariants. A test is named after the one that it is about: ``test_training_every_point``."""

_SEVERITY = ("passed", "skipped", "failed")


class ReportError(ValueError):
    """A file is no report that can be used."""


def write_report(file: Path, config: pytest.Config, plan: Plan, recorder: Recorder) -> None:
    """Writes what a recorder has seen; a file that is there is replaced.

    Args:
        file: Where to.
        config: Of the run.
        plan: What was asked for.
        recorder: What happened.
    """
    command = _without_folders(shlex.join(["pytest", *config.invocation_params.args]), config.rootpath)
    date = dt.datetime.now(dt.timezone.utc).date().isoformat()
    revision = find_revision(__file__)
    runs = []
    for row in plan.rows:
        results = sorted(
            (result for result in recorder.results.values() if result.row == row.id),
            key=lambda result: (
                result.test,
                result.world,
                result.scenario,
            ),  # under pytest-xdist they come in any order
        )
        runs.append({**_described(row, plan, recorder, config.rootpath, revision), "date": date, "command": command})
        runs[-1].update(_verdicts(results))
        runs[-1]["not_trained"] = _not_trained(row, plan)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dumps({"schema": SCHEMA, "runs": runs}), encoding="utf-8")


def read_report(file: Path) -> list[dict[str, Any]]:
    """The runs of a report.

    Raises:
        ReportError: If it is no report, or one of another schema.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ReportError(f"{file} is no conformance report of schema {SCHEMA}")
    runs: list[dict[str, Any]] = content["runs"]
    return runs


def invariant(test: str) -> str:
    """The id of the invariant that a test is about: the longest that its name begins with, or else its first word."""
    name = test.removeprefix("test_")
    known = [each for each in INVARIANTS if f"{name}_".startswith(f"{each}_")]
    return max(known, key=len, default=name.partition("_")[0])


def tested(run: Mapping[str, Any]) -> set[tuple[str, int]]:
    """The pairs of scenario and world size that something was tested on, in a run of a report."""
    return {
        (scenario, int(world))
        for entry in run["verdicts"]
        for verdict in ("passed", "failed")
        for world, scenarios in entry.get(verdict, {}).items()
        for scenario in scenarios
    }


def holding(run: Mapping[str, Any]) -> list[str]:
    """The invariants that hold, in a run of a report: tested somewhere, and broken nowhere."""
    return [
        name
        for name in INVARIANTS
        if any(name in entry["invariants"] and entry.get("passed") for entry in run["verdicts"])
        and not any(name in entry["invariants"] and entry.get("failed") for entry in run["verdicts"])
    ]


def _described(row: Row, plan: Plan, recorder: Recorder, root: Path, revision: str | None) -> dict[str, Any]:
    """What was tested on what, as the worker processes found it."""
    facts = recorder.facts.get(row.id, {})
    path = facts.get("megatron_path")
    return {
        "row": row.id,
        "adapter": row.adapter,
        "evidence": row.evidence,
        "megatron": {
            "release": row.megatron,
            "states": facts.get("megatron"),
            "path": None if path is None else _without_folders(path, root),
        },
        "versions": {**facts.get("versions", {}), **({"revision": revision} if revision else {})},
        "device": facts.get("device", {"type": plan.device}),
        "scope": row.scope,
    }


def _verdicts(results: list[Result]) -> dict[str, Any]:
    """The verdicts of the invariants by scenario and world size, and what they amount to."""
    by_place: dict[str, dict[tuple[int, str], str]] = {}
    for result in results:
        places = by_place.setdefault(invariant(result.test), {})
        place = (result.world, result.scenario)
        # A test that is skipped says nothing about an invariant that another test has looked at there.
        known = places.get(place, result.verdict)
        verdicts = {known, result.verdict} - ({"skipped"} if {known, result.verdict} != {"skipped"} else set())
        places[place] = max(verdicts, key=_SEVERITY.index)
    entries: list[dict[str, Any]] = []
    for name, places in sorted(by_place.items(), key=lambda item: _position(item[0])):
        verdicts_here = _grouped(places)
        same = next((entry for entry in entries if entry["verdicts"] == verdicts_here), None)
        if same is None:
            entries.append({"invariants": [name], "verdicts": verdicts_here})
        else:
            same["invariants"].append(name)
    return {
        "tests": {verdict: sum(result.verdict == verdict for result in results) for verdict in _SEVERITY},
        "seconds": round(sum(result.seconds for result in results), 1),
        "verdicts": [{"invariants": entry["invariants"], **entry["verdicts"]} for entry in entries],
        "not_passed": [
            {"test": result.test, "on": result.where, "verdict": result.verdict, "why": result.detail}
            for result in results
            if result.verdict != "passed"
        ],
    }


def _grouped(places: Mapping[tuple[int, str], str]) -> dict[str, dict[str, list[str]]]:
    """By verdict and world size, the scenarios in their own order."""
    order = list(SCENARIOS)
    found: dict[str, dict[str, list[str]]] = {}
    for (world, scenario), verdict in sorted(places.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        found.setdefault(verdict, {}).setdefault(str(world), []).append(scenario)
    return found


def _not_trained(row: Row, plan: Plan) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, scenario in SCENARIOS.items():
        if reason := plan.why_not(row, scenario):
            found.setdefault(reason, []).append(name)
    return found


def _position(name: str) -> tuple[int, str]:
    return (INVARIANTS.index(name) if name in INVARIANTS else len(INVARIANTS), name)


def _without_folders(text: str, root: Path) -> str:
    """The text with paths below the root folder made relative, and other absolute ones cut to their last two parts."""
    text = text.replace(f"{root}/", "").replace(str(root), ".")
    return re.sub(r"(?<![\w.~-])(?:/[^\s/:='\"]+)*(/[^\s/:='\"]+/[^\s/:='\"]+)", r"...\1", text)


def dumps(content: Mapping[str, Any]) -> str:
    """JSON for people to read and for git to compare: lists of words take one line each."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+((?:\"[^\"\n]*\",?\s+)+)\]", _one_line, text) + "\n"


def _one_line(found: re.Match[str]) -> str:
    return f"[{' '.join(found[1].split())}]"
