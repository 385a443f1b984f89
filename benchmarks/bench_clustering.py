"""Balanced k-means at real sizes: time, memory, sizes and cost. Runs on a CPU.

    OMP_NUM_THREADS=2 python benchmarks/bench_clustering.py [--points 300000] [--channels 256] [--clusters 120]

The points are random: 300 groups of unequal sizes in 40 dimensions, mixed into the channels, and noise. They are stored
in half precision in a file, as features between two phases are. Then the best assignment to given centres is timed
against the exact solver of scipy, at a size that this solver can handle.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, measure
from scipy.optimize import linear_sum_assignment

from corrmatch.methods.parts.clustering import assign, balanced_kmeans, distances, means, parts

GROUPS, DIMENSIONS = 300, 40


def draw(path: Path, count: int, channels: int) -> np.ndarray:
    """Points (count, channels) in float16, a memory map of the file."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(DIMENSIONS, channels))
    middles = rng.normal(size=(GROUPS, DIMENSIONS))
    group = rng.choice(GROUPS, count, p=rng.dirichlet(np.ones(GROUPS)))
    points = np.lib.format.open_memmap(path, "w+", np.float16, (count, channels))
    for rows in parts(count):
        inner = middles[group[rows]] + 0.7 * rng.normal(size=(len(group[rows]), DIMENSIONS))
        points[rows] = (inner @ mixed + rng.normal(size=(len(inner), channels))) / 4
    points.flush()
    return np.load(path, mmap_mode="r")


def spread(points: np.ndarray, labels: np.ndarray, clusters: int) -> float:
    """The mean squared distance of points from the means of their clusters."""
    centres = means(points, labels, clusters)
    squares = [np.square(points[rows] - centres[labels[rows]]).sum() for rows in parts(len(points))]
    return float(sum(squares)) / len(points)


def clustering(points: np.ndarray, clusters: int) -> dict[str, Any]:
    """Measures the whole: seconds, memory, sizes, cost, and the cost of an unbalanced assignment to the same means."""
    labels, seconds = np.empty(0), [0.0, 0.0]

    def run() -> None:
        nonlocal labels
        before = time.perf_counter(), time.process_time()
        labels = balanced_kmeans(points, clusters, np.random.default_rng(0))
        seconds[:] = time.perf_counter() - before[0], time.process_time() - before[1]

    peak = measure.peak_extra_bytes(run, "cpu")
    sizes = np.bincount(labels, minlength=clusters)
    return {
        "seconds": seconds[0], "processor_seconds": seconds[1], "peak_extra_bytes": peak,
        "sizes": [int(sizes.min()), int(sizes.max())], "spread": spread(points, labels, clusters),
    }  # fmt: skip


def against_scipy(points: np.ndarray, clusters: int) -> dict[str, Any]:
    """Measures one balanced assignment to random centres: seconds and cost of both solvers."""
    cost = distances(points, points[:clusters].astype(np.float64)).astype(np.float64)
    start = time.perf_counter()
    labels, _ = assign(cost)
    middle = time.perf_counter()
    slots = np.repeat(np.arange(clusters), len(points) // clusters)
    rows, taken = linear_sum_assignment(cost[:, slots])
    end = time.perf_counter()
    found = [float(cost[rows, x].sum()) for x in (labels, slots[taken])]
    return {"points": len(points), "clusters": clusters, "seconds": [middle - start, end - middle], "cost": found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures. Returns 1 if sizes are not balanced or the costs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=300_000)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=120)
    parser.add_argument("--exact", type=int, default=3000, help="points of the comparison with scipy")
    parser.add_argument("--json", type=Path, help="gets the figures too")
    options = parser.parse_args(arguments)
    environment = machine.environment("cpu")
    with tempfile.TemporaryDirectory() as folder:
        points = draw(Path(folder) / "points.npy", options.points, options.channels)
        whole = clustering(points, options.clusters)
        few = max(1, options.exact // 125)
        small = against_scipy(points[: options.exact // few * few], few)
    figures = {"environment": environment, "clustering": whole, "assignment": small}
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"corrmatch {environment['corrmatch']}, commit {environment['commit']}, numpy {environment['numpy']}")
    print(f"{environment['device']}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, {environment['date']}")
    print(f"load {environment['load']:.1f} at the start: other processes may run on this machine\n")
    peak = "n/a" if whole["peak_extra_bytes"] is None else f"{whole['peak_extra_bytes'] / 2**20:.0f} MiB"
    print(f"{options.points} points of {options.channels} channels in {options.clusters} clusters")
    print(f"  {whole['seconds']:.1f} s, {whole['processor_seconds']:.1f} s of processor time, peak extra memory {peak}")
    print(f"  sizes {whole['sizes'][0]} to {whole['sizes'][1]}, mean squared distance {whole['spread']:.3f}")
    print(f"one assignment of {small['points']} points to {small['clusters']} clusters")
    print(
        f"  {small['seconds'][0]:.2f} s, scipy's exact solver {small['seconds'][1]:.2f} s, cost {small['cost'][0]:.6g}"
    )
    balanced = whole["sizes"][1] - whole["sizes"][0] <= 1
    return 0 if balanced and np.isclose(*small["cost"], rtol=1e-9) else 1


if __name__ == "__main__":
    sys.exit(main())
