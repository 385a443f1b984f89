"""results.json of the GPU suite, version 1: its format and its construction.

    schema       1
    dry_run      true if nothing in it was measured on a GPU
    environment  that of `bench_corr`; null if the step "device" failed
    command      arguments of the suite
    seconds      duration of the whole run
    failures     number of steps that neither passed nor were left out
    steps        a list, in the order of the run; each has
        part      "build", "device", "tests", "ops", "regions" or "train"
        name      of the step
        command   program and arguments
        status    "passed", "failed", "timed out", "not run" (counts as a failure), "left out" (a tool that is optional)
        reason    of a failure or omission, else null
        seconds   it took
        limit     seconds that it was allowed
        log       file below OUTDIR; null if it did not run
        tests     {passed, failed, skipped, names (of failed tests)} of a run of tests; else null
        clocks    [before, after] of a benchmark, in the form of `bench_corr`, each null on a CPU; else null
    cases        of all runs of `bench_corr`, documented there, without the seconds of each round
    train        of `bench_train`: setting, differences and parts, without the seconds; null if it wrote nothing

results.schema.json in this folder is the same as a JSON Schema, and tests check the suite against it. `bench_corr
--json` writes environment and cases in the same form, so both are evidence for `readme_table`.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

VERSION = 1
FINE = ("passed", "left out")

TRAIN = ("setting", "differences", "parts")  # parts of a record of `bench_train` that are kept


def collect(
    out: Path,
    steps: list[dict[str, Any]],
    environment: dict[str, Any] | None,
    dry_run: bool,
    command: list[str],
    seconds: float,
) -> dict[str, Any]:
    """The results, from the steps and the JSON of the benchmarks."""
    cases, train = [], None
    for step in steps:
        path = out / "runs" / f"{step['name']}.json"
        step["clocks"] = None  # if a run was stopped, the second is missing
        if step["part"] not in ("ops", "regions", "train") or not path.exists():
            continue
        record = json.loads(path.read_text(), object_hook=_without_rounds)
        step["clocks"] = [record["environment"].get(name) for name in ("clocks", "clocks_after")]
        if step["part"] == "train":
            train = {name: record[name] for name in TRAIN}
        else:
            cases += record["cases"]
    return {
        "schema": VERSION, "dry_run": dry_run, "environment": environment, "command": command, "seconds": seconds,
        "failures": sum(step["status"] not in FINE for step in steps), "steps": steps, "cases": cases, "train": train,
    }  # fmt: skip


def _without_rounds(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if not (k == "seconds" and isinstance(v, list))}


def read_tests(path: Path) -> dict[str, Any] | None:
    """The counts of a JUnit file and the names of failed tests; None if there is no file."""
    if not path.exists():
        return None
    counts, names = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ET.parse(path).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            names.append(f"{case.get('classname')}::{case.get('name')}")
    return counts | {"names": names}
