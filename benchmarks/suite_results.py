"""results.json of the GPU suite, version 1: what it holds, how it comes together, whether it is as documented.

    schema       1
    dry_run      true: nothing in it was measured on a GPU
    environment  as of `bench_corr`; null where the step "device" failed
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
        tests     {passed, failed, skipped, names} of a run of tests, names being of those that failed; else null
        clocks    [before, after] of a benchmark, as of `bench_corr`, each null on a CPU; else null
    cases        of all runs of `bench_corr`, as it documents them, without the seconds of every round: every figure
                 with median, spread, share of the exp floor, peak memory, and its peers
    train        of `bench_train`: setting, differences and parts, without the seconds; null where it wrote nothing

`bench_corr --json` writes environment and cases in the same form, so both serve as evidence (`readme_table`).
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

VERSION = 1
FINE = ("passed", "left out")

Number = (int, float)
Text, OptionalText, OptionalNumber = str, (str, type(None)), (int, float, type(None))


class Each:
    """A mapping from any name to one form."""

    def __init__(self, form: Any):
        self.form = form


class Optional:
    """A form, or null; as the form of a field also: the field may lack."""

    def __init__(self, form: Any):
        self.form = form


CLOCKS = Optional(Each(OptionalNumber))
ENVIRONMENT = {
    "date": Text, "device": Text, "device_type": Text, "threads": int, "load": OptionalNumber, "backends": Each(Text),
    "variables": Each(Text), "corrmatch": Text, "commit": OptionalText, "torch": Text, "triton": OptionalText,
    "numpy": OptionalText, "cuda": OptionalText, "python": Text, "platform": Text, "clocks": CLOCKS,
    "exponentials_a_second": OptionalNumber,
    "gpu": Optional({"driver": OptionalText, "capability": Text, "multiprocessors": int, "memory_bytes": int}),
}  # fmt: skip
STEP = {
    "part": Text, "name": Text, "command": [Text], "status": Text, "reason": OptionalText, "seconds": Number,
    "limit": Number, "log": OptionalText, "clocks": Optional([CLOCKS]),
    "tests": Optional({"passed": int, "failed": int, "skipped": int, "names": [Text]}),
}  # fmt: skip
TIMES = {"median": Number, "spread": Number, "rounds": int}
CONTENDER = {
    "name": Text, "ours": bool, "family": OptionalText, "status": Text, "reason": Optional(Text),
    "error": Optional(Number), "no_graph": Optional(Text), "peak_extra_bytes": Optional(Each(OptionalNumber)),
    "times": Optional(Each(TIMES)), "floor_shares": Optional(Each(Number)),
}  # fmt: skip
MEASURED = ("error", "peak_extra_bytes", "times", "floor_shares")  # of a contender that was timed
CASE = {
    "op": Text, "size": Text, "workload": Text, "positions": int, "batch": int, "dtype": Text, "elements": int,
    "unit": Text, "tolerance": Number, "exponentials": Each(int), "contenders": [CONTENDER],
}  # fmt: skip
TRAIN = {
    "setting": Each(Text), "differences": [Number],
    "parts": Each(Each(TIMES | {"peak_extra_bytes": OptionalNumber})),
}  # fmt: skip
RESULTS = {
    "schema": int, "dry_run": bool, "environment": Optional(ENVIRONMENT), "command": [Text], "seconds": Number,
    "failures": int, "steps": [STEP], "cases": [CASE], "train": Optional(TRAIN),
}  # fmt: skip


def problems(results: Any) -> list[str]:
    """Where results are not as documented; empty where they are."""
    found = _misfits(results, RESULTS, "results")
    if found:
        return found
    if results["schema"] != VERSION:
        found.append(f"results.schema: {results['schema']}, expected {VERSION}")
    wrong = sum(step["status"] not in FINE for step in results["steps"])
    if results["failures"] != wrong:
        found.append(f"results.failures: {results['failures']}, but {wrong} steps did not pass")
    for case in results["cases"]:
        for row in case["contenders"]:
            lacking = [name for name in MEASURED if row["status"] == "ok" and row.get(name) is None]
            found += [f"{case['op']} {case['size']}, {row['name']}: was timed, but has no {name}" for name in lacking]
    return found


def _misfits(value: Any, form: Any, where: str) -> list[str]:
    """Compares a value with a form: a type or some, [form of the items], {field: form}, Each or Optional."""
    if isinstance(form, Optional):
        return [] if value is None else _misfits(value, form.form, where)
    if isinstance(form, Each):
        if not isinstance(value, dict):
            return [f"{where}: expected an object, got {value!r}"]
        return [x for name, item in value.items() for x in _misfits(item, form.form, f"{where}.{name}")]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where}: expected a list, got {value!r}"]
        return [x for i, item in enumerate(value) for x in _misfits(item, form[0], f"{where}[{i}]")]
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{where}: expected an object, got {value!r}"]
        found = [f"{where}.{name}: not documented" for name in value if name not in form]
        found += [f"{where}.{name}: lacking" for name, f in form.items()
                  if name not in value and not isinstance(f, Optional)]  # fmt: skip
        return found + [x for name, f in form.items() if name in value
                        for x in _misfits(value[name], f, f"{where}.{name}")]  # fmt: skip
    kinds = form if isinstance(form, tuple) else (form,)
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    return [] if fits else [f"{where}: expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}"]


def collect(
    out: Path,
    steps: list[dict[str, Any]],
    environment: dict[str, Any] | None,
    dry_run: bool,
    command: list[str],
    seconds: float,
) -> dict[str, Any]:
    """The results, from the steps and from what the benchmarks wrote."""
    cases, train = [], None
    for step in steps:
        path = out / "runs" / f"{step['name']}.json"
        step["clocks"] = None  # where a run was ended before its time, the second of the two is
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
    """Counts of a JUnit file, and the names of what failed; None where there is none."""
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
