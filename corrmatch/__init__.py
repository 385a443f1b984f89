"""Label propagation by correlation matching: fused, differentiable ops for PyTorch on CPUs and GPUs.

The public interface is `corrmatch.ops` (functions), `corrmatch.nn` (modules), `corrmatch.reference` (the same functions
in plain PyTorch: their definition) and `backends()`.
"""

import torch  # noqa: F401  (before _C, which shares the OpenMP runtime that torch brings)

__version__ = "0.1.0"

try:
    from corrmatch import _C  # noqa: F401
except ImportError as error:
    from corrmatch.loading import why_not

    raise ImportError(why_not(error)) from error

from corrmatch import nn, ops, reference
from corrmatch.masks import RegionMasks
from corrmatch.ops.backend import backends

__all__ = ["RegionMasks", "__version__", "backends", "nn", "ops", "reference"]
