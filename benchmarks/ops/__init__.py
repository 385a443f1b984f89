"""The benchmarks of the ops, one file for each: inputs, contenders, the result of the oracle and the errors.

Each file has a `BENCHMARK`. The oracle is `corrmatch.reference` on the inputs in float64. This package times nothing.
"""

from __future__ import annotations

import importlib
import pkgutil

from harness.case import Benchmark

_found: list[Benchmark] = [
    importlib.import_module(f"ops.{module.name}").BENCHMARK for module in pkgutil.iter_modules(__path__)
]
OPS = {benchmark.op: benchmark for benchmark in sorted(_found, key=lambda x: (-x.share, x.op))}
