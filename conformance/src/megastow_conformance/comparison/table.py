"""Asks every subject for every invariant, and writes down what holds.

``python -m megastow_conformance.comparison mcore-0.13=FOLDER mcore-0.14=FOLDER mcore-0.16=FOLDER --json FILE
--markdown FILE``; each FOLDER holds the package ``megatron``. With ``--from FILE`` the table is written anew from what
was found before.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megastow_conformance.judging import INVARIANTS, judge
from megastow_conformance.messages import DEFAULT_SUBJECT
from megastow_conformance.rows import Row, parse_trees, read_matrix, select_rows
from megastow_conformance.scenarios import SCENARIOS
from megastow_conformance.workers import WorkerGroup

_PACKAGE = "megastow_conformance.comparison"


@dataclass(frozen=True)
class Contender:
    """Something that is asked.

    Attributes:
        name: What it is, for people.
        subject: How to make it, as ``module:name``.
        rows: On which rows of the matrix.
    """

    name: str
    subject: str
    rows: tuple[str, ...]


CONTENDERS = (
    Contender("megastow", DEFAULT_SUBJECT, ("mcore-0.13", "mcore-0.14", "mcore-0.16")),
    Contender("megatron-core's own offloading", f"{_PACKAGE}.megatron_own:own_offload", ("mcore-0.16",)),
    Contender(
        "the classic technique",
        f"{_PACKAGE}.classic:classic_technique",
        ("mcore-0.13", "mcore-0.14", "mcore-0.16"),
    ),
)
"""What is compared. The calls of megatron-core came with 0.16; what the classic technique forgets came with 0.14."""

COMPARED = (
    "gpt_distopt",
    "gpt_plainopt",
    "toy_distopt",
    "toy_bf16_grads_distopt",
    "toy_bf16_grads_plainopt",
    "toy_overlap_distopt",
)
"""The scenarios, by name."""

_SIGNS = {"holds": "yes", "broken": "**no**", "not asked": "-"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog=f"python -m {_PACKAGE}", description=__doc__.split("\n")[0])
    parser.add_argument("trees", nargs="*", metavar="ID=FOLDER", help="a row and the folder that holds its Megatron")
    parser.add_argument("--matrix", type=Path, default=Path("matrix.toml"), help="the file with the rows")
    parser.add_argument("--from", dest="known", type=Path, help="take the findings from this file instead")
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    given = parser.parse_args(arguments)
    if given.known is not None:
        found = json.loads(given.known.read_text(encoding="utf-8"))
    else:
        trees = parse_trees(given.trees)
        found = list(compare(select_rows(read_matrix(given.matrix), trees, trees)))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.markdown is not None:
        given.markdown.write_text(markdown(found), encoding="utf-8")
    return 0


def compare(rows: Sequence[Row], scenarios: Sequence[str] = COMPARED) -> Iterator[dict[str, Any]]:
    """Every contender on every scenario, on one rank of the CPU.

    Yields:
        Who was asked, on what, and by invariant ``holds``, ``broken`` or ``not asked`` with the reasons.
    """
    for row in rows:
        with WorkerGroup(row, 1, harness=row.harness, lasting=True) as group:
            for contender in (contender for contender in CONTENDERS if row.id in contender.rows):
                for scenario in scenarios:
                    yield {
                        "subject": contender.name,
                        "megatron": row.megatron,
                        "scenario": scenario,
                        "invariants": judge_all(group, contender.subject, scenario),
                    }


def judge_all(group: WorkerGroup, subject: str, scenario: str) -> dict[str, dict[str, Any]]:
    """By invariant, whether it holds: it is broken if one of its tests objects, and holds if one was asked."""
    found: dict[str, dict[str, Any]] = {name: {"verdict": "not asked", "reasons": {}} for name in INVARIANTS}
    for finding in judge(group, SCENARIOS[scenario], subject, thorough=True):
        entry = found[finding.invariant]
        if finding.verdict == "broken":
            entry["verdict"] = "broken"
            entry["reasons"][finding.test] = without_paths(finding.reason)
        elif finding.verdict == "holds" and entry["verdict"] == "not asked":
            entry["verdict"] = "holds"
    return found


def without_paths(reason: str) -> str:
    """A reason that says nothing of the machine that it was found on."""
    short = re.sub(r"(/[\w.@+-]+){2,}", "...", reason)
    return short if len(short) <= 240 else f"{short[:240]}..."


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The table, and below it every reason."""
    lines = [
        "# What holds, of what others do",
        "",
        _ABOUT,
        "",
        "```",
        f"python -m {_PACKAGE} mcore-0.13=FOLDER mcore-0.14=FOLDER mcore-0.16=FOLDER \\",
        "    --json benchmarks/results/comparison.json --markdown docs/comparison.md",
        "```",
        "",
        _NOTES,
        "",
        f"| subject | megatron-core | scenario | {' | '.join(INVARIANTS)} |",
        f"|{' --- |' * (len(INVARIANTS) + 3)}",
    ]
    for entry in found:
        signs = " | ".join(_SIGNS[entry["invariants"][name]["verdict"]] for name in INVARIANTS)
        lines.append(f"| {entry['subject']} | {entry['megatron']} | {entry['scenario']} | {signs} |")
    lines += ["", "## Why", ""]
    for subject in dict.fromkeys(entry["subject"] for entry in found):
        reasons = _reasons([entry for entry in found if entry["subject"] == subject])
        if reasons:
            lines += [f"### {subject}", "", *reasons, ""]
    return "\n".join(lines).rstrip() + "\n"


_ABOUT = """\
The invariants of [invariants.md](invariants.md), asked of megastow, of the offloading that megatron-core ships itself,
and of the classic technique. Each runs with the real Megatron, on one rank of the CPU. Written by"""

_NOTES = """\
`-`: not asked, because it is about something that only megastow has (adapters that are chosen, named steps of a move).
What the wrappers add to the calls that they wrap is the bookkeeping of what is away, and nothing else. megatron-core's
own code tells host from device by `Tensor.is_cuda`; on a CPU, `is_cuda`, `cpu`, `cuda` and `pin_memory` of a tensor are
stood in for while it runs (`comparison/megatron_own.py`)."""


def _reasons(entries: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each test that objected somewhere, with where it did and the first reason that it gave."""
    where: dict[tuple[str, str], list[str]] = {}
    first: dict[tuple[str, str], str] = {}
    for entry in entries:
        for invariant, judged in entry["invariants"].items():
            for test, reason in judged["reasons"].items():
                where.setdefault((invariant, test), []).append(f"{entry['scenario']} on {entry['megatron']}")
                first.setdefault((invariant, test), reason)
    return [
        f"* **{invariant}** (`{test}`; {_places(where[invariant, test], len(entries))}): {_escaped(reason)}"
        for (invariant, test), reason in first.items()
    ]


def _places(places: Sequence[str], number: int) -> str:
    return "everywhere" if len(places) == number else ", ".join(places)


def _escaped(reason: str) -> str:
    return f"`{reason.replace('`', chr(39))}`"
