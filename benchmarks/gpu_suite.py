"""Builds, tests and measures corrmatch on the NVIDIA GPU of this machine, and reports, in nine minutes at most.

bash benchmarks/gpu_suite.sh OUTDIR [--only tests,ops,regions,train] [--commit HASH] [--archive FILE] [--dry-run]

Needs no network. Every step is a process of its own with a time limit; one that fails does not stop the rest. The
extension is built into a folder of its own, so an installed corrmatch stays as it is. Writes to OUTDIR
    results.json   everything, as `suite.results` documents it
    report.md      the same for people
    *.png          time and memory of pixel_propagate against N, a figure for each dtype
    logs/          what every step printed
    runs/          what every benchmark wrote, with the seconds of every round
results.json, report.md and, where `--archive FILE` asks for one, FILE (OUTDIR as .tar.gz) are written after every
step: a run that is ended at any moment leaves what it had. The last table says what passed. The exit code is 0 where
all did, 1 where not.

`--dry-run` needs no GPU: the same steps on the CPU, Triton's interpreter and the emulator, with tiny sizes and what is
installed.
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
RESERVE = 15.0  # of these, for the report
LEAST = 5.0  # less is not worth a start
GRACE = 5.0  # from asking a process to stop, so that it can still write what it has, to killing it


class Suite:
    """The run: where it writes, how long it may still take, and what has become of its steps."""

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
        self.device: dict[str, Any] | None = None  # what the step of that name wrote down
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
        """Writes down all that is known by now."""
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
    """Where programs are looked for: PATH, then the CUDA toolkit."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return os.pathsep.join([os.environ.get("PATH", os.defpath), toolkit])


def wait(step: SuiteStep, limit: float, environment: dict[str, str], log: Any) -> int | None:
    """Exit code of a process; None if it had to be stopped. Nothing that it started outlives it."""
    process = subprocess.Popen(
        step.command, cwd=step.folder, env=environment | {"PATH": search_path()}, stdin=subprocess.DEVNULL,
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_heed_interrupts,
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


def _heed_interrupts() -> None:
    # What a shell starts in the background ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
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
        # All that follows hangs on it, so that it gets a second chance.
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
