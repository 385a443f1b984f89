"""Measures time, peak memory and error of corrmatch and of other implementations. Needs no argument.

Each contender is first compared with the oracle (`corrmatch.reference` in float64). A contender that disagrees is
reported and not timed, and the exit code is 1. Contenders are timed in turns within a time budget. Compiled ones come
last, in turns with corrmatch. SIGINT ends a run, and what has been timed is kept.

`--json FILE` writes an object, after the first second and then again while it grows:
    environment   date, device, device_type, threads, load and load_after (average number of running
                  processes in the minute before start and end, null if unknown), backends {name: detail},
                  variables (of the environment: CORRMATCH_*, TRITON_*), corrmatch, commit (null outside a
                  checkout), torch, triton, numpy, cuda, python, platform; and, null on a CPU, gpu {driver,
                  capability, multiprocessors, memory_bytes}, clocks and clocks_after {sm_mhz, sm_max_mhz,
                  memory_mhz, memory_max_mhz, power_w, power_limit_w, celsius}, exponentials_a_second (at its
                  highest clock)
    command       the arguments
    interrupted   true during the run, and if the run was stopped: contenders may be missing
    seconds       duration of the run
    failures      number of contenders that failed or disagree with the oracle and of cases that could not be checked
    cases         a list; each has op, title (of the op), size, workload, positions (N), batch, dtype,
                  elements (in one call), unit (of elements), tolerance (of error), exponentials (the least number
                  in forward and in both, if this bounds their time) and contenders, a list of
        name, ours, family (variants of which only the fastest is timed, or null)
        status            "ok", "wrong", "failed" (it raised an error), "not installed", "slower variant"
                          or "untimed" (the run ended before it was timed)
        reason            (if failed) the error
        error             (unless failed or not installed) largest relative Frobenius norm among result and gradients
                          or, for discrete results, share of pixels that differ
        peak_extra_bytes  (if ok) forward and, if it has a backward, both; null if unknown
        times             (if ok) for forward and, if it has them, backward and both, on a GPU also forward_graph
                          and both_graph (replays of a CUDA graph): median, spread (half the interquartile range
                          over the median), rounds, seconds (of each round)
        floor_shares      (if ok) for passes that exponentials bound: their least time, at exponentials_a_second,
                          over the median; empty if unknown
        no_graph          (if no CUDA graph could be captured) the error
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import machine, measure, plot, report
from harness.case import CHANNELS, Setting
from harness.measurement import Measurement, first_line
from ops import OPS

import corrmatch

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAP_LIMIT = 10**8  # elements of the map; up to this number the default batch is 4, above it 1
INTERVAL = 1.0  # seconds between two versions of the JSON
INTERRUPTED = 130  # exit code of a process that SIGINT has ended


class Run:
    """A run of the benchmark, and its results up to now.

    `save` writes the whole JSON. It is called once a second while contenders are measured, so a run that is stopped at
    any moment leaves its results.
    """

    def __init__(self, options: argparse.Namespace, command: list[str]):
        self.options, self.command, self.start = options, command, time.perf_counter()
        self.environment = machine.environment(options.device) | {"load_after": None, "clocks_after": None}
        self.measurements: list[Measurement] = []
        self.without_oracle = 0
        self.saved = -float("inf")

    def all(self) -> None:
        """Measures all cases, first without compiled contenders, then with them."""
        chosen = chosen_cases(self.options)
        total, op_before = sum(OPS[op].share for op, _ in chosen), None
        later = []
        for op, setting in chosen:
            if op != op_before:
                print(header(op), flush=True)
            op_before = op
            seconds = self.options.budget * OPS[op].share / total
            for measurement in self.prepared(op, setting):
                heats = 2 if measurement.contenders(compiled=True) else 1
                self.measure(measurement, seconds * measurement.case.share / heats)
                if heats == 2:
                    later.append((measurement, seconds * measurement.case.share / heats))
        if later:
            print(f"With what torch.compile makes\n{header(later[0][0].case.op)}", flush=True)
        for measurement, seconds in later:
            torch.compiler.reset()  # it keeps eight forms of a function, and each size has several
            self.measure(measurement, seconds, compiled=True)

    def prepared(self, op: str, setting: Setting) -> Iterator[Measurement]:
        """The cases of an op at one size, with the result of the oracle. Cases without one are counted."""
        try:
            for case in OPS[op].cases(setting):
                available = measure.available_bytes(self.options.device)
                if available is not None and case.oracle_bytes > available:
                    need, have = (f"{x / 2**30:.1f} GiB" for x in (case.oracle_bytes, available))
                    print(f"{case.size}: nothing measured, because the oracle needs {need} and {have} is free")
                    self.without_oracle += 1
                    continue
                yield Measurement(case, self.options.device)
        except Exception as error:  # noqa: BLE001 - the other ops and sizes can still be measured
            print(f"{op} {setting.grid}: nothing measured: {first_line(error)}"[: report.WIDTH])
            self.without_oracle += 1

    def measure(self, measurement: Measurement, seconds: float, compiled: bool = False) -> None:
        """Measures a case and prints its table."""
        if measurement not in self.measurements:
            self.measurements.append(measurement)
        try:
            for _ in measurement.measure(measurement.contenders(compiled=compiled), seconds):
                if time.monotonic() - self.saved >= INTERVAL:
                    self.save()
        finally:
            print(report.block(self.result(measurement)), flush=True)
        self.save()

    def result(self, measurement: Measurement) -> dict[str, Any]:
        """A case in the form of the JSON."""
        result = measurement.result() | {"dtype": self.options.dtype, "title": OPS[measurement.case.op].title}
        report.add_floor_shares(result, self.environment["exponentials_a_second"])
        return result

    def results(self) -> list[dict[str, Any]]:
        """All cases up to now."""
        return [self.result(measurement) for measurement in self.measurements]

    def failures(self, results: list[dict[str, Any]]) -> int:
        """The number of contenders that failed or are wrong, and of cases without an oracle."""
        rows = [row for result in results for row in result["contenders"]]
        return self.without_oracle + sum(row["status"] in ("wrong", "failed") for row in rows)

    def save(self, interrupted: bool = True) -> None:
        """Writes the JSON, if requested, atomically."""
        self.saved = time.monotonic()
        if self.options.json is None:
            return
        results = self.results()
        record = {"environment": self.environment, "command": self.command, "interrupted": interrupted}
        record |= {"seconds": time.perf_counter() - self.start, "failures": self.failures(results), "cases": results}
        part = self.options.json.with_name(self.options.json.name + ".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(self.options.json)


def header(op: str) -> str:
    """Title and column heads of an op."""
    return report.op_header(op, OPS[op].title, tuple(report.PASSES) if OPS[op].backward else ("forward",))


def chosen_cases(options: argparse.Namespace) -> list[tuple[str, Setting]]:
    """The cases in order. Their inputs are made later, one case after another."""
    chosen = []
    for op in options.ops:
        for height, width in options.sizes if options.sizes is not None else OPS[op].sizes:
            batch = options.batch
            if batch is None:
                batch = 4 if 4 * (height * width) ** 2 <= MAP_LIMIT else 1
            dtype = DTYPES[options.dtype]
            for channels in options.channels if op != "connected_components" else options.channels[:1]:
                setting = Setting(
                    (height, width), batch, dtype, options.device, options.value_grad, options.compile, channels,
                    options.patch,
                )  # fmt: skip
                chosen.append((op, setting))
    return chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=_ops, default=list(OPS), help=f"comma-separated, of {', '.join(OPS)}")
    parser.add_argument("--sizes", type=_sizes, help="grids: 41,65,41x33 (full resolution: 8 (n - 1) + 1)")
    parser.add_argument("--channels", type=_counts, default=[CHANNELS], help="D and C: 21,150 (default: 21)")
    parser.add_argument("--patch", type=_count, help="full resolution: so many pixels a position, as of a transformer")
    parser.add_argument("--batch", type=_count, help="images (default: 4, or 1 where the map passes 10^8 elements)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--value-grad", action="store_true", help="gradients of value too, which the method needs not")
    parser.add_argument("--compile", action="store_true", help="add the published form under torch.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--threads", type=_count, help="CPU threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of timing, roughly (default: 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory of pixel_propagate against N")
    options = parser.parse_args(arguments)
    if options.plot is not None and options.channels != [CHANNELS]:
        parser.error(f"--plot: it is drawn for {CHANNELS} channels")
    return options


def default_device() -> str:
    """The GPU, if corrmatch has a backend for it, else the CPU."""
    serves = any(b.available and b.devices == ("cuda",) for b in corrmatch.backends().values())
    return "cuda" if serves and torch.cuda.is_available() else "cpu"


def _ops(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in OPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no op {unknown[0]!r}; expected some of {', '.join(OPS)}")
    return text.split(",")


def _sizes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"(\d+)(?:x(\d+))?", part) for part in text.split(",")]
    sizes = [(int(m[1]), int(m[2] if m[2] is not None else m[1])) for m in found if m is not None]
    if len(sizes) < len(found) or any(min(size) < 2 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected sizes of 2 or more such as 41,65x33, got {text!r}")
    return sizes


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = parse(arguments)
    if options.plot is not None:
        plot.require(options.ops)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run = Run(options, list(sys.argv[1:] if arguments is None else arguments))
    print(report.header(run.environment, options), flush=True)
    interrupted = False
    try:
        run.all()
    except KeyboardInterrupt:
        interrupted = True
    run.environment |= {"load_after": machine.load(), "clocks_after": machine.clocks(options.device)}
    run.save(interrupted)
    results = run.results()
    failures = run.failures(results)
    measured = {result["op"] for result in results}
    notes = [x for op in OPS if op in measured for x in OPS[op].notes(options.device, options.compile)]
    print(report.footer(notes, failures, time.perf_counter() - run.start, run.environment))
    if interrupted:
        print("Interrupted: what was not timed is missing.")
        return INTERRUPTED
    if options.plot is not None:
        plot.draw(results, run.environment, options.plot)
    return 1 if failures > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
