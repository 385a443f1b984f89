"""Which implementation serves a call. One predicate, `Backend.refusal`, both explains and decides."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from corrmatch import _C

ALL_OPS = frozenset({"pixel_propagate", "region_masks", "region_propagate", "connected_components", "pseudo_label"})


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: What `backend=` calls it.
        devices: Device types whose tensors it takes; None for any.
        ops: Names of the ops it has.
        missing: Why it cannot run in this installation; None where it can.
        detail: What is in use, for people.
    """

    name: str
    devices: tuple[str, ...] | None
    ops: frozenset[str]
    missing: str | None = None
    detail: str = ""

    @property
    def available(self) -> bool:
        """Whether it can run in this installation."""
        return self.missing is None

    def refusal(self, op: str, tensor: Tensor) -> str | None:
        """Why this backend cannot serve `op` on tensors like this one; None where it can."""
        if self.missing is not None:
            return self.missing
        if op not in self.ops:
            return f"it has no {op}"
        if self.devices is not None and tensor.device.type not in self.devices:
            return f"it takes tensors on {' or '.join(self.devices)}, not on {tensor.device.type}"
        return None


def _known() -> tuple[Backend, ...]:
    """All backends, best first."""
    return (
        Backend("cuda", ("cuda",), frozenset(), _C.cuda_status),
        Backend("triton", ("cuda",), frozenset(), "this version has no Triton kernels"),
        Backend("cpu", ("cpu",), ALL_OPS, detail=f"{_C.cpu.isa()} of {', '.join(_C.cpu.isas())}"),
        Backend("reference", None, ALL_OPS, detail="plain PyTorch, materialises; for checks"),
    )


_BACKENDS = _known()
NAMES = tuple(backend.name for backend in _BACKENDS)


def backends() -> dict[str, Backend]:
    """The backends by name, best first; each says whether it is available and, where it is not, why."""
    return {backend.name: backend for backend in _known()}


def choose(op: str, backend: str | None, tensor: Tensor) -> str:
    """Name of the backend that serves `op` on tensors like `tensor`.

    An explicit backend that cannot serve raises ValueError with the reason. `CORRMATCH_BACKEND` counts as explicit for
    every op that the backend it names has.
    """
    if backend is None:
        backend = os.environ.get("CORRMATCH_BACKEND") or None
        if backend in NAMES and op not in _BACKENDS[NAMES.index(backend)].ops:
            backend = None
    if backend is None:
        for candidate in _BACKENDS:
            if candidate.refusal(op, tensor) is None:
                return candidate.name
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or None, got {type(backend).__name__}")
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    reason = _BACKENDS[NAMES.index(backend)].refusal(op, tensor)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {op}: {reason}")
    return backend


def check_values(tensor: Tensor) -> bool:
    """Whether values are to be checked: always on a CPU, elsewhere on request, for it synchronises with the host."""
    return tensor.device.type == "cpu" or os.environ.get("CORRMATCH_CHECK") == "1"


def borrow(tensor: Tensor | None) -> _C.Tensor | None:
    """The tensor as the extension sees it. The caller keeps it alive during the call."""
    if tensor is None:
        return None
    return _C.Tensor(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tensor.shape, tensor.stride())


def threads() -> int:
    """Number of threads the CPU kernels may use."""
    return torch.get_num_threads()
