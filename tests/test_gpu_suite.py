"""The GPU suite: its dry run from end to end, and failures of steps."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import gpu_suite
import pytest
from suite import results as suite_results
from suite import steps as suite_steps
from test_suite_results import ENVIRONMENT, GPU, misfits

pytestmark = pytest.mark.slow

SCRIPT = Path(gpu_suite.__file__).with_name("gpu_suite.sh")
OPS = ["ops-bfloat16"]
REGIONS = ["regions-masks", "regions-components"]
LATER = ["tests-core", *OPS, *REGIONS, "train", "ops-float32", "tests-rest", "tests-sanitizer"]
ORDER = ["build", "device", *LATER]


def test_dry_run_goes_through_every_step(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), "out", "--dry-run", "--commit", "0123456789ab", "--archive", "out.tgz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    out = tmp_path / "out"
    logs = "\n".join(path.read_text()[-1000:] for path in (out / "logs").glob("*"))
    assert done.returncode == 0, done.stdout + done.stderr + logs

    results = json.loads((out / "results.json").read_text())
    assert misfits(results) == []
    with tarfile.open(tmp_path / "out.tgz") as archive:
        packed = {entry.name for entry in archive if entry.isfile()}
        assert json.load(archive.extractfile("out/results.json"))["steps"] == results["steps"]
    assert packed == {str(path.relative_to(tmp_path)) for path in out.rglob("*") if path.is_file()}
    assert results["dry_run"]
    assert results["failures"] == 0
    assert [step["name"] for step in results["steps"]] == ORDER
    assert {step["status"] for step in results["steps"]} == {"passed"}
    assert results["environment"]["commit"] == "0123456789ab"
    assert results["environment"]["device_type"] == "cpu"
    for step in results["steps"]:
        assert (out / step["log"]).exists()
        assert step["part"] != "tests" or step["tests"]["passed"] > 3
    measured = {(case["op"], case["dtype"]) for case in results["cases"]}
    assert measured == {("pixel_propagate", "bfloat16"), *((op, "float32") for op in suite_steps.OPS)}
    assert len(suite_steps.OPS) >= 6
    assert set(results["train"]["parts"]["step"]) == {
        "corrmatch", "published eager", "corrmatch + bf16", "corrmatch + channels_last"
    }  # fmt: skip
    assert "seconds" in json.loads((out / "runs/train.json").read_text())["parts"]["network"]["both"]

    first, *rest = (out / "report.md").read_text(encoding="utf-8").splitlines()
    assert "nothing in this report was measured on a GPU" in first
    assert sum("▸ corrmatch" in line for line in rest) == len(results["cases"])
    assert (out / "pixel_propagate-bfloat16.png").read_bytes().startswith(b"\x89PNG")
    table = done.stdout.splitlines()[-2 - len(ORDER) :]
    assert [line.split()[:2] for line in table[: len(ORDER)]] == [[name, "passed"] for name in ORDER]
    assert table[-2].startswith("all passed, ")
    assert table[-1] == "dry run: nothing was measured on a GPU"


class Machine:
    """Replaces the processes of a run on a GPU. It records them and ends them as told."""

    def __init__(self, codes, clock):
        self.codes, self.clock, self.steps, self.variables = codes, clock, {}, {}

    def wait(self, step, limit, environment, log):
        self.steps[step.name], self.variables[step.name] = step, environment
        self.clock[0] += limit
        code = self.codes.get(step.name, 0)
        if step.name == "device" and code == 0:
            Path(step.command[-1]).write_text(json.dumps(ENVIRONMENT))
        if step.name.startswith("tests"):
            junit = next(x for x in step.command if x.startswith("--junitxml=")).removeprefix("--junitxml=")
            bad = '<testcase classname="test_x" name="bad"><failure/></testcase>' if code else ""
            good = '<testcase classname="test_x" name="good"/><testcase name="left"><skipped/></testcase>'
            Path(junit).write_text(f"<testsuites><testsuite>{good}{bad}</testsuite></testsuites>")
        return code


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the suite with replaced processes, and as if all modules were installed."""

    def suite(*arguments, codes=(), lacking=(), clock=None):
        machine = Machine(codes or {}, [0.0] if clock is None else clock)
        monkeypatch.setattr(gpu_suite, "wait", machine.wait)
        monkeypatch.setattr(suite_steps, "architectures", lambda: "90a")
        monkeypatch.setattr(suite_steps.os, "sched_getaffinity", lambda pid: range(26))
        monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None if name in lacking else name)
        monkeypatch.setattr(gpu_suite.shutil, "which", lambda name, path: None if name in lacking else name)
        monkeypatch.setattr(gpu_suite.report, "draw", lambda results, out: [])
        code = gpu_suite.main([str(tmp_path / "out"), *arguments])
        results = json.loads((tmp_path / "out/results.json").read_text())
        assert misfits(results) == []
        return code, results, machine

    return suite


