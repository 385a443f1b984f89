"""Costs of installing and importing: seconds and memory of the build, and seconds of `import corrmatch` after torch.

`python benchmarks/bench_install.py` times the import. With `--build` it also builds a wheel from this checkout, under
MAX_JOBS and the other variables of setup.py.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from harness.machine import environment

ROOT = Path(__file__).resolve().parents[1]
IMPORT = "import time, torch; start = time.perf_counter(); import corrmatch; print(time.perf_counter() - start)"


def import_seconds(rounds: int) -> list[float]:
    """Seconds of `import corrmatch` after `import torch`, each in a fresh process."""
    command = [sys.executable, "-c", IMPORT]
    return [float(subprocess.check_output(command, cwd=tempfile.gettempdir())) for _ in range(rounds)]


def peak_of_tree(process: subprocess.Popen[bytes]) -> int:
    """Waits for the process. Returns the largest sum of bytes that it and its descendants held."""
    top, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            peak = max(peak, sum(p.memory_info().rss for p in [top, *top.children(recursive=True)]))
        time.sleep(0.05)
    return peak


def build() -> tuple[float, int]:
    """Seconds and peak bytes of building a wheel, with the isolated environment of pip."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, str(ROOT)]
        start = time.perf_counter()
        process = subprocess.Popen(command)
        peak = peak_of_tree(process)
        if process.returncode:
            raise SystemExit(f"pip wheel failed with {process.returncode}")
        return time.perf_counter() - start, peak


def main() -> None:
    """Measures, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="build a wheel, too")
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes that import (default: 9)")
    options = parser.parse_args()
    where = environment("cpu")
    print(", ".join(str(where[field]) for field in ("device", "platform", "torch", "commit", "date")))
    found = import_seconds(options.rounds + 1)[1:]  # the first brings files into memory
    print(f"import corrmatch after torch: {1e3 * statistics.median(found):.0f} ms (most {1e3 * max(found):.0f} ms)")
    if options.build:
        seconds, peak = build()
        print(f"pip wheel: {seconds:.0f} s, at most {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
