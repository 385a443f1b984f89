"""Which implementation serves a call. One predicate, `Backend.refusal`, both explains and decides."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from corrmatch import _C
from corrmatch.ops import cuda

HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
SMALL = 128 * 1024  # bytes; GPUs of compute capability 8.6, 8.9 and 12 have 99 KiB
ALL_OPS = frozenset(
    {"pixel_propagate", "region_masks", "region_propagate", "connected_components", "pseudo_label", "pixel_loss"}
)


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: What `backend=` calls it.
        devices: Device types whose tensors it takes; None for any.
        ops: Names of the ops it has.
        dtypes: Floating dtypes that it takes; None for any. Integers it takes all.
        channels: The most channels that it takes; None for any number.
        narrow: The most of pixel_propagate in float32 and float16 where a block has less than SMALL shared memory.
        capability: The least compute capability of a GPU that it takes, 80 for 8.0; None for any.
        automatic: Whether it may be chosen where no backend is named.
        missing: Why it cannot run in this installation; None where it can.
        detail: What is in use, for people.
    """

    name: str
    devices: tuple[str, ...] | None
    ops: frozenset[str]
    missing: str | None = None
    detail: str = ""
    dtypes: tuple[torch.dtype, ...] | None = None
    channels: int | None = None
    narrow: int | None = None
    capability: int | None = None
    automatic: bool = True

    @property
    def available(self) -> bool:
        """Whether it can run in this installation."""
        return self.missing is None

    def refusal(self, op: str, *tensors: Tensor) -> str | None:
        """Why this backend cannot serve `op` on these tensors, which are on one device; None where it can."""
        if self.missing is not None:
            return self.missing
        if op not in self.ops:
            return f"it has no {op}"
        device = tensors[0].device.type
        if self.devices is not None and device not in self.devices:
            return f"it takes tensors on {' or '.join(self.devices)}, not on {device}"
        if self.capability is not None and device == "cuda" and not torch.compiler.is_compiling():
            reason = self._refusal_of_gpu(op, *tensors)
            if reason is not None:
                return reason
        for tensor in tensors:
            if self.dtypes is not None and tensor.is_floating_point() and tensor.dtype not in self.dtypes:
                return f"it does not take {str(tensor.dtype).removeprefix('torch.')}"
            if self.channels is not None and tensor.shape[1] > self.channels:
                return f"it takes at most {self.channels} channels, not {tensor.shape[1]}"
        return None

    def _refusal_of_gpu(self, op: str, *tensors: Tensor) -> str | None:
        gpu = torch.cuda.get_device_properties(tensors[0].device)
        if self.capability is not None and 10 * gpu.major + gpu.minor < self.capability:
            least = f"{self.capability // 10}.{self.capability % 10}"
            return f"it takes GPUs of compute capability {least} or more, not {gpu.major}.{gpu.minor}"
        if self.narrow is None or op != "pixel_propagate":
            return None
        most = max(tensor.shape[1] for tensor in tensors)
        shared = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's annotations lack it
        if most <= self.narrow or shared >= SMALL or all(tensor.dtype == torch.bfloat16 for tensor in tensors):
            return None
        return f"on {gpu.name} it takes at most {self.narrow} channels of float32 or float16, not {most}"


def _known(*, gpu: bool) -> tuple[Backend, ...]:
    """All backends, best first, where there is a GPU or none."""
    return (
        _cuda(gpu),
        _triton(gpu),
        Backend("cpu", ("cpu",), ALL_OPS, detail=f"{_C.cpu.isa()} of {', '.join(_C.cpu.isas())}"),
        Backend("reference", None, ALL_OPS, detail="plain PyTorch, materialises; for checks"),
    )


def _cuda(gpu: bool) -> Backend:
    missing = None
    if cuda.KERNELS is None:
        missing = _C.cuda_status
    elif not cuda.EMULATED and not gpu:
        missing = f"no GPU ({_C.cuda_status})"
    return Backend(
        "cuda",
        ("cpu",) if cuda.EMULATED else ("cuda",),
        frozenset({"region_masks", "region_propagate", "connected_components"}),
        missing,
        detail="emulated on the CPU; for checks" if cuda.EMULATED else _C.cuda_status,
        dtypes=HALF_AND_SINGLE,
        capability=80,
        automatic=not cuda.EMULATED,
    )


def _triton(gpu: bool) -> Backend:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = "triton is not installed"
    elif not interpreted and not gpu:
        missing = "no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)"
    return Backend(
        "triton",
        ("cpu",) if interpreted else ("cuda",),
        frozenset({"pixel_propagate", "pseudo_label", "pixel_loss"}),
        missing,
        detail="interpreted on the CPU; for checks" if interpreted else "",
        dtypes=HALF_AND_SINGLE,
        channels=256,
        narrow=128,
        capability=80,
        automatic=not interpreted,
    )


# A tensor on a GPU is proof of one. To ask torch would start the driver, after which no forked process can use it.
_BACKENDS = _known(gpu=True)
NAMES = tuple(backend.name for backend in _BACKENDS)


def use_emulator(kernels: ModuleType) -> None:
    """From here on "cuda" stands for these kernels, which take tensors on a CPU: those that tests/emulator builds."""
    global _BACKENDS
    cuda.KERNELS, cuda.EMULATED = kernels, True
    _BACKENDS = _known(gpu=True)


def backends() -> dict[str, Backend]:
    """The backends by name, best first; each says whether it is available and, where it is not, why."""
    return {backend.name: backend for backend in _known(gpu=torch.cuda.is_available())}


def choose(op: str, backend: str | None, *tensors: Tensor) -> str:
    """Name of the backend that serves `op` on these tensors.

    An explicit backend that cannot serve raises ValueError with the reason. `CORRMATCH_BACKEND` counts as explicit for
    every op that the backend it names has.
    """
    if backend is None:
        backend = os.environ.get("CORRMATCH_BACKEND") or None
        if backend in NAMES and op not in _BACKENDS[NAMES.index(backend)].ops:
            backend = None
    if backend is None:
        for candidate in _BACKENDS:
            if candidate.automatic and candidate.refusal(op, *tensors) is None:
                return candidate.name
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or None, got {type(backend).__name__}")
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    reason = _BACKENDS[NAMES.index(backend)].refusal(op, *tensors)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot serve {op}: {reason}")
    return backend


def run_on_cpu(kernel: Callable[..., None], *arguments: object) -> None:
    """Calls a kernel for CPUs, which takes the number of threads last: as many as torch uses."""
    threads = torch.get_num_threads()
    if _forked is None or threads == 1:
        kernel(*arguments, threads)
    else:
        _forked.submit(kernel, *arguments, threads).result()


# OpenMP keeps the threads that it has started for the thread that calls it. A fork copies that thread and not those, so
# that it would wait for them for good; a thread that begins after the fork has none yet, and starts its own.
_forked: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _forked
    _forked = ThreadPoolExecutor(1, "corrmatch")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
