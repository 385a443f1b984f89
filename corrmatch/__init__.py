"""Label propagation by correlation matching: fused, differentiable ops for PyTorch on CPUs and GPUs.

The public interface is `corrmatch.ops` (functions), `corrmatch.nn` (modules), `corrmatch.reference` (the same functions
in plain PyTorch: their definition) and `backends()`.
"""

import importlib.util

import torch  # noqa: F401  (before _C, which shares the OpenMP runtime that torch brings)

__version__ = "0.1.0"

try:
    from corrmatch import _C  # noqa: F401
except ImportError as error:
    if importlib.util.find_spec("corrmatch._C") is not None:
        raise ImportError(f"corrmatch's compiled extension is there and cannot be loaded: {error}") from error
    raise ImportError(
        "corrmatch's compiled extension is missing. This is the source tree and nothing is built in it: run "
        "`pip install -c constraints.txt .` and start Python elsewhere than in the source folder, or "
        "`pip install -c constraints.txt -e .` to work on the source in place."
    ) from error

from corrmatch import nn, ops, reference
from corrmatch.masks import RegionMasks
from corrmatch.ops.backend import backends

__all__ = ["RegionMasks", "__version__", "backends", "nn", "ops", "reference"]
