"""The files that the GPU suite writes, and the processes that it starts."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import bench_corr
import gpu_suite
import jsonschema
import pytest
from suite import report as suite_report
from suite import results as suite_results
from suite.steps import SuiteStep

pytestmark = pytest.mark.slow

GPU = {"driver": "580.1", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 85 * 10**9}
CLOCKS = {"sm_mhz": 1980.0, "power_w": None}


def running(pid):
    """Whether the process runs. A process that has ended and was not collected by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_past_its_limit_ends_with_all_that_it_started(tmp_path):
    pid, log = tmp_path / "pid", tmp_path / "log"
    code = f"""import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid)!r}, "w").write(str(child.pid))
print("started", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("asked to stop", flush=True)"""
    start = time.monotonic()
    with log.open("w") as file:
        assert gpu_suite.wait(SuiteStep("x", [sys.executable, "-c", code]), 3, dict(os.environ), file) is None
    assert time.monotonic() - start < 60
    assert log.read_text().splitlines() == ["started", "asked to stop"]
    while time.monotonic() - start < 60 and running(int(pid.read_text())):
        time.sleep(0.1)
    assert not running(int(pid.read_text()))


def test_exit_code_of_a_process(tmp_path):
    step = SuiteStep("x", [sys.executable, "-c", "import os, sys; print(os.getcwd()); sys.exit(7)"], tmp_path)
    with (tmp_path / "log").open("w") as file:
        assert gpu_suite.wait(step, 60, dict(os.environ), file) == 7
    assert (tmp_path / "log").read_text().strip() == str(tmp_path)


ENVIRONMENT = {
    "date": "2027-01-02T03:04:05+00:00", "device": "NVIDIA X", "device_type": "cuda", "threads": 8, "load": 0.5,
    "backends": {"triton": ""}, "variables": {}, "corrmatch": "0.1.0", "commit": None, "torch": "2.11.0",
    "triton": "3.6.0", "numpy": "2.5.2", "cuda": "13.0", "python": "3.12.3", "platform": "Linux", "clocks": CLOCKS,
    "exponentials_a_second": 4e12, "gpu": GPU,
}  # fmt: skip
TIMES = {"forward": {"median": 1.0, "spread": 0.1, "rounds": 3}}
OURS = {"name": "corrmatch", "ours": True, "family": None, "status": "ok", "error": 0.0,
        "peak_extra_bytes": {"forward": 7}, "times": TIMES, "floor_shares": {"forward": 0.5}}  # fmt: skip
CASE = {"op": "pseudo_label", "title": "labels", "size": "5x5", "workload": "C = 21", "positions": 25, "batch": 1,
        "dtype": "float32", "elements": 9, "unit": "pixels", "tolerance": 1e-4, "exponentials": {},
        "contenders": [OURS]}  # fmt: skip
STEP = {"part": "ops", "name": "ops-float32", "command": ["python"], "status": "passed", "reason": None, "seconds": 1.5,
        "limit": 9, "log": "logs/ops-float32.txt", "tests": None, "clocks": [CLOCKS, None]}  # fmt: skip
GOOD = {"schema": 1, "dry_run": False, "environment": ENVIRONMENT, "command": [], "seconds": 2.5, "failures": 0,
        "steps": [STEP], "cases": [CASE], "train": None}  # fmt: skip


SCHEMA = json.loads(Path(suite_results.__file__).with_name("results.schema.json").read_text())


def misfits(results):
    """The places where results violate the schema or have a wrong number of failures."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    found = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(results)]
    if not found and results["failures"] != sum(s["status"] not in suite_results.FINE for s in results["steps"]):
        found.append("$.failures: not the number of steps that did not pass")
    return found


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_good_results_have_no_problem():
    assert misfits(GOOD) == []


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (["schema"], 2, "$.schema: 1 was expected"),
        (["dry_run"], 1, "$.dry_run: 1 is not of type 'boolean'"),
        (["failures"], True, "$.failures: True is not of type 'integer'"),
        (["failures"], 1, "$.failures: not the number of steps"),
        (["environment", "gpu", "driver"], 580, "$.environment: "),
        (["environment", "torch"], ..., "$.environment: "),
        (["steps", 0, "extra"], 1, "$.steps[0]: Additional properties are not allowed ('extra' was unexpected)"),
        (["steps", 0, "status"], "fine", "$.steps[0].status: 'fine' is not one of"),
        (["steps", 0, "clocks", 0, "sm_mhz"], "fast", "$.steps[0].clocks: "),
        (["cases"], {}, "$.cases: {} is not of type 'array'"),
        (
            ["cases", 0, "contenders", 0, "times", "forward", "spread"],
            None,
            "times.forward.spread: None is not of type",
        ),
        (["cases", 0, "contenders", 0, "times"], [], "times: [] is not of type 'object'"),
        (["cases", 0, "contenders", 0, "floor_shares"], ..., "contenders[0]: 'floor_shares' is a required property"),
        (["train"], {"parts": {}, "differences": []}, "$.train: "),
        ([], None, "$: None is not of type 'object'"),
    ],
)
def test_what_is_not_as_documented_is_found(path, value, problem):
    results = {"": json.loads(json.dumps(GOOD))}
    at, *keys = results, "", *path
    for key in keys[:-1]:
        at = at[key]
    if value is ...:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    found = misfits(results[""])
    assert len({line.split(": ")[0] for line in found}) == 1
    assert problem in found[0]


def test_every_field_is_documented():
    """In the comment above `collect`, or in the docstring of bench_corr for its results."""
    forms, words = SCHEMA["$defs"], suite_results.__doc__
    assert all(name in words for name in (*SCHEMA["properties"], *forms["step"]["properties"]))
    fields = [name for form in ("case", "contender", "times", "environment") for name in forms[form]["properties"]]
    assert [name for name in fields if name not in bench_corr.__doc__] == []


def test_report_of_a_measured_case():
    blocks = "\n".join(suite_report.figures(GOOD))
    assert "## pseudo_label, float32" in blocks
    assert "share of the exp floor: forward 50 %" in blocks
    clocks = [{"sm_mhz": 1980.0}, {"sm_mhz": 1755.0}], [{"sm_mhz": None}, {"sm_mhz": None}], None
    shown = suite_report.steps(GOOD | {"steps": [STEP | {"clocks": pair} for pair in clocks]}).splitlines()[-3:]
    assert [line.split("|")[5].strip() for line in shown] == ["1980 to 1755", "", ""]
