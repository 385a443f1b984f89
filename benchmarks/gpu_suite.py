"""Builds, tests and measures corrmatch on the NVIDIA GPU of this machine, in at most nine minutes.

bash benchmarks/gpu_suite.sh OUTDIR [--only tests,ops,regions,train] [--commit HASH] [--archive FILE] [--dry-run]

Needs no network. Each step is a process with a time limit. A step that fails does not stop the others. The extension is
built into a separate folder, so an installed corrmatch stays as it is. Writes to OUTDIR
    results.json   all results, documented in `suite.results`
    report.md      the same as tables
    *.png          time and memory of pixel_propagate against N, a figure for each dtype
    logs/          the output of each step
    runs/          the JSON of each benchmark, with the seconds of each round
results.json, report.md and, with `--archive FILE`, FILE (OUTDIR as .tar.gz) are written after each step: a run that is
stopped at any moment leaves its results. The last table lists the steps that passed. The exit code is 0 if all did,
else 1.

`--dry-run` needs no GPU: the same steps run on the CPU, Triton's interpreter and the emulator, with tiny sizes and the
installed corrmatch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from suite import report, results
from suite.steps import LIMITS, Schedule, SuiteStep

PARTS = ("tests", "ops", "regions", "train")
TOTAL = 540.0  # seconds
RESERVE = 15.0  # of these seconds, for the report
LEAST = 5.0  # a step is not started with less
GRACE = 5.0  # between SIGINT, after which a process can write its results, and SIGKILL


class Suite:
    """The run: its folder, its remaining time, and the results of its steps."""

    def __init__(self, options: argparse.Namespace, command: list[str], site: Path):
        self.out, self.dry = options.out.resolve(), options.dry_run
        self.plan = Schedule(self.out, self.dry, site)
        self.deadline = time.monotonic() + TOTAL - RESERVE
        self.environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if self.dry:
            self.environment["OMP_NUM_THREADS"] = "1"
        else:
            before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
            self.environment["PYTHONPATH"] = os.pathsep.join([str(site), *before])
        if options.commit is not None:
            self.environment["CORRMATCH_COMMIT"] = options.commit
        self.start, self.command = time.monotonic(), command
        self.archive = None if options.archive is None else options.archive.resolve()
        self.device: dict[str, Any] | None = None  # the JSON that the step of this name wrote
        self.done: list[dict[str, Any]] = []
        for folder in ("logs", "runs"):
            shutil.rmtree(self.out / folder, ignore_errors=True)
            (self.out / folder).mkdir(parents=True)

    def run(self, step: SuiteStep, blocked: str | None = None) -> bool:
        """Runs a step unless it is blocked. Returns whether it passed."""
        limit = min(LIMITS[step.name], self.deadline - time.monotonic())
        missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
        record = {"part": step.part, "name": step.name, "command": step.command, "status": "not run",
                  "reason": blocked, "seconds": 0.0, "limit": max(0.0, limit), "log": None, "tests": None}  # fmt: skip
        self.done.append(record)
        if blocked is not None:
            pass
        elif missing:
            record["reason"] = f"needs {', '.join(missing)}"
        elif step.tool is not None and not self.dry and shutil.which(step.tool, path=search_path()) is None:
            record |= {"status": "left out", "reason": f"no {step.tool} here"}
        elif limit < LEAST:
            record["reason"] = "no time left"
        else:
            self._run(step, limit, record)
        print(report.line(record), flush=True)
        self.save()
        return record["status"] == "passed"

    def save(self) -> dict[str, Any]:
        """Writes all results up to now."""
        seconds = time.monotonic() - self.start
        collected = results.collect(self.out, self.done, self.device, self.dry, self.command, seconds)
        (self.out / "results.json").write_text(json.dumps(collected, indent=1) + "\n")
        report.write(collected, self.out)
        if self.archive is not None:
            part = self.archive.with_name(self.archive.name + ".part")
            with tarfile.open(part, "w:gz") as file:
                for path in sorted(self.out.rglob("*")):
                    if path.is_file() and path not in (part, self.archive):
                        file.add(path, Path(self.out.name) / path.relative_to(self.out))
            part.replace(self.archive)
        return collected

    def _run(self, step: SuiteStep, limit: float, record: dict[str, Any]) -> None:
        log, start = self.out / "logs" / f"{step.name}.txt", time.monotonic()
        with log.open("w") as file:
            code = wait(step, limit, self.environment | step.environment, file)
        record |= {"seconds": time.monotonic() - start, "log": f"logs/{step.name}.txt"}
        record["status"] = "passed" if code == 0 else "timed out" if code is None else "failed"
        if record["part"] == "tests":
            record["tests"] = results.read_tests(self.plan.file(step.name, ".xml"))
        if record["status"] == "failed":
            record["reason"] = f"exit code {code}"
        elif code == 0 and record["tests"] is not None and record["tests"]["passed"] == 0:
            record |= {"status": "failed", "reason": "no test passed"}


def search_path() -> str:
    """The search path of programs: PATH, then the CUDA toolkit."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return os.pathsep.join([os.environ.get("PATH", os.defpath), toolkit])


def wait(step: SuiteStep, limit: float, environment: dict[str, str], log: Any) -> int | None:
    """Runs a process and its children. Returns its exit code, or None if it had to be stopped."""
    process = subprocess.Popen(
        step.command, cwd=step.folder, env=environment | {"PATH": search_path()}, stdin=subprocess.DEVNULL,
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def heed_interrupts() -> None:
    """For new processes: one that a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    parser.add_argument("--only", type=_parts, default=PARTS, help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--commit", help="of the sources, where they were copied without their history")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="pack OUTDIR into FILE (.tar.gz) after every step")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: the same steps, tiny, on the CPU")
    return parser.parse_args(arguments)


def _parts(text: str) -> tuple[str, ...]:
    unknown = [name for name in text.split(",") if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    return tuple(text.split(","))


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; returns the exit code."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as site:
        suite = Suite(options, list(sys.argv[1:] if arguments is None else arguments), Path(site))
        plan = suite.plan
        built = suite.run(plan.build("build", True))
        if not built and not suite.dry:
            built = suite.run(plan.build("build-without-cuda", False))
        # All other steps depend on it, so it gets a second chance.
        found = any(suite.run(plan.probe(), None if built else "nothing was built") for _ in range(1 + built))
        if found:
            suite.device = json.loads(plan.file("device").read_text())
        gpu = None if suite.device is None else suite.device["gpu"]
        for step in plan.steps(0 if gpu is None else gpu["memory_bytes"]):
            if step.part in options.only:
                suite.run(step, None if found else "no device to run on")
    collected = suite.save()
    print(f"\n{report.table(collected)}")
    return 1 if collected["failures"] > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