def statuses(results):
    return {step["name"]: step["status"] for step in results["steps"]}


def test_a_run_on_a_gpu(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "mine")
    code, results, machine = run("--commit", "0123456789ab")
    assert code == 0
    assert list(machine.steps) == ORDER
    assert not results["dry_run"]
    build = machine.steps["build"]
    assert build.environment == {"CORRMATCH_BUILD_CUDA": "1", "CORRMATCH_CUDA_ARCHS": "90a"}
    assert {"--no-index", "--no-build-isolation", "--no-deps"} <= set(build.command)
    site = build.command[build.command.index("--target") + 1]
    assert not Path(site).exists()  # afterwards
    for variables in machine.variables.values():
        assert variables["PYTHONPATH"] == f"{site}{os.pathsep}mine"
        assert variables["CORRMATCH_COMMIT"] == "0123456789ab"
        assert "TRITON_INTERPRET" not in variables
    for name in OPS:
        assert "--batch 8 --budget 30 --sizes 101,65,41" in " ".join(machine.steps[name].command)
    workers = dict(pairwise(machine.steps["tests-core"].command))["-n"]
    assert 1 < int(workers) <= 8
    assert machine.steps["tests-sanitizer"].command[0] == "compute-sanitizer"
    assert "-n" not in machine.steps["tests-sanitizer"].command
    report = (tmp_path / "out/report.md").read_text()
    assert report.startswith("# GPU suite: NVIDIA X\n")
    assert "- clocks at the start: sm_mhz 1980\n" in report
    assert "Dry run" not in report


def test_limits_of_a_run_fit_nine_minutes(run, monkeypatch):
    """If all steps take as long as they may, later steps get the remaining time."""
    now = [0.0]
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])
    code, results, machine = run(clock=now)
    assert code == 1
    assert list(machine.steps) == ORDER[: len(machine.steps)]
    assert set(OPS) < set(machine.steps) < set(ORDER)  # the most valuable steps have run
    assert now[0] == gpu_suite.TOTAL - gpu_suite.RESERVE
    assert (results["steps"][-1]["status"], results["steps"][-1]["reason"]) == ("not run", "no time left")
    assert set(suite_steps.LIMITS) == {*ORDER, "build-without-cuda"}


def test_a_failing_step_stops_no_other(run, capsys):
    code, results, machine = run(codes={"tests-core": 1, "ops-bfloat16": None, "train": -11})
    assert code == 1
    assert list(machine.steps) == ORDER
    found = statuses(results)
    assert [name for name, status in found.items() if status != "passed"] == ["tests-core", "ops-bfloat16", "train"]
    assert found["ops-bfloat16"] == "timed out"
    step = results["steps"][2]
    assert step["tests"] == {"passed": 1, "failed": 1, "skipped": 1, "names": ["test_x::bad"]}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("3 FAILED")
    assert any(line.split()[:2] == ["train", "failed"] and line.endswith("exit code -11") for line in printed)
    report = Path(results["command"][0], "report.md").read_text()
    assert "- failed: `test_x::bad`" in report


def test_a_run_that_is_ended_leaves_what_it_had(run, tmp_path):
    """Results are written after each step, so they are complete however the run ends."""
    archive = tmp_path / "all.tgz"
    seen = []

    class Ended(BaseException):
        pass

    class Codes(dict):
        def get(self, name, default):
            with contextlib.suppress(FileNotFoundError), tarfile.open(archive) as file:
                seen.append(len(json.load(file.extractfile("out/results.json"))["steps"]))
            if name == "train":
                raise Ended
            return default

    with pytest.raises(Ended):
        run("--archive", str(archive), codes=Codes(other=0))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert misfits(results) == []
    assert [step["name"] for step in results["steps"]] == ORDER[: ORDER.index("train")]
    assert seen == list(range(1, 1 + ORDER.index("train")))
    with tarfile.open(archive) as file:
        assert {"out/results.json", "out/report.md", "out/runs/device.json"} <= set(file.getnames())


