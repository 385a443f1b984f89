"""Measures corrmatch against other ways to compute the same things: time, peak memory, error. Needs no argument.

Every contender is compared with the oracle (`corrmatch.reference` in float64) first; one that disagrees is reported,
not timed, and the exit code is 1. Contenders are timed in turns within a time budget.

`--json FILE` writes an object:
    environment   date, device, device_type, threads, load and load_after (average number of running
                  processes in the minute before start and end, null where unknown), backends {name: detail},
                  variables (of the environment: CORRMATCH_*, TRITON_*), corrmatch, commit (null outside a
                  checkout), torch, triton, numpy, cuda, python, platform; and, null on a CPU, gpu {driver,
                  capability, multiprocessors, memory_bytes}, clocks and clocks_after {sm_mhz, sm_max_mhz,
                  memory_mhz, memory_max_mhz, power_w, power_limit_w, celsius}, exponentials_a_second (at its
                  highest clock)
    command       the arguments
    seconds       duration of the whole run
    failures      number of contenders that failed or disagree with the oracle and of cases that could not be checked
    cases         a list; each has op, size, workload, positions (N), batch, dtype, elements (in one call), unit (of
                  elements), tolerance (of error), exponentials (the least that forward and both compute, where
                  that bounds them) and contenders, a list of
        name, ours, family (variants of which only the fastest is timed, or null)
        status            "ok", "wrong", "failed" (it raised an error), "not installed" or "slower variant"
        reason            (if failed) the error
        error             (unless failed or not installed) largest relative Frobenius norm among result and gradients
                          or, where results are discrete, share of pixels that differ
        peak_extra_bytes  (if ok) forward and, where it has a backward, both; null where unknown
        times             (if ok) for forward and, where it has them, backward and both, on a GPU also forward_graph
                          and both_graph (replays of a CUDA graph): median, spread (half the interquartile range
                          over the median), rounds, seconds (of every round)
        floor_shares      (if ok) for the timed passes that exponentials bound: the least time that those take, at
                          exponentials_a_second, over the median; empty where that is unknown
        no_graph          (where no CUDA graph could be captured) the error
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import cases
import machine
import measure
import plot
import report
import torch
import workload

import corrmatch

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {"pixel_propagate": ((41, 41), (65, 65), (101, 101)), "connected_components": ((41, 41), (101, 101))}
OTHER_SIZES = ((41, 41),)
MAP_LIMIT = 10**8  # elements of the map up to which the default batch is 4 and not 1
SHARE = {  # of the time budget, for one size
    "pixel_propagate": 4.0,
    "region_masks": 2.0,
    "region_propagate": 2.0,
    "connected_components": 1.0,
    "pseudo_label": 1.0,
    "pixel_loss": 1.0,
}
QUICK = 1.0  # seconds: what takes no longer gets a second trial when the fastest of a family is picked


def measure_case(case: workload.Case, seconds: float, device: str) -> dict[str, Any]:
    """Verifies, weighs and races the contenders of a case."""
    rows = verify(case, device)
    racing = [(c, row) for c, row in zip(case.contenders, rows, strict=True) if row["status"] == "ok"]
    for contender, row in racing:
        with torch.no_grad():
            row["peak_extra_bytes"] = {"forward": measure.peak_extra_bytes(contender.forward, device)}
        if contender.leaves:
            row["peak_extra_bytes"]["both"] = measure.peak_extra_bytes(contender.both, device)
        if device == "cuda" and not contender.on_host:
            try:
                contender.capture()
            except RuntimeError as error:  # a peer may do what a graph cannot hold
                contender.graphs.clear()
                row["no_graph"] = first_line(error)
    if racing:
        samples = measure.race([contender for contender, _ in racing], seconds, device)
        for (_, row), times in zip(racing, samples, strict=True):
            row["times"] = {name: measure.summary(values) for name, values in times.items()}
    fields = ("op", "size", "exponentials", "workload", "positions", "batch", "elements", "unit", "tolerance")
    return {name: getattr(case, name) for name in fields} | {"contenders": rows}


def verify(case: workload.Case, device: str) -> list[dict[str, Any]]:
    """Compares every contender with the oracle, and picks the fastest of each family."""
    expected = case.expected()
    rows: list[dict[str, Any]] = []
    fastest: dict[str, tuple[float, dict[str, Any]]] = {}
    for contender in case.contenders:
        row: dict[str, Any] = {"name": contender.name, "ours": contender.ours, "family": contender.family}
        rows.append(row)
        if contender.missing is not None:
            row["status"] = contender.missing
            continue
        start = measure.now(device)
        try:
            answer = contender.both() if contender.answer is None else contender.answer()
        except RuntimeError as error:  # out of memory, or no code for this device; the others can still be measured
            row |= {"status": "failed", "reason": first_line(error)}
            continue
        trial = measure.now(device) - start
        row["error"] = case.error(answer, expected)
        del answer
        row["status"] = "ok" if row["error"] <= case.tolerance else "wrong"
        if contender.family is None or row["status"] == "wrong":
            continue
        if trial < QUICK:
            start = measure.now(device)
            contender.both()
            trial = min(trial, measure.now(device) - start)
        best = fastest.get(contender.family)
        if best is not None:
            (best[1] if trial < best[0] else row)["status"] = "slower variant"
        if best is None or trial < best[0]:
            fastest[contender.family] = (trial, row)
    return rows


def first_line(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def chosen_cases(options: argparse.Namespace) -> list[tuple[str, workload.Setting]]:
    """What to measure, in order. Inputs are made later, a case at a time."""
    chosen = []
    for op in options.ops:
        for height, width in options.sizes if options.sizes is not None else SIZES.get(op, OTHER_SIZES):
            batch = options.batch
            if batch is None:
                batch = 4 if 4 * (height * width) ** 2 <= MAP_LIMIT else 1
            dtype = DTYPES[options.dtype]
            setting = workload.Setting(
                (height, width), batch, dtype, options.device, options.value_grad, options.compile
            )
            chosen.append((op, setting))
    return chosen


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=_ops, default=list(cases.OPS), help=f"comma-separated, of {', '.join(cases.OPS)}")
    parser.add_argument("--sizes", type=_sizes, help="grids: 41,65,41x33 (full resolution: 8 (n - 1) + 1)")
    parser.add_argument("--batch", type=_count, help="pictures (default: 4, or 1 where the map passes 10^8 elements)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--value-grad", action="store_true", help="gradients of value too, which the method needs not")
    parser.add_argument("--compile", action="store_true", help="add the published form under torch.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--threads", type=_count, help="CPU threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of timing, roughly (default: 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory of pixel_propagate against N")
    return parser.parse_args(arguments)


def default_device() -> str:
    """The GPU where corrmatch has a backend for it."""
    serves = any(b.available and b.devices == ("cuda",) for b in corrmatch.backends().values())
    return "cuda" if serves and torch.cuda.is_available() else "cpu"


def _ops(text: str) -> list[str]:
    unknown = [name for name in text.split(",") if name not in cases.OPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no op {unknown[0]!r}; expected some of {', '.join(cases.OPS)}")
    return text.split(",")


def _sizes(text: str) -> list[tuple[int, int]]:
    found = [re.fullmatch(r"(\d+)(?:x(\d+))?", part) for part in text.split(",")]
    sizes = [(int(m[1]), int(m[2] if m[2] is not None else m[1])) for m in found if m is not None]
    if len(sizes) < len(found) or any(min(size) < 2 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected sizes of 2 or more such as 41,65x33, got {text!r}")
    return sizes


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    start = time.perf_counter()
    options = parse(arguments)
    if options.plot is not None:
        plot.require(options.ops)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    environment = machine.environment(options.device)
    print(report.header(environment, options), flush=True)
    chosen, results, failures = chosen_cases(options), [], 0
    total = sum(SHARE[op] for op, _ in chosen)
    for i, (op, setting) in enumerate(chosen):
        if i == 0 or chosen[i - 1][0] != op:
            print(report.op_header(op), flush=True)
        for case in cases.OPS[op](setting):
            available = measure.available_bytes(options.device)
            if available is not None and case.oracle_bytes > available:
                need, have = (f"{x / 2**30:.1f} GiB" for x in (case.oracle_bytes, available))
                print(f"{case.size}: nothing measured, for the oracle needs {need} and {have} is free")
                failures += 1
                continue
            result = measure_case(case, options.budget * case.share * SHARE[op] / total, options.device)
            result["dtype"] = options.dtype
            report.add_floor_shares(result, environment["exponentials_a_second"])
            print(report.block(result), flush=True)
            failures += sum(row["status"] in ("wrong", "failed") for row in result["contenders"])
            results.append(result)
    elapsed, environment["load_after"] = time.perf_counter() - start, machine.load()
    environment["clocks_after"] = machine.clocks(options.device)
    print(report.footer(results, failures, elapsed, environment, options))
    if options.json is not None:
        command = list(sys.argv[1:] if arguments is None else arguments)
        record = {"environment": environment, "command": command, "seconds": elapsed, "failures": failures}
        options.json.write_text(json.dumps(record | {"cases": results}, indent=1) + "\n")
    if options.plot is not None:
        plot.draw(results, environment, options.plot)
    return 1 if failures > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
