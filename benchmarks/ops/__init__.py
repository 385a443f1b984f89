"""What is measured, one file an op: inputs, contenders, the oracle's answer and the distance from it.

Each file has a `BENCHMARK`. The oracle is `corrmatch.reference` on the inputs in float64. Nothing here is timed.
"""

from __future__ import annotations

import importlib
import pkgutil

from harness.case import Benchmark

_found: list[Benchmark] = [
    importlib.import_module(f"ops.{module.name}").BENCHMARK for module in pkgutil.iter_modules(__path__)
]
OPS = {benchmark.op: benchmark for benchmark in sorted(_found, key=lambda x: (-x.share, x.op))}