@pytest.mark.parametrize(
    ("printed", "expected"),
    [("9.0\n", "90a"), ("8.0\n9.0\n", "80;90a"), ("12.0\n12.0\n", "120"), ("[N/A]\n", None), ("", None)],
)
def test_architectures_are_asked_from_the_driver(monkeypatch, tmp_path, printed, expected):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CORRMATCH_CUDA_ARCHS", raising=False)
    assert suite_steps.architectures() == expected
    build = suite_steps.Schedule(tmp_path, False, tmp_path).build("build", True)
    assert build.environment.get("CORRMATCH_CUDA_ARCHS") == expected
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert suite_steps.architectures() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert suite_steps.architectures() is None
    monkeypatch.setenv("CORRMATCH_CUDA_ARCHS", "80")  # the step gets the caller's list unchanged
    assert (
        "CORRMATCH_CUDA_ARCHS" not in suite_steps.Schedule(tmp_path, False, tmp_path).build("build", True).environment
    )


def test_a_device_that_answers_late_gets_a_second_chance(run):
    class Codes(dict):
        def get(self, name, default):
            return self.pop(name, default)

    code, results, _ = run(codes=Codes(device=None))
    assert code == 1
    assert [step["status"] for step in results["steps"] if step["name"] == "device"] == ["timed out", "passed"]
    assert [step["name"] for step in results["steps"][3:]] == LATER
    assert results["environment"] is not None


def test_without_cuda_kernels_the_rest_is_measured(run):
    code, results, machine = run(codes={"build": 1})
    assert code == 1
    assert list(machine.steps) == ["build", "build-without-cuda", *ORDER[1:]]
    assert machine.steps["build-without-cuda"].environment["CORRMATCH_BUILD_CUDA"] == "0"
    assert [name for name, status in statuses(results).items() if status != "passed"] == ["build"]


@pytest.mark.parametrize(
    ("codes", "started", "reason"),
    [
        ({"build": 1, "build-without-cuda": 1}, 2, "no device to run on"),
        ({"device": 1}, 2, "no device to run on"),
    ],
)
def test_without_a_build_or_a_device_nothing_else_starts(run, codes, started, reason):
    code, results, machine = run(codes=codes)
    assert code == 1
    assert len(machine.steps) == started
    assert results["environment"] is None
    later = results["steps"][-len(LATER) :]
    assert [step["name"] for step in later] == LATER
    assert {(step["status"], step["reason"]) for step in later} == {("not run", reason)}
    assert "No device" in Path(results["command"][0], "report.md").read_text()


def test_what_is_not_installed_is_named(run):
    code, results, machine = run(lacking=("omegaconf", "compute-sanitizer", "xdist"))
    assert code == 1
    steps = {step["name"]: step for step in results["steps"]}
    assert (steps["train"]["status"], steps["train"]["reason"]) == ("not run", "needs omegaconf")
    assert steps["tests-sanitizer"]["status"] == "left out"
    assert "-n" not in machine.steps["tests-core"].command
    assert results["failures"] == 1
    code, results, _ = run("--only", "tests,ops", lacking=("omegaconf", "compute-sanitizer"))
    assert code == 0
    assert {step["part"] for step in results["steps"]} == {"build", "device", "tests", "ops"}


def test_tests_that_are_all_skipped_have_not_passed(run, monkeypatch):
    monkeypatch.setattr(suite_results, "read_tests", lambda path: {"passed": 0, "failed": 0, "skipped": 9, "names": []})
    code, results, _ = run("--only", "tests")
    assert code == 1
    assert {step["reason"] for step in results["steps"] if step["part"] == "tests"} == {"no test passed"}


@pytest.mark.parametrize("memory", [24, 80])
def test_eight_images_where_their_oracle_fits(run, monkeypatch, memory):
    monkeypatch.setitem(ENVIRONMENT, "gpu", GPU | {"memory_bytes": memory * 2**30})
    _, _, machine = run("--only", "ops")
    assert ("--batch" in machine.steps[OPS[0]].command) is (memory == 80)


def test_unknown_part_is_explained(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.parse(["out", "--only", "tests,speed"])
    assert "no part 'speed'" in capsys.readouterr().err
