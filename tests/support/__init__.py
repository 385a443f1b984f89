"""What the tests know of each op, one file an op: tests that go over all ops find it in `OPS`.

Each file has
    FUNCTIONS       names of its public functions
    SAMPLES         {name: make}; make(size, device, **options) gives a call and its tensors, on random inputs
    DIFFERENTIABLE  names of the samples that have gradients: of the maps, which come first
    RANDOM          {make: weight}: random calls for the fuzzer, each with what agreement with the oracle means
    CONTRACT        {operator of the extension: check of what it may rely on}
    VALID           calls with valid arguments, all of them keywords that can be changed
    WRONG           (call, arguments, exception, start of the message)
    DENSE           (call, further arguments, name of a tensor, that tensor): a sparse one is refused
    TOO_LARGE       {argument: call with an image of too many pixels}
    opcheck_calls   a generator of registered ops and arguments, without the backend that they take last
    opcheck_others  the same of its registered ops that take no backend
and, where it has Triton kernels,
    LINEAR          those that are linear in the positions, by the names of `kernels.inspect`
    LAUNCHES        {module: names of its kernels} and large_batch(maps), which launches each of them
"""

from __future__ import annotations

import importlib
import pkgutil

OPS = {module.name: importlib.import_module(f"support.{module.name}") for module in pkgutil.iter_modules(__path__)}
