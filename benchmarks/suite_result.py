"""Turns the junit report of a conformance run into a small JSON file that can be kept.

    pytest ... --junitxml=report.xml
    python benchmarks/suite_result.py report.xml --command "pytest ..." --hardware "NVIDIA H200" > results/NAME.json

Says what passed, by invariant and by scenario, and names every test that was skipped or failed, with its reason.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

TEST_ID = re.compile(r"test_(?P<invariant>[a-z]+)\w*\[(?P<row>.+)-w(?P<world>\d+)-(?P<scenario>\w+)\]")


def main() -> int:
    """Read the report, print the result; exit status 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--command", required=True)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--versions", type=json.loads, default={}, help="a JSON object")
    arguments = parser.parse_args()
    suite = ET.parse(arguments.report).getroot().find("testsuite")
    assert suite is not None
    passed: dict[str, Counter[str]] = {"invariant": Counter(), "scenario": Counter(), "row and world": Counter()}
    others: dict[str, dict[str, str]] = {"skipped": {}, "failed": {}}
    for case in suite.iter("testcase"):
        found = TEST_ID.fullmatch(case.get("name", ""))
        problem = next((e for e in case if e.tag in ("failure", "error", "skipped")), None)
        if problem is not None:
            verdict = "skipped" if problem.tag == "skipped" else "failed"
            others[verdict][case.get("name", "")] = problem.get("message", "").splitlines()[0]
        elif found:
            passed["invariant"][found["invariant"]] += 1
            passed["scenario"][found["scenario"]] += 1
            passed["row and world"][f"{found['row']} w{found['world']}"] += 1
    result = {
        "command": arguments.command,
        "date": suite.get("timestamp"),
        "hardware": arguments.hardware,
        "versions": arguments.versions,
        "seconds": float(suite.get("time", 0)),
        "num_passed": sum(passed["invariant"].values()),
        "passed": {by: dict(sorted(counts.items())) for by, counts in passed.items()},
        **others,
    }
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 1 if others["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
